"""An engine whose hidden states stay on the device between the iterations of texts that go on together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnxruntime as ort

from service.engine import Engine, FloatArray, pad_ids, pad_states


@dataclass(frozen=True)
class DeviceBatch:
    """What one call left on the device: hidden states (texts, longest, width), and each text's length."""

    value: ort.OrtValue
    lengths: list[int]

    @cached_property
    def host_BLD(self) -> FloatArray:
        """A copy in the host's memory, made when it is first asked for."""
        values: FloatArray = self.value.numpy()
        return values


@dataclass(frozen=True)
class DeviceState:
    """One text's hidden state: a row of a batch."""

    batch: DeviceBatch
    row: int

    def fetch(self) -> FloatArray:
        """The state (length, width) in the host's memory."""
        return self.batch.host_BLD[self.row, : self.batch.lengths[self.row]]


class DeviceEngine:
    """Runs an engine's graphs on a device with a memory of its own.

    Texts that go on together go on in place. The rows of those that have left are run along as long as they are the
    fewer; a batch that is newly put together goes through the host's memory once.
    """

    def __init__(self, engine: Engine) -> None:
        self.precision, self.provider, self.model_bytes = engine.precision, engine.provider, engine.model_bytes
        self._embed, self._step = engine.embed_session, engine.step_session

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
        """A batch on the device that holds all these states, and in which rows."""
        batch = hidden[0].batch
        if all(state.batch is batch for state in hidden) and 2 * len(hidden) >= len(batch.lengths):
            return batch, [state.row for state in hidden]
        states = [state.fetch() for state in hidden]
        value = ort.OrtValue.ortvalue_from_numpy(pad_states(states), self.provider)
        return DeviceBatch(value, [len(state_LD) for state_LD in states]), list(range(len(states)))


def _rows(batch: DeviceBatch) -> list[DeviceState]:
    return [DeviceState(batch, row) for row in range(len(batch.lengths))]
