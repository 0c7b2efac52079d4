"""Folders with one fault each: the fault is reported by the corresponding check and by no other."""

import json
import re

import pytest
import torch

from minigpt_hf import doctor
from minigpt_hf.data.tokenizer import byte_level_bpe
from tests.conftest import representative
from tests.doctor.conftest import Broken

FAULTS = {}


def plant(*rows: str, reason: str):
    """Register a function that damages a folder, the checks that fail for it, and a pattern of the first reason."""

    def register(function):
        FAULTS[function.__name__] = (function, rows, reason)
        return function

    return register


# -- files ------------------------------------------------------------------------------------------------------------


@plant("files complete", reason="missing: tokenizer.json")
def no_tokenizer(folder: Broken):
    folder.delete("tokenizer.json")


@plant("files complete", reason="missing: README.md")
def no_card(folder: Broken):
    folder.delete("README.md")


@plant("files complete", reason="missing: config.json")
def no_config(folder: Broken):
    folder.delete("config.json")


@plant("files complete", reason=r"missing: model\.safetensors")
def no_weights(folder: Broken):
    folder.delete("model.safetensors")


@plant("files complete", "auto_map", reason=r"missing: modeling_minigpt\.py")
def no_code(folder: Broken):
    folder.delete("modeling_minigpt.py")


@plant("files known", reason=r"not files of a model folder: checkpoint\.tar\.xz")
def a_foreign_file(folder: Broken):
    folder.write("checkpoint.tar.xz", b"\xfd7zXZ\x00")


@plant("files known", reason=r"not files of a model folder: helpers/more\.py")
def a_subfolder_with_code(folder: Broken):
    folder.write("helpers/more.py", "x = 1\n")


@plant("files readable", reason=r"config\.json is not valid JSON")
def half_a_config(folder: Broken):
    text = (folder.path / "config.json").read_text()
    folder.write("config.json", text[: len(text) // 2])


@plant("files readable", reason="duplicate key 'eos_token_id'")
def a_duplicate_key(folder: Broken):
    folder.replace("generation_config.json", "{", '{"eos_token_id": 5,')


@plant("files readable", reason=r"README\.md is not UTF-8")
def a_card_in_latin_1(folder: Broken):
    folder.write("README.md", (folder.path / "README.md").read_bytes() + "naïve".encode("latin-1"))


@plant("files readable", reason="tokenizer_config.json is not a JSON object")
def a_list_instead_of_settings(folder: Broken):
    folder.write("tokenizer_config.json", "[]")


@plant("no secret", reason=r"README\.md, line \d+: a Hugging Face token \(hf_abc…\)")
def a_token_in_the_card(folder: Broken):
    folder.append("README.md", "\n\nLog in with hf_abcdefghijklmnopqrstuvwxyzABCDEFGH first.\n")


@plant("no secret", reason=r"minigpt\.json, line \d+: a token")
def a_token_in_the_metadata(folder: Broken):
    folder.json("minigpt.json", hub_token="not-of-a-known-form")


# -- configuration ----------------------------------------------------------------------------------------------------


@plant("config", "recipe", reason="`num_hidden_layers` is -1")
def a_negative_number_of_layers(folder: Broken):
    folder.json("config.json", num_hidden_layers=-1)


@plant("config", "recipe", reason="`max_position_embeddings` is 0")
def no_positions(folder: Broken):
    folder.json("config.json", max_position_embeddings=0)


@plant("config", reason=r"`attention_dropout` is 7: must be in \[0, 1\)")
def dropout_of_seven(folder: Broken):
    folder.json("config.json", attention_dropout=7)


@plant("config", "recipe", reason="4 heads are not a multiple of 3")
def heads_that_do_not_divide(folder: Broken):
    folder.json("config.json", num_key_value_heads=3)


@plant("config", "special tokens", reason="`eos_token_id` 300 is not in the vocabulary of 300")
def an_eos_token_beyond_the_vocabulary(folder: Broken):
    folder.json("config.json", eos_token_id=300)


@plant("config", reason="`architectures` is 'MiniGPTModel', not a causal language model")
def a_model_without_a_head(folder: Broken):
    folder.json("config.json", architectures=["MiniGPTModel"])


@plant("config", reason="no `head_dim`: its default may differ elsewhere")
def a_size_that_depends_on_the_default(folder: Broken):
    folder.json("config.json", head_dim=None)


@plant("config", "recipe", reason="`layer_types` and `use_sliding_window` disagree")
def a_disabled_sliding_window(folder: Broken):
    folder.json("config.json", use_sliding_window=False)


@plant("recipe", reason=r"`rope_theta` is 500000\.0, trained with 10000\.0")
def another_theta(folder: Broken):
    folder.json("config.json", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})


@plant("config", reason=r"`rope_theta` is 500\.0, but 10000\.0 in `rope_parameters`")
def two_thetas(folder: Broken):
    folder.json("config.json", rope_theta=500.0)


@plant("recipe", reason=r"`sliding_window` is 5, trained with \d+")
def another_window(folder: Broken):
    folder.json("config.json", sliding_window=5)


@plant("recipe", reason="`rope_type` is 'linear', trained with 'default'")
def scaled_rotary_positions(folder: Broken):
    folder.json("config.json", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})


