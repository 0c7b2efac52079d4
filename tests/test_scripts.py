"""The scripts: NumPy forward pass and bare training loop against the package, and the generated conformance tests."""

import json
import os
import subprocess
import sys

import bare_loop
import conformance
import numpy as np
import numpy_gpt
import pytest
import torch
from tokenizers import Tokenizer, processors

from minigpt_hf.cli import main
from minigpt_hf.data.prepared import PreparedText, find_prepared
from minigpt_hf.data.tokenizer import byte_tokenizer, character_tokenizer
from minigpt_hf.export.native import export_native
from minigpt_hf.inference.generation import generate
from minigpt_hf.publish.model_folder import save_model_files
from minigpt_hf.training.recipe import parse_arguments
from tests.conftest import ROOT, random_ids, tiny_model


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_numpy_logits_equal_those_of_torch(tied, kv_heads, window, tmp_path):
    model = tiny_model(
        tie_word_embeddings=tied,
        num_key_value_heads=kv_heads,
        head_dim=16,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=1,
    )
    model.save_pretrained(tmp_path)
    ids = random_ids(40)
    logits = numpy_gpt.forward(ids.numpy(), *numpy_gpt.load(tmp_path))
    np.testing.assert_allclose(logits, model(ids[None]).logits[0].detach().numpy(), atol=1e-4, rtol=0)


def test_numpy_loads_sharded_weights_a_trained_model_folder_and_its_twin(run_folder, tmp_path, tmp_path_factory):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = random_ids(12)
    expected = model(ids[None]).logits[0].detach().numpy()
    np.testing.assert_allclose(numpy_gpt.forward(ids.numpy(), *numpy_gpt.load(tmp_path)), expected, atol=1e-4, rtol=0)
    twin = export_native(run_folder / "model", tmp_path_factory.mktemp("native") / "twin")
    logits = [numpy_gpt.forward(np.arange(5), *numpy_gpt.load(folder)) for folder in (run_folder / "model", twin)]
    assert np.isfinite(logits[0]).all()
    assert np.array_equal(*logits)


def test_numpy_at_low_temperature_generates_the_greedy_tokens(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    ids = random_ids(6).tolist()
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, 6:].tolist()
    generated = numpy_gpt.generate(ids, *numpy_gpt.load(tmp_path), 20, 1e-4, np.random.default_rng(0))
    assert list(generated) == [token for token in greedy if token != 0]


def test_numpy_stops_at_every_eos_token_of_the_generation_config(tmp_path):
    """A chat model ends its answers with another token than that of its configuration, or with either."""
    model = tiny_model()
    ids = random_ids(6).tolist()
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 6:].tolist()
    end = greedy[-1]
    model.generation_config.eos_token_id = [0, end]
    model.save_pretrained(tmp_path)
    generated = numpy_gpt.generate(ids, *numpy_gpt.load(tmp_path), 20, 1e-4, np.random.default_rng(0))
    assert list(generated) == greedy[: greedy.index(end)]


def test_the_numpy_script_generates_text_without_torch_or_transformers(tmp_path):
    save_model_files(tiny_model(vocab_size=258), byte_tokenizer(), tmp_path)
    code = "import sys, runpy; sys.modules['torch'] = sys.modules['transformers'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    script = ROOT / "scripts" / "numpy_gpt.py"
    argv = [sys.executable, "-c", code, script, tmp_path, "--prompt", "def ", "--max_new_tokens", "5"]
    process = subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=60)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("def ")


def test_the_numpy_script_prints_the_text_of_generate(tmp_path):
    """The prompt has the name of a special token, and the text may end in an incomplete character."""
    model, prompt = tiny_model(vocab_size=258), "a<|endoftext|>b"
    save_model_files(model, byte_tokenizer(), tmp_path)
    script = ROOT / "scripts" / "numpy_gpt.py"
    for length in (1, 2, 3, 12):
        options = ["--prompt", prompt, "--max_new_tokens", str(length), "--temperature", "1e-4"]
        argv = [sys.executable, script, tmp_path, *options]
        text = subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=60, check=True).stdout
        expected = generate(model.eval(), byte_tokenizer(), prompt, max_new_tokens=length, do_sample=False)
        assert [text.removesuffix("\n")] == expected


