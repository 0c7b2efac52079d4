"""Export as a GGUF file for llama.cpp, with an Ollama `Modelfile`.

The output folder contains `NAME-F32.gguf` (or F16, BF16, Q8_0) with the architecture `qwen3`, which computes the same
function as MiniGPT. The file is verified with the GGUF reader of transformers: architecture, weights, token ids of a text.

Rejected, because `qwen3` cannot represent them: sliding windows (unless `context` is at most the window), scaled RoPE,
activations other than SiLU, tokenizers that llama.cpp would interpret differently. Q8_0 also rejects rows that do not divide
into blocks of 32 weights, and float16 rejects weights beyond its range.
"""

import json
import logging
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

from ..atomic import new_folder
from ..data.chat_format import CHAT_TEMPLATE
from ..errors import MiniGPTError
from ..model.configuration_minigpt import MiniGPTConfig
from ..model.modeling_minigpt import MiniGPTForCausalLM
from ..model.native import qwen3_settings
from ..publish.card import report_system_messages
from ..trust import recipe_text
from .conversion import (
    check_context,
    check_output,
    check_stop_tokens,
    file_name,
    has_sliding_window,
    load_model,
    longest_full_context,
    sampling_settings,
    verify,
    write_card,
)
from .gguf_vocabulary import Vocabulary, encoded, vocabulary_of

logger = logging.getLogger(__name__)

