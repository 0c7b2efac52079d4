"""Export as one HTML file that runs the model in a browser and shows its internal states, without server or network.

The output folder contains `NAME.html`: weights, tokenizer, the model in JavaScript (`page/gpt.js`), the figures of the card
and, if the model folder is in a run folder, the losses and samples of the log.

Matrices are stored as float32, float16 or int8 with one scale per row, and norm weights as float32; the page computes in
float32. How much the rounded weights change the model is measured with torch and reported: the largest difference of a
logit, and the number of equal greedy continuations of 20 prompts.
"""

import base64
import copy
import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .. import __version__
from ..atomic import new_folder
from ..data.tokenizer import bos_token_id
from ..errors import MiniGPTError
from ..model import modeling_minigpt
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..publish.card import has_changed_data, has_copying, is_seen_by_base_model, report_system_messages
from ..training.run_folder import RunFolder, is_model_of, read_json, read_log
from ..trust import read_metadata, recipe_text
from .conversion import (
    check_context,
    check_output,
    file_name,
    greedy_continuation,
    load_model,
    sampling_settings,
    stop_tokens,
    verify,
)
from .html_document import document
from .html_tokenizer import NotInPage, chat_format, page_tokenizer
from .native import comparison_ids, comparison_prompts

logger = logging.getLogger(__name__)

VERIFIED = "the page contains the rounded weights that were compared with the model"
# Size of the weights; base64 takes a third more, and browsers limit the length of a string to about 500 MB.
MAX_MEGABYTES = 100
PROMPTS, NEW_TOKENS = 20, 32
LOG_ROWS = 1000  # rows of the log in the page, at most
NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
# The line of the model file that computes each stage of the view "Look inside".
STAGES = {
    "embedding": "inputs_embeds = self.embed_tokens(input_ids)",
    "query": "query = self.q_norm(self.q_proj(hidden_states)",
    "scores": "scores = query @ key.transpose(2, 3) * scaling",
    "weights": "weights = nn.functional.softmax(scores",
    "output": "return (weights @ value)",
    "attention": "hidden_states = hidden_states + self.dropout(attn_output)",
    "mlp": "return self.down_proj(self.act_fn(",
    "norm": "last_hidden_state=self.norm(hidden_states)",
    "logits": "logits = self.lm_head(",
}


def export_html(
    folder: Path,
    out: Path,
    dtype: str | None = None,
    context: int | None = None,
    samples: list[dict[str, Any]] | None = None,
) -> Path:
    """Write the page to the folder `out` atomically, and return `out`.

    Args:
        dtype: `float32`, `float16` or `int8`, for the matrices. Default: `float16` if it leaves the greedy continuations of
            all prompts unchanged or `float32` weights would be too large, otherwise `float32`.
        context: Maximum context in tokens. Default: that of the model.
        samples: Samples with the passages of the training text that they share, see `inference.copying.CopiedSample`.

    Raises:
        MiniGPTError: if the page cannot represent the model, its weights are too large, or `out` exists.
    """
    check_output(out, folder)
    try:
        source = _source(folder)
    except NotInPage as error:
        raise MiniGPTError(f"{error}; use `--to native`") from error
    check_context(source.model.config, context)
    if source.lacks_chat:
        logger.warning(f"{folder}: its chat template is not ChatML; the page continues text and offers no chat")
    page = _page(source, dtype, context, samples=samples)
    with new_folder(out) as unfinished:
        (unfinished / f"{file_name(folder)}.html").write_text(page, encoding="utf-8", newline="\n")
    return out


def demo_page(folder: Path, name: str) -> str | None:
    """Return the page of a model for its Space, or None, with the reason in the log, if it has none.

    Args:
        name: Hub id of the model, which the page shows.
    """
    try:
        source = _source(folder)
        if (size := _megabytes(source.model, "float16")) > MAX_MEGABYTES:
            raise NotInPage(f"its weights need {size:,.0f} MB in float16, and a page holds at most {MAX_MEGABYTES} MB")
        if source.lacks_chat:
            raise NotInPage("its chat template is not ChatML")
    except NotInPage as error:
        logger.warning(f"the Space runs a program on a server instead of a page: {error}")
        return None
    return _page(source, name=name)


