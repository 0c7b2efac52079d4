"""Files are found by their literal names and read byte for byte; skipped files are reported; the cache is never stale."""

import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import random
import re
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from minigpt_hf import evaluate
from minigpt_hf.cli import main
from minigpt_hf.data import documents as module
from minigpt_hf.data import reading
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.reading import Decoding
from minigpt_hf.data.tables import read_tables
from tests.conftest import ROOT
from tests.data.test_corpus import write_files
from tests.data.test_sources import COMPRESS, texts_of, write_table

# -- literal names ----------------------------------------------------------------------------------------------------

ODD_NAMES = ["a[1]", "x*y", "what?", "a::b", "[!a]", "{a,b}", "a:0.5,b:0.5", "50% off", "~tilde", "line\nend", "#1&2=3"]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("extension", [".txt", ".jsonl", ".csv", ".parquet", ".arrow", ".jsonl.gz"])
def test_a_name_that_exists_is_interpreted_literally(name, extension, tmp_path, monkeypatch):
    """Next to a file that the name would match as a pattern."""
    monkeypatch.chdir(tmp_path)
    for stem, content in ((name, "requested"), ("a1", "other"), ("x-y", "other"), ("what!", "other"), ("b", "other")):
        plain = tmp_path / f"plain{extension.removesuffix('.gz')}"
        if extension == ".txt":
            plain.write_text(content)
        else:
            write_table(datasets.Dataset.from_dict({"text": [content]}), plain)
        data = plain.read_bytes()
        (tmp_path / f"{stem}{extension}").write_bytes(gzip.compress(data) if extension.endswith(".gz") else data)
    assert texts_of(f"{name}{extension}") == ["requested"]
    assert texts_of(tmp_path / f"{name}{extension}") == ["requested"]


@pytest.mark.parametrize("name", ["sub[1]", "a*", "a::b"])
@pytest.mark.parametrize("extension", [".txt", ".jsonl"])
def test_names_of_a_folder_and_its_files_are_interpreted_literally(name, extension, tmp_path):
    folder = tmp_path / name
    rows = {"plain": "one", "x[y]": "two", "z*": "three"}
    files = {f"{stem}{extension}": t if extension == ".txt" else json.dumps({"text": t}) for stem, t in rows.items()}
    write_files(folder, files)
    write_files(tmp_path / "sub1", files)
    assert texts_of(folder) == ["one", "two", "three"]


def test_a_name_is_interpreted_as_a_pattern_only_if_no_file_has_it(tmp_path, caplog):
    write_files(tmp_path, {"a1.txt": "one", "a2.txt": "two", "a3.txt/x.txt": "a folder"})
    with caplog.at_level(logging.INFO):
        assert texts_of(tmp_path / "a[13].txt") == ["one"]
    assert (
        "interpreted as a pattern, because no file has this name: read 1 of 2 files; skipped 1: 1 folders"
        in caplog.text
    )


def test_names_in_a_mixture_may_contain_commas_and_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {"a,b.txt": "a" * 100, "c:d.txt": "c" * 100, "e:1,f.txt": "e" * 100})
    text = "".join(load_corpus("a,b.txt:0.5,c:d.txt:0.25, e:1,f.txt:0.25", 0).train)
    assert (text.count("a"), text.count("c"), text.count("e")) == (100, 50, 50)
    for wrong, message in (
        ("a,b.txt:1,absent,x:1", "'absent' is not a valid component"),
        ("c:1,c:2", "occurs twice"),
    ):
        with pytest.raises(ValueError, match=message):
            load_corpus(wrong)


@pytest.mark.parametrize("data", ["", "  ", "\n", " :0.5,x:0.5"])
def test_an_empty_name_is_an_error(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {"a.txt": "text"})
    with pytest.raises(ValueError, match="which is empty"):
        load_corpus(data)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_skipped_files_of_a_folder_are_reported_with_the_option_that_includes_them(tmp_path, caplog):
    names = ["README", "copyright", "x.amd64.gz", "y.1.gz", "p.png", ".hidden.txt", ".git/a.txt", "a.txt", "sub/B.TXT"]
    folder = Path(write_files(tmp_path / "texts", dict.fromkeys(names, "text")))
    (folder / "broken.txt").symlink_to("absent")
    (folder / "link").symlink_to(folder / "sub")
    os.mkfifo(folder / "pipe.txt")
    with caplog.at_level(logging.INFO):
        corpus = load_corpus(str(folder))
    assert len(list(corpus.train)) + len(list(corpus.validation)) >= 2
    (line,) = [record.getMessage() for record in caplog.records if "read 2 of" in record.getMessage()]
    assert "read 2 of 12 files; skipped 10: " in line
    for reason in ("2 without extension", "2 *.gz of unknown kind", "2 hidden"):
        assert reason in line
    assert "1 *.png, 1 broken links, 2 others" in line  # links to folders and special files
    assert line.endswith("--data_format text reads every file that is not hidden")
    assert "read 2 of 12 files" in corpus.split_description


