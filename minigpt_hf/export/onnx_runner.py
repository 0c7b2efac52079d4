"""An exported ONNX folder + a prompt -> text, with numpy, onnxruntime and tokenizers alone.

In: the folder in which this file lies, and a prompt. Out: text, as it is written. It takes one text at a time, and the
most likely token each time, or draws among all of them at a temperature.

    python run_onnx.py --prompt "ROMEO:" --max_new_tokens 100 --temperature 0.8
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def names(kind: str, layers: int) -> list[str]:
    """What keys and values are called: ("present", 1) -> ["present.0.key", "present.0.value"]."""
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


class Runner:
    """A graph and its cache.

    Attributes:
        tokenizer: Text to ids and back.
        stops: Ids that end a text.
    """

    def __init__(self, folder: Path):
        options = onnxruntime.SessionOptions()
        # Threads that spin while they wait for each other take the cores away from whatever else runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        graph = folder / "onnx" / "model.onnx"
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.cache_names = names("past_key_values", config["num_hidden_layers"])
        self.cache_shape = (1, config["num_key_value_heads"], 0, config["head_dim"])
        eos = config["eos_token_id"]
        self.stops = set(eos if isinstance(eos, list) else [eos])
        self.opening = config["bos_token_id"]

    def forward(self, ids: np.ndarray, past: list[np.ndarray] | None = None) -> tuple[np.ndarray, list[np.ndarray]]:
        """Ids [1, T] and the cache of what came before -> logits [1, T, V], and the cache with them."""
        if past is None:
            past = [np.zeros(self.cache_shape, dtype=np.float32) for _ in self.cache_names]
        seen, new = past[0].shape[2], ids.shape[1]
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((1, seen + new), dtype=np.int64),
            "position_ids": np.arange(seen, seen + new)[None],
            **dict(zip(self.cache_names, past, strict=True)),
        }
        logits, *present = self.session.run(None, feed)
        return logits, present

    def generate(self, ids: list[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> Iterator[int]:
        """Ids of a prompt -> ids that go on from it, one by one, up to the end of the text."""
        source, past, step = np.random.default_rng(seed), None, ids
        for _ in range(max_new_tokens):
            logits, past = self.forward(np.array([step], dtype=np.int64), past)
            scores = logits[0, -1].astype(np.float64)
            if temperature > 0:
                chances = np.exp((scores - scores.max()) / temperature)
                token = int(source.choice(len(chances), p=chances / chances.sum()))
            else:
                token = int(scores.argmax())
            if token in self.stops:
                return
            yield token
            step = [token]


def main() -> None:
    """Write after a prompt, or begin a document if there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most likely token each time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    runner = Runner(Path(__file__).parent)
    ids = runner.tokenizer.encode(args.prompt).ids or [runner.opening]
    # Text is decoded as a whole each time: the bytes of one character may be spread over several tokens.
    written, shown = [], ""
    print(args.prompt, end="", flush=True)
    for token in runner.generate(ids, args.max_new_tokens, args.temperature, args.seed):
        written.append(token)
        text = runner.tokenizer.decode(written)
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


if __name__ == "__main__":
    main()
