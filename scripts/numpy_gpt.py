"""A MiniGPT folder, run in NumPy alone: the whole forward pass on one page.

    python scripts/numpy_gpt.py runs/bard/model --prompt "ROMEO:" --max_new_tokens 200

In: a model folder of this package, with any architecture that its recipes can make. Out: text. It refuses rotary
scaling, which is a way to stretch a context and no part of how a GPT works. No torch, no transformers: the weights are
arrays in a dictionary, and each function is a line or two of the mathematics.

Shapes: T time, H width, N query heads, K key and value heads, D width of a head, F feed-forward width, V vocabulary.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer


def rms_norm(x, weight, eps):
    """Each vector to a root mean square of one, then scaled: [..., H] -> [..., H]."""
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def softmax(x):
    """Any scores -> shares that sum to one along the last axis."""
    shares = np.exp(x - x.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def silu(x):
    """x · sigmoid(x): nearly 0 on the left, nearly x on the right."""
    return x / (1 + np.exp(-x))


def rotate(x, theta):
    """Turn pair (i, i + D/2) of the vector at position t by t · θ^(-2i/D): [heads, T, D] -> same."""
    length, width = x.shape[-2:]
    angles = np.arange(length)[:, None] * theta ** (-np.arange(0, width, 2) / width)  # [T, D/2]
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(x, w, config, window):
    """Each token gathers messages from those before it: [T, H] -> [T, H]."""
    length, width = len(x), config["head_dim"]

    def heads(name):  # [T, heads · D] -> [heads, T, D]
        return (x @ w[f"{name}.weight"].T).reshape(length, -1, width).transpose(1, 0, 2)

    eps, theta = config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]
    query = rotate(rms_norm(heads("q_proj"), w["q_norm.weight"], eps), theta)  # [N, T, D]
    key = rotate(rms_norm(heads("k_proj"), w["k_norm.weight"], eps), theta)  # [K, T, D]
    value = heads("v_proj")  # [K, T, D]
    group = len(query) // len(key)  # so many query heads share a key head
    key, value = key.repeat(group, axis=0), value.repeat(group, axis=0)  # [N, T, D]

    scores = query @ key.transpose(0, 2, 1) / np.sqrt(width)  # [N, T, T]
    distance = np.arange(length)[:, None] - np.arange(length)  # from the token that looks to the one looked at
    scores = np.where((distance < 0) | (distance >= window), -np.inf, scores)  # neither ahead nor too far back
    mixed = softmax(scores) @ value  # [N, T, D]
    return mixed.transpose(1, 0, 2).reshape(length, -1) @ w["o_proj.weight"].T


def feed_forward(x, w):
    """Each token by itself, through F hidden units with gates: [T, H] -> [T, H]."""
    return (silu(x @ w["gate_proj.weight"].T) * (x @ w["up_proj.weight"].T)) @ w["down_proj.weight"].T


def forward(ids, weights, config):
    """Token ids [T] -> scores of each next token [T, V]."""

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
    """Weights by name (of one file, or of all shards) and the configuration."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "minigpt" or config["rope_parameters"]["rope_type"] != "default":
        raise SystemExit(f"{folder}: not a MiniGPT folder with plain rotary positions")
    weights = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        weights |= load_file(file)
    return weights, config


def generate(ids, weights, config, max_new_tokens, temperature, rng):
    """Draw one token after the other: look at all so far, pick the next by its share, append it, look again."""
    longest = config["max_position_embeddings"]
    for _ in range(max_new_tokens):
        scores = forward(np.array(ids[-longest:]), weights, config)[-1]
        ids.append(int(rng.choice(len(scores), p=softmax(scores.astype(np.float64) / temperature))))
        if ids[-1] == config["eos_token_id"]:
            break
        yield ids[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write text with a MiniGPT folder, in NumPy alone.")
    parser.add_argument("folder")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    weights, config = load(args.folder)
    tokenizer = Tokenizer.from_file(str(Path(args.folder) / "tokenizer.json"))
    ids = tokenizer.encode(args.prompt).ids or [config["bos_token_id"]]
    rng = np.random.default_rng(args.seed)
    shown = ""
    print(args.prompt, end="", flush=True)
    written = []
    for token in generate(ids, weights, config, args.max_new_tokens, args.temperature, rng):
        written.append(token)
        text = tokenizer.decode(written)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the bytes of a character may be spread over tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
