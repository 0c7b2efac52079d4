"""`minigpt data`: build the questions and answers of a task, in three splits, for `minigpt train --data`."""

from pathlib import Path

from .parser import Parser, quiet, raising_on_sigterm


def parser() -> Parser:
    """The arguments of the command."""
    from ..tasks import TASKS

    parser = Parser("data")
    parser.add_argument("task", choices=TASKS, help=f"{', '.join(TASKS)}")
    parser.add_argument(
        "--output_dir", required=True, help="folder to write: train, validation and test.jsonl, README.md"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of generated questions")
    parser.add_argument("--language", help="with translation: target language, e.g. it, da, fr, de (default: it)")
    parser.add_argument(
        "--source",
        type=Path,
        help="folder with the files of the source: those of quiz(6), or Packages and Translation files of apt "
        "(default: the files of the package bsdgames; those that apt-get downloads for the sources of this system)",
    )
    return parser


def run(argv: list[str]) -> None:
    """Build the task and print the number of rows."""
    args = parser().parse_args(argv)

    from ..atomic import check_new_folder, new_folder
    from ..tasks import build

    quiet()
    folder = Path(args.output_dir)
    check_new_folder(folder)
    with raising_on_sigterm():
        task = build(args.task, args.seed, args.source, args.language)
        with new_folder(folder) as directory:
            task.write(directory)
    counts = ", ".join(f"{len(rows):,} for {split}" for split, rows in task.rows.items())
    print(
        f"{folder}: {counts.replace('for train', 'for training')} (split {task.split})\n"
        f"source: {task.source}; license: {task.license}\n"
        f"minigpt train --recipe task --data {folder} …  trains on it\n"
        f"minigpt evaluate FOLDER --data {folder}/test.jsonl --score {task.metric}  scores the answers"
    )
