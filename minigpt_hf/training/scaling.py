"""How settings follow from the size of a model and the tokens it learns from: arithmetic, and where it comes from.

In: a width, a vocabulary, a number of tokens. Out: settings, as fields of the dataclasses in `arguments`. It measures
nothing and refuses nothing. With P parameters, D tokens to learn from and T tokens of text:

| choice         | rule                                        | why                                                       |
|----------------|---------------------------------------------|-----------------------------------------------------------|
| P              | D = 10 P                                    | 20 is the best for AdamW on much text (arXiv:2203.15556); |
|                |                                             | the recipes, with Muon on little, have 0.4 to 2           |
| layers         | 2 at width 64, 4 at 128, 12 at 768          | as the recipes                                            |
| block          | 128 tokens up to D = 10⁷, then twice as     | a longer context costs more, and is learnt later          |
|                | many for each factor of 10, up to 1,024     |                                                           |
| tokens a step  | 768 · √(D / 1.5 million), but at least 768  | the Shakespeare recipe's, grown about as the largest      |
|                |                                             | batch that still pays does (arXiv:2505.13738)             |
| rate of Muon   | 0.02 at every width                         | its updates have the same operator norm at each, which is |
|                |                                             | what transfers (arXiv:2310.17813)                         |
| rate of AdamW  | 0.004 · √(128 / width)                      | a tied embedding wants a constant as the entrance and     |
|                |                                             | 1 / width as the exit (arXiv:2203.03466): half way        |
| dropout        | 0 up to D = 4 T, 0.1 up to 10 T, then 0.2   | up to four readings teach as new text does                |
| weight decay   | 0 up to D = 4 T, then 0.1                   | (arXiv:2305.16264)                                        |

`size_for_text` gives P and D where neither a time nor a size is given: from the text alone, and for minutes of training.
"""

import math
from dataclasses import dataclass
from typing import Any

from ..errors import MiniGPTError

TOKENS_PER_PARAMETER = 10
MAX_EFFECTIVE_EPOCHS = 4
# What is learnt from a text for which nobody said how long or how large: see `size_for_text`.
PARAMETERS_PER_BYTE = 4
MOST_READINGS = 20
SHORTEST_TRAINING = 150_000
LONGEST_UNASKED = 1_500_000
LARGEST_UNASKED = 1_000_000
# The widths that `--minutes` chooses among, and those that a given size is matched with.
WIDTHS = (64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536)
FINE_WIDTHS = (*range(32, 128, 8), *range(128, 256, 16), *range(256, 512, 32), *range(512, 4097, 64))


