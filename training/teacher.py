"""Knowledge distillation: what trained runs say of the training texts, asked once and kept in the run directory."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from training import run as runs
from training.errors import TrainingError
from training.evaluate import predict

LOGITS = "teacher.safetensors"


def check_teachers(teachers: Sequence[Path], labels: Sequence[str]) -> None:
    """A teacher may have any shape, architecture and tokenizer, but must decide between the same labels."""
    for run in teachers:
        known = runs.read_info(run).labels
        if known != list(labels):
            raise TrainingError(f"--teacher {run} knows the labels {', '.join(known)}, not {', '.join(labels)}")


def teach(teachers: Sequence[Path], texts: Sequence[str], run: Path, device: torch.device) -> Tensor | None:
    """The teachers' logits for every text, (N, C) float32, their mean; None without a teacher."""
    if not teachers:
        return None
    path = run / LOGITS
    if not path.exists():
        logits_NC = torch.stack([_logits(teacher, texts, device) for teacher in teachers]).mean(0)
        runs.replace(path, save({"logits": logits_NC}))
    taught_NC: Tensor = load_file(path)["logits"]
    return taught_NC


def _logits(teacher: Path, texts: Sequence[str], device: torch.device) -> Tensor:
    """Its last iteration's, which is its best answer."""
    model = runs.read_model(teacher).to(device)
    return predict(model, runs.read_tokenizer(teacher), texts, model.config.max_tokens)[-1]