@dataclass(frozen=True)
class Source:
    """A model that the page can represent.

    Args:
        tokenizer: Loaded tokenizer.
        vocabulary: The tokenizer as data of the page.
        chat: The chat template as data of the page; None if there is none, or if it is not ChatML.
    """

    folder: Path
    model: MiniGPTForCausalLM
    tokenizer: PreTrainedTokenizerBase
    vocabulary: dict[str, Any]
    chat: dict[str, Any] | None

    @property
    def lacks_chat(self) -> bool:
        """Whether the model has a chat template that the page cannot represent."""
        return self.tokenizer.chat_template is not None and self.chat is None


def _source(folder: Path) -> Source:
    """Load a model.

    Raises:
        NotInPage: if the page cannot represent it.
        MiniGPTError: if it cannot be loaded.
    """
    model = load_model(folder).float()
    config = model.config
    assert config.rope_parameters is not None  # `PreTrainedConfig` sets the default
    if (kind := config.rope_parameters["rope_type"]) != "default":
        raise NotInPage(f"{folder}: its RoPE is scaled ({kind}); the page supports only unscaled RoPE")
    if config.hidden_act != "silu":
        raise NotInPage(f"{folder}: its activation is {config.hidden_act}; the page supports only silu")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    vocabulary, chat = page_tokenizer(tokenizer, config.vocab_size), chat_format(tokenizer)
    if chat is not None and chat["system"] is None:  # training added it to conversations without a system message
        chat["system"] = recipe_text(folder, "system") or None
    return Source(folder, model, tokenizer, vocabulary, chat)


def _page(
    source: Source,
    dtype: str | None = None,
    context: int | None = None,
    name: str | None = None,
    samples: list[dict[str, Any]] | None = None,
) -> str:
    """Return the page, after verifying it.

    Args:
        name: Name of the model. Default: that in the metadata, or of the folder.
        samples: See `export_html`.
    """
    folder, model, metadata = source.folder, source.model, read_metadata(source.folder)
    _check_size(folder, model, dtype or "int8")
    weights = _weights(model, dtype)
    _check_size(folder, model, weights.dtype)
    data = {
        "name": name or _text(metadata, "name") or folder.resolve().name,
        "version": __version__,
        "parameters": model.num_parameters(),
        "config": _settings(model, context),
        "tokenizer": source.vocabulary,
        "chat": source.chat,
        "hasOtherSystems": source.chat is not None and report_system_messages(folder, "the page"),
        "hasTemplate": source.tokenizer.chat_template is not None,
        "bos": bos_token_id(source.tokenizer),
        "stop": _stop_ids(model, source.chat),
        "sampling": sampling_settings(model.generation_config),
        "prompt": _text(metadata, "sample", "prompt"),
        "tensors": weights.tensors,
        "storage": {
            "dtype": weights.dtype,
            "bytes": len(weights.content),
            "difference": weights.difference,
            "equal": weights.equal,
            "prompts": PROMPTS,
        },
        "stages": _stages(),
        "facts": _facts(metadata, model),
        "copying": _copying(metadata),
        "samples": samples,
        "log": _log(folder),
    }
    page = document(data, weights.content)
    _verify(page, weights)
    logger.info(
        f"weights in {weights.dtype}: the logits differ by at most {weights.difference:.1e}, and {weights.equal} of "
        f"{PROMPTS} greedy continuations are equal"
    )
    return page


def _megabytes(model: MiniGPTForCausalLM, dtype: str) -> float:
    return model.num_parameters() * np.dtype(NUMPY_TYPES[dtype]).itemsize / 1e6


