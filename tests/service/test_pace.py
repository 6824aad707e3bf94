"""How well the pace foretells when a queue is empty: from the first moment, after idle time, and after a stand-still.

Turns are simulated, with the service's own decisions about them and an engine that takes the same time for each token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.jobs import CALL_TOKENS, Pace, Pool, Text, Waiting
from service.scheduling import choose_batch, most_urgent
from tests.service.fakes import fake_app, running

TOKEN_SECONDS = 30e-6
BATCH_TOKENS = 256
LONGEST = 250
OFF = 3.0  # a foretold time may be so many times too long or too short
FEW = 20  # texts, of which a batch that is nearly done is too large a part
LENGTHS = {"short": [20] * 200, "long": [LONGEST] * 30, "mixed": [10, 20, 30, LONGEST] * 20}
NOBODY: Any = None


class Simulation:
    """A queue, the turns that empty it, and what was foretold after each of them."""

    def __init__(self, slower_when_loaded: float = 1.0) -> None:
        tokens = 2 * (LONGEST + CALL_TOKENS)
        self.pace = Pace(slower_when_loaded * tokens * TOKEN_SECONDS, tokens, 1)
        self.pool = Pool()
        self.now = 0.0
        self.foretold: list[tuple[float, float]] = []  # when, and for when

    def submit(self, lengths: Sequence[int], iterations: int = 2) -> None:
        if not self.pool.texts:
            self.pace.starts(self.now)
        for length in lengths:
            text = Text([0] * length, iterations)
            number = max(self.pool.texts, default=0) + 1
            self.pool.add(Waiting(number, text, NOBODY, self.pool, NOBODY, self.now, self.now + 1e9))
        self.foretell()

    def turn(self, stalled: float = 0.0) -> None:
        texts = list(self.pool.texts.values())
        leader = most_urgent([self.now - text.arrived for text in texts], [text.work for text in texts])
        near = list(self.pool.near(texts[leader].length, CALL_TOKENS))
        near.sort(key=lambda text: text is not texts[leader])  # it comes first
        batch = [near[place] for place in choose_batch([text.length for text in near], BATCH_TOKENS, CALL_TOKENS)]
        padded = len(batch) * max(text.length for text in batch)
        began = self.now
        self.now += (padded + CALL_TOKENS) * TOKEN_SECONDS + stalled
        for text in batch:
            text.iterations += 1
        done = [text for text in batch if text.iterations == text.text.max_iterations]
        self.pace.saw(batch, done, began, self.now)
        for text in done:
            self.pool.remove(text)

    def foretell(self) -> None:
        if len(self.pool.texts) > FEW:
            self.foretold.append((self.now, self.now + self.pace.seconds(admitted=self.pool.admitted)))

    def empty(self) -> None:
        """Take turns until nothing waits, and see whether that came when it was foretold."""
        while self.pool.texts:
            self.turn()
            self.foretell()
        assert self.foretold
        for when, until in self.foretold:
            assert (self.now - when) / OFF <= until - when <= (self.now - when) * OFF
        self.foretold.clear()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("iterations", [1, 2, 8])
def test_the_first_texts_are_foretold_before_one_is_done(lengths: str, iterations: int) -> None:
    simulation = Simulation()
    simulation.submit(LENGTHS[lengths], iterations)
    simulation.empty()


@pytest.mark.parametrize("stalled", [0.1, 1.0, 5.0, 60.0])
@pytest.mark.parametrize("turns", [0, 1, 50])
def test_a_stand_still_is_no_pace(stalled: float, turns: int) -> None:
    simulation = Simulation()
    simulation.submit([20] * 1000)
    for _ in range(turns):
        simulation.turn()
    simulation.foretold.clear()  # nobody foretells a stand-still
    simulation.turn(stalled)
    simulation.foretell()
    simulation.empty()


def test_idle_time_is_none_that_texts_take() -> None:
    simulation = Simulation()
    for lengths in ([20] * 100, [LONGEST] * 25, [20] * 30):
        simulation.submit(lengths)
        simulation.empty()
        simulation.now += 1000


def test_texts_that_take_many_turns_do_not_look_slower_than_they_are() -> None:
    simulation = Simulation()
    simulation.submit([20] * 100)
    simulation.empty()
    simulation.submit([LONGEST] * 25, iterations=16)
    simulation.empty()


def test_a_first_measurement_that_was_wrong_is_forgotten() -> None:
    simulation = Simulation(slower_when_loaded=20)
    simulation.submit([20] * 1000)
    for _ in range(50):
        simulation.turn()
    simulation.foretold.clear()
    simulation.empty()


def turn_of(pace: Pace, tokens: int, now: float) -> None:
    text = Waiting(0, Text([0] * tokens, 1), NOBODY, NOBODY, NOBODY, 0.0, 1e9, iterations=1)
    pace.saw([text], [text], now, now)


@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(1e-6, 1e3)), min_size=1, max_size=30),
    st.integers(1, 500),
    st.floats(0, 1e6),
)
def test_one_turn_doubles_it_at_the_most(turns: list[tuple[int, float]], tokens: int, seconds: float) -> None:
    pace, now = Pace(), 0.0
    for length, took in turns:
        turn_of(pace, length, now := now + took)
    before = pace.seconds(admitted=1000)
    turn_of(pace, tokens, now + seconds)
    assert pace.seconds(admitted=1000) <= 2.001 * before


@pytest.mark.parametrize("times", [0.01, 10, 1000])
def test_what_has_become_slower_or_faster_for_good_is_learned(times: float) -> None:
    pace, now = Pace(), 0.0
    for _ in range(30):
        turn_of(pace, 100, now := now + 0.01)
    for _ in range(100):
        turn_of(pace, 100, now := now + 0.01 * times)
    assert pace.seconds(admitted=10 * (100 + CALL_TOKENS)) == pytest.approx(0.1 * times, rel=0.7)


def test_a_model_that_has_answered_nothing_knows_its_pace() -> None:
    with running(fake := fake_app()):
        batcher = fake.app.state.runtime.serving.models["sentiment", "recurrent"].batcher
        fake.recurrent.gate.clear()
        job = batcher.submit([Text([1, 2, 3], 2)] * 5, time.monotonic() + 100)
        assert batcher.backlog_seconds > 0
        job.abandon("client")
