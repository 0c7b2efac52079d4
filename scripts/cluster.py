"""Train the same tiny model with each distributed engine and world size, interrupt it, and compare the results.

    python scripts/cluster.py                                  # all rows
    python scripts/cluster.py --row "DDP 2" --output FILE.md   # one row; the table as Markdown, or as JSON (FILE.json)

Columns, each compared with a run of one process or with an uninterrupted run of the same row:

- losses equal: the largest difference of a loss from that of one process, over the first 40 steps (7 epochs); at most 1e-5.
- kill: one rank receives SIGKILL. The job ends by itself, and the same command resumes it.
- SIGTERM: the launcher receives SIGTERM. All ranks save one checkpoint, at the same step, and the same command resumes it.
- resume bit-identical: after both, weights, optimizer, schedule and logged losses equal those of an uninterrupted run.
- merge: `model/` and every checkpoint hold whole weights, which `from_pretrained` loads.
- elastic: the run is resumed with another world size: DDP with one process, one process with two, FSDP2 with four instead of
  two or with two instead of four; the difference of a loss as in the first column.

"TP 2 × FSDP 2" are four processes: two groups, of two ranks each that divide every layer and receive the same sequences.

The processes are started by torchrun and communicate over gloo. "Two hosts" are two network namespaces that are connected by
a virtual Ethernet cable; each starts torchrun. They need root and `ip`. The exit code is 1 if a cell has failed; a cell that
was not run states why.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import transformers
from safetensors.torch import load_file

from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.cli.parser import quiet
from minigpt_hf.training.checkpoint import verification_error
from minigpt_hf.training.run_folder import RunFolder

COLUMNS = ("losses equal", "resume bit-identical", "kill", "SIGTERM", "merge", "elastic")
TOLERANCE = 1e-5  # for losses of about 5; gradients are summed in another order
COMPARED = 40  # steps; later ones amplify the differences of the first
BATCH = 4  # sequences per step, divided among the processes
SECONDS = 300  # time limit of a process

# 26 sequences, i.e. six steps per epoch and an incomplete one that is omitted. No dropout: its masks differ between ranks.
RECIPE = """
tokenizer: bytes
block_size: 16
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 4
attention_dropout: 0
embedding_dropout: 0
residual_dropout: 0
validation_fraction: 0.0
muon: false
learning_rate: 1.0e-3
dataloader_drop_last: true
warmup_steps: 2
logging_steps: 1
save_steps: 20
save_total_limit: 99
sample_tokens: 0
sample_prompt: ""
use_cpu: true
"""


@dataclass(frozen=True)
class Engine:
    """A row of the table.

    Args:
        name: Name of the engine.
        processes: Number of ranks.
        tp_size: Number of ranks that divide each layer and receive the same sequences.
        hosts: Number of network namespaces.
        flags: Flags of `minigpt train` for this engine.
        unsupported: Why the row is not run; empty if it is.
    """

    name: str
    processes: int
    tp_size: int = 1
    hosts: int = 1
    flags: tuple[str, ...] = ()
    unsupported: str = ""

    def __str__(self) -> str:
        name = f"TP {self.tp_size} × {self.name}" if self.tp_size > 1 else self.name
        return f"{name} {self.processes // self.tp_size}" + (f", {self.hosts} hosts" if self.hosts > 1 else "")


ONE = Engine("process", 1)
ENGINES = [
    ONE,
    Engine("DDP", 2),
    Engine("DDP", 4),
    Engine("DDP", 2, hosts=2),
    Engine("FSDP2", 2, flags=("--fsdp",)),
    Engine("FSDP2", 4, flags=("--fsdp",)),
    Engine("FSDP", 4, tp_size=2, flags=("--fsdp", "--fsdp_config", '{"tp_size": 2}')),
]


class Failed(Exception):
    """A check failed; the message is the content of the cell."""


class Job:
    """The processes of one training run, with their common output."""

    def __init__(self, engine: Engine, run: Path, steps: int, namespaces: Sequence[str]):
        folder = run.parent
        self.output = folder / "output.txt"
        train = ["-m", "minigpt_cli", "train", "--recipe", folder / "recipe.yaml", "--data", folder / "text.txt"]
        train += ["--output_dir", run, "--max_steps", steps]
        train += ["--per_device_train_batch_size", BATCH * engine.tp_size // engine.processes, *engine.flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        commands = [[sys.executable, *train]]
        if engine.processes > 1:
            launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", engine.hosts]
            launch += [
                "--nproc_per_node",
                engine.processes // engine.hosts,
                "--rdzv_backend",
                "c10d",
                "--rdzv_id",
                run.name,
            ]
            commands = [[*launch, "--rdzv_endpoint", "localhost:0", *train]]
        if engine.hosts > 1:
            environment["GLOO_SOCKET_IFNAME"] = INTERFACE
            launch += ["--rdzv_endpoint", f"{address(0)}:29500"]
            commands = []
            for host, name in enumerate(namespaces):
                own = ["--local_addr", address(host), "--rdzv_conf", f"is_host={int(host == 0)}"]
                commands += [["ip", "netns", "exec", name, *launch, *own, *train]]
        with self.output.open("w") as output:
            self.launchers = [
                subprocess.Popen(list(map(str, each)), env=environment, stdout=output, stderr=subprocess.STDOUT)
                for each in commands
            ]

    def ranks(self) -> list[psutil.Process]:
        """The processes that train: those without children of this command."""
        tree = [psutil.Process(each.pid) for each in self.launchers]
        tree += [child for each in tree for child in each.children(recursive=True)]
        return [
            each for each in tree if "minigpt_cli" in each.cmdline() and "torch.distributed.run" not in each.cmdline()
        ]

    def wait(self) -> int:
        """Wait until all processes have ended. Returns the largest exit code."""
        deadline = time.monotonic() + SECONDS
        try:
            return max(abs(each.wait(max(0.1, deadline - time.monotonic()))) for each in self.launchers)
        except subprocess.TimeoutExpired:
            raise Failed(f"a launcher is still running after {SECONDS} s") from None
        finally:
            for each in self.launchers:
                if each.poll() is None:
                    for process in (*psutil.Process(each.pid).children(recursive=True), each):
                        process.kill()

    def finish(self) -> None:
        """Wait for the end of a run that is not interrupted."""
        if code := self.wait():
            raise Failed(f"exit code {code}: {last_error(self.output)}")

    def wait_for_step(self, run: Path, step: int) -> None:
        """Wait until a step has been logged."""
        deadline = time.monotonic() + SECONDS
        while not (run / "log.jsonl").exists() or len(rows(run)) < step:
            if any(each.poll() for each in self.launchers) or time.monotonic() > deadline:
                raise Failed(f"step {step} was not reached: {last_error(self.output)}")
            time.sleep(0.02)


def last_error(output: Path) -> str:
    """The last line of an output that states an error."""
    lines = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if "rror" in line]
    return lines[-1].strip()[:100] if lines else f"see {output}"


# -- two hosts --------------------------------------------------------------------------------------------------------

INTERFACE = "eth0"


def address(host: int) -> str:
    """The address of a host in the network of the namespaces."""
    return f"10.231.47.{host + 1}"


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces, connected by a virtual Ethernet cable, which reach only each other.

    Raises:
        Failed: if they cannot be created.
    """
    names = [f"minigpt-{os.getpid()}-{host}" for host in range(2)]
    ends = [f"mg{os.getpid()}-{host}" for host in range(2)]
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add {ends[0]} type veth peer name {ends[1]}"]
    for host, (name, end) in enumerate(zip(names, ends, strict=True)):
        commands += [f"link set {end} netns {name} name {INTERFACE}"]
        commands += [f"-n {name} address add {address(host)}/24 dev {INTERFACE}"]
        commands += [f"-n {name} link set {INTERFACE} up", f"-n {name} link set lo up"]
    try:
        for command in commands:
            try:
                done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            except OSError as error:
                raise Failed("not run: needs the command ip") from error
            if done.returncode:
                raise Failed(f"not run: network namespaces cannot be created ({done.stderr.strip()})")
        yield names
    finally:
        for name in names:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


