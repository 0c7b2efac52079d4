"""GGUF: transformers reads the model's weights and tokens from the file; what the format cannot represent is rejected."""

import json
import re
import shutil

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from minigpt_hf.data.chat_format import CHAT_TEMPLATE, with_chat_tokens
from minigpt_hf.data.tokenizer import END_OF_TEXT, byte_tokenizer, character_tokenizer
from minigpt_hf.export import gguf as module
from minigpt_hf.export.gguf import export_gguf
from minigpt_hf.export.gguf_vocabulary import encoded, merged, vocabulary_of
from minigpt_hf.model.native import qwen3_settings
from minigpt_hf.publish.model_folder import save_model_files
from tests.conftest import random_ids, tiny_model
from tests.publish.strings import TOKENIZERS, adversarial_tokenizer, strings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with full attention and a byte tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "bytes"
    save_model_files(tiny_model(vocab_size=260), byte_tokenizer(), folder)
    return folder


def tensors_of(out) -> dict[str, gguf.ReaderTensor]:
    (file,) = out.glob("*.gguf")
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


# -- content of the file


def test_a_trained_folder_is_read_by_transformers_and_gives_the_same_logits(run_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(run_folder / "model")
    out = export_gguf(run_folder / "model", tmp_path / "out", context=33)
    assert sorted(file.name for file in out.iterdir()) == ["Modelfile", "README.md", "tiny-F32.gguf"]
    theirs = Qwen3ForCausalLM.from_pretrained(
        out, gguf_file="tiny-F32.gguf", config=Qwen3Config(**qwen3_settings(model.config, 33)), dtype=torch.float32
    )
    ids = random_ids(2, 32)
    assert torch.equal(theirs(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_stored_once(tied, tmp_path):
    save_model_files(tiny_model(vocab_size=258, tie_word_embeddings=tied), byte_tokenizer(), tmp_path / "model")
    names = set(tensors_of(export_gguf(tmp_path / "model", tmp_path / "out")))
    assert ("output.weight" in names) != tied
    assert len(names) == 2 * 11 + 2 + (not tied)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("q8_0", 34 / 32)])
def test_each_dtype_rounds_once_and_takes_its_size(folder, dtype, size, tmp_path):
    tensors = tensors_of(export_gguf(folder, tmp_path / "out", dtype))
    weight = AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight.detach()
    embedding = tensors["token_embd.weight"]
    assert embedding.n_bytes == weight.numel() * size
    read = torch.tensor(gguf.quants.dequantize(embedding.data, embedding.tensor_type))
    if (
        dtype == "q8_0"
    ):  # the scale, in float16, is the largest magnitude of 32 weights divided by 127; weights are multiples of it
        steps = weight.reshape(-1, 32).abs().amax(dim=1, keepdim=True) / 127
        assert ((read - weight).reshape(-1, 32).abs() <= 0.57 * steps).all()
    else:
        assert torch.equal(read, weight.to(getattr(torch, dtype)).float())
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_a_block_of_q8_0_computed_manually():
    """The largest magnitude is 127, so the step is 1, and every weight is rounded to the nearest integer."""
    block = np.array([[127.0, 1.4, -2.6, 0.4] + [0.0] * 28], dtype=np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    read = gguf.quants.dequantize(gguf.quants.quantize(block, kind), kind)
    assert read[0, :4].tolist() == [127.0, 1.0, -3.0, 0.0]
    assert module._is_stored_as(torch.from_numpy(block), torch.from_numpy(read), kind)
    assert not module._is_stored_as(torch.from_numpy(block), torch.from_numpy(read) + 0.6, kind)


def test_weights_are_not_converted_implicitly(tmp_path):
    save_model_files(tiny_model(vocab_size=258).to(torch.bfloat16), byte_tokenizer(), tmp_path / "model")
    out = export_gguf(tmp_path / "model", tmp_path / "out")
    assert (out / "model-BF16.gguf").is_file()
    assert tensors_of(out)["token_embd.weight"].tensor_type.name == "BF16"


def test_the_modelfile_samples_as_the_model_does(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "model")
    settings = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    (other / "generation_config.json").write_text(json.dumps(settings))
    lines = (export_gguf(other, tmp_path / "out", context=50) / "Modelfile").read_text().splitlines()
    assert lines == [
        "FROM ./model-F32.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        "PARAMETER num_ctx 50",
        "PARAMETER temperature 0.8",
        "PARAMETER top_k 50",
        "PARAMETER top_p 0.9",
        "PARAMETER repeat_penalty 1.0",
        'PARAMETER stop "<|endoftext|>"',
    ]


def test_settings_of_generation_that_the_modelfile_lacks_are_reported(folder, tmp_path, caplog):
    other = shutil.copytree(folder, tmp_path / "model")
    settings = {"do_sample": True, "min_p": 0.1, "no_repeat_ngram_size": 3, "num_beams": 1, "max_new_tokens": 9}
    (other / "generation_config.json").write_text(json.dumps(settings))
    export_gguf(other, tmp_path / "out", context=50)
    assert "the export has no equivalent of min_p 0.1, no_repeat_ngram_size 3; it generates without" in caplog.text


def test_the_modelfile_has_the_system_message_of_training_and_penalizes_the_entire_context(tmp_path, caplog):
    tokenizer = with_chat_tokens(byte_tokenizer())
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.generation_config.repetition_penalty = 1.5
    save_model_files(model, tokenizer, tmp_path / "model")
    (tmp_path / "model" / "minigpt.json").write_text(json.dumps({"recipe": {"system": "Be brief.\nBe kind."}}))
    content = (export_gguf(tmp_path / "model", tmp_path / "out") / "Modelfile").read_text()
    assert 'SYSTEM """Be brief.\nBe kind."""\n' in content
    assert "PARAMETER repeat_penalty 1.5\nPARAMETER repeat_last_n -1\n" in content
    (tmp_path / "model" / "minigpt.json").write_text(json.dumps({"recipe": {"system": 'Say "no"'}}))
    assert "SYSTEM" not in (export_gguf(tmp_path / "model", tmp_path / "other") / "Modelfile").read_text()
    assert "the Modelfile omits the system message" in caplog.text


@pytest.mark.parametrize(
    ("systems", "recipe", "data", "is_reported"),
    [
        (["Add.", None], {}, {}, True),
        (["Add."], {"system": "Add."}, {"has_other_systems": False}, False),
        ([None], {}, {"has_other_systems": True}, True),
        ([None], {}, {}, False),
        ([3], {}, [], False),
    ],
    ids=["of samples", "of the settings", "of other rows", "none", "malformed"],
)
def test_system_messages_that_are_not_part_of_the_modelfile_are_reported(
    systems, recipe, data, is_reported, tmp_path, caplog
):
    tokenizer = with_chat_tokens(byte_tokenizer())
    save_model_files(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model")
    conversations = [[] if each is None else [{"role": "system", "content": each}] for each in systems]
    about = {"recipe": recipe, "data": data, "sample": {"conversations": conversations}}
    (tmp_path / "model" / "minigpt.json").write_text(json.dumps(about))
    export_gguf(tmp_path / "model", tmp_path / "out")
    message = "conversations of the training have system messages of their own, which the Modelfile does not contain"
    assert (message in caplog.text) == is_reported
    assert ("may differ from those in the card" in caplog.text) == (systems[0] == "Add." and is_reported)


def test_the_end_of_text_is_the_token_at_which_generate_stops(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "model")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [66]}))  # the byte "@"
    out = export_gguf(other, tmp_path / "out")
    (file,) = out.glob("*.gguf")
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.eos_token_id"].contents() == 66
    assert (out / "Modelfile").read_text().splitlines()[-1] == 'PARAMETER stop "@"'


