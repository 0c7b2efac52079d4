"""`minigpt export`: a model folder -> the same model in the words of other programs, verified before it is there."""

import logging
from pathlib import Path

from ..export import FORMATS, export_model
from .parser import Parser, quiet


def parser() -> Parser:
    """What this verb takes."""
    parser = Parser("export")
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument(
        "--to",
        required=True,
        choices=list(FORMATS),
        help="; ".join(f"{name}: {each.help}" for name, each in FORMATS.items()),
    )
    parser.add_argument(
        "--output_dir", type=Path, help="a folder that is not there yet (default: MODEL-FORMAT, beside it)"
    )
    parser.add_argument(
        "--dtype",
        choices=list(dict.fromkeys(dtype for each in FORMATS.values() for dtype in each.dtypes)),
        help="of the matrices (default: what they are in; nothing is cast unasked)",
    )
    parser.add_argument(
        "--context",
        type=int,
        help="the longest text in tokens, for programs that know no sliding windows; at most the model's window",
    )
    return parser


def run(argv: list[str]) -> None:
    """Write the export, or say why it cannot be, and where it is."""
    args = parser().parse_args(argv)
    folder = args.model
    out = args.output_dir or folder.resolve().with_name(f"{folder.resolve().name}-{args.to}")
    quiet()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of operators that no model here has
    verified = export_model(folder, out, args.to, args.dtype, args.context)
    print(f"exported to {out}\nverified: {verified}")
    if args.context:
        print(f"maximum context: {args.context} tokens")
