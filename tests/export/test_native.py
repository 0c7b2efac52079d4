"""The native twin: only `config.json` differs, and Qwen3 of transformers computes the same logits."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from minigpt_hf.data.tokenizer import byte_tokenizer
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.export import native as module
from minigpt_hf.export.native import export_native
from minigpt_hf.model.native import qwen3_settings
from minigpt_hf.publish.model_folder import save_model_files
from tests.conftest import random_ids, tiny_model


@pytest.fixture(scope="module")
def twin(run_folder, tmp_path_factory):
    return export_native(run_folder / "model", tmp_path_factory.mktemp("native") / "twin")


def content(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_the_config_and_the_examples_differ_and_the_code_is_left_out(run_folder, twin):
    ours, theirs = content(run_folder / "model"), content(twin)
    assert set(ours) - set(theirs) == {"configuration_minigpt.py", "modeling_minigpt.py"}
    assert {name for name in theirs if theirs[name] != ours[name]} == {"config.json", "README.md"}
    assert "trust_remote_code" not in theirs["README.md"].decode()


def test_metadata_of_another_version_are_rejected(run_folder, tmp_path):
    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    metadata = json.loads((folder / "minigpt.json").read_text())
    del metadata["data"]["datasets"]
    (folder / "minigpt.json").write_text(json.dumps(metadata))
    with pytest.raises(MiniGPTError, match="no card can be rendered"):
        export_native(folder, tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_qwen3_gives_the_same_logits_bit_for_bit_beyond_the_window(run_folder, twin, attention):
    ours = AutoModelForCausalLM.from_pretrained(run_folder / "model", attn_implementation=attention)
    theirs = AutoModelForCausalLM.from_pretrained(twin, trust_remote_code=False, attn_implementation=attention)
    assert type(theirs) is Qwen3ForCausalLM
    ids = random_ids(2, 80)  # longer than the sliding window
    assert torch.equal(theirs(ids).logits, ours(ids).logits)


@pytest.mark.slow
def test_a_process_without_this_package_loads_it_and_encodes_the_same(run_folder, twin, tmp_path):
    code = (
        "import sys; sys.modules['minigpt_hf'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))\n"
        "print(model.generate(**tokenizer('def é', return_tensors='pt'), max_new_tokens=9, do_sample=False).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, twin], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(run_folder / "model")
    inputs = AutoTokenizer.from_pretrained(run_folder / "model")("def é", return_tensors="pt")
    assert done.stdout.strip() == str(ours.generate(**inputs, max_new_tokens=9, do_sample=False).tolist()), done.stderr


def test_every_value_of_the_architecture_is_stated(twin):
    settings = json.loads((twin / "config.json").read_text())
    assert (settings["head_dim"], settings["use_sliding_window"], settings["sliding_window"]) == (8, True, 33)
    assert settings["layer_types"] == ["sliding_attention"] * 2
    assert settings["rope_parameters"] == {"rope_type": "default", "rope_theta": settings["rope_theta"]}
    assert not {"auto_map", "embedding_dropout", "residual_dropout"} & set(settings)


def test_a_context_replaces_the_sliding_window_for_engines_without_one(run_folder, tmp_path):
    twin = export_native(run_folder / "model", tmp_path / "twin", context=32)
    settings = json.loads((twin / "config.json").read_text())
    assert (settings["use_sliding_window"], settings["max_position_embeddings"]) == (False, 32)
    assert AutoTokenizer.from_pretrained(twin).model_max_length == 32
    ids = random_ids(2, 32)
    ours = AutoModelForCausalLM.from_pretrained(run_folder / "model")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(twin)(ids).logits, ours(ids).logits)
    for context in (0, 34):
        with pytest.raises(ValueError, match=rf"--context {context}: give 1 to 33 tokens.*sliding window is 33"):
            export_native(run_folder / "model", tmp_path / "other", context=context)


def test_sharded_and_bfloat16_weights_and_mixed_layers_are_unchanged(tmp_path):
    model = tiny_model(
        vocab_size=258, use_sliding_window=True, sliding_window=8, max_window_layers=1, initializer_range=1
    ).to(torch.bfloat16)
    save_model_files(model, byte_tokenizer(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    twin = export_native(tmp_path / "model", tmp_path / "twin")
    assert len(list(twin.glob("*.safetensors"))) > 1
    ours, theirs = (AutoModelForCausalLM.from_pretrained(place) for place in (tmp_path / "model", twin))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(theirs(random_ids(1, 40)).logits, ours(random_ids(1, 40)).logits)


def test_an_export_that_differs_from_the_model_is_not_written(run_folder, tmp_path, monkeypatch):
    """A configuration without the sliding window, as with Qwen3's defaults, fails verification."""
    right = module.qwen3_settings

    def without_a_window(config, context):
        return {**right(config, context), "use_sliding_window": False, "layer_types": None}

    monkeypatch.setattr(module, "qwen3_settings", without_a_window)
    with pytest.raises(ValueError, match="it is not true that its logits equal the model's bit for bit"):
        export_native(run_folder / "model", tmp_path / "twin")
    assert list(tmp_path.iterdir()) == []


