"""Conversations: layouts of rows, ChatML, the mask of answers, packing, and the loss of packed conversations."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM
from minigpt_hf.data.chat_format import IGNORE_INDEX, ChatFormat, with_chat_tokens
from minigpt_hf.data.conversations import conversations_in, messages_of
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.packing import ConversationDataset, pack
from minigpt_hf.data.prepared import prepare_conversations
from minigpt_hf.data.tokenizer import byte_level_bpe, byte_tokenizer, character_tokenizer
from minigpt_hf.errors import MiniGPTError

QUESTION = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
LONG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour, e.g.\n\n  red"},
    {"role": "assistant", "content": "Blue. It's the colour of the sky,\nand of the sea."},
    {"role": "user", "content": "Another one?"},
    {"role": "assistant", "content": "  Grün 🌱"},
]
TEXTS = [message["content"] for message in QUESTION + LONG] + ["systemuserassistant\n<|im_start|><|im_end|>"]
TOKENIZERS = {
    "bpe": lambda: byte_level_bpe(TEXTS * 3, 320),
    "characters": lambda: character_tokenizer(TEXTS),
    "bytes": byte_tokenizer,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return with_chat_tokens(TOKENIZERS[request.param]())


# -- rows → messages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": QUESTION},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], "source": "x"},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": QUESTION[:1], "completion": QUESTION[1:]},
        {"instruction": "2 + 2?", "output": "4"},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"messages": None, "prompt": "2 + 2?", "completion": "4"},
    ],
)
def test_each_layout_of_a_row_becomes_the_same_messages(row):
    assert messages_of(row) == QUESTION


def test_the_input_of_an_instruction_follows_it():
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    assert messages_of(row)[0]["content"] == "Add.\n\n2 and 2"


def test_a_system_message_is_added_only_where_there_is_none():
    assert messages_of({"messages": QUESTION}, "Hi")[0] == {"role": "system", "content": "Hi"}
    assert messages_of({"messages": LONG}, "Hi") == LONG


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "completion": "4"},
        {"instruction": "2 + 2?", "input": None, "output": "4"},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
    ],
)
def test_the_column_system_is_the_system_message(row):
    question = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert messages_of({**row, "system": "Add."}, "Hi") == [{"role": "system", "content": "Add."}, *question]
    for empty in ("", None):
        assert messages_of({**row, "system": empty}) == question
    with pytest.raises(ValueError, match="has the value 3 in 'system', not a string"):
        messages_of({**row, "system": 3})


def test_a_system_message_in_two_places_is_an_error():
    with pytest.raises(ValueError, match="has a system message in the column 'system' and another in its messages"):
        messages_of({"messages": LONG, "system": "Add."})


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


BAD_ROWS = {
    "an empty answer": ({"messages": [user("a"), assistant(" \n")]}, "row 2 has an empty answer (message 2)"),
    "an unknown role": ({"messages": [{"role": "tool", "content": "a"}]}, 'row 2 has a message of role "tool"'),
    "two answers": (
        {"messages": [user("a"), assistant("b"), assistant("c")]},
        "two assistant messages in a row (message 3)",
    ),
    "no answer": ({"messages": [user("a")]}, "nothing to learn"),
    "a late system message": (
        {"messages": [user("a"), {"role": "system", "content": "b"}, assistant("c")]},
        "a system message that is not the first message (message 2)",
    ),
    "another layout": ({"question": "a", "answer": "b"}, "the columns question, answer"),
    "input that is no text": ({"instruction": "a", "input": 0, "output": "b"}, "the value 0 in 'input', not a string"),
    "content that is no text": ({"messages": [user(3), assistant("b")]}, "the value 3 in 'content', not a string"),
    "no list": ({"messages": "a"}, "not a list of messages"),
    "no completion": ({"prompt": "a", "completion": None}, "the value null in 'completion'"),
}


@pytest.mark.parametrize("row, message", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_row_that_cannot_be_trained_on_is_reported_with_its_number(row, message, tmp_path):
    file = tmp_path / "chats.json"
    file.write_text(json.dumps([{"messages": QUESTION}, row]))
    with pytest.raises(MiniGPTError) as error:
        load_corpus(str(file), 0.0, chat=True, cache_dir=tmp_path / "cache")
    assert message in str(error.value) and "chats.json" in str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow", "saved dataset"])
def test_conversations_are_read_verbatim_from_every_format(kind, tmp_path):
    rows = [{"prompt": f"{i} + {i}?\r\n", "completion": f'{2 * i}\u00a0, "é"'} for i in range(30)]
    dataset = datasets.Dataset.from_list(rows)
    data = tmp_path / f"chats.{kind}"
    if kind == "jsonl":
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        data.write_text(json.dumps(rows))
    elif kind == "csv":
        dataset.to_csv(data)
    elif kind == "parquet":
        dataset.to_parquet(data)
    else:
        dataset.save_to_disk(tmp_path / "saved")
        data = tmp_path / "saved" if kind == "saved dataset" else next((tmp_path / "saved").glob("*.arrow"))
    corpus = load_corpus(str(data), 0.0, chat=True, cache_dir=tmp_path / "cache")
    expected = [[user(row["prompt"]), assistant(row["completion"])] for row in rows]
    assert list(conversations_in(corpus.train)) == expected


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved dataset"])
def test_what_is_not_read_of_a_row_is_reported(kind, tmp_path, caplog):
    """Also if the conversations are in the cache. Values that are null, as Arrow adds them, are not reported."""
    rows = [{"prompt": f"{i}?", "completion": f"{i}", "source": "me", "system": "Count."} for i in range(3)]
    rows = [row | {"note": None, "title": None} for row in rows]
    if kind != "csv":  # a list of messages has no representation in CSV
        answer = {"role": "assistant", "content": "b", "weight": 0, "name": None}
        rows.append({"prompt": [user("a") | {"weight": None, "name": "Eve"}], "completion": [answer], "title": "A"})
        for row in rows[:3]:
            row["prompt"], row["completion"] = [user(row["prompt"])], [assistant(row["completion"])]
    data = tmp_path / f"chats.{kind}"
    dataset = datasets.Dataset.from_list(rows)
    if kind == "jsonl":
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        dataset.to_csv(data)
    elif kind == "parquet":
        dataset.to_parquet(data)
    else:
        dataset.save_to_disk(data)
    names = "source" if kind == "csv" else "source, title; of messages: name, weight"
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO"):
            corpus = load_corpus(str(data), 0.0, chat=True, cache_dir=tmp_path / "cache")
        assert f"columns that are not read: {names}" in caplog.text.splitlines()[-1].partition(": ")[2]
    assert next(iter(conversations_in(corpus.train)))[0] == {"role": "system", "content": "Count."}


def test_names_that_are_not_text_are_reported_as_well(tmp_path, caplog):
    message = {"role": "user", "content": "a", "\udc00": 1}  # JSON can contain lone surrogates
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [message, assistant("b")], "\ud800x": 1}) + "\n")
    with caplog.at_level("INFO"):
        load_corpus(str(tmp_path / "chats.jsonl"), 0.0, chat=True, cache_dir=tmp_path / "cache")
    assert r"columns that are not read: \ud800x; of messages: \udc00" in caplog.text


def test_two_columns_of_the_same_name_are_an_error_if_a_conversation_needs_them(tmp_path):
    columns, names = [["?"], ["a"], ["b"]], ["prompt", "completion", "completion"]
    pq.write_table(pa.table(columns, names=names), tmp_path / "chats.parquet")
    (tmp_path / "chats.csv").write_text("prompt,completion,completion\n?,a,b\n")
    (tmp_path / "notes.csv").write_text("prompt,completion,note,note\n?,a,b,c\n")
    for name in ("chats.parquet", "chats.csv"):
        with pytest.raises(MiniGPTError, match=rf"{name}: 2 columns are named 'completion'; rename all but one"):
            load_corpus(str(tmp_path / name), 0.0, chat=True, cache_dir=tmp_path / "cache")
    corpus = load_corpus(str(tmp_path / "notes.csv"), 0.0, chat=True, cache_dir=tmp_path / "cache")
    assert list(conversations_in(corpus.train)) == [[user("?"), assistant("a")]]


def test_the_split_divides_conversations_by_hash_and_needs_twenty(tmp_path):
    rows = [{"prompt": str(i), "completion": str(-i)} for i in range(1, 201)]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_corpus(str(file), 0.1, chat=True, cache_dir=tmp_path / "cache")
    splits = [{each[0]["content"] for each in conversations_in(split)} for split in (corpus.train, corpus.validation)]
    assert (len(splits[0]), len(splits[1])) == (180, 20)
    assert splits[0] | splits[1] == {row["prompt"] for row in rows}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:19]))
    with pytest.raises(MiniGPTError, match="at least 20 are required"):
        load_corpus(str(file), 0.1, chat=True, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("a.txt", {}, "is text, and --chat requires conversations"),
        ("a.jsonl", {"text_column": "prompt"}, "--text_column prompt"),
        ("a.jsonl:0.5,a.txt:0.5", {}, "is a mixture, which --chat does not support"),
        ("user/name", {"streaming": True}, "--streaming is not supported with --chat"),
        ("a.jsonl", {"chat": False, "system": "Hi"}, "--system requires --chat"),
    ],
)
def test_other_sources_and_settings_are_refused(name, settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    with pytest.raises(MiniGPTError, match=message):
        load_corpus(name, 0.0, cache_dir=tmp_path / "cache", **{"chat": True, **settings})


# -- messages → ids ---------------------------------------------------------------------------------------------------


def test_the_ids_are_those_of_the_chat_template(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for messages in (QUESTION, LONG):
        for generation in (False, True):
            expected = loaded.apply_chat_template(messages, add_generation_prompt=generation, return_dict=False)
            assert ChatFormat(tokenizer).encode(messages, generation).tolist() == expected
    assert loaded.eos_token == "<|im_end|>" and loaded.bos_token == "<|endoftext|>"


def test_a_conversation_starts_with_the_prompt_after_which_its_answer_is_generated(tokenizer):
    chat_format = ChatFormat(tokenizer)
    for answer in ("4", "\n\n4", " 4"):
        prompt = chat_format.encode(QUESTION[:1], add_generation_prompt=True).tolist()
        whole = chat_format.encode([*QUESTION[:1], assistant(answer)]).tolist()
        assert whole[: len(prompt)] == prompt
        end = whole.index(chat_format.end, len(prompt))
        assert tokenizer.decode(whole[len(prompt) : end]) == answer


def test_special_tokens_in_a_message_are_text(tokenizer):
    chat_format = ChatFormat(tokenizer)
    content = "<|im_end|><|im_start|>assistant\n"
    ids = chat_format.encode([user(content), assistant("4")])
    assert (ids == chat_format.start).sum() == (ids == chat_format.end).sum() == 2
    assert chat_format.question(ids) == [user(content)]


def test_ordinary_tokens_with_these_names_become_special(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<|im_start|>", "<|im_end|>")])
    size, ids = len(tokenizer), tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    with pytest.raises(MiniGPTError, match="no special tokens"):
        ChatFormat(tokenizer)
    with_chat_tokens(tokenizer).save_pretrained(tmp_path)
    chat_format = ChatFormat(AutoTokenizer.from_pretrained(tmp_path))
    assert (len(chat_format.tokenizer), [chat_format.start, chat_format.end]) == (size, ids)
    content = "x <|im_end|>\n<|im_start|>assistant\ny"
    encoded = chat_format.encode([{"role": "user", "content": content}, QUESTION[1]])
    assert [(encoded == token).sum() for token in ids] == [2, 2]
    assert chat_format.tokenizer.decode(encoded[chat_format.is_answer(encoded)].tolist()) == "4<|im_end|>"


def test_the_answers_and_their_ends_are_marked():
    tokenizer = with_chat_tokens(byte_tokenizer())
    chat_format = ChatFormat(tokenizer)
    ids = chat_format.encode([user("assistant\n"), assistant("ab"), user("c"), assistant("d")])
    marked = ids[chat_format.is_answer(ids)]
    assert tokenizer.decode(marked.tolist()) == "ab<|im_end|>d<|im_end|>"
    assert not chat_format.is_answer(chat_format.encode([user("a")])).any()


def test_a_tokenizer_that_has_the_tokens_is_not_enlarged():
    tokenizer = with_chat_tokens(byte_tokenizer())
    size = len(tokenizer)
    assert len(with_chat_tokens(tokenizer)) == size == len(byte_tokenizer()) + 2


# -- packing ----------------------------------------------------------------------------------------------------------


def test_each_item_is_packed_once_by_best_fit():
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    bins = pack(lengths, 64, seed=1)
    assert sorted(item for members in bins for item in members) == list(range(500))
    loads = [sum(lengths[members]) for members in bins]
    assert max(loads) <= 64
    # Reference: search all bins for the smallest space that suffices.
    order = list(np.random.default_rng([0x9AC4, 1]).permutation(500))
    free: list[int] = []
    for item in order:
        fitting = [(space, number) for number, space in enumerate(free) if space >= lengths[item]]
        if fitting:
            free[min(fitting)[1]] -= lengths[item]
        else:
            free.append(64 - lengths[item])
    assert [64 - load for load in loads] == free
    assert pack(lengths, 64, seed=2) != bins


def dataset_of(rows, block_size, tmp_path, seed=0):
    folder = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(folder)
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_corpus(str(file), 0.0, chat=True, cache_dir=tmp_path / "cache")
    text = prepare_conversations(corpus, str(folder), 300, tmp_path / "cache", block_size=block_size)
    return ConversationDataset(text.train, ChatFormat(text.tokenizer), block_size, seed), text


ROWS = [{"prompt": "a" * (i % 7), "completion": chr(98 + i % 5) * (1 + i % 11)} for i in range(40)]


def test_a_sequence_holds_complete_conversations_with_labels_only_for_answers(tmp_path):
    dataset, text = dataset_of(ROWS, 128, tmp_path)
    found = []
    for index in range(len(dataset)):
        item = dataset[0, index]
        starts = np.flatnonzero(item["position_ids"] == 0)
        for start, end in zip(starts, [*starts[1:], 128], strict=True):
            ids, labels = item["input_ids"][start:end], item["shift_labels"][start:end]
            assert item["position_ids"][start:end].tolist() == list(range(end - start))
            if ids[0] == text.train.bos_token_id:  # padding
                assert (labels == IGNORE_INDEX).all()
                continue
            kept = labels != IGNORE_INDEX
            answer = text.tokenizer.decode(labels[kept].tolist())
            assert answer.endswith("<|im_end|>")
            assert labels[kept][:-1].tolist() == ids[1:][kept[:-1]].tolist()  # the label is the next token
            found.append(
                (text.tokenizer.decode(ids[: len(ids) - kept.sum() + 1].tolist()), answer[: -len("<|im_end|>")])
            )
    expected = [
        (f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n", row["completion"]) for row in ROWS
    ]
    assert sorted(found) == sorted(expected)
    assert text.train.targets == sum(len(row["completion"]) + 1 for row in ROWS)
    assert text.train.bytes == sum(len(row["completion"]) for row in ROWS)


def test_long_conversations_are_left_out_and_reported(tmp_path, caplog):
    size = len(ChatFormat(with_chat_tokens(byte_tokenizer())).encode([user("a"), assistant("b" * 20)])) - 2
    rows = [{"prompt": "a", "completion": "b" * 20}, {"prompt": "a", "completion": "b" * 21}]
    dataset, text = dataset_of(rows, size, tmp_path)
    assert len(text.train.documents) == len(dataset) == 1
    assert f"1 of 2 conversations of the training split have more than {size} tokens" in caplog.text
    with pytest.raises(MiniGPTError, match=f"fits into {size - 1} tokens"):
        dataset_of(rows, size - 1, tmp_path)


@pytest.mark.parametrize("window", [None, 16])
def test_the_loss_of_packed_conversations_is_that_of_each_alone(window, tmp_path):
    dataset, text = dataset_of(ROWS, 128, tmp_path)
    config = MiniGPTConfig(
        vocab_size=len(text.tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        use_sliding_window=window is not None,
        sliding_window=window,
    )
    model = MiniGPTForCausalLM(config).eval()
    batch = dataset.collate([dataset[0, index] for index in range(len(dataset))])
    assert torch.equal(batch["labels"], batch["shift_labels"])  # the Trainer counts the labels
    with torch.no_grad():
        packed = model(**batch, use_cache=False).loss
        total, count = 0.0, 0
        for ids in text.train.iterate_documents():
            ids = torch.tensor(ids.astype(np.int64))
            answer = torch.from_numpy(dataset.chat_format.is_answer(ids.numpy()))[1:]
            logits = model(input_ids=ids[None, :-1]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total, count = total + losses[answer].sum(), count + int(answer.sum())
    assert packed == pytest.approx(float(total / count), rel=1e-5)


def test_a_saved_dataset_is_identified_by_its_content_and_not_changed(tmp_path):
    """The fingerprint in `state.json` does not change if another program writes the data file."""
    for folder, answer in (("saved", "first"), ("other", "second")):
        rows = [{"prompt": f"question {i}", "completion": f"{answer} {i}"} for i in range(30)]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / folder)
    saved, name = tmp_path / "saved", "data-00000-of-00001.arrow"
    files = {file.name for file in saved.iterdir()}
    for answer in ("first", "second"):
        if answer == "second":
            (tmp_path / "other" / name).replace(saved / name)
        corpus = load_corpus(str(saved), 0, chat=True, cache_dir=tmp_path / "cache")
        answers = [messages[1]["content"] for messages in conversations_in(corpus.train)]
        assert answers == [f"{answer} {i}" for i in range(30)]
        assert {file.name for file in saved.iterdir()} == files
