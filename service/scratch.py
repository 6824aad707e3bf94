"""A directory for the processes of one service to share, and the end of those whose service was killed before it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from service.errors import StartError

MEMORY = Path("/dev/shm")  # noqa: S108  # directories of our own are made in it
PREFIX = "refrain-"
OWNER = "owner"  # in each directory a file, locked for as long as the process lives that made it


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Make a directory, in memory where it can be, that is gone in the end; raises StartError.

    Those that killed services have left are removed first: a lock ends with its owner, however that ends.
    """
    try:  # in memory: often the only place to write in a container
        parent = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        for owner in parent.glob(f"{PREFIX}*/{OWNER}"):
            _remove_unless_owned(owner)
        directory, lock = _make(parent)
    except OSError as error:
        raise StartError(f"there is no directory to write metrics to, neither {MEMORY} nor TMPDIR: {error}") from None
    with lock:
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _make(parent: Path) -> tuple[Path, BinaryIO]:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        owner = directory / OWNER
        owner.touch()
        with suppress(FileNotFoundError):
            if (lock := _lock(owner)) is not None:
                return directory, lock
        # Another service, which starts just now, saw no owner yet and removes it.


def _remove_unless_owned(owner: Path) -> None:
    with suppress(OSError):  # somebody else's, or removed meanwhile
        if (lock := _lock(owner)) is not None:
            with lock:
                shutil.rmtree(owner.parent, ignore_errors=True)


def _lock(owner: Path) -> BinaryIO | None:
    """Open and lock a file; None where another process holds it, or has removed it meanwhile."""
    lock = owner.open("rb+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held = False
    else:
        held = os.fstat(lock.fileno()).st_nlink > 0
    if held:
        return lock
    lock.close()
    return None
