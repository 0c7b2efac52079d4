"""A recipe with some settings changed, trained by `bare_loop.train_model` and scored on the validation text.

In: flags of `minigpt train`, and what no flag can say. Out: the validation loss, exactly that of `minigpt evaluate`. It
writes nothing but the token streams in the cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import bare_loop
from transformers import set_seed

from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.data.blocks import Blocks
from minigpt_hf.data.stream import TokenStream
from minigpt_hf.evaluation import score_documents
from minigpt_hf.run import make_config, make_model, prepare_text
from minigpt_hf.training.arguments import Arguments
from minigpt_hf.training.recipe import parse_arguments

QUIET = ("--output_dir", "unused", "--eval_strategy", "no", "--save_strategy", "no", "--logging_steps", "1000000")


@dataclass
class Trial:
    """A training that is ready to start."""

    arguments: Arguments
    model: MiniGPTForCausalLM
    blocks: Blocks
    validation: TokenStream

    def run(self) -> float:
        """Train, and return the validation loss in nats per token."""
        data, _, training = self.arguments
        bare_loop.train_model(self.model, self.blocks, training)
        opening = self.validation.end_of_text
        nats, tokens, _ = score_documents(self.model, self.validation.texts(), opening, data.block_size, batch_size=32)
        return nats / tokens


def prepare(
    recipe: str,
    flags: Sequence[str],
    *,
    start: Callable[[MiniGPTForCausalLM], None] = lambda model: None,
    cut: type[Blocks] = Blocks,
) -> Trial:
    """Read settings and text, and make the model.

    Args:
        start: Changes the fresh weights.
        cut: How the stream is cut into blocks.
    """
    arguments = data, architecture, training = parse_arguments([*QUIET, *flags], recipe)
    set_seed(training.seed)
    text = prepare_text(data)
    config = make_config(architecture, data.block_size, text.tokenizer)
    model = make_model(config, architecture).to(training.device)
    start(model)
    return Trial(arguments, model, cut(text.train, data.block_size, training.seed), text.validation)