@dataclass(frozen=True)
class Shape:
    """A width and a depth, and what follows from them.

    Args:
        width: `hidden_size`.
        depth: `num_hidden_layers`; default: that of the recipes at this width.
        heads: `num_attention_heads`; default: heads of 32, from width 256 on of 64.
        key_value_heads: `num_key_value_heads`, of which the number of heads is a multiple; default: any number of heads.
    """

    width: int
    depth: int | None = None
    heads: int | None = None
    key_value_heads: int | None = None

    @property
    def layers(self) -> int:
        """64 -> 2, 128 -> 4, 256 -> 5, 384 -> 7, 768 -> 12."""
        return usual_layers(self.width) if self.depth is None else self.depth

    def parameters(self, vocabulary: int) -> int:
        """All but the norms: attention and feed-forward matrices, and one embedding for both ends."""
        feed_forward = -(-self.width * 8 // 96) * 32
        return self.layers * self.width * (4 * self.width + 3 * feed_forward) + vocabulary * self.width

    def settings(self) -> dict[str, Any]:
        """As fields of `ModelArguments`."""
        heads = self.heads or heads_for(self.width, self.key_value_heads or 1)
        return {"hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": heads}


def usual_layers(width: int) -> int:
    """Number of layers of the recipes at this width: 32 -> 2, 64 -> 2, 128 -> 4, 256 -> 5, 384 -> 7, 768 -> 12."""
    return max(2, min(width // 32, 4 + (width - 128) // 80))


def usual_heads(width: int) -> float:
    """Number of heads of width 32, from width 256 on of 64; a fraction where they do not divide the width."""
    return width / (32 if width < 256 else 64)


def heads_for(width: int, key_value_heads: int = 1) -> int | None:
    """Number of heads nearest to heads of 32 (of 64 from width 256 on) into which a width divides, or None.

    The width of a head is a multiple of 8 if possible, as kernels prefer, and even in any case, as rotary positions need.
    """
    for multiple in (8, 2):
        fitting = [
            heads
            for heads in range(key_value_heads, width // 2 + 1, key_value_heads)
            if width % heads == 0 and width // heads % multiple == 0
        ]
        if fitting:
            return min(fitting, key=lambda heads: abs(math.log(heads / usual_heads(width))))
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
    """The shape with about as many parameters, and about as deep as the recipes are at its width.

    Depths within a factor of 1.5 of the recipes' are considered. Of the shapes within 10 % of the size it is the one most
    like the recipes in depth and width of a head; if there is none, the nearest in size.

    Args:
        parameters: Number of parameters wanted.
        vocabulary: Number of token ids; each has a row of the embedding.
        width, layers, heads, key_value_heads: What is fixed.

    Raises:
        MiniGPTError: if no width fits the number of heads.
    """
    step = math.lcm(2 * heads, 8) if heads else 8
    widths = [width] if width else [each for each in FINE_WIDTHS if each % step == 0] or [step]
    shapes = []
    for each in widths:
        if not heads and heads_for(each, key_value_heads or 1) is None:
            continue
        usual = usual_layers(each)
        few, many = max(1, math.floor(usual / 1.5)), math.ceil(usual * 1.5)
        # With the width given the depth is the usual one: the user decided about the size.
        depths = [layers] if layers else [usual] if width else range(few, many + 1)
        shapes += [Shape(each, depth, heads, key_value_heads) for depth in depths]
    if not shapes:
        raise MiniGPTError(
            f"hidden_size {width} does not divide into a number of heads that is a multiple of num_key_value_heads "
            f"{key_value_heads}, with an even width of each head: choose another hidden_size or num_key_value_heads"
            if width
            else f"num_key_value_heads is {key_value_heads}: no width up to {FINE_WIDTHS[-1]} divides into a multiple of it"
        )

    def distance(shape: Shape) -> tuple[float, float, float]:
        deeper = abs(math.log(shape.layers / usual_layers(shape.width)))
        more_heads = abs(math.log(shape.settings()["num_attention_heads"] / usual_heads(shape.width)))
        off = abs(math.log(shape.parameters(vocabulary) / parameters))
        return max(off, math.log(1.1)), deeper + more_heads, off

    return min(shapes, key=distance)


def size_for_text(size: int, tokens: int) -> tuple[float, float]:
    """(P, D) for a text of `size` bytes and `tokens` tokens, if nobody said how large or how long.

    P is four parameters for each byte, at most 1,000,000. D is four readings; a short text is read up to 20 times, until
    150,000 tokens have been learnt from; D is at most 1,500,000. So the cost P · D is at most 1.5 · 10¹², where that of
    the recipe `demo` is 2,164,672 · 921,600 = 2.0 · 10¹².

    4 kB in 2,000 tokens -> 16,000 and 40,000; 1 MB in 400,000 tokens -> 1,000,000 and 1,500,000.
    """
    learnt = max(MAX_EFFECTIVE_EPOCHS * tokens, min(MOST_READINGS * tokens, SHORTEST_TRAINING))
    return min(PARAMETERS_PER_BYTE * size, LARGEST_UNASKED), min(learnt, LONGEST_UNASKED)


def vocabulary_for_text(characters: int) -> int:
    """Tokens of a BPE, of which 258 are the bytes and two special tokens: 4 kB -> 324; 100 kB -> 420; 1 MB -> 1,320."""
    return min(320 + characters // 1000, 2048)


def block_size_for(tokens: float) -> int:
    """Tokens in a training block: 2e6 -> 128, 2e7 -> 256, 2e8 -> 512, more than 1e9 -> 1024."""
    return 128 * 2 ** min(3, max(0, math.ceil(math.log10(tokens / 1e7))))


def vocabulary_for(characters: float) -> int:
    """Tokens of a BPE: one for each 8,000 characters, as a power of two, so that the rarest are seen dozens of times."""
    return 2 ** int(math.log2(min(max(characters / 8000, 1024), 32768)))


def tokens_in_a_step(tokens: float) -> float:
    """The batch, in tokens: 1.5e6 or less -> 768, 1.5e8 -> 7680."""
    return 768 * max(1.0, math.sqrt(tokens / 1.5e6))


def learning_rates(width: int) -> dict[str, float]:
    """128 -> 0.004 and 0.02, 512 -> 0.002 and 0.02; whatever the depth."""
    return {"learning_rate": round(4e-3 * math.sqrt(128 / width), 6), "muon_learning_rate": 0.02}


def weight_decay(readings: float) -> float:
    """By how often the text is read."""
    return 0.1 if readings > MAX_EFFECTIVE_EPOCHS else 0.0


def dropout(readings: float) -> float:
    """Of each branch, by how often the text is read."""
    return 0.0 if readings <= MAX_EFFECTIVE_EPOCHS else 0.1 if readings <= 10 else 0.2


def distance_from_optimal(shape: Shape, vocabulary: int, compute: float) -> float:
    """How far D is from 10 P, as a logarithm, if this shape is given a compute of D · P."""
    parameters = shape.parameters(vocabulary)
    return abs(math.log(max(compute, 1) / parameters / (TOKENS_PER_PARAMETER * parameters)))


def number_of(size: str) -> float:
    """ "10m" -> 10,000,000; "800k", "0.8M" and "800000" are the same.

    Raises:
        MiniGPTError: if it is no number of parameters.
    """
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    try:
        number = float(size.rstrip("kmbKMB")) * units.get(size[-1:].lower(), 1)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise MiniGPTError(f"--size {size}: this is no number of parameters; give one like 800k, 10m or 124m")
    return number
