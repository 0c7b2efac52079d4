"""Atomic, verified checkpoints.

1. *Write.* All files are written into `.unfinished/checkpoint-N/`; existing checkpoints are not touched.
2. *Seal.* `manifest.json` lists the size and SHA-256 of every file; each file and the directory are fsynced.
3. *Rename.* One rename, atomic on POSIX file systems, makes it `checkpoint-N/`; the parent directory is fsynced.
4. *Resume.* Checkpoints are verified against their manifests, newest first. An invalid one is renamed, never deleted.
5. *Load.* Names, shapes and dtypes of the tensors are compared with those of the run: the manifest of a checkpoint that was
   changed on purpose may be valid, and kernels of torch read tensors of a wrong shape out of bounds.

With `--async_checkpoints`, steps 2 and 3 are taken in a thread while training continues.
"""

import json
import logging
import math
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..atomic import MANIFEST, fsync, rename_aside, seal, sha256
from ..errors import MiniGPTError
from .optimizer import expected_states
from .run_folder import CHECKPOINT, FINGERPRINT, RunFolder, read_json

logger = logging.getLogger(__name__)

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


@contextmanager
def atomic_checkpoint(checkpoint: Path, finish: Callable[[Callable[[], None]], None] | None = None) -> Iterator[Path]:
    """Yield a folder to fill. If the block ends without an exception, the folder is sealed and renamed to `checkpoint`.

    Args:
        finish: Calls the function that it is given, which seals and renames, now or later. Default: it is called at once.
    """
    folder = staging_folder(checkpoint)
    shutil.rmtree(folder.parent, ignore_errors=True)  # left by a killed process
    folder.parent.mkdir()  # fails if the run folder was removed: a checkpoint alone could not be resumed
    folder.mkdir()

    def seal_and_rename() -> None:
        try:
            seal(folder)
            if checkpoint.exists():  # left by the run before it was resumed from an earlier checkpoint
                rename_aside(checkpoint)
            folder.rename(checkpoint)
            fsync(checkpoint.parent)
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)

    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder.parent, ignore_errors=True)
        raise
    if finish is None:
        seal_and_rename()
    else:
        finish(seal_and_rename)


class BackgroundSave:
    """Completes checkpoints in a thread, at most one at a time.

    The files of a checkpoint have been written, i.e. copied to the page cache of the operating system, when training
    continues. The thread hashes them, synchronizes them to disk and renames their folder; until then the previous checkpoint
    is the newest. As a context manager, waits for the thread at the end of the block.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, complete: Callable[[], None]) -> None:
        """Call a function in the thread. The previous one must have ended: see `wait`."""
        assert self._thread is None

        def run() -> None:
            try:
                complete()
            except Exception as error:
                self._error = error

        # Not a daemon: at the end of the process, Python waits for it.
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of the thread if it has ended with one."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the end of the thread, if there is one, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread, error, self._error = None, self._error, None
            if error is not None:
                raise error

    def __enter__(self) -> "BackgroundSave":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            logger.warning("the checkpoint that was being written is lost: %s", failed)


@contextmanager
def without_crc32() -> Iterator[None]:
    """Let `torch.save` omit the CRC-32 of its files, which takes longer than writing them: the manifest has their SHA-256."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def staging_folder(checkpoint: Path) -> Path:
    """Folder in which a checkpoint is written before it is renamed."""
    return checkpoint.parent / ".unfinished" / checkpoint.name


def verification_error(checkpoint: Path) -> str | None:
    """Compare a checkpoint with its manifest. Returns a description of the first difference, or `None` if it is valid."""
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in entries.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size:,} bytes instead of {entry['size']:,}"
            if sha256(file) != entry["sha256"]:
                return f"the content of {name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    config = "adapter_config.json" if "adapter_config.json" in entries else "config.json"
    if needed := {config, "trainer_state.json", OPTIMIZER, SCHEDULER, FINGERPRINT} - set(entries):
        return f"{', '.join(sorted(needed))} not in {MANIFEST}"
    name = CHECKPOINT.fullmatch(checkpoint.name)  # a copy may have any other name
    if name and (step := read_json(checkpoint / "trainer_state.json")["global_step"]) != int(name[1]):
        return f"it was saved at step {step:,}"
    return None


def is_of_run(checkpoint: Path, log_history: list[dict[str, Any]]) -> bool:
    """Whether a valid checkpoint belongs to the run with these log rows: it has logged the same losses at the same steps."""

    def losses(rows: list[dict[str, Any]]) -> dict[tuple[str, int], str]:
        return {(name, row["step"]): repr(row[name]) for row in rows for name in ("loss", "eval_loss") if name in row}

    logged, expected = losses(read_json(checkpoint / "trainer_state.json")["log_history"]), losses(log_history)
    return all(logged[key] == expected[key] for key in logged.keys() & expected.keys())


def remove_old_checkpoints(run: RunFolder, limit: int | None, newest: Path, best: Path | None) -> None:
    """Delete the oldest checkpoints until `limit` are left, but not `newest`, `best` or symbolic links.

    transformers' `rotate_checkpoints` would also delete folders such as `checkpoint-10-old` and `checkpoint-6.aside-1`.
    """
    if not limit:
        return
    protected = {newest} | ({best} if best else set())
    found = [path for path in run.checkpoints() if not path.is_symlink()]
    old = [path for path in found if path not in protected]
    for path in old[: max(0, len(found) - max(limit, len(protected)))]:
        shutil.rmtree(path, ignore_errors=True)


