"""The engine whose states stay on the device: the same answers as the plain one, however texts part and meet.

The device here is the CPU, through the same bindings as a GPU's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from service.bundle import load_bundle
from service.device_engine import DeviceEngine
from service.engine import open_engine
from tests import tiny


@settings(max_examples=25)
@given(data=st.data())
def test_states_on_the_device_change_nothing(models_dir: Path, data: st.DataObject) -> None:
    bundle = load_bundle(models_dir / f"{tiny.DATASET}-recurrent")
    plain = open_engine(bundle, provider="cpu", precision="int8", threads=1)
    device = DeviceEngine(plain)
    lengths = data.draw(st.lists(st.integers(1, tiny.MAX_TOKENS), min_size=1, max_size=8))
    rng = np.random.default_rng(len(lengths))
    texts = [rng.integers(0, bundle.tokenizer.get_vocab_size(), length).tolist() for length in lengths]
    expected, found = plain.embed(texts), device.embed(texts)
    for _ in range(4):  # each time some of them, in some order
        going = data.draw(st.lists(st.sampled_from(range(len(texts))), min_size=1, unique=True))
        stepped, logits_BC = plain.step([expected[place] for place in going])
        moved, same_BC = device.step([found[place] for place in going])
        np.testing.assert_allclose(same_BC, logits_BC, rtol=0, atol=1e-6)  # a mean may be added up in another order
        for place, state_LD, state in zip(going, stepped, moved, strict=True):
            expected[place], found[place] = state_LD, state
            np.testing.assert_array_equal(state.fetch(), state_LD)


def test_texts_that_go_on_together_stay_where_they_are(models_dir: Path) -> None:
    bundle = load_bundle(models_dir / f"{tiny.DATASET}-recurrent")
    device = DeviceEngine(open_engine(bundle, provider="cpu", precision="fp32", threads=1))
    states = device.embed([[1, 2, 3], [4, 5], [6], [7, 8]])
    states, _ = device.step([states[2], states[0], states[3]])  # in another order, one has left
    device.step(states)
    assert "host_BLD" not in states[0].batch.__dict__, "the states were copied to the host"
    few, _ = device.step(states[:1])  # three of four have left: not worth running them along
    assert "host_BLD" in states[0].batch.__dict__
    assert few[0].batch.lengths == [1]
