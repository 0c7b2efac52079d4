"""Blocks -> checkpoints: the one subclass of transformers' `Trainer`, and why each override must exist.

In: a model, training blocks, a validation stream. Out: `checkpoint-N/` folders that each load with `from_pretrained`. The
loop, devices, accumulation, mixed precision, schedules and logging are the Trainer's own.
"""

import time
from pathlib import Path

import torch
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from ..data.blocks import Blocks, BlockSampler
from ..data.stream import TokenStream
from ..evaluation import score_documents, summarize
from ..publish.folder import save_suitcase
from .arguments import MiniGPTTrainingArguments
from .optimizer import muon_adamw


class MiniGPTTrainer(Trainer):
    """HF's Trainer with data addressed by (epoch, index), exact validation, and checkpoints without pickles."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: MiniGPTTrainingArguments,
        blocks: Blocks,
        validation: TokenStream | None,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
    ):
        super().__init__(
            model=model,
            args=args,
            data_collator=blocks.collate,
            train_dataset=blocks,
            eval_dataset=validation,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=optimizer_factory(args) if args.muon else None,
        )
        self.remove_callback(PrinterCallback)  # `callbacks` print lines instead of dictionaries

    def _get_train_sampler(self, train_dataset: Blocks | None = None) -> Sampler:
        """Because the order of blocks is computed from (seed, epoch), where a `RandomSampler` would store it."""
        return BlockSampler(len(self.train_dataset), self.train_dataset.seed)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Because a mean over batches is not a mean over tokens: this is the figure of `minigpt evaluate`, exactly.

        Each process scores its share of the windows; the sums are added up.
        """
        stream: TokenStream = self.eval_dataset
        block_size = self.train_dataset.block_size
        began = time.perf_counter()
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            nats, tokens, documents = score_documents(
                self.model,
                stream.texts(),
                stream.end_of_text,
                block_size,
                batch_size=self.args.per_device_eval_batch_size,
                share=(self.args.process_index, self.args.world_size),
            )
        # Sums of natural logarithms fit float32 well enough to travel; MPS knows no float64.
        sums = torch.tensor([nats, tokens], device=self.args.device, dtype=torch.float32)
        nats, tokens = self.accelerator.reduce(sums, "sum").tolist() if self.args.world_size > 1 else (nats, tokens)
        score = summarize(nats, int(tokens), stream.bytes, documents, block_size, None).to_dict()
        metrics = {f"{metric_key_prefix}_{name}": score[name] for name in ("loss", "perplexity", "bits_per_byte")}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - began, 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Because the Trainer would pickle its arguments beside the weights, and publish `use_cache: false`."""
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        save_suitcase(model, self.processing_class, Path(output_dir or self.args.output_dir), state_dict)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Because a tied head is not in the file, and the Trainer warns that it is missing; anything else would be."""
        missing = set(load_result.missing_keys) - set(self.model.all_tied_weights_keys)
        assert not missing and not load_result.unexpected_keys, f"checkpoint does not fit the model: {load_result}"


def optimizer_factory(args: MiniGPTTrainingArguments):
    """Muon with AdamW, in the form in which the Trainer takes an optimizer that looks at the whole model."""
    settings = {
        "lr": args.learning_rate,
        "muon_lr": args.muon_learning_rate,
        "momentum": args.muon_momentum,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    return (lambda: muon_adamw), settings
