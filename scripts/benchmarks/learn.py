"""Validation loss and training time, compared with nanoGPT or with models of transformers.

All candidates use the same text, split and number of threads and, except for the shorter runs of minigpt-hf, the same
number of tokens. `--peer nanogpt` runs the unmodified `train.py` of a copy of nanoGPT with its CPU example. `--peer hf` runs
transformers' GPT-2 and Llama in the stock Trainer, with its default settings and with tuned AdamW. Each training run is a
separate process. All models are evaluated as by `minigpt evaluate` on the last tenth of the text, each character once, in
windows of 64. The training time is that of the training steps, without evaluation, saving and sampling.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import nanogpt
from benchmarks.process import CompletedProcess, timed

SCRIPTS = Path(__file__).parents[1]
STEPS, TOKENS_PER_STEP = 2000, 12 * 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--peer", choices=["nanogpt", "hf"], required=True, help="what to compare with")
    parser.add_argument("--nanogpt", type=Path, help="clone of karpathy/nanoGPT, for --peer nanogpt")
    parser.add_argument("--data", type=Path, required=True, help="training text, e.g. tinyshakespeare.txt")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds, one round each (default: 0 1 2)"
    )
    for name, choices in (("--architectures", ["gpt2", "llama"]), ("--settings", ["stock", "tuned"])):
        parser.add_argument(name, nargs="+", default=choices, choices=choices, help="for --peer hf (default: both)")
    parser.add_argument(
        "--max_steps",
        type=int,
        default=STEPS,
        help="steps of the peers; those of minigpt are scaled by the same factor (default: 2000)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train the peers and minigpt-hf, alternating, once per seed, and compare."""
    if args.peer == "nanogpt" and args.nanogpt is None:
        raise SystemExit("--peer nanogpt requires --nanogpt, a clone of https://github.com/karpathy/nanoGPT")
    from minigpt_hf.cli.parser import quiet
    from minigpt_hf.training.recipe import read_recipe

    quiet()
    scale = args.max_steps / STEPS
    trainings = {}
    if args.peer == "nanogpt":
        trainings["nanoGPT"] = lambda folder, seed: train_nanogpt(args, folder)
    else:
        for name in args.architectures:
            for settings in args.settings:
                trainings[f"{name}, {settings}"] = lambda folder, seed, peer=(name, settings): train_hf(
                    args, folder, seed, *peer
                )
    for name, (recipe, changes) in RUNS[args.peer].items():
        settings = {"max_steps": read_recipe(recipe)["max_steps"]} | changes
        settings["max_steps"] = max(1, round(settings["max_steps"] * scale))
        trainings[name] = lambda folder, seed, recipe=recipe, settings=settings: train_ours(
            args, folder, seed, recipe, settings
        )

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in trainings}
    for seed in args.seeds:
        for name, training in trainings.items():
            with tempfile.TemporaryDirectory() as folder:
                row = training(Path(folder), seed)
                rows[name].append(row | {"loss": score(Path(folder) / "model", args.data)})
            values = "   ".join(f"{key} {round(value, 4)}" for key, value in rows[name][-1].items())
            print(f"seed {seed}   {name:<22} {values}", file=sys.stderr, flush=True)
    return compare(rows)


# Runs of minigpt-hf: recipe and changed settings. All but the first one are shorter and reach the final loss of the peer,
# nanoGPT or tuned GPT-2, in the least time or with the fewest tokens.
RUNS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "nanogpt": {
        "minigpt, equal tokens": ("shakespeare-char", {}),
        "minigpt, fast": ("shakespeare-char-fast", {}),
        "minigpt, fewest tokens": (
            "shakespeare-char",
            {
                "max_steps": 176,
                "muon_learning_rate": 0.03,
                "learning_rate": 0.015,
                "muon_momentum": 0.8,
                "initializer_range": 0.05,
                "mtp_loss_weight": 0.0,
            },
        ),
    },
    "hf": {
        "minigpt, equal tokens": ("shakespeare-char", {}),
        "minigpt, fast": ("shakespeare-char", {"max_steps": 400}),
    },
}


