"""`minigpt evaluate`: score a text with a causal LM and print loss, perplexity and bits per byte; or run tasks."""

import json
import math
from pathlib import Path
from typing import Any

from ..atomic import write_files
from ..data.files import FORMATS
from ..errors import MiniGPTError, NotSavedError
from .parser import Parser, quiet


def parser() -> Parser:
    """The arguments of the command, which are those of `minigpt_hf.evaluate`."""
    parser = Parser("evaluate")
    parser.add_argument("model", help="model folder or Hub id")
    parser.add_argument("--data", help="text to score, given as in `minigpt train --data`")
    parser.add_argument(
        "--tasks", help="instead of --data: tasks of lm-evaluation-harness, separated by commas: blimp,arithmetic_1dc"
    )
    parser.add_argument(
        "--task_path", help="with --tasks: folder of further tasks, YAML files with local data; their code is executed"
    )
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
        "--chat",
        action="store_true",
        default=None,
        help=f"score the answers of conversations, the rows of tables {how}",
    )
    parser.add_argument(
        "--no_chat",
        dest="chat",
        action="store_false",
        default=None,
        help="score all text, even if the model was trained on conversations",
    )
    parser.add_argument("--system", help=f"with --chat: system message of conversations that have none {how}")
    parser.add_argument(
        "--max_characters",
        type=int,
        help="score a sample of about this many characters from all documents (default: for the validation split the "
        "sample scored in training, otherwise all)",
    )
    parser.add_argument("--block_size", type=int, help="input tokens per window (default: as in training)")
    parser.add_argument("--stride", type=int, help="tokens scored per window (default: block_size)")
    parser.add_argument("--batch_size", type=int, help="windows or requests per batch (default: as in training, or 16)")
    parser.add_argument(
        "--score",
        choices=["exact", "chrf", "bleu", "rouge"],
        help="with --chat: generate the last answer of each conversation and compare it with the given one",
    )
    parser.add_argument("--answers", help="with --score: JSON Lines file for questions, references and answers")
    parser.add_argument(
        "--no_save",
        action="store_true",
        help="with --score and --tasks: do not add the result to minigpt.json and the card of the model folder",
    )
    parser.add_argument(
        "--copying",
        action="store_true",
        help="generate samples and measure how much of them occurs verbatim in the training split of the data; the baseline "
        "is text of the validation split",
    )
    parser.add_argument("--samples", type=int, help="with --copying: number of samples (default: as in training, 3)")
    parser.add_argument(
        "--sample_tokens", type=int, help="with --copying: maximum length of a sample (default: as in training, or 200)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trust_remote_code", action="store_true", help="execute Python code of the model repository")
    return parser


def run(argv: list[str]) -> None:
    """Score the text and print the result."""
    settings = vars(parser().parse_args(argv))
    as_json, metric, answers, no_save = (settings.pop(name) for name in ("json", "score", "answers", "no_save"))
    of_copying = {name: settings.pop(name) for name in ("samples", "sample_tokens")}
    copying = settings.pop("copying")
    tasks, task_path = settings.pop("tasks"), settings.pop("task_path")
    if (tasks is None) == (settings["data"] is None):
        raise MiniGPTError("give either --data, a text to score, or --tasks, names of tasks")
    if tasks is not None:
        kept = {name: settings[name] for name in ("model", "batch_size", "trust_remote_code")}
        defaults = vars(parser().parse_args(["MODEL"]))
        others = {**settings, **of_copying, "copying": copying, "score": metric, "answers": answers}
        if unused := [name for name, value in others.items() if name not in kept and value != defaults[name]]:
            raise MiniGPTError(f"--{unused[0]} does not apply to --tasks: omit it")
        _evaluate_tasks(kept, tasks, task_path, as_json, save=not no_save)
        return
    if task_path is not None:
        raise MiniGPTError("--task_path requires --tasks")
    if copying:
        if metric is not None or answers is not None:
            raise MiniGPTError("--copying and --score are different measurements: give one of them")
        _measure_copying(settings, of_copying, as_json)
        return
    for name, value in of_copying.items():
        if value is not None:
            raise MiniGPTError(f"--{name} requires --copying")
    if metric is not None:
        _score_answers(settings, metric, answers, as_json, save=not no_save)
        return
    for flag, given in (("--answers", answers is not None), ("--no_save", no_save)):
        if given:
            raise MiniGPTError(f"{flag} requires --score{' or --tasks' if flag == '--no_save' else ''}")

    from .. import api

    quiet()
    score: dict[str, Any] = api.evaluate(**settings).to_dict()
    if as_json:
        if math.isinf(score["perplexity"]):
            score["perplexity"] = None  # JSON cannot represent infinity
        print(json.dumps({name: settings[name] for name in ("model", "data", "split")} | score, allow_nan=False))
        return
    if score["stride"] == 0:
        scored = (
            f"{score['tokens']:,} tokens of answers, {score['bytes']:,} bytes, {score['documents']:,} conversations"
        )
        windows = f"complete conversations of at most {score['block_size']} input tokens"
    else:
        excerpts = f" ({score['excerpts']:,} excerpts)" if score["excerpts"] != score["documents"] else ""
        scored = f"{score['tokens']:,} tokens, {score['bytes']:,} bytes, {score['documents']:,} documents{excerpts}"
        scored += ", without BOS tokens"
        windows = f"{score['block_size']} input tokens, {score['stride']} scored per window"
    print(
        f"loss            {score['loss']:.4f} nats per token\n"
        f"perplexity      {score['perplexity']:.6g}\n"
        f"bits per byte   {score['bits_per_byte']:.4f}\n"
        f"scored          {scored}\n"
        f"windows         {windows}"
    )


