"""What a worker does: holds an engine and turns units into shards, by the code that answers requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from service.batcher import Batcher, Limits, RunsBatches
from service.bulk.job import read_job
from service.bulk.rows import CHUNK_ROWS, BadText, read_chunks
from service.bulk.shards import RESULT_FIELDS, new_shard
from service.bundle import Bundle, load_bundle
from service.device_engine import DeviceEngine
from service.engine import open_engine
from service.engine_thread import EngineThread
from service.errors import BulkError, InferenceFailed, RefrainError
from service.jobs import Exit
from service.schemas import Options, Result
from service.texts import encode, texts_to_run, to_result

CHUNK_SECONDS = 900.0
"""So long a chunk may take; an engine that needs longer hangs."""
NO_TOKENS = "nothing but the class token once it is cut up"


class Unobserved:
    """No metrics: what a job did, its summary says."""

    def batch(self, texts: int, real_tokens: int, padding_tokens: int) -> None: ...
    def exit(self, reason: Exit, iterations: int) -> None: ...
    def dropped(self, reason: Literal["deadline", "client"], texts: int) -> None: ...
    def queued(self, texts: int) -> None: ...


class Classifier:
    """One model in this process. Texts are batched among the chunk's, those of like length together."""

    def __init__(self, bundle: Bundle, engine: RunsBatches, *, batch_tokens: int, options: Options) -> None:
        self._bundle, self._options = bundle, options
        self._thread = EngineThread(stuck_seconds=CHUNK_SECONDS)
        self._batcher = Batcher(
            engine,
            self._thread,
            limits=Limits(batch_tokens, queue_texts=CHUNK_ROWS, queue_tokens=CHUNK_ROWS * bundle.manifest.max_tokens),
            observer=Unobserved(),
            temperatures=bundle.manifest.calibration.temperatures,
        )
        self._thread.start()
        self._batcher.start()

    def classify(self, texts: Sequence[str | BadText]) -> list[Result | BadText]:
        """The answer to each text, in order; raises RefrainError where the engine is down."""
        outcomes: list[Result | BadText] = [BadText(NO_TOKENS) if isinstance(text, str) else text for text in texts]
        places = [place for place, text in enumerate(texts) if isinstance(text, str)]
        encoded = encode(self._bundle, [text for text in texts if isinstance(text, str)])
        runs = [(place, text) for place, text in zip(places, encoded, strict=True) if not text.is_empty]
        if not runs:
            return outcomes
        asked = texts_to_run(self._options, self._bundle.manifest, [text for _, text in runs])
        results = self._batcher.submit(asked, math.inf).future.result(CHUNK_SECONDS)
        for (place, text), result in zip(runs, results, strict=True):
            if isinstance(result, InferenceFailed):
                outcomes[place] = BadText(result.detail)
            elif isinstance(result, RefrainError):
                raise result
            else:
                outcomes[place] = to_result(self._options, self._bundle, text, result)
        return outcomes

    def close(self) -> None:
        """Ends the engine's thread."""
        self._batcher.stop(0)
        self._thread.end(CHUNK_SECONDS)


@dataclass(frozen=True)
class Counts:
    """What became of a unit; `problem` says why it could not be read, and then no shard is there."""

    unit: int
    texts: int = 0
    failed: int = 0
    iterations: int = 0
    problem: str = ""


class UnitWorker:
    """Opens the bundle of the job in `out`, and does its units; Ray Data makes one for each process."""

    def __init__(self, out: str, bundle: str, batch_tokens: int) -> None:
        self._out, self._job = Path(out), read_job(Path(out))
        asked = self._job.asked
        self._bundle = load_bundle(Path(bundle))
        if self._bundle.id != asked.model:
            raise BulkError(f"{bundle} holds {self._bundle.id} on this machine; the job began with {asked.model}")
        engine = open_engine(self._bundle, provider=asked.provider, precision=asked.precision, threads=1)
        runs: RunsBatches = DeviceEngine(engine) if engine.provider == "cuda" else engine
        self._classifier = Classifier(self._bundle, runs, batch_tokens=batch_tokens, options=asked.options)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Does one unit; the same one done twice leaves the same shard."""
        number = int(row["unit"])
        try:
            return asdict(self.write_shard(number))
        except BulkError as error:
            return asdict(Counts(number, problem=str(error)))

    def write_shard(self, number: int) -> Counts:
        """One unit's answers into its shard; raises BulkError for a file that cannot be read."""
        job = self._job
        texts = failed = iterations = 0
        path = self._out / job.shard(number)
        with new_shard(path, job.asked.format, self._bundle.manifest.labels, job.columns) as writer:
            for chunk in read_chunks(job.units[number], job.asked.column, job.asked.keep):
                outcomes = self._classifier.classify(chunk.texts)
                writer.write(chunk, [result_fields(outcome) for outcome in outcomes])
                answered = [outcome for outcome in outcomes if isinstance(outcome, Result)]
                texts += len(outcomes)
                failed += len(outcomes) - len(answered)
                iterations += sum(answer.iterations for answer in answered)
        return Counts(number, texts, failed, iterations)

    def close(self) -> None:
        """Ends the engine's thread."""
        self._classifier.close()


def result_fields(outcome: Result | BadText) -> dict[str, Any]:
    """The columns that a result adds to its row."""
    if isinstance(outcome, BadText):
        return dict.fromkeys(RESULT_FIELDS) | {"error": outcome.reason}
    return {name: getattr(outcome, name, None) for name in RESULT_FIELDS}
