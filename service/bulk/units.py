"""Which files a job reads, and how they are cut into units of work that are read apart from each other."""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict

from service.errors import BulkError

Kind = Literal["jsonl", "csv", "parquet", "txt"]
KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "txt"}
MAX_RECORD = 16 << 20
"""Bytes of the longest row; more means a quote that nobody closed, or no text file at all."""
BOM = b"\xef\xbb\xbf"

csv.field_size_limit(MAX_RECORD)


class InputFile(BaseModel):
    """A file and how to know it again; the time is its last change, in nanoseconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    bytes: int
    changed_ns: int


class Unit(BaseModel):
    """A part of a file: the bytes from `start` to `end`, both where rows begin; in a parquet file, row groups.

    What is compressed as a whole is one unit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    start: int
    end: int

    @property
    def kind(self) -> Kind:
        """How the file is written."""
        return kind_of(Path(self.file))

    @property
    def is_compressed(self) -> bool:
        """Whether the file is compressed as a whole."""
        return self.file.endswith(".gz")


def kind_of(path: Path) -> Kind:
    """How a file is written, by its name; raises BulkError."""
    name = path.name.removesuffix(".gz")
    kind = KINDS.get(Path(name).suffix)
    if kind is None or (kind == "parquet" and name != path.name):
        raise BulkError(f"{path}: the name must end in {', '.join(KINDS)}, all but parquet also with .gz")
    return kind


def find_files(asked: str) -> list[InputFile]:
    """The files of a path, a folder (those in it whose names end as they must) or a pattern, by name."""
    path = Path(asked)
    if path.is_dir():
        paths = [found for found in path.rglob("*") if _is_input(found, path)]
    else:
        paths = [path] if path.is_file() else [Path(found) for found in glob.glob(asked, recursive=True)]  # noqa: PTH207  # pathlib takes no absolute pattern
        paths = [found for found in paths if found.is_file()]
    if not paths and path.is_dir():
        raise BulkError(f"{asked}: no file there ends in {', '.join(KINDS)}")
    if not paths:
        raise BulkError(f"{asked}: there is no such file")
    kinds = {kind_of(found): found for found in sorted(paths)}
    if len(kinds) > 1:
        raise BulkError(f"{' and '.join(map(str, kinds.values()))} are written differently: make them two jobs")
    return [_known(found.resolve()) for found in sorted(paths)]


def _is_input(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    return not hidden and path.is_file() and Path(path.name.removesuffix(".gz")).suffix in KINDS


def _known(path: Path) -> InputFile:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise BulkError(f"{str(path)!a}: the file's name is not UTF-8: rename it") from None
    status = path.stat()
    return InputFile(path=str(path), bytes=status.st_size, changed_ns=status.st_mtime_ns)


def cut_into_units(files: Iterable[InputFile], unit_bytes: int) -> list[Unit]:
    """Units of about that many bytes, in the order of the rows; raises BulkError for a file that cannot be read."""
    units = []
    for file in files:
        try:
            bounds = [0, *_cuts(file, unit_bytes)]
        except (OSError, csv.Error, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise BulkError(f"{file.path} cannot be read: {error}") from error
        units += [Unit(file=file.path, start=start, end=end) for start, end in pairwise(bounds)]
    return units


def _cuts(file: InputFile, unit_bytes: int) -> list[int]:
    kind = kind_of(Path(file.path))
    if kind == "parquet":
        return list(_row_group_cuts(file.path, unit_bytes))
    if not file.bytes or file.path.endswith(".gz"):
        return [file.bytes] if file.bytes else []
    with Path(file.path).open("rb") as lines:
        inside = _record_cuts(lines, unit_bytes) if kind == "csv" else _line_cuts(lines, unit_bytes, file.bytes)
        return [*(cut for cut in inside if cut < file.bytes), file.bytes]


def _line_cuts(lines: BinaryIO, unit_bytes: int, size: int) -> Iterator[int]:
    """The first ends of lines behind every so many bytes: nothing between them is read."""
    end = 0
    while end + unit_bytes < size:
        lines.seek(end + unit_bytes - 1)
        if len(lines.readline(MAX_RECORD + 1)) > MAX_RECORD:
            raise BulkError(f"{lines.name}: the line after byte {end + unit_bytes} is longer than {MAX_RECORD} bytes")
        end = lines.tell()
        yield end


def _record_cuts(lines: BinaryIO, unit_bytes: int) -> Iterator[int]:
    """The same for CSV, where not every end of a line ends a row: all of it is read."""
    end = 0

    def counted() -> Iterator[str]:
        nonlocal end
        while line := lines.readline(MAX_RECORD + 1):
            if len(line) > MAX_RECORD:
                raise BulkError(f"{lines.name}: the line at byte {end} is longer than {MAX_RECORD} bytes")
            text = (line if end else line.removeprefix(BOM)).decode("utf-8", "surrogateescape")
            end += len(line)
            yield text

    began = 0
    for _ in csv.reader(counted()):
        if end - began >= unit_bytes:
            yield end
            began = end


def _row_group_cuts(path: str, unit_bytes: int) -> Iterator[int]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        gathered = 0
        groups = file.metadata.num_row_groups
        for group in range(groups):
            gathered += file.metadata.row_group(group).total_byte_size
            if gathered >= unit_bytes or group == groups - 1:
                gathered = 0
                yield group + 1