# The chat template in the language of Ollama (Go templates).
CHATML = """\
{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
VERIFIED = "transformers reads the same weights and token ids from the GGUF file"

KINDS = {
    "float32": (Kind.F32, FileType.ALL_F32),
    "float16": (Kind.F16, FileType.MOSTLY_F16),
    "bfloat16": (Kind.BF16, FileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, FileType.MOSTLY_Q8_0),
}
BLOCK_SIZE = 32  # weights per scale in Q8_0


def export_gguf(folder: Path, out: Path, dtype: str | None = None, context: int | None = None) -> Path:
    """Write a GGUF file, its `Modelfile` and a card to the folder `out` atomically, and return `out`.

    Args:
        dtype: `float32`, `float16`, `bfloat16` or `q8_0`, for the matrices; norm weights are stored in float32, as llama.cpp
            requires. Default: the dtype of the weights.
        context: Maximum context in tokens, stored in the file. Required for models with sliding windows, at most the window:
            llama.cpp's `qwen3` has full attention, which is the same function up to that length.

    Raises:
        MiniGPTError: if the format cannot represent the model, `out` exists, or verification fails.
    """
    check_output(out, folder)
    model = load_model(folder)
    dtype = dtype or str(model.dtype).removeprefix("torch.")
    if dtype not in KINDS:
        raise MiniGPTError(f"--dtype {dtype}: GGUF supports {', '.join(KINDS)}")
    _check_representable(folder, model.config, context)
    check_context(model.config, context)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    vocabulary = vocabulary_of(tokenizer, model.config.vocab_size)
    stops = _stop_tokens(folder, model, tokenizer)
    context = context or model.config.max_position_embeddings
    name = file_name(folder)
    with new_folder(out) as unfinished:
        file = unfinished / f"{name}-{KINDS[dtype][0].name}.gguf"
        _write(file, name, model, tokenizer, vocabulary, stops, dtype, context)
        _verify(file, model, tokenizer, dtype, context)
        text = f"`{file.name}`, for llama.cpp: matrices in {dtype}, at most {context:,} tokens of context."
        write_card(folder, unfinished, "gguf", text)
        ends = [tokenizer.decode([stop]) for stop in stops]
        is_chat = tokenizer.chat_template == CHAT_TEMPLATE
        system = recipe_text(folder, "system") if is_chat else ""
        if (system + '"""').index('"""') < len(system):  # it would end the string
            logger.warning(
                f"{folder}: the Modelfile omits the system message of training, which has or ends with quotes"
            )
            system = ""
        elif is_chat:
            report_system_messages(folder, "the Modelfile")
        content = modelfile(file.name, model.generation_config, ends, context, is_chat, system)
        (unfinished / "Modelfile").write_text(content, encoding="utf-8")
    return out


def modelfile(
    gguf_name: str, settings: GenerationConfig, stops: list[str], context: int, is_chat: bool, system: str = ""
) -> str:
    """Return the input of `ollama create NAME -f Modelfile`, with the sampling of `generation_config.json`.

    Args:
        stops: Texts at which generation stops.
        is_chat: Use ChatML instead of a plain prompt.
        system: System message of conversations that have none, as in training.
    """
    sampling = sampling_settings(settings)
    sampling["repeat_penalty"] = sampling.pop("repetition_penalty")
    if sampling["repeat_penalty"] != 1:
        sampling["repeat_last_n"] = -1  # the entire context, as in transformers, instead of the last 64 tokens
    template = CHATML if is_chat else "{{ .Prompt }}"
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{template}"""', f"PARAMETER num_ctx {context}"]
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f"PARAMETER {name} {value}" for name, value in sampling.items()]
    lines += [f"PARAMETER stop {json.dumps(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _check_representable(folder: Path, config: MiniGPTConfig, context: int | None) -> None:
    if has_sliding_window(config) and context is None:
        raise MiniGPTError(
            f"{folder}: its attention has a sliding window of {config.sliding_window} tokens, which llama.cpp's qwen3 does "
            f"not support: limit the context with --context {longest_full_context(config)}, up to which both are equal, "
            "or use `--to native` or `--to onnx`"
        )
    assert config.rope_parameters is not None  # `PreTrainedConfig` sets the default
    if (kind := config.rope_parameters["rope_type"]) != "default":
        raise MiniGPTError(f"{folder}: its RoPE is scaled ({kind}); the GGUF export supports only unscaled RoPE")
    if config.hidden_act != "silu":
        raise MiniGPTError(f"{folder}: its activation is {config.hidden_act}; llama.cpp's qwen3 supports only silu")


def _stop_tokens(folder: Path, model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens at which `generate` stops: one, or two, e.g. the end of an answer and of a document."""
    eos = [model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id]
    found = next(ids for ids in eos if ids not in (None, []))
    stops = found if isinstance(found, list) else [found]
    if len(stops) > 2:
        raise MiniGPTError(f"{folder}: it has {len(stops)} EOS tokens {stops}; a GGUF file supports two")
    check_stop_tokens(folder, model, stops)
    return stops


def _check_storable(name: str, weight: torch.Tensor, kind: Kind) -> None:
    if kind is Kind.Q8_0 and weight.shape[-1] % BLOCK_SIZE:
        raise MiniGPTError(
            f"{name} has rows of {weight.shape[-1]} weights, which do not divide into the blocks of {BLOCK_SIZE} of Q8_0: "
            f"choose another --dtype, or train with widths that are multiples of {BLOCK_SIZE}"
        )
    if kind is Kind.F16 and weight.abs().max() > torch.finfo(torch.float16).max:
        raise MiniGPTError(f"{name} has weights beyond 65,504, the largest float16: choose another --dtype")


def _write(
    file: Path,
    name: str,
    model: MiniGPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    stops: list[int],
    dtype: str,
    context: int,
) -> None:
    settings, (kind, file_type) = qwen3_settings(model.config), KINDS[dtype]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3])
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(context)
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_key_length(settings["head_dim"])
    writer.add_value_length(settings["head_dim"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(settings["rope_theta"])

    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(stops[0])
    if len(stops) > 1:
        writer.add_eot_token_id(stops[1])  # llama.cpp stops at either
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, settings["num_hidden_layers"])
    # `named_parameters` lists a tied head once, as the embedding, which llama.cpp then uses for both.
    for parameter, weight in model.named_parameters():
        stored = kind if weight.dim() == 2 else Kind.F32
        _check_storable(parameter, weight, stored)
        stem = names.get_name(parameter.removesuffix(".weight"))
        assert stem is not None, parameter  # gguf knows every parameter of Qwen3
        writer.add_tensor(
            f"{stem}.weight", gguf.quants.quantize(weight.detach().float().numpy(), stored), raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _verify(
    file: Path, model: MiniGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, dtype: str, context: int
) -> None:
    """Compare what the readers of transformers and `gguf` find in the file with the model."""
    read = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False).to_dict()
    settings = {**qwen3_settings(model.config), "max_position_embeddings": context}
    for name in (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("vocab_size", "max_position_embeddings", "tie_word_embeddings"),
    ):
        verify(read[name] == settings[name], f"{name} is {settings[name]} (found: {read[name]})")
    verify(np.float32(read["rms_norm_eps"]) == np.float32(settings["rms_norm_eps"]), "rms_norm_eps equals the model's")
    verify(read["rope_parameters"]["rope_theta"] == settings["rope_theta"], "rope_theta equals the model's")

    # Without `config` transformers assumes a head_dim of 128.
    loaded = Qwen3ForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=Qwen3Config(**settings), dtype=torch.float32
    )
    kind, weights = KINDS[dtype][0], dict(loaded.named_parameters())
    verify(set(weights) == {name for name, _ in model.named_parameters()}, "it has exactly the weights of the model")
    for name, weight in model.named_parameters():
        verify(_is_stored_as(weight.detach().float(), weights[name], kind), f"{name} equals the model's in {dtype}")

    vocabulary = _read_vocabulary(file)
    # A text made of every token except special tokens and incomplete UTF-8 sequences.
    sample = [i for i in range(len(tokenizer)) if i not in tokenizer.added_tokens_decoder]
    text = "".join(tokenizer.decode([i]) for i in sample).replace("\ufffd", "")
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.encode_special_tokens = True  # special tokens in the text are encoded as ordinary text
    plain.no_truncation()
    plain.no_padding()
    expected = plain.encode(text, add_special_tokens=False).ids
    verify(encoded(text, vocabulary) == expected, "its vocabulary encodes a text to the same token ids")


def _is_stored_as(weight: torch.Tensor, read: torch.Tensor, kind: Kind) -> bool:
    """Whether `read` is the float32 weight rounded once to `kind`, or within the quantization error of Q8_0.

    Q8_0 stores for every 32 weights a step (largest magnitude / 127, as float16 with 11 significant bits) and each weight as
    a multiple of it. The error is at most half a step for rounding the weight, plus 127 steps · 2⁻¹¹ for rounding the step.
    """
    if weight.dim() == 1:
        return torch.equal(weight, read)
    if kind is not Kind.Q8_0:
        rounded = weight.to({Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind])
        return torch.equal(rounded.float(), read)
    blocks, difference = weight.reshape(-1, BLOCK_SIZE), (weight - read).reshape(-1, BLOCK_SIZE)
    step = blocks.abs().amax(dim=1, keepdim=True) / 127
    return bool((difference.abs() <= step * (0.5 + 127 / 2**11) + 1e-7).all())  # 6e-8 is the smallest float16


def _read_vocabulary(file: Path) -> Vocabulary:
    fields = gguf.GGUFReader(file).fields
    contents = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("pre", "tokens", "token_type", "merges")}
    return Vocabulary(
        contents["pre"], contents["tokens"], list(map(gguf.TokenType, contents["token_type"])), contents["merges"]
    )
