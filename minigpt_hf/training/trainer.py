"""`MiniGPTTrainer`: transformers' `Trainer`, with the reason for each override.

The training loop, devices, gradient accumulation, mixed precision and logging are the Trainer's own. Checkpoints are in
`trainer_checkpoints`; safeguards, callbacks, the optimizer and the schedule are in the modules of these names.
"""

import logging
import math
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
)
from transformers.trainer_utils import SaveStrategy
from transformers.utils import PushInProgress

from ..data.blocks import SequenceDataset, SequenceSampler
from ..data.packing import ConversationDataset
from ..data.prepared import PreparedText
from ..data.stream import TokenStream
from ..errors import MiniGPTError, NonFiniteLossError
from ..inference.evaluation import score_conversations, score_documents, summarize
from ..publish.model_folder import published_files, write_metadata
from ..publish.push import check_revision, commit_in_background, open_repository
from .arguments import MiniGPTTrainingArguments, Settings, log_on_main_process
from .auxiliary_head import (
    add_auxiliary_loss,
    attach_auxiliary_head,
)
from .callbacks import ProgressLogger, SampleLogger, preserved_random_state
from .checkpoint import (
    BackgroundSave,
    best_checkpoint,
)
from .chunked_loss import chunked_cross_entropy
from .optimizer import optimizer_factory
from .report import describe, tokens_per_step, training_result
from .resume import changes_since
from .run_folder import FINGERPRINT, RunFolder, read_json, read_log
from .safeguards import LossGuard, advice, check_weights
from .schedule import learning_rate_schedule
from .sharding import (
    check_is_sharded,
    data_parallel_size,
    sharding_accelerator,
    tensor_parallel_size,
)
from .stopping import ignore_signals
from .tensor_parallel import divide_among_ranks
from .trainer_checkpoints import CheckpointingTrainer, RestoreTotals

logger = logging.getLogger(__name__)

INTERVALS = ("logging_steps", "eval_steps", "save_steps")


