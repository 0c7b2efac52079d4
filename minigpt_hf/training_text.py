"""Repeat how the training text of a model was read and divided, for evaluation and for the search of verbatim copies.

`minigpt.json` states how the text was read and divided; arguments take precedence.
"""

import logging
import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .errors import MiniGPTError, check_type

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .data.corpus import Corpus
    from .data.documents import Documents
    from .data.stream import TokenStream

logger = logging.getLogger(__name__)

SPLITS = ("all", "train", "validation")

# For a model without a recipe: window length in tokens, and number of held-out characters to read.
BLOCK_SIZE, HELD_OUT_CHARACTERS = 1024, 1_000_000
# How a text is read, as in `load_corpus`: names and types of the keywords of `evaluate`.
READING: dict[str, tuple[type, ...]] = {
    "validation_fraction": (int, float),
    **dict.fromkeys(("encoding", "encoding_errors", "newline", "data_split", "text_column", "data_format"), (str,)),
    "chat": (bool,),
    "system": (str,),
}
WHICH_TEXT = ("data_split", "text_column", "data_format")  # these select another text; the others change or divide it
NOTHING_GIVEN: dict[str, Any] = dict.fromkeys(READING)
# Settings of a model's recipe that `evaluate` uses, and their types.
EVALUATION_SETTINGS = {
    ("validation_characters", "block_size", "per_device_eval_batch_size", "max_tokens", "sample_tokens"): int,
    ("validation_fraction",): int | float,
    ("encoding", "encoding_errors", "newline", "data_split", "text_column", "data_format", "system", "dedup"): str,
    ("sample_prompt",): str,
    ("chat", "streaming"): bool,
}


def check_data(data: str | os.PathLike, split: str, reading: dict[str, Any]) -> str:
    """Check the settings with which a text is read, and return its name.

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


def read_part(
    data: str, split: str, recipe: dict[str, Any], reading: dict[str, Any], as_shards: bool = False
) -> "tuple[Documents, Documents]":
    """Read a text or conversations and return the part to score, and the training split.

    Args:
        split: See `evaluate`.
        recipe: Recipe of the model; its values apply where `reading` has none.
        reading: Settings by name, see `READING`.
        as_shards: Divide the text as if it were tokenized in shards, or streamed.

    Raises:
        MiniGPTError: if the text cannot be read, or there is no validation split.
    """
    from .data.documents import Mixture

    whole_text = split == "all"
    # Duplicates affect which documents are held out. They are scored if the entire text is.
    changes = {"validation_fraction": 0.0} if whole_text else {"dedup": recipe.get("dedup", "none")}
    corpus = read_divided(data, recipe, reading | changes, as_shards and not whole_text)
    whole = corpus.validation if split == "validation" else corpus.train
    if split == "all" and corpus.unused is not None:
        whole = Mixture.joined([corpus.train, corpus.unused])
        logger.info("the separate validation split of the data set is evaluated as well")
    if whole is None or whole.characters == 0:
        raise MiniGPTError(f"{data} has no validation split; set its size with --validation_fraction")
    return whole, corpus.train


def read_divided(
    data: str, recipe: dict[str, Any], reading: dict[str, Any], as_shards: bool = False, streaming: bool = False
) -> "Corpus":
    """Read a text or conversations, divided as in the training of a model; for the arguments see `read_part`.

    Args:
        streaming: Read a dataset of the Hub as a stream, which has another fingerprint.

    Raises:
        MiniGPTError: if the text cannot be read.
    """
    from .data.corpus import load_corpus, mixture
    from .data.files import Share
    from .data.sources import has_split

    values: dict[str, Any] = {name: recipe.get(name) if value is None else value for name, value in reading.items()}
    values = {name: value for name, value in values.items() if value is not None}
    data_split = values.pop("data_split", None)
    sources = (mixture(data) or [data]) if data_split else []
    if reading["data_split"] is None and not any(has_split(source, data_split) for source in sources):
        data_split = None
    if not values.get("chat") and reading["system"] is None:
        values.pop("system", None)
    share = Share(0, 1) if as_shards and not streaming else None
    return load_corpus(data, split=data_split, share=share, streaming=streaming, **values)


def reading_of(data: str | os.PathLike, recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Check settings for reading a text, and add those that are not given; `chat` is that of the recipe by default."""
    if unknown := given.keys() - READING:
        raise MiniGPTError(f"{min(unknown)} does not apply to verbatim copying: omit it")
    reading = NOTHING_GIVEN | given
    check_data(data, "all", reading)
    return reading | {"chat": recipe.get("chat") if reading["chat"] is None else reading["chat"]}


