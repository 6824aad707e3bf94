"""From a text to what an engine runs, and from its logits to its answer: alike for a request and for a whole file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Encoding

from service.bundle import Bundle
from service.confidence import softmax, temperature_after
from service.jobs import CALL_TOKENS, Answer, Text
from service.manifest import Manifest
from service.schemas import Options, Result

CHARACTERS = 4  # of a token, in English
READ_AT_FIRST, READ_NEXT = 2 * CHARACTERS, 16 * CHARACTERS
"""Of a long text, so many characters are read for each token that the model takes; where these will not do, all are."""
OPEN_WORDS = 2
"""So many words next to a cut may be others in the whole: the last two of "it'l" are one of "it'll"."""


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
    """Turn texts into ids, cut to what the model takes; the class token is their first."""
    return [encode_ends(bundle, text) or encode_further(bundle, text) for text in texts]


def encode_ends(bundle: Bundle, text: str) -> Encoded | None:
    """Encode a text if little of it need be read for that, as of most, however long: what the model drops is not."""
    return _encode(bundle, text, READ_AT_FIRST)


def encode_further(bundle: Bundle, text: str) -> Encoded:
    """Encode a text of which more must be read, since its words are long or few; a megabyte may take a second."""
    return _encode(bundle, text, READ_NEXT) or _encode_whole(bundle, text)


def _encode(bundle: Bundle, text: str, characters: int) -> Encoded | None:
    """Encode a text by so many of its first and last characters for each token that the model takes of either.

    None where the rest could change these tokens. It can change no words but those next to it, and a word, to the
    tokenizer, is what it splits no further by rule: a run of letters, a sign.
    """
    tail = bundle.manifest.tail_tokens
    head = bundle.manifest.max_tokens - tail
    if len(text) <= bundle.manifest.max_tokens * characters:
        return _encode_whole(bundle, text)
    first = _first(bundle.tokenizer.encode(text[: head * characters]), head)
    last = _last(bundle.tokenizer.encode(text[len(text) - tail * characters :]), tail) if first else None
    return None if first is None or last is None else Encoded(first + last, truncated=True)


def _first(begun: Encoding, tokens: int) -> list[int] | None:
    """So many of its first ids; None where what follows could change them."""
    first_dropped, last = begun.token_to_word(tokens), begun.token_to_word(max(0, len(begun) - 1))  # None: of no word
    if first_dropped is None or last is None or last - first_dropped < OPEN_WORDS:
        return None
    return begun.ids[:tokens]


def _last(ended: Encoding, tokens: int) -> list[int] | None:
    """So many of its last ids; None where what comes before could change them."""
    if not tokens:
        return []
    first_kept = ended.token_to_word(max(0, len(ended) - tokens))
    if first_kept is None or first_kept < OPEN_WORDS:
        return None
    return ended.ids[-tokens:]


def _encode_whole(bundle: Bundle, text: str) -> Encoded:
    ids = bundle.words.ids(text) if bundle.words else None
    if ids is None:
        (whole,) = bundle.tokenizer.encode_batch_fast([text])
        ids = whole.ids
    limit, tail = bundle.manifest.max_tokens, bundle.manifest.tail_tokens
    if len(ids) <= limit:
        return Encoded(ids, truncated=False)
    return Encoded(ids[: limit - tail] + ids[len(ids) - tail :], truncated=True)


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
