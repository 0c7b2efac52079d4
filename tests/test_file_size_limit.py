"""A file that is larger than the process may write (`ulimit -f`) is reported in one line with exit code 28.

Libraries report this, and a full disk, in different ways: an `OSError`, an exception of Rust, or one of NumPy.
"""

import resource
import shutil

import pytest

from minigpt_hf.atomic import storage_error
from minigpt_hf.cli import main
from tests.conftest import representative


@pytest.mark.parametrize("target", representative(["gguf", "native", "onnx", "html"], "gguf", "native", "html"))
def test_an_export_that_exceeds_the_limit_leaves_nothing(target, run_folder, tmp_path, limit_file_size, capsys):
    argv = ["export", str(run_folder / "model"), "--to", target, "--output_dir", str(tmp_path / "out" / "x")]
    argv += ["--context", "33"] if target == "gguf" else []
    limit_file_size(4096)
    code = main(argv)
    limit_file_size(resource.RLIM_INFINITY)
    assert code == 28
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        f"minigpt export: {tmp_path / 'out' / 'x'}: a file is larger than the file size limit of this process (4,096 bytes, "
        "`ulimit -f`); raise the limit, or specify another folder"
    )
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_exceeds_the_limit_is_not_in_the_cache(text_file, tmp_path, limit_file_size, capsys):
    argv = ["tokenize", "--data", text_file, "--tokenizer", "bpe", "--vocab_size", "400"]
    argv += ["--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out"]
    limit_file_size(4096)
    code = main([str(word) for word in argv])
    limit_file_size(resource.RLIM_INFINITY)
    assert code == 28
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"minigpt tokenize: {tmp_path / 'cache'}: the tokenizer cannot be written to this cache")
    assert "raise the file size limit (`ulimit -f`)" in line
    assert main([str(word) for word in argv]) == 0


def test_metadata_that_exceed_the_limit_are_left_as_they_were(run_folder, text_file, tmp_path, limit_file_size, capsys):
    from minigpt_hf.publish.model_folder import save_score

    model = shutil.copytree(run_folder / "model", tmp_path / "model")
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    score = {
        "metric": "exact",
        "data": {"fingerprint": "0", "name": "x.json", "split": "all"},
        "score": 0.5,
        "low": 0.4,
    }
    score |= {"high": 0.6, "answers": 9, "ended": 1.0, "baselines": {"question": 0.1}}
    limit_file_size(2048)
    with pytest.raises(OSError, match=r"README.md: a file is larger than the file size limit of this process"):
        save_score(model, score)
    limit_file_size(resource.RLIM_INFINITY)
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("answers", [False, True])
def test_a_score_that_exceeds_the_limit_is_printed_and_the_exit_code_is_that_of_a_full_disk(
    answers, chat_run, chats, tmp_path, limit_file_size, capsys
):
    model = shutil.copytree(chat_run / "model", tmp_path / "model")
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    (tmp_path / "two.jsonl").write_text("".join(chats.read_text().splitlines(keepends=True)[:2]))
    argv = ["evaluate", str(model), "--data", str(tmp_path / "two.jsonl"), "--score", "exact"]
    argv += ["--answers", str(tmp_path / "answers.jsonl")] if answers else []
    limit_file_size(4096)
    code = main(argv)
    limit_file_size(resource.RLIM_INFINITY)
    printed = capsys.readouterr()
    assert code == 28
    assert printed.out.startswith("exact ") and "ended by the model" in printed.out
    assert "not saved: " in printed.err.splitlines()[-1]
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before
    assert not answers or len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


def test_answers_that_exceed_the_limit_are_left_as_they_were(chat_run, chats, tmp_path, limit_file_size, capsys):
    answers = tmp_path / "answers.jsonl"
    answers.write_text("before")
    argv = ["evaluate", str(chat_run / "model"), "--data", str(chats), "--score", "exact", "--no_save"]
    limit_file_size(2048)
    code = main([*argv, "--answers", str(answers)])
    limit_file_size(resource.RLIM_INFINITY)
    assert code == 28
    assert f"{answers}: a file is larger than the file size limit" in capsys.readouterr().err
    assert answers.read_text() == "before" and [*tmp_path.iterdir()] == [answers]


def test_a_run_folder_in_which_nothing_can_be_written_is_named(
    recipe_file, text_file, tmp_path, limit_file_size, capsys
):
    argv = ["train", "--recipe", str(recipe_file), "--data", str(text_file), "--output_dir", str(tmp_path / "run")]
    limit_file_size(0)
    code = main(argv)
    limit_file_size(resource.RLIM_INFINITY)
    assert code == 28
    assert f"minigpt train: {tmp_path / 'run'}: a file is larger than the file size limit" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_figure_that_exceeds_the_limit_is_left_as_it_was(run_folder, tmp_path, limit_file_size, capsys):
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"before")
    limit_file_size(4096)
    code = main(["plot", str(run_folder), "--output", str(figure)])
    limit_file_size(resource.RLIM_INFINITY)
    assert code == 28
    assert f"{figure}: a file is larger than the file size limit" in capsys.readouterr().err
    assert figure.read_bytes() == b"before" and [*tmp_path.iterdir()] == [figure]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        Exception("No space left on device (os error 28)"),
        ValueError("1024 requested and 0 written"),
    ],
)
def test_every_form_of_a_full_disk_is_recognized(error, tmp_path):
    assert storage_error(error, tmp_path).errno == 28
    assert str(storage_error(error, tmp_path)).endswith(
        "no space left on this disk; free some space or specify another folder"
    )


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    assert storage_error(ValueError("28 requested"), tmp_path) is None
    assert storage_error(OSError(13, "Permission denied"), tmp_path) is None