def test_files_of_runs_and_models_below_a_folder_of_texts_are_not_read(tmp_path, caplog):
    """A training in a subfolder of its data must read the same text when it is resumed; another one not its card and code."""
    run = [
        "recipe.yaml",
        "log.jsonl",
        "samples.md",
        "checkpoint-2/config.json",
        "model/minigpt.json",
        "model/README.md",
    ]
    names = ["a.md", "sub/b.md", "sub/recipe.yaml", "model/README.md", "model/code.py", "model/minigpt.json"]
    folder = Path(write_files(tmp_path, dict.fromkeys([*names, *(f"sub/runs/x/{name}" for name in run)], "text")))
    with caplog.at_level(logging.INFO):
        assert len(texts_of(str(folder))) == 3
    assert "read 3 of 12 files; skipped 9: 9 of runs and models" in caplog.text
    assert len(texts_of(f"{folder}/**/*.md")) == 2
    assert len(texts_of(f"{folder}/**")) == 3
    for named in (f"{folder}/model/*.md", f"{folder}/sub/runs/*/*.md", f"{folder}/model/code.py"):
        assert texts_of(named) == ["text"]  # asked for


def test_data_format_text_reads_every_file_that_is_not_hidden(tmp_path, caplog):
    files = {"README": "1", "copyright": "2", "data.csv": "text\n3", "x.amd64": "4", "y.txt": "5", ".h": "no", "z": ""}
    folder = write_files(tmp_path, files)
    (tmp_path / "w.amd64.gz").write_bytes(gzip.compress(b"6"))
    with caplog.at_level(logging.INFO):
        assert sorted(texts_of(folder, data_format="text")) == ["1", "2", "4", "5", "6", "text\n3"]
    assert "read 7 of 8 files; skipped 1: 1 hidden" in caplog.text
    assert "1 of 7 files have no text and are skipped" in caplog.text


def test_splits_and_documentation_next_to_tables_are_reported(tmp_path, caplog):
    rows = {f"{name}.jsonl": json.dumps({"text": name}) for name in ("train", "validation", "test")}
    folder = write_files(tmp_path, {**rows, "README.md": "about"})
    with caplog.at_level(logging.INFO):
        corpus = load_corpus(folder)
    assert (list(corpus.train), list(corpus.validation)) == (["train"], ["validation"])
    assert "read 2 of 4 files; skipped 2: 1 named README or LICENSE, 1 of the test split" in caplog.text
    assert texts_of(folder, split="test") == ["test"]
    with pytest.raises(ValueError, match="no file for --data_split dev; there are test, train, validation"):
        texts_of(folder, split="dev")


def test_data_split_of_files_is_an_error_and_text_column_without_effect_is_reported(tmp_path, caplog):
    write_files(tmp_path, {"a.txt": "text", "b.jsonl": '{"text": "row"}'})
    for name in ("a.txt", "b.jsonl"):
        with pytest.raises(ValueError, match=r"--data_split train\[:5%\]: only datasets have splits"):
            texts_of(tmp_path / name, split="train[:5%]")
    assert texts_of(tmp_path / "a.txt", text_column="body") == ["text"]
    assert "--text_column body has no effect" in caplog.text


