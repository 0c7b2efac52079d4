"""Verbatim copying: figures calculated by hand, baselines of equal length, and the command on a trained model."""

import json
import shutil

import numpy as np
import pytest

import minigpt_hf
from minigpt_hf import api, training_text
from minigpt_hf.cli import main
from minigpt_hf.data.chat_format import ChatFormat, with_chat_tokens
from minigpt_hf.data.conversations import build_conversation_stream
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.stream import build_stream
from minigpt_hf.data.tokenizer import byte_level_bpe, byte_tokenizer
from minigpt_hf.inference.copying import copied_samples, encode_samples, held_out_excerpts, measure_copying
from tests.conftest import fine_tune

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def stream_of(texts: list[str], tokenizer, folder):
    """The stream of documents, one per row of a table."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = load_corpus(str(folder / "rows.jsonl"), 0, cache_dir=folder / "cache")
    return build_stream(corpus.train, tokenizer, folder / "cache")


def conversation_stream_of(rows: list[dict], tokenizer, folder):
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_corpus(str(folder / "rows.jsonl"), 0, chat=True, cache_dir=folder / "cache")
    return build_conversation_stream(corpus.train, tokenizer, 1000, folder / "cache")


# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures_calculated_manually(tmp_path):
    tokenizer = byte_tokenizer()  # a token is a byte
    train = stream_of([LETTERS, "0123456789"], tokenizer, tmp_path / "train")
    samples = encode_samples(tokenizer, [("", f"--{LETTERS[:40]}--"), ("> ", "> 01234567 yz01 "), ("", "")])
    copying = measure_copying(tokenizer, samples, train, None)
    assert (copying.samples.tokens, copying.samples.longest) == (44 + 14, 40)
    assert copying.samples.shares == {"8": 48 / 58, "16": 40 / 58, "32": 40 / 58}
    assert [(s.tokens, s.of_tokens, s.text) for s in copying.stretches] == [
        (40, 44, LETTERS[:40]),
        (8, 14, "01234567"),  # not "yz01", which crosses a document boundary
        (0, 0, ""),
    ]
    assert copying.training_tokens == len(train) == 1 + 52 + 1 + 10
    assert copying.held_out is None


def test_the_baseline_is_held_out_text_of_equal_length(tmp_path):
    tokenizer = byte_tokenizer()
    train = stream_of([LETTERS], tokenizer, tmp_path / "train")
    validation = stream_of([f"{LETTERS[:20]}{'.' * 30}", "-" * 60], tokenizer, tmp_path / "validation")
    samples = encode_samples(tokenizer, [("", "x" * 30), ("", "y" * 50)])
    copying = measure_copying(tokenizer, samples, train, validation)
    assert copying.samples.longest == 1
    assert (copying.held_out.tokens, copying.held_out.longest) == (80, 20)
    assert copying.held_out.shares == {"8": 0.25, "16": 0.25, "32": 0.0}


def test_excerpts_start_with_documents_and_continue_with_the_next_ones(tmp_path):
    tokenizer = byte_tokenizer()
    validation = stream_of(["abc", "defgh", "ijk", "lmnop"], tokenizer, tmp_path)
    first, second = held_out_excerpts(validation, [5, 4])
    assert [tokenizer.decode(ids[ids >= 0].tolist()) for ids in (first, second)] == ["abcde", "ijkl"]
    assert np.flatnonzero(first < 0).tolist() == [0, 4]  # before and between the documents


def test_excerpts_of_a_long_document_are_evenly_spaced_and_do_not_overlap(tmp_path):
    tokenizer = byte_tokenizer()
    text = "".join(chr(33 + i) for i in range(90))
    validation = stream_of([text], tokenizer, tmp_path)
    excerpts = held_out_excerpts(validation, [20, 20, 50])
    texts = [tokenizer.decode(ids[ids >= 0].tolist()) for ids in excerpts]
    assert texts == [text[:20], text[29:49], text[59:]]  # the third of them is shorter


def test_of_conversations_the_answers_are_measured(tmp_path):
    tokenizer = with_chat_tokens(byte_tokenizer())
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}, {LETTERS[10 * i : 10 * i + 10]}"} for i in range(4)]
    train = conversation_stream_of(rows[:2], tokenizer, tmp_path / "train")
    validation = conversation_stream_of(rows[2:], tokenizer, tmp_path / "validation")
    given = "question 0\n"
    samples = encode_samples(tokenizer, [(given, f"{given}answer 1, KLMNO"), (given, f"{given}?")], is_chat=True)
    assert [len(ids) for ids in samples] == [15, 1]
    copying = measure_copying(tokenizer, samples, train, validation, is_chat=True)
    assert copying.stretches[0].text == "answer 1, "
    excerpts = held_out_excerpts(validation, [25, 3], ChatFormat(tokenizer))
    texts = [tokenizer.decode(ids[ids >= 0].tolist()) for ids in excerpts]
    assert texts == [rows[2]["completion"], rows[3]["completion"][:3]]
    assert copying.held_out.tokens == 16


@pytest.mark.parametrize("content", ["Paris", " Paris", "\nParis\n\n is", "é 😀<|im_end|>", "a  b"])
def test_answers_have_the_tokens_of_the_stream(content, tmp_path):
    """With byte-level BPE, the first token depends on the line end before the answer."""
    tokenizer = with_chat_tokens(byte_level_bpe(["user\nassistant\nParis is\n\n a city\n\n"] * 3, 300))
    train = conversation_stream_of([{"prompt": "?", "completion": content}], tokenizer, tmp_path)
    (ids,) = encode_samples(tokenizer, [("?\n", f"?\n{content}")], is_chat=True)
    copying = measure_copying(tokenizer, [ids], train, None, is_chat=True)
    assert copying.samples.longest == copying.samples.tokens == len(ids) > 0
    assert copying.stretches[0].text == content


def test_passages_have_their_surroundings_and_the_number_of_their_document(tmp_path):
    tokenizer = byte_tokenizer()
    train = stream_of(["first", f"ä{'.' * 47}{LETTERS}{'!' * 60}", LETTERS], tokenizer, tmp_path)
    ((sample, short),) = [copied_samples(tokenizer, [("<", f"<--{LETTERS[:20]}+{LETTERS[-9:]}"), ("", "x")], train)]
    assert sample.given == "<" and tokenizer.decode(sample.ids) == f"--{LETTERS[:20]}+{LETTERS[-9:]}"
    long, end = sample.passages
    assert (long.start, long.tokens, long.document, long.text) == (2, 20, 2, LETTERS[:20])
    assert long.before == "." * 47  # without half of the character before
    assert long.after == f"{LETTERS[20:]}{'!' * 16}"
    assert (end.start, end.tokens, end.document, end.text, end.after) == (23, 9, 2, LETTERS[-9:], "!" * 48)
    assert short.passages == []


# -- a trained model --------------------------------------------------------------------------------------------------


@pytest.fixture
def metadata(run_folder):
    return json.loads((run_folder / "model" / "minigpt.json").read_text())


def test_the_command_measures_what_training_has_recorded(run_folder, text_file, metadata, capsys):
    """The same samples are generated again, and compared with the same stream."""
    argv = ["evaluate", str(run_folder / "model"), "--data", str(text_file), "--copying"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in metadata["copying"]} == metadata["copying"]
    assert found["training_tokens"] == metadata["data"]["train"]["tokens"]
    assert found["samples"]["tokens"] == sum(stretch["of_tokens"] for stretch in found["stretches"]) > 0
    assert main([*argv, "--samples", "2", "--sample_tokens", "40"]) == 0
    out = capsys.readouterr().out
    assert "held-out text" in out and "in stretches of 8 tokens or more" in out
    assert [line.split()[0] for line in out.partition("of each sample\n")[2].splitlines()] == ["1", "2"]


def test_the_command_answers_the_question_that_training_has_asked(run_folder, chats, tmp_path, capsys):
    folder = fine_tune(run_folder, chats, tmp_path / "run", "--sample_prompt", "7 + 1", "--max_steps", "2") / "model"
    published = json.loads((folder / "minigpt.json").read_text())["copying"]
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--data", str(chats), "--copying", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in published} == published
    assert len(api.measure_copying(folder, str(chats), samples=3).stretches) == 3


def test_a_passage_of_the_training_text_is_recognized(run_folder, text_file, text):
    """Held-out text and training text, given instead of samples."""
    tokenizer, train, validation = training_text.training_text(
        run_folder / "model",
        str(text_file),
        training_text.recipe_of(run_folder / "model"),
        training_text.NOTHING_GIVEN,
    )
    copied = encode_samples(tokenizer, [("", text[3000:4000])])
    copying = measure_copying(tokenizer, copied, train, validation)
    assert copying.samples.longest >= len(copied[0]) - 2  # the tokens at the ends may differ
    assert copying.samples.shares["32"] > 0.95 > copying.held_out.shares["32"]


def test_a_prepared_text_is_the_training_text(run_folder, text_file, recipe_file, metadata, tmp_path, capsys):
    prepared = str(tmp_path / "prepared")
    argv = ["tokenize", "--recipe", str(recipe_file), "--data", str(text_file), "--output_dir", prepared]
    assert main(argv) == 0
    capsys.readouterr()
    argv = ["evaluate", str(run_folder / "model"), "--data", prepared, "--copying"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in metadata["copying"]} == metadata["copying"]
    assert main([*argv, "--encoding", "latin-1"]) == 2
    assert "is a prepared text, which stores how it was read: omit encoding" in capsys.readouterr().err

    shutil.copytree(run_folder / "model", tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.pop("tokenizer_fingerprint")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    argv[1] = str(tmp_path / "model")
    assert main(argv) == 2
    assert "was prepared with another tokenizer than that of" in capsys.readouterr().err


def test_the_original_of_a_prepared_text_has_the_same_baseline(text, recipe_file, tmp_path, capsys):
    """The sequences of training are shorter than those for which the text was prepared and its sample was taken."""
    (documents := tmp_path / "documents").mkdir()
    for i in range(30):
        (documents / f"{i}.txt").write_text(text[i * 900 : i * 900 + 600])
    flags = ["--recipe", str(recipe_file), "--data", str(documents), "--validation_characters", "700"]
    assert main(["tokenize", *flags, "--output_dir", str(tmp_path / "prepared")]) == 0
    flags = ["--recipe", str(recipe_file), "--data", str(tmp_path / "prepared"), "--output_dir", str(tmp_path / "run")]
    assert main(["train", *flags, *"--block_size 8 --max_steps 2".split()]) == 0
    published = json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())["copying"]
    for data in (tmp_path / "prepared", documents):
        capsys.readouterr()
        argv = ["evaluate", str(tmp_path / "run" / "model"), "--data", str(data), "--copying", "--json"]
        assert main(argv) == 0
        found = json.loads(capsys.readouterr().out)
        assert {name: found[name] for name in published} == published


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--copying", "--split", "train"], "takes its baseline from the validation split: omit --split"),
        (["--copying", "--score", "exact"], "--copying and --score are different measurements"),
        (["--copying", "--samples", "0"], "samples is 0: it must be at least 1"),
        (["--copying", "--stride", "3"], "stride does not apply to verbatim copying"),
        (["--samples", "3"], "--samples requires --copying"),
    ],
)
def test_flags_that_do_not_apply_are_named(flags, message, run_folder, text_file, capsys):
    assert main(["evaluate", str(run_folder / "model"), "--data", str(text_file), *flags]) == 2
    assert message in capsys.readouterr().err


def test_another_text_than_that_of_training_is_reported(run_folder, text_file, text, tmp_path, caplog):
    (tmp_path / "other.py").write_text(text.replace("argparse", "optparse"))
    for file, warns in ((text_file, False), (tmp_path / "other.py", True)):
        caplog.clear()
        minigpt_hf.measure_copying(run_folder / "model", file, samples=1)
        assert ("its training split is not the one that" in caplog.text) == warns


def test_without_held_out_text_there_is_no_baseline(run_folder, text_file):
    copying = minigpt_hf.measure_copying(run_folder / "model", text_file, validation_fraction=0.0, samples=1)
    assert copying.held_out is None and copying.samples.tokens > 0


def test_the_card_states_the_figures(run_folder, metadata):
    card = (run_folder / "model" / "README.md").read_text()
    for name, part in (("samples", metadata["copying"]["samples"]), ("held-out text", metadata["copying"]["held_out"])):
        shares = " | ".join(f"{100 * share:.1f} %" for share in part["shares"].values())
        assert f"| {name} | {part['tokens']:,} | {part['longest']:,} | {shares} |\n" in card
