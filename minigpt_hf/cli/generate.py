"""`minigpt generate`: generate text with a causal LM and print it token by token."""

import sys

from ..errors import MiniGPTError
from .parser import Parser, generation_options, quiet


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
        help="bfloat16 and a compiled decoding step: at least twice the speed; compiling takes up to a minute the first time",
    )
    parser.add_argument("--interactive", action="store_true", help="read prompts from the terminal until Ctrl-D")
    return parser


def run(argv: list[str]) -> None:
    """Load the model and continue one prompt, or several with `--interactive`."""
    args, rest = parser().parse_known_args(argv)
    options = generation_options(rest)
    if "max_length" not in options:
        options.setdefault("max_new_tokens", 200)

    from ..inference.generation import encode_prompt, load, warn_of_unused_options
    from ..inference.generation import generate as write
    from .streaming import TextPrinter

    quiet()
    model, tokenizer = load(args.model, args.trust_remote_code)
    warn_of_unused_options(model, options, args.seed)

    extra = {}
    if args.fast:
        from ..inference.compiled import UNSUPPORTED_OPTIONS, compile_for_generation

        if unsupported := [name for name in UNSUPPORTED_OPTIONS if name in options]:
            raise MiniGPTError(
                f"--{unsupported[0]} cannot be combined with --fast, which compiles one decoding step with a static cache: "
                "omit one of them"
            )
        defaults = model.generation_config
        for name in UNSUPPORTED_OPTIONS:  # `use_cache` is replaced in any case
            if name != "use_cache" and (value := getattr(defaults, name)) not in (None, 1):
                raise MiniGPTError(
                    f"generation_config.json of the model has {name} {value}, which cannot be combined with --fast: omit it"
                )
        if defaults.num_return_sequences is not None:
            options.setdefault("num_return_sequences", defaults.num_return_sequences)
        print("compiling the model …", file=sys.stderr, flush=True)
        sizes = {name: options[name] for name in ("max_new_tokens", "num_return_sequences") if name in options}
        longest = max(options.pop("max_cache_len", 0), options.get("max_length", 0))
        compiled = compile_for_generation(model, tokenizer, args.prompt, max_cache_len=longest, **sizes)
        print(f"compiled: {compiled}", file=sys.stderr, flush=True)
        extra = {"extra_options": compiled.generation_options}

    settings = {"seed": args.seed, "special_tokens": args.special_tokens, **extra, **options}

    def answer(prompt: str) -> None:
        defaults = model.generation_config
        sequences = options.get("num_return_sequences") or defaults.num_return_sequences or 1
        beams = options.get("num_beams") or defaults.num_beams or 1
        if sequences == beams == 1:  # otherwise the texts are printed when they are complete
            encode_prompt(tokenizer, prompt, args.special_tokens)  # raises before anything is printed
            streamer = TextPrinter(tokenizer, prompt)
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
            prompt = input("> ").removesuffix("\r")  # Windows line ends of a file
        except EOFError:
            print()
            return
        try:
            answer(prompt)
        except ValueError as error:  # e.g. the prompt cannot be encoded
            print(f"minigpt generate: {error}", file=sys.stderr)
