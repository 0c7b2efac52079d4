"""The Python interface: train, evaluate, generate, load.

    folder = minigpt_hf.train(data="notes.txt", output_dir="runs/notes", max_steps=300)
    print(folder.results["bits_per_byte"], folder.generate("Dear ")[0])

Invalid input raises `MiniGPTError`, whose message states in one line what was given, why it is invalid, and what to do.
"""

import logging
import os
import reprlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import MiniGPTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .data.documents import Documents
    from .inference.answers import AnswerScore
    from .inference.evaluation import Score
    from .inference.suites import TaskResult


logger = logging.getLogger(__name__)

_training = threading.Lock()  # held while this process trains
SPLITS = ("all", "train", "validation")

# Estimates the window length in characters if a model does not state it; typical of English and byte-level BPE.
CHARACTERS_PER_TOKEN = 4
# How a text is read, as in `load_corpus`: names and types of the keywords of `evaluate`.
READING: dict[str, tuple[type, ...]] = {
    "validation_fraction": (int, float),
    **dict.fromkeys(("encoding", "encoding_errors", "newline", "data_split", "text_column", "data_format"), (str,)),
    "chat": (bool,),
    "system": (str,),
}
# Settings of a model's recipe that `evaluate` uses, and their types.
EVALUATION_SETTINGS = {
    ("validation_characters", "block_size", "per_device_eval_batch_size"): int,
    ("validation_fraction",): int | float,
    ("encoding", "encoding_errors", "newline", "data_split", "text_column", "data_format", "system"): str,
    ("chat",): bool,
}


