"""TRL: `SFTTrainer` on text and on chat messages starts at the loss of the model, and the loss decreases; the programs of
docs/chat.md train a model on answers, on pairs and with a reward.
"""

import math
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from minigpt_hf.cli import main
from tests.conftest import ROOT
from tests.neighbours.conftest import CHAT_TEMPLATE, EMAIL

STEPS = 8


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def make_rows(data_format: str) -> list[dict]:
    lines = (EMAIL / "policy.py").read_text(encoding="utf-8").splitlines()
    lines = [line.strip() for line in lines if len(line.strip()) > 40][:16]
    if data_format == "text":
        return [{"text": line} for line in lines]
    return [
        {"messages": [{"role": "user", "content": line[:20]}, {"role": "assistant", "content": line[20:]}]}
        for line in lines
    ]


@torch.no_grad()
def mean_loss(model, tokenizer, texts: list[str]) -> float:
    """Compute the mean loss in nats per token, over every token except the first of each text."""
    total_loss = tokens = 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids]])
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        total_loss, tokens = total_loss + loss.item(), tokens + ids.shape[1] - 1
    return total_loss / tokens


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("data_format", ["text", "messages"])
def test_sft_starts_at_the_loss_of_the_model_and_decreases_it(data_format, lora, model, chat_tokenizer, tmp_path):
    rows = make_rows(data_format)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=len(rows),  # every step uses all rows, so that the losses are comparable
            learning_rate=1e-2 if lora else 1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=chat_tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM") if lora else None,
    )
    if data_format == "text":  # TRL appends the EOS token
        texts = [row["text"] + chat_tokenizer.eos_token for row in rows]
    else:
        texts = [chat_tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    initial_loss = mean_loss(model, chat_tokenizer, texts)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(initial_loss, abs=1e-3)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.2
    trained_names = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert all(("lora_" in name) == lora for name in trained_names)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / ("adapter_model.safetensors" if lora else "modeling_minigpt.py")).is_file()


def test_the_programs_of_the_documentation_train_on_answers_pairs_and_a_reward(tmp_path, monkeypatch):
    """With two steps each."""
    monkeypatch.chdir(tmp_path)
    assert main(["data", "arithmetic", "--output_dir", "sums"]) == 0
    argv = ["train", "--recipe", "task", "--data", "sums", "--tokenizer", "characters", "--use_cpu"]
    assert main([*argv, "--max_steps", "30", "--output_dir", "runs/short"]) == 0
    document = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    section = document.partition("## Preference tuning")[2].partition("## Limits")[0]
    names, logs = {}, []
    for program in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        program, settings = re.subn(r"(max_steps|logging_steps)=\d+", r"\1=2", program)
        assert settings == 2
        exec(program.replace("logging_steps=2", "logging_steps=1"), names)
        logs.append([row for row in names["trainer"].state.log_history if "loss" in row])
    _, dpo, grpo = logs
    assert [len(log) for log in logs] == [2, 2, 2]
    assert all(math.isfinite(row["loss"]) for log in logs for row in log)
    assert dpo[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)  # the model equals its reference
    assert all(0 <= row["reward"] <= 1.5 for row in grpo)
    for folder in ("runs/sft", "runs/dpo", "runs/rewarded"):
        assert main(["evaluate", folder, "--data", "sums/test.jsonl", "--score", "exact", "--no_save"]) == 0
