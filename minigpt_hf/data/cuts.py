"""Where a text may be cut so that its pieces, encoded one by one, give the tokens of the whole.

The pattern of `tokenizer.PATTERN` matches runs of one class of characters: letters, single digits, punctuation (all that is
neither letter, digit nor white space), white space. A position is a safe cut if a match ends there in every text, and no
match before it depends on what follows:

- after a line end, if the next line is not blank: no match reaches over it;
- between a character that is not white space and a space: a match of letters, a digit or punctuation ends before a space,
  and no alternative looks further;
- after a digit: it is a match of its own;
- between a letter and punctuation: letters match up to the last one.

The classes below contain only characters whose class is the same in every version of Unicode. Text without such a position
is a single word, such as DNA without line ends. It may be cut inside a run, but then its tokens must be joined with care:
see `Encoder`.
"""

import re
from collections.abc import Iterable, Iterator

LINE_END = re.compile(r"\n(?=[^\S\r\n]*\S)")
LETTER = "A-Za-zÀ-ÖØ-öø-ʯΑ-ΡΣ-ώА-яא-תぁ-ゖァ-ヺ一-龥가-힣"
PUNCTUATION = (
    "\\x00-\\x08\\x0e-\\x1b!-/:-@\\[-`{-~¡-©«-±¶-¸»¿\u2010-\u2027\u2030-\u205e\u2190-\u23e7\u2500-\u2767"
    "\u3001-\u3003\u3008-\u3020！-／：-＠\U0001f300-\U0001f64f"
)
SAFE_CUT = re.compile(
    rf"(?<=[^\s\x1c-\x1f\x85\u180e\u200b])(?= )|(?<=[0-9])|(?<=[{LETTER}])(?=[{PUNCTUATION}])|(?<=\n)(?=\S)"
)
# Inside a run of one class a match goes on: neither its begin nor its end is within three characters.
RUN = re.compile(rf"(?<=[{LETTER}]{{3}})(?=[{LETTER}]{{3}})|(?<=[{PUNCTUATION}]{{3}})(?=[{PUNCTUATION}]{{3}})")

PIECE_CHARACTERS = 100_000  # long enough to keep a process busy for some 50 ms, short enough to keep memory flat


def pieces(
    parts: Iterable[tuple[bool, str]], anywhere: bool = False, whole: bool = False
) -> Iterator[tuple[bool, str]]:
    """Cut (or join) parts of documents where that changes no token.

    In and out come (does it open a document?, text); documents without text are left out. A piece has `PIECE_CHARACTERS`
    or a little more; it ends at a line end if there is one before it has twice as many, and else at the next safe cut,
    wherever that is. The result does not depend on how a document comes in parts.

    Args:
        anywhere: Each character is encoded by itself: cut after exactly `PIECE_CHARACTERS`.
        whole: Only join the parts of each document.
    """
    opens, held, length = True, [], 0  # of the next piece: does it open a document, its text so far
    for opens_document, text in parts:
        if opens_document:
            if length:
                yield opens, "".join(held)
            opens, held, length = True, [], 0
        if whole or length + len(text) <= PIECE_CHARACTERS:
            held.append(text)
            length += len(text)
            continue
        if length < 2 * PIECE_CHARACTERS:
            text, start, known = "".join([*held, text]), 0, 0
            held, length = [], 0
        else:  # no cut in what is held: look at the new text alone, and at the character before it
            held[-1], text = held[-1][:-1], held[-1][-1] + text
            start, known = 0, length - 1
        while True:
            # The piece is `held` (of `known` characters) and text[start:].
            first = start + max(PIECE_CHARACTERS - known, 0)
            stop = _cut(text, first, start + 2 * PIECE_CHARACTERS - known, anywhere)
            if stop is None:
                break
            yield opens, "".join([*held, text[start:stop]])
            opens, held, start, known = False, [], stop, 0
        held.append(text[start:])
        length = known + len(text) - start
    if length:
        yield opens, "".join(held)


def _cut(text: str, first: int, soon: int, anywhere: bool) -> int | None:
    """The first good position from `first` on; None if more text is needed to tell."""
    if len(text) <= first:
        return None
    if anywhere:
        return first
    if line_end := LINE_END.search(text, first, max(soon, first)):
        return line_end.end()
    if len(text) < soon:
        return None
    found = SAFE_CUT.search(text, max(first, 1))
    return found.end() if found and found.end() < len(text) else None
