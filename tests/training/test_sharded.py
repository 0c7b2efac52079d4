"""Sharded training (FSDP2) on gloo processes: Muon, tensor parallelism, the Trainer, checkpoints, signals and failures."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minigpt_hf import MiniGPTConfig
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.training.arguments import MiniGPTTrainingArguments
from minigpt_hf.training.run_folder import RunFolder
from minigpt_hf.training.tensor_parallel import check_divisible
from tests.conftest import ROOT
from tests.training.conftest import assert_equal, call_on_ranks, go_back, rows, train

WITHOUT_DROPOUT = "--attention_dropout 0 --embedding_dropout 0 --residual_dropout 0".split()
ADAMW = [*WITHOUT_DROPOUT, "--muon", "false"]
TENSOR_PARALLEL = ["--fsdp_config", '{"tp_size": 2}']
EVALUATED = "--validation_fraction 0.08 --eval_strategy steps --eval_steps 2 --sample_tokens 4".split()


def start(ranks: int, script: Path, *arguments) -> subprocess.Popen:
    """Start a script on several processes."""
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        ranks,
        script,
        *arguments,
    ]
    return subprocess.Popen(
        [str(word) for word in argv],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def start_training(ranks: int, recipe, words, folder, *flags) -> subprocess.Popen:
    """Start `minigpt train --fsdp` on several processes."""
    common = ["--recipe", recipe, "--data", words, "--output_dir", folder, "--fsdp"]
    return start(ranks, ROOT / "scripts" / "train.py", *common, *flags)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Wait for the processes and return their output."""
    out, _ = process.communicate(timeout=240)
    assert process.returncode == code, out
    return out


def assert_same_checkpoint(one: Path, other: Path, ranks: int) -> None:
    """Compare the files of two checkpoints bit for bit."""
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for rank in range(ranks):
        name = f"rng_state_{rank}.pth"
        assert_equal(*(torch.load(each / name, weights_only=False) for each in (one, other)))


def muon_results_are_equal(results: dict, expected: set[str]) -> bool:
    """Whether parameters and states equal those of whole parameters, and are sharded if they should be."""
    message = "Muon supports parameters whose rows are sharded once (FSDP, HSDP), not (Shard(dim=1),) and None"
    assert results.pop("error") == f"{message}; use --muon false"
    assert {name for name, _ in results} == expected
    for (name, decay), result in results.items():
        for part in ("parameters", "states"):
            assert_equal(result[part], results["whole", decay][part])
        for placement in [*result["placements"], *result["state placements"]]:
            assert ("Shard(dim=0)" in placement) == (name in ("sharded", "HSDP")), (name, placement)
    return True


