"""The path of one request: read, check, tokenize, choose, submit, wait, answer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from service.batcher import temperature_after
from service.body import client_left, read_body
from service.errors import (
    ClientGone,
    DeadlineExceeded,
    InferenceFailed,
    InputEmpty,
    InputTooLong,
    RefrainError,
    TooManyInputs,
)
from service.jobs import Answer, Job, Text
from service.loading import Model
from service.logs import Call
from service.runtime import Runtime
from service.schemas import ClassifyAnswer, ClassifyRequest, Result, Timings, parse_request
from service.settings import Settings

# One thread: a megabyte of text takes 80 times that while it is cut into tokens, and so the next waits.
_TOKENIZER_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")
INLINE_CHARACTERS = 8_192  # up to here tokenizing takes less than handing it to a thread and back is worth


@dataclass(frozen=True)
class Encoded:
    """One text as it will run."""

    ids: list[int]
    truncated: bool


async def classify(request: Request) -> Response:
    """Answer POST /classify; raises RefrainError for every way that it can go wrong."""
    runtime: Runtime = request.app.state.runtime
    with runtime.admitted():
        asked = await _read(request, runtime.settings, request.state.call)
        answer = await decide(asked, request)
    return Response(answer.model_dump_json(), media_type="application/json")


async def decide(asked: ClassifyRequest, request: Request) -> ClassifyAnswer:
    """Choose a model and let it answer before the deadline; whatever the protocol, a request comes through here.

    The caller holds `runtime.admitted()`, and has read the body to its end. Raises RefrainError.
    """
    runtime: Runtime = request.app.state.runtime
    call: Call = request.state.call
    model = runtime.choose(asked.task, asked.architecture, call.id)
    call.architecture, call.task = model.metric_labels
    deadline = call.started + min(asked.deadline_ms or math.inf, runtime.settings.deadline_ms) / 1000
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            answer = await _answer(asked, model, deadline, request)
    except TimeoutError:
        raise DeadlineExceeded from None
    runtime.metrics.answered(model.metric_labels, call.timings_ms)
    return answer


async def _read(request: Request, settings: Settings, call: Call) -> ClassifyRequest:
    body = await read_body(request, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    asked = parse_request(body)
    check_count(len(asked.texts), settings, call)
    return asked


def check_count(texts: int, settings: Settings, call: Call) -> None:
    """Note how many texts a request brings; raises TooManyInputs."""
    call.texts = texts
    if texts > settings.max_inputs:
        raise TooManyInputs(f"At most {settings.max_inputs} inputs in one request.", limit=settings.max_inputs)


async def _answer(asked: ClassifyRequest, model: Model, deadline: float, request: Request) -> ClassifyAnswer:
    call: Call = request.state.call
    model.batcher.check_room(len(asked.texts))  # before tokenizing, which would be for nothing
    started = time.monotonic()
    encoded = await tokenize(model, asked)
    tokenize_seconds = time.monotonic() - started
    call.tokens = sum(len(text.ids) for text in encoded)
    job = model.batcher.submit(_texts(asked, model, encoded), deadline)
    answers = _all_good(await _wait(job, request.receive))
    results = [_result(asked, model, text, answer) for text, answer in zip(encoded, answers, strict=True)]
    call.iterations = sum(answer.iterations for answer in answers)
    timings = Timings(
        tokenize=_ms(tokenize_seconds),
        queue=_ms(max(answer.queue_seconds for answer in answers)),
        inference=_ms(max(answer.inference_seconds for answer in answers)),
        total=_ms(time.monotonic() - call.started),
    )
    call.timings_ms = timings.model_dump()
    return ClassifyAnswer(id=call.id, task=model.manifest.task, results=results, timings_ms=timings)


def _texts(asked: ClassifyRequest, model: Model, encoded: Sequence[Encoded]) -> list[Text]:
    iterations = asked.max_iterations or model.manifest.iterations
    depth = 1 if model.manifest.iterations == 1 else iterations  # a baseline has no second pass to offer
    calibrated = model.manifest.calibration.exit_threshold
    threshold = calibrated if asked.exit_threshold is None else asked.exit_threshold
    return [Text(text.ids, depth, threshold, asked.allow_fewer_iterations) for text in encoded]


async def tokenize(model: Model, asked: ClassifyRequest) -> list[Encoded]:
    """Turn texts into ids, cut to what the model takes; raises InputEmpty, and InputTooLong where no cut is wanted.

    The class token comes first, so cutting the end keeps it.
    """
    texts, limit = asked.texts, model.manifest.max_tokens
    encode = model.bundle.tokenizer.encode_batch_fast
    if sum(map(len, texts)) <= INLINE_CHARACTERS:
        encodings = encode(texts)
    else:
        encodings = await asyncio.get_running_loop().run_in_executor(_TOKENIZER_THREAD, encode, texts)
    encoded = []
    for index, encoding in enumerate(encodings):
        ids = encoding.ids
        if len(ids) <= 1:
            raise InputEmpty(f"Input {index} holds nothing but the class token once it is cut up.", index=index)
        if len(ids) > limit and not asked.truncate:
            detail = f"Input {index} has {len(ids)} tokens; the model takes {limit}."
            raise InputTooLong(detail, index=index, tokens=len(ids), limit=limit)
        encoded.append(Encoded(ids[:limit], len(ids) > limit))
    return encoded


async def _wait(job: Job, receive: Receive) -> list[Answer | RefrainError]:
    """Wait for a job, and give it up when the client leaves or the wait is cancelled, as by its deadline."""
    done = asyncio.wrap_future(job.future)
    gone = asyncio.ensure_future(client_left(receive))
    either: set[asyncio.Future[Any]] = {done, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        unfinished = not done.done()
        if unfinished:
            job.abandon()
    if unfinished:
        raise ClientGone
    return done.result()


def _all_good(outcomes: Sequence[Answer | RefrainError]) -> list[Answer]:
    """Pass answers on; one failure is the whole list's, and says which text it was."""
    answers = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, InferenceFailed) and len(outcomes) > 1:
            raise InferenceFailed(index) from outcome
        if isinstance(outcome, RefrainError):
            raise outcome
        answers.append(outcome)
    return answers


def _result(asked: ClassifyRequest, model: Model, text: Encoded, answer: Answer) -> Result:
    labels = model.manifest.labels
    logits = answer.logits.tolist()
    temperature = temperature_after(model.manifest.calibration.temperatures, answer.iterations)
    values = [round(value, 6) for value in (logits if asked.raw_scores else softmax(logits, temperature))]
    ranked = sorted(range(len(labels)), key=values.__getitem__, reverse=True)
    shown = sorted(ranked[: asked.top_k])
    return Result(
        label=labels[ranked[0]],
        score=values[ranked[0]],
        scores={labels[index]: values[index] for index in shown},
        architecture=model.manifest.architecture,
        model=model.bundle.id,
        iterations=answer.iterations,
        tokens=len(text.ids),
        truncated=text.truncated,
        degraded=answer.degraded,
    )


def softmax(logits: Sequence[float], temperature: float) -> list[float]:
    """Turn one text's logits into probabilities; for a handful of classes an array costs ten times as much."""
    largest = max(logits)
    powers = [math.exp((logit - largest) / temperature) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
