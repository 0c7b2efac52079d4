"""Export as the native twin: a folder that transformers, mlx-lm and others load as `Qwen3ForCausalLM` without remote code.

Only `config.json`, the examples of the card and, with `context`, `model_max_length` in `tokenizer_config.json` differ from
the model folder, and its code is omitted; the weights are the same bytes. The export is verified: it loads with
`trust_remote_code=False`, and its logits are equal bit for bit.
"""

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from ..atomic import new_folder
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..model.native import qwen3_settings
from ..publish.card import card_for
from ..publish.model_folder import report_stray_weights
from ..trust import read_metadata, weight_files
from .conversion import check_context, check_output, load_model, verify

VERIFIED = "loads as Qwen3ForCausalLM without remote code; equal weights; logits equal bit for bit"

# Copied in addition to the weights: all but `config.json`, which is converted, and the code. Only the card can change.
COPIED = (
    "generation_config.json",
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
    check_output(out, folder)
    model = load_model(folder)
    check_context(model.config, context)
    with new_folder(out) as twin:
        report_stray_weights(folder, "not copied")
        for pattern in (*weight_files(folder), *COPIED):
            for file in folder.glob(pattern):
                (twin / file.relative_to(folder)).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, twin / file.relative_to(folder))
        if (folder / "README.md").is_file() and read_metadata(folder):
            (twin / "README.md").write_text(card_for(folder), encoding="utf-8")
        _write_json(twin / "config.json", qwen3_settings(model.config, context))
        if context is not None:
            settings = json.loads((twin / "tokenizer_config.json").read_text(encoding="utf-8"))
            _write_json(twin / "tokenizer_config.json", {**settings, "model_max_length": context})
        _verify(twin, folder, model, context)
    return out


def _verify(twin: Path, folder: Path, model: MiniGPTForCausalLM, context: int | None) -> None:
    for name in weight_files(folder):
        verify(filecmp.cmp(folder / name, twin / name, shallow=False), f"{name} is the same file")
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
