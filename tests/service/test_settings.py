"""The settings: what is read, what is refused, and that a refusal names the setting and hides the secret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import SettingsError
from service.settings import PREFIX, Settings, available_cpus, describe_settings, described_settings, load_settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)


def test_an_empty_environment_gives_the_documented_defaults() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, str(settings.models_dir)) == ("127.0.0.1", 8000, "models")
    assert (settings.routing, settings.provider, settings.precision) == ("fixed:recurrent", "auto", "auto")
    assert settings.api_keys == () and settings.architectures == ()
    assert (settings.processes, settings.threads) == (available_cpus(), 1)


def test_lists_are_comma_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAIN_ARCHITECTURES", "recurrent, baseline,")
    monkeypatch.setenv("REFRAIN_API_KEYS", "one,two")
    settings = load_settings()
    assert settings.architectures == ("recurrent", "baseline")
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("REFRAIN_PROT", "REFRAIN_PORT"),
        ("REFRAIN_MODEL_DIR", "REFRAIN_MODELS_DIR"),
        ("refrain_apikeys", "REFRAIN_API_KEYS"),
    ],
)
def test_a_misspelt_setting_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, misspelt: str, meant: str
) -> None:
    monkeypatch.setenv(misspelt, "1")
    with pytest.raises(SettingsError, match=f"^{misspelt} is no setting; did you mean {meant}\\?$"):
        load_settings()


def test_each_wrong_value_gets_one_line_with_name_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAIN_PORT", "eighty")
    monkeypatch.setenv("REFRAIN_PROVIDER", "tpu")
    monkeypatch.setenv("REFRAIN_DEADLINE_MS", "0")
    with pytest.raises(SettingsError) as refused:
        load_settings()
    port, provider, deadline = sorted(str(refused.value).splitlines(), key=lambda line: "PORT" not in line)
    assert port.startswith("REFRAIN_PORT=eighty: ")
    assert provider.startswith("REFRAIN_PROVIDER=tpu: ") and "'cuda'" in provider
    assert deadline.startswith("REFRAIN_DEADLINE_MS=0: ")


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_a_number_must_be_a_number(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("REFRAIN_DRAIN_SECONDS", value)
    with pytest.raises(SettingsError, match=f"REFRAIN_DRAIN_SECONDS={value}: "):
        load_settings()


@pytest.mark.parametrize("name", [one.name for one in described_settings() if one.name.endswith(("_MS", "_SECONDS"))])
def test_a_wait_has_an_end(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "9" * 400 if name.endswith("_MS") else "1e300")
    with pytest.raises(SettingsError, match=f"^{name}="):
        load_settings()


def test_a_list_that_the_queue_can_never_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAIN_MAX_QUEUE", "10")
    with pytest.raises(SettingsError, match="REFRAIN_MAX_INPUTS=256 must not be above REFRAIN_MAX_QUEUE=10"):
        load_settings()


@pytest.mark.parametrize(("drain", "deadline"), [("9.9", None), ("0", None), (None, "30001"), ("60", "61000")])
def test_a_drain_shorter_than_a_request_is_refused(
    monkeypatch: pytest.MonkeyPatch, drain: str | None, deadline: str | None
) -> None:
    for name, value in (("REFRAIN_DRAIN_SECONDS", drain), ("REFRAIN_DEADLINE_MS", deadline)):
        if value is not None:
            monkeypatch.setenv(name, value)
    longest = deadline or "10000"
    least = f"{int(longest) / 1000:g}"
    problem = f"^REFRAIN_DRAIN_SECONDS={drain or 30} must be at least {least}, .*REFRAIN_DEADLINE_MS={longest}"
    with pytest.raises(SettingsError, match=problem):
        load_settings()


def test_a_drain_as_long_as_a_request_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAIN_DRAIN_SECONDS", "0.25")
    monkeypatch.setenv("REFRAIN_DEADLINE_MS", "250")
    assert load_settings().drain_seconds == 0.25


def test_a_secret_shows_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAIN_API_KEYS", "hush-hush")
    assert "hush" not in repr(load_settings())
    monkeypatch.setenv("REFRAIN_API_KEYS", "hush-hush, ,naïve-hush")
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert str(refused.value).startswith("REFRAIN_API_KEYS: ") and "hush" not in str(refused.value)


def test_help_lists_every_setting() -> None:
    described = describe_settings()
    for name, field in Settings.model_fields.items():
        assert f"{PREFIX}{name.upper()} (" in described
        assert field.description and field.description in described


@pytest.mark.parametrize(
    "line",
    [
        "REFRAIN_PORT (8000; 0 to 65535)",
        "REFRAIN_PROVIDER (auto; auto, cpu or cuda)",
        "REFRAIN_MAX_BODY_BYTES (1048576; 1024 or more)",
        "REFRAIN_STUCK_SECONDS (10; above 0, up to 3600)",
        "REFRAIN_PROCESSES (by the machine; 1 to 1024)",
        "REFRAIN_MAX_BATCH_TOKENS (by the machine; 1 or more)",
        "REFRAIN_API_KEYS (empty)",
    ],
)
def test_help_says_what_a_setting_may_be(line: str) -> None:
    assert f"  {line}\n" in describe_settings()


@pytest.mark.parametrize(
    ("content", "cpus"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None), ("garbage", None)]
)
def test_a_cpu_limit_bounds_the_processes(tmp_path: Path, content: str, cpus: int | None) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert available_cpus(tmp_path / "cpu.max") == (cpus or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("provider", "device", "processes"),
    [("auto", "nvidiactl", 1), ("auto", "none", None), ("cpu", "nvidiactl", None), ("cuda", "none", 1)],
)
def test_a_gpu_that_is_there_takes_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str, device: str, processes: int | None
) -> None:
    package = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr("service.settings.GPU_DEVICES", (tmp_path / device,))
    monkeypatch.setattr("service.settings.available_cpus", lambda: 4)
    monkeypatch.setenv("REFRAIN_PROVIDER", provider)
    assert load_settings().processes == (processes or 4)


def run_service(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service"],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_process_says_what_is_wrong_in_one_line_and_exits_1(tmp_path: Path) -> None:
    misspelt = run_service(REFRAIN_PROT="80")
    assert (misspelt.returncode, misspelt.stderr) == (
        1,
        "refrain: REFRAIN_PROT is no setting; did you mean REFRAIN_PORT?\n",
    )
    empty = run_service(REFRAIN_MODELS_DIR=str(tmp_path))
    assert empty.returncode == 1
    assert empty.stderr.startswith("refrain: ") and empty.stderr.count("\n") == 1 and str(tmp_path) in empty.stderr
