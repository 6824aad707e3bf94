"""Bundles are read whole and checked, or refused in one line that says why."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from service.bundle import MANIFEST, find_bundles, load_bundle
from service.errors import BundleError
from service.manifest import Manifest, content_version, stored_files
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
        assert there == named | {MANIFEST, "README.md"}  # the card, which nothing reads


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
    assert "version 0123456789ab does not follow from its content" in refused(bundle_dir)


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (["task"], "another"),
        (["architecture"], "another"),
        (["labels"], ["positive", "negative"]),
        (["max_tokens"], 39),
        (["tail_tokens"], 1),
        (["calibration", "temperatures", 1], 1.2345),
        (["calibration", "exit_threshold"], 0.9876),
    ],
)
def test_whoever_changes_an_answer_by_hand_is_refused_for_the_version(
    bundle_dir: Path, path: list[str | int], to: object
) -> None:
    change(bundle_dir, *path, to=to)
    assert "does not follow from its content" in refused(bundle_dir)


def test_iterations_and_their_temperatures_belong_to_the_version(bundle_dir: Path) -> None:
    change(bundle_dir, "calibration", "temperatures", to=[1.0, 1.0, 1.0])
    assert "calibration.temperatures has 3 of them, the model 2 iterations" in refused(bundle_dir)
    change(bundle_dir, "iterations", to=3)
    assert "does not follow from its content" in refused(bundle_dir)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_another_file_with_its_hash_is_another_version(bundle_dir: Path, precision: str) -> None:
    content = (bundle_dir / precision / "step.onnx").read_bytes() + b"and more"
    (bundle_dir / precision / "step.onnx").write_bytes(content)
    change(bundle_dir, "precisions", precision, "graphs", "step", "sha256", to=hashlib.sha256(content).hexdigest())
    assert "does not follow from its content" in refused(bundle_dir)


def test_two_graphs_that_change_places_are_another_version(bundle_dir: Path) -> None:
    precisions = json.loads((bundle_dir / MANIFEST).read_text())["precisions"]
    change(bundle_dir, "precisions", to={"fp16": precisions["int8"], "int8": precisions["fp16"]})
    assert "does not follow from its content" in refused(bundle_dir)


def test_where_a_bundle_comes_from_and_how_good_it_is_leaves_the_version(bundle_dir: Path) -> None:
    document = json.loads((bundle_dir / MANIFEST).read_text())
    change(bundle_dir, "training", "commit", to="0123456789ab")
    change(bundle_dir, "calibration", "texts", to=41)
    assert load_bundle(bundle_dir).manifest.version == document["version"]


def test_a_bundle_of_another_schema_is_refused_with_what_to_do(bundle_dir: Path) -> None:
    document = json.loads((bundle_dir / MANIFEST).read_text())
    del document["calibration"]
    (bundle_dir / MANIFEST).write_text(json.dumps(document | {"schema_version": 1}))
    said = "schema_version: the bundle's is 1, this release reads 4: export its run again"
    assert f"{MANIFEST}: {said}" in refused(bundle_dir)


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        (["schema_version"], 5, "schema_version: the bundle's is 5, this release reads 4"),
        (["max_tokens"], 10**9, "max_tokens: Input should be less than or equal to 8192"),
        (["tail_tokens"], 40, "the document: Value error, tail_tokens is 40: less than max_tokens, 40, is needed"),
        (["surprise"], 1, "surprise: Extra inputs are not permitted"),
        (["precisions", "int8", "graphs", "step", "surprise"], 1, "precisions.int8.graphs.step.surprise: Extra"),
        (["precisions", "int4"], {}, "precisions.int4"),
        (["precisions"], {}, "precisions"),
        (["precisions", "int8", "graphs"], {}, "precisions.int8.graphs"),
        (["labels"], ["one"], "labels"),
        (["labels"], ["one", "one"], "labels: Value error, each label comes once"),
        (["name"], "../name", "name"),
        (["iterations"], 0, "iterations"),
        (["calibration"], None, "calibration: Input should be"),
        (["calibration", "temperatures"], [], "calibration.temperatures"),
        (["calibration", "temperatures", 0], 0, "calibration.temperatures.0"),
        (["calibration", "temperatures", 0], -1.0, "calibration.temperatures.0"),
        (["calibration", "temperatures", 0], 1e-300, "calibration.temperatures.0"),
        (["calibration", "temperatures", 0], float("inf"), "calibration.temperatures.0"),
        (["calibration", "temperatures", 1], float("nan"), "calibration.temperatures.1"),
        (["calibration", "temperatures", 1], "1.5", "calibration.temperatures.1"),
        (["calibration", "temperatures", 1], True, "calibration.temperatures.1"),
        (["calibration", "exit_threshold"], 0, "calibration.exit_threshold"),
        (["calibration", "exit_threshold"], 1, "calibration.exit_threshold"),
        (["calibration", "exit_threshold"], "0.9", "calibration.exit_threshold"),
        (["version"], "0123456789AB", "version"),
    ],
)
def test_a_manifest_of_another_form_is_refused_with_the_field(
    bundle_dir: Path, path: list[str | int], to: object, said: str
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
    manifest = Manifest.model_validate_json((bundle_dir / MANIFEST).read_bytes())
    change(bundle_dir, "version", to=content_version(manifest))
    assert "tokenizer.json: not a tokenizer" in refused(bundle_dir)


def test_the_version_is_the_contents_and_not_the_orders(bundle_dir: Path) -> None:
    document = json.loads((bundle_dir / MANIFEST).read_text())
    document["precisions"] = dict(reversed(document["precisions"].items()))
    (bundle_dir / MANIFEST).write_text(json.dumps(document, sort_keys=True))
    assert load_bundle(bundle_dir).manifest.version == document["version"]


def test_where_there_is_no_bundle_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"does not exist$"):
        find_bundles(tmp_path / "nowhere")
    (tmp_path / "lost+found").mkdir()
    with pytest.raises(BundleError, match=rf"^no bundle in {tmp_path}"):
        find_bundles(tmp_path)
    with pytest.raises(BundleError, match=r"cannot be read: File name too long$"):
        find_bundles(tmp_path / ("a" * 300))


def test_a_link_into_nowhere_was_a_bundle_once(models_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(models_dir / f"{tiny.DATASET}-baseline", tmp_path / "whole")
    (tmp_path / "gone").symlink_to("releases/41")
    with pytest.raises(BundleError, match=r"/gone is no bundle"):
        find_bundles(tmp_path)


@pytest.mark.parametrize("dangling", [False, True])
def test_half_of_a_bundle_is_said_and_not_passed_over(models_dir: Path, tmp_path: Path, dangling: bool) -> None:
    for name in ("half", "whole"):
        shutil.copytree(models_dir / f"{tiny.DATASET}-baseline", tmp_path / name)
    (tmp_path / "README.md").write_text("which is no bundle, and no matter")
    assert len(find_bundles(tmp_path)) == 2
    (tmp_path / "half" / MANIFEST).unlink()
    if dangling:
        (tmp_path / "half" / MANIFEST).symlink_to("nowhere")
    with pytest.raises(BundleError, match=r"/half is no bundle, or half of one: it holds no manifest\.json"):
        find_bundles(tmp_path)


def test_what_an_export_is_writing_is_not_found(models_dir: Path, tmp_path: Path) -> None:
    for name in ("whole", ".whole.partial", ".whole.old"):
        shutil.copytree(models_dir / f"{tiny.DATASET}-baseline", tmp_path / name)
    assert find_bundles(tmp_path) == [tmp_path / "whole"]


def test_the_name_of_a_special_token_in_a_text_is_only_letters(models_dir: Path) -> None:
    encoded = load_bundle(models_dir / f"{tiny.DATASET}-recurrent").tokenizer.encode("[CLS] a [MASK] film [PAD]")
    assert encoded.tokens[0] == "[CLS]"
    assert not {"[CLS]", "[MASK]", "[PAD]"} & set(encoded.tokens[1:])
