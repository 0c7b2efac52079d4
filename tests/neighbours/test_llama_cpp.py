"""Real llama.cpp reads our GGUF files: the same ids for every text, and the same text greedily.

Needs llama-cpp-python, which is compiled on installation (about 15 minutes on one core, once):
`pip install llama-cpp-python`. Skipped where it is not installed.
"""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minigpt_hf.cli import main
from minigpt_hf.publish.export import gguf_vocabulary
from minigpt_hf.publish.export.gguf import export_gguf
from minigpt_hf.publish.folder import save_suitcase
from tests.conftest import tiny_model
from tests.publish.strings import TOKENIZERS, adversarial_tokenizer, strings

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: its build takes 15 minutes")
F32 = 0  # ggml's number of the type: keys and values as torch keeps them (llama.cpp's default is float16)
BLOCK = 64


def open_in_llama_cpp(out, n_ctx=256):
    (file,) = out.glob("*.gguf")
    return llama_cpp.Llama(str(file), n_ctx=n_ctx, n_threads=1, type_k=F32, type_v=F32, logits_all=True, verbose=False)


@pytest.fixture(scope="module", params=["bpe", "characters"])
def trained(request, recipe_file, text_file, tmp_path_factory):
    """A model that has learnt something, so that its greedy text is no accident."""
    run = tmp_path_factory.mktemp("trained") / request.param
    argv = ["train", "--recipe", recipe_file, "--data", text_file, "--output_dir", run, "--tokenizer", request.param]
    argv += [
        "--vocab_size",
        600,
        "--block_size",
        BLOCK,
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
    return export_gguf(trained, tmp_path_factory.mktemp("gguf") / "out", context=BLOCK + 1)


# -- tokens -----------------------------------------------------------------------------------------------------------


def differing(tokenizer, folder) -> list[str]:
    """The strings of which llama.cpp makes other ids, with special tokens read as such or as text."""
    save_suitcase(tiny_model(vocab_size=len(tokenizer)), tokenizer, folder / "model")
    llama = open_in_llama_cpp(export_gguf(folder / "model", folder / "out"))
    backend, found = tokenizer.backend_tokenizer, []
    for special in (True, False):
        backend.encode_special_tokens = not special
        for text in strings():
            ours = backend.encode(text, add_special_tokens=False).ids
            theirs = llama.tokenize(text.encode(), add_bos=False, special=special)
            found += [text] * (ours != theirs)
            if not special:
                assert llama.detokenize(theirs) == text.encode()
    return found


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_200_strings_have_the_same_ids(make, tmp_path):
    assert len(strings()) == 200
    assert differing(make(), tmp_path) == []


def test_a_wrong_name_of_the_words_is_seen_on_the_adversarial_tokenizer(tmp_path, monkeypatch):
    """So the test above can fail: the same file, but for the name of the pre-tokenizer."""
    words = gguf_vocabulary.WORDS
    monkeypatch.setattr(gguf_vocabulary, "WORDS", {"llama-bpe": words["qwen2"]})
    assert len(differing(adversarial_tokenizer(), tmp_path)) > 5


def test_an_ordinary_token_named_eos_is_refused_for_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_vocabulary, "SPECIAL_NAME", re.compile("(?!)"))  # nothing is refused
    assert any("<eos>" in text for text in differing(adversarial_tokenizer(["<eos>"] * 20), tmp_path))


# -- text -------------------------------------------------------------------------------------------------------------


def test_twenty_prompts_go_on_by_the_same_text(trained, exported, text):
    llama = open_in_llama_cpp(exported)
    model, tokenizer = (auto.from_pretrained(trained) for auto in (AutoModelForCausalLM, AutoTokenizer))
    for start in range(0, 40_000, 2000):
        prompt = text[start : start + 20]
        inputs = tokenizer(prompt, return_tensors="pt")
        room = BLOCK + 1 - inputs.input_ids.shape[1]
        ours = model.generate(**inputs, do_sample=False, max_new_tokens=room)[0, -room:]
        theirs = llama.create_completion(prompt, max_tokens=room, temperature=0.0, top_k=1, repeat_penalty=1.0)
        assert theirs["choices"][0]["text"] == tokenizer.decode(ours, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 2e-5), ("float16", 0.016), ("bfloat16", 0.11), ("q8_0", 0.4)]
)
def test_logits_are_near_as_the_dtype_allows(trained, text, dtype, tolerance, tmp_path):
    """The tolerances are three times what was seen: 6e-6, 0.0053, 0.037, 0.13."""
    llama = open_in_llama_cpp(export_gguf(trained, tmp_path / "out", dtype, BLOCK + 1))
    model, tokenizer = (auto.from_pretrained(trained) for auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(text[:500]).input_ids[: BLOCK + 1]
    llama.eval(ids)
    with torch.no_grad():
        difference = (torch.tensor(llama.scores[: len(ids)]) - model(torch.tensor([ids])).logits[0]).abs().max()
    assert difference <= tolerance


def test_beyond_the_window_llama_cpp_is_another_model(trained, exported, text):
    """Why windows are refused without a `--context`."""
    llama = open_in_llama_cpp(exported)
    model, tokenizer = (auto.from_pretrained(trained) for auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(text[:1000]).input_ids[: 3 * BLOCK]
    llama.eval(ids)
    with torch.no_grad():
        difference = (torch.tensor(llama.scores[: len(ids)]) - model(torch.tensor([ids])).logits[0]).abs().amax(dim=1)
    assert difference[: BLOCK + 1].max() <= 1e-4
    assert difference[BLOCK + 1 :].max() > 0.1