def test_the_numpy_script_encodes_the_whole_prompt_and_no_token_after_it(tmp_path):
    """Whatever settings the tokenizer was saved with."""
    model, prompt = tiny_model(vocab_size=258), "def f(x):"
    save_model_files(model, byte_tokenizer(), tmp_path)
    end, tokenizer = "<|endoftext|>", Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {end}", special_tokens=[(end, 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    argv = [sys.executable, ROOT / "scripts" / "numpy_gpt.py", tmp_path, "--prompt", prompt]
    argv += ["--max_new_tokens", "8", "--temperature", "1e-4"]
    text = subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=60, check=True).stdout
    expected = generate(model.eval(), byte_tokenizer(), prompt, max_new_tokens=8, do_sample=False)
    assert [text.removesuffix("\n")] == expected


@pytest.mark.parametrize(
    ("dtype", "flags", "message"),
    [
        (torch.bfloat16, [], "NumPy has no bfloat16; save the model in float32 or float16"),
        (torch.float32, ["--temperature", "0"], "--temperature 0.0: must be greater than 0"),
    ],
)
def test_the_numpy_script_rejects_bfloat16_and_a_temperature_of_0(dtype, flags, message, tmp_path):
    save_model_files(tiny_model(vocab_size=258).to(dtype), byte_tokenizer(), tmp_path)
    argv = [sys.executable, ROOT / "scripts" / "numpy_gpt.py", tmp_path, *flags]
    process = subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=60)
    assert process.returncode != 0 and message in process.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "setting",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"hidden_act": "gelu"},
        {"model_type": "qwen3", "attention_bias": True},
    ],
)
def test_numpy_rejects_what_it_does_not_compute(setting, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    with pytest.raises(
        SystemExit, match="unsupported model; give a MiniGPT folder with hidden_act 'silu' and without RoPE"
    ):
        numpy_gpt.load(tmp_path)


def test_the_numpy_script_reports_a_missing_folder_and_a_prompt_without_ids(tmp_path):
    script = ROOT / "scripts" / "numpy_gpt.py"
    tokenizer = character_tokenizer(["ab"])
    save_model_files(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model")
    for arguments, message in (
        ([tmp_path / "absent"], "absent: no model folder (No such file or directory: config.json)"),
        ([tmp_path / "model", "--prompt", "z"], "error: the tokenizer cannot encode the prompt: "),
    ):
        process = subprocess.run(
            [sys.executable, script, *arguments], capture_output=True, encoding="utf-8", timeout=60
        )
        assert process.returncode != 0 and message in process.stderr.splitlines()[-1]
        assert "Traceback" not in process.stderr


def test_conformance_requires_a_checkout_of_transformers(tmp_path, capsys):
    assert conformance.main([str(tmp_path)]) == 2
    assert "is not a checkout of transformers" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["minigpt", "minigpt-window"])
def test_the_generated_conformance_tests_use_every_class_of_this_package(model):
    package, name, heads, settings = conformance.MODELS[model]
    module = conformance.MODULE.format(
        package=package, name=name, mappings=conformance.MAPPINGS, heads=heads, settings=settings
    )
    classes = [word for word in __import__(package).__all__ if word.startswith(name)]
    assert {f"package.{word}" in module for word in classes} == {True}


# -- bare_loop.py -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("muon", "max_grad_norm"), [("true", "0.05"), ("false", "0")])
def test_bare_loop_losses_equal_the_trainers_for_a_schedule_with_keyword_arguments(
    muon, max_grad_norm, recipe_file, text_file, tmp_path
):
    """`cosine_with_min_lr` requires `min_lr` or `min_lr_rate`; with 0.9 it differs clearly from a plain cosine.

    A maximum gradient norm of 0 means no clipping.
    """
    flags = ["--data", str(text_file), "--lr_scheduler_type", "cosine_with_min_lr", "--warmup_steps", "2"]
    flags += ["--muon", muon, "--max_grad_norm", max_grad_norm]
    flags += ["--lr_scheduler_kwargs", '{"min_lr_rate": 0.9}', "--max_steps", "8", "--logging_steps", "1"]
    flags += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "no"]
    flags += ["--mtp_loss_weight", "0.5", "--positional_heads", "1,2"]
    losses = bare_loop.train(parse_arguments([*flags, "--output_dir", str(tmp_path / "bare")], str(recipe_file)))
    assert main(["train", "--recipe", str(recipe_file), *flags, "--output_dir", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([row["loss"] for row in rows if "loss" in row], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--num_train_epochs 1", "num_train_epochs"),
        ("--init_from base --lora_rank 2 --no_muon", "init_from"),
        ("--gradient_accumulation_steps 2", "gradient_accumulation_steps"),
        ("--label_smoothing_factor 0.1", "label_smoothing_factor"),
        ("--shuffle_window 8", "shuffle_window"),
        ("--no_muon --optim sgd", "optim"),
        ("--size 30k", "size"),
    ],
)
def test_bare_loop_rejects_settings_that_it_would_ignore(flags, name, text_file, tmp_path):
    argv = [sys.executable, ROOT / "scripts" / "bare_loop.py", "--recipe", "shakespeare-char-fast", "--data", text_file]
    if name in ("init_from", "size"):
        argv[2:4] = ["--recipe", "lora" if name == "init_from" else "auto"]
    argv += ["--use_cpu", "--output_dir", tmp_path / "bare", *flags.split()]
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True)
    assert done.returncode == 2 and name in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "bare").exists()


