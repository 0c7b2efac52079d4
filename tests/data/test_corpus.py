"""Text is read as documents and divided into training and validation splits without common documents."""

import functools
import gzip
import http.server
import json
import threading
from pathlib import Path

import datasets
import pytest

from minigpt_hf.cli import main
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.documents import IndexedDocuments
from minigpt_hf.errors import MiniGPTError


def write_files(folder, texts: dict[str, str]):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def test_a_file_is_one_document_and_its_tail_is_validation(text, text_file):
    corpus = load_corpus(str(text_file))
    boundary = int(len(text) * 0.9)
    assert list(corpus.train) == [text[:boundary]]
    assert list(corpus.validation) == [text[boundary:]]
    assert corpus.split_description == f"the last {len(text) - boundary:,} of {len(text):,} characters"


def test_the_split_of_few_documents_may_divide_a_document(tmp_path):
    folder = write_files(tmp_path / "a", {"1.txt": "abcde", "2.txt": "fghij"})
    inside = load_corpus(folder, validation_fraction=0.3)
    assert (list(inside.train), list(inside.validation)) == (["abcde", "fg"], ["hij"])
    between = load_corpus(folder, validation_fraction=0.5)
    assert (list(between.train), list(between.validation)) == (["abcde"], ["fghij"])


def test_a_folder_is_read_in_order_without_hidden_empty_or_other_files(tmp_path):
    files = {"b.txt": "B", "a/c.md": "C", ".hidden.txt": "no", ".git/x.txt": "no", "empty.txt": "", "p.png": "no"}
    corpus = load_corpus(write_files(tmp_path, files), validation_fraction=0)
    assert list(corpus.train) == ["C", "B"]
    assert corpus.validation is None


def test_of_many_documents_a_tenth_is_held_out_by_content_hash(tmp_path):
    texts = [f"document {i}\n" * (i + 1) for i in range(40)]
    one = load_corpus(write_files(tmp_path / "one", {f"{i:02}.txt": text for i, text in enumerate(texts)}))
    other = load_corpus(write_files(tmp_path / "other", {f"{40 - i:02}.txt": text for i, text in enumerate(texts)}))
    assert len(one.validation) == 4
    assert sorted([*one.train, *one.validation]) == sorted(texts)
    assert list(one.validation) == list(other.validation)
    assert one.validation.fingerprint != one.train.fingerprint


def test_copies_of_a_document_are_in_the_same_split(tmp_path):
    texts = {f"{i:02}.txt": f"document {i % 20}" for i in range(60)}
    corpus = load_corpus(write_files(tmp_path, texts))
    assert set(corpus.train).isdisjoint(corpus.validation)
    assert len(corpus.validation) == 6  # a tenth of 20 distinct documents, three copies of each


def test_the_head_is_a_prefix_of_the_text_and_the_fingerprint_depends_on_the_content(tmp_path):
    corpus = load_corpus(write_files(tmp_path, {"1.txt": "abcde", "2.txt": "fghij"}), validation_fraction=0.3)
    complete = "".join(corpus.train)
    for characters in range(1, 12):
        head = corpus.train.head(characters)
        assert "".join(head) == complete[:characters]
        assert head.characters == min(characters, len(complete))
    assert "".join(corpus.validation.head(2)) == "hi"
    assert len({corpus.train.head(n).fingerprint for n in (3, 4, 5, 6)}) == 4


def test_the_standard_library_provides_several_megabytes_of_text():
    corpus = load_corpus("stdlib")
    assert isinstance(corpus.train, IndexedDocuments)
    assert corpus.train.characters > 3_000_000
    assert any("class ArgumentParser" in text for part in (corpus.train, corpus.validation) for text in part)
    assert not any("import pytest" in text for text in corpus.train)


