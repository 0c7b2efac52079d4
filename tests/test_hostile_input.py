"""Hostile folders and files: their code is not executed, nothing outside them is opened, and each is reported in one line.

A canary is a file that exists if code has been executed. As in `test_bad_input.py`: one line that states what was given,
exit code 2, no traceback, no change on disk, within ten seconds.
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
from minigpt_hf import doctor
from minigpt_hf.cli import main
from tests.conftest import ROOT, representative
from tests.doctor.conftest import Broken

SHORT = "--max_steps 1 --eval_strategy no --save_strategy no --load_best_model_at_end false --sample_tokens 0".split()
# Commands that load a folder, by name.
COMMANDS = {
    "generate": "generate FOLDER --prompt def --max_new_tokens 2 --do_sample false",
    "evaluate": "evaluate FOLDER --data TEXT --max_characters 100",
    "init_from": "train --recipe finetune --init_from FOLDER --data TEXT --block_size 32 --use_cpu true --output_dir new",
    "tokenizer": "train --recipe RECIPE --tokenizer FOLDER --data TEXT --output_dir new",
    "tokenize": "tokenize --recipe RECIPE --tokenizer FOLDER --data TEXT --output_dir new",
    "export": "export FOLDER --to native --output_dir new",
}
MODEL_COMMANDS = tuple(name for name in COMMANDS if not name.startswith("token"))


@pytest.fixture
def folder(run_folder, tmp_path, monkeypatch) -> Broken:
    """A copy of a valid model folder, to be modified by a test, in an empty current directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\n" * 100)))
    return Broken(run_folder / "model", tmp_path)


def content(place: Path) -> dict:
    files = {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}
    return {path: text for path, text in files.items() if "canary" not in path.name}


def arguments_of(command: str, folder: Path, text_file: Path, recipe_file: Path) -> list[str]:
    words = {"FOLDER": str(folder), "TEXT": str(text_file), "RECIPE": str(recipe_file)}
    argv = [words.get(word, word) for word in COMMANDS[command].split()]
    return argv + SHORT if argv[0] == "train" else argv


def rejected(argv: list[str], capfd, message: str, *places: Path) -> None:
    """Check that a command fails within the time limit with one line that matches `message`, and changes no file."""
    before, began = [content(place) for place in places], (time.process_time(), time.perf_counter())
    capfd.readouterr()
    code = main(argv)
    processor, seconds = time.process_time() - began[0], time.perf_counter() - began[1]
    _, err = capfd.readouterr()
    messages = [line for line in err.splitlines() if line.startswith("minigpt ")]
    assert code == 2, err
    assert len(messages) == 1, err
    assert "Traceback" not in err
    assert re.search(message, messages[0]), messages[0]
    assert "\x1b" not in err
    assert processor < 10  # CPU time, since the machine may be busy
    assert seconds < 100
    assert [content(place) for place in places] == before


# -- remote code ------------------------------------------------------------------------------------------------------


def poison(folder: Broken) -> None:
    """Add code wherever transformers looks for it, to a folder that loads without it."""
    code = f"open({str(folder.canary)!r}, 'w').close()\n"
    folder.write("evil.py", code + "class A:\n    pass\n")
    folder.write("custom_generate/generate.py", code + "def generate(model, **kwargs):\n    pass\n")
    for name in ("configuration_minigpt.py", "modeling_minigpt.py"):
        folder.append(name, code)
    classes = dict.fromkeys(folder.get("config.json")["auto_map"], "evil.A")
    folder.json("config.json", auto_map={**classes, "AutoTokenizer": ["evil.A", "evil.A"]}, custom_pipelines={"a": {}})
    folder.json("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.A"]})
    folder.write("processor_config.json", json.dumps({"auto_map": {"AutoProcessor": "evil.A"}}))
    (folder.path / "pytorch_model.bin").write_bytes(pickle.dumps(CreateCanary(folder.canary)))


