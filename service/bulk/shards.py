"""Shards, the files of answers: written aside and renamed, so that one that is there is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from uuid import uuid4

from service.bulk.rows import Chunk

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["jsonl", "parquet"]
MADE_WAY = "input_"
RESULT_FIELDS = ("label", "score", "scores", "iterations", "tokens", "truncated", "model", "error")
REST = "other_fields"
"""The column that holds, as JSON, what a row of JSON lines has beyond the columns."""
Columns = Sequence[str | None]
"""Names of columns; None stands for REST, which a column of the input may be called too."""


class Writer(Protocol):
    """Takes chunks and, for each of their rows, the result's fields."""

    def write(self, chunk: Chunk, fields: Sequence[dict[str, Any]]) -> None: ...
    def close(self) -> None: ...


@contextmanager
def new_shard(path: Path, form: Format, labels: Sequence[str], columns: Columns) -> Iterator[Writer]:
    """A writer whose file gets its name when all is written; `columns` are those of rows that bring no types."""
    aside = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    writer = JsonLinesWriter(aside) if form == "jsonl" else ParquetWriter(aside, labels, columns)
    try:
        yield writer
        writer.close()
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(path)
    finally:
        try:
            writer.close()  # which a full disk refuses once more
        finally:
            aside.unlink(missing_ok=True)


def kept_name(name: str) -> str:
    """A kept column's name in the shard: what a result's field is called makes way, and what it would meet there too.

    So answers can be classified again, and no two columns become one.
    """
    called = name
    while called.startswith(MADE_WAY):
        called = called.removeprefix(MADE_WAY)
    return MADE_WAY + name if called in RESULT_FIELDS else name


class JsonLinesWriter:
    """One JSON object for each row."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, chunk: Chunk, fields: Sequence[dict[str, Any]]) -> None:
        """Appends the rows."""
        rows = chunk.kept if isinstance(chunk.kept, list) else chunk.kept.to_pylist()
        for row, result in zip(rows, fields, strict=True):
            self._file.write(_json_line({kept_name(name): value for name, value in row.items()} | result))

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


class ParquetWriter:
    """Batches keep their types; values of rows without types become text, all but texts as JSON."""

    def __init__(self, path: Path, labels: Sequence[str], columns: Columns) -> None:
        import pyarrow as pa

        self._path, self._columns = path, columns
        self._results = pa.schema(
            [
                ("label", pa.string()),
                ("score", pa.float64()),
                ("scores", pa.struct([(label, pa.float64()) for label in labels])),
                ("iterations", pa.int32()),
                ("tokens", pa.int32()),
                ("truncated", pa.bool_()),
                ("model", pa.string()),
                ("error", pa.string()),
            ]
        )
        self._writer: Any = None

    def write(self, chunk: Chunk, fields: Sequence[dict[str, Any]]) -> None:
        """Appends the rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        kept = self._as_text(chunk.kept) if isinstance(chunk.kept, list) else pa.Table.from_batches([chunk.kept])
        columns = {kept_name(name): column for name, column in zip(kept.column_names, kept.columns, strict=True)}
        for field in self._results:
            columns[field.name] = pa.array([result[field.name] for result in fields], field.type)
        table = pa.table(columns)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()

    def _as_text(self, rows: list[dict[str, Any]]) -> pa.Table:
        import pyarrow as pa

        values = {name: [_as_text(row.get(name)) for row in rows] for name in self._columns if name is not None}
        if None in self._columns:
            rest = [{name: value for name, value in row.items() if name not in self._columns} for row in rows]
            values[REST] = [_as_text(beyond or None) for beyond in rest]
        return pa.table({name: pa.array(column, pa.string()) for name, column in values.items()})


def _json_line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return json.dumps(row, default=str).encode() + b"\n"


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode()
