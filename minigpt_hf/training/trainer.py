"""`MiniGPTTrainer`, the subclass of transformers' `Trainer`, with the reason for each override.

The training loop, devices, gradient accumulation, mixed precision, schedules and logging are the Trainer's own.
"""

import dataclasses
import json
import logging
import math
import shutil
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from transformers.utils import PushInProgress

from ..data.blocks import SequenceDataset, SequenceSampler
from ..data.prepared import PreparedText
from ..data.stream import TokenStream
from ..errors import DiskFullError, MiniGPTError, NonFiniteLossError, UntrainedModelError
from ..inference.evaluation import score_documents, summarize
from ..publish.model_folder import non_finite_parameter, published_files, save_model_files, write_metadata
from ..publish.push import commit_in_background, open_repository
from .arguments import MiniGPTTrainingArguments, Settings
from .callbacks import SAMPLE_TEMPERATURE, ProgressLogger, SampleLogger
from .checkpoint import atomic_checkpoint, remove_old_checkpoints, staging_folder, verification_error
from .optimizer import muon_adamw
from .report import TrainingResult, describe
from .run_folder import FINGERPRINT, RunFolder, read_json, read_log
from .stopping import ignore_signals, is_disk_full

logger = logging.getLogger(__name__)

TOTALS = "MiniGPTTrainer"  # entry of the state's `stateful_callbacks`
CADENCE = ("logging_steps", "eval_steps", "save_steps")


