"""The texts that are sent: composed from our own words at the lengths of real reviews, or read from a file."""

import gzip
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from math import log
from pathlib import Path
from typing import Any, TypeVar

from loadtest.errors import LoadTestError

Item = TypeVar("Item")

COUNT = 2000
MEDIAN_WORDS = 19
P95_WORDS = 35
REVIEW_WORDS = (100, 300)
REVIEW_SHARE = 0.1

# A lognormal whose 95th percentile lies 1.645 standard deviations above its median.
_SIGMA = log(P95_WORDS / MEDIAN_WORDS) / 1.645
_SENTENCE_WORDS = (3, 60)

_OPENERS = (
    "in the end", "for once", "sadly", "to my surprise", "as a debut", "after a sluggish start", "scene by scene",
    "even on a second viewing", "despite the hype", "at barely ninety minutes", "more than anything",
    "if you can forgive the ending", "for a sequel", "somewhere around the midpoint", "without a trace of irony",
)  # fmt: skip
_SUBJECTS = (
    "the director", "the screenplay", "this lavish remake", "the young lead", "the whole ensemble", "the plot",
    "every car chase", "the dialogue", "a wonderfully dry narrator", "the soundtrack", "the cinematography",
    "the villain", "its quiet middle act", "the romance", "the editing", "a parade of cameos", "the second hour",
    "the animation", "this documentary", "the twist",
)  # fmt: skip
_VERBS = (
    "never quite earns", "finds", "squanders", "delivers", "keeps circling", "stumbles into", "celebrates",
    "cannot disguise", "breathes life into", "drowns in", "borrows", "rescues", "mistakes noise for", "lingers on",
    "hits", "flirts with", "sidesteps", "wallows in", "captures", "undercuts",
)  # fmt: skip
_OBJECTS = (
    "a tenderness that feels lived in", "jokes nobody will remember by breakfast", "real suspense",
    "the usual cliches of the genre", "an oddly moving farewell", "its own cleverness", "moments of genuine wonder",
    "a gallery of cardboard characters", "the melancholy of small towns", "too many endings",
    "a rhythm all of its own", "the charm of the original", "gloriously silly slapstick", "warmth and mischief",
    "stale sentimentality", "a performance worth the ticket", "grief with surprising candour",
    "an overcooked finale", "the ache of growing older", "nothing but loud explosions",
)  # fmt: skip
_JOINTS = (", and", ", but", ", while", ", although", ", because", ";", ", so", ", yet", ".", ", where")


@dataclass(frozen=True)
class Sample:
    """A text, and the right answer where the file says it: the label, or its place among the model's labels."""

    text: str
    label: str | int | None = None


def load(path: Path | None, *, seed: int, mixed: bool) -> list[str]:
    """The texts of a load test: those of the file when there is one, else composed ones."""
    return read(path) if path else compose(COUNT, seed=seed, mixed=mixed)


def compose(count: int, *, seed: int, mixed: bool = False) -> list[str]:
    """`count` texts, the same for the same seed; words a text: median 19, 5 % above 35, from 3 to 60.

    With `mixed`, a tenth of them are reviews of 100 to 300 words instead.
    """
    rng = random.Random(seed)
    return [_text(_words(rng, mixed), rng) for _ in range(count)]


def compose_reviews(count: int, *, seed: int) -> list[str]:
    """`count` texts of 100 to 300 words, the same for the same seed."""
    rng = random.Random(seed)
    return [_text(rng.randint(*REVIEW_WORDS), rng) for _ in range(count)]


def read(path: Path) -> list[str]:
    """The texts of a file, as `read_samples` reads it."""
    return [sample.text for sample in read_samples(path)]


def read_samples(path: Path) -> list[Sample]:
    """The texts of a file: one a line, or JSON Lines with "text" and perhaps "label"; blank lines are skipped.

    LoadTestError names the file, and the line where it is one.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    is_json = path.name.removesuffix(".gz").endswith(".jsonl")
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            numbered = ((number, line.strip()) for number, line in enumerate(lines, 1))
            filled = ((number, line) for number, line in numbered if line)
            samples = [_json_sample(line, path, number) if is_json else Sample(line) for number, line in filled]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise LoadTestError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not samples:
        raise LoadTestError(f"{path} holds no text")
    return samples


def request_bodies(
    texts: Sequence[str], *, list_size: int, architecture: str, task: str, exit_threshold: float | None = None
) -> list[bytes]:
    """JSON bodies for POST /classify that together send every text, `list_size` texts each (the last one filled up).

    A list size of 1 sends the bare text, as most callers do. Unless told, a text leaves early when the model's own
    threshold says so.
    """
    fields: dict[str, Any] = {"architecture": architecture, "task": task}
    if exit_threshold is not None:
        fields["exit_threshold"] = exit_threshold
    return [_body(chunk, fields) for chunk in chunks(texts, list_size)]


def chunks(items: Sequence[Item], size: int) -> list[list[Item]]:
    """The items in order, `size` at a time; the last part is filled up from the first items on."""
    endless = chain.from_iterable(repeat(items))
    return [list(islice(endless, size)) for _ in range(-(-len(items) // size))]


def _body(texts: list[str], fields: dict[str, Any]) -> bytes:
    inputs = texts[0] if len(texts) == 1 else texts
    return json.dumps({"inputs": inputs} | fields).encode()


def _json_sample(line: str, path: Path, number: int) -> Sample:
    try:
        fields = json.loads(line)
        text, label = fields["text"], fields.get("label")
    except (ValueError, TypeError, KeyError):
        text = label = None
    if not isinstance(text, str) or not text.strip():
        raise LoadTestError(f'{path}, line {number}: not a JSON object with a "text" that has one')
    return Sample(text, label if isinstance(label, str | int) else None)


def _words(rng: random.Random, mixed: bool) -> int:
    if mixed and rng.random() < REVIEW_SHARE:
        return rng.randint(*REVIEW_WORDS)
    low, high = _SENTENCE_WORDS
    return min(max(round(rng.lognormvariate(log(MEDIAN_WORDS), _SIGMA)), low), high)


def _text(words: int, rng: random.Random) -> str:
    """Clauses until there are words enough, cut to the word: the length is what matters, not the last clause."""
    return " ".join(islice(_clause_words(rng), words)).rstrip(",;.") + "."


def _clause_words(rng: random.Random) -> Iterator[str]:
    while True:
        clause = f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}"
        opened = f"{rng.choice(_OPENERS)}, {clause}" if rng.random() < 0.4 else clause
        yield from (opened + rng.choice(_JOINTS)).split()
