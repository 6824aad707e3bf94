"""What each training cost: collects speed and memory from the runs' metrics into one table."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from training import run as runs
from training.errors import TrainingError
from training.tables import grid


def record(directories: Sequence[Path], output: Path) -> str:
    """Writes `output`.json and `output`.md; returns the table. Rows of other runs that stand there stay, before these.

    Hours are those of training, without validation, up to the last step that was logged; of several processes at
    the same states their sum.
    """
    rows, path = [cost(run) for run in directories], output.with_suffix(".json")
    earlier = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    rows = [*(row for row in earlier if row["run"] not in [one["run"] for one in rows]), *rows]
    table = _table(rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, {"runs": rows})
    text = f"# What the trainings cost\n\nWritten by `python -m training record`.\n\n{table}\n"
    runs.replace(output.with_suffix(".md"), text.encode())
    return table


def cost(run: Path) -> dict[str, Any]:
    """One run's figures; None where an older version did not measure them."""
    info, path = runs.read_info(run), run / runs.METRICS
    written = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in written if "tokens_per_second" in line or "seconds" in line]
    if not lines:
        raise TrainingError(f"{run} has measured no speed: its training was too short, or has not begun")
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return {
        "run": info.provenance["run_id"],
        "stage": _stage(info),
        "dataset": info.provenance["dataset"],
        "texts": info.provenance.get("texts", {}).get("train"),
        "architecture": info.options["model"] if info.architecture == runs.STATES else info.architecture,
        "seed": info.provenance.get("seed"),
        "machine": info.provenance.get("machine"),
        "precision": info.options.get("mixed_precision"),
        "steps": written[-1].get("step") if speeds else None,  # a validation comes after the last of them
        "tokens_per_second": {"median": round(median(speeds)), "lowest": min(speeds), "highest": max(speeds)}
        if speeds
        else None,
        "hours": sum(line["seconds"] for line in lines) / 3600 if "seconds" in lines[0] else None,
        "peak_memory_mb": max(line.get("peak_memory_mb", 0) for line in lines) or None,
        "peak_cuda_mb": max(line.get("peak_cuda_mb", 0) for line in lines) or None,
    }


def _stage(info: runs.RunInfo) -> str:
    if info.architecture in (runs.LINEAR, runs.STATES):
        return info.architecture
    return "train" if info.labels else "pretrain"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("stage", "data", "texts", "architecture", "seed", "machine", "precision", "steps",
            "tokens/s (lowest to highest)", "hours", "peak memory, MB", "peak GPU memory, MB")  # fmt: skip
    lines: list[Sequence[str]] = [head]
    for row in rows:
        speed, seed = row["tokens_per_second"], row.get("seed")
        lines.append([
            row["stage"], row["dataset"], f"{row['texts']:,}" if row.get("texts") else "-", row["architecture"],
            "-" if seed is None else str(seed),
            row["machine"] or "-", row["precision"] or "-", str(row["steps"] or "-"),
            f"{speed['median']:,} ({speed['lowest']:,} to {speed['highest']:,})" if speed else "-",
            "-" if row["hours"] is None else f"{row['hours']:.2f}",
            str(row["peak_memory_mb"] or "-"), str(row["peak_cuda_mb"] or "-"),
        ])  # fmt: skip
    return grid(lines)