def _score_answers(settings: dict[str, Any], metric: str, file: str | None, as_json: bool, save: bool) -> None:
    """Generate and score answers, save and print the result, and write the answers to a file."""
    from .. import api

    quiet()
    if file is not None:  # an error is reported before the answers are generated
        if Path(file).exists() and Path(settings["data"]).exists() and Path(file).samefile(settings["data"]):
            raise MiniGPTError(
                f"--answers {file}: is the file of --data, which would be overwritten; give another file"
            )
        is_new = not Path(file).exists()
        Path(file).open("a", encoding="utf-8").close()
        if is_new:
            Path(file).unlink()
    given, unsaved = {name: value for name, value in settings.items() if value is not None}, None
    try:
        score, rows = api.score_answers(**given, metric=metric, save=save)
    except NotSavedError as error:
        (score, rows), unsaved = error.results, error
    if as_json:
        print(json.dumps({name: settings[name] for name in ("model", "data", "split")} | score.to_dict()), flush=True)
    else:
        show = (lambda value: f"{value:.1%}") if metric == "exact" else (lambda value: f"{value:.3f}")
        print(f"{metric:<24}{show(score.score)}   (95 % interval: {show(score.low)} to {show(score.high)})")
        for name, value in score.baselines.items():
            print(f"  {name:<22}{show(value)}")
        print(f"ended by the model      {score.ended:.1%} of {score.answers:,} answers", flush=True)
    if file is not None:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if Path(file).exists() and not Path(file).is_file():  # /dev/stdout
            Path(file).write_text(content, encoding="utf-8")
        else:
            write_files({Path(file).resolve(): content})
    if unsaved is not None:
        raise unsaved


def _measure_copying(settings: dict[str, Any], of_copying: dict[str, Any], as_json: bool) -> None:
    """Generate samples, compare them with the training text, and print the result."""
    from .. import api

    if settings.pop("split") != "all":
        raise MiniGPTError(
            "--copying compares with the training split and takes its baseline from the validation split: omit --split"
        )
    given = {name: value for name, value in (settings | of_copying).items() if value is not None}
    quiet()
    result = api.measure_copying(**given)
    if as_json:
        print(json.dumps({name: settings[name] for name in ("model", "data")} | result.to_dict()))
        return
    columns = {"samples": result.samples}
    if result.held_out is not None:
        columns["held-out text"] = result.held_out
    rows = [
        ("tokens", [f"{each.tokens:,}" for each in columns.values()]),
        ("longest stretch", [f"{each.longest:,} tokens" for each in columns.values()]),
        *(
            (f"in stretches of {number} tokens or more", [f"{each.shares[number]:.1%}" for each in columns.values()])
            for number in result.samples.shares
        ),
    ]
    print(f"found verbatim in the training text, {result.training_tokens:,} tokens")
    for name, cells in [("", list(columns)), *rows]:
        print(f"{name:<36}" + "".join(f"{cell:>16}" for cell in cells))
    print("\nlongest stretch of each sample")
    for number, stretch in enumerate(result.stretches, 1):
        print(f"{number:>4}  {stretch.tokens:,} of {stretch.of_tokens:,} tokens  {stretch.text!r}")


def _evaluate_tasks(settings: dict[str, Any], tasks: str, task_path: str | None, as_json: bool, save: bool) -> None:
    """Run tasks, save the results and print them."""
    from .. import api

    quiet()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    unsaved = None
    try:
        results = api.evaluate_tasks(**settings, tasks=names, task_path=task_path, save=save)
    except NotSavedError as error:
        results, unsaved = error.results, error
    if as_json:
        print(json.dumps({"model": settings["model"], "tasks": [result.to_dict() for result in results]}), flush=True)
    else:
        width = max((len(result.task) for result in results), default=0)
        for result in results:
            deviation = "" if result.stderr is None else f" ± {result.stderr:.4f}"
            print(
                f"{result.task:<{width}}   {result.metric} {result.value:.4f}{deviation}   {result.samples:,} questions"
            )
    if unsaved is not None:
        raise unsaved
