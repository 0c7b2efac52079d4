"""Positional-head initialization, seen in the attention of models that were published without training."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt_hf.atomic import seal
from minigpt_hf.cli import main
from tests.conftest import representative
from tests.training.conftest import go_back, train

UNTRAINED = ["--learning_rate", "0", "--muon_learning_rate", "0", "--max_steps", "1"]
LARGER = ["--hidden_size", "64", "--block_size", "32", "--num_hidden_layers", "3"]
DISTANCES = [[1, 2, 3], [1, 4], [2]]
FLAGS = ["--positional_heads", "1,2,3", "1,4", "2", "--rope_theta", "1000"]


def attention_at(folder, text: str) -> list[torch.Tensor]:
    """For each layer, the mean attention of each head to the token d back, [N, 10], for 10 ≤ t."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = AutoTokenizer.from_pretrained(folder)(text[:1024], return_tensors="pt").input_ids[0]
    weights = model(ids[:960].view(-1, 32), output_attentions=True).attentions
    return [
        torch.stack([each.diagonal(-d, 2, 3)[:, :, 10 - d :].mean((0, 2)) for d in range(10)], dim=1)
        for each in weights
    ]


@pytest.mark.parametrize(
    ("flags", "query_heads"),
    [
        ([], 1),
        (["--tie_word_embeddings", "false"], 1),
        (["--num_attention_heads", "8", "--num_key_value_heads", "4"], 2),
    ],
    ids=["tied", "untied", "grouped queries"],
)
def test_the_selected_heads_and_no_others_attend_to_their_distance(flags, query_heads, recipe, words, text, tmp_path):
    assert train(recipe, words, tmp_path / "run", *UNTRAINED, *LARGER, *FLAGS, *flags) == 0
    for of_layer, attention in zip(DISTANCES, attention_at(tmp_path / "run" / "model", text), strict=True):
        for head, of_head in enumerate(attention):
            key_head = head // query_heads
            if key_head < len(of_layer):
                assert of_head.argmax() == of_layer[key_head]
                assert of_head.max() > 0.35
            else:
                assert of_head.max() < 0.35


def test_the_rest_of_the_model_is_initialized_as_without(recipe, words, tmp_path):
    models = []
    for name, flags in (("plain", []), ("positional", FLAGS)):
        assert train(recipe, words, tmp_path / name, *UNTRAINED, *LARGER, *flags, "--rope_theta", "1000") == 0
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict())
    changed = {name for name, tensor in models[0].items() if not torch.equal(tensor, models[1][name])}
    kinds = {name.removeprefix("model.").removesuffix(".weight") for name in changed}
    projections = {f"layers.{layer}.self_attn.{kind}" for layer in range(3) for kind in ("q_proj", "k_proj")}
    norms = {f"layers.{layer}.self_attn.{kind}" for layer in range(3) for kind in ("q_norm", "k_norm")}
    assert kinds == {"embed_tokens", "lm_head"} | projections | norms
    difference = models[1]["lm_head.weight"] - models[0]["lm_head.weight"]
    torch.testing.assert_close(difference, torch.full_like(difference, 2 * 0.02))  # all logits are shifted equally
    for kind in ("q_proj", "k_proj"):  # the last head of layer 0 is random; the parts of others orthogonal to 1 as well
        plain, positional = (model[f"model.layers.0.self_attn.{kind}.weight"].view(4, 16, 64) for model in models)
        assert torch.equal(plain[3], positional[3])
        torch.testing.assert_close(
            plain - plain.mean(2, keepdim=True), positional - positional.mean(2, keepdim=True), atol=1e-6, rtol=0
        )


def test_a_recipe_and_flags_give_the_same_model_and_another_initialization_is_another_run(
    recipe, words, tmp_path, capsys
):
    settings = yaml.safe_load(recipe.read_text()) | {"positional_heads": [[1, 2], [1]]}
    (tmp_path / "positional.yaml").write_text(yaml.safe_dump(settings))
    flags = ["--positional_heads", "1,2", "1"]
    assert train(tmp_path / "positional.yaml", words, tmp_path / "recipe") == 0
    assert train(recipe, words, tmp_path / "flags", *flags) == 0
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("recipe", "flags")]
    assert files[0].read_bytes() == files[1].read_bytes()
    published = json.loads((tmp_path / "flags" / "model" / "minigpt.json").read_text())
    assert published["recipe"]["positional_heads"] == [[1, 2], [1]]

    go_back(tmp_path / "flags", tmp_path / "stopped", 4)
    capsys.readouterr()
    assert train(recipe, words, tmp_path / "stopped") == 2
    assert "positional_heads was [[1, 2], [1]]" in capsys.readouterr().err
    assert train(tmp_path / "flags" / "recipe.yaml", words, tmp_path / "stopped") == 0