def test_the_model_folder_states_how_many_files_were_read(recipe_file, text, tmp_path, capfd):
    folder = write_files(
        tmp_path / "data", {"a.txt": text[:3000], "b.txt": text[3000:6000], "README": "x", "c.bin": "x"}
    )
    run = tmp_path / "run"
    argv = ["train", "--recipe", str(recipe_file), "--data", folder, "--output_dir", str(run), "--max_steps", "2"]
    assert main([*argv, "--eval_steps", "1", "--save_steps", "1"]) == 0
    assert "read 2 of 4 files; skipped 2" in capfd.readouterr().err
    assert "read 2 of 4 files" in json.loads((run / "model" / "minigpt.json").read_text())["data"]["cut"]


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["", *COMPRESS])
def test_every_byte_is_preserved(compression, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_CHARACTERS", 8)  # parts end between any two characters for some shift
    content = "\ufeffa\r\nb\rc\n\r\n\x0b\x0c\x1c\x85\u2028\u2029\0\x1a€😀 end\r".encode()
    for padding in range(8):
        data = b"x" * padding + content
        file = tmp_path / f"{padding}.txt{compression}"
        file.write_bytes(COMPRESS[compression](data) if compression else data)
        assert "".join(texts_of(file)).encode() == data


@pytest.mark.parametrize("size", [8, 13, 40])
def test_chunks_end_after_the_last_line_end_before_a_character_that_is_not_white_space(size, tmp_path):
    source = random.Random(size)
    for _ in range(200):
        text = "".join(source.choices(["a", "b", " ", "\n", "\r\n", "\n\n", "\t", "\x1c", "é"], k=150))
        (tmp_path / "a.txt").write_bytes(text.encode())
        chunks = list(reading.text_chunks(str(tmp_path / "a.txt"), "a.txt", Decoding(), size))
        assert "".join(chunks) == text
        position = 0
        for chunk in chunks[:-1]:
            window = text[position : position + size]
            ends = [match.end() for match in re.finditer(r"\n(?=\S)", window) if match.start() >= size - size // 2]
            assert len(chunk) == (ends[-1] if ends else size)
            position += len(chunk)


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("newline", ["preserve", "universal"])
def test_the_digest_of_a_file_is_that_of_its_text_in_utf_8(encoding, errors, newline, tmp_path):
    """Bytes are hashed without encoding the text again if they are the same; chunks divide characters."""
    text = "a\r\nb\0é\r" * 40 if encoding == "latin-1" else "\ufeffa\r\nb\0é€😀\r" * 40
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    for size in (1, 2, 3, 7, 1000):
        digest, statistics = hashlib.sha256(), reading.DecodingStatistics()
        decoding = Decoding(encoding, errors, newline)
        chunks = reading.decoded(str(tmp_path / "a.txt"), "a.txt", decoding, size, statistics, digest)
        read = "".join(chunks)
        assert digest.digest() == hashlib.sha256(read.encode()).digest()
        assert statistics.zeros == read.count("\0") == 40
        found = texts_of(tmp_path / "a.txt", encoding=encoding, encoding_errors=errors, newline=newline)
        assert found == [read]


def test_standard_input_and_file_descriptors_are_read_byte_for_byte(tmp_path, monkeypatch):
    """A shell replaces `<(command)` by `/dev/fd/N`."""
    content = "\ufeffa\r\nb\rc\n€\0".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert "".join(texts_of("-", cache_dir=tmp_path)).encode() == content
    reader, writer = os.pipe()
    os.write(writer, content + b"\xff")
    os.close(writer)
    with pytest.raises(ValueError, match=f"/dev/fd/{reader}: not utf-8 text: byte 0xff at position {len(content)}"):
        load_corpus(f"/dev/fd/{reader}", cache_dir=tmp_path)
    os.close(reader)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="standard input is available to only one of several processes"):
        load_corpus("-")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 1000])
def test_universal_newlines_equal_those_of_python(size, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "PART_CHARACTERS", size)
    text = "a\r\n\r\nb\rc\n\r\r\n\nd\u2028e\r"
    (tmp_path / "a.txt").write_bytes(text.encode())
    with caplog.at_level(logging.INFO):
        assert "".join(texts_of(tmp_path / "a.txt", newline="universal")) == (tmp_path / "a.txt").read_text()
    assert "converted 6 line endings (CRLF, CR) to LF" in caplog.text
    with pytest.raises(ValueError, match="newline is 'unix': it must be one of preserve, universal"):
        texts_of(tmp_path / "a.txt", newline="unix")


