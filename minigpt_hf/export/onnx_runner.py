"""Generate text with an exported ONNX model, using only numpy, onnxruntime and tokenizers.

The model is in the folder of this file. Decoding is greedy, or samples from the full distribution at a temperature. The
batch size is 1.

    python run_onnx.py --prompt "ROMEO:" --max_new_tokens 100 --temperature 0.8
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def cache_names(kind: str, layers: int) -> list[str]:
    """Return the names of keys and values: ("present", 1) -> ["present.0.key", "present.0.value"]."""
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


class Runner:
    """An ONNX model and its tokenizer.

    Args:
        folder: The export.
        graph: File in `folder/onnx`.

    Attributes:
        tokenizer: The tokenizer of the model.
        context: Maximum number of tokens of a sequence; infinite if every layer has a sliding window.
        bos_token_id: Token that precedes every document.
        eos_token_ids: Tokens that end generation.
    """

    def __init__(self, folder: Path, graph: str = "model.onnx"):
        options = onnxruntime.SessionOptions()
        # Spinning threads would slow down other processes on the same cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            folder / "onnx" / graph, options, providers=["CPUExecutionProvider"]
        )
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()  # a tokenizer is saved with the truncation and padding of its last call
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # names of special tokens in a prompt are text, as in training
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.cache_names = cache_names("past_key_values", config["num_hidden_layers"])
        self.cache_shape = (1, config["num_key_value_heads"], 0, config["head_dim"])
        eos = config["eos_token_id"]
        self.eos_token_ids = set(eos if isinstance(eos, list) else [eos]) - {None}
        self.bos_token_id = config["bos_token_id"]
        is_windowed = set(config["layer_types"]) == {"sliding_attention"}
        self.context = float("inf") if is_windowed else config["max_position_embeddings"]

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a prompt without the EOS token that some tokenizers append; of an empty one, the BOS token."""
        encoding = self.tokenizer.encode(prompt)
        of_prompt = [i for i, is_added in enumerate(encoding.special_tokens_mask) if not is_added]
        return encoding.ids[: of_prompt[-1] + 1] if of_prompt else [self.bos_token_id]

    def forward(self, ids: np.ndarray, past: list[np.ndarray] | None = None) -> tuple[np.ndarray, list[np.ndarray]]:
        """Compute logits [1, T, V] and the updated cache, from token ids [1, T] and the cache of the preceding tokens."""
        if past is None:
            past = [np.zeros(self.cache_shape, dtype=np.float32) for _ in self.cache_names]
        past_length, length = past[0].shape[2], ids.shape[1]
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((1, past_length + length), dtype=np.int64),
            "position_ids": np.arange(past_length, past_length + length)[None],
            **dict(zip(self.cache_names, past, strict=True)),
        }
        logits, *present = self.session.run(None, feed)
        return logits, present

    def generate(self, ids: list[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> Iterator[int]:
        """Yield the ids of the continuation of a prompt until an EOS token; temperature 0 is greedy decoding."""
        rng, past, step = np.random.default_rng(seed), None, ids
        for _ in range(max_new_tokens):
            logits, past = self.forward(np.array([step], dtype=np.int64), past)
            scores = logits[0, -1].astype(np.float64)
            if temperature > 0:
                weights = np.exp((scores - scores.max()) / temperature)
                token = int(rng.choice(len(weights), p=weights / weights.sum()))
            else:
                token = int(scores.argmax())
            if token in self.eos_token_ids:
                return
            yield token
            step = [token]


def main() -> None:
    """Continue a prompt, or start a document if it is empty."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy decoding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--graph", default="model.onnx", help="file in the folder onnx (default: model.onnx)")
    args = parser.parse_args()

    graphs = sorted(file.name for file in (Path(__file__).parent / "onnx").glob("*.onnx"))
    if args.graph not in graphs:
        parser.error(f"--graph {args.graph}: no such file in the folder onnx; it has {', '.join(graphs)}")
    if not args.temperature >= 0:
        parser.error(f"--temperature {args.temperature}: must be at least 0")
    if args.max_new_tokens < 1:
        parser.error(f"--max_new_tokens {args.max_new_tokens}: must be at least 1")
    runner = Runner(Path(__file__).parent, args.graph)
    try:
        ids = runner.encode(args.prompt)
    except Exception as error:  # the class that `tokenizers` raises for a character without an id
        parser.error(f"the tokenizer cannot encode the prompt: {error}")
    if len(ids) + args.max_new_tokens > runner.context:
        print(
            f"warning: the prompt has {len(ids)} tokens and --max_new_tokens is {args.max_new_tokens}, together more than "
            f"the {runner.context} tokens of the context, beyond which the text may be meaningless",
            file=sys.stderr,
        )
    if (Path(__file__).parent / "chat_template.jinja").is_file():
        print(
            "warning: this model has a chat template, which this program does not apply: it continues the prompt as text, "
            "and does not answer it; use transformers.js for answers",
            file=sys.stderr,
        )
    # All tokens are decoded each time, because the bytes of a character may be spread over several tokens, and some decoders
    # omit the space before the first token.
    text = printed = runner.tokenizer.decode(ids)
    print(args.prompt, end="", flush=True)
    for token in runner.generate(list(ids), args.max_new_tokens, args.temperature, args.seed):
        ids.append(token)
        text = runner.tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print(text[len(printed) :])


if __name__ == "__main__":
    main()
