"""A MiniGPT folder -> one GGUF file, for llama.cpp and what is built on it, with an Ollama `Modelfile` beside it.

In: a model folder, and the precision that is asked for. Out: a folder with `NAME-F32.gguf` (or F16, BF16, Q8_0), written
as architecture `qwen3`, which computes what a MiniGPT computes. It is verified before it is there, by transformers' reader
of GGUF: architecture, weights, and the tokens of a text.

It refuses what `qwen3` cannot say: windows (unless a `context` is given in which they hide nothing), scaled rotary
positions, another activation than SiLU, tokenizers that llama.cpp would read otherwise; rows that Q8_0 cannot cut into
blocks of 32; weights beyond the range of float16.
"""

import json
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType as FileType
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ..errors import MiniGPTError
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..trust import read_metadata
from . import check, check_context, load_model, longest_context, whole_or_absent
from .gguf_vocabulary import Vocabulary, encoded, vocabulary_of
from .native import qwen3_settings

KINDS = {
    "float32": (Kind.F32, FileType.ALL_F32),
    "float16": (Kind.F16, FileType.MOSTLY_F16),
    "bfloat16": (Kind.BF16, FileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, FileType.MOSTLY_Q8_0),
}
BLOCK = 32  # weights that share a scale in Q8_0


def export_gguf(folder: Path, out: Path, dtype: str | None = None, context: int | None = None) -> Path:
    """Write a GGUF file and its `Modelfile` into the folder `out`, whole or not at all, and return `out`.

    Args:
        dtype: `float32`, `float16`, `bfloat16` or `q8_0`, for the matrices; norms stay in float32, as llama.cpp wants
            them. Default: what the weights are in.
        context: The longest text that the file allows, in tokens. Models with windows need it: llama.cpp's `qwen3` knows
            none, and up to `sliding_window` tokens there is nothing that a window would hide.

    Raises:
        MiniGPTError: for what the format cannot say, with the reason; if `out` is there already; or if the file is not
            what it should be.
    """
    model = load_model(folder)
    dtype = dtype or str(model.dtype).removeprefix("torch.")
    if dtype not in KINDS:
        raise MiniGPTError(f"--dtype {dtype}: GGUF files are written in {', '.join(KINDS)}")
    _refuse_what_qwen3_cannot_say(folder, model.config, context)
    check_context(model.config, context)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    vocabulary = vocabulary_of(tokenizer, model.config.vocab_size)
    context = context or model.config.max_position_embeddings
    name = _name(folder)
    with whole_or_absent(out) as unfinished:
        file = unfinished / f"{name}-{KINDS[dtype][0].name}.gguf"
        _write(file, name, model, tokenizer, vocabulary, dtype, context)
        _verify(file, model, tokenizer, dtype, context)
        (unfinished / "Modelfile").write_text(modelfile(file.name, folder, tokenizer, context), encoding="utf-8")
    return out


def modelfile(gguf_name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, context: int) -> str:
    """What `ollama create NAME -f Modelfile` needs: the plain prompt, and the sampling of `generation_config.json`.

    What the configuration leaves open is written as transformers has it, since Ollama's own defaults differ.
    """
    settings = GenerationConfig.from_pretrained(folder)
    chosen = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    if not settings.do_sample:
        chosen = {"temperature": 0.0, "top_k": 1, "top_p": 1.0}
    defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repeat_penalty": 1.0}
    chosen["repeat_penalty"] = settings.repetition_penalty
    sampling = {name: defaults[name] if chosen[name] is None else chosen[name] for name in defaults}
    lines = [f"FROM ./{gguf_name}", 'TEMPLATE """{{ .Prompt }}"""', f"PARAMETER num_ctx {context}"]
    lines += [f"PARAMETER {name} {value}" for name, value in sampling.items()]
    return "\n".join([*lines, f"PARAMETER stop {json.dumps(tokenizer.eos_token)}"]) + "\n"


def _refuse_what_qwen3_cannot_say(folder: Path, config: MiniGPTConfig, context: int | None) -> None:
    if "sliding_attention" in config.layer_types and context is None:
        raise MiniGPTError(
            f"{folder}: its layers slide a window of {config.sliding_window} tokens over the text, and llama.cpp's qwen3 "
            f"knows no windows: it would differ beyond them. Say --context {longest_context(config)}: up to there a window "
            "hides nothing, and the file allows no longer text; or use `--to native` or `--to onnx`, which have windows"
        )
    if (kind := config.rope_parameters["rope_type"]) != "default":
        raise MiniGPTError(f"{folder}: its rotary positions are scaled ({kind}); only plain ones are written to GGUF")
    if config.hidden_act != "silu":
        raise MiniGPTError(f"{folder}: its activation is {config.hidden_act}; llama.cpp's qwen3 has silu")
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    for eos in (config.eos_token_id, stops):
        if isinstance(eos, list) and len(eos) > 1:
            raise MiniGPTError(f"{folder}: it stops at any of the tokens {eos}; a GGUF file names one")


