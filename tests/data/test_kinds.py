"""Text files and tables are not combined: the documents of the former are files, those of the latter are rows."""

import pytest

from minigpt_hf.data.corpus import load_corpus
from tests.data.test_corpus import write_files


def test_a_glob_that_matches_text_and_a_table_is_an_error(tmp_path):
    write_files(tmp_path, {"a.txt": "one document\n", "b.csv": "text\nfirst\nsecond\n"})
    with pytest.raises(ValueError, match="files of different formats"):
        load_corpus(str(tmp_path / "*"), 0)
    assert list(load_corpus(str(tmp_path / "*.csv"), 0).train) == ["first", "second"]
