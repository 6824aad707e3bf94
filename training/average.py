"""The mean of runs' weights, as of a network before and after it was trained further: often better than each of them.

Wortsman et al. 2022, arXiv 2109.01903 (before and after) and 2203.05482 (several that began from one).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training import run as runs
from training.errors import TrainingError
from training.prepare import new_id, standing_run
from training.run import RunInfo


def average(sources: Sequence[Path], output: Path) -> Path:
    """Writes a run whose weights are the mean of the others', in all else the last of them; returns its directory.

    Raises TrainingError where they differ in shape, labels or tokenizer.
    """
    if len(sources) < 2:
        raise TrainingError(f"{len(sources)} run: a mean takes at least two")
    weights = [runs.read_model(source).state_dict() for source in sources]
    infos = [runs.read_info(source) for source in sources]
    kinds, last = [_kind(source, info) for source, info in zip(sources, infos, strict=True)], infos[-1]
    for source, kind in zip(sources, kinds, strict=True):
        if changed := [name for name, value in kind.items() if value != kinds[-1][name]]:
            raise TrainingError(f"{source} and {sources[-1]} differ in {', '.join(changed)}: they have no mean")
    options = {**last.options, "averaged": [info.provenance["run_id"] for info in infos]}
    seen = {
        "learned_from": [name for info in infos for name in runs.learned_from(info)],
        "language_models": [name for info in infos for name in runs.language_models(info)],
    }
    new = {"run_id": new_id(last.provenance["dataset"], last.architecture)}
    provenance = last.provenance | {name: list(dict.fromkeys(names)) for name, names in seen.items()} | new
    with runs.hold(output):
        standing = standing_run(output, options, {})
        runs.replace(output / runs.TOKENIZER, (sources[-1] / runs.TOKENIZER).read_bytes())
        mean = {name: torch.stack([one[name] for one in weights]).mean(0) for name in weights[-1]}
        runs.write_weights(output, mean)
        runs.write_info(output, standing or RunInfo(**{**vars(last), "options": options, "provenance": provenance}))
    return output


def _kind(source: Path, info: RunInfo) -> dict[str, Any]:
    """What must be alike; how much of a text is read, and dropout, are in no weight."""
    shape = {
        name: value for name, value in info.encoder.items() if name not in ("max_tokens", "tail_tokens", "dropout")
    }
    tokenizer = (source / runs.TOKENIZER).read_bytes()
    return {"labels": info.labels, "architecture": info.architecture, "shape": shape, "tokenizer": tokenizer}