@dataclass(frozen=True)
class ModelFolder(os.PathLike):
    """A model folder: a path for any `from_pretrained`, with access to its metadata."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def metadata(self) -> dict[str, Any]:
        """The content of `minigpt.json`: recipe, data, tokenizer, training, results, sample."""
        from .trust import read_metadata

        if not (self.path / "minigpt.json").is_file():
            raise MiniGPTError(f"{self.path}: it has no minigpt.json; give a model folder")
        return read_metadata(self.path)

    @property
    def results(self) -> dict[str, float]:
        """The published validation score (see `Score`); empty if there was no validation split."""
        return self.metadata["results"]

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
    data: str | os.PathLike | None = None,
    recipe: str | os.PathLike | None = None,
    output_dir: str | os.PathLike | None = None,
    **overrides: Any,
) -> ModelFolder:
    """Train a GPT and return its model folder. An interrupted run is resumed exactly.

    torch has one random state per process. Code that draws random numbers in another thread meanwhile changes dropout, so the
    run cannot be repeated exactly.

    Args:
        data: Training text, see `load_corpus`. Default: that of the recipe.
        recipe: Name of a recipe, or a YAML file. Default: `lora` with `lora_rank`, `finetune` with `init_from`, none with
            `minutes` or `size`, `auto` with `data` (settings that are not given are chosen for the text), else `demo`.
        output_dir: Run folder. Default: `runs/` and the name of the recipe.
        overrides: Any setting of a recipe, including the fields of `TrainingArguments`: `max_steps=300` (steps),
            `block_size=128` (tokens), `learning_rate=4e-3`.

    Returns:
        The folder `model` in `output_dir`.

    Raises:
        MiniGPTError: if a setting is unknown or invalid, the text cannot be read, or the folder is in use.
        TrainingStopped: if the run ended early: a signal, a full disk, or a non-finite loss.
    """
    if not _training.acquire(blocking=False):
        raise MiniGPTError(
            "another thread of this process is training, and accelerate has one state per process: wait for it, or train in "
            "another process"
        )
    try:
        return _train(data, recipe, output_dir, overrides)
    finally:
        _training.release()


def _train(
    data: str | os.PathLike | None,
    recipe: str | os.PathLike | None,
    output_dir: str | os.PathLike | None,
    overrides: dict[str, Any],
) -> ModelFolder:
    from .training.recipe import parse_arguments

    paths = {"data": data, "recipe": recipe, "output_dir": output_dir}
    for name, value in paths.items():
        check_type(name, value, str, os.PathLike, type(None))
    named = {name: os.fspath(value) for name, value in paths.items() if value is not None}
    from .training import train as run
    from .training.safeguards import preserved_global_state

    with preserved_global_state():
        return ModelFolder(run.train(parse_arguments([], **named, **overrides)))


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
    chat: bool | None = None,
    system: str | None = None,
    max_characters: int | None = None,
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
) -> "Score":
    """Evaluate any causal LM on a text: loss in nats per token, perplexity, bits per byte.

    Args:
        model: A model folder or Hub id.
        data: The text, see `load_corpus`.
        split: Part of the text, divided as in training; `all` includes a separate validation split of the data set.
        validation_fraction, encoding, encoding_errors, newline, data_split, text_column, data_format: How the text is read
            and divided. Default: as in the model's training.
        chat: Evaluate the answers of conversations, the rows of tables. Default: as in the model's training.
        system: With `chat`, system message of conversations that have none. Default: as in the model's training.
        max_characters: Evaluate a sample of about this many characters from all documents. Default: for the validation split
            the sample that training evaluated, otherwise the entire text.
        block_size: Maximum number of input tokens in a window. Default: that of training.
        stride: Number of tokens scored in a window. Default: `block_size`.
        batch_size: Number of windows per forward pass. Default: that of the model's training, which reproduces its score
            exactly, or 16.
        trust_remote_code: Run the code in the model's repository; not needed for MiniGPT models.

    Raises:
        MiniGPTError: if the model or the text cannot be loaded, or there is no validation split.
    """
    counts = {"max_characters": max_characters, "block_size": block_size, "stride": stride, "batch_size": batch_size}
    for name, count in counts.items():
        check_type(name, count, int, type(None))
    reading = {
        "validation_fraction": validation_fraction,
        "encoding": encoding,
        "encoding_errors": encoding_errors,
        "newline": newline,
        "data_split": data_split,
        "text_column": text_column,
        "data_format": data_format,
        "chat": chat,
        "system": system,
    }
    data = check_data(data, split, reading)

    from .data.conversations import conversations_in
    from .data.prepared import ValidationSample, report_lossy_tokenizer, warn_if_sample_is_small
    from .inference.evaluation import changed_arithmetic, evaluate_conversations, evaluate_texts, longest_context
    from .trust import checked_folder

    if max_characters is not None and max_characters < 1:
        raise MiniGPTError(f"max_characters is {max_characters}: it must be at least 1")
    if validation_fraction is not None and not 0 <= validation_fraction < 1:
        raise MiniGPTError(f"validation_fraction is {validation_fraction}: it must be in [0, 1), e.g. 0.1")
    loaded, tokenizer = load(model, trust_remote_code)
    if fault := changed_arithmetic(loaded.device.type):
        logger.warning(f"torch's {fault} before evaluating: the score differs from that with the default settings")
    folder = checked_folder(os.fspath(model), trust_remote_code)  # of a Hub id: its cached snapshot
    recipe = recipe_of(folder)

    chat = recipe.get("chat", False) if chat is None else chat
    if chat and (max_characters is not None or stride is not None):
        raise MiniGPTError(
            "max_characters and stride do not apply to conversations, which are scored in full: omit them"
        )
    whole = read_part(data, split, recipe, reading)
    if max_characters is None and split == "validation":
        max_characters = recipe.get("validation_characters")
    block_size = recipe.get("block_size") if block_size is None else block_size
    if batch_size is None:  # recipes omit the default of `TrainingArguments`, 8
        batch_size = recipe.get("per_device_eval_batch_size", 8) if recipe else 16
    if chat:
        logger.info("scored: the answers of conversations, each given the messages before it")
        return evaluate_conversations(loaded, tokenizer, conversations_in(whole), block_size, batch_size)
    texts = whole
    if max_characters is not None:
        window = window_characters_of(folder) or CHARACTERS_PER_TOKEN * (block_size or longest_context(loaded))
        texts = whole.sample(max_characters, window)
        documents, characters = texts.number_of_documents, texts.characters
        if documents is not None and characters is not None:  # not a stream
            sample = ValidationSample(documents, whole.number_of_documents, characters, whole.characters, window)
            logger.info("scored: %s", sample)
    if tokenizer.is_fast:
        report_lossy_tokenizer(tokenizer, texts)
    score = evaluate_texts(loaded, tokenizer, texts, block_size, stride, batch_size, texts.number_of_documents)
    remedy = "give more text" if texts is whole else "raise --max_characters"
    warn_if_sample_is_small(score.tokens, score.bytes, remedy)
    return score


def score_answers(
    model: str | os.PathLike,
    data: str | os.PathLike,
    metric: str,
    *,
    split: Literal["all", "train", "validation"] = "all",
    batch_size: int | None = None,
    save: bool = False,
    trust_remote_code: bool = False,
    **reading: Any,
) -> "tuple[AnswerScore, list[dict[str, str]]]":
    """Generate the last answer of each conversation and compare it with the given one.

    Args:
        model: A model folder or Hub id.
        data: Conversations, the rows of tables; see `data.conversations`.
        metric: `exact`, `chrf`, `bleu` or `rouge`; see `inference.answers`.
        split: Part of the conversations, divided as in training.
        batch_size: Answers that are generated together. Default: 32.
        save: Add the score to `minigpt.json` and the card of the model folder; if that is not possible, the reason is logged.
        trust_remote_code: Run the code in the model's repository; not needed for MiniGPT models.
        reading: `validation_fraction`, `encoding`, …, `system`, as in `evaluate`.

    Returns:
        The score, and for each conversation its question, reference and answer.

    Raises:
        MiniGPTError: if the model or the conversations cannot be loaded.
    """
    reading = {**dict.fromkeys(READING), **reading, "chat": True}
    if unknown := reading.keys() - READING:
        raise MiniGPTError(f"{min(unknown)} does not apply to generated answers: omit it")
    check_type("batch_size", batch_size, int, type(None))
    if batch_size is not None and batch_size < 1:
        raise MiniGPTError(f"batch_size is {batch_size}: it must be at least 1")
    data = check_data(data, split, reading)

    from tqdm.auto import tqdm

    from .data.conversations import conversations_in
    from .data.corpus import public_name
    from .inference.answers import score_answers
    from .publish.model_folder import save_score

    loaded, tokenizer = load(model, trust_remote_code)
    documents = read_part(data, split, recipe_of(model), reading)
    with tqdm(total=documents.number_of_documents, desc="answering", delay=2, leave=False) as bar:
        result = score_answers(loaded, tokenizer, conversations_in(documents), metric, batch_size or 32, bar.update)
    if save:
        identity = {"name": public_name(data), "split": split, "fingerprint": documents.fingerprint}
        try:
            save_score(Path(model), {"data": identity, **result[0].to_dict()})
        except (MiniGPTError, OSError) as error:  # the result of a long computation is returned
            logger.warning("the score is not saved: %s", error)
        else:
            logger.info("saved in minigpt.json and README.md of %s", model)
    return result


def evaluate_tasks(
    model: str | os.PathLike,
    tasks: Sequence[str],
    *,
    task_path: str | os.PathLike | None = None,
    batch_size: int | None = None,
    save: bool = False,
    trust_remote_code: bool = False,
) -> "list[TaskResult]":
    """Evaluate a model on tasks of lm-evaluation-harness, which is the extra `suites`.

    Args:
        model: A model folder or Hub id.
        tasks: Names of tasks or groups, or patterns: `["blimp", "arithmetic_1dc"]`.
        task_path: Folder of further tasks, YAML files of the harness. Python functions that they refer to are executed.
        batch_size: Number of requests per forward pass. Default: 16.
        save: Add the results to `minigpt.json` and the card of the model folder; if that is not possible, the reason is
            logged.
        trust_remote_code: Run the code in the model's repository; not needed for MiniGPT models.

    Returns:
        Each metric of each task, with its standard error.

    Raises:
        MiniGPTError: if the model, the harness, a task or its data cannot be loaded.
    """
    check_type("task_path", task_path, str, os.PathLike, type(None))
    check_type("batch_size", batch_size, int, type(None))
    if batch_size is not None and batch_size < 1:
        raise MiniGPTError(f"batch_size is {batch_size}: it must be at least 1")
    if isinstance(tasks, str) or not tasks or not all(isinstance(name, str) and name for name in tasks):
        raise MiniGPTError(f"tasks is {reprlib.repr(tasks)}: give a list of names")

    from .inference.suites import evaluate_tasks
    from .publish.model_folder import save_tasks

    loaded, tokenizer = load(model, trust_remote_code)
    folder = None if task_path is None else Path(task_path)
    results = evaluate_tasks(loaded, tokenizer, tasks, folder, batch_size or 16)
    if save:
        try:
            save_tasks(Path(model), [result.to_dict() for result in results])
        except (MiniGPTError, OSError) as error:  # the results of a long computation are returned
            logger.warning("the results are not saved: %s", error)
        else:
            logger.info("saved in minigpt.json and README.md of %s", model)
    return results


def generate(
    model: str | os.PathLike,
    prompt: str = "",
    *,
    seed: int | None = None,
    special_tokens: bool = False,
    trust_remote_code: bool = False,
    **options,
) -> list[str]:
    """Generate a continuation of a prompt with any causal LM, or a new document if the prompt is empty.

    Args:
        model: A model folder or Hub id.
        prompt: Start of the text.
        seed: Seed for sampling. Default: the current state of the random number generators.
        special_tokens: Encode strings such as `<|endoftext|>` in the prompt as special tokens. By default they are ordinary
            text, as in training.
        trust_remote_code: Run the code in the model's repository; not needed for MiniGPT models.
        options: Any attribute of `GenerationConfig`: `max_new_tokens` (default 200), `temperature`, `top_k`, …

    Returns:
        `num_return_sequences` texts, each including the prompt.

    Raises:
        MiniGPTError: if the model cannot be loaded, an option is unknown or invalid, or the prompt cannot be encoded.
    """
    from .inference.generation import generate

    if unknown := options.keys() & {"streamer", "extra_options"}:
        raise MiniGPTError(f"unknown option {min(unknown)}: give attributes of GenerationConfig")
    if "max_length" not in options:
        options.setdefault("max_new_tokens", 200)
    loaded, tokenizer = load(model, trust_remote_code)
    return generate(loaded, tokenizer, prompt, seed=seed, special_tokens=special_tokens, **options)


def load(
    model: str | os.PathLike, trust_remote_code: bool = False
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load model and tokenizer of a folder or Hub id in evaluation mode, on the accelerator if there is one.

    Raises:
        MiniGPTError: if the model cannot be loaded, or needs code that is not trusted.
    """
    from .inference.generation import load

    check_type("model", model, str, os.PathLike)
    return load(os.fspath(model), trust_remote_code)


