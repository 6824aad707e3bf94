"""Holds docker-compose.yml and Prometheus' configuration to what they promise and to the application they deploy."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.command_line import parse
from loadtest.options import KEY_NAME
from service.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROMETHEUS: dict[str, Any] = yaml.safe_load((ROOT / "monitoring/prometheus/prometheus.yml").read_text())
STOP_MARGIN = 10  # seconds: after the longest drain the process still joins its threads

every_service = pytest.mark.parametrize("name", SERVICES)


def test_docker_compose_1_29_and_v2_both_read_the_top_level() -> None:
    assert {key for key in COMPOSE if not key.startswith("x-")} <= {"services", "volumes", "networks"}


def test_docker_compose_accepts_the_file() -> None:
    if not (program := shutil.which("docker-compose")):
        pytest.skip("docker-compose is not installed")
    outcome = subprocess.run(
        [program, "config", "--quiet"], cwd=ROOT, check=False, capture_output=True, text=True, timeout=60
    )
    assert outcome.returncode == 0, outcome.stderr


def test_the_gpu_s_override_changes_the_build_the_provider_and_the_device_and_nothing_else() -> None:
    if not (program := shutil.which("docker-compose")):
        pytest.skip("docker-compose is not installed")
    files = ("--file", "docker-compose.yml"), ("--file", "docker-compose.gpu.yml")

    def config(*chosen: str) -> dict[str, Any]:
        outcome = subprocess.run(
            [program, *chosen, "config"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
        )
        merged: dict[str, Any] = yaml.safe_load(outcome.stdout)["services"]["service"]
        return merged

    plain, gpu = config(*files[0]), config(*files[0], *files[1])
    assert gpu["build"].pop("args") == {"ACCELERATOR": "gpu"}
    assert "ARG ACCELERATOR" in (ROOT / "Dockerfile").read_text()
    assert gpu["environment"].pop("REFRAIN_PROVIDER") == "cuda"
    (device,) = gpu.pop("deploy")["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert gpu.pop("image") != plain.pop("image")
    assert gpu.pop("mem_limit") != plain.pop("mem_limit")
    assert gpu == plain


@every_service
def test_ports_are_published_on_loopback_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), f"{name} publishes {port}"


@every_service
def test_every_container_is_locked_down(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert "no-new-privileges:true" in service["security_opt"]


@every_service
def test_every_container_is_limited(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert service["cpus"] > 0
    assert service["pids_limit"] > 0


@every_service
def test_images_carry_a_tag_and_build_from_a_stage_that_exists(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":(v?\d+\.\d+\.\d+|\$\{IMAGE_TAG:-\w+\})$", service["image"])
    if "build" in service:
        stages = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        assert service["build"]["target"] in stages


@every_service
def test_what_is_mounted_from_the_repository_exists_and_is_read_only(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source, target, *mode = volume.split(":")
        if source.startswith("."):
            assert (ROOT / source).is_dir(), f"{name} mounts {source}, which is not a directory"
            assert mode == ["ro"]
        else:
            assert source in COMPOSE["volumes"], f"{name} mounts {source} on {target}, which is not declared"


def test_a_plain_up_starts_the_service_and_prometheus() -> None:
    assert {name for name, service in SERVICES.items() if "profiles" not in service} == {"service", "prometheus"}
    assert SERVICES["loadtest"]["profiles"] == ["load"]
    assert SERVICES["grafana"]["profiles"] == ["dashboard"]


def test_settings_passed_on_are_settings_of_the_application(settings_names: set[str]) -> None:
    names = {entry.partition("=")[0] for entry in SERVICES["service"]["environment"]}
    assert names <= settings_names


def test_an_interpolated_name_is_never_mistaken_for_a_setting() -> None:
    # A REFRAIN_ name that the application does not know would stop `make serve` in the same shell.
    assert not re.findall(r"\$\{REFRAIN_\w+", (ROOT / "docker-compose.yml").read_text())


def test_the_health_check_asks_a_path_that_is_served(served_paths: set[str], defaults: Settings) -> None:
    command = SERVICES["service"]["healthcheck"]["test"]
    match = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", command[-1])
    assert match is not None
    assert int(match[1]) == defaults.port
    assert match[2] in served_paths


def test_docker_waits_longer_than_the_drain(defaults: Settings) -> None:
    grace = int(SERVICES["service"]["stop_grace_period"].removesuffix("s"))
    assert grace >= defaults.drain_delay_seconds + defaults.drain_seconds + STOP_MARGIN


def test_a_stop_is_heard_while_the_service_starts() -> None:
    assert SERVICES["service"]["init"] is True


def test_the_load_test_drives_the_service_when_it_is_ready(defaults: Settings) -> None:
    loadtest = SERVICES["loadtest"]
    program, *arguments = loadtest["entrypoint"]
    assert (program, arguments[:2]) == ("python", ["-m", "loadtest"])
    options = parse(arguments[2:])
    assert options.host == f"http://service:{defaults.port}"
    assert any(options.output_dir.is_relative_to(writable) for writable in loadtest["tmpfs"])
    assert KEY_NAME in loadtest["environment"]
    assert loadtest["depends_on"]["service"]["condition"] == "service_healthy"


def test_prometheus_scrapes_the_service(served_paths: set[str], defaults: Settings) -> None:
    jobs = {job["job_name"]: job for job in PROMETHEUS["scrape_configs"]}
    assert jobs["refrain"]["static_configs"] == [{"targets": [f"service:{defaults.port}"]}]
    assert jobs["refrain"].get("metrics_path", "/metrics") in served_paths


def test_prometheus_accepts_its_configuration() -> None:
    if not (program := shutil.which("promtool")):
        pytest.skip("promtool is not installed")
    command = [program, "check", "config", str(ROOT / "monitoring/prometheus/prometheus.yml")]
    outcome = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 0, outcome.stderr


def test_prometheus_reads_the_file_that_is_mounted() -> None:
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["prometheus"]["volumes"])
    assert f"--config.file={mounts['./monitoring/prometheus']}/prometheus.yml" in SERVICES["prometheus"]["command"]
    assert f"--storage.tsdb.path={mounts['prometheus']}" in SERVICES["prometheus"]["command"]


def test_grafana_shows_the_dashboard_to_whoever_looks_and_lets_nobody_in() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert not any("PASSWORD" in name for name in environment)


def test_grafana_finds_what_it_is_given() -> None:
    mounts = dict(reversed(volume.split(":")[:2]) for volume in SERVICES["grafana"]["volumes"])
    provisioning = Path(mounts["/etc/grafana/provisioning/datasources"]).parent
    (source,) = yaml.safe_load((ROOT / provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    published = SERVICES["prometheus"]["ports"][0].rpartition(":")[2]
    assert source["type"] == "prometheus" and source["isDefault"] is True
    assert source["url"] == f"http://prometheus:{published}"
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((ROOT / provisioning / "dashboards/refrain.yml").read_text())["providers"]
    assert mounts["/etc/grafana/provisioning/dashboards"] == f"./{provisioning}/dashboards"
    shown = ROOT / mounts[provider["options"]["path"]] / "refrain.json"
    assert shown.is_file()
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{shown.name}"


def test_grafana_writes_only_where_it_may_and_asks_nobody_outside() -> None:
    grafana = SERVICES["grafana"]
    assert set(grafana["tmpfs"]) == {"/var/lib/grafana", "/tmp"}  # noqa: S108  # its data and its sockets
    assert grafana["environment"]["GF_PLUGINS_PREINSTALL_DISABLED"] == "true"
    for name in ("REPORTING_ENABLED", "CHECK_FOR_UPDATES", "CHECK_FOR_PLUGIN_UPDATES"):
        assert grafana["environment"][f"GF_ANALYTICS_{name}"] == "false"
