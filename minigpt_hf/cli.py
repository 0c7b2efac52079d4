"""`minigpt <verb>`: the package on the command line.

Each verb is a thin skin over one stage, imported inside it, so that `--help` answers at once. What a user can put right is
told in one line with exit code 2; `--debug` shows where it came from.
"""

import argparse
import errno
import json
import sys
from collections.abc import Callable, Sequence

USAGE = """usage: minigpt <verb> [options]      minigpt <verb> --help

  train       train a GPT from scratch on a text, and write a model folder
  evaluate    score a text with any causal LM: loss, perplexity, bits per byte
  generate    write text with any causal LM

  --version   the version of this package
  --debug     after a verb: show the traceback of an error
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        from . import __version__

        print(f"minigpt {__version__}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        print(f"minigpt: unknown verb {verb!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    debug = "--debug" in rest
    return _in_one_line(verb, [flag for flag in rest if flag != "--debug"], debug)


def train(argv: list[str]) -> None:
    """train a GPT from scratch on a text, and write a model folder"""
    from .training.arguments import argument_parser, parse_arguments, recipe_names

    first = argparse.ArgumentParser(prog="minigpt train", add_help=False, allow_abbrev=False)
    first.add_argument(
        "--recipe",
        default="demo",
        help=f"Settings that the other flags override: {', '.join(recipe_names())}, or a YAML file.",
    )
    if "--help" in argv or "-h" in argv:
        argument_parser(prog="minigpt train", parents=[first]).print_help()
        return
    recipe, rest = first.parse_known_args(argv)
    arguments = parse_arguments(rest, recipe.recipe)

    from . import run

    _quiet()
    run.train(arguments)


def evaluate(argv: list[str]) -> None:
    """score a text with any causal LM: loss, perplexity, bits per byte"""
    parser = _Parser(prog="minigpt evaluate", description=evaluate.__doc__)
    parser.add_argument("model", help="a model folder or Hub id")
    parser.add_argument("--data", required=True, help="a text file, a folder, a URL, or `stdlib`")
    parser.add_argument(
        "--split", choices=["all", "train", "validation"], default="all", help="which part of it, as training cuts it"
    )
    parser.add_argument(
        "--validation_fraction", type=float, help="how it is cut (default: as the model's training did)"
    )
    parser.add_argument("--encoding", help="of the text (default: as the model's training, or utf-8)")
    parser.add_argument(
        "--max_characters", type=int, help="score no more (default: of the validation part as many as training did)"
    )
    parser.add_argument("--block_size", type=int, help="inputs in a window (default: what the model was trained on)")
    parser.add_argument("--stride", type=int, help="tokens scored in a window (default: block_size)")
    parser.add_argument("--batch_size", type=int, default=16, help="windows at a time (default: 16)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model brings along")
    args = parser.parse_args(argv)

    from .data.corpus import load_corpus
    from .evaluation import evaluate_texts
    from .generation import load

    _quiet()
    model, tokenizer = load(args.model, args.trust_remote_code)
    recipe = _recipe_of(args.model)
    fraction = args.validation_fraction
    if fraction is None:
        fraction = recipe.get("validation_fraction", 0.1)
    encoding = args.encoding or recipe.get("encoding", "utf-8")
    corpus = load_corpus(args.data, 0.0 if args.split == "all" else fraction, encoding)
    texts = corpus.validation if args.split == "validation" else corpus.train
    if not len(texts):
        raise ValueError(f"nothing of {args.data} is held out for validation; say how much with --validation_fraction")
    most = args.max_characters
    if most is None and args.split == "validation":
        most = recipe.get("validation_characters")
    if most is not None:
        texts = texts.head(most)
    block_size = recipe.get("block_size") if args.block_size is None else args.block_size
    score = evaluate_texts(model, tokenizer, texts, block_size, args.stride, args.batch_size).to_dict()
    if args.json:
        print(json.dumps({"model": args.model, "data": args.data, "split": args.split, **score}))
        return
    print(
        f"loss            {score['loss']:.4f} nats per token\n"
        f"perplexity      {score['perplexity']:.3f}\n"
        f"bits per byte   {score['bits_per_byte']:.4f}\n"
        f"scored          {score['tokens']:,} tokens, {score['bytes']:,} bytes, {score['documents']:,} documents, "
        "end-of-text tokens left out\n"
        f"windows         {score['block_size']} inputs, {score['stride']} scored in each"
    )


def generate(argv: list[str]) -> None:
    """write text with any causal LM"""
    parser = _Parser(
        prog="minigpt generate",
        description=generate.__doc__,
        epilog="Every other flag is an option of transformers' GenerationConfig: --max_new_tokens 300 --temperature 0.8 "
        "--top_k 50 --top_p 0.9 --do_sample false --num_beams 4 --num_return_sequences 3 …",
    )
    parser.add_argument("model", help="a model folder or Hub id")
    parser.add_argument("--prompt", default="", help="what the text starts with (default: nothing: a new document)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model brings along")
    parser.add_argument("--interactive", action="store_true", help="ask for one prompt after another")
    args, rest = parser.parse_known_args(argv)
    options = _options(rest)
    if "max_length" not in options:
        options.setdefault("max_new_tokens", 200)

    from transformers import TextStreamer

    from .generation import encode_prompt, load
    from .generation import generate as write

    _quiet()
    model, tokenizer = load(args.model, args.trust_remote_code)

    def answer(prompt: str) -> None:
        if options.get("num_return_sequences", 1) == 1 and options.get("num_beams", 1) == 1:
            encode_prompt(tokenizer, prompt)  # one that cannot be encoded is not printed
            # The prompt is printed as it was typed; an empty one is the end-of-text token, which is not text.
            print(prompt, end="", flush=True)
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            write(model, tokenizer, prompt, seed=args.seed, streamer=streamer, **options)
        else:
            for text in write(model, tokenizer, prompt, seed=args.seed, **options):
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


VERBS: dict[str, Callable[[list[str]], None]] = {"train": train, "evaluate": evaluate, "generate": generate}


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise ValueError(message)


def _options(flags: list[str]) -> dict:
    """["--top_k", "50", "--do_sample", "false"] -> {"top_k": 50, "do_sample": False}."""
    import yaml

    options = {}
    while flags:
        flag, *flags = flags
        if not flag.startswith("--"):
            raise ValueError(f"unexpected argument {flag!r}; options look like --top_k 50")
        name, is_joined, value = flag[2:].partition("=")
        if not is_joined:
            value, flags = (flags[0], flags[1:]) if flags and not flags[0].startswith("--") else ("true", flags)
        options[name.replace("-", "_")] = yaml.safe_load(value)
    return options


def _recipe_of(folder: str) -> dict:
    """What `minigpt.json` says of how a model folder was trained; nothing, if it is not one of ours."""
    from pathlib import Path

    file = Path(folder) / "minigpt.json"
    return json.loads(file.read_text(encoding="utf-8"))["recipe"] if file.is_file() else {}


def _quiet() -> None:
    """No bars for steps that take a blink; what takes long says so in lines of its own."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _in_one_line(verb: str, argv: list[str], debug: bool) -> int:
    """Run a verb; tell an error that a user can put right in one line."""
    try:
        VERBS[verb](argv)
    except KeyboardInterrupt:
        print(f"minigpt {verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from huggingface_hub.errors import StrictDataclassError

        from .training.stops import RunStopped

        if debug or not isinstance(error, ValueError | OSError | ImportError | StrictDataclassError | RunStopped):
            raise
        if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
            error = error.__cause__  # the sentence of the check, without the name of the checker
        print(f"minigpt {verb}: {' '.join(str(error).split())}", file=sys.stderr)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return errno.ENOSPC  # as DiskFull: the log, too, needs room
        return error.exit_code if isinstance(error, RunStopped) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
