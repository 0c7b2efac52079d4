"""A MiniGPT folder -> its twin: the same weights under the name of Qwen3, with no code of ours.

In: a model folder. Out: a folder that transformers, mlx-lm and other engines load as `Qwen3ForCausalLM`. Only
`config.json` is another; weights and tokenizer are the same bytes. It is verified before it is there: it loads with
`trust_remote_code=False` and gives the same logits, bit for bit.

Every number of the architecture is written out, since the defaults of Qwen3 are others: heads of 128, no window.
"""

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM
from . import check, check_context, load_model, whole_or_absent

# What comes along as it is. Left behind are `config.json`, which is written anew, and the two files of code.
ALONG = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("README.md", "LICENSE", "minigpt.json", "figures/*", ".eval_results/*"),
)


def export_native(folder: Path, out: Path, context: int | None = None) -> Path:
    """Write the twin of a model folder to `out`, whole or not at all, and return `out`.

    Args:
        context: For engines that know no sliding windows: a context of so many tokens, within which the window hides
            nothing, in place of the window. Without it the twin has the windows of the model.

    Raises:
        MiniGPTError: if `folder` holds no MiniGPT, if `out` is there already, if the window is felt within `context`, or if
            the twin is not what it should be.
    """
    model = load_model(folder)
    check_context(model.config, context)
    with whole_or_absent(out) as twin:
        for pattern in ALONG:
            for file in folder.glob(pattern):
                (twin / file.relative_to(folder)).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, twin / file.relative_to(folder))
        _write_json(twin / "config.json", qwen3_settings(model, context))
        if context is not None:
            settings = json.loads((twin / "tokenizer_config.json").read_text(encoding="utf-8"))
            _write_json(twin / "tokenizer_config.json", {**settings, "model_max_length": context})
        _verify(twin, folder, model, context)
    return out


def qwen3_settings(model: MiniGPTForCausalLM, context: int | None = None) -> dict[str, Any]:
    """The content of the twin's `config.json`."""
    ours = model.config.to_dict()
    settings = {name: ours[name] for name in Qwen3Config.__annotations__ if name in ours}
    settings |= {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention_bias": False,
        "rope_theta": ours["rope_parameters"]["rope_theta"],  # where transformers 4 and older engines look for it
    }
    for name in ("initializer_range", "rms_norm_eps"):
        settings[name] = float(settings[name])  # Qwen3's are never integers
    if context is not None:
        settings |= {
            "max_position_embeddings": context,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": ["full_attention"] * model.config.num_hidden_layers,
        }
    return settings


def _verify(twin: Path, folder: Path, model: MiniGPTForCausalLM, context: int | None) -> None:
    for file in folder.glob("*.safetensors"):
        check(filecmp.cmp(file, twin / file.name, shallow=False), f"{file.name} is the same file")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        twin,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        attn_implementation="eager",
    )
    check(type(theirs) is Qwen3ForCausalLM, "transformers loads it with its own Qwen3")
    check(not any(report[fault] for fault in report), "its weights are those of a Qwen3, no more and no fewer")
    ids = probe(model.config, context)
    with torch.no_grad():
        check(torch.equal(theirs.eval()(ids).logits, model(ids).logits), "its logits are the model's, bit for bit")
    loaded = [AutoTokenizer.from_pretrained(place, trust_remote_code=False) for place in (folder, twin)]
    encoders = [tokenizer.backend_tokenizer.to_str() for tokenizer in loaded]
    check(encoders[0] == encoders[1], "transformers loads the same tokenizer from it")


def probe(config: MiniGPTConfig, context: int | None = None) -> torch.Tensor:
    """Token ids [1, T] to compare two models by: longer than the window, where there is one to be felt."""
    length = context or min(config.max_position_embeddings, max((config.sliding_window or 0) + 16, 64))
    return torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
