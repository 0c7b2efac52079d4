"""The training loop with no Trainer: what happens in each step, on one page.

    python scripts/bare_loop.py --recipe shakespeare-char --data tinyshakespeare.txt --output_dir runs/bare

In: the recipe and flags of `minigpt train`. Out: a folder that loads with `from_pretrained`, and the same losses as the
Trainer's, to the last bit on one CPU. It refuses nothing and restores nothing: no checkpoints, one device, no
validation. Its use is to be read, and to measure what the Trainer adds.
"""

import argparse
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import get_scheduler, set_seed

from minigpt_hf import MiniGPTForCausalLM
from minigpt_hf.data.blocks import Blocks, BlockSampler
from minigpt_hf.run import make_config, make_model, prepare_text
from minigpt_hf.training.arguments import Arguments, MiniGPTTrainingArguments
from minigpt_hf.training.recipe import parse_arguments
from minigpt_hf.training.trainer import optimizer_factory


def train(arguments: Arguments) -> list[float]:
    """Train as the recipe says and return the loss of every step, in nats per token."""
    data, architecture, training = arguments
    set_seed(training.seed)
    text = prepare_text(data)
    config = make_config(architecture, data.block_size, text.tokenizer)
    model = make_model(config, architecture).to(training.device)
    losses = learn(model, Blocks(text.train, data.block_size, training.seed), training)
    model.save_pretrained(training.output_dir)
    text.tokenizer.save_pretrained(training.output_dir)
    return losses


def learn(model: MiniGPTForCausalLM, blocks: Blocks, training: MiniGPTTrainingArguments) -> list[float]:
    """The loop itself."""
    model.train()
    optimizer = make_optimizer(model, training)
    steps = training.max_steps
    schedule = get_scheduler(training.lr_scheduler_type, optimizer, training.get_warmup_steps(steps), steps)

    losses, epoch, began = [], 0, time.perf_counter()
    while len(losses) < steps:
        order = BlockSampler(len(blocks), training.seed)
        order.set_epoch(epoch)  # each epoch cuts the text elsewhere and shuffles the blocks anew
        for batch in DataLoader(blocks, training.train_batch_size, sampler=order, collate_fn=blocks.collate):
            batch = {name: tensor.to(training.device) for name, tensor in batch.items()}
            with torch.autocast(training.device.type, dtype=torch.bfloat16, enabled=training.bf16):
                # The loss is summed and divided by the number of tokens, as the Trainer does for the whole step.
                loss = model(**batch, use_cache=False, num_items_in_batch=batch["labels"].numel()).loss
            loss.backward()  # how would the loss change with each weight?
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            optimizer.step()  # move each weight a little against it
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) % training.logging_steps == 0:
                speed = len(losses) * batch["labels"].numel() / (time.perf_counter() - began)
                print(f"step {len(losses)}/{steps}   loss {losses[-1]:.4f}   {speed:,.0f} tokens/s", flush=True)
            if len(losses) == steps:
                break
        epoch += 1
    return losses


def make_optimizer(model: MiniGPTForCausalLM, training: MiniGPTTrainingArguments) -> torch.optim.Optimizer:
    """Muon for the matrices of the layers and AdamW for the rest; or AdamW for all, which decays no norm weight."""
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
    arguments = parse_arguments(flags, recipe.recipe)
    if arguments[2].size or arguments[2].minutes:
        raise SystemExit("this loop chooses no settings: name a recipe without size and minutes, e.g. --recipe demo")
    if Path(arguments[2].output_dir).exists():
        raise SystemExit(f"{arguments[2].output_dir} exists; name another --output_dir")
    train(arguments)