class MiniGPTTrainer(CheckpointingTrainer):
    """transformers' `Trainer` with data addressed by (epoch, index), exact validation, and checkpoints without pickles.

    Args:
        model: The model to train.
        args: Copied, because the Trainer assigns to its arguments.
        blocks: Training sequences.
        validation: Text to evaluate; `None` for no evaluation.
        tokenizer: Saved with every checkpoint.
        callbacks: Must contain a `ProgressLogger` and a `SampleLogger` to publish a model.
        fingerprint: Saved with every checkpoint; decides whether a run may be resumed.
        settings, text: For the model card of uploads during training.
    """

    control: TrainerControl
    push_in_progress: PushInProgress | None

    def __init__(
        self,
        model: PreTrainedModel,
        args: MiniGPTTrainingArguments,
        blocks: SequenceDataset | ConversationDataset,
        validation: TokenStream | None,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
        fingerprint: dict[str, Any] | None = None,
        settings: Settings | None = None,
        text: PreparedText | None = None,
    ):
        args = args.mutable_copy()
        if args.mtp_loss_weight:
            attach_auxiliary_head(model)
        replicas = torch.distributed.group.WORLD if args.world_size > 1 else None
        super().__init__(
            model=model,
            args=args,
            data_collator=blocks.collate,
            train_dataset=blocks,
            eval_dataset=validation,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=optimizer_factory(args, replicas) if args.muon else None,
        )
        self.remove_callback(PrinterCallback)  # `ProgressLogger` replaces it
        self.fingerprint = fingerprint or {}
        self.changes: list[dict[str, Any]] = []  # settings that were changed when the run was resumed
        self.settings, self.text = settings, text
        self.progress = next((each for each in callbacks if isinstance(each, ProgressLogger)), None)
        self.samples = next((each for each in callbacks if isinstance(each, SampleLogger)), None)
        self.guard = LossGuard(self)
        self.saving = BackgroundSave()
        self.announced_step: int | None = None  # the step at which the user was told that training resumes
        self.add_callback(RestoreTotals(self))

    # -- sharding -----------------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Overridden because accelerate ignores FSDP on CPU."""
        with sharding_accelerator(self.args):
            super().create_accelerator_and_postprocess()

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Overridden because the Trainer applies tensor parallelism only to models that it loads, because training with DDP
        although FSDP was requested would not be noticed, and because DDP arranges its buckets after its first step, also in
        a resumed run."""
        if tensor_parallel_size(self.args) > 1:
            divide_among_ranks(self.model, self.accelerator.torch_device_mesh["tp"])
            # accelerate 1.15 replicates parameters that are not divided by a class that transformers 5.23 does not have
            # (`ReplicateParallel`: ImportError); none are left.
            self.accelerator._prepare_tp = lambda *objects: objects  # type: ignore[method-assign]
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.args.fsdp:
            check_is_sharded(self.model)
        if isinstance(self.model_wrapped, DistributedDataParallel):
            self._arrange_buckets(self.model_wrapped)
        return prepared

    def _arrange_buckets(self, model: DistributedDataParallel) -> None:
        """Let DDP arrange its buckets before the first step; gradients are discarded and random states restored.

        DDP copies gradients to buckets in the order of the parameters, and after the first backward pass in the order in
        which that pass has computed them. The order in which more than two ranks are summed depends on the place in a
        bucket, so the first step of a resumed run would differ from that of an uninterrupted one in the last bits.
        """
        batch = self.train_dataset.collate([self.train_dataset[0, 0]])
        with preserved_random_state():
            loss = self.compute_loss(model.train(), self._prepare_inputs(batch))
            self.accelerator.backward(loss)
        model.zero_grad()

    # -- data and schedule --------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: SequenceDataset | None = None) -> Sampler:
        """Overridden because the order of sequences is a function of (seed, epoch), not the state of a `RandomSampler`."""
        window, sequences = self.settings.data.shuffle_window if self.settings else 0, self.train_dataset
        step = tokens_per_step(self.args, sequences.block_size) // sequences.block_size
        step = step if self.args.dataloader_drop_last else 1
        self.block_sampler = SequenceSampler(len(sequences), sequences.seed, window, step)
        return self.block_sampler

    def get_train_dataloader(self) -> DataLoader:
        """Overridden because data loader workers must survive a signal to their process group and leave the random state
        as it is, and because accelerate computes the addresses of all ranks on each rank.

        A data loader draws the base seed of its workers from the global random state when it creates them. Persistent
        workers are created once per process, so a resumed run would draw it in another epoch: they get a separate generator.
        """
        loader = super().get_train_dataloader()
        if isinstance(shard := loader.batch_sampler, BatchSamplerShard):
            sampler = self.block_sampler
            sampler.batch_size, sampler.rank, sampler.num_ranks = (
                shard.batch_size,
                shard.process_index,
                shard.num_processes,
            )
            shard.process_index, shard.num_processes = 0, 1  # passes the batches of this rank on
        torch_loader = loader.base_dataloader  # accelerate's data loader iterates over this one
        if self.args.dataloader_num_workers:
            torch_loader.worker_init_fn = partial(ignore_signals, torch_loader.worker_init_fn)
        if self.args.dataloader_persistent_workers:
            torch_loader.generator = torch.Generator()
        return loader

    def train(self, *args, **kwargs):
        """Overridden to end persistent workers: they ignore SIGTERM, and Python would wait for them at its exit."""
        try:
            return super().train(*args, **kwargs)
        finally:
            loader = self.callback_handler.train_dataloader
            if loader is not None and (iterator := loader.base_dataloader._iterator) is not None:
                iterator._shutdown_workers()

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Overridden so that the schedule is defined in one place."""
        if self.lr_scheduler is None:
            self.lr_scheduler = learning_rate_schedule(optimizer or self.optimizer, self.args, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- resuming -----------------------------------------------------------------------------------------------------

    def _init_training_state(
        self, max_steps, steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        """Overridden because the Trainer resumes with the paths and intervals of the checkpoint.

        Here the best checkpoint is searched for in the current run folder, and the batch size and the intervals
        (`logging_steps`, `eval_steps`, `save_steps`) are those of the arguments.
        """
        self.began = time.perf_counter()
        self.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        given = {name: getattr(self.args, name) for name in (*INTERVALS, "per_device_train_batch_size")}
        if self.resumed_from:
            # The Trainer warns if these arguments differ from the state. Intervals may be shares of all steps, and another
            # number of processes has another batch size.
            saved = read_json(self.resumed_from / "trainer_state.json")
            for name in INTERVALS:
                setattr(self.args, name, saved[name])
            self.args.per_device_train_batch_size = saved["train_batch_size"] // max(1, self.args.n_gpu)
        epochs, batches = super()._init_training_state(
            max_steps, steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        for name, value in given.items():
            setattr(self.args, name, value)
        if self.resumed_from:
            self.state.train_batch_size = self._train_batch_size
            self.state.compute_steps(self.args, max_steps)
            self._discard_scores_of_another_validation_text()
            for name in INTERVALS:
                if (new := getattr(self.state, name)) != saved[name]:
                    logger.info(f"{name} was {saved[name]} and is {new} from this step on")
            self._find_best_checkpoint()
            self.changes = changes_since(self.resumed_from, self.fingerprint, self.state.global_step)
            if self.announced_step not in (None, self.state.global_step):
                raise MiniGPTError(
                    f"{self.resumed_from}: was saved at step {self.announced_step}, but loaded at step "
                    f"{self.state.global_step}: it was changed in the meantime; run the same command again"
                )
        if self.state.global_step > max_steps:
            epochs_given = f"num_train_epochs {self.args.num_train_epochs:g}, "
            cause = f"{'' if self.args.max_steps > 0 else epochs_given}max_steps"
            logger.warning(
                f"{cause} {max_steps}: the run has already taken {self.state.global_step} steps; its model is published "
                "without further training"
            )
        self.steps_logged = self.state.global_step
        # After the last step no epoch is left; `_run_epoch` must be called once nevertheless.
        return (num_train_epochs - 1, 0) if self.state.global_step >= max_steps else (epochs, batches)

    def _discard_scores_of_another_validation_text(self) -> None:
        """Keep only scores that can be compared with those of this run; the change was allowed."""
        assert self.resumed_from is not None
        saved = read_json(self.resumed_from / FINGERPRINT)
        if all(saved[name] == self.fingerprint[name] for name in ("validation", "block_size") if name in saved):
            return
        state = self.state
        if any("eval_loss" in row for row in state.log_history):
            logger.warning(
                "the validation text has changed: earlier scores cannot be compared with those from this step on, so earlier "
                "checkpoints are not published"
            )
        state.log_history = [row for row in state.log_history if "eval_loss" not in row]
        state.best_global_step = state.best_metric = state.best_model_checkpoint = None

    def _find_best_checkpoint(self) -> None:
        """Set the state's best checkpoint to a valid one; warn if the best one is missing, invalid or of another run."""
        state, args = self.state, self.args
        if state.best_global_step is None or args.metric_for_best_model is None:
            state.best_model_checkpoint = None
            return
        runs = [Path(args.output_dir), *([self.resumed_from.parent] if self.resumed_from else [])]
        metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        found = best_checkpoint(runs, state.log_history, metric, bool(args.greater_is_better))
        step, value, folder = found or (None, None, None)
        if step != state.best_global_step:
            instead = f"{folder.name} is the best of the others" if folder else "no other checkpoint was evaluated"
            logger.warning(
                f"checkpoint-{state.best_global_step}, the best checkpoint, is missing, invalid or of another run; {instead}"
            )
        state.best_global_step, state.best_metric = step, value
        state.best_model_checkpoint = str(folder) if folder else None

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Overridden because the Trainer keeps a NaN as the best metric until the end: no number compares better; and because
        it compares a checkpoint with scores of steps that have none, so that the best checkpoint would be deleted."""
        is_saved = self.control.should_save or self.args.save_strategy == SaveStrategy.BEST
        is_saved = is_saved or self.state.global_step == self._initial_global_step  # resumed from there
        is_candidate = is_saved and math.isfinite(metrics.get("eval_loss", 0.0))
        is_best = is_candidate and super()._determine_best_metric(metrics, trial)
        # With save_strategy best, this is whether the Trainer saves, which a signal during the evaluation may demand.
        return is_best or self.control.should_save

    def _run_epoch(self, *, trial, ignore_keys_for_eval, **kwargs) -> None:
        """Overridden because a run interrupted at a step is evaluated at that step when it resumes, and a run with all
        steps taken must not take another one."""
        self.saving.wait()  # the data loader may fork workers, which must not happen while a thread writes
        if self._lacks_evaluation():
            metrics = self._evaluate(trial, ignore_keys_for_eval)
            self._determine_best_metric(metrics, trial)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(self.resumed_from)
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        self.resumed_batches = None
        if self.control.should_training_stop:
            return
        batches = kwargs["steps_trained_in_current_epoch"] if kwargs["epoch"] == kwargs["epochs_trained"] else 0
        if self.resumed_from is not None and batches:
            kwargs["train_dataloader"].set_epoch(kwargs["epoch"])
            self.block_sampler.num_skipped = batches * self._train_batch_size
            self.resumed_batches = iter(kwargs["train_dataloader"])
        try:
            super()._run_epoch(trial=trial, ignore_keys_for_eval=ignore_keys_for_eval, **kwargs)
        finally:
            self.resumed_batches = None  # its workers end with it

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Overridden because the iterator of a resumed epoch generates and discards all earlier batches; here the sampler
        starts at the position of the run."""
        return super().get_batch_samples(self.resumed_batches or epoch_iterator, num_batches, device)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False) -> dict[str, float] | None:
        """Overridden because `eval_on_start`, the only caller with `skip_scheduler`, would evaluate on every resume."""
        if skip_scheduler and self.resumed_from is not None:
            if not any(row["step"] == 0 and "eval_loss" in row for row in self.state.log_history):
                message = "eval_on_start: no effect, because the run is resumed, and step 0 was not evaluated"
                log_on_main_process(self.args, message, logging.WARNING)
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
        """Overridden because the Trainer averages the loss of one process only, uses the wall clock, deletes the last
        checkpoint if `save_total_limit` is 1, and loads the best checkpoint without verifying it."""
        self.saving.wait()
        self.guard.check_pending()
        if self.args.world_size > 1:
            self._tr_loss = self.accelerator.gather(self._tr_loss.reshape(1)).mean()
        if self.args.load_best_model_at_end:
            self._find_best_checkpoint()
            if self.state.best_model_checkpoint:
                self._check_weights(Path(self.state.best_model_checkpoint))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, num_train_samples, self._start_time())
        finally:
            self.args.save_total_limit = limit

    def _start_time(self) -> float:
        """When training began, relative to the current wall clock, which may have been set in the meantime."""
        return time.time() - (time.perf_counter() - self.began)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: TokenStream | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Overridden because the Trainer averages over batches, not tokens; this is the score of `minigpt evaluate`.

        Each rank scores its share of the windows; the sums are reduced.

        Raises:
            NonFiniteLossError: if the loss is non-finite and `on_bad_loss` is `stop`.
        """
        self.guard.check_pending()
        stream: TokenStream = self.eval_dataset if eval_dataset is None else eval_dataset
        block_size = self.train_dataset.block_size
        began = time.perf_counter()
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            groups, tp_size = data_parallel_size(self.args), tensor_parallel_size(self.args)
            share = self.args.per_device_eval_batch_size, self.args.process_index // tp_size, groups
            texts = stream.iterate_documents()
            if isinstance(self.train_dataset, ConversationDataset):
                nats, tokens, excerpts = score_conversations(self.model, texts, self.train_dataset.chat_format, *share)
            else:
                nats, tokens, excerpts = score_documents(
                    self.model, texts, stream.bos_token_id, block_size, None, *share
                )
        # float32 is precise enough for the sums of a few ranks; MPS has no float64.
        sums = torch.tensor([nats, tokens], device=self.args.device)
        if self.args.world_size > 1:
            nats, tokens = (self.accelerator.reduce(sums, "sum") / tp_size).tolist()  # equal in a group
        score = summarize(nats / tokens, int(tokens), stream.bytes, excerpts, excerpts, block_size, None).to_dict()
        if not math.isfinite(score["loss"]):
            check_weights(self)
            fault = f"step {self.state.global_step}: the validation loss is {score['loss']}"
            if self.args.on_bad_loss == "stop":
                raise NonFiniteLossError(
                    f"{fault}; the model is not saved, earlier checkpoints are intact; {advice(self)}"
                )
            if self.is_world_process_zero():
                logger.warning(f"{fault}; it is not considered for the best checkpoint")
        metrics = {f"{metric_key_prefix}_{name}": score[name] for name in ("loss", "perplexity", "bits_per_byte")}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - began, 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- steps --------------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Overridden to keep the batches of a step until its loss is known to be finite, and to report a failed save."""
        self.saving.check()
        self.guard.record(inputs["input_ids"], self._tr_loss)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Overridden to compute the loss in chunks, to add the auxiliary loss of multi-token prediction, and because the
        Trainer's label smoothing shifts labels itself and so ignores `shift_labels`."""
        chunk_size, weight = self.args.logits_chunk_size, self.args.mtp_loss_weight
        if chunk_size or weight:
            labels = inputs["shift_labels"]
            num_items = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
            averages = num_items_in_batch is not None and self.args.average_tokens_across_devices
            scale = (self.accelerator.num_processes if averages else 1) / num_items
            inputs = {**inputs, "output_hidden_states": True}
            if chunk_size:  # the model computes the logits of the last position only
                others = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
                outputs = model(**others, logits_to_keep=1)
                states, head = outputs.hidden_states[-1], self.model.get_output_embeddings().weight
                with self.accelerator.autocast():  # otherwise enabled in the forward pass of the model only
                    loss = chunked_cross_entropy(states, head, labels, scale, chunk_size)
            else:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if weight:
                weight *= 1 - self.state.global_step / max(1, self.state.max_steps)  # 0 before training
                states = outputs.hidden_states[-1]
                with self.accelerator.autocast():
                    loss = add_auxiliary_loss(loss, self.model, states, labels, weight, scale, chunk_size)
            return (loss, outputs) if return_outputs else loss
        if self.label_smoother is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        others = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        outputs = model(**others)
        loss = self.label_smoother(outputs, inputs["shift_labels"], num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * data_parallel_size(self.args)  # gradients are averaged over processes, not summed
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Overridden because it is called between clipping and the optimizer step, where a bad step can still be stopped;
        the callback event at this point, `on_pre_optimizer_step`, does not receive the gradient norm."""
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.guard.check(model, self._tr_loss, norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Overridden because a skipped step must not count as one with loss 0, nor a resumed run as a new one."""
        guard, step = self.guard, self.state.global_step
        if "loss" in logs and guard.skipped_since_log:
            steps = step - self.steps_logged
            taken, guard.skipped_since_log = steps - guard.skipped_since_log, 0
            logs["loss"] = logs["loss"] * steps / taken if taken else math.nan
        if "loss" in logs:
            self.steps_logged = step
            if guard.skipped_steps:
                logs["skipped_steps"] = guard.skipped_steps
        if logs.pop("train_loss", None) is not None and (taken := step - guard.skipped_steps):
            logs["train_loss"] = self._total_loss_scalar / taken
        super().log(logs, self._start_time() if start_time is not None else None)

    # -- the Hub ------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: None = None, private: bool | None = None) -> None:
        """Overridden to report errors of the Hub in one line, and to reject a public repository if `private` is set."""
        if self.is_world_process_zero():
            shutil.rmtree(RunFolder(Path(self.args.output_dir)).pushing, ignore_errors=True)  # what a killed run left
            check_revision(self.args.hub_revision)
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            self.hub_model_id = open_repository(name, bool(private or self.args.hub_private_repo))
        self.push_in_progress = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Overridden because the Trainer uploads weights without code and card, plus a log and a pickle, from a folder
        that is being renamed.

        Here the model files are copied first and uploaded, with a card, in one commit.
        """
        earlier = self.push_in_progress
        busy = earlier is not None and not earlier.is_done()
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
        assert self.settings is not None and self.text is not None
        metadata = describe(self.settings, self.text, training_result(self))
        write_metadata(folder, metadata, self.model.config, read_log(run.log) if self.args.figures else None)
        message = f"Training in progress, step {self.state.global_step}"
        job = commit_in_background(folder, self.hub_model_id, self.args.hub_revision, message)
        self.push_in_progress = PushInProgress([*(earlier.jobs if earlier is not None and busy else []), job])
