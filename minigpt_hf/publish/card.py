"""Render the model card (`README.md`) from the metadata in `minigpt.json` and the template `model_card.md`."""

import functools
import json
import logging
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..data.chat_format import system_message
from ..doctor.card import ACTIVE
from ..errors import MiniGPTError
from ..model.configuration_minigpt import MiniGPTConfig
from ..trust import read_metadata, recipe_text

logger = logging.getLogger(__name__)

# The template is next to this file in the wheel, and at the root of the repository in a checkout.
_PACKAGED = Path(__file__).with_name("model_card.md")
TEMPLATE = _PACKAGED if _PACKAGED.is_file() else Path(__file__).parents[2] / "model_card.md"

# The package is not published in a registry and is installed from a checkout.
INSTALL = "pip install PATH/TO/minigpt-hf"

# Generated text may contain control characters, which act on terminals, and bidirectional formatting characters, which
# reorder the text around them.
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


# Grams of CO2 equivalent per kWh: the world average of the IEA, which CodeCarbon assumes for an unknown location
# (https://mlco2.github.io/codecarbon/methodology.html).
CARBON_INTENSITY = 475


# Names of the scores of generated answers, and their identifiers on the Hub (https://hf.co/metrics).
SCORE_NAMES = {"exact": "exact match", "chrf": "chrF", "bleu": "BLEU", "rouge": "ROUGE-L"}
HUB_METRICS = {"exact": "exact_match", "chrf": "chrf", "bleu": "bleu", "rouge": "rouge"}


@dataclass(frozen=True)
class Place:
    """What a card says about the repository or folder that it describes.

    Args:
        native: `main` of a repository or a native export, which load without the code of a model folder.
        absent: Hub ids of datasets and models that do not exist on the Hub, and are not linked.
        space: Hub id of the Space that demonstrates the model.
        revision: Branch of the repository; None: `main`.
    """

    native: bool = False
    absent: frozenset[str] = frozenset()
    space: str | None = None
    revision: str | None = None


def render_card(metadata: dict[str, Any], config: MiniGPTConfig, place: Place | None = None) -> str:
    """Return the text of the model card.

    Args:
        metadata: Content of `minigpt.json`.
        config: Configuration of the model.
        place: Default: `place_of`.

    Raises:
        jinja2.UndefinedError: if the template uses a value that `metadata` lacks.
    """
    place = place or place_of(metadata)
    return (
        _template().render(
            card_data=card_data(metadata, place.absent).to_yaml(),
            config=config,
            location=location(metadata["name"]),
            native=place.native,
            space=place.space,
            revision=place.revision,
            is_fine_tuned=is_fine_tuned(metadata),
            base_model=base_model(metadata, place.absent),
            emissions=emissions(metadata),
            has_copying=has_copying(metadata),
            has_changed_data=has_changed_data(metadata),
            is_seen_by_base_model=is_seen_by_base_model(metadata),
            is_mixture_of_streams=is_mixture_of_streams(metadata),
            carbon_intensity=CARBON_INTENSITY,
            install=INSTALL,
            prompt=metadata["sample"]["prompt"] or metadata["tokenizer"]["opening"],
            messages=messages_literal(metadata),
            systems=system_messages(metadata),
            recipe_yaml=to_yaml(metadata["recipe"]).strip(),
            score_names=SCORE_NAMES,
            **{"scores": [], "tasks": [], **metadata},
        )
        + "\n"
    )


def place_of(metadata: dict[str, Any], card: str = "") -> Place:
    """Return the branch that the model was trained for or downloaded from if its name is a Hub id, else a local folder.

    Args:
        card: Its card, which names the demo, and links the datasets and the base model that existed when it was pushed.
    """
    native = "/" in metadata["name"]
    ids = {*metadata["data"]["datasets"], base_model(metadata)} - {None}
    linked = {*re.findall(r"^(?:- |base_model: )(\S+)$", card, re.MULTILINE)}
    absent = frozenset(ids - linked if native and card else ())
    return Place(native, absent, space_in(card), metadata.get("hub_revision"))


