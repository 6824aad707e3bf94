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
READ_AT_FIRST, READ_NEXT = 2 * CHARACTERS, 16 * CHARACTERS
"""Of a text, so many characters are read for each token that the model takes; where these will not do, all are."""
OPEN_WORDS = 2
"""So many words at the end of a beginning may be others in the whole: the last two of "it'l" are one of "it'll"."""


@dataclass(frozen=True)
class Encoded:
    """One text as it will run, and whether it was cut to fit the model."""

    ids: list[int]
    truncated: bool

    @property
    def is_empty(self) -> bool:
        """Whether nothing but the class token is left of it."""
        return len(self.ids) <= 1 and not self.truncated


def encode(bundle: Bundle, texts: Sequence[str]) -> list[Encoded]:
    """Turn texts into ids, cut to what the model takes. The class token comes first, so cutting the end keeps it."""
    return [encode_beginning(bundle, text) or encode_further(bundle, text) for text in texts]


def encode_beginning(bundle: Bundle, text: str) -> Encoded | None:
    """Encode a text if little of it need be read for that, as of most, however long: what the model drops is not."""
    return _encode(bundle, text, READ_AT_FIRST * bundle.manifest.max_tokens)


def encode_further(bundle: Bundle, text: str) -> Encoded:
    """Encode a text of which more must be read, since its words are long or few; a megabyte may take a second."""
    return _encode(bundle, text, READ_NEXT * bundle.manifest.max_tokens) or _encode_whole(bundle, text)


def _encode(bundle: Bundle, text: str, characters: int) -> Encoded | None:
    """Encode a text by its first characters; None where the rest could change what the model takes of it.

    What follows a beginning can change its last words only, and a word, to the tokenizer, is what it splits no further
    by rule: a run of letters, a sign.
    """
    limit = bundle.manifest.max_tokens
    if len(text) <= characters:
        return _encode_whole(bundle, text)
    begun = bundle.tokenizer.encode(text[:characters])
    first_dropped, last = begun.token_to_word(limit), begun.token_to_word(max(0, len(begun) - 1))  # None: of no word
    if first_dropped is None or last is None or last - first_dropped < OPEN_WORDS:
        return None
    return Encoded(begun.ids[:limit], truncated=True)


def _encode_whole(bundle: Bundle, text: str) -> Encoded:
    limit = bundle.manifest.max_tokens
    ids = bundle.words.ids(text) if bundle.words else None
    if ids is None:
        (whole,) = bundle.tokenizer.encode_batch_fast([text])
        ids = whole.ids
    return Encoded(ids[:limit], len(ids) > limit)


def texts_to_run(asked: Options, manifest: Manifest, encoded: Sequence[Encoded], sure: float = 0.0) -> list[Text]:
    """Say what each text asks of the batcher; none leaves early while it is less sure than `sure`."""
    depth = _depth(asked.max_iterations, manifest)
    threshold = max(asked.exit_threshold or manifest.calibration.exit_threshold or 1.0, sure)
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
