"""Who runs next: nobody starves, nobody runs twice, padding stays cheaper than what it saves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scheduling import ALIKE, choose_batch, cut_short, most_urgent

CALL_TOKENS = 6
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)
BUDGETS = st.integers(1, 2048)


@given(LENGTHS, BUDGETS)
def test_the_first_always_runs_and_nobody_twice(lengths: list[int], budget: int) -> None:
    chosen = choose_batch(lengths, budget, CALL_TOKENS)
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(range(len(lengths)))


@given(LENGTHS, BUDGETS)
def test_a_padded_batch_stays_within_the_budget_unless_one_text_alone_does_not(lengths: list[int], budget: int) -> None:
    chosen = choose_batch(lengths, budget, CALL_TOKENS)
    assert len(chosen) == 1 or len(chosen) * max(lengths[place] for place in chosen) <= budget


@given(LENGTHS, BUDGETS, st.integers(0, 40))
def test_the_padding_is_never_dearer_than_the_calls_that_it_saves(
    lengths: list[int], budget: int, call_tokens: int
) -> None:
    batch = [lengths[place] for place in choose_batch(lengths, budget, call_tokens)]
    assert len(batch) * max(batch) - sum(batch) <= call_tokens * (len(batch) - 1)


@given(st.integers(1, 50), st.integers(1, 60))
def test_texts_of_one_length_all_go_as_far_as_the_budget_allows(length: int, count: int) -> None:
    assert choose_batch([length] * count, 400, CALL_TOKENS) == list(range(max(1, min(count, 400 // length))))


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "chosen"),
    [
        ([10], 5, [0]),  # too long for the budget: alone
        ([10, 10, 10], 20, [0, 1]),
        ([10, 26], 1000, [0, 1]),  # 16 tokens of padding are what a call costs
        ([10, 27], 1000, [0]),
        ([27, 10], 1000, [0]),
        ([26, 10], 1000, [0, 1]),
        ([20, 21, 19, 50], 1000, [0, 1, 2]),
        ([20, 12, 28], 1000, [0, 1, 2]),
        ([20, 12, 29, 10], 1000, [0, 1, 3]),  # two would be padded by nine each
        ([20, 20, 10, 30], 60, [0, 1, 2]),
    ],
)
def test_the_edges_of_choosing(lengths: list[int], max_tokens: int, chosen: list[int]) -> None:
    assert choose_batch(lengths, max_tokens, 16) == chosen


@pytest.mark.parametrize(
    ("waited", "work", "chosen"),
    [
        ([1.0], [5], 0),
        ([1.0, 1.0], [5, 5], 0),  # of equals the first
        ([1.0, 0.6], [ALIKE, 0], 1),  # the short one goes first
        ([1.2, 0.6], [ALIKE, 0], 0),  # until the long one has waited enough
        ([0.0, 0.0], [10, 1], 0),
    ],
)
def test_the_edges_of_urgency(waited: list[float], work: list[int], chosen: int) -> None:
    assert most_urgent(waited, work) == chosen


@given(
    st.lists(st.lists(st.integers(1, 20 * ALIKE), max_size=4), min_size=1, max_size=60),
    st.integers(2, 6),
    st.lists(st.integers(1, 20 * ALIKE), min_size=1, max_size=5),
)
def test_however_many_short_texts_come_a_text_waits_at_most_that_long(
    arrivals: list[list[int]], room: int, others: list[int]
) -> None:
    """One text at a time, each taking as long as it is; whoever finds the queue full is sent away."""
    most = 20 * ALIKE
    ratio = (most + ALIKE) / (1 + ALIKE)
    bound = ratio * room * most + most
    clock, pool = 0.0, [(0.0, most), *((0.0, work) for work in others)][:room]
    turn = 0
    while pool:
        place = most_urgent([clock - arrived for arrived, _ in pool], [work for _, work in pool])
        arrived, work = pool.pop(place)
        clock += work
        assert clock - arrived <= bound
        newcomers = arrivals[turn % len(arrivals)] if turn < 2000 else []  # again and again, as long as anybody waits
        pool += [(clock, work) for work in newcomers][: room - len(pool)]
        turn += 1


@dataclass
class Deep:
    """A text of several turns, the first of which is all that it wants if fewer will do."""

    arrived: float
    turn: int
    left: int
    fewer_will_do: bool
    begun: bool = False

    @property
    def wanted(self) -> int:
        return self.turn if self.fewer_will_do and not self.begun else self.turn * self.left


DEEP = st.tuples(st.integers(1, 2 * ALIKE), st.integers(1, 10), st.booleans())


@given(st.lists(st.lists(DEEP, max_size=4), min_size=1, max_size=40), st.integers(2, 6))
def test_nor_does_it_wait_longer_for_those_who_want_their_first_turn_soon(
    arrivals: list[list[tuple[int, int, bool]]], room: int
) -> None:
    """One turn at a time; whoever finds the queue full is sent away."""
    most = 20 * ALIKE
    bound = (most + ALIKE) / (1 + ALIKE) * room * most + most
    clock, turn, pool = 0.0, 0, [Deep(0.0, 2 * ALIKE, 10, fewer_will_do=False)]
    while pool:
        text = pool[most_urgent([clock - text.arrived for text in pool], [text.wanted for text in pool])]
        clock, text.left, text.begun = clock + text.turn, text.left - 1, True
        if not text.left:
            pool.remove(text)
            assert clock - text.arrived <= bound
        newcomers = arrivals[turn % len(arrivals)] if turn < 1000 else []
        pool += [Deep(clock, *asked) for asked in newcomers][: room - len(pool)]
        turn += 1


def test_a_long_text_is_not_starved_by_short_ones() -> None:
    """The queue is always full of the shortest texts: the long one still runs, and not at the bound only."""
    long = 20 * ALIKE
    clock, pool = 0.0, [(0.0, 1)] * 4 + [(0.0, long)]
    while True:
        place = most_urgent([clock - arrived for arrived, _ in pool], [work for _, work in pool])
        _, work = pool.pop(place)
        if work == long:
            break
        clock += work
        pool.append((clock, 1))
        assert clock < 21 * 4 * long
    assert clock > 4  # those that came with it went first, and more


@pytest.mark.parametrize(
    ("backlog", "brown_out", "time_left", "turn", "expected"),
    [
        (0.0, 1.0, 10.0, 0.1, None),
        (0.99, 1.0, 10.0, 0.1, None),
        (1.0, 1.0, 10.0, 0.1, "overload"),
        (0.0, math.inf, 0.2, 0.1, None),
        (0.0, math.inf, 0.19, 0.1, "deadline"),
        (0.0, math.inf, 0.0, 0.0, None),  # nothing measured yet: it may try
    ],
)
def test_the_edges_of_cutting_short(
    backlog: float, brown_out: float, time_left: float, turn: float, expected: str | None
) -> None:
    found = cut_short(backlog=backlog, brown_out=brown_out, time_left=time_left, turn=turn)
    assert found == expected
