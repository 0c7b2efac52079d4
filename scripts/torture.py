"""Fault injection: kill a training run repeatedly with SIGKILL and compare its final state with an uninterrupted run.

    python scripts/torture.py --kills 100

Two of three kills occur while a checkpoint is saved: the process kills itself at a randomly chosen file operation
(open, rename or removal). The others come from the parent process at a random time. After each kill the run is resumed
with the same command. The run uses dropout and lasts several epochs. The exit code is 0 if the final states are
bit-identical: weights, optimizer moments, learning-rate schedule and random number generators.

Then each file of the latest checkpoint is corrupted in five ways, and the previous checkpoint must be selected.
Training processes are forked after the imports, so that 100 kills take only minutes.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

import minigpt_hf.training.train  # noqa: F401 (imported before forking)
from minigpt_hf.cli import main
from minigpt_hf.training.checkpoint import newest_valid, verification_error
from minigpt_hf.training.run_folder import RunFolder

RECIPE = """
tokenizer: bytes
block_size: 16
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 4
attention_dropout: 0.1
embedding_dropout: 0.1
residual_dropout: 0.1
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
max_steps: STEPS
logging_steps: 1
eval_strategy: "no"
save_steps: 2
save_total_limit: 3
sample_tokens: 0
validation_fraction: 0.0
use_cpu: true
"""

CORRUPTIONS = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 0xFF]) + file.read_bytes()[1:]),
}


def start_training(recipe: Path, text: Path, run: Path, kill_at: int | None = None, flags: Sequence[str] = ()) -> int:
    """Fork a process that trains or resumes a run.

    Args:
        flags: Further flags of the command.
        kill_at: The process kills itself at this file operation of checkpoint saving, counted from 1.

    Returns:
        The process id.
    """
    child = os.fork()
    if child:
        return child
    with (run.parent / "output.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    if kill_at is not None:
        operations = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal operations
            operations += event == "shutil.rmtree" or any("/.unfinished" in str(argument) for argument in arguments)
            if operations == kill_at:
                operations += 1  # `os.kill` raises an audit event as well
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
    os._exit(main(["train", "--recipe", str(recipe), "--data", str(text), "--output_dir", str(run), *flags]))


def wait_for(child: int) -> int:
    """Wait for a process and return its exit code, or the negative signal number."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differing_states(first: Path, second: Path) -> list[str]:
    """Return the names of the tensors and values that differ between two checkpoints."""

    def flatten(value, name: str):
        if isinstance(value, dict):
            for key in value:
                yield from flatten(value[key], f"{name}.{key}")
        elif isinstance(value, list | tuple):
            for index, element in enumerate(value):
                yield from flatten(element, f"{name}.{index}")
        else:
            yield name, value

    def load_states(checkpoint: Path) -> dict:
        states = dict(flatten(load_file(checkpoint / "model.safetensors"), "weights"))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            # Unpickling is safe: the file was written by this script.
            states |= flatten(torch.load(checkpoint / name, weights_only=False), name)
        return states

    a, b = load_states(first), load_states(second)
    equal = {name for name in a.keys() & b.keys() if bool(torch.as_tensor(a[name] == b[name]).all())}
    return sorted((a.keys() | b.keys()) - equal)


