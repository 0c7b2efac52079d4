"""Export as the native twin: a folder that transformers, mlx-lm and others load as `Qwen3ForCausalLM` without remote code.

Only `config.json` differs from the model folder; weights and tokenizer are the same bytes. The export is verified: it loads
with `trust_remote_code=False`, and its logits are equal bit for bit. Every value of the architecture is stated, because the
defaults of Qwen3 differ (head dimension 128, no sliding window).
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
from .conversion import atomic_folder, check_context, load_model, verify

VERIFIED = "loads as Qwen3ForCausalLM without remote code; equal weights; logits equal bit for bit"

# Files copied unchanged: all but `config.json`, which is converted, and the two code files.
COPIED = (
    *("*.safetensors", "model.safetensors.index.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("README.md", "LICENSE", "minigpt.json", "figures/*", ".eval_results/*"),
)


def export_native(folder: Path, out: Path, dtype: None = None, context: int | None = None) -> Path:
    """Write the native twin of a model folder to `out` atomically, and return `out`.

    Args:
        dtype: Unused; the weights are stored unchanged.
        context: Maximum context in tokens, for engines without sliding windows: the twin gets full attention, which is the
            same function up to the length of the window. Default: the sliding windows of the model.

    Raises:
        MiniGPTError: if `folder` has no MiniGPT model, `out` exists, `context` is longer than the window, or verification
            fails.
    """
    model = load_model(folder)
    check_context(model.config, context)
    with atomic_folder(out) as twin:
        for pattern in COPIED:
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
    """Return the content of the twin's `config.json`; for `context` see `export_native`."""
    source = model.config.to_dict()
    settings = {name: source[name] for name in Qwen3Config.__annotations__ if name in source}
    settings |= {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention_bias": False,
        "rope_theta": source["rope_parameters"]["rope_theta"],  # read by transformers 4 and older engines
    }
    for name in ("initializer_range", "rms_norm_eps"):
        settings[name] = float(settings[name])  # declared as floats by Qwen3
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
        verify(filecmp.cmp(file, twin / file.name, shallow=False), f"{file.name} is the same file")
    twin_model, report = AutoModelForCausalLM.from_pretrained(
        twin,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        attn_implementation="eager",
    )
    verify(type(twin_model) is Qwen3ForCausalLM, "transformers loads it as Qwen3ForCausalLM")
    verify(not any(report.values()), "its weights are exactly those of Qwen3ForCausalLM")
    ids = comparison_ids(model.config, context)
    with torch.no_grad():
        verify(
            torch.equal(twin_model.eval()(ids).logits, model(ids).logits), "its logits equal the model's bit for bit"
        )
    tokenizers = [AutoTokenizer.from_pretrained(path, trust_remote_code=False) for path in (folder, twin)]
    serialized = [tokenizer.backend_tokenizer.to_str() for tokenizer in tokenizers]
    verify(serialized[0] == serialized[1], "transformers loads the same tokenizer from it")


def comparison_ids(config: MiniGPTConfig, context: int | None = None) -> torch.Tensor:
    """Return random token ids [1, T] for comparing two models, longer than the sliding window unless `context` is given."""
    length = context or min(config.max_position_embeddings, max((config.sliding_window or 0) + 16, 64))
    return torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def comparison_prompts(ids: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Return prompts of 1, 2, 3, … of the token ids [1, T], each starting at another token; shorter ones for a small T."""
    length = ids.shape[1]
    return [ids[:, i % length : 2 * i + 1] if 2 * i < length else ids[:, i % length :] for i in range(count)]


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
