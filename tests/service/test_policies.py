"""The policies over HTTP: who answers, and that a shadow is never in a caller's way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from service import shadow
from service.batcher import Batcher
from service.bundle import Bundle
from service.classify import Outcome
from service.jobs import Answer
from service.loading import Model
from service.routing import position
from service.runtime import LINGER_SECONDS, Runtime
from service.schemas import ClassifyRequest
from service.texts import Encoded
from tests.service.fakes import Fake, FakeEngine, FloatArray, byte_tokenizer, fake_app, fake_bundle, running, wait_until
from tests.service.live import classify_bytes, live

SHADOW = "shadow:recurrent,baseline=1"
CASCADE = "cascade:recurrent,baseline=0.8"
TEXTS = [f"a film, seen {number} times" for number in range(12)]
RECURRENT = {"architecture": "recurrent", "task": "sentiment"}
BASELINE = {"architecture": "baseline", "task": "sentiment"}
NO_MODEL: Any = None


@dataclass
class Setup:
    """An app at work, and what one asks of it."""

    fake: Fake
    client: TestClient
    pool: ThreadPoolExecutor

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = self.fake.app.state.runtime
        return runtime

    @property
    def recurrent(self) -> FakeEngine:
        return self.fake.recurrent

    @property
    def baseline(self) -> FakeEngine:
        return self.fake.engines["sentiment", "baseline"]

    def batcher(self, architecture: str) -> Batcher:
        return self.runtime.serving.models["sentiment", architecture].batcher

    def post(self, inputs: Any, *, request_id: str = "", **fields: Any) -> httpx2.Response:
        return self.client.post("/classify", json={"inputs": inputs, **fields}, headers={"X-Request-Id": request_id})

    def later(self, inputs: Any, **fields: Any) -> Future[httpx2.Response]:
        return self.pool.submit(self.post, inputs, **fields)

    def results(self, inputs: Any, **fields: Any) -> list[dict[str, Any]]:
        answer = self.post(inputs, **fields)
        assert answer.status_code == 200, answer.text
        results: list[dict[str, Any]] = answer.json()["results"]
        return results

    def count(self, name: str, **labels: str) -> float:
        return self.runtime.metrics.registry.get_sample_value(name, labels) or 0.0

    def shadows(self, result: str) -> float:
        return self.count("refrain_shadow_total", result=result, **BASELINE)

    def unsure(self, threshold: float = 0.8) -> list[str]:
        """The texts of which the recurrent model is less sure."""
        seen = zip(TEXTS, self.results(TEXTS, architecture="recurrent"), strict=True)
        return [text for text, result in seen if result["score"] < threshold]


@contextmanager
def serving(routing: str, bundles: Sequence[Bundle] | None = None, **settings: Any) -> Iterator[Setup]:
    with ThreadPoolExecutor() as pool:
        fake = fake_app(bundles, routing=routing, **settings)
        with running(fake) as client:
            yield Setup(fake, client, pool)


@pytest.mark.parametrize(
    "routing",
    [
        "fixed:baseline",
        "split:recurrent=9,baseline=1",
        "shadow:recurrent,baseline=0.05",
        "cascade:recurrent,baseline=0.9",
        "least-loaded:recurrent,baseline",
    ],
)
def test_models_shows_the_policy_and_a_named_architecture_always_answers(routing: str) -> None:
    with serving(routing) as setup:
        assert setup.client.get("/models").json()["routing"] == routing
        for name in ("recurrent", "baseline"):
            assert {result["architecture"] for result in setup.results(TEXTS, architecture=name)} == {name}


def test_split_sticks_to_the_routing_key_and_tells_nobody() -> None:
    keys, seen = [f"hush-{number}" for number in range(12)], []
    for _ in range(2):  # another process, or the same one after a restart
        with serving("split:recurrent=1,baseline=1") as setup, capture_logs() as lines:
            for key in keys:
                asked = [setup.results("a", routing_key=key)[0]["architecture"] for _ in range(3)]
                assert len(set(asked)) == 1  # whatever the ids of the requests
                seen.append(asked[0])
            assert "hush" not in str(lines) + setup.client.get("/metrics").text
            assert "hush" not in setup.post("a", routing_key="hush" * 40).text
    assert seen[: len(keys)] == seen[len(keys) :]
    assert set(seen) == {"recurrent", "baseline"}


def test_least_loaded_goes_where_less_waits() -> None:
    with serving("least-loaded:recurrent,baseline") as setup:
        for name in ("recurrent", "baseline"):
            setup.results("a pace to be measured", architecture=name)
        assert setup.results("idle")[0]["architecture"] == "recurrent"
        setup.recurrent.gate.clear()
        occupied = setup.later(TEXTS, architecture="recurrent")
        wait_until(lambda: setup.batcher("recurrent").queue_depth == len(TEXTS))
        routed = setup.later("busy")
        wait_until(lambda: setup.batcher("baseline").queue_depth == 1)
        setup.recurrent.gate.set()
        assert routed.result(timeout=10).json()["results"][0]["architecture"] == "baseline"
        assert occupied.result(timeout=10).status_code == 200


# --- cascade -----------------------------------------------------------------------------------------------------


def test_a_cascade_decides_for_each_text_by_itself() -> None:
    with serving(CASCADE) as setup:
        alone = {name: setup.results(TEXTS, architecture=name) for name in ("recurrent", "baseline")}
        expected = [
            one if one["score"] >= 0.8 else other
            for one, other in zip(alone["recurrent"], alone["baseline"], strict=True)
        ]
        by = [result["architecture"] for result in expected]
        assert set(by) == {"recurrent", "baseline"}, "the texts prove nothing"
        with capture_logs() as lines:
            assert setup.results(TEXTS) == expected
        assert setup.results(TEXTS[::-1]) == expected[::-1]
        assert [setup.results(text)[0] for text in TEXTS] == expected
        for name in alone:
            decided = setup.count("refrain_cascade_total", decided_by=name, task="sentiment")
            assert decided == 3 * by.count(name)
        (line,) = (line for line in lines if line["event"] == "request")
        assert (line["architecture"], line["passed_on"]) == ("recurrent", by.count("baseline"))
        ran = [*alone["recurrent"], *(result for result in expected if result["architecture"] == "baseline")]
        assert (line["tokens"], line["iterations"]) == tuple(
            sum(r[key] for r in ran) for key in ("tokens", "iterations")
        )


def test_a_cascade_s_threshold_is_on_probabilities_whatever_is_shown() -> None:
    with serving(CASCADE) as setup:
        shown = setup.results(TEXTS, raw_scores=True, top_k=1)
        assert [r["architecture"] for r in shown] == [r["architecture"] for r in setup.results(TEXTS)]


def test_the_first_of_a_cascade_goes_deeper_before_it_hands_on() -> None:
    def score(text: str, iterations: int) -> float:
        (result,) = setup.results(text, architecture="recurrent", max_iterations=iterations, exit_threshold=1)
        return float(result["score"])

    with serving(CASCADE) as setup:
        deepened = [text for text in TEXTS if 0.6 <= score(text, 1) < 0.8 <= score(text, 2)]
        assert deepened, "the texts prove nothing"
        results = setup.results(deepened, exit_threshold=0.6)
        assert {(result["architecture"], result["iterations"]) for result in results} == {("recurrent", 2)}


def test_a_cascade_s_threshold_is_on_calibrated_probabilities() -> None:
    bundles = [fake_bundle(temperatures=[100.0, 100.0]), fake_bundle(architecture="baseline")]
    with serving(CASCADE, bundles) as setup:
        assert {result["architecture"] for result in setup.results(TEXTS)} == {"baseline"}


def test_a_cascade_s_times_are_those_of_both_models() -> None:
    text = Encoded([1], truncated=False)
    first, second = (
        Outcome(NO_MODEL, text, Answer(np.zeros(2, dtype=np.float32), n, "depth", n, 10 * n), 100 * n) for n in (1, 2)
    )
    both = second.after(first)
    assert (both.answer.queue_seconds, both.answer.inference_seconds, both.tokenize_seconds) == (3, 30, 300)
    assert both.answer.iterations == 2


def test_a_cascade_s_answer_shows_the_time_of_both_models() -> None:
    with serving("cascade:recurrent,baseline=1") as setup:
        setup.recurrent.gate.clear()
        asked = setup.later("a")
        assert setup.recurrent.entered.wait(timeout=10)
        time.sleep(held := 0.05)
        setup.recurrent.gate.set()
        answer = asked.result(timeout=10).json()
        assert answer["results"][0]["architecture"] == "baseline"
        assert answer["timings_ms"]["inference"] >= held * 1000


def test_a_cascade_has_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(CASCADE) as setup:
        text = setup.unsure()[0]
        deadlines: list[float] = []
        submit = Batcher.submit

        def spy(self: Batcher, texts: Any, deadline: float, **options: Any) -> Any:
            deadlines.append(deadline)
            return submit(self, texts, deadline, **options)

        monkeypatch.setattr(Batcher, "submit", spy)
        setup.baseline.gate.clear()
        answer = setup.post(text, deadline_ms=100)
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline")
        assert len(deadlines) == 2 and len(set(deadlines)) == 1
        assert setup.batcher("baseline").queue_depth == 0  # given up, although the engine still has it


def test_a_cascade_that_fails_in_its_second_part_names_the_text() -> None:
    with serving(CASCADE) as setup:
        text = setup.unsure()[-1]
        place = TEXTS.index(text)
        setup.baseline.fail_for(text)
        answer = setup.post(TEXTS)
        assert (answer.status_code, answer.json()["code"], answer.json()["index"]) == (500, "inference_failed", place)
        assert "index" not in setup.post(text).json()
        alone_in_the_second = [other for other in TEXTS if other == text or other not in setup.unsure()]
        assert setup.post(alone_in_the_second).json()["index"] == alone_in_the_second.index(text)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_cascade_whose_second_queue_is_full_refuses_or_rather_has_its_first_s_answers(allowed: bool) -> None:
    with serving(CASCADE, max_queue=4, max_inputs=4) as setup:
        alone = {text: setup.results(text, architecture="recurrent", max_iterations=1)[0] for text in TEXTS}
        sure, unsure = (next(t for t in TEXTS if (alone[t]["score"] < 0.8) is doubtful) for doubtful in (False, True))
        setup.recurrent.entered.clear()
        setup.recurrent.gate.clear()
        setup.baseline.gate.clear()
        asked = setup.later([sure, unsure], max_iterations=1, allow_fewer_iterations=allowed)
        assert setup.recurrent.entered.wait(timeout=10)
        others = setup.later(["a", "b", "c", "d"], architecture="baseline")
        wait_until(lambda: setup.batcher("baseline").queue_depth == 4)
        setup.recurrent.gate.set()
        answer = asked.result(timeout=10)
        if allowed:
            assert answer.json()["results"] == [alone[sure], {**alone[unsure], "degraded": True}]
            assert setup.count("refrain_degraded_texts_total", reason="overload", **RECURRENT) == 1
        else:
            assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
        setup.baseline.gate.set()
        assert others.result(timeout=10).status_code == 200


def test_a_cascade_whose_second_is_late_rather_has_its_first_s_answers_where_that_is_allowed() -> None:
    with serving(CASCADE) as setup:
        text = setup.unsure()[0]
        (alone,) = setup.results(text, architecture="recurrent")
        setup.baseline.gate.clear()
        assert setup.results(text, deadline_ms=1000, allow_fewer_iterations=True) == [{**alone, "degraded": True}]
        assert setup.batcher("baseline").queue_depth == 0
        assert setup.count("refrain_cascade_total", decided_by="recurrent", task="sentiment") == 1
        assert setup.count("refrain_degraded_texts_total", reason="deadline", **RECURRENT) == 1


def test_a_text_that_was_cut_short_under_load_does_not_go_on() -> None:
    with serving("cascade:recurrent,baseline=1", brown_out_ms=0) as setup:
        results = setup.results(TEXTS, allow_fewer_iterations=True)
        assert {(result["architecture"], result["degraded"]) for result in results} == {("recurrent", True)}
        assert setup.count("refrain_degraded_texts_total", reason="overload", **RECURRENT) == len(TEXTS)
        assert {result["architecture"] for result in setup.results(TEXTS)} == {"baseline"}


def test_nothing_runs_for_a_client_that_left_a_cascade_half_way() -> None:
    bundles = [fake_bundle(), fake_bundle(architecture="baseline")]
    with live(bundles, routing="cascade:recurrent,baseline=1") as served:
        baseline = served.fake.engines["sentiment", "baseline"]
        baseline.entered.clear()
        baseline.gate.clear()
        leaver = served.send(classify_bytes("leaver"))
        assert baseline.entered.wait(timeout=10)
        leaver.close()
        wait_until(lambda: served.count("refrain_rejected_total", reason="client_gone") == 1)
        assert served.count("refrain_queue_depth", **BASELINE) == 0
        assert served.count("refrain_dropped_texts_total", reason="client", **BASELINE) == 1
        baseline.gate.set()
        assert served.ask("POST", "/classify", {"inputs": "a"})[0] == 200


# --- shadow ------------------------------------------------------------------------------------------------------


def test_a_shadow_is_compared_and_seen_in_no_answer_and_no_caller_s_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("fixed:recurrent") as setup:
        plain = setup.results(TEXTS, exit_threshold=0.6)
    with serving(SHADOW) as setup:
        truth, contrary = setup.baseline.logits, {tuple(byte_tokenizer().encode(TEXTS[n]).ids) for n in (2, 7, 8)}

        def logits(state_LD: FloatArray) -> list[float]:
            known = truth(state_LD)
            return known[::-1] if tuple(map(int, state_LD[:, 0])) in contrary else known

        monkeypatch.setattr(setup.baseline, "logits", logits)
        assert setup.results(TEXTS, exit_threshold=0.6) == plain
        wait_until(lambda: setup.shadows("agree") + setup.shadows("disagree") == len(TEXTS))
        assert (setup.shadows("agree"), setup.shadows("disagree")) == (len(TEXTS) - 3, 3)
        assert setup.count("refrain_shadow_score_difference_count", **BASELINE) == len(TEXTS)
        wait_until(lambda: setup.count("refrain_shadow_duration_seconds_count", **BASELINE) == 1)
        assert setup.count("refrain_requests_total", code="200", **BASELINE) == 0
        assert setup.count("refrain_request_duration_seconds_count", **BASELINE) == 0
        assert setup.count("refrain_stage_duration_seconds_count", stage="inference", **BASELINE) == 0
        assert setup.count("refrain_batch_texts_sum", **BASELINE) == len(TEXTS)
        assert setup.count("refrain_requests_total", code="200", **RECURRENT) == 1


def test_the_score_difference_is_that_of_the_answered_label_and_the_duration_that_of_inference() -> None:
    with serving(SHADOW) as setup:
        setup.baseline.gate.clear()
        (answered,) = setup.later("a film").result(timeout=10).json()["results"]
        assert setup.baseline.entered.wait(timeout=10)
        time.sleep(held := 0.05)
        setup.baseline.gate.set()
        wait_until(lambda: setup.count("refrain_shadow_duration_seconds_sum", **BASELINE) >= held)
        (other,) = setup.results("a film", architecture="baseline")
        label = answered["label"]
        wait_until(lambda: setup.shadows("agree") == 1)
        difference = setup.count("refrain_shadow_score_difference_sum", **BASELINE)
        assert difference == pytest.approx(abs(answered["score"] - other["scores"][label]), abs=1e-5) and difference > 0


def test_only_a_share_and_no_named_architecture_is_shadowed() -> None:
    with serving("shadow:recurrent,baseline=0.5") as setup:
        for _ in range(20):
            setup.results("named", architecture="recurrent")
        assert setup.baseline.steps == 0
        ids = [f"request-{number}" for number in range(40)]
        drawn = sum(position(request_id) < 0.5 for request_id in ids)
        for request_id in ids:
            assert setup.post("a", request_id=request_id).status_code == 200
        wait_until(lambda: sum(setup.shadows(result) for result in ("agree", "dropped")) == drawn)
        assert 10 < drawn < 30


def test_a_caller_does_not_wait_for_a_blocked_shadow_which_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "SECONDS", 0.2)
    with serving("shadow:baseline,recurrent=1") as setup:
        setup.recurrent.gate.clear()
        assert setup.later("a").result(timeout=10).status_code == 200
        assert setup.recurrent.entered.wait(timeout=10)
        wait_until(lambda: setup.count("refrain_shadow_total", result="dropped", **RECURRENT) == 1)
        assert setup.count("refrain_dropped_texts_total", reason="deadline", **RECURRENT) == 1  # its place is free
        setup.recurrent.gate.set()
        assert setup.post("a", architecture="baseline").status_code == 200
        assert setup.recurrent.steps == 1  # its second iteration was not run


def test_a_shadow_takes_all_its_iterations_whatever_the_caller_allows() -> None:
    with serving("shadow:baseline,recurrent=1", brown_out_ms=0) as setup:
        setup.results("a", allow_fewer_iterations=True)
        wait_until(lambda: setup.count("refrain_shadow_total", result="agree", **RECURRENT) == 1)
        assert setup.recurrent.steps == 2


def test_a_failing_shadow_is_counted_and_that_is_all() -> None:
    with serving(SHADOW) as setup:
        setup.baseline.fail_for("bad")
        assert len(setup.results(["bad", "good"])) == 2
        wait_until(lambda: setup.shadows("failed") + setup.shadows("agree") == 2)
        assert setup.shadows("failed") == 1
        assert setup.count("refrain_requests_total", code="200", **RECURRENT) == 1


def test_a_shadow_that_refuses_a_request_has_failed_for_all_its_texts() -> None:
    small = fake_bundle(architecture="baseline")
    small = replace(small, manifest=small.manifest.model_copy(update={"max_tokens": 8}))
    with serving(SHADOW, bundles=[fake_bundle(), small]) as setup:
        assert len(setup.results(["short", "longer than that"], truncate=False)) == 2
        wait_until(lambda: setup.shadows("failed") == 2)


def test_a_list_of_any_length_is_shadowed() -> None:
    with serving(SHADOW, max_inputs=300, max_batch_tokens=64) as setup:
        assert len(setup.results(["a"] * 300)) == 300
        wait_until(lambda: setup.shadows("agree") + setup.shadows("disagree") == 300)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the death is the test
def test_a_caller_has_the_answer_before_the_shadow_kills_the_engine() -> None:
    with serving(SHADOW) as setup:
        setup.baseline.die = True
        assert setup.post("a").status_code == 200
        wait_until(lambda: setup.shadows("failed") == 1)


def test_a_shadow_begins_only_when_nobody_is_served_and_is_dropped_when_that_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shadow, "SECONDS", 0.2)
    with serving(SHADOW) as setup:
        with setup.runtime.admitted():
            setup.results(["a", "b"])
            wait_until(lambda: setup.shadows("dropped") == 2)
        assert setup.baseline.steps == 0
        monkeypatch.undo()
        setup.results("c")
        wait_until(lambda: setup.shadows("agree") == 1)


def test_a_caller_s_texts_go_before_those_of_shadows_and_find_the_queue_empty_of_them() -> None:
    with serving(SHADOW, max_queue=4, max_inputs=4) as setup:
        setup.baseline.gate.clear()
        assert setup.later(["a", "b", "c", "d"]).result(timeout=10).status_code == 200
        assert setup.baseline.entered.wait(timeout=10)
        asked = [setup.later(["e", "f", "g", "h"], architecture=name) for name in ("recurrent", "baseline")]
        wait_until(lambda: setup.batcher("recurrent").queue_depth == setup.batcher("baseline").queue_depth == 4)
        setup.baseline.gate.set()
        assert [answer.result(timeout=10).status_code for answer in asked] == [200, 200]


def test_a_drain_waits_for_no_shadow_and_begins_none() -> None:
    with serving(SHADOW) as setup:
        setup.baseline.gate.clear()
        assert setup.later("a").result(timeout=10).status_code == 200
        assert setup.baseline.entered.wait(timeout=10)
        setup.runtime.drain()
        assert setup.runtime.drained(time.monotonic() + LINGER_SECONDS)
    with serving(SHADOW) as setup:
        setup.recurrent.gate.clear()
        accepted = setup.later("a")
        assert setup.recurrent.entered.wait(timeout=10)
        setup.runtime.drain()
        setup.recurrent.gate.set()
        assert accepted.result(timeout=10).status_code == 200
        wait_until(lambda: setup.shadows("dropped") == 1)
        assert setup.baseline.steps == 0


def test_a_process_has_few_shadows_on_their_way() -> None:
    def answered(model: Model) -> Sequence[Outcome]:
        answer = Answer(np.array([0.0, 1.0], dtype=np.float32), 1, "depth", 0.0, 0.0)
        return [Outcome(model, Encoded([1], truncated=False), answer, 0.0)]

    with serving("fixed:recurrent") as setup:
        shadows = shadow.Shadows(setup.runtime)
        recurrent, baseline = (setup.runtime.serving.models["sentiment", name] for name in ("recurrent", "baseline"))
        setup.baseline.gate.clear()

        async def offer_many() -> None:
            for _ in range(shadow.OUTSTANDING + 3):
                shadows.offer(baseline, ClassifyRequest(inputs="a"), answered(recurrent))
            assert setup.shadows("dropped") == 3
            setup.baseline.gate.set()
            async with asyncio.timeout(10):
                while setup.shadows("agree") + setup.shadows("disagree") < shadow.OUTSTANDING:
                    await asyncio.sleep(0.005)
            shadows.offer(baseline, ClassifyRequest(inputs="a"), answered(recurrent))
            assert setup.shadows("dropped") == 3

        asyncio.run(offer_many())


@pytest.mark.parametrize(
    ("answered", "shadowed", "same", "difference"),
    [
        ({"a": 0.9, "b": 0.1}, {"a": 0.6, "b": 0.4}, True, 0.3),
        ({"a": 0.9, "b": 0.1}, {"b": 0.6, "a": 0.4}, False, 0.5),
        ({"a": 0.9, "b": 0.1}, {"b": 0.6, "c": 0.4}, False, 0.9),
    ],
)
def test_two_opinions_are_compared_by_label(
    answered: dict[str, float], shadowed: dict[str, float], same: bool, difference: float
) -> None:
    assert shadow.compare(answered, shadowed) == (same, pytest.approx(difference))
