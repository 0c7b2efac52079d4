"""Translation and summarization of package descriptions, from files of the format of a Debian mirror."""

import os
import re
from hashlib import md5

import pytest

from minigpt_hf.cli import main
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.tasks import build
from minigpt_hf.tasks.debian import MAX_CHARACTERS
from minigpt_hf.tasks.task import SPLITS

PACKAGES = 240


def stanza(**fields):
    return "".join(f"{name.replace('_', '-')}: {value}\n" for name, value in fields.items()) + "\n"


@pytest.fixture
def source(tmp_path):
    """Three packages of each source package; sources `tool7-…` and `tool8-…` differ in the version only."""
    folder = tmp_path / "lists"
    folder.mkdir()
    packages, english, italian = [], [], []
    for number in range(PACKAGES):
        kind = "abcdefghij"[number // 6 % 10] + "abcdefghij"[number // 60]
        name, short = f"lib{kind}{number}", f"Library {number} for {kind}"
        long = f" First paragraph {number},\n second line. It has two sentences.\n .\n Last paragraph.\n"
        digest = md5(f"{short}{long}".encode()).hexdigest()
        packages.append(stanza(Package=name, Source=f"tool-{kind}-{number // 3 % 2 + 7}.1 (2.0-1)", Version="2.0"))
        english.append(f"Package: {name}\nDescription-md5: {digest}\nDescription-en: {short}\n{long}\n")
        if number % 10:
            text = short if number % 10 == 5 else f"libreria {number} per {kind} è"
            italian.append(f"Package: {name}\nDescription-md5: {digest}\nDescription-it: {text}\n Testo.\n\n")
        else:  # of an older description
            italian.append(f"Package: {name}\nDescription-md5: {'0' * 32}\nDescription-it: vecchia\n Testo.\n\n")
    (folder / "mirror_binary-amd64_Packages").write_text("".join(packages))
    (folder / "mirror_Translation-en").write_text("".join(english))
    (folder / "mirror_Translation-it").write_text("".join(italian), encoding="utf-8")
    return folder


def all_rows(task):
    return [each for split in SPLITS for each in task.rows[split]]


def test_synopses_are_paired_with_translations_of_the_same_description(source):
    task = build("translation", source=source)
    answers = {each["prompt"]: each["completion"] for each in all_rows(task)}
    assert answers["Library 1 for aa"] == "libreria 1 per aa è"
    assert len(answers) == PACKAGES * 8 // 10  # without outdated translations and those that equal the original
    assert task.metric == "chrf"


def test_packages_of_one_source_in_any_version_are_in_one_split(source):
    for task in (build("translation", source=source), build("synopsis", source=source)):
        kinds = []
        for split in SPLITS:
            kinds.append({re.search(r"\b[a-j]{2}\b", " ".join(each.values()))[0] for each in task.rows[split]})
        assert all(kinds) and sum(map(len, kinds)) == PACKAGES // 6


def test_the_split_is_determined_by_the_seed(source):
    assert build("translation", 1, source).rows == build("translation", 1, source).rows
    assert build("translation", 1, source).rows["test"] != build("translation", 2, source).rows["test"]


def test_long_descriptions_are_cut_after_a_paragraph_or_a_sentence(source):
    file = source / "mirror_Translation-en"
    digest = "Description-md5: 1\n"
    long = "".join(f" Sentence {number} is here.\n" for number in range(100))
    file.write_text(
        file.read_text() + f"Package: libaa1\n{digest}Description-en: cut after a sentence\n{long}\n"
        f"Package: libaa2\n{digest}Description-en: cut after a paragraph\n Short.\n .\n{long}\n"
    )
    questions = {each["completion"]: each["prompt"] for each in all_rows(build("synopsis", source=source))}
    expected = "First paragraph 1, second line. It has two sentences.\nLast paragraph."
    assert questions["Library 1 for aa"] == expected
    assert questions["cut after a paragraph"] == "Short."
    cut = questions["cut after a sentence"]
    assert MAX_CHARACTERS - 30 < len(cut) <= MAX_CHARACTERS and cut.endswith("is here.")


def test_missing_files_are_reported(source, tmp_path, capsys):
    argv = ["data", "translation", "--source", str(source), "--language", "da", "--output_dir", str(tmp_path / "task")]
    assert main(argv) == 2
    assert "there is no uncompressed file Translation-da: give a language" in capsys.readouterr().err
    with pytest.raises(MiniGPTError, match="there is no uncompressed file Packages"):
        build("synopsis", source=tmp_path / "missing")


def apt_get(folder, script, monkeypatch):
    """Put a substitute for apt-get before that of the system in PATH."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "apt-get"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(os.name == "nt", reason="apt-get is a shell script here")
def test_apt_get_downloads_into_a_temporary_folder(source, tmp_path, monkeypatch):
    configuration = tmp_path / "apt.conf"
    script = (
        f'cp "$2" {configuration}; cp {source}/* "$(dirname "$2")/state/lists/"; echo "$1 $3 $4" > {tmp_path}/flags'
    )
    apt_get(tmp_path, script, monkeypatch)
    assert build("translation").rows == build("translation", source=source).rows
    assert (tmp_path / "flags").read_text() == "--config-file --quiet=2 update\n"
    lines = configuration.read_text()
    assert 'Acquire::Languages { "en"; "it"; };' in lines and "#clear Acquire::Languages;" in lines
    assert not os.path.exists(re.search(r'Dir::State "(.*)"', lines)[1])  # noqa: PTH110


@pytest.mark.skipif(os.name == "nt", reason="apt-get is a shell script here")
def test_a_failure_of_apt_get_is_reported_in_one_line(tmp_path, monkeypatch, capsys):
    apt_get(tmp_path, "echo 'W: something' >&2; echo 'E: no network' >&2; exit 100", monkeypatch)
    assert main(["data", "synopsis", "--output_dir", str(tmp_path / "task")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has not downloaded the descriptions of packages: E: no network; check the sources of apt" in line
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["data", "synopsis", "--output_dir", str(tmp_path / "task")]) == 2
    assert "read by apt-get, which this system lacks" in capsys.readouterr().err
