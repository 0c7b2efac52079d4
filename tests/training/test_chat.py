"""Fine-tuning on conversations: the published model, its score, exact resuming, LoRA, and `minigpt chat`."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import minigpt_hf
from minigpt_hf import doctor
from minigpt_hf.cli import main
from minigpt_hf.data.chat_format import CHAT_TEMPLATE
from tests.conftest import ROOT

from .conftest import assert_equal, rows, state_of

FLAGS = [
    "--recipe",
    "chat",
    "--use_cpu",
    "--block_size",
    "64",
    "--per_device_train_batch_size",
    "2",
    "--warmup_steps",
    "2",
]
STEPS = [
    "--max_steps",
    "8",
    "--save_steps",
    "2",
    "--eval_steps",
    "4",
    "--logging_steps",
    "1",
    "--save_total_limit",
    "9",
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """60 additions, each followed by thanks."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with file.open("w") as lines:
        for i in range(60):
            contents = [f"{i} + 1", str(i + 1), "Thanks", "Bye."]
            roles = ["user", "assistant"] * 2
            messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return file


@pytest.fixture(scope="module")
def chat_run(run_folder, chats, tmp_path_factory):
    """A base model, fine-tuned for 8 steps with dropout."""
    return fine_tune(run_folder, chats, tmp_path_factory.mktemp("runs") / "chat", "--residual_dropout", "0.1")


def fine_tune(base, chats, folder, *flags):
    argv = ["train", *FLAGS, *STEPS, "--init_from", base / "model", "--data", chats, "--output_dir", folder, *flags]
    assert main([str(word) for word in argv]) == 0
    return folder


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


# -- minigpt chat -----------------------------------------------------------------------------------------------------


def chat(folder, lines: str, *flags) -> tuple[int, str, str]:
    argv = [sys.executable, "-m", "minigpt_hf.cli", "chat", str(folder / "model"), "--max_new_tokens", "8", *flags]
    done = subprocess.run(argv, input=lines, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_a_conversation_in_the_terminal(chat_run, tmp_path):
    saved = tmp_path / "saved.jsonl"
    lines = ["3 + 1", "Thanks", f"/save {saved}", "/nonsense", "/system Add.", "//4", f"/save {saved}"]
    lines += ["/reset", f"/save {saved}", "/exit", "never"]
    code, _, errors = chat(chat_run, "\n".join(lines))
    assert code == 0
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


def test_the_oldest_questions_are_forgotten_when_the_context_is_full(chat_run):
    context = AutoModelForCausalLM.from_pretrained(chat_run / "model").config.max_position_embeddings
    code, _, errors = chat(chat_run, f"{'9' * (context // 2)}\n{'8' * (context // 2)}\n")
    assert code == 0
    assert "(1 earlier questions no longer fit" in errors


def test_a_base_model_continues_each_text(run_folder):
    code, out, errors = chat(run_folder, "def \n")
    assert code == 0
    assert "> def " in out and "has no chat template" in errors


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