class MiniGPTTrainer(Trainer):
    """HF's Trainer with data addressed by (epoch, index), exact validation, and checkpoints without pickles."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: MiniGPTTrainingArguments,
        blocks: SequenceDataset,
        validation: TokenStream | None,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
        fingerprint: dict[str, Any] | None = None,
        settings: Settings | None = None,
        text: PreparedText | None = None,
    ):
        args = args.mutable_copy()  # the Trainer assigns to its arguments; the settings of the run stay frozen
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
        self.settings, self.text = settings, text  # for the model card of what is uploaded during training
        self.progress = next((each for each in callbacks if isinstance(each, ProgressLogger)), None)
        self.samples = next((each for each in callbacks if isinstance(each, SampleLogger)), None)
        self.step_batches: list[torch.Tensor] = []  # input ids of this step, kept until it is known to be good
        self.loss_before_step = 0.0
        self.skipped_steps = self.skipped_since_log = 0
        self.announced_step: int | None = None  # at which the user was told that training resumes
        self.add_callback(_RestoreTotals(self))

    # -- data ---------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: SequenceDataset | None = None) -> Sampler:
        """Because the order of blocks is computed from (seed, epoch), where a `RandomSampler` would store it."""
        self.block_sampler = SequenceSampler(len(self.train_dataset), self.train_dataset.seed)
        return self.block_sampler

    def get_train_dataloader(self) -> DataLoader:
        """Because loader workers are to survive a signal to their process group, and not to change the random state.

        A loader draws the seed of its workers from the global random state when it creates them: at each epoch, as a
        resumed run does, too; but persistent workers only once, which a resumed run would do in another epoch.
        """
        loader = super().get_train_dataloader()
        torch_loader = loader.base_dataloader  # accelerate's loader takes its batches from this one
        if self.args.dataloader_num_workers:
            torch_loader.worker_init_fn = partial(ignore_signals, torch_loader.worker_init_fn)
        if self.args.dataloader_persistent_workers:
            torch_loader.generator = torch.Generator()
        return loader

    def check_batches(self) -> None:
        """Whether an epoch has at least one full batch for each process, where incomplete ones are left out.

        Raises:
            MiniGPTError: if it does not: no step would be taken.
        """
        if len(self.get_train_dataloader()) == 0:
            size, processes, blocks = self._train_batch_size, self.args.world_size, self.train_dataset
            raise MiniGPTError(
                f"the training text has {len(blocks):,} blocks of {blocks.block_size:,} tokens, and a step needs "
                f"{size * processes:,}: per_device_train_batch_size {size} × {processes} processes; lower "
                "--per_device_train_batch_size or --block_size, start fewer processes, or give more text"
            )

    def check_trained(self) -> None:
        """Whether at least half of the optimizer steps were taken, and the weights are finite.

        Raises:
            UntrainedModelError: if most steps were skipped: such a model is never published.
            NonFiniteLossError: if a weight is not finite.
        """
        skipped, steps = self.skipped_steps, self.state.global_step
        if steps <= skipped or skipped > steps / 2:
            what = "no optimizer step was taken" if steps <= skipped else "most optimizer steps were not taken"
            raise UntrainedModelError(
                f"{what}: {skipped} of {steps} steps were skipped because of a non-finite or exploded loss or gradient; no "
                "model is published; start again with a lower --learning_rate and --muon_learning_rate and --fresh, or look "
                "at the text"
            )
        if skipped and self.is_world_process_zero():
            logger.warning(f"{skipped} of {steps} steps were skipped because of a non-finite or exploded loss")
        self.check_weights()

    def check_weights(self) -> None:
        """Whether all weights are finite; on every process if one of them finds a value that is not.

        Raises:
            NonFiniteLossError: whatever `on_bad_loss` is: no later step can repair such weights.
        """
        name = non_finite_parameter(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        names = gather_object([name]) if self.args.world_size > 1 else [name]
        if found := next((each for each in names if each), None):
            raise NonFiniteLossError(
                f"step {self.state.global_step}: {found} has values that are not finite; these weights are neither saved nor "
                f"published, earlier checkpoints are untouched; {self.advice()}"
            )

    def advice(self) -> str:
        """From where to resume after a bad loss, and how."""
        guess = math.log(self.model.config.vocab_size)
        losses = {f"checkpoint-{row['step']}": row["eval_loss"] for row in self.state.log_history if "eval_loss" in row}
        found = list(reversed(RunFolder(Path(self.args.output_dir)).checkpoints()))
        if not found:
            return (
                "there is no checkpoint: start again with a lower --learning_rate and --muon_learning_rate and --fresh"
            )
        lower = "a lower --learning_rate and --muon_learning_rate (--allow_change)"
        loss = losses.get(found[0].name, 0.0)  # one that was not evaluated is given the benefit of the doubt
        good = next((path for path in found if losses.get(path.name, math.inf) < guess), None)
        if not loss < guess and good:
            return (
                f"the validation loss of {found[0].name} is {loss:.4g} and that of a uniform guess {guess:.4g}: resume from "
                f"an earlier checkpoint with --resume_from_checkpoint {good}, and {lower}"
            )
        return f"resume with {lower}"

    # -- resuming -----------------------------------------------------------------------------------------------------

    def _init_training_state(
        self, max_steps, steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        """Because the Trainer resumes by throwing batches away, by paths of the time of saving, and with old intervals.

        Here passed batches cost nothing, the best checkpoint is looked for where the run is now, and the intervals
        (`logging_steps`, `eval_steps`, `save_steps`) are those of the arguments.
        """
        self.began = time.perf_counter()
        self.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        given = {name: getattr(self.args, name) for name in CADENCE}
        if self.resumed_from:
            # The Trainer compares the arguments, which may be shares of all steps, with the steps in the state, and warns.
            saved = read_json(self.resumed_from / "trainer_state.json")
            for name in CADENCE:
                setattr(self.args, name, saved[name])
        epochs, batches = super()._init_training_state(
            max_steps, steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        for name, value in given.items():
            setattr(self.args, name, value)
        if self.resumed_from:
            self.state.compute_steps(self.args, max_steps)
            for name in CADENCE:
                if (new := getattr(self.state, name)) != saved[name]:
                    logger.info(f"{name} was {saved[name]} and is {new} from here on")
            self._find_best_checkpoint()
            if self.announced_step not in (None, self.state.global_step):
                raise MiniGPTError(
                    f"{self.resumed_from}: was saved at step {self.announced_step}, and is loaded at step "
                    f"{self.state.global_step}: it was changed meanwhile; run the same command again"
                )
        self.block_sampler.num_skipped = batches * self._train_batch_size * self.args.world_size
        self.steps_logged = self.state.global_step
        # At the last step no epoch is left; `_run_epoch` is to be called once all the same.
        return (num_train_epochs - 1, 0) if self.state.global_step >= max_steps else (epochs, batches)

    def _find_best_checkpoint(self) -> None:
        """Set the state's best checkpoint to one that is in the run folder, and whole.

        If the best one was removed or is broken, the best of the others takes its place, and a warning says so.
        """
        if self.state.best_global_step is None or self.args.metric_for_best_model is None:
            self.state.best_model_checkpoint = None
            return
        metric, folders = f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}", {}
        for row in self.state.log_history:
            for run in (Path(self.args.output_dir), *([self.resumed_from.parent] if self.resumed_from else [])):
                if math.isfinite(row.get(metric, math.nan)) and (run / f"checkpoint-{row['step']}").is_dir():
                    folders.setdefault(row["step"], (row[metric], run / f"checkpoint-{row['step']}"))
        order = sorted(folders, key=lambda step: (folders[step][0] * (-1 if self.args.greater_is_better else 1), step))
        for step in order:
            value, folder = folders[step]
            if verification_error(folder) is None:
                break
        else:
            step, value, folder = None, None, None
        if step != self.state.best_global_step:
            instead = f"{folder.name} is the best of those that are left" if folder else "no other one was evaluated"
            logger.warning(f"checkpoint-{self.state.best_global_step}, the best one, is missing or broken; {instead}")
        self.state.best_global_step, self.state.best_metric = step, value
        self.state.best_model_checkpoint = str(folder) if folder else None

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Because no number is better than NaN for the Trainer: it would stay the best to the end."""
        return math.isfinite(metrics.get("eval_loss", 0.0)) and super()._determine_best_metric(metrics, trial)

    def _run_epoch(self, *, trial, ignore_keys_for_eval, **kwargs) -> None:
        """Because a run that was stopped at a step is evaluated at it when it resumes, and one that is finished is not
        to take another step."""
        if self._lacks_evaluation():
            metrics = self._evaluate(trial, ignore_keys_for_eval)
            if self._determine_best_metric(metrics, trial):
                self.state.best_model_checkpoint = str(self.resumed_from)
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(trial=trial, ignore_keys_for_eval=ignore_keys_for_eval, **kwargs)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False) -> dict[str, float] | None:
        """Because `eval_on_start`, which alone skips the scheduler, would evaluate again at each start of one run."""
        if skip_scheduler and self.resumed_from is not None:
            return None
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _lacks_evaluation(self) -> bool:
        """Whether the checkpoint was saved for a signal, at a step at which the run would have been evaluated."""
        step, args = self.state.global_step, self.args
        if self.resumed_from is None or step != self._initial_global_step or args.eval_strategy == "no":
            return False
        at_end = step >= self.state.max_steps
        if args.eval_strategy == "epoch":
            is_due = at_end or float(self.state.epoch).is_integer()
            is_due = is_due and args.eval_delay <= self.state.epoch
        else:
            is_due = (at_end or step % self.state.eval_steps == 0) and args.eval_delay <= step
        return is_due and not any(row["step"] == step and "eval_loss" in row for row in self.state.log_history)

    def _finalize_training(self, trial, num_train_samples, start_time):
        """Because the Trainer averages only the loss of this process here, goes by the wall clock, deletes the last
        checkpoint where `save_total_limit` is 1, and loads the best one unseen."""
        if self.args.world_size > 1:
            self._tr_loss = self.accelerator.gather(self._tr_loss.reshape(1)).mean()
        if self.args.load_best_model_at_end:
            self._find_best_checkpoint()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, num_train_samples, self._since_began())
        finally:
            self.args.save_total_limit = limit

    def _since_began(self) -> float:
        """When training began, by what the wall clock shows now: it may have been set meanwhile."""
        return time.time() - (time.perf_counter() - self.began)

    def _totals(self) -> dict[str, Any]:
        """Sums that the Trainer starts again at zero when it resumes; `loss_since_log` by rank."""
        loss = self._tr_loss.reshape(1)
        return {
            "loss_since_log": (self.accelerator.gather(loss) if self.args.world_size > 1 else loss).tolist(),
            "loss_until_log": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "skipped_steps": self.skipped_steps,
            "skipped_since_log": self.skipped_since_log,
        }

    def _restore_totals(self) -> None:
        if self.resumed_from is None or not (totals := self.state.stateful_callbacks.get(TOTALS)):
            return
        losses = totals["attributes"]["loss_since_log"]
        same = len(losses) == self.args.world_size  # else each takes the mean, which is what is logged
        loss = losses[self.args.process_index] if same else sum(losses) / len(losses)
        self._tr_loss = torch.tensor(loss, dtype=torch.float32, device=self.args.device)
        self._total_loss_scalar = totals["attributes"]["loss_until_log"]
        self._globalstep_last_logged = self.steps_logged = totals["attributes"]["logged_step"]
        self.skipped_steps = totals["attributes"]["skipped_steps"]
        self.skipped_since_log = totals["attributes"]["skipped_since_log"]

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
                stream.iterate_documents(),
                stream.bos_token_id,
                block_size,
                batch_size=self.args.per_device_eval_batch_size,
                rank=self.args.process_index,
                world_size=self.args.world_size,
            )
        # Sums of natural logarithms fit float32 well enough to travel; MPS knows no float64.
        sums = torch.tensor([nats, tokens], device=self.args.device)
        nats, tokens = self.accelerator.reduce(sums, "sum").tolist() if self.args.world_size > 1 else (nats, tokens)
        score = summarize(nats / tokens, int(tokens), stream.bytes, documents, block_size, None).to_dict()
        if not math.isfinite(score["loss"]):
            self.check_weights()
            what = f"step {self.state.global_step}: the validation loss is {score['loss']}"
            if self.args.on_bad_loss == "stop":
                raise NonFiniteLossError(
                    f"{what}; the model is not saved, earlier checkpoints are untouched; {self.advice()}"
                )
            if self.is_world_process_zero():
                logger.warning(f"{what}; it does not count as the best")
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
        losses, norms = self._of_all_ranks(self._tr_loss - self.loss_before_step, norm)
        batches, self.step_batches = self.step_batches, []
        # Each rank's loss is scaled so that the mean over ranks is the loss of the step, as with one process.
        loss = sum(losses) / len(losses)
        # A uniform guess costs ln(V); what costs ten times as much has exploded. (With fp16 a gradient that is not
        # finite is how the loss scale is found, and accelerate leaves out that step.)
        exploded = loss > 10 * math.log(self.model.config.vocab_size)
        if math.isfinite(loss) and not exploded and (self.args.fp16 or all(map(math.isfinite, norms))):
            return norm
        self.check_weights()  # broken by the update before; the data of this step are not to blame
        step = self.state.global_step + 1
        what = f"step {step}: the loss is {loss:.4g} and the gradient norm {norms[0]:.4g}"
        if len(losses) > 1:
            what += f" (loss by rank: {', '.join(f'{each:.4g}' for each in losses)})"
        if self.args.on_bad_loss == "skip":
            self.skipped_steps += 1
            self.skipped_since_log += 1
            self._tr_loss.copy_(self.loss_before_step)
            model.zero_grad(set_to_none=True)  # the optimizer passes over parameters without a gradient
            if self.is_world_process_zero():
                print(f"{what}; it is left out ({self.skipped_steps} so far)", flush=True)
            return norm
        file = RunFolder(Path(self.args.output_dir)).bad_step(step)
        rows = [(self.args.process_index, row) for batch in batches for row in batch.tolist()]
        if self.args.world_size > 1:
            rows = gather_object(rows)
        if self.is_world_process_zero():
            ranks, ids = zip(*rows, strict=True)
            texts = self.processing_class.batch_decode(ids)
            content = {"what": what, "ranks": ranks, "losses": losses, "input_ids": ids, "texts": texts}
            file.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
        self.accelerator.wait_for_everyone()  # a launcher ends all processes as soon as one fails
        raise NonFiniteLossError(
            f"{what}; no weight was changed by it, its data are in {file}, earlier checkpoints are untouched; "
            f"{self.advice()}, or add --on_bad_loss skip"
        )

    def _of_all_ranks(self, loss: torch.Tensor, norm: torch.Tensor | float) -> tuple[list[float], list[float]]:
        """Loss and gradient norm of each rank, the same lists on all of them."""
        if self.args.world_size == 1:
            return [loss.item()], [float(norm)]
        pair = torch.tensor([[loss.item(), float(norm)]], device=self.args.device)
        losses, norms = self.accelerator.gather(pair).T.tolist()
        return losses, norms

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Because a step that was left out must not count as one with loss 0, nor a resumed run as a new one."""
        if "loss" in logs and self.skipped_since_log:
            steps = self.state.global_step - self.steps_logged
            counted, self.skipped_since_log = steps - self.skipped_since_log, 0
            logs["loss"] = logs["loss"] * steps / counted if counted else math.nan
        if "loss" in logs:
            self.steps_logged = self.state.global_step
            if self.skipped_steps:
                logs["skipped_steps"] = self.skipped_steps
        if logs.pop("train_loss", None) is not None and (taken := self.state.global_step - self.skipped_steps):
            logs["train_loss"] = self._total_loss_scalar / taken
        super().log(logs, self._since_began() if start_time is not None else None)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        """Because a checkpoint is to be whole or absent, and the Trainer writes it in its place, file by file."""
        self.check_weights()
        run, step = Path(self.args.output_dir), self.state.global_step
        checkpoint = RunFolder(run).checkpoint(step)
        self.state.stateful_callbacks[TOTALS] = {"args": {}, "attributes": self._totals()}
        try:
            staged = atomic_checkpoint(checkpoint) if self.args.should_save else nullcontext(staging_folder(checkpoint))
            with staged as folder:
                self.args.output_dir = str(folder.parent)
                self.accelerator.wait_for_everyone()  # the folder is there
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # each process has written its random states
                if self.args.should_save:
                    # The path of the best checkpoint follows from its step; a run folder may be moved.
                    state = dataclasses.replace(self.state, best_model_checkpoint=None)
                    state.save_to_json(folder / "trainer_state.json")
                    (folder / FINGERPRINT).write_text(json.dumps(self.fingerprint, indent=2) + "\n", encoding="utf-8")
        except Exception as error:
            self.args.output_dir = str(run)
            if not is_disk_full(error) and shutil.disk_usage(run).free >= self.bytes_of_a_checkpoint():
                raise
            raise self.disk_full(f"checkpoint-{step}") from error
        finally:
            self.args.output_dir = str(run)
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(checkpoint)  # the Trainer noted where it was staged
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            remove_old_checkpoints(RunFolder(run), self.args.save_total_limit, checkpoint, Path(best) if best else None)

    def disk_full(self, what: str) -> DiskFullError:
        """What to raise where there is no room for `what`."""
        it = "it" if what.startswith("checkpoint") else "a checkpoint"
        needed, free = self.bytes_of_a_checkpoint(), shutil.disk_usage(self.args.output_dir).free
        return DiskFullError(
            f"no room for {what}: {it} needs about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; earlier "
            "checkpoints are whole; make room, and the same command goes on from there"
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Because the Trainer would pickle its arguments beside the weights, and publish `use_cache: false`."""
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        save_model_files(model, self.processing_class, Path(output_dir or self.args.output_dir), state_dict)

    def bytes_of_a_checkpoint(self) -> int:
        """Weights in float32, one number of Muon or two of AdamW for each of them, and the small files."""
        matrices = sum(p.numel() for n, p in self.model.named_parameters() if ".layers." in n and p.ndim == 2)
        total = self.model.num_parameters()
        moments = matrices + 2 * (total - matrices) if self.args.muon else 2 * total
        return 4 * (total + moments) + len(self.processing_class.backend_tokenizer.to_str().encode()) + 200_000

    def check_room(self) -> None:
        """Whether the checkpoints that are kept, the one being written, and the model folder will fit.

        Raises:
            DiskFullError: before the first step, if they will not.
        """
        if self.args.save_strategy == "no":
            return
        kept = self.args.save_total_limit or math.ceil(1 / self.args.save_steps if self.args.save_steps < 1 else 1)
        copies = 2 if self.args.push_to_hub else 1  # of the model: its folder, and what is on the way to the Hub
        needed = (kept + 1) * self.bytes_of_a_checkpoint() + 4 * self.model.num_parameters() * copies
        free = shutil.disk_usage(self.args.output_dir).free
        if free < needed:
            raise DiskFullError(
                f"no room for this run in {self.args.output_dir}: {kept} checkpoints, one being written and the model need "
                f"about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; make room, or name another --output_dir"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Because what was allowed to change is to be applied, and the Trainer restores old rates over new ones.

        Moments and position come from the checkpoint, settings from the arguments; unchanged ones are the same numbers.
        """
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        if checkpoint is not None and self._has_another_optimizer(Path(checkpoint)):
            self._take_position_of_schedule(Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not isinstance(self.lr_scheduler, LambdaLR):
            return  # schedules of another kind set their rates by what they have seen
        schedule = self.lr_scheduler
        schedule.base_lrs = [setting["initial_lr"] for setting in settings]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
        for group, setting, rate in zip(self.optimizer.param_groups, settings, schedule._last_lr, strict=True):
            group.update(setting, lr=rate)

    def _has_another_optimizer(self, checkpoint: Path) -> bool:
        """Whether the checkpoint holds moments of another optimizer, a change that was allowed."""
        saved = read_json(checkpoint / FINGERPRINT)
        return any(saved[name] != self.fingerprint[name] for name in ("muon", "optim") if name in self.fingerprint)

    def _take_position_of_schedule(self, checkpoint: Path) -> None:
        """The schedule stands where the run stands; the moments of the other optimizer are not used, which is logged."""
        if not isinstance(self.lr_scheduler, LambdaLR):
            raise MiniGPTError(
                f"lr_scheduler_type {self.args.lr_scheduler_type}: its state belongs to the optimizer of {checkpoint.name}, "
                "and muon or optim is another; keep them, or say --fresh"
            )
        logger.warning(f"muon or optim is not that of {checkpoint.name}: the optimizer starts without moments")
        saved = torch.load(checkpoint / "scheduler.pt", weights_only=True)
        self.lr_scheduler.last_epoch, self.lr_scheduler._step_count = saved["last_epoch"], saved["_step_count"]

    def _issue_warnings_after_load(self, load_result) -> None:
        """Because a tied head is not in the file, and the Trainer warns that it is missing; anything else would be."""
        missing = set(load_result.missing_keys) - set(self.model.all_tied_weights_keys)
        assert not missing and not load_result.unexpected_keys, f"checkpoint does not fit the model: {load_result}"

    # -- the result ---------------------------------------------------------------------------------------------------

    def result(self, finished: PreTrainedModel | None = None) -> TrainingResult:
        """The outcome so far.

        Args:
            finished: The model to publish, if training has ended: its samples are generated.
        """
        samples = self.samples
        latest = [samples.latest] if samples.latest else []
        return TrainingResult(
            name=self.hub_model_id or Path(self.args.output_dir).absolute().name,
            parameters=(finished or self.model).num_parameters(),
            steps=self.state.global_step,
            skipped_steps=self.skipped_steps,
            planned_steps=self.state.max_steps,
            seconds=self.progress.seconds,
            evaluation=self._evaluation_of_weights(finished is not None),
            prompt=samples.prompt,
            temperature=SAMPLE_TEMPERATURE,
            sample_tokens=samples.tokens,
            samples=samples.first_seeds(finished) if finished else latest,
        )

    def _evaluation_of_weights(self, finished: bool) -> dict[str, Any] | None:
        """The log row of the evaluation of the current weights: at the end those of the best evaluation, if it is loaded."""
        evaluations = [row for row in self.state.log_history if "eval_loss" in row]
        if not finished:
            evaluations = [row for row in evaluations if row["step"] == self.state.global_step]
        if finished and self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            evaluations = [row for row in evaluations if row["step"] == self.state.best_global_step] or evaluations
            return evaluations[0] if evaluations else None
        return evaluations[-1] if evaluations else None

    # -- the Hub ------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: None = None, private: bool | None = None) -> None:
        """Because a refusal of the Hub is to be told in one line, and a public repository not to pass for a private one."""
        if self.is_world_process_zero():
            shutil.rmtree(RunFolder(Path(self.args.output_dir)).pushing, ignore_errors=True)  # what a killed run left
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
        run = RunFolder(checkpoint.parents[1])
        run.pushing.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{checkpoint.name}-", dir=run.pushing))
        for file in published_files(checkpoint):
            shutil.copyfile(file, folder / file.name)
        metadata = describe(self.settings, self.text, self.result())
        write_metadata(folder, metadata, self.model.config, read_log(run.log))
        message = f"Training in progress, step {self.state.global_step}"
        job = commit_in_background(folder, self.hub_model_id, self.args.hub_revision, message)
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else []), job])


class _RestoreTotals(TrainerCallback):
    """Runs right after the Trainer has set its sums to zero."""

    def __init__(self, trainer: MiniGPTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._restore_totals()


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
