"""Hub datasets: downloaded or streamed, with configurations and splits. The Hub is a server on loopback."""

import json
from pathlib import Path

import datasets
import pytest

from minigpt_hf.cli import main
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.prepared import prepare
from minigpt_hf.data.stream import build_stream
from minigpt_hf.data.tokenizer import byte_tokenizer
from minigpt_hf.errors import MiniGPTError

ROWS = [f"line {i} of the play\n" * (1 + i % 7) for i in range(200)]


@pytest.fixture
def plays(hub, tmp_path) -> str:
    """user/plays: the configurations `long` (train and validation) and `short` (train alone), as parquet."""
    files = {
        "long/train.parquet": ROWS,
        "long/validation.parquet": ["held out"] * 3,
        "short/train.parquet": ROWS[:5],
    }
    content = {}
    for name, rows in files.items():
        datasets.Dataset.from_dict({"text": rows, "n": list(range(len(rows)))}).to_parquet(tmp_path / "rows.parquet")
        content[name] = (tmp_path / "rows.parquet").read_bytes()
    configs = "\n".join(f"- config_name: {name}\n  data_dir: {name}" for name in ("long", "short"))
    content["README.md"] = f"---\nconfigs:\n{configs}\n---\n".encode()
    hub.put("user/plays", content, repo_type="datasets")
    return "user/plays"


def test_the_validation_split_of_a_dataset_is_used(plays):
    corpus = load_corpus(f"{plays}:long")
    assert (list(corpus.train), list(corpus.validation)) == (ROWS, ["held out"] * 3)
    assert corpus.split_description == "the validation split provided with the data"
    part = load_corpus(f"{plays}:long", 0, split="train[:5%]")
    assert list(part.train) == ROWS[:10]
    short = load_corpus(f"{plays}:short", 0.4)
    assert len(list(short.train)) + len(list(short.validation)) >= 5
    assert "".join([*short.train, *short.validation]) == "".join(ROWS[:5])


def test_a_streamed_dataset_is_split_by_content_and_limited_to_max_tokens(plays, tmp_path):
    streamed = load_corpus(f"{plays}:long", 0.1, streaming=True)
    assert list(streamed.train) == ROWS
    assert list(streamed.validation) == ["held out"] * 3
    part = load_corpus(f"{plays}:long", 0.1, split="train", streaming=True)
    train, validation = list(part.train), list(part.validation)
    assert sorted([*train, *validation]) == sorted(ROWS)
    assert 8 <= len(validation) <= 40
    assert "".join(part.validation.head(50)) == "".join(validation)[:50]

    complete = build_stream(load_corpus(f"{plays}:long", 0).train, byte_tokenizer(), tmp_path)
    stream = prepare(streamed, "bytes", 0, tmp_path, block_size=8, validation_characters=10, max_tokens=1000).train
    assert 1000 <= len(stream) < 1200
    assert stream.tokens[:].tolist() == complete.tokens[: len(stream)].tolist()


def test_the_column_of_a_stream_does_not_depend_on_its_first_row(hub):
    rows = [{"title": "a", "text": None}, *({"title": "b", "text": f"text {i}"} for i in range(30))]
    hub.put(
        "user/rows", {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}, repo_type="datasets"
    )
    for column, expected in ((None, "text 0"), ("title", "a")):
        for streaming in (False, True):
            assert next(iter(load_corpus("user/rows", 0, streaming=streaming, text_column=column).train)) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_split_and_a_missing_configuration_are_errors(streaming, plays):
    with pytest.raises(MiniGPTError, match=r"user/plays: cannot be loaded: Config name is missing"):
        load_corpus(plays, streaming=streaming)
    with pytest.raises(MiniGPTError, match=r"user/plays:long: .* split .?dev"):
        load_corpus(f"{plays}:long", streaming=streaming, split="dev")


def test_a_mixture_of_streams_has_the_requested_shares(plays, hub, tmp_path):
    datasets.Dataset.from_dict({"text": ["x" * 40] * 500}).to_parquet(tmp_path / "x.parquet")
    hub.put("user/x", {"train.parquet": (tmp_path / "x.parquet").read_bytes()}, repo_type="datasets")
    corpus = load_corpus(f"{plays}:long:0.75,user/x:0.25", 0, streaming=True)
    text = "".join(corpus.train.head(8000))
    assert text.count("x") / len(text) == pytest.approx(0.25, abs=0.02)


def test_a_model_is_trained_on_a_streamed_dataset(plays, hub, recipe_file, tmp_path, capsys):
    argv = ["train", "--recipe", str(recipe_file), "--data", f"{plays}:long", "--streaming", "--max_tokens", "2000"]
    argv += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--eval_steps", "1", "--save_steps", "1"]
    assert main(argv) == 0
    about = json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())
    assert about["data"]["datasets"] == [plays]
    assert about["data"]["train"]["tokens"] >= 2000


