"""Shadows: a request that was answered runs on another model too, unseen, to learn how the two compare."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from service.classify import Outcome, tokenize
from service.errors import DeadlineExceeded, Draining, QueueFull, RefrainError
from service.jobs import Answer
from service.loading import Model
from service.runtime import Runtime
from service.schemas import ClassifyRequest
from service.texts import probabilities, texts_to_run

OUTSTANDING = 8
"""Requests whose shadows may be on their way in one process."""
REST_SECONDS = 0.005
"""For so long nobody must have been served before a shadow begins: who sends one request after another is spared."""
SECONDS = 5.0
"""A shadow that takes longer, waiting for rest included, is dropped."""

Verdict = Literal["agree", "disagree", "dropped", "failed"]

# Of its own, and even for short texts: whoever waits for an answer needs the event loop and the tokenizer's thread.
_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shadow")


class Shadows:
    """The shadows of one process: one by one, in the background, and dropped rather than in anybody's way."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._metrics = runtime.metrics.shadows
        self._tasks: set[asyncio.Task[None]] = set()
        self._one_by_one = asyncio.Lock()

    def offer(self, model: Model, asked: ClassifyRequest, answered: Sequence[Outcome]) -> None:
        """Compare answers with another model's, later, or drop them; neither waits nor raises."""
        if len(self._tasks) >= OUTSTANDING:
            self._count(model, "dropped", len(answered))
            return
        task = asyncio.get_running_loop().create_task(self._compare(model, asked, answered))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(self, model: Model, asked: ClassifyRequest, answered: Sequence[Outcome]) -> None:
        deadline = time.monotonic() + SECONDS
        try:
            async with asyncio.timeout(SECONDS), self._one_by_one:
                await self._rest()
                results = await _run(model, asked, deadline)
        except (RefrainError, TimeoutError) as error:
            self._count(model, verdict_on(error), len(answered))
            return
        await asyncio.get_running_loop().run_in_executor(_THREAD, self._judge, model, answered, results)

    async def _rest(self) -> None:
        while (idle := self._runtime.idle_seconds(time.monotonic())) < REST_SECONDS:
            await asyncio.sleep(REST_SECONDS - idle)
        self._runtime.check_open()  # the end of a process waits for no shadow

    def _judge(self, model: Model, answered: Sequence[Outcome], results: Sequence[Answer | RefrainError]) -> None:
        for outcome, result in zip(answered, results, strict=True):
            if isinstance(result, RefrainError):
                self._count(model, verdict_on(result))
                continue
            agree, difference = compare(_scores(outcome.model, outcome.answer), _scores(model, result))
            self._count(model, "agree" if agree else "disagree")
            self._metrics.score_difference.labels(*model.metric_labels).observe(difference)
        if ran := [result.inference_seconds for result in results if isinstance(result, Answer)]:
            self._metrics.duration.labels(*model.metric_labels).observe(max(ran))

    def _count(self, model: Model, verdict: Verdict, texts: int = 1) -> None:
        self._metrics.texts.labels(verdict, *model.metric_labels).inc(texts)


async def _run(model: Model, asked: ClassifyRequest, deadline: float) -> list[Answer | RefrainError]:
    asked = asked.model_copy(update={"allow_fewer_iterations": False})  # nobody waits, and only whole depth compares
    nobody_leaves: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    encoded = await tokenize(model, asked, range(len(asked.texts)), deadline, nobody_leaves, _THREAD)
    job = model.batcher.submit(texts_to_run(asked, model.manifest, encoded), deadline, background=True)
    try:
        return await asyncio.wrap_future(job.future)
    except asyncio.CancelledError:  # too late, or the process ends
        job.abandon("deadline")
        raise


def verdict_on(error: RefrainError | TimeoutError) -> Verdict:
    """Tell a shadow that found no room or no time from one whose model cannot answer."""
    return "dropped" if isinstance(error, QueueFull | Draining | DeadlineExceeded | TimeoutError) else "failed"


def _scores(model: Model, answer: Answer) -> dict[str, float]:
    return dict(zip(model.manifest.labels, probabilities(model.manifest, answer), strict=True))


def compare(answered: Mapping[str, float], shadowed: Mapping[str, float]) -> tuple[bool, float]:
    """Whether both find the same label likeliest, and how far apart they see the one that was answered."""
    label = max(answered, key=answered.__getitem__)
    same = label == max(shadowed, key=shadowed.__getitem__)
    return same, abs(answered[label] - shadowed.get(label, 0.0))
