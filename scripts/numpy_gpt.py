"""The complete forward pass of MiniGPT in NumPy, on one page, without torch or transformers.

    python scripts/numpy_gpt.py runs/bard/model --prompt "ROMEO:" --max_new_tokens 200

Loads a MiniGPT model folder of any shape, with the default activation and without RoPE scaling, and samples text. Weights
are arrays in a dictionary, as in the safetensors file.

Shapes: T time, H hidden size, N query heads, K key/value heads, D head dimension, F intermediate size, V vocabulary
size.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer


def rms_norm(x, weight, eps):
    """Scale each vector to a root mean square of 1, then multiply by the weight: [..., H] -> [..., H]."""
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def softmax(x):
    """Convert logits to probabilities along the last axis."""
    exponentials = np.exp(x - x.max(-1, keepdims=True))  # subtracting the maximum avoids overflow
    return exponentials / exponentials.sum(-1, keepdims=True)


def silu(x):
    """x · sigmoid(x): close to 0 for very negative x, close to x for large x."""
    return x / (1 + np.exp(-x))


def rotate(x, theta):
    """RoPE: rotate the pair (i, i + D/2) at position t by the angle t · θ^(-2i/D): [heads, T, D] -> [heads, T, D]."""
    length, head_dim = x.shape[-2:]
    angles = np.arange(length)[:, None] * theta ** (-np.arange(0, head_dim, 2) / head_dim)  # [T, D/2]
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(x, w, config, window):
    """Causal grouped-query attention with QK-norm and RoPE: [T, H] -> [T, H]."""
    length, head_dim = len(x), config["head_dim"]

    def heads(name):  # [T, heads · D] -> [heads, T, D]
        return (x @ w[f"{name}.weight"].T).reshape(length, -1, head_dim).transpose(1, 0, 2)

    eps, theta = config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]
    query = rotate(rms_norm(heads("q_proj"), w["q_norm.weight"], eps), theta)  # [N, T, D]
    key = rotate(rms_norm(heads("k_proj"), w["k_norm.weight"], eps), theta)  # [K, T, D]
    value = heads("v_proj")  # [K, T, D]
    group = len(query) // len(key)  # number of query heads that share one key/value head
    key, value = key.repeat(group, axis=0), value.repeat(group, axis=0)  # [N, T, D]

    scores = query @ key.transpose(0, 2, 1) / np.sqrt(head_dim)  # [N, T, T]
    distance = np.arange(length)[:, None] - np.arange(length)  # query position - key position
    scores = np.where((distance < 0) | (distance >= window), -np.inf, scores)  # causal and sliding window
    mixed = softmax(scores) @ value  # [N, T, D]
    return mixed.transpose(1, 0, 2).reshape(length, -1) @ w["o_proj.weight"].T


def feed_forward(x, w):
    """SwiGLU MLP with F hidden units, applied to each position: [T, H] -> [T, H]."""
    return (silu(x @ w["gate_proj.weight"].T) * (x @ w["up_proj.weight"].T)) @ w["down_proj.weight"].T


def forward(ids, weights, config):
    """Compute the logits of the next token at each position: ids [T] -> [T, V]."""

    def under(prefix):
        return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}

    eps = config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][ids]  # [T, H]
    for i, layer_type in enumerate(config["layer_types"]):
        w = under(f"model.layers.{i}.")
        window = config["sliding_window"] if layer_type == "sliding_attention" else len(ids)
        normed = rms_norm(x, w["input_layernorm.weight"], eps)
        x = x + attention(normed, under(f"model.layers.{i}.self_attn."), config, window)
        x = x + feed_forward(rms_norm(x, w["post_attention_layernorm.weight"], eps), under(f"model.layers.{i}.mlp."))
    x = rms_norm(x, weights["model.norm.weight"], eps)
    head = weights["model.embed_tokens.weight"] if config["tie_word_embeddings"] else weights["lm_head.weight"]
    return x @ head.T


def load(folder):
    """Load the weights, by name, from one file or all shards, and the configuration."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"{folder}: no model folder ({error.strerror}: config.json)") from error
    if (
        config["model_type"] not in ("minigpt", "qwen3")
        or config.get("attention_bias")
        or config["hidden_act"] != "silu"
        or config["rope_parameters"]["rope_type"] != "default"
    ):
        raise SystemExit(
            f"{folder}: unsupported model; give a MiniGPT folder with hidden_act 'silu' and without RoPE scaling "
            "(rope_type 'default')"
        )
    if (generation := Path(folder) / "generation_config.json").exists():  # where `generate` stops
        config["eos_token_id"] = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
    weights = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            weights |= load_file(file)
        except TypeError as error:
            raise SystemExit(f"{file}: NumPy has no bfloat16; save the model in float32 or float16") from error
    return weights, config


def generate(ids, weights, config, max_new_tokens, temperature, rng):
    """Sample tokens autoregressively until an EOS token, appending them to `ids`."""
    context_length, eos = config["max_position_embeddings"], config["eos_token_id"]
    for _ in range(max_new_tokens):
        logits = forward(np.array(ids[-context_length:]), weights, config)[-1]
        ids.append(int(rng.choice(len(logits), p=softmax(logits.astype(np.float64) / temperature))))
        if ids[-1] in (eos if isinstance(eos, list) else [eos]):
            break
        yield ids[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Generate text with a MiniGPT model folder, using only NumPy.")
    parser.add_argument("folder")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.temperature > 0:
        parser.error(
            f"--temperature {args.temperature}: must be greater than 0; with 1e-4 the most probable token is chosen"
        )

    weights, config = load(args.folder)
    tokenizer = Tokenizer.from_file(str(Path(args.folder) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # a string such as <|endoftext|> in the prompt is ordinary text
    tokenizer.no_truncation()  # a tokenizer is saved with the truncation and padding of its last call
    tokenizer.no_padding()
    try:
        encoding = tokenizer.encode(args.prompt)
    except Exception as error:  # the class that `tokenizers` raises for a character without an id
        parser.error(f"the tokenizer cannot encode the prompt: {error}")
    of_prompt = [i for i, is_added in enumerate(encoding.special_tokens_mask) if not is_added]
    ids = encoding.ids[: of_prompt[-1] + 1] if of_prompt else [config["bos_token_id"]]  # some append an EOS token
    rng = np.random.default_rng(args.seed)
    shown = ""
    print(args.prompt, end="", flush=True)
    generated = []
    for token in generate(ids, weights, config, args.max_new_tokens, args.temperature, rng):
        generated.append(token)
        text = tokenizer.decode(generated)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may span several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(generated)[len(shown) :])  # an incomplete character at the end
