"""`minigpt evaluate`: score a text with a causal LM and print loss, perplexity and bits per byte."""

import json
import math
from typing import Any

from ..data.files import FORMATS
from .parser import Parser, quiet


def parser() -> Parser:
    """The arguments of the command, which are those of `minigpt_hf.evaluate`."""
    parser = Parser("evaluate")
    parser.add_argument("model", help="model folder or Hub id")
    parser.add_argument("--data", required=True, help="text to score, given as in `minigpt train --data`")
    parser.add_argument(
        "--split",
        choices=["all", "train", "validation"],
        default="all",
        help="part of the text, split as in training; all: includes a separate validation split of the data",
    )
    how = "(default: as in training)"
    parser.add_argument("--validation_fraction", type=float, help=f"share of the validation split {how}")
    parser.add_argument("--encoding", help=f"encoding of text, csv and json files {how}")
    parser.add_argument("--encoding_errors", help=f"strict, replace or ignore: handling of undecodable bytes {how}")
    parser.add_argument("--newline", choices=["preserve", "universal"], help=f"line endings of text files {how}")
    parser.add_argument("--data_split", help=f"split of a dataset {how}")
    parser.add_argument("--text_column", help=f"column of a table that holds the text {how}")
    parser.add_argument("--data_format", help=f"format of the files: {', '.join(FORMATS)} {how}")
    parser.add_argument(
        "--max_characters",
        type=int,
        help="score a sample of about this many characters from all documents (default: for the validation split the "
        "sample scored in training, otherwise all)",
    )
    parser.add_argument("--block_size", type=int, help="input tokens per window (default: as in training)")
    parser.add_argument("--stride", type=int, help="tokens scored per window (default: block_size)")
    parser.add_argument("--batch_size", type=int, help="windows per batch (default: as in training, or 16)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trust_remote_code", action="store_true", help="execute Python code of the model repository")
    return parser


def run(argv: list[str]) -> None:
    """Score the text and print the result."""
    settings = vars(parser().parse_args(argv))
    as_json = settings.pop("json")

    from .. import api

    quiet()
    score: dict[str, Any] = api.evaluate(**settings).to_dict()
    if as_json:
        if math.isinf(score["perplexity"]):
            score["perplexity"] = None  # JSON cannot represent infinity
        print(json.dumps({name: settings[name] for name in ("model", "data", "split")} | score, allow_nan=False))
        return
    excerpts = f" ({score['excerpts']:,} excerpts)" if score["excerpts"] != score["documents"] else ""
    print(
        f"loss            {score['loss']:.4f} nats per token\n"
        f"perplexity      {score['perplexity']:.3f}\n"
        f"bits per byte   {score['bits_per_byte']:.4f}\n"
        f"scored          {score['tokens']:,} tokens, {score['bytes']:,} bytes, {score['documents']:,} documents"
        f"{excerpts}, without BOS tokens\n"
        f"windows         {score['block_size']} input tokens, {score['stride']} scored per window"
    )
