"""The data sets that training knows by name, and their composites."""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from training.errors import TrainingError
from training.examples import SMALLEST_SPLIT, Columns, Examples, collect, find_split, label_names, read_examples

SPLIT_SEED = 13
VALIDATION_SHARE = 0.1
HELD_OUT_SHARE = 0.01
"""Of the texts for a pretraining, to measure it on."""
POLARITY = ("negative", "positive")
NEWSGROUPS = (
    "alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware",
    "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey",
    "sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns",
    "talk.politics.mideast", "talk.politics.misc", "talk.religion.misc",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A public data set: where the hub has it, what its folder under --data-dir may be called, what it decides."""

    hub: str
    task: str
    labels: tuple[str, ...]
    folders: tuple[str, ...]
    kind: str
    """What sort of text it is, for the card of a model that learned from it."""
    columns: Columns = field(default_factory=Columns)
    language: str = "English"


SOURCES: Mapping[str, Source] = {
    "sst2": Source("stanfordnlp/sst2", "sentiment", POLARITY, ("sst2",), "phrases and sentences of film reviews"),
    "imdb": Source("stanfordnlp/imdb", "sentiment", POLARITY, ("imdb",), "film reviews"),
    "yelp_polarity": Source(
        "fancyzhx/yelp_polarity",
        "sentiment",
        POLARITY,
        ("yelp_polarity", "yelp_reviews"),
        "reviews of local businesses",
    ),
    "amazon_polarity": Source(
        "fancyzhx/amazon_polarity", "sentiment", POLARITY, ("amazon_polarity", "amazon_reviews"), "product reviews"
    ),
    "ag_news": Source(
        "fancyzhx/ag_news", "topic", ("world", "sports", "business", "technology"), ("ag_news",), "news items"
    ),
    "20newsgroups": Source(
        "SetFit/20_newsgroups",
        "newsgroup",
        NEWSGROUPS,
        ("20newsgroups",),
        "messages to newsgroups of the 1990s",
        Columns(drop_empty=True),
    ),
}
TASK_LETTERS = 50
TASK = re.compile(f"[a-z0-9][a-z0-9_-]{{0,{TASK_LETTERS - 1}}}")
LABEL_LETTERS = 64
SENTIMENT_MIX = ("sst2", "imdb", "yelp_polarity", "amazon_polarity")
REVIEWS = SENTIMENT_MIX[1:]
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n|<br />|\\n")
"""Also where a line ends: as a newline, and as the hub's imdb and yelp_polarity spell one."""
FEWEST_WORDS, MOST_WORDS = 5, 30
"""Of a sentence that is an example by itself."""
REVIEW_SENTENCES = 130_000
PASSAGE_WORDS = 45
"""About 64 pieces, so that attention costs little and a teacher has much to say for each token."""
DOMAINS: Mapping[str, str] = {
    "movies": "imdb",
    "local business": "yelp_polarity",
    "online shopping": "amazon_polarity",
}
MOST_SENTENCES = 4
"""Of an excerpt."""
NAMES = (*SOURCES, "sentiment", "sentences", "passages", "domain", "excerpts")


@dataclass(frozen=True)
class Dataset:
    """A task's examples. A `test` split is for the final figures alone; None where there is none with labels."""

    name: str
    task: str
    labels: tuple[str, ...]
    train: Examples
    validation: Examples
    test: Examples | None
    sources: Mapping[str, Examples] = field(default_factory=dict)
    """What judges each part of a mix, as `finals` names it."""

    @property
    def finals(self) -> Mapping[str, Examples]:
        """What judges a model in the end, as in `yelp_polarity test`; validation where a test's labels are withheld."""
        if self.sources:
            return self.sources
        return {f"{self.name} test": self.test} if self.test else {f"{self.name} validation": self.validation}

    @property
    def judged(self) -> dict[str, Examples]:
        """The splits that quality is reported on; validation alone may tune anything."""
        return {"validation": self.validation, **(self.sources or ({"test": self.test} if self.test else {}))}


def origins(name: str) -> dict[str, Source]:
    """The public data sets that one is made of; none that we know for one's own."""
    parts: dict[str, tuple[str, ...]] = dict.fromkeys(("sentiment", *PIECES), SENTIMENT_MIX)
    parts |= dict.fromkeys(("domain", "excerpts"), tuple(DOMAINS.values()))
    found = {part: SOURCES[part] for part in parts.get(name, (name,)) if part in SOURCES}
    if name == "excerpts":
        found = {part: replace(one, kind=f"{one.kind} and excerpts of them") for part, one in found.items()}
    if name in PIECES:
        found |= {part: replace(found[part], kind=f"{name} of {found[part].kind}") for part in REVIEWS}
    return found


def load_dataset(name: str, data_dir: Path | None) -> Dataset:
    """A data set by name: from `data_dir/NAME/{train,validation,test}.*` if given, else from the hub.

    A name that is not listed is one's own: a folder of `data_dir`, labelled as its training file is. Where there is
    no validation split, a tenth of the training split is cut off for it, always the same.
    """
    if name == "sentiment":
        return _sentiment_mix(data_dir)
    if name in PIECES:
        return _pieces(name, data_dir)
    if name == "domain":
        return _domain(data_dir)
    if name == "excerpts":
        return _excerpts(data_dir)
    if name not in SOURCES and data_dir is None:
        raise TrainingError(f"unknown data set '{name}'; known: {', '.join(NAMES)}, or a folder of --data-dir")
    return _from_files(name, data_dir) if data_dir else _from_hub(name)


def unlabelled(names: Sequence[str], data_dir: Path | None) -> Dataset:
    """The training texts of all these data sets, each once, for a task without labels (every number is 0).

    None of them is also a validation or test text of any of the data sets.
    """
    parts = [load_dataset(name, data_dir) for name in names]
    held = _held_out(parts)
    texts = list(dict.fromkeys(text for part in parts for text in part.train.texts if text not in held))
    texts = [texts[index] for index in _shuffled(len(texts))]
    count = max(1, round(len(texts) * HELD_OUT_SHARE))
    train, held_out = (Examples(some, [0] * len(some)) for some in (texts[count:], texts[:count]))
    return Dataset("+".join(names), "pretraining", (), train, held_out, None)


def draw_share(dataset: Dataset, share: float, seed: int) -> Dataset:
    """The same with a share of its training split."""
    count = len(dataset.train)
    chosen = random.Random(seed).sample(range(count), max(1, round(count * share)))
    return replace(dataset, train=dataset.train.pick(sorted(chosen)))


def _from_files(name: str, data_dir: Path) -> Dataset:
    source = SOURCES.get(name)
    candidates = [data_dir / folder for folder in (source.folders if source else (name,))]
    folder = next((path for path in candidates if path.is_dir()), None)
    if folder is None:
        raise TrainingError(f"no folder {' or '.join(map(str, candidates))} for data set '{name}'")
    train_path = find_split(folder, "train")
    if train_path is None:
        raise TrainingError(f"{folder}: no train.jsonl, .csv, .tsv (each also .gz) or .parquet")
    columns = source.columns if source else Columns()
    labels = source.labels if source else tuple(label_names(train_path, columns.label))
    _check_names(folder, name, labels)

    def split(which: str) -> Examples | None:
        path = find_split(folder, which)
        return read_examples(path, labels, columns) if path else None

    return _assemble(name, source.task if source else name, labels, split("train"), split("validation"), split("test"))


def _check_names(folder: Path, task: str, labels: Sequence[str]) -> None:
    """TrainingError for what no bundle may have: better now than after a training."""
    if not TASK.fullmatch(task):
        raise TrainingError(
            f"{folder}: the folder's name becomes the task's, so it takes small letters, digits, - and _, "
            f"{TASK_LETTERS} at most"
        )
    if too_long := [label for label in labels if len(label) > LABEL_LETTERS]:
        shown, letters = too_long[0][:LABEL_LETTERS], len(too_long[0])
        raise TrainingError(f"{folder}: label '{shown}...' has {letters} letters; {LABEL_LETTERS} at most")


def _from_hub(name: str) -> Dataset:
    import datasets  # a second to import, and local files don't need it

    source = SOURCES[name]
    try:
        splits = datasets.load_dataset(source.hub)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"data set {source.hub} cannot be loaded ({reason}); --data-dir reads files") from error

    def split(which: str) -> Examples | None:
        if which not in splits or min(splits[which].unique(source.columns.label)) == -1:  # -1: labels withheld
            return None
        return collect(splits[which], f"{source.hub} {which}", source.labels, source.columns)

    return _assemble(name, source.task, source.labels, split("train"), split("validation"), split("test"))