@pytest.fixture
def streamed(hub, recipe_file, tmp_path):
    """A function that trains a model on streamed datasets and returns its folder."""
    texts = [f"document {i}: {'word ' * (i % 9)}" for i in range(120)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "rows.parquet")
    hub.put("user/words", {"train.parquet": (tmp_path / "rows.parquet").read_bytes()}, repo_type="datasets")
    flags = "--streaming --max_tokens 2000 --tokenizer bytes --validation_fraction 0.3 --max_steps 2 --eval_steps 2"

    def train(data: str) -> Path:
        argv = ["train", "--recipe", recipe_file, "--data", data, "--output_dir", tmp_path / "run", "--save_steps", 2]
        assert main([*map(str, argv), *flags.split()]) == 0
        return tmp_path / "run" / "model"

    return train


def test_evaluate_repeats_the_score_of_a_streamed_dataset(streamed, capsys):
    """A stream is divided by a threshold, a stored dataset by the exact share of documents: here 31 or 36 are held out."""
    model = streamed("user/words")
    published = json.loads((model / "minigpt.json").read_text())["results"]
    assert published["documents"] == 31
    capsys.readouterr()
    assert main(["evaluate", str(model), "--data", "user/words", "--split", "validation", "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert {name: score[name] for name in published} == published


def test_passages_are_sought_in_the_text_that_was_streamed(streamed, hub, tmp_path, capsys):
    """A downloaded dataset has another fingerprint than its stream."""
    model = str(streamed("user/words"))
    published = json.loads((Path(model) / "minigpt.json").read_text())["copying"]
    datasets.Dataset.from_dict({"text": ["other words"] * 300}).to_parquet(tmp_path / "other.parquet")
    hub.put("user/other", {"train.parquet": (tmp_path / "other.parquet").read_bytes()}, repo_type="datasets")
    for data, is_other in (("user/words", False), ("user/other", True), (str(tmp_path / "other.parquet"), True)):
        capsys.readouterr()
        assert main(["evaluate", model, "--data", data, "--copying", "--json"]) == 0
        output = capsys.readouterr()
        assert ("its training split is not the one that" in output.err) == is_other
        score = json.loads(output.out)
        assert is_other or score["training_tokens"] == published["training_tokens"]
        assert is_other or score["samples"] == published["samples"]


def test_training_text_that_was_streamed_is_recognized(streamed, tmp_path, capsys):
    """Three tenths were held out when the dataset was streamed; it is downloaded afterwards."""
    model = str(streamed("user/words"))
    for fraction, is_seen in (("0.6", True), ("0.2", False)):
        capsys.readouterr()
        flags = ["--data", "user/words", "--validation_fraction", fraction]
        assert main(["evaluate", model, "--split", "validation", *flags]) == 0
        assert ("contains text that the model was trained on" in capsys.readouterr().err) == is_seen
        flags += ["--init_from", model, "--max_steps", "1", "--block_size", "32", "--use_cpu", "--no_figures"]
        assert main(["train", "--recipe", "finetune", *flags, "--output_dir", str(tmp_path / fraction)]) == 0
        assert ("was trained on text of the validation split" in capsys.readouterr().err) == is_seen


def test_evaluate_rejects_the_split_of_a_mixture_of_streamed_datasets(streamed, plays, capsys):
    mixture = f"user/words:0.5,{plays}:long:0.5"
    model = streamed(mixture)
    assert main(["evaluate", str(model), "--data", mixture, "--split", "validation"]) == 2
    assert "a mixture of streamed datasets, whose split cannot be reproduced" in capsys.readouterr().err
    assert main(["evaluate", str(model), "--data", "user/words", "--split", "all"]) == 0


def test_files_of_a_repository_are_read_by_their_urls(plays, tmp_path):
    url = f"hf://datasets/{plays}/long"
    assert list(load_corpus(f"{url}/train.parquet", 0, cache_dir=tmp_path).train) == ROWS
    both = load_corpus(f"{url}/*.parquet", cache_dir=tmp_path)
    assert list(both.train) == ROWS
    assert len(both.validation) == 3
    assert "config_name: long" in "".join(load_corpus(f"hf://datasets/{plays}/README.md", 0).train)


def test_a_dataset_that_cannot_be_loaded_is_an_error(hub):
    hub.put("user/empty", {"README.md": b"nothing"}, repo_type="datasets")
    with pytest.raises(ValueError, match="user/absent: no such file or folder, and it cannot be loaded from the Hub"):
        load_corpus("user/absent")
    with pytest.raises(ValueError, match="user/empty"):
        load_corpus("user/empty")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.jsonl": b'{"text": "a"}\n{"text": \n'}, r"user/broken: cannot be read: \w+"),
        (
            {"1.jsonl": b'{"text": "a"}\n' * 2, "2.jsonl": b'{"body": "b"}\n' * 2},
            "user/broken: cannot be read: its tables have different columns",
        ),
    ],
)
def test_a_dataset_whose_tables_cannot_be_converted_is_an_error_with_the_reason(files, message, hub):
    hub.put("user/broken", files, repo_type="datasets")
    with pytest.raises(ValueError, match=message):
        load_corpus("user/broken")
