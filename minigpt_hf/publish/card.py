"""What is known of a model -> its card.

In: the content of `minigpt.json` and the model's configuration. Out: the text of `README.md`, rendered from the template
`model_card.md`, the only home of the card's prose. It refuses to leave a placeholder open: an unknown figure is an error.
"""

from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..model.configuration_minigpt import MiniGPTConfig

# The wheel carries the template in this folder; in a checkout it stands at the top.
_PACKAGED = Path(__file__).with_name("model_card.md")
TEMPLATE = _PACKAGED if _PACKAGED.is_file() else Path(__file__).parents[2] / "model_card.md"


def render_card(about: dict[str, Any], config: MiniGPTConfig) -> str:
    """Fill the template.

    Raises:
        jinja2.UndefinedError: if the template asks for something that is not known.
    """
    results = about["results"]
    metadata = ModelCardData(
        model_name=about["name"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["minigpt", "gpt", "from-scratch"],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=f"{Path(about['data']['name']).name}, validation part",
                metric_type=name,
                metric_name=name.replace("_", " "),
                metric_value=round(results[name], 4),
            )
            for name in ("loss", "perplexity", "bits_per_byte")
            if results
        ]
        or None,
    )
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    recipe_yaml = yaml.safe_dump(about["recipe"], sort_keys=False).strip()
    return template.render(card_data=metadata.to_yaml(), config=config, recipe_yaml=recipe_yaml, **about) + "\n"