def _assemble(
    name: str,
    task: str,
    labels: Sequence[str],
    train: Examples | None,
    validation: Examples | None,
    test: Examples | None,
) -> Dataset:
    if train is None:
        raise TrainingError(f"data set '{name}' has no training split")
    if validation is None:
        order = _shuffled(len(train))
        cut = max(SMALLEST_SPLIT, round(len(train) * VALIDATION_SHARE))
        validation = train.pick(order[:cut])
        held_out = set(validation.texts)  # a text that stands there twice is not learned from either
        train = train.pick(place for place in order[cut:] if train.texts[place] not in held_out)
    missing = [label for number, label in enumerate(labels) if number not in set(train.labels)]
    if missing or len(labels) < 2:
        raise TrainingError(
            f"data set '{name}': too small to train on; no example of {', '.join(missing) or 'a second label'}"
        )
    return Dataset(name, task, tuple(labels), train, validation, test)


def _shuffled(count: int) -> list[int]:
    order = list(range(count))
    random.Random(SPLIT_SEED).shuffle(order)
    return order


def _sentiment_mix(data_dir: Path | None) -> Dataset:
    parts = [load_dataset(name, data_dir) for name in SENTIMENT_MIX]
    tests = [part.test for part in parts if part.test]
    return Dataset(
        "sentiment",
        "sentiment",
        POLARITY,
        _join([part.train for part in parts]),
        _join([part.validation for part in parts]),
        _join(tests) if tests else None,
        {name: examples for part in parts for name, examples in part.finals.items()},
    )