def test_bits_per_byte_refer_to_the_bytes_of_the_file_and_evaluate_reads_like_training(
    recipe_file, text, tmp_path, capfd
):
    crlf = text[:6000].replace("\n", "\r\n")
    file = tmp_path / "crlf.txt"
    file.write_bytes(crlf.encode())
    for newline, size in (("preserve", len(crlf.encode())), ("universal", len(text[:6000].encode()))):
        run = tmp_path / newline
        argv = [
            "train",
            "--recipe",
            str(recipe_file),
            "--data",
            str(file),
            "--output_dir",
            str(run),
            "--max_steps",
            "2",
        ]
        assert main([*argv, "--newline", newline, "--eval_steps", "1", "--save_steps", "1"]) == 0
        data = json.loads((run / "model" / "minigpt.json").read_text())["data"]
        assert data["train"]["bytes"] + data["validation"]["bytes"] == size
        assert evaluate(run / "model", str(file)).bytes == size
    assert evaluate(run / "model", str(file), newline="preserve").bytes == len(crlf.encode())


@pytest.mark.parametrize("compression", ["", *COMPRESS])
@pytest.mark.parametrize(
    ("encoding", "good", "bad", "offset"),
    [
        ("utf-8", "é€", b"\xff", 0),
        ("utf-8", "é€", b"\xe2\x82", 0),  # truncated at the end of the file
        ("utf-8-sig", "é€", b"\xff", 3),
        ("utf-16", "é€", b"\x00\xdc", 2),
        ("shift_jis", "日本", b"\xff", 0),
        ("cp1252", "é€", b"\x81", 0),
    ],
)
def test_undecodable_bytes_are_reported_with_their_position(compression, encoding, good, bad, offset, tmp_path):
    data = (good * 500_000).encode(encoding) + bad
    assert data.decode(encoding, "replace")[:2] == good
    file = tmp_path / f"bad.txt{compression}"
    file.write_bytes(COMPRESS[compression](data) if compression else data)
    position = len(data) - len(bad)
    message = rf"bad\.txt{compression}: not {encoding} text: byte {data[position]:#04x} at position {position};"
    with pytest.raises(ValueError, match=message):
        load_corpus(str(file), encoding=encoding)


@pytest.mark.parametrize("encoding", ["rot13", "base64", "hex", "zlib", "bz2", "uu", "undefined", "", "a\0b", "utf-9"])
def test_codecs_that_do_not_decode_text_are_errors(encoding, text_file):
    with pytest.raises(ValueError, match=r"encoding .* (is unknown|does not decode bytes to text); try utf-8"):
        load_corpus(str(text_file), encoding=encoding)


def test_byte_order_marks_zero_characters_and_lone_surrogates_are_reported(tmp_path, caplog):
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbftext")
    assert texts_of(tmp_path / "mark.txt") == ["\ufefftext"]
    assert (
        "mark.txt begins with a byte order mark, which is read as the character U+FEFF; --encoding utf-8-sig"
        in caplog.text
    )
    assert texts_of(tmp_path / "mark.txt", encoding="utf-8-sig") == ["text"]
    (tmp_path / "wide.txt").write_bytes("text".encode("utf-16-le"))
    texts_of(tmp_path / "wide.txt")
    assert (
        "wide.txt contains zero characters (U+0000), so the data may be UTF-16 (use --encoding utf-16)" in caplog.text
    )
    (tmp_path / "half.txt").write_bytes(rb"a\ud800b")
    with pytest.raises(ValueError, match=r"half\.txt: contains U\+D800, a lone surrogate"):
        texts_of(tmp_path / "half.txt", encoding="unicode_escape")


# -- identification by content ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extension", [".txt", ".txt.gz", ".txt.zst", ".csv", ".jsonl", ".jsonl.gz", ".parquet", ".arrow"]
)
def test_changed_content_is_read_although_size_and_time_are_unchanged(extension, tmp_path):
    kinds = extension.split(".")[1:]

    def write(text: str) -> Path:
        plain = tmp_path / f"a.{kinds[0]}"
        if kinds[0] == "txt":
            plain.write_text(text)
        else:
            write_table(datasets.Dataset.from_dict({"text": [text]}), plain)
        if len(kinds) > 1:
            packed = tmp_path / f"a{extension}"
            packed.write_bytes(COMPRESS[f".{kinds[1]}"](plain.read_bytes()))
            plain.unlink()
            return packed
        return plain

    sizes, fingerprints = set(), set()
    for text in ("one text", "two text", "one text"):
        file = write(text)
        os.utime(file, (1, 1))
        corpus = load_corpus(str(file), 0, cache_dir=tmp_path / "cache")
        assert list(corpus.train) == [text]
        sizes.add(file.stat().st_size)
        fingerprints.add(corpus.train.fingerprint)
    assert len(fingerprints) == 2
    assert len(sizes) == 1 or extension in (".txt.gz", ".parquet")


