"""Holds every rendered kustomization to the Kubernetes schemas and to the application that it deploys."""

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # ships no types
import pytest
import yaml

from service.settings import PREFIX, Settings, load_settings

Manifest = dict[str, Any]

ROOT = Path(__file__).parents[2]
OLDEST, NEWEST = "1.25", "1.37"
STOP_MARGIN = 10  # seconds: after the longest drain the process still joins its threads
SELECTORS = {
    "Service": ("spec", "selector"),
    "Deployment": ("spec", "selector", "matchLabels"),
    "PodDisruptionBudget": ("spec", "selector", "matchLabels"),
    "NetworkPolicy": ("spec", "podSelector", "matchLabels"),
}


def _kustomizations() -> list[Path]:
    """Every directory that renders by itself: components only change what others render."""
    files = sorted((ROOT / "k8s").rglob("kustomization.yaml"))
    return [file.parent for file in files if yaml.safe_load(file.read_text())["kind"] == "Kustomization"]


@functools.cache
def _render(directory: Path) -> list[Manifest]:
    if not (program := shutil.which("kubectl")):
        pytest.skip("kubectl is not installed, so no kustomization can be rendered")
    outcome = subprocess.run([program, "kustomize", directory], check=False, capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 0, outcome.stderr
    return list(yaml.safe_load_all(outcome.stdout))


@pytest.fixture(params=_kustomizations(), ids=lambda path: str(path.relative_to(ROOT)))
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """The manifests that one kustomization renders to."""
    return _render(request.param)


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    found = [manifest for manifest in manifests if manifest["kind"] == kind]
    assert found, f"no {kind} is rendered"
    return found


def pods(manifests: list[Manifest]) -> list[Manifest]:
    return [deployment["spec"]["template"] for deployment in of_kind(manifests, "Deployment")]


def container(pod: Manifest) -> Manifest:
    (only,) = pod["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def settings_of(pod: Manifest, manifests: list[Manifest]) -> dict[str, str]:
    """The settings that a pod's container gets, a Secret's value left empty."""
    config_maps = {manifest["metadata"]["name"]: manifest["data"] for manifest in of_kind(manifests, "ConfigMap")}
    settings: dict[str, str] = {}
    for source in container(pod)["envFrom"]:
        settings |= config_maps[source["configMapRef"]["name"]]
    return settings | {entry["name"]: entry.get("value", "") for entry in container(pod).get("env", [])}


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_manifest_fits_the_schema(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_every_setting_is_one_that_the_application_accepts(
    manifests: list[Manifest], settings_names: set[str], defaults: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pod in pods(manifests):
        settings = settings_of(pod, manifests)
        assert set(settings) <= settings_names
        with monkeypatch.context() as environment:
            for name, value in settings.items():
                environment.setenv(name, value)
            load_settings()  # raises on a wrong value


def test_probes_ask_paths_that_are_served_on_the_port_that_is_listened_on(
    manifests: list[Manifest], served_paths: set[str], defaults: Settings
) -> None:
    for pod in pods(manifests):
        (port,) = container(pod)["ports"]
        assert port["containerPort"] == int(settings_of(pod, manifests).get(PREFIX + "PORT", defaults.port))
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container(pod)[probe]["httpGet"]
            assert asked["path"] in served_paths
            assert asked["port"] == port["name"]


def test_only_readiness_takes_a_pod_out_and_only_health_restarts_it(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        assert container(pod)["readinessProbe"]["httpGet"]["path"] == "/readyz"
        assert container(pod)["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_services_and_policies_open_the_port_of_the_container(manifests: list[Manifest]) -> None:
    names = {port["name"] for pod in pods(manifests) for port in container(pod)["ports"]}
    for service in of_kind(manifests, "Service"):
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    for policy in of_kind(manifests, "NetworkPolicy"):
        opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
        assert opened == names


def test_every_selector_finds_the_pods(manifests: list[Manifest]) -> None:
    for kind, path in SELECTORS.items():
        for manifest in of_kind(manifests, kind):
            selector = functools.reduce(lambda part, key: part[key], path, manifest)
            assert selector
            assert any(selector.items() <= pod["metadata"]["labels"].items() for pod in pods(manifests)), (
                f"{kind} {manifest['metadata']['name']} selects no pod"
            )


def test_pods_spread_away_from_pods_of_their_own(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        for constraint in pod["spec"]["topologySpreadConstraints"]:
            assert constraint["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_the_cluster_waits_longer_than_the_drain(manifests: list[Manifest], defaults: Settings) -> None:
    for pod in pods(manifests):
        drain = float(settings_of(pod, manifests).get(PREFIX + "DRAIN_SECONDS", defaults.drain_seconds))
        command, seconds = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
        assert command == "sleep"
        assert pod["spec"]["terminationGracePeriodSeconds"] >= float(seconds) + drain + STOP_MARGIN


def test_service_links_are_off(manifests: list[Manifest]) -> None:
    # A Service named refrain would give every pod a REFRAIN_PORT=tcp://... and a REFRAIN_SERVICE_HOST.
    for pod in pods(manifests):
        assert pod["spec"]["enableServiceLinks"] is False


def test_pods_are_locked_down(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        security = container(pod)["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}


def test_pods_run_as_the_user_of_the_image(manifests: list[Manifest]) -> None:
    users = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for pod in pods(manifests):
        context = pod["spec"]["securityContext"]
        assert {(str(context["runAsUser"]), str(context["runAsGroup"]))} == set(users)


def test_pods_say_what_they_need_and_what_they_may_take(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        resources = container(pod)["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys()
        assert {"cpu", "memory"} <= resources["limits"].keys()  # the CPU limit also sets the engine's threads
