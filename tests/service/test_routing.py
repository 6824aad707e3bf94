"""The policies: whom they choose, that they stay with it, and what they refuse at start."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import SettingsError
from service.routing import build_policy, position

BOTH = {"sentiment": ["baseline", "recurrent"], "domain": ["baseline", "recurrent"]}
APART = {"sentiment": ["baseline", "recurrent"], "domain": ["baseline"]}


def test_fixed_always_names_the_same() -> None:
    policy = build_policy("fixed:baseline", BOTH)
    assert {policy(task, str(key)) for task in BOTH for key in range(50)} == {"baseline"}


@pytest.mark.parametrize("setting", ["fixed:recurrent", "split:recurrent=1"])
def test_a_task_without_the_named_architecture_falls_to_its_only_one(setting: str) -> None:
    policy = build_policy(setting, APART)
    assert (policy("sentiment", "k"), policy("domain", "k")) == ("recurrent", "baseline")


def test_split_shares_by_weight() -> None:
    policy = build_policy("split:recurrent=90,baseline=10", BOTH)
    counted = Counter(policy("sentiment", str(key)) for key in range(5000))
    assert counted["baseline"] == pytest.approx(500, rel=0.25)
    assert counted["recurrent"] == 5000 - counted["baseline"]


@given(st.text(), st.integers(0, 100), st.integers(1, 100))
def test_split_sticks_to_a_key(key: str, recurrent: int, baseline: int) -> None:
    setting = f"split:recurrent={recurrent},baseline={baseline}"
    first, second = build_policy(setting, BOTH), build_policy(setting, dict(reversed(BOTH.items())))
    assert first("domain", key) == second("domain", key) in BOTH["domain"]


def test_a_weight_of_zero_gets_nothing() -> None:
    policy = build_policy("split:recurrent=0,baseline=1", BOTH)
    assert {policy("domain", str(key)) for key in range(200)} == {"baseline"}


def test_a_key_s_place_never_changes() -> None:
    assert position("a-request") == pytest.approx(0.07507, abs=1e-5)  # over releases too: experiments rest on it


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("", "must be fixed:NAME or split:NAME=WEIGHT"),
        ("fixed:", "must be fixed:NAME"),
        ("random:recurrent", "must be fixed:NAME"),
        ("fixed:recurent", "task sentiment has baseline, recurrent"),
        ("split:recurrent", "must be NAME=WEIGHT"),
        ("split:recurrent=-1", "must be NAME=WEIGHT"),
        ("split:recurrent=1,recurrent=2", "each name once"),
        ("split:recurrent=0,baseline=0", "one weight must be above 0"),
        ("split:recurent=1,baseline=1", "names recurent, but loaded are baseline, recurrent"),
    ],
)
def test_a_wrong_policy_stops_the_start(setting: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        build_policy(setting, APART)
