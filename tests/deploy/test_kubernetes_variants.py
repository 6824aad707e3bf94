"""Holds each component and overlay to what it is for: autoscaling, monitoring, GPU, KServe, split, production."""

import re
from typing import Any

import pytest
import yaml

from service.front import OPEN_PATHS
from service.metrics import Metrics
from service.settings import Settings, load_settings
from tests.deploy.rendering import K8S, ROOT, Manifest, Pod, everywhere, of_kind, pods, quantity, render, selects

PROMETHEUS = ROOT / "monitoring/prometheus"
AUTOSCALERS = ["HorizontalPodAutoscaler", "ScaledObject"]
ARCHITECTURES = ["recurrent", "baseline"]


def name_of(manifest: Manifest) -> str:
    name = manifest["metadata"]["name"]
    assert isinstance(name, str)
    return name


def only(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [manifest for manifest in of_kind(manifests, kind) if name_of(manifest) == name]
    return found


def pods_behind(service: Manifest, manifests: list[Manifest]) -> list[Pod]:
    return [pod for pod in pods(manifests) if selects(service["spec"]["selector"], pod.labels)]


def pods_of(scaler: Manifest, manifests: list[Manifest]) -> list[Pod]:
    """The pods that an autoscaler makes more or fewer of."""
    deployment = only(manifests, "Deployment", scaler["spec"]["scaleTargetRef"]["name"])
    return [pod for pod in pods(manifests) if selects(deployment["spec"]["selector"]["matchLabels"], pod.labels)]


def trigger(scaled: Manifest, kind: str) -> dict[str, Any]:
    (found,) = [trigger for trigger in scaled["spec"]["triggers"] if trigger["type"] == kind]
    assert isinstance(found, dict)
    return found


def scraped(monitor: Manifest, manifests: list[Manifest]) -> list[Manifest]:
    """The Services that a ServiceMonitor selects."""
    selector = monitor["spec"]["selector"]["matchLabels"]
    return [service for service in of_kind(manifests, "Service") if selects(selector, service["metadata"]["labels"])]


# Autoscaling


@pytest.mark.parametrize("kind", AUTOSCALERS)
def test_an_autoscaler_has_its_deployment_for_itself(kind: str) -> None:
    for scaler, manifests in everywhere(kind):
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["apiVersion"], target["kind"]) == ("apps/v1", "Deployment")
        # With a number of its own each apply would undo what the autoscaler did.
        assert "replicas" not in only(manifests, "Deployment", target["name"])["spec"]
        everyone = [other for one in AUTOSCALERS for other in of_kind(manifests, one)]
        assert [other["spec"]["scaleTargetRef"]["name"] for other in everyone].count(target["name"]) == 1


def test_a_deployment_without_an_autoscaler_says_how_many_pods_it_wants() -> None:
    for deployment, manifests in everywhere("Deployment"):
        scaled = [other["spec"]["scaleTargetRef"]["name"] for one in AUTOSCALERS for other in of_kind(manifests, one)]
        assert name_of(deployment) in scaled or deployment["spec"]["replicas"] >= 1


def test_autoscalers_keep_two_pods_and_have_room_to_scale() -> None:
    for scaler, _ in everywhere("HorizontalPodAutoscaler"):
        assert 2 <= scaler["spec"]["minReplicas"] < scaler["spec"]["maxReplicas"]
    for scaler, _ in everywhere("ScaledObject"):
        assert 2 <= scaler["spec"]["minReplicaCount"] < scaler["spec"]["maxReplicaCount"]


def test_pods_can_use_the_cpu_that_an_autoscaler_waits_for() -> None:
    wanted = [
        (scaler, manifests, metric["resource"]["target"]["averageUtilization"])
        for scaler, manifests in everywhere("HorizontalPodAutoscaler")
        for metric in scaler["spec"]["metrics"]
    ] + [(one, others, int(trigger(one, "cpu")["metadata"]["value"])) for one, others in everywhere("ScaledObject")]
    for scaler, manifests, percent in wanted:
        for pod in pods_of(scaler, manifests):
            resources = pod.container["resources"]
            # A process is an interpreter, which hardly fills more than a core.
            cores = 1 if pod.settings["REFRAIN_PROVIDER"] == "cuda" else quantity(resources["limits"]["cpu"])
            assert cores / quantity(resources["requests"]["cpu"]) > percent / 100


