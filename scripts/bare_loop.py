"""The training loop without `Trainer`, on one page.

    python scripts/bare_loop.py --recipe shakespeare-char --data tinyshakespeare.txt --output_dir runs/bare

Takes the recipe and flags of `minigpt train`, and saves a folder that `from_pretrained` loads. On one CPU the losses
are bit-identical to the Trainer's. It supports one device and a given number of steps, without validation, checkpoints or
resuming, and rejects settings that it would ignore (`check`). It serves as an introduction, and as the baseline of
`benchmark.py throughput`.
"""

import argparse
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import set_seed

from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.data.blocks import SequenceDataset, SequenceSampler
from minigpt_hf.errors import MiniGPTError
from minigpt_hf.training.arguments import MiniGPTTrainingArguments, Settings
from minigpt_hf.training.auxiliary_head import add_auxiliary_loss, attach_auxiliary_head, detach_auxiliary_head
from minigpt_hf.training.initialize import build_config, build_model
from minigpt_hf.training.optimizer import optimizer_factory
from minigpt_hf.training.recipe import parse_arguments
from minigpt_hf.training.schedule import learning_rate_schedule
from minigpt_hf.training.text import prepare_text

# Settings that change weights or losses of the Trainer but not of this loop, and the values that describe this loop.
UNSUPPORTED = {
    **dict.fromkeys(("init_from", "minutes", "size", "neftune_noise_alpha", "fsdp", "deepspeed")),
    "lora_rank": 0,
    "chat": False,
    "shuffle_window": 0,
    "gradient_accumulation_steps": 1,
    "dataloader_drop_last": False,
    "label_smoothing_factor": 0,
    "fp16": False,
    "torch_compile": False,
    "on_bad_loss": "stop",
}


def check(arguments: Settings) -> None:
    """Check that the loop has every requested setting.

    Raises:
        MiniGPTError: if it would ignore one.
    """
    values = {name: value for group in arguments for name, value in vars(group).items()}
    for name, value in UNSUPPORTED.items():
        if values[name] != value and (values[name] or value):
            raise MiniGPTError(
                f"{name} {values[name]}: is not supported by this loop: omit it, or choose another recipe"
            )
    if values["max_steps"] < 1:
        raise MiniGPTError("num_train_epochs is not supported by this loop: give --max_steps")
    if not values["muon"] and values["optim"] not in ("adamw_torch", "adamw_torch_fused"):
        raise MiniGPTError(f"optim {values['optim']}: is not supported by this loop, which has Muon and AdamW")


def train(arguments: Settings) -> list[float]:
    """Prepare the data, train a new model and save it.

    Returns:
        The loss of every step, in nats per token.
    """
    data, architecture, training = arguments
    check(arguments)
    set_seed(training.seed)
    text = prepare_text(data)
    config = build_config(architecture, data.block_size, text.tokenizer)
    model = build_model(config, architecture).to(training.device)
    losses = train_model(model, SequenceDataset(text.train, data.block_size, training.seed), training)
    model.save_pretrained(training.output_dir)
    text.tokenizer.save_pretrained(training.output_dir)
    return losses


def train_model(
    model: MiniGPTForCausalLM, sequences: SequenceDataset, training: MiniGPTTrainingArguments
) -> list[float]:
    """The training loop. Returns the loss of every step, in nats per token."""
    model.train()
    if training.mtp_loss_weight:
        attach_auxiliary_head(model)
    optimizer = make_optimizer(model, training)
    steps = training.max_steps
    scheduler = learning_rate_schedule(optimizer, training, steps)

    losses, epoch, start = [], 0, time.perf_counter()
    while len(losses) < steps:
        sampler = SequenceSampler(len(sequences), training.seed)
        sampler.set_epoch(epoch)  # each epoch splits the stream at another offset and shuffles the sequences
        for batch in DataLoader(sequences, training.train_batch_size, sampler=sampler, collate_fn=sequences.collate):
            batch = {name: tensor.to(training.device) for name, tensor in batch.items()}
            with torch.autocast(training.device.type, dtype=torch.bfloat16, enabled=training.bf16):
                # Sum of the token losses divided by the number of tokens in the step, as in the Trainer.
                num_items = batch["labels"].numel()
                outputs = model(**batch, use_cache=False, output_hidden_states=True, num_items_in_batch=num_items)
                loss = outputs.loss
                if training.mtp_loss_weight:
                    weight = training.mtp_loss_weight * (1 - len(losses) / steps)
                    hidden_states = outputs.hidden_states[-1]
                    loss = add_auxiliary_loss(loss, model, hidden_states, batch["shift_labels"], weight, 1 / num_items)
            loss.backward()
            if training.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) % training.logging_steps == 0:
                speed = len(losses) * batch["labels"].numel() / (time.perf_counter() - start)
                print(f"step {len(losses)}/{steps}   loss {losses[-1]:.4f}   {speed:,.0f} tokens/s", flush=True)
            if len(losses) == steps:
                break
        epoch += 1
    detach_auxiliary_head(model)
    return losses


def make_optimizer(model: MiniGPTForCausalLM, training: MiniGPTTrainingArguments) -> torch.optim.Optimizer:
    """MuonAdamW, or with `muon=False` AdamW for all parameters, without weight decay on norm weights."""
    if training.muon:
        muon_adamw, rates = optimizer_factory(training)
        return muon_adamw()(model, **rates)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (training.adam_beta1, training.adam_beta2)
    return torch.optim.AdamW(groups, training.learning_rate, betas, training.adam_epsilon, fused=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--recipe", default="demo")
    recipe, flags = parser.parse_known_args()
    try:
        arguments = parse_arguments(flags, recipe.recipe)
        check(arguments)
        if Path(arguments[2].output_dir).exists():
            raise MiniGPTError(f"{arguments[2].output_dir} already exists: choose another --output_dir")
        train(arguments)
    except MiniGPTError as error:
        parser.error(str(error))