@plant("recipe", reason="`hidden_act` is 'gelu', trained with 'silu'")
def another_activation(folder: Broken):
    folder.json("config.json", hidden_act="gelu")


@plant("recipe", reason=r"`max_position_embeddings` is 40, trained with \d+")
def another_length(folder: Broken):
    folder.json("config.json", max_position_embeddings=40)


@plant("generation config", reason="temperature")
def greedy_with_a_temperature(folder: Broken):
    folder.json("generation_config.json", do_sample=False)


@plant("generation config", reason="unknown: temprature")
def a_misspelt_option(folder: Broken):
    folder.json("generation_config.json", temprature=0.7)


# -- code -------------------------------------------------------------------------------------------------------------


@plant("auto_map", reason="no entry for AutoConfig, AutoModel, AutoModelForCausalLM")
def no_auto_map(folder: Broken):
    folder.json("config.json", auto_map=None)


@plant("auto_map", reason="no entry for AutoModel$")
def an_auto_map_without_the_base(folder: Broken):
    entries = folder.get("config.json")["auto_map"]
    del entries["AutoModel"]
    folder.json("config.json", auto_map=entries)


@plant("auto_map", reason=r"but modeling_minigpt\.py does not define this class")
def a_class_that_is_not_there(folder: Broken):
    entries = folder.get("config.json")["auto_map"]
    folder.json("config.json", auto_map={**entries, "AutoModel": "modeling_minigpt.MiniGTPModel"})


@plant("code", reason=r"modeling_minigpt\.py, line \d+: ")
def code_that_does_not_parse(folder: Broken):
    folder.append("modeling_minigpt.py", "\ndef broken(:\n")


@plant("code", reason=r"`from \.\.configuration_minigpt import …` does not name a module of the folder")
def an_import_of_two_levels(folder: Broken):
    folder.replace("modeling_minigpt.py", "from .configuration_minigpt", "from ..configuration_minigpt")


@plant("code", reason=r"`from \. import …` does not name a module of the folder")
def an_import_of_the_folder(folder: Broken):
    folder.append("modeling_minigpt.py", "\nfrom . import configuration_minigpt\n")


@plant("code", reason=r"`from \.layers import …`, and there is no layers\.py")
def an_import_of_a_file_that_is_not_there(folder: Broken):
    folder.append("modeling_minigpt.py", "\nfrom .layers import Layer\n")


@plant("code", reason="imports minigpt_hf, which is not available as remote code")
def an_import_of_the_package(folder: Broken):
    folder.append("modeling_minigpt.py", "\nimport minigpt_hf.training\n")


@plant("code", reason="imports no_such_package, which is not installed")
def an_import_of_what_is_not_installed(folder: Broken):
    folder.append("configuration_minigpt.py", "\nimport no_such_package\n")


@plant("code", reason=r"parses one of its lines as an import of `\.there`")
def a_docstring_that_looks_like_an_import(folder: Broken):
    folder.append("modeling_minigpt.py", '\n"""\nfrom .there import nothing\n"""\n')


@plant("chat format", reason="an answer ends with None, which does not stop")
def a_chat_template_without_an_end_of_the_answer(folder: Broken):
    folder.write("chat_template.jinja", "{% for message in messages %}{{ message.content }}{% endfor %}")


@plant("chat format", reason="an answer ends with .*, which does not stop")
def a_chat_template_with_an_end_that_does_not_stop(folder: Broken):
    folder.write("chat_template.jinja", "{% for message in messages %}{{ message.content }}|{% endfor %}")


@plant("chat format", reason="the ids of a prompt are not the start")
def a_chat_template_with_another_prompt_than_conversation(folder: Broken):
    ending = "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    folder.write("chat_template.jinja", "{% for message in messages %}{{ message.content }}" + ending)


