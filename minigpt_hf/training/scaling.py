"""Scaling rules: settings as functions of the size of a model and the number of training tokens, with their sources.

The functions take a width, or a number of parameters, tokens, characters or epochs, and return values of the settings in
`arguments`. With P parameters, D training tokens and T tokens of text, D / T is the number of epochs:

| setting            | rule                                       | reason                                                |
|--------------------|--------------------------------------------|-------------------------------------------------------|
| P                  | D = 2 P · ∛(P / 800,000)                   | measured below 10⁶ parameters: docs/log.md; it gives  |
|                    |                                            | 10.7 P at 124 million, where 20 P is optimal for      |
|                    |                                            | AdamW (arXiv:2203.15556). For a given size, D is at   |
|                    |                                            | least 10 P, up to 1.5 million                         |
| num_hidden_layers  | 2 at width 64, 4 at 128, 12 at 768         | approximately as in the recipes                       |
| block_size         | 128 up to 10⁷ characters, doubled for each | longer contexts cost more and are useful only after   |
|                    | factor of 10, up to 1,024                  | longer training                                       |
| tokens per step    | 1.5 · √D, at least 768                     | measured at D = 10⁶: docs/log.md; scaled roughly as   |
|                    |                                            | the critical batch size (arXiv:2505.13738)            |
| muon_learning_rate | 0.02 at every width                        | updates have the same operator norm at every width,   |
|                    |                                            | so the learning rate transfers (arXiv:2310.17813)     |
| learning_rate      | 0.01 · √(128 / width)                      | geometric mean of the rules for input embeddings      |
|                    |                                            | (constant) and output heads (1 / width) in            |
|                    |                                            | arXiv:2203.03466, since the embedding is tied         |
| positional_heads   | in the first three layers, up to 4, 3 and  | measured: docs/log.md                                 |
|                    | 2 heads, at most 3/4 of them; with BPE not |                                                       |
|                    | in the last of three layers, and at most   |                                                       |
|                    | 1/2 of fewer than four heads               |                                                       |
| rope_theta         | 4 · block_size                             | longer wavelengths than the sequence are useless      |
| residual_dropout   | 0 up to D = 4 T, 0.1 up to 10 T, then 0.2  | up to 4 epochs, repeated text is almost as useful as  |
| weight_decay       | 0 up to D = 4 T, then 0.1                  | new text (arXiv:2305.16264)                           |
| mtp_loss_weight    | 0.5 for characters and bytes               | measured: docs/log.md; with large vocabularies        |
|                    |                                            | the auxiliary head costs more time than it gains      |

In fine-tuning on conversations, both learning rates are multiplied by min(1, √(10⁶ / P)): half of the rates for training from
scratch reduced the accuracy of a model with about 10⁶ parameters, while larger models require lower ones
(`finetuning_factor`).

`size_for_text` determines P and D from the text alone, for training of a few minutes.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

from ..errors import MiniGPTError

MAX_EFFECTIVE_EPOCHS = 4
MAX_SMALL_VOCABULARY = 320  # characters and bytes
# Limits for `size: auto`; see `size_for_text`.
PARAMETERS_PER_BYTE = 4
MAX_AUTO_EPOCHS = 20
MIN_AUTO_TOKENS = 150_000
MAX_AUTO_TOKENS = 1_500_000
MAX_AUTO_PARAMETERS = 1_000_000
# Candidate widths for `minutes`, and for `size`.
WIDTHS = (64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536)
FINE_WIDTHS = (*range(32, 128, 8), *range(128, 256, 16), *range(256, 512, 32), *range(512, 4097, 64))


def finetuning_factor(parameters: int) -> float:
    """Factor of the learning rates for fine-tuning on conversations: 1 up to 10⁶ parameters, 0.09 for 124 million."""
    return min(1.0, (1e6 / parameters) ** 0.5)


@dataclass(frozen=True)
class Shape:
    """Width, depth and number of heads of a model.

    Args:
        width: `hidden_size`.
        depth: `num_hidden_layers`. Default: `typical_layers`.
        heads: `num_attention_heads`. Default: heads of dimension 32, or 64 from width 256 on.
        key_value_heads: `num_key_value_heads`; the number of heads is a multiple of it. Default: no constraint.
    """

    width: int
    depth: int | None = None
    heads: int | None = None
    key_value_heads: int | None = None

    @property
    def layers(self) -> int:
        """Number of layers: 2 at width 64, 4 at 128, 5 at 256, 7 at 384, 12 at 768."""
        return typical_layers(self.width) if self.depth is None else self.depth

    def parameters(self, vocabulary: int) -> int:
        """Number of parameters without the norms: attention and feed-forward matrices, and one tied embedding."""
        feed_forward = -(-self.width * 8 // 96) * 32
        return self.layers * self.width * (4 * self.width + 3 * feed_forward) + vocabulary * self.width

    def settings(self) -> dict[str, Any]:
        """Return the shape as fields of `ModelArguments`."""
        heads = self.heads or heads_for(self.width, self.key_value_heads or 1)
        return {"hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": heads}


def typical_layers(width: int) -> int:
    """Typical number of layers at a width: 32 -> 2, 64 -> 2, 128 -> 4, 256 -> 5, 384 -> 7, 768 -> 12."""
    return max(2, min(width // 32, 4 + (width - 128) // 80))


def typical_heads(width: int) -> float:
    """Width divided by the typical head dimension, 32, or 64 from width 256 on; may be fractional."""
    return width / (32 if width < 256 else 64)


@functools.cache
def heads_for(width: int, key_value_heads: int = 1) -> int | None:
    """Return the divisor of `width` closest to `typical_heads`, or `None` if there is none.

    The head dimension is a multiple of 8 if possible, for efficient kernels, and always even, as RoPE requires.

    Args:
        key_value_heads: The number of heads is a multiple of it.
    """
    for multiple in (8, 2):
        fitting = [
            heads
            for heads in range(key_value_heads, width // 2 + 1, key_value_heads)
            if width % heads == 0 and width // heads % multiple == 0
        ]
        if fitting:
            return min(fitting, key=lambda heads: abs(math.log(heads / typical_heads(width))))
    return None


def shape_for(
    parameters: float,
    vocabulary: int,
    *,
    width: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    key_value_heads: int | None = None,
) -> Shape:
    """Choose a shape with approximately the given number of parameters.

    Depths within a factor of 1.5 of `typical_layers` are considered. Of the shapes within 10 % of the number of parameters,
    the one closest to the typical depth and number of heads is chosen; if there is none, the closest in size.

    Args:
        parameters: Target number of parameters.
        vocabulary: Number of rows of the embedding matrix.
        width, layers, heads, key_value_heads: Fixed values, if given.

    Raises:
        MiniGPTError: if no width is divisible into a valid number of heads.
    """
    step = math.lcm(2 * heads, 8) if heads else 8
    widths = [width] if width else [each for each in FINE_WIDTHS if each % step == 0] or [step]
    shapes = []
    for each in widths:
        if not heads and heads_for(each, key_value_heads or 1) is None:
            continue
        typical = typical_layers(each)
        lowest, highest = max(1, math.floor(typical / 1.5)), math.ceil(typical * 1.5)
        # If the width is given, it determines the size, so the depth is the typical one.
        depths = [layers] if layers else [typical] if width else range(lowest, highest + 1)
        shapes += [Shape(each, depth, heads, key_value_heads) for depth in depths]
    if not shapes:
        raise MiniGPTError(
            f"hidden_size {width} does not divide into a number of heads that is a multiple of num_key_value_heads "
            f"{key_value_heads}, with an even head dimension: choose another hidden_size or num_key_value_heads"
            if width
            else f"num_key_value_heads is {key_value_heads}: no width up to {FINE_WIDTHS[-1]} divides into a number of heads "
            "that is a multiple of it; choose a smaller number"
        )

    def distance(shape: Shape) -> tuple[float, float, float]:
        depth = abs(math.log(shape.layers / typical_layers(shape.width)))
        head_count = abs(math.log(shape.settings()["num_attention_heads"] / typical_heads(shape.width)))
        size = abs(math.log(shape.parameters(vocabulary) / parameters))
        return max(size, math.log(1.1)), depth + head_count, size

    return min(shapes, key=distance)


def size_for_text(size: int, tokens: int) -> tuple[float, float]:
    """Return (P, D), the number of parameters and of training tokens for `size: auto`.

    P is 4 parameters per byte, at most 1,000,000. D is 4 epochs, or up to 20 epochs for short texts until D is 150,000, and
    at most 1,500,000. The compute P · D is therefore at most 1.5 · 10¹²; that of the recipe `demo` is
    640,032 · 1,843,200 = 1.2 · 10¹².

    4 kB in 2,000 tokens -> 16,000 and 40,000; 1 MB in 400,000 tokens -> 1,000,000 and 1,500,000.

    Args:
        size: Length of the training text in bytes.
        tokens: Length of the training text in tokens.
    """
    training_tokens = max(MAX_EFFECTIVE_EPOCHS * tokens, min(MAX_AUTO_EPOCHS * tokens, MIN_AUTO_TOKENS))
    return min(PARAMETERS_PER_BYTE * size, MAX_AUTO_PARAMETERS), min(training_tokens, MAX_AUTO_TOKENS)


def vocabulary_for_text(characters: int) -> int:
    """Vocabulary size of BPE for `size: auto`: 4,000 characters -> 324, 10⁶ -> 1,320; 258 are bytes and special tokens."""
    return min(320 + characters // 1000, 2048)


def block_size_for(characters: float) -> int:
    """Tokens per training sequence, by characters of text: 2e6 -> 128, 2e7 -> 256, 2e8 -> 512, more than 1e9 -> 1024."""
    return 128 * 2 ** min(3, max(0, math.ceil(math.log10(characters / 1e7))))


def vocabulary_for(characters: float) -> int:
    """Vocabulary size of BPE: a power of two, about one token per 8,000 characters, so that even rare tokens occur often."""
    return 2 ** int(math.log2(min(max(characters / 8000, 1024), 32768)))


def batch_tokens(tokens: float) -> float:
    """Tokens per optimizer step: 262,144 training tokens or fewer -> 768, 10⁶ -> 1,500, 10⁸ -> 15,000."""
    return max(768.0, 1.5 * math.sqrt(tokens))


def learning_rates(width: int) -> dict[str, float]:
    """Learning rates of AdamW and Muon: 0.01 and 0.02 at width 128, 0.005 and 0.02 at 512; independent of the depth."""
    return {"learning_rate": round(1e-2 * math.sqrt(128 / width), 6), "muon_learning_rate": 0.02}


def positional_heads(layers: int, heads: int, vocabulary: int) -> list[list[int]]:
    """Distances for `positional_heads`: 4 layers of 4 heads -> [[1, 2, 3], [1, 2, 4], [1, 2]].

    With a large vocabulary, 3 layers of 3 heads -> [[1], [1]]: half of a few heads and the last of three layers are left for
    other purposes, which models of tables need.

    Args:
        layers: `num_hidden_layers`.
        heads: Number of key and value heads. A single head is not initialized, because it must attend elsewhere as well.
        vocabulary: Number of tokens.
    """
    if heads < 2:
        return []
    most = max(1, 3 * heads // 4)
    if vocabulary > MAX_SMALL_VOCABULARY:
        most = heads // 2 if heads < 4 else most
        layers = 2 if layers == 3 else layers
    return [distances[:most] for distances in ([1, 2, 3, 4], [1, 2, 4], [1, 2])[:layers]]


def optimal_tokens(parameters: float) -> float:
    """Number of training tokens of a model: 2 per parameter at 800,000 parameters, 4.6 at 10 million, 10.7 at 124 million."""
    return 2 * parameters * (parameters / 8e5) ** (1 / 3)


def tokens_for_size(parameters: float) -> float:
    """Number of training tokens for `size`: at least 10 per parameter up to 1.5 million, as small models are trained quickly.

    40,000 parameters -> 400,000 tokens; 300,000 -> 1.5 million; 800,000 -> 1.6 million; more: `optimal_tokens`.
    """
    return max(optimal_tokens(parameters), min(10 * parameters, MAX_AUTO_TOKENS))


def mtp_loss_weight(vocabulary: int) -> float:
    """Initial weight of the auxiliary loss for a vocabulary size."""
    return 0.5 if vocabulary <= MAX_SMALL_VOCABULARY else 0.0


def weight_decay(epochs: float) -> float:
    """Weight decay for a number of epochs."""
    return 0.1 if epochs > MAX_EFFECTIVE_EPOCHS else 0.0


def dropout(epochs: float) -> float:
    """Residual dropout for a number of epochs."""
    return 0.0 if epochs <= MAX_EFFECTIVE_EPOCHS else 0.1 if epochs <= 10 else 0.2


def distance_from_optimal(shape: Shape, vocabulary: int, compute: float) -> float:
    """Return |log(D / optimal_tokens(P))| for a compute budget of D · P."""
    parameters = shape.parameters(vocabulary)
    return abs(math.log(max(compute, 1) / parameters / optimal_tokens(parameters)))


def parse_size(size: str) -> float:
    """Parse a number of parameters: "10m" -> 10,000,000; "800k", "0.8M" and "800000" -> 800,000.

    Raises:
        MiniGPTError: if `size` is not a positive number.
    """
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    try:
        number = float(size.rstrip("kmbKMB")) * units.get(size[-1:].lower(), 1)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise MiniGPTError(f"size {size}: not a number of parameters; give one like 800k, 10m or 124m")
    return number
