"""Tokenizers are lossless, and unknown characters are errors that name them."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2TokenizerFast

from minigpt_hf.cli import main
from minigpt_hf.data import chunking
from minigpt_hf.data import tokenizer as module
from minigpt_hf.data.chunking import split_into_chunks
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.encoding import Encoder
from minigpt_hf.data.prepared import prepare
from minigpt_hf.data.tokenizer import (
    END_OF_TEXT,
    PAD,
    appended_tokens,
    byte_level_bpe,
    byte_tokenizer,
    character_tokenizer,
    load_tokenizer,
    lost_characters,
    special_tokens_in_text,
    tokenizer_fingerprint,
)
from minigpt_hf.doctor import examine, examine_files, failures
from minigpt_hf.publish.model_folder import save_model_files
from tests.conftest import tiny_model

# Difficult text: any character, special tokens, and mixtures of white space.
DIFFICULT = st.lists(
    st.one_of(
        st.text(), st.sampled_from([END_OF_TEXT, PAD, "\n", "\r\n", "  ", "\u2028", "\x1c", "\t", "'ll", " é", "é"])
    )
).map("".join)


@pytest.fixture(scope="module")
def bpe():
    from pathlib import Path

    return byte_level_bpe([Path(module.__file__).read_text(encoding="utf-8")], 400)


@pytest.fixture(scope="module")
def tokenizers(bpe):
    return [bpe, byte_tokenizer()]


@settings(max_examples=150, deadline=None)
@given(text=DIFFICULT)
def test_decoding_restores_the_encoded_text(tokenizers, text):
    for tokenizer in tokenizers:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        encoder = Encoder(tokenizer.backend_tokenizer.to_str())
        assert tokenizer.decode(encoder(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab \n\r\té", max_size=60))
def test_decoding_restores_the_text_of_a_character_tokenizer(text):
    tokenizer = character_tokenizer(["ab \n\r\té"])
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@settings(max_examples=200, deadline=None)
@given(text=DIFFICULT, size=st.integers(1, 20))
def test_chunks_encode_to_the_same_tokens_as_the_complete_text(bpe, text, size):
    encoder = Encoder(bpe.backend_tokenizer.to_str())
    chunks = list(_chunks_of_size(text, size))
    assert "".join(chunks) == text
    assert [i for chunk in chunks for i in encoder(chunk)] == encoder(text).tolist()


def _chunks_of_size(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "CHUNK_CHARACTERS", size)
        yield from (chunk for _, chunk in split_into_chunks([(True, text[: size * 3]), (False, text[size * 3 :])]))


def test_chunks_of_real_text_encode_to_the_same_tokens(bpe, text):
    encoder = Encoder(bpe.backend_tokenizer.to_str())
    chunks = list(_chunks_of_size(text, 1000))
    assert len(chunks) > 50
    assert [i for chunk in chunks for i in encoder(chunk)] == encoder(text).tolist()


def test_the_pre_tokenizer_equals_that_of_qwen2(bpe):
    qwen2 = Qwen2TokenizerFast().backend_tokenizer.pre_tokenizer
    ours = bpe.backend_tokenizer.pre_tokenizer
    source = random.Random(0)
    for _ in range(300):
        text = "".join(source.choice("aB1 \n\r\t'.,é日_-½\u00a0") for _ in range(30)) + " it's we'LL 12345"
        assert ours.pre_tokenize_str(text) == qwen2.pre_tokenize_str(text)


def test_training_is_deterministic_and_gives_the_requested_vocabulary_size(text):
    one, other = byte_level_bpe([text], 300), byte_level_bpe(iter([text]), 300)
    assert len(one) == len(other) == 300
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(byte_level_bpe([text], 301))


def test_the_first_merge_is_the_most_frequent_pair():
    """In "ababab ab" the pair (a, b) occurs four times, more than any other."""
    tokenizer = byte_level_bpe(["ababab ab"], 259)
    assert tokenizer.convert_ids_to_tokens(258) == "ab"


def test_byte_b_has_id_b_plus_2():
    assert byte_tokenizer()("A\n\x00é").input_ids == [65 + 2, 10 + 2, 0 + 2, 0xC3 + 2, 0xA9 + 2]


def test_characters_have_ids_in_code_point_order_after_the_special_tokens():
    assert character_tokenizer(["cab"])("abc").input_ids == [2, 3, 4]


def test_an_unknown_character_is_an_error_that_names_it():
    encoder = Encoder(character_tokenizer(["abc"]).backend_tokenizer.to_str())
    with pytest.raises(ValueError, match=r"does not know: 'é' \(U\+00E9\)"):
        encoder("abécab")


def test_special_tokens_in_the_text_are_encoded_as_text(bpe):
    encoder = Encoder(bpe.backend_tokenizer.to_str())
    assert bpe.eos_token_id not in encoder(f"a{END_OF_TEXT}b{PAD}")
    assert bpe.pad_token_id not in encoder(f"a{END_OF_TEXT}b{PAD}")
    assert bpe(f"a{END_OF_TEXT}").input_ids[-1] == bpe.eos_token_id  # transformers recognizes the special token


def test_special_tokens_have_the_ids_0_and_1(tokenizers):
    for tokenizer in [*tokenizers, character_tokenizer(["abc"])]:
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
        assert (tokenizer.bos_token, tokenizer.pad_token) == (END_OF_TEXT, PAD)


def test_a_saved_tokenizer_loads_anywhere_and_encodes_the_same(tokenizers, tmp_path, text):
    for i, tokenizer in enumerate([*tokenizers, character_tokenizer([text])]):
        tokenizer.model_max_length = 64
        save_model_files(tiny_model(), tokenizer, tmp_path / str(i))
        assert "PreTrainedTokenizerFast" in (tmp_path / str(i) / "tokenizer_config.json").read_text()
        loaded = AutoTokenizer.from_pretrained(tmp_path / str(i))
        assert loaded.model_max_length == 64
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.decode(loaded(text).input_ids) == text
        assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / str(i)))) == tokenizer_fingerprint(tokenizer)


def test_saved_tokenizers_disable_the_cleanup_of_spaces(tokenizers, tmp_path):
    """By default transformers 4 removes the space of "a ." when decoding."""
    for name, tokenizer in enumerate(tokenizers):
        tokenizer.save_pretrained(tmp_path / str(name))
        config = json.loads((tmp_path / str(name) / "tokenizer_config.json").read_text())
        assert config["clean_up_tokenization_spaces"] is False


def test_a_missing_tokenizer_and_a_vocabulary_that_is_too_small_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="at least 258"):
        byte_level_bpe(["abc"], 200)


def lossy_tokenizer(folder, text: str) -> str:
    """A vocabulary of lower-case words without accents, as in BERT; other words are unknown tokens."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[END]": 1}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator([text], trainers.WordLevelTrainer(vocab_size=100, special_tokens=["[UNK]", "[END]"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[END]").save_pretrained(folder)
    return str(folder)


def test_what_a_tokenizer_loses_is_logged_and_published(text, recipe_file, tmp_path, capfd):
    words, folder = text[:20_000], lossy_tokenizer(tmp_path / "tokenizer", text)
    (tmp_path / "text.txt").write_text(words)
    flags = ["--data", str(tmp_path / "text.txt"), "--tokenizer", folder, "--validation_fraction", "0.5"]
    short = "--max_steps 2 --eval_steps 2 --save_steps 2 --sample_tokens 0".split()
    prepared, run = str(tmp_path / "prepared"), tmp_path / "run"
    assert main(["tokenize", "--recipe", str(recipe_file), *flags, "--output_dir", prepared]) == 0
    encoding = Tokenizer.from_file(f"{folder}/tokenizer.json").encode(words[:10_000])
    unknown = encoding.ids.count(0) / len(encoding.ids)
    lost = f"{unknown:.2%} of the tokens are unknown; upper case, white space"
    warning = f"the tokenizer does not reproduce the text ({lost}"
    assert warning in capfd.readouterr().err
    assert main(["train", "--recipe", str(recipe_file), "--data", prepared, *short, "--output_dir", str(run)]) == 0
    assert warning in json.loads((run / "model" / "minigpt.json").read_text())["tokenizer"]["lossy"]
    assert warning in (run / "model" / "README.md").read_text()
    capfd.readouterr()
    assert main(["evaluate", str(run / "model"), "--data", str(tmp_path / "text.txt")]) == 0
    assert "the tokenizer does not reproduce the text (" in capfd.readouterr().err
    rows = {row.name: row for row in examine_files(run / "model")}
    assert (row := rows["tokenizer round trip"]).state == "pass" and "as minigpt.json states" in row.reason
    assert failures(examine(run / "model", trust_remote_code=True)) == []


@pytest.mark.parametrize(
    ("template", "appended"), [("<|endoftext|> $A", []), ("$A <|pad|> <|endoftext|>", ["<|pad|>", "<|endoftext|>"])]
)
def test_a_tokenizer_that_appends_tokens_to_every_text_is_reported(template, appended, tmp_path, bpe, caplog):
    backend = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
    special_tokens = [(END_OF_TEXT, 0), (PAD, 1)]
    backend.post_processor = processors.TemplateProcessing(template, special_tokens=special_tokens)
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT).save_pretrained(folder)
    assert appended_tokens(load_tokenizer(str(folder))) == appended
    (tmp_path / "text.txt").write_text("One text. " * 100)
    prepare(
        load_corpus(str(tmp_path / "text.txt"), cache_dir=tmp_path),
        *(str(folder), 400, tmp_path),
        block_size=8,
        validation_characters=100,
    )
    assert ("appends <|pad|> <|endoftext|> to every text" in caplog.text) == bool(appended)


def test_padding_in_a_tokenizer_file_does_not_append_tokens_to_every_text(tmp_path, bpe):
    backend = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
    backend.enable_padding(length=32)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT).save_pretrained(tmp_path)
    assert appended_tokens(load_tokenizer(str(tmp_path))) == []


def test_special_tokens_that_a_tokenizer_recognizes_in_a_text_are_reported(tmp_path, bpe, caplog):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((character, -3.0) for character in "▁</s>at")]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "unigram")
    bpe.save_pretrained(tmp_path / "bpe")
    character_tokenizer(["a ts"]).save_pretrained(tmp_path / "characters")
    for name, found in (("unigram", ["</s>"]), ("bpe", []), ("characters", [])):
        assert special_tokens_in_text(load_tokenizer(str(tmp_path / name))) == found
    (tmp_path / "text.txt").write_text("at a stat " * 100)
    prepare(
        load_corpus(str(tmp_path / "text.txt"), cache_dir=tmp_path),
        *(str(tmp_path / "unigram"), 400, tmp_path),
        block_size=8,
        validation_characters=100,
    )
    assert "unigram: the string </s> in a text is encoded as the special token" in caplog.text