@plant("chat format", reason="a conversation cannot be encoded: UndefinedError")
def a_chat_template_that_does_not_render(folder: Broken):
    folder.write("chat_template.jinja", "{{ messages[9].content.text }}")


@plant("chat template", reason="chat_template.jinja does not parse")
def a_chat_template_without_an_end_tag(folder: Broken):
    folder.write("chat_template.jinja", "{% for message in messages %}{{ message.content }}")


# -- weights ----------------------------------------------------------------------------------------------------------


@plant("weights header", reason="the tensors end at byte")
def half_of_the_weights(folder: Broken):
    content = (folder.path / "model.safetensors").read_bytes()
    folder.write("model.safetensors", content[: len(content) - 400])


@plant("tensors", "weights recorded", reason=r"missing: model\.layers\.1\.mlp\.up_proj\.weight$")
def a_tensor_is_missing(folder: Broken):
    folder.tensors(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


@plant("tensors", "recipe", reason=r"missing: model\.layers\.2\..* and 8 more")
def one_layer_too_many_in_the_config(folder: Broken):
    layers = folder.get("config.json")["layer_types"]
    folder.json("config.json", num_hidden_layers=3, layer_types=[*layers, layers[0]])


@plant("tensors", "weights recorded", reason=r"unexpected: model\.layers\.0\.self_attn\.q_proj\.bias")
def a_tensor_too_many(folder: Broken):
    folder.tensors(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))


@plant("tensors", "weights recorded", reason=r"model\.norm\.weight is \(31,\), not \(32,\)")
def a_tensor_of_another_shape(folder: Broken):
    folder.tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))


@plant("tensors finite", "weights recorded", reason=r"NaN or infinity in model\.norm\.weight")
def one_nan(folder: Broken):
    folder.tensors(lambda tensors: tensors["model.norm.weight"].__setitem__(7, float("nan")))


@plant("tensors finite", "weights recorded", reason=r"NaN or infinity in model\.layers\.0\.mlp\.down_proj\.weight")
def an_infinity_in_bfloat16(folder: Broken):
    def set_infinity(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})
        tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = float("-inf")

    folder.tensors(set_infinity)


@plant("weights recorded", reason="its results, scores and samples are those of other weights")
def weights_of_another_model(folder: Broken):
    folder.tensors(lambda tensors: tensors["model.norm.weight"].add_(1))


@plant("tied weights", "weights recorded", reason=r"lm_head\.weight and model\.embed_tokens\.weight differ")
def tied_weights_that_differ(folder: Broken):
    folder.tensors(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))


@plant(
    "weights index",
    reason=r"model\.safetensors\.index\.json names model-00002-of-00002\.safetensors, which does not exist",
)
def a_shard_is_missing(folder: Broken):
    places = dict.fromkeys(weight_names(folder), "model.safetensors")
    places["model.norm.weight"] = "model-00002-of-00002.safetensors"
    folder.write("model.safetensors.index.json", json.dumps({"weight_map": places}))


@plant("weights index", reason="no model.safetensors.index.json, and the weights are model-00001-of-00002.safetensors")
def a_shard_without_an_index(folder: Broken):
    folder.write("model-00001-of-00002.safetensors", (folder.path / "model.safetensors").read_bytes())


@plant("weights index", reason="a tensor is in two shards")
def a_tensor_in_two_shards(folder: Broken):
    content = (folder.path / "model.safetensors").read_bytes()
    folder.write("model-00002-of-00002.safetensors", content)
    places = dict.fromkeys(weight_names(folder), "model.safetensors")
    places["model.norm.weight"] = "model-00002-of-00002.safetensors"
    folder.write("model.safetensors.index.json", json.dumps({"weight_map": places}))


@plant("weights index", reason=r"disagree about model\.norm\.weight")
def an_index_without_a_tensor(folder: Broken):
    places = dict.fromkeys(weight_names(folder), "model.safetensors")
    del places["model.norm.weight"]
    folder.write("model.safetensors.index.json", json.dumps({"weight_map": places}))


