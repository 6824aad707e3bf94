"""The experiments as data: what each trains, what it is tested on, and what was published."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from training.experiments.options import Name


@dataclass(frozen=True)
class Exam:
    """A split that judges: of a selection (its random test part), or of a public data set."""

    title: str
    data: str
    split: Literal["validation", "test"] = "test"

    @property
    def key(self) -> str:
        return f"{self.data} {self.split}"


@dataclass(frozen=True)
class Cell:
    """One training: a row of the table for one model. `published` maps a test (or precision) to its accuracy there."""

    row: str
    model: str
    data: str
    epochs: int
    tests: tuple[Exam, ...]
    published: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the training beyond the recipe that all cells share."""

    @property
    def architecture(self) -> Literal["recurrent", "baseline"]:
        return "recurrent" if self.model.startswith("recurrent") else "baseline"

    def run_name(self, seed: int) -> str:
        """The same for cells that train the same, whichever experiment they are in; it can also name a bundle."""
        changed = [f"{name}-{value}" for name, value in sorted(self.options.items())]
        return "-".join([self.data, *changed, self.architecture, f"seed-{seed}"]).replace(".", "_")


@dataclass(frozen=True)
class Experiment:
    """Cells and what a reader must know of them. `title` heads the page."""

    title: str
    notes: tuple[str, ...]
    cells: tuple[Cell, ...]
    by_precision: bool = False
    """Whether each cell is exported, and its rows are the precisions."""


RECIPE: Mapping[str, Any] = {
    "pooling": "first",
    "max_tokens": 128,
    "weight_decay": 0.1,
    "label_smoothing": 0.1,
    "early_stopping_patience": 3,
}
"""The same for both models and in every experiment, or their figures could not be set side by side."""

RANDOM_SPLIT = "random test part"
SST2 = Exam(RANDOM_SPLIT, "pooled-sst2")
LEAK = (
    "Random test part: a tenth of the pooled phrases, drawn by the seed. SST-2's phrases are pieces of its sentences, "
    "so pieces of one sentence fall on both sides of that split, and a model is asked about what it has nearly seen. "
    "The official validation split holds whole sentences that are new, and is harder. Its sentences are in the pool, "
    "as in the source; but those that fall into the training part, or the part that chooses its weights, are left out."
)
OFFICIAL = Exam("official validation", "sst2", "validation")


def _both(
    row: str,
    data: str,
    epochs: int,
    tests: tuple[Exam, ...],
    published: tuple[float, float] | None = None,
    **options: Any,
) -> tuple[Cell, Cell]:
    """Baseline and recurrent; the published figures are those of the first test."""
    of = [{tests[0].title: figure} for figure in published] if published else [{}, {}]
    baseline, recurrent = (
        Cell(row, model, data, epochs, tests, figure, options)
        for model, figure in zip(("baseline", "recurrent"), of, strict=True)
    )
    return baseline, recurrent


_AT_BOTH = (SST2, OFFICIAL)
_YELP = Exam("Yelp, random test part", "pooled-yelp")
_PRECISIONS = ("fp32", "fp16")
EXPERIMENTS: Mapping[Name, Experiment] = {
    "data-size": Experiment(
        "Data size: how much each model needs to learn from",
        (LEAK, "Smaller shares are trained for more epochs, as the recipe says."),
        (
            *_both("10 %", "pooled-sst2", 12, _AT_BOTH, (0.7661, 0.7453), train_share=0.1),
            *_both("50 %", "pooled-sst2", 6, _AT_BOTH, (0.8903, 0.8791), train_share=0.5),
            *_both("100 %", "pooled-sst2", 4, _AT_BOTH, (0.9022, 0.8977)),
        ),
    ),
    "length": Experiment(
        "Length: trained and tested on the longest and on the shortest phrases",
        (LEAK, "Length is counted in words; of phrases alike in length the seed decides."),
        (
            *_both("longest 30 %", "longest-sst2", 8, (Exam(RANDOM_SPLIT, "longest-sst2"), OFFICIAL), (0.8666, 0.8710)),
            *_both(
                "shortest 30 %", "shortest-sst2", 8, (Exam(RANDOM_SPLIT, "shortest-sst2"), OFFICIAL), (0.7610, 0.7522)
            ),
        ),
    ),
    "yelp": Experiment(
        "Yelp: the protocol on reviews of businesses",
        ("Published with as many texts as SST-2 has; where there are fewer here, all are used.",),
        _both("Yelp", "pooled-yelp", 2, (_YELP,), (0.8796, 0.8956)),
    ),
    "transfer": Experiment(
        "Transfer: from SST-2 to Yelp, without training on Yelp",
        ("The models of the experiment data-size (100 %), asked about the test part of the experiment yelp.", LEAK),
        _both("SST-2", "pooled-sst2", 4, (_YELP, SST2, OFFICIAL)),
    ),
    "domain": Experiment(
        "Domain: which of three sorts of reviews a text is",
        ("Films (IMDB), local businesses (Yelp), online shopping (Amazon), as many of each.",),
        _both(
            "domain", "balanced-domain", 1, (Exam(RANDOM_SPLIT, "balanced-domain"),), (0.9840, 0.9865), max_tokens=64
        ),
    ),
    "precision": Experiment(
        "Precision: what FP16 and INT8 cost, and a wider recurrent model",
        (
            "Figures as the engine that serves gives them, on the random test part, at full depth. On a CPU the FP16 "
            "graphs are computed in FP32, so their time is that of FP32.",
        ),
        (
            Cell("", "baseline", "pooled-sst2", 4, (SST2,), dict(zip(_PRECISIONS, (0.9022, 0.9021), strict=True))),
            Cell("", "recurrent", "pooled-sst2", 4, (SST2,), dict(zip(_PRECISIONS, (0.8977, 0.8977), strict=True))),
            Cell(
                "",
                "recurrent 384",
                "pooled-sst2",
                4,
                (SST2,),
                dict(zip(_PRECISIONS, (0.9100, 0.9100), strict=True)),
                {"width": 384, "heads": 6},
            ),
        ),
        by_precision=True,
    ),
    "recurrence": Experiment(
        "Recurrence: what running the layers again brings, and what sharing their weights costs",
        (
            "`recurrent` runs three layers of width 256 twice. `recurrent, once` is as large and does half the work; "
            "`baseline 256` does as much work, in six such layers with weights of their own.",
            LEAK,
        ),
        (
            *_both("", "pooled-sst2", 4, _AT_BOTH),
            Cell("", "recurrent, once", "pooled-sst2", 4, _AT_BOTH, options={"recurrent_depth": 1}),
            Cell("", "baseline 256", "pooled-sst2", 4, _AT_BOTH, options={"width": 256, "heads": 4}),
        ),
    ),
}
