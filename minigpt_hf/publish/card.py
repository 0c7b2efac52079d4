"""What is known of a model -> its card.

In: the content of `minigpt.json` and the model's configuration. Out: the text of `README.md`, rendered from the template
`model_card.md`, the only home of the card's prose. It refuses to leave a placeholder open: an unknown figure is an error.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from ..model.configuration_minigpt import MiniGPTConfig

# The wheel carries the template in this folder; in a checkout it stands at the top.
_PACKAGED = Path(__file__).with_name("model_card.md")
TEMPLATE = _PACKAGED if _PACKAGED.is_file() else Path(__file__).parents[2] / "model_card.md"

# The package is in no registry: it is installed from a checkout.
INSTALL = "pip install PATH/TO/minigpt-hf"

# A model of bytes may write anything, and some characters steer terminals or turn the direction of text.
UNSHOWN = "\N{REPLACEMENT CHARACTER}"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def render_card(about: dict[str, Any], config: MiniGPTConfig) -> str:
    """Fill the template.

    Raises:
        jinja2.UndefinedError: if the template asks for something that is not known.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"code": code, "fenced": fenced, "literal": literal, "shell": shell, "energy": energy}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return (
        template.render(
            card_data=metadata(about).to_yaml(),
            config=config,
            location=location(about["name"]),
            install=INSTALL,
            prompt=about["sample"]["prompt"] or about["tokenizer"]["opening"],
            recipe_yaml=as_yaml(about["recipe"]).strip(),
            **about,
        )
        + "\n"
    )


def location(name: str) -> str:
    """What the snippets of a card load: the Hub id of a model that has one, else the folder in which the card stands."""
    return name if "/" in name else "."


def metadata(about: dict[str, Any]) -> ModelCardData:
    """What the Hub reads of a card: it finds the model by it, and shows the results."""
    data, results, prompt = about["data"], about["results"], about["sample"]["prompt"]
    measured = {name: results[name] for name in ("block_size", "stride", "tokens", "bytes") if results}
    return ModelCardData(
        model_name=about["name"] if results else None,  # of the results, not of the model
        language=about["language"] or None,
        license=about["license"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["minigpt", "gpt", "from-scratch"],
        datasets=[data["dataset"]] if data["dataset"] else None,
        widget=[{"text": prompt}] if prompt and not STEERING.search(prompt) else None,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=data["dataset"] or "text",
                dataset_name=f"{STEERING.sub(UNSHOWN, data['name'])}, validation part",
                dataset_split="validation",
                dataset_args={"cut": data["cut"]},
                metric_type=name,
                metric_name=f"{name.replace('_', ' ')}, each token scored once",
                metric_value=round(results[name], 4),
                metric_args=measured,
            )
            for name in ("bits_per_byte", "perplexity", "loss")
            if results
        ]
        or None,
    )


def eval_results(about: dict[str, Any]) -> str | None:
    """The content of `.eval_results/validation.yaml`, if the text is a data set of the Hub, for its pages to show.

    Source of the format: https://huggingface.co/docs/hub/eval-results.
    """
    results, dataset = about["results"], about["data"]["dataset"]
    if not results or not dataset:
        return None
    notes = f"bits per byte of {about['data']['cut']}; windows of {results['block_size']}, each token scored once"
    entry = EvalResultEntry(dataset, "default", round(results["bits_per_byte"], 4), date=about["date"], notes=notes)
    return as_yaml(eval_result_entries_to_yaml([entry]))


def code(text: str) -> str:
    """In one line of Markdown, in the middle of a sentence or a table: a`b|c -> ``a`b\\|c``."""
    text = STEERING.sub(UNSHOWN, text.replace("\n", " ")).replace("|", r"\|")
    ticks = "`" * (_longest_run(text) + 1)
    space = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) else ""  # CommonMark takes one away
    return f"{ticks}{space}{text}{space}{ticks}"


def fenced(text: str, language: str = "text") -> str:
    """As a block that nothing in the text can end."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    return f"{ticks}{language}\n{STEERING.sub(UNSHOWN, text)}\n{ticks}"


def literal(text: str) -> str:
    """As Python writes it, in double quotes."""
    return STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def shell(text: str) -> str:
    """As one word of bash, in one line."""
    if not STEERING.search(text) and "\n" not in text:
        return shlex.quote(text)
    escaped = text.replace("\\", r"\\").replace("'", r"\'")
    return "$'" + re.sub(rf"{STEERING.pattern}|\n", lambda found: f"\\u{ord(found[0]):04x}", escaped) + "'"


def as_yaml(value: Any) -> str:
    """With characters as they are, unless one of them steers: then all that are not ASCII are spelled out."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return yaml.safe_dump(value, sort_keys=False) if STEERING.search(text) else text


def energy(watt_hours: float) -> str:
    """To two digits, which is more than an estimate holds: 0.00714 -> "0.0071 Wh"; 1234 -> "1.2 kWh"."""
    size, unit = (watt_hours, "Wh") if watt_hours < 1000 else (watt_hours / 1000, "kWh")
    return f"{float(f'{size:.2g}'):,g} {unit}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
