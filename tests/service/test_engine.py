"""The engine: being batched changes nothing, and what is asked for is chosen or refused."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.bundle import find_bundles, load_bundle
from service.engine import CPU, CUDA, Engine, Precision, Provider, choose_precision, choose_provider, open_engine
from service.errors import BundleError, SettingsError
from service.manifest import Manifest, StoredPrecision
from tests import tiny

FloatArray = NDArray[np.float32]

SHIPPED = Path(__file__).resolve().parents[2] / "models"
TOLERANCE = 1e-5
DEPTH = 3  # one more than the recurrent model is trained for
SEVERAL = settings(max_examples=30)


@cache
def engine_of(path: Path, precision: Precision, threads: int) -> tuple[Engine, int, int]:
    """An engine, its vocabulary's size and its longest text."""
    bundle = load_bundle(path)
    engine = open_engine(bundle, provider="cpu", precision=precision, threads=threads)
    return engine, bundle.tokenizer.get_vocab_size(), bundle.manifest.max_tokens


def run(engine: Engine, texts: Sequence[Sequence[int]]) -> FloatArray:
    """The logits of every iteration, (iterations, texts, classes)."""
    hidden, logits = engine.embed(texts), []
    for _ in range(DEPTH):
        hidden, logits_BC = engine.step(hidden)
        logits.append(logits_BC)
    return np.stack(logits)


