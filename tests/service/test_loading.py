"""From a models directory to warm engines: what would answer wrongly is refused before it answers anybody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from service.bundle import MANIFEST, Bundle, load_bundle
from service.engine import FloatArray
from service.engine_thread import EngineThread
from service.errors import BundleError
from service.loading import load_bundles, load_model, make_engine
from service.manifest import Manifest, content_version
from service.metrics import Metrics
from service.settings import Settings
from tests import tiny
from tests.service.fakes import FakeEngine, fake_bundle


@pytest.fixture
def models(models_dir: Path, tmp_path: Path) -> Path:
    """A models directory of one's own, with a bundle that answers `positive` and `negative`."""
    shutil.copytree(models_dir / f"{tiny.DATASET}-baseline", tmp_path / "models" / "it")
    return tmp_path / "models"


def rewrite(bundle: Path, **members: Any) -> None:
    """Change members of a bundle's manifest, and its version with them."""
    document = json.loads((bundle / MANIFEST).read_text()) | members
    manifest = Manifest.model_validate(document, strict=False)
    (bundle / MANIFEST).write_text(json.dumps(document | {"version": content_version(manifest)}))


def load(bundle: Bundle, engine: FakeEngine) -> None:
    load_model(bundle, Settings(), Metrics(), EngineThread(stuck_seconds=1), lambda bundle, settings: engine)


@pytest.mark.parametrize("task", ["sentiment", "domain"])
def test_as_many_labels_as_the_graphs_give_numbers_or_none_is_right(task: str) -> None:
    bundle = fake_bundle(task)
    load(bundle, FakeEngine(len(bundle.manifest.labels)))
    with pytest.raises(BundleError, match=rf"^nowhere: its graphs give 5 numbers .* {len(bundle.manifest.labels)} lab"):
        load(bundle, FakeEngine(5))


def test_graphs_that_do_not_run_are_named() -> None:
    bundle = fake_bundle()
    engine = FakeEngine(poison={(0,)})
    with pytest.raises(BundleError, match=r"^nowhere: its graphs do not run: RuntimeError: poisoned$"):
        load(bundle, engine)


def test_a_tokenizer_that_knows_more_than_the_graphs_is_refused() -> None:
    bundle = fake_bundle()
    most = bundle.tokenizer.get_vocab_size() - 1

    class Smaller(FakeEngine):
        def embed(self, ids: Sequence[Sequence[int]]) -> list[FloatArray]:
            if max(map(max, ids)) >= most:
                raise IndexError("out of bounds")
            return super().embed(ids)

    with pytest.raises(BundleError, match=r"^nowhere: its graphs do not run: IndexError: out of bounds$"):
        load(bundle, Smaller())


def test_two_bundles_of_one_name_are_refused(models: Path) -> None:
    settings = Settings(models_dir=models)
    shutil.copytree(models / "it", models / "other")
    rewrite(models / "other", task="another")
    with pytest.raises(BundleError, match=r"/it and \S+/other have the same name, \S+: rename one$"):
        load_bundles(settings)
    rewrite(models / "other", name="another")
    assert len(load_bundles(settings)) == 2


def test_a_bundle_that_is_replaced_while_it_is_loaded_is_refused(models: Path) -> None:
    verified = load_bundle(models / "it")
    make_engine(verified, Settings())
    rewrite(models / "it", labels=["no", "yes"])
    with pytest.raises(BundleError, match=r"/it was replaced while it was loaded: reload once all of it is there$"):
        make_engine(verified, Settings())
    shutil.copy(models / "it" / "fp16" / "step.onnx", models / "it" / "int8" / "step.onnx")
    with pytest.raises(BundleError, match=r"step\.onnx is damaged"):
        make_engine(verified, Settings())
