"""Print text while it is generated."""

from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer


class TextPrinter(BaseStreamer):
    """Prints the tokens of one sequence as they are generated.

    Args:
        tokenizer: Decodes them.
        prompt: Printed unmodified with the first token, i.e. after all options have been validated.

    Some decoders omit the space before the first token, and the bytes of a character may be spread over several tokens.
    Each piece of text is therefore decoded together with the previous one, and printed when its last character is
    complete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str):
        self.tokenizer, self.prompt, self.has_begun = tokenizer, prompt, False
        self.ids: list[int] = []
        self.previous = self.printed = 0  # where the last printed piece starts and ends in `ids`

    def put(self, value) -> None:
        self.ids += value.flatten().tolist()
        if not self.printed:
            self.printed = len(self.ids)  # of the prompt, which is the first value
            return
        self.begin()
        self.print_text()

    def print_text(self, is_last: bool = False) -> None:
        before, text = (
            self.tokenizer.decode(self.ids[self.previous : end], skip_special_tokens=True)
            for end in (self.printed, len(self.ids))
        )
        if is_last or not text.endswith("\ufffd"):
            print(text[len(before) :], end="", flush=True)
            self.previous, self.printed = self.printed, len(self.ids)

    def begin(self) -> None:
        if not self.has_begun:
            self.has_begun = True
            print(self.prompt, end="", flush=True)

    def end(self) -> None:
        self.begin()
        self.print_text(is_last=True)
        print(flush=True)
