"""Fine-tuning of existing models, full and with LoRA."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config, Qwen3ForCausalLM

from minigpt_hf.cli import main
from minigpt_hf.data.tokenizer import load_tokenizer
from minigpt_hf.training.run_folder import read_log
from tests.conftest import random_ids, tiny_model
from tests.training.conftest import rows

SHORT = (
    "--block_size 32 --per_device_train_batch_size 4 --max_steps 6 --logging_steps 1 --eval_steps 3 --sample_tokens 3"
)
SHORT = [*SHORT.split(), "--warmup_steps", "0", "--validation_characters", "2000", "--use_cpu"]


@pytest.fixture
def finetune(run_folder, text_file, tmp_path):
    def run(name: str, *flags: str, folder=run_folder / "model") -> int:
        argv = ["train", "--init_from", str(folder), "--data", str(text_file), *SHORT, *flags]
        return main([*argv, "--output_dir", str(tmp_path / name)])

    return run


def test_training_starts_from_the_weights_of_the_model(finetune, run_folder, tmp_path):
    """With learning rates of 0 the published weights equal the initial ones."""
    assert finetune("run", "--learning_rate", "0", "--muon_learning_rate", "0") == 0
    about = json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())
    published = json.loads((run_folder / "model" / "minigpt.json").read_text())
    assert load_file(tmp_path / "run" / "model" / "model.safetensors").keys() == (
        load_file(run_folder / "model" / "model.safetensors").keys()
    )
    for name, tensor in load_file(run_folder / "model" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "run" / "model" / "model.safetensors")[name])
    assert about["tokenizer"]["fingerprint"] == published["tokenizer"]["fingerprint"]
    assert about["recipe"]["hidden_size"] == published["recipe"]["hidden_size"] == 32
    assert about["recipe"]["init_from"] == "model"  # without its path on this machine


def test_fine_tuning_reduces_the_loss(finetune, run_folder, tmp_path):
    flags = ["--max_steps", "40", "--eval_steps", "20", "--learning_rate", "4e-3", "--validation_characters", "20000"]
    assert finetune("run", *flags) == 0
    before, after = (
        json.loads((folder / "model" / "minigpt.json").read_text())["results"]["loss"]
        for folder in (run_folder, tmp_path / "run")
    )
    assert after < before - 0.1


@pytest.mark.parametrize(("fraction", "is_seen"), [("0.05", False), ("0.1", False), ("0.3", True)])
def test_a_score_on_text_that_the_base_model_was_trained_on_is_marked(fraction, is_seen, finetune, tmp_path, capsys):
    """The base model has held out a tenth of the same text."""
    assert finetune("run", "--validation_fraction", fraction) == 0
    assert ("was trained on text of the validation split" in capsys.readouterr().err) == is_seen
    card = ModelCard((tmp_path / "run" / "model" / "README.md").read_text())
    assert ("**Not a score of unseen text**: the model that training started from" in card.text) == is_seen
    assert bool(card.data.eval_results) != is_seen


def test_reading_a_text_like_the_base_model_is_not_logged(finetune, text_file, tmp_path, capsys):
    """The text is read again, without the duplicates that the base model dropped, to compare it with that of its training."""
    lines = [f"line {i} of {words}" for i, words in enumerate(text_file.read_text().splitlines()) if words.strip()]
    table = tmp_path / "table.csv"
    table.write_text("text\n" + "".join('"' + line.replace('"', "'") + '"\n' for line in [*lines, *lines[:9]]))
    assert finetune("base", "--data", str(table), "--dedup", "exact") == 0
    assert "9 of" in capsys.readouterr().err
    assert finetune("run", "--data", str(table), folder=tmp_path / "base" / "model") == 0
    log = "".join(capsys.readouterr())
    assert "dropped as" not in log
    assert log.count("the first row is the header") == 1


@pytest.mark.parametrize("case", ["prepared text", "no metadata"])
def test_a_text_that_is_not_compared_with_that_of_the_base_model_is_not_called_compared(
    case, finetune, run_folder, text_file, tmp_path, capsys
):
    base, flags = tmp_path / "base", ["--validation_fraction", "0.3"]
    shutil.copytree(run_folder / "model", base)
    if case == "no metadata":
        assert main(["export", str(base), "--to", "native", "--output_dir", str(tmp_path / "native")]) == 0
        base = tmp_path / "native"
        (base / "minigpt.json").unlink(missing_ok=True)
    else:
        argv = [
            "tokenize",
            "--data",
            str(text_file),
            "--tokenizer",
            str(base),
            "--block_size",
            "32",
            *flags,
            "--validation_characters",
            "2000",
        ]
        assert main([*argv, "--output_dir", str(tmp_path / "prepared")]) == 0
        flags = ["--data", str(tmp_path / "prepared")]
    assert finetune("run", *flags, folder=base) == 0
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "The scored text was not compared with the training text of the base model." in card


def test_settings_of_a_recipe_that_the_base_model_determines_are_reported(finetune, run_folder, tmp_path, capsys):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "hidden_size: 64\nnum_hidden_layers: 2\ntokenizer: characters\nvocab_size: 300\nchat_tokens: true\n"
        "positional_heads: [[1, 2]]\n"
    )
    assert finetune("run", "--recipe", str(recipe)) == 0
    log = capsys.readouterr().err
    base = run_folder / "model"
    assert f"hidden_size 64, positional_heads [[1, 2]]: no effect, init_from {base} determines the architecture" in log
    for setting in ("tokenizer characters", "vocab_size 300", "chat_tokens True"):
        assert f"{setting}: no effect, the tokenizer of init_from {base} is used" in log
    # The recipe that the run records contains every setting, but those of the base model.
    assert finetune("again", "--recipe", str(tmp_path / "run" / "recipe.yaml")) == 0
    assert "no effect" not in capsys.readouterr().err


def test_the_kind_of_a_tokenizer_is_that_of_the_base_model(finetune, recipe_file, text_file, tmp_path):
    argv = ["train", "--recipe", recipe_file, "--data", text_file, "--tokenizer", "characters", "--max_steps", 2]
    argv += ["--logging_steps", 1, "--sample_tokens", 0, "--output_dir", tmp_path / "base"]
    assert main([str(word) for word in argv]) == 0
    assert finetune("run", folder=tmp_path / "base" / "model") == 0
    assert finetune("next", folder=tmp_path / "run" / "model") == 0
    for run, origin in (("base", "training text"), ("run", "text that it was made from"), ("next", "text that it was")):
        folder = tmp_path / run / "model"
        assert json.loads((folder / "minigpt.json").read_text())["tokenizer"]["kind"] == "characters"
        sentence = f"The tokenizer rejects characters that do not occur in the {origin}"
        assert sentence in (folder / "README.md").read_text()


def test_text_that_an_earlier_model_was_trained_on_is_marked(finetune, text_file, tmp_path, capsys):
    """The first model has held out a tenth, the second three tenths, and the third those or others."""
    assert finetune("second", "--validation_fraction", "0.3") == 0
    for fraction, is_seen in (("0.3", True), ("0.2", True), ("0.1", False)):
        name = f"third-{fraction}"
        assert finetune(name, "--validation_fraction", fraction, folder=tmp_path / "second" / "model") == 0
        card = ModelCard((tmp_path / name / "model" / "README.md").read_text())
        assert ("**Not a score of unseen text**: the model that training started from" in card.text) == is_seen
        capsys.readouterr()
        argv = ["evaluate", tmp_path / name / "model", "--data", text_file, "--split", "validation"]
        assert main([str(word) for word in argv]) == 0
        assert ("contains text that the model was trained on" in capsys.readouterr().err) == is_seen


def test_a_qwen3_folder_becomes_a_minigpt_with_the_same_logits(finetune, run_folder, tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "model")
    config = Qwen3Config(
        vocab_size=320,  # more embedding rows than tokens, as in Qwen's models
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        eos_token_id=0,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "qwen")
    qwen = Qwen3ForCausalLM.from_pretrained(tmp_path / "qwen", dtype=torch.float32)
    tokenizer.save_pretrained(tmp_path / "qwen")
    assert finetune("run", "--learning_rate", "0", "--muon_learning_rate", "0", folder=tmp_path / "qwen") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert (model.config.model_type, model.dtype) == ("minigpt", torch.float32)
    ids = random_ids(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, qwen(ids).logits, rtol=0, atol=0)


def test_lora_trains_factors_of_frozen_matrices_and_merges_them_at_the_end(finetune, run_folder, tmp_path, capsys):
    assert finetune("run", "--lora_rank", "2") == 0
    assert "of them are trained" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(run_folder / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "checkpoint-6")
    assert (adapted.peft_config["default"].r, adapted.peft_config["default"].lora_alpha) == (2, 4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert type(merged).__name__ == "MiniGPTForCausalLM"
    assert not any("lora" in name for name in merged.state_dict())
    ids = random_ids(2, 20)
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(run_folder / "model")(ids).logits
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
        assert (merged(ids).logits - before).abs().max() > 1e-3
    # Embeddings and norms are unchanged.
    old, new = (load_file(folder / "model" / "model.safetensors") for folder in (run_folder, tmp_path / "run"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all("_proj.weight" in name for name in changed)
    # A checkpoint, too, loads with `from_pretrained`.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits)


def test_a_resumed_lora_run_equals_an_uninterrupted_one(finetune, tmp_path):
    assert finetune("straight", "--lora_rank", "2", "--save_total_limit", "9") == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "model")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-6")
    assert finetune("resumed", "--lora_rank", "2", "--save_total_limit", "9") == 0
    assert rows(tmp_path / "resumed") == rows(tmp_path / "straight")
    straight, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("straight", "resumed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_an_adapter_is_resumed_only_with_its_model_and_rank(finetune, run_folder, tmp_path, capsys):
    """Checkpoints have the factors only: with another model, the best one would be other weights than those scored."""
    run, other = tmp_path / "run", tmp_path / "other"
    assert finetune("run", "--lora_rank", "2", "--save_total_limit", "9") == 0
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoint-6")
    shutil.copytree(run_folder / "model", other)
    weights = {name: 0.9 * weight for name, weight in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    for folder, name, rank in ((other, "init_from", "2"), (run_folder / "model", "lora_rank", "4")):
        assert finetune("run", "--lora_rank", rank, "--allow_change", name, folder=folder) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt train")]
        assert f"another adapter or without one ({name} was" in line
    assert finetune("run", "--recipe", "finetune", "--allow_change", "lora_rank") == 2
    assert "another adapter or without one (lora_rank was 2 and is 0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden_size", "64"], "hidden_size is determined by the model of init_from"),
        (["--tokenizer", "bytes"], "tokenizer is determined by the model of init_from"),
        (["--block_size", "5000"], "is less than block_size 5000"),
        (["--lora_rank", "2", "--muon"], "LoRA is trained with AdamW"),
        (["--lora_rank", "2", "--push_to_hub"], "hub_strategy every_save is not supported with lora_rank"),
    ],
)
def test_settings_that_contradict_an_existing_model_are_rejected(flags, message, finetune, capsys):
    assert finetune("run", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_text_prepared_with_another_tokenizer_is_rejected(finetune, run_folder, text_file, tmp_path, capsys):
    """Its token ids would index another vocabulary, of the same size or a smaller one."""
    of_bos = load_tokenizer(str(run_folder / "model"))
    of_bos.bos_token = of_bos.pad_token  # in tokenizer_config.json only
    of_bos.save_pretrained(tmp_path / "bos")
    prepared = {"ours": str(run_folder / "model"), "other": "bytes", "other-bos": str(tmp_path / "bos")}
    for name, tokenizer in prepared.items():
        argv = ["tokenize", "--recipe", "demo", "--data", str(text_file), "--tokenizer", tokenizer]
        argv += ["--validation_characters", "2000"]
        assert main([*argv, "--output_dir", str(tmp_path / name)]) == 0
    for name in ("other", "other-bos"):
        assert finetune("run", "--data", str(tmp_path / name)) == 2
        assert "was prepared with another tokenizer than that of --init_from" in capsys.readouterr().err
    assert finetune("run", "--data", str(tmp_path / "ours")) == 0


def test_missing_models_and_tokenizers_are_rejected(finetune, tmp_path, capsys):
    assert finetune("run", folder=tmp_path / "absent") == 2
    assert "no model can be loaded from it (no such folder)" in capsys.readouterr().err
    LlamaConfig().save_pretrained(tmp_path / "llama")
    tiny_model().save_pretrained(tmp_path / "no tokenizer")
    assert finetune("run", folder=tmp_path / "no tokenizer") == 2
    assert "no tokenizer can be loaded" in capsys.readouterr().err
    assert main(["train", "--recipe", "finetune", "--data", "x"]) == 2
    assert "give a folder or a Hub id with --init_from" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("attention_bias", True), ("hidden_act", "gelu")])
def test_a_qwen3_model_with_an_unsupported_setting_is_rejected_with_its_name(name, value, finetune, tmp_path, capsys):
    Qwen3Config(**{name: value}).save_pretrained(tmp_path / "qwen3")
    assert finetune("run", folder=tmp_path / "qwen3") == 2
    assert f"its {name} is {value!r}; only models with" in capsys.readouterr().err


@pytest.mark.slow
def test_training_ends_after_five_evaluations_without_improvement(text, tmp_path, capsys):
    """A short text is memorized within a few epochs, after which the validation loss rises."""
    (tmp_path / "short.txt").write_text(text[3000:3600])
    argv = ["train", "--recipe", "demo", "--data", str(tmp_path / "short.txt"), "--tokenizer", "bytes", *SHORT]
    argv += ["--lr_scheduler_type", "constant"]
    argv += "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --max_steps 120 --eval_steps 4".split()
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    assert "the validation loss has not improved for 5 evaluations" in capsys.readouterr().err
    losses = validation_losses(tmp_path / "run")
    assert len(losses) < 30
    assert losses.index(min(losses)) == len(losses) - 6
    results = json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())["results"]
    assert results["loss"] == pytest.approx(min(losses))
    assert main([*argv, "--early_stopping_patience", "0", "--output_dir", str(tmp_path / "all")]) == 0
    assert len(validation_losses(tmp_path / "all")) == 30


def validation_losses(run) -> list[float]:
    return [row["eval_loss"] for row in read_log(run / "log.jsonl") if "eval_loss" in row]