def check_batches_change_nothing(path: Path, precision: Precision, threads: int, data: st.DataObject) -> None:
    """Draws texts, runs them alone and in drawn batches, and compares every iteration's logits."""
    engine, vocabulary, max_tokens = engine_of(path, precision, threads)
    lengths = data.draw(st.lists(st.integers(1, max_tokens), min_size=2, max_size=9), label="lengths")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed of the texts"))
    texts = [rng.integers(0, vocabulary, length).tolist() for length in lengths]
    alone_RNC = np.concatenate([run(engine, [text]) for text in texts], axis=1)
    order = data.draw(st.permutations(range(len(texts))), label="order")
    cut = data.draw(st.integers(1, len(texts)), label="cut")
    for batch in (order[:cut], order[cut:]):
        if batch:
            found_RBC = run(engine, [texts[place] for place in batch])
            np.testing.assert_allclose(found_RBC, alone_RNC[:, batch], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@SEVERAL
@given(data=st.data())
def test_being_batched_changes_nothing(
    models_dir: Path, architecture: str, precision: Precision, threads: int, data: st.DataObject
) -> None:
    check_batches_change_nothing(models_dir / f"{tiny.DATASET}-{architecture}", precision, threads, data)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@settings(max_examples=3)
@given(data=st.data())
def test_being_batched_changes_nothing_for_the_shipped_models(
    architecture: str, precision: Precision, data: st.DataObject
) -> None:
    needed: StoredPrecision = "int8" if precision == "int8" else "fp16"
    paths = [path for path in find_bundles(SHIPPED) if path.name.endswith(architecture) and (path / needed).is_dir()]
    assert paths
    for path in paths:
        check_batches_change_nothing(path, precision, 2, data)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_text_goes_its_own_way_among_texts_of_other_iterations(models_dir: Path, precision: Precision) -> None:
    engine, vocabulary, max_tokens = engine_of(models_dir / f"{tiny.DATASET}-recurrent", precision, 1)
    rng = np.random.default_rng(5)
    early, late = (rng.integers(0, vocabulary, length).tolist() for length in (7, max_tokens))
    (early_state,), (late_state,) = engine.embed([early]), engine.embed([late])
    (early_state,), _ = engine.step([early_state])
    _, mixed_BC = engine.step([late_state, early_state])
    np.testing.assert_allclose(mixed_BC[0], run(engine, [late])[0, 0], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(mixed_BC[1], run(engine, [early])[1, 0], rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="only there are denormal numbers taken for zero"
)
def test_denormal_numbers_are_zero_while_it_runs_in_whichever_thread_and_not_after(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product() -> float:
        return float(np.float32(1e-30) * np.float32(1e-10))  # 1e-40 is denormal

    products = []

    class Watched:
        def __init__(self, session: ort.InferenceSession) -> None:
            self._session = session

        def run(self, *given: Any) -> Any:
            products.append(product())
            return self._session.run(*given)

    engine = open_engine(
        load_bundle(models_dir / f"{tiny.DATASET}-recurrent"), provider="cpu", precision="fp32", threads=2
    )
    assert product() > 0
    for name in ("embed_session", "step_session"):
        monkeypatch.setattr(engine, name, Watched(getattr(engine, name)))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: engine.step(engine.embed([[5, 6]]))).result()
        assert pool.submit(product).result() > 0
    engine.step(engine.embed([[5, 6]]))
    assert product() > 0
    assert products == [0.0] * 4


def test_the_precisions_are_different_graphs_that_agree_on_clear_texts(models_dir: Path) -> None:
    bundle = load_bundle(models_dir / f"{tiny.DATASET}-recurrent")
    ids = [encoding.ids for encoding in bundle.tokenizer.encode_batch(["a dreadful film", "a wonderful film"])]
    logits = {name: run(engine_of(bundle.path, name, 1)[0], ids) for name in ("fp32", "int8")}
    assert not np.array_equal(logits["fp32"], logits["int8"])
    for found in logits.values():
        assert found[1].argmax(-1).tolist() == [0, 1]


def test_the_size_is_that_of_the_graphs_that_were_opened(models_dir: Path) -> None:
    path = models_dir / f"{tiny.DATASET}-baseline"
    for precision, folder in (("fp32", "fp16"), ("int8", "int8")):
        expected = sum((path / folder / f"{role}.onnx").stat().st_size for role in ("embed", "step"))
        assert engine_of(path, precision, 1)[0].model_bytes == expected


def manifest_with(*stored: StoredPrecision) -> Manifest:
    return Manifest.model_construct(name="sentiment-recurrent", precisions=dict.fromkeys(stored), left_out={})


@pytest.mark.parametrize(
    ("stored", "provider", "asked", "chosen"),
    [
        (("fp16", "int8"), "cpu", "auto", ("int8", "int8")),
        (("fp16", "int8"), "cuda", "auto", ("fp32", "fp16")),
        (("fp16", "int8"), "cuda", "fp32", ("fp32", "fp16")),
        (("fp16",), "cpu", "auto", ("fp32", "fp16")),
        (("int8",), "cpu", "auto", ("int8", "int8")),
        (("fp16", "int8"), "cpu", "fp32", ("fp32", "fp16")),
        (("fp16", "int8"), "cpu", "fp16", ("fp32", "fp16")),
        (("fp16", "int8"), "cuda", "fp16", ("fp16", "fp16")),
        (("fp16", "int8"), "cpu", "int8", ("int8", "int8")),
        (("fp16", "int8"), "cuda", "int8", ("int8", "int8")),
    ],
)
def test_the_precision_that_is_chosen(
    stored: tuple[StoredPrecision, ...], provider: Literal["cpu", "cuda"], asked: Precision, chosen: tuple[str, str]
) -> None:
    assert choose_precision(manifest_with(*stored), provider, asked) == chosen


@pytest.mark.parametrize(
    ("stored", "provider", "asked", "said"),
    [
        ("fp16", "cpu", "int8", "REFRAIN_PRECISION=int8: bundle sentiment-recurrent has no int8 graphs, only fp16"),
        (
            "int8",
            "cpu",
            "fp32",
            "=fp32: bundle sentiment-recurrent has no fp16 graphs, which fp32 is computed from, on",
        ),
        ("int8", "cuda", "auto", "has no fp16 graphs, which fp32 is computed from, only int8"),
        ("int8", "cuda", "fp16", "has no fp16 graphs, only int8"),
    ],
)
def test_a_precision_that_is_not_there_is_refused(
    stored: StoredPrecision, provider: Literal["cpu", "cuda"], asked: Precision, said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        choose_precision(manifest_with(stored), provider, asked)


def test_why_a_precision_is_not_there_is_said() -> None:
    manifest = manifest_with("fp16").model_copy(update={"left_out": {"int8": "int8 loses 0.0071 of accuracy on test"}})
    with pytest.raises(SettingsError, match=r"no int8 graphs, only fp16 \(int8 loses 0\.0071 of accuracy on test\)$"):
        choose_precision(manifest, "cpu", "int8")


@pytest.mark.parametrize("provider", ["auto", "cuda"])
def test_a_bundle_for_cpus_alone_is_run_on_one_where_there_is_a_gpu(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch, provider: Provider
) -> None:
    bundle = load_bundle(models_dir / f"{tiny.DATASET}-baseline")
    precisions = {"int8": bundle.manifest.precisions["int8"]}
    bundle = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"precisions": precisions}))
    monkeypatch.setattr("service.engine.usable_providers", lambda: [CUDA, CPU])
    engine = open_engine(bundle, provider=provider, precision="auto", threads=1)
    assert (engine.provider, engine.precision) == ("cpu", "int8")
    with pytest.raises(SettingsError, match="has no fp16 graphs, only int8"):
        open_engine(bundle, provider=provider, precision="fp16", threads=1)


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")  # the CUDA build logs an error instead
def test_the_cuda_build_without_a_gpu_is_not_taken_for_one(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(models_dir / f"{tiny.DATASET}-recurrent")
    monkeypatch.setattr("service.engine.ort.get_available_providers", lambda: [CUDA, CPU])
    engine = open_engine(bundle, provider="auto", precision="auto", threads=1)
    assert (engine.provider, engine.precision) == ("cpu", "int8")
    with pytest.raises(SettingsError, match=r"^REFRAIN_PROVIDER=cuda: ONNX Runtime has no CUDA here; .* driver"):
        open_engine(bundle, provider="cuda", precision="auto", threads=1)
    monkeypatch.setattr("service.engine.usable_providers", lambda: [CUDA, CPU])  # it was there a moment ago
    with pytest.raises(SettingsError, match=r"^ONNX Runtime has no CUDA here; .* driver"):
        open_engine(bundle, provider="auto", precision="auto", threads=1)


@pytest.mark.parametrize(
    ("asked", "available", "chosen"),
    [
        ("auto", [CPU], "cpu"),
        ("auto", [CUDA, CPU], "cuda"),
        ("cpu", [CUDA, CPU], "cpu"),
        ("cpu", [CPU], "cpu"),
        ("cuda", [CUDA, CPU], "cuda"),
        ("auto", ["AzureExecutionProvider", CPU], "cpu"),
    ],
)
def test_the_provider_that_is_chosen(asked: Provider, available: list[str], chosen: str) -> None:
    assert choose_provider(manifest_with("fp16", "int8"), asked, "auto", available) == chosen


def test_a_provider_that_is_not_there_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^REFRAIN_PROVIDER=cuda: "):
        choose_provider(manifest_with("int8"), "cuda", "auto", [CPU])


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a" * 100])
def test_a_file_that_is_no_graph_is_refused_in_one_line(models_dir: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copy(models_dir / f"{tiny.DATASET}-baseline/int8/embed.onnx", tmp_path / "embed.onnx")
    (tmp_path / "step.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"step\.onnx: ONNX Runtime does not load it: ") as caught:
        Engine(
            {"embed": tmp_path / "embed.onnx", "step": tmp_path / "step.onnx"},
            provider="cpu",
            precision="int8",
            threads=1,
        )
    assert "\n" not in str(caught.value)
