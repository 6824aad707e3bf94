"""Stand-ins for what takes long: an engine whose answers follow from the ids alone, and an app that runs on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from service.app import create_app
from service.bundle import Bundle
from service.manifest import Calibration, Card, Lengths, Manifest
from service.settings import Settings

FloatArray = NDArray[np.float32]
CLASS_TOKEN = 256
MAX_TOKENS = 32
LABELS = {"sentiment": ["negative", "positive"], "domain": ["movies", "local business", "online shopping"]}


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, after the class token: lengths are easy to foresee."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"[CLS]": CLASS_TOKEN}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", CLASS_TOKEN)])
    return tokenizer


def fake_bundle(
    task: str = "sentiment",
    architecture: str = "recurrent",
    temperatures: Sequence[float] = (1.0,),
    exit_threshold: float | None = None,
) -> Bundle:
    """A bundle that was never on disk; its manifest has what the service reads."""
    manifest = Manifest.model_construct(
        schema_version=4,
        name=f"{task}-{architecture}",
        task=task,
        architecture=architecture,
        version="0123456789ab",
        labels=LABELS[task],
        max_tokens=MAX_TOKENS,
        tail_tokens=0,
        parameters=1000,
        iterations=2 if architecture == "recurrent" else 1,
        precisions={},
        quality={"test": {"fp32": []}},
        calibration=Calibration(
            split="test",
            texts=1,
            temperatures=list(temperatures),
            exit_threshold=exit_threshold,
            ece={},
            reliability=[],
            exit_curve={},
        ),
        card=Card(
            data=[],
            recipe={},
            lengths=Lengths(median=1, percentile_95=1, share_cut=0),
            weakest=[],
            by_length=[],
            limits=["not a model"],
        ),
    )
    return Bundle(Path("nowhere"), manifest, byte_tokenizer())


@dataclass
class FakeEngine:
    """Deterministic logits from the ids and the iteration; counts, fails and blocks when told to."""

    classes: int = 2
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    provider: Literal["cpu", "cuda"] = "cpu"
    model_bytes: int = 1234
    steps: int = 0
    die: bool = False  # take the thread with it at the next step
    poison: set[tuple[int, ...]] = field(default_factory=set)
    gate: threading.Event = field(default_factory=threading.Event)  # cleared: `step` waits
    entered: threading.Event = field(default_factory=threading.Event)  # set once a step has been asked for

    def __post_init__(self) -> None:
        self.gate.set()

    def fail_for(self, text: str) -> None:
        """Fail every batch that holds this text."""
        self.poison.add(tuple(byte_tokenizer().encode(text).ids))

    def embed(self, ids: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Each text's state, (length, 2): its ids, and how often it was stepped."""
        return [np.array([[token, 0] for token in text], dtype=np.float32) for text in ids]

    def step(self, hidden: Sequence[FloatArray]) -> tuple[list[FloatArray], FloatArray]:
        """Step every text once."""
        self.entered.set()
        if not self.gate.wait(timeout=30):
            raise TimeoutError("the test left the gate closed")
        if self.die:
            raise SystemExit
        self.steps += 1
        if any(tuple(map(int, state_LD[:, 0])) in self.poison for state_LD in hidden):
            raise RuntimeError("poisoned")
        stepped = [state_LD + np.array([0, 1], dtype=np.float32) for state_LD in hidden]
        return stepped, np.array([self.logits(state_LD) for state_LD in stepped], dtype=np.float32)

    def logits(self, state_LD: FloatArray) -> list[float]:
        """What the fake thinks of a text, surer with each iteration."""
        phase = float(state_LD[:, 0] @ np.arange(1, len(state_LD) + 1))
        return [float(state_LD[0, 1]) * np.sin(phase * (label + 1)) for label in range(self.classes)]


@dataclass
class Fake:
    """An app on fake engines, by (task, architecture)."""

    app: FastAPI
    engines: dict[tuple[str, str], FakeEngine]

    @property
    def recurrent(self) -> FakeEngine:
        """The engine that answers when nothing else is asked for."""
        return self.engines["sentiment", "recurrent"]


def fake_app(bundles: Sequence[Bundle] | None = None, **settings: Any) -> Fake:
    """Make an app; by default two architectures for sentiment and a baseline for domain."""
    served = bundles or [fake_bundle(), fake_bundle(architecture="baseline"), fake_bundle("domain", "baseline")]
    engines = {
        (bundle.manifest.task, bundle.manifest.architecture): FakeEngine(len(bundle.manifest.labels))
        for bundle in served
    }

    def make(bundle: Bundle, settings: Settings) -> FakeEngine:
        return engines[bundle.manifest.task, bundle.manifest.architecture]

    return Fake(create_app(Settings(**settings), served, make), engines)


@contextmanager
def running(fake: Fake) -> Iterator[TestClient]:
    """Start the app and wait until it is ready; at the end every gate is opened, so that nothing hangs."""
    with TestClient(fake.app, raise_server_exceptions=False) as client:
        try:
            wait_until(lambda: client.get("/readyz").status_code == 200)
            for engine in fake.engines.values():
                engine.entered.clear()
                engine.steps = 0
            yield client
        finally:
            for engine in fake.engines.values():
                engine.gate.set()


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    """Wait for something that another thread brings about."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)