def test_the_queue_that_is_scaled_on_is_that_of_the_pods_that_are_scaled() -> None:
    metrics = {sample.name for family in Metrics().registry.collect() for sample in [*family.samples, family]}
    for scaler, manifests in everywhere("ScaledObject"):
        query = trigger(scaler, "prometheus")["metadata"]["query"]
        assert set(re.findall(r"refrain_\w+", query)) <= metrics
        (service,) = re.findall(r'service="([^"]+)"', query)
        assert pods_behind(only(manifests, "Service", service), manifests) == pods_of(scaler, manifests)


def test_the_queue_never_scales_alone() -> None:
    # It is empty until the pods are full: by itself it would scale in until they are. Without data it holds still.
    for scaler, _ in everywhere("ScaledObject"):
        assert [one["type"] for one in scaler["spec"]["triggers"]] == ["prometheus", "cpu"]
        assert trigger(scaler, "prometheus")["metadata"]["ignoreNullValues"] == "false"


# Monitoring


def test_prometheus_asks_a_path_that_is_served_without_a_key(served_paths: set[str]) -> None:
    for monitor, _ in everywhere("ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            assert endpoint["path"] in served_paths & OPEN_PATHS


def test_prometheus_scrapes_every_pod_once() -> None:
    for monitor, manifests in everywhere("ServiceMonitor"):
        (endpoint,) = monitor["spec"]["endpoints"]
        for pod in pods(manifests):
            if made := of_kind(manifests, "InferenceService"):  # KServe's Service has its labels, and its port's name
                labelled, ports = made, pod.container["ports"]
            else:
                labelled = [
                    service for service in of_kind(manifests, "Service") if pod in pods_behind(service, manifests)
                ]
                ports = [port for service in labelled for port in service["spec"]["ports"]]
            selector = monitor["spec"]["selector"]["matchLabels"]
            through = [name_of(one) for one in labelled if selects(selector, one["metadata"]["labels"])]
            assert len(through) == 1, f"{pod.labels} is scraped through {through}"
            assert {port["name"] for port in ports} == {endpoint["port"]}


def test_the_job_is_called_as_in_compose() -> None:
    jobs = {job["job_name"] for job in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]}
    for monitor, manifests in everywhere("ServiceMonitor"):
        for service in scraped(monitor, manifests):
            assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] in jobs


def test_the_operator_gets_the_rules_that_prometheus_gets_elsewhere() -> None:
    files = sorted((PROMETHEUS / "rules").glob("*.yml"))
    rules = {f"refrain-{file.stem}": yaml.safe_load(file.read_text()) for file in files}
    rendered = {name_of(rule): rule["spec"] for rule in of_kind(render("base + monitoring"), "PrometheusRule")}
    assert rendered == rules, "write k8s/components/monitoring/prometheusrules.yaml anew: make rules"


# GPU