@pytest.fixture
def sharded_text(text, tmp_path) -> list[str]:
    """Six files of text; returns data, tokenizer and output folder."""
    (tmp_path / "text").mkdir()
    for number in range(6):
        (tmp_path / "text" / f"{number}.txt").write_text(text[number * 5000 : number * 5000 + 4000], encoding="utf-8")
    return [str(tmp_path / "text"), "bytes", str(tmp_path / "shards")]


def assert_is_merged(sharded_text: list[str], tmp_path) -> None:
    """Compare the merged shards with the text tokenized by one process."""
    data, tokenizer, output = sharded_text
    argv = ["--data", data, "--tokenizer", tokenizer, "--validation_fraction", "0"]
    assert main(["tokenize", *argv, "--output_dir", str(tmp_path / "whole")]) == 0
    ours, theirs = (PreparedText.open(find_prepared(str(folder))).train for folder in (output, tmp_path / "whole"))
    assert ours.tokens[:].tolist() == theirs.tokens[:].tolist()


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.slow
def test_two_jobs_of_a_slurm_array_write_the_shards_of_a_text(sharded_text, tmp_path):
    """Each job runs the script with the variables that Slurm sets."""
    command = tmp_path / "bin" / "minigpt"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m minigpt_cli "$@"\n')
    command.chmod(0o755)
    jobs = []
    for number in range(2):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "2"}
        environment |= {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        argv = ["bash", ROOT / "scripts/cluster/tokenize.slurm", *sharded_text, "--validation_fraction", "0"]
        jobs.append(subprocess.Popen(argv, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
    outputs = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert any(f"minigpt tokenize --merge {sharded_text[2]}" in output for output in outputs)
    assert main(["tokenize", "--merge", sharded_text[2]]) == 0
    assert_is_merged(sharded_text, tmp_path)


@pytest.mark.slow
def test_two_workers_of_ray_write_and_merge_the_shards_of_a_text(sharded_text, tmp_path):
    pytest.importorskip("ray", reason="needs Ray: pip install ray")
    data, tokenizer, output = sharded_text
    argv = ["--data", data, "--tokenizer", tokenizer, "--output_dir", output, "--validation_fraction", "0"]
    argv = [ROOT / "scripts/cluster/tokenize_ray.py", *argv, "--shards", "3", "--cpus", "1", "--num_cpus", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, *argv], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert_is_merged(sharded_text, tmp_path)
