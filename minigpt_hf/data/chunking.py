"""Split text into chunks that are encoded independently and give the same tokens as the complete text.

The pre-tokenizer (`encoding.PATTERN`) matches runs of characters of one class: letters, single digits, punctuation (any
character that is neither a letter, a digit nor white space), and white space. A position is a safe boundary if a match ends
there in every text and no earlier match depends on the characters that follow:

- after a line ending, if the next line is not blank: no match extends across it;
- between a character that is not white space and a space: a match of letters, a digit or punctuation ends before a space,
  and no alternative looks further ahead;
- after a digit: a digit is a match of its own;
- between a letter and punctuation: a match of letters extends to the last letter.

The character classes below contain only characters that have the same class in every version of Unicode. Text without a safe
boundary is a single long word, such as DNA without line endings. It can be split inside a run as well, but then the tokens of
the parts must be merged; see `encoding.Encoder`.
"""

import re
from collections.abc import Iterable, Iterator

LINE_END = re.compile(r"\n(?=[^\S\r\n]*\S)")
LETTER = "A-Za-zÀ-ÖØ-öø-ʯΑ-ΡΣ-ώА-яא-תぁ-ゖァ-ヺ一-龥가-힣"
PUNCTUATION = (
    "\\x00-\\x08\\x0e-\\x1b!-/:-@\\[-`{-~¡-©«-±¶-¸»¿\u2010-\u2027\u2030-\u205e\u2190-\u23e7\u2500-\u2767"
    "\u3001-\u3003\u3008-\u3020！-／：-＠\U0001f300-\U0001f64f"
)
SAFE_BOUNDARY = re.compile(
    rf"(?<=[^\s\x1c-\x1f\x85\u180e\u200b])(?= )|(?<=[0-9])|(?<=[{LETTER}])(?=[{PUNCTUATION}])|(?<=\n)(?=\S)"
)
# A position inside a match: at least three characters from its start and from its end.
INSIDE_RUN = re.compile(rf"(?<=[{LETTER}]{{3}})(?=[{LETTER}]{{3}})|(?<=[{PUNCTUATION}]{{3}})(?=[{PUNCTUATION}]{{3}})")

CHUNK_CHARACTERS = 100_000  # large enough that the overhead per chunk is negligible; bounds the memory


def split_into_chunks(
    parts: Iterable[tuple[bool, str]], anywhere: bool = False, entire_documents: bool = False
) -> Iterator[tuple[bool, str]]:
    """Split (or join) parts of documents at positions that do not change the tokens.

    A chunk has at least `CHUNK_CHARACTERS` characters unless it ends a document. It ends at the first line ending before
    twice that length, or else at the next safe boundary. The result does not depend on how the documents are divided into
    parts.

    Args:
        parts: (whether the part starts a document, text).
        anywhere: Every character is encoded separately, so chunks have exactly `CHUNK_CHARACTERS` characters.
        entire_documents: Only join the parts of each document.

    Yields:
        (whether the chunk starts a document, text). Documents without text are omitted.
    """
    pending: list[str] = []
    starts_document, length = True, 0  # state of the next chunk, whose text is `pending`
    for part_starts_document, text in parts:
        if part_starts_document:
            if length:
                yield starts_document, "".join(pending)
            starts_document, pending, length = True, [], 0
        if entire_documents or length + len(text) <= CHUNK_CHARACTERS:
            pending.append(text)
            length += len(text)
            continue
        if length < 2 * CHUNK_CHARACTERS:
            text, start, searched = "".join([*pending, text]), 0, 0
            pending, length = [], 0
        else:  # the pending text has no boundary: search only the new text and the character before it
            pending[-1], text = pending[-1][:-1], pending[-1][-1] + text
            start, searched = 0, length - 1
        while True:
            # The next chunk starts with `pending` (`searched` characters) and text[start:].
            first = start + max(CHUNK_CHARACTERS - searched, 0)
            stop = _find_boundary(text, first, start + 2 * CHUNK_CHARACTERS - searched, anywhere)
            if stop is None:
                break
            yield starts_document, "".join([*pending, text[start:stop]])
            starts_document, pending, start, searched = False, [], stop, 0
        pending.append(text[start:])
        length = searched + len(text) - start
    if length:
        yield starts_document, "".join(pending)


def _find_boundary(text: str, first: int, line_end_before: int, anywhere: bool) -> int | None:
    """Return the first boundary at or after `first`, preferring a line ending; None if more text is needed to decide."""
    if len(text) <= first:
        return None
    if anywhere:
        return first
    if line_end := LINE_END.search(text, first, max(line_end_before, first)):
        return line_end.end()
    if len(text) < line_end_before:
        return None
    found = SAFE_BOUNDARY.search(text, max(first, 1))
    return found.end() if found and found.end() < len(text) else None
