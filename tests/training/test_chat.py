"""Fine-tuning on conversations: the published model, its score, exact resuming, LoRA, and `minigpt chat`."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import minigpt_hf
from minigpt_hf import doctor
from minigpt_hf.cli import main
from minigpt_hf.data.chat_format import CHAT_TEMPLATE, ChatFormat, with_chat_tokens
from minigpt_hf.data.conversations import build_conversation_stream
from minigpt_hf.data.corpus import load_corpus
from minigpt_hf.data.packing import ConversationDataset
from minigpt_hf.errors import MiniGPTError
from tests.conftest import CHAT_FLAGS, ROOT, fine_tune

from .conftest import assert_equal, rows, state_of


@pytest.mark.slow
def test_the_published_model_stops_at_the_end_of_an_answer_and_has_the_template(chat_run, run_folder):
    model = AutoModelForCausalLM.from_pretrained(chat_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(chat_run / "model")
    end, separator = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == [end, separator]
    assert model.config.eos_token_id == tokenizer.eos_token_id == end
    assert tokenizer.chat_template == CHAT_TEMPLATE
    old = AutoModelForCausalLM.from_pretrained(run_folder / "model")
    assert model.config.vocab_size == old.config.vocab_size + 2 == len(tokenizer)
    assert doctor.failures(doctor.examine(chat_run / "model")) == []
    answer = pipeline("text-generation", model=str(chat_run / "model"))(
        [{"role": "user", "content": "3 + 1"}], max_new_tokens=5
    )
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


@pytest.mark.slow
def test_the_examples_of_the_card_run_and_ask_a_question(chat_run, tmp_path):
    card = (chat_run / "model" / "README.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert '"role": "user"' in first and '"role": "user"' in second and "minigpt chat ." in card
    for example in (first, second):
        done = subprocess.run([sys.executable, "-c", example], cwd=chat_run / "model", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    metadata = json.loads((chat_run / "model" / "minigpt.json").read_text())
    question = {"role": "user", "content": metadata["sample"]["prompt"]}
    assert ModelCard(card).data.to_dict()["widget"] == [{"messages": [question]}]


def test_the_card_states_how_many_of_the_training_tokens_are_padding(chat_run):
    """A sequence holds the inputs of its conversations: without BOS and the last `<|im_end|>` of each."""
    metadata = json.loads((chat_run / "model" / "minigpt.json").read_text())
    training, data = metadata["training"], metadata["data"]["train"]
    positions = training["tokens"] / training["epochs"]
    padding = 1 - (data["tokens"] - 2 * data["documents"]) / positions
    assert 0 < padding < 1 and training["padding"] == pytest.approx(padding)
    card = (chat_run / "model" / "README.md").read_text()
    assert f"| tokens | {training['tokens']:,}, of which {100 * padding:.1f} % are padding |\n" in card


def test_evaluate_reproduces_the_published_score_of_the_answers(chat_run, chats, capsys):
    results = json.loads((chat_run / "model" / "minigpt.json").read_text())["results"]
    score = minigpt_hf.evaluate(chat_run / "model", chats, split="validation")
    assert (score.loss, score.bits_per_byte, score.tokens) == (
        results["loss"],
        results["bits_per_byte"],
        results["tokens"],
    )
    model = AutoModelForCausalLM.from_pretrained(chat_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(chat_run / "model")
    everything = minigpt_hf.evaluate(chat_run / "model", chats)
    nats = count = size = 0
    for line in chats.read_text().splitlines():
        messages = json.loads(line)["messages"]
        for turn in (2, 4):
            prompt, whole = (
                tokenizer.apply_chat_template(part, add_generation_prompt=start, return_dict=False)
                for part, start in ((messages[: turn - 1], True), (messages[:turn], False))
            )
            ids = torch.tensor(whole[: len(whole) - 1])  # without the line end
            with torch.no_grad():
                losses = torch.nn.functional.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="none")
            nats += losses[len(prompt) - 1 :].double().sum().item()
            count += len(ids) - len(prompt)
            size += len(messages[turn - 1]["content"])
    assert (everything.tokens, everything.bytes, everything.documents) == (count, size, 60)
    assert everything.loss == pytest.approx(nats / count, rel=1e-5)


def test_evaluate_reproduces_the_published_copying_of_the_answers(chat_run, chats):
    metadata = json.loads((chat_run / "model" / "minigpt.json").read_text())
    assert metadata["sample"]["given"] == [f"{text.partition(chr(10))[0]}\n" for text in metadata["sample"]["texts"]]
    copying = minigpt_hf.measure_copying(chat_run / "model", chats)
    assert copying.to_dict() == metadata["copying"]
    assert copying.training_tokens == metadata["data"]["train"]["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(chat_run / "model")
    for text, stretch in zip(metadata["sample"]["texts"], copying.stretches, strict=True):
        answer = text.partition("\n")[2]
        assert stretch.text in answer
        assert stretch.of_tokens == len(tokenizer(answer, split_special_tokens=True).input_ids)


def test_a_resumed_run_equals_an_uninterrupted_one(chat_run, run_folder, chats, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(chat_run, resumed)
    shutil.rmtree(resumed / "model")
    for step in (4, 6, 8):
        shutil.rmtree(resumed / f"checkpoint-{step}")
    fine_tune(run_folder, chats, resumed, "--residual_dropout", "0.1")
    assert rows(resumed) == rows(chat_run)
    assert_equal(state_of(resumed / "checkpoint-8"), state_of(chat_run / "checkpoint-8"))


def test_the_answers_to_held_out_questions_are_shown_during_training(chat_run):
    log = [json.loads(line) for line in (chat_run / "log.jsonl").read_text().splitlines()]
    samples = [row["sample"] for row in log if "sample" in row]
    assert len(samples) == 3  # before training, after 4 steps, and at the end
    sample = json.loads((chat_run / "model" / "minigpt.json").read_text())["sample"]
    questions = [text.splitlines()[0] for text in sample["texts"]]
    assert len({*questions}) == 3 and all(question.endswith(" + 1") for question in questions)
    assert sample["prompt"] == questions[0]
    assert samples[-1] == "\n\n".join(sample["texts"])


def test_a_system_message_is_trained_on_and_used_by_default(run_folder, chats, tmp_path, capsys):
    run = fine_tune(
        run_folder, chats, tmp_path / "run", "--block_size", "128", "--system", "Add.", "--sample_prompt", "1 + 1"
    )
    recipe = json.loads((run / "model" / "minigpt.json").read_text())["recipe"]
    assert recipe["system"] == "Add."
    metadata = json.loads((run / "model" / "minigpt.json").read_text())
    without = minigpt_hf.evaluate(run / "model", chats, split="validation", system="Subtract.")
    assert (
        minigpt_hf.evaluate(run / "model", chats, split="validation").loss
        == metadata["results"]["loss"]
        != without.loss
    )
    assert len(metadata["sample"]["texts"]) == 1 and metadata["sample"]["texts"][0].startswith("1 + 1\n")
    assert (
        "The greedily decoded answer to the question given by `sample_prompt`" in (run / "model/README.md").read_text()
    )


def test_markup_in_a_system_message_is_not_in_the_widget(run_folder, chats, tmp_path):
    """The Hub shows the widget in a page, and `push` rejects active markup in it."""
    flags = ["--block_size", "128", "--max_steps", "2", "--system", "No <script>."]
    folder = fine_tune(run_folder, chats, tmp_path / "run", *flags) / "model"
    assert "widget" not in ModelCard((folder / "README.md").read_text()).data.to_dict()
    assert not doctor.failures(doctor.examine_files(folder))


SYSTEMS = {"equal": ["Add {{ x }}\nTODO `"], "different": ["Add.", "Sum."], "or none": ["Add.", None]}


@pytest.mark.parametrize("contents", SYSTEMS.values(), ids=SYSTEMS.keys())
def test_the_card_states_the_system_messages_of_the_samples(contents, run_folder, chats, tmp_path, monkeypatch, capsys):
    """An answer to the question alone differs from the sample."""
    lines = [json.loads(line) for line in chats.read_text().splitlines()]
    systems = [contents[number % len(contents)] for number in range(len(lines))]
    data = tmp_path / "systems.jsonl"
    data.write_text(
        "".join(json.dumps(row | {"system": each}) + "\n" for row, each in zip(lines, systems, strict=True))
    )
    flags = ["--block_size", "128", "--max_steps", "2"]
    folder = fine_tune(run_folder, data, tmp_path / "run", *flags) / "model"
    card, metadata = (folder / "README.md").read_text(), json.loads((folder / "minigpt.json").read_text())
    questions = [text.splitlines()[0] for text in metadata["sample"]["texts"]]
    of_question = {row["messages"][0]["content"]: each for row, each in zip(lines, systems, strict=True)}
    of_samples = [of_question[question] for question in questions]
    asked = [
        [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": question}]
        for system, question in zip(of_samples, questions, strict=True)
    ]
    assert metadata["sample"]["conversations"] == asked
    first = asked[0]
    assert ModelCard(card).data.to_dict()["widget"] == [{"messages": first}]
    assert f"messages = {json.dumps(first)}\n" in card
    blocks = [f"```text\n{text}\n```\n" for text in metadata["sample"]["texts"]]
    before = ["" if each is None else f"System message:\n\n```text\n{each}\n```\n" for each in of_samples]
    if len({*of_samples}) == 1:
        shown = "\n".join([f"{before[0]}\nConversations:\n", *blocks])
    else:
        described = ("Conversation without a system message:", "\nConversation:")
        parts = zip(before, blocks, strict=True)
        shown = "\n".join(f"{system}{described[bool(system)]}\n\n{block}" for system, block in parts)
    assert shown in card
    assert metadata["data"]["has_other_systems"] is True
    assert not doctor.failures(doctor.examine_files(folder))  # as prose, braces would be placeholders
    for options, is_reported in (((), True), (("--system", "Add."), False)):
        monkeypatch.setattr("sys.stdin", io.StringIO("/exit\n"))
        capsys.readouterr()
        assert main(["chat", str(folder), *options]) == 0
        assert ("system messages of their own, which this conversation" in capsys.readouterr().err) == is_reported
    answered = pipeline("text-generation", model=str(folder))(first, max_new_tokens=metadata["sample"]["tokens"])
    assert metadata["sample"]["texts"][0] == f"{questions[0]}\n{answered[0]['generated_text'][-1]['content']}"


def test_a_sample_and_the_example_of_the_card_contain_all_messages_before_the_answer(run_folder, chats, tmp_path):
    """The answer to the last one alone may be another."""
    rows = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    before = {"role": "user", "content": "Add:"}
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"messages": [before, *messages]}) + "\n" for messages in rows))
    flags = ["--block_size", "128", "--max_steps", "2"]
    folder = fine_tune(run_folder, data, tmp_path / "run", *flags) / "model"
    metadata = json.loads((folder / "minigpt.json").read_text())
    sample = metadata["sample"]
    assert metadata["data"]["has_other_systems"] is False
    first = sample["conversations"][0]
    assert [message["role"] for message in first] == ["user", "user"] and first[0] == before
    assert f"messages = {json.dumps(first)}\n" in (folder / "README.md").read_text()
    answered = pipeline("text-generation", model=str(folder))(first, max_new_tokens=sample["tokens"])
    answer = answered[0]["generated_text"][-1]["content"]
    assert sample["texts"][0] == f"Add:\n{first[1]['content']}\n{answer}"
    assert sample["given"][0] == f"Add:\n{first[1]['content']}\n"


def test_the_card_states_which_questions_are_answered(recipe_file, chats, tmp_path, capsys):
    """Without held-out questions, and with a question that the tokenizer cannot encode."""
    argv = [
        "train",
        "--recipe",
        recipe_file,
        "--chat",
        "--data",
        chats,
        "--tokenizer",
        "characters",
        "--block_size",
        "64",
    ]
    argv += ["--max_steps", "2", "--validation_fraction", "0", "--sample_prompt", "é", "--output_dir", tmp_path]
    assert main([*map(str, argv)]) == 0
    assert "samples answer the first questions, without the prompt" in capsys.readouterr().err
    sample = json.loads((tmp_path / "model" / "minigpt.json").read_text())["sample"]
    assert len(sample["texts"]) == 3 and sample["prompt"].endswith(" + 1")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Not selected: greedily decoded first answers of the first conversations of the training" in card


@pytest.mark.slow
@pytest.mark.parametrize("kind, size", [("bpe", 300), ("characters", None), ("bytes", 260)])
def test_reserved_tokens_are_used_later_without_a_larger_vocabulary(kind, size, recipe_file, text, chats, tmp_path):
    text += "0123456789"  # of the conversations
    (tmp_path / "text.txt").write_text(text)
    argv = ["train", "--recipe", recipe_file, "--data", tmp_path / "text.txt", "--tokenizer", kind, "--chat_tokens"]
    assert main([*map(str, argv), "--max_steps", "2", "--output_dir", str(tmp_path / "base")]) == 0
    base = AutoTokenizer.from_pretrained(tmp_path / "base" / "model")
    size = size or 4 + len({*text})
    assert len(base) == size and {"<|im_start|>", "<|im_end|>"} <= {*base.all_special_tokens}
    assert base.eos_token == "<|endoftext|>" and base.chat_template is None
    assert doctor.failures(doctor.examine_files(tmp_path / "base" / "model")) == []

    run = fine_tune(tmp_path / "base", chats, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.get_vocab() == base.get_vocab() and tokenizer.eos_token == "<|im_end|>"
    weights = load_file(run / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert len(weights) == AutoModelForCausalLM.from_pretrained(run / "model").config.vocab_size == size


def test_a_prepared_text_reserves_the_tokens(recipe_file, text_file, tmp_path, capsys):
    argv = ["--recipe", str(recipe_file), "--max_steps", "2"]
    prepared = ["--data", str(text_file), "--chat_tokens", "--output_dir", str(tmp_path / "text")]
    assert main(["tokenize", *argv, *prepared]) == 0
    train = ["train", *argv, "--data", str(tmp_path / "text"), "--output_dir", str(tmp_path / "run")]
    assert main(train) == 0
    assert "<|im_end|>" in AutoTokenizer.from_pretrained(tmp_path / "run" / "model").get_vocab()
    assert main([*train, "--chat_tokens", "false", "--fresh"]) == 2
    assert "was prepared with chat_tokens True" in capsys.readouterr().err


def test_a_vocabulary_without_space_for_the_reserved_tokens_is_an_error(recipe_file, text_file, tmp_path, capsys):
    argv = ["train", "--recipe", recipe_file, "--data", text_file, "--output_dir", tmp_path / "run", "--chat_tokens"]
    assert main([*map(str, argv), "--vocab_size", "259"]) == 2
    assert "needs at least 260 (4 special tokens and 256 bytes)" in capsys.readouterr().err
    argv = ["train", "--init_from", "user/base", "--data", text_file, "--output_dir", tmp_path / "run", "--chat_tokens"]
    assert main([*map(str, argv)]) == 2
    assert "chat_tokens is determined by the model of init_from" in capsys.readouterr().err


def test_conversations_are_not_tokenized_in_advance(text_file, tmp_path, capsys):
    argv = ["tokenize", "--data", str(text_file), "--output_dir", str(tmp_path / "out"), "--tokenizer", "bytes"]
    for flags in (["--chat"], ["--chat", "true"], ["--chat=true"]):
        assert main([*argv, *flags]) == 2
        assert "--chat: conversations are tokenized by `minigpt train`" in capsys.readouterr().err
    assert main([*argv, "--chat", "false"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--no_muon"], ["--no_muon", "--lora_rank", "2"]])
def test_only_lora_leaves_the_other_embeddings_unchanged(flags, run_folder, chats, tmp_path):
    run = fine_tune(run_folder, chats, tmp_path / "run", *flags)
    old, new = (
        load_file(folder / "model" / "model.safetensors")["model.embed_tokens.weight"] for folder in (run_folder, run)
    )
    assert torch.equal(new[: len(old)], old) == ("--lora_rank" in flags)
    before = load_file(run / "checkpoint-2" / "model.safetensors") if "--lora_rank" not in flags else None
    assert before is None or not torch.equal(before["model.embed_tokens.weight"][len(old) :], new[len(old) :])
    assert not torch.equal(new[-1], new[-2])


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "there is no pretrained model to start from"),
        (["--init_from", "MODEL", "--mtp_loss_weight", "0.5"], "mtp_loss_weight is not supported with chat"),
        (["--init_from", "MODEL", "--block_size", "8"], "raise --block_size"),
        (["--init_from", "MODEL", "--data", "."], "no text file or table"),
    ],
)
def test_settings_that_do_not_fit_are_rejected(flags, message, run_folder, chats, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [str(run_folder / "model") if word == "MODEL" else word for word in flags]
    argv = [
        "train",
        "--recipe",
        "chat",
        "--use_cpu",
        "--data",
        str(chats),
        "--output_dir",
        str(tmp_path / "run"),
        *flags,
    ]
    assert main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("first", ["assistant", "system"])
def test_conversations_that_start_with_an_answer_are_trained_on_and_published(first, tmp_path):
    """They have no question that could be shown in a sample."""
    start = [{"role": "system", "content": "Add."}] if first == "system" else []
    messages = [*start, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": messages, "i": i}) + "\n" for i in range(30)))
    flags = ["--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2", "--vocab_size", "300"]
    flags += ["--positional_heads", "none", "--validation_fraction", "0", "--output_dir", str(tmp_path / "run")]
    argv = [
        "train",
        "--recipe",
        "task",
        "--use_cpu",
        "--max_steps",
        "2",
        "--data",
        str(tmp_path / "chats.jsonl"),
        *flags,
    ]
    assert main([*argv, "--per_device_train_batch_size", "1", "--block_size", "64"]) == 0
    sample = json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())["sample"]
    assert sample["prompt"] == "" and len(sample["texts"]) == 3
    example = json.dumps(start or [{"role": "user", "content": "Hello"}])  # a question, if there is no message at all
    assert f"messages = {example}\n" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.parametrize("name, value", [("max_tokens", 5), ("minutes", 1), ("size", "10k")])
def test_settings_without_an_effect_on_conversations_are_rejected(name, value, chats, tmp_path):
    recipe = None if name in ("minutes", "size") else "task"
    with pytest.raises(MiniGPTError, match=f"{name} is not supported with chat"):
        minigpt_hf.train(chats, recipe, chat=True, output_dir=tmp_path / "run", **{name: value})


@pytest.mark.slow
def test_all_held_out_conversations_are_scored(chats, run_folder, tmp_path, caplog):
    fine_tune(run_folder, chats, tmp_path / "run", "--validation_characters", "10")
    assert "validation_characters 10: no effect, all conversations are scored" in caplog.text
    assert json.loads((tmp_path / "run" / "model" / "minigpt.json").read_text())["results"]["documents"] == 6


def test_other_processes_load_the_same_sequences(chats, run_folder, tmp_path):
    """Data loader workers that are not forked receive the data set as a pickle."""
    tokenizer = with_chat_tokens(AutoTokenizer.from_pretrained(run_folder / "model"))
    corpus = load_corpus(str(chats), 0.0, chat=True, cache_dir=tmp_path)
    stream = build_conversation_stream(corpus.train, tokenizer, 64, tmp_path)
    dataset = ConversationDataset(stream, ChatFormat(tokenizer), 64, seed=0)
    copied = pickle.loads(pickle.dumps(dataset))
    assert len(copied) == len(dataset)
    for index in range(len(dataset)):
        one, other = dataset[0, index], copied[0, index]
        assert all((one[name] == other[name]).all() for name in one)


def test_the_card_counts_the_tokens_and_bytes_of_answers(chat_run):
    metadata = json.loads((chat_run / "model" / "minigpt.json").read_text())
    train = metadata["data"]["train"]
    assert metadata["tokenizer"]["bytes_per_token"] == train["bytes"] / train["targets"]
    card = (chat_run / "model" / "README.md").read_text()
    assert f"| training | {train['documents']} | {train['characters']} | {train['bytes']} " in card.replace(",", "")
    assert f"| bytes of answers per token of answers | {train['bytes'] / train['targets']:.2f} |" in card
    assert "bytes per token" not in card
    text = (chat_run / "log.jsonl").read_text().splitlines()
    epoch = next(json.loads(line)["epoch"] for line in text if "train_loss" in line)
    assert metadata["training"]["epochs"] == pytest.approx(epoch, rel=0.05)  # `epoch` counts batches, not sequences


def test_evaluate_says_what_it_scores(chat_run, chats, capsys):
    assert main(["evaluate", str(chat_run / "model"), "--data", str(chats)]) == 0
    out = capsys.readouterr().out
    assert "tokens of answers" in out and "60 conversations" in out and "complete conversations of at most 64" in out
    assert "per window" not in out


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_as_an_uninterrupted_one(chat_run, run_folder, chats, tmp_path):
    """SIGKILL before the first checkpoint, while it is written, and after the third."""
    run = tmp_path / "run"
    argv = [sys.executable, "-m", "minigpt_hf.cli", "train", *CHAT_FLAGS, "--residual_dropout", "0.1"]
    argv += ["--init_from", run_folder / "model", "--data", chats, "--output_dir", run]
    for event in ("log.jsonl", ".unfinished*", "checkpoint-6"):
        known = {*run.glob(event)}
        with subprocess.Popen(argv, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
            while process.poll() is None and {*run.glob(event)} <= known:
                time.sleep(0.001)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    assert not (run / "model").exists()
    assert subprocess.run(argv, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
    assert rows(run) == rows(chat_run)
    assert_equal(state_of(run / "checkpoint-8"), state_of(chat_run / "checkpoint-8"))
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, chat_run)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_processes_train_as_one(run_folder, chats, tmp_path):
    """With half the batch each: equal losses within float32 rounding, and the score of one process."""
    argv = ["--init_from", str(run_folder / "model"), "--data", str(chats), *CHAT_FLAGS]
    runs = {}
    for processes, batch in ((1, "4"), (2, "2")):
        runs[processes] = tmp_path / str(processes)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
        command = [*launcher, str(ROOT / "scripts" / "train.py"), *argv, "--output_dir", str(runs[processes])]
        done = subprocess.run(
            [*command, "--per_device_train_batch_size", batch],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
    one, two = rows(runs[1]), rows(runs[2])
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-4)
    scores = [json.loads((runs[n] / "model" / "minigpt.json").read_text())["results"] for n in (1, 2)]
    assert scores[0]["tokens"] == scores[1]["tokens"] and scores[0]["loss"] == pytest.approx(
        scores[1]["loss"], rel=1e-3
    )


# -- minigpt chat -----------------------------------------------------------------------------------------------------


def chat(folder, lines: str, *flags) -> tuple[int, str, str]:
    argv = [sys.executable, "-m", "minigpt_hf.cli", "chat", str(folder / "model"), "--max_new_tokens", "8", *flags]
    done = subprocess.run(argv, input=lines, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_a_conversation_in_the_terminal(chat_run, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "saved.jsonl"
    lines = ["3 + 1", "Thanks", f"/save {saved}", "/nonsense", "/system Add.", "//4", f"/save {saved}"]
    lines += ["/reset", f"/save {saved}", "/exit", "never"]
    text = "\r\n".join(lines).encode()  # of a file with the line ends of Windows
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), newline="\n"))  # as Python opens it on POSIX
    assert main(["chat", str(chat_run / "model"), "--max_new_tokens", "8"]) == 0
    errors = capsys.readouterr().err
    assert "/nonsense is not a command" in errors and "there is no conversation to save yet" in errors
    first, second = (json.loads(line)["messages"] for line in saved.read_text().splitlines())
    assert [message["role"] for message in first] == ["user", "assistant"] * 2
    assert [message["content"] for message in second[:2]] == ["Add.", "/4"]
    model = AutoModelForCausalLM.from_pretrained(chat_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(chat_run / "model")
    for turn in (1, 3):  # the answers are the model's own, given all messages before them
        inputs = tokenizer.apply_chat_template(
            first[:turn], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=True) == first[turn]["content"]


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_one_answer_is_printed_whatever_the_generation_config_has(settings, chat_run, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(chat_run / "model", tmp_path / "model")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1\n"))
    capsys.readouterr()
    assert main(["chat", str(folder), "--max_new_tokens", "3", "--seed", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.count("> ") == 2 and "minigpt chat: " not in err


@pytest.mark.parametrize(
    ("flags", "is_unused"),
    [
        ("--temperature 3 --top_k 2 --seed 1", True),
        ("--temperature 3 --do_sample true --seed 1", False),
        ("", False),
    ],
)
def test_options_of_sampling_without_effect_are_reported(flags, is_unused, chat_run, monkeypatch, capsys):
    """The default of a model that answers is the most probable token."""
    for command in ("chat", "generate"):
        monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1\n"))
        capsys.readouterr()
        assert main([command, str(chat_run / "model"), "--max_new_tokens", "3", *flags.split()]) == 0
        assert ("temperature, top_k, seed: no effect without --do_sample true" in capsys.readouterr().err) == is_unused


def test_options_that_no_causal_model_uses_are_reported(chat_run, monkeypatch, capsys):
    flags = "--diversity_penalty 0.5 --low_memory true --decoder_start_token_id 3 --max_matching_ngram_size 2"
    flags += " --num_beam_groups 2"
    for command in ("chat", "generate"):
        monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1\n"))
        assert main([command, str(chat_run / "model"), "--max_new_tokens", "3", *flags.split()]) == 0
        unused = "diversity_penalty, num_beam_groups, low_memory, decoder_start_token_id: no effect in this version"
        error = capsys.readouterr().err
        assert unused in error and "max_matching_ngram_size: no effect without --prompt_lookup_num_tokens" in error


@pytest.mark.slow
def test_invalid_utf8_and_empty_answers_in_the_terminal(chat_run, tmp_path):
    """The conversation continues after a byte that is not UTF-8."""
    typed = b"1 + 1\n\xff\n/save %s\n" % str(tmp_path / "chats.jsonl").encode()
    empty = ["--max_new_tokens", "1", "--forced_eos_token_id", str(end_of(chat_run))]
    argv = [sys.executable, "-m", "minigpt_hf.cli", "chat", str(chat_run / "model"), *empty]
    result = subprocess.run(argv, input=typed, capture_output=True, check=True)
    assert b"minigpt chat: the prompt is not valid UTF-8 at position 0" in result.stderr
    assert b"it cannot be trained on, because a message is empty" in result.stderr
    (row,) = map(json.loads, (tmp_path / "chats.jsonl").read_text().splitlines())
    assert [message["content"] for message in row["messages"]] == ["1 + 1", ""]


def end_of(chat_run) -> int:
    return AutoTokenizer.from_pretrained(chat_run / "model").eos_token_id


@pytest.mark.slow
def test_the_oldest_questions_are_forgotten_when_the_context_is_full(chat_run):
    context = AutoModelForCausalLM.from_pretrained(chat_run / "model").config.max_position_embeddings
    code, _, errors = chat(chat_run, f"{'9' * (context // 2)}\n{'8' * (context // 2)}\n")
    assert code == 0
    assert "no longer fit into the context and are forgotten: 1)" in errors


def test_a_short_conversation_fits_into_a_short_context_by_default(chat_run, tmp_path, monkeypatch, capsys):
    model = shutil.copytree(chat_run / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1\n2 + 2\n"))
    every_token = json.dumps([*range(config["vocab_size"])])  # ends an answer
    assert main(["chat", str(model), "--eos_token_id", every_token]) == 0
    assert "forgotten" not in capsys.readouterr().err


def test_the_number_of_new_tokens_of_the_generation_config_is_the_default(chat_run, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(chat_run / "model", tmp_path / "model")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_new_tokens": 3, "min_new_tokens": 3}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = ChatFormat(tokenizer).encode([{"role": "user", "content": "1 + 1"}], add_generation_prompt=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    answer = model.generate(torch.from_numpy(ids)[None])[0, len(ids) :]
    assert len(answer) == 3
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1\n"))
    capsys.readouterr()
    assert main(["chat", str(folder)]) == 0
    assert capsys.readouterr().out == f"> {tokenizer.decode(answer, skip_special_tokens=True)}\n> \n"


@pytest.mark.slow
def test_a_base_model_continues_each_text(run_folder):
    code, out, errors = chat(run_folder, "def \n")
    assert code == 0
    assert "> def " in out and "has no chat template" in errors


def test_a_system_message_for_a_model_without_a_chat_template_is_an_error(run_folder, monkeypatch, capsys):
    folder = str(run_folder / "model")
    monkeypatch.setattr("sys.stdin", io.StringIO("/system Add.\n"))
    assert main(["chat", folder]) == 0
    assert "/system: the model has no chat template, so a system message has no effect" in capsys.readouterr().err
    for flags in ([], ["--web"]):
        assert main(["chat", folder, "--system", "Add.", *flags]) == 2
        assert "--system: the model has no chat template, so a system message has no effect" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(run_folder):
    argv = [sys.executable, "-m", "minigpt_hf.cli", "chat", str(run_folder / "model"), "--max_new_tokens", "100000"]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        for text in (b"def ", b"import "):
            process.stdin.write(text + b"\n")
            process.stdin.flush()
            out = b""
            while b"> " + text not in out:  # the answer has begun
                out += process.stdout.read(1)
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(b"/exit\n", timeout=100)
    assert process.returncode == 0, errors


def test_the_number_of_steps_follows_from_the_packed_sequences(tmp_path, caplog):
    """40 conversations of 41 tokens: each has a sequence of 64 tokens of its own, so 10 steps of 4 sequences."""
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i:020}", "completion": "x"}) + "\n" for i in range(40)))
    argv = [
        "train",
        "--recipe",
        "task",
        "--data",
        str(file),
        "--tokenizer",
        "bytes",
        "--block_size",
        "64",
        "--no_figures",
    ]
    argv += (
        "--hidden_size 32 --num_hidden_layers 2 --sample_tokens 0 --num_train_epochs 1 --validation_fraction 0".split()
    )
    argv += "--per_device_train_batch_size 4 --warmup_steps 8 --logging_steps 9 --use_cpu".split()
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    assert "does not reach its peak" not in caplog.text
    assert [row["step"] for row in rows(tmp_path / "run")] == [9]


def test_held_out_conversations_that_the_base_model_was_trained_on_are_marked(chat_run, chats, tmp_path, capsys):
    """With a system message, the conversations have other hashes, so others are held out."""
    for name, flags, is_seen in (("system", ["--system", "Add."], True), ("same", [], False)):
        fine_tune(chat_run, chats, tmp_path / name, "--block_size", "128", *flags)
        assert ("was trained on text of the validation split" in capsys.readouterr().err) == is_seen
        card = (tmp_path / name / "model" / "README.md").read_text()
        assert ("**Not a score of unseen text**" in card) == is_seen
