"""The whole benchmark, short, on the tiny bundles: the real service, the real runtime, the real load generator."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import tiny

ROOT = Path(__file__).resolve().parents[2]


def bench(models_dir: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REFRAIN_")}
    command = [sys.executable, "-m", "loadtest.bench", "--models-dir", str(models_dir), "--task", tiny.DATASET]
    command += ["--rounds", "1", "--seconds", "0.2", "--warmup", "0.1", "--output-dir", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=120, check=False)


def test_a_short_run_measures_everything_and_every_answer_is_right(
    models_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    texts = data_dir / tiny.DATASET / "validation.jsonl"
    ended = bench(
        models_dir, tmp_path, "--texts", str(texts), "--modes", "early-exit", "--connections", "2",
        "--mixed-connections", "4", "--list-size", "4", "--overload", "0.3",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    content = json.loads((tmp_path / "bench.json").read_text())
    measured = {(one["kind"], one["connections"]): one["figures"] for one in content["cells"]}
    assert {kind for kind, _ in measured} == {"raw", "bare", "lists", "single", "mixed"}
    lists = next(figures for (kind, _), figures in measured.items() if kind == "lists")
    assert lists["texts_per_second"] == 4 * lists["requests_per_second"]
    assert 1 <= lists["mean_iterations"] <= 2
    assert lists["cpu_ms_per_request"] > 0
    assert lists["slowest_probe_ms"] > 0
    assert measured["mixed", 4]["padding_share"] >= 0
    assert measured["mixed", 4]["long_p50_ms"] > 0
    assert content["accuracy"][0]["accuracy"] > 0.5
    assert content["memory"]["recurrent"]["peak"]["pss"] >= content["memory"]["recurrent"]["idle"]["pss"] > 1e6
    assert content["memory"]["recurrent"]["model"] > 0
    assert content["overload"]["sent"] > 0
    assert content["overload"]["unexpected"] == {}
    assert content["overload"]["lost"] == 0
    assert "texts/s, of raw: lists" in content["against_raw"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in (tmp_path / "bench.md").read_text() + json.dumps(content)


def test_a_bundle_that_is_not_there_is_said_in_one_line(models_dir: Path, tmp_path: Path) -> None:
    ended = bench(models_dir, tmp_path / "out", "--modes", "baseline", "--models-dir", str(tmp_path))
    assert ended.returncode == 1
    assert "bench: the service ended with status 1 at its start" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()
