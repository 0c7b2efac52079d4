"""Pass text on while it is generated: print it, or iterate over its pieces."""

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..inference.generation import Prompt, generate


class TextStreamer(BaseStreamer):
    """Passes on the text of one sequence as it is generated, without the prompt.

    Args:
        tokenizer: Decodes the tokens.
        write: Receives each piece of text.

    Some decoders omit the space before the first token, and the bytes of a character may be spread over several tokens.
    Each piece of text is therefore decoded together with the previous one, and passed on when its last character is
    complete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]):
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.previous = self.written = 0  # where the last piece starts and ends in `ids`

    def put(self, value) -> None:
        self.ids += value.flatten().tolist()
        if not self.written:
            self.written = len(self.ids)  # the first value is the prompt
            return
        self.write_text()

    def write_text(self, is_last: bool = False) -> None:
        before, text = (
            self.tokenizer.decode(self.ids[self.previous : end], skip_special_tokens=True)
            for end in (self.written, len(self.ids))
        )
        if is_last or not text.endswith("\ufffd"):
            self.write(text[len(before) :])
            self.previous, self.written = self.written, len(self.ids)

    def end(self) -> None:
        self.write_text(is_last=True)


class TextPrinter(TextStreamer):
    """Prints the text of one sequence as it is generated.

    Args:
        tokenizer: Decodes the tokens.
        prompt: Printed unmodified with the first token, i.e. after all options have been validated.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str):
        super().__init__(tokenizer, self.print)
        self.prompt, self.has_begun = prompt, False

    def print(self, text: str) -> None:
        print(text if self.has_begun else self.prompt + text, end="", flush=True)
        self.has_begun = True

    def end(self) -> None:
        super().end()
        print(flush=True)


def stopping_when(is_stopped: Callable[[], bool]) -> Callable[[int, dict], dict[str, Any]]:
    """Return the `extra_options` of `generate` that end generation at the next token once `is_stopped()` is true."""

    def criterion(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), is_stopped(), device=input_ids.device)

    return lambda prompt_tokens, options: {"stopping_criteria": [criterion]}


def generated_pieces(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, **options: Any
) -> Iterator[str]:
    """Yield pieces of the text that continues or answers a prompt, while it is generated in a thread.

    Generation stops when the iterator is closed.

    Args:
        options: Keywords of `generate`.

    Raises:
        MiniGPTError: as `generate`.
    """
    pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
    stopped = Event()

    def run() -> None:
        try:
            streamer = TextStreamer(tokenizer, pieces.put)
            generate(
                model, tokenizer, prompt, streamer=streamer, extra_options=stopping_when(stopped.is_set), **options
            )
            pieces.put(None)
        except BaseException as error:  # raised again in the thread that iterates
            pieces.put(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        stopped.set()
        thread.join()