def _check_size(folder: Path, model: MiniGPTForCausalLM, dtype: str) -> None:
    if (size := _megabytes(model, dtype)) > MAX_MEGABYTES:
        smaller = [name for name in NUMPY_TYPES if _megabytes(model, name) <= MAX_MEGABYTES]
        remedy = f"use --dtype {' or '.join(smaller)}" if smaller else "use `--to native`, `gguf` or `onnx`"
        raise MiniGPTError(
            f"{folder}: its weights need {size:,.0f} MB in {dtype}, and a page holds at most "
            f"{MAX_MEGABYTES} MB; {remedy}"
        )


# -- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """The weights of a page, and how much they change the model.

    Args:
        dtype: Data type of the matrices.
        tensors: Name, shape, dtype and offset of each tensor in `content`, which `page/weights.js` decodes.
        content: All tensors.
        model: The model with these weights.
        difference: Largest difference of a logit.
        equal: Number of prompts, out of `PROMPTS`, with an equal greedy continuation.
    """

    dtype: str
    tensors: list[dict[str, Any]]
    content: bytes
    model: MiniGPTForCausalLM
    difference: float
    equal: int


def _weights(model: MiniGPTForCausalLM, dtype: str | None) -> Weights:
    """Convert the weights to `dtype`.

    The default is float16 if no greedy continuation changes, or if float32 would be too large, otherwise float32.
    """
    largest = max(float(weight.detach().abs().max()) for weight in model.parameters())
    fits = largest <= torch.finfo(torch.float16).max
    if dtype == "float16" and not fits:
        raise MiniGPTError(f"a weight of {largest:.3g} exceeds 65,504, the largest float16: choose another --dtype")
    if dtype is None:
        half = _converted(model, "float16") if fits else None
        is_needed = _megabytes(model, "float32") > MAX_MEGABYTES
        return half if half is not None and (half.equal == PROMPTS or is_needed) else _converted(model, "float32")
    return _converted(model, dtype)


def _converted(model: MiniGPTForCausalLM, dtype: str) -> Weights:
    rounded, tensors, content = copy.deepcopy(model), [], bytearray()
    # `named_parameters` lists a tied head once, as the embedding, which the page then uses for both.
    for name, weight in rounded.named_parameters():
        kind = dtype if weight.dim() == 2 else "float32"
        tensors.append({"name": name, "shape": list(weight.shape), "dtype": kind, "offset": len(content)})
        stored, values = _encoded(weight.detach(), kind)
        content += stored + bytes(-len(stored) % 4)  # arrays in JavaScript are aligned to their elements
        weight.data = values
    return Weights(dtype, tensors, bytes(content), rounded, *_deviation(model, rounded))


def _encoded(weight: torch.Tensor, kind: str) -> tuple[bytes, torch.Tensor]:
    """Return the stored content of a tensor and its float32 values when it is decoded."""
    if kind == "int8":  # one step per row: the largest magnitude is 127 steps
        step = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        integers = (weight / step).round()
        return _little_endian(step, "float32") + _little_endian(integers, kind), integers * step
    content = _little_endian(weight, kind)
    return content, weight.half().float() if kind == "float16" else weight


def _little_endian(values: torch.Tensor, kind: str) -> bytes:
    return values.numpy().astype(np.dtype(NUMPY_TYPES[kind]).newbyteorder("<")).tobytes()


def _deviation(model: MiniGPTForCausalLM, rounded: MiniGPTForCausalLM) -> tuple[float, int]:
    """Compare logits, and greedy continuations of `PROMPTS` prompts of 1, 2, 3, … random tokens."""
    ids = comparison_ids(model.config)
    with torch.no_grad():
        difference = float((model(ids).logits - rounded(ids).logits).abs().max())
    prompts = comparison_prompts(ids, PROMPTS)
    inputs = torch.zeros(PROMPTS, max(prompt.shape[1] for prompt in prompts), dtype=torch.long)
    mask = torch.zeros_like(inputs)
    for row, prompt in enumerate(prompts):  # padded on the left
        inputs[row, inputs.shape[1] - prompt.shape[1] :] = prompt
        mask[row, inputs.shape[1] - prompt.shape[1] :] = 1
    eos = model.generation_config.eos_token_id
    texts = [greedy_continuation(each, inputs, mask, NEW_TOKENS, eos) for each in (model, rounded)]
    longest = max(text.shape[1] for text in texts)  # one may end earlier
    expected, found = (torch.nn.functional.pad(text, (0, longest - text.shape[1])) for text in texts)
    equal = int((expected == found).all(dim=1).sum())
    return difference, equal


def _verify(page: str, weights: Weights) -> None:
    """Read the weights back from the page and compare them with those that were compared with the model."""
    blocks = dict(re.findall(r'<script type="[^"]*" id="(data|weights)">(.*?)</script>', page, re.DOTALL))
    content, expected = base64.b64decode(blocks["weights"]), dict(weights.model.named_parameters())
    tensors = json.loads(blocks["data"])["tensors"]
    verify({tensor["name"] for tensor in tensors} == set(expected), "the page has exactly the weights of the model")
    for tensor in tensors:
        offset: int = tensor["offset"]
        step: Any = np.float32(1)
        if tensor["dtype"] == "int8":
            step = np.frombuffer(content, "<f4", tensor["shape"][0], offset)[:, None]
            offset += step.nbytes
        kind = np.dtype(NUMPY_TYPES[tensor["dtype"]]).newbyteorder("<")
        values = np.frombuffer(content, kind, int(np.prod(tensor["shape"])), offset).reshape(tensor["shape"])
        found, weight = values.astype(np.float32) * step, expected[tensor["name"]].detach().numpy()
        verify(np.array_equal(found, weight), f"{tensor['name']} equals the model's")


# -- data -------------------------------------------------------------------------------------------------------------


def _settings(model: MiniGPTForCausalLM, context: int | None) -> dict[str, Any]:
    """The fields of `config.json` that `page/gpt.js` reads."""
    config = model.config
    assert config.rope_parameters is not None
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "layer_types", "sliding_window"),
    )
    return {
        **{name: getattr(config, name) for name in names},
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_position_embeddings": context or config.max_position_embeddings,
    }


def _stop_ids(model: MiniGPTForCausalLM, chat: dict[str, Any] | None) -> list[int]:
    """The tokens at which `generate` stops, and the end of a turn."""
    return [*stop_tokens(model), *([chat["end"]] if chat else [])]


def _stages() -> dict[str, dict[str, Any]]:
    """Number and text of the lines in `STAGES`."""
    lines = Path(modeling_minigpt.__file__).read_text(encoding="utf-8").splitlines()
    found = {}
    for stage, start in STAGES.items():
        (number,) = (i for i, line in enumerate(lines, 1) if line.strip().startswith(start))
        found[stage] = {"line": number, "code": lines[number - 1].strip()}
    return found


def _text(metadata: Any, *path: str) -> str:
    """Return a text in `minigpt.json`, which other programs may have written; empty if there is none."""
    for name in path:
        metadata = metadata.get(name) if isinstance(metadata, dict) else None
    return metadata if isinstance(metadata, str) else ""


def _facts(metadata: dict[str, Any], model: MiniGPTForCausalLM) -> list[tuple[str, str]]:
    """The figures of the model card as pairs of label and value; without those that `minigpt.json` lacks."""
    limits, last = _limits_of_score(metadata), _last_text(metadata)
    recipe = metadata.get("recipe")
    is_chat = isinstance(recipe, dict) and bool(recipe.get("chat"))
    scored = "answers of the validation split" if is_chat else "validation text"
    size = "bytes of answers per token of answers" if is_chat else "bytes per token"
    formats = {
        f"bits per byte of the {scored}{limits}": lambda: f"{metadata['results']['bits_per_byte']:.3f}",
        "parameters": lambda: f"{model.num_parameters():,}",
        f"training tokens{', padding included' if is_chat else ''}": lambda: f"{metadata['training']['tokens']:,}",
        "training time": lambda: str(metadata["training"]["time"]),
        f"validation loss{limits}": lambda: f"{metadata['results']['loss']:.4f} nats per token",
        "tokens scored": lambda: f"{metadata['results']['tokens']:,}",
        f"training text{last}": lambda: f"{metadata['data']['name']}, {_size_of_text(metadata)}",
        f"epochs{last}": lambda: f"{metadata['training']['epochs']:.2f}",
        "sequence length": lambda: f"{metadata['recipe']['block_size']:,} tokens",
        "tokenizer": lambda: f"{metadata['tokenizer']['kind']}, {model.config.vocab_size:,} tokens",
        size: lambda: f"{metadata['tokenizer']['bytes_per_token']:.2f}",
        "hardware": lambda: str(metadata["training"]["device"]),
        "date": lambda: str(metadata["date"]),
        "license": lambda: str(metadata["license"] or "not stated"),
    }
    facts = []
    for label, format in formats.items():
        try:
            facts.append((label, format()))
        except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
            continue
    return facts


def _last_text(metadata: dict[str, Any]) -> str:
    """What the card states of figures of the training text, for their labels, if the text was changed during training."""
    try:
        return ", as if the last text had always been used" if has_changed_data(metadata) else ""
    except (KeyError, TypeError, AttributeError):  # absent, or written by another program
        return ""


def _limits_of_score(metadata: dict[str, Any]) -> str:
    """What the card states of the validation score in addition, for its label; empty if there is nothing."""
    try:
        is_unseen = not (has_changed_data(metadata) or is_seen_by_base_model(metadata))
        return ("" if is_unseen else ", not of unseen text") + (
            ", not comparable" if metadata["tokenizer"]["lossy"] else ""
        )
    except (KeyError, TypeError, AttributeError):  # absent, or written by another program
        return ""


def _size_of_text(metadata: dict[str, Any]) -> str:
    train = metadata["data"]["train"]
    if metadata["recipe"].get("chat"):
        return f"{train['documents']:,} conversations"
    return f"{train['bytes']:,} bytes"


def _copying(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of verbatim copying in the card as rows, and the longest stretch of each sample; None without them."""
    try:
        if not has_copying(metadata):
            return None
        copying = metadata["copying"]
        parts = {"samples": copying["samples"], "held-out text": copying["held_out"]}
        rows = []
        for name, part in parts.items():
            if part is not None:
                shares = [f"{100 * share:.1f} %" for share in part["shares"].values()]
                rows.append([name, f"{part['tokens']:,}", f"{part['longest']:,}", *shares])
        return {
            "header": [
                "",
                "tokens",
                "longest stretch",
                *(f"{number} or more" for number in copying["samples"]["shares"]),
            ],
            "rows": rows,
            "stretches": [
                {"text": str(each["text"]), "length": f"{each['tokens']:,} of {each['of_tokens']:,} tokens"}
                for each in copying["stretches"]
            ],
        }
    except (KeyError, TypeError, ValueError, AttributeError):  # absent, or written by another program
        return None


def _log(folder: Path) -> dict[str, list]:
    """Losses and samples of the run that the model folder belongs to: [tokens, nats per token], and [tokens, text]."""
    run = RunFolder(folder.resolve().parent)
    log: dict[str, list] = {"train": [], "validation": [], "samples": []}
    if run.model.resolve() != folder.resolve() or not (run.log.is_file() and run.fingerprint.is_file()):
        return log
    if not is_model_of(folder, read_json(run.fingerprint)):
        logger.warning(f"{run.log}: belongs to another training run than {folder}; the page shows no losses")
        return log
    tokens = 0  # rows of samples have none
    for row in read_log(run.log):
        tokens = row["tokens"] if type(row.get("tokens")) is int else tokens
        for key, name in (("eval_loss", "validation"), ("loss", "train")):
            if isinstance(row.get(key), float) and math.isfinite(row[key]):
                log[name].append([tokens, row[key]])
        if "sample" in row:
            log["samples"].append([tokens, row["sample"]])
    log["samples"] = list(dict(log["samples"]).items())  # one per step: the last of a resumed run
    return {name: rows[:: -1 - len(rows) // LOG_ROWS][::-1] for name, rows in log.items()}  # including the last row
