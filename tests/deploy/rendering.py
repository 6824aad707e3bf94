"""What kustomize makes of k8s/, of each kustomization there and of components together, and ways to look into it."""

import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.custom_resources import KSERVE_FIELDS

Manifest = dict[str, Any]

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
COMPONENTS = sorted(file.parent.name for file in (K8S / "components").glob("*/kustomization.yaml"))
TOGETHER = ["gpu monitoring autoscaling-queue", "gpu autoscaling-cpu", "gpu monitoring kserve"]


def _kustomizations() -> list[str]:
    """Every directory below k8s/ that renders by itself: components only change what others render."""
    files = sorted(K8S.rglob("kustomization.yaml"))
    return [
        str(file.parent.relative_to(K8S)) for file in files if yaml.safe_load(file.read_text())["kind"] != "Component"
    ]


# Names of renderings: a directory below k8s/, or "base + " and components.
RENDERINGS = _kustomizations() + [f"base + {components}" for components in [*COMPONENTS, *TOGETHER]]


@functools.cache
def render(name: str, suffix: str = "") -> list[Manifest]:
    """The manifests of a rendering; a suffix for all names only goes with components.

    Skips the test where neither kubectl nor kustomize is installed.
    """
    directory, _, components = name.partition(" + ")
    if not components:
        return _build(K8S / directory)
    with tempfile.TemporaryDirectory() as scratch:
        k8s = Path(os.path.relpath(K8S, Path(scratch).resolve()))
        kustomization = {
            "resources": [str(k8s / directory)],
            "components": [str(k8s / "components" / component) for component in components.split()],
            "nameSuffix": suffix,
        }
        (Path(scratch) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return _build(Path(scratch).resolve())


def _build(directory: Path) -> list[Manifest]:
    for program, verb in (("kubectl", "kustomize"), ("kustomize", "build")):
        if path := shutil.which(program):
            command = [path, verb, str(directory)]
            outcome = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
            assert outcome.returncode == 0, outcome.stderr
            return list(yaml.safe_load_all(outcome.stdout))
    pytest.skip("neither kubectl nor kustomize is installed, so no kustomization can be rendered")


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """The manifests of a kind; there may be none."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def everywhere(kind: str) -> list[tuple[Manifest, list[Manifest]]]:
    """Every manifest of a kind in all renderings, each with all that is rendered beside it; never empty."""
    found = [(manifest, render(name)) for name in RENDERINGS for manifest in of_kind(render(name), kind)]
    assert found, f"no {kind} is rendered anywhere"
    return found


@dataclass(frozen=True)
class Pod:
    """A pod that a manifest asks for, and the settings that its container gets, a Secret's value left empty."""

    labels: dict[str, str]
    spec: Manifest
    settings: dict[str, str]

    @property
    def container(self) -> Manifest:
        (only,) = self.spec["containers"]
        assert isinstance(only, dict)
        return only


def pods(manifests: list[Manifest]) -> list[Pod]:
    """The pods of Deployments and InferenceServices; never empty."""
    found = [_pod(*template, manifests) for manifest in manifests for template in _templates(manifest)]
    assert found
    return found


def _templates(manifest: Manifest) -> list[tuple[dict[str, str], Manifest]]:
    if manifest["kind"] == "Deployment":
        template = manifest["spec"]["template"]
        return [(template["metadata"]["labels"], template["spec"])]
    if manifest["kind"] == "InferenceService":  # whose labels KServe gives to the pod
        predictor = manifest["spec"]["predictor"]
        spec = {name: value for name, value in predictor.items() if name not in KSERVE_FIELDS}
        return [(manifest["metadata"]["labels"], spec)]
    return []


def _pod(labels: dict[str, str], spec: Manifest, manifests: list[Manifest]) -> Pod:
    config_maps = {manifest["metadata"]["name"]: manifest["data"] for manifest in of_kind(manifests, "ConfigMap")}
    settings: dict[str, str] = {}
    for source in spec["containers"][0]["envFrom"]:
        settings |= config_maps[source["configMapRef"]["name"]]
    settings |= {entry["name"]: entry.get("value", "") for entry in spec["containers"][0].get("env", [])}
    return Pod(labels, spec, {name: value for name, value in settings.items() if name.startswith("REFRAIN_")})


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether labels hold all that a selector asks for; an empty selector is a mistake here."""
    assert selector
    return selector.items() <= labels.items()


def quantity(value: str) -> float:
    """A Kubernetes quantity as a number: cores, or bytes."""
    for suffix, factor in (("Gi", 2**30), ("Mi", 2**20), ("m", 0.001)):
        if value.endswith(suffix):
            return float(value.removesuffix(suffix)) * factor
    return float(value)
