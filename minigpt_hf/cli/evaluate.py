"""`minigpt evaluate`: any causal LM and a text -> loss, perplexity, bits per byte."""

import json
import math

from .parser import Parser, quiet


def parser() -> Parser:
    """What this verb takes: the arguments of `minigpt_hf.evaluate`."""
    parser = Parser("evaluate")
    parser.add_argument("model", help="a model folder or Hub id")
    parser.add_argument("--data", required=True, help="the text: whatever `minigpt train --data` takes")
    parser.add_argument(
        "--split",
        choices=["all", "train", "validation"],
        default="all",
        help="which part of it, as training cuts it; all: also the validation split that comes with it",
    )
    how = "(default: as the model's training did)"
    parser.add_argument("--validation_fraction", type=float, help=f"how it is cut {how}")
    parser.add_argument("--encoding", help=f"of text, csv and json files {how}")
    parser.add_argument("--encoding_errors", help=f"strict, replace or ignore: bytes that are not text in it {how}")
    parser.add_argument("--newline", choices=["preserve", "universal"], help=f"line ends of text files {how}")
    parser.add_argument("--data_split", help=f"split of a dataset {how}")
    parser.add_argument("--text_column", help=f"column of a table that is text {how}")
    parser.add_argument("--data_format", help=f"read files as text, json, csv, parquet or arrow {how}")
    parser.add_argument(
        "--max_characters",
        type=int,
        help="score a sample of about this many characters from all documents (default: the sample that training scored "
        "for the validation part, otherwise everything)",
    )
    parser.add_argument("--block_size", type=int, help="inputs in a window (default: what the model was trained on)")
    parser.add_argument("--stride", type=int, help="tokens scored in a window (default: block_size)")
    parser.add_argument("--batch_size", type=int, help="windows at a time (default: as in the model's training, or 16)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model brings along")
    return parser


def run(argv: list[str]) -> None:
    """Score and print."""
    settings = vars(parser().parse_args(argv))
    as_json = settings.pop("json")

    from .. import api

    quiet()
    score = api.evaluate(**settings).to_dict()
    if as_json:
        if math.isinf(score["perplexity"]):
            score["perplexity"] = None  # JSON has no infinity
        print(json.dumps({name: settings[name] for name in ("model", "data", "split")} | score, allow_nan=False))
        return
    print(
        f"loss            {score['loss']:.4f} nats per token\n"
        f"perplexity      {score['perplexity']:.3f}\n"
        f"bits per byte   {score['bits_per_byte']:.4f}\n"
        f"scored          {score['tokens']:,} tokens, {score['bytes']:,} bytes, {score['documents']:,} documents, "
        "end-of-text tokens left out\n"
        f"windows         {score['block_size']} inputs, {score['stride']} scored in each"
    )
