"""Import nanoGPT checkpoints: convert `ckpt.pt` to a GPT-2 folder for transformers, and verify that the logits are equal.

The vocabulary comes from the `meta.pkl` of a nanoGPT data folder or from a tokenizer. Pickles may contain only plain values
and tensors, so no code in them is executed.

nanoGPT's model is GPT-2 of transformers with three differences: exact GELU instead of the tanh approximation, optional
biases (zero if absent), and transposed matrices, because transformers stores those of GPT-2 as [in, out].
"""

import logging
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from torch.nn import functional as F
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..atomic import check_new_folder, new_folder
from ..data.tokenizer import CHARACTER_PRE_TOKENIZER, load_tokenizer, vocabulary_size
from ..errors import MiniGPTError
from ..publish.model_folder import save_model_files

logger = logging.getLogger(__name__)

ARCHITECTURE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MAX_SIZE = 10_000_000  # largest value in `model_args`
TOLERANCE = 1e-4  # relative to the largest logit; the order of float32 summation causes differences of about 1e-6


def import_checkpoint(checkpoint: Path, folder: Path, vocabulary: PreTrainedTokenizerBase) -> float:
    """Convert a checkpoint to a GPT-2 folder, atomically, and return the maximum difference of the logits.

    Args:
        checkpoint: `ckpt.pt` of nanoGPT.
        folder: Target folder; it must not exist.
        vocabulary: Result of `character_vocabulary` or `load_tokenizer`.

    Raises:
        MiniGPTError: if the folder exists, the file is not a nanoGPT checkpoint, or the vocabulary is too large for it.
    """
    check_new_folder(folder)
    weights, architecture = read_checkpoint(checkpoint)
    if vocabulary_size(vocabulary) > architecture["vocab_size"]:
        raise MiniGPTError(
            f"the vocabulary has {vocabulary_size(vocabulary):,} tokens, but {checkpoint} has only "
            f"{architecture['vocab_size']:,}: give the vocabulary that it was trained with"
        )
    if unused := architecture["vocab_size"] - vocabulary_size(vocabulary):
        logger.warning(
            "%s has %s tokens, %s more than the vocabulary; these decode to an empty text. nanoGPT pads the vocabulary of "
            "GPT-2 from 50,257 to 50,304 tokens; otherwise give the vocabulary that it was trained with",
            checkpoint,
            f"{architecture['vocab_size']:,}",
            f"{unused:,}",
        )
    model = to_gpt2(weights, architecture, vocabulary)
    vocabulary.model_max_length = architecture["block_size"]

    ids = torch.randint(vocabulary_size(vocabulary), (2, architecture["block_size"]), generator=torch.Generator())
    expected = nanogpt_logits(weights, architecture, ids)
    with torch.no_grad():
        difference = (model(ids).logits - expected).abs().max().item()
    if not difference <= TOLERANCE * expected.abs().max().item():
        raise MiniGPTError(
            f"{checkpoint}: the logits of the converted model differ by {difference:.2g}: "
            "this is not a model of nanoGPT's `model.py`"
        )
    with new_folder(folder) as unfinished:
        save_model_files(model, vocabulary, unfinished)
    return difference


