"""Hostile folders and files: no code of theirs runs, nothing outside of them is opened, and each gets one line.

A canary is a file that exists once something has run. The discipline is that of `test_bad_input.py`: one line that names
what was given, exit code 2, no traceback, nothing on disk changes, within ten seconds.
"""

import ast
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minigpt_hf
from minigpt_hf.cli import main
from tests.conftest import ROOT
from tests.doctor.conftest import Broken

SHORT = "--max_steps 1 --eval_strategy no --save_strategy no --load_best_model_at_end false --sample_tokens 0".split()
# What each verb is asked about a folder.
VERBS = {
    "generate": "generate FOLDER --prompt def --max_new_tokens 2 --do_sample false",
    "evaluate": "evaluate FOLDER --data TEXT --max_characters 100",
    "init_from": "train --recipe finetune --init_from FOLDER --data TEXT --block_size 32 --use_cpu true --output_dir new",
    "tokenizer": "train --recipe RECIPE --tokenizer FOLDER --data TEXT --output_dir new",
    "tokenize": "tokenize --recipe RECIPE --tokenizer FOLDER --data TEXT --output_dir new",
    "export": "export FOLDER --to native --output_dir new",
}
MODEL_VERBS = tuple(name for name in VERBS if not name.startswith("token"))


@pytest.fixture
def folder(run_folder, tmp_path, monkeypatch) -> Broken:
    """A copy of a whole model folder, to be made hostile in one way, in a current directory of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\n" * 100)))
    return Broken(run_folder / "model", tmp_path)


def content(place: Path) -> dict:
    files = {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}
    return {path: text for path, text in files.items() if "canary" not in path.name}


def asked(verb: str, folder: Path, text_file: Path, recipe_file: Path) -> list[str]:
    words = {"FOLDER": str(folder), "TEXT": str(text_file), "RECIPE": str(recipe_file)}
    argv = [words.get(word, word) for word in VERBS[verb].split()]
    return argv + SHORT if argv[0] == "train" else argv


def refused(argv: list[str], capfd, message: str, *places: Path) -> None:
    """It is refused in one line that matches, soon, and no place has changed."""
    before, began = [content(place) for place in places], (time.process_time(), time.perf_counter())
    capfd.readouterr()
    code = main(argv)
    processor, seconds = time.process_time() - began[0], time.perf_counter() - began[1]
    _, err = capfd.readouterr()
    said = [line for line in err.splitlines() if line.startswith("minigpt ")]
    assert code == 2, err
    assert len(said) == 1, err
    assert "Traceback" not in err
    assert re.search(message, said[0]), said[0]
    assert "\x1b" not in err
    assert processor < 10  # not the clock of the wall: the machine may be busy
    assert seconds < 100
    assert [content(place) for place in places] == before


# Code.


def poison(folder: Broken) -> None:
    """Code wherever transformers looks for it, in a folder that loads without any of it."""
    code = f"open({str(folder.canary)!r}, 'w').close()\n"
    folder.write("evil.py", code + "class A:\n    pass\n")
    folder.write("custom_generate/generate.py", code + "def generate(model, **kwargs):\n    pass\n")
    for name in ("configuration_minigpt.py", "modeling_minigpt.py"):
        folder.append(name, code)
    classes = dict.fromkeys(folder.get("config.json")["auto_map"], "evil.A")
    folder.json("config.json", auto_map={**classes, "AutoTokenizer": ["evil.A", "evil.A"]}, custom_pipelines={"a": {}})
    folder.json("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.A"]})
    folder.write("processor_config.json", json.dumps({"auto_map": {"AutoProcessor": "evil.A"}}))
    (folder.path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.canary)))


class Bomb:
    """A pickle that creates the canary when it is opened."""

    def __init__(self, canary: Path):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


@pytest.mark.parametrize("verb", VERBS)
def test_code_of_a_folder_does_not_run_and_nobody_is_asked(verb, folder, text_file, recipe_file, monkeypatch, capfd):
    poison(folder)

    def read(*args):
        raise AssertionError("standard input was read")

    monkeypatch.setattr("builtins.input", read)
    code = main(asked(verb, folder.path, text_file, recipe_file))
    _, err = capfd.readouterr()
    assert not folder.canary.exists()
    assert "y/N" not in err
    assert code == 0, err


def foreign(folder: Broken) -> None:
    """Only its own code could load it."""
    poison(folder)
    folder.json("config.json", model_type="foreign")
    folder.json("tokenizer_config.json", tokenizer_class="ForeignTokenizer")


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_needs_its_code_is_refused(verb, folder, text_file, recipe_file, monkeypatch, capfd):
    foreign(folder)

    def read(*args):
        raise AssertionError("standard input was read")

    monkeypatch.setattr("builtins.input", read)
    refused(
        asked(verb, folder.path, text_file, recipe_file),
        capfd,
        "it needs custom code, which is not run|type is .foreign.",
        folder.outside,
    )
    assert not folder.canary.exists()


@pytest.mark.parametrize("verb", ["init_from", "export"])
def test_a_process_with_an_answer_on_standard_input_runs_no_code_either(verb, folder, text_file, recipe_file):
    foreign(folder)
    argv = asked(verb, folder.path, text_file, recipe_file)
    done = subprocess.run(
        [sys.executable, "-m", "minigpt_hf.cli", *argv],
        input="y\n" * 100,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert not folder.canary.exists()
    assert "y/N" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("minigpt ")]) == 1, done.stderr


def test_push_and_its_examination_run_no_code_of_a_folder(folder, hub, capfd):
    foreign(folder)
    assert main(["push", str(folder.path), "--repo-id", "user/x"]) == 2
    assert "not uploaded" in capfd.readouterr().err
    assert not folder.canary.exists()
    assert hub.requests == []


def test_text_on_standard_input_arrives_whole_beside_a_model_with_code(folder, text, monkeypatch):
    poison(folder)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    argv = ["train", "--recipe", "finetune", "--init_from", str(folder.path), "--data", "-", "--block_size", "32"]
    assert main([*argv, *SHORT, "--use_cpu", "true", "--output_dir", "new"]) == 0
    about = json.loads(Path("new/model/minigpt.json").read_text())["data"]
    parts = [part for part in (about["train"], about["validation"]) if part]
    assert sum(part["characters"] for part in parts) == len(text)
    assert not folder.canary.exists()


# Every loader of the package says whether code may run; a class of ours, or one of transformers, cannot run any.
CANNOT_RUN_CODE = {"MiniGPTForCausalLM", "MiniGPTConfig", "Qwen3ForCausalLM", "GenerationConfig"}


def test_every_loader_call_says_whether_code_is_trusted():
    calls = []
    for file in (ROOT / "minigpt_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("from_pretrained", "from_config"):
                owner = ast.unparse(node.func.value)
                said = {keyword.arg for keyword in node.keywords}
                calls.append(owner)
                assert "trust_remote_code" in said or owner in CANNOT_RUN_CODE, f"{file}:{node.lineno}"
                if node.func.attr == "from_pretrained" and owner.endswith("ForCausalLM"):
                    assert said & {"use_safetensors", "gguf_file"}, (
                        f"{file}:{node.lineno}"
                    )  # else a pickle may be opened
    assert len(calls) > 10


# Settings that lead elsewhere, malformed settings, weights.

FOLDERS: dict[str, tuple] = {}  # name -> (function, message, verbs)


def hostile(message: str, *verbs: str):
    def keep(function):
        FOLDERS[function.__name__.replace("_", " ")] = (function, message, verbs or MODEL_VERBS)
        return function

    return keep


@hostile("`_attn_implementation` is 'evil/kernel'", *VERBS)
def a_kernel(folder):
    folder.json("config.json", _attn_implementation="evil/kernel")


@hostile("`attn_implementation` is 'evil/kernel:f'", "generate", "init_from")
def a_kernel_for_a_part(folder):
    folder.json("config.json", attn_implementation={"": "evil/kernel:f"})


@hostile("`_attn_implementation_internal` is 'evil/kernel'", "generate")
def a_kernel_by_its_internal_name(folder):
    folder.json("config.json", _attn_implementation_internal="evil/kernel")


@hostile("`experts_implementation` is 'deepgemm'", "generate")
def kernels_of_experts(folder):
    folder.json("config.json", experts_implementation="deepgemm")


@hostile("`quantization_config` names 'finegrained_fp8'", "generate", "init_from", "export")
def quantization_by_kernels(folder):
    folder.json("config.json", quantization_config={"quant_method": "finegrained_fp8"})


@hostile("its weights are quantized, and cannot be trained", "init_from")
def quantized_weights(folder):
    folder.json("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


@hostile("`compile_config` refers to code outside", "generate")
def a_compiler(folder):
    folder.json("generation_config.json", compile_config={"backend": "evil", "_compile_all_devices": True})


@hostile("adapter_config.json refers to the base model 'evil/base'", *VERBS)
def an_adapter_of_a_model_elsewhere(folder):
    folder.write("adapter_config.json", json.dumps({"base_model_name_or_path": "evil/base", "peft_type": "LORA"}))


@hostile("adapter_config.json refers to the base model 'evil/base'", "generate")
def nothing_but_an_adapter(folder):
    an_adapter_of_a_model_elsewhere(folder)
    folder.delete("config.json")


@hostile("`transformers_weights` is '../outside/model.safetensors'")
def weights_named_elsewhere(folder):
    shutil.copy(folder.path / "model.safetensors", folder.outside)
    folder.json("config.json", transformers_weights="../outside/model.safetensors")


@hostile("`vocab_file` is '/etc/passwd'", *VERBS)
def a_vocabulary_elsewhere(folder):
    folder.json("tokenizer_config.json", vocab_file="/etc/passwd")


@hostile("no file named model.safetensors")
def weights_in_a_pickle_only(folder):
    folder.delete("model.safetensors")
    (folder.path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.canary)))


@hostile("model.safetensors is a link")
def weights_by_a_link_that_leads_out(folder):
    shutil.move(folder.path / "model.safetensors", folder.outside)
    (folder.path / "model.safetensors").symlink_to(folder.outside / "model.safetensors")


@hostile("tokenizer.json is a device, a pipe or a socket", *VERBS)
def a_pipe_for_a_tokenizer(folder):
    folder.delete("tokenizer.json")
    os.mkfifo(folder.path / "tokenizer.json")


def shards(folder: Broken, **changes) -> None:
    """The weights in one shard and an index, with a change to the place of a tensor."""
    kept = load_file(folder.path / "model.safetensors")
    folder.delete("model.safetensors")
    save_file(kept, folder.path / "model-00001-of-00001.safetensors", {"format": "pt"})
    places = dict.fromkeys(kept, "model-00001-of-00001.safetensors") | {"model.norm.weight": changes["norm"]}
    folder.write("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": places}))


@hostile(r"index.json names files outside the folder: \.\./outside/secret.safetensors")
def a_shard_above(folder):
    shards(folder, norm="../outside/secret.safetensors")


@hostile(r"index.json names files outside the folder: /.*secret.safetensors", "generate", "init_from")
def a_shard_by_its_absolute_path(folder):
    shards(folder, norm=str(folder.outside / "secret.safetensors"))


@hostile("index.json names a.safetensors, which is missing")
def a_missing_shard(folder):
    shards(folder, norm="a.safetensors")


@hostile("index.json has no `weight_map`", "generate", "init_from")
def a_shard_that_is_a_number(folder):
    shards(folder, norm=7)


@hostile("duplicate key 'weight_map'", "generate", "init_from")
def two_maps(folder):
    shards(folder, norm="model-00001-of-00001.safetensors")
    index = folder.path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}, ' + index.read_text()[1:])


@hostile("index.json names missing.safetensors, which is missing", "generate", "evaluate")
def very_many_entries(folder):
    shards(folder, norm="model-00001-of-00001.safetensors")
    places = {f"tensor.{i}": "missing.safetensors" for i in range(300_000)}
    folder.write("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": places}))


@hostile("(?i)header.*too large|headertoolarge")
def a_header_longer_than_the_file(folder):
    weights = (folder.path / "model.safetensors").read_bytes()
    folder.write("model.safetensors", (1 << 62).to_bytes(8, "little") + weights[8:])


@hostile("config.json specifies 9,000 layers")
def more_layers_than_weights(folder):
    folder.json("config.json", num_hidden_layers=9000, layer_types=None)


@hostile("`num_hidden_layers` is 10000000000", "generate", "export")
def layers_without_end(folder):
    folder.json("config.json", num_hidden_layers=10**10, layer_types=None)


@hostile("config.json specifies an embedding of")
def an_embedding_larger_than_the_weights(folder):
    folder.json("config.json", vocab_size=9_000_000)


@hostile("its weights are incomplete|missing|not those of its configuration")
def a_tensor_too_few(folder):
    folder.tensors(lambda kept: kept.pop("model.layers.1.mlp.up_proj.weight"))


@hostile("`dtype` is 'evil'")
def an_unknown_dtype(folder):
    folder.json("config.json", dtype="evil")


@hostile("`dtype` is 'load'", "generate")
def a_dtype_that_is_a_function(folder):
    folder.json("config.json", dtype="load")


@hostile("`rope_type` is 'evil', which is unknown", "generate", "init_from", "export")
def nonsense_rope(folder):
    folder.json("config.json", rope_parameters={"rope_type": "evil", "rope_theta": 10000.0})


@hostile("`rope_theta` is 'x'", "generate")
def a_rope_theta_of_words(folder):
    folder.json("config.json", rope_parameters={"rope_type": "default", "rope_theta": "x"})


@hostile("`rope_parameters` is 7, not an object", "generate")
def a_rope_that_is_a_number(folder):
    folder.json("config.json", rope_parameters=7)


@hostile("`_attn_implementation` is 'evil/kernel'", "generate")
def a_kernel_in_a_part_of_the_configuration(folder):
    folder.json("config.json", text_config={"_attn_implementation": "evil/kernel"})


@hostile("config.json", *VERBS)
def a_config_that_is_a_list(folder):
    folder.write("config.json", "[]")


@hostile("config.json is not valid JSON", *VERBS)
def a_config_nested_without_end(folder):
    folder.write("config.json", "[" * 200_000)


@hostile("config.json is not UTF-8", "generate")
def a_config_of_bytes(folder):
    folder.write("config.json", b'{"model_type": "\xff"}')


@hostile("`num_return_sequences` is 1000000", "generate")
def a_million_sequences(folder):
    folder.json("generation_config.json", num_return_sequences=1_000_000)


@hostile("generation_config.json is not a JSON object", "generate", "evaluate")
def a_generation_config_that_is_a_list(folder):
    folder.write("generation_config.json", "[]")


@hostile("custom_generate|dola|penalty_alpha|requires `trust_remote_code=True`|Contrastive", "generate")
def a_way_of_generating_from_the_hub(folder):
    folder.json("generation_config.json", penalty_alpha=0.6, top_k=4, do_sample=False)


@hostile("tokenizer", "generate", "tokenizer", "export")
def a_broken_tokenizer(folder):
    folder.write("tokenizer.json", '{"version": "1.0", "model": {"type": "evil"}}')


@hostile("tokenizer_config.json is not a JSON object", *VERBS)
def a_tokenizer_config_that_is_a_list(folder):
    folder.write("tokenizer_config.json", "[]")


@hostile("`model_max_length` is 'x', not a number", *VERBS)
def a_length_of_words(folder):
    folder.json("tokenizer_config.json", model_max_length="x")


@hostile("tokenizer", "export", "tokenizer")
def no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder.delete(name)


for _name, _text in {
    "a list": "[]",
    "null": "null",
    "empty": "",
    "invalid UTF-8": b"\xff\xfe{}",
    "nested without end": '{"recipe": ' + "[" * 200_000,
    "a recipe of numbers": '{"recipe": 7}',
    "a block of words": '{"recipe": {"block_size": "x"}}',
    "a share that is no number": '{"recipe": {"block_size": 8, "validation_fraction": [1]}}',
}.items():
    FOLDERS[f"minigpt.json is {_name}"] = (
        lambda folder, text=_text: folder.write("minigpt.json", text),
        "minigpt.json",
        ("evaluate",),
    )

CASES = [(case, verb) for case, (_, _, verbs) in FOLDERS.items() for verb in verbs]


@pytest.mark.parametrize(("case", "verb"), CASES, ids=[f"{case}-{verb}" for case, verb in CASES])
def test_a_hostile_folder_is_refused_in_one_line(case, verb, folder, text_file, recipe_file, hub, capfd):
    make, message, _ = FOLDERS[case]
    make(folder)
    refused(asked(verb, folder.path, text_file, recipe_file), capfd, message, Path.cwd(), folder.outside)
    assert not folder.canary.exists()
    assert hub.requests == []


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": -1},
        {"max_new_tokens": 10**12},
        {"max_length": 10**12, "min_new_tokens": 10**9},
        {"eos_token_id": 10**6},
        {"cache_implementation": "evil"},
        {"suppress_tokens": list(range(300))},
        {"temperature": "hot"},
        {"top_k": "x"},
        {"stop_strings": 7},
        {"assistant_confidence_threshold": "x"},
        {"watermarking_config": {"seeding_scheme": "evil"}},
        {"custom": {"a": 1}},
        {"temperature": 1e-300, "do_sample": True},
        {"max_time": "x"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_hostile_settings_of_generation_are_refused_or_harmless(settings, folder, capfd):
    folder.json("generation_config.json", **settings)
    began = time.process_time()
    code = main(["generate", str(folder.path), "--prompt", "def", "--max_new_tokens", "2"])
    _, err = capfd.readouterr()
    assert code in (0, 2), err
    assert code == len([line for line in err.splitlines() if line.startswith("minigpt ")]) * 2, err
    assert "Traceback" not in err
    assert time.process_time() - began < 10


def test_a_chat_template_is_not_rendered_unasked(folder, text_file, recipe_file):
    folder.write(
        "chat_template.jinja", "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}"
    )
    for verb in ("generate", "evaluate", "tokenizer"):
        assert main(asked(verb, folder.path, text_file, recipe_file)) == 0


def test_an_error_that_quotes_a_file_does_not_act_on_the_terminal(folder, capfd):
    folder.json("config.json", _attn_implementation="\x1b]0;owned\x07/k")
    refused(["generate", str(folder.path)], capfd, r"\\x1b\]0;owned", folder.outside)


# The same through the Hub.


def test_a_repository_is_checked_as_a_folder_is(folder, hub, capfd):
    def put(**changes):
        folder.json("config.json", **changes)
        files = {file.name: file.read_bytes() for file in folder.path.iterdir() if file.is_file()}
        hub.put("evil/model", files)

    put()
    argv = ["generate", "evil/model", "--prompt", "def", "--max_new_tokens", "2", "--seed", "1"]
    assert main(argv) == 0
    assert main(["generate", str(folder.path), *argv[2:]]) == 0
    out = capfd.readouterr().out
    assert len(set(out.splitlines())) == 1 or out[: len(out) // 2] == out[len(out) // 2 :]
    poison(folder)
    put()
    assert main(argv) == 0
    assert not folder.canary.exists()
    assert not any("evil.py" in request.path or "pytorch_model" in request.path for request in hub.requests)
    put(_attn_implementation="evil/kernel")
    refused(argv, capfd, "evil/model: .*config.json: `_attn_implementation` is 'evil/kernel'")
    assert not any("kernel" in request.path for request in hub.requests)


# Recipes, options, prompts.

RECIPES = {
    "nested without end": ("a: " + "[" * 30_000, "nested too deeply"),
    "a bomb of references": (
        "a: &a [x, x]\n"
        + "".join(f"{c}: &{c} [*{b}, *{b}]\n" for b, c in zip("abcdefghij", "bcdefghijk", strict=True)),
        "aliases .* are not supported",
    ),
    "an object": ("hidden_size: !!python/object/apply:os.system ['touch canary']", "could not determine a constructor"),
    "a key twice": ("hidden_size: 8\nhidden_size: 16", "duplicate key 'hidden_size'"),
    "a key that is a list": ("? [a]\n: 1", "unhashable"),
    "a key that is a number": ("1: 2", "unknown setting 1"),
    "nan": ("learning_rate: .nan", "learning_rate is nan"),
    "infinity": ("weight_decay: .inf", "weight_decay is inf"),
    "infinity for a whole number": ("hidden_size: .inf", "hidden_size is inf"),
    "half a number": ("hidden_size: 32.5", "hidden_size is 32.5"),
    "a huge number": ("max_steps: 1" + "0" * 100, "an integer of 333 bits"),
    "a number of a million digits": ("max_steps: 1" + "0" * 60_000, "max_steps|digits"),
    "a date": ("max_steps: 2020-01-01", "max_steps"),
    "too long": ("#" * 70_000, "larger than 65,536 bytes"),
    "control characters": ("hidden_size: '\x1b[2J'", "special characters are not allowed"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_hostile_recipe_is_refused_in_one_line(case, tmp_path, text_file, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    recipe, message = RECIPES[case]
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    argv = ["train", "--recipe", "recipe.yaml", "--data", str(text_file), "--output_dir", "new"]
    refused(argv, capfd, "recipe.yaml.*" + message if "digits" not in message else message, tmp_path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "binary"])
def test_a_recipe_that_is_no_text_file_is_refused(kind, tmp_path, text_file, capfd):
    place = tmp_path / "recipe.yaml"
    {"folder": place.mkdir, "pipe": lambda: os.mkfifo(place), "binary": lambda: place.write_bytes(b"\x80\x02" * 99)}[
        kind
    ]()
    argv = ["train", "--recipe", str(place), "--data", str(text_file), "--output_dir", str(tmp_path / "new")]
    refused(argv, capfd, "no such file|invalid YAML")


OPTIONS = {
    "references": (["--top_k", "&a [*a]"], "aliases"),
    "nested without end": (["--top_k", "[" * 20_000], "nested too deeply"),
    "an object": (["--top_k", "!!python/name:os.system"], "invalid value"),
    "nan": (["--temperature", ".nan"], "temperature is nan: a finite number is required"),
    "infinity": (["--temperature", ".inf"], "temperature is inf"),
    "a date": (["--max_new_tokens", "2020-01-01"], "must be an integer of at least 1"),
    "a map": (["--max_new_tokens", "{a: 1}"], "must be an integer of at least 1"),
    "a count as text": (["--max_new_tokens", "1e9"], "must be an integer of at least 1"),
    "no tokens": (["--max_new_tokens", "-1"], "max_new_tokens"),
    "everything suppressed": (["--suppress_tokens", str(list(range(300))), "--do_sample", "true"], "can be generated"),
    "a cache of its own": (["--cache_implementation", "evil"], "cache_implementation"),
    "code of the Hub": (["--custom_generate", "evil/repo"], "no option 'custom_generate'"),
    "bytes that are not UTF-8": (["--prompt", "a\udcffb"], "not valid UTF-8 at position 1"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_hostile_option_is_refused_in_one_line(case, run_folder, capfd):
    options, message = OPTIONS[case]
    refused(["generate", str(run_folder / "model"), "--max_new_tokens", "4", *options], capfd, message)


@pytest.mark.parametrize("prompt", ["a\0b", "\x1b[2J", "\u202eabc", "\r\n\t"])
def test_control_characters_in_a_prompt_are_text(prompt, run_folder, capfd):
    assert main(["generate", str(run_folder / "model"), "--prompt", prompt, "--max_new_tokens", "2"]) == 0
    assert capfd.readouterr().out.startswith(prompt)


# What spells a special token.


def test_a_prompt_that_spells_a_special_token_is_text_as_in_training(run_folder, monkeypatch, capfd):
    from minigpt_hf.data.tokenizer import Encoder
    from minigpt_hf.inference.generation import encode_prompt

    folder = run_folder / "model"
    model, tokenizer = minigpt_hf.load(folder)
    encode = Encoder(tokenizer.backend_tokenizer.to_str())
    for prompt in ("<|endoftext|>", "a<|endoftext|>b<|pad|>", "def "):
        ids = encode_prompt(tokenizer, prompt).input_ids[0].tolist()
        assert ids == encode(prompt)
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    special = encode_prompt(tokenizer, "<|endoftext|>", special_tokens=True).input_ids.tolist()
    assert special == [[tokenizer.bos_token_id]] == encode_prompt(tokenizer, "").input_ids.tolist()

    prompt, options = "<|endoftext|>def", {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(torch.tensor([encode(prompt)]), **options)
    assert minigpt_hf.generate(folder, prompt, **options) == [tokenizer.decode(expected[0], skip_special_tokens=True)]
    assert minigpt_hf.generate(folder, prompt, **options)[0].startswith(prompt)
    argv = ["generate", str(folder), "--max_new_tokens", "4", "--do_sample", "false"]
    assert main([*argv, "--prompt", prompt]) == 0
    assert capfd.readouterr().out.rstrip("\n") == minigpt_hf.generate(folder, prompt, **options)[0].rstrip("\n")

    of_the_token = minigpt_hf.generate(folder, prompt, special_tokens=True, **options)[0]
    start = torch.tensor([[tokenizer.bos_token_id, *encode("def")]])
    assert of_the_token == tokenizer.decode(model.generate(start, **options)[0], skip_special_tokens=True)
    assert main([*argv, "--prompt", prompt, "--special_tokens"]) == 0
    assert capfd.readouterr().out.rstrip("\n") == "<|endoftext|>" + of_the_token.rstrip("\n")


def test_a_typed_special_token_reaches_the_interactive_prompt_as_text(run_folder, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"<|endoftext|>\n")))
    argv = ["generate", str(run_folder / "model"), "--interactive", "--max_new_tokens", "4", "--do_sample", "false"]
    assert main(argv) == 0
    options = {"max_new_tokens": 4, "do_sample": False}
    assert minigpt_hf.generate(run_folder / "model", "<|endoftext|>", **options)[0].strip() in capfd.readouterr().out


# plot


def logged(folder: Path, *rows) -> str:
    folder.mkdir()
    (folder / "log.jsonl").write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(folder)


GOOD = [{"step": i, "tokens": 100 * i, "bits_per_byte": 3 / i, "eval_bits_per_byte": 4 / i} for i in (1, 2, 3)]


def test_a_log_of_odd_values_is_drawn_without_them_and_says_so(tmp_path, capfd):
    odd = [
        {"step": 4, "tokens": 400, "eval_bits_per_byte": float("nan")},
        {"step": 5, "tokens": 500, "bits_per_byte": float("-inf")},
        {"step": 6, "tokens": 600, "bits_per_byte": "low"},
        {"step": 7, "tokens": 700, "eval_bits_per_byte": {"deep": [1]}},
        {"step": 8, "tokens": 800, "eval_bits_per_byte": 10**400},
        {"step": 9, "bits_per_byte": 1.0},
        {},
    ]
    run, output = logged(tmp_path / "run", *GOOD, *odd, 7), tmp_path / "a.png"
    assert main(["plot", run, "--output", str(output)]) == 0
    err = capfd.readouterr().err
    assert "5 non-finite values of log.jsonl are skipped" in err
    assert "2 incomplete lines of log.jsonl are skipped" in err
    assert main(["plot", logged(tmp_path / "b", *GOOD), "--output", str(tmp_path / "b.png")]) == 0
    assert "skipped" not in capfd.readouterr().err


def test_an_empty_log_is_drawn(tmp_path):
    assert main(["plot", logged(tmp_path / "run"), "--output", str(tmp_path / "a.png")]) == 0


@pytest.mark.parametrize("name", ["_hidden", r"$\frac{", "a$b$c", "two\nlines", "\x1b[2J", "x" * 200])
def test_the_legend_holds_the_name_of_a_run_as_it_is(name, tmp_path):
    """An SVG with text as text, to read it back."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert main(["plot", logged(tmp_path / name, *GOOD), "--output", str(tmp_path / "a.svg")]) == 0
    shown = name.replace("\n", "\\n").replace("\x1b", "\\x1b")
    assert f"{shown} (1.333)" in re.sub(r"<[^>]*>", "", (tmp_path / "a.svg").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", ['{"step": 1', "\x00", "7", "[" * 100_000])
def test_the_incomplete_lines_of_a_log_are_left_out_and_counted(row, tmp_path, capfd):
    run = logged(tmp_path / "run", row, *GOOD)
    assert main(["plot", run, "--output", str(tmp_path / "a.png")]) == 0
    assert f"{run}: 1 incomplete lines of log.jsonl are skipped" in capfd.readouterr().err


def test_a_picture_does_not_replace_what_is_no_file(tmp_path, capfd):
    run = logged(tmp_path / "run", *GOOD)
    (tmp_path / "a.png").mkdir()
    os.mkfifo(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        refused(["plot", run, "--output", str(tmp_path / name)], capfd, f"{name}: already exists and is not a file")


# push


@pytest.mark.parametrize("repo_id", ["../x", "a/b/c", "user/a\nb", "", "user/a b", "-x/y"])
def test_a_repository_that_cannot_be_is_refused_before_anything_is_sent(repo_id, run_folder, hub, capfd):
    refused(["push", str(run_folder / "model"), f"--repo-id={repo_id}"], capfd, "Repo id must")
    assert hub.requests == []


PUSHED = {
    "front matter that is broken": lambda folder: folder.write("README.md", "---\na: [\n---\n# x"),
    "front matter nested without end": lambda folder: folder.write("README.md", "---\na: " + "[" * 2_000 + "\n---\n"),
    "a card of bytes": lambda folder: folder.write("README.md", b"---\nlicense: mit\n---\n\xff"),
    "a list for minigpt.json": lambda folder: folder.write("minigpt.json", "[]"),
    "a card that acts": lambda folder: folder.append("README.md", "\n<script>alert(1)</script>\n"),
    "a link": lambda folder: (folder.path / "LICENSE").symlink_to("/etc/passwd"),
    "a pipe": lambda folder: os.mkfifo(folder.path / "pipe"),
    "a name that cannot be seen": lambda folder: folder.write("a\u202eb.txt", "x"),
    "a token": lambda folder: folder.write("LICENSE", "hf_" + "x" * 34),
}


@pytest.mark.parametrize("case", PUSHED)
def test_a_hostile_folder_is_not_pushed(case, folder, hub, monkeypatch, capfd):
    """With the doctor's rows about files alone: loading the model, which takes long, is tested above."""
    import minigpt_hf.doctor

    monkeypatch.setattr(minigpt_hf.doctor, "examine", minigpt_hf.doctor.examine_files)
    PUSHED[case](folder)
    refused(["push", str(folder.path), "--repo-id", "user/x"], capfd, "not uploaded|is a link", folder.outside)
    assert hub.requests == []


def test_a_folder_that_changes_while_it_is_examined_is_not_pushed(folder, hub, monkeypatch, capfd):
    import minigpt_hf.doctor

    def examine(path):
        folder.append("README.md", "more\n")
        return []

    monkeypatch.setattr(minigpt_hf.doctor, "examine", examine)
    assert main(["push", str(folder.path), "--repo-id", "user/x"]) == 2
    assert "has changed since it was checked" in capfd.readouterr().err
    assert not any(request.method == "POST" and "commit" in request.path for request in hub.requests)


# export


def test_an_export_goes_neither_into_the_model_nor_over_a_link(folder, capfd):
    for out in (folder.path / "twin", folder.path / "figures" / ".." / "twin"):
        argv = ["export", str(folder.path), "--to", "native", "--output_dir", str(out)]
        refused(argv, capfd, "is inside a model folder", folder.path)
    (folder.outside / "out").symlink_to(folder.outside / "nowhere")
    argv = ["export", str(folder.path), "--to", "native", "--output_dir", str(folder.outside / "out")]
    refused(argv, capfd, "already exists", folder.outside)


def test_an_export_copies_nothing_from_outside_the_folder(folder, capfd):
    (folder.path / "LICENSE").symlink_to("/etc/passwd")
    refused(["export", str(folder.path), "--to", "native"], capfd, "LICENSE is a link", folder.outside)


# import


def checkpoint(place: Path, **content) -> Path:
    torch.save(content, place / "ckpt.pt")
    return place / "ckpt.pt"


ARGS = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "vocab_size": 3, "bias": False}
TABLES = {"transformer.wte.weight": torch.zeros(3, 4), "transformer.wpe.weight": torch.zeros(4, 4)}
IMPORTED = {
    "code": lambda place: checkpoint(place, model=Bomb(place / "canary"), model_args={}),
    "no tensors": lambda place: checkpoint(place, model={"a": 1}, model_args=ARGS),
    "a list of weights": lambda place: checkpoint(place, model=[], model_args=ARGS),
    "a list of sizes": lambda place: checkpoint(place, model=TABLES, model_args=list(ARGS)),
    "sizes in words": lambda place: checkpoint(place, model=TABLES, model_args={**ARGS, "n_layer": "x"}),
    "layers without end": lambda place: checkpoint(place, model=TABLES, model_args={**ARGS, "n_layer": 10**6}),
    "a vocabulary without end": lambda place: checkpoint(place, model=TABLES, model_args={**ARGS, "vocab_size": 10**7}),
    "no heads": lambda place: checkpoint(place, model=TABLES, model_args={**ARGS, "n_head": 0}),
    "half a model": lambda place: checkpoint(place, model=TABLES, model_args=ARGS),
}


@pytest.mark.parametrize("case", IMPORTED)
def test_a_hostile_checkpoint_is_refused_in_one_line(case, tmp_path, capfd):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0, "b": 1, "c": 2}}))
    file = IMPORTED[case](tmp_path)
    argv = ["import", str(file), "--meta", str(tmp_path / "meta.pkl"), "--output_dir", str(tmp_path / "new")]
    refused(argv, capfd, "ckpt.pt: |the weights are not", tmp_path)
    assert not (tmp_path / "canary").exists()


