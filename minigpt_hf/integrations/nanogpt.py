"""nanoGPT's `ckpt.pt` -> a GPT-2 folder that transformers, and everything built on it, loads.

In: a checkpoint of nanoGPT's `train.py`, and the vocabulary it was trained with: the `meta.pkl` of its data folder, or a
tokenizer. Out: a model folder with the same logits, which is checked. It refuses pickles that hold anything but plain
values and tensors (no code of theirs runs), checkpoints of other programs, and vocabularies that do not fit.

nanoGPT's model is GPT-2 in transformers with three settings: the exact GELU instead of GPT-2's approximation by a tanh;
biases of zero where it was trained without; and each matrix transposed, since transformers keeps GPT-2's [in, out].
"""

import math
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from torch.nn import functional as F
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..data.tokenizer import CHARACTER_PRE_TOKENIZER, load_tokenizer, vocabulary_size
from ..errors import MiniGPTError
from ..publish.model_folder import save_model_files

ARCHITECTURE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
LARGEST = 10_000_000  # of any size in `model_args`
TOLERANCE = 1e-4  # of logits, relative to the largest: float32 sums in another order differ by some 1e-6


def import_checkpoint(checkpoint: Path, folder: Path, vocabulary: PreTrainedTokenizerBase) -> float:
    """Write the folder, whole or not at all; return the largest difference between its logits and nanoGPT's.

    Args:
        folder: Where it is to stand; it must not exist.
        vocabulary: As `character_vocabulary` or `load_tokenizer` give it.

    Raises:
        MiniGPTError: if the folder exists, the vocabulary does not fit, or it is no checkpoint of nanoGPT.
    """
    if folder.exists():
        raise MiniGPTError(f"{folder}: is there already; name another folder")
    weights, architecture = read_checkpoint(checkpoint)
    if vocabulary_size(vocabulary) > architecture["vocab_size"]:
        raise MiniGPTError(
            f"the vocabulary has {vocabulary_size(vocabulary):,} tokens, {checkpoint} only "
            f"{architecture['vocab_size']:,}: give the one that it was trained with"
        )
    model = to_gpt2(weights, architecture, vocabulary)
    vocabulary.model_max_length = architecture["block_size"]

    ids = torch.randint(vocabulary_size(vocabulary), (2, architecture["block_size"]), generator=torch.Generator())
    theirs = nanogpt_logits(weights, architecture, ids)
    with torch.no_grad():
        difference = (model(ids).logits - theirs).abs().max().item()
    if not difference <= TOLERANCE * theirs.abs().max().item():
        raise MiniGPTError(
            f"{checkpoint}: as GPT-2 its logits differ by {difference:.2g}: this is not the model of nanoGPT's `model.py`"
        )
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_model_files(model, vocabulary, unfinished)
    unfinished.rename(folder)
    return difference