def _pieces(name: str, data_dir: Path | None) -> Dataset:
    """Phrases, and pieces of reviews labelled as the review they stand in: many say nothing, as a teacher can tell."""
    phrases = load_dataset("sst2", data_dir)
    parts = [load_dataset(part, data_dir) for part in REVIEWS]
    cut, most = PIECES[name]
    reviews = _join([part.train for part in parts])
    label_of = {piece: label for text, label in zip(reviews.texts, reviews.labels, strict=True) for piece in cut(text)}
    for text in _held_out([phrases, *parts]):
        label_of.pop(text, None)
    found = Examples(list(label_of), list(label_of.values()))
    drawn = found.pick(_shuffled(len(found))[:most])
    return replace(phrases, name=name, train=_join([phrases.train, drawn]), test=None)


def _sentences(review: str) -> Iterator[str]:
    for sentence in SENTENCE_END.split(review):
        if FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS:
            yield sentence.strip()


def passages(review: str) -> Iterator[str]:
    """All of a review: sentences that follow one another, as many as fit; one that is too long by itself is cut."""
    words: list[str] = []
    for sentence in SENTENCE_END.split(review):
        more = sentence.split()
        if words and len(words) + len(more) > PASSAGE_WORDS:
            yield " ".join(words)
            words = []
        words += more
        while len(words) > PASSAGE_WORDS:
            yield " ".join(words[:PASSAGE_WORDS])
            words = words[PASSAGE_WORDS:]
    if words:
        yield " ".join(words)


PIECES: Mapping[str, tuple[Callable[[str], Iterator[str]], int | None]] = {
    "sentences": (_sentences, REVIEW_SENTENCES),
    "passages": (passages, None),
}
"""How a review is cut, and how many of the pieces are drawn."""


def _held_out(parts: Sequence[Dataset]) -> set[str]:
    return {text for part in parts for split in (part.validation, part.test) if split for text in split.texts}


def _join(parts: Sequence[Examples]) -> Examples:
    return Examples([t for part in parts for t in part.texts], [n for part in parts for n in part.labels])


def _domain(data_dir: Path | None) -> Dataset:
    parts = [load_dataset(name, data_dir) for name in DOMAINS.values()]
    tests = [part.test for part in parts]
    return Dataset(
        "domain",
        "domain",
        tuple(DOMAINS),
        _balanced([part.train for part in parts]),
        _balanced([part.validation for part in parts]),
        _balanced([test for test in tests if test]) if all(tests) else None,
    )


def _excerpts(data_dir: Path | None) -> Dataset:
    """What `domain` has, and a few sentences of each text: else how short a text is tells its sort.

    Whole reviews of films are long, those of products often short, and a model that knows only these takes nearly
    every sentence for one of a product.
    """
    whole = _domain(data_dir)
    train, validation = _join([whole.train, _of_each(whole.train)]), _of_each(whole.validation)
    held_out = _held_out([whole]).union(validation.texts)
    train = train.pick(place for place, text in enumerate(train.texts) if text not in held_out)
    return replace(
        whole,
        name="excerpts",
        train=train,
        validation=_join([whole.validation, validation]),
        test=None,
        sources={**whole.finals, "excerpts validation": validation},
    )


def _of_each(reviews: Examples) -> Examples:
    drawing = random.Random(SPLIT_SEED)
    return Examples([excerpt(text, drawing) for text in reviews.texts], reviews.labels)


def excerpt(review: str, drawing: random.Random) -> str:
    """Up to MOST_SENTENCES sentences that follow one another; more where these have fewer than FEWEST_WORDS words."""
    sentences = [part.strip() for part in SENTENCE_END.split(review) if part.strip()] or [review]
    count = min(drawing.randint(1, MOST_SENTENCES), len(sentences))
    begin = drawing.randint(0, len(sentences) - count)
    while len(" ".join(sentences[begin : begin + count]).split()) < FEWEST_WORDS and count < len(sentences):
        begin, count = max(0, begin - 1), count + 1
    return " ".join(sentences[begin : begin + count])


def _balanced(parts: Sequence[Examples]) -> Examples:
    """As many of each part as the smallest has, labelled by the part's place."""
    smallest = min(map(len, parts))
    chosen = [part.pick(_shuffled(len(part))[:smallest]) for part in parts]
    return Examples(
        [t for part in chosen for t in part.texts], [n for n, part in enumerate(chosen) for _ in part.texts]
    )
