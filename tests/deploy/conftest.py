"""What the deployment files are checked against: the application's own paths and settings."""

import os

import pytest

from service import inference_protocol
from service.app import router
from service.settings import PREFIX, Settings, load_settings

FIGURES: list[str] = []


@pytest.fixture(scope="session")
def figures() -> list[str]:
    """What a test measured and does not assert; it is shown at the end."""
    return FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("measured")
        terminalreporter.write("\n".join([*FIGURES, ""]))


@pytest.fixture(scope="session")
def served_paths() -> set[str]:
    """Every path that the application answers on."""
    routes = [*router.routes, *inference_protocol.router.routes]
    return {route.path for route in routes if hasattr(route, "path")}


@pytest.fixture(scope="session")
def settings_names() -> set[str]:
    """Every environment variable that the application reads."""
    return {PREFIX + field.upper() for field in Settings.model_fields}


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings of an environment that names none; the developer's own shell may."""
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    return load_settings()