def space_in(card: str) -> str | None:
    """Return the demo that a card links."""
    space = re.search(r"^Try it: \[(\S+)\]\(https://huggingface\.co/spaces/", card, re.MULTILINE)
    return space[1] if space else None


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "code": code,
        "cell": cell,
        "fenced": fenced,
        "literal": literal,
        "shell": shell,
        "energy": energy,
    }
    environment.filters["score"] = score_value
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def card_for(folder: Path, place: Place | None = None, name: str | None = None) -> str:
    """Return the card of a model folder for another place.

    A card that has been edited, or was written by another version of the package, is returned unchanged, which is logged.

    Args:
        place: Default: a native export.
        name: Name of the model there. Default: unchanged.

    Raises:
        MiniGPTError: if no card can be rendered from the metadata.
    """
    card, here = (folder / "README.md").read_text(encoding="utf-8"), rendered_card(folder)
    metadata, config = read_metadata(folder), MiniGPTConfig.from_pretrained(folder)
    place = place or replace(place_of(metadata, card), native=True)
    adapted = render_card({**metadata, "name": name or metadata["name"]}, config, place)
    if card in (adapted, here):
        return adapted
    logger.warning(
        f"{folder / 'README.md'}: has been edited, or written by another version of this package, and is copied unchanged: "
        f"its name, links and examples are not adapted to {name or 'the export'}"
    )
    return card


