"""`minigpt plot RUN [RUN …]`: how runs learnt, in one picture."""

import logging
from pathlib import Path

from ..errors import MiniGPTError
from .parser import Parser

logger = logging.getLogger(__name__)


def parser() -> Parser:
    """What this verb takes."""
    parser = Parser("plot")
    parser.add_argument("runs", nargs="+", help="run folders: what `minigpt train --output_dir` names")
    parser.add_argument("--output", default="plot.png", help="the picture (default: plot.png)")
    return parser


def run(argv: list[str]) -> None:
    """Read the logs and draw."""
    args = parser().parse_args(argv)

    from ..publish.figures import draw_comparison, is_number
    from ..training.run_folder import rows_and_faults

    output, logs = Path(args.output), {}
    if output.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise MiniGPTError(f"--output {output}: pictures are written as .png, .svg or .pdf")
    if output.exists() and not output.is_file():
        raise MiniGPTError(f"--output {output}: is there already and is not a file; name another one")
    for name in args.runs:
        if not (Path(name) / "log.jsonl").is_file():
            raise MiniGPTError(f"{name}: no run there (it has no log.jsonl); name what --output_dir was")
        try:
            log, faults = rows_and_faults(Path(name) / "log.jsonl")
        except (ValueError, RecursionError) as error:  # of UTF-8 or of JSON
            raise MiniGPTError(f"{name}: its log.jsonl cannot be read ({error}); name another run") from error
        if faults:
            logger.warning("%s: %d incomplete lines of log.jsonl are not drawn", name, len(faults))
        drawn = [row[key] for row in log for key in ("bits_per_byte", "eval_bits_per_byte") if key in row]
        if odd := sum(not is_number(value) for value in drawn):
            logger.warning("%s: %d values of log.jsonl are not finite numbers and are not drawn", name, odd)
        logs[name] = log
    names = {name: Path(name).name for name in logs}
    if len(set(names.values())) < len(names):
        names = {name: name for name in logs}  # runs of one name in different folders
    draw_comparison({names[name]: log for name, log in logs.items()}, output)
    print(f"drawn: {output}")