@pytest.mark.parametrize(
    ("before", "after"),
    representative([(["1,2"], ["1"]), (["1,2"], ["none"]), (["none"], ["1,2"])], (["1,2"], ["1"]), (["none"], ["1,2"])),
    ids=["fewer", "none", "added"],
)
def test_heads_cannot_be_changed_on_resuming_because_they_act_at_initialization(
    before, after, recipe, words, tmp_path, capsys
):
    assert train(recipe, words, tmp_path / "run", "--positional_heads", *before) == 0
    go_back(tmp_path / "run", tmp_path / "stopped", 4)
    capsys.readouterr()
    for allowed in ([], ["--allow_change", "positional_heads"]):
        assert train(recipe, words, tmp_path / "stopped", "--positional_heads", *after, *allowed) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "contains a run with another initialization (positional_heads was " in line
        assert line.endswith("it has no effect after step 0; give the previous value, or use another folder or --fresh")


def test_a_run_of_an_earlier_version_that_recorded_no_heads_had_none(recipe, words, tmp_path, capsys):
    assert train(recipe, words, tmp_path / "run") == 0
    go_back(tmp_path / "run", tmp_path / "stopped", 4)
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-2")
    for file in [tmp_path / "stopped" / "fingerprint.json", *(tmp_path / "stopped").glob("*/fingerprint.json")]:
        fingerprint = json.loads(file.read_text())
        del fingerprint["positional_heads"]
        file.write_text(json.dumps(fingerprint))
    (tmp_path / "stopped" / "checkpoint-4" / "manifest.json").unlink()
    seal(tmp_path / "stopped" / "checkpoint-4")
    assert train(recipe, words, tmp_path / "stopped", "--positional_heads", "1") == 2
    assert "positional_heads was not recorded and is [[1]]" in capsys.readouterr().err
    assert train(recipe, words, tmp_path / "stopped") == 0
    assert "resuming from step 4" in capsys.readouterr().err


UNFIT = [
    (["--num_hidden_layers", "1"], [[1, 2, 3]]),
    (["--num_key_value_heads", "2"], [[1, 2], [1, 4]]),
    (["--block_size", "4"], [[1, 2, 3], [1]]),
    (["--block_size", "1"], []),
    (["--use_sliding_window", "true", "--sliding_window", "4"], [[1, 2, 3], [1]]),
    (["--use_sliding_window", "true", "--sliding_window", "2", "--max_window_layers", "1"], [[1, 2, 3], [1]]),
    (["--positional_heads", "none"], []),
    (["--num_attention_heads", "8"], [[1, 2, 3], [1, 4]]),
]


@pytest.mark.parametrize(("flags", "expected"), representative(UNFIT, *UNFIT[1:3], UNFIT[6]))
def test_heads_of_a_recipe_that_do_not_fit_other_settings_are_dropped_with_a_message(
    flags, expected, recipe, words, tmp_path, capsys
):
    (tmp_path / "positional.yaml").write_text(f"{recipe.read_text()}positional_heads: [[1, 2, 3], [1, 4]]\n")
    assert train(tmp_path / "positional.yaml", words, tmp_path / "run", *flags, "--max_steps", "2") == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["positional_heads"] == expected
    is_adjusted = flags[:1] != ["--positional_heads"] and expected != [[1, 2, 3], [1, 4]]
    assert (f"positional_heads {expected}: those of the recipe that fit" in capsys.readouterr().err) == is_adjusted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["1,2", "1", "1"], "positional_heads has 3 lists, one per layer, but num_hidden_layers is 2"),
        (["1,2,3,4,5"], "positional_heads has 5 distances for layer 0, but it has only 4 key heads"),
        (["1,0"], "positional_heads is ['1,0']: expected a list of distances ≥ 1 for each layer"),
        (["one"], "positional_heads is ['one']: expected a list of distances ≥ 1 for each layer"),
        (["1,20"], "positional_heads has the distance 20, but block_size is 16"),
        (
            ["1,9", "--use_sliding_window", "true", "--sliding_window", "9"],
            "positional_heads has the distance 9, but layer 0 has a sliding_window of 9",
        ),
        (
            ["1", "6", "--use_sliding_window", "true", "--sliding_window", "2", "--max_window_layers", "1"],
            "positional_heads has the distance 6, but layer 1 has a sliding_window of 2",
        ),
        (
            ["1,7", "--head_dim", "2"],
            "positional_heads has the distance 7, but heads of dimension 2 with rope_theta 10000 also attend to the "
            "distance 1",
        ),
    ],
)
def test_invalid_heads_are_reported_in_one_line(given, message, recipe, words, tmp_path, capsys):
    assert train(recipe, words, tmp_path / "run", "--positional_heads", *given) == 2
    assert capsys.readouterr().err.startswith(f"minigpt train: {message}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["5", "[[1, 2.5]]", "[[[1]]]", "[[true]]", "{1: 2}", "[1]", "null"])
def test_a_recipe_with_other_types_is_reported_in_one_line(value, recipe, words, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(f"{recipe.read_text()}positional_heads: {value}\n")
    assert train(tmp_path / "bad.yaml", words, tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("minigpt train: positional_heads is ")


def test_heads_of_a_pretrained_model_are_not_initialized(run_folder, text_file, tmp_path, capsys):
    argv = ["train", "--init_from", run_folder / "model", "--data", text_file, "--output_dir", tmp_path / "run"]
    assert main([*map(str, argv), "--positional_heads", "1,2"]) == 2
    assert "positional_heads is determined by the model of init_from" in capsys.readouterr().err
