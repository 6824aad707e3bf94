"""The policies: whom they choose, that they stay with it, and what they refuse at start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import SettingsError
from service.routing import Facts, Loaded, Plan, build_policy, position, shortest

BOTH = {"sentiment": ["baseline", "recurrent"], "domain": ["baseline", "recurrent"]}
APART = {"sentiment": ["baseline", "recurrent"], "domain": ["baseline"]}
IDLE = {"recurrent": 0.0, "baseline": 0.0}
NAMES = st.sampled_from(["recurrent", "baseline"])


def plan(
    setting: str,
    loaded: Loaded = BOTH,
    *,
    task: str = "sentiment",
    id: str = "an id",  # noqa: A002  # as the facts call it
    key: str = "a key",
    ahead: Mapping[str, float] = IDLE,
) -> Plan[str]:
    return build_policy(setting, loaded)(Facts(task, id, key, ahead.__getitem__))


def test_fixed_always_names_the_same() -> None:
    chosen = {plan("fixed:baseline", task=task, id=str(n), key=str(n)) for task in BOTH for n in range(50)}
    assert chosen == {Plan("baseline")}


@pytest.mark.parametrize(
    ("setting", "whole"),
    [
        ("fixed:recurrent", Plan("recurrent")),
        ("split:recurrent=1,baseline=0", Plan("recurrent")),
        ("shadow:recurrent,baseline=1", Plan("recurrent", shadow="baseline")),
        ("shadow:baseline,recurrent=1", Plan("baseline", shadow="recurrent")),
        ("cascade:recurrent,baseline=0.9", Plan("recurrent", then="baseline", threshold=0.9)),
        ("cascade:baseline,recurrent=0.9", Plan("baseline", then="recurrent", threshold=0.9)),
        ("least-loaded:recurrent,baseline", Plan("recurrent")),
    ],
)
def test_a_task_with_one_architecture_is_answered_by_that_alone(setting: str, whole: Plan[str]) -> None:
    assert plan(setting, APART) == whole
    assert plan(setting, APART, task="domain") == Plan("baseline")


def test_a_task_with_neither_of_several_is_refused_at_start() -> None:
    loaded = {"sentiment": ["baseline", "recurrent"], "domain": ["wide", "deep"]}
    for setting in ("cascade:recurrent,baseline=0.5", "least-loaded:recurrent,baseline", "shadow:recurrent,wide=1"):
        with pytest.raises(SettingsError, match="task domain has deep, wide: name one of those"):
            build_policy(setting, loaded)


def test_split_shares_by_weight() -> None:
    policy = build_policy("split:recurrent=90,baseline=10", BOTH)
    counted = Counter(policy(Facts("sentiment", "", str(key), IDLE.__getitem__)).first for key in range(5000))
    assert counted["baseline"] == pytest.approx(500, rel=0.25)
    assert counted["recurrent"] == 5000 - counted["baseline"]


@given(st.text(), st.text(), st.text(), st.integers(0, 100), st.integers(1, 100))
def test_split_sticks_to_a_key_whatever_the_request(key: str, one: str, other: str, left: int, right: int) -> None:
    setting = f"split:recurrent={left},baseline={right}"
    first = plan(setting, BOTH, id=one, key=key)
    assert first == plan(setting, dict(reversed(BOTH.items())), id=other, key=key)
    assert first.first in BOTH["sentiment"]


@given(st.text(), st.integers(1, 99))
def test_more_weight_never_takes_a_key_away(key: str, weight: int) -> None:
    """A rollout from 10 to 20 percent keeps those who are in it."""
    if plan(f"split:recurrent={weight},baseline={100 - weight}", key=key).first == "recurrent":
        assert plan(f"split:recurrent={weight + 1},baseline={99 - weight}", key=key).first == "recurrent"


def test_a_weight_of_zero_gets_nothing() -> None:
    assert {plan("split:recurrent=0,baseline=1", key=str(key)).first for key in range(200)} == {"baseline"}


def test_a_key_s_place_never_changes() -> None:
    assert position("a-request") == pytest.approx(0.07507, abs=1e-5)  # over releases too: experiments rest on it


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_shadow_takes_its_share_of_the_requests_of_one_key(share: float) -> None:
    policy = build_policy(f"shadow:recurrent,baseline={share}", BOTH)
    plans = [policy(Facts("domain", f"request {n}", "one key", IDLE.__getitem__)) for n in range(5000)]
    assert {plan.first for plan in plans} == {"recurrent"}
    assert sum(plan.shadow == "baseline" for plan in plans) == pytest.approx(share * 5000, rel=0.25)


@given(st.text(), st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True))
def test_a_larger_share_shadows_all_of_a_smaller_one_s_requests(id: str, share: float, other: float) -> None:  # noqa: A002
    less, more = (plan(f"shadow:recurrent,baseline={share}", id=id).shadow for share in sorted((share, other)))
    assert less is None or more == "baseline"


@given(NAMES, NAMES, st.floats(0, 1e6), st.floats(0, 1e6))
def test_least_loaded_takes_the_shorter_and_of_equal_ones_the_first(
    first: str, second: str, ahead: float, behind: float
) -> None:
    if first == second:
        return
    seconds = {first: ahead, second: behind}
    chosen = plan(f"least-loaded:{first},{second}", ahead=seconds).first
    assert chosen == (second if behind < ahead else first)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=6))
def test_the_shortest_is_the_first_of_the_least(seconds: list[float]) -> None:
    place = shortest(seconds)
    assert all(seconds[place] <= other for other in seconds)
    assert all(seconds[place] < other for other in seconds[:place])


def test_a_plan_is_resolved_whole() -> None:
    found = Plan("a", "b", 0.5, "c").resolve(str.upper)
    assert found == Plan("A", "B", 0.5, "C")
    assert Plan("a").resolve(str.upper) == Plan("A")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("", "must be fixed:NAME, split:NAME=WEIGHT,NAME=WEIGHT, shadow:PRIMARY,SHADOW=SHARE, cascade:"),
        ("fixed:", "must be fixed:NAME"),
        ("random:recurrent", "or least-loaded:NAME,NAME$"),
        ("fixed:recurent", "names recurent, but loaded are baseline, recurrent"),
        ("split:recurrent=90", "must be split:NAME=WEIGHT,NAME=WEIGHT; two names are needed, and fixed:recurrent is"),
        ("split:recurrent", "must be split:NAME=WEIGHT,NAME=WEIGHT; 'recurrent' is not"),
        ("split:recurrent=-1", "the weight is a whole number"),
        (f"split:recurrent={'9' * 400},baseline=1", "at most 9 digits"),
        ("split:recurrent=1,recurrent=2", "each name comes once"),
        ("split:recurrent=0,baseline=0", "one weight must be above 0"),
        ("split:recurent=1,baseline=1", "names recurent, but loaded are baseline, recurrent"),
        ("shadow:recurrent,baseline", "must be shadow:PRIMARY,SHADOW=SHARE; the number is missing"),
        ("shadow:recurrent,baseline=", "'' is not a number above 0 and at most 1"),
        ("shadow:recurrent,baseline=10%", "'10%' is not a number"),
        ("shadow:recurrent,baseline=0", "'0' is not a number above 0"),
        ("shadow:recurrent,baseline=1.5", "'1.5' is not a number above 0 and at most 1"),
        ("shadow:recurrent,baseline=nan", "'nan' is not a number"),
        ("shadow:recurrent,baselin=0.1", "names baselin, but loaded are baseline, recurrent"),
        ("shadow:recurrent,recurrent=0.1", "two different names are needed"),
        ("cascade:recurrent=0.9", "must be cascade:FIRST,SECOND=THRESHOLD; two different names are needed"),
        ("cascade:recurrent,baseline,wide=0.9", "two names and no more"),
        ("cascade:recurrent,baseline=high", "'high' is not a number"),
        ("cascade:recurent,baseline=0.9", "names recurent, but loaded are"),
        ("least-loaded:recurrent", "must be least-loaded:NAME,NAME; two different names"),
        ("least-loaded:recurrent,,baseline", "two different names are needed"),
        ("least-loaded:recurrent,wide", "names wide, but loaded are"),
    ],
)
def test_a_wrong_policy_stops_the_start(setting: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        build_policy(setting, APART)
