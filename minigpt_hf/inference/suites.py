"""Evaluation suites of lm-evaluation-harness: multiple choice, minimal pairs, likelihoods and generated answers.

The harness is the extra `suites`. Its tasks are YAML files that name their data: a dataset of the Hub, or local files. Models
and tokenizers are passed as loaded objects, so the results are those of its own command, `lm_eval --model hf`.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoding import unknown_character_error
from ..data.tokenizer import appended_tokens
from ..errors import MiniGPTError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task.

    Args:
        task: Name of a task, or of a group of tasks.
        version: Version of the task; "" if its definition states none.
        metric, filter: Name of the metric, and of the filter of the answers that it is computed from.
        value: Value of the metric, in its own unit.
        stderr: Standard error of the value; None if the harness does not estimate it.
        samples: Number of questions.
        shots: Number of examples in the prompt; None for a group whose tasks differ in it.
        dataset: Hub id of the data; None for local files and groups.
        harness: Version of lm-evaluation-harness.
        shortened: Number of questions of which the harness omitted the start, because they exceed the context.
    """

    task: str
    version: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int
    shots: int | None
    dataset: str | None
    harness: str
    shortened: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    task_path: Path | None = None,
    batch_size: int = 16,
) -> list[TaskResult]:
    """Evaluate a model on tasks of the harness.

    Args:
        tasks: Names or patterns of tasks, groups or tags.
        task_path: Folder of further tasks. Python functions that they refer to are executed.
        batch_size: Number of requests per forward pass.

    Raises:
        MiniGPTError: if the harness is not installed, a task does not exist, its definition or data cannot be read, an
            answer exceeds the context of the model, or the tokenizer does not know a character.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise MiniGPTError(
            f"tasks need {package}, which is not installed: install the extra `suites`, or lm_eval[hf]"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("lm-eval").setLevel(logging.ERROR)
    if task_path is not None and not task_path.is_dir():
        raise MiniGPTError(f"{task_path}: no such folder; give a folder of tasks (YAML files of lm-evaluation-harness)")
    try:
        manager = TaskManager(include_path=str(task_path) if task_path else None)
        unknown = [name for name in tasks if not manager.match_tasks([name])]
        if unknown:
            raise MiniGPTError(
                f"unknown task {unknown[0]!r}: `lm_eval ls tasks` lists the names, and --task_path adds a folder of tasks"
            )
        names = manager.match_tasks(list(tasks))
        shortened: dict[str, set[Any]] = defaultdict(set)
        wrapped = _wrapped(model, tokenizer, batch_size, shortened)
        found = lm_eval.simple_evaluate(wrapped, tasks=names, task_manager=manager, log_samples=False)
    except MiniGPTError:
        raise
    except (OSError, KeyError, ValueError, yaml.YAMLError, TemplateError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MiniGPTError(
            f"tasks {', '.join(tasks)}: a definition or its data cannot be read ({reason}); data on the Hub need the "
            "network once, local data files must exist"
        ) from error
    assert found is not None  # None is returned on other ranks only
    return _results(found, lm_eval.__version__, {task: len(questions) for task, questions in shortened.items()})


def _wrapped(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, shortened: dict[str, set[Any]]
) -> Any:
    """Return the model for the harness.

    Tokens that a tokenizer appends to every text are removed: the harness takes the answer to be what a question with the
    answer has more than the question, at its end, and would score these tokens instead of the last ones of the answer.

    Args:
        shortened: Receives the questions of which the harness omits the start, by task.
    """
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    is_fast = tokenizer.is_fast and tokenizer.eos_token is not None
    appended = tokenizer.convert_tokens_to_ids(appended_tokens(tokenizer)) if is_fast else []

    class Model(HFLM):
        def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
            try:
                ids = super().tok_encode(string, *args, **options)
                end = len(ids) - len(appended)
                if not appended or ids[end:] != appended:
                    return ids
                is_text = ids == super().tok_encode(string, add_special_tokens=False)
                return ids if is_text else ids[:end]
            except Exception as error:  # the bare `Exception` that `tokenizers` raises for a word without an id
                what = "a question, an answer or a stop string of the tasks"
                if unknown := unknown_character_error(string, tokenizer.get_vocab(), what):
                    raise unknown from error
                raise

        def tok_batch_encode(
            self, strings: list[str], *args: Any, left_truncate_len: int, **options: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            options["left_truncate_len"] = left_truncate_len + len(appended)
            ids, mask = super().tok_batch_encode(strings, *args, **options)
            end = ids.shape[1] - len(appended)
            if any(row[end:] != appended for row in ids.tolist()):  # added to no text, as one begins with the BOS token
                return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
            return ids[:, :end], mask[:, :end]  # padding is on the left

        def check(self, request: Any, prompt: int, answer: int, most: int) -> None:
            """Compare numbers of tokens with the context, in which `most` tokens of prompt and answer fit."""
            if answer == 0:
                raise MiniGPTError(
                    f"task {request.task_name}: an answer has no tokens of its own, because the tokenizer joins it with the "
                    "question: omit this task"
                )
            if answer >= most:
                raise MiniGPTError(
                    f"task {request.task_name}: an answer has up to {answer:,} tokens, and the context of the model is "
                    f"{self.max_length:,}: omit this task"
                )
            if prompt + answer > most:
                shortened[request.task_name].add(request.doc_id)

        def loglikelihood(self, requests, disable_tqdm: bool = False):
            for request in requests:
                prompt, answer = request.args
                if prompt:
                    before, after = (len(ids) for ids in self._encode_pair(prompt, answer))
                else:
                    before, after = 1, len(self.tok_encode(answer, add_special_tokens=False))
                self.check(request, before, after, self.max_length + 1)  # the last token is only predicted
            return super().loglikelihood(requests, disable_tqdm)

        def generate_until(self, requests, disable_tqdm: bool = False):
            for request in requests:
                prompt, settings = request.args
                normalized = normalize_gen_kwargs(dict(settings), self.max_gen_toks)
                for stop in normalized["until"]:
                    self.tok_encode(stop, add_special_tokens=False)  # the harness encodes it without this check
                answer = normalized["max_gen_toks"]
                self.check(request, len(self.tok_encode(prompt)), answer, self.max_length)
            return super().generate_until(requests, disable_tqdm)

    return Model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))


def _results(found: Any, harness: str, shortened: dict[str, int]) -> list[TaskResult]:
    """Convert the result of the harness, and log shortened questions and metrics without a finite value, which are omitted.

    Args:
        shortened: Number of shortened questions, by task.
    """
    for task, count in shortened.items():
        logger.warning(
            "%s: %s of %s questions exceed the context of the model; their start was omitted",
            task,
            f"{count:,}",
            f"{_samples(found, task):,}",
        )
    results = []
    for task, metrics in found["results"].items():
        config = found["configs"].get(task, {})
        path = config.get("dataset_path")
        for key, value in metrics.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr"):
                continue
            if not isinstance(value, int | float) or not math.isfinite(value):
                logger.warning("%s: %s is %s and is omitted", task, metric, value)
                continue
            stderr = metrics.get(f"{metric}_stderr,{name}")
            is_estimated = isinstance(stderr, int | float) and math.isfinite(stderr)
            results.append(
                TaskResult(
                    task=task,
                    version=_version(found, task),
                    metric=metric,
                    filter=name,
                    value=float(value),
                    stderr=float(stderr) if is_estimated else None,
                    samples=_samples(found, task),
                    shots=_shots(found, task),
                    dataset=path if isinstance(path, str) and "/" in path else None,
                    harness=harness,
                    shortened=sum(shortened.get(each, 0) for each in _tasks(found, task)),
                )
            )
    return results


def _tasks(found: Any, task: str) -> list[str]:
    """Return the tasks of a group, or the task itself."""
    if task in found["n-samples"]:
        return [task]
    return [name for each in found.get("group_subtasks", {}).get(task, []) for name in _tasks(found, each)]


def _version(found: Any, task: str) -> str:
    """The version of a task or group; "" if its definition states none."""
    from lm_eval.api.task import ConfigurableTask

    version = found["versions"].get(task)
    return "" if version in (None, "N/A", ConfigurableTask.VERSION) else str(version)


def _samples(found: Any, task: str) -> int:
    """The number of questions of a task, or of the tasks of a group."""
    return sum(int(found["n-samples"][each]["effective"]) for each in _tasks(found, task))


def _shots(found: Any, task: str) -> int | None:
    """The number of examples in the prompts of a task, or of the tasks of a group; None if they differ."""
    numbers = {int(found["n-shot"].get(each) or 0) for each in _tasks(found, task)}
    return numbers.pop() if len(numbers) == 1 else None