def training_text(
    model: str | os.PathLike, data: str, recipe: dict[str, Any], reading: dict[str, Any]
) -> "tuple[PreTrainedTokenizerBase, TokenStream, TokenStream | None]":
    """Encode a training text as in the training of a model. The streams are cached, and reused for the same text.

    Args:
        data: The text, or a folder written by `minigpt tokenize`.
        recipe: Recipe of the model.
        reading: Settings by name, see `READING`.

    Returns:
        The tokenizer of the model, the training split, and a sample of the validation split, if there is one. A warning is
        logged if the training split is not the one that the model was trained on.

    Raises:
        MiniGPTError: if the text cannot be read, or was prepared with another tokenizer.
    """
    from tqdm.auto import tqdm

    from .data.conversations import build_conversation_stream
    from .data.corpus import CACHE
    from .data.prepared import PreparedText, find_prepared
    from .data.stream import build_stream
    from .data.tokenizer import load_tokenizer, tokenizer_fingerprint

    tokenizer = load_tokenizer(os.fspath(model))
    if (prepared := find_prepared(data)) is not None:
        if given := sorted(name for name, value in reading.items() if value is not None and value != recipe.get(name)):
            raise MiniGPTError(f"{data}: is a prepared text, which stores how it was read: omit {given[0]}")
        text = PreparedText.open(prepared)
        if tokenizer_fingerprint(text.tokenizer) != tokenizer_fingerprint(tokenizer):
            raise MiniGPTError(
                f"{data}: was prepared with another tokenizer than that of {model}; give the text that the model was "
                "trained on"
            )
        _warn_if_other_text(model, data, text.train)
        return tokenizer, text.train, text.validation
    corpus = read_divided(
        data, recipe, reading | {"dedup": recipe.get("dedup", "none")}, is_divided_by_threshold(model)
    )
    block_size = recipe.get("block_size") or BLOCK_SIZE

    def encode(documents: "Documents", max_tokens: int | None = None) -> "TokenStream":
        with tqdm(total=documents.characters, desc="tokenizing", unit_scale=True, delay=2, leave=False) as bar:
            if reading["chat"]:
                return build_conversation_stream(documents, tokenizer, block_size, CACHE)
            return build_stream(documents, tokenizer, CACHE, progress=bar.update, max_tokens=max_tokens)

    train = encode(corpus.train, recipe.get("max_tokens"))
    if not _is_streamed_text(model, data, recipe, reading, tokenizer):
        _warn_if_other_text(model, data, train)
    if corpus.validation is None:
        return tokenizer, train, None
    held_out = corpus.validation
    if not reading["chat"]:
        window = window_characters_of(model)
        if window is None:
            window = max(1, round(block_size * train.characters / max(1, len(train) - len(train.documents))))
        held_out = held_out.sample(recipe.get("validation_characters") or HELD_OUT_CHARACTERS, window)
    return tokenizer, train, encode(held_out)


def _warn_if_other_text(model: str | os.PathLike, data: str, train: "TokenStream") -> None:
    """Log a warning if the metadata of a model state another training split."""
    known = _training_split(model).get("fingerprint")
    if isinstance(known, str) and known != train.fingerprint:
        logger.warning(
            "%s: its training split is not the one that %s was trained on, so the figures and passages are those of another "
            "text",
            *(data, model),
        )


def _is_streamed_text(
    model: str | os.PathLike,
    data: str,
    recipe: dict[str, Any],
    reading: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
) -> bool:
    """Whether a model was trained on a stream of this dataset, which has another fingerprint if it is downloaded; for the
    arguments see `training_text`."""
    from .data.stream import stream_fingerprint

    if not recipe.get("streaming"):
        return False
    try:
        streamed = read_divided(data, recipe, reading | {"dedup": recipe.get("dedup", "none")}, streaming=True).train
    except MiniGPTError:  # it is another text, e.g. a local file
        return False
    known = _training_split(model).get("fingerprint")
    return known == f"{stream_fingerprint(streamed, tokenizer)}-at-most-{recipe.get('max_tokens')}"


def truncated_to(model: str | os.PathLike, recipe: dict[str, Any], train: "Documents") -> int | None:
    """Return the number of tokens that a model was trained on if `max_tokens` was less than its training split has.

    Args:
        train: The complete training split.
    """
    split = _training_split(model)
    tokens, characters = split.get("tokens"), split.get("characters")
    if recipe.get("max_tokens") is None or not isinstance(tokens, int) or not isinstance(characters, int):
        return None
    return None if train.characters is not None and characters >= train.characters else tokens


def _training_split(model: str | os.PathLike) -> dict[str, Any]:
    """Return what the metadata of a model state of its training split; empty if they state nothing."""
    from .trust import read_metadata

    known: Any = read_metadata(model)
    for key in ("data", "train"):
        known = known.get(key) if isinstance(known, dict) else None
    return known if isinstance(known, dict) else {}


def window_characters_of(model: str | os.PathLike) -> int | None:
    """Return the window length, in characters, of the validation sample of a model's training; `None` if unknown."""
    from .trust import read_metadata

    value: Any = read_metadata(model)
    for key in ("data", "validation", "window_characters"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, int) and value > 0 else None


def check_split_is_reproducible(model: str | os.PathLike) -> None:
    """Check that the split of the text of a model can be computed again.

    Raises:
        MiniGPTError: for a mixture of streamed datasets, whose training documents would be scored.
    """
    if _streamed_from(model) == "a mixture":
        raise MiniGPTError(
            f"{model}: was trained on a mixture of streamed datasets, whose split cannot be reproduced: give a text that "
            "it was not trained on, with --split all"
        )


