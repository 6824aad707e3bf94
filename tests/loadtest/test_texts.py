"""Lengths and determinism of the composed texts, files of texts, and the bodies made of them."""

import gzip
import json
from pathlib import Path
from statistics import median

import pytest

from loadtest.errors import LoadTestError
from loadtest.texts import compose, read, request_bodies


def lengths(texts: list[str]) -> list[int]:
    return sorted(len(text.split()) for text in texts)


def test_composed_texts_are_as_long_as_film_review_sentences() -> None:
    words = lengths(compose(4000, seed=1))
    assert 18 <= median(words) <= 20
    assert 0.04 <= sum(count > 35 for count in words) / len(words) <= 0.06
    assert words[0] >= 3
    assert words[-1] <= 60


def test_a_tenth_of_mixed_texts_are_long_reviews() -> None:
    words = lengths(compose(4000, seed=1, mixed=True))
    long = [count for count in words if count > 60]
    assert 0.08 <= len(long) / len(words) <= 0.12
    assert (long[0] >= 100, long[-1] <= 300) == (True, True)
    assert 185 <= median(long) <= 215


def test_the_seed_decides_the_texts_and_they_differ() -> None:
    texts = compose(500, seed=3)
    assert texts == compose(500, seed=3)
    assert texts != compose(500, seed=4)
    assert len(set(texts)) > 490


def test_lines_and_json_lines_are_read_plain_and_compressed(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("fine\n\n  über  \n", encoding="utf-8")
    rows = b'{"text": "fine", "label": 1}\n{"text": "\xc3\xbcber"}\n'
    (tmp_path / "texts.jsonl").write_bytes(rows)
    (tmp_path / "texts.jsonl.gz").write_bytes(gzip.compress(rows))
    for name in ("texts.txt", "texts.jsonl", "texts.jsonl.gz"):
        assert read(tmp_path / name) == ["fine", "über"], name


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"text": "fine"}\n{"label": 1}\n', "line 2: not a JSON object"),
        (b'{"text": "fine"}\n"bare"\n', "line 2: not a JSON object"),
        (b'{"text": " "}\n', "line 1: not a JSON object"),
        (b"fine\n", "line 1: not a JSON object"),
        (b"\n\n", "holds no text"),
        (b'{"text": "\xff"}\n', "cannot be read as UTF-8"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    with pytest.raises(LoadTestError, match=complaint):
        read(path)


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    damaged = bytearray(gzip.compress(b"fine\n" * 20))
    damaged[10:14] = b"\xff" * 4
    (tmp_path / "texts.txt.gz").write_bytes(damaged)
    with pytest.raises(LoadTestError, match="cannot be read"):
        read(tmp_path / "texts.txt.gz")


def test_bodies_send_every_text_in_order_and_fill_up_the_last() -> None:
    single = [json.loads(body) for body in request_bodies(["a", "b"], list_size=1, architecture="baseline", task="t")]
    fields = {"architecture": "baseline", "task": "t"}
    assert single == [{"inputs": text} | fields for text in ("a", "b")]
    (fixed,) = request_bodies(["a"], list_size=1, architecture="baseline", task="t", exit_threshold=1)
    assert json.loads(fixed) == {"inputs": "a", "exit_threshold": 1} | fields
    lists = request_bodies(["a", "b", "c"], list_size=2, architecture="baseline", task="t")
    assert [json.loads(body)["inputs"] for body in lists] == [["a", "b"], ["c", "a"]]
    (long,) = request_bodies(["a", "b"], list_size=5, architecture="baseline", task="t")
    assert json.loads(long)["inputs"] == ["a", "b", "a", "b", "a"]
