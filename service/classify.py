"""The path of one request: read, check, tokenize, choose, submit, wait, answer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from service.body import read_body
from service.bundle import Bundle
from service.errors import (
    ClientGone,
    DeadlineExceeded,
    InferenceFailed,
    InputEmpty,
    InputTooLong,
    QueueFull,
    RefrainError,
    TooManyInputs,
)
from service.jobs import Answer, Job, Shortage
from service.loading import Model
from service.logs import Call
from service.problems import release
from service.routing import Plan
from service.runtime import TakeIn, runtime_of
from service.scheduling import patience
from service.schemas import ClassifyAnswer, ClassifyRequest, Timings, parse_request
from service.settings import Settings
from service.texts import (
    Encoded,
    encode,
    encode_ends,
    encode_further,
    likely_work,
    probabilities,
    texts_to_run,
    to_result,
)

if TYPE_CHECKING:
    from service.shadow import Shadows

Found = TypeVar("Found")

# For texts of which much must be read, a huge word for one. One thread: a megabyte of text takes 80 times that while it
# is cut into tokens, and so the next waits.
_TOKENIZER_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")
TURN_CHARACTERS = 8_192  # of a list, and the event loop goes on with others: about two milliseconds


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a model made of one text."""

    model: Model
    text: Encoded
    answer: Answer
    tokenize_seconds: float

    def after(self, earlier: Outcome) -> Outcome:
        """The same, with the time that the text spent on an earlier model."""
        answer = replace(
            self.answer,
            queue_seconds=self.answer.queue_seconds + earlier.answer.queue_seconds,
            inference_seconds=self.answer.inference_seconds + earlier.answer.inference_seconds,
        )
        return replace(self, answer=answer, tokenize_seconds=self.tokenize_seconds + earlier.tokenize_seconds)


async def classify(request: Request) -> Response:
    """Answer POST /classify; raises RefrainError for every way that it can go wrong."""
    runtime = runtime_of(request)
    with runtime.admitted() as take_in:
        asked = await _read(request, take_in, runtime.settings, request.state.call)
        answer = await decide(asked, request)
    return Response(answer.model_dump_json(), media_type="application/json")


async def decide(asked: ClassifyRequest, request: Request) -> ClassifyAnswer:
    """Choose who answers, and let them before the deadline; whatever the protocol, a request comes through here.

    The caller holds `runtime.admitted`, and has read the body to its end. Raises RefrainError.
    """
    runtime = runtime_of(request)
    call: Call = request.state.call
    plan = runtime.choose(asked.task, asked.architecture, call.id, asked.routing_key)
    call.architecture, call.task = plan.first.metric_labels
    deadline = call.started + min(asked.deadline_ms or math.inf, runtime.settings.deadline_ms) / 1000
    outcomes = await _follow(plan, asked, deadline, request)
    answer = _answer(asked, outcomes, call)
    for outcome in outcomes:
        if outcome.answer.degraded:
            runtime.metrics.degraded.labels(outcome.answer.exit, *outcome.model.metric_labels).inc()
    runtime.metrics.durations.answered(plan.first.metric_labels, call.timings_ms)
    if plan.shadow is not None:
        shadows: Shadows = request.app.state.shadows
        shadows.offer(plan.shadow, asked, outcomes)
    return answer


