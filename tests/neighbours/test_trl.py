"""TRL: `SFTTrainer` on text and on chat messages starts at the loss of the model, and the loss decreases."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

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