# -- comparisons ------------------------------------------------------------------------------------------------------


def rows(run: Path) -> list[dict[str, float]]:
    """Loss, gradient norm and learning rate of each complete line of the log."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [{name: row[name] for name in names} for row in map(json.loads, lines) if "loss" in row]


def difference(run: Path, reference: Path) -> str:
    """The largest difference of a loss over the first steps.

    Raises:
        Failed: if it exceeds the tolerance.
    """
    pairs = list(zip(rows(run)[:COMPARED], rows(reference)[:COMPARED], strict=True))
    assert pairs and all(one["step"] == other["step"] for one, other in pairs)
    differences = [abs(one["loss"] - other["loss"]) for one, other in pairs]
    largest = max(differences)
    if not all(each <= TOLERANCE for each in differences):  # also if one is NaN
        raise Failed(f"differ by {largest:.1e}")
    return f"within {largest:.1e}" if largest else "equal"


def compare_bit_for_bit(run: Path, straight: Path) -> str:
    """Compare the last checkpoints and the logs of two runs.

    Raises:
        Failed: if they differ.
    """
    last = RunFolder(straight).checkpoints()[-1].name
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        if (run / last / name).read_bytes() != (straight / last / name).read_bytes():
            raise Failed(f"{name} differs")
    if rows(run) != rows(straight):
        raise Failed("logged losses differ")
    return "equal"


def check_weights(run: Path) -> str:
    """Load the model folder, compare it with the last checkpoint, and verify that each checkpoint holds the same tensors.

    Raises:
        Failed: if not.
    """
    model = MiniGPTForCausalLM.from_pretrained(run / "model")
    checkpoints = RunFolder(run).checkpoints()
    for checkpoint in checkpoints:
        if error := verification_error(checkpoint):
            raise Failed(f"{checkpoint.name}: {error}")
    weights, published = load_file(checkpoints[-1] / "model.safetensors"), model.state_dict()
    if any(not torch.equal(tensor, published[name]) for name, tensor in weights.items()):
        raise Failed("the model differs from the last checkpoint")
    loaded = MiniGPTForCausalLM.from_pretrained(checkpoints[0], output_loading_info=True)[1]
    if loaded["missing_keys"] or loaded["unexpected_keys"] or loaded["mismatched_keys"]:
        raise Failed(f"{checkpoints[0].name} lacks weights")
    return "whole"


def copy_until(run: Path, copy: Path, step: int) -> None:
    """Copy a finished run to its state after an interruption right after the checkpoint of this step."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    for checkpoint in RunFolder(copy).checkpoints():
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)