async def _read(request: Request, take_in: TakeIn, settings: Settings, call: Call) -> ClassifyRequest:
    body = await read_body(request, take_in, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    asked = parse_request(body)
    check_count(len(asked.texts), settings, call)
    return asked


def check_count(texts: int, settings: Settings, call: Call) -> None:
    """Note how many texts a request brings; raises TooManyInputs, and does not note what may be any number then."""
    if texts > settings.max_inputs:
        raise TooManyInputs(f"At most {settings.max_inputs} inputs in one request.", limit=settings.max_inputs)
    call.texts = texts


async def _follow(plan: Plan[Model], asked: ClassifyRequest, deadline: float, request: Request) -> list[Outcome]:
    """Let the first model answer, and the second what the first is unsure of, each text by itself.

    Where the second has no room or no time the first's answers stand, degraded, if the request rather has those.
    """
    outcomes = await _run(plan.first, asked, range(len(asked.texts)), deadline, request, sure=plan.threshold)
    if plan.then is None:
        return outcomes
    # One that was cut short under load stays: to go on elsewhere would add to that load.
    unsure = [
        place
        for place, outcome in enumerate(outcomes)
        if not outcome.answer.degraded and max(probabilities(outcome.model.manifest, outcome.answer)) < plan.threshold
    ]
    try:
        second = await _run(plan.then, asked, unsure, deadline, request) if unsure else []
    except (QueueFull, DeadlineExceeded) as error:
        if not asked.allow_fewer_iterations:
            raise
        release(error)
        reason: Shortage = "overload" if isinstance(error, QueueFull) else "deadline"
        for place in unsure:
            outcomes[place] = replace(outcomes[place], answer=replace(outcomes[place].answer, exit=reason))
    else:
        for place, outcome in zip(unsure, second, strict=True):
            outcomes[place] = outcome.after(outcomes[place])
    request.state.call.passed_on = sum(outcome.model is plan.then for outcome in outcomes)
    runtime_of(request).metrics.decided(outcome.model.metric_labels for outcome in outcomes)
    return outcomes


async def _run(
    model: Model,
    asked: ClassifyRequest,
    places: Sequence[int],
    deadline: float,
    request: Request,
    *,
    sure: float = 0.0,
) -> list[Outcome]:
    """Have one model answer the texts in these places; a failure of one is the whole list's."""
    call: Call = request.state.call
    longest = max(len(asked.texts[place]) for place in places)
    work = likely_work(longest, asked.max_iterations, model.manifest)
    started = time.monotonic()
    if started >= deadline:
        raise DeadlineExceeded
    wait = patience(deadline - started, may_be_cut=asked.allow_fewer_iterations)
    model.batcher.check_room(len(places), 0, work, wait)  # before tokenizing, which would be for nothing
    encoded = await tokenize(model, asked, places, deadline, request.state.left)
    tokenize_seconds = time.monotonic() - started
    tokens, most = sum(len(text.ids) for text in encoded), runtime_of(request).settings.max_queue_tokens
    if tokens > most:  # and would be however empty the queue
        raise TooManyInputs(f"At most {most} tokens in one request; these inputs have {tokens}.", limit=most)
    call.tokens = (call.tokens or 0) + tokens
    job = model.batcher.submit(texts_to_run(asked, model.manifest, encoded, sure), deadline)
    results = await _wait(job, deadline, request.state.left)
    outcomes = [
        Outcome(model, text, _good(asked, place, result), tokenize_seconds)
        for place, text, result in zip(places, encoded, results, strict=True)
    ]
    call.iterations = (call.iterations or 0) + sum(outcome.answer.iterations for outcome in outcomes)
    return outcomes


def _answer(asked: ClassifyRequest, outcomes: Sequence[Outcome], call: Call) -> ClassifyAnswer:
    results = [
        to_result(asked, outcome.model.bundle, outcome.text, outcome.answer, asked.top_k) for outcome in outcomes
    ]
    call.timings_ms = {
        "tokenize": _ms(max(outcome.tokenize_seconds for outcome in outcomes)),
        "queue": _ms(max(outcome.answer.queue_seconds for outcome in outcomes)),
        "inference": _ms(max(outcome.answer.inference_seconds for outcome in outcomes)),
        "total": _ms(time.monotonic() - call.started),
    }
    timings = Timings(**call.timings_ms)
    return ClassifyAnswer(id=call.id, task=outcomes[0].model.manifest.task, results=results, timings_ms=timings)


async def tokenize(
    model: Model,
    asked: ClassifyRequest,
    places: Sequence[int],
    deadline: float,
    left: asyncio.Future[None],
    thread: Executor | None = None,
) -> list[Encoded]:
    """Turn the texts in these places into ids, cut to what the model takes; on `thread`, or in turns with others.

    Raises DeadlineExceeded, ClientGone once `left` is done, InputEmpty, and InputTooLong where no cut is wanted.
    """
    texts, limit = [asked.texts[place] for place in places], model.manifest.max_tokens
    if thread is None:
        encoded = await _encode_in_turns(model.bundle, texts, deadline, left)
    else:
        loop = asyncio.get_running_loop()
        encoded = await _by(deadline, left, loop.run_in_executor(thread, encode, model.bundle, texts))
    if time.monotonic() >= deadline:
        raise DeadlineExceeded
    for index, text in zip(places, encoded, strict=True):
        if text.is_empty:
            raise InputEmpty(f"Input {index} holds nothing but the class token once it is cut up.", index=index)
        if text.truncated and not asked.truncate:
            raise InputTooLong(
                f"Input {index} has more than the {limit} tokens that the model takes.", index=index, limit=limit
            )
    return encoded


async def _encode_in_turns(
    bundle: Bundle, texts: Sequence[str], deadline: float, left: asyncio.Future[None]
) -> list[Encoded]:
    """Encode on the event loop, which others get now and then; only a text that takes long goes to the thread."""
    encoded: list[Encoded] = []
    characters = 0
    for text in texts:
        if characters > TURN_CHARACTERS:
            await asyncio.sleep(0)
            characters = 0
            if left.done():
                raise ClientGone
        characters += len(text)
        found = encode_ends(bundle, text)
        if found is None:
            loop = asyncio.get_running_loop()
            found = await _by(deadline, left, loop.run_in_executor(_TOKENIZER_THREAD, encode_further, bundle, text))
        encoded.append(found)
    return encoded


async def _by(deadline: float, left: asyncio.Future[None], found: asyncio.Future[Found]) -> Found:
    """Wait for what a thread finds, and have it not begin once it is too late or the client has left.

    Raises DeadlineExceeded, ClientGone.
    """
    either: set[asyncio.Future[Any]] = {found, left}
    try:
        await asyncio.wait(either, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
        if found.done():
            return found.result()
    finally:
        found.cancel()
    raise ClientGone if left.done() else DeadlineExceeded


async def _wait(job: Job, deadline: float, left: asyncio.Future[None]) -> list[Answer | RefrainError]:
    """Wait for a job, and give it up at its deadline or when its client has left, or the wait is cancelled."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()

    def settle(_: object = None) -> None:
        if not over.done():
            over.set_result(None)

    job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(settle))
    left.add_done_callback(settle)
    timer = loop.call_later(deadline - time.monotonic(), settle)
    try:
        await over
    finally:
        timer.cancel()
        left.remove_done_callback(settle)
        if not job.future.done():
            job.abandon("client" if left.done() else "deadline")
    if job.future.cancelled():
        raise ClientGone if left.done() else DeadlineExceeded
    return job.future.result()


def _good(asked: ClassifyRequest, place: int, result: Answer | RefrainError) -> Answer:
    """Pass an answer on; a failure says which text of a list it was."""
    if isinstance(result, InferenceFailed) and len(asked.texts) > 1:
        raise InferenceFailed(place) from result
    if isinstance(result, RefrainError):
        raise result
    return result


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
