"""Reading files: every format gives the same examples, and every complaint names the file and the row."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.training.easy import Records, write_jsonl
from training.errors import TrainingError
from training.examples import SUFFIXES, Columns, Examples, find_split, label_names, read_examples

LABELS = ("bad", "good")
RECORDS: Records = [
    {"text": "dull, and long", "label": "bad"},
    {"text": 'a "great" film', "label": "good"},
    {"text": "two\nlines — été", "label": "1"},
    {"text": "never again", "label": "0"},
]
EXAMPLES = Examples([record["text"] for record in RECORDS], [0, 1, 1, 0])


def write(path: Path, records: Records) -> Path:
    """The records in the format that the name asks for."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return path
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        else:
            table = csv.DictWriter(file, list(records[0]), delimiter="," if kind == "csv" else "\t")
            table.writeheader()
            table.writerows(records)
    return path


def refusal(path: Path, columns: Columns | None = None) -> str:
    with pytest.raises(TrainingError) as refused:
        read_examples(path, LABELS, columns or Columns())
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_holds_the_same_examples(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"train{suffix}", RECORDS)
    assert find_split(tmp_path, "train") == path
    assert read_examples(path, LABELS, Columns()) == EXAMPLES
    assert label_names(path, "label") == ["0", "1", "bad", "good"]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("\ufefftext,label\n" + "fine,1\n" * 4, encoding="utf-8")
    assert len(read_examples(path, LABELS, Columns())) == 4


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_text_may_be_as_long_as_a_book(suffix: str, tmp_path: Path) -> None:
    book = "word " * 100_000
    path = write(tmp_path / f"train{suffix}", [{"text": book, "label": "bad"}] * 4)
    assert read_examples(path, LABELS, Columns()).texts == [book] * 4


@pytest.mark.parametrize("column", ["text", "sentence", "content"])
def test_the_text_column_may_have_any_usual_name(column: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{column: "fine", "label": 1, "other": None}] * 4)
    assert read_examples(path, LABELS, Columns()).texts == ["fine"] * 4


def test_labels_that_are_themselves_numbers_stand_for_themselves(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": "fine", "label": 1 + row % 2} for row in range(4)])
    assert read_examples(path, ("1", "2"), Columns()).labels == [0, 1, 0, 1]
    write_jsonl(path, [{"text": "fine", "label": 0}] * 4)
    with pytest.raises(TrainingError, match=r"train\.jsonl, row 1: unknown label '0'; known: 1, 2$"):
        read_examples(path, ("1", "2"), Columns())


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ({"label": "bad"}, "no text column (text or sentence or content); it has label"),
        ({"text": "fine"}, "no column 'label'; it has text"),
        ({"text": "fine", "label": "ugly"}, "unknown label 'ugly'; known: bad, good (or 0 to 1)"),
        ({"text": "fine", "label": 2}, "unknown label '2'; known: bad, good (or 0 to 1)"),
        ({"text": "fine", "label": -1}, "unknown label '-1'; known: bad, good (or 0 to 1)"),
        ({"text": "fine", "label": None}, "the label is empty"),
        ({"text": " \n\t", "label": "bad"}, "the text is empty"),
        ({"text": 7, "label": "bad"}, "column 'text' holds int, not text"),
        ({"text": None, "label": "bad"}, "column 'text' holds NoneType, not text"),
        (
            {"text": "caf\ufffd", "label": "bad"},
            "the text holds U+FFFD, left by a failed decoding; re-read its source as UTF-8",
        ),
        (
            {"text": "half \ud83c of an emoji", "label": "bad"},
            "the text holds U+D83C, left by a failed decoding; re-read its source as UTF-8",
        ),
        (
            {"text": "fine", "label": "bad", "body_start": "3rd"},
            "column 'body_start' holds '3rd', not a number of characters",
        ),
        (
            {"text": "fine", "label": "bad", "body_start": -2},
            "column 'body_start' holds -2, not a number of characters",
        ),
        (
            {"text": "fine", "label": "bad", "body_start": float("inf")},
            "column 'body_start' holds inf, not a number of characters",
        ),
        (
            {"text": "fine", "label": "9" * 5000},
            f"unknown label '{'9' * 47}...; known: bad, good (or 0 to 1)",
        ),
    ],
)
def test_a_bad_record_is_named(broken: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [*RECORDS, broken, *RECORDS])
    assert refusal(path) == f"{path}, row 5: {complaint}"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("train.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', ", row 2: not JSON: Expecting value"),
        ("train.jsonl", b'{"text": "a", "label": 1}\n\n', ", row 2: not JSON: Expecting value"),
        ("train.jsonl", b'{"text": ' + b"[" * 100_000, ", row 1: not JSON: "),
        ("train.jsonl", b'["text", "label"]\n', ", row 1: a JSON object is needed, not list"),
        (
            "train.jsonl",
            b'{"text": "a", "label": 1}\n{"text": "caf\xe9", "label": 1}\n',
            ", line 2: not UTF-8 (byte 13",
        ),
        ("train.csv", b"text,label\nfine,1\ncaf\xe9,1\n", ", line 3: not UTF-8 (byte 3"),
        ("train.csv", b"text,label\nfine,1\nfine\n", ", row 2: 1 columns, the header has 2"),
        ("train.csv", b"text,label\nfine,1\nfine, but long,1\n", ", row 2: 3 columns, the header has 2"),
        ("train.tsv", b"text\tlabel\nfine\t1\nfine\tbut\t1\n", ", row 2: 3 columns, the header has 2"),
        ("train.csv", b'text,label\nfine,1\n"never closed,1\n', ", line 3: broken CSV: unexpected end of data"),
        ("train.csv", b"text,label\n,1\n", ", row 1: the text is empty"),
        ("train.csv", b"", ": 0 usable rows, at least 4 are needed"),
        ("train.jsonl", b'{"text": "a", "label": 1}\n' * 3, ": 3 usable rows, at least 4 are needed"),
        ("train.jsonl.gz", b"no gzip", ", after line 0: cannot be read: Not a gzipped file"),
        ("train.parquet", b"PAR1 and no more", ": not a readable Parquet file: "),
    ],
)
def test_a_broken_file_is_named(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}{complaint}")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="truncated"),
        pytest.param(lambda content: content[:40] + bytes(20) + content[60:], id="overwritten"),
    ],
)
def test_a_damaged_gzip_file_is_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl.gz", RECORDS * 50)
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(path)
    assert message.startswith(f"{path}, after line ")
    assert "cannot be read" in message


