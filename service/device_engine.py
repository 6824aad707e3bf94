"""An engine whose hidden states stay on the device between iterations, however texts part and meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import onnxruntime as ort

from service.device_graphs import MOST_BATCHES, gathering_graph
from service.engine import Engine, FloatArray, pad_ids, start_session


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """What one call left on the device: hidden states (texts, longest, width), and each text's length."""

    value: ort.OrtValue
    lengths: list[int]


@dataclass(frozen=True)
class DeviceState:
    """One text's hidden state: a row of a batch."""

    batch: DeviceBatch
    row: int


class DeviceEngine:
    """Runs an engine's graphs on a device with a memory of its own.

    Texts that go on together go on in place. The rows of those that have left are run along as long as they are the
    fewer; else, and where texts of several batches meet, the device gathers their rows.
    """

    def __init__(self, engine: Engine) -> None:
        """Raises SettingsError where the device is not to be had any more."""
        self.precision, self.provider, self.model_bytes = engine.precision, engine.provider, engine.model_bytes
        self._embed, self._step = engine.embed_session, engine.step_session
        self._gather = start_session(gathering_graph(), engine.provider, threads=1)
        width = self._step.get_inputs()[0].shape[-1]
        self._no_batch = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 1, width), dtype=np.float32), engine.provider)

    def embed(self, ids: Sequence[Sequence[int]]) -> list[DeviceState]:
        """The first hidden state of each text; none may be empty."""
        binding = self._embed.io_binding()
        binding.bind_cpu_input("ids", pad_ids(ids))
        binding.bind_output("hidden", self.provider)
        self._embed.run_with_iobinding(binding)
        (hidden,) = binding.get_outputs()
        return _rows(DeviceBatch(hidden, [len(text) for text in ids]))

    def step(self, hidden: Sequence[DeviceState]) -> tuple[list[DeviceState], FloatArray]:
        """One iteration: each text's next hidden state, and the logits (texts, classes)."""
        batch, rows = self._together(hidden)
        mask_BL = np.arange(batch.value.shape()[1]) < np.array(batch.lengths)[:, None]
        binding = self._step.io_binding()
        binding.bind_ortvalue_input("hidden", batch.value)
        binding.bind_cpu_input("mask", mask_BL)
        binding.bind_output("next_hidden", self.provider)
        binding.bind_output("logits", "cpu")
        self._step.run_with_iobinding(binding)
        following, logits = binding.get_outputs()
        states = _rows(DeviceBatch(following, batch.lengths))
        return [states[row] for row in rows], logits.numpy()[rows]

    def _together(self, hidden: Sequence[DeviceState]) -> tuple[DeviceBatch, list[int]]:
        """A batch that holds all these states, and in which rows."""
        states = list(hidden)
        while True:
            batches = _batches(states)
            if len(batches) == 1 and 2 * len(states) >= len(batches[0].lengths):
                return batches[0], [state.row for state in states]
            some = set(batches[:MOST_BATCHES])
            places = [place for place, state in enumerate(states) if state.batch in some]
            gathered = self._gathered([states[place] for place in places])
            for place, state in zip(places, gathered, strict=True):
                states[place] = state

    def _gathered(self, states: Sequence[DeviceState]) -> list[DeviceState]:
        """These states, of MOST_BATCHES batches at most, as the rows of one."""
        batches = _batches(states)
        shapes = [batch.value.shape() for batch in batches]
        before = accumulate((texts * length for texts, length, _width in shapes), initial=0)
        first = {batch: (start, length) for batch, start, (_, length, _) in zip(batches, before, shapes, strict=False)}
        starts = np.array([first[state.batch][0] + state.row * first[state.batch][1] for state in states])
        lengths = [state.batch.lengths[state.row] for state in states]
        # A text is padded with its own last token: were it another's, that one's NaN would reach it.
        places_BL = starts[:, None] + np.minimum(np.arange(max(lengths)), np.array(lengths)[:, None] - 1)
        binding = self._gather.io_binding()
        for number in range(MOST_BATCHES):
            value = batches[number].value if number < len(batches) else self._no_batch
            binding.bind_ortvalue_input(f"batch{number}", value)
        binding.bind_cpu_input("places", places_BL.astype(np.int32))
        binding.bind_output("gathered", self.provider)
        self._gather.run_with_iobinding(binding)
        (gathered,) = binding.get_outputs()
        return _rows(DeviceBatch(gathered, lengths))


def _batches(states: Sequence[DeviceState]) -> list[DeviceBatch]:
    return list(dict.fromkeys(state.batch for state in states))


def _rows(batch: DeviceBatch) -> list[DeviceState]:
    return [DeviceState(batch, row) for row in range(len(batch.lengths))]
