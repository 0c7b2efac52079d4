"""`main` of a pushed repository loads everywhere without remote code; the branch `minigpt` has the readable code."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3ForCausalLM

import minigpt_hf
from minigpt_hf import MiniGPTForCausalLM, doctor
from minigpt_hf.cli import main
from minigpt_hf.data.tokenizer import byte_tokenizer
from minigpt_hf.export.native import export_native
from minigpt_hf.publish.model_folder import save_model_files, write_metadata
from minigpt_hf.publish.push import push_folder
from tests.conftest import random_ids, representative, tiny_model

GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False)
CLEAN_PROCESS = """
import json, sys
sys.modules["minigpt_hf"] = None  # importing it fails
import torch, transformers
from transformers import AutoConfig, AutoTokenizer, pipeline

name, out = sys.argv[1:]
generator = pipeline("text-generation", name)
assert type(generator.model).__name__ == "Qwen3ForCausalLM"
text = generator("def f", max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
assert AutoConfig.from_pretrained(name).model_type == "qwen3"
tokenizer = AutoTokenizer.from_pretrained(name)
ids = tokenizer("def f", return_tensors="pt")
for head in ("", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
    model = getattr(transformers, f"AutoModel{head}").from_pretrained(name, pad_token_id=tokenizer.pad_token_id).eval()
    assert type(model).__name__ == f"Qwen3{head or 'Model'}"
    model.save_pretrained(f"{out}/{head}")
    again = type(model).from_pretrained(f"{out}/{head}")
    assert torch.equal(again(**ids)[0], model(**ids)[0])
tokenizer.save_pretrained(f"{out}/ForCausalLM")
for task in ("feature-extraction", "text-classification", "token-classification"):
    pipeline(task, name)("def f")
assert pipeline("text-generation", f"{out}/ForCausalLM")(
    "def f", max_new_tokens=12, do_sample=False, return_full_text=False
)[0]["generated_text"] == text
print(json.dumps(text))
"""


def in_a_clean_process(code: str, hub, tmp_path, *argv) -> subprocess.CompletedProcess:
    """Run code without the package, without standard input, and with empty caches."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, argv)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.fixture
def published(run_folder, hub) -> str:
    push_folder(run_folder / "model", "user/tiny")
    return "user/tiny"


def test_main_loads_in_a_clean_process_by_pipelines_and_every_auto_class(run_folder, published, hub, tmp_path):
    """Neither package nor trust; nothing asks for permission, and what is saved loads again."""
    done = in_a_clean_process(CLEAN_PROCESS, hub, tmp_path, published, tmp_path / "saved")
    assert done.returncode == 0, done.stderr
    for word in ("[y/N]", "trust_remote_code", "model of type", "custom code"):
        assert word not in done.stdout + done.stderr
    model, tokenizer = (
        MiniGPTForCausalLM.from_pretrained(run_folder / "model"),
        AutoTokenizer.from_pretrained(published),
    )
    inputs = tokenizer("def f", return_tensors="pt")
    tokens = model.generate(**inputs, generation_config=GREEDY)[0, inputs.input_ids.shape[1] :]
    assert json.loads(done.stdout) == tokenizer.decode(tokens)
    assert not any(name.endswith(".py") for name in hub.files(published))


@pytest.mark.parametrize("trust", [None, False, True])
def test_no_value_of_trust_remote_code_runs_code_of_main(published, trust):
    assert type(AutoModelForCausalLM.from_pretrained(published, trust_remote_code=trust)) is Qwen3ForCausalLM
    assert not hasattr(AutoModelForCausalLM.from_pretrained(published, trust_remote_code=trust).config, "auto_map")


def test_our_class_loads_main_without_a_warning_and_saves_a_model_folder(run_folder, published, tmp_path, capfd):
    loaded = MiniGPTForCausalLM.from_pretrained(published)
    assert "model of type" not in capfd.readouterr().err
    local = MiniGPTForCausalLM.from_pretrained(run_folder / "model")
    assert torch.equal(loaded(random_ids(2, 80)).logits, local(random_ids(2, 80)).logits)
    loaded.save_pretrained(tmp_path / "saved")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) is MiniGPTForCausalLM
    saved, original = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "saved", run_folder / "model")
    )
    assert saved == original


