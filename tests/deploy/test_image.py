"""Holds the Dockerfile to what it promises, without building it: what goes in, who runs, what is asked and told."""

import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from service.settings import Settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


class Instruction(NamedTuple):
    stage: str  # empty before the first FROM
    name: str
    value: str


def _read(text: str) -> list[Instruction]:
    """The Dockerfile's instructions, continued lines joined, each with the name of its stage."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    instructions, stage = [], ""
    for line in filter(None, "\n".join(lines).replace("\\\n", "").splitlines()):
        name, value = line.split(maxsplit=1)
        if name == "FROM":
            stage = value.rpartition(" AS ")[2]
        instructions.append(Instruction(stage, name, value))
    return instructions


INSTRUCTIONS = _read(TEXT)
PARENTS = {i.stage: i.value.partition(" AS ")[0] for i in INSTRUCTIONS if i.name == "FROM"}


def _in_image(stage: str, name: str) -> list[str]:
    """The values of an instruction in a stage and those it is built on, the earliest first."""
    inherited = _in_image(PARENTS[stage], name) if PARENTS.get(stage) in PARENTS else []
    return inherited + [i.value for i in INSTRUCTIONS if i.stage == stage and i.name == name]


def _environment(stage: str) -> dict[str, str]:
    pairs = [pair for value in _in_image(stage, "ENV") for pair in shlex.split(value)]
    return dict(pair.split("=", 1) for pair in pairs)


def _copied(stage: str) -> list[str]:
    """The paths that a stage takes from the repository."""
    values = [value.split() for value in _in_image(stage, "COPY") if not value.startswith("--from=")]
    return [source for *sources, _ in values for source in sources]


def _copied_from(stage: str) -> list[str]:
    """The stages that a stage takes files from."""
    return re.findall(r"^--from=(\S+)", "\n".join(_in_image(stage, "COPY")), re.MULTILINE)


both_images = pytest.mark.parametrize("stage", ["service", "loadtest"])


def test_a_plain_build_gives_the_service() -> None:
    assert INSTRUCTIONS[-1].stage == "service"


def test_the_base_can_be_replaced() -> None:
    assert Instruction("", "ARG", "BASE_IMAGE=python:3.11-slim") in INSTRUCTIONS
    assert {parent for parent in PARENTS.values() if parent not in PARENTS} == {"${BASE_IMAGE}"}


def test_every_builder_can_build_it() -> None:
    for only_buildkit in ("# syntax=", "<<", "--link", "--mount", "--chmod"):
        assert only_buildkit not in TEXT


@pytest.mark.parametrize(("stage", "content"), [("service", ["service", "models"]), ("loadtest", ["loadtest"])])
def test_an_image_holds_its_dependencies_and_its_content_alone(stage: str, content: list[str]) -> None:
    assert _copied(stage) == []
    assert _copied_from(stage) == [f"{stage}-dependencies", f"{stage}-content"]
    assert _copied(f"{stage}-content") == content


@both_images
def test_content_is_readable_whatever_the_checkout_allowed(stage: str) -> None:
    assert _in_image(f"{stage}-content", "RUN")[-1] == "chmod -R a+rX,a-w ."


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    first, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert first == "*"
    allowed = {line[1:] for line in rest if line.startswith("!")}
    assert allowed == {source.removeprefix("./") for stage in PARENTS for source in _copied(stage)}


@both_images
def test_it_runs_as_a_fixed_user_without_privileges(stage: str) -> None:
    assert _in_image(stage, "USER")[-1] == "10001:10001"


@both_images
def test_it_runs_from_a_root_that_cannot_be_written(stage: str) -> None:
    assert _environment(stage)["PYTHONDONTWRITEBYTECODE"] == "1"


def test_it_starts_the_service_as_the_first_process() -> None:
    # In shell form the shell would be the one that SIGTERM reaches.
    assert json.loads(_in_image("service", "CMD")[-1]) == ["python", "-m", "service"]
    assert importlib.util.find_spec("service.__main__") is not None
    assert _in_image("service", "STOPSIGNAL") == ["SIGTERM"]


def test_its_settings_are_settings_of_the_application(settings_names: set[str]) -> None:
    names = {name for name in _environment("service") if name.startswith("REFRAIN_")}
    assert names <= settings_names
    assert _environment("service")["REFRAIN_HOST"] == "0.0.0.0"  # a container's own network


def test_it_reports_to_nobody() -> None:
    assert _environment("service")["ORT_DISABLE_TELEMETRY"] == "1"


def test_it_tells_the_port_and_the_path_of_its_health(served_paths: set[str], defaults: Settings) -> None:
    port = str(defaults.port)
    assert _in_image("service", "EXPOSE") == [port]
    (check,) = _in_image("service", "HEALTHCHECK")
    match = re.search(r"'REFRAIN_PORT', '(\d+)'\) \+ '(/\w+)'", check)
    assert match is not None
    assert match[1] == port
    assert match[2] in served_paths


def test_it_installs_what_the_project_declares(tmp_path: Path) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (reading,) = (i.value for i in INSTRUCTIONS if i.name == "RUN" and "tomllib" in i.value)
    subprocess.run(["sh", "-c", reading], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "core.txt").read_text().splitlines() == declared["dependencies"]
    for extra in ("cpu", "gpu", "loadtest"):
        assert (tmp_path / f"{extra}.txt").read_text().splitlines() == declared["optional-dependencies"][extra]


def test_each_accelerator_brings_its_own_runtime() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (check,) = (i.value for i in INSTRUCTIONS if i.name == "RUN" and "case" in i.value)
    match = re.search(r"in ([\w|]+)\)", check)
    assert match is not None
    packages = {extra: {re.split(r"[^\w-]", name)[0] for name in extras[extra]} for extra in match[1].split("|")}
    runtimes = {"onnxruntime", "onnxruntime-gpu"}
    assert packages["cpu"] & runtimes == {"onnxruntime"}
    assert packages["gpu"] & runtimes == {"onnxruntime-gpu"}


def test_no_package_index_is_written_down() -> None:
    assert not re.findall(r"--(?:extra-)?index-url|--find-links|--trusted-host|PIP_INDEX_URL", TEXT)
    assert set(re.findall(r"https?://([\w.]+)", TEXT)) <= {"127.0.0.1", "service"}
