"""The launch files and `minigpt launch`: each file is parsed by its engine, as far as the engine is installed.

`tests/neighbours/` runs those that need no GPU, and parses others with DeepSpeed, Slurm and the models of Kubeflow.
"""

import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

import minigpt_cli
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.model.modeling_minigpt import MiniGPTDecoderLayer
from minigpt_hf.training.recipe import parse_arguments, recipe_names
from minigpt_hf.training.sharding import check_config, launcher_config
from tests.conftest import ROOT, tiny_model

FILES = sorted(file for file in (ROOT / "minigpt_hf" / "launch").iterdir() if file.is_file())
BASH = shutil.which("bash")


def comment(file) -> list[str]:
    """Lines of the comment that the file begins with, after the line that names the shell."""
    text = file.read_text(encoding="ascii").removeprefix("#!/bin/bash\n")
    return re.match(r"(#.*\n)+", text)[0].splitlines()


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_list_names_every_file_with_its_purpose_and_what_was_run(capsys):
    assert minigpt_cli.main(["launch", "list"]) == 0
    out = capsys.readouterr().out
    assert len(FILES) == 12
    for file in FILES:
        purpose, *_, status = comment(file)
        assert f"{file.name:<28}{purpose[2:]}\n{'':<28}{status[2:]}\n" in out


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_is_printed_verbatim_by_its_name_or_stem(file, capsys):
    for name in (file.name, file.stem):
        assert minigpt_cli.main(["launch", "show", name]) == 0
        assert capsys.readouterr().out.encode() == file.read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "slrum"], "show slrum: no such file; available: deepspeed_zero2.yaml, "),
        (["show"], "show give the name of a file; available: deepspeed_zero2.yaml, "),
        (["print"], "argument action: invalid choice: 'print'"),
        ([], "the following arguments are required: action"),
    ],
)
def test_an_invalid_command_is_one_line_and_exit_code_2(argv, message, capsys):
    assert minigpt_cli.main(["launch", *argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"minigpt launch: {message}")


def test_the_command_imports_neither_the_package_nor_its_dependencies():
    program = "import sys, minigpt_cli; minigpt_cli.main(['launch', 'show', 'slurm']); print(*sys.modules)"
    *_, modules = subprocess.check_output([sys.executable, "-c", program], text=True, cwd=ROOT).splitlines()
    assert not {"minigpt_hf", "torch", "transformers", "numpy", "logging"} & {*modules.split()}


@pytest.mark.slow
def test_the_wheel_contains_every_file(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for file in FILES:
            assert archive.read(f"minigpt_hf/launch/{file.name}") == file.read_bytes()


# -- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_comment_states_the_command_and_what_was_run_or_only_parsed(file):
    lines = comment(file)
    assert any(line.startswith("#     ") and file.name in line for line in lines)
    assert re.match(r"# (Run|Parsed)\b", lines[-1])
    recipes = re.findall(r"--recipe (\S+)", "\n".join(lines))
    assert set(recipes) <= set(recipe_names())


def parsed_by_accelerate(file: str, *options: str):
    """Parse a configuration file as `accelerate launch` does."""
    config = ROOT / "minigpt_hf" / "launch" / file
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(config), *options, "-m", "minigpt_cli", "train"]
    )
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize(
    ("file", "processes", "kind"),
    [
        ("one_gpu.yaml", 1, None),
        ("eight_gpus.yaml", 8, "multi_gpu"),
        ("two_cpu_processes.yaml", 2, "multi_gpu"),
        ("fsdp2.yaml", 8, "use_fsdp"),
        ("hsdp.yaml", 32, "use_fsdp"),
        ("deepspeed_zero2.yaml", 8, "use_deepspeed"),
        ("deepspeed_zero3.yaml", 8, "use_deepspeed"),
    ],
)
def test_accelerate_reads_the_engine_and_the_number_of_processes(file, processes, kind):
    arguments = parsed_by_accelerate(file)
    assert arguments.num_processes == processes
    assert {name: getattr(arguments, name) for name in ("multi_gpu", "use_fsdp", "use_deepspeed")} == {
        name: name == kind for name in ("multi_gpu", "use_fsdp", "use_deepspeed")
    }
    assert arguments.mixed_precision == ("no" if "cpu" in file else "bf16")


