"""A MiniGPT folder -> an ONNX graph with its cache, which onnxruntime runs without torch.

In: a model folder. Out: a folder with `onnx/model.onnx`, the configuration and tokenizer beside it, and `run_onnx.py`,
which writes text with nothing but numpy, onnxruntime and tokenizers. It is verified before it is there, by that very
program: the logits are those of torch within 1e-4, also with a cache and beyond a window, and 20 prompts are continued
greedily by the same tokens.

Inputs and outputs have the names that are usual on the Hub: `input_ids`, `attention_mask` and `position_ids` [B, T],
`past_key_values.0.key` [B, K, S, D] and so on; `logits` [B, T, V], `present.0.key` and so on. The cache keeps every token;
windows are in the mask.

It refuses half precision: what is promised above would not hold.
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
from . import check, check_context, load_model, whole_or_absent
from .native import probe, qwen3_settings
from .onnx_runner import Runner, names

ALONG = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE")
RUNNER = Path(__file__).with_name("onnx_runner.py")
TOLERANCE = 1e-4  # of a logit; float32 sums taken in another order were seen to differ by 1e-5
PROMPTS, NEW_TOKENS = 20, 32
# What torch's exporter says of itself, and of one name that stands on several inputs: nothing that a user could put right.
OF_THE_EXPORTER = (
    ("# The axis name: .* will not be used", UserWarning),
    ("Attempted to insert a get_attr Node", UserWarning),
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
)


class Cached(nn.Module):
    """The model as a function of tensors alone: keys and values come in and go out as lists."""

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
        cache = (
            DynamicCache()
        )  # without the config: layers that would forget what has left the window are not for a graph
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        outputs = self.model(input_ids, attention_mask, position_ids, cache, use_cache=True)
        return outputs.logits, [(layer.keys, layer.values) for layer in cache.layers]


def export_onnx(folder: Path, out: Path, dtype: str | None = None, context: int | None = None) -> Path:
    """Write the graph and what belongs to it into the folder `out`, whole or not at all, and return `out`.

    Args:
        dtype: `float32`; it must be said if the weights are in less, since the file is larger then.
        context: The longest text that `config.json` allows, if it is to be shorter than the model's.

    Raises:
        MiniGPTError: if `folder` holds no MiniGPT, if `out` is there already, for half precision, or if the graph does not
            compute what the model computes.
    """
    model = load_model(folder)
    check_context(model.config, context)
    stored = str(model.dtype).removeprefix("torch.")
    if (dtype or stored) != "float32":
        hint = "" if dtype else f" (the weights are {stored}: say --dtype float32, which changes none of them)"
        raise MiniGPTError(
            f"ONNX in {dtype or stored}: the graph is written in float32 alone, in which it is verified{hint}"
        )
    model = model.float()
    with whole_or_absent(out) as unfinished:
        (unfinished / "onnx").mkdir()
        _write(unfinished / "onnx" / "model.onnx", model)
        settings = qwen3_settings(model) | ({"max_position_embeddings": context} if context else {})
        (unfinished / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for file in (folder / name for name in ALONG):
            if file.is_file():
                shutil.copyfile(file, unfinished / file.name)
        shutil.copyfile(RUNNER, unfinished / "run_onnx.py")
        _verify(unfinished, model)
    return out


def _write(file: Path, model: MiniGPTForCausalLM) -> None:
    config = model.config
    layers, batch, new, old = config.num_hidden_layers, 2, 3, 5  # sizes of the example; all three are free in the graph
    shape = (batch, config.num_key_value_heads, old, config.head_dim)
    example = (
        torch.zeros(batch, new, dtype=torch.long),
        torch.ones(batch, old + new, dtype=torch.long),
        torch.arange(old, old + new).repeat(batch, 1),
        [(torch.zeros(shape), torch.zeros(shape)) for _ in range(layers)],
    )
    tokens, past = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}
    with warnings.catch_warnings():
        for message, category in OF_THE_EXPORTER:
            warnings.filterwarnings("ignore", message, category)
        program = torch.onnx.export(
            Cached(model).eval(),
            example,
            dynamo=True,
            verbose=False,
            dynamic_shapes=(tokens, {0: "batch", 1: "past_and_sequence"}, tokens, [(past, past)] * layers),
            input_names=["input_ids", "attention_mask", "position_ids", *names("past_key_values", layers)],
            output_names=["logits", *names("present", layers)],
        )
    program.save(file)


def _verify(folder: Path, model: MiniGPTForCausalLM) -> None:
    runner = Runner(folder)
    ids = probe(model.config)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    half = ids.shape[1] // 2
    first, past = runner.forward(ids[:, :half].numpy())
    second, _ = runner.forward(ids[:, half:].numpy(), past)
    difference = float(np.abs(np.concatenate([first, second], axis=1) - expected).max())
    check(difference <= TOLERANCE, f"its logits are the model's within {TOLERANCE} (they differ by {difference:.1e})")
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": list(runner.stops)}
    for i in range(PROMPTS):
        prompt = ids[:, i : 2 * i + 1]  # 1, 2, 3, … tokens
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[
            0, prompt.shape[1] :
        ].tolist()
        if written[-1] in runner.stops:
            written.pop()
        check(
            list(runner.generate(prompt[0].tolist(), NEW_TOKENS)) == written,
            f"prompt {i + 1} goes on by the same tokens",
        )
