"""Reads labelled texts from local files and from the hub; every complaint names the file and the row."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from training.errors import TrainingError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
SMALLEST_SPLIT = 4
MOST_DIGITS = 9
"""Of a label's number."""
SHOWN = 48
"""Characters of a label in a complaint."""
LONGEST_FIELD = 2**31 - 1
"""Characters in a field of a CSV file; the library's own 131,072 are fewer than some texts have."""
UNDECODED = re.compile("[\ufffd\ud800-\udfff]")
"""What a failed decoding leaves behind: the replacement character, or half of a surrogate pair (JSON can spell one)."""


@dataclass(frozen=True)
class Examples:
    """Texts and, at the same index, the number of each one's label."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def pick(self, indices: Iterable[int]) -> "Examples":
        chosen = list(indices)
        return Examples([self.texts[i] for i in chosen], [self.labels[i] for i in chosen])


@dataclass(frozen=True)
class Columns:
    """Where a record keeps its text and label. The first text column that a file has is taken."""

    text: tuple[str, ...] = ("text", "sentence", "content")
    label: str = "label"
    body_start: str = "body_start"
    """Offset at which the text proper begins, where a file has that column (20 Newsgroups: headers leak the label)."""
    drop_empty: bool = False


def find_split(folder: Path, split: str) -> Path | None:
    """The one file of `folder` that holds a split; more than one is an error."""
    found = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        raise TrainingError(f"{folder}: more than one file for split '{split}': {', '.join(p.name for p in found)}")
    return found[0] if found else None


def read_examples(path: Path, labels: Sequence[str], columns: Columns) -> Examples:
    """Every row of a file as examples of the given labels (by name, or by number in their order)."""
    return collect(read_records(path), str(path), labels, columns)


def label_names(path: Path, column: str) -> list[str]:
    """The distinct labels of a file, sorted: what a data set that we don't know by name decides between."""
    return sorted({str(record[column]) for record in read_records(path) if not _is_empty(record.get(column))})


def _is_empty(label: object) -> bool:
    """What an empty cell of a table comes as: nothing, blanks, or the number that equals no number."""
    return label is None or label != label or not str(label).strip()


def collect(records: Iterable[Mapping[str, Any]], source: str, labels: Sequence[str], columns: Columns) -> Examples:
    """Checks each record; `source` names where they come from, rows count from 1."""
    texts: list[str] = []
    numbers: list[int] = []
    for row, record in enumerate(records, start=1):
        where = f"{source}, row {row}"
        text, number = _text(record, columns, where), _label(record, columns.label, labels, where)
        if not text.strip():
            if columns.drop_empty:
                continue
            raise TrainingError(f"{where}: the text is empty")
        texts.append(text)
        numbers.append(number)
    if len(texts) < SMALLEST_SPLIT:
        raise TrainingError(f"{source}: {len(texts)} usable rows, at least {SMALLEST_SPLIT} are needed")
    return Examples(texts, numbers)


def _text(record: Mapping[str, Any], columns: Columns, where: str) -> str:
    column = next((name for name in columns.text if name in record), None)
    if column is None:
        raise TrainingError(f"{where}: no text column ({' or '.join(columns.text)}); it has {', '.join(record)}")
    text = record[column]
    if not isinstance(text, str):
        raise TrainingError(f"{where}: column '{column}' holds {type(text).__name__}, not text")
    if broken := UNDECODED.search(text):
        raise TrainingError(
            f"{where}: the text holds U+{ord(broken[0]):04X}, left by a failed decoding; re-read its source as UTF-8"
        )
    return text[_offset(record, columns.body_start, where) :]


def _offset(record: Mapping[str, Any], column: str, where: str) -> int:
    value = record.get(column, 0)
    try:
        offset = int(value)
    except (TypeError, ValueError, OverflowError):
        offset = -1
    if offset < 0:
        raise TrainingError(f"{where}: column '{column}' holds {value!r}, not a number of characters")
    return offset


def _label(record: Mapping[str, Any], column: str, labels: Sequence[str], where: str) -> int:
    if column not in record:
        raise TrainingError(f"{where}: no column '{column}'; it has {', '.join(record)}")
    if _is_empty(record[column]):
        raise TrainingError(f"{where}: the label is empty")
    value = str(record[column])
    if value in labels:
        return labels.index(value)
    numbered = not any(label.isdecimal() for label in labels)  # else the numbers are names, and stand for themselves
    if numbered and value.isdecimal() and len(value) <= MOST_DIGITS and int(value) < len(labels):
        return int(value)
    or_number = f" (or 0 to {len(labels) - 1})" if numbered else ""
    shown = repr(value) if len(value) <= SHOWN else f"{value!r:.{SHOWN}}..."
    raise TrainingError(f"{where}: unknown label {shown}; known: {', '.join(labels)}{or_number}")


def read_records(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a JSON Lines, CSV, TSV (each also gzipped) or Parquet file."""
    if path.suffix == ".parquet":
        yield from _parquet_records(path)
        return
    if not path.name.endswith(SUFFIXES):
        raise TrainingError(f"{path}: the name must end in {', '.join(SUFFIXES)}")
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    with _open(path) as stream:
        lines = _decoded(stream, path)
        if kind == "jsonl":
            yield from (_json_record(line, f"{path}, row {row}") for row, line in enumerate(lines, start=1))
        else:
            yield from _separated_records(lines, "," if kind == "csv" else "\t", path)


def _open(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read: {error.strerror}") from error


def _decoded(stream: Iterable[bytes], path: Path) -> Iterator[str]:
    row = 0
    try:
        for row, line in enumerate(stream, start=1):  # the handler names the row
            yield line.decode("utf-8-sig" if row == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path}, line {row}: not UTF-8 (byte {error.start}: {error.reason})") from error
    except (EOFError, OSError, zlib.error) as error:
        raise TrainingError(f"{path}, after line {row}: cannot be read: {error}") from error


def _separated_records(lines: Iterator[str], delimiter: str, path: Path) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(LONGEST_FIELD)  # of the whole process, as the library has it
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header, rows = next(reader, []), (row for row in reader if row)
        for number, row in enumerate(rows, start=1):
            if len(row) != len(header):
                raise TrainingError(f"{path}, row {number}: {len(row)} columns, the header has {len(header)}")
            if delimiter == "\t" and any("\t" in field and "\n" in field for field in row):
                raise TrainingError(
                    f"{path}, line {reader.line_num}: a quotation mark opened a field that runs over tabs and lines; "
                    'a text that begins with one is quoted as a whole, its marks doubled: """so it goes"", he said"'
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise TrainingError(f"{path}, line {reader.line_num}: broken CSV: {error}") from error


def _json_record(line: str, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise TrainingError(f"{where}: a JSON object is needed, not {type(record).__name__}")
    return record


def _parquet_records(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet  # heavy, and only this format needs it

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise TrainingError(f"{path}: not a readable Parquet file: {error}") from error