METAS = {
    "code": lambda place: pickle.dumps({"stoi": Bomb(place / "canary")}),
    "a class": lambda place: pickle.dumps({"stoi": Path}),
    "nothing": lambda place: b"",
    "half": lambda place: pickle.dumps({"stoi": {"a": 0}})[:-3],
    "a claim of many bytes": lambda place: b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b".",
    "an index that is not there": lambda place: b"\x80\x04h\x07.",
    "a stack underflow": lambda place: b"\x80\x04us.",
    "no characters": lambda place: pickle.dumps({"stoi": {7: 0, "b": 1}}),
    "ids of words": lambda place: pickle.dumps({"stoi": {"a": "x", "b": 1}}),
    "a surrogate": lambda place: pickle.dumps({"stoi": {"\ud800": 0, "b": 1}}),
}


@pytest.mark.parametrize("case", METAS)
def test_a_hostile_vocabulary_is_refused_in_one_line(case, tmp_path, capfd):
    file = checkpoint(tmp_path, model=TABLES, model_args=ARGS)
    (tmp_path / "meta.pkl").write_bytes(METAS[case](tmp_path))
    argv = ["import", str(file), "--meta", str(tmp_path / "meta.pkl"), "--output_dir", str(tmp_path / "new")]
    refused(argv, capfd, "meta.pkl: ", tmp_path)
    assert not (tmp_path / "canary").exists()