def read_checkpoint(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights by nanoGPT's names, and its `model_args`.

    Raises:
        MiniGPTError: if it is no checkpoint of nanoGPT, or holds more than tensors and plain values.
    """
    if not checkpoint.is_file():
        raise MiniGPTError(f"{checkpoint}: no such file; give the `ckpt.pt` of a nanoGPT run")
    if not zipfile.is_zipfile(checkpoint):
        raise MiniGPTError(f"{checkpoint}: not a file that `torch.save` wrote, or half of one")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # a malformed pickle may raise anything (documentation of `pickle.UnpicklingError`)
        raise MiniGPTError(
            f"{checkpoint}: cannot be read as tensors and plain values ({type(error).__name__}: "
            f"{(str(error).strip() or 'no message').splitlines()[0]}); a pickle with code in it is not opened"
        ) from error
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise MiniGPTError(f"{checkpoint}: no checkpoint of nanoGPT, which holds `model` and `model_args`")
    weights, architecture = content["model"], content["model_args"]
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise MiniGPTError(f"{checkpoint}: no checkpoint of nanoGPT, in which `model` holds tensors by name")
    if not isinstance(architecture, dict):
        raise MiniGPTError(f"{checkpoint}: no checkpoint of nanoGPT, in which `model_args` is a dictionary")
    if missing := [name for name in ARCHITECTURE if name not in architecture]:
        raise MiniGPTError(f"{checkpoint}: `model_args` says nothing of {', '.join(missing)}")
    for name in set(ARCHITECTURE) - {"bias"}:
        if type(size := architecture[name]) is not int or not 1 <= size <= LARGEST:
            raise MiniGPTError(
                f"{checkpoint}: `model_args` has {name} {size!r}: a number from 1 to {LARGEST:,} is required"
            )
    if architecture["n_embd"] % architecture["n_head"]:
        raise MiniGPTError(
            f"{checkpoint}: `model_args` has n_head {architecture['n_head']}, which does not divide n_embd "
            f"{architecture['n_embd']}"
        )
    weights = {
        str(name).removeprefix("_orig_mod."): tensor.float()  # torch.compile puts that before each name
        for name, tensor in weights.items()
        if not str(name).endswith(".attn.bias")  # the causal mask of torch versions without its own attention
    }
    return weights, architecture


def to_gpt2(
    weights: dict[str, torch.Tensor], architecture: dict[str, Any], vocabulary: PreTrainedTokenizerBase
) -> GPT2LMHeadModel:
    """The same function as one of transformers' models.

    Raises:
        MiniGPTError: if a weight is missing, left over, or of another shape.
    """
    sizes = {"wte": "vocab_size", "wpe": "block_size"}
    shapes = {name: (architecture[size], architecture["n_embd"]) for name, size in sizes.items()}
    found = {name: tuple(weights.get(f"transformer.{name}.weight", torch.empty(0)).shape) for name in shapes}
    if found != shapes or architecture["n_layer"] > len(weights):
        raise MiniGPTError("the weights are not those of nanoGPT's model: they do not have the sizes of `model_args`")
    # nanoGPT has no token that opens a document; its own samples begin with a line end.
    opening = vocabulary.eos_token_id
    if opening is None:
        opening = vocabulary.get_vocab().get("\n")
    config = GPT2Config(
        vocab_size=architecture["vocab_size"],
        n_positions=architecture["block_size"],
        n_embd=architecture["n_embd"],
        n_layer=architecture["n_layer"],
        n_head=architecture["n_head"],
        activation_function="gelu",
        layer_norm_epsilon=1e-5,
        bos_token_id=opening,
        eos_token_id=vocabulary.eos_token_id,
    )
    model = GPT2LMHeadModel(config).eval()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, bos_token_id=opening, eos_token_id=vocabulary.eos_token_id
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
    """What nanoGPT's `model.py` computes, written out: token ids [B, T] -> logits [B, T, V]."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"), 1e-5)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    width, length = architecture["n_embd"], ids.shape[1]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:length]  # [B, T, H]
    for layer in range(architecture["n_layer"]):
        block = f"transformer.h.{layer}"
        three = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x)).split(width, dim=-1)
        query, key, value = (each.unflatten(-1, (architecture["n_head"], -1)).transpose(1, 2) for each in three)
        scores = query @ key.mT / math.sqrt(query.shape[-1])  # [B, N, T, T]
        messages = scores.masked_fill(later, -math.inf).softmax(-1) @ value  # [B, N, T, D]
        x = x + linear(f"{block}.attn.c_proj", messages.transpose(1, 2).flatten(2))
        x = x + linear(f"{block}.mlp.c_proj", F.gelu(linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))))
    return F.linear(norm("transformer.ln_f", x), weights["lm_head.weight"])


def vocabulary_for(checkpoint: Path, meta: Path | None, tokenizer: str | None) -> PreTrainedTokenizerBase:
    """The vocabulary that a user names, or a line that says what to name.

    Raises:
        MiniGPTError: unless exactly one of the two is given.
    """
    if (meta is None) == (tokenizer is None):
        raise MiniGPTError(
            f"which text do the ids of {checkpoint} stand for? For a model of characters give --meta data/NAME/meta.pkl of "
            "the nanoGPT folder; for one of GPT-2's tokens give --tokenizer, a folder or Hub id such as gpt2"
        )
    return character_vocabulary(meta) if tokenizer is None else load_tokenizer(tokenizer)


def character_vocabulary(meta: Path) -> PreTrainedTokenizerFast:
    """The `meta.pkl` of a nanoGPT data folder -> a tokenizer, which has no special token at all.

    Raises:
        MiniGPTError: if the file has no `stoi` that gives each character an id.
    """
    if not meta.is_file():
        raise MiniGPTError(f"{meta}: no such file; give the `meta.pkl` of nanoGPT's data folder")
    try:
        with meta.open("rb") as file:
            content = _PlainValues(file).load()
        stoi = dict(content["stoi"])
    except Exception as error:  # a malformed pickle may raise anything (documentation of `pickle.UnpicklingError`)
        raise MiniGPTError(f"{meta}: not a vocabulary of nanoGPT ({' '.join(str(error).split())})") from error
    ids = set(stoi.values()) if all(type(number) is int for number in stoi.values()) else set()
    characters = all(isinstance(c, str) and len(c) == 1 and not "\ud800" <= c <= "\udfff" for c in stoi)
    if ids != set(range(len(stoi))) or not characters:
        raise MiniGPTError(f"{meta}: `stoi` does not give each character one of the ids 0 to {len(stoi) - 1}")
    tokenizer = Tokenizer(models.WordLevel(vocab=stoi))
    tokenizer.pre_tokenizer = CHARACTER_PRE_TOKENIZER
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


class _PlainValues(pickle.Unpickler):
    """Reads dictionaries, lists, strings and numbers; a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it names {module}.{name}, and is not opened")
