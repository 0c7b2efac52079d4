"""`minigpt plot RUN [RUN …]`: plot the loss curves of runs in one figure."""

import logging
from pathlib import Path

from ..atomic import write_files
from ..errors import MiniGPTError
from .parser import Parser

logger = logging.getLogger(__name__)


def parser() -> Parser:
    """The arguments of the command."""
    parser = Parser("plot")
    parser.add_argument("runs", nargs="+", help="run folders, i.e. --output_dir of `minigpt train`")
    parser.add_argument("--output", default="plot.png", help="figure to write (default: plot.png)")
    return parser


def run(argv: list[str]) -> None:
    """Read the logs and plot them."""
    args = parser().parse_args(argv)

    from ..publish.figures import draw_comparison, is_number
    from ..training.run_folder import parse_log

    output, logs = Path(args.output), {}
    if output.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise MiniGPTError(f"--output {output}: the format must be .png, .svg or .pdf")
    if output.exists() and not output.is_file():
        raise MiniGPTError(f"--output {output}: already exists and is not a file; give another path")
    for name in args.runs:
        if not (Path(name) / "log.jsonl").is_file():
            raise MiniGPTError(f"{name}: not a run folder (no log.jsonl); give --output_dir of a run")
        try:
            log, faults = parse_log(Path(name) / "log.jsonl")
        except (ValueError, RecursionError) as error:  # invalid UTF-8 or JSON
            raise MiniGPTError(f"{name}: log.jsonl cannot be read ({error}); give another run") from error
        if faults:
            logger.warning("%s: %d incomplete lines of log.jsonl are skipped", name, len(faults))
        values = [row[key] for row in log for key in ("bits_per_byte", "eval_bits_per_byte") if key in row]
        if odd := sum(not is_number(value) for value in values):
            logger.warning("%s: %d non-finite values of log.jsonl are skipped", name, odd)
        logs[name] = log
    names = {name: Path(name).name for name in logs}
    if len(set(names.values())) < len(names):
        names = {name: name for name in logs}  # runs of the same name in different folders
    figure = draw_comparison({names[name]: log for name, log in logs.items()}, output.suffix[1:].lower())
    write_files({output.resolve(): figure})  # a link to a figure remains a link
    print(f"the figure is in {output}")