def rendered_card(folder: Path) -> str:
    """Return the card of a model folder, rendered from its metadata for the place that its present card describes.

    Raises:
        MiniGPTError: if the metadata lack a value or are malformed.
    """
    metadata, config = read_metadata(folder), MiniGPTConfig.from_pretrained(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    try:
        return render_card(metadata, config, place_of(metadata, card))
    except (KeyError, TypeError, ValueError, AttributeError, jinja2.TemplateError) as error:
        raise MiniGPTError(
            f"{folder}: no card can be rendered from minigpt.json ({type(error).__name__}: {error}), which is malformed, "
            f"or was written by another version of this package ({metadata.get('minigpt_version', 'unknown')}); restore it "
            "from its source, or train again"
        ) from error


def location(name: str) -> str:
    """Return what the examples of a card load: the Hub id, or the current folder if the model has none."""
    return name if "/" in name else "."


def example_messages(metadata: dict[str, Any]) -> list[dict[str, str]]:
    """Return the messages of the example of a model that learned conversations; empty for other models."""
    recipe, question = metadata["recipe"], metadata["sample"]["prompt"]
    if not recipe.get("chat"):
        return []
    asked = metadata["sample"].get("conversations") or [[]]
    if asked[0]:
        return asked[0]
    systems = system_messages(metadata) or [recipe.get("system") or None]
    system = [] if systems[0] is None else [{"role": "system", "content": systems[0]}]
    return [*system, {"role": "user", "content": question or "Hello"}]


def system_messages(metadata: dict[str, Any]) -> list[str | None]:
    """Return the system message of each conversation that a sample answers; empty if the metadata have none."""
    sample = metadata.get("sample")
    conversations = sample.get("conversations") if isinstance(sample, dict) else None
    try:
        found: list[Any] = [system_message(messages) for messages in conversations or []]
    except (TypeError, KeyError):  # metadata of another program
        return []
    return [each if isinstance(each, str) else None for each in found]


def report_system_messages(folder: Path, what: str) -> bool:
    """Log, and return, whether conversations of the training of a model have system messages of their own.

    Args:
        what: What starts conversations with the system message of the settings, or with none.
    """
    metadata = read_metadata(folder)
    data, of_samples = metadata.get("data"), {*system_messages(metadata)} - {None, recipe_text(folder, "system")}
    has_others = bool(of_samples) or (isinstance(data, dict) and data.get("has_other_systems") is True)
    if has_others:
        logger.warning(
            f"{folder}: conversations of the training have system messages of their own, which {what} does not contain"
            + (", so its answers may differ from those in the card" if of_samples else "")
        )
    return has_others


def messages_literal(metadata: dict[str, Any]) -> str:
    """Return `example_messages` as a Python literal; "" for other models."""
    messages = [
        f'{{"role": {literal(message["role"])}, "content": {literal(message["content"])}}}'
        for message in example_messages(metadata)
    ]
    return f"[{', '.join(messages)}]" if messages else ""


def is_fine_tuned(metadata: dict[str, Any]) -> bool:
    """Whether training started from an existing model."""
    return bool(metadata["recipe"].get("init_from"))


def base_model(metadata: dict[str, Any], absent: Collection[str] = ()) -> str | None:
    """Return the Hub id of the model that training started from; `None` if there is none, or it was a local folder.

    `minigpt.json` contains only the last component of a local path. An id without namespace is therefore not accepted: it
    could be the name of a folder, and no MiniGPT or Qwen3 model on the Hub has one.
    """
    base = hub_id(metadata["recipe"].get("init_from"))
    return None if base in absent else base


def hub_id(name: Any) -> str | None:
    """Return a name of the form USER/NAME, or `None` for any other value."""
    if not isinstance(name, str) or "/" not in name:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def emissions(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the estimated emissions of training in the schema of the Hub, which expects grams."""
    training = metadata["training"]
    return {
        "emissions": float(f"{training['energy_wh'] / 1000 * CARBON_INTENSITY:.2g}"),
        "source": f"estimated by minigpt-hf: time × assumed power × {CARBON_INTENSITY} g/kWh (world average)",
        "training_type": "fine-tuning" if is_fine_tuned(metadata) else "pre-training",
        "hardware_used": training["device"],
    }


def card_data(metadata: dict[str, Any], absent: Collection[str] = ()) -> ModelCardData:
    """Return the YAML metadata of a card, which the Hub uses for search, the widget and evaluation results.

    Args:
        absent: Hub ids that are not linked.
    """
    prompt, messages = metadata["sample"]["prompt"], example_messages(metadata)
    shown = [prompt, *(message["content"] for message in messages)]  # by other programs, in web pages
    datasets = [name for name in metadata["data"]["datasets"] if name not in absent]
    base = base_model(metadata, absent)
    results = [
        *validation_results(metadata, datasets[0] if len(datasets) == 1 else "text"),
        *score_results(metadata),
        *task_results(metadata),
    ]
    return ModelCardData(
        model_name=metadata["name"] if results else None,  # required by `eval_results`, and written only with them
        language=metadata["language"] or None,
        license=metadata["license"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["minigpt", "gpt"] if is_fine_tuned(metadata) else ["minigpt", "gpt", "from-scratch"],
        datasets=datasets or None,
        base_model=base,
        # Published folders contain complete weights: LoRA factors are merged, so the relation is never "adapter".
        base_model_relation="finetune" if base else None,
        co2_eq_emissions=emissions(metadata),
        widget=[{"messages": messages} if messages else {"text": prompt}]
        if prompt and not any(CONTROL_CHARACTERS.search(each) or ACTIVE.search(each) for each in shown)
        else None,
        eval_results=results or None,
    )


def has_changed_data(metadata: dict[str, Any]) -> bool:
    """Whether the training text was changed during training: the earlier one may contain the text that is scored."""
    return any(change["setting"] == "data" for change in metadata["training"].get("changes", []))


def is_seen_by_base_model(metadata: dict[str, Any]) -> bool:
    """Whether the model that training started from was trained on text that is scored."""
    return "unseen_fraction" in metadata["data"]


def is_mixture_of_streams(metadata: dict[str, Any]) -> bool:
    """Whether the training text is a mixture of streamed datasets, whose split `minigpt evaluate` cannot reproduce."""
    recipe = metadata["recipe"]
    return bool(recipe.get("streaming")) and "," in str(recipe.get("data"))  # the name of one dataset has no comma


def validation_results(metadata: dict[str, Any], dataset_type: str) -> list[EvalResult]:
    """Return the validation score in the schema of the Hub; empty if there is none, or it is not one of unseen text."""
    if has_changed_data(metadata) or is_seen_by_base_model(metadata):
        return []
    data, results, lossy = metadata["data"], metadata["results"], metadata["tokenizer"].get("lossy")
    conditions = {name: results[name] for name in ("block_size", "stride", "tokens", "bytes") if results}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset_type,
            dataset_name=f"{CONTROL_CHARACTERS.sub(REPLACEMENT, data['name'])}, validation split"
            + (f" (not comparable: {lossy})" if lossy else ""),
            dataset_split="validation",
            dataset_args={"split": data["cut"]},
            metric_type=name,
            metric_name=f"{name.replace('_', ' ')}, each token scored once",
            metric_value=round(results[name], 4),
            metric_args=conditions,
        )
        for name in ("bits_per_byte", "perplexity", "loss")
        if results
    ]


def score_results(metadata: dict[str, Any]) -> list[EvalResult]:
    """Return the scores of generated answers in the schema of the Hub. The fingerprint of the data is its revision."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=CONTROL_CHARACTERS.sub(REPLACEMENT, score["data"]["name"])
            + (" (contains the training text)" if score["data"].get("of_training") else "")
            + (" (with another system message than in training)" if "system" in score["data"] else ""),
            dataset_split=None if score["data"]["split"] == "all" else score["data"]["split"],
            dataset_revision=score["data"]["fingerprint"],
            metric_type=HUB_METRICS[score["metric"]],
            metric_name=f"{SCORE_NAMES[score['metric']]} of generated answers",
            metric_value=round(score["score"], 4),
            metric_args={name: round(score[name], 4) for name in ("low", "high", "ended", "answers")}
            | {"baselines": {name: round(value, 4) for name, value in score["baselines"].items()}},
        )
        for score in metadata.get("scores", [])
    ]


