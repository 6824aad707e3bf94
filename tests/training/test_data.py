"""The data sets by name: from local folders, from the hub's own objects, and the composites of them."""

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from service.manifest import Label, Name
from tests.training.easy import Records, easy_records, write_jsonl
from training.data import (
    DOMAINS,
    FEWEST_WORDS,
    NEWSGROUPS,
    PASSAGE_WORDS,
    PIECES,
    SENTIMENT_MIX,
    Dataset,
    excerpt,
    load_dataset,
    origins,
)
from training.errors import TrainingError


def polarity(name: str, count: int) -> Records:
    """Texts that say which set they are from; labels 0 and 1 take turns."""
    return [{"text": f"{name} text {row}", "label": row % 2} for row in range(count)]


def texts_of(dataset: Dataset) -> dict[str, list[str]]:
    return {"train": dataset.train.texts, "validation": dataset.validation.texts}


def refusal(name: str, data_dir: Path | None) -> str:
    with pytest.raises(TrainingError) as refused:
        load_dataset(name, data_dir)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_known_name_brings_its_task_and_labels(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sst2" / "train.jsonl", polarity("train", 20))
    write_jsonl(tmp_path / "sst2" / "validation.jsonl", polarity("validation", 6))
    dataset = load_dataset("sst2", tmp_path)
    assert (dataset.task, dataset.labels, dataset.test) == ("sentiment", ("negative", "positive"), None)
    assert (len(dataset.train), len(dataset.validation)) == (20, 6)
    assert dataset.validation.labels == [0, 1] * 3


def test_ones_own_folder_is_labelled_as_its_training_file_is(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mine" / "train.jsonl", easy_records(30))
    write_jsonl(tmp_path / "mine" / "test.jsonl", easy_records(6))
    dataset = load_dataset("mine", tmp_path)
    assert (dataset.name, dataset.task, dataset.labels) == ("mine", "mine", ("bad", "good"))
    assert dataset.test is not None
    assert dataset.test.labels == [0, 1] * 3


def test_a_label_of_the_validation_split_alone_is_unknown(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mine" / "train.jsonl", easy_records(30))
    path = write_jsonl(tmp_path / "mine" / "validation.jsonl", [*easy_records(6), {"text": "hm", "label": "so-so"}])
    assert refusal("mine", tmp_path).startswith(f"{path}, row 7: unknown label 'so-so'; known: bad, good")


def test_a_tenth_is_cut_off_for_validation_always_the_same(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "imdb" / "train.jsonl", polarity("imdb", 200))
    first, second = load_dataset("imdb", tmp_path), load_dataset("imdb", tmp_path)
    assert first == second
    assert (len(first.train), len(first.validation)) == (180, 20)
    assert sorted(first.train.texts + first.validation.texts) == sorted(f"imdb text {row}" for row in range(200))
    assert set(first.validation.labels) == {0, 1}
    for examples in (first.train, first.validation):
        assert examples.labels == [int(text.split()[-1]) % 2 for text in examples.texts]


def test_a_text_that_is_cut_off_for_validation_is_not_learned_from(tmp_path: Path) -> None:
    twice = [{"text": f"text {number // 2}", "label": ("bad", "good")[number // 2 % 2]} for number in range(400)]
    write_jsonl(tmp_path / "own" / "train.jsonl", twice)
    dataset = load_dataset("own", tmp_path)
    assert len(dataset.validation) == 40
    assert not set(dataset.validation.texts) & set(dataset.train.texts)
    assert set(dataset.validation.texts) | set(dataset.train.texts) == {one["text"] for one in twice}


@pytest.mark.parametrize("folder", ["yelp_polarity", "yelp_reviews"])
def test_a_folder_may_have_its_other_name(folder: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / folder / "train.jsonl", polarity("yelp", 50))
    assert len(load_dataset("yelp_polarity", tmp_path).train) == 45


def test_20_newsgroups_are_their_bodies_without_the_empty_ones(tmp_path: Path) -> None:
    records = [{"text": f"Subject: {group}\n\nbody", "label": group} for group in NEWSGROUPS for _ in range(3)]
    for record in records:
        record["body_start"] = str(record["text"].index("body"))
    records[1] |= {"text": "Subject: only", "body_start": "13"}
    write_jsonl(tmp_path / "20newsgroups" / "train.jsonl", records)
    write_jsonl(tmp_path / "20newsgroups" / "validation.jsonl", records)
    dataset = load_dataset("20newsgroups", tmp_path)
    assert set(dataset.train.texts) == {"body"}
    assert len(dataset.train) == 59
    assert Counter(dataset.train.labels) == Counter({0: 2} | dict.fromkeys(range(1, 20), 3))


def test_the_sentiment_mix_joins_its_four_sets(tmp_path: Path) -> None:
    for number, name in enumerate(SENTIMENT_MIX, start=1):
        write_jsonl(tmp_path / name / "train.jsonl", polarity(name, 10 * number))
        write_jsonl(tmp_path / name / "validation.jsonl", polarity(name, 4))
    write_jsonl(tmp_path / "imdb" / "test.jsonl", polarity("imdb", 6))
    dataset = load_dataset("sentiment", tmp_path)
    assert (dataset.task, dataset.labels) == ("sentiment", ("negative", "positive"))
    sizes = dict(zip(SENTIMENT_MIX, (10, 20, 30, 40), strict=True))
    assert Counter(text.split()[0] for text in dataset.train.texts) == sizes
    assert dataset.train.labels == [int(text.split()[-1]) % 2 for text in dataset.train.texts]
    assert len(dataset.validation) == 16
    assert dataset.test is not None
    assert len(dataset.test) == 6


def test_a_mix_is_judged_by_its_sources_and_validation_where_there_is_no_test(tmp_path: Path) -> None:
    for name in SENTIMENT_MIX:
        write_jsonl(tmp_path / name / "train.jsonl", polarity(name, 40))
    for name in ("sst2", "yelp_polarity"):
        write_jsonl(tmp_path / name / "validation.jsonl", polarity(f"{name} validation", 6))
    write_jsonl(tmp_path / "yelp_polarity" / "test.jsonl", polarity("yelp_polarity test", 8))
    mix = load_dataset("sentiment", tmp_path)
    sources = ["sst2 validation", "imdb validation", "yelp_polarity test", "amazon_polarity validation"]
    assert list(mix.finals) == sources
    assert list(mix.judged) == ["validation", *sources]
    assert mix.finals["yelp_polarity test"].texts == [f"yelp_polarity test text {row}" for row in range(8)]
    assert mix.finals["imdb validation"] == load_dataset("imdb", tmp_path).validation
    yelp = load_dataset("yelp_polarity", tmp_path)
    assert list(yelp.judged) == ["validation", "test"]
    assert (list(yelp.finals), list(origins("sentiment"))) == (["yelp_polarity test"], list(SENTIMENT_MIX))
    assert origins("mine") == {}


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Each review has a sentence that is its own, one of four words, and one of 31."""
    for name in ("imdb", "yelp_polarity", "amazon_polarity"):
        records = [
            {"text": f"This is {name} review {row}! Far too few words.\n{'word ' * 31}", "label": row % 2}
            for row in range(20)
        ]
        write_jsonl(tmp_path / name / "train.jsonl", records)
        held = [{"text": f"This is the held out {name} text {row}.", "label": row % 2} for row in range(4)]
        write_jsonl(tmp_path / name / "validation.jsonl", held)
        write_jsonl(tmp_path / name / "test.jsonl", held)
    write_jsonl(tmp_path / "sst2" / "train.jsonl", polarity("phrase", 10))
    write_jsonl(tmp_path / "sst2" / "validation.jsonl", polarity("a phrase held out of sst2", 6))
    return tmp_path


def drawn(data_dir: Path, name: str = "sentences") -> dict[str, int]:
    """The pieces of reviews and their labels."""
    train = load_dataset(name, data_dir).train
    return dict(zip(train.texts[10:], train.labels[10:], strict=True))


def test_sentences_are_phrases_and_the_reviews_sentences_labelled_as_they_are(reviews: Path) -> None:
    dataset = load_dataset("sentences", reviews)
    sst2 = load_dataset("sst2", reviews)
    assert (dataset.name, dataset.task, dataset.labels) == ("sentences", "sentiment", ("negative", "positive"))
    assert dataset.train.texts[:10] == sst2.train.texts
    assert dataset.train.labels[:10] == sst2.train.labels
    assert (dataset.validation, dataset.test, list(dataset.judged)) == (sst2.validation, None, ["validation"])
    names = ("imdb", "yelp_polarity", "amazon_polarity")
    assert drawn(reviews) == {f"This is {name} review {row}!": row % 2 for name in names for row in range(20)}
    assert load_dataset("sentences", reviews) == dataset


def test_a_sentence_ends_at_its_mark_or_its_line_however_that_is_spelt(reviews: Path) -> None:
    ends = ("one two three four v1.5, six. ", "one two three four five? ", "one two three four\tfive\n",
            "a b c d e<br />", "f g h i j<br /><br />", r"k l m n o\n", "p q r s t")  # fmt: skip
    write_jsonl(reviews / "imdb" / "train.jsonl", [{"text": "".join(ends), "label": row % 2} for row in range(4)])
    assert {text for text in drawn(reviews) if not text.startswith("This is")} == {
        "one two three four v1.5, six.", "one two three four five?", "one two three four\tfive", "a b c d e",
        "f g h i j", "k l m n o", "p q r s t",
    }  # fmt: skip


def test_no_sentence_is_a_held_out_text(reviews: Path) -> None:
    held = [*polarity("a phrase held out of sst2", 6), {"text": "This is the held out yelp_polarity text 1."}]
    leaking = " ".join(f"{one['text']}." if "label" in one else one["text"] for one in held)
    records = [{"text": f"{leaking}\n{held[0]['text']}", "label": row % 2} for row in range(4)]
    write_jsonl(reviews / "imdb" / "train.jsonl", records)
    found = drawn(reviews)
    assert "a phrase held out of sst2 text 1." in found, "with its full stop it is another text"
    assert {one["text"] for one in held}.isdisjoint(found)


def test_no_more_sentences_are_drawn_than_wanted(reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(drawn(reviews))
    monkeypatch.setattr("training.data.PIECES", dict(PIECES) | {"sentences": (PIECES["sentences"][0], 9)})
    some = list(drawn(reviews))
    assert some == whole[:9]
    assert len({text.split()[2] for text in some}) > 1, "they are drawn from all"


@given(st.lists(st.text("ab .!?\n", min_size=1), min_size=1, max_size=40).map(" ".join))
def test_passages_are_all_of_a_review_and_none_is_longer_than_wanted(review: str) -> None:
    passages = list(PIECES["passages"][0](review))
    assert " ".join(passages).split() == review.split()
    assert all(1 <= len(passage.split()) <= PASSAGE_WORDS for passage in passages)


def test_a_passage_is_as_many_whole_sentences_as_fit(reviews: Path) -> None:
    ends = (f"{'a ' * 19}b. ", f"{'c ' * 19}d! ", f"{'e ' * 49}f. g h? ")
    write_jsonl(reviews / "imdb" / "train.jsonl", [{"text": "".join(ends), "label": row % 2} for row in range(4)])
    found = {text for text in drawn(reviews, "passages") if not text.startswith("This is")}
    assert found == {f"{'a ' * 19}b. {'c ' * 19}d!", ("e " * 45).strip(), "e e e e f. g h?"}


@pytest.mark.parametrize("pieces", PIECES)
def test_a_card_can_say_where_pieces_are_from(pieces: str) -> None:
    kinds = {name: one.kind for name, one in origins(pieces).items()}
    assert kinds == {
        "sst2": "phrases and sentences of film reviews",
        "imdb": f"{pieces} of film reviews",
        "yelp_polarity": f"{pieces} of reviews of local businesses",
        "amazon_polarity": f"{pieces} of product reviews",
    }


def test_domain_has_as_many_texts_of_each_and_its_own_labels(tmp_path: Path) -> None:
    for name, count in zip(DOMAINS.values(), (40, 20, 30), strict=True):
        write_jsonl(tmp_path / name / "train.jsonl", polarity(name, count))
        write_jsonl(tmp_path / name / "validation.jsonl", polarity(name, count // 5))
    dataset = load_dataset("domain", tmp_path)
    assert (dataset.task, dataset.labels) == ("domain", ("movies", "local business", "online shopping"))
    assert dataset.test is None
    sources = [list(DOMAINS.values())[label] for label in dataset.train.labels]
    assert [text.split()[0] for text in dataset.train.texts] == sources
    assert Counter(dataset.train.labels) == {0: 20, 1: 20, 2: 20}
    assert Counter(dataset.validation.labels) == {0: 4, 1: 4, 2: 4}
    assert load_dataset("domain", tmp_path) == dataset


def test_excerpts_are_whole_reviews_and_some_sentences_of_each(tmp_path: Path) -> None:
    for name, count in zip(DOMAINS.values(), (40, 20, 30), strict=True):
        reviews = [
            {"text": f"{name} review {row} begins here. It has more to say. It ends.", "label": row % 2}
            for row in range(count)
        ]
        write_jsonl(tmp_path / name / "train.jsonl", reviews[5:])
        write_jsonl(tmp_path / name / "validation.jsonl", reviews[:5])
    domain, dataset = load_dataset("domain", tmp_path), load_dataset("excerpts", tmp_path)
    assert (dataset.task, dataset.labels, dataset.test) == (domain.task, domain.labels, None)
    assert {name: len(split) for name, split in dataset.judged.items()} == {
        "validation": 30,
        "domain validation": 15,
        "excerpts validation": 15,
    }
    assert dataset.train.texts[:45] == domain.train.texts
    whole = dict(zip(domain.validation.texts, domain.validation.labels, strict=True))
    found = dataset.sources["excerpts validation"]
    for text, label, review in zip(found.texts, found.labels, whole, strict=True):
        assert text in review and whole[review] == label
    assert {text.count(".") for text in found.texts} > {1, 3}
    assert load_dataset("excerpts", tmp_path) == dataset


def test_an_excerpt_that_is_held_out_is_not_learned_from(tmp_path: Path) -> None:
    for name in DOMAINS.values():
        said = f"This was said of {name} by everybody."
        reviews = [{"text": " ".join([said] * count), "label": count % 2} for count in range(1, 45)]
        write_jsonl(tmp_path / name / "train.jsonl", reviews[4:])
        write_jsonl(tmp_path / name / "validation.jsonl", reviews[:4])
    domain, dataset = load_dataset("domain", tmp_path), load_dataset("excerpts", tmp_path)
    assert dataset.train == domain.train, "all of the excerpts are validation reviews too"


@given(st.lists(st.text("ab .!?\n", min_size=1), min_size=1, max_size=40).map(" ".join), st.randoms())
def test_an_excerpt_is_a_part_of_its_review_and_no_more_than_is_wanted(review: str, drawing: Random) -> None:
    found, whole = excerpt(review, drawing).split(), review.split()
    assert any(whole[start : start + len(found)] == found for start in range(len(whole) + 1))
    assert len(found) >= min(FEWEST_WORDS, len(whole))


def test_a_card_can_say_where_excerpts_are_from() -> None:
    assert origins("excerpts")["imdb"].kind == "film reviews and excerpts of them"
    assert origins("excerpts").keys() == origins("domain").keys()


def test_unknown_names_and_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    assert refusal("sst3", None).startswith("unknown data set 'sst3'; known: sst2, imdb,")
    assert refusal("mine", tmp_path) == f"no folder {tmp_path / 'mine'} for data set 'mine'"
    assert f"{tmp_path / 'yelp_polarity'} or {tmp_path / 'yelp_reviews'}" in refusal("yelp_polarity", tmp_path)
    (tmp_path / "sst2").mkdir()
    assert refusal("sst2", tmp_path).startswith(f"{tmp_path / 'sst2'}: no train.jsonl, .csv")


@pytest.mark.parametrize(
    ("name", "label", "complaint"),
    [
        ("My_Reviews", "good", "the folder's name becomes the task's, so it takes small letters, digits"),
        ("reviews.v2", "good", "the folder's name becomes the task's"),
        ("r" * 51, "good", "50 at most"),
        ("reviews", "g" * 65, "has 65 letters; 64 at most"),
    ],
)
def test_a_name_that_no_bundle_may_have_is_refused_before_a_training(
    name: str, label: str, complaint: str, tmp_path: Path
) -> None:
    for folder, good in ((name, label), ("r" * 50, "g" * 64)):
        rows = [{"text": f"text {row}", "label": ("bad", good)[row % 2]} for row in range(40)]
        write_jsonl(tmp_path / folder / "train.jsonl", rows)
    assert complaint in refusal(name, tmp_path)
    dataset = load_dataset("r" * 50, tmp_path)
    TypeAdapter(Name).validate_python(f"{dataset.task}-recurrent")
    TypeAdapter(list[Label]).validate_python(list(dataset.labels))


@pytest.mark.parametrize(
    ("records", "missing"),
    [
        (polarity("small", 4), "negative, positive"),
        ([{"text": f"fine {number}", "label": 1} for number in range(20)], "negative"),
    ],
)
def test_too_little_to_train_on_is_refused(records: Records, missing: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sst2" / "train.jsonl", records)
    assert refusal("sst2", tmp_path) == f"data set 'sst2': too small to train on; no example of {missing}"


def test_a_single_label_decides_nothing(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "mine" / "train.jsonl", [{"text": f"fine {number}", "label": "good"} for number in range(20)]
    )
    assert refusal("mine", tmp_path).endswith("too small to train on; no example of a second label")


def hub_answers(monkeypatch: pytest.MonkeyPatch, splits: dict[str, Records] | Exception) -> list[str]:
    """The hub cannot be reached from a test, so its answer is made here, of the library's own objects."""
    asked: list[str] = []

    def answer(name: str) -> Any:
        asked.append(name)
        if isinstance(splits, Exception):
            raise splits
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", answer)
    return asked


def test_the_hub_is_asked_by_public_name_and_a_test_split_without_labels_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"idx": row, "sentence": f"text {row}", "label": row % 2} for row in range(20)]
    withheld = [{"idx": row, "sentence": f"text {row}", "label": -1} for row in range(5)]
    asked = hub_answers(monkeypatch, {"train": rows, "validation": rows[:6], "test": withheld})
    dataset = load_dataset("sst2", None)
    assert asked == ["stanfordnlp/sst2"]
    assert dataset.train.texts == [f"text {row}" for row in range(20)]
    assert (dataset.validation.labels, dataset.test) == ([0, 1] * 3, None)


def test_the_hubs_other_splits_are_used_as_they_are_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = polarity("imdb", 50)
    hub_answers(monkeypatch, {"train": rows, "test": rows[:8], "unsupervised": [{"text": "?", "label": -1}] * 9})
    dataset = load_dataset("imdb", None)
    assert (len(dataset.train), len(dataset.validation)) == (45, 5)
    assert dataset.test is not None
    assert len(dataset.test) == 8


def test_a_bad_row_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = polarity("imdb", 50)
    hub_answers(monkeypatch, {"train": [*rows, {"text": "", "label": 1}]})
    assert refusal("imdb", None) == "stanfordnlp/imdb train, row 51: the text is empty"


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_answers(monkeypatch, ConnectionError("no route\nto the hub"))
    assert refusal("sst2", None) == ("data set stanfordnlp/sst2 cannot be loaded (no route); --data-dir reads files")
