"""Kill a training again and again, with SIGKILL, and see whether it ends where the quiet one ends, bit for bit.

    python scripts/torture.py --kills 100

Two of three kills fall inside the save of a checkpoint: at a random one of its file operations (an open, a rename, a
removal) the process kills itself. The others fall at a random moment, from outside. After each kill the same command is
given again, and nothing else. Dropout is on; the run has several epochs. Exit code 0 if every state is equal: weights,
moments, schedule and random states.

Then each file of the newest checkpoint is broken in each of five ways, and the one before it must be taken: a table of what
held. Processes are forked from this one, which has imported torch but computed nothing, so a hundred kills take minutes.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import minigpt_hf.run  # noqa: F401 (imported here, so that forked processes need not)
from minigpt_hf.cli import main
from minigpt_hf.training.checkpoint import checkpoints, newest_valid, what_is_wrong

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

DAMAGE = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "halved": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 0xFF]) + file.read_bytes()[1:]),
}


def train(recipe: Path, text: Path, run: Path, dies_at: int | None = None) -> int:
    """Fork a process that trains; with `dies_at`, it kills itself at that file operation of a save."""
    child = os.fork()
    if child:
        return child
    with (run.parent / "output.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    if dies_at is not None:
        seen = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal seen
            seen += event == "shutil.rmtree" or any("/.unfinished" in str(argument) for argument in arguments)
            if seen == dies_at:
                seen += 1  # to kill is an event, too
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
    os._exit(main(["train", "--recipe", str(recipe), "--data", str(text), "--output_dir", str(run)]))


def ended_by(child: int) -> int:
    """Wait for a process: 0 if it ended well, -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def unequal(one: Path, other: Path) -> list[str]:
    """Names of states that differ between two checkpoints."""

    def flat(value, name: str):
        if isinstance(value, dict):
            for key in value:
                yield from flat(value[key], f"{name}.{key}")
        elif isinstance(value, list | tuple):
            for place, each in enumerate(value):
                yield from flat(each, f"{name}.{place}")
        else:
            yield name, value

    def states(checkpoint: Path) -> dict:
        found = dict(flat(load_file(checkpoint / "model.safetensors"), "weights"))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            found |= flat(torch.load(checkpoint / name, weights_only=False), name)  # written by this very program
        return found

    a, b = states(one), states(other)
    same = {name for name in a.keys() & b.keys() if bool(torch.as_tensor(a[name] == b[name]).all())}
    return sorted((a.keys() | b.keys()) - same)


def torture(kills: int, folder: Path, seed: int) -> list[str]:
    """Run the quiet training and the tortured one; return what went wrong."""
    recipe, text = folder / "recipe.yaml", folder / "text.txt"
    recipe.write_text(RECIPE.replace("STEPS", str(16 * kills)))  # about what the kills let it do
    text.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:2000], encoding="utf-8")
    quiet, tortured = folder / "quiet", folder / "tortured"
    code = ended_by(train(recipe, text, quiet))
    if code:
        return [f"the quiet run ended with {code}"]

    source, inside, faults = random.Random(seed), 0, []
    print(f"{'kill':>5}  {'where':<42}  newest checkpoint, verified", flush=True)
    for number in range(1, kills + 1):
        if number % 3:
            dies_at = source.randint(1, 60)
            where = f"in a save, at file operation {dies_at}"
            code = ended_by(train(recipe, text, tortured, dies_at))
            inside += code == -signal.SIGKILL
        else:
            seconds = source.uniform(0.1, 2.5)
            where = f"from outside, after {seconds:.2f} s"
            child = train(recipe, text, tortured)
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
            code = ended_by(child)
        newest = checkpoints(tortured)[-1:]
        fault = what_is_wrong(newest[0]) if newest else None
        if fault:
            faults.append(f"kill {number} left {newest[0].name} broken: {fault}")
        if code not in (-signal.SIGKILL, 0):
            faults.append(f"run {number} ended with {code} by itself")
        print(f"{number:>5}  {where:<42}  {newest[0].name if newest else 'none yet'} {fault or ''}", flush=True)
        if (tortured / "model").exists():  # it got to its end between two kills: begin again, the figures add up
            faults += judge(quiet, tortured)
            tortured.rename(tortured.with_name(f"tortured-until-{number}"))

    code = ended_by(train(recipe, text, tortured))
    if code:
        faults.append(f"the last run ended with {code}")
    faults += judge(quiet, tortured)
    if inside < kills / 2:
        faults.append(f"only {inside} kills fell inside a save")
    faults += break_everything(quiet, folder)
    print(f"{kills} kills, {inside} of them inside a save; {len(faults)} failures", flush=True)
    return faults


def break_everything(run: Path, folder: Path) -> list[str]:
    """Every file × every damage: the checkpoint before must be taken, and the broken one kept."""
    before, newest = checkpoints(run)[-2:]
    faults = []
    print(f"{'file':<28}" + "".join(f"{damage:>9}" for damage in DAMAGE))
    for file in sorted(newest.iterdir()):
        cells = []
        for damage, harm in DAMAGE.items():
            copy = folder / f"{file.name}-{damage}"
            for checkpoint in (before, newest):
                shutil.copytree(checkpoint, copy / checkpoint.name)
            harm(copy / newest.name / file.name)
            found, lines = newest_valid(copy)
            held = found == copy / before.name and len(lines) == 1 and (copy / f"{newest.name}.aside-1").is_dir()
            cells.append("held" if held else "FAILED")
            faults += [] if held else [f"{file.name} {damage}: {found} was taken"]
            shutil.rmtree(copy)
        print(f"{file.name:<28}" + "".join(f"{cell:>9}" for cell in cells), flush=True)
    return faults


def judge(quiet: Path, tortured: Path) -> list[str]:
    """Compare the ends of two runs."""
    last = checkpoints(quiet)[-1].name
    different = unequal(quiet / last, tortured / last)
    return [f"{len(different)} states differ at the end, the first is {different[0]}"] if different else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill a training again and again, and compare where it ends.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="where the runs go (default: a temporary folder, removed at the end)"
    )
    args = parser.parse_args()
    place = args.folder or Path(tempfile.mkdtemp(prefix="minigpt-torture-"))
    place.mkdir(parents=True, exist_ok=True)
    found = torture(args.kills, place, args.seed)
    for line in found:
        print(f"FAILURE: {line}")
    if not args.folder:
        shutil.rmtree(place)
    sys.exit(1 if found else 0)