class CreateCanary:
    """Creates the canary when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


@pytest.mark.parametrize("command", COMMANDS)
def test_code_of_a_folder_is_not_executed_and_no_question_is_asked(
    command, folder, text_file, recipe_file, monkeypatch, capfd
):
    poison(folder)

    def read(*args):
        raise AssertionError("standard input was read")

    monkeypatch.setattr("builtins.input", read)
    code = main(arguments_of(command, folder.path, text_file, recipe_file))
    _, err = capfd.readouterr()
    assert not folder.canary.exists()
    assert "y/N" not in err
    assert code == 0, err


def foreign(folder: Broken) -> None:
    """Change the model type so that only the code of the folder could load it."""
    poison(folder)
    folder.json("config.json", model_type="foreign")
    folder.json("tokenizer_config.json", tokenizer_class="ForeignTokenizer")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_needs_its_code_is_rejected(command, folder, text_file, recipe_file, monkeypatch, capfd):
    foreign(folder)

    def read(*args):
        raise AssertionError("standard input was read")

    monkeypatch.setattr("builtins.input", read)
    rejected(
        arguments_of(command, folder.path, text_file, recipe_file),
        capfd,
        "it needs custom code, which is not run|type is .foreign.",
        folder.outside,
    )
    assert not folder.canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["init_from", "export"])
def test_an_answer_on_standard_input_does_not_permit_code(command, folder, text_file, recipe_file):
    foreign(folder)
    argv = arguments_of(command, folder.path, text_file, recipe_file)
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


@pytest.mark.parametrize("checks", representative(["examine", "examine_files"], "examine_files"))
def test_push_and_its_checks_execute_no_code_of_a_folder(checks, folder, hub, monkeypatch, capfd):
    """With all checks, which start processes, and with those of the files."""
    monkeypatch.setattr(doctor, "examine", getattr(doctor, checks))
    foreign(folder)
    assert main(["push", str(folder.path), "--repo-id", "user/x"]) == 2
    assert "not uploaded" in capfd.readouterr().err
    assert not folder.canary.exists()
    assert hub.requests == []


def test_text_on_standard_input_is_read_completely_with_a_model_that_contains_code(folder, text, monkeypatch):
    poison(folder)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    argv = ["train", "--recipe", "finetune", "--init_from", str(folder.path), "--data", "-", "--block_size", "32"]
    assert main([*argv, *SHORT, "--use_cpu", "true", "--output_dir", "new"]) == 0
    about = json.loads(Path("new/model/minigpt.json").read_text())["data"]
    parts = [part for part in (about["train"], about["validation"]) if part]
    assert sum(part["characters"] for part in parts) == len(text)
    assert not folder.canary.exists()


# Loaders of a fixed class, which execute no remote code. All others must state `trust_remote_code`.
FIXED_CLASSES = {"MiniGPTForCausalLM", "MiniGPTConfig", "Qwen3ForCausalLM", "GenerationConfig"}


def test_every_loader_call_states_trust_remote_code():
    calls = []
    for file in (ROOT / "minigpt_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("from_pretrained", "from_config"):
                owner = ast.unparse(node.func.value)
                given = {keyword.arg for keyword in node.keywords}
                calls.append(owner)
                assert "trust_remote_code" in given or owner in FIXED_CLASSES, f"{file}:{node.lineno}"
                if node.func.attr == "from_pretrained" and owner.endswith("ForCausalLM"):
                    assert given & {"use_safetensors", "gguf_file"}, (
                        f"{file}:{node.lineno}"
                    )  # otherwise a pickle may be loaded
    assert len(calls) > 10


# -- references to other files, malformed settings, weights -----------------------------------------------------------

FOLDERS: dict[str, tuple] = {}  # name -> (function, message, commands)


def hostile(message: str, *commands: str):
    def register(function):
        FOLDERS[function.__name__.replace("_", " ")] = (function, message, commands or MODEL_COMMANDS)
        return function

    return register


@hostile("`_attn_implementation` is 'evil/kernel'", *COMMANDS)
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


@hostile("quantized weights cannot be trained", "init_from")
def quantized_weights(folder):
    folder.json("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


@hostile("`compile_config` refers to code outside", "generate")
def a_compiler_backend(folder):
    folder.json("generation_config.json", compile_config={"backend": "evil", "_compile_all_devices": True})


@hostile("adapter_config.json refers to the base model 'evil/base'", *COMMANDS)
def an_adapter_with_an_external_base_model(folder):
    folder.write("adapter_config.json", json.dumps({"base_model_name_or_path": "evil/base", "peft_type": "LORA"}))


@hostile("adapter_config.json refers to the base model 'evil/base'", "generate")
def only_an_adapter(folder):
    an_adapter_with_an_external_base_model(folder)
    folder.delete("config.json")


@hostile("`transformers_weights` is '../outside/model.safetensors'")
def external_weights(folder):
    shutil.copy(folder.path / "model.safetensors", folder.outside)
    folder.json("config.json", transformers_weights="../outside/model.safetensors")


@hostile("`vocab_file` is '/etc/passwd'", *COMMANDS)
def an_external_vocabulary(folder):
    folder.json("tokenizer_config.json", vocab_file="/etc/passwd")


@hostile("no file named model.safetensors")
def weights_in_a_pickle_only(folder):
    folder.delete("model.safetensors")
    (folder.path / "pytorch_model.bin").write_bytes(pickle.dumps(CreateCanary(folder.canary)))


@hostile("model.safetensors is a link")
def weights_by_a_link_out_of_the_folder(folder):
    shutil.move(folder.path / "model.safetensors", folder.outside)
    (folder.path / "model.safetensors").symlink_to(folder.outside / "model.safetensors")


@hostile("tokenizer.json is a device, a pipe or a socket", *COMMANDS)
def a_pipe_for_a_tokenizer(folder):
    folder.delete("tokenizer.json")
    os.mkfifo(folder.path / "tokenizer.json")


def shards(folder: Broken, **changes) -> None:
    """Store the weights in one shard with an index, in which `norm` is the file of model.norm.weight."""
    tensors = load_file(folder.path / "model.safetensors")
    folder.delete("model.safetensors")
    save_file(tensors, folder.path / "model-00001-of-00001.safetensors", {"format": "pt"})
    places = dict.fromkeys(tensors, "model-00001-of-00001.safetensors") | {"model.norm.weight": changes["norm"]}
    folder.write("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": places}))


@hostile(r"index.json names files outside the folder: \.\./outside/secret.safetensors")
def a_shard_in_the_parent_folder(folder):
    shards(folder, norm="../outside/secret.safetensors")


@hostile(r"index.json names files outside the folder: /.*secret.safetensors", "generate", "init_from")
def a_shard_by_its_absolute_path(folder):
    shards(folder, norm=str(folder.outside / "secret.safetensors"))


@hostile("index.json names a.safetensors, which is missing")
def a_missing_shard(folder):
    shards(folder, norm="a.safetensors")


@hostile("index.json and the shards disagree about model.norm.weight", "generate", "evaluate", "export", "init_from")
def a_tensor_in_two_shards(folder):
    """The loader would use the copy in the shard that it reads last, not the one that the index names."""
    shards(folder, norm="model-00001-of-00001.safetensors")
    norm = load_file(folder.path / "model-00001-of-00001.safetensors")["model.norm.weight"]
    save_file({"model.norm.weight": 0 * norm, "lm_head.weight": norm}, folder.path / "z.safetensors", {"format": "pt"})
    file = folder.path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = "z.safetensors"
    file.write_text(json.dumps(index))


@hostile("index.json has no `weight_map`", "generate", "init_from")
def a_shard_that_is_a_number(folder):
    shards(folder, norm=7)


@hostile("duplicate key 'weight_map'", "generate", "init_from")
def two_weight_maps(folder):
    shards(folder, norm="model-00001-of-00001.safetensors")
    index = folder.path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}, ' + index.read_text()[1:])


@hostile("index.json names missing.safetensors, which is missing", "generate", "evaluate")
def very_many_entries(folder):
    shards(folder, norm="model-00001-of-00001.safetensors")
    places = {f"tensor.{i}": "missing.safetensors" for i in range(100_000)}
    folder.write("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": places}))


@hostile("(?i)header.*too large|headertoolarge")
def a_header_longer_than_the_file(folder):
    weights = (folder.path / "model.safetensors").read_bytes()
    folder.write("model.safetensors", (1 << 62).to_bytes(8, "little") + weights[8:])


@hostile("config.json specifies 9,000 layers")
def more_layers_than_weights(folder):
    folder.json("config.json", num_hidden_layers=9000, layer_types=None)


@hostile("`num_hidden_layers` is 10000000000", "generate", "export")
def ten_billion_layers(folder):
    folder.json("config.json", num_hidden_layers=10**10, layer_types=None)


@hostile("config.json specifies an embedding of")
def an_embedding_larger_than_the_weights(folder):
    folder.json("config.json", vocab_size=9_000_000)


@hostile("its weights are incomplete|missing|do not match the configuration")
def a_missing_tensor(folder):
    folder.tensors(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


@hostile("`dtype` is 'evil'")
def an_unknown_dtype(folder):
    folder.json("config.json", dtype="evil")


@hostile("`dtype` is 'load'", "generate")
def a_dtype_that_is_a_function(folder):
    folder.json("config.json", dtype="load")


@hostile("`rope_type` is 'evil', which is unknown", "generate", "init_from", "export")
def an_unknown_rope_type(folder):
    folder.json("config.json", rope_parameters={"rope_type": "evil", "rope_theta": 10000.0})


@hostile("`rope_theta` is 'x'", "generate")
def a_rope_theta_that_is_a_word(folder):
    folder.json("config.json", rope_parameters={"rope_type": "default", "rope_theta": "x"})


@hostile("`rope_parameters` is 7, not an object", "generate")
def a_rope_that_is_a_number(folder):
    folder.json("config.json", rope_parameters=7)


@hostile("`_attn_implementation` is 'evil/kernel'", "generate")
def a_kernel_in_a_part_of_the_configuration(folder):
    folder.json("config.json", text_config={"_attn_implementation": "evil/kernel"})


@hostile("config.json", *COMMANDS)
def a_config_that_is_a_list(folder):
    folder.write("config.json", "[]")


@hostile("config.json is not valid JSON", *COMMANDS)
def a_deeply_nested_config(folder):
    folder.write("config.json", "[" * 200_000)


@hostile("config.json is not UTF-8", "generate")
def a_config_that_is_not_utf_8(folder):
    folder.write("config.json", b'{"model_type": "\xff"}')


@hostile("`num_return_sequences` is 1000000", "generate")
def a_million_sequences(folder):
    folder.json("generation_config.json", num_return_sequences=1_000_000)


@hostile("generation_config.json is not a JSON object", "generate", "evaluate")
def a_generation_config_that_is_a_list(folder):
    folder.write("generation_config.json", "[]")


@hostile("Contrastive Search is not part of this version of transformers: omit the options", "generate")
def a_decoding_method_from_the_hub(folder):
    folder.json("generation_config.json", penalty_alpha=0.6, top_k=4, do_sample=False)


@hostile("tokenizer", "generate", "tokenizer", "export")
def a_broken_tokenizer(folder):
    folder.write("tokenizer.json", '{"version": "1.0", "model": {"type": "evil"}}')


@hostile("tokenizer_config.json is not a JSON object", *COMMANDS)
def a_tokenizer_config_that_is_a_list(folder):
    folder.write("tokenizer_config.json", "[]")


@hostile("`model_max_length` is 'x', not a number", *COMMANDS)
def a_length_that_is_a_word(folder):
    folder.json("tokenizer_config.json", model_max_length="x")


@hostile("tokenizer", "export", "tokenizer")
def no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder.delete(name)


@hostile("`use_sliding_window` is not true", "generate", "init_from", "export")
def a_sliding_window_that_is_not_used(folder):
    config = folder.get("config.json")
    del config["use_sliding_window"]
    config |= {"sliding_window": 33, "layer_types": ["sliding_attention"] * config["num_hidden_layers"]}
    folder.write("config.json", json.dumps(config))


@hostile("`sliding_window` is 1000000000000000000000000000000", "generate", "init_from", "export")
def an_endless_sliding_window(folder):
    layers = ["sliding_attention"] * folder.get("config.json")["num_hidden_layers"]
    folder.json("config.json", use_sliding_window=True, sliding_window=10**30, layer_types=layers)


@hostile("`rms_norm_eps` is 1000000000000000000000000000000", "generate", "init_from", "export")
def an_epsilon_beyond_floats(folder):
    folder.json("config.json", rms_norm_eps=10**30)


@hostile("`rms_norm_eps` is -1", "generate", "init_from", "export")
def a_negative_epsilon(folder):
    folder.json("config.json", rms_norm_eps=-1)


@hostile("architectures", "generate", "evaluate")
def architectures_of_a_wrong_type(folder):
    folder.json("config.json", architectures=[["x"]])


@hostile("architectures", "generate", "evaluate")
def architectures_that_are_a_number(folder):
    folder.json("config.json", architectures=5)


@hostile("BOS token.*vocabulary", "evaluate")
def a_bos_token_outside_the_vocabulary(folder):
    folder.json("tokenizer_config.json", bos_token="../../etc/passwd")


@hostile("has another tokenizer", "init_from", "export")
def the_tokenizer_of_another_model(folder):
    exchange_two_tokens(folder)


for _name, _text in {
    "a list": "[]",
    "null": "null",
    "empty": "",
    "invalid UTF-8": b"\xff\xfe{}",
    "deeply nested": '{"recipe": ' + "[" * 200_000,
    "a recipe that is a number": '{"recipe": 7}',
    "a block size that is a word": '{"recipe": {"block_size": "x"}}',
    "a validation fraction that is a list": '{"recipe": {"block_size": 8, "validation_fraction": [1]}}',
}.items():
    FOLDERS[f"minigpt.json is {_name}"] = (
        lambda folder, text=_text: folder.write("minigpt.json", text),
        "minigpt.json",
        ("evaluate",),
    )

CASES = [(case, command) for case, (_, _, commands) in FOLDERS.items() for command in commands]


# Each folder with one command, and each command with several folders.
FAST = [(case, commands[number % len(commands)]) for number, (case, (_, _, commands)) in enumerate(FOLDERS.items())]
IDS = [f"{case}-{command}" for case, command in CASES]


@pytest.mark.parametrize(("case", "command"), representative(CASES, *FAST), ids=IDS)
def test_a_hostile_folder_is_rejected_in_one_line(case, command, folder, text_file, recipe_file, hub, capfd):
    make, message, _ = FOLDERS[case]
    make(folder)
    rejected(arguments_of(command, folder.path, text_file, recipe_file), capfd, message, Path.cwd(), folder.outside)
    assert not folder.canary.exists()
    assert hub.requests == []


def exchange_two_tokens(folder) -> None:
    tokenizer = folder.get("tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    folder.write("tokenizer.json", json.dumps(tokenizer))


@pytest.mark.parametrize("verb", ["evaluate", "init_from"])
def test_a_huge_number_in_the_metadata_is_not_a_share_of_the_text(verb, folder, text_file, recipe_file, capfd):
    metadata = json.loads((folder.path / "minigpt.json").read_text())
    metadata["data"]["unseen_fraction"] = 10**400
    folder.write("minigpt.json", json.dumps(metadata))
    assert main(arguments_of(verb, folder.path, text_file, recipe_file)) == 0
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_the_tokenizer_of_another_model_is_reported(verb, folder, text_file, recipe_file, capfd):
    """It is not refused: other programs add tokens without updating the fingerprint in config.json."""
    exchange_two_tokens(folder)
    assert main(arguments_of(verb, folder.path, text_file, recipe_file)) == 0
    assert (
        f"{folder.path}: has another tokenizer than the one that the model was trained with" in capfd.readouterr().err
    )


@pytest.mark.parametrize("verb", ["generate", "evaluate", "init_from", "export"])
def test_another_token_that_precedes_documents_is_another_tokenizer(verb, folder, text_file, recipe_file, capfd):
    """Only tokenizer_config.json names it; its ids are in no hash of tokenizer.json."""
    tokenizer = folder.get("tokenizer_config.json")
    folder.write("tokenizer_config.json", json.dumps(tokenizer | {"bos_token": tokenizer["pad_token"]}))
    status = main(arguments_of(verb, folder.path, text_file, recipe_file))
    assert status == (0 if verb in ("generate", "evaluate") else 2)
    assert "has another tokenizer than the one that the model was trained with (BOS token" in capfd.readouterr().err


def test_a_null_in_a_recipe_is_a_setting_that_was_not_given(folder, text_file, recipe_file, capfd):
    argv = arguments_of("evaluate", folder.path, text_file, recipe_file)
    assert main(argv) == 0
    expected = capfd.readouterr().out
    folder.json("minigpt.json", recipe={**folder.get("minigpt.json")["recipe"], "encoding": None, "newline": None})
    assert main(argv) == 0
    assert capfd.readouterr().out == expected


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
def test_hostile_generation_settings_are_rejected_or_harmless(settings, folder, capfd):
    folder.json("generation_config.json", **settings)
    began = time.process_time()
    code = main(["generate", str(folder.path), "--prompt", "def", "--max_new_tokens", "2"])
    _, err = capfd.readouterr()
    assert code in (0, 2), err
    assert code == len([line for line in err.splitlines() if line.startswith("minigpt ")]) * 2, err
    assert "Traceback" not in err
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no\\x1b[2J system') }}", "no.*system"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{% if %}", "Expected an expression"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_the_error_of_a_chat_template_is_reported_in_one_line(template, message, folder, monkeypatch, capfd):
    folder.write("chat_template.jinja", template)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main(["chat", str(folder.path)]) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("minigpt chat: ")]
    assert len(lines) == 1
    assert re.search(f"the chat template of the model rejects the conversation .*{message}", lines[0])
    assert "\x1b" not in lines[0]


def test_a_chat_template_is_not_rendered_without_chat(folder, text_file, recipe_file):
    folder.write(
        "chat_template.jinja", "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}"
    )
    for command in ("generate", "evaluate", "tokenizer"):
        assert main(arguments_of(command, folder.path, text_file, recipe_file)) == 0


def test_control_characters_quoted_in_an_error_are_escaped(folder, capfd):
    folder.json("config.json", _attn_implementation="\x1b]0;owned\x07/k")
    rejected(["generate", str(folder.path)], capfd, r"\\x1b\]0;owned", folder.outside)


# -- Hub repositories -------------------------------------------------------------------------------------------------


def test_a_repository_is_checked_like_a_folder(folder, hub, capfd):
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
    rejected(argv, capfd, "evil/model: .*config.json: `_attn_implementation` is 'evil/kernel'")
    assert not any("kernel" in request.path for request in hub.requests)


# -- recipes, options, prompts ----------------------------------------------------------------------------------------

RECIPES = {
    "deeply nested": ("a: " + "[" * 30_000, "nested too deeply"),
    "exponentially expanding references": (
        "a: &a [x, x]\n"
        + "".join(f"{c}: &{c} [*{b}, *{b}]\n" for b, c in zip("abcdefghij", "bcdefghijk", strict=True)),
        "aliases .* are not supported",
    ),
    "an object": ("hidden_size: !!python/object/apply:os.system ['touch canary']", "could not determine a constructor"),
    "a duplicate key": ("hidden_size: 8\nhidden_size: 16", "duplicate key 'hidden_size'"),
    "a key that is a list": ("? [a]\n: 1", "unhashable"),
    "a key that is a number": ("1: 2", "unknown setting 1"),
    "nan": ("learning_rate: .nan", "learning_rate is nan"),
    "infinity": ("weight_decay: .inf", "weight_decay is inf"),
    "infinity for an integer": ("hidden_size: .inf", "hidden_size is inf"),
    "a fraction for an integer": ("hidden_size: 32.5", "hidden_size is 32.5"),
    "a huge number": ("max_steps: 1" + "0" * 100, "an integer of 333 bits"),
    "a number of a million digits": ("max_steps: 1" + "0" * 60_000, "max_steps|digits"),
    "a date": ("max_steps: 2020-01-01", "max_steps"),
    "too long": ("#" * 70_000, "larger than 65,536 bytes"),
    "control characters": ("hidden_size: '\x1b[2J'", "special characters are not allowed"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_hostile_recipe_is_rejected_in_one_line(case, tmp_path, text_file, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    recipe, message = RECIPES[case]
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    argv = ["train", "--recipe", "recipe.yaml", "--data", str(text_file), "--output_dir", "new"]
    rejected(argv, capfd, "recipe.yaml.*" + message if "digits" not in message else message, tmp_path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "binary"])
def test_a_recipe_that_is_not_a_text_file_is_rejected(kind, tmp_path, text_file, capfd):
    place = tmp_path / "recipe.yaml"
    {"folder": place.mkdir, "pipe": lambda: os.mkfifo(place), "binary": lambda: place.write_bytes(b"\x80\x02" * 99)}[
        kind
    ]()
    argv = ["train", "--recipe", str(place), "--data", str(text_file), "--output_dir", str(tmp_path / "new")]
    rejected(argv, capfd, "no such file|invalid YAML")


OPTIONS = {
    "references": (["--top_k", "&a [*a]"], "aliases"),
    "deeply nested": (["--top_k", "[" * 20_000], "nested too deeply"),
    "an object": (["--top_k", "!!python/name:os.system"], "invalid value"),
    "nan": (["--temperature", ".nan"], "temperature is nan: a finite number is required"),
    "more than all tokens": (["--top_p", "1.5"], "top_p is 1.5: a number from 0 to 1 is required"),
    "infinity": (["--temperature", ".inf"], "temperature is inf"),
    "a date": (["--max_new_tokens", "2020-01-01"], "must be an integer of at least 1"),
    "a map": (["--max_new_tokens", "{a: 1}"], "must be an integer of at least 1"),
    "a count as text": (["--max_new_tokens", "1e9"], "must be an integer of at least 1"),
    "no tokens": (["--max_new_tokens", "-1"], "max_new_tokens"),
    "everything suppressed": (["--suppress_tokens", str(list(range(300))), "--do_sample", "true"], "can be generated"),
    "an unknown cache": (["--cache_implementation", "evil"], "cache_implementation"),
    "code from the Hub": (["--custom_generate", "evil/repo"], "no option 'custom_generate'"),
    "bytes that are not UTF-8": (["--prompt", "a\udcffb"], "not valid UTF-8 at position 1"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_hostile_option_is_rejected_in_one_line(case, run_folder, capfd):
    options, message = OPTIONS[case]
    rejected(["generate", str(run_folder / "model"), "--max_new_tokens", "4", *options], capfd, message)


@pytest.mark.parametrize("prompt", ["a\0b", "\x1b[2J", "\u202eabc", "\r\n\t"])
def test_control_characters_in_a_prompt_are_text(prompt, run_folder, capfd):
    assert main(["generate", str(run_folder / "model"), "--prompt", prompt, "--max_new_tokens", "2"]) == 0
    assert capfd.readouterr().out.startswith(prompt)


# -- special tokens in prompts ----------------------------------------------------------------------------------------


def test_a_special_token_in_a_prompt_is_treated_as_text_as_in_training(run_folder, monkeypatch, capfd):
    from minigpt_hf.data.encoding import Encoder
    from minigpt_hf.inference.generation import encode_prompt

    folder = run_folder / "model"
    model, tokenizer = minigpt_hf.load(folder)
    encoder = Encoder(tokenizer.backend_tokenizer.to_str())
    encode = lambda prompt: encoder(prompt).tolist()  # noqa: E731
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

    with_special_token = minigpt_hf.generate(folder, prompt, special_tokens=True, **options)[0]
    start = torch.tensor([[tokenizer.bos_token_id, *encode("def")]])
    assert with_special_token == tokenizer.decode(model.generate(start, **options)[0], skip_special_tokens=True)
    assert main([*argv, "--prompt", prompt, "--special_tokens"]) == 0
    assert capfd.readouterr().out.rstrip("\n") == "<|endoftext|>" + with_special_token.rstrip("\n")


def test_a_special_token_typed_interactively_is_treated_as_text(run_folder, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"<|endoftext|>\n")))
    argv = ["generate", str(run_folder / "model"), "--interactive", "--max_new_tokens", "4", "--do_sample", "false"]
    assert main(argv) == 0
    options = {"max_new_tokens": 4, "do_sample": False}
    assert minigpt_hf.generate(run_folder / "model", "<|endoftext|>", **options)[0].strip() in capfd.readouterr().out


# -- plot -------------------------------------------------------------------------------------------------------------


def logged(folder: Path, *rows) -> str:
    folder.mkdir()
    (folder / "log.jsonl").write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(folder)


GOOD = [{"step": i, "tokens": 100 * i, "bits_per_byte": 3 / i, "eval_bits_per_byte": 4 / i} for i in (1, 2, 3)]


def test_invalid_values_of_a_log_are_skipped_and_counted(tmp_path, capfd):
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


def test_an_empty_log_can_be_plotted(tmp_path):
    assert main(["plot", logged(tmp_path / "run"), "--output", str(tmp_path / "a.png")]) == 0


@pytest.mark.parametrize("name", ["_hidden", r"$\frac{", "a$b$c", "two\nlines", "\x1b[2J", "x" * 200])
def test_the_legend_contains_the_unmodified_name_of_a_run(name, tmp_path):
    """In SVG with text stored as text, so that it can be read."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert main(["plot", logged(tmp_path / name, *GOOD), "--output", str(tmp_path / "a.svg")]) == 0
    shown = name.replace("\n", "\\n").replace("\x1b", "\\x1b")
    assert f"{shown} (1.333)" in re.sub(r"<[^>]*>", "", (tmp_path / "a.svg").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", ['{"step": 1', "\x00", "7", "[" * 100_000])
def test_incomplete_lines_of_a_log_are_skipped_and_counted(row, tmp_path, capfd):
    run = logged(tmp_path / "run", row, *GOOD)
    assert main(["plot", run, "--output", str(tmp_path / "a.png")]) == 0
    assert f"{run}: 1 incomplete lines of log.jsonl are skipped" in capfd.readouterr().err


def test_a_figure_does_not_replace_folders_and_special_files(tmp_path, capfd):
    run = logged(tmp_path / "run", *GOOD)
    (tmp_path / "a.png").mkdir()
    os.mkfifo(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        rejected(["plot", run, "--output", str(tmp_path / name)], capfd, f"{name}: already exists and is not a file")


# -- push -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo_id", ["../x", "a/b/c", "user/a\nb", "", "user/a b", "-x/y"])
def test_an_invalid_repository_id_is_rejected_before_anything_is_sent(repo_id, run_folder, hub, capfd):
    rejected(["push", str(run_folder / "model"), f"--repo-id={repo_id}"], capfd, "Repo id must")
    assert hub.requests == []


PUSHED = {
    "invalid front matter": lambda folder: folder.write("README.md", "---\na: [\n---\n# x"),
    "deeply nested front matter": lambda folder: folder.write("README.md", "---\na: " + "[" * 2_000 + "\n---\n"),
    "a card that is not UTF-8": lambda folder: folder.write("README.md", b"---\nlicense: mit\n---\n\xff"),
    "minigpt.json is a list": lambda folder: folder.write("minigpt.json", "[]"),
    "active markup in the card": lambda folder: folder.append("README.md", "\n<script>alert(1)</script>\n"),
    "a link": lambda folder: (folder.path / "LICENSE").symlink_to("/etc/passwd"),
    "a pipe": lambda folder: os.mkfifo(folder.path / "pipe"),
    "a bidirectional control character in a name": lambda folder: folder.write("a\u202eb.txt", "x"),
    "a token": lambda folder: folder.write("LICENSE", "hf_" + "x" * 34),
}


@pytest.mark.parametrize("case", PUSHED)
def test_a_hostile_folder_is_not_pushed(case, folder, hub, monkeypatch, capfd):
    """With the doctor's file checks only; loading the model takes longer and is tested above."""
    import minigpt_hf.doctor

    monkeypatch.setattr(minigpt_hf.doctor, "examine", minigpt_hf.doctor.examine_files)
    PUSHED[case](folder)
    rejected(["push", str(folder.path), "--repo-id", "user/x"], capfd, "not uploaded|is a link", folder.outside)
    assert hub.requests == []


def test_a_folder_that_changes_while_it_is_checked_is_not_pushed(folder, hub, monkeypatch, capfd):
    import minigpt_hf.doctor

    def examine(path):
        folder.append("README.md", "more\n")
        return []

    monkeypatch.setattr(minigpt_hf.doctor, "examine", examine)
    assert main(["push", str(folder.path), "--repo-id", "user/x"]) == 2
    assert "has changed since it was checked" in capfd.readouterr().err
    assert not any(request.method == "POST" and "commit" in request.path for request in hub.requests)


# -- export -----------------------------------------------------------------------------------------------------------


def test_an_export_is_written_neither_into_the_model_folder_nor_over_a_link(folder, capfd):
    for out in (folder.path / "twin", folder.path / "figures" / ".." / "twin"):
        argv = ["export", str(folder.path), "--to", "native", "--output_dir", str(out)]
        rejected(argv, capfd, "is inside the model folder", folder.path)
    (folder.outside / "out").symlink_to(folder.outside / "nowhere")
    argv = ["export", str(folder.path), "--to", "native", "--output_dir", str(folder.outside / "out")]
    rejected(argv, capfd, "out is a symbolic link to .*nowhere, which does not exist", folder.outside)


def test_an_export_copies_nothing_from_outside_the_folder(folder, capfd):
    (folder.path / "LICENSE").symlink_to("/etc/passwd")
    rejected(["export", str(folder.path), "--to", "native"], capfd, "LICENSE is a link", folder.outside)


# -- import -----------------------------------------------------------------------------------------------------------


def checkpoint(place: Path, **content) -> Path:
    torch.save(content, place / "ckpt.pt")
    return place / "ckpt.pt"


ARGS = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "vocab_size": 3, "bias": False}
TABLES = {"transformer.wte.weight": torch.zeros(3, 4), "transformer.wpe.weight": torch.zeros(4, 4)}
IMPORTED = {
    "code": lambda place: checkpoint(place, model=CreateCanary(place / "canary"), model_args={}),
    "no tensors": lambda place: checkpoint(place, model={"a": 1}, model_args=ARGS),
    "a list of weights": lambda place: checkpoint(place, model=[], model_args=ARGS),
    "a list of sizes": lambda place: checkpoint(place, model=TABLES, model_args=list(ARGS)),
    "a size that is a word": lambda place: checkpoint(place, model=TABLES, model_args={**ARGS, "n_layer": "x"}),
    "a million layers": lambda place: checkpoint(place, model=TABLES, model_args={**ARGS, "n_layer": 10**6}),
    "ten million tokens": lambda place: checkpoint(place, model=TABLES, model_args={**ARGS, "vocab_size": 10**7}),
    "no heads": lambda place: checkpoint(place, model=TABLES, model_args={**ARGS, "n_head": 0}),
    "an incomplete model": lambda place: checkpoint(place, model=TABLES, model_args=ARGS),
}


@pytest.mark.parametrize("case", IMPORTED)
def test_a_hostile_checkpoint_is_rejected_in_one_line(case, tmp_path, capfd):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0, "b": 1, "c": 2}}))
    file = IMPORTED[case](tmp_path)
    argv = ["import", str(file), "--meta", str(tmp_path / "meta.pkl"), "--output_dir", str(tmp_path / "new")]
    rejected(argv, capfd, "ckpt.pt: |the weights are not", tmp_path)
    assert not (tmp_path / "canary").exists()


