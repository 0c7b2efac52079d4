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
"""

import math
from dataclasses import dataclass
from typing import Any

TOKENS_PER_PARAMETER = 10
READINGS_AS_GOOD_AS_NEW = 4
WIDTHS = (64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536)


@dataclass(frozen=True)
class Shape:
    """A width, and what follows from it."""

    width: int

    @property
    def layers(self) -> int:
        """64 -> 2, 128 -> 4, 256 -> 5, 384 -> 7, 768 -> 12."""
        return max(2, min(self.width // 32, 4 + (self.width - 128) // 80))

    def parameters(self, vocabulary: int) -> int:
        """All but the norms: attention and feed-forward matrices, and one embedding for both ends."""
        feed_forward = -(-self.width * 8 // 96) * 32
        return self.layers * self.width * (4 * self.width + 3 * feed_forward) + vocabulary * self.width

    def settings(self) -> dict[str, Any]:
        """As fields of `ModelArguments`."""
        heads = self.width // (32 if self.width < 256 else 64)
        return {"hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": heads}


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
    return 0.1 if readings > READINGS_AS_GOOD_AS_NEW else 0.0


def dropout(readings: float) -> float:
    """Of each branch, by how often the text is read."""
    return 0.0 if readings <= READINGS_AS_GOOD_AS_NEW else 0.1 if readings <= 10 else 0.2


def distance_from_optimal(shape: Shape, vocabulary: int, compute: float) -> float:
    """How far D is from 10 P, as a logarithm, if this shape is given a compute of D · P."""
    parameters = shape.parameters(vocabulary)
    return abs(math.log(max(compute, 1) / parameters / (TOKENS_PER_PARAMETER * parameters)))