@pytest.mark.parametrize("missing", ["", "  ", float("nan")])
def test_a_missing_label_is_no_label_of_ones_own(missing: object, tmp_path: Path) -> None:
    """As a table's empty cell comes; it would be a class that no bundle may have."""
    named, suffix = ((1.0, 2.0), "parquet") if isinstance(missing, float) else (("a", "b"), "csv")
    path = write(tmp_path / f"train.{suffix}", [{"text": "fine", "label": label} for label in (*named, missing)] * 2)
    labels = label_names(path, "label")
    assert len(labels) == 2
    with pytest.raises(TrainingError, match=r"row 3: the label is empty$"):
        read_examples(path, labels, Columns())


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", RECORDS)
    write(tmp_path / "train.jsonl.gz", RECORDS)
    with pytest.raises(TrainingError, match=r"more than one file for split 'train': train\.jsonl\.gz, train\.csv$"):
        find_split(tmp_path, "train")
    assert find_split(tmp_path, "test") is None


def test_body_start_cuts_off_what_stands_before_the_text(tmp_path: Path) -> None:
    record = {"text": "From: x\n\nthe body", "label": "bad", "body_start": 9}
    path = write_jsonl(tmp_path / "train.jsonl", [record] * 4)
    assert read_examples(path, LABELS, Columns()).texts == ["the body"] * 4


def test_texts_that_are_empty_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    headers_only = {"text": "From: x\n\n", "label": "bad", "body_start": 9}
    path = write_jsonl(tmp_path / "train.jsonl", [headers_only, *RECORDS, headers_only])
    assert refusal(path) == f"{path}, row 1: the text is empty"
    assert read_examples(path, LABELS, Columns(drop_empty=True)) == EXAMPLES


def test_a_file_that_is_not_there_or_of_no_known_kind_is_said(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.jsonl") == f"{tmp_path / 'none.jsonl'}: cannot be read: No such file or directory"
    (tmp_path / "list.json").write_text("[]")
    assert refusal(tmp_path / "list.json").startswith(f"{tmp_path / 'list.json'}: the name must end in .jsonl, ")


def test_a_stray_quotation_mark_joins_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text('text\tlabel\nfine\tgood\n"hello there\tgood\nthis is bad\tbad\nhe said so"\tgood\nfine\tgood\n')
    assert "line 5: a quotation mark opened a field" in refusal(path)
