"""The engine whose states stay on the device: the same answers as the plain one, however texts part and meet.

The device here is the CPU, through the same bindings as a GPU's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.bundle import load_bundle
from service.device_engine import DeviceEngine, DeviceState
from service.device_graphs import MOST_BATCHES
from service.engine import Engine, FloatArray, Precision, open_engine
from tests import tiny


def plain_engine(models_dir: Path, precision: Precision = "int8") -> Engine:
    bundle = load_bundle(models_dir / f"{tiny.DATASET}-recurrent")
    return open_engine(bundle, provider="cpu", precision=precision, threads=1)


def fetch(state: DeviceState) -> FloatArray:
    values: FloatArray = state.batch.value.numpy()
    return values[state.row, : state.batch.lengths[state.row]]


@settings(max_examples=50)
@given(data=st.data())
def test_states_on_the_device_change_nothing(models_dir: Path, data: st.DataObject) -> None:
    plain = plain_engine(models_dir)
    device = DeviceEngine(plain)
    texts = st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=tiny.MAX_TOKENS), min_size=1, max_size=6)
    expected: list[FloatArray] = []
    found: list[DeviceState] = []
    for _ in range(4):  # each time others join, and some go on, in some order
        joining = data.draw(texts)
        expected += plain.embed(joining)
        found += device.embed(joining)
        going = data.draw(st.lists(st.sampled_from(range(len(found))), min_size=1, unique=True))
        stepped, logits_BC = plain.step([expected[place] for place in going])
        moved, same_BC = device.step([found[place] for place in going])
        np.testing.assert_allclose(same_BC, logits_BC, rtol=0, atol=1e-6)  # a mean may be added up in another order
        for place, state_LD, state in zip(going, stepped, moved, strict=True):
            expected[place], found[place] = state_LD, state
            np.testing.assert_array_equal(fetch(state), state_LD)


@pytest.mark.parametrize("apart", [MOST_BATCHES, MOST_BATCHES + 1, 3 * MOST_BATCHES])
def test_however_many_batches_meet(models_dir: Path, apart: int) -> None:
    plain = plain_engine(models_dir)
    device = DeviceEngine(plain)
    texts = [[1 + place % 20] * (1 + place % 5) for place in range(apart)]
    states, logits_BC = plain.step(plain.embed(texts))
    moved, same_BC = device.step([state for text in texts for state in device.embed([text])])
    np.testing.assert_allclose(same_BC, logits_BC, rtol=0, atol=1e-6)
    for state_LD, state in zip(states, moved, strict=True):
        np.testing.assert_array_equal(fetch(state), state_LD)
    assert len({state.batch for state in moved}) == 1


def test_texts_that_go_on_together_stay_where_they_are(models_dir: Path) -> None:
    device = DeviceEngine(plain_engine(models_dir))
    states = device.embed([[1, 2, 3], [4, 5], [6], [7, 8]])
    states, _ = device.step([states[2], states[0], states[3]])  # in another order, one has left
    assert [state.row for state in states] == [2, 0, 3]
    few, _ = device.step(states[:1])  # three of four have left: not worth running them along
    assert few[0].batch.lengths == [1]


def test_a_text_that_is_no_number_spoils_no_other(models_dir: Path) -> None:
    plain = plain_engine(models_dir, "fp32")  # 8-bit numbers are always some
    device = DeviceEngine(plain)
    (bad,), (good,) = device.embed([[1, 2, 3]]), device.embed([[4, 5]])
    values = np.full(bad.batch.value.shape(), np.nan, dtype=np.float32)
    bad.batch.value.update_inplace(values)
    (_, state), logits_BC = device.step([bad, good])
    (expected_LD,), expected_BC = plain.step(plain.embed([[4, 5]]))
    np.testing.assert_array_equal(fetch(state), expected_LD)
    np.testing.assert_allclose(logits_BC[1:], expected_BC, rtol=0, atol=1e-6)


def test_no_hidden_state_is_copied_to_the_host(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = DeviceEngine(plain_engine(models_dir))
    seen: list[list[int]] = []

    def numpy(value: object) -> object:
        seen.append(value.shape())  # type: ignore[attr-defined]
        return there(value)

    there = type(device.embed([[1]])[0].batch.value).numpy
    monkeypatch.setattr(type(device.embed([[1]])[0].batch.value), "numpy", numpy)
    states = device.embed([[1, 2], [3]]) + device.embed([[4, 5, 6]])
    states, _ = device.step(states)
    device.step(states[:1])
    assert seen == [[3, 2], [1, 2]]  # logits alone