def test_a_chat_model_has_both_stop_tokens_its_template_and_chatml_in_the_modelfile(tmp_path):
    tokenizer = with_chat_tokens(byte_tokenizer())
    end, separator = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=end)
    model.generation_config.eos_token_id = [end, separator]
    save_model_files(model, tokenizer, tmp_path / "model")
    out = export_gguf(tmp_path / "model", tmp_path / "out")
    (file,) = out.glob("*.gguf")
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == end
    assert fields["tokenizer.ggml.eot_token_id"].contents() == separator
    assert fields["tokenizer.chat_template"].contents() == CHAT_TEMPLATE
    content = (out / "Modelfile").read_text()
    assert content.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n')
    # The Go template with one message is the chat template with it.
    template = re.search(r'TEMPLATE """(.*?)"""', content, re.DOTALL)[1]
    filled = template.replace("{{ range .Messages }}", "").replace("{{ end }}", "")
    filled = filled.replace("{{ .Role }}", "user").replace("{{ .Content }}", "Hi")
    question = [{"role": "user", "content": "Hi"}]
    assert filled == tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)


def test_a_folder_without_a_generation_config_is_exported(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "model")
    (other / "generation_config.json").unlink()
    assert "PARAMETER stop" in (export_gguf(other, tmp_path / "out") / "Modelfile").read_text()


