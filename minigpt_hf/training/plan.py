"""What a training is about to do, said before it does it.

In: a trainer that is ready. Out: five lines: device, text, model, training, time. It refuses nothing.
"""

import math
import time
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig, Trainer

from ..data.prepared import PreparedText
from ..errors import MiniGPTError
from .arguments import MiniGPTTrainingArguments, ModelArguments


def tokens_per_step(training: MiniGPTTrainingArguments, block_size: int) -> int:
    """Tokens that one optimizer step learns from, over all processes."""
    blocks = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    return blocks * block_size


def check_memory(config: PreTrainedConfig, architecture: ModelArguments, training: MiniGPTTrainingArguments) -> None:
    """Whether weights, gradients and two moments of each parameter, in float32, will fit: 16 bytes for each.

    With LoRA what is learnt is little, and 4 bytes are enough; with FSDP processes share.

    Raises:
        MiniGPTError: before anything is allocated, if they will not.
    """
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    parameters = config.num_hidden_layers * layer + embeddings
    on_gpu = training.device.type == "cuda"
    free = torch.cuda.mem_get_info(training.device)[0] if on_gpu else psutil.virtual_memory().available
    needed = (4 if architecture.lora_rank else 16) * parameters / (training.world_size if training.fsdp else 1)
    if needed > free:
        raise MiniGPTError(
            f"this model has {parameters:,} parameters, which need about {needed / 1e9:,.1f} GB to train, and "
            f"{free / 1e9:,.1f} GB are free: lower --hidden_size, --num_hidden_layers or --vocab_size"
        )


def show_plan(trainer: Trainer, text: PreparedText, done: int = 0) -> None:
    """What is about to happen, before it does.

    Args:
        done: Steps that were taken before, if a run is resumed: the time is that of the rest.
    """
    args, model, stream = trainer.args, trainer.model, text.train
    steps = args.max_steps
    if steps <= 0:
        steps_per_epoch = len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps
        steps = math.ceil(steps_per_epoch * args.num_train_epochs)
    step = tokens_per_step(args, trainer.train_dataset.block_size)
    rest = f" for the remaining {steps - done:,} steps" if done else ""
    precision = "bf16 autocast over float32 weights" if args.bf16 else "fp16 autocast" if args.fp16 else "float32"
    print(
        f"device        {device_name(args)}, {precision}\n"
        f"text          {text.name}: {stream.characters:,} characters -> {len(stream):,} tokens of "
        f"{stream.bytes / len(stream):.2f} bytes; validation: {text.split_description}"
        f"{f'; scored: {text.scored}' if text.scored else ''}\n"
        f"model         {model.num_parameters():,} parameters, {model.config.num_hidden_layers} layers of width "
        f"{model.config.hidden_size}, vocabulary {model.config.vocab_size:,}{learnt(model)}\n"
        f"training      {steps:,} steps of {step:,} tokens = {steps * step:,} tokens, "
        f"{steps * step / len(stream):.2f} times the text\n"
        f"time          about {duration((steps - done) * seconds_per_step(trainer))}{rest}, evaluations left out",
        flush=True,
    )


def learnt(model) -> str:
    """How many of the parameters are learnt, where it is not all of them."""
    few, all_of_them = model.num_parameters(only_trainable=True), model.num_parameters()
    return f"; {few:,} of them are learnt ({few / all_of_them:.1%})" if few < all_of_them else ""


def seconds_per_step(trainer: Trainer) -> float:
    """Time forward and backward on one batch, three times, and forget the gradients; the fastest is taken."""
    args = trainer.args
    rows = min(args.train_batch_size, len(trainer.train_dataset))
    batch = trainer.train_dataset.collate([trainer.train_dataset[0, i] for i in range(rows)])
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
    devices = [args.device] if args.device.type == "cuda" else []
    seconds = []
    with torch.random.fork_rng(devices):  # dropout draws numbers
        for _ in range(3):
            began = time.perf_counter()
            with trainer.accelerator.autocast():
                loss = trainer.model.train()(**batch, use_cache=False).loss
            loss.backward()
            loss.item()  # waits for the device
            seconds.append(time.perf_counter() - began)
    trainer.model.zero_grad()
    return min(seconds) * args.gradient_accumulation_steps


def device_name(args: MiniGPTTrainingArguments) -> str:
    """The hardware, in words."""
    if args.device.type == "cuda":
        return f"{args.world_size} × {torch.cuda.get_device_name(args.device)}"
    threads = f", {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    processes = f", {args.world_size} processes" if args.world_size > 1 else ""
    return f"{args.device.type}{threads}{processes}"


def assumed_power(args: MiniGPTTrainingArguments) -> dict[str, Any]:
    """What an estimate of energy goes by, since nothing here measures any.

    The watts are those that Green Algorithms (arXiv:2007.07610) takes for a processor core, and for an accelerator, of
    an unknown kind.
    """
    if args.device.type == "cpu":
        return {"devices": torch.get_num_threads() * args.world_size, "kind": "processor core", "watts": 12}
    return {"devices": args.world_size, "kind": "accelerator", "watts": 200}


def duration(seconds: float) -> str:
    """45 -> "45 s"; 200 -> "3 min 20 s"; 7500 -> "2 h 5 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
