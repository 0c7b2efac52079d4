"""llama.cpp: an exported GGUF file gives the same token ids, logits and greedy text.

Requires llama-cpp-python, which is compiled on installation (about 15 minutes on one core): `pip install
llama-cpp-python`. Skipped if it is not installed.
"""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt_hf.cli import main
from minigpt_hf.data.chat_format import ChatFormat, with_chat_tokens
from minigpt_hf.data.tokenizer import byte_level_bpe
from minigpt_hf.export import gguf_vocabulary
from minigpt_hf.export.gguf import export_gguf
from minigpt_hf.publish.model_folder import save_model_files
from tests.conftest import tiny_model
from tests.publish.strings import TOKENIZERS, adversarial_tokenizer, strings

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
F32 = 0  # ggml type of the key/value cache (llama.cpp's default is float16)
BLOCK_SIZE = 64


def load_gguf(folder, n_ctx=256):
    (file,) = folder.glob("*.gguf")
    return llama_cpp.Llama(str(file), n_ctx=n_ctx, n_threads=1, type_k=F32, type_v=F32, logits_all=True, verbose=False)


@pytest.fixture(scope="module", params=["bpe", "characters"])
def trained(request, recipe_file, text_file, tmp_path_factory):
    """A trained model, so that its greedy text does not depend on near-equal probabilities."""
    run = tmp_path_factory.mktemp("trained") / request.param
    argv = ["train", "--recipe", recipe_file, "--data", text_file, "--output_dir", run, "--tokenizer", request.param]
    argv += [
        "--vocab_size",
        600,
        "--block_size",
        BLOCK_SIZE,
        "--hidden_size",
        64,
        "--max_steps",
        300,
        "--logging_steps",
        100,
    ]
    assert main([*map(str, argv), "--eval_steps", "300", "--save_steps", "300"]) == 0
    return run / "model"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return export_gguf(trained, tmp_path_factory.mktemp("gguf") / "out", context=BLOCK_SIZE + 1)


# -- tokens -----------------------------------------------------------------------------------------------------------


def differing(tokenizer, folder) -> list[str]:
    """Return the strings that llama.cpp encodes to other ids, with special tokens parsed or treated as text."""
    save_model_files(tiny_model(vocab_size=len(tokenizer)), tokenizer, folder / "model")
    llama = load_gguf(export_gguf(folder / "model", folder / "out"))
    backend, differences = tokenizer.backend_tokenizer, []
    for special in (True, False):
        backend.encode_special_tokens = not special
        for text in strings():
            expected = backend.encode(text, add_special_tokens=False).ids
            ids = llama.tokenize(text.encode(), add_bos=False, special=special)
            differences += [text] * (ids != expected)
            if not special:
                assert llama.detokenize(ids) == text.encode()
    return differences


@pytest.mark.parametrize("make_tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_200_strings_have_the_same_ids(make_tokenizer, tmp_path):
    assert len(strings()) == 200
    assert differing(make_tokenizer(), tmp_path) == []


def test_a_wrong_pre_tokenizer_changes_ids(tmp_path, monkeypatch):
    """Shows that the test above detects a file that differs only in the name of the pre-tokenizer."""
    monkeypatch.setattr(gguf_vocabulary, "pre_tokenizer_name", lambda words: "llama-bpe")
    monkeypatch.setitem(gguf_vocabulary.PRE_TOKENIZERS, "llama-bpe", gguf_vocabulary.PRE_TOKENIZERS["qwen2"])
    assert len(differing(adversarial_tokenizer(), tmp_path)) > 5


def test_an_ordinary_token_named_eos_would_change_ids(tmp_path, monkeypatch):
    """The reason why the export rejects such tokenizers."""
    monkeypatch.setattr(gguf_vocabulary, "SPECIAL_NAME", re.compile("(?!)"))  # disables the check of the export
    assert any("<eos>" in text for text in differing(adversarial_tokenizer(["<eos>"] * 20), tmp_path))


# -- logits and text --------------------------------------------------------------------------------------------------


def test_twenty_greedy_texts_equal_those_of_generate(trained, exported, text):
    llama = load_gguf(exported)
    model, tokenizer = (auto.from_pretrained(trained) for auto in (AutoModelForCausalLM, AutoTokenizer))
    for start in range(0, 40_000, 2000):
        prompt = text[start : start + 20]
        inputs = tokenizer(prompt, return_tensors="pt")
        new_tokens = BLOCK_SIZE + 1 - inputs.input_ids.shape[1]
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)[0, -new_tokens:]
        output = llama.create_completion(prompt, max_tokens=new_tokens, temperature=0.0, top_k=1, repeat_penalty=1.0)
        assert output["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 2e-5), ("float16", 0.016), ("bfloat16", 0.11), ("q8_0", 0.4)]
)
def test_logits_agree_within_the_precision_of_the_dtype(trained, text, dtype, tolerance, tmp_path):
    """The tolerances are three times the measured differences: 6e-6, 0.0053, 0.037, 0.13."""
    llama = load_gguf(export_gguf(trained, tmp_path / "out", dtype, BLOCK_SIZE + 1))
    model, tokenizer = (auto.from_pretrained(trained) for auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(text[:500]).input_ids[: BLOCK_SIZE + 1]
    llama.eval(ids)
    with torch.no_grad():
        difference = (torch.tensor(llama.scores[: len(ids)]) - model(torch.tensor([ids])).logits[0]).abs().max()
    assert difference <= tolerance


def test_llama_cpp_ignores_the_sliding_window(trained, exported, text):
    """The reason why models with a sliding window require `--context`."""
    llama = load_gguf(exported)
    model, tokenizer = (auto.from_pretrained(trained) for auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(text[:1000]).input_ids[: 3 * BLOCK_SIZE]
    llama.eval(ids)
    with torch.no_grad():
        difference = (torch.tensor(llama.scores[: len(ids)]) - model(torch.tensor([ids])).logits[0]).abs().amax(dim=1)
    assert difference[: BLOCK_SIZE + 1].max() <= 1e-4
    assert difference[BLOCK_SIZE + 1 :].max() > 0.1


# -- chat -------------------------------------------------------------------------------------------------------------


def test_a_chat_model_is_prompted_with_its_template_and_stops_at_both_tokens(tmp_path):
    tokenizer = with_chat_tokens(byte_level_bpe([" ".join(strings())], 600))
    chat_format = ChatFormat(tokenizer)
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=chat_format.end)
    model.generation_config.eos_token_id = [chat_format.end, tokenizer.bos_token_id]
    save_model_files(model, tokenizer, tmp_path / "model")
    engine = load_gguf(export_gguf(tmp_path / "model", tmp_path / "out"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        engine.metadata["tokenizer.chat_template"], eos_token="", bos_token=""
    )
    text = formatter(messages=messages).prompt
    assert engine.tokenize(text.encode(), add_bos=False, special=True) == chat_format.encode(messages, True).tolist()
    vocabulary = llama_cpp.llama_model_get_vocab(engine.model)
    assert all(llama_cpp.llama_vocab_is_eog(vocabulary, stop) for stop in (chat_format.end, tokenizer.bos_token_id))