def test_an_export_with_the_card_of_other_weights_is_reported(run_folder, tmp_path, caplog):
    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    export_native(folder, tmp_path / "same")
    assert caplog.text == ""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data += 1
    model.save_pretrained(folder)
    export_native(folder, tmp_path / "other")
    assert "its results, scores and samples are those of other weights" in caplog.text


def test_folders_that_cannot_be_exported_are_rejected(run_folder, twin, tmp_path):
    model = run_folder / "model"
    with pytest.raises(ValueError, match=f"this is a run folder; its model folder is {model}"):
        export_native(run_folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"it has no config\.json; give a model folder"):
        export_native(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="already exists"):
        export_native(model, twin)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="its model type is 'gpt2'; only MiniGPT and Qwen3 models"):
        export_native(tmp_path / "gpt2", tmp_path / "out")
    shutil.rmtree(tmp_path / "gpt2")

    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(model / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys in its weights: \['model\.norm\.weight'\]"):
        export_native(broken, tmp_path / "out")
    weights["model.norm.weight"] = torch.full_like(norm, float("inf"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight has values that are not finite"):
        export_native(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_shards_of_any_name_are_exported(tmp_path):
    """The index names the files of the weights."""
    model = tiny_model(vocab_size=258)
    save_model_files(model, byte_tokenizer(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "part.safetensors")
    index = {"metadata": {}, "weight_map": {name: "part.safetensors" for name, _ in model.named_parameters()}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    twin = AutoModelForCausalLM.from_pretrained(export_native(tmp_path / "model", tmp_path / "twin"))
    assert torch.equal(twin(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits)


def test_settings_that_a_qwen3_configuration_omits_have_the_defaults_of_qwen3(tmp_path):
    """The window of Qwen3 begins at layer 28 by default, that of MiniGPT at layer 0."""
    model = tiny_model(vocab_size=258)
    save_model_files(model, byte_tokenizer(), tmp_path / "model")
    settings = qwen3_settings(model.config) | {"use_sliding_window": True, "sliding_window": 3}
    del settings["layer_types"], settings["max_window_layers"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(random_ids(1, 9)).logits
    twin = AutoModelForCausalLM.from_pretrained(export_native(tmp_path / "model", tmp_path / "twin"))
    assert torch.equal(twin(random_ids(1, 9)).logits, expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_the_model_does_not_load_are_reported_and_not_copied(sharded, tmp_path, caplog):
    model, folder = tiny_model(vocab_size=258), tmp_path / "model"
    save_model_files(model, byte_tokenizer(), folder)
    stray = ["adapter_model.safetensors", "model-00009-of-00009.safetensors"]
    if sharded:
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
    else:
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "adapter_model.safetensors"}}')
        stray.append("model.safetensors.index.json")
    loaded = {file.name for file in folder.glob("model*.safetensors")}
    for name in stray[:2]:
        save_file({"x": torch.zeros(1)}, folder / name)
    twin = export_native(folder, tmp_path / "twin")
    assert {file.name for file in twin.glob("*.safetensors")} == loaded
    assert (twin / "model.safetensors.index.json").exists() == sharded
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(twin)(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits
    )
    (line,) = caplog.messages
    assert line == f"{folder}: not copied, because the model does not load them: {', '.join(stray)}"