# -- tokenizers


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_vocabulary_alone_gives_the_ids_of_200_strings(make):
    tokenizer = make()
    vocabulary = vocabulary_of(tokenizer, len(tokenizer) + 2)
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.encode_special_tokens = True
    assert len(strings()) == 200
    for text in strings():
        assert encoded(text, vocabulary) == plain.encode(text, add_special_tokens=False).ids, text
    assert [kind.name for kind in vocabulary.types[:3]] == ["CONTROL", "CONTROL", "NORMAL"]
    assert vocabulary.tokens[-1] == f"[unused{len(tokenizer) + 1}]"
    assert vocabulary.types[-1].name == "UNUSED"


def test_the_adversarial_tokenizer_detects_a_wrong_order_of_merges():
    """Shows that the test above can fail: with the same merges in reverse order."""
    tokenizer = adversarial_tokenizer()
    vocabulary = vocabulary_of(tokenizer, len(tokenizer))
    right = [encoded(text, vocabulary) for text in strings()]
    vocabulary.merges.reverse()
    assert sum(encoded(text, vocabulary) != ids for text, ids in zip(strings(), right, strict=True)) > 20


def test_a_character_is_merged_from_its_own_bytes_only():
    """€ is E2 82 AC, which byte-level BPE writes â Ĥ ¬; a needs no merge."""
    vocabulary = vocabulary_of(character_tokenizer(["a€"]), 4)
    assert vocabulary.tokens[2:] == ["a", "âĤ¬"]
    assert vocabulary.merges == ["â Ĥ", "âĤ ¬"]
    assert encoded("€a€€", vocabulary) == [3, 2, 3, 3]
    assert encoded("é", vocabulary) == [None, None]  # no character of this tokenizer


def test_merges_computed_manually():
    assert merged("abc", {"b c": 0, "a b": 1}) == ["a", "bc"]
    assert merged("aaa", {"a a": 0}) == ["aa", "a"]
    assert merged("", {}) == []