def newest_valid(run: RunFolder) -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint. Newer ones, which are invalid, are renamed.

    Returns:
        The checkpoint, or `None` if no checkpoint is valid; and a message for each renamed one.
    """
    messages: list[str] = []
    for checkpoint in reversed(run.checkpoints()):
        fault = verification_error(checkpoint)
        if fault is None:
            return checkpoint, messages
        messages.append(f"{checkpoint.name} is invalid ({fault}); renamed to {rename_aside(checkpoint).name}")
    return None, messages


def best_checkpoint(
    runs: list[Path], log_history: list[dict[str, Any]], metric: str, greater_is_better: bool
) -> tuple[int, float, Path] | None:
    """Find the best valid checkpoint of a run by a metric; the earliest of equals.

    Args:
        runs: Run folders in which to look, in this order.
        log_history: The Trainer's log rows.

    Returns:
        Step, value of the metric and folder; `None` if no evaluated checkpoint of this run is valid.
    """
    found: dict[int, tuple[float, Path]] = {}
    for row in log_history:
        for run in map(RunFolder, runs):
            if math.isfinite(row.get(metric, math.nan)) and run.checkpoint(row["step"]).is_dir():
                found.setdefault(row["step"], (row[metric], run.checkpoint(row["step"])))
    order = sorted(found, key=lambda step: (found[step][0] * (-1 if greater_is_better else 1), step))
    valid = (
        step for step in order if verification_error(found[step][1]) is None and is_of_run(found[step][1], log_history)
    )
    step = next(valid, None)
    return None if step is None else (step, *found[step])


# -- content ----------------------------------------------------------------------------------------------------------


def changed_error(checkpoint: Path, fault: str) -> MiniGPTError:
    """The error to raise if the content of a checkpoint with a valid manifest does not fit the run."""
    return MiniGPTError(
        f"{checkpoint}: {fault}; it was changed after it was saved; restore it, or delete it to resume from an earlier one"
    )


def check_tensors(checkpoint: Path, expected: dict[str, torch.Tensor], tied: set[str]) -> None:
    """Check names, dtypes and shapes of the weights in a checkpoint; of adapters, only dtypes.

    Args:
        expected: The weights of the model. They are in float32.
        tied: Names of weights that may be missing.

    Raises:
        MiniGPTError: for the first one that differs from that of the model.
    """
    names = set()
    for file in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118  # not a dictionary
                    tensor = content.get_slice(name)
                    dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                    required = tuple(expected[name].shape) if name in expected else shape
                    if (dtype, shape) != ("F32", required):
                        difference = _difference(f"{file.name}: {name}", (dtype, shape), ("F32", required))
                        raise changed_error(checkpoint, difference)
                    names.add(name)
        except SafetensorError as error:
            raise changed_error(checkpoint, f"{file.name} cannot be read ({error})") from error
    if (checkpoint / "adapter_config.json").is_file():
        return
    for verb, different in (("lack", expected.keys() - names - tied), ("have in addition", names - expected.keys())):
        if different:
            raise changed_error(checkpoint, f"the weights {verb} {min(different)}")


def check_optimizer_state(
    checkpoint: Path, optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], skipped_steps: int
) -> None:
    """Check that the optimizer state of a checkpoint has the states that an optimizer needs, with their shapes and dtypes.

    Args:
        names: Name of each parameter.
        skipped_steps: If there are any, parameters may have no state.

    Raises:
        MiniGPTError: if not.
    """
    saved = load_checked(checkpoint, OPTIMIZER)
    if not isinstance(saved, dict) or not saved.keys() >= {"state", "param_groups"}:
        raise changed_error(checkpoint, f"{OPTIMIZER} is not the state of an optimizer")
    numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if [group["params"] for group in saved["param_groups"]] != numbers:
        raise changed_error(checkpoint, f"the parameter groups of {OPTIMIZER} are not those of the model")
    for saved_group, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for number, parameter in zip(saved_group["params"], group["params"], strict=True):
            state, name = saved["state"].get(number, {}), names[parameter]
            for key, shape in expected_states(optimizer, group, parameter).items():
                # Muon creates second moments when they are first needed, e.g. after an allowed change of their decay.
                is_optional = skipped_steps or (key == "second_moment" and not saved_group.get("second_moment_decay"))
                if key not in state and is_optional:
                    continue
                if not isinstance(tensor := state.get(key), torch.Tensor):
                    raise changed_error(checkpoint, f"{OPTIMIZER} lacks {key} of {name}")
                found, expected = (tensor.dtype, tuple(tensor.shape)), (parameter.dtype, shape)
                if found != expected:
                    raise changed_error(checkpoint, _difference(f"{OPTIMIZER}: {key} of {name}", found, expected))


def check_schedule(checkpoint: Path, step: int | None) -> None:
    """Check that the schedule of a checkpoint is at a step; `None`: at any.

    Raises:
        MiniGPTError: if not.
    """
    saved = load_checked(checkpoint, SCHEDULER)
    if not isinstance(saved, dict) or not isinstance(position := saved.get("last_epoch"), int):
        raise changed_error(checkpoint, f"{SCHEDULER} is not the state of a schedule")
    if step is not None and position != step:
        raise changed_error(checkpoint, f"{SCHEDULER} is at step {position:,} instead of {step:,}")


def load_checked(checkpoint: Path, name: str) -> Any:
    """Load a file that `torch.save` has written; tensors are read when they are used.

    Raises:
        MiniGPTError: if it is missing or cannot be read.
    """
    file = checkpoint / name
    if not file.is_file():
        raise changed_error(checkpoint, f"{name} is missing")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the archive, the pickle or a tensor is damaged
        raise changed_error(checkpoint, f"{name} cannot be read ({type(error).__name__})") from error


def _difference(name: str, found: tuple, expected: tuple) -> str:
    (dtype, shape), (expected_dtype, expected_shape) = found, expected
    return f"{name} is {dtype} {shape} instead of {expected_dtype} {expected_shape}".replace("torch.", "")
