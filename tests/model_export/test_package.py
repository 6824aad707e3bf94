"""A run in, a bundle out: whole and right, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

import model_export.package
from model_export.__main__ import main
from model_export.errors import ExportError
from model_export.graphs import Graphs, to_fp16
from model_export.package import ExportOptions, export
from model_export.parity import Tolerances
from service.bundle import MANIFEST, Bundle, load_bundle
from service.engine import open_engine
from service.manifest import GraphRole
from tests import tiny
from tests.tiny import Architecture
from training.run import CONFIG, WEIGHTS, read_info, read_model
from training.shapes import Reading


def export_options(run: Path, out: Path, data_dir: Path, **changed: Any) -> ExportOptions:
    defaults: dict[str, Any] = {"precisions": ("fp16",), "portable": False, "tolerances": Tolerances()}
    return ExportOptions(run=run, out=out, data_dir=data_dir, **defaults | changed)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def altered_run(run: Path, to: Path, **config: Any) -> Path:
    """A copy of a run with other entries in its configuration."""
    shutil.copytree(run, to)
    (to / CONFIG).write_text(json.dumps(json.loads((to / CONFIG).read_text()) | config))
    return to


def negate_head(graphs: Graphs) -> dict[GraphRole, Any]:
    """FP16 graphs that always say the opposite."""
    found = to_fp16(graphs)
    for tensor in found["step"].graph.initializer:
        if "classify" in tensor.name:
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    return found


@pytest.fixture
def old_bundle(models_dir: Path, tmp_path: Path) -> Path:
    """A bundle that stands where another is to be written, with a file that no export writes."""
    out = tmp_path / "models" / f"{tiny.DATASET}-recurrent"
    shutil.copytree(models_dir / out.name, out)
    (out / "left-over").write_text("from before")
    return out


def test_the_manifest_says_all_that_is_promised(bundle: Bundle, run_dirs: Mapping[Architecture, Path]) -> None:
    manifest = bundle.manifest
    architecture: Architecture = "recurrent" if manifest.architecture == "recurrent" else "baseline"
    info, model = read_info(run_dirs[architecture]), read_model(run_dirs[architecture])
    iterations = 2 if architecture == "recurrent" else 1
    assert (manifest.name, manifest.task) == (bundle.path.name, tiny.DATASET)
    assert (manifest.labels, manifest.max_tokens, manifest.iterations) == (info.labels, tiny.MAX_TOKENS, iterations)
    assert manifest.parameters == sum(weight.numel() for weight in model.parameters())
    assert manifest.training.run_id == info.provenance["run_id"]
    assert manifest.training.texts == {"train": 80, "validation": 40}
    assert set(manifest.precisions) == set(manifest.parity.against_fp32) == {"fp16", "int8"}
    assert manifest.quality["validation"].keys() == {"fp32", "fp16", "int8"}
    assert all(len(found) == iterations for found in manifest.quality["validation"].values())
    assert 0 < manifest.parity.fp32_against_pytorch <= manifest.parity.fp32_tolerance == 1e-4
    found = [one for several in manifest.parity.against_fp32.values() for one in several]
    assert all((one.split, one.texts) == ("validation", 40) and one.labels_agree >= 0.98 for one in found)


def test_a_bundle_may_read_other_parts_of_a_text_than_its_run_did(
    run_dirs: Mapping[Architecture, Path], data_dir: Path, tmp_path: Path
) -> None:
    run, most = run_dirs["recurrent"], tiny.MAX_TOKENS + 24
    bundle = load_bundle(export(export_options(run, tmp_path / "out", data_dir, reading=Reading(most, 20))))
    assert (bundle.manifest.max_tokens, bundle.manifest.tail_tokens) == (most, 20)
    said = f"than {most} tokens only the first 44 and the last 20 count; in training it was the first 40, and 0.0% of"
    assert any(said in limit for limit in bundle.manifest.card.limits)
    model = read_model(run, Reading(most))
    ids = [place * 7 % model.config.vocabulary for place in range(most)]
    engine = open_engine(bundle, provider="cpu", precision="fp32", threads=1)
    (state_LD,), _ = engine.step(engine.embed([ids]))
    _, logits_BC = engine.step([state_LD])
    expected_RBC = model(torch.tensor([ids])).detach()
    assert logits_BC[0] == pytest.approx(expected_RBC[-1, 0].numpy(), abs=1e-2)  # the weights are FP16's
    assert bundle.manifest.quality["validation"]["fp16"][-1].accuracy >= 0.95


def test_an_export_keeps_how_a_run_reads_or_takes_what_it_is_told(
    run_dirs: Mapping[Architecture, Path], data_dir: Path, tmp_path: Path
) -> None:
    run = run_dirs["baseline"]
    reads_both_ends = altered_run(run, tmp_path / "run", encoder=read_info(run).encoder | {"tail_tokens": 7})
    command = [str(reads_both_ends), str(tmp_path / "out"), "--data-dir", str(data_dir), "--precisions", "fp16"]
    assert main(command) == 0
    assert load_bundle(tmp_path / "out").manifest.tail_tokens == 7
    assert main([*command, "--tail-tokens", "9"]) == 0
    manifest = load_bundle(tmp_path / "out").manifest
    assert manifest.tail_tokens == 9
    said = "only the first 31 and the last 9 count; in training it was the first 33 and the last 7, and"
    assert any(said in limit for limit in manifest.card.limits)


def test_the_tiny_models_have_learned_their_task(bundle: Bundle) -> None:
    for found in bundle.manifest.quality["validation"].values():
        assert found[-1].accuracy >= 0.95


def test_the_same_run_gives_the_same_version_in_place_of_the_old_bundle(
    run_dirs: Mapping[Architecture, Path], data_dir: Path, models_dir: Path, old_bundle: Path
) -> None:
    asked = export_options(run_dirs["recurrent"], old_bundle, data_dir, precisions=("fp16", "int8"), portable=True)
    assert export(asked) == old_bundle
    assert contents(old_bundle) == contents(models_dir / old_bundle.name)
    assert [path.name for path in old_bundle.parent.iterdir()] == [old_bundle.name]


def test_other_content_is_another_version(models_dir: Path) -> None:
    versions = {load_bundle(models_dir / f"{tiny.DATASET}-{name}").manifest.version for name in tiny.ARCHITECTURES}
    assert len(versions) == 2


def test_a_model_that_gives_no_numbers_is_not_exported_and_the_old_bundle_stands(
    run_dirs: Mapping[Architecture, Path], data_dir: Path, old_bundle: Path, tmp_path: Path
) -> None:
    broken = altered_run(run_dirs["recurrent"], tmp_path / "broken")
    weights = load_file(broken / WEIGHTS)
    weights["head.classify.bias"][0] = float("nan")
    save_file(weights, broken / WEIGHTS)
    before = contents(tmp_path)
    with pytest.raises(ExportError, match=r"^FP32 against PyTorch: the logits differ by up to nan, "):
        export(export_options(broken, old_bundle, data_dir))
    assert contents(tmp_path) == before


def test_a_precision_that_answers_otherwise_is_not_exported(
    run_dirs: Mapping[Architecture, Path], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_export.package, "to_fp16", negate_head)
    with pytest.raises(ExportError, match=r"^fp16 loses (1\.0|0\.9).* of accuracy on validation .*, the tolerance is"):
        export(export_options(run_dirs["baseline"], tmp_path / "out", data_dir))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"task": "My Reviews"}, r"^the manifest would not be valid: name: "),
        ({"labels": ["negative", "p" * 65]}, r"^the manifest would not be valid: labels\.1: "),
    ],
)
def test_a_task_or_label_that_no_bundle_may_have_is_said_before_anything_is_computed(
    config: dict[str, Any],
    complaint: str,
    run_dirs: Mapping[Architecture, Path],
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = altered_run(run_dirs["baseline"], tmp_path / "run", **config)
    monkeypatch.setattr(model_export.package, "export_graphs", lambda model: pytest.fail("said too late"))
    with pytest.raises(ExportError, match=complaint):
        export(export_options(run, tmp_path / "out", data_dir))
    assert not (tmp_path / "out").exists()


def test_the_card_names_the_data_of_earlier_runs_too(
    run_dirs: Mapping[Architecture, Path], data_dir: Path, tmp_path: Path
) -> None:
    provenance = read_info(run_dirs["baseline"]).provenance | {
        "learned_from": ["imdb", "sentiment", "sentences", tiny.DATASET],
        "language_models": ["some/language-model"],
    }
    run = altered_run(run_dirs["baseline"], tmp_path / "run", provenance=provenance)
    card = load_bundle(export(export_options(run, tmp_path / "out", data_dir))).manifest.card
    told = [(one.name, one.kind) for one in card.data]
    assert told.count(("imdb", "film reviews")) == told.count(("imdb", "sentences of film reviews")) == 1
    assert "film reviews" in card.limits[0]
    assert "the language model some/language-model" in card.limits[1]


def test_only_a_bundle_or_nothing_is_replaced(
    run_dirs: Mapping[Architecture, Path], data_dir: Path, tmp_path: Path
) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("precious")
    folder.mkdir()
    (folder / "precious").write_text("too")
    before = contents(tmp_path)
    for out in (file, folder):
        with pytest.raises(ExportError, match="exists and is not a bundle"):
            export(export_options(run_dirs["baseline"], out, data_dir))
    assert contents(tmp_path) == before


def test_a_bundle_of_another_task_is_not_replaced_but_a_broken_one_is(
    run_dirs: Mapping[Architecture, Path], data_dir: Path, tmp_path: Path
) -> None:
    out = export(export_options(run_dirs["baseline"], tmp_path / "out", data_dir))
    before = contents(out)
    other = altered_run(run_dirs["baseline"], tmp_path / "other", task="mood")
    with pytest.raises(ExportError, match=rf"out holds {tiny.DATASET}-baseline, which mood-baseline will not replace"):
        export(export_options(other, out, data_dir))
    assert contents(out) == before
    (out / MANIFEST).write_text("{")
    assert load_bundle(export(export_options(other, out, data_dir))).manifest.name == "mood-baseline"


def test_a_bundle_stays_when_its_successor_cannot_take_its_place(
    run_dirs: Mapping[Architecture, Path], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Ctrl-C comes between the two renames."""
    out = export(export_options(run_dirs["baseline"], tmp_path / "out", data_dir))
    before, rename = contents(tmp_path), Path.rename

    def stopped(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial") and path.is_dir():
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        export(export_options(run_dirs["baseline"], out, data_dir))
    assert contents(tmp_path) == before


def test_inspect_prints_what_is_in_a_bundle(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle.path)]) == 0
    printed = capsys.readouterr().out
    manifest = bundle.manifest
    for fact in (
        bundle.id,
        "negative, positive",
        f"{manifest.parameters:,} parameters",
        "ONNX opset 23, refrain 1",
        manifest.training.run_id,
        "portable",
        "ids int64[batch,length] -> hidden float[batch,length,32]",
        f"{manifest.parity.fp32_against_pytorch:.1e}",
    ):
        assert fact in printed
    assert printed.count(" MB ") == 6
    assert printed.count("accuracy at each iteration") == 3


def refused(arguments: list[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that fails."""
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("model_export: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_cannot_be_exported_is_said_in_one_line(
    run_dirs: Mapping[Architecture, Path], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out, data = run_dirs["baseline"], tmp_path / "out", ["--data-dir", data_dir]
    assert "is not a run directory" in refused([tmp_path, out, *data], capsys)
    assert "no folder" in refused([run, out, "--data-dir", tmp_path], capsys)
    assert "no precision" in refused([run, out, *data, "--precisions"], capsys)
    other = altered_run(run, tmp_path / "other", labels=["good", "bad"])
    assert "has labels negative, positive, the run good, bad" in refused([other, out, *data], capsys)
    assert not out.exists()


def test_ctrl_c_says_that_nothing_was_written_and_leaves_nothing(
    run_dirs: Mapping[Architecture, Path],
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_export.package, "to_fp16", stopped)
    assert main([str(run_dirs["baseline"]), str(tmp_path / "out"), "--data-dir", str(data_dir)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "model_export: stopped; nothing was written"
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_inspected_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "manifest.json cannot be read" in refused(["inspect", tmp_path], capsys)
