"""`minigpt generate`: generate text with a causal LM and print it token by token."""

import re
import sys
from typing import Any

from ..errors import MiniGPTError
from .parser import Parser, quiet

SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def parser() -> Parser:
    """The arguments of the command, without the options of `GenerationConfig`."""
    parser = Parser(
        "generate",
        epilog="Every other flag is an option of transformers' GenerationConfig: --max_new_tokens 300 --temperature 0.8 "
        "--top_k 50 --top_p 0.9 --do_sample false --num_beams 4 --num_return_sequences 3 …",
    )
    parser.add_argument("model", help="model folder or Hub id")
    parser.add_argument("--prompt", default="", help="start of the text (default: empty, a new document)")
    parser.add_argument("--seed", type=int, help="seed of sampling")
    parser.add_argument(
        "--special_tokens",
        action="store_true",
        help="encode the names of special tokens in the prompt as these tokens (default: as text, as in training)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="execute Python code of the model repository")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="bfloat16 and a compiled decoding step: at least twice the speed; the first compilation takes minutes",
    )
    parser.add_argument("--interactive", action="store_true", help="read prompts from the terminal until Ctrl-D")
    return parser


def run(argv: list[str]) -> None:
    """Load the model and continue one prompt, or several with `--interactive`."""
    args, rest = parser().parse_known_args(argv)
    options = _options(rest)
    for name in ("max_new_tokens", "max_length", "max_cache_len", "num_return_sequences", "num_beams"):
        if name in options and (type(options[name]) is not int or options[name] < 1):
            raise MiniGPTError(f"--{name} {options[name]}: must be an integer of at least 1")
    if "max_length" not in options:
        options.setdefault("max_new_tokens", 200)

    from transformers.generation.streamers import BaseStreamer

    from ..inference.generation import encode_prompt, load
    from ..inference.generation import generate as write

    quiet()
    model, tokenizer = load(args.model, args.trust_remote_code)

    extra = {}
    if args.fast:
        from ..inference.compiled import UNSUPPORTED_OPTIONS, compile_for_generation

        if unsupported := [name for name in UNSUPPORTED_OPTIONS if name in options]:
            raise MiniGPTError(f"--{unsupported[0]} cannot be combined with --fast, which decodes one token per step")
        print("compiling the model …", file=sys.stderr, flush=True)
        sizes = {name: options[name] for name in ("max_new_tokens", "num_return_sequences") if name in options}
        longest = max(options.pop("max_cache_len", 0), options.get("max_length", 0))
        compiled = compile_for_generation(model, tokenizer, args.prompt, max_cache_len=longest, **sizes)
        print(f"compiled: {compiled}", file=sys.stderr, flush=True)
        extra = {"extra_options": compiled.generation_options}

    settings = {"seed": args.seed, "special_tokens": args.special_tokens, **extra, **options}

    class PromptAndText(BaseStreamer):
        """Prints the unmodified prompt together with the first token, i.e. after all options have been validated.

        Some decoders omit the space before the first token, and the bytes of a character may be spread over several tokens.
        Each piece of text is therefore decoded together with the previous one, and printed when its last character is
        complete.
        """

        def __init__(self, prompt: str):
            self.prompt, self.has_begun = prompt, False
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
                tokenizer.decode(self.ids[self.previous : end], skip_special_tokens=True)
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

    def answer(prompt: str) -> None:
        defaults = model.generation_config
        sequences = options.get("num_return_sequences") or defaults.num_return_sequences or 1
        beams = options.get("num_beams") or defaults.num_beams or 1
        if sequences == beams == 1:  # otherwise the texts are printed when they are complete
            encode_prompt(tokenizer, prompt, args.special_tokens)  # raises before anything is printed
            streamer = PromptAndText(prompt)
            try:
                write(model, tokenizer, prompt, streamer=streamer, **settings)
            except ValueError:
                if streamer.has_begun:
                    print(flush=True)  # so that the error starts a new line
                raise
        else:
            for text in write(model, tokenizer, prompt, **settings):
                print(text, end="\n---\n", flush=True)

    if not args.interactive:
        answer(args.prompt)
        return
    print("One prompt per line; an empty line starts a new document; end with Ctrl-D.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            answer(prompt)
        except ValueError as error:  # e.g. the prompt cannot be encoded
            print(f"minigpt generate: {error}", file=sys.stderr)


def _options(flags: list[str]) -> dict[str, Any]:
    """["--top_k", "50", "--do_sample", "false"] -> {"top_k": 50, "do_sample": False}."""
    from ..training.recipe import load_yaml

    options: dict[str, Any] = {}
    while flags:
        flag, *flags = flags
        if not flag.startswith("--"):
            raise MiniGPTError(f"unexpected argument {flag!r}; options look like --top_k 50")
        name, is_joined, value = flag[2:].partition("=")
        if not is_joined:
            value, flags = (flags[0], flags[1:]) if flags and not flags[0].startswith("--") else ("true", flags)
        name = name.replace("-", "_")
        if name == "stop_strings" and not value.startswith("["):
            options[name] = value  # not YAML, in which "no" and "123" are not strings
            continue
        try:
            # YAML parses 1e-3 as a string.
            options[name] = float(value) if SCIENTIFIC.fullmatch(value) else load_yaml(value)
        except ValueError as error:
            raise MiniGPTError(f"--{name} {value}: invalid value: {error}") from error
    return options
