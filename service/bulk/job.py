"""The job file: what was asked of which files, cut into which units. It is what makes a job go on where it was."""

from __future__ import annotations

import csv
import fcntl
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from service.bulk.rows import check_columns, column_names, first_object, is_unicode
from service.bulk.shards import REST, Columns, Format
from service.bulk.units import InputFile, Unit, cut_into_units, find_files
from service.errors import BulkError
from service.schemas import Options

JOB_FILE = "job.json"
LOCK_FILE = ".lock"
OURS = ("part-*.jsonl", "part-*.parquet", ".part-*.tmp", f".{JOB_FILE}.*.tmp", JOB_FILE)
UNITS = 256
"""About so many units are made of a job, as long as their size stays between the two below."""
SMALLEST_UNIT, LARGEST_UNIT = 256 << 10, 64 << 20


class Asked(BaseModel):
    """What decides a job's answers and shards; a job goes on only under the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """the bundle's name and version"""
    provider: Literal["cpu", "cuda"]
    precision: Literal["fp32", "fp16", "int8"]
    options: Options
    column: str
    keep: list[str] | None
    """None: all columns"""
    format: Format
    shard_bytes: int | None
    """None: by the size of the input"""
    files: list[InputFile]


class Job(BaseModel):
    """The job file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[2] = 2
    asked: Asked
    columns: list[str | None]
    """of rows that bring no types, as parquet needs them, None for the one that holds the rest; empty for other rows"""
    units: list[Unit]

    def shard(self, number: int) -> str:
        """The file name of one unit's answers; the order of names is the order of the rows."""
        return f"part-{number:06}.{self.asked.format}"

    def missing(self, out: Path) -> list[int]:
        """Units whose shard is not there yet."""
        return [number for number in range(len(self.units)) if not (out / self.shard(number)).is_file()]


def list_files(asked: str, out: Path) -> list[InputFile]:
    """The input's files; raises BulkError, also where the shards would be among them."""
    files = find_files(asked)
    inside = Path(asked).is_dir() and out.resolve().is_relative_to(Path(asked).resolve())
    if inside:
        raise BulkError(f"{out} lies in {asked}: the next run would read the shards of this one")
    return files


def make_job(asked: Asked) -> Job:
    """Cuts the input into units and checks its columns; raises BulkError, naming the file that is wrong."""
    total = sum(file.bytes for file in asked.files)
    by_size = min(max(total // UNITS, SMALLEST_UNIT), LARGEST_UNIT)
    units = cut_into_units(asked.files, asked.shard_bytes or by_size)
    columns = {unit.file: _columns(unit, asked) for unit in reversed(units)}  # reversed: the first unit of each stays
    first = columns[units[0].file] if units else []
    return Job(asked=asked, columns=list(first), units=units)


def _columns(unit: Unit, asked: Asked) -> Columns:
    """The columns that rows without types are written to."""
    try:
        names = [asked.column] if unit.kind == "txt" else column_names(unit)
        if names is not None:
            check_columns(unit.file, names, asked.column, asked.keep)
            return [] if unit.kind == "parquet" else names if asked.keep is None else asked.keep
        own = [name for name in first_object(unit) if name != REST and is_unicode(name)]
        return [*own, None] if asked.keep is None else asked.keep
    except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:
        raise BulkError(f"{unit.file} cannot be read: {error}") from error


def open_job(asked: Asked, out: Path, *, overwrite: bool) -> Job:
    """The job in `out`, or a new one there; raises BulkError where another one is, or something that is no job."""
    path = out / JOB_FILE
    if path.exists() and not overwrite:
        job = read_job(out)
        if difference := _difference(job.asked, asked):
            raise BulkError(f"{out} holds another job: {difference}. --overwrite begins anew, another folder as well")
        _remove(out, OURS[2:4])
        return job
    if not path.exists() and (foreign := [name for name in out.iterdir() if name.name != LOCK_FILE]):
        raise BulkError(f"{out} holds {foreign[0].name} but no {JOB_FILE}: choose a folder that is empty or new")
    job = make_job(asked)
    path.unlink(missing_ok=True)  # first: without it no shard counts
    _remove(out, OURS)
    aside = out / f".{JOB_FILE}.{uuid4().hex}.tmp"
    aside.write_text(job.model_dump_json())
    aside.replace(path)
    return job


def read_job(out: Path) -> Job:
    """The job file of a folder; raises BulkError."""
    try:
        return Job.model_validate_json((out / JOB_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise BulkError(f"{out / JOB_FILE} is no job file of this release; --overwrite begins anew") from error


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Makes the folder, and keeps a second run out of it; raises BulkError for the second."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK_FILE).open("w")
    except OSError as error:
        raise BulkError(f"{out} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BulkError(f"{out}: another run is at work there") from None
        yield


def _remove(out: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def _difference(before: Asked, now: Asked) -> str | None:
    """What is not as it was, in words."""
    was, today = _flat(before), _flat(now)
    for name in was:
        if was[name] != today[name]:
            return f"{name} was {was[name]!r}, now it is {today[name]!r}"
    known, found = {file.path: file for file in before.files}, {file.path: file for file in now.files}
    for path in sorted(known.keys() | found.keys()):
        if path not in found or path not in known:
            return f"{path} is {'gone' if path in known else 'new'}"
        if known[path] != found[path]:
            return f"{path} has changed since"
    return None


def _flat(asked: Asked) -> dict[str, Any]:
    fields = asked.model_dump(exclude={"files", "options"})
    return fields | asked.options.model_dump()
