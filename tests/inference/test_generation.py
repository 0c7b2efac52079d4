"""Generation with the `generate` method of transformers, from any model folder."""

import copy
import json
import logging
import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

import minigpt_hf
from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.cli import main
from minigpt_hf.data.tokenizer import byte_tokenizer, character_tokenizer
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.inference.compiled import compile_for_generation
from minigpt_hf.inference.generation import encode_prompt, generate, load
from minigpt_hf.publish.model_folder import save_model_files
from tests.conftest import random_ids, tiny_model


@pytest.fixture(scope="module")
def loaded(run_folder):
    return load(str(run_folder / "model"))


def test_greedy_text_is_that_of_generate(loaded):
    model, tokenizer = loaded
    ids = tokenizer("def ", return_tensors="pt").input_ids
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True)
    assert generate(model, tokenizer, "def ", max_new_tokens=20, do_sample=False) == [expected]


def test_equal_seeds_give_equal_text_and_others_differ(loaded):
    texts = [generate(*loaded, "def ", seed=seed, max_new_tokens=20)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_prompt_generation_starts_with_the_bos_token(loaded):
    model, tokenizer = loaded
    start = torch.tensor([[tokenizer.bos_token_id]])
    expected = tokenizer.decode(model.generate(start, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
    assert generate(model, tokenizer, max_new_tokens=8, do_sample=False) == [expected]


def test_several_sequences_can_be_generated(loaded):
    texts = generate(*loaded, "def ", seed=0, max_new_tokens=12, num_return_sequences=3)
    assert len(set(texts)) == 3
    assert all(text.startswith("def ") for text in texts)


def test_generation_continues_beyond_the_training_sequence_length(loaded):
    """With a sliding window in every layer; compared with greedy decoding without a cache."""
    model, tokenizer = loaded
    block_size = 32
    assert model.config.sliding_window == block_size + 1
    ids = tokenizer("def main(", return_tensors="pt").input_ids
    long = model.generate(ids, max_new_tokens=5 * block_size, do_sample=False)
    steps = [ids]
    for _ in range(5 * block_size):  # without a cache, one token at a time
        steps.append(model(torch.cat(steps, 1), use_cache=False).logits[:, -1:].argmax(-1))
        if steps[-1].item() == tokenizer.eos_token_id:
            break
    assert torch.equal(long, torch.cat(steps, 1))


def test_an_unknown_generation_option_is_rejected_with_a_suggestion(loaded):
    with pytest.raises(ValueError, match="no option 'temprature'; did you mean temperature"):
        generate(*loaded, "def ", temprature=1)


def test_a_character_that_the_tokenizer_does_not_know_is_named():
    with pytest.raises(ValueError, match=r"does not know: 'é' \(U\+00E9\)"):
        generate(tiny_model(), character_tokenizer(["abc"]), "abé")


def test_a_folder_without_a_model_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="no model can be loaded"):
        load(str(tmp_path))


def test_remote_code_is_not_executed_unless_it_is_trusted(tmp_path):
    """The model type is unknown to the installed packages, so that only remote code can load the folder."""
    save_model_files(tiny_model(), character_tokenizer(["abc"]), tmp_path)
    for file in ("config.json", "configuration_minigpt.py"):
        renamed = (tmp_path / file).read_text().replace('"minigpt"', '"foreign"')
        (tmp_path / file).write_text(renamed)
    with pytest.raises(ValueError, match=r"no model can be loaded from it .*custom code"):
        load(str(tmp_path))
    model, tokenizer = load(str(tmp_path), trust_remote_code=True)
    assert model.config.model_type == "foreign"
    assert generate(model, tokenizer, "ab", max_new_tokens=3, do_sample=False)[0].startswith("ab")


def test_no_method_of_generation_is_overridden():
    assert "generate" not in vars(MiniGPTForCausalLM)
    assert MiniGPTForCausalLM.generate.__module__ == "transformers.generation.utils"


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}]
)
def test_other_caches_and_prompt_lookup_generate_the_same_tokens(options, window):
    model = tiny_model(use_sliding_window=window is not None, sliding_window=window)
    ids = random_ids(1, 7)
    plain = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False, **options), plain)


def test_text_with_a_window_of_one_token_is_that_of_no_cache():
    """The caches of transformers keep all tokens of such a layer, because they keep `keys[-window + 1:]`."""
    model, tokenizer = tiny_model(vocab_size=258, use_sliding_window=True, sliding_window=1), byte_tokenizer()
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    ids = tokenizer("ab", return_tensors="pt").input_ids
    expected = tokenizer.batch_decode(model.generate(ids, use_cache=False, **options), skip_special_tokens=True)
    assert generate(model, tokenizer, "ab", **options) == expected


