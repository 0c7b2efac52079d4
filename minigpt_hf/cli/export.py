"""`minigpt export`: convert a model folder for other programs; the result is verified before it is written."""

import logging
from pathlib import Path
from typing import Any

from ..errors import MiniGPTError
from ..export import FORMATS, export_model
from .parser import Parser, quiet, raising_on_sigterm


def parser() -> Parser:
    """The arguments of the command."""
    parser = Parser("export")
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument(
        "--to",
        required=True,
        choices=list(FORMATS),
        help="; ".join(f"{name}: {each.help}" for name, each in FORMATS.items()),
    )
    parser.add_argument("--output_dir", type=Path, help="new folder (default: MODEL-FORMAT, next to the model folder)")
    dtypes = dict.fromkeys(dtype for each in FORMATS.values() for dtype in each.dtypes)
    parser.add_argument("--dtype", choices=list(dtypes), help="data type of the matrices (default: unchanged)")
    parser.add_argument(
        "--context",
        type=int,
        help="maximum context in tokens, for programs without sliding-window attention; at most the window of the model",
    )
    parser.add_argument(
        "--with_sources",
        metavar="TEXT",
        help="with --to html: training text, given as in `minigpt train --data`; its passages that occur in the samples of "
        "the card are embedded in the page",
    )
    return parser


def run(argv: list[str]) -> None:
    """Export the model and print where it is and how it was verified."""
    args = parser().parse_args(argv)
    folder = args.model
    out = args.output_dir or folder.resolve().with_name(f"{folder.resolve().name}-{args.to}")
    quiet()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about operators that these models do not use
    if args.with_sources is not None and args.to != "html":
        raise MiniGPTError(
            f"--with_sources embeds passages in a page, which --to {args.to} does not write: use --to html"
        )
    options: dict[str, Any] = {}
    with raising_on_sigterm():
        if args.with_sources is not None:
            from ..api import copied_samples
            from ..export.conversion import check_output

            check_output(out, folder)
            options["samples"] = [sample.to_dict() for sample in copied_samples(folder, args.with_sources)]
        verified = export_model(folder, out, args.to, args.dtype, args.context, **options)
    print(f"the export is in {out}\nverified: {verified}")
    if args.context:
        print(f"maximum context: {args.context} tokens")
