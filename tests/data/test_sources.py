"""`--data` accepts text files, tables, saved and Hub datasets; anything else is an error that names it."""

import gzip
import io
import json
import logging
import lzma
import os
import re
import sys
from datetime import datetime

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import minigpt_hf
from minigpt_hf.data import documents as module
from minigpt_hf.data.corpus import load_corpus, mixture
from minigpt_hf.data.files import FORMATS, Share
from minigpt_hf.data.tables import READERS
from minigpt_hf.errors import MiniGPTError
from tests.data.test_corpus import write_files

ROWS = ["first\n", "zweite Zeile\nmit Umbruch", "第三", 'with "quotes", commas\tand tabs', "last"]
COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": lambda data: zstandard.compress(data)}


def texts_of(data, **settings) -> list[str]:
    return list(load_corpus(str(data), 0, **settings).train)


@pytest.fixture
def table() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": ROWS, "number": list(range(len(ROWS)))})


def write_table(table: datasets.Dataset, file) -> None:
    extension = file.suffix
    if extension in (".jsonl", ".ndjson"):
        table.to_json(file)
    elif extension == ".json":
        table.to_json(file, lines=False)
    elif extension in (".csv", ".tsv"):
        table.to_csv(file, sep="\t" if extension == ".tsv" else ",")
    elif extension == ".parquet":
        table.to_parquet(file)
    elif extension == ".arrow":
        with datasets.arrow_writer.ArrowWriter(path=str(file), features=table.features) as writer:
            for row in table:
                writer.write(row)
            writer.finalize()


