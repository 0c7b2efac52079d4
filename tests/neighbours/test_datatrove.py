"""The token files of datatrove have the ids that minigpt writes."""

import argparse
from pathlib import Path

import pytest

from minigpt_hf.cli import main
from minigpt_hf.data.prepared import PreparedText

pytest.importorskip("datatrove")


def test_the_tokenizer_of_datatrove_writes_the_same_ids(tmp_path):
    """The documents of the other program end with the separator, and those of this one start with it."""
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    text = Path(argparse.__file__).read_text(encoding="utf-8")
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number:02}.txt").write_text(
            text[number * 3000 : number * 3000 + 2500], encoding="utf-8"
        )
    argv = ["tokenize", "--data", str(tmp_path / "text"), "--tokenizer", "bpe", "--vocab_size", "500"]
    assert main([*argv, "--validation_fraction", "0", "--output_dir", str(tmp_path / "whole")]) == 0
    tokenizer = tmp_path / "whole" / "tokenizer"
    step = DocumentTokenizer(
        output_folder=str(tmp_path / "files"),
        tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
        eos_token="<|endoftext|>",
        shuffle_documents=False,
    )
    texts = [file.read_text(encoding="utf-8") for file in sorted((tmp_path / "text").iterdir())]
    step.run(Document(text=one, id=str(number)) for number, one in enumerate(texts) if one)
    assert main(["tokenize", "--merge", str(tmp_path / "files"), "--tokenizer", str(tokenizer)]) == 0
    ours, theirs = (PreparedText.open(tmp_path / name).train for name in ("whole", "files/index"))
    assert theirs.tokens[:].tolist() == ours.tokens[:].tolist()
    assert theirs.documents[:].tolist() == ours.documents[:].tolist()
