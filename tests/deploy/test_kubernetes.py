"""Holds everything that kustomize renders to the Kubernetes schemas and to the application that it deploys."""

import functools
import json
import re

import jsonschema  # type: ignore[import-untyped]  # ships no types
import kubernetes_validate  # type: ignore[import-untyped]  # ships no types
import pytest

from service.app import create_app
from service.settings import PREFIX, Settings, load_settings
from tests.deploy.custom_resources import SCHEMAS, standard_parts
from tests.deploy.rendering import K8S, RENDERINGS, ROOT, Manifest, Pod, of_kind, pods, quantity, render, selects

OLDEST, NEWEST = "1.25", "1.37"
STOP_MARGIN = 10  # seconds: after the longest drain the process still joins its threads
# What one process of the service holds, and what is there beside the processes.
PROCESS_BYTES, SUPERVISOR_BYTES = 150e6, 40e6
SELECTORS = {
    "Service": ("spec", "selector"),
    "Deployment": ("spec", "selector", "matchLabels"),
    "PodDisruptionBudget": ("spec", "selector", "matchLabels"),
    "NetworkPolicy": ("spec", "podSelector", "matchLabels"),
}


@pytest.fixture(params=RENDERINGS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """The manifests of one rendering."""
    return render(request.param)


@functools.cache  # most manifests are alike in several renderings
def validate(manifest: str, version: str) -> None:
    kubernetes_validate.validate(json.loads(manifest), version, strict=True)


def process_count(pod: Pod) -> int:
    """How many processes serve in a pod: one for each core that it may use, on a GPU one, unless a setting says."""
    cores = 1 if pod.settings[PREFIX + "PROVIDER"] == "cuda" else quantity(pod.container["resources"]["limits"]["cpu"])
    return int(pod.settings.get(PREFIX + "PROCESSES", cores))


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_manifest_fits_the_schema(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        custom = manifest["kind"] in SCHEMAS
        if custom:
            jsonschema.validate(manifest, SCHEMAS[manifest["kind"]])
        for standard in standard_parts(manifest) if custom else [manifest]:
            validate(json.dumps(standard, sort_keys=True), version)


def test_no_two_manifests_are_the_same_object(manifests: list[Manifest]) -> None:
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(names) == len(set(names))


def test_every_setting_is_one_that_the_application_accepts(
    manifests: list[Manifest], settings_names: set[str], defaults: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pod in pods(manifests):
        assert set(pod.settings) <= settings_names
        with monkeypatch.context() as environment:
            environment.setenv(PREFIX + "MODELS_DIR", str(ROOT / "models"))
            for name, value in pod.settings.items():
                environment.setenv(name, value)
            create_app(load_settings())  # raises on a wrong value, and on architectures that are not there


def test_probes_ask_paths_that_are_served_on_the_port_that_is_listened_on(
    manifests: list[Manifest], served_paths: set[str], defaults: Settings
) -> None:
    for pod in pods(manifests):
        (port,) = pod.container["ports"]
        assert port["containerPort"] == int(pod.settings.get(PREFIX + "PORT", defaults.port))
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = pod.container[probe]["httpGet"]
            assert asked["path"] in served_paths
            assert asked["port"] == port["name"]


def test_only_readiness_takes_a_pod_out_and_only_health_restarts_it(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        assert pod.container["readinessProbe"]["httpGet"]["path"] == "/readyz"
        assert pod.container["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_services_forward_to_the_port_of_the_container(manifests: list[Manifest]) -> None:
    for service in of_kind(manifests, "Service"):
        for pod in pods(manifests):
            if selects(service["spec"]["selector"], pod.labels):
                names = {port["name"] for port in pod.container["ports"]}
                assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_policies_let_all_pods_of_the_cluster_in_and_nothing_out(manifests: list[Manifest]) -> None:
    # Prometheus and ingress controllers live in namespaces of their own. Probes come from the node, past every policy.
    for pod in pods(manifests):
        policies = [
            policy["spec"]
            for policy in of_kind(manifests, "NetworkPolicy")
            if selects(policy["spec"]["podSelector"]["matchLabels"], pod.labels)
        ]
        assert policies
        for policy in policies:
            assert policy["policyTypes"] == ["Ingress", "Egress"]
            assert policy["egress"] == []
        rules = [rule for policy in policies for rule in policy["ingress"]]
        # A rule without `from` lets everybody in.
        assert any({"namespaceSelector": {}} in rule.get("from", [{"namespaceSelector": {}}]) for rule in rules)
        opened = {port["port"] for rule in rules for port in rule["ports"]}
        assert opened == {port["name"] for port in pod.container["ports"]}


def test_every_selector_finds_pods(manifests: list[Manifest]) -> None:
    for kind, path in SELECTORS.items():
        for manifest in of_kind(manifests, kind):
            selector = functools.reduce(lambda part, key: part[key], path, manifest)
            assert any(selects(selector, pod.labels) for pod in pods(manifests)), (
                f"{kind} {manifest['metadata']['name']} selects no pod"
            )


def test_no_two_deployments_or_budgets_claim_the_same_pod(manifests: list[Manifest]) -> None:
    # Kubernetes evicts no pod that two budgets select.
    for kind in ("Deployment", "PodDisruptionBudget"):
        selectors = [manifest["spec"]["selector"]["matchLabels"] for manifest in of_kind(manifests, kind)]
        for pod in pods(manifests):
            assert sum(selects(selector, pod.labels) for selector in selectors) <= 1


def test_what_a_pod_refers_to_is_rendered(manifests: list[Manifest]) -> None:
    accounts = {account["metadata"]["name"] for account in of_kind(manifests, "ServiceAccount")}
    for pod in pods(manifests):  # a ConfigMap that is not there, `pods` does not find either
        assert pod.spec["serviceAccountName"] in accounts


def test_pods_spread_away_from_pods_of_their_own(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        constraints = pod.spec["topologySpreadConstraints"]
        assert {one["topologyKey"] for one in constraints} == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
        for constraint in constraints:
            assert selects(constraint["labelSelector"]["matchLabels"], pod.labels)
            others = [other for other in pods(manifests) if other.labels != pod.labels]
            assert not any(selects(constraint["labelSelector"]["matchLabels"], other.labels) for other in others)


def test_the_cluster_waits_longer_than_the_drain(manifests: list[Manifest], defaults: Settings) -> None:
    for pod in pods(manifests):
        drain = float(pod.settings.get(PREFIX + "DRAIN_SECONDS", defaults.drain_seconds))
        delay = float(pod.settings[PREFIX + "DRAIN_DELAY_SECONDS"])
        assert delay > 0  # in which the endpoints forget the pod
        assert "lifecycle" not in pod.container  # a second wait would only be added to it
        assert pod.spec["terminationGracePeriodSeconds"] >= delay + drain + STOP_MARGIN


def test_service_links_are_off(manifests: list[Manifest]) -> None:
    # A Service named refrain would give every pod a REFRAIN_PORT=tcp://... and a REFRAIN_SERVICE_HOST.
    for pod in pods(manifests):
        assert pod.spec["enableServiceLinks"] is False


def test_pods_are_locked_down(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        assert pod.spec["automountServiceAccountToken"] is False
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        security = pod.container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}


def test_pods_run_as_the_user_of_the_image(manifests: list[Manifest]) -> None:
    users = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for pod in pods(manifests):
        context = pod.spec["securityContext"]
        assert {(str(context["runAsUser"]), str(context["runAsGroup"]))} == set(users)


def test_pods_get_the_cores_and_the_memory_that_their_processes_take(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        requests, limits = (pod.container["resources"][part] for part in ("requests", "limits"))
        assert quantity(limits["cpu"]).is_integer()  # the service counts whole cores
        assert 1 <= process_count(pod) <= quantity(limits["cpu"])
        assert quantity(requests["cpu"]) <= quantity(limits["cpu"])
        needed = SUPERVISOR_BYTES + process_count(pod) * PROCESS_BYTES
        assert quantity(requests["memory"]) >= needed
        assert quantity(limits["memory"]) >= 2 * needed  # for long texts and full queues


def test_no_pod_runs_an_image_by_a_tag_that_moves(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        tag = pod.container["image"].rpartition("/")[2]
        assert re.search(r"[:@]", tag) and not tag.endswith(":latest")


def test_every_file_is_part_of_something() -> None:
    named = "\n".join(file.read_text() for file in K8S.rglob("kustomization.yaml"))
    for file in K8S.rglob("*.*"):
        assert file.name == "kustomization.yaml" or file.name in named, f"no kustomization names {file}"
