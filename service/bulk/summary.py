"""How far a job is while it runs, and its last line."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from service.bulk.classifier import Counts


@dataclass
class Summary:
    """What a run did; `there` are the shards that earlier runs had done."""

    shards: int
    there: int
    texts: int = 0
    failed: int = 0
    iterations: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def gather(self, done: Iterable[Counts]) -> None:
        """Adds units up as they are done, with a bar on stderr where somebody watches."""
        began = time.monotonic()
        with tqdm(total=self.shards, initial=self.there, unit="shard", disable=None) as bar:
            for counts in done:
                self._add(counts)
                self.seconds = time.monotonic() - began
                bar.set_postfix_str(f"{self.texts} texts, {self.texts / self.seconds:.0f}/s, {self.failed} failed")
                bar.update(0 if counts.problem else 1)
        self.seconds = time.monotonic() - began

    def line(self, out: Path) -> str:
        """The run in one line; the seconds hold the start of Ray and the loading of the model."""
        answered = self.texts - self.failed
        parts = [
            f"{self.texts} texts in {self.seconds:.1f} s, {self.texts / max(self.seconds, 1e-9):.0f} texts/s",
            f"{self.iterations / answered:.2f} iterations each" if answered else "none answered",
            f"{self.failed} failed" + (" (the column `error` says why)" if self.failed else ""),
            f"{self.shards - len(self.problems)} of {self.shards} shards in {out}"
            + (f", {self.there} of them from before" if self.there else ""),
        ]
        return "; ".join(parts)

    def _add(self, counts: Counts) -> None:
        self.texts += counts.texts
        self.failed += counts.failed
        self.iterations += counts.iterations
        if counts.problem:
            self.problems.append(counts.problem)