def _refuse_kind(name: str, weight: torch.Tensor, kind: Kind) -> None:
    if kind is Kind.Q8_0 and weight.shape[-1] % BLOCK:
        raise MiniGPTError(
            f"{name} has rows of {weight.shape[-1]} weights, and Q8_0 stores blocks of {BLOCK}: choose another --dtype, or "
            f"train with widths that are multiples of {BLOCK}"
        )
    if kind is Kind.F16 and weight.abs().max() > torch.finfo(torch.float16).max:
        raise MiniGPTError(f"{name} has weights beyond 65,504, where float16 ends: choose another --dtype")


def _write(
    file: Path,
    name: str,
    model: MiniGPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    dtype: str,
    context: int,
) -> None:
    config, (kind, file_type) = model.config, KINDS[dtype]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3])
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])

    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    # A tied head is the embedding: `named_parameters` lists it once, and llama.cpp takes it from there.
    for parameter, weight in model.named_parameters():
        stored = kind if weight.dim() == 2 else Kind.F32
        _refuse_kind(parameter, weight, stored)
        name = names.get_name(parameter.removesuffix(".weight")) + ".weight"
        writer.add_tensor(name, gguf.quants.quantize(weight.detach().float().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _verify(
    file: Path, model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, dtype: str, context: int
) -> None:
    """Read the file as a stranger does, with the readers of transformers and of `gguf`, and compare."""
    read = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False).to_dict()
    settings = {**qwen3_settings(model), "max_position_embeddings": context}
    for name in (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("vocab_size", "max_position_embeddings", "tie_word_embeddings"),
    ):
        check(read[name] == settings[name], f"{name} is {settings[name]} (it reads {read[name]})")
    check(np.float32(read["rms_norm_eps"]) == np.float32(settings["rms_norm_eps"]), "rms_norm_eps is the model's")
    check(read["rope_parameters"]["rope_theta"] == settings["rope_theta"], "rope_theta is the model's")

    # Without `config` transformers assumes a head_dim of 128.
    theirs = Qwen3ForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=Qwen3Config(**settings), dtype=torch.float32
    )
    kind, weights = KINDS[dtype][0], dict(theirs.named_parameters())
    check(set(weights) == {name for name, _ in model.named_parameters()}, "it has the weights of the model, no others")
    for name, weight in model.named_parameters():
        check(_is_stored_as(weight.detach().float(), weights[name], kind), f"{name} is the model's in {dtype}")

    vocabulary = _read_vocabulary(file)
    # A text in which every token has its turn, but for those that are no text by themselves.
    sample = [i for i in range(len(tokenizer)) if i not in tokenizer.added_tokens_decoder]
    text = "".join(tokenizer.decode([i]) for i in sample).replace("\ufffd", "")
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.encode_special_tokens = True  # what spells a special token is text here
    expected = plain.encode(text, add_special_tokens=False).ids
    check(encoded(text, vocabulary) == expected, "its vocabulary makes the same tokens of a text")


def _is_stored_as(weight: torch.Tensor, read: torch.Tensor, kind: Kind) -> bool:
    """Whether what was read is what the kind makes of a float32 weight: rounded once, or near enough in Q8_0.

    Q8_0 stores, for 32 weights, the largest magnitude / 127 as a float16 step (11 bits) and each weight in whole steps:
    it is off by half a step and, at most, by 127 steps times 2⁻¹¹.
    """
    if weight.dim() == 1:
        return torch.equal(weight, read)
    if kind is not Kind.Q8_0:
        rounded = weight.to({Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind])
        return torch.equal(rounded.float(), read)
    blocks, difference = weight.reshape(-1, BLOCK), (weight - read).reshape(-1, BLOCK)
    step = blocks.abs().amax(dim=1, keepdim=True) / 127
    return bool((difference.abs() <= step * (0.5 + 127 / 2**11) + 1e-7).all())  # float16 steps end at 6e-8


def _read_vocabulary(file: Path) -> Vocabulary:
    fields = gguf.GGUFReader(file).fields
    contents = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("pre", "tokens", "token_type", "merges")}
    return Vocabulary(
        contents["pre"], contents["tokens"], list(map(gguf.TokenType, contents["token_type"])), contents["merges"]
    )


def _name(folder: Path) -> str:
    """What the model is called: the name of its run, as `minigpt.json` has it, or of its folder; fit for a file name."""
    name = read_metadata(folder).get("name")
    if not isinstance(name, str) or not name:
        name = folder.resolve().name
    return re.sub(r"[^\w.-]+", "-", name)
