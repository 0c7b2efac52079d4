"""`minigpt generate`: any causal LM and a prompt -> text, as it is written."""

import re
import sys

from ..errors import MiniGPTError
from .parser import Parser, quiet

SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def parser() -> Parser:
    """What this verb takes, beside the options of transformers' `GenerationConfig`."""
    parser = Parser(
        "generate",
        epilog="Every other flag is an option of transformers' GenerationConfig: --max_new_tokens 300 --temperature 0.8 "
        "--top_k 50 --top_p 0.9 --do_sample false --num_beams 4 --num_return_sequences 3 …",
    )
    parser.add_argument("model", help="a model folder or Hub id")
    parser.add_argument("--prompt", default="", help="what the text starts with (default: nothing: a new document)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument(
        "--special_tokens",
        action="store_true",
        help="let text of a prompt that spells a special token stand for that token (default: it is text, as in training)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model brings along")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="bfloat16 and a compiled step: twice the speed or more, after minutes of preparation the first time",
    )
    parser.add_argument("--interactive", action="store_true", help="ask for one prompt after another")
    return parser


def run(argv: list[str]) -> None:
    """Load, and write after each prompt."""
    args, rest = parser().parse_known_args(argv)
    options = _options(rest)
    for name in ("max_new_tokens", "max_length", "max_cache_len", "num_return_sequences", "num_beams"):
        if name in options and (type(options[name]) is not int or options[name] < 1):
            raise MiniGPTError(f"--{name} {options[name]}: a whole number of at least 1 is required")
    if "max_length" not in options:
        options.setdefault("max_new_tokens", 200)

    from transformers import TextStreamer

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

    class PromptAndText(TextStreamer):
        """Prints the prompt as it was typed with the first generated token, when all options have been accepted."""

        def __init__(self, tokenizer, prompt: str):
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.prompt, self.has_begun = prompt, False

        def put(self, value) -> None:
            if not self.next_tokens_are_prompt:
                self.begin()
            super().put(value)

        def begin(self) -> None:
            if not self.has_begun:
                self.has_begun = True
                print(self.prompt, end="", flush=True)

        def end(self) -> None:
            self.begin()
            super().end()

    def answer(prompt: str) -> None:
        if options.get("num_return_sequences", 1) == 1 and options.get("num_beams", 1) == 1:
            encode_prompt(tokenizer, prompt, args.special_tokens)  # one that cannot be encoded is not printed
            streamer = PromptAndText(tokenizer, prompt)
            try:
                write(model, tokenizer, prompt, streamer=streamer, **settings)
            except ValueError:
                if streamer.has_begun:
                    print(flush=True)  # the error gets a line of its own
                raise
        else:
            for text in write(model, tokenizer, prompt, **settings):
                print(text, end="\n---\n", flush=True)

    if not args.interactive:
        answer(args.prompt)
        return
    print("One prompt a line; an empty line writes a new document; end with Ctrl-D.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            answer(prompt)
        except ValueError as error:  # a prompt that cannot be encoded does not end the session
            print(f"minigpt generate: {error}", file=sys.stderr)


def _options(flags: list[str]) -> dict:
    """["--top_k", "50", "--do_sample", "false"] -> {"top_k": 50, "do_sample": False}."""
    from ..training.recipe import load_yaml

    options = {}
    while flags:
        flag, *flags = flags
        if not flag.startswith("--"):
            raise MiniGPTError(f"unexpected argument {flag!r}; options look like --top_k 50")
        name, is_joined, value = flag[2:].partition("=")
        if not is_joined:
            value, flags = (flags[0], flags[1:]) if flags and not flags[0].startswith("--") else ("true", flags)
        name = name.replace("-", "_")
        if name == "stop_strings" and not value.startswith("["):
            options[name] = value  # text, not YAML: "no" and "123" are words
            continue
        try:
            # YAML reads 1e-3 as text.
            options[name] = float(value) if SCIENTIFIC.fullmatch(value) else load_yaml(value)
        except ValueError as error:
            raise MiniGPTError(f"--{name} {value}: not a value: {error}") from error
    return options