def test_a_gpu_pod_is_one_process_with_one_gpu(defaults: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    (pod,) = pods(render("base + gpu"))
    assert pod.container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod.container["image"] == "refrain:gpu"
    assert pod.settings["REFRAIN_PROVIDER"] == "cuda"
    for name, value in pod.settings.items():
        monkeypatch.setenv(name, value)
    assert load_settings().processes == 1


# Callers that are no pods


@pytest.mark.parametrize("suffix", ["", "-other"])
def test_outside_callers_are_let_in_on_the_http_port_and_nowhere_else(suffix: str) -> None:
    manifests = render("base + outside-callers", suffix)
    (policy,), (pod,) = of_kind(manifests, "NetworkPolicy"), pods(manifests)
    assert selects(policy["spec"]["podSelector"]["matchLabels"], pod.labels)
    assert policy["spec"]["ingress"] == [{"ports": [{"port": pod.container["ports"][0]["name"]}]}]  # from everywhere
    (narrow,) = of_kind(render("base", suffix), "NetworkPolicy")
    assert policy["spec"] == narrow["spec"] | {"ingress": policy["spec"]["ingress"]}


# KServe


def test_kserve_gets_the_deployment_s_pod_in_place_of_deployment_and_service() -> None:
    manifests = render("base + kserve")
    assert not of_kind(manifests, "Deployment")
    assert not of_kind(manifests, "Service")
    (pod,), (expected,) = pods(manifests), pods(render("base"))
    assert pod.container["name"] == "kserve-container"
    assert {"name": "PROTOCOL", "value": "v2"} in pod.container["env"]
    env = [entry for entry in pod.container["env"] if entry["name"] != "PROTOCOL"]
    assert pod.spec | {"containers": [pod.container | {"name": "service", "env": env}]} == expected.spec
    assert pod.labels == expected.labels


def test_kserve_is_told_of_a_protocol_that_is_spoken(served_paths: set[str]) -> None:
    (pod,) = pods(render("base + kserve"))
    (protocol,) = [entry["value"] for entry in pod.container["env"] if entry["name"] == "PROTOCOL"]
    assert {f"/{protocol}/health/live", f"/{protocol}/health/ready"} <= served_paths


def test_kserve_takes_over_what_other_components_changed() -> None:
    (pod,) = pods(render("base + gpu monitoring kserve"))
    assert pod.container["image"] == "refrain:gpu"
    assert pod.container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod.settings["REFRAIN_PROVIDER"] == "cuda"


# Custom resources, whose references kustomize must be told of


def test_a_suffix_reaches_what_a_scaled_object_names() -> None:
    manifests = render("base + autoscaling-queue", "-other")
    (scaler,) = of_kind(manifests, "ScaledObject")
    assert pods_of(scaler, manifests)


def test_a_suffix_reaches_what_an_inference_service_names() -> None:
    manifests = render("base + kserve", "-other")
    (pod,) = pods(manifests)  # with the ConfigMap that it names
    assert {name_of(account) for account in of_kind(manifests, "ServiceAccount")} == {pod.spec["serviceAccountName"]}


# Overlays


def test_split_gives_each_architecture_pods_and_a_scaler_of_its_own() -> None:
    manifests = render("overlays/split")
    loaded = {pod.settings["REFRAIN_ARCHITECTURES"]: pod.settings["REFRAIN_ROUTING"] for pod in pods(manifests)}
    assert loaded == {name: f"fixed:{name}" for name in ARCHITECTURES}
    for kind in ("Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"):
        assert {name_of(manifest) for manifest in of_kind(manifests, kind)} == {f"refrain-{a}" for a in ARCHITECTURES}


def test_split_has_a_service_for_each_architecture_and_one_for_both() -> None:
    manifests = render("overlays/split")
    behind = {
        name_of(service): sorted(pod.settings["REFRAIN_ARCHITECTURES"] for pod in pods_behind(service, manifests))
        for service in of_kind(manifests, "Service")
    }
    assert behind == {"refrain": sorted(ARCHITECTURES)} | {f"refrain-{name}": [name] for name in ARCHITECTURES}


def test_production_pins_its_image_and_asks_for_keys() -> None:
    for pod in pods(render("overlays/production")):
        assert re.search(r"^registry\.example\.com/refrain@sha256:[0-9a-f]{64}$", pod.container["image"])
        (keys,) = [entry for entry in pod.container["env"] if entry["name"] == "REFRAIN_API_KEYS"]
        assert keys["valueFrom"]["secretKeyRef"]["optional"] is False


def test_production_is_scaled_and_watched() -> None:
    kinds = {manifest["kind"] for manifest in render("overlays/production")}
    assert kinds >= {"HorizontalPodAutoscaler", "PodDisruptionBudget", "ServiceMonitor"}


def test_development_is_one_small_talkative_pod() -> None:
    manifests = render("overlays/development")
    (deployment,) = of_kind(manifests, "Deployment")
    assert deployment["spec"]["replicas"] == 1
    (pod,) = pods(manifests)
    assert pod.settings["REFRAIN_LOG_LEVEL"] == "debug"
    assert quantity(pod.container["resources"]["limits"]["cpu"]) == 1


def test_every_component_and_overlay_says_what_it_is_for() -> None:
    for file in K8S.glob("*/*/kustomization.yaml"):
        assert file.read_text().startswith("# "), file
