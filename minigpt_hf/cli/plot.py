"""`minigpt plot RUN [RUN …]`: how runs learnt, in one picture."""

from pathlib import Path

from .parser import Parser


def parser() -> Parser:
    """What this verb takes."""
    parser = Parser("plot")
    parser.add_argument("runs", nargs="+", help="run folders: what `minigpt train --output_dir` names")
    parser.add_argument("--output", default="plot.png", help="the picture (default: plot.png)")
    return parser


def run(argv: list[str]) -> None:
    """Read the logs and draw."""
    args = parser().parse_args(argv)

    from ..publish.figures import draw_comparison
    from ..training.resume import read_log

    output, logs = Path(args.output), {}
    if output.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output {output}: pictures are written as .png, .svg or .pdf")
    for name in args.runs:
        if not (Path(name) / "log.jsonl").is_file():
            raise ValueError(f"{name}: no run there (it has no log.jsonl); name what --output_dir was")
        logs[name] = read_log(Path(name) / "log.jsonl")
    names = {name: Path(name).name for name in logs}
    if len(set(names.values())) < len(names):
        names = {name: name for name in logs}  # runs of one name in different folders
    draw_comparison({names[name]: log for name, log in logs.items()}, output)
    print(f"drawn: {output}")