def tokenizer_with(**parts) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def words_of_characters() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({END_OF_TEXT: 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def ordinary_special() -> PreTrainedTokenizerFast:
    return adversarial_tokenizer(["<eos>"] * 20)


def with_a_byte_fallback() -> PreTrainedTokenizerFast:
    vocab = byte_tokenizer().get_vocab()
    return tokenizer_with(model=BPE(vocab=vocab, merges=[], byte_fallback=True))


def with_an_unknown_token() -> PreTrainedTokenizerFast:
    tokenizer = character_tokenizer(["abc"])
    tokenizer.backend_tokenizer.model = WordLevel({**tokenizer.get_vocab(), "[?]": 9}, unk_token="[?]")
    return tokenizer


REJECTED = {
    "a normalizer": (lambda: tokenizer_with(normalizer=normalizers.NFC()), "its normalizer NFC is not supported"),
    "tokens added to a text": (
        lambda: tokenizer_with(
            post_processor=processors.TemplateProcessing(f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
        ),
        "adds special tokens to every text",
    ),
    "another pre-tokenizer": (
        lambda: tokenizer_with(pre_tokenizer=pre_tokenizers.Metaspace()),
        "its pre-tokenizer is not one of qwen2, gpt-2",
    ),
    "a space before the first word": (
        lambda: tokenizer_with(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "its pre-tokenizer is not one of qwen2, gpt-2",
    ),
    "no pre-tokenizer": (lambda: tokenizer_with(pre_tokenizer=None), "its pre-tokenizer is not one of qwen2, gpt-2"),
    "a word-level model": (words_of_characters, "no WordLevel tokenizer with this pre-tokenizer"),
    "byte fallback": (with_a_byte_fallback, "its BPE model has byte_fallback"),
    "unknown characters": (with_an_unknown_token, "it encodes unknown characters as "),
    "an ordinary <eos>": (ordinary_special, "its ordinary token '<eos>' would be treated as special"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_tokenizer_that_llama_cpp_would_interpret_differently_is_rejected(case):
    make, reason = REJECTED[case]
    with pytest.raises(ValueError, match=f"cannot be represented in GGUF: .*{reason}"):
        vocabulary_of(make(), 700)


def test_more_tokens_than_embeddings_are_rejected():
    with pytest.raises(ValueError, match="the largest token id is 257, but the model has only 200 embeddings"):
        vocabulary_of(byte_tokenizer(), 200)


def test_an_unusual_name_becomes_a_safe_file_name_and_adds_no_line_to_the_modelfile(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "model")
    (other / "minigpt.json").write_text(json.dumps({"name": '../a b\nSYSTEM """x'}))
    out = export_gguf(other, tmp_path / "out")
    assert (out / "Modelfile").read_text().splitlines()[0] == "FROM ./..-a-b-SYSTEM-x-F32.gguf"
    assert (out / "..-a-b-SYSTEM-x-F32.gguf").is_file()


# -- unsupported models


def test_sliding_windows_are_rejected_and_the_remedy_works(run_folder, tmp_path):
    with pytest.raises(ValueError, match=r"sliding window of 33 tokens.* --context 33, .*--to native"):
        export_gguf(run_folder / "model", tmp_path / "out")
    with pytest.raises(ValueError, match="--context 34: give 1 to 33 tokens"):
        export_gguf(run_folder / "model", tmp_path / "out", context=34)
    out = export_gguf(run_folder / "model", tmp_path / "out", context=33)
    fields = gguf.GGUFReader(out / "tiny-F32.gguf").fields
    assert fields["qwen3.context_length"].contents() == 33


@pytest.mark.parametrize(
    ("overrides", "dtype", "reason"),
    [
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, None, r"scaled \(linear\)"),
        ({"hidden_act": "gelu"}, None, "its activation is gelu"),
        ({"eos_token_id": [0, 5, 7]}, None, r"it has 3 EOS tokens \[0, 5, 7\]"),
        ({"head_dim": 12}, "q8_0", r"o_proj\.weight has rows of 48 weights, which do not divide into the blocks of 32"),
        ({}, "float16", "embed_tokens.weight has weights beyond 65,504"),
        ({}, "float64", "--dtype float64: GGUF supports float32, float16, bfloat16, q8_0"),
    ],
)
def test_what_the_format_cannot_represent_is_rejected_with_the_reason(overrides, dtype, reason, tmp_path):
    model = tiny_model(vocab_size=258, **overrides)
    model.model.embed_tokens.weight.data[7, 7] = 7e4
    save_model_files(model, byte_tokenizer(), tmp_path / "model")
    with pytest.raises(ValueError, match=reason):
        export_gguf(tmp_path / "model", tmp_path / "out", dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# -- verification


def other_weights(monkeypatch):
    original = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda data, kind: original(np.nextafter(data, np.float32(9)), kind))


def other_rotation(monkeypatch):
    original = gguf.GGUFWriter.add_rope_freq_base
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda writer, base: original(writer, base * 100))


def other_tokens(monkeypatch):
    original = gguf.GGUFWriter.add_token_list
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_list", lambda writer, tokens: original(writer, tokens[::-1]))


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        (other_weights, r"model\.embed_tokens\.weight equals the model's in float32"),
        (other_rotation, "rope_theta equals the model's"),
        (other_tokens, "its vocabulary encodes a text to the same token ids"),
    ],
)
def test_a_file_that_differs_from_the_model_is_not_written(change, claim, folder, tmp_path, monkeypatch):
    change(monkeypatch)
    with pytest.raises(ValueError, match=f"it is not true that {claim}"):
        export_gguf(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_character_model_encodes_the_same_in_gguf(tmp_path, text):
    tokenizer = character_tokenizer([text, "€"])
    save_model_files(tiny_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model")
    out = export_gguf(tmp_path / "model", tmp_path / "out")
    vocabulary = module._read_vocabulary(next(out.glob("*.gguf")))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert encoded(text[:5000] + "€", vocabulary) == loaded(text[:5000] + "€").input_ids