def check_data(data: str | os.PathLike, split: str, reading: dict[str, Any]) -> str:
    """Check how a text is to be read, and return its name.

    Args:
        reading: Settings by name, see `READING`.

    Raises:
        MiniGPTError: if a value has the wrong type, or there is no such split.
    """
    if split not in SPLITS:
        raise MiniGPTError(f"split is {split!r}: give one of {', '.join(SPLITS)}")
    if not isinstance(data, str | os.PathLike):
        raise MiniGPTError(
            f"data is a {type(data).__name__}: give one string; a mixture is written 'plays:0.7,notes:0.3'"
        )
    for name, value in reading.items():
        check_type(name, value, *READING[name], type(None))
    return os.fspath(data)


def read_part(data: str, split: str, recipe: dict[str, Any], reading: dict[str, Any]) -> "Documents":
    """Read a text or conversations and return the part to score.

    Args:
        split: See `evaluate`.
        recipe: Of the model; its values apply where `reading` has none.
        reading: Settings by name, see `READING`.

    Raises:
        MiniGPTError: if the text cannot be read, or there is no validation split.
    """
    from .data.corpus import load_corpus
    from .data.documents import Mixture
    from .data.sources import has_split

    values: dict[str, Any] = {name: recipe.get(name) if value is None else value for name, value in reading.items()}
    values = {name: value for name, value in values.items() if value is not None}
    data_split = values.pop("data_split", None)
    if reading["data_split"] is None and data_split and not has_split(data, data_split):
        data_split = None
    if split == "all":
        values["validation_fraction"] = 0.0
    if not values.get("chat") and reading["system"] is None:
        values.pop("system", None)
    corpus = load_corpus(data, split=data_split, **values)
    whole = corpus.validation if split == "validation" else corpus.train
    if split == "all" and corpus.unused is not None:
        whole = Mixture.joined([corpus.train, corpus.unused])
        logger.info("the separate validation split of the data set is evaluated as well")
    if whole is None or whole.characters == 0:
        raise MiniGPTError(f"{data} has no validation split; set its size with --validation_fraction")
    return whole


