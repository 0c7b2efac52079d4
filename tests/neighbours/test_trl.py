"""TRL: `SFTTrainer` takes steps on text and on chat messages; its first loss is the model's own, and it goes down."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests.neighbours.conftest import CHAT_TEMPLATE, EMAIL

STEPS = 8


@pytest.fixture
def chatting(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def rows_of(kind: str) -> list[dict]:
    lines = (EMAIL / "policy.py").read_text(encoding="utf-8").splitlines()
    lines = [line.strip() for line in lines if len(line.strip()) > 40][:16]
    if kind == "text":
        return [{"text": line} for line in lines]
    return [
        {"messages": [{"role": "user", "content": line[:20]}, {"role": "assistant", "content": line[20:]}]}
        for line in lines
    ]


@torch.no_grad()
def mean_loss(model, tokenizer, texts: list[str]) -> float:
    """Nats per token of a batch, by hand: every token but the first of each text."""
    nats = tokens = 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids]])
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        nats, tokens = nats + loss.item(), tokens + ids.shape[1] - 1
    return nats / tokens


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_sft_starts_at_the_loss_of_the_model_and_learns(kind, lora, trained, model, chatting, tmp_path):
    rows = rows_of(kind)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=len(rows),  # all of it in each step, so that the losses are of the same text
            learning_rate=1e-2 if lora else 1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=chatting,
        peft_config=LoraConfig(task_type="CAUSAL_LM") if lora else None,
    )
    if kind == "text":  # TRL closes each text with the end-of-text token
        texts = [row["text"] + chatting.eos_token for row in rows]
    else:
        texts = [chatting.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    first = mean_loss(model, chatting, texts)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(first, abs=1e-3)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.2
    trained_names = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert all(("lora_" in name) == lora for name in trained_names)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / ("adapter_model.safetensors" if lora else "modeling_minigpt.py")).is_file()
