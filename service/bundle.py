"""A bundle: the directory that is served, read with every hash checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError
from tokenizers import Tokenizer

from service.errors import BundleError
from service.manifest import Manifest, StoredFile, content_version, first_problem, stored_files
from service.words import WordIds, word_ids

MANIFEST = "manifest.json"
VISIBLE = "[!.@$]*"  # hidden: an export is at work, or a file system's own
NO_BUNDLES = ("lost+found", "System Volume Information")  # of a volume's own


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    path: Path
    manifest: Manifest
    tokenizer: Tokenizer

    @cached_property
    def words(self) -> WordIds | None:
        """For plain texts a faster way to the same ids, if there is one."""
        return word_ids(self.tokenizer)

    @property
    def id(self) -> str:
        """Name and version, as answers show it."""
        return f"{self.manifest.name}@{self.manifest.version}"


def find_bundles(models_dir: Path) -> list[Path]:
    """The directories in `models_dir`, by name; BundleError where there is none, or one holds no manifest.

    One that is passed over would be a model that is gone, and no word said: a copy begun, or half deleted.
    """
    try:
        if not models_dir.is_dir():
            raise BundleError(f"the models directory {models_dir} does not exist")
        there = sorted(path for path in models_dir.glob(VISIBLE) if path.name not in NO_BUNDLES)
        found = [path for path in there if path.is_dir() or not path.exists()]  # a link into nowhere was a bundle once
        half = [path for path in found if not (path / MANIFEST).is_file()]
    except OSError as error:
        raise BundleError(f"{error.filename or models_dir} cannot be read: {error.strerror}") from error
    if half:
        raise BundleError(f"{half[0]} is no bundle, or half of one: it holds no {MANIFEST}; complete it or take it out")
    if not found:
        raise BundleError(f"no bundle in {models_dir}: there is no directory in it")
    return found


def load_bundle(path: Path) -> Bundle:
    """Reads a bundle and checks its schema, every file's hash and its version; BundleError says what does not match."""
    manifest = _read_manifest(path / MANIFEST)
    for stored in stored_files(manifest):
        _verify(path, stored)
    version = content_version(manifest)
    if version != manifest.version:
        raise BundleError(f"{path / MANIFEST}: version {manifest.version} does not follow from its content ({version})")
    try:
        tokenizer = Tokenizer.from_file(str(path / manifest.tokenizer.file))
    except Exception as error:  # the library raises bare Exception
        raise BundleError(f"{path / manifest.tokenizer.file}: not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "[MASK]" in somebody's text is those letters, not the token
    return Bundle(path, manifest, tokenizer)


def _read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)} (problems in all: {error.error_count()})") from error


def _verify(bundle: Path, stored: StoredFile) -> None:
    path = bundle / stored.file
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    if found != stored.sha256:
        raise BundleError(f"{path} is damaged: its SHA-256 begins {found[:12]}, the manifest says {stored.sha256[:12]}")
