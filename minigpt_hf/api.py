"""The package in Python: train, evaluate, generate, load. The command line is a thin skin over these.

    folder = minigpt_hf.train(data="notes.txt", output_dir="runs/notes", max_steps=300)
    print(folder.results["bits_per_byte"], folder.generate("Dear ")[0])

In: folders and texts by name. Out: model folders, figures, texts. What a user can put right is a `MiniGPTError` that says in
one line what was given, why it cannot be, and what to do.
"""

import logging
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import MiniGPTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .inference.evaluation import Score


logger = logging.getLogger(__name__)

SPLITS = ("all", "train", "validation")

# Estimates the length of a window in characters for a model that does not state it: about 4 for English and byte-level BPE.
CHARACTERS_PER_TOKEN = 4
# The settings of a model's recipe that `evaluate` uses, and their types.
USED_OF_A_RECIPE = {
    ("validation_characters", "block_size", "per_device_eval_batch_size"): int,
    ("validation_fraction",): int | float,
    ("encoding", "encoding_errors", "newline", "data_split", "text_column", "data_format"): str,
}


@dataclass(frozen=True)
class ModelFolder(os.PathLike):
    """A trained model on disk: a path that every `from_pretrained` takes, and what is known of it."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def about(self) -> dict[str, Any]:
        """The content of `minigpt.json`: recipe, data, tokenizer, training, results, sample."""
        from .trust import read_metadata

        if not (self.path / "minigpt.json").is_file():
            raise MiniGPTError(f"{self.path}: there is no minigpt.json in it; give a model folder")
        return read_metadata(self.path)

    @property
    def results(self) -> dict[str, float]:
        """The validation score it was published with (see `Score`); empty if nothing was held out."""
        return self.about["results"]

    def load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """See `load`."""
        return load(self)

    def evaluate(self, data: str, **settings) -> "Score":
        """See `evaluate`."""
        return evaluate(self, data, **settings)

    def generate(self, prompt: str = "", **options) -> list[str]:
        """See `generate`."""
        return generate(self, prompt, **options)


def train(
    data: str | None = None, recipe: str | None = None, output_dir: str | os.PathLike | None = None, **overrides: Any
) -> ModelFolder:
    """Train a GPT and return its model folder; a run that was interrupted goes on, exactly.

    Args:
        data: What to learn from, see `load_corpus`; default: as the recipe says.
        recipe: Name of a recipe, or a YAML file. Default: `lora` with `lora_rank`, `finetune` with `init_from`, none with
            `minutes` or `size`, `auto` with `data` (what is not given is chosen to fit the text), else `demo`.
        output_dir: Folder of the run; default: `runs/` and the recipe's name.
        overrides: Any setting of a recipe by name, `max_steps=300` (steps), `block_size=128` (tokens),
            `learning_rate=4e-3`; those of `TrainingArguments` included.

    Returns:
        The folder `model` in `output_dir`.

    Raises:
        MiniGPTError: for settings that do not exist or cannot be, a text that cannot be read, a folder in use.
        TrainingStopped: if the run ended early: by a signal, a full disk, or a loss that is no number.
    """
    from .training.recipe import parse_arguments

    named = {"data": data, "output_dir": None if output_dir is None else os.fspath(output_dir)}
    arguments = parse_arguments([], recipe, **{k: v for k, v in named.items() if v is not None}, **overrides)
    from .training import train as run

    return ModelFolder(run.train(arguments))


def evaluate(
    model: str | os.PathLike,
    data: str,
    *,
    split: Literal["all", "train", "validation"] = "all",
    validation_fraction: float | None = None,
    encoding: str | None = None,
    encoding_errors: str | None = None,
    newline: str | None = None,
    data_split: str | None = None,
    text_column: str | None = None,
    data_format: str | None = None,
    max_characters: int | None = None,
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
) -> "Score":
    """Score a text with any causal LM: loss in nats per token, perplexity, bits per byte.

    Args:
        model: A model folder or Hub id.
        data: The text, see `load_corpus`.
        split: Which part of it, as training cuts it; `all` includes a validation split that comes with the text.
        validation_fraction, encoding, encoding_errors, newline, data_split, text_column, data_format: How it is read and
            cut; default: as the model's training did.
        max_characters: Score a sample of about this many characters from all documents; default: for the validation part
            the sample that training scored, otherwise everything.
        block_size: Inputs in a window, in tokens; default: what the model was trained on.
        stride: Tokens scored in a window; default: `block_size`.
        batch_size: Windows at a time; default: as in the model's training, whose score is then repeated exactly, or 16.
        trust_remote_code: Run code that the model brings along; a MiniGPT needs none here.

    Raises:
        MiniGPTError: if there is no such model or text, or nothing is held out.
    """
    if split not in SPLITS:
        raise MiniGPTError(f"split is {split!r}: give one of {', '.join(SPLITS)}")
    if not isinstance(data, str | os.PathLike):
        raise MiniGPTError(
            f"data is a {type(data).__name__}: give one name; several are a mixture, 'plays:0.7,notes:0.3'"
        )
    data = os.fspath(data)

    from .data.corpus import load_corpus
    from .data.documents import Mixture
    from .data.prepared import ValidationSample, report_lossy_tokenizer, warn_if_sample_is_small
    from .data.sources import has_split
    from .inference.evaluation import evaluate_texts, longest_context

    if max_characters is not None and max_characters < 1:
        raise MiniGPTError(f"max_characters is {max_characters}: it must be at least 1")
    loaded, tokenizer = load(model, trust_remote_code)
    recipe = recipe_of(model)

    def given_or_as_trained(name: str, value: Any, default: Any = None) -> Any:
        return recipe.get(name, default) if value is None else value

    trained_split = recipe.get("data_split")
    if data_split is None and trained_split and has_split(data, trained_split):
        data_split = trained_split
    corpus = load_corpus(
        data,
        0.0 if split == "all" else given_or_as_trained("validation_fraction", validation_fraction, 0.1),
        given_or_as_trained("encoding", encoding, "utf-8"),
        encoding_errors=given_or_as_trained("encoding_errors", encoding_errors, "strict"),
        newline=given_or_as_trained("newline", newline, "preserve"),
        split=data_split,
        text_column=given_or_as_trained("text_column", text_column),
        data_format=given_or_as_trained("data_format", data_format),
    )
    whole = corpus.validation if split == "validation" else corpus.train
    if split == "all" and corpus.unused is not None:
        whole = Mixture.joined([corpus.train, corpus.unused])
        logger.info("scored with the text: the validation split that comes with it")
    if whole is None or whole.characters == 0:
        raise MiniGPTError(f"nothing of {data} is held out for validation; say how much with --validation_fraction")
    if max_characters is None and split == "validation":
        max_characters = recipe.get("validation_characters")
    block_size = given_or_as_trained("block_size", block_size)
    if batch_size is None:  # the default of `TrainingArguments`, 8, is not written into recipes
        batch_size = recipe.get("per_device_eval_batch_size", 8) if recipe else 16
    texts = whole
    if max_characters is not None:
        window = window_characters_of(model) or CHARACTERS_PER_TOKEN * (block_size or longest_context(loaded))
        texts = whole.sample(max_characters, window)
        if None not in (whole.characters, texts.characters):
            sample = ValidationSample(
                texts.number_of_documents, whole.number_of_documents, texts.characters, whole.characters, window
            )
            logger.info("scored: %s", sample)
    if tokenizer.is_fast:
        report_lossy_tokenizer(tokenizer, texts)
    score = evaluate_texts(loaded, tokenizer, texts, block_size, stride, batch_size)
    remedy = "give more text" if texts is whole else "raise --max_characters"
    warn_if_sample_is_small(score.tokens, score.bytes, remedy)
    return score


def generate(
    model: str | os.PathLike,
    prompt: str = "",
    *,
    seed: int | None = None,
    special_tokens: bool = False,
    trust_remote_code: bool = False,
    **options,
) -> list[str]:
    """Continue a prompt with any causal LM, or begin a document if there is none.

    Args:
        model: A model folder or Hub id.
        prompt: What the text starts with.
        seed: Makes sampling repeatable.
        special_tokens: Whether a prompt that spells a special token such as `<|endoftext|>` stands for that token; by
            default it is text, as in training.
        trust_remote_code: Run code that the model brings along; a MiniGPT needs none here.
        options: Any attribute of `GenerationConfig`: `max_new_tokens` (default 200), `temperature`, `top_k`, …

    Returns:
        `num_return_sequences` texts, each with its prompt.

    Raises:
        MiniGPTError: if there is no such model, an option does not exist, or the prompt cannot be encoded.
    """
    from .inference.generation import generate

    if "max_length" not in options:
        options.setdefault("max_new_tokens", 200)
    loaded, tokenizer = load(model, trust_remote_code)
    return generate(loaded, tokenizer, prompt, seed=seed, special_tokens=special_tokens, **options)


def load(
    model: str | os.PathLike, trust_remote_code: bool = False
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer of a folder or Hub id, on the accelerator if there is one, ready to generate.

    Raises:
        MiniGPTError: if there is no model there, or it brings code that is not trusted.
    """
    from .inference.generation import load

    return load(os.fspath(model), trust_remote_code)


def window_characters_of(model: str | os.PathLike) -> int | None:
    """Length in characters of the windows that the validation sample of a training consisted of; `None` if unknown."""
    from .trust import read_metadata

    found: Any = read_metadata(model)
    for key in ("data", "validation", "window_characters"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, int) and found > 0 else None


def recipe_of(model: str | os.PathLike) -> dict[str, Any]:
    """What `minigpt.json` says of how a model folder was trained; nothing, if it is not one of ours.

    Raises:
        MiniGPTError: if it is malformed, or a setting that evaluation uses is of another type.
    """
    from .trust import read_metadata

    about = read_metadata(model)
    recipe = about.get("recipe", {} if not about else None)
    if not isinstance(recipe, dict):
        raise MiniGPTError(f"{model}: minigpt.json has no `recipe`; restore it from where the model was trained")
    for names, kind in USED_OF_A_RECIPE.items():
        for name in names:
            if (value := recipe.get(name)) is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                raise MiniGPTError(
                    f"{model}: minigpt.json has {name} {reprlib.repr(value)}; restore it from where the model was trained"
                )
    return recipe