# -- rows -------------------------------------------------------------------------------------------------------------


def examine(engine: Engine, reference: Path, columns: Sequence[str], steps: int) -> dict[str, str]:
    """Run an engine and fill in its cells. Those of columns that were not asked for are "not run".

    Args:
        reference: Run of one process.
    """
    cells = dict.fromkeys(COLUMNS, engine.unsupported or "not run")
    if engine.unsupported:
        return cells
    if engine.hosts > 1:
        try:
            with two_hosts() as namespaces:
                return fill(cells, engine, reference, columns, steps, namespaces)
        except Failed as failed:
            return dict.fromkeys(COLUMNS, str(failed))
    return fill(cells, engine, reference, columns, steps, ())


def fill(
    cells: dict[str, str],
    engine: Engine,
    reference: Path,
    columns: Sequence[str],
    steps: int,
    namespaces: Sequence[str],
) -> dict[str, str]:
    """See `examine`."""
    folder = reference.parent / f"{engine.name}-{engine.processes}-{engine.hosts}"
    folder.mkdir()
    for name in ("recipe.yaml", "text.txt"):
        shutil.copy(reference.parent / name, folder)
    straight = folder / "straight"

    def check(name: str, compute, *args) -> bool:
        """Fill in a cell. Returns whether the check passed."""
        try:
            cells[name] = compute(*args)
        except Failed as failed:
            cells[name] = f"FAILED: {failed}"
        return not cells[name].startswith("FAILED")

    def start(run: Path, with_engine: Engine = engine) -> Job:
        return Job(with_engine, run, steps, namespaces if with_engine is engine else ())

    def losses() -> str:
        if engine == ONE:
            shutil.copytree(reference, straight)
            return "reference"
        start(straight).finish()
        return difference(straight, reference)

    if not check("losses equal", losses):
        return cells
    if "merge" in columns:
        check("merge", check_weights, straight)

    def kill() -> str:
        job = start(folder / "stopped")
        job.wait_for_step(folder / "stopped", steps // 3)
        job.ranks()[-1].kill()
        if job.wait() == 0:
            raise Failed("exit code 0")
        return "ended, resumed"

    def terminate() -> str:
        job = start(folder / "stopped")
        job.wait_for_step(folder / "stopped", 2 * steps // 3)
        job.launchers[-1].send_signal(signal.SIGTERM)
        job.wait()
        said = job.output.read_text(encoding="utf-8").split("stopped by SIGTERM and saved at step ")[1:]
        if len(said) != 1:
            raise Failed(last_error(job.output))
        step = said[0].partition(";")[0]
        if RunFolder(folder / "stopped").checkpoints()[-1].name != f"checkpoint-{step}":
            raise Failed(f"no checkpoint of step {step}")
        return f"saved at step {step}, resumed"

    def resume() -> str:
        start(folder / "stopped").finish()
        return compare_bit_for_bit(folder / "stopped", straight)

    if {"kill", "SIGTERM", "resume bit-identical"} & {*columns} and check("kill", kill) and check("SIGTERM", terminate):
        check("resume bit-identical", resume)

    def continue_elsewhere() -> str:
        copy_until(straight, folder / "elastic", 20)
        other = Engine("DDP", 2) if engine == ONE else ONE
        if engine.tp_size > 1:
            other = dataclasses.replace(ONE, flags=("--allow_change", "fsdp", "fsdp_config"))
        elif engine.flags:  # the same engine with two instead of four processes, or with four instead of two
            other = dataclasses.replace(engine, processes=6 - engine.processes)
        start(folder / "elastic", other).finish()
        return f"{engine.processes} to {other.processes}: {difference(folder / 'elastic', reference)}"

    if "elastic" in columns:
        check("elastic", continue_elsewhere)
    return cells


def table(results: dict[str, dict[str, str]]) -> str:
    """The results as a Markdown table."""
    cells = [["", *COLUMNS], *([name, *row.values()] for name, row in results.items())]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Returns 1 if a cell has failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [str(engine) for engine in ENGINES]
    parser.add_argument("--row", choices=names, action="append", help="run only this row; may be repeated")
    parser.add_argument("--column", choices=COLUMNS, action="append", help="run only this column; may be repeated")
    parser.add_argument("--steps", type=int, default=180, help="length of a run, a multiple of 20 (default: 180)")
    parser.add_argument("--output", type=Path, help="also write the table: .json, otherwise Markdown")
    parser.add_argument(
        "--folder", type=Path, help="folder for the runs (default: a temporary one, removed at the end)"
    )
    args = parser.parse_args(argv)
    quiet()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="minigpt-cluster-"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    text = Path(argparse.__file__).read_text(encoding="utf-8")[:420]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    results: dict[str, dict[str, str]] = {}
    try:
        reference = folder / "reference"
        Job(ONE, reference, args.steps, ()).finish()
        for engine in ENGINES:
            if not args.row or str(engine) in args.row:
                results[str(engine)] = examine(engine, reference, args.column or COLUMNS, args.steps)
                print(f"{engine}: {results[str(engine)]}", file=sys.stderr, flush=True)
    finally:
        if not args.folder:
            shutil.rmtree(folder)
    title = f"torch {torch.__version__}, transformers {transformers.__version__}, gloo on CPU, {args.steps} steps"
    print(f"{title}\n\n{table(results)}")
    if args.output:
        as_json = json.dumps({"title": title, "rows": results}, indent=2)
        content = as_json if args.output.suffix == ".json" else f"{title}\n\n{table(results)}"
        args.output.write_text(content + "\n", encoding="utf-8")
    return 1 if any(cell.startswith("FAILED") for row in results.values() for cell in row.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