def torture(kills: int, folder: Path, seed: int, flags: Sequence[str] = ()) -> list[str]:
    """Run the uninterrupted and the interrupted training, and corrupt checkpoints. Returns the failures.

    Args:
        flags: Flags of the interrupted training only.
    """
    recipe, text = folder / "recipe.yaml", folder / "text.txt"
    # 16 steps per kill: about as many as the interrupted run completes.
    recipe.write_text(RECIPE.replace("STEPS", str(16 * kills)))
    text.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:2000], encoding="utf-8")
    reference, interrupted = folder / "reference", folder / "interrupted"
    code = wait_for(start_training(recipe, text, reference))
    if code:
        return [f"the uninterrupted run ended with exit code {code}"]

    rng, kills_in_save, failures = random.Random(seed), 0, []
    print(f"{'kill':>5}  {'at':<42}  latest checkpoint, verified", flush=True)
    for number in range(1, kills + 1):
        if number % 3:
            kill_at = rng.randint(1, 60)
            description = f"file operation {kill_at} of saving"
            code = wait_for(start_training(recipe, text, interrupted, kill_at, flags))
            kills_in_save += code == -signal.SIGKILL
        else:
            seconds = rng.uniform(0.1, 2.5)
            description = f"{seconds:.2f} s after the start"
            child = start_training(recipe, text, interrupted, flags=flags)
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
            code = wait_for(child)
        latest = RunFolder(interrupted).checkpoints()[-1:]
        error = verification_error(latest[0]) if latest else None
        if error:
            failures.append(f"kill {number} left {latest[0].name} corrupt: {error}")
        if code not in (-signal.SIGKILL, 0):
            failures.append(f"run {number} ended with exit code {code} before the kill")
        print(f"{number:>5}  {description:<42}  {latest[0].name if latest else 'none yet'} {error or ''}", flush=True)
        if (interrupted / "model").exists():  # the run finished between two kills: compare it and start another
            failures += compare_final_states(reference, interrupted)
            interrupted.rename(interrupted.with_name(f"interrupted-until-{number}"))

    code = wait_for(start_training(recipe, text, interrupted, flags=flags))
    if code:
        failures.append(f"the last run ended with exit code {code}")
    failures += compare_final_states(reference, interrupted)
    if kills_in_save < kills / 2:
        failures.append(f"only {kills_in_save} kills occurred during a save")
    failures += corrupt_every_file(reference, folder)
    print(f"{kills} kills, {kills_in_save} of them during a save; {len(failures)} failures", flush=True)
    return failures


def corrupt_every_file(run: Path, folder: Path) -> list[str]:
    """Corrupt each file of the latest checkpoint in each way.

    Each time the previous checkpoint must be selected, and the corrupt one renamed rather than deleted.

    Args:
        run: A run with at least two checkpoints; it is not modified.
        folder: A folder for temporary copies.

    Returns:
        The failures.
    """
    previous, latest = RunFolder(run).checkpoints()[-2:]
    failures = []
    print(f"{'file':<28}" + "".join(f"{name:>11}" for name in CORRUPTIONS))
    for file in sorted(latest.iterdir()):
        cells = []
        for name, corrupt in CORRUPTIONS.items():
            copy = folder / f"{file.name}-{name}"
            for checkpoint in (previous, latest):
                shutil.copytree(checkpoint, copy / checkpoint.name)
            corrupt(copy / latest.name / file.name)
            selected, messages = newest_valid(RunFolder(copy))
            is_renamed = (copy / f"{latest.name}.aside-1").is_dir()
            passed = selected == copy / previous.name and len(messages) == 1 and is_renamed
            cells.append("passed" if passed else "FAILED")
            failures += [] if passed else [f"{file.name} {name}: {selected} was selected"]
            shutil.rmtree(copy)
        print(f"{file.name:<28}" + "".join(f"{cell:>11}" for cell in cells), flush=True)
    return failures


def compare_final_states(reference: Path, interrupted: Path) -> list[str]:
    """Compare the last checkpoints of two runs. Returns the failures."""
    last = RunFolder(reference).checkpoints()[-1].name
    names = differing_states(reference / last, interrupted / last)
    return [f"{len(names)} states differ at the end, the first is {names[0]}"] if names else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Kill a training run repeatedly and compare its final state with an uninterrupted run."
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="folder for the runs (default: a temporary folder, removed at the end)"
    )
    parser.add_argument(
        "--async_checkpoints", action="store_true", help="save in the background in the interrupted training"
    )
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="minigpt-torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    failures = torture(args.kills, folder, args.seed, ["--async_checkpoints"] * args.async_checkpoints)
    for failure in failures:
        print(f"FAILURE: {failure}")
    if not args.folder:
        shutil.rmtree(folder)
    sys.exit(1 if failures else 0)