def weight_names(folder: Broken) -> list[str]:
    content = (folder.path / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return [name for name in header if name != "__metadata__"]


# -- tokenizer --------------------------------------------------------------------------------------------------------


@plant("tokenizer", reason="tokenizer.json does not load")
def a_tokenizer_of_an_unknown_type(folder: Broken):
    content = folder.get("tokenizer.json")
    folder.json("tokenizer.json", model={**content["model"], "type": "Guess"})


@plant("fingerprint", reason="minigpt.json has ")
def the_tokenizer_of_another_text(folder: Broken):
    other = byte_level_bpe(["zyxwvu tsrqpo nmlkji hgfedc ba " * 40], 300)
    folder.write("tokenizer.json", other.backend_tokenizer.to_str())


@plant("fingerprint", "files complete", reason="config.json has ")
def the_tokenizer_of_another_text_without_metadata(folder: Broken):
    the_tokenizer_of_another_text(folder)
    folder.delete("minigpt.json")


@plant("fingerprint", reason="config.json has ")
def the_configuration_of_another_tokenizer(folder: Broken):
    folder.json("config.json", tokenizer_fingerprint="0" * 64)


@plant("vocabulary", "fingerprint", reason=r"ids beyond the 300 rows of the embedding")
def a_tokenizer_that_is_too_big(folder: Broken):
    content = folder.get("tokenizer.json")
    model = {**content["model"], "vocab": {**content["model"]["vocab"], "zzzzzz": 300}}
    folder.json("tokenizer.json", model=model)


@plant("tokenizer round trip", "fingerprint", reason="is decoded as")
def a_tokenizer_without_a_decoder(folder: Broken):
    content = folder.get("tokenizer.json")
    folder.write("tokenizer.json", json.dumps({**content, "decoder": None}))


@plant("special tokens", "fingerprint", reason=r"not marked as special: <\|pad\|>")
def a_special_token_that_is_text(folder: Broken):
    tokens = folder.get("tokenizer.json")["added_tokens"]
    folder.json("tokenizer.json", added_tokens=[{**token, "special": token["id"] == 0} for token in tokens])


@plant("special tokens", reason="pad_token is 0, but config.json has 1")
def padding_with_the_eos_token(folder: Broken):
    folder.json("tokenizer_config.json", pad_token="<|endoftext|>")


@plant("special tokens", "end of text", reason="eos_token is 0, but generation_config.json has 5")
def another_eos_token_in_the_generation_config(folder: Broken):
    folder.json("generation_config.json", eos_token_id=5)


@plant("end of text", reason=r"`suppress_tokens` suppresses '<\|endoftext\|>'")
def a_suppressed_eos_token(folder: Broken):
    folder.json("generation_config.json", suppress_tokens=[0])


@plant("end of text", "fingerprint", reason="the tokenizer has no eos_token")
def a_tokenizer_without_an_eos_token(folder: Broken):
    folder.json("tokenizer_config.json", eos_token=None)


# -- card -------------------------------------------------------------------------------------------------------------


@plant("card", reason="README.md has no metadata")
def a_card_without_metadata(folder: Broken):
    folder.write("README.md", "# A model\n")


@plant("card", reason="`language` holds False, which is not a string")
def a_language_that_yaml_reads_as_false(folder: Broken):
    folder.replace("README.md", "library_name:", "language: no\nlibrary_name:")


@plant("card", reason="`pipeline_tag` is 'image-classification'")
def a_card_of_another_task(folder: Broken):
    folder.replace("README.md", "pipeline_tag: text-generation", "pipeline_tag: image-classification")


@plant("card", reason="Invalid `model_index`")
def results_without_a_dataset(folder: Broken):
    folder.replace("README.md", "    dataset:\n", "    data:\n")


@plant("card filled in", reason=r"README\.md has placeholders: \{\{ name \}\}")
def a_placeholder_of_the_template(folder: Broken):
    folder.append("README.md", "\nThis is {{ name }}.\n")


@plant("card filled in", reason=r"\[More Information Needed\]")
def a_section_left_empty(folder: Broken):
    folder.append("README.md", "\n## Limits\n\n[More Information Needed]\n")


# -- every fault ------------------------------------------------------------------------------------------------------


# Of the faults that the same checks report, `make test` plants the first one.
FIRST = {rows: name for name, (_, rows, _) in reversed(FAULTS.items())}.values()


@pytest.mark.parametrize("name", representative(FAULTS, *FIRST))
def test_a_fault_is_reported_by_its_checks_only(name, broken):
    damage, expected, reason = FAULTS[name]
    damage(broken)
    failed = doctor.failures(doctor.examine_files(broken.path))
    assert sorted(row.name for row in failed) == sorted(expected), failed
    row = next(row for row in failed if row.name == expected[0])
    assert re.search(reason, row.reason), row.reason
    assert row.remedy


def test_at_least_forty_faults_are_tested():
    assert len(FAULTS) >= 40
