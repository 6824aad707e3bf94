"""The shapes of the networks, apart from the networks: the command line needs them without loading torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from training.errors import TrainingError

FEWEST_TOKENS = 3
"""Of a text that is cut: with fewer the exporter takes a text's length for fixed."""
MOST_TOKENS = 8192
"""The most that a bundle may say."""
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
    tail_tokens: int = 0
    dropout: float = 0.1
    pooling: Pooling = "first"
    """As runs have it that are older than the choice; new ones name theirs."""

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise TrainingError(
                f"width {self.width} does not fit {self.heads} heads: a multiple of {2 * self.heads} is needed, since "
                "rotary positions turn pairs"
            )


@dataclass(frozen=True)
class Reading:
    """How much of a text is read where it is not as much as in training; no weight depends on it."""

    max_tokens: int | None = None
    tail_tokens: int | None = None

    def of(self, config: EncoderConfig) -> EncoderConfig:
        """The shape with this reading; TrainingError where it is none."""
        given = {name: tokens for name, tokens in vars(self).items() if tokens is not None}
        changed = replace(config, **given)
        check_max_tokens(changed.max_tokens)
        check_tail_tokens(changed.tail_tokens, changed.max_tokens)
        return changed


AS_IN_TRAINING = Reading()


def check_max_tokens(max_tokens: int) -> None:
    if not FEWEST_TOKENS <= max_tokens <= MOST_TOKENS:
        raise TrainingError(f"--max-tokens is {max_tokens}; {FEWEST_TOKENS} to {MOST_TOKENS} are possible")


def check_tail_tokens(tail_tokens: int, max_tokens: int) -> None:
    if not 0 <= tail_tokens < max_tokens:
        raise TrainingError(f"--tail-tokens is {tail_tokens}; 0 to {max_tokens - 1}, below --max-tokens, are possible")


SHAPES: Mapping[str, Mapping[str, int]] = {
    "recurrent": {"layers": 3, "iterations": 2, "width": 256, "heads": 4, "feed_forward": 680},
    "baseline": {"layers": 6, "iterations": 1, "width": 384, "heads": 6, "feed_forward": 680},
}
