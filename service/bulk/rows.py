"""The rows of one unit, a chunk at a time: their texts, what is wrong with a text, and the columns to keep."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.bulk.units import BOM, MAX_RECORD, Unit
from service.errors import BulkError

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_ROWS = 2048
CHUNK_CHARACTERS = 4 << 20
SHOWN = 60


@dataclass(frozen=True)
class BadText:
    """What stands in the place of a text that there is not."""

    reason: str


MISSING = object()


@dataclass(frozen=True)
class Chunk:
    """Rows that follow each other. What is kept of them: named values, or a batch with types of its own."""

    texts: list[str | BadText]
    kept: list[dict[str, Any]] | pa.RecordBatch


def read_chunks(unit: Unit, column: str, keep: Sequence[str] | None) -> Iterator[Chunk]:
    """All the rows of a unit, at least one chunk; raises BulkError, naming the file, where it cannot be read."""
    reader = _read_parquet if unit.kind == "parquet" else _read_text
    try:
        yield from reader(unit, column, keep)
    except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise BulkError(f"{unit.file} cannot be read: {error}") from error


def check_columns(file: str, names: Sequence[str], column: str, keep: Sequence[str] | None) -> None:
    """Raises BulkError for a column that the file lacks, one that it has twice, and one whose name is not UTF-8."""
    if lacking := [name for name in (column, *(keep or ())) if name not in names]:
        raise BulkError(f"{file}: no column {lacking[0]!r}, only {', '.join(map(repr, names))}")
    if len(set(names)) < len(names):
        raise BulkError(f"{file}: two columns have the same name: {', '.join(map(repr, names))}")
    if unwritable := [name for name in names if not is_unicode(name)]:
        raise BulkError(f"{file}: the name of the column {_mended(unwritable[0])!r} is not UTF-8")


def column_names(unit: Unit) -> list[str] | None:
    """The columns of a CSV or parquet file, from its head; None where rows name their own."""
    if unit.kind == "parquet":
        import pyarrow.parquet as pq

        return list(pq.read_schema(unit.file).names)
    return next(csv.reader(_decoded(_whole(unit))), []) if unit.kind == "csv" else None


def first_object(unit: Unit) -> dict[str, Any]:
    """The first row of JSON lines that is an object; an empty one where none is."""
    for line in _lines(unit):
        record = _parse(line)
        if isinstance(record, dict):
            return record
    return {}


def _read_parquet(unit: Unit, column: str, keep: Sequence[str] | None) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = None if keep is None else list(dict.fromkeys([column, *keep]))
    with pq.ParquetFile(unit.file) as file:
        groups = list(range(unit.start, unit.end))
        empty = True
        for batch in file.iter_batches(CHUNK_ROWS, row_groups=groups, columns=columns):
            empty = False
            texts = [_checked(text) for text in batch.column(column).to_pylist()]
            yield Chunk(texts, batch if keep is None else batch.select(list(keep)))
        if empty:
            nothing = pa.RecordBatch.from_pylist([], schema=file.schema_arrow)
            yield Chunk([], nothing if keep is None else nothing.select(list(keep)))


def _read_text(unit: Unit, column: str, keep: Sequence[str] | None) -> Iterator[Chunk]:
    rows = {"jsonl": _json_rows, "csv": _csv_rows, "txt": _plain_rows}[unit.kind](unit, column)
    texts: list[str | BadText] = []
    kept: list[dict[str, Any]] = []
    characters = 0
    for row, text in rows:
        texts.append(text)
        kept.append(row if keep is None else {name: row[name] for name in keep if name in row})
        characters += len(text) if isinstance(text, str) else 0
        if len(texts) == CHUNK_ROWS or characters > CHUNK_CHARACTERS:
            yield Chunk(texts, kept)
            texts, kept, characters = [], [], 0
    yield Chunk(texts, kept)


Row = tuple[dict[str, Any], str | BadText]


def _json_rows(unit: Unit, column: str) -> Iterator[Row]:
    for line in _lines(unit):
        if not line.strip():
            continue
        record = _parse(line)
        if isinstance(record, BadText):
            yield {}, record
        elif isinstance(record, dict):
            yield record, _checked(record.get(column, MISSING), column)
        else:
            yield {}, BadText(f"not a JSON object: {_beginning(line)}")


def _csv_rows(unit: Unit, column: str) -> Iterator[Row]:
    names = column_names(unit) or []
    rows = csv.reader(_decoded(_lines(unit)))
    if unit.start == 0:
        next(rows, None)  # the head
    place = names.index(column)
    for fields in rows:
        if not fields:
            continue
        row = dict(zip(names, map(_mended, fields), strict=False))
        if len(fields) != len(names):
            yield row, BadText(f"{len(fields)} fields in place of {len(names)}")
        else:
            yield row, _checked(fields[place], encoding="not UTF-8")


def _plain_rows(unit: Unit, column: str) -> Iterator[Row]:
    for line in _decoded(_lines(unit)):
        text = line.rstrip("\r\n")
        yield {column: _mended(text)}, _checked(text, encoding="not UTF-8")


def _checked(value: object, column: str = "", encoding: str = "not Unicode: half of a surrogate pair") -> str | BadText:
    """A text as it is, or why it is none; the rules of a request's inputs."""
    if value is MISSING:
        return BadText(f"no column {column!r}")
    if value is None:
        return BadText("no text: null")
    if not isinstance(value, str):
        return BadText(f"not a text: {_beginning(str(value))}")
    if not value or value.isspace():
        return BadText("empty")
    return value if is_unicode(value) else BadText(encoding)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: not if it holds half of a surrogate pair."""
    return _mended(text) is text


def _mended(text: str) -> str:
    """The text itself, or where it cannot be written as UTF-8 one with question marks in those places."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        return BadText(f"not UTF-8: {_beginning(line)}")
    except (ValueError, RecursionError):
        return BadText(f"not JSON: {_beginning(line)}")


def _beginning(found: bytes | str) -> str:
    text = (found if isinstance(found, str) else found[: 4 * SHOWN].decode("utf-8", "replace")).strip()
    return _mended(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    """Lines of text in which bytes that are none are kept as halves of surrogate pairs, for their row to be refused."""
    return (line.decode("utf-8", "surrogateescape") for line in lines)


def _whole(unit: Unit) -> Iterator[bytes]:
    return _lines(Unit(file=unit.file, start=0, end=Path(unit.file).stat().st_size))


def _lines(unit: Unit) -> Iterator[bytes]:
    """The unit's lines with their ends; of a compressed file all, whatever the unit's bounds."""
    with gzip.open(unit.file) if unit.is_compressed else Path(unit.file).open("rb") as file:
        position = file.seek(unit.start)
        while unit.is_compressed or position < unit.end:
            line = file.readline(MAX_RECORD + 1)
            if len(line) > MAX_RECORD:
                raise BulkError(f"{unit.file}: the line at byte {position} is longer than {MAX_RECORD} bytes")
            if not line:
                return
            yield line.removeprefix(BOM) if position == 0 else line
            position += len(line)