def is_divided_by_threshold(model: str | os.PathLike) -> bool:
    """Whether the text of a model was divided by a threshold for hashes, as merged shards and streamed datasets are: as in
    `load_corpus` with a share. A mixture of streamed datasets is not read in shares."""
    from .trust import read_metadata

    data = read_metadata(model).get("data")
    return (isinstance(data, dict) and bool(data.get("shards"))) or _streamed_from(model) == "one dataset"


def _streamed_from(model: str | os.PathLike) -> str:
    """What the training text of a model was streamed from: "one dataset", "a mixture", or "" if it was not streamed."""
    from .data.corpus import mixture

    recipe = recipe_of(model)
    if not recipe.get("streaming"):
        return ""
    return "one dataset" if mixture(str(recipe.get("data"))) is None else "a mixture"


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


def trained_on(model: str | os.PathLike) -> tuple[str, float]:
    """Return the fingerprint of the documents that a model was trained on, and the share of their text that was held out by
    this model and by those from which its training started; an empty fingerprint if it is unknown."""
    from .trust import read_metadata

    try:  # the fingerprint of a token stream begins with that of its documents
        data = read_metadata(os.fspath(model))["data"]
        fraction = data.get("unseen_fraction", recipe_of(model).get("validation_fraction", 0))
        return data["train"]["fingerprint"].partition("-")[0], float(fraction)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return "", 0.0


def _is_training_split(model: str | os.PathLike, documents: "Documents") -> bool:
    """Whether documents are those that a model was trained on. Those of shards, whose fingerprint is another one, are
    recognized by their numbers of documents and characters."""
    from .trust import read_metadata

    trained = trained_on(model)[0]
    if trained and documents.fingerprint[: len(trained)] == trained:
        return True
    split = _training_split(model)
    sizes = (documents.number_of_documents, documents.characters)
    is_of_shards = bool(split) and bool(read_metadata(model)["data"].get("shards"))
    return is_of_shards and sizes == (split.get("documents"), split.get("characters"))


def has_training_text(
    model: str | os.PathLike, data: str, split: str, reading: dict[str, Any], documents: "Documents"
) -> bool:
    """Whether the text to score is, or contains, the one that the model was trained on.

    A text is recognized if it, or what it contains as its training split, is that of the training. Its validation split
    contains training text as well if it is larger than in the training of this model or of those from which its training
    started, or if the text is read in another way, e.g. if a part of the training split of a dataset is held out.

    Args:
        reading: The settings with which `documents` were read.
        documents: The part of `data` to score.
    """
    trained, trained_fraction = trained_on(model)
    if not trained:
        return False
    if _is_training_split(model, documents):
        return True
    recipe = recipe_of(model)
    fraction = reading["validation_fraction"]
    as_trained = NOTHING_GIVEN | {name: reading[name] for name in ("chat", *WHICH_TEXT)}

    by_threshold = is_divided_by_threshold(model)
    dedup = {"dedup": recipe.get("dedup", "none")}
    streaming = bool(recipe.get("streaming"))
    with read_again():
        try:
            train = read_divided(data, recipe, as_trained | dedup, by_threshold, streaming).train
            if not _is_training_split(model, train):
                # With `data_split`, the training split of a dataset that has a validation split is divided.
                if reading["data_split"] in (None, recipe.get("data_split")):
                    return False
                whole = as_trained | {"validation_fraction": 0.0}
                return _is_training_split(model, read_divided(data, recipe, whole, streaming=streaming).train)
            is_larger = (recipe.get("validation_fraction", 0) if fraction is None else fraction) > trained_fraction
            if split != "validation" or is_larger:
                return True
            same, _ = read_part(data, split, recipe, as_trained | {"validation_fraction": fraction}, by_threshold)
        except MiniGPTError:  # it is another text
            return False
    return same.fingerprint != documents.fingerprint


def is_other_text(
    model: str | os.PathLike, data: str, reading: dict[str, Any], train: "Documents | None" = None
) -> bool:
    """Whether a text is not the one that the model was trained on, as far as that is known. It may be a changed one.

    Args:
        reading: The settings with which the text was read.
        train: Its training split, if it was read and divided as in training.
    """
    if not trained_on(model)[0]:
        return False
    recipe = recipe_of(model)
    streaming = bool(recipe.get("streaming"))
    if train is None or streaming:
        as_trained = NOTHING_GIVEN | {name: reading[name] for name in ("chat", *WHICH_TEXT)}
        as_trained |= {"dedup": recipe.get("dedup", "none")}
        with read_again():
            try:
                train = read_divided(data, recipe, as_trained, is_divided_by_threshold(model), streaming).train
            except MiniGPTError:  # it cannot be read as in training
                return True
    return not _is_training_split(model, train)


@contextmanager
def read_again() -> Iterator[None]:
    """Suppress what is logged about a text, because it was logged when the text was read first."""
    reader = logging.getLogger(f"{__package__}.data")
    level = reader.level
    reader.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        reader.setLevel(level)
