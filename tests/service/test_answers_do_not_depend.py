"""Through the batcher, under mixed load from many sides at once, each text's scores are the scores it has alone."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.app import create_app
from service.batcher import Batcher, Limits
from service.bundle import load_bundle
from service.engine import Engine, Precision, open_engine
from service.engine_thread import EngineThread
from service.jobs import Answer, Text
from service.settings import Settings
from tests import tiny
from tests.service.fakes import Fake, running
from tests.service.test_batcher import Recorder

CLIENTS, REQUESTS, LIST_LENGTH = 8, 12, 6
SECONDS = 60.0
TOLERANCE = 1e-5


def alone(engine: Engine, asked: Text) -> list[NDArray[np.float32]]:
    """The logits after each of a text's iterations when nothing shares its batch."""
    hidden, logits = engine.embed([asked.ids]), []
    for _ in range(asked.max_iterations):
        hidden, logits_BC = engine.step(hidden)
        logits.append(logits_BC[0])
    return logits


def draw(rng: random.Random, vocabulary: int, deepest: int) -> Text:
    ids = [rng.randrange(vocabulary) for _ in range(rng.randint(1, tiny.MAX_TOKENS))]
    return Text(ids, rng.randint(1, deepest), rng.choice([1.0, 1.0, 0.6, 0.99]))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(("architecture", "deepest"), [("recurrent", 4), ("baseline", 1)])
def test_load_changes_no_answer(models_dir: Path, architecture: str, deepest: int, precision: Precision) -> None:
    bundle = load_bundle(models_dir / f"{tiny.DATASET}-{architecture}")
    engine = open_engine(bundle, provider="cpu", precision=precision, threads=2)
    vocabulary, seen = bundle.tokenizer.get_vocab_size(), Recorder()
    thread = EngineThread(stuck_seconds=SECONDS)
    batcher = Batcher(engine, thread, limits=Limits(512, 10_000, 1_000_000), observer=seen)

    def client(number: int) -> list[tuple[Text, Answer]]:
        rng, pairs = random.Random(number), []
        for _ in range(REQUESTS):
            texts = [draw(rng, vocabulary, deepest) for _ in range(rng.randint(1, LIST_LENGTH))]
            found = batcher.submit(texts, time.monotonic() + SECONDS).future.result(timeout=SECONDS)
            for text, answer in zip(texts, found, strict=True):
                assert isinstance(answer, Answer), answer
                pairs.append((text, answer))
        return pairs

    thread.start()
    batcher.start()
    with ThreadPoolExecutor(CLIENTS) as clients:
        answered = [pair for pairs in clients.map(client, range(CLIENTS)) for pair in pairs]
    batcher.stop(timeout=SECONDS)
    thread.end(timeout=SECONDS)

    assert max(texts for texts, _, _ in seen.batches) > LIST_LENGTH, "no batch held texts of two requests"
    for text, answer in answered:
        expected = alone(engine, text)[answer.iterations - 1]
        np.testing.assert_allclose(answer.logits, expected, rtol=0, atol=TOLERANCE)


def test_load_changes_no_answer_of_a_cascade(models_dir: Path) -> None:
    app = create_app(Settings(models_dir=models_dir, routing="cascade:recurrent,baseline=0.99"))
    rng = random.Random(0)
    vocabulary = load_bundle(models_dir / f"{tiny.DATASET}-recurrent").tokenizer.get_vocab()
    words = sorted(filter(str.isalpha, vocabulary))
    lists = [
        [" ".join(rng.choices(words, k=rng.randint(1, 20))) for _ in range(rng.randint(1, LIST_LENGTH))]
        for _ in range(CLIENTS * 6)
    ]

    with running(Fake(app, {})) as client, ThreadPoolExecutor(CLIENTS) as clients:

        def ask(texts: list[str]) -> list[dict[str, Any]]:
            answer = client.post("/classify", json={"inputs": texts})
            assert answer.status_code == 200, answer.text
            results: list[dict[str, Any]] = answer.json()["results"]
            return results

        together = [result for results in clients.map(ask, lists) for result in results]
        apart = [result for texts in lists for text in texts for result in ask([text])]
    assert {result["architecture"] for result in apart} == {"recurrent", "baseline"}, "no text or each was handed on"
    for found, expected in zip(together, apart, strict=True):
        scores, expected_scores = found.pop("scores"), expected.pop("scores")
        assert scores == pytest.approx(expected_scores, abs=TOLERANCE)
        assert found.pop("score") == pytest.approx(expected.pop("score"), abs=TOLERANCE)
        assert found == expected
