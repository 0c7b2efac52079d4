"""The text of a run: from the cache, from a prepared folder, or read and tokenized; and the tokenization of a shard."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..atomic import check_links
from ..data.chat_format import with_reserved_tokens
from ..data.corpus import CACHE, Corpus, load_corpus
from ..data.files import Share
from ..data.prepared import PreparedText, find_prepared, prepare, prepare_conversations, report_lossy_tokenizer
from ..data.shards import description_of, is_complete, share_tokenizer, write_shard
from ..data.stream import TokenStream
from ..data.tokenizer import bos_token_id, byte_tokenizer, load_tokenizer, tokenizer_fingerprint
from ..errors import MiniGPTError
from ..training_text import read_again, recipe_of, trained_on
from ..trust import checked_folder, read_metadata
from .arguments import DataArguments, MiniGPTTrainingArguments, Settings

logger = logging.getLogger(__name__)

# With several processes, the main process tokenizes while the others wait, at most `ddp_timeout` (30 minutes by default). A
# gigabyte takes less than a minute with fastokens, including the training of the tokenizer, and took 15.6 minutes in an
# earlier version (docs/results.md).
MAX_CHARACTERS_TO_TOKENIZE = 1_000_000_000
# Settings with which a text has other documents, or others of them are held out.
CHANGES_SPLIT = ("encoding", "encoding_errors", "newline", "system", "dedup")
CHARACTERS_PER_TOKEN = 4  # estimate for a stream, whose length is known in tokens only


def prepare_text(
    data: DataArguments,
    choose_tokenizer: Callable[[Corpus], DataArguments] | None = None,
    choose_block_size: Callable[[TokenStream], int] | None = None,
    world_size: int = 1,
) -> PreparedText:
    """Load the text, tokenizer and token streams, from the cache if they were prepared before.

    Args:
        choose_tokenizer: Returns the settings with a tokenizer chosen for the corpus.
        choose_block_size: Returns the length of a sequence, chosen for the training tokens; default: that of the settings.
        world_size: Number of processes that wait for the text.

    Raises:
        MiniGPTError: if the text cannot be read, or is too long to be tokenized while other processes wait.
    """
    cache_dir = Path(data.cache_dir) if data.cache_dir else CACHE
    if (folder := find_prepared(data.data, cache_dir)) is not None:
        if data.chat:
            raise MiniGPTError(
                f"--data {data.data}: is a prepared text, and --chat requires the tables of conversations"
            )
        return PreparedText.open(folder, cache_dir, data.shard_cache)  # `parse_arguments` applied its settings
    corpus = read_corpus(data)
    if data.chat:
        return prepare_conversations(
            corpus,
            data.tokenizer,
            data.vocab_size,
            cache_dir,
            block_size=data.block_size,
            chat_tokens=data.chat_tokens,
        )
    if world_size > 1:
        check_length(corpus, data)
    if choose_tokenizer is not None:
        data = choose_tokenizer(corpus)
    return prepare(
        corpus,
        data.tokenizer,
        data.vocab_size,
        cache_dir,
        block_size=choose_block_size or data.block_size,
        validation_characters=data.validation_characters,
        num_proc=data.num_proc,
        max_tokens=data.max_tokens,
        chat_tokens=data.chat_tokens,
    )


def read_corpus(data: DataArguments, share: Share | None = None) -> Corpus:
    """Read the text that the settings name, or a share of it; see `load_corpus`."""
    return load_corpus(
        data.data,
        data.validation_fraction,
        data.encoding,
        encoding_errors=data.encoding_errors,
        newline=data.newline,
        split=data.data_split,
        text_column=data.text_column,
        data_format=data.data_format,
        streaming=data.streaming,
        chat=data.chat,
        system=data.system,
        share=share,
        dedup=data.dedup,
        cache_dir=Path(data.cache_dir) if data.cache_dir else CACHE,
    )


def with_unseen_fraction(text: PreparedText, settings: Settings) -> PreparedText:
    """State whether a text was compared with that of the model of `init_from`, and which share this model has held out as
    well, if it is smaller; this is logged.

    Documents that are held out with a smaller share are held out with a larger one as well, and others in addition, if the
    text is read in the same way. Otherwise other documents are held out, and the share is 0.
    """
    data, base = settings.data, settings.model.init_from
    if not base or text.validation is None or find_prepared(data.data, data.cache_dir) is not None:
        return text
    folder = checked_folder(base, with_weights=False)
    recipe, (trained, fraction) = recipe_of(folder), trained_on(folder)
    is_of_shards = trained and read_metadata(folder)["data"].get("shards")  # their fingerprint is not that of the text
    if not trained or is_of_shards:
        return text
    text = replace(text, is_compared=True)
    is_read_alike = all(recipe.get(name) == vars(data)[name] for name in CHANGES_SPLIT)
    if is_read_alike and fraction >= data.validation_fraction:
        return text

    def held_out(data: DataArguments) -> str | None:
        corpus = read_corpus(data)
        return corpus.validation.fingerprint if corpus.validation is not None else None

    as_given = {name: vars(data)[name] for name in ("validation_fraction", "streaming", "max_tokens")}
    known = [name for name in ("validation_fraction", *CHANGES_SPLIT) if recipe.get(name) is not None]
    as_base = {"system": None} | {name: recipe[name] for name in known}
    if recipe.get("streaming"):  # a dataset that is streamed now is not downloaded for the comparison
        as_base |= {"streaming": True, "max_tokens": recipe.get("max_tokens")}
    try:
        with read_again():
            of_base = replace(data, **as_base)
            if read_corpus(of_base).train.fingerprint[: len(trained)] != trained:
                return text
            if not is_read_alike:
                fraction = fraction if held_out(replace(of_base, **as_given)) == held_out(data) else 0.0
    except MiniGPTError:  # it cannot be read in this way, so it is another text
        return text
    if fraction >= data.validation_fraction:
        return text
    logger.warning(
        f"--init_from {base}: was trained on text of the validation split, because it held out a smaller share of the same "
        f"text, {fraction:g}, or read it in another way: the validation score is not one of unseen text"
        + (f"; give --validation_fraction {fraction:g}" if fraction else "")
    )
    return replace(text, unseen_fraction=fraction)


def prepare_shard(data: DataArguments, share: Share, output: Path) -> bool:
    """Tokenize a share of a text into a shard, unless this has been done; see `data.shards`.

    Args:
        output: The folder of all shards.

    Returns:
        Whether the shard was written.

    Raises:
        MiniGPTError: if the text cannot be read, the tokenizer is to be trained, or the folder has other shards.
    """
    if data.tokenizer in ("bpe", "characters"):
        raise MiniGPTError(
            "--shard requires a tokenizer that all shards share: train one on a sample with `minigpt tokenize --data SAMPLE "
            "--output_dir FOLDER`, and give --tokenizer FOLDER/tokenizer, or `bytes`"
        )
    cache_dir = Path(data.cache_dir) if data.cache_dir else CACHE
    tokenizer = byte_tokenizer() if data.tokenizer == "bytes" else load_tokenizer(data.tokenizer)
    if data.chat_tokens:
        tokenizer = with_reserved_tokens(tokenizer)
    description = description_of(tokenizer, data.tokenizer, share, vars(data))
    check_links(output)
    if is_complete(output, share, description, cache_dir):
        return False
    corpus = read_corpus(data, share)
    share_tokenizer(output, tokenizer)
    lossy = None if data.tokenizer == "bytes" else report_lossy_tokenizer(tokenizer, corpus.train)
    try:
        with tqdm(
            total=corpus.train.characters, desc=str(share), unit=" characters", unit_scale=True, delay=2, leave=False
        ) as bar:
            write_shard(
                output,
                corpus,
                tokenizer,
                share,
                description,
                lossy=lossy,
                block_size=data.block_size,
                num_proc=data.num_proc,
                progress=bar.update,
            )
    except MiniGPTError:
        # Another process may have written the shard in the meantime.
        if not is_complete(output, share, description, cache_dir):
            raise
        return False
    return True


def check_length(corpus: Corpus, data: DataArguments) -> None:
    """Check that a text is short enough to be tokenized while other processes wait.

    Raises:
        MiniGPTError: if not, with the commands to use instead.
    """
    characters, estimate = corpus.train.characters, corpus.train.characters is None
    if characters is None:
        characters = CHARACTERS_PER_TOKEN * (data.max_tokens or 0)
    if characters > MAX_CHARACTERS_TO_TOKENIZE:
        flags = f"--data {data.data}" + (f" --streaming --max_tokens {data.max_tokens}" if data.streaming else "")
        raise MiniGPTError(
            f"{data.data}: {'about ' * estimate}{characters:,} characters are too many to tokenize while the other processes "
            f"wait (more than {MAX_CHARACTERS_TO_TOKENIZE:,}): run `minigpt tokenize` with the same recipe and {flags}, and "
            "train with the folder that it writes as --data"
        )


def raise_unless_same_tokenizer(text: PreparedText, settings: Settings) -> None:
    """Check that a prepared text has the tokenizer of the pretrained model.

    Raises:
        MiniGPTError: if its token ids index another vocabulary.
    """
    source = settings.model.init_from
    if not source or find_prepared(settings.data.data, settings.data.cache_dir) is None:
        return
    tokenizer = load_tokenizer(source)
    is_same = tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(text.tokenizer)
    if not is_same or bos_token_id(tokenizer) != text.train.bos_token_id:
        raise MiniGPTError(
            f"--data {settings.data.data}: was prepared with another tokenizer than that of --init_from {source}; "
            f"prepare the text with `minigpt tokenize --tokenizer {source}`"
        )


def raise_unless_same_text(text: PreparedText, training: MiniGPTTrainingArguments) -> None:
    """Check that all ranks have read the same text: each reads it separately, and a file may change in the meantime.

    Raises:
        MiniGPTError: if the ranks have read different texts.
    """
    if training.world_size == 1:
        return
    streams = (text.train, text.validation)
    read = gather_object([[stream.fingerprint for stream in streams if stream is not None]])
    if any(one != read[0] for one in read):
        raise MiniGPTError(
            f"{text.name}: the {len(read)} processes have read different texts; wait until nothing writes to it, and give "
            "the same files to all machines"
        )