@pytest.mark.parametrize("change", ["append", "replace", "truncate", "remove"])
def test_a_file_that_changes_between_indexing_and_reading_is_an_error(change, tmp_path):
    file = tmp_path / "growing.log"
    file.write_text("line\n" * 1000)
    corpus = load_corpus(str(file), 0.1)
    if change == "append":
        file.open("a").write("x")
    elif change == "replace":
        file.write_text("LINE\n" * 1000)
    elif change == "truncate":
        os.truncate(file, 4999)
    else:
        file.unlink()
    for part in (corpus.train, corpus.train.head(10), corpus.validation):
        with pytest.raises(ValueError, match=r"growing\.log: (changed while it was being read|cannot be read)"):
            list(part)


# -- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", [".csv", ".tsv"])
def test_csv_fields_are_read_verbatim(extension, tmp_path):
    tab = "\t" if extension == ".tsv" else ","
    fields = [
        "NA",
        "null",
        "nan",
        "None",
        "007",
        "1.10",
        "True",
        " x ",
        "a\r\nb",
        "c\rd",
        'say "hi"',
        "a,\tb",
        "1e5",
        "N/A",
    ]
    quoted = ['"' + field.replace('"', '""') + '"' for field in fields]
    lines = [
        f"id{tab}text",
        *(f"{i}{tab}{field}" for i, field in enumerate([*quoted, '""', ""])),
        f"9{tab}NA",
        "",
        "10",
    ]
    file = tmp_path / f"rows{extension}"
    file.write_bytes("\r\n".join(lines).encode())
    assert texts_of(file) == [*fields, "NA"]
    file.write_text(f"text{tab}\none{tab}\n{tab}\ntwo{tab}{tab}{tab}\n")  # empty fields beyond the header are ignored
    assert texts_of(file) == ["one", "two"]
    file.write_bytes(b"\xef\xbb\xbf" + "\n".join(f"{field}{tab}x" for field in ["text", *quoted]).encode("utf-8"))
    assert texts_of(file) == fields


def test_the_text_column_of_csv_is_detected(tmp_path):
    write_files(tmp_path, {"a.csv": "n,body,score\n1,hello,\n2,7,NA\n", "n.csv": "n,m\n007,1\n08,2\n"})
    assert texts_of(tmp_path / "a.csv") == ["hello", "7"]
    with pytest.raises(ValueError, match=r"no column contains text; columns of text: none"):
        texts_of(tmp_path / "n.csv")
    assert texts_of(tmp_path / "n.csv", text_column="n") == ["007", "08"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\nhello, world\n", r"a\.csv: the row that ends on line 2 has 2 fields and the header 1; quote fields"),
        (
            "id,text\n1,two\nlines\n2,one\n",
            r"a\.csv: row 2 has 1 of the 2 fields of the header, and not the column 'text'; quote fields",
        ),
        ("text,text\na,b\n", r"a\.csv: 2 columns are named 'text'"),
        ('text\n"never closed\nmore\n', r"a\.csv: line 3: unexpected end of data"),
        ("text\n", r"a\.csv: contains no text"),
        ("", r"a\.csv: contains no text: the table has no rows"),
        (b"text\ncaf\xe9\n", r"a\.csv: not utf-8 text: byte 0xe9 at position 8"),
    ],
)
def test_invalid_csv_is_an_error(content, message, tmp_path):
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_corpus(str(tmp_path / "a.csv"))


def test_undecodable_bytes_are_detected_in_json(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "caf\xe9"}\r\n{"text": "a\\r\\nb"}\n{"text": null}\n{}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: not utf-8 text: byte 0xe9 at position 13"):
        texts_of(file)
    assert texts_of(file, encoding_errors="replace") == ["caf\ufffd", "a\r\nb"]
    assert texts_of(file, encoding="latin-1") == ["café", "a\r\nb"]
    file.write_bytes('{"text": "é"}\n'.encode("utf-16"))
    assert texts_of(file, encoding="utf-16") == ["é"]
    file.write_bytes('{"text": "é"}\n'.encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"a\.jsonl: not utf-16 text: UTF-16 stream does not start with BOM"):
        texts_of(file, encoding="utf-16")