def test_fsdp_is_configured_by_the_launcher_or_by_fsdp_config(monkeypatch):
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", "29500", "--machine_rank", "1"]
    for name, value in prepare_multi_gpu_env(parsed_by_accelerate("hsdp.yaml", *address)).items():
        if name.startswith(("ACCELERATE_USE_FSDP", "FSDP_", "PARALLELISM_CONFIG_")):  # without those of the processes
            monkeypatch.setenv(name, value)
    assert parse_arguments([]).training.fsdp_config["dp_replicate_size"] == "4"
    with pytest.raises(MiniGPTError, match="`accelerate launch` configures FSDP as well: add --fsdp"):
        parse_arguments([], fsdp_config={"tp_size": 2})
    config = parse_arguments(["--fsdp"], fsdp_config={"tp_size": 2}).training.fsdp_config
    assert config["tp_size"] == 2 and "dp_replicate_size" not in config


@pytest.mark.parametrize(("file", "groups"), [("fsdp2.yaml", 1), ("hsdp.yaml", 4), ("fsdp_two_cpu_processes.yaml", 1)])
def test_fsdp_wraps_each_decoder_layer(file, groups, monkeypatch):
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", "29500", "--machine_rank", "1"]
    for name, value in prepare_multi_gpu_env(parsed_by_accelerate(file, *address)).items():
        monkeypatch.setenv(name, value)
    assert int(launcher_config().get("dp_replicate_size", 1)) == groups
    assert launcher_config()["reshard_after_forward"] is True
    check_config(launcher_config())
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    model = tiny_model()
    plugin.set_auto_wrap_policy(model)
    wrapped = [
        module for module in model.modules() if plugin.auto_wrap_policy(module, recurse=False, nonwrapped_numel=0)
    ]
    assert [type(module) for module in wrapped] == [MiniGPTDecoderLayer] * 2


def test_hsdp_shards_within_a_machine_and_replicates_across_machines():
    arguments = parsed_by_accelerate("hsdp.yaml")
    assert arguments.use_parallelism_config
    sizes = [int(getattr(arguments, f"parallelism_config_{name}_size")) for name in ("dp_replicate", "dp_shard", "tp")]
    assert sizes == [arguments.num_machines, arguments.num_processes // arguments.num_machines, 1] == [4, 8, 1]


def test_the_trainjob_starts_one_process_per_gpu():
    job = yaml.safe_load((ROOT / "minigpt_hf" / "launch" / "trainjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = job["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"] == 8
    assert [*trainer["command"], *trainer["args"]][:4] == ["torchrun", "-m", "minigpt_cli", "train"]
    assert all(isinstance(argument, str) for argument in trainer["args"])


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize("name", ["slurm.sbatch", "hf_jobs.sh"])
def test_bash_parses_the_scripts(name):
    done = subprocess.run([BASH, "-n", ROOT / "minigpt_hf" / "launch" / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_hf_jobs_accepts_the_command(tmp_path):
    """`hf` is replaced by a script that adds --dry-run, which prints the job and contacts no server."""
    dry_run = f'exec {sys.executable} -m huggingface_hub.cli.hf jobs run --dry-run "${{@:3}}"'
    (tmp_path / "hf").write_text(f"#!{BASH}\n{dry_run}\n")
    (tmp_path / "hf").chmod(0o755)
    done = subprocess.run(
        [BASH, ROOT / "minigpt_hf" / "launch" / "hf_jobs.sh", "--recipe", "demo", "--hub_model_id", "user/name"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "torchrun --standalone --nproc_per_node 8 -m minigpt_cli train --recipe demo" in done.stdout
    assert "--hub_model_id user/name --push_to_hub" in done.stdout
    assert "not submitted" in done.stdout
