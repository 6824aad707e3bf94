"""What `python -m training experiments` takes; apart from what it runs, since --help shall not wait for torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from training.config import check_seed
from training.errors import TrainingError

Name = Literal["data-size", "length", "yelp", "transfer", "domain", "precision", "recurrence"]


@dataclass(frozen=True)
class ExperimentsConfig:
    """Repeats a published experiment with both architectures over several seeds, and writes table, figure and JSON;
    `recurrence` is one of our own.

    Interrupted, the same command goes on where it was; cells that several experiments share are trained once.
    """

    name: tyro.conf.Positional[Name]
    data_dir: Path | None = None
    """Read the data sets here instead of from the hub; another one needs another --output-dir."""
    seeds: tuple[int, ...] = (13, 14, 15)
    """Each draws its own split, and trains every cell once. What the results hold of other seeds stays, so that seeds
    may come one by one, and from several machines."""
    output_dir: Path = Path("runs/experiments")
    """Where splits and runs are kept."""
    results_dir: Path = Path("docs/results")
    """Where NAME.md, NAME.png and NAME.json go; --quick leaves it alone."""
    jobs: int = 1
    """Cells trained at the same time; if more than one, each with one thread."""
    effort: float = 1.0
    """Multiplies the epochs of every cell."""
    batch_size: int = 64
    learning_rate: float = 6e-4
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    quick: bool = False
    """Tiny models on a few texts, to see that it works: everything goes to OUTPUT_DIR/quick."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise TrainingError(f"--seeds {' '.join(map(str, self.seeds))}: at least one, and each once")
        for seed in self.seeds:
            check_seed(seed)
        if self.jobs < 1 or not 0 < self.effort < math.inf:
            raise TrainingError(f"--jobs {self.jobs} --effort {self.effort}: at least 1, and above 0, are needed")

    @property
    def place(self) -> Path:
        """What this run may write to, but for the results."""
        return self.output_dir / "quick" if self.quick else self.output_dir

    @property
    def results(self) -> Path:
        return self.place / "results" if self.quick else self.results_dir
