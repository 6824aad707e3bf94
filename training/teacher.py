"""Knowledge distillation: what trained runs say of the training texts, asked once and kept in the run directory."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from training import run as runs
from training.errors import TrainingError
from training.evaluate import read_classifier

LOGITS = "teacher.safetensors"
BLOCK = 5000


def check_teachers(teachers: Sequence[Path], labels: Sequence[str], run: Path) -> None:
    """A teacher may have any shape, architecture and tokenizer, but must decide between the same labels.

    Where `run` has not begun it must also be readable: else what stood there could not begin, nor anything else.
    """
    for teacher in teachers:
        info = runs.read_info(teacher)
        runs.check_decides(teacher, info)
        known = info.labels
        if known != list(labels):
            raise TrainingError(f"--teacher {teacher} knows the labels {', '.join(known)}, not {', '.join(labels)}")
        if not (run / runs.CONFIG).exists():
            read_classifier(teacher, torch.device("cpu"))


def teach(teachers: Sequence[Path], texts: Sequence[str], run: Path, device: torch.device) -> Tensor | None:
    """The mean of the teachers' logits for every text, (N, C) float32; None without a teacher.

    Kept after every few thousand texts, so that one who is interrupted goes on from there.
    """
    if not teachers:
        return None
    path = run / LOGITS
    blocks_NC = [load_file(path)["logits"]] if path.exists() else []
    known = sum(map(len, blocks_NC))
    missing = range(known, len(texts), BLOCK)
    taught = [read_classifier(teacher, device) for teacher in teachers if missing]
    for start in tqdm(missing, desc="teacher", unit=f"{BLOCK} texts", disable=not missing):
        block = texts[start : start + BLOCK]
        # The last iteration is a teacher's best answer.
        said = [one.logits(block)[-1] for one in taught]
        blocks_NC.append(torch.stack(said).mean(0))
        runs.replace(path, save({"logits": torch.cat(blocks_NC)}))
    return torch.cat(blocks_NC)
