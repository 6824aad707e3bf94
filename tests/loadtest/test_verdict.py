"""Who is better at what: only what the rounds agree on."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.options import Options
from loadtest.summary import Summary
from loadtest.tables import Spread
from loadtest.verdict import better, verdict

SPREADS = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=5).map(Spread.of)


def summary(recurrent: dict[str, Any], baseline: dict[str, Any]) -> Summary:
    """From {"load figure": values} of each."""
    made: Summary = {}
    for subject, values in (("recurrent", recurrent), ("baseline", baseline)):
        for name, rounds in values.items():
            load, figure = name.split()
            made.setdefault(load, {}).setdefault(subject, {})[figure] = Spread.of(rounds)
    return made


@given(SPREADS, SPREADS)
def test_a_verdict_does_not_depend_on_whom_one_asks_first(one: Spread, other: Spread) -> None:
    swapped = {"recurrent": "baseline", "baseline": "recurrent", None: None}
    assert better(one, other, "higher") == swapped[better(other, one, "higher")]
    assert better(one, other, "higher") == swapped[better(one, other, "lower")]


@pytest.mark.parametrize(
    ("recurrent", "baseline", "said"),
    [
        ([100, 110, 120], [60, 70, 80], "recurrent"),
        ([60, 70, 80], [100, 110, 120], "baseline"),
        ([60, 90, 101], [100, 110, 120], None),  # the rounds overlap
        ([100, 101, 102], [103, 104, 105], None),  # too near to matter
        ([100], [104], None),
        ([100], [106], "baseline"),
    ],
)
def test_only_a_clear_difference_decides(recurrent: list[float], baseline: list[float], said: str | None) -> None:
    assert better(Spread.of(recurrent), Spread.of(baseline), "higher") == said


def test_each_load_goes_to_the_one_that_is_better_at_it() -> None:
    found = summary(
        {
            "step level_texts_per_second": [800, 820],
            "users p99_ms": [30, 31],
            "lists texts_per_second": [500, 510],
            "memory model_memory_bytes": [7e6],
        },
        {
            "step level_texts_per_second": [500, 520],
            "users p99_ms": [30, 32],
            "lists texts_per_second": [600, 610],
            "memory model_memory_bytes": [20e6],
        },
    )
    said = verdict(found, Options())
    assert list(said) == ["Take recurrent for", "Take baseline for", "No clear difference in"]
    assert said["Take recurrent for"] == [
        "single texts with p99 under 100 ms: recurrent 810 texts/s, baseline 510",
        "model memory: recurrent 7.00 MB, baseline 20.0",
    ]
    assert said["Take baseline for"] == ["throughput, 4 users, lists of 32: recurrent 505 texts/s, baseline 605"]
    assert said["No clear difference in"] == ["p99, 16 users, single texts: recurrent 30.5 ms, baseline 31.0"]


def test_one_that_wins_everything_is_told_so() -> None:
    found = summary({"memory model_memory_bytes": [7e6]}, {"memory model_memory_bytes": [20e6]})
    assert list(verdict(found, Options())) == ["Take recurrent for every load measured"]


def test_one_that_never_kept_the_level_is_named() -> None:
    found = summary({"step level_texts_per_second": [80, 90]}, {"step level_texts_per_second": [0, 0]})
    never = "baseline kept p99 under 100 ms at no rate that was tried"
    assert list(verdict(found, Options())) == ["Take recurrent for every load measured", never]
    once = summary({"step level_texts_per_second": [80, 90]}, {"step level_texts_per_second": [0, 5]})
    assert never not in verdict(once, Options())


def test_both_together_are_set_beside_each_alone() -> None:
    found = summary({"memory peak_memory_bytes": [300e6]}, {"memory peak_memory_bytes": [310e6]})
    found["memory"]["both"] = {"peak_memory_bytes": Spread.of([340e6])}
    said = verdict(found, Options())
    assert said["Both in one process"] == ["process memory: 340 MB; recurrent alone 300, baseline alone 310"]
    assert "Both in one process" not in verdict(found, Options(host="http://127.0.0.1:1"))
