"""A trained model -> a model folder that the world can load.

In: model, tokenizer, what is known of the training. Out: a folder with exactly the files of `REQUIRED` and perhaps some of
`OPTIONAL` (shards and their index stand for `model.safetensors`). It is whole or it is not there: it is written beside its
place and moved there. It refuses weights that are not finite.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..atomic import to_disk
from ..errors import MiniGPTError
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM
from .card import eval_results, render_card
from .figures import draw_learning, draw_training

REQUIRED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "configuration_minigpt.py",
    "modeling_minigpt.py",
    "README.md",
    "minigpt.json",
)
OPTIONAL = (
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "chat_template.jinja",
    "LICENSE",
    "figures/*.png",
    ".eval_results/*.yaml",
)


def published_files(folder: Path) -> list[Path]:
    """The files of a folder that belong to a model folder, sorted; whatever else lies there is left out."""
    return sorted({file for pattern in (*REQUIRED, *OPTIONAL) for file in folder.glob(pattern) if file.is_file()})


def save_model_files(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, state_dict: dict | None = None
) -> None:
    """Write what `from_pretrained` needs: weights as safetensors, configurations, tokenizer, and the model's own code.

    Two things are put right: the Trainer switches `use_cache` off while it trains, which is not for publication; and
    transformers 5 names the tokenizer's class `TokenizersBackend`, which older tools do not know, where the alias
    `PreTrainedTokenizerFast` loads everywhere.
    """
    use_cache, model.config.use_cache = model.config.use_cache, True
    model.save_pretrained(folder, state_dict=state_dict)
    model.config.use_cache = use_cache

    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    about: dict[str, Any],
    log: list[dict[str, Any]],
) -> None:
    """Write a model folder, whole or not at all: it is forced to disk before it is renamed to its place.

    Args:
        folder: Where it is to stand; it must not exist.
        about: Becomes `minigpt.json`: recipe, data, tokenizer, training, results. The card tells it in prose.
        log: Rows of `log.jsonl`, for the figure.

    Raises:
        MiniGPTError: if a weight is not finite: such a model is never published.
    """
    if name := non_finite_parameter(model):
        raise MiniGPTError(f"{name} has values that are not finite; the model is not published")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        save_model_files(model, tokenizer, unfinished)
        write_metadata(unfinished, about, model.config, log)
        for path in (*unfinished.rglob("*"), unfinished):
            to_disk(path)
        unfinished.rename(folder)
        to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # on a full disk its room is needed
        raise


def non_finite_parameter(model: torch.nn.Module) -> str | None:
    """The name of the first parameter with a value that is not finite; `None` if there is none."""
    return next((name for name, each in model.named_parameters() if not torch.isfinite(each).all()), None)


def damage(folder: Path) -> str | None:
    """What makes a model folder unusable; `None` if every required file is there and the weights fit the configuration.

    Compared are names and shapes of all tensors, and each safetensors header with the size of its file. The values are not
    read, and a card that was edited is no damage.
    """
    index = folder / "model.safetensors.index.json"
    for name in REQUIRED:
        file = index if name == "model.safetensors" and index.is_file() else folder / name
        if not file.is_file() or not file.stat().st_size:
            return f"{file.name} is {'empty' if file.is_file() else 'missing'}"
    try:
        for file in folder.glob("*.json"):
            json.loads(file.read_text(encoding="utf-8"))
        with torch.device("meta"):
            model = MiniGPTForCausalLM(MiniGPTConfig.from_pretrained(folder))
        tied = set(model.all_tied_weights_keys)
        wanted = {name: tuple(each.shape) for name, each in model.state_dict().items() if name not in tied}
        found = {}
        for file in folder.glob("model*.safetensors"):
            with safe_open(file, "pt") as weights:
                names = weights.keys()
                found |= {name: tuple(weights.get_slice(name).get_shape()) for name in names}
    except Exception as error:  # what the loaders raise over malformed files is not documented
        return f"it cannot be read: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    if wrong := sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name)):
        return f"tensor {wrong[0]} is {found.get(wrong[0], 'missing')} instead of {wanted.get(wrong[0], 'absent')}"
    return None


def write_metadata(folder: Path, about: dict[str, Any], config: MiniGPTConfig, log: list[dict[str, Any]]) -> None:
    """Write what tells people and programs where a model comes from: `minigpt.json`, the figures, the card, the results."""
    (folder / "minigpt.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "figures").mkdir()
    draw_learning(log, folder / "figures" / "loss.png")
    draw_training(log, folder / "figures" / "training.png")
    (folder / "README.md").write_text(render_card(about, config), encoding="utf-8")
    if results := eval_results(about):
        (folder / ".eval_results").mkdir()
        (folder / ".eval_results" / "validation.yaml").write_text(results, encoding="utf-8")
