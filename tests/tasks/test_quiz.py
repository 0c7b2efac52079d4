"""The quiz: patterns, facts and wordings, from files of the format of quiz(6)."""

import pytest

from minigpt_hf.cli import main
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.tasks import build
from minigpt_hf.tasks.quiz import FRAMES, RELATIONS, text_of


@pytest.fixture
def source(tmp_path):
    """All files that the quiz reads, with a few facts."""
    folder = tmp_path / "quiz"
    folder.mkdir()
    for relation in RELATIONS:
        for each in relation.columns:
            (folder / each.split()[0]).touch()
    (folder / "africa").write_text("Algeria:Algiers\nBenin:Porto-Novo\nC[^\bo|o\b^]te d'Ivoire:Yamoussoukro\n")
    (folder / "asia").write_text("Cyprus:Nicosia\nArmenia:Yerevan\n")
    (folder / "europe").write_text("Cyprus:Nicosia\nArmenia:another\n\n")
    (folder / "elements").write_text("H:1:1.008:Hydrogen\nHe:2:4.003:Helium\nX:3\n")
    (folder / "pres").write_text("{J{ohn} }Adams:1797-1801:{T{homas} }Jefferson:\\\n{T{homas} }Jefferson\n")
    return folder


@pytest.mark.parametrize(
    "pattern, text",
    [
        ("Algiers", "Algiers"),
        ("company|troupe", "company"),
        ("{G{eorge} }Washington", "George Washington"),
        ("Cal{if{ornia}}|CA", "California"),
        ("W[illia|]m [I|1|the Conqueror]", "William I"),
        ("forget{-| }me{-| }not", "forget-me-not"),
        ("1789-{17}97", "1789-1797"),
        ("a\\|b\\:c", "a|b:c"),
        ("S~\bao Tom'\be", "São Tomé"),
        ("C[^\bo|o]te", "Côte"),
    ],
)
def test_a_pattern_stands_for_its_longest_first_alternative(pattern, text):
    assert text_of(pattern) == text


def test_each_fact_is_asked_in_training_and_tested_in_another_wording(source):
    rows = build("quiz", source=source).rows
    answers = {each["prompt"]: each["completion"] for split in rows for each in rows[split]}
    assert answers["Which city is the capital of Algeria?"] == "Algiers"
    assert answers["Name the capital of Côte d'Ivoire."] == "Yamoussoukro"
    assert answers["How many protons does Helium have?"] == "2"
    assert answers["Who succeeded John Adams?"] == "Thomas Jefferson"
    assert not any("Armenia" in prompt for prompt in answers)  # two answers
    facts = 4 + 2 + 2 + 3  # capitals, symbols, atomic numbers, John Adams
    assert len(answers) == 6 * facts
    assert [len(rows[split]) for split in ("train", "validation", "test")] == [len(FRAMES) * facts, facts, facts]
    assert sorted(each["completion"] for each in rows["test"]) == sorted(
        each["completion"] for each in rows["validation"]
    )


def test_every_relation_has_the_same_number_of_different_wordings():
    for relation in RELATIONS:
        assert len(set(relation.wordings)) == len(FRAMES) + 2
        assert all(wording.count("{}") == 1 for wording in relation.wordings)


def test_the_quiz_is_determined_by_its_seed(source):
    assert build("quiz", 1, source).rows == build("quiz", 1, source).rows
    assert build("quiz", 1, source).rows["test"] != build("quiz", 2, source).rows["test"]


def test_missing_files_are_reported_with_the_package(source, tmp_path, capsys):
    (source / "morse").unlink()
    with pytest.raises(MiniGPTError, match="morse: there is no such file"):
        build("quiz", source=source)
    argv = ["data", "quiz", "--source", str(tmp_path / "missing"), "--output_dir", str(tmp_path / "task")]
    assert main(argv) == 2
    assert "apt-get install bsdgames" in capsys.readouterr().err
    assert not (tmp_path / "task").exists()


def test_a_file_that_is_not_utf8_is_an_error_that_names_it(source, tmp_path, capsys):
    (source / "america").write_bytes("Peru:Lima\nMéxico:México\n".encode("latin-1"))
    argv = ["data", "quiz", "--source", str(source), "--output_dir", str(tmp_path / "task")]
    assert main(argv) == 2
    assert "america: byte 0xe9 at position 11 is not UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "task").exists()


def test_files_without_a_fact_are_an_error(source, tmp_path, capsys):
    for file in source.iterdir():
        file.write_text("")
    assert main(["data", "quiz", "--source", str(source), "--output_dir", str(tmp_path / "task")]) == 2
    assert "contain no fact" in capsys.readouterr().err


def test_the_split_states_whether_all_wordings_occur_in_training(source, tmp_path):
    assert "some wordings do not occur in training" in build("quiz", source=source).split  # one fact of most relations
    facts = "".join(f"subject {i}:answer {i}:second {i}:third {i}\n" for i in range(50))
    for file in source.iterdir():
        file.write_text(facts)
    assert "each wording occurs in training with other facts" in build("quiz", source=source).split
