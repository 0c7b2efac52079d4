"""Train a recipe with modified settings in `bare_loop.py`, and evaluate it on the validation split.

The loss equals that of `minigpt evaluate`. Nothing is saved except the token streams in the cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import bare_loop
from transformers import set_seed

from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.data.blocks import SequenceDataset
from minigpt_hf.data.stream import TokenStream
from minigpt_hf.inference.evaluation import score_documents
from minigpt_hf.training.arguments import Settings
from minigpt_hf.training.initialize import build_config, build_model
from minigpt_hf.training.recipe import parse_arguments
from minigpt_hf.training.text import prepare_text

QUIET = ("--output_dir", "unused", "--eval_strategy", "no", "--save_strategy", "no", "--logging_steps", "1000000")


@dataclass
class Trial:
    """A prepared training run."""

    arguments: Settings
    model: MiniGPTForCausalLM
    dataset: SequenceDataset
    validation: TokenStream

    def run(self) -> float:
        """Train and return the validation loss, in nats per token."""
        data, _, training = self.arguments
        bare_loop.train_model(self.model, self.dataset, training)
        bos_token_id = self.validation.bos_token_id
        documents = self.validation.iterate_documents()
        nats, tokens, _ = score_documents(self.model, documents, bos_token_id, data.block_size, batch_size=32)
        return nats / tokens


def prepare(
    recipe: str,
    flags: Sequence[str],
    *,
    initialize: Callable[[MiniGPTForCausalLM], None] = lambda model: None,
    dataset_class: type[SequenceDataset] = SequenceDataset,
) -> Trial:
    """Resolve the settings, prepare the data and initialize the model.

    Args:
        recipe: Name or path of a recipe.
        flags: Flags of `minigpt train` that override it.
        initialize: Modifies the initialized weights in place.
        dataset_class: The dataset that splits the token stream into sequences.
    """
    arguments = data, architecture, training = parse_arguments([*QUIET, *flags], recipe)
    bare_loop.check(arguments)
    set_seed(training.seed)
    text = prepare_text(data)
    config = build_config(architecture, data.block_size, text.tokenizer)
    model = build_model(config, architecture).to(training.device)
    initialize(model)
    return Trial(arguments, model, dataset_class(text.train, data.block_size, training.seed), text.validation)