@pytest.mark.parametrize("characters", ["ab", "abcdef"])
def test_stop_strings_require_a_tokenizer_that_knows_the_letters_a_to_f(characters):
    tokenizer = character_tokenizer([characters])
    model = tiny_model(vocab_size=len(tokenizer)).eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    (text,) = generate(model, tokenizer, "ab", **options)
    if characters == "abcdef":
        assert generate(model, tokenizer, "ab", stop_strings=["x"], **options) == [text]
    else:
        with pytest.raises(MiniGPTError, match="stop_strings cannot be used with this tokenizer"):
            generate(model, tokenizer, "ab", stop_strings=["b"], **options)


def test_a_pipeline_generates_the_same_text(run_folder):
    folder = run_folder / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = pipeline("text-generation", model, tokenizer=tokenizer)("def ", max_new_tokens=10, do_sample=False)
    assert text[0]["generated_text"] == generate(model, tokenizer, "def ", max_new_tokens=10, do_sample=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_a_compiled_model_generates_likely_tokens_with_one_graph(batch):
    """Sliding window and prompts of different lengths: no recompilation, probabilities within 0.02 of float32."""
    model = tiny_model(vocab_size=258, num_hidden_layers=1, use_sliding_window=True, sliding_window=8)
    model.generation_config.update(
        do_sample=True, num_return_sequences=2, stop_strings=["a"]
    )  # do not apply to the comparison
    reference, tokenizer = copy.deepcopy(model), byte_tokenizer()
    torch._dynamo.utils.counters.clear()
    compiled = compile_for_generation(model, tokenizer, "ab", max_new_tokens=30, num_return_sequences=batch)
    assert (compiled.max_cache_len, model.dtype) == (128, torch.bfloat16)
    assert torch.equal(model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)  # in float32
    assert 0 < compiled.max_probability_difference < 0.02
    model.generation_config.stop_strings = None
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "num_return_sequences": batch, "top_k": 1, "do_sample": True}
    for prompt in ("ab", "a longer one"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        generated = model.generate(ids, **options, **compiled.generation_options(ids.shape[1], options))
        assert generated.shape == (batch, ids.shape[1] + 30)
        probabilities = reference(generated).logits.softmax(-1)[
            :, ids.shape[1] - 1 : -1
        ]  # of the generated tokens, in float32
        chosen = probabilities.gather(-1, generated[:, ids.shape[1] :, None])[..., 0]
        assert (probabilities.amax(-1) - chosen).max() < 0.02
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with pytest.raises(ValueError, match="are 302 tokens, but the cache of --fast holds 128: increase --max_cache_len"):
        generate(
            model, tokenizer, "ab", extra_options=compiled.generation_options, **{**options, "max_new_tokens": 300}
        )
    with pytest.raises(ValueError, match="are 302 tokens"):  # `max_new_tokens` has priority over `max_length`
        compiled.generation_options(2, {**options, "max_new_tokens": 300, "max_length": 100})


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_models_of_equal_shape_are_compiled_separately(batch):
    """A step has the weights and constants of its model, not those of a model that was compiled before."""
    for factor, eps in ((1.0, 1e-6), (-1.0, 1e-6), (-1.0, 10.0)):
        model = tiny_model(vocab_size=258, num_hidden_layers=1, rms_norm_eps=eps)
        for parameter in model.parameters():
            parameter.data *= factor
        compiled = compile_for_generation(model, byte_tokenizer(), "ab", num_return_sequences=batch)
        assert compiled.max_probability_difference < 0.02, (factor, eps)


def test_fast_rejects_models_and_options_it_does_not_support(run_folder, tmp_path, capsys):
    model = tiny_model()
    model._can_compile_fullgraph = False
    with pytest.raises(
        ValueError,
        match="--fast compiles the model as one graph, which transformers does not support for model type 'minigpt'",
    ):
        compile_for_generation(model, byte_tokenizer())
    assert main(["generate", str(run_folder / "model"), "--fast", "--num_beams", "2"]) == 2
    assert "--num_beams cannot be combined with --fast" in capsys.readouterr().err
    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "num_beams": 2}))
    assert main(["generate", str(folder), "--fast"]) == 2
    assert (
        "generation_config.json of the model has num_beams 2, which cannot be combined with --fast"
        in capsys.readouterr().err
    )


