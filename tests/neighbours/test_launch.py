"""The launch files with their engines: two CPU processes of accelerate and two workers of Ray give the losses of one process.

The TrainJob is parsed by the models of Kubeflow Trainer. `test_slurm.py` runs `slurm.sbatch`; `tests/test_launch.py` parses
the other files.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

LAUNCH = ROOT / "minigpt_hf" / "launch"
# Without dropout and with AdamW, as in tests/training/test_two_processes.py, so that two processes equal one.
FLAGS = "--attention_dropout 0 --embedding_dropout 0 --residual_dropout 0 --muon false --max_steps 6 --logging_steps 1"


def needs(module: str):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


def train(command: list, run: Path, recipe_file, text_file, batch: int) -> list[float]:
    """Train with a launcher and return the losses."""
    flags = ["--recipe", recipe_file, "--data", text_file, "--use_cpu", "true", *FLAGS.split()]
    argv = [*command, *flags, "--per_device_train_batch_size", batch, "--output_dir", run]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, argv)), env=environment, cwd=run.parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "model" / "model.safetensors").is_file()
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def one(recipe_file, text_file, tmp_path_factory) -> list[float]:
    """The losses of one process."""
    command = [sys.executable, "-m", "minigpt_cli", "train"]
    return train(command, tmp_path_factory.mktemp("one") / "run", recipe_file, text_file, 4)


def assert_two_processes_equal_one(run: Path, two: list[float], one: list[float]) -> None:
    """Gradients are summed in another order: 1e-5 in a loss of 5 (float32)."""
    assert json.loads((run / "fingerprint.json").read_text())["world_size"] == 2
    assert two == pytest.approx(one, abs=1e-5)
    assert len(one) == 6


@pytest.mark.parametrize("file", ["two_cpu_processes.yaml", "fsdp_two_cpu_processes.yaml"])
def test_two_cpu_processes_of_accelerate_give_the_losses_of_one(file, recipe_file, text_file, one, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", LAUNCH / file]
    command = [*launch, "--main_process_port", 0, "-m", "minigpt_cli", "train"]
    two = train(command, tmp_path / "run", recipe_file, text_file, 2)
    assert_two_processes_equal_one(tmp_path / "run", two, one)
    fingerprint = json.loads((tmp_path / "run" / "fingerprint.json").read_text())
    assert bool(fingerprint["fsdp"]) == file.startswith("fsdp")


@needs("ray")
def test_two_workers_of_ray_give_the_losses_of_one(recipe_file, text_file, one, tmp_path):
    two = train([sys.executable, LAUNCH / "ray_train.py", "--workers", 2], tmp_path / "run", recipe_file, text_file, 2)
    assert_two_processes_equal_one(tmp_path / "run", two, one)


@needs("kubeflow_trainer_api")
def test_the_models_of_kubeflow_trainer_accept_the_trainjob():
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    written = yaml.safe_load((LAUNCH / "trainjob.yaml").read_text(encoding="utf-8"))
    job = TrainerV1alpha1TrainJob.from_dict(written)
    assert json.loads(job.to_json()) == written  # unknown fields would be missing