def task_results(metadata: dict[str, Any]) -> list[EvalResult]:
    """Return the results of evaluation suites in the schema of the Hub, with standard errors."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=each["dataset"] or "text",
            dataset_name=CONTROL_CHARACTERS.sub(REPLACEMENT, each["task"]),
            metric_type=CONTROL_CHARACTERS.sub(REPLACEMENT, each["metric"]),
            metric_name=f"{CONTROL_CHARACTERS.sub(REPLACEMENT, each['metric'])}, lm-evaluation-harness {each['harness']}",
            metric_value=round(each["value"], 6),
            metric_args={name: each[name] for name in ("version", "filter", "samples", "shots")}
            | ({} if each["stderr"] is None else {"stderr": round(each["stderr"], 6)}),
        )
        for each in metadata.get("tasks", [])
    ]


def score_value(value: float, metric: str) -> str:
    """Format a score: 0.998 becomes "99.8 %" for `exact`; 63.21 becomes "63.2" for `chrf`; ROUGE-L has three decimals."""
    return f"{100 * value:.1f} %" if metric == "exact" else f"{value:.3f}" if metric == "rouge" else f"{value:.1f}"


def has_copying(metadata: dict[str, Any]) -> bool:
    """Whether there are figures of verbatim copying, of a sample that is as long as the shortest stretch they count."""
    copying: dict[str, Any] = metadata.get("copying") or {}
    if not copying:
        return False
    longest_sample = max(stretch["of_tokens"] for stretch in copying["stretches"])
    return longest_sample >= min(map(int, copying["samples"]["shares"]))


def code(text: str) -> str:
    """Format text as inline code in a sentence: a`b|c becomes ``a`b|c``."""
    text = CONTROL_CHARACTERS.sub(REPLACEMENT, text.replace("\n", " "))
    ticks = "`" * (_longest_backtick_run(text) + 1)
    space = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) else ""  # CommonMark strips one space
    return f"{ticks}{space}{text}{space}{ticks}"


def cell(text: str) -> str:
    """Format text as inline code in a cell of a table: a|b becomes `a\\|b`."""
    return code(text).replace("|", r"\|")


def fenced(text: str, language: str = "text") -> str:
    """Format text as a fenced code block whose fence is longer than any run of backticks in the text.

    Line ends of Windows become those of the card; as control characters, they would be replaced.
    """
    text = text.replace("\r\n", "\n")
    ticks = "`" * max(3, _longest_backtick_run(text) + 1)
    return f"{ticks}{language}\n{CONTROL_CHARACTERS.sub(REPLACEMENT, text)}\n{ticks}"


def literal(text: str) -> str:
    """Format text as a Python string literal in double quotes."""
    return CONTROL_CHARACTERS.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(text, ensure_ascii=False))


def shell(text: str) -> str:
    """Quote text as one word of bash on one line."""
    if not CONTROL_CHARACTERS.search(text) and "\n" not in text:
        return shlex.quote(text)
    escaped = text.replace("\\", r"\\").replace("'", r"\'")
    pattern = rf"{CONTROL_CHARACTERS.pattern}|\n"
    return "$'" + re.sub(pattern, lambda match: f"\\u{ord(match[0]):04x}", escaped) + "'"


def to_yaml(value: Any) -> str:
    """Dump a value as YAML. Non-ASCII characters are escaped only if the text contains control characters."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return yaml.safe_dump(value, sort_keys=False) if CONTROL_CHARACTERS.search(text) else text


def energy(watt_hours: float) -> str:
    """Format an estimated energy with two significant digits: 0.00714 becomes "0.0071 Wh", 1234 becomes "1.2 kWh"."""
    value, unit = (watt_hours, "Wh") if watt_hours < 1000 else (watt_hours / 1000, "kWh")
    return f"{float(f'{value:.2g}'):,g} {unit}"


def _longest_backtick_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
