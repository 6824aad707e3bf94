"""The shapes of the networks, apart from the networks: the command line needs them without loading torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from training.errors import TrainingError

Pooling = Literal["mean", "first"]
"""What the head reads: the mean of all tokens, or the first one alone."""


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder. `iterations` is how often the stack of layers runs (1 for the baseline)."""

    layers: int
    iterations: int
    width: int
    heads: int
    feed_forward: int
    classes: int
    vocabulary: int = 4096
    max_tokens: int = 256
    dropout: float = 0.1
    pooling: Pooling = "first"
    """As runs have it that are older than the choice; new ones name theirs."""

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise TrainingError(
                f"width {self.width} does not fit {self.heads} heads: a multiple of {2 * self.heads} is needed, since "
                "rotary positions turn pairs"
            )


SHAPES: Mapping[str, Mapping[str, int]] = {
    "recurrent": {"layers": 3, "iterations": 2, "width": 256, "heads": 4, "feed_forward": 680},
    "baseline": {"layers": 6, "iterations": 1, "width": 384, "heads": 6, "feed_forward": 680},
}
