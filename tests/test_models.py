"""The bundles that ship with this repository keep what the README and the manifests say of them."""

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
from fastapi.testclient import TestClient

from model_export.ops import register_schemas
from service.app import create_app
from service.bundle import Bundle, load_bundle
from service.engine import CPU, CUDA, Provider, choose_precision, choose_provider
from service.settings import Settings
from tests.service.fakes import wait_until

MODELS = Path(__file__).parent.parent / "models"
PARAMETERS = {"recurrent": 3.4e6, "baseline": 9.8e6}
PRECISIONS = {"sentiment": {"fp16", "int8"}, "domain": {"int8"}}
FLOORS = {"sentiment": 0.90, "domain": 0.92}


@pytest.fixture(scope="module", params=[f"{task}-{name}" for task in PRECISIONS for name in PARAMETERS])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return load_bundle(MODELS / request.param)


def test_together_they_are_small() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 60e6


def test_parameters_are_those_of_the_design(bundle: Bundle) -> None:
    assert bundle.manifest.parameters == pytest.approx(PARAMETERS[bundle.manifest.architecture], rel=0.02)


@pytest.mark.parametrize("asked", ["auto", "cuda"])  # cuda is what compose and Kubernetes set where there is a GPU
def test_a_machine_with_a_gpu_loads_them_all(bundle: Bundle, asked: Provider) -> None:
    provider = choose_provider(bundle.manifest, asked, "auto", [CUDA, CPU])
    precision, _ = choose_precision(bundle.manifest, provider, "auto")
    assert (provider, precision) == {"sentiment": ("cuda", "fp32"), "domain": ("cpu", "int8")}[bundle.manifest.task]


def test_accuracy_holds_in_every_precision(bundle: Bundle) -> None:
    task, quality = bundle.manifest.task, bundle.manifest.quality["validation"]
    assert set(quality) == {"fp32"} | PRECISIONS[task] == {"fp32"} | set(bundle.manifest.precisions)
    assert all(figures[-1].accuracy >= FLOORS[task] for figures in quality.values())
    found = [one for several in bundle.manifest.parity.against_fp32.values() for one in several]
    assert all(one.accuracy_lost <= 0.005 for one in found)
    assert bundle.manifest.parity.fp32_against_pytorch <= 1e-4


@pytest.mark.parametrize(
    ("sentence", "sort"),
    [
        ("The actors never find the comedy in this long, sentimental film.", "movies"),
        ("The waiter was rude and the pasta was cold.", "local business"),
        ("The battery died after a week, so I sent it back.", "online shopping"),
    ],
)
def test_the_sort_of_a_sentence_is_found_too(sentence: str, sort: str) -> None:
    with TestClient(create_app(Settings(models_dir=MODELS))) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        for architecture in PARAMETERS:
            asked = {"inputs": sentence, "task": "domain", "architecture": architecture}
            assert client.post("/classify", json=asked).json()["results"][0]["label"] == sort


def test_quality_is_told_as_it_was_written(bundle: Bundle) -> None:
    written = json.loads((bundle.path / "manifest.json").read_text())["quality"]
    assert (
        bundle.manifest.model_dump(mode="json")["quality"] == written
    )  # no null for what an older export did not tell


@pytest.mark.parametrize("role", ["embed", "step"])
def test_graphs_are_valid_and_run_with_nothing_registered(bundle: Bundle, role: str) -> None:
    register_schemas()
    for precision in bundle.manifest.precisions:
        check_graph(bundle.path / precision / f"{role}.onnx", role)


def check_graph(path: Path, role: str) -> None:
    onnx.checker.check_model(str(path), full_check=True)
    onnxruntime.InferenceSession(path)
    content = path.read_bytes()
    assert not any(trace in content for trace in (b".py", b"/home", b"/root", b"site-packages"))
    nodes = {(node.domain, node.op_type) for node in onnx.load(path).graph.node}
    if role == "step":
        assert {("refrain", "RMSNorm"), ("refrain", "RoPE")} <= nodes


def test_a_text_of_which_no_token_is_left_is_empty() -> None:
    with TestClient(create_app(Settings(models_dir=MODELS))) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, seconds=60)
        answer = client.post("/classify", json={"inputs": ["a film", "\u200b"]})
    assert (answer.status_code, answer.json()["code"], answer.json()["index"]) == (422, "input_empty", 1)


def test_probabilities_are_better_with_their_temperature_or_good_anyway_in_every_precision(bundle: Bundle) -> None:
    calibration = bundle.manifest.calibration
    assert set(calibration.ece) == {"fp32", *bundle.manifest.precisions}
    perfect = 0.025  # or better: what a model that is right about itself shows on 872 texts, simulated (docs/log.md)
    assert all(one.after < max(one.before, perfect) for found in calibration.ece.values() for one in found)


@pytest.mark.parametrize("task", PRECISIONS)
def test_leaving_early_by_default_saves_a_quarter_and_costs_nothing(task: str) -> None:
    calibration = load_bundle(MODELS / f"{task}-recurrent").manifest.calibration
    for points in calibration.exit_curve.values():
        (default,) = (point for point in points if point.threshold == calibration.exit_threshold)
        full_depth = points[-1]
        assert default.accuracy >= full_depth.accuracy - 0.002
        assert default.mean_iterations <= 0.75 * full_depth.mean_iterations
    assert load_bundle(MODELS / f"{task}-baseline").manifest.calibration.exit_threshold is None