def test_a_table_that_changes_after_its_columns_were_read_is_an_error(tmp_path):
    file = tmp_path / "growing.jsonl"
    file.write_text('{"text": "a"}\n')

    def choose_column(*columns):
        file.write_text('{"text": "a"}\n{"text": "b"}\n')
        return "text"

    with pytest.raises(ValueError, match=r"growing\.jsonl: changed while it was being read"):
        read_tables("json", [str(file)], {}, Decoding(), tmp_path / "cache", choose_column)


def test_skipped_rows_are_counted(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": ""}\n{"text": "b"}\n')
    with caplog.at_level(logging.INFO):
        assert texts_of(tmp_path / "a.jsonl") == ["a", "b"]
    assert "2 of 4 rows have no text and are skipped" in caplog.text


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_all_arrow_string_types_are_text(kind, tmp_path):
    import pyarrow.parquet as pq

    table = pa.table({"text": pa.array(["one", None, "zwei €"], kind), "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "A.PARQUET")
    assert texts_of(tmp_path / "A.PARQUET") == ["one", "zwei €"]
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert texts_of(tmp_path / "a.arrow") == ["one", "zwei €"]


def test_a_table_with_the_wrong_extension_is_an_error(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    for name in ("a.jsonl", "a.csv", "a.arrow", "a.txt"):
        (tmp_path / name).write_bytes(content + b"\xff")
        with pytest.raises(ValueError, match=name):
            texts_of(tmp_path / name)


# -- hostile files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESS)
def test_all_frames_are_read_and_a_damaged_file_is_an_error(compression, tmp_path):
    compress = COMPRESS[compression]
    rows = [json.dumps({"text": np.random.default_rng(i).bytes(3000).hex()}) + "\n" for i in (0, 1)]
    for extension in (".txt", ".jsonl"):
        padding = b"" if compression == ".zst" else b"\0" * 8
        file = tmp_path / f"a{extension}{compression}"
        packed = b"".join(compress(row.encode()) + padding for row in rows)
        file.write_bytes(packed)
        assert "".join(texts_of(file)).count("".join(rows) if extension == ".txt" else json.loads(rows[1])["text"]) == 1
        for damaged in (packed[:-20], packed[: len(packed) * 3 // 4], packed + b"garbage"):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"a{extension}{compression}: cannot be read"):
                texts_of(file)


@pytest.mark.parametrize("name", ["bomb.txt.gz", "bomb.txt.zst", "bomb.txt.xz", "bomb.jsonl.gz", "bomb.csv.zst"])
def test_a_file_that_expands_excessively_is_an_error(name, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "EXPANSION_CHECKED_ABOVE_BYTES", 1_000_000)
    file = tmp_path / name
    file.write_bytes(COMPRESS[file.suffix](b"0" * 3_000_000))
    with pytest.raises(ValueError, match=rf"{name}: its .* bytes expand more than 100-fold .* decompress it"):
        load_corpus(str(file), cache_dir=tmp_path / "cache")
    file.write_bytes(COMPRESS[file.suffix](b"0" * 900_000))
    if ".txt" in name:
        assert load_corpus(str(file), 0).train.characters == 900_000


def peak_of(data: Path) -> tuple[int | str, int]:
    """Return the number of characters read, or the error message, and the peak of allocated bytes."""
    tracemalloc.start()
    try:
        corpus = load_corpus(str(data), 0.1)
        result = sum(len(text) for part in (corpus.train, corpus.validation) for _, text in part.parts())
    except ValueError as error:
        result = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, peak


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_memory_does_not_depend_on_the_length_of_a_line(compression, tmp_path):
    file = tmp_path / f"line.txt{compression}"
    data = np.random.default_rng(0).integers(97, 123, 20_000_000, dtype=np.uint8).tobytes()
    file.write_bytes(gzip.compress(data, 1) if compression else data)
    del data
    characters, peak = peak_of(file)
    assert characters == 20_000_000
    assert peak < 12_000_000


def test_memory_is_bounded_for_a_decompression_bomb(tmp_path):
    file = tmp_path / "bomb.txt.gz"
    with gzip.open(file, "wb") as bomb:
        for _ in range(300):
            bomb.write(b"0" * 1_000_000)
    error, peak = peak_of(file)
    assert "bomb.txt.gz: its" in error
    assert peak < 12_000_000


def test_special_files_are_errors_and_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        for name, kind in (("/dev/zero", "device"), ("pipe.txt", "named pipe"), ("socket.txt", "socket")):
            with pytest.raises(ValueError, match=f"{name}: is a {kind}, not a regular file"):
                load_corpus(name)
        write_files(tmp_path / "folder", {"a.txt": "text"})
        os.mkfifo("folder/b.txt")
        (tmp_path / "folder" / "loop").symlink_to(tmp_path / "folder")
        (tmp_path / "folder" / "zero.txt").symlink_to("/dev/zero")
        assert texts_of("folder") == ["text"]
        assert texts_of("folder", data_format="text") == ["text"]
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "gone.txt").symlink_to("absent")
    for name in ("self.txt", "gone.txt"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            load_corpus(name)


def test_names_with_invalid_utf8_or_line_ends_are_escaped_in_messages(recipe_file, text, tmp_path, capfd):
    folder = tmp_path / "data"
    folder.mkdir()
    names = [b"a\xff.txt", b"b\nc.txt", b"d.x\xff", b"e.y\nz"]
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(b"\xef\xbb\xbf" + text[:4000].encode())
    argv = [
        "train",
        "--recipe",
        str(recipe_file),
        "--max_steps",
        "2",
        "--eval_steps",
        "1",
        "--save_steps",
        "1",
        "--data",
    ]
    assert main([*argv, str(folder), "--output_dir", str(tmp_path / "run")]) == 0
    err = capfd.readouterr().err
    assert r"skipped 2: 1 *.x\udcff, 1 *.y\nz" in err
    one = os.fsdecode(os.fsencode(folder) + b"/" + names[0])
    assert main([*argv, one, "--output_dir", str(tmp_path / "one")]) == 0
    json.loads((tmp_path / "one" / "model" / "minigpt.json").read_text(encoding="utf-8"))
    assert r"a\udcff.txt begins with a byte order mark" in capfd.readouterr().err
    (folder / "é\nname.txt").write_bytes(b"\xff")
    assert main([*argv, str(folder), "--output_dir", str(tmp_path / "other")]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("minigpt train: ")]
    assert r"é\nname.txt: not utf-8 text" in line


def test_reading_many_files_takes_linear_time(tmp_path):
    """Measured in function calls: 2,000 files take at most about 10 times the calls of 200."""

    def calls(number: int) -> int:
        folder = tmp_path / str(number)
        folder.mkdir()
        for i in range(number):
            (folder / f"{i}.txt").write_text(f"document {i}")
        count = 0

        def trace(frame, event, arg):
            nonlocal count
            count += 1

        sys.setprofile(trace)
        try:
            corpus = load_corpus(str(folder))
            found = len(list(corpus.train)) + len(list(corpus.validation))
        finally:
            sys.setprofile(None)
        assert found == number
        return count

    calls(20)
    assert calls(2000) < 12 * calls(200)


@pytest.mark.slow
def test_processes_that_read_the_same_text_compute_the_same_fingerprint(tmp_path, text):
    folder = write_files(tmp_path / "data", {f"{i}.txt": text[i * 100 : i * 100 + 90] + "\r\n" for i in range(40)})
    code = (
        "import sys; from minigpt_hf.data.corpus import load_corpus\n"
        "corpus = load_corpus(sys.argv[1]); print(corpus.train.fingerprint, corpus.validation.fingerprint)"
    )
    corpus = load_corpus(folder)
    env = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONUTF8": "0"}
    out = subprocess.check_output([sys.executable, "-c", code, folder], env=env, cwd=ROOT, text=True)
    assert out.split() == [corpus.train.fingerprint, corpus.validation.fingerprint]


def test_xz_streams_are_separated_by_padding_of_four_bytes(tmp_path):
    streams = [lzma.compress(text) for text in (b"one ", b"two")]
    for padding in (0, 4, 8, 1 << 17):
        (tmp_path / "a.txt.xz").write_bytes((b"\0" * padding).join(streams) + b"\0" * padding)
        assert texts_of(tmp_path / "a.txt.xz") == ["one two"]
    for content in (streams[0] + b"\0\0\0" + streams[1], streams[0] + b"\0\0", b"\0\0\0\0" + streams[0]):
        (tmp_path / "a.txt.xz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.txt\.xz: cannot be read: it is damaged between two streams"):
            texts_of(tmp_path / "a.txt.xz")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"one", lzma.FORMAT_ALONE))
    with pytest.raises(ValueError, match=r"a\.txt\.xz: cannot be read"):
        texts_of(tmp_path / "a.txt.xz")