def saved_llama(folder, template=""):
    """A Llama whose tokenizer writes a space as a part of the following token, and whose decoder omits the first one."""
    words = ["the", "king", "and", "queen", "said", "to", "him", "her"]
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *(f"▁{word}" for word in words)])}
    backend = Tokenizer(WordLevel(vocab))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if template:
        special_tokens = [(token, vocab[token]) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(template, special_tokens=special_tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=10, bos_token_id=0, eos_token_id=1, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_printed_text_keeps_the_space_before_the_first_generated_word(tmp_path, capsys):
    folder = saved_llama(tmp_path)
    capsys.readouterr()
    assert main(["generate", folder, "--prompt", "the king", "--max_new_tokens", "5", "--seed", "0"]) == 0
    (text,) = generate(*load(folder), "the king", seed=0, max_new_tokens=5)
    assert text.startswith("the king ")
    assert capsys.readouterr().out == text + "\n"


def test_printed_text_has_every_character_whose_bytes_are_spread_over_tokens(tmp_path, capsys):
    save_model_files(tiny_model(vocab_size=258), byte_tokenizer(), tmp_path)
    model, tokenizer = load(str(tmp_path))
    for seed in range(5):
        flags = ["--prompt", "é", "--max_new_tokens", "40", "--do_sample", "true", "--seed", str(seed)]
        assert main(["generate", str(tmp_path), *flags]) == 0
        (text,) = generate(model, tokenizer, "é", seed=seed, do_sample=True, max_new_tokens=40)
        assert capsys.readouterr().out == text + "\n"


def test_a_document_starts_with_one_bos_token(tmp_path):
    _, tokenizer = load(saved_llama(tmp_path, template="<s> $A"))
    assert encode_prompt(tokenizer, "").input_ids.tolist() == [[0]]
    assert encode_prompt(tokenizer, "the king").input_ids.tolist() == [[0, 2, 3]]


def test_a_prompt_does_not_end_with_the_eos_token_that_a_tokenizer_appends(tmp_path):
    _, tokenizer = load(saved_llama(tmp_path, template="<s> $A </s>"))
    assert tokenizer("the king").input_ids == [0, 2, 3, 1]
    assert encode_prompt(tokenizer, "").input_ids.tolist() == [[0]]
    encoding = encode_prompt(tokenizer, "the king")
    assert {name: ids.tolist() for name, ids in encoding.items()} == {
        "input_ids": [[0, 2, 3]],
        "attention_mask": [[1, 1, 1]],
    }
    assert encode_prompt(tokenizer, "the king</s>", special_tokens=True).input_ids.tolist() == [[0, 2, 3, 1]]


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_several_sequences_of_the_generation_config_are_printed(settings, run_folder, tmp_path, capsys):
    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **settings}))
    assert main(["generate", str(folder), "--prompt", "def ", "--max_new_tokens", "3", "--seed", "0"]) == 0
    assert capsys.readouterr().out.count("\n---\n") == settings.get("num_return_sequences", 1)


@pytest.mark.parametrize("as_length", [False, True])
@pytest.mark.parametrize(("window", "new_tokens"), [(None, 61), (None, 60), (8, 61)])
def test_text_beyond_the_context_is_reported_unless_all_layers_have_a_window(window, new_tokens, as_length, caplog):
    """The context is 64 tokens, the prompt has four."""
    sliding = {"use_sliding_window": True, "sliding_window": window} if window else {}
    limit = {"max_length": 4 + new_tokens} if as_length else {"max_new_tokens": new_tokens}
    generate(tiny_model(vocab_size=258, **sliding), byte_tokenizer(), "abcd", **limit)
    is_reported = "4 tokens of prompt and 61 new tokens exceed the context of the model, 64 tokens" in caplog.text
    assert is_reported == (window is None and new_tokens == 61)


def test_a_prompt_beyond_the_context_is_an_error_without_a_warning_of_transformers(run_folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(MiniGPTError, match="shorten the prompt, so that new tokens fit"):
        minigpt_hf.generate(run_folder / "model", "def " * 500)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty"])
def test_whole_numbers_are_accepted(name, run_folder):
    texts = [
        minigpt_hf.generate(run_folder / "model", "def ", seed=0, max_new_tokens=5, do_sample=True, **{name: value})
        for value in (2, 2.0)
    ]
    assert texts[0] == texts[1]
