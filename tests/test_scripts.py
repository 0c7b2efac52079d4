"""The scripts to learn from compute what the package computes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from minigpt_hf.data.tokenizer import byte_tokenizer
from minigpt_hf.publish.folder import save_suitcase
from tests.conftest import ROOT, random_ids, tiny_model

sys.path.insert(0, str(ROOT / "scripts"))
import conformance
import numpy_gpt


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_numpy_gives_the_logits_of_torch(tied, kv_heads, window, tmp_path):
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


def test_numpy_reads_sharded_weights_and_a_trained_folder(run_folder, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = random_ids(12)
    expected = model(ids[None]).logits[0].detach().numpy()
    np.testing.assert_allclose(numpy_gpt.forward(ids.numpy(), *numpy_gpt.load(tmp_path)), expected, atol=1e-4, rtol=0)
    weights, config = numpy_gpt.load(run_folder / "model")
    assert np.isfinite(numpy_gpt.forward(np.arange(5), weights, config)).all()


def test_numpy_at_low_temperature_writes_the_greedy_text(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    ids = random_ids(6).tolist()
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, 6:].tolist()
    written = numpy_gpt.generate(ids, *numpy_gpt.load(tmp_path), 20, 1e-4, np.random.default_rng(0))
    assert list(written) == [token for token in greedy if token != 0]


def test_the_numpy_script_writes_text_without_torch_or_transformers(tmp_path):
    save_suitcase(tiny_model(vocab_size=258), byte_tokenizer(), tmp_path)
    code = "import sys, runpy; sys.modules['torch'] = sys.modules['transformers'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    script = ROOT / "scripts" / "numpy_gpt.py"
    argv = [sys.executable, "-c", code, script, tmp_path, "--prompt", "def ", "--max_new_tokens", "5"]
    done = subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("def ")


def test_numpy_refuses_scaled_rotary_positions(tmp_path):
    model = tiny_model(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_type"] == "linear"
    with pytest.raises(SystemExit, match="plain rotary positions"):
        numpy_gpt.load(tmp_path)


def test_conformance_wants_a_checkout_of_transformers(tmp_path, capsys):
    assert conformance.main([str(tmp_path)]) == 2
    assert "is no checkout of transformers" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["minigpt", "minigpt-window"])
def test_conformance_points_the_tests_at_the_classes_of_this_package(model):
    package, name, heads, settings = conformance.MODELS[model]
    module = conformance.MODULE.format(
        package=package, name=name, tables=conformance.TABLES, heads=heads, settings=settings
    )
    home = __import__(package)
    assert {f"home.{word}" in module for word in home.__all__ if word.startswith(name)} == {True}
