"""Learning, side by side with a peer: the same text, split, threads and tokens, and no more parameters.

`--peer nanogpt` runs nanoGPT's own `train.py`, unmodified, with its CPU example, from a clone that you name (a copy of
it works in a temporary folder). `--peer hf` runs transformers' GPT-2 and Llama with the stock Trainer, with its defaults
and with AdamW tuned. Each training is a whole process. One evaluator scores all models: the last tenth of the text,
each character once, in windows of 64. Training seconds are those of steps, without evaluations, saving and samples.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import nanogpt
from benchmarks.process import Done, timed

SCRIPTS = Path(__file__).parents[1]
STEPS, TOKENS_PER_STEP = 2000, 12 * 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What it takes."""
    parser.add_argument("--peer", choices=["nanogpt", "hf"], required=True)
    parser.add_argument("--nanogpt", type=Path, help="a clone of karpathy/nanoGPT")
    parser.add_argument("--data", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one round each (default: 0 1 2)")
    parser.add_argument("--architectures", nargs="+", default=["gpt2", "llama"], choices=["gpt2", "llama"])
    parser.add_argument("--settings", nargs="+", default=["stock", "tuned"], choices=["stock", "tuned"])
    parser.add_argument("--fast_steps", type=int, help="of the short training (default: of its recipe)")
    parser.add_argument("--max_steps", type=int, default=STEPS, help="fewer, to try this command (default: 2000)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train peers and ours in turn, once for each seed, and compare."""
    if args.peer == "nanogpt" and args.nanogpt is None:
        raise SystemExit("--peer nanogpt needs --nanogpt, a clone of https://github.com/karpathy/nanoGPT")
    from minigpt_hf.cli.parser import quiet
    from minigpt_hf.training.recipe import read_recipe

    quiet()
    share = args.max_steps / STEPS
    trainings = {}
    if args.peer == "nanogpt":
        trainings["nanoGPT"] = lambda folder, seed: train_nanogpt(args, folder)
    else:
        for name in args.architectures:
            for settings in args.settings:
                trainings[f"{name}, {settings}"] = lambda folder, seed, peer=(name, settings): train_hf(
                    args, folder, seed, *peer
                )
    fast_recipe, fast_steps = FAST[args.peer]
    fast_steps = args.fast_steps or fast_steps or read_recipe(fast_recipe)["max_steps"]
    ours = {"ours, equal tokens": ("shakespeare-char", STEPS), "ours, fast": (fast_recipe, fast_steps)}
    for name, (recipe, steps) in ours.items():
        trainings[name] = lambda folder, seed, recipe=recipe, steps=steps: train_ours(
            args, folder, seed, recipe, max(1, round(steps * share))
        )

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in trainings}
    for seed in args.seeds:
        for name, training in trainings.items():
            with tempfile.TemporaryDirectory() as folder:
                row = training(Path(folder), seed)
                rows[name].append(row | {"loss": score(Path(folder) / "model", args.data)})
            told = "   ".join(f"{key} {round(value, 4)}" for key, value in rows[name][-1].items())
            print(f"seed {seed}   {name:<20} {told}", file=sys.stderr, flush=True)
    return compare(rows)


# The shorter trainings that reach a peer's final loss, by the same recipe: nanoGPT's at its own length, the tuned GPT-2's
# after some more steps.
FAST = {"nanogpt": ("shakespeare-char-fast", None), "hf": ("shakespeare-char-fast", 400)}


def train_ours(args: argparse.Namespace, folder: Path, seed: int, recipe: str, steps: int) -> dict[str, Any]:
    """`minigpt train`, as a person types it."""
    argv = [sys.executable, "-m", "minigpt_hf.cli", "train", "--recipe", recipe, "--data", args.data.resolve()]
    argv += ["--output_dir", folder / "run", "--cache_dir", folder / "cache", "--seed", seed, "--max_steps", steps]
    argv += ["--logging_steps", steps] if steps < 50 else []  # lines tell the time of steps: there must be one
    done = timed([*argv, "--use_cpu"], cwd=folder)
    (folder / "run" / "model").rename(folder / "model")
    seconds = seconds_of_log((folder / "run" / "log.jsonl").read_text(), steps)
    about = json.loads((folder / "model" / "minigpt.json").read_text())["training"]
    return measures(about["parameters"], about["tokens"], seconds, [done])


def seconds_of_log(log: str, steps: int) -> float:
    """Seconds of all steps by our `log.jsonl`; steps after its last line are counted as the others."""
    seconds, tokens, step = 0.0, 0, 0
    for row in map(json.loads, log.splitlines()):
        if "tokens_per_second" in row:  # of the steps since the line before, evaluations and saving left out
            seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
            tokens, step = row["tokens"], row["step"]
    return seconds * steps / step


def train_nanogpt(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """nanoGPT's `prepare.py` and `train.py`, and its checkpoint as a folder."""
    clone = folder / "nanoGPT"
    nanogpt.copy(args.nanogpt, args.data, clone)
    steps = [f"--max_iters={args.max_steps}", f"--lr_decay_iters={args.max_steps}"] if args.max_steps != STEPS else []
    steps += [f"--eval_interval={args.max_steps}"] if args.max_steps < 250 else []  # else it saves nothing
    prepared = timed([sys.executable, "prepare.py"], cwd=clone / nanogpt.DATA)
    argv = [sys.executable, "train.py", *nanogpt.CPU_EXAMPLE, *steps, "--log_interval=1"]
    trained = timed([*argv, f"--out_dir={folder / 'out'}"], cwd=clone)

    from minigpt_hf.nanogpt import character_vocabulary, import_checkpoint, read_checkpoint

    import_checkpoint(
        folder / "out" / "ckpt.pt", folder / "model", character_vocabulary(clone / nanogpt.DATA / "meta.pkl")
    )
    weights, _ = read_checkpoint(folder / "out" / "ckpt.pt")
    parameters = sum(weight.numel() for name, weight in weights.items() if name != "lm_head.weight")
    seconds = seconds_of_nanogpt(trained.output, args.max_steps)
    return measures(parameters, args.max_steps * TOKENS_PER_STEP, seconds, [prepared, trained])


def seconds_of_nanogpt(output: str, steps: int) -> float:
    """Seconds of all steps by what `train.py` prints; one with an evaluation in it is counted as the others.

    "step 250: train loss 2.4, val loss 2.5"      an evaluation, before the step of that number
    "iter 250: loss 2.4, time 812.50ms, mfu 1%"   and that step, with the time of both
    """
    words = [line.replace(":", "").replace(",", "").split() for line in output.splitlines()]
    evaluated = {line[1] for line in words if line[:1] == ["step"]}
    times = [float(line[5].removesuffix("ms")) for line in words if line[:1] == ["iter"] and line[1] not in evaluated]
    return statistics.mean(times) / 1000 * steps


def train_hf(args: argparse.Namespace, folder: Path, seed: int, architecture: str, settings: str) -> dict[str, Any]:
    """One of transformers' models, by `hf_peer.py`."""
    argv = [
        sys.executable,
        SCRIPTS / "benchmarks" / "hf_peer.py",
        architecture,
        settings,
        "--data",
        args.data.resolve(),
    ]
    argv += ["--output_dir", folder / "model", "--seed", seed, "--max_steps", args.max_steps]
    done = timed(argv, cwd=folder)

    from transformers import AutoModelForCausalLM

    parameters = AutoModelForCausalLM.from_pretrained(folder / "model").num_parameters()
    seconds = json.loads(done.output.splitlines()[-1])["seconds"]
    return measures(parameters, args.max_steps * TOKENS_PER_STEP, seconds, [done])


def measures(parameters: int, tokens: int, training_seconds: float, processes: list[Done]) -> dict[str, Any]:
    """What a training took: its steps alone, and its whole commands by the clock and in processor seconds."""
    return {
        "parameters": parameters,
        "tokens": tokens,
        "training_seconds": training_seconds,
        "whole_seconds": sum(done.seconds for done in processes),
        "cpu_seconds": sum(done.cpu_seconds for done in processes),
    }


def score(model_folder: Path, data: Path) -> float:
    """The one evaluator: nats per character of the last tenth of the text, in windows of 64."""
    from minigpt_hf.data.corpus import load_corpus
    from minigpt_hf.evaluation import evaluate_texts
    from minigpt_hf.generation import load

    model, tokenizer = load(str(model_folder))
    return evaluate_texts(model, tokenizer, load_corpus(str(data)).validation, block_size=64).loss


def compare(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Mean losses and median seconds of each training, and ratios to the peers."""
    peers = [name for name in rows if not name.startswith("ours")]
    table, summary, ratios = [], {}, []
    for name, seeds in rows.items():
        losses = [row["loss"] for row in seeds]
        took = {key: statistics.median(row[key] for row in seeds) for key in seeds[0] if key != "loss"}
        summary[name] = took | {"loss": statistics.mean(losses)}
        cells = {"parameters": f"{took['parameters']:,}", "tokens": f"{took['tokens']:,}"}
        cells |= {"loss": f"{statistics.mean(losses):.4f}", "spread": f"{max(losses) - min(losses):.4f}"}
        seconds = {key: round(took[key], 1) for key in ("training_seconds", "whole_seconds", "cpu_seconds")}
        table.append({"training": name, **cells, **seconds})
    for peer in peers:
        for name in (name for name in rows if name not in peers):
            # Runs of one round stood next to each other, so their ratio is taken first and its median second.
            pairs = list(zip(rows[peer], rows[name], strict=True))
            times = {
                f"{key}_ratio": round(statistics.median(theirs[key] / ours[key] for theirs, ours in pairs), 2)
                for key in ("tokens", "training_seconds", "whole_seconds", "cpu_seconds")
            }
            gap = f"{summary[name]['loss'] - summary[peer]['loss']:+.4f}"
            ratios.append({"peer": peer, "against": name, "nats": gap, **times})
    return {"trainings": table, "peer_over_ours": ratios}
