"""Files of a bulk job: cut anywhere, every row is read once and in order; what is wrong is said, by row or by file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.bulk import rows, units
from service.bulk.rows import BadText, read_chunks
from service.bulk.units import Unit, cut_into_units, find_files
from service.errors import BulkError

TEXTS = st.lists(st.text(st.sampled_from('ab"\n\r,é😀 '), max_size=9), max_size=12)
ANY_PLACE = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_all(path: Path, unit_bytes: int = 1 << 20, column: str = "text") -> list[tuple[object, object]]:
    """What is kept of each row, and its text or why there is none, over all the units of a file."""
    found: list[tuple[object, object]] = []
    for unit in cut_into_units(find_files(str(path)), unit_bytes):
        for chunk in read_chunks(unit, column, None):
            kept = chunk.kept if isinstance(chunk.kept, list) else chunk.kept.to_pylist()
            found += zip(kept, chunk.texts, strict=True)
    return found


@ANY_PLACE
@given(texts=TEXTS, unit_bytes=st.integers(1, 60), end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
def test_csv_is_cut_between_rows_only(texts: list[str], unit_bytes: int, end: str, bom: bool, tmp_path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerows([["id", "text"], *enumerate(texts)])
    path = tmp_path / "a.csv"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode())
    assert [row for row, _ in read_all(path, unit_bytes)] == [
        {"id": str(number), "text": text} for number, text in enumerate(texts)
    ]


def test_a_quote_inside_a_field_is_no_more_to_the_cuts_than_to_the_reader(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,a 5" pipe\n2,"two\nlines"\n3,"three\nmore\nlines"\n')
    for unit_bytes in range(1, 40):
        texts = [text for _, text in read_all(tmp_path / "a.csv", unit_bytes)]
        assert texts == ['a 5" pipe', "two\nlines", "three\nmore\nlines"]
    assert len(cut_into_units(find_files(str(tmp_path / "a.csv")), 20)) == 2


@ANY_PLACE
@given(texts=TEXTS, unit_bytes=st.integers(1, 60), last=st.sampled_from(["", "\n"]))
def test_lines_are_cut_between_lines_only(texts: list[str], unit_bytes: int, last: str, tmp_path: Path) -> None:
    records = [{"id": number, "text": text} for number, text in enumerate(texts)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + last)
    assert [row for row, _ in read_all(path, unit_bytes)] == records


def test_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": range(10), "text": [f"text {n}" for n in range(10)]}), path, row_group_size=3)
    assert len(cut_into_units(find_files(str(path)), 1)) == 4
    for unit_bytes in (1, 200, 1 << 20):
        found = read_all(path, unit_bytes)
        assert [text for _, text in found] == [f"text {n}" for n in range(10)]
        assert found[3][0] == {"id": 3, "text": "text 3"}


def test_compressed_and_plain_lines_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("one\n\ntwo\r\nthr\u00e9e".encode()))
    found = read_all(tmp_path / "a.txt.gz", unit_bytes=1)
    assert [text for _, text in found] == ["one", BadText("empty"), "two", "thr\u00e9e"]
    assert found[2][0] == {"text": "two"}


BAD_LINES = {
    '{"id": 1}': "no column 'text'",
    '{"text": null}': "no text: null",
    '{"text": 7}': "not a text: 7",
    '{"text": " \\n"}': "empty",
    '{"text": "\\ud800"}': "not Unicode: half of a surrogate pair",
    "[1]": "not a JSON object: [1]",
    '{"text": "half': 'not JSON: {"text": "half',
    "[" * 100_000: "not JSON: " + "[" * 60 + "...",
}


def test_a_bad_line_is_one_row_s_matter(tmp_path: Path) -> None:
    lines = [line.encode() for line in BAD_LINES] + [b'{"text": "\xff"}', b'{"text": "good"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = [text for _, text in read_all(tmp_path / "a.jsonl")]
    assert found[:-2] == [BadText(reason) for reason in BAD_LINES.values()]
    assert found[-2] == BadText('not UTF-8: {"text": "\ufffd"}')
    assert found[-1] == "good"


def test_a_bad_row_of_csv_is_one_row_s_matter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,good\n2\n3,a,b\n4,\xff\n5,""\n\n6,fine\n')
    assert [text for _, text in read_all(tmp_path / "a.csv")] == [
        "good",
        BadText("1 fields in place of 2"),
        BadText("3 fields in place of 2"),
        BadText("not UTF-8"),
        BadText("empty"),
        "fine",
    ]


def test_a_column_of_another_type_is_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, None]}), tmp_path / "a.parquet")
    assert [text for _, text in read_all(tmp_path / "a.parquet")] == [
        BadText("not a text: 1"),
        BadText("no text: null"),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", b"no gzip"),
        ("b.txt.gz", gzip.compress(b"words " * 5000, mtime=0)[:-30]),
        ("c.parquet", b"no parquet"),
        ("d.csv", b'text\n"' + b"never closed\n" * 100),
        ("e.jsonl", b'{"text": "' + b"long " * 300 + b'"}\n'),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    name: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (units, rows):
        monkeypatch.setattr(module, "MAX_RECORD", 1000)
    (tmp_path / name).write_bytes(content)
    limit = csv.field_size_limit(1000)
    try:
        with pytest.raises(BulkError, match=name):
            read_all(tmp_path / name)
    finally:
        csv.field_size_limit(limit)


def test_a_file_that_is_not_there_is_not_said_to_end_wrongly(tmp_path: Path) -> None:
    for missing in ("missing.jsonl", "missing-*.jsonl"):
        with pytest.raises(BulkError, match="no such file"):
            find_files(str(tmp_path / missing))
    with pytest.raises(BulkError, match="no file there ends in"):
        find_files(str(tmp_path))


def test_folders_and_patterns_find_files_by_name(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "deep/c.csv.gz", ".hidden/d.csv", "_temporary/e.csv", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text\n")
    assert [Path(file.path).name for file in find_files(str(tmp_path))] == ["a.csv", "b.csv", "c.csv.gz"]
    assert [Path(file.path).name for file in find_files(str(tmp_path / "[ab].*"))] == ["a.csv", "b.csv"]
    with pytest.raises(BulkError, match=r"notes\.md"):
        find_files(str(tmp_path / "notes.md"))
    with pytest.raises(BulkError, match="no such file"):
        find_files(str(tmp_path / "none"))
    (tmp_path / "f.jsonl").write_text("")
    with pytest.raises(BulkError, match="written differently"):
        find_files(str(tmp_path))


def test_a_unit_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    line = json.dumps({"text": "words " * 40}).encode() + b"\n"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(80):
            file.write(line * 1000)
    tracemalloc.start()
    try:
        texts = sum(len(chunk.texts) for chunk in read_chunks(_only_unit(path), "text", None))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert texts == 80_000
    assert peak < 80_000 * len(line) / 4


def _only_unit(path: Path) -> Unit:
    (unit,) = cut_into_units(find_files(str(path)), 1 << 30)
    return unit