def test_a_url_is_read_like_a_file(text, text_file, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # the server is on loopback
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=text_file.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        corpus = load_corpus(f"http://127.0.0.1:{server.server_port}/{text_file.name}")
        with pytest.raises(ValueError, match="cannot be read"):
            load_corpus(f"http://127.0.0.1:{server.server_port}/absent.txt")
        server.shutdown()
    assert "".join([*corpus.train, *corpus.validation]) == text


def test_a_url_has_the_format_of_its_extension_and_changed_content_is_downloaded_again(tmp_path, monkeypatch):
    """The server sends no ETag, so only the content shows the change."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # the server is on loopback
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for text in ("one\r\n", "two\r\n"):
            (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
            (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
            (tmp_path / "c.csv").write_bytes(f'text\n"{text}"\n'.encode())
            for name in ("a.txt.gz?download=1", "b.jsonl.gz", "c.csv"):
                assert list(load_corpus(f"{url}/{name}", 0, cache_dir=tmp_path / "cache").train) == [text]
        (tmp_path / "bad.txt").write_bytes(b"\xff")
        with pytest.raises(ValueError, match=f"{url}/bad.txt: not utf-8 text: byte 0xff at position 0"):
            load_corpus(f"{url}/bad.txt")
        server.shutdown()


def test_a_connection_that_is_lost_during_a_download_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # the server is on loopback

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(b"line\n")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/lines.txt"
        with pytest.raises(MiniGPTError, match=r"lines\.txt: cannot be read: .*payload"):
            load_corpus(url, 0, cache_dir=tmp_path / "cache")
        server.shutdown()


def test_a_damaged_copy_of_a_url_is_downloaded_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # the server is on loopback
    content, requests = b"".join(b"line %d\n" % i for i in range(1000)), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"1"')
            self.end_headers()

        def do_GET(self):
            requests.append(self.path)
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/lines.txt"
        texts = lambda: list(load_corpus(url, 0, cache_dir=tmp_path / "cache").train)  # noqa: E731
        assert texts() == texts() == [content.decode()]
        assert len(requests) == 1
        copies = [
            file
            for folder in (tmp_path, Path(datasets.config.HF_DATASETS_CACHE))
            for file in folder.rglob("*")
            if file.is_file() and file.read_bytes() == content
        ]
        for copy in copies:
            copy.write_bytes(content[: len(content) // 10])
        assert texts() == [content.decode()]
        server.shutdown()
    assert len(requests) == 2 and "the cached copy of a remote file is damaged" in caplog.text


def test_the_access_token_in_a_url_is_not_stored_in_a_prepared_text(text_file, tmp_path, monkeypatch):
    """Nor in a model folder, which names its text in the same way."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # the server is on loopback
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=text_file.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"127.0.0.1:{server.server_port}/{text_file.name}"
        argv = ["tokenize", "--tokenizer", "bytes", "--data", f"http://user:secret@{url}?token=secret"]
        assert main([*argv, "--output_dir", str(tmp_path / "prepared")]) == 0
        server.shutdown()
    stored = (tmp_path / "prepared" / "prepared.json").read_text()
    assert json.loads(stored)["name"] == f"http://{url}" and "secret" not in stored


def test_another_encoding_can_be_specified(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("café au lait".encode("latin-1"))
    assert "".join(load_corpus(str(file), 0, encoding="latin-1").train) == "café au lait"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.txt", "no such file or folder"),
        (lambda folder: folder, "no text file or table in this folder"),
        (lambda folder: (folder / "empty.txt").write_text("") or folder / "empty.txt", "contains no text"),
        (
            lambda folder: (folder / "bad.txt").write_bytes(b"abc\xff\xfe") and folder / "bad.txt",
            r"bad.txt: not utf-8 text: byte 0xff at position 3; specify its encoding",
        ),
    ],
)
def test_unreadable_data_is_an_error_that_names_it(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_corpus(str(make(tmp_path)))


def test_an_unknown_encoding_and_an_invalid_fraction_are_errors(text_file):
    with pytest.raises(ValueError, match="encoding 'utf-9' is unknown"):
        load_corpus(str(text_file), encoding="utf-9")
    with pytest.raises(ValueError, match=r"validation_fraction is 1\.0"):
        load_corpus(str(text_file), 1.0)


def write_documents(folder, texts: list[str]) -> str:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_text(text)
    return str(folder)


def test_a_warning_is_logged_if_the_held_out_share_differs_much_from_the_requested_one(tmp_path, caplog):
    words = [f"document {number:02}\n" * 10 for number in range(30)]
    load_corpus(write_documents(tmp_path / "alike", words))
    assert "held out" not in caplog.text
    held_out = next(iter(load_corpus(str(tmp_path / "alike")).validation))
    copies = write_documents(tmp_path / "copies", [*words, *[held_out] * 60])
    corpus = load_corpus(copies)
    share = 100 * corpus.validation.characters / (corpus.validation.characters + corpus.train.characters)
    assert share > 60
    total = corpus.validation.characters + corpus.train.characters
    assert f"{share:.3g}% of its characters are held out, while --validation_fraction requests 10%" in caplog.text
    assert f"only {corpus.train.characters:,} of {total:,} characters remain for training" in caplog.text
    caplog.clear()
    load_corpus(copies, 0.6)
    assert "remain for training" not in caplog.text
