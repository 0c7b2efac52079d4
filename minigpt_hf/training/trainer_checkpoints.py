"""The methods of the Trainer that save and load checkpoints, with the reason for each override.

What a checkpoint contains, and how it is written and verified, is in `checkpoint`; gathering sharded models in `sharding`.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.initialization import no_init_weights

from ..errors import MiniGPTError
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..publish.model_folder import save_model_files
from .auxiliary_head import load_auxiliary_head, save_auxiliary_head, without_auxiliary_head
from .callbacks import ProgressLogger, preserved_random_state
from .checkpoint import (
    OPTIMIZER,
    SCHEDULER,
    BackgroundSave,
    atomic_checkpoint,
    changed_error,
    check_optimizer_state,
    check_schedule,
    check_tensors,
    remove_old_checkpoints,
    staging_folder,
    without_crc32,
)
from .run_folder import FINGERPRINT, RunFolder, read_json
from .safeguards import LossGuard, check_weights, no_space
from .sharding import load_optimizer_state, load_weights, whole_optimizer_state, whole_weights

logger = logging.getLogger(__name__)

TOTALS = "MiniGPTTrainer"  # entry of `TrainerState.stateful_callbacks`


class CheckpointingTrainer(Trainer):
    """transformers' `Trainer` with atomic, verified checkpoints without pickles, from which runs resume exactly.

    Attributes:
        fingerprint: Saved with every checkpoint; decides whether a run may be resumed.
        changes: Settings that were changed when the run was resumed; see `changes_since`.
        resumed_from: The checkpoint that the run was resumed from.
        guard: Decides whether the weights may be saved.
        saving: The checkpoint that is being completed in the background.
        progress: Measures the training time.
    """

    lr_scheduler: LRScheduler | None
    fingerprint: dict[str, Any]
    changes: list[dict[str, Any]]
    resumed_from: Path | None
    guard: LossGuard
    saving: BackgroundSave
    progress: ProgressLogger | None

    # -- totals -------------------------------------------------------------------------------------------------------

    def _totals(self) -> dict[str, Any]:
        """Sums that the Trainer resets when it resumes; `loss_since_log` by rank."""
        loss = self._tr_loss.reshape(1)
        return {
            "loss_since_log": (self.accelerator.gather(loss) if self.args.world_size > 1 else loss).tolist(),
            "loss_until_log": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "skipped_steps": self.guard.skipped_steps,
            "skipped_since_log": self.guard.skipped_since_log,
            "changes": self.changes,
            "seconds": self.progress.seconds if self.progress else 0.0,
        }

    def _restore_totals(self) -> None:
        if self.resumed_from is None or not (totals := self.state.stateful_callbacks.get(TOTALS)):
            return
        values = totals["attributes"]
        self.changes = [*values.get("changes", []), *self.changes]
        losses = values["loss_since_log"]
        same_world_size = len(losses) == self.args.world_size  # otherwise each rank takes the mean, which is logged
        loss = losses[self.args.process_index] if same_world_size else sum(losses) / len(losses)
        self._tr_loss = torch.tensor(loss, dtype=torch.float32, device=self.args.device)
        self._total_loss_scalar = values["loss_until_log"]
        self._globalstep_last_logged = self.steps_logged = values["logged_step"]
        self.guard.skipped_steps, self.guard.skipped_since_log = values["skipped_steps"], values["skipped_since_log"]
        if self.progress:  # the log may have no row of the steps before the checkpoint
            self.progress.earlier = max(self.progress.earlier, values.get("seconds", 0.0))

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        """Overridden because checkpoints are atomic, and the Trainer writes file by file into the final folder."""
        self.saving.wait()
        self.guard.check_pending()
        check_weights(self)
        run, step = Path(self.args.output_dir), self.state.global_step
        checkpoint = RunFolder(run).checkpoint(step)
        self.state.stateful_callbacks[TOTALS] = {"args": {}, "attributes": self._totals()}

        def complete(seal_and_rename: Callable[[], None], best: Path | None) -> None:
            seal_and_rename()
            remove_old_checkpoints(RunFolder(run), self.args.save_total_limit, checkpoint, best)

        def complete_in_thread(*args) -> None:
            with self._full_disk_reported(step):
                complete(*args)

        def finish(seal_and_rename: Callable[[], None]) -> None:
            self.args.output_dir = str(run)
            best = str(checkpoint) if self.state.best_global_step == step else self.state.best_model_checkpoint
            args = seal_and_rename, Path(best) if best else None
            if self.args.async_checkpoints:
                self.saving.start(partial(complete_in_thread, *args))
            else:
                complete(*args)

        staged: AbstractContextManager[Path] = nullcontext(staging_folder(checkpoint))
        if self.args.should_save:
            staged = atomic_checkpoint(checkpoint, finish)
        try:
            with self._full_disk_reported(step), staged as folder, without_crc32():
                self.args.output_dir = str(folder.parent)
                self.accelerator.wait_for_everyone()  # the main process has created the folder
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # each process has written its random states
                if self.args.should_save:
                    # The path of the best checkpoint is derived from its step, so that a run folder can be moved.
                    state = dataclasses.replace(self.state, best_model_checkpoint=None)
                    state.save_to_json(folder / "trainer_state.json")
                    (folder / FINGERPRINT).write_text(json.dumps(self.fingerprint, indent=2) + "\n", encoding="utf-8")
        finally:
            self.args.output_dir = str(run)
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(checkpoint)  # the Trainer recorded the staging folder

    @contextmanager
    def _full_disk_reported(self, step: int) -> Iterator[None]:
        """Translate errors in a save that mean a full disk or too large a file."""
        run = self.args.output_dir
        try:
            yield
        except Exception as error:
            self.args.output_dir = run
            if found := no_space(self, error, f"checkpoint-{step}", guess=not isinstance(error, OSError)):
                raise found from error
            raise

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Overridden because the Trainer pickles its arguments next to the weights and publishes `use_cache: false`."""
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.mtp_loss_weight:
            state_dict = without_auxiliary_head(model.state_dict() if state_dict is None else state_dict)
        save_model_files(model, self.processing_class, folder, state_dict)
        if self.args.mtp_loss_weight:
            save_auxiliary_head(model, folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Overridden because transformers copies the code of the class of the model, which `fully_shard` has replaced."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        model = self.whole_model()
        if self.args.should_save:
            save_model_files(model, self.processing_class, Path(output_dir or self.args.output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Overridden because with FSDP the Trainer saves files of its own, which only a sharded run can resume from."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def whole_model(self) -> PreTrainedModel:
        """The model to save and to publish, on rank 0; called on all ranks.

        If the model is sharded, this is a copy with whole weights in the memory of the host.
        """
        if not self.is_fsdp_enabled:
            return self.model
        weights = whole_weights(self.model, keep=self.args.should_save)
        if not self.args.should_save:
            return self.model
        with no_init_weights():
            model = MiniGPTForCausalLM(self.model.config)
        self._issue_warnings_after_load(model.load_state_dict(weights, strict=False, assign=True))
        model.tie_weights()
        model.generation_config = self.model.generation_config
        return model.eval()

    # -- loading ------------------------------------------------------------------------------------------------------

    def _load_best_model(self) -> None:
        """Overridden because the Trainer expects files of its own with FSDP."""
        if not self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, Path(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Overridden because the auxiliary head is in a separate file, and tensors of another dtype would be converted."""
        checkpoint = Path(resume_from_checkpoint)
        self._check_weights(checkpoint)
        if self.is_fsdp_enabled:
            load_weights(self.model, checkpoint)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.mtp_loss_weight and read_json(checkpoint / FINGERPRINT).get("mtp_loss_weight"):
            load_auxiliary_head(self.model, checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Overridden because allowed changes must take effect, and the Trainer restores the previous learning rates without
        checking the states.

        Moments and the position of the schedule come from the checkpoint, settings from the arguments.
        """
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        if checkpoint is not None:
            self._check_states(Path(checkpoint))
        if checkpoint is not None and self._has_another_optimizer(Path(checkpoint)):
            self._restore_schedule_position(Path(checkpoint))
        elif checkpoint is not None and self.is_fsdp_enabled:
            assert self.lr_scheduler is not None
            load_optimizer_state(self.optimizer, Path(checkpoint) / OPTIMIZER)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not isinstance(self.lr_scheduler, LambdaLR):
            return  # other schedules derive their rates from what they have seen
        schedule = self.lr_scheduler
        schedule.base_lrs = [setting["initial_lr"] for setting in settings]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
        for group, setting, rate in zip(self.optimizer.param_groups, settings, schedule._last_lr, strict=True):
            group.update(setting, lr=rate)

    def _check_weights(self, checkpoint: Path) -> None:
        """Check the tensors of a checkpoint; tied heads and the auxiliary head are not among them.

        Raises:
            MiniGPTError: if they do not fit the model.
        """
        if not self.is_deepspeed_enabled:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            check_tensors(checkpoint, without_auxiliary_head(model.state_dict()), set(model.all_tied_weights_keys))

    def _check_states(self, checkpoint: Path) -> None:
        """Check the states of optimizer, schedule and random numbers before they are loaded.

        Raises:
            MiniGPTError: if they do not fit the run.
        """
        if self.is_deepspeed_enabled:
            return  # each rank has a part of the states
        if not self._has_another_optimizer(checkpoint):
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            names = {parameter: name for name, parameter in model.named_parameters()}
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
            totals = self.state.stateful_callbacks.get(TOTALS, {"attributes": {"skipped_steps": 0}})
            check_optimizer_state(checkpoint, optimizer, names, totals["attributes"]["skipped_steps"])
        if isinstance(self.lr_scheduler, LambdaLR):  # with fp16, accelerate skips steps to find the loss scale
            check_schedule(checkpoint, None if self.args.fp16 else self.state.global_step)
        if read_json(checkpoint / FINGERPRINT)["world_size"] == self.args.world_size:
            name = "rng_state.pth" if self.args.world_size == 1 else f"rng_state_{self.args.process_index}.pth"
            if not (checkpoint / name).is_file():
                raise changed_error(checkpoint, f"{name} is missing")
            try:
                with preserved_random_state():
                    self._load_rng_state(str(checkpoint))
            except Exception as error:
                raise changed_error(checkpoint, f"{name} is not a random state ({type(error).__name__})") from error

    def _has_another_optimizer(self, checkpoint: Path) -> bool:
        """Whether the checkpoint holds the moments of another optimizer or of other parameters; the change was allowed."""
        saved = read_json(checkpoint / FINGERPRINT)
        if bool(saved.get("mtp_loss_weight")) != bool(self.args.mtp_loss_weight):  # with or without the auxiliary head
            return True
        return any(saved[name] != self.fingerprint[name] for name in ("muon", "optim") if name in self.fingerprint)

    def _restore_schedule_position(self, checkpoint: Path) -> None:
        """Continue the schedule with another optimizer, which starts without moments."""
        if not isinstance(self.lr_scheduler, LambdaLR):
            raise MiniGPTError(
                f"lr_scheduler_type {self.args.lr_scheduler_type}: its state depends on the optimizer of {checkpoint.name}, "
                "but muon, optim or mtp_loss_weight has changed; restore them, or use --fresh"
            )
        logger.warning(
            f"muon, optim or mtp_loss_weight differs from that of {checkpoint.name}: the optimizer starts without its moments"
        )
        saved = torch.load(checkpoint / "scheduler.pt", weights_only=True)
        self.lr_scheduler.last_epoch, self.lr_scheduler._step_count = saved["last_epoch"], saved["_step_count"]

    def _issue_warnings_after_load(self, load_result) -> None:
        """Overridden because the Trainer warns about tied heads and the auxiliary head, which are not in the file; other
        mismatches are bugs."""
        missing = set(without_auxiliary_head(dict.fromkeys(load_result.missing_keys)))
        missing -= set(self.model.all_tied_weights_keys)
        assert not missing and not load_result.unexpected_keys, f"checkpoint does not fit the model: {load_result}"


class RestoreTotals(TrainerCallback):
    """Restores the Trainer's sums on `on_train_begin`, the first event after the Trainer has reset them.

    `restore_callback_states_from_checkpoint` restores the attributes of callbacks before that reset.
    """

    def __init__(self, trainer: CheckpointingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._restore_totals()