def test_an_unknown_token_that_is_a_character_of_the_text_loses_nothing():
    vocabulary = {"<|endoftext|>": 0, "?": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="?")
    assert lost_characters(fast, ["ab?ba"]) is None
    assert lost_characters(fast, ["ab?ba", "abc"]) == "25.00% of the tokens are unknown; characters lost or changed"


def test_lost_characters_is_none_for_lossless_tokenizers(text, bpe):
    for tokenizer in (bpe, byte_tokenizer(), character_tokenizer([text])):
        assert lost_characters(tokenizer, [text[:5000], " a\n"]) is None


def test_what_a_tokenizer_loses_is_reported_by_category():
    """Each of three normalizers loses one category; U+0338 is the combining character of the lowest class."""
    for normalizer, text, lost in (
        (normalizers.Lowercase(), "Ab", "upper case"),
        (normalizers.Replace(" ", ""), "a b", "white space"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "a\u0338b", "accents"),
        (normalizers.Replace("b", "a"), "ab", "characters"),
    ):
        backend = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
        backend.normalizer = normalizer
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
        assert lost_characters(tokenizer, [text]) == f"{lost} lost or changed"


def test_the_fingerprint_does_not_depend_on_truncation_and_padding(bpe):
    """Each call of a tokenizer sets them, and saving it writes them."""
    before = tokenizer_fingerprint(bpe)
    bpe(["a", "a longer text"], truncation=True, max_length=3, padding=True)
    assert "LongestFirst" in bpe.backend_tokenizer.to_str()
    assert tokenizer_fingerprint(bpe) == before
