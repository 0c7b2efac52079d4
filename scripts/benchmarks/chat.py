"""Fine-tuning on conversations: packed sequences compared with TRL's padded batches, if TRL is installed.

Both train the same model, with the same AdamW, on the same tokens with the same answers marked, and with as many
conversations per step on average. They alternate in one process. `tokens_per_second` counts the tokens of conversations, not
padding. Before training, both compute the loss of all conversations; its difference is reported.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--data", required=True, help="conversations, e.g. a folder written by `minigpt data`")
    parser.add_argument("--model", required=True, help="model folder to fine-tune")
    parser.add_argument(
        "--conversations", type=int, default=2000, help="number to train on in each round (default: 2000)"
    )
    parser.add_argument("--block_size", type=int, default=256, help="tokens per packed sequence (default: 256)")
    parser.add_argument("--batch_size", type=int, default=16, help="packed sequences per step (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Alternate the candidates and compare their throughput and their loss."""
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from minigpt_hf.cli.parser import quiet
    from minigpt_hf.data.chat_format import ChatFormat, with_chat_tokens
    from minigpt_hf.data.conversations import build_conversation_stream
    from minigpt_hf.data.corpus import load_corpus
    from minigpt_hf.data.packing import ConversationDataset
    from minigpt_hf.data.tokenizer import load_tokenizer
    from minigpt_hf.training.arguments import ModelArguments
    from minigpt_hf.training.initialize import build_config, build_model

    quiet()
    tokenizer = with_chat_tokens(load_tokenizer(args.model))
    chat_format = ChatFormat(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        corpus = load_corpus(args.data, 0.0, chat=True, cache_dir=Path(folder))
        documents = corpus.train.select(np.arange(min(args.conversations, len(corpus.train))))
        stream = build_conversation_stream(documents, tokenizer, args.block_size, Path(folder))
        packed = ConversationDataset(stream, chat_format, args.block_size, seed=0)
        tokens = int(packed.lengths.sum())
        shared = {
            "output_dir": folder,
            "num_train_epochs": 1,
            "per_device_train_batch_size": args.batch_size,
            "learning_rate": 1e-3,
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
            "use_cpu": True,
        }

        def new_model() -> torch.nn.Module:
            torch.manual_seed(0)
            architecture = ModelArguments(init_from=args.model)
            config = build_config(architecture, args.block_size, tokenizer, chat=True)
            return build_model(config, architecture, (chat_format.start, chat_format.end))

        class InEpoch(torch.utils.data.Dataset):
            """The packed sequences of the first epoch, addressed by their index."""

            def __len__(self) -> int:
                return len(packed)

            def __getitem__(self, index: int) -> dict[str, Any]:
                return packed[0, index]

        def packed_trainer() -> Trainer:
            settings = TrainingArguments(**shared, remove_unused_columns=False)
            return Trainer(new_model(), settings, train_dataset=InEpoch(), data_collator=packed.collate)

        def rows() -> Iterator[dict[str, Any]]:
            for ids in stream.iterate_documents():
                mask = chat_format.is_answer(ids).astype(int)
                yield {"input_ids": ids.tolist(), "completion_mask": mask.tolist()}

        candidates: dict[str, Callable[[], Trainer]] = {"packed": packed_trainer}
        if find_spec("trl") is not None:
            from trl import SFTConfig, SFTTrainer

            padded = Dataset.from_list(list(rows()))

            def padded_trainer() -> Trainer:
                rows_per_step = round(args.batch_size * len(padded) / len(packed))
                settings = SFTConfig(
                    **{**shared, "per_device_train_batch_size": rows_per_step},
                    max_length=None,
                    completion_only_loss=True,
                    bf16=False,
                    gradient_checkpointing=False,
                )
                return SFTTrainer(new_model(), args=settings, train_dataset=padded, processing_class=tokenizer)

            candidates["TRL, padded"] = padded_trainer
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        losses: dict[str, float] = {}
        for number in range(args.rounds):
            for name, create in candidates.items():
                with redirect_stdout(StringIO()):
                    trainer = create()
                    if number == 0:
                        losses[name] = mean_loss(trainer)
                    began = time.perf_counter()
                    trainer.train()
                    seconds[name].append(time.perf_counter() - began)
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    result: dict[str, Any] = {
        "conversations": len(stream.documents),
        "tokens": tokens,
        "filled": round(packed.filled, 3),
        "training": [
            {
                "rows": name,
                "tokens_per_second": round(tokens / statistics.median(values)),
                "loss_before_training": round(losses[name], 6),
            }
            for name, values in seconds.items()
        ],
    }
    if len(candidates) > 1:
        pairs = zip(seconds["TRL, padded"], seconds["packed"], strict=True)
        result["throughput_ratio"] = round(statistics.median(padded / packed for padded, packed in pairs), 2)
        result["loss_difference"] = round(abs(losses["packed"] - losses["TRL, padded"]), 6)
    return result


def mean_loss(trainer: Any) -> float:
    """The loss per answer token of all batches, without training."""
    import torch

    nats = tokens = 0.0
    model = trainer.model.eval()
    for batch in trainer.get_train_dataloader():
        labels = batch.get("shift_labels", batch["labels"][:, 1:])
        count = int((labels != -100).sum())
        with torch.no_grad():
            loss = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(count)).loss
        nats, tokens = nats + loss.item() * count, tokens + count
    model.train()
    return nats / tokens