@pytest.mark.parametrize("extension", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"])
def test_each_row_of_a_table_is_a_document(table, extension, tmp_path):
    write_table(table, tmp_path / f"rows{extension}")
    assert texts_of(tmp_path / f"rows{extension}") == ROWS


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("extension", [".txt", ".jsonl", ".csv"])
def test_compressed_files_are_decompressed(table, extension, compression, tmp_path):
    plain = tmp_path / f"rows{extension}"
    if extension == ".txt":
        plain.write_text("".join(ROWS), encoding="utf-8")
    else:
        write_table(table, plain)
    packed = tmp_path / f"packed{extension}{compression}"
    packed.write_bytes(COMPRESS[compression](plain.read_bytes()))
    assert texts_of(packed) == (["".join(ROWS)] if extension == ".txt" else ROWS)


def test_every_format_has_a_reader():
    assert {"text", *READERS} == set(FORMATS)


def test_a_glob_reads_the_files_it_matches_in_order(tmp_path, monkeypatch):
    write_files(tmp_path, {"b/2.txt": "two", "a/1.txt": "one", "a/3.md": "three"})
    assert texts_of(tmp_path / "**" / "*.txt") == ["one", "two"]
    monkeypatch.chdir(tmp_path)
    assert texts_of("*/*") == ["one", "three", "two"]


def test_the_splits_of_a_saved_dataset_are_used(table, tmp_path):
    table.shuffle(seed=1).save_to_disk(tmp_path / "one")  # with an indices mapping
    assert sorted(texts_of(tmp_path / "one")) == sorted(ROWS)
    both = datasets.DatasetDict({"train": table, "dev": table.select([0, 1])})
    both.save_to_disk(tmp_path / "two")
    corpus = load_corpus(str(tmp_path / "two"))
    assert (list(corpus.train), list(corpus.validation)) == (ROWS, ROWS[:2])
    assert corpus.split_description == "the validation split provided with the data"
    assert list(load_corpus(str(tmp_path / "two"), 0, split="dev").train) == ROWS[:2]
    assert load_corpus(str(tmp_path / "two"), 0).validation is None


@pytest.mark.parametrize("dtype", ["large_string", "string_view"])
def test_every_type_of_text_is_read_from_a_saved_dataset(table, dtype, tmp_path, tmp_path_factory):
    table.cast_column("text", datasets.Value(dtype)).save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved").features["text"].dtype == dtype
    files = set(tmp_path.rglob("*"))
    assert texts_of(tmp_path / "saved", cache_dir=tmp_path_factory.mktemp("cache")) == ROWS
    assert set(tmp_path.rglob("*")) == files  # `datasets` would write what it casts next to the data


def test_splits_of_a_dataset_that_are_not_read_are_reported(table, tmp_path, caplog):
    splits = {"train": table, "unsupervised": table, "validation": table.select([0]), "test": table.select([1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with caplog.at_level("INFO"):
        load_corpus(str(tmp_path / "saved"))
    assert "saved: splits that are not read: unsupervised, test" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        load_corpus(str(tmp_path / "saved"), 0, split="test")
    assert "splits that are not read" not in caplog.text  # chosen by the user


def test_a_folder_of_tables_uses_its_validation_file_and_skips_test_and_readme(table, tmp_path):
    for name, rows in (("train", [0, 1, 2]), ("validation", [3]), ("test", [4])):
        table.select(rows).to_json(tmp_path / f"{name}.jsonl")
    (tmp_path / "README.md").write_text("about the data")
    corpus = load_corpus(str(tmp_path))
    assert (list(corpus.train), list(corpus.validation)) == (ROWS[:3], ROWS[3:4])


def test_another_text_column_can_be_selected(tmp_path):
    rows = datasets.Dataset.from_dict({"question": ["q1", "q2"], "answer": ["a1", None], "n": [1, 2]})
    rows.to_json(tmp_path / "rows.jsonl")
    file = tmp_path / "rows.jsonl"
    assert texts_of(file, text_column="answer") == ["a1"]  # rows without text are skipped
    rows.select_columns(["answer", "n"]).to_json(tmp_path / "one.jsonl")
    assert texts_of(tmp_path / "one.jsonl") == ["a1"]  # the only column of text
    with pytest.raises(ValueError, match=r"several columns contain text; .*columns of text: question, answer"):
        texts_of(file)
    with pytest.raises(ValueError, match="--text_column body: there is no such column"):
        texts_of(file, text_column="body")
    with pytest.raises(ValueError, match="--text_column n: contains values that are not text"):
        texts_of(file, text_column="n")


@pytest.mark.parametrize(
    ("early", "late", "message"),
    [
        ({}, "text", "line 1,002 is the first one with the column 'text'"),
        ({}, "body", "several columns contain text; .*columns of text: title, body"),
        ({"body": None}, "body", "several columns contain text; .*columns of text: title, body"),
    ],
)
def test_a_column_of_text_that_begins_after_the_inspected_rows_is_not_ignored(early, late, message, tmp_path):
    rows = [{"title": f"t{i}", **early} for i in range(1001)] + [{"title": "t", late: "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        texts_of(tmp_path / "rows.jsonl")
    assert texts_of(tmp_path / "rows.jsonl", text_column="title") == [row["title"] for row in rows]


@pytest.mark.parametrize("early", ["", "12"])
def test_a_csv_column_of_text_that_begins_after_the_inspected_rows_is_not_ignored(early, tmp_path):
    rows = ["title,body", *(f"t{i},{early}" for i in range(1001)), "t,b"]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    message = "several columns contain text; .*columns of text: title, body"
    with pytest.raises(ValueError, match=message):
        texts_of(tmp_path / "rows.csv", cache_dir=tmp_path / "cache")
    requested = texts_of(tmp_path / "rows.csv", cache_dir=tmp_path / "cache", text_column="title")
    assert requested == [*(f"t{i}" for i in range(1001)), "t"]
    with pytest.raises(ValueError, match=message):  # although the column is in the cache now
        texts_of(tmp_path / "rows.csv", cache_dir=tmp_path / "cache")


def test_empty_tables_next_to_others_are_reported(tmp_path, caplog):
    for extension, content in ((".csv", "text\na\n"), (".jsonl", '{"text": "a"}\n')):
        write_files(tmp_path / extension, {f"a{extension}": content, f"b{extension}": ""})
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert texts_of(tmp_path / extension) == ["a"]
        assert f"1 of 2 tables have no rows and are skipped: {tmp_path / extension}/b{extension}" in caplog.text


def test_a_table_can_be_read_as_plain_text(table, tmp_path):
    write_table(table, tmp_path / "rows.csv")
    assert texts_of(tmp_path / "rows.csv", data_format="text") == [(tmp_path / "rows.csv").read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.pdf": "x"}, r"a\.pdf: \.pdf files are not supported; known extensions: \.txt .* use --data_format text"),
        ({"a.zip": "x"}, r"\.zip files are not supported"),
        ({"a.bin.gz": "x"}, r"\.bin files are not supported"),
    ],
)
def test_unsupported_files_are_errors_that_name_them(files, message, tmp_path):
    write_files(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        texts_of(tmp_path / next(iter(files)))


def test_a_folder_with_text_files_and_tables_is_an_error(tmp_path):
    write_files(tmp_path, {"a.txt": "x", "b.jsonl": '{"text": "y"}'})
    with pytest.raises(
        ValueError,
        match=r"1 text files and 1 tables \(\.jsonl, \.txt\).*--data '.*\*\*/\*\.jsonl'.*--data_format text",
    ):
        texts_of(tmp_path)
    assert texts_of(tmp_path / "*.jsonl") == ["y"]


def test_the_message_on_tables_of_several_formats_counts_only_files_that_would_be_read(tmp_path):
    for name in ("README.jsonl", "a.jsonl", "b.csv"):
        (tmp_path / name).write_text("text\nTo be\n")
    with pytest.raises(MiniGPTError, match=r"contains 2 tables \(\.csv, \.jsonl\)"):
        load_corpus(str(tmp_path))


def test_standard_input_is_a_document(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("über\nalles".encode())))
    assert texts_of("-", cache_dir=tmp_path) == ["über\nalles"]


# -- parts of documents -----------------------------------------------------------------------------------------------


def test_the_corpus_does_not_depend_on_the_size_of_parts(text, tmp_path, monkeypatch):
    """All kinds of line ends, blank lines, a byte order mark, no final line end; as files and as a table."""
    difficult = "\ufeff" + text.replace("\n\n", "\r\n\x0b\u2028\n", 5) + "end"
    contents = [difficult + "a", difficult + "日本" * 400]
    for name, content in zip("ab", contents, strict=True):
        (tmp_path / f"{name}.txt").write_bytes(content.encode())
    (tmp_path / "cache").mkdir()
    datasets.Dataset.from_dict({"text": contents}).to_parquet(tmp_path / "cache" / "rows.parquet")
    complete = load_corpus(str(tmp_path / "*.txt"), 0.3, cache_dir=tmp_path / "cache")
    assert "".join([*complete.train, *complete.validation]) == "".join(contents)
    monkeypatch.setattr(module, "PART_CHARACTERS", 700)
    in_parts = load_corpus(str(tmp_path / "*.txt"), 0.3, cache_dir=tmp_path / "cache")
    rows = load_corpus(str(tmp_path / "cache" / "rows.parquet"), 0.3, cache_dir=tmp_path / "cache")
    for other in (in_parts, rows):
        assert len(list(other.train.parts())) > 100
        assert max(len(part) for _, part in other.train.parts()) <= 700
        for one, again in ((complete.train, other.train), (complete.validation, other.validation)):
            assert list(one) == list(again)
            assert one.fingerprint == again.fingerprint
            for characters in (1, 699, 701, 5000):
                assert "".join(again.head(characters)) == "".join(one)[:characters]


def test_evenly_spaced_parts_cover_the_text_in_order(text, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_CHARACTERS", 500)
    folder = write_files(tmp_path, {f"{i:02}.txt": text[i * 300 : (i + 1) * 300] for i in range(100)})
    train = load_corpus(folder, 0).train
    parts = list(train.evenly_spaced(6_000))
    assert 5_000 < sum(map(len, parts)) < 8_000
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)
    assert positions[-1] > 25_000
    assert "".join(train.evenly_spaced(10**9)) == "".join(train)


# -- mixtures ---------------------------------------------------------------------------------------------------------


def test_a_mixture_has_the_requested_shares_and_repeats_no_text(tmp_path, caplog):
    caplog.set_level(logging.INFO, "minigpt_hf")
    folder = write_files(tmp_path, {"a.txt": "a" * 1000, "b.txt": "b" * 1000})
    corpus = load_corpus(f"{folder}/a.txt:3,{folder}/b.txt:1", 0.1)
    train, validation = "".join(corpus.train), "".join(corpus.validation)
    assert (train.count("a"), train.count("b")) == (900, 300)
    assert re.findall(r"the mixture uses (.*) characters of .*/(\w\.txt): it ends", caplog.text) == [
        ("300 of 900", "b.txt"),
        ("33 of 100 validation", "b.txt"),
    ]
    assert (validation.count("a"), validation.count("b")) == (100, 33)
    assert "".join(corpus.train.head(100)).count("a") == 75
    other = load_corpus(f"{folder}/a.txt:2,{folder}/b.txt:1", 0.1)
    assert other.train.fingerprint != corpus.train.fingerprint


def test_without_a_held_out_share_the_validation_splits_of_a_mixture_are_unused(tmp_path):
    for name in ("one", "two"):
        rows = {f"{split}.jsonl": json.dumps({"text": f"{name} {split}"}) for split in ("train", "validation")}
        write_files(tmp_path / name, rows)
    corpus = load_corpus(f"{tmp_path}/one:1,{tmp_path}/two:1", 0)
    assert sorted(corpus.train) == ["one train", "two train"]
    assert sorted(corpus.unused) == ["one validation", "two validation"]


@pytest.mark.parametrize("share", [None, Share(0, 1)])
def test_a_validation_split_of_the_data_that_is_not_used_is_reported(share, table, tmp_path):
    datasets.DatasetDict({"train": table, "validation": table.select([0])}).save_to_disk(tmp_path / "saved")
    description = "no validation; the validation split provided with the data is not used"
    assert load_corpus(str(tmp_path / "saved"), 0, share=share).split_description == description
    table.save_to_disk(tmp_path / "train")
    assert load_corpus(str(tmp_path / "train"), 0, share=share).split_description == "no validation"


def test_a_mixture_is_distinguished_from_a_name_with_a_comma(tmp_path, monkeypatch):
    assert mixture("plain.txt") is None
    assert mixture("user/a:config:0.7, user/b:0.3") == {"user/a:config": 0.7, "user/b": 0.3}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one,two.txt").write_text("text")
    assert texts_of("one,two.txt") == ["text"]
    for wrong in ("a:0.5,b", "a:x,b:1", "a:0,b:1", "a:-1,b:2", ",", "a:nan,b:1"):
        with pytest.raises(ValueError, match="mixture"):
            mixture(wrong)


def test_undecodable_bytes_can_be_replaced_or_ignored(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "b.txt").write_text("plain")
    with pytest.raises(ValueError, match=r"a\.txt: not utf-8 text: byte 0xe9 at position 3.*--encoding_errors replace"):
        texts_of(tmp_path)
    assert texts_of(tmp_path, encoding_errors="replace") == ["caf\ufffd au lait", "plain"]
    assert texts_of(tmp_path, encoding_errors="ignore") == ["caf au lait", "plain"]


@pytest.mark.parametrize(("errors", "what"), [("replace", "replaced by U+FFFD"), ("ignore", "dropped")])
@pytest.mark.parametrize("part", [1, 2, 3, 1_000_000])
def test_undecodable_bytes_are_counted(errors, what, part, tmp_path, monkeypatch, caplog):
    """U+FFFD in the file is not counted; of an incomplete character, every byte is."""
    monkeypatch.setattr("minigpt_hf.data.documents.PART_CHARACTERS", part)
    content = b"caf\xe9 \xe2\x82 \xff\xfe \xef\xbf\xbd \xf0\x9f"
    (tmp_path / "a.txt").write_bytes(content)
    assert texts_of(tmp_path / "a.txt", encoding_errors=errors) == [content.decode(errors=errors)]
    assert f"a.txt contains bytes that are not utf-8 text (7 {what})" in caplog.text
    (tmp_path / "b.txt").write_bytes(b"\xff" * 1000 + b"b")
    (tmp_path / "c.txt").write_text("plain")
    texts_of(tmp_path, encoding_errors=errors)
    assert f"2 files ({tmp_path / 'a.txt'}, …) contain bytes that are not utf-8 text (1,007 {what})" in caplog.text


@pytest.mark.parametrize("cached_bytes", [0, 1 << 26])
def test_undecodable_bytes_are_reported_again_when_the_index_is_cached(cached_bytes, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("minigpt_hf.data.documents.CACHED_BYTES", cached_bytes)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    for _ in range(2):
        caplog.clear()
        texts_of(tmp_path / "a.txt", encoding_errors="ignore", cache_dir=tmp_path / "cache")
        assert "a.txt contains bytes that are not utf-8 text (1 dropped)" in caplog.text


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_undecodable_bytes_of_tables_are_counted(name, tmp_path, caplog):
    rows = {"a.csv": b"text\ncaf\xe9\n\xff\xfeb\n", "a.jsonl": b'{"text": "caf\xe9"}\n{"text": "\xff\xfeb"}\n'}
    (tmp_path / name).write_bytes(rows[name])
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        assert texts_of(tmp_path / name, encoding_errors="ignore", cache_dir=tmp_path / "cache") == ["caf", "b"]
        assert f"{name} contains bytes that are not utf-8 text (3 dropped)" in caplog.text
    assert texts_of(tmp_path / name, encoding="latin-1", encoding_errors="ignore") == ["café", "ÿþb"]
    assert caplog.text.count("not utf-8 text") == 1


LAYOUTS = {
    "hub": [
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
        "validation-00000-of-00001.jsonl",
        "test-0.jsonl",
    ],
    "numbered": ["part_0.jsonl", "part_1.jsonl", "valid_0.jsonl", "eval.jsonl"],
    "folders": ["train/0.jsonl", "train/1.jsonl", "validation/0.jsonl", "test/0.jsonl"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl", "/**"])
def test_splits_are_recognized_by_words_in_the_names_of_files_and_folders(layout, pattern, tmp_path, caplog):
    names = LAYOUTS[layout]
    folder = tmp_path / "test"  # the name of the root folder is ignored
    write_files(folder, {name: json.dumps({"text": name}) for name in names})
    with caplog.at_level(logging.INFO):
        corpus = load_corpus(f"{folder}{pattern}")
    assert (list(corpus.train), list(corpus.validation)) == (names[:2], names[2:3])
    assert re.search(r"read 3 of \d files; skipped .*1 of the test split", caplog.text)
    assert f"1 files of the validation split: {names[2]}" in caplog.text
    word = {"hub": "validation", "numbered": "valid", "folders": "validation"}[layout]
    assert texts_of(f"{folder}{pattern}", split=word) == names[2:3]


def test_words_that_contain_the_name_of_a_split_do_not_indicate_one(tmp_path):
    names = ["contest.jsonl", "latest.jsonl", "developer.jsonl"]
    write_files(tmp_path, {name: json.dumps({"text": name}) for name in names})
    assert sorted(texts_of(tmp_path)) == sorted(names)


def test_text_files_indicate_splits_only_if_all_names_do(tmp_path):
    write_files(tmp_path, {"train/a.txt": "train", "test/a.txt": "test", "dev/a.txt": "dev"})
    corpus = load_corpus(str(tmp_path))
    assert (list(corpus.train), list(corpus.validation)) == (["train"], ["dev"])
    write_files(tmp_path, {"main.txt": "main"})  # as in the source code of a program
    assert sorted(texts_of(tmp_path)) == ["dev", "main", "test", "train"]


def test_a_glob_skips_and_counts_hidden_files(tmp_path, caplog):
    write_files(tmp_path, {"a.txt": "a", ".b.txt": "b", ".git/c.txt": "c", "d/e.txt": "e"})
    with caplog.at_level(logging.INFO):
        assert texts_of(tmp_path / "**" / "*.txt") == ["a", "e"]
    assert "read 2 of 4 files; skipped 2: 2 hidden" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert texts_of(tmp_path / "**") == ["a", "e"]
    assert "read 2 of 5 files; skipped 3: 2 hidden, 1 folders" in caplog.text  # a hidden folder is not counted
    assert texts_of(tmp_path / ".*.txt") == ["b"]
    assert texts_of(tmp_path / ".git" / "*") == ["c"]


def test_a_glob_counts_links_to_folders_that_it_does_not_follow(tmp_path, caplog):
    write_files(tmp_path, {"texts/a.md": "a", "texts/sub/b.md": "b", "other/c.md": "c", "other/docs/d.md": "d"})
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "texts" / ".hidden").symlink_to(tmp_path / "other")
    (tmp_path / "texts" / "loop").symlink_to("loop")
    with caplog.at_level(logging.INFO):
        assert texts_of(tmp_path / "texts" / "**" / "*.md") == ["a", "b"]
    assert "read 2 of 3 files; skipped 1: 1 links to folders" in caplog.text
    for pattern in (tmp_path / "texts" / "**", tmp_path / "texts" / "**" / "*"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert texts_of(pattern) == ["a", "b"]
        assert "1 folders, 1 links to folders" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert texts_of(tmp_path / "texts" / "*" / "*.md") == ["c", "b"]
        assert texts_of(tmp_path / "texts" / "**" / "link" / "*.md") == ["c"]
    assert "links to folders" not in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every folder")
@pytest.mark.parametrize("pattern", ["**/*.md", "*/*.md", "**"])
def test_a_folder_that_a_glob_cannot_read_is_an_error(pattern, tmp_path):
    write_files(tmp_path, {"a.md": "a", "sub/b.md": "b", "private/c.md": "c"})
    (tmp_path / "private").chmod(0)
    try:
        with pytest.raises(ValueError, match="private: cannot be read: Permission denied"):
            texts_of(tmp_path / pattern)
    finally:
        (tmp_path / "private").chmod(0o700)


def test_split_all_includes_the_validation_split_of_the_data(tmp_path, run_folder, caplog):
    rows = {"train": ["def one():\n", "    return 1\n"], "validation": ["def two():\n"]}
    write_files(tmp_path, {f"{name}.jsonl": "\n".join(json.dumps({"text": t}) for t in rows[name]) for name in rows})
    model = minigpt_hf.ModelFolder(run_folder / "model")
    scores = {split: model.evaluate(str(tmp_path), split=split) for split in ("all", "train", "validation")}
    for name in ("tokens", "bytes", "documents"):
        parts = [vars(scores[split])[name] for split in ("train", "validation")]
        assert vars(scores["all"])[name] == sum(parts)
    assert scores["all"].documents == 3
    with caplog.at_level(logging.INFO):
        assert model.evaluate(str(tmp_path), max_characters=1000).documents == 3
    assert "a score on only" in caplog.text


def test_invalid_json_is_reported_with_file_and_line(tmp_path):
    write_files(tmp_path, {"a.jsonl": '{"text": "a"}\n', "b.jsonl": '{"text": "b"}\n\n{"text": \n{"text": "c"}\n'})
    with pytest.raises(ValueError, match=r"b\.jsonl: line 3 is not JSON: "):
        texts_of(tmp_path)


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ";"), ("a.csv", "\t"), ("a.csv", "|"), ("a.tsv", ",")])
def test_a_table_with_another_delimiter_is_an_error(name, delimiter, tmp_path):
    """Otherwise entire rows, including delimiters, would be read as text."""
    (tmp_path / name).write_text(f"id{delimiter}text\n1{delimiter}one\n2{delimiter}two\n")
    with pytest.raises(ValueError, match=r"its only column is 'id.+text', so its fields appear to be separated by"):
        texts_of(tmp_path / name)


def test_how_a_table_is_interpreted_is_logged(tmp_path, caplog):
    caplog.set_level("INFO", logger="minigpt_hf")
    (tmp_path / "a.csv").write_text('id,text\n1,"one, two"\n')
    assert texts_of(tmp_path / "a.csv") == ["one, two"]
    assert "a.csv: the first row is the header, 'id', 'text'" in caplog.text
    assert "quote" not in caplog.text
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"one"\n2\ttwo "2"\n')
    assert texts_of(tmp_path / "a.tsv") == ["one", 'two "2"']
    assert "a.tsv: 1 fields in the first 1,000 lines begin with a quote" in caplog.text
    assert "fewer fields" not in caplog.text
    (tmp_path / "b.csv").write_text("id,text,label\n1,two\nlines,pos\n2,one,neg\n")
    for _ in range(2):  # also if the table is in the cache
        caplog.clear()
        assert texts_of(tmp_path / "b.csv", text_column="text") == ["two", "pos", "one"]
        assert "b.csv: 2 of the first 3 rows have fewer fields than the header" in caplog.text


def write_json_lines(file, *rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("value", [5, True, 1.10, ["a"], {"a": "b"}])
@pytest.mark.parametrize("index", [0, 200, 5000])
def test_a_value_that_is_not_a_string_is_an_error_in_any_row(value, index, tmp_path):
    """It is not converted, and no other column is used instead."""
    rows = [{"text": f"text of row {row}", "url": f"https://example.org/{row}"} for row in range(5001)]
    rows[index]["text"] = value
    write_json_lines(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(ValueError, match=rf"rows\.jsonl: line {index + 1:,}: 'text' is .*, not a string"):
        texts_of(tmp_path / "rows.jsonl")
    assert texts_of(tmp_path / "rows.jsonl", text_column="url")[-1] == "https://example.org/5000"


def test_a_column_called_text_is_never_ignored(tmp_path):
    write_json_lines(tmp_path / "rows.jsonl", {"text": 1, "url": "a"}, {"text": 2, "url": "b"})
    with pytest.raises(ValueError, match="the column 'text': contains values that are not text; columns of text: url"):
        texts_of(tmp_path / "rows.jsonl")


def test_tables_of_a_folder_whose_text_is_in_different_columns_are_an_error_unless_one_is_selected(tmp_path):
    write_json_lines(tmp_path / "1.jsonl", {"question": "a"})
    write_json_lines(tmp_path / "2.jsonl", {"answer": "b"})
    with pytest.raises(
        ValueError, match=r"different columns, 'question' in .*1.jsonl, 'answer' in .*2.jsonl; choose one"
    ):
        texts_of(tmp_path)


@pytest.mark.parametrize("odd", [5, datetime(2020, 1, 1), b"bytes"])
@pytest.mark.parametrize("first", [True, False])
def test_text_columns_of_different_types_are_an_error(odd, first, tmp_path):
    """Neither is cast to the type of the other, in either order of the files."""
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / f"{2 if first else 1}.parquet")
    pq.write_table(pa.table({"text": [odd]}), tmp_path / f"{1 if first else 2}.parquet")
    with pytest.raises(ValueError, match=r"'text'.*(of type \w+|contains values that are not text)"):
        texts_of(tmp_path)


def test_strings_that_look_like_other_types_and_rows_with_different_keys_are_read_verbatim(tmp_path):
    texts = ["2026-11-24T10:00:00Z", "1.10", "007", "null", "NaN", "2020-01-01"] * 3000
    write_json_lines(tmp_path / "1.jsonl", *[{"text": text, "date": text} for text in texts])
    write_json_lines(tmp_path / "2.jsonl", {"other": 1, "text": "last"}, {"other": [1, "x"]}, {"date": 3})
    assert texts_of(tmp_path) == [*texts, "last"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2 is not JSON: the key 'text' occurs twice"),
        ('{"text": "a"}\n{"text": "\\ud800"}\n', "row 2 contains a lone surrogate"),
        ('{"text": "a"}\n["b"]\n', "line 2 is not a JSON object"),
        ('[{"text": "a"}, 5]', "row 2 is not a JSON object"),
        ('[{"text": "a"},\n{"text": }]', "line 2 is not JSON: "),
        ('\n[{"text": "a"},\n{"text": },\n\n]', "line 3 is not JSON: "),
        ('[{"text": "a"},\n\n{"text": "b", "text": "c"}]\n', "line 1 is not JSON: the key 'text' occurs twice"),
        ('{"text": "a"}\n' + '{"a": ' * 100_000 + "\n", "line 2 is nested too deeply"),
    ],
)
def test_json_that_is_not_a_table_is_reported_with_line_or_row(content, message, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"a.json: {message}")):
        texts_of(tmp_path / "a.json")


def test_json_values_that_span_lines_and_arrays_of_strings_are_tables(tmp_path):
    values = {
        "pretty": json.dumps({"text": "a\nb"}, indent=1) * 2,
        "strings": '["a", "b"]\n["c"]',
        "one": '{"text": "a"}',
    }
    expected = {"pretty": ["a\nb", "a\nb"], "strings": ["a", "b", "c"], "one": ["a"]}
    for name, content in values.items():
        (tmp_path / f"{name}.json").write_text(content)
        assert texts_of(tmp_path / f"{name}.json") == expected[name]


def test_dictionary_encoded_and_view_columns_are_text(tmp_path):
    column = pa.array(["a", "b", "a"])
    for number, kind in enumerate((pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.string_view())):
        table = pa.table({"text": column.cast(kind) if number != 0 else column.dictionary_encode()})
        with pa.ipc.new_stream(tmp_path / f"{number}.arrow", table.schema) as writer:
            writer.write_table(table)
        assert texts_of(tmp_path / f"{number}.arrow") == ["a", "b", "a"]


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_an_arrow_stream_that_is_followed_by_another_one_is_an_error(compression, tmp_path):
    """Readers of Arrow end at the end of the first stream."""
    table, stream = pa.table({"text": ["a", "b", "c"]}), io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    compress, file = COMPRESS.get(compression, bytes), tmp_path / f"table.arrow{compression}"
    file.write_bytes(compress(stream.getvalue()))
    assert texts_of(file) == ["a", "b", "c"]
    file.write_bytes(compress(stream.getvalue()) * 2)
    with pytest.raises(MiniGPTError, match="more data follow the end of its Arrow stream, at byte"):
        texts_of(file)


def test_text_in_parquet_that_is_not_utf8_and_columns_of_equal_names_are_errors(tmp_path):
    texts = ["a"] * 12_000 + ["invalid"]  # several batches
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    content = "".join(texts).encode().replace(b"v", b"\xff")
    column = pa.StringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(content))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a\.parquet: row 12,001 is not UTF-8 text \(invalid start byte\); remove the row"
    ):
        texts_of(tmp_path / "a.parquet")
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: 2 columns are named 'text'; rename all but one"):
        texts_of(tmp_path / "b.parquet")


def test_a_split_can_be_selected_by_its_name_or_by_a_word_in_file_names(tmp_path):
    write_files(tmp_path, {f"{name}.jsonl": json.dumps({"text": name}) for name in ("train", "val")})
    for split in ("val", "validation"):
        assert texts_of(tmp_path, split=split) == ["val"]


def test_an_object_store_has_the_splits_of_a_local_folder(tmp_path):
    for name in ("train", "validation", "test"):
        rows = "".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(30))
        write_files(tmp_path, {f"{name}.jsonl": rows})
    write_files(tmp_path, {"README.md": "about the rows", ".hidden.jsonl": '{"text": "hidden"}\n'})
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path), "/bucket/rows", recursive=True)
    try:
        for pattern in ("", "/*.jsonl"):
            for settings in ({}, {"split": "test"}, {"data_format": "text"}):
                if pattern or "data_format" not in settings:
                    local, remote = (
                        load_corpus(f"{folder}{pattern}", **settings) for folder in (tmp_path, "memory://bucket/rows")
                    )
                    assert list(remote.train) == list(local.train)
                    assert list(remote.validation) == list(local.validation)
                    assert remote.split_description == local.split_description
        mixed = load_corpus("memory://bucket/rows:0.5,stdlib:0.5", 0, split="test")
        assert list(mixed.train.components[0]) == [f"test {i}" for i in range(30)]
    finally:
        store.rm("/bucket", recursive=True)


def test_a_name_in_an_object_store_may_contain_the_delimiters_of_a_url():
    store = fsspec.filesystem("memory")
    content = b'{"text": "a"}\n{"text": "b"}\n'
    store.pipe({"/bucket/rows#1.jsonl": content, "/bucket/rows?2.jsonl.gz": gzip.compress(content)})
    try:
        for name in ("bucket/rows#1.jsonl", "bucket/rows#*", "bucket/*.gz"):
            assert texts_of(f"memory://{name}") == ["a", "b"]
        assert texts_of("memory://bucket") == ["a", "b", "a", "b"]
    finally:
        store.rm("/bucket", recursive=True)


@pytest.mark.parametrize("fault", ["no rows", "damaged"])
def test_a_saved_dataset_without_rows_or_with_a_damaged_file_is_an_error(fault, table, tmp_path):
    (table.select([]) if fault == "no rows" else table).save_to_disk(tmp_path / "saved")
    if fault == "damaged":
        (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(MiniGPTError, match="a split of this saved dataset has no rows, or a file is damaged"):
        load_corpus(str(tmp_path / "saved"))


@pytest.mark.parametrize("file", ["state.json", "dataset_dict.json"])
def test_a_saved_dataset_that_names_files_outside_its_folder_is_rejected(file, table, tmp_path):
    table.save_to_disk(tmp_path / "private")
    saved = tmp_path / "saved"
    datasets.DatasetDict(train=table).save_to_disk(saved)
    if file == "state.json":
        state = json.loads((saved / "train" / file).read_text())
        name = f"../../private/{state['_data_files'][0]['filename']}"
        (saved / "train" / file).write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
    else:
        (saved / file).write_text(json.dumps({"splits": ["train", "../private"]}))
    with pytest.raises(MiniGPTError, match=r"its JSON files name a file outside the folder, .*private"):
        load_corpus(str(saved))


def test_settings_that_have_no_effect_on_binary_tables_and_datasets_are_reported(table, tmp_path, caplog):
    table.to_parquet(tmp_path / "table.parquet")
    rows = pa.table({"text": ["one", "two"]})
    with pa.ipc.new_file(str(tmp_path / "table.arrow"), rows.schema) as file:
        file.write_table(rows)
    table.save_to_disk(tmp_path / "saved")
    settings = {"encoding": "latin-1", "encoding_errors": "replace", "newline": "universal"}
    for name, more in (("table.parquet", []), ("table.arrow", []), ("saved", ["data_format"])):
        caplog.clear()
        load_corpus(str(tmp_path / name), **settings, **dict.fromkeys(more, "parquet"))
        for setting in (*settings, *more):
            assert f"--{setting} has no effect on " in caplog.text
    caplog.clear()
    load_corpus(str(tmp_path / "saved"))
    assert "no effect" not in caplog.text
