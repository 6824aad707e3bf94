"""Bundles are read whole and checked, or refused in one line that says why."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from service.bundle import MANIFEST, content_version, find_bundles, load_bundle, stored_files
from service.errors import BundleError
from tests import tiny


@pytest.fixture
def bundle_dir(models_dir: Path, tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    copy = tmp_path / "models" / "a-bundle"
    shutil.copytree(models_dir / f"{tiny.DATASET}-recurrent", copy)
    return copy


def change(bundle_dir: Path, *path: str | int, to: Any) -> None:
    """Sets one entry of the manifest, `path` leading to it."""
    file = bundle_dir / MANIFEST
    document = json.loads(file.read_text())
    inner = document
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = to
    file.write_text(json.dumps(document))


def refused(bundle_dir: Path) -> str:
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle_dir)
    message = str(caught.value)
    assert "\n" not in message
    assert str(bundle_dir) in message
    return message


def test_a_bundle_reads_back(models_dir: Path) -> None:
    for path in find_bundles(models_dir):
        bundle = load_bundle(path)
        assert bundle.id == f"{path.name}@{bundle.manifest.version}"
        assert len(bundle.tokenizer.encode("a wonderful film " * 100).ids) > tiny.MAX_TOKENS  # the service cuts, it not


def test_every_file_but_the_manifest_is_vouched_for(models_dir: Path) -> None:
    for path in find_bundles(models_dir):
        named = {stored.file for stored in stored_files(load_bundle(path).manifest)}
        there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert there == named | {MANIFEST}


@pytest.mark.parametrize("file", ["int8/step.onnx", "fp16/embed.onnx", "fp16/portable.onnx", "tokenizer.json"])
def test_one_wrong_byte_is_found(bundle_dir: Path, file: str) -> None:
    content = bytearray((bundle_dir / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_dir / file).write_bytes(content)
    assert f"{file} is damaged" in refused(bundle_dir)


@pytest.mark.parametrize("file", ["int8/step.onnx", "tokenizer.json", MANIFEST])
def test_a_file_that_is_missing_is_named(bundle_dir: Path, file: str) -> None:
    (bundle_dir / file).unlink()
    assert refused(bundle_dir).endswith(f"{file} cannot be read: No such file or directory")


def test_a_cut_file_is_found(bundle_dir: Path) -> None:
    file = bundle_dir / "fp16/step.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    assert "fp16/step.onnx is damaged" in refused(bundle_dir)


def test_a_hash_that_is_not_the_files_is_found(bundle_dir: Path) -> None:
    change(bundle_dir, "precisions", "int8", "graphs", "step", "sha256", to="0" * 64)
    assert "the manifest says 000000000000" in refused(bundle_dir)


def test_a_version_that_does_not_follow_from_the_content_is_found(bundle_dir: Path) -> None:
    change(bundle_dir, "version", to="0123456789ab")
    assert "version 0123456789ab does not follow from its files" in refused(bundle_dir)


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        (["schema_version"], 2, "schema_version: Input should be 1"),
        (["surprise"], 1, "surprise: Extra inputs are not permitted"),
        (["precisions", "int8", "graphs", "step", "surprise"], 1, "precisions.int8.graphs.step.surprise: Extra"),
        (["precisions", "int4"], {}, "precisions.int4"),
        (["precisions"], {}, "precisions"),
        (["precisions", "int8", "graphs"], {}, "precisions.int8.graphs"),
        (["labels"], ["one"], "labels"),
        (["name"], "../name", "name"),
        (["iterations"], 0, "iterations"),
        (["version"], "0123456789AB", "version"),
    ],
)
def test_a_manifest_of_another_form_is_refused_with_the_field(
    bundle_dir: Path, path: list[str], to: object, said: str
) -> None:
    change(bundle_dir, *path, to=to)
    assert f"{MANIFEST}: {said}" in refused(bundle_dir)


@pytest.mark.parametrize(
    "file",
    ["../x.onnx", "/etc/x.onnx", "int8/../../x.onnx", "..", "a/b/x.onnx", "int8\\x.onnx", "x.onnx\n", "x.py", ""],
)
def test_no_file_lies_outside_the_bundle(bundle_dir: Path, file: str) -> None:
    shutil.copy(bundle_dir / "int8/step.onnx", bundle_dir.parent / "x.onnx")
    change(bundle_dir, "precisions", "int8", "graphs", "step", "file", to=file)
    assert "precisions.int8.graphs.step.file: String should match pattern" in refused(bundle_dir)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}"])
def test_a_manifest_that_is_none_is_refused(bundle_dir: Path, content: bytes) -> None:
    (bundle_dir / MANIFEST).write_bytes(content)
    refused(bundle_dir)


def test_a_tokenizer_that_is_none_is_refused(bundle_dir: Path) -> None:
    content = b'{"not": "a tokenizer"}'
    (bundle_dir / "tokenizer.json").write_bytes(content)
    change(bundle_dir, "tokenizer", "sha256", to=hashlib.sha256(content).hexdigest())
    document = json.loads((bundle_dir / MANIFEST).read_text())
    hashes = [document["tokenizer"]["sha256"]]
    for precision in document["precisions"].values():
        hashes += [graph["sha256"] for graph in (*precision["graphs"].values(), precision["portable"])]
    change(bundle_dir, "version", to=content_version(hashes))
    assert "tokenizer.json: not a tokenizer" in refused(bundle_dir)


def test_the_version_is_the_contents_and_not_the_orders() -> None:
    assert content_version(["a" * 64, "b" * 64]) == content_version(["b" * 64, "a" * 64])
    assert content_version(["a" * 64, "b" * 64]) != content_version(["a" * 64, "c" * 64])


def test_where_there_is_no_bundle_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"does not exist$"):
        find_bundles(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=rf"^no bundle in {tmp_path}"):
        find_bundles(tmp_path)


def test_a_half_written_bundle_is_not_found(models_dir: Path, tmp_path: Path) -> None:
    for name in ("whole", ".whole.partial", ".whole.old"):
        shutil.copytree(models_dir / f"{tiny.DATASET}-baseline", tmp_path / name)
    assert find_bundles(tmp_path) == [tmp_path / "whole"]


def test_the_name_of_a_special_token_in_a_text_is_only_letters(models_dir: Path) -> None:
    encoded = load_bundle(models_dir / f"{tiny.DATASET}-recurrent").tokenizer.encode("[CLS] a [MASK] film [PAD]")
    assert encoded.tokens[0] == "[CLS]"
    assert not {"[CLS]", "[MASK]", "[PAD]"} & set(encoded.tokens[1:])
