"""What a training cost, collected from what it wrote on its way."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from training import metrics
from training.__main__ import main
from training.record import cost

CONFIG = {
    "task": "easy", "labels": ["bad", "good"], "architecture": "recurrent", "encoder": {},
    "options": {"mixed_precision": "bf16"}, "provenance": {"run_id": "one", "dataset": "easy"},
}  # fmt: skip


def write_run(directory: Path, *lines: dict[str, object], **provenance: str) -> Path:
    directory.mkdir()
    config = CONFIG | {"provenance": {"run_id": "one", "dataset": "easy"} | provenance}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_a_runs_cost_is_the_sum_of_its_seconds_and_the_peak_of_its_memory(tmp_path: Path) -> None:
    lines = [
        {"step": step, "tokens_per_second": speed, "seconds": 1800.0, "peak_memory_mb": memory}
        for step, speed, memory in ((50, 900, 700), (100, 1200, 800), (150, 1000, 800))
    ]
    found = cost(write_run(tmp_path / "run", *lines, {"step": 160, "validation": []}, machine="2 CPU threads"))
    assert found["tokens_per_second"] == {"median": 1000, "lowest": 900, "highest": 1200}
    assert (found["hours"], found["peak_memory_mb"], found["peak_cuda_mb"]) == (1.5, 800, None)
    assert (found["stage"], found["machine"], found["steps"]) == ("train", "2 CPU threads", 160)


def test_the_command_writes_a_table_and_takes_older_runs_as_well(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = write_run(tmp_path / "older", {"step": 50, "tokens_per_second": 900})
    assert main(["record", str(older), str(run), "--output", str(tmp_path / "results" / "training")]) == 0
    table = (tmp_path / "results" / "training.md").read_text()
    first, second = (line for line in table.splitlines() if line.startswith("| train |"))
    assert [cell.strip() for cell in first.split("|")[-5:-1]] == ["900 (900 to 900)", "-", "-", "-"]
    provenance = json.loads((run / "config.json").read_text())["provenance"]
    assert [second.split("|")[place].strip() for place in (3, 5)] == [
        str(provenance["texts"]["train"]), str(provenance["seed"])
    ]  # fmt: skip
    assert "CPU thread" in second
    assert table.splitlines()[-1] in capsys.readouterr().out
    rows = json.loads((tmp_path / "results" / "training.json").read_text())["runs"]
    assert rows[1]["peak_memory_mb"] > 50
    assert rows[1]["hours"] > 0


def test_rows_of_other_runs_stay_and_a_run_has_one_row(tmp_path: Path) -> None:
    def write(name: str, run_id: str, speed: int) -> list[str]:
        run = write_run(tmp_path / name, {"step": 50, "tokens_per_second": speed}, run_id=run_id)
        assert main(["record", str(run), "--output", str(tmp_path / "training")]) == 0
        return [line for line in (tmp_path / "training.md").read_text().splitlines() if line.startswith("| train |")]

    write("a", "first", 900)
    assert len(write("b", "second", 901)) == 2
    again = write("c", "first", 902)
    assert ["901 (" in line for line in again] == [True, False]
    assert ["902 (" in line for line in again] == [False, True]


def test_what_is_no_number_of_a_linear_model_is_a_dash(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"step": 1, "seconds": 36.0, "peak_memory_mb": 700, "validation": []})
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"architecture": "linear", "options": {}}))
    assert main(["record", str(run), "--output", str(tmp_path / "training")]) == 0
    last = (tmp_path / "training.md").read_text().splitlines()[-1]
    assert " ".join(last.split()) == "| linear | easy | - | linear | - | - | - | - | - | 0.01 | 700 | - |"


def test_a_run_without_a_measured_speed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", str(write_run(tmp_path / "run"))]) == 1
    assert f"{tmp_path / 'run'} has measured no speed" in capsys.readouterr().err


def test_the_speed_is_of_training_alone_since_it_was_last_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clock: begun at 0, paused from 4 to 104, read at 110 and at 112."""
    clock = iter([0.0, 4.0, 104.0, 110.0, 110.0, 112.0, 112.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    meter = metrics.Meter()
    meter.tokens += 500
    with meter.paused():
        pass
    first = meter.read()
    assert (first["tokens_per_second"], first["seconds"]) == (50, 10)
    meter.tokens += 60
    second = meter.read()
    assert (second["tokens_per_second"], second["seconds"]) == (30, 2)
    assert second["peak_memory_mb"] > 50


@pytest.mark.parametrize("torn", [b'{"step": 100, "epo', b"\x00\x00\x00", b'"', b"\xff\n[]", b'{"step": 100}'])
def test_a_line_that_was_written_in_part_does_not_keep_a_run_from_going_on(torn: bytes, tmp_path: Path) -> None:
    """As a full disk or a power cut may leave it."""
    path, first = tmp_path / "metrics.jsonl", '{"step": 50, "epoch": 0, "loss": 0.5}\n'
    path.write_bytes(first.encode() + torn)
    metrics.Log(path, step=100, epoch=1).write(step=150, epoch=1)
    assert path.read_text() == first + '{"step": 150, "epoch": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_log_is_whole_or_as_it_was_when_a_run_that_goes_on_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 50, "epoch": 0}\n{"step": 100, "epoch": 0}\n')
    before = path.read_text()

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.Log(path, step=50, epoch=0)
    assert path.read_text() == before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process begins with a peak of its own")
def test_the_peak_of_memory_is_this_processs_own_and_not_that_of_what_started_it() -> None:
    """Linux hands the resource usage of whoever forked on to the program that it starts."""
    code = (
        "import subprocess, sys\nballast = bytearray(b'1' * 900_000_000)\n"
        "child = 'from training.metrics import peak_memory; print(peak_memory()[\"peak_memory_mb\"])'\n"
        "subprocess.run([sys.executable, '-c', child], check=True)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert 50 < float(said) < 800