def test_two_sharded_processes_equal_one_and_settings_that_cannot_be_sharded_are_rejected(recipe, words, tmp_path):
    """Steps of Muon on sharded and replicated matrices, bit for bit: each matrix is orthogonalized whole, on one rank.

    Steps of AdamW on models that tensor parallelism divides: losses, gradients and their norms, tied and untied.

    Training: gradients are summed in another order, and Muon rounds them to bfloat16: 1e-3 in a loss of 5. Each parameter
    is sharded in training, whole in the checkpoints and in the model folder.
    """
    flags = ["--recipe", recipe, "--data", words, *WITHOUT_DROPOUT, *EVALUATED, "--max_steps", "4"]
    fsdp = [*flags, "--fsdp", "--output_dir"]
    commands = [
        [*fsdp, tmp_path / "refused", "--torch_compile", "true"],
        [*fsdp, tmp_path / "refused", "--fsdp_config", '{"dp_replicate_size": 2}'],
        [*fsdp, tmp_path / "refused", *TENSOR_PARALLEL, "--muon", "false"],
        [*fsdp, tmp_path / "ddp", "--with_ddp"],
        [*fsdp, tmp_path / "two"],
    ]
    (tmp_path / "commands.json").write_text(json.dumps([[str(word) for word in command] for command in commands]))
    from tests.training import on_ranks  # imports FSDP

    out = call_on_ranks(on_ranks.run, 2, tmp_path, tmp_path)
    assert out.count("torch_compile is not supported with fsdp: omit one of them") == 2
    assert out.count("dp_replicate_size is 2: it must divide the number of processes, 2, and be less") == 2
    assert out.count("tp_size is 2: it must divide the number of processes, 2, and be less") == 2
    assert out.count("fsdp was requested, but model.embed_tokens.weight is not sharded") == 2
    for rank in (0, 1):
        result = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert result["codes"] == [2, 2, 2, 2, 0]
        assert max(value for each in result["tensor_parallel"] for value in each.values()) <= 2e-6
        assert len(result["placements"]) == 24
        assert set(result["placements"].values()) == {"(Shard(dim=0),)"}
    assert muon_results_are_equal(torch.load(tmp_path / "muon.pt"), {"whole", "replicated", "sharded"})
    assert not list((tmp_path / "ddp").glob("checkpoint-*"))

    assert train(recipe, words, tmp_path / "one", *flags[4:], "--per_device_train_batch_size", "4") == 0
    for name in ("loss", "grad_norm"):
        one, two = ([row[name] for row in rows(tmp_path / each)] for each in ("one", "two"))
        assert two == pytest.approx(one, abs=1e-3)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    scores = [[row["eval_loss"] for row in map(json.loads, log) if "eval_loss" in row] for log in logs]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
    assert sum("sample" in json.loads(line) for line in logs[1]) == 3
    for folder in (tmp_path / "two" / "checkpoint-4", tmp_path / "two" / "model"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["MiniGPTForCausalLM"]
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == load_file(tmp_path / "one" / "model" / "model.safetensors").keys()
        assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())
    names = [{file.name for file in (tmp_path / name / "model").iterdir()} for name in ("one", "two")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_steps_on_four_ranks_equal_those_of_whole_parameters(tmp_path):
    """Muon with HSDP, two replicas of two shards, bit for bit; tensor parallelism of two groups of two."""
    (tmp_path / "commands.json").write_text("[]")
    from tests.training import on_ranks  # imports FSDP

    call_on_ranks(on_ranks.run, 4, tmp_path, tmp_path)
    assert muon_results_are_equal(torch.load(tmp_path / "muon.pt"), {"whole", "replicated", "sharded", "HSDP"})
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert max(value for report in reports for each in report["tensor_parallel"] for value in each.values()) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "batch", "tolerance", "flags"),
    [
        (2, 2, 1e-5, [*ADAMW, "--tie_word_embeddings", "false"]),
        (4, 1, 1e-3, [*WITHOUT_DROPOUT, *EVALUATED]),
        (4, 1, 1e-5, [*ADAMW, "--fsdp_config", '{"dp_replicate_size": 2}']),
        (4, 2, 1e-5, [*ADAMW, *EVALUATED, *TENSOR_PARALLEL, "--label_smoothing_factor", "0.1"]),
    ],
)
def test_sharded_training_equals_one_process_and_a_resumed_run_an_uninterrupted_one(
    ranks, batch, tolerance, flags, recipe, words, tmp_path
):
    """Batches of 4 in one process; AdamW untied; Muon tied, with evaluations; HSDP; tensor parallelism of two groups of two.

    258 rows are not divisible by 4. The resumed run is equal bit for bit.
    """
    flags = [*flags, "--max_steps", "6", "--gradient_accumulation_steps", "2"]
    one, straight, resumed = tmp_path / "one", tmp_path / "straight", tmp_path / "resumed"
    whole = [flag for flag in flags if "fsdp_config" not in flag and not flag.startswith("{")]
    assert train(recipe, words, one, *whole, "--per_device_train_batch_size", "4") == 0
    flags += ["--per_device_train_batch_size", batch]
    finish(start_training(ranks, recipe, words, straight, *flags))
    # An epoch has 3 steps of 8 sequences; one process takes another one of the 2 sequences that may be left.
    for name, steps in (("loss", 3), ("eval_loss", 1)):
        logs = [map(json.loads, (run / "log.jsonl").read_text().splitlines()) for run in (straight, one)]
        values = [[row[name] for row in log if name in row][:steps] for log in logs]
        assert values[0] == pytest.approx(values[1], abs=tolerance)
    go_back(straight, resumed, 4)
    assert "resuming from step 4" in finish(start_training(ranks, recipe, words, resumed, *flags))
    assert rows(resumed) == rows(straight)
    assert_same_checkpoint(resumed / "checkpoint-6", straight / "checkpoint-6", ranks)
    published = [(run / "model" / "model.safetensors").read_bytes() for run in (resumed, straight)]
    assert published[0] == published[1]


@pytest.mark.slow
def test_a_checkpoint_is_resumed_with_another_number_of_processes_sharded_or_not(recipe, words, tmp_path):
    """1 whole → 4 sharded → 4 tensor-parallel → 2 sharded → 1 whole: the losses are those of one process."""
    flags = [*ADAMW, "--max_steps", "6", "--save_steps", "1"]
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert train(recipe, words, straight, *flags, "--per_device_train_batch_size", "4") == 0
    go_back(straight, run, 1)
    changed = ["--allow_change", "world_size", "fsdp", "fsdp_config"]
    for ranks, batch, step, layout in ((4, 1, 2, []), (4, 2, 3, TENSOR_PARALLEL), (2, 2, 4, [])):
        batches = ["--per_device_train_batch_size", batch]
        finish(start_training(ranks, recipe, words, run, *flags, *batches, *layout, *changed))
        fingerprint = json.loads((run / "checkpoint-6" / "fingerprint.json").read_text())
        assert fingerprint["world_size"] == ranks
        assert fingerprint["fsdp_config"] == ({"tp_size": 2} if layout else None)
        shutil.rmtree(run / "model")
        for each in [each for each in run.glob("checkpoint-*") if int(each.name.split("-")[1]) > step]:
            shutil.rmtree(each)
    assert train(recipe, words, run, *flags, "--per_device_train_batch_size", "4", *changed) == 0
    assert [row["loss"] for row in rows(run)] == pytest.approx([row["loss"] for row in rows(straight)], abs=1e-5)