def train_ours(
    args: argparse.Namespace, folder: Path, seed: int, recipe: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Run `minigpt train` with a recipe and changed settings, `max_steps` among them."""
    steps = settings["max_steps"]
    argv = [sys.executable, "-m", "minigpt_cli", "train", "--recipe", recipe, "--data", args.data.resolve()]
    argv += ["--output_dir", folder / "run", "--cache_dir", folder / "cache", "--seed", seed]
    argv += flags(settings)
    if steps < 50:
        argv += ["--logging_steps", steps]  # step times are read from the log, which needs at least one entry
    process = timed([*argv, "--use_cpu"], cwd=folder)
    (folder / "run" / "model").rename(folder / "model")
    seconds = seconds_of_log((folder / "run" / "log.jsonl").read_text(), steps)
    metadata = json.loads((folder / "model" / "minigpt.json").read_text())["training"]
    return measurements(metadata["parameters"], metadata["tokens"], seconds, [process])


def flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def seconds_of_log(log: str, steps: int) -> float:
    """Compute the time of all training steps from `log.jsonl`; steps after the last entry count with the mean time."""
    seconds, tokens, step = 0.0, 0, 0
    for row in map(json.loads, log.splitlines()):
        if "tokens_per_second" in row:  # of the steps since the previous entry, without evaluation and saving
            seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
            tokens, step = row["tokens"], row["step"]
    return seconds * steps / step


def train_nanogpt(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run nanoGPT's `prepare.py` and `train.py`, and convert its checkpoint to a model folder."""
    clone = folder / "nanoGPT"
    nanogpt.copy(args.nanogpt, args.data, clone)
    steps = [f"--max_iters={args.max_steps}", f"--lr_decay_iters={args.max_steps}"] if args.max_steps != STEPS else []
    if args.max_steps < 250:
        steps += [f"--eval_interval={args.max_steps}"]  # train.py saves checkpoints only after an evaluation
    prepared = timed([sys.executable, "prepare.py"], cwd=clone / nanogpt.DATA)
    argv = [sys.executable, "train.py", *nanogpt.CPU_EXAMPLE, *steps, "--log_interval=1"]
    trained = timed([*argv, f"--out_dir={folder / 'out'}"], cwd=clone)

    from minigpt_hf.integrations.nanogpt import character_vocabulary, import_checkpoint, read_checkpoint

    import_checkpoint(
        folder / "out" / "ckpt.pt", folder / "model", character_vocabulary(clone / nanogpt.DATA / "meta.pkl")
    )
    weights, _ = read_checkpoint(folder / "out" / "ckpt.pt")
    parameters = sum(weight.numel() for name, weight in weights.items() if name != "lm_head.weight")
    seconds = seconds_of_nanogpt(trained.output, args.max_steps)
    return measurements(parameters, args.max_steps * TOKENS_PER_STEP, seconds, [prepared, trained])


def seconds_of_nanogpt(output: str, steps: int) -> float:
    """Compute the time of all training steps from the output of `train.py`.

    Steps with an evaluation are excluded from the mean, because their time includes it:

    "step 250: train loss 2.4, val loss 2.5"      evaluation before step 250
    "iter 250: loss 2.4, time 812.50ms, mfu 1%"   step 250; the time is that of both
    """
    words = [line.replace(":", "").replace(",", "").split() for line in output.splitlines()]
    evaluated = {line[1] for line in words if line[:1] == ["step"]}
    times = [float(line[5].removesuffix("ms")) for line in words if line[:1] == ["iter"] and line[1] not in evaluated]
    return statistics.mean(times) / 1000 * steps


def train_hf(args: argparse.Namespace, folder: Path, seed: int, architecture: str, settings: str) -> dict[str, Any]:
    """Train a model of transformers with `hf_peer.py`."""
    argv = [
        sys.executable,
        SCRIPTS / "benchmarks" / "hf_peer.py",
        architecture,
        settings,
        "--data",
        args.data.resolve(),
    ]
    argv += ["--output_dir", folder / "model", "--seed", seed, "--max_steps", args.max_steps]
    process = timed(argv, cwd=folder)

    from transformers import AutoModelForCausalLM

    parameters = AutoModelForCausalLM.from_pretrained(folder / "model").num_parameters()
    seconds = json.loads(process.output.splitlines()[-1])["seconds"]
    return measurements(parameters, args.max_steps * TOKENS_PER_STEP, seconds, [process])


def measurements(
    parameters: int, tokens: int, training_seconds: float, processes: list[CompletedProcess]
) -> dict[str, Any]:
    """Collect the cost of a training run: time of its steps, and wall and CPU time of its processes."""
    return {
        "parameters": parameters,
        "tokens": tokens,
        "training_seconds": training_seconds,
        "process_seconds": sum(process.seconds for process in processes),
        "cpu_seconds": sum(process.cpu_seconds for process in processes),
    }


def score(model_folder: Path, data: Path) -> float:
    """Evaluate a model folder: nats per character of the last tenth of the text, in windows of 64."""
    from minigpt_hf.data.corpus import load_corpus
    from minigpt_hf.inference.evaluation import evaluate_texts
    from minigpt_hf.inference.generation import load

    model, tokenizer = load(str(model_folder))
    return evaluate_texts(model, tokenizer, load_corpus(str(data)).validation, block_size=64).loss


def compare(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Compute mean losses and median times of each training run, and ratios to the peers."""
    peers = [name for name in rows if not name.startswith("minigpt")]
    table, summary, ratios = [], {}, []
    for name, runs in rows.items():
        losses = [row["loss"] for row in runs]
        medians = {key: statistics.median(row[key] for row in runs) for key in runs[0] if key != "loss"}
        summary[name] = medians | {"loss": statistics.mean(losses)}
        cells = {"parameters": f"{medians['parameters']:,}", "tokens": f"{medians['tokens']:,}"}
        cells |= {"loss": f"{statistics.mean(losses):.4f}", "range": f"{max(losses) - min(losses):.4f}"}
        seconds = {key: round(medians[key], 1) for key in ("training_seconds", "process_seconds", "cpu_seconds")}
        table.append({"training": name, **cells, **seconds})
    for peer in peers:
        for name in (name for name in rows if name not in peers):
            # Ratios are taken within a round, then the median: runs of one round were under similar load.
            pairs = list(zip(rows[peer], rows[name], strict=True))
            times = {
                f"{key}_ratio": round(statistics.median(peer_row[key] / row[key] for peer_row, row in pairs), 2)
                for key in ("tokens", "training_seconds", "process_seconds", "cpu_seconds")
            }
            difference = f"{summary[name]['loss'] - summary[peer]['loss']:+.4f}"
            ratios.append({"peer": peer, "training": name, "loss_difference": difference, **times})
    return {"trainings": table, "peer_over_minigpt": ratios}
