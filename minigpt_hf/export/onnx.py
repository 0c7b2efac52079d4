"""Export as an ONNX graph with a key/value cache, which onnxruntime executes without torch.

The output folder contains `onnx/model.onnx`, the configuration and tokenizer, and `run_onnx.py`, which generates text with
numpy, onnxruntime and tokenizers only. The export is verified with that program: logits within 1e-4 of torch, also with a
cache and beyond a sliding window, and equal greedy continuations of 20 prompts. That precision requires float32; half
precision is rejected.

Inputs and outputs have the names that are usual on the Hub (B batch, T new tokens, S cached tokens, K key/value heads, D head
dimension, V vocabulary): `input_ids` and `position_ids` [B, T], `attention_mask` [B, S + T], `past_key_values.0.key`
[B, K, S, D], …; `logits` [B, T, V], `present.0.key` [B, K, S + T, D], …. The cache keeps every token; sliding windows are
applied by the attention mask.
"""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from ..errors import MiniGPTError
from ..model.modeling_minigpt import MiniGPTForCausalLM
from .conversion import atomic_folder, check_context, load_model, verify
from .native import comparison_ids, comparison_prompts, qwen3_settings
from .onnx_runner import Runner, cache_names

COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE")
RUNNER = Path(__file__).with_name("onnx_runner.py")
TOLERANCE = 1e-4  # absolute, per logit; the order of float32 summation causes differences of about 1e-5
PROMPTS, NEW_TOKENS = 20, 32
VERIFIED = f"logits of onnxruntime within {TOLERANCE}; equal greedy continuations of {PROMPTS} prompts"
# Internal warnings of torch's exporter, on which a user cannot act.
EXPORTER_WARNINGS = (
    ("# The axis name: .* will not be used", UserWarning),
    ("Attempted to insert a get_attr Node", UserWarning),
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
)


class ModelWithCache(nn.Module):
    """The model as a function of tensors: keys and values are passed and returned as lists instead of a cache object."""

    def __init__(self, model: MiniGPTForCausalLM):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        # Without a configuration, no layer drops tokens that have left its sliding window: the graph needs one layout.
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        outputs = self.model(input_ids, attention_mask, position_ids, cache, use_cache=True)
        return outputs.logits, [(layer.keys, layer.values) for layer in cache.layers]


def export_onnx(folder: Path, out: Path, dtype: str | None = None, context: int | None = None) -> Path:
    """Write the graph, configuration, tokenizer and `run_onnx.py` to the folder `out` atomically, and return `out`.

    Args:
        dtype: `float32`; must be given if the weights have a smaller dtype, because the file becomes larger.
        context: Maximum context in tokens, stored in `config.json`. Default: that of the model.

    Raises:
        MiniGPTError: if `folder` has no MiniGPT model, `out` exists, the precision is not float32, or verification fails.
    """
    model = load_model(folder)
    check_context(model.config, context)
    assert model.config.rope_parameters is not None  # `PreTrainedConfig` sets the default
    if model.config.rope_parameters["rope_type"] == "dynamic":
        raise MiniGPTError(
            f"{folder}: its RoPE is scaled (dynamic) by the length of the sequence, which the ONNX export does not support; "
            "use `--to native`"
        )
    stored = str(model.dtype).removeprefix("torch.")
    if (dtype or stored) != "float32":
        hint = "" if dtype else f": the weights are {stored}; --dtype float32 converts them without loss"
        raise MiniGPTError(f"the ONNX export supports only float32, not {dtype or stored}{hint}")
    model = model.float()
    with atomic_folder(out) as unfinished:
        (unfinished / "onnx").mkdir()
        _write(unfinished / "onnx" / "model.onnx", model)
        settings = qwen3_settings(model) | ({"max_position_embeddings": context} if context else {})
        if (stops := model.generation_config.eos_token_id) is not None:  # where `generate` stops
            settings["eos_token_id"] = stops
        (unfinished / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for file in (folder / name for name in COPIED):
            if file.is_file():
                shutil.copyfile(file, unfinished / file.name)
        shutil.copyfile(RUNNER, unfinished / "run_onnx.py")
        _verify(unfinished, model)
    return out


def _write(file: Path, model: MiniGPTForCausalLM) -> None:
    config = model.config
    layers, batch, new, old = (
        config.num_hidden_layers,
        2,
        3,
        5,
    )  # of the example; the last three are dynamic in the graph
    shape = (batch, config.num_key_value_heads, old, config.head_dim)
    example = (
        torch.zeros(batch, new, dtype=torch.long),
        torch.ones(batch, old + new, dtype=torch.long),
        torch.arange(old, old + new).repeat(batch, 1),
        [(torch.zeros(shape), torch.zeros(shape)) for _ in range(layers)],
    )
    tokens, past = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}
    with warnings.catch_warnings():
        for message, category in EXPORTER_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        program = torch.onnx.export(
            ModelWithCache(model).eval(),
            example,
            dynamo=True,
            verbose=False,
            dynamic_shapes=(tokens, {0: "batch", 1: "past_and_sequence"}, tokens, [(past, past)] * layers),
            input_names=["input_ids", "attention_mask", "position_ids", *cache_names("past_key_values", layers)],
            output_names=["logits", *cache_names("present", layers)],
        )
    program.save(file)


def _verify(folder: Path, model: MiniGPTForCausalLM) -> None:
    runner = Runner(folder)
    ids = comparison_ids(model.config)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    half = ids.shape[1] // 2
    first, past = runner.forward(ids[:, :half].numpy())
    second, _ = runner.forward(ids[:, half:].numpy(), past)
    difference = float(np.abs(np.concatenate([first, second], axis=1) - expected).max())
    verify(
        difference <= TOLERANCE,
        f"its logits equal the model's within {TOLERANCE} (maximum difference {difference:.1e})",
    )
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": list(runner.eos_token_ids) or None}
    for i, prompt in enumerate(comparison_prompts(ids, PROMPTS)):
        expected_ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[
            0, prompt.shape[1] :
        ].tolist()
        if expected_ids[-1] in runner.eos_token_ids:
            expected_ids.pop()
        verify(
            list(runner.generate(prompt[0].tolist(), NEW_TOKENS)) == expected_ids,
            f"the greedy continuation of prompt {i + 1} is the same",
        )
