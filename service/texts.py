"""From a text to what an engine runs, and from its logits to its answer: alike for a request and for a whole file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.bundle import Bundle
from service.confidence import softmax, temperature_after
from service.jobs import CALL_TOKENS, Answer, Text
from service.manifest import Manifest
from service.schemas import Options, Result

CHARACTERS = 4  # of a token, in English


@dataclass(frozen=True)
class Encoded:
    """One text as it will run; `whole` is how many tokens it has before it is cut."""

    ids: list[int]
    whole: int

    @property
    def truncated(self) -> bool:
        """Whether it was cut to fit the model."""
        return len(self.ids) < self.whole

    @property
    def is_empty(self) -> bool:
        """Whether nothing but the class token is left of it."""
        return self.whole <= 1


def encode(bundle: Bundle, texts: Sequence[str]) -> list[Encoded]:
    """Turn texts into ids, cut to what the model takes. The class token comes first, so cutting the end keeps it."""
    limit = bundle.manifest.max_tokens
    encodings = (encoding.ids for encoding in bundle.tokenizer.encode_batch_fast(texts))
    return [Encoded(ids[:limit], len(ids)) for ids in encodings]


def texts_to_run(asked: Options, manifest: Manifest, encoded: Sequence[Encoded], sure: float = 0.0) -> list[Text]:
    """Say what each text asks of the batcher; none leaves early while it is less sure than `sure`."""
    depth = _depth(asked.max_iterations, manifest)
    calibrated = manifest.calibration.exit_threshold
    threshold = calibrated if asked.exit_threshold is None else asked.exit_threshold
    threshold = None if threshold is None else max(threshold, sure)
    return [Text(text.ids, depth, threshold, asked.allow_fewer_iterations) for text in encoded]


def likely_work(characters: int, max_iterations: int | None, manifest: Manifest) -> int:
    """What a text of so many characters asks of the engine, in tokens, as far as one can tell before tokenizing."""
    tokens = min(characters // CHARACTERS + 1, manifest.max_tokens)
    return _depth(max_iterations, manifest) * (tokens + CALL_TOKENS)


def _depth(max_iterations: int | None, manifest: Manifest) -> int:
    # A baseline has no second pass to offer.
    return 1 if manifest.iterations == 1 else max_iterations or manifest.iterations


def to_result(asked: Options, bundle: Bundle, text: Encoded, answer: Answer, top_k: int | None = None) -> Result:
    """Show one text's answer; `top_k` is how many of the best labels `scores` names, None being all."""
    labels = bundle.manifest.labels
    scores = answer.logits.tolist() if asked.raw_scores else probabilities(bundle.manifest, answer)
    values = [round(score, 6) for score in scores]
    ranked = sorted(range(len(labels)), key=values.__getitem__, reverse=True)
    shown = sorted(ranked[:top_k])
    return Result(
        label=labels[ranked[0]],
        score=values[ranked[0]],
        scores={labels[index]: values[index] for index in shown},
        architecture=bundle.manifest.architecture,
        model=bundle.id,
        iterations=answer.iterations,
        tokens=len(text.ids),
        truncated=text.truncated,
        degraded=answer.degraded,
    )


def probabilities(manifest: Manifest, answer: Answer) -> list[float]:
    """Say how likely each label is, calibrated, in the order of the model's labels."""
    temperature = temperature_after(manifest.calibration.temperatures, answer.iterations)
    return softmax(answer.logits.tolist(), temperature)
