"""Write and check model folders: weights, configurations, tokenizer, model code, card, figures and metadata.

A model folder contains the files in `REQUIRED` (shards with their index may replace `model.safetensors`) and optionally
those in `OPTIONAL`. It is written atomically, and never with weights that are not finite.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..atomic import fsync, write_files
from ..doctor.folder import Folder
from ..doctor.weights import recorded, weights_fingerprint
from ..errors import MiniGPTError
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..trust import read_metadata, weight_files
from .card import place_of, render_card

logger = logging.getLogger(__name__)

CODE = ("configuration_minigpt.py", "modeling_minigpt.py")
REQUIRED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    *CODE,
    "README.md",
    "minigpt.json",
)
OPTIONAL = (
    "chat_template.jinja",
    "LICENSE",
    "figures/*.png",
    ".eval_results/*.yaml",
)


def published_files(folder: Path) -> list[Path]:
    """Return the sorted paths of the files in a folder that belong to a model folder; other files are ignored.

    Raises:
        MiniGPTError: if the index of the weights cannot be read or names files outside the folder.
    """
    found = {file for pattern in (*REQUIRED, *OPTIONAL) for file in folder.glob(pattern)}
    return sorted(file for file in {*found, *(folder / name for name in weight_files(folder))} if file.is_file())


def report_stray_weights(folder: Path, effect: str) -> None:
    """Log which weights in a folder its model does not load, if there are any.

    Args:
        effect: What happens to them, for the message.
    """
    found = {file.name for file in (*folder.glob("*.safetensors"), *folder.glob("model.safetensors.index.json"))}
    if stray := sorted(found - set(weight_files(folder))):
        logger.warning(f"{folder}: {effect}, because the model does not load them: {', '.join(stray)}")


def save_model_files(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, state_dict: dict | None = None
) -> None:
    """Write the files that `from_pretrained` reads: safetensors, configurations, tokenizer, and the model code.

    The Trainer disables `use_cache` during training; it is saved as enabled. transformers 5 calls the tokenizer class
    `TokenizersBackend`, which other releases do not have; the alias `PreTrainedTokenizerFast` is saved instead. Token types,
    which tokenizers of other models return, are omitted, because `generate` rejects them.

    Args:
        folder: Target folder; created if it does not exist.
        state_dict: Weights to save. Default: those of `model`.
    """
    use_cache, model.config.use_cache = model.config.use_cache, True
    model.save_pretrained(folder, state_dict=state_dict)
    model.config.use_cache = use_cache

    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    for weights in folder.glob("*.safetensors"):  # safetensors creates its files for their owner only
        weights.chmod(file.stat().st_mode)
    settings = json.loads(file.read_text(encoding="utf-8"))
    before = dict(settings)
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "token_type_ids" in settings.get("model_input_names", []):
        settings["model_input_names"] = [each for each in settings["model_input_names"] if each != "token_type_ids"]
    if settings != before:
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    metadata: dict[str, Any],
    log: list[dict[str, Any]] | None,
) -> None:
    """Write a model folder atomically: it is filled under a temporary name, synchronized to disk and renamed.

    Args:
        folder: Target folder; it must not exist.
        metadata: Content of `minigpt.json`: recipe, data, tokenizer, training, results. The fingerprint of the weights is
            added.
        log: Rows of `log.jsonl`, for the figures. `None`: no figures.

    Raises:
        MiniGPTError: if a weight is not finite.
    """
    if name := non_finite_parameter(model):
        raise MiniGPTError(f"{name} has values that are not finite; the model is not published")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        save_model_files(model, tokenizer, unfinished)
        metadata = {**metadata, "weights": weights_fingerprint(Folder(unfinished))}
        write_metadata(unfinished, metadata, model.config, log)
        for path in (*unfinished.rglob("*"), unfinished):
            fsync(path)
        unfinished.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # after an error; on a full disk, this frees its space


def non_finite_parameter(model: torch.nn.Module) -> str | None:
    """Return the name of the first parameter with a value that is not finite, or `None`; of a sharded one (FSDP), the values
    on this rank are checked."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight.to_local() if isinstance(weight, DTensor) else weight).all():
            return name
    return None


