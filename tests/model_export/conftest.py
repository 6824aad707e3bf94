"""Graphs of the tiny models, exported once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from model_export.graphs import Graphs, export_graphs
from service.bundle import Bundle, load_bundle
from tests import tiny
from tests.tiny import Architecture
from training.architectures.encoder import Encoder
from training.run import read_model


@pytest.fixture(scope="session")
def model(run_dirs: Mapping[Architecture, Path]) -> Encoder:
    """The recurrent one."""
    return read_model(run_dirs["recurrent"])


@pytest.fixture(scope="session")
def fp32_graphs(model: Encoder) -> Graphs:
    """The recurrent model's graphs before any precision is taken from them."""
    return export_graphs(model)


@pytest.fixture(scope="session", params=tiny.ARCHITECTURES)
def bundle(models_dir: Path, request: pytest.FixtureRequest) -> Bundle:
    """Each architecture's bundle."""
    return load_bundle(models_dir / f"{tiny.DATASET}-{request.param}")