def test_the_commands_accept_main(run_folder, published, text_file, tmp_path, capsys):
    """generate, evaluate, doctor, export, and fine-tuning, which detects another tokenizer."""
    argv = ["generate", "--prompt", "def ", "--max_new_tokens", "10", "--seed", "0"]
    texts = []
    for name in (published, str(run_folder / "model")):
        assert main([argv[0], name, *argv[1:]]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    score = minigpt_hf.evaluate(published, str(text_file), split="validation")
    assert score.to_dict() == minigpt_hf.evaluate(run_folder / "model", str(text_file), split="validation").to_dict()

    folder = snapshot_download(published, local_dir=tmp_path / "snapshot")
    assert doctor.failures(doctor.examine_files(folder)) == []
    twin = export_native(tmp_path / "snapshot", tmp_path / "twin", context=32)
    ids = random_ids(1, 32)
    logits = [AutoModelForCausalLM.from_pretrained(place)(ids).logits for place in (published, twin)]
    assert torch.equal(*logits)

    argv = ["train", "--init_from", published, "--data", str(text_file), "--output_dir", str(tmp_path / "tuned")]
    argv += ["--block_size", "32", "--max_steps", "1", "--learning_rate", "1e-9", "--use_cpu", "true"]
    argv += ["--validation_characters", "2000", "--warmup_steps", "0", "--muon_learning_rate", "1e-9"]
    argv += ["--sample_tokens", "2", "--no_figures"]
    assert main(argv) == 0
    tuned = MiniGPTForCausalLM.from_pretrained(tmp_path / "tuned" / "model")
    torch.testing.assert_close(tuned(ids).logits, logits[0])
    metadata = json.loads((tmp_path / "tuned" / "model" / "minigpt.json").read_text())
    assert metadata["recipe"]["init_from"] == published
    capsys.readouterr()
    (tmp_path / "other").mkdir()
    byte_tokenizer().save_pretrained(tmp_path / "snapshot")
    assert main([*argv[:2], str(tmp_path / "snapshot"), *argv[3:6], str(tmp_path / "wrong"), *argv[7:]]) == 2
    assert "tokenizer" in capsys.readouterr().err


VARIANTS = {
    "sliding window in the upper layers": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "sliding window in the lower layers": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "scaled RoPE": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 32,
        }
    },
    "untied head": {"tie_word_embeddings": False},
    "head dimension that differs from hidden_size / heads": {"head_dim": 6},
    "bfloat16 in shards": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize(
    "variant", representative(VARIANTS, "sliding window in the upper layers", "untied head", "bfloat16 in shards")
)
def test_each_architecture_is_published_natively_with_equal_logits(variant, run_folder, hub, tmp_path):
    settings = dict(VARIANTS[variant])
    model = tiny_model(vocab_size=258, **{name: settings[name] for name in settings if name != "dtype"})
    model = model.to(settings.get("dtype", torch.float32))
    folder = tmp_path / "model"
    save_model_files(model, byte_tokenizer(), folder)
    if "shards" in variant:
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    metadata = json.loads((run_folder / "model" / "minigpt.json").read_text())
    write_metadata(folder, metadata, model.config, [])
    push_folder(folder, "user/tiny")
    native = AutoModelForCausalLM.from_pretrained("user/tiny", trust_remote_code=False)
    code = AutoModelForCausalLM.from_pretrained("user/tiny", revision="minigpt", trust_remote_code=True)
    package = MiniGPTForCausalLM.from_pretrained("user/tiny")
    assert (type(native), type(package), code.config.model_type) == (Qwen3ForCausalLM, MiniGPTForCausalLM, "minigpt")
    ids, local = random_ids(2, 48), MiniGPTForCausalLM.from_pretrained(folder)
    for loaded in (native, code, package):
        assert loaded.dtype == local.dtype == model.dtype
        assert torch.equal(loaded(ids).logits, local(ids).logits)


def test_a_lora_adapter_of_our_model_fits_main_and_is_saved_with_its_name(run_folder, published, tmp_path):
    ours = get_peft_model(MiniGPTForCausalLM.from_pretrained(published), LoraConfig(r=2, task_type="CAUSAL_LM"))
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ours.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], sorted(settings["target_modules"])) == (
        published,
        ["q_proj", "v_proj"],
    )
    native = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(published), tmp_path / "adapter")
    ids = random_ids(2, 40)
    assert torch.equal(native.eval()(ids).logits, ours.eval()(ids).logits)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # finds its base model on the Hub
    assert torch.equal(alone(ids).logits, ours(ids).logits)


def test_a_qwen3_with_biases_is_not_loaded_as_minigpt(published, tmp_path):
    native = AutoModelForCausalLM.from_pretrained(published)
    native.config.attention_bias = True
    native.save_pretrained(tmp_path / "biased")
    with pytest.raises(ValueError, match="`attention_bias` is true, but MiniGPT has no biases"):
        MiniGPTForCausalLM.from_pretrained(tmp_path / "biased")