def damage(folder: Path) -> str | None:
    """Return why a model folder is unusable, or `None` if it has every required file and weights for its configuration.

    Compares the names and shapes of all tensors, and each safetensors header with the size of its file. Values of weights and
    the content of the card are not checked.
    """
    index = folder / "model.safetensors.index.json"
    for name in REQUIRED:
        file = folder / name
        if name == "model.safetensors" and not file.is_file() and index.is_file():
            file = index
        if not file.is_file() or not file.stat().st_size:
            return f"{file.name} is {'empty' if file.is_file() else 'missing'}"
    try:
        for file in folder.glob("*.json"):
            json.loads(file.read_text(encoding="utf-8"))
        with torch.device("meta"):
            model = MiniGPTForCausalLM(MiniGPTConfig.from_pretrained(folder))
        tied = set(model.all_tied_weights_keys)
        expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items() if name not in tied}
        found: dict[str, tuple[int, ...]] = {}
        for name in weight_files(folder):
            if name == index.name:
                continue
            with safe_open(folder / name, "pt") as weights:
                names = weights.keys()
                found |= {name: tuple(weights.get_slice(name).get_shape()) for name in names}
    except Exception as error:  # the loaders do not document what they raise for malformed files
        return f"it cannot be read: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    if wrong := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        return f"tensor {wrong[0]} is {found.get(wrong[0], 'missing')} instead of {expected.get(wrong[0], 'absent')}"
    return None


def write_metadata(
    folder: Path, metadata: dict[str, Any], config: MiniGPTConfig, log: list[dict[str, Any]] | None
) -> None:
    """Write `minigpt.json`, the figures and the model card into a folder.

    Args:
        metadata: Content of `minigpt.json`.
        log: Rows of `log.jsonl`, for the figures. `None`: no figures.
    """
    (folder / "minigpt.json").write_text(_json(metadata), encoding="utf-8")
    if log is not None:
        from .figures import draw_learning, draw_training  # imports matplotlib

        (folder / "figures").mkdir()
        draw_learning(log, folder / "figures" / "loss.png")
        draw_training(log, folder / "figures" / "training.png")
    (folder / "README.md").write_text(render_card(metadata, config), encoding="utf-8")


def save_score(folder: Path, score: dict[str, Any]) -> list[str]:
    """Add a score of generated answers to the metadata and the card of a model folder; see `_save`.

    It replaces a score of the same data and metric.

    Args:
        score: An entry of `scores` in `minigpt.json`: an `AnswerScore` and the identity of its data.
    """
    return _save(folder, "scores", [score], lambda each: (each["metric"], each["data"]["fingerprint"]))


def warn_if_weights_differ(folder: Path) -> None:
    """Log a warning if `minigpt.json`, and hence the card, describes other weights than those of the folder."""
    if (row := recorded(Folder(folder, follow=True))).state == "fail":
        logger.warning(f"{folder}: {row.reason}; {row.remedy}")


def save_tasks(folder: Path, results: list[dict[str, Any]]) -> list[str]:
    """Add results of evaluation suites to the metadata and the card of a model folder; see `_save`.

    They replace those of the same task and metric.

    Args:
        results: Entries of `tasks` in `minigpt.json`: `TaskResult`.
    """
    return _save(folder, "tasks", results, lambda each: (each["task"], each["metric"], each["filter"]))


def _save(
    folder: Path, kind: str, entries: list[dict[str, Any]], identity: Callable[[dict], tuple[str, ...]]
) -> list[str]:
    """Add entries to a list in the metadata of a model folder, and to its card.

    Each file is replaced atomically. A card that has been edited, or was written by another version of the package, is left
    unchanged, which is logged.

    Args:
        identity: Entries with an equal identity replace earlier ones.

    Returns:
        The names of the files that were replaced.

    Raises:
        MiniGPTError: if `folder` is not a model folder, or its metadata are malformed.
    """
    if missing := [name for name in (*CODE, "README.md", "minigpt.json") if not (folder / name).is_file()]:
        raise MiniGPTError(f"{folder} is not a model folder, {missing[0]} is missing")
    warn_if_weights_differ(folder)
    metadata, card = read_metadata(folder), (folder / "README.md").read_text(encoding="utf-8")
    config = MiniGPTConfig.from_pretrained(folder)
    try:
        known = {identity(each): each for each in (*metadata.get(kind, []), *entries)}
        updated = {**metadata, kind: [*known.values()]}
        place = place_of(metadata, card)
        old_card, new_card = render_card(metadata, config, place), render_card(updated, config, place)
    except (KeyError, TypeError, ValueError, AttributeError, TemplateError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise MiniGPTError(f"{folder}: minigpt.json is malformed ({reason}); restore it from its source") from error
    contents = {folder / "minigpt.json": _json(updated)}
    # Equal to the new card: the process was killed after the first of the two files had been replaced.
    if card in (old_card, new_card):
        contents = {folder / "README.md": new_card, **contents}
    else:
        logger.warning(
            f"{folder / 'README.md'}: has been edited and is left unchanged; the {kind} are in minigpt.json only"
        )
    write_files(contents)
    return sorted((file.name for file in contents), key=str.lower)


def _json(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