def read_checkpoint(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the weights, by nanoGPT's names, and the `model_args` of a checkpoint.

    Raises:
        MiniGPTError: if the file is not a nanoGPT checkpoint, or contains anything but tensors and plain values.
    """
    if not checkpoint.is_file():
        raise MiniGPTError(f"{checkpoint}: no such file; give the `ckpt.pt` of a nanoGPT run")
    if not zipfile.is_zipfile(checkpoint):
        raise MiniGPTError(f"{checkpoint}: not a file written by `torch.save`, or truncated")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed pickle may raise anything (documentation of `pickle.UnpicklingError`)
        raise MiniGPTError(
            f"{checkpoint}: cannot be read as tensors and plain values ({type(error).__name__}: "
            f"{(str(error).strip() or 'no message').splitlines()[0]}); pickles that contain code are rejected"
        ) from error
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise MiniGPTError(f"{checkpoint}: not a nanoGPT checkpoint: `model` or `model_args` is missing")
    weights, architecture = content["model"], content["model_args"]
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise MiniGPTError(f"{checkpoint}: not a nanoGPT checkpoint: `model` is not a dictionary of tensors")
    if not isinstance(architecture, dict):
        raise MiniGPTError(f"{checkpoint}: not a nanoGPT checkpoint: `model_args` is not a dictionary")
    if missing := [name for name in ARCHITECTURE if name not in architecture]:
        raise MiniGPTError(f"{checkpoint}: `model_args` lacks {', '.join(missing)}")
    for name in set(ARCHITECTURE) - {"bias"}:
        if type(size := architecture[name]) is not int or not 1 <= size <= MAX_SIZE:
            raise MiniGPTError(
                f"{checkpoint}: `model_args` has {name} {size!r}: a number from 1 to {MAX_SIZE:,} is required"
            )
    if architecture["n_embd"] % architecture["n_head"]:
        raise MiniGPTError(
            f"{checkpoint}: `model_args` has n_head {architecture['n_head']}, which does not divide n_embd "
            f"{architecture['n_embd']}"
        )
    weights = {
        str(name).removeprefix("_orig_mod."): tensor.float()  # prefix added by torch.compile
        for name, tensor in weights.items()
        if not str(name).endswith(".attn.bias")  # causal mask of nanoGPT without flash attention
    }
    return weights, architecture


def to_gpt2(
    weights: dict[str, torch.Tensor], architecture: dict[str, Any], vocabulary: PreTrainedTokenizerBase
) -> GPT2LMHeadModel:
    """Convert weights and `model_args` to `GPT2LMHeadModel`.

    Raises:
        MiniGPTError: if a weight is missing, unexpected, or of another shape.
    """
    sizes = {"wte": "vocab_size", "wpe": "block_size"}
    shapes = {name: (architecture[size], architecture["n_embd"]) for name, size in sizes.items()}
    found = {name: tuple(weights.get(f"transformer.{name}.weight", torch.empty(0)).shape) for name in shapes}
    if found != shapes or architecture["n_layer"] > len(weights):
        raise MiniGPTError("the weights are not those of nanoGPT's model: their shapes contradict `model_args`")
    # nanoGPT's character vocabularies have no BOS token; its samples start with a line feed.
    bos_token_id = vocabulary.eos_token_id
    if bos_token_id is None:
        bos_token_id = vocabulary.get_vocab().get("\n")
    config = GPT2Config(
        vocab_size=architecture["vocab_size"],
        n_positions=architecture["block_size"],
        n_embd=architecture["n_embd"],
        n_layer=architecture["n_layer"],
        n_head=architecture["n_head"],
        activation_function="gelu",
        layer_norm_epsilon=1e-5,
        bos_token_id=bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
    )
    model = GPT2LMHeadModel(config).eval()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, bos_token_id=bos_token_id, eos_token_id=vocabulary.eos_token_id
    )
    state = {name: tensor.mT if name.endswith(TRANSPOSED) else tensor for name, tensor in weights.items()}
    if not architecture["bias"]:
        state |= {name: torch.zeros_like(bias) for name, bias in model.named_parameters() if name.endswith(".bias")}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise MiniGPTError(f"the weights are not those of nanoGPT's model: {' '.join(str(error).split())}") from error
    return model


@torch.no_grad()
def nanogpt_logits(weights: dict[str, torch.Tensor], architecture: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Compute logits [B, T, V] from token ids [B, T] as nanoGPT's `model.py` does."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"), 1e-5)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    width, length = architecture["n_embd"], ids.shape[1]
    causal_mask = torch.ones(length, length, dtype=torch.bool).triu(1)  # True where attention is not allowed
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:length]  # [B, T, H]
    for layer in range(architecture["n_layer"]):
        block = f"transformer.h.{layer}"
        qkv = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x)).split(width, dim=-1)
        query, key, value = (each.unflatten(-1, (architecture["n_head"], -1)).transpose(1, 2) for each in qkv)
        scores = query @ key.mT / math.sqrt(query.shape[-1])  # [B, N, T, T]
        attended = scores.masked_fill(causal_mask, -math.inf).softmax(-1) @ value  # [B, N, T, D]
        x = x + linear(f"{block}.attn.c_proj", attended.transpose(1, 2).flatten(2))
        x = x + linear(f"{block}.mlp.c_proj", F.gelu(linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))))
    return F.linear(norm("transformer.ln_f", x), weights["lm_head.weight"])


def vocabulary_for(checkpoint: Path, meta: Path | None, tokenizer: str | None) -> PreTrainedTokenizerBase:
    """Load the vocabulary from `meta` or `tokenizer`.

    Raises:
        MiniGPTError: unless exactly one of the two is given.
    """
    if meta is not None and tokenizer is None:
        return character_vocabulary(meta)
    if meta is None and tokenizer is not None:
        return load_tokenizer(tokenizer)
    raise MiniGPTError(
        f"{checkpoint} has no vocabulary: for a character model give --meta data/NAME/meta.pkl of the nanoGPT folder; "
        "for GPT-2 tokens give --tokenizer, a folder or Hub id such as gpt2"
    )


def character_vocabulary(meta: Path) -> PreTrainedTokenizerFast:
    """Create a tokenizer without special tokens from the `meta.pkl` of a nanoGPT data folder.

    Raises:
        MiniGPTError: if the file has no `stoi` that maps characters to consecutive ids.
    """
    if not meta.is_file():
        raise MiniGPTError(f"{meta}: no such file; give the `meta.pkl` of nanoGPT's data folder")
    try:
        with meta.open("rb") as file:
            content = _PlainValues(file).load()
        stoi = dict(content["stoi"])
    except Exception as error:  # a malformed pickle may raise anything (documentation of `pickle.UnpicklingError`)
        raise MiniGPTError(f"{meta}: not a nanoGPT vocabulary ({' '.join(str(error).split())})") from error
    ids = set(stoi.values()) if all(type(number) is int for number in stoi.values()) else set()
    characters = all(isinstance(c, str) and len(c) == 1 and not "\ud800" <= c <= "\udfff" for c in stoi)
    if ids != set(range(len(stoi))) or not characters:
        raise MiniGPTError(f"{meta}: `stoi` does not map single characters to the ids 0 to {len(stoi) - 1}")
    tokenizer = Tokenizer(models.WordLevel(vocab=stoi))
    tokenizer.pre_tokenizer = CHARACTER_PRE_TOKENIZER
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


class _PlainValues(pickle.Unpickler):
    """Unpickler for dictionaries, lists, strings and numbers, which rejects any reference to a class or function."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, and is rejected")
