"""Blocks -> checkpoints: the one subclass of transformers' `Trainer`, and why each override must exist.

In: a model, training blocks, a validation stream. Out: `checkpoint-N/` folders that each load with `from_pretrained`. The
loop, devices, accumulation, mixed precision, schedules and logging are the Trainer's own.
"""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import PushInProgress

from ..data.blocks import Blocks, BlockSampler
from ..data.stream import TokenStream
from ..evaluation import score_documents, summarize
from ..publish.folder import published_files, save_suitcase, write_story
from ..publish.push import commit_in_background, open_repository
from .arguments import MiniGPTTrainingArguments
from .checkpoint import FINGERPRINT, unfinished, whole_or_absent
from .optimizer import muon_adamw
from .resume import read_log
from .stops import BadLoss, DiskFull


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
        fingerprint: dict[str, Any] | None = None,
        story: Callable[["MiniGPTTrainer"], dict[str, Any]] | None = None,
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
        self.fingerprint = fingerprint or {}
        assert story is not None or not args.push_to_hub, "what is pushed while it trains needs a card"
        self.story = story  # what the card is to tell, at any moment
        self.step_batches: list[torch.Tensor] = []  # input ids of this step, kept until it is known to be good
        self.loss_before_step = 0.0
        self.skipped_steps = self.skipped_since_log = 0

    # -- data ---------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Blocks | None = None) -> Sampler:
        """Because the order of blocks is computed from (seed, epoch), where a `RandomSampler` would store it."""
        self.block_sampler = BlockSampler(len(self.train_dataset), self.train_dataset.seed)
        return self.block_sampler

    def _init_training_state(self, max_steps, steps_per_epoch, num_train_epochs, *args, **kwargs) -> tuple[int, int]:
        """Because the Trainer resumes by throwing batches away, and takes one step too many after the last one.

        Here passed batches cost nothing, and at the last step no epoch is left.
        """
        epochs, batches = super()._init_training_state(max_steps, steps_per_epoch, num_train_epochs, *args, **kwargs)
        self.block_sampler.passed = batches * self._train_batch_size * self.args.world_size
        self.steps_logged = self.state.global_step
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else (epochs, batches)

    # -- validation ---------------------------------------------------------------------------------------------------

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

    # -- steps --------------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Because the data of a step that goes wrong are to be shown."""
        if not self.step_batches:
            self.loss_before_step = self._tr_loss.clone()
        self.step_batches.append(inputs["input_ids"])
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Because the Trainer's label smoothing shifts labels by itself, and so would lose one of each block."""
        if self.label_smoother is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        others = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        outputs = model(**others)
        loss = self.label_smoother(outputs, inputs["shift_labels"], num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the gradients of all processes are averaged, not summed
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Because this runs before every optimizer step: the last moment to keep a bad one from spreading."""
        norm = super()._get_grad_norm(model, grad_norm)
        loss = (self._tr_loss - self.loss_before_step).item()
        batches, self.step_batches = self.step_batches, []
        # A uniform guess costs ln(V); what costs ten times as much has exploded. (With fp16 a gradient that is not
        # finite is how the loss scale is found, and accelerate leaves out that step.)
        exploded = loss > 10 * math.log(self.model.config.vocab_size)
        if math.isfinite(loss) and not exploded and (self.args.fp16 or math.isfinite(float(norm))):
            return norm
        step = self.state.global_step + 1
        what = f"step {step}: the loss is {loss:.4g} and the gradient norm {float(norm):.4g}"
        if self.args.on_bad_loss == "skip":
            self.skipped_steps += 1
            self.skipped_since_log += 1
            self._tr_loss.copy_(self.loss_before_step)
            model.zero_grad(set_to_none=True)  # the optimizer passes over parameters without a gradient
            print(f"{what}; it is left out ({self.skipped_steps} so far)", flush=True)
            return norm
        file = Path(self.args.output_dir) / f"bad-step-{step}.json"
        rows = [row for batch in batches for row in batch.tolist()]
        texts = self.processing_class.batch_decode(rows)
        file.write_text(json.dumps({"what": what, "input_ids": rows, "texts": texts}, ensure_ascii=False), "utf-8")
        raise BadLoss(
            f"{what}; no weight was changed by it, its data are in {file}, earlier checkpoints are untouched; "
            "go on with a lower --learning_rate and --muon_learning_rate (--allow_change), or with --on_bad_loss skip"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Because a step that was left out must not count as one with loss 0."""
        if "loss" in logs and self.skipped_since_log:
            steps = self.state.global_step - self.steps_logged
            counted, self.skipped_since_log = steps - self.skipped_since_log, 0
            logs["loss"] = logs["loss"] * steps / counted if counted else math.nan
        if "loss" in logs:
            self.steps_logged = self.state.global_step
            if self.skipped_steps:
                logs["skipped_steps"] = self.skipped_steps
        super().log(logs, start_time)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        """Because a checkpoint is to be whole or absent, and the Trainer writes it in its place, file by file."""
        run, step = Path(self.args.output_dir), self.state.global_step
        checkpoint = run / f"checkpoint-{step}"
        try:
            staged = whole_or_absent(checkpoint) if self.args.should_save else nullcontext(unfinished(checkpoint))
            with staged as folder:
                self.args.output_dir = str(folder.parent)
                self.accelerator.wait_for_everyone()  # the folder is there
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # each process has written its random states
                if self.args.should_save:
                    if self.state.best_global_step == step:
                        self.state.best_model_checkpoint = str(checkpoint)  # the Trainer noted where it was staged
                    self.state.save_to_json(folder / "trainer_state.json")
                    (folder / FINGERPRINT).write_text(json.dumps(self.fingerprint, indent=2) + "\n", encoding="utf-8")
        except Exception as error:
            free = shutil.disk_usage(run).free
            if "No space left" not in str(error) and free >= self.bytes_of_a_checkpoint():
                raise
            needed = f"{self.bytes_of_a_checkpoint() / 1e6:,.1f} MB"
            raise DiskFull(
                f"no room for checkpoint-{step}: it needs about {needed}, {free / 1e6:,.1f} MB are free; earlier "
                "checkpoints are whole; make room, and the same command goes on from there"
            ) from error
        finally:
            self.args.output_dir = str(run)
        if self.args.should_save:
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Because the Trainer would pickle its arguments beside the weights, and publish `use_cache: false`."""
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        save_suitcase(model, self.processing_class, Path(output_dir or self.args.output_dir), state_dict)

    def bytes_of_a_checkpoint(self) -> int:
        """Weights in float32, one number of Muon or two of AdamW for each of them, and the small files."""
        matrices = sum(p.numel() for n, p in self.model.named_parameters() if ".layers." in n and p.ndim == 2)
        total = self.model.num_parameters()
        moments = matrices + 2 * (total - matrices) if self.args.muon else 2 * total
        return 4 * (total + moments) + len(self.processing_class.backend_tokenizer.to_str().encode()) + 200_000

    def check_room(self) -> None:
        """Whether the checkpoints that are kept, the one being written, and the model folder will fit.

        Raises:
            DiskFull: before the first step, if they will not.
        """
        if self.args.save_strategy == "no":
            return
        kept = self.args.save_total_limit or math.ceil(1 / self.args.save_steps if self.args.save_steps < 1 else 1)
        copies = 2 if self.args.push_to_hub else 1  # of the model: its folder, and what is on the way to the Hub
        needed = (kept + 1) * self.bytes_of_a_checkpoint() + 4 * self.model.num_parameters() * copies
        free = shutil.disk_usage(self.args.output_dir).free
        if free < needed:
            raise DiskFull(
                f"no room for this run in {self.args.output_dir}: {kept} checkpoints, one being written and the model need "
                f"about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; make room, or name another --output_dir"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Because what was allowed to change is to be applied, and the Trainer restores old rates over new ones.

        Moments and position come from the checkpoint, settings from the arguments; unchanged ones are the same numbers.
        """
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not isinstance(self.lr_scheduler, LambdaLR):
            return  # schedules of another kind set their rates by what they have seen
        schedule = self.lr_scheduler
        schedule.base_lrs = [setting["initial_lr"] for setting in settings]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
        for group, setting, rate in zip(self.optimizer.param_groups, settings, schedule._last_lr, strict=True):
            group.update(setting, lr=rate)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Because a tied head is not in the file, and the Trainer warns that it is missing; anything else would be."""
        missing = set(load_result.missing_keys) - set(self.model.all_tied_weights_keys)
        assert not missing and not load_result.unexpected_keys, f"checkpoint does not fit the model: {load_result}"

    # -- the Hub ------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: None = None, private: bool | None = None) -> None:
        """Because a refusal of the Hub is to be told in one line, and a public repository not to pass for a private one."""
        if self.is_world_process_zero():
            shutil.rmtree(Path(self.args.output_dir) / ".pushing", ignore_errors=True)  # what a killed run left
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            self.hub_model_id = open_repository(name, bool(private or self.args.hub_private_repo))
        self.push_in_progress = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Because the Trainer uploads weights without code and card, along with the log and a pickle, while they are moved.

        Here a model folder goes up, copied first, in one commit.
        """
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if (
            not self.is_world_process_zero()
            or self.args.hub_strategy == "end"
            or (busy and not self.args.hub_always_push)
        ):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)  # RUN/.unfinished/checkpoint-N
        run = checkpoint.parents[1]
        (run / ".pushing").mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{checkpoint.name}-", dir=run / ".pushing"))
        for file in published_files(checkpoint):
            shutil.copyfile(file, folder / file.name)
        write_story(folder, self.story(self), self.model.config, read_log(run / "log.jsonl"))
        message = f"Training in progress, step {self.state.global_step}"
        job = commit_in_background(folder, self.hub_model_id, self.args.hub_revision, message)
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else []), job])


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