def check_type(name: str, value: Any, *types: type) -> None:
    """Check the type of an argument. A bool is not accepted as a number.

    Raises:
        MiniGPTError: if it has another type.
    """
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        names = " or ".join({os.PathLike: "path", type(None): "None"}.get(kind, kind.__name__) for kind in types)
        raise MiniGPTError(f"{name} is {reprlib.repr(value)}: expected {names}")


def window_characters_of(model: str | os.PathLike) -> int | None:
    """Return the window length, in characters, of the validation sample of a model's training; `None` if unknown."""
    from .trust import read_metadata

    value: Any = read_metadata(model)
    for key in ("data", "validation", "window_characters"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, int) and value > 0 else None


def recipe_of(model: str | os.PathLike) -> dict[str, Any]:
    """Return the recipe in `minigpt.json`; empty for models that were not written by this package.

    Raises:
        MiniGPTError: if it is malformed, or a setting that evaluation uses has the wrong type.
    """
    from .trust import read_metadata

    metadata = read_metadata(model)
    recipe = metadata.get("recipe") if metadata else {}
    if not isinstance(recipe, dict):
        raise MiniGPTError(f"{model}: minigpt.json has no `recipe`; restore it from its source")
    for names, kind in EVALUATION_SETTINGS.items():
        for name in names:
            value, is_flag = recipe.get(name), kind is bool
            if value is not None and (isinstance(value, bool) != is_flag or not isinstance(value, kind)):
                raise MiniGPTError(
                    f"{model}: minigpt.json has {name} {reprlib.repr(value)}; restore it from its source"
                )
    return recipe
