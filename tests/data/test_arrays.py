"""Arrays with an entry per document give the same results in memory and memory-mapped, and in blocks of any size."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt_hf.data import arrays
from minigpt_hf.data.arrays import lowest_distinct, selected, stored
from minigpt_hf.data.corpus import load_corpus


@pytest.fixture(params=["in memory", "memory-mapped"])
def small(request, monkeypatch):
    """Blocks of three entries."""
    monkeypatch.setattr(arrays, "BLOCK", 3)
    monkeypatch.setattr("minigpt_hf.data.documents.BLOCK", 3)
    monkeypatch.setattr(arrays, "STORED_BYTES", 1 if request.param == "memory-mapped" else 1 << 26)
    return request.param == "memory-mapped"


def test_parts_are_concatenated(small, tmp_path):
    array = stored((np.arange(n) for n in (3, 1, 4)), 8, np.dtype("<i8"), tmp_path)
    assert array.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert isinstance(array, np.memmap) == small
    assert stored([], 0, np.dtype("<i8"), tmp_path).tolist() == []
    assert list(tmp_path.iterdir()) == []  # the file has no name, so nothing remains after a kill
    array.sort()
    assert array.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]


def test_a_folder_that_does_not_exist_is_replaced_by_the_default_one(small, tmp_path):
    assert stored([np.arange(5)], 5, np.dtype("<i8"), tmp_path / "absent").tolist() == [0, 1, 2, 3, 4]


def test_entries_are_selected_by_position_or_mask(small, tmp_path):
    array = np.arange(100, 110)
    assert selected(array, np.array([7, 7, 0, 9]), tmp_path).tolist() == [107, 107, 100, 109]
    assert selected(array, array % 3 == 0, tmp_path).tolist() == [102, 105, 108]


@settings(max_examples=200, deadline=None)
@given(keys=st.lists(st.integers(0, 20) | st.integers(0, 2**64 - 1), max_size=40), share=st.floats(0.001, 0.999))
def test_the_lowest_distinct_keys_are_those_of_a_sorted_list(keys, share):
    expected = sorted(set(keys))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "BLOCK", 3)
        last = lowest_distinct(np.array(keys, dtype=np.uint64), share)
    assert last == (expected[max(1, round(len(expected) * share)) - 1] if expected else None)


TEXTS = [f"document {number % 35}" if number % 4 else "" for number in range(80)]


@pytest.mark.parametrize("mixture", [False, True])
def test_documents_are_split_in_the_same_way_memory_mapped(mixture, small, tmp_path):
    """Empty rows, copies in one source, and copies in both; compared with sets of texts."""

    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"text": [*TEXTS[:30], *(f"other {number}" for number in range(30))]}), tmp_path / "b.parquet"
    )
    data = f"{tmp_path}/a.parquet:0.5,{tmp_path}/b.parquet:0.5" if mixture else f"{tmp_path}/a.parquet"
    corpus = load_corpus(data, 0.2, cache_dir=tmp_path / "cache")
    assert set(corpus.train).isdisjoint(corpus.validation)
    if not mixture:
        texts = [text for text in TEXTS if text]
        assert sorted([*corpus.train, *corpus.validation]) == sorted(texts)
        assert len(set(corpus.validation)) == round(len(set(texts)) * 0.2)
        assert corpus.train.number_of_documents == len(list(corpus.train))
        assert corpus.train.characters == sum(map(len, corpus.train))
        assert isinstance(corpus.train.index, np.memmap) == small
        complete = "".join(corpus.train)
        for characters in (1, 11, 12, 100, len(complete) - 1, len(complete), len(complete) + 1):
            head, tail = corpus.train.split(characters)
            assert "".join(head) == complete[:characters]
            assert "".join(tail) == complete[characters:]


def test_fingerprints_do_not_depend_on_blocks_or_memory(small, tmp_path):
    """Otherwise cached streams and tokenizers would not be found."""
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number:02}.txt").write_text(f"document {number}")
    corpus = load_corpus(str(tmp_path / "text"), 0.2)
    assert corpus.train.fingerprint == "e18b1aa7f09457d91cfad2c76c38573e7061f8161935cddf26752b974debbbc8"
    assert corpus.validation.fingerprint == "17f3bbc74145f4d9582802644f6b897503578bc195c9d8bbc279401b747f8941"
