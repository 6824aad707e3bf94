"""Tiny models of both architectures, trained and exported once for all tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import hypothesis
import pytest

from tests import tiny
from tests.tiny import Architecture

hypothesis.settings.register_profile("any machine", deadline=None)  # its speed is not what is tested
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `--data-dir` takes: one small data set."""
    directory = tmp_path_factory.mktemp("data")
    tiny.write_data(directory)
    return directory


@pytest.fixture(scope="session")
def run_dirs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[Architecture, Path]:
    """A run of each architecture."""
    import torch  # it takes seconds, and most tests need none

    from training.config import TrainConfig
    from training.loop import train

    torch.set_num_threads(1)  # so little work is slower shared out, and on a busy machine much slower
    runs = tmp_path_factory.mktemp("runs")
    return {
        name: train(TrainConfig(**tiny.train_options(name), data_dir=data_dir, output_dir=runs / name))
        for name in tiny.ARCHITECTURES
    }


@pytest.fixture(scope="session")
def models_dir(data_dir: Path, run_dirs: Mapping[Architecture, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What REFRAIN_MODELS_DIR takes: a bundle of each architecture, in both precisions, with portable graphs."""
    from model_export.package import ExportOptions, export
    from model_export.parity import Tolerances

    models = tmp_path_factory.mktemp("models")
    for name, run in run_dirs.items():
        export(
            ExportOptions(
                run=run,
                out=models / f"{tiny.DATASET}-{name}",
                data_dir=data_dir,
                precisions=("fp16", "int8"),
                portable=True,
                tolerances=Tolerances(),
            )
        )
    return models