METAS = {
    "code": lambda place: pickle.dumps({"stoi": CreateCanary(place / "canary")}),
    "a class": lambda place: pickle.dumps({"stoi": Path}),
    "an empty file": lambda place: b"",
    "a truncated pickle": lambda place: pickle.dumps({"stoi": {"a": 0}})[:-3],
    "a length beyond the file": lambda place: b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b".",
    "a missing memo index": lambda place: b"\x80\x04h\x07.",
    "a stack underflow": lambda place: b"\x80\x04us.",
    "no characters": lambda place: pickle.dumps({"stoi": {7: 0, "b": 1}}),
    "ids that are words": lambda place: pickle.dumps({"stoi": {"a": "x", "b": 1}}),
    "a surrogate": lambda place: pickle.dumps({"stoi": {"\ud800": 0, "b": 1}}),
}


@pytest.mark.parametrize("case", METAS)
def test_a_hostile_vocabulary_is_rejected_in_one_line(case, tmp_path, capfd):
    file = checkpoint(tmp_path, model=TABLES, model_args=ARGS)
    (tmp_path / "meta.pkl").write_bytes(METAS[case](tmp_path))
    argv = ["import", str(file), "--meta", str(tmp_path / "meta.pkl"), "--output_dir", str(tmp_path / "new")]
    rejected(argv, capfd, "meta.pkl: ", tmp_path)
    assert not (tmp_path / "canary").exists()
