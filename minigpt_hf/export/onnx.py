"""Export as an ONNX graph with a key/value cache, which onnxruntime and transformers.js execute without torch.

The output folder contains `onnx/model.onnx`, the configuration and tokenizer, and `run_onnx.py`, which generates text with
numpy, onnxruntime and tokenizers only. The export is verified with that program: logits within 1e-4 of torch, also with a
cache and beyond a sliding window, and equal greedy continuations of 20 prompts. That precision requires float32. For
browsers the same graph is also stored in float16 and with 8-bit matrices, under the names that transformers.js expects; the
card states how far their logits deviate.

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
import onnx
import torch
from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn
from transformers import AutoTokenizer, DynamicCache

from ..atomic import new_folder
from ..data.tokenizer import bos_token_id
from ..errors import MiniGPTError
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..model.native import qwen3_settings
from .conversion import check_context, check_output, greedy_continuation, load_model, verify, write_card
from .native import comparison_ids, comparison_prompts
from .onnx_runner import Runner, cache_names

COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE")
TABLE = "| file | matrices | deviation of the logits |\n|---|---|---|"
NOTE = (
    "Deviation: root mean square of the difference from the logits in float32, divided by their standard deviation. "
    "`run_onnx.py` continues a text without torch{}."
)
RUNNER = Path(__file__).with_name("onnx_runner.py")
TOLERANCE = 1e-4  # absolute, per logit; the order of float32 summation causes differences of about 1e-5
PROMPTS, NEW_TOKENS = 20, 32
# The smaller graphs by file name; transformers.js calls their precision `fp16` and `q8`.
SMALLER = {"model_fp16.onnx": "float16", "model_quantized.onnx": "8-bit integers"}
LARGEST = 2**31  # bytes of a protobuf message, which is how these are converted
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
    check_output(out, folder)
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
    with new_folder(out) as unfinished:
        (unfinished / "onnx").mkdir()
        _write(unfinished / "onnx" / "model.onnx", model)
        settings = qwen3_settings(model.config) | {"dtype": "float32"}
        if context:
            settings["max_position_embeddings"] = context
        if (stops := model.generation_config.eos_token_id) is not None:  # where `generate` stops
            settings["eos_token_id"] = stops
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        settings["bos_token_id"] = bos_token_id(tokenizer)  # `run_onnx.py` starts a document with it
        (unfinished / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for file in (folder / name for name in COPIED):
            if file.is_file():
                shutil.copyfile(file, unfinished / file.name)
        shutil.copyfile(RUNNER, unfinished / "run_onnx.py")
        _verify(unfinished, model)
        rows = {"model.onnx": ("float32", f"below {TOLERANCE}, absolute")}
        if (unfinished / "onnx" / "model.onnx").stat().st_size < LARGEST:
            _write_smaller(unfinished / "onnx")
            rows |= {name: (SMALLER[name], f"{_deviation(unfinished, name, model):.2g}") for name in SMALLER}
        table = "\n".join(f"| `onnx/{name}` | {kind} | {deviation} |" for name, (kind, deviation) in rows.items())
        note = NOTE.format("" if tokenizer.chat_template is None else "; it does not apply the chat template")
        write_card(folder, unfinished, "transformers.js", f"{TABLE}\n{table}\n\n{note}")
    return out


def _write(file: Path, model: MiniGPTForCausalLM) -> None:
    config = model.config
    # Of the example; all but the number of layers are dynamic in the graph.
    layers, batch, new, old = config.num_hidden_layers, 2, 3, 5
    shape = (batch, config.num_key_value_heads, old, config.head_dim)
    example = (
        torch.zeros(batch, new, dtype=torch.long),
        torch.ones(batch, old + new, dtype=torch.long),
        torch.arange(old, old + new).repeat(batch, 1),
        [(torch.zeros(shape), torch.zeros(shape)) for _ in range(layers)],
    )
    # transformers.js creates the empty cache by the name `batch_size`.
    tokens, past = {0: "batch_size", 1: "sequence_length"}, {0: "batch_size", 2: "past_sequence_length"}
    both = {0: "batch_size", 1: "total_sequence_length"}
    with warnings.catch_warnings():
        for message, category in EXPORTER_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        program = torch.onnx.export(
            ModelWithCache(model).eval(),
            example,
            dynamo=True,
            verbose=False,
            dynamic_shapes=(tokens, both, tokens, [(past, past)] * layers),
            input_names=["input_ids", "attention_mask", "position_ids", *cache_names("past_key_values", layers)],
            output_names=["logits", *cache_names("present", layers)],
        )
    program.save(file)


def _write_smaller(folder: Path) -> None:
    """Write the graphs of `SMALLER` next to `model.onnx`. Inputs, outputs and cache remain float32."""
    source, prepared = folder / "model.onnx", folder / "prepared.onnx"
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), folder / "model_fp16.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_dynamic(prepared, folder / "model_quantized.onnx", weight_type=QuantType.QInt8, per_channel=True)
    prepared.unlink()


def _deviation(folder: Path, graph: str, model: MiniGPTForCausalLM) -> float:
    """Return the root mean square of the difference from the model's logits, divided by their standard deviation."""
    ids = comparison_ids(model.config)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    logits, _ = Runner(folder, graph).forward(ids.numpy())
    verify(bool(np.isfinite(logits).all()), f"the logits of {graph} are finite")
    return float(np.sqrt(np.square(logits - expected).mean()) / expected.std())


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
    ends = list(runner.eos_token_ids) or None
    for i, prompt in enumerate(comparison_prompts(ids, PROMPTS)):
        text = greedy_continuation(model, prompt, torch.ones_like(prompt), NEW_TOKENS, ends)
        expected_ids = text[0, prompt.shape[1] :].tolist()
        if expected_ids[-1] in runner.eos_token_ids:
            expected_ids.pop()
        verify(
            list(runner.generate(prompt[0].tolist(), NEW_TOKENS)) == expected_ids,
            f"the greedy continuation of prompt {i + 1} is the same",
        )