def start_as_scheduler(recipe, words, folder, *flags) -> list[subprocess.Popen]:
    """Start two ranks without a launcher, as srun does, so that each process reports its own exit code.

    torchrun ends the other workers with SIGTERM as soon as one has exited, which can replace their exit codes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    argv = [sys.executable, ROOT / "scripts" / "train.py", "--recipe", recipe, "--data", words, "--output_dir", folder]
    return [
        subprocess.Popen(
            [str(word) for word in [*argv, "--fsdp", *flags]],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]


def wait_for_steps(run: Path, number: int) -> None:
    """Wait until the log of a run has so many rows."""
    deadline = time.monotonic() + 60
    while not (run / "log.jsonl").exists() or len(rows(run)) < number:
        assert time.monotonic() < deadline, "the training did not start"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_signal_and_a_killed_process_lose_no_step(recipe, words, tmp_path):
    """SIGTERM: all save at the same step and exit with 143. SIGKILL of one: the job ends. Both are resumed exactly."""
    flags = ["--max_steps", "60", "--save_steps", "20"]
    straight, run = tmp_path / "straight", tmp_path / "run"
    finish(start_training(2, recipe, words, straight, *flags))

    ranks = start_as_scheduler(recipe, words, run, *flags)
    wait_for_steps(run, 3)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    out = "".join(finish(rank, 143) for rank in ranks)
    assert out.count("stopped by SIGTERM and saved at step") == 1
    assert len(RunFolder(run).checkpoints()) == 1

    process = start_training(2, recipe, words, run, *flags)
    wait_for_steps(run, len(rows(run)) + 3)
    workers = [child for child in psutil.Process(process.pid).children() if "train.py" in " ".join(child.cmdline())]
    workers[1].kill()
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - began < 10
    assert not (run / "model").exists()

    assert "resuming from step" in finish(start_training(2, recipe, words, run, *flags))
    assert rows(run) == rows(straight)
    assert_same_checkpoint(run / "checkpoint-60", straight / "checkpoint-60", 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "fsdp shards a model over several processes, and this is the only one: start N of them with `torchrun"),
        (["--fsdp_config", '{"version": 1}'], "fsdp_config: version 1 is not supported: FSDP1 has been removed"),
        (["--fsdp_config", '{"state_dict_type": "SHARDED_STATE_DICT"}'], "state_dict_type SHARDED_STATE_DICT is not"),
        (["--fsdp_config", '{"cpu_offload": true}'], "fsdp_config: cpu_offload True is not supported: parameters stay"),
        (["--fsdp_config", '{"cp_size": 2}'], "fsdp_config: cp_size 2 is not supported: sequences are not divided"),
        (["--fsdp_config", '{"sp_size": 2}'], "fsdp_config: sp_size 2 is not supported: sequences are not divided"),
        (
            ["--fsdp_config", '{"tp_size": 0}'],
            "fsdp_config: tp_size 0 is not a number of ranks: give a positive integer",
        ),
        (
            TENSOR_PARALLEL,
            "fsdp_config: tp_size 2 is not supported with Muon, which exchanges whole rows: use --muon false",
        ),
        (
            ["--muon", "false", "--fsdp_config", '{"tp_size": 2, "dp_replicate_size": 2}'],
            "fsdp_config: tp_size 2 is not supported with dp_replicate_size 2: omit one of them",
        ),
        (["--logits_chunk_size", "8"], "logits_chunk_size is not supported with fsdp: omit one of them"),
    ],
)
def test_settings_that_cannot_be_sharded_are_rejected_in_one_line(flags, message, recipe, words, tmp_path, capsys):
    assert train(recipe, words, tmp_path / "run", "--fsdp", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        (4, {}, "tp_size 4 does not divide num_key_value_heads, 2: choose a multiple of 4"),
        (3, {}, "tp_size 3 does not divide num_attention_heads, 4: choose a multiple of 3"),
        (2, {"intermediate_size": 33}, "tp_size 2 does not divide intermediate_size, 33: choose a multiple of 2"),
        (
            2,
            {"residual_dropout": 0.1},
            "residual_dropout 0.1 is not supported with tp_size 2: the ranks of a group would",
        ),
    ],
)
def test_a_model_that_tensor_parallelism_cannot_divide_is_rejected(size, settings, message, tmp_path):
    training = MiniGPTTrainingArguments(
        output_dir=str(tmp_path), fsdp=True, fsdp_config={"tp_size": size}, use_cpu=True
    )
    config = MiniGPTConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, **settings)
    with pytest.raises(MiniGPTError, match=message):
        check_divisible(config, training)
