"""The Python interface: train, evaluate, generate, load.

    folder = minigpt_hf.train(data="notes.txt", output_dir="runs/notes", max_steps=300)
    print(folder.results["bits_per_byte"], folder.generate("Dear ")[0])

Invalid input raises `MiniGPTError`, whose message states in one line what was given, why it is invalid, and what to do.
"""

import logging
import os
import reprlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .atomic import storage_error
from .errors import MiniGPTError, NotSavedError, check_type
from .training_text import (
    READING,
    WHICH_TEXT,
    check_data,
    check_split_is_reproducible,
    has_training_text,
    is_divided_by_threshold,
    is_other_text,
    read_part,
    reading_of,
    recipe_of,
    trained_on,
    training_text,
    truncated_to,
    window_characters_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .inference.answers import AnswerScore
    from .inference.copying import CopiedSample, Copying
    from .inference.evaluation import Score
    from .inference.suites import TaskResult


logger = logging.getLogger(__name__)

_training = threading.Lock()  # held while this process trains
SAMPLES = 3  # of `measure_copying`, as in training
SAMPLE_TOKENS = 200  # length of a sample, for a model without a recipe
# Estimates the window length in characters if a model does not state it; typical of English and byte-level BPE.
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class ModelFolder(os.PathLike):
    """A model folder: a path for any `from_pretrained`, with access to its metadata."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # a string may be given

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

    torch has one global random state per process: if another thread draws random numbers during training, the dropout masks
    change, and the run is not reproducible.

    Args:
        data: Training text, see `load_corpus`. Default: that of the recipe.
        recipe: Name of a recipe, or a YAML file. Default: none with `minutes` or `size`, `chat` with `chat`, `lora` with
            `lora_rank`, `finetune` with `init_from`, `auto` with `data` (settings that are not given are chosen for the
            text), otherwise `demo`.
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
    folder = checked_folder(os.fspath(model), trust_remote_code)  # for a Hub id, its cached snapshot
    recipe = recipe_of(folder)

    chat = recipe.get("chat", False) if chat is None else chat
    if chat and (max_characters is not None or stride is not None):
        raise MiniGPTError(
            "max_characters and stride do not apply to conversations, which are scored in full: omit them"
        )
    if split != "all":
        check_split_is_reproducible(folder)
    whole, train = read_part(data, split, recipe, reading, is_divided_by_threshold(folder))
    if split == "train" and (used := truncated_to(folder, recipe, whole)) is not None:
        logger.info(f"{data}: the complete training split is scored; the model was trained on {used:,} tokens of it")
    changing = ("data_split", *(name for name in READING if name not in WHICH_TEXT))
    is_changed = any(reading[name] not in (None, recipe.get(name)) for name in changing)
    is_changed = is_changed or trained_on(folder)[1] < recipe.get("validation_fraction", 0)
    of_text = reading | {"chat": chat}
    if split == "validation" and is_changed and has_training_text(folder, data, split, of_text, whole):
        logger.warning(
            f"{data}: is read or divided in another way than in the training of the model, or of the one from which its "
            "training started, so its validation split contains text that the model was trained on"
        )
    elif split == "validation" and is_other_text(folder, data, of_text, None if is_changed else train):
        logger.info(
            f"{data}: is not the text that the model was trained on, or it has changed, e.g. the names, and so the order, of "
            "its files: if it has parts of that text, its validation split may contain text that the model was trained on"
        )
    elif split == "all" and has_training_text(folder, data, split, of_text, whole):
        logger.warning(
            f"{data}: contains the training text of the model, so the score is not one of unseen text; "
            "see --split validation"
        )
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
    report_lossy_tokenizer(tokenizer, texts)
    score = evaluate_texts(loaded, tokenizer, texts, block_size, stride, batch_size, texts.number_of_documents)
    is_complete = texts is whole or (whole.characters is not None and texts.characters == whole.characters)
    remedy = "give more text" if is_complete else "raise --max_characters"
    warn_if_sample_is_small(score.tokens, score.bytes, remedy, score="score")
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
        NotSavedError: if the disk is too full for the score, which its attribute `results` has.
    """
    reading = {**dict.fromkeys(READING), **reading, "chat": True}
    if unknown := reading.keys() - READING:
        raise MiniGPTError(f"{min(unknown)} does not apply to generated answers: omit it")
    check_type("batch_size", batch_size, int, type(None))
    if batch_size is not None and batch_size < 1:
        raise MiniGPTError(f"batch_size is {batch_size}: it must be at least 1")
    data = check_data(data, split, reading)

    from tqdm.auto import tqdm

    from .data.conversations import conversations_in, has_system_message
    from .data.corpus import public_name
    from .inference.answers import score_answers
    from .publish.model_folder import save_score
    from .trust import checked_folder

    check_type("model", model, str, os.PathLike)
    folder = checked_folder(os.fspath(model), trust_remote_code)  # for a Hub id, its cached snapshot
    before = model_files(folder)
    loaded, tokenizer = load(model, trust_remote_code)
    recipe = recipe_of(folder)
    documents, _ = read_part(data, split, recipe, reading)
    of_training = has_training_text(folder, data, split, reading, documents)
    if of_training:
        logger.warning(
            f"{data}: contains the training text of the model, so the score does not show how it answers new questions"
        )
    with tqdm(total=documents.number_of_documents, desc="answering", delay=2, leave=False) as bar:
        result = score_answers(loaded, tokenizer, conversations_in(documents), metric, batch_size or 32, bar.update)
    if save:
        identity: dict[str, Any] = {"name": public_name(data), "split": split, "fingerprint": documents.fingerprint}
        identity |= {"of_training": True} if of_training else {}
        system = reading["system"]
        if system not in (None, recipe.get("system")) and has_system_message(documents, system):
            identity |= {"system": system}
        entry = {"data": identity, **result[0].to_dict()}
        _save(model, before, lambda: save_score(Path(model), entry), result)
    return result


def model_files(folder: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Return size, modification time and inode of the files of a model folder, except its metadata and its card."""
    states = {
        file.name: file.stat()
        for file in Path(folder).iterdir()
        if file.is_file() and not file.name.startswith(".") and file.name not in ("README.md", "minigpt.json")
    }
    return {name: (state.st_size, state.st_mtime_ns, state.st_ino) for name, state in states.items()}


def _save(
    model: str | os.PathLike, before: dict[str, tuple[int, ...]], save: Callable[[], list[str]], results: Any
) -> None:
    """Save results in a model folder; log the reason if that is not possible, because the results are returned as well.

    Args:
        before: `model_files` before the model was loaded.
        save: Returns the names of the files that it has changed.

    Raises:
        NotSavedError: if the disk is full, or a file larger than the process may write.
    """
    try:
        if not Path(model).is_dir():
            raise MiniGPTError(f"{model}: is not a local folder")
        if model_files(model) != before:
            raise MiniGPTError(f"{model}: was changed during the evaluation; run the same command again")
        saved = save()
    except (MiniGPTError, OSError) as error:
        if isinstance(error, OSError) and storage_error(error, Path(model)):
            raise NotSavedError(f"not saved: {error}", results) from error
        logger.warning("not saved: %s", error)
    else:
        logger.info("saved in %s of %s", " and ".join(saved), model)


def measure_copying(
    model: str | os.PathLike,
    data: str | os.PathLike,
    *,
    samples: int | None = None,
    sample_tokens: int | None = None,
    trust_remote_code: bool = False,
    **reading: Any,
) -> "Copying":
    """Generate samples and measure how much of them occurs verbatim in the training text.

    Args:
        model: A model folder or Hub id.
        data: The training text, see `load_corpus`, or a folder written by `minigpt tokenize`. Samples are compared with its
            training split; its validation split is the baseline.
        samples: Number of samples, with the seeds 0, 1, …, from the prompt and at the temperature of training; of a model
            that learned conversations, the answers to the `sample_prompt` of training, if there is one, and to the first
            held-out questions. Default: as in training.
        sample_tokens: Maximum number of tokens of a sample. Default: as in training, or 200.
        trust_remote_code: Run the code in the model's repository; not needed for MiniGPT models.
        reading: `validation_fraction`, `encoding`, …, `system`, as in `evaluate`.

    Raises:
        MiniGPTError: if the model or the text cannot be loaded, or the text was prepared with another tokenizer.
    """
    check_type("samples", samples, int, type(None))
    check_type("sample_tokens", sample_tokens, int, type(None))
    for name, count in (("samples", samples), ("sample_tokens", sample_tokens)):
        if count is not None and count < 1:
            raise MiniGPTError(f"{name} is {count}: it must be at least 1")

    from tqdm.auto import tqdm

    from .data.chat_format import ChatFormat
    from .inference.copying import encode_samples, measure_copying
    from .training.callbacks import given_text, sample, usable_prompts
    from .trust import checked_folder

    check_type("model", model, str, os.PathLike)
    folder = checked_folder(os.fspath(model), trust_remote_code)  # for a Hub id, its cached snapshot
    recipe = recipe_of(folder)
    reading = reading_of(data, recipe, reading)
    tokenizer, train, validation = training_text(folder, os.fspath(data), recipe, reading)
    loaded, _ = load(model, trust_remote_code)
    prompts: list[Any]
    prompt = recipe.get("sample_prompt") or ""
    if reading["chat"]:
        system = recipe.get("system") if reading["system"] is None else reading["system"]
        before = [] if system is None else [{"role": "system", "content": system}]
        asked: list[Any] = [[*before, {"role": "user", "content": prompt}]] if prompt else []
        asked = usable_prompts(loaded, tokenizer, asked, [])
        samples, held_out = samples or len(asked) or SAMPLES, train if validation is None else validation
        prompts = [*asked, *ChatFormat(tokenizer).questions(held_out.iterate_documents(), samples - len(asked))]
    else:
        prompts = usable_prompts(loaded, tokenizer, [prompt], [""]) * (samples or SAMPLES)
    length = sample_tokens or recipe.get("sample_tokens") or SAMPLE_TOKENS
    texts = []
    for seed, prompt in enumerate(tqdm(prompts, desc="sampling", delay=2, leave=False)):
        texts.append((given_text(prompt), sample(loaded, tokenizer, prompt, length, seed)))
    is_chat = bool(reading["chat"])
    return measure_copying(tokenizer, encode_samples(tokenizer, texts, is_chat), train, validation, is_chat)


def copied_samples(model: str | os.PathLike, data: str | os.PathLike, **reading: Any) -> "list[CopiedSample]":
    """Find the passages of the training text that the samples of a model card share with it.

    Args:
        model: A model folder with `minigpt.json`.
        data, reading: See `measure_copying`.

    Raises:
        MiniGPTError: if the folder has no samples, or the text cannot be loaded.
    """
    from .inference.copying import copied_samples
    from .trust import read_metadata

    card: Any = read_metadata(model).get("sample")
    card = card if isinstance(card, dict) else {}
    texts, given = (card[name] if isinstance(card.get(name), list) else [] for name in ("texts", "given"))
    if not texts or len(texts) != len(given):
        raise MiniGPTError(f"{model}: its minigpt.json has no samples whose passages could be found in a training text")
    recipe = recipe_of(model)
    reading = reading_of(data, recipe, reading)
    tokenizer, train, _ = training_text(model, os.fspath(data), recipe, reading)
    samples = [(str(start), str(text)) for start, text in zip(given, texts, strict=True)]
    return copied_samples(tokenizer, samples, train, bool(reading["chat"]))


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
        NotSavedError: if the disk is too full for the results, which its attribute `results` has.
    """
    check_type("task_path", task_path, str, os.PathLike, type(None))
    check_type("batch_size", batch_size, int, type(None))
    if batch_size is not None and batch_size < 1:
        raise MiniGPTError(f"batch_size is {batch_size}: it must be at least 1")
    if isinstance(tasks, str) or not tasks or not all(isinstance(name, str) and name for name in tasks):
        raise MiniGPTError(f"tasks is {reprlib.repr(tasks)}: give a list of names")

    from .inference.suites import evaluate_tasks
    from .publish.model_folder import save_tasks
    from .trust import checked_folder

    check_type("model", model, str, os.PathLike)
    before = model_files(checked_folder(os.fspath(model), trust_remote_code))
    loaded, tokenizer = load(model, trust_remote_code)
    path = None if task_path is None else Path(task_path)
    results = evaluate_tasks(loaded, tokenizer, tasks, path, batch_size or 16)
    if save:
        _save(model, before, lambda: save_tasks(Path(model), [result.to_dict() for result in results]), results)
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
    from .inference.generation import generate, warn_of_unused_options

    if unknown := options.keys() & {"streamer", "extra_options"}:
        raise MiniGPTError(f"unknown option {min(unknown)}: give attributes of GenerationConfig")
    if "max_length" not in options:
        options.setdefault("max_new_tokens", 200)
    loaded, tokenizer = load(model, trust_remote_code)
    warn_of_unused_options(loaded, options, seed)
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
