"""The raw runtime, no service around it: how fast batches and single calls can be, and what the answers are.

`python -m loadtest.bench.raw` does one job for loadtest.bench.workers.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

from loadtest.bench import workers

FloatArray = NDArray[np.float32]
Precision = Literal["fp32", "fp16", "int8"]
Provider = Literal["cpu", "cuda"]


class RawModel:
    """A bundle's two graphs in one process, with one thread; `precision` and `provider` as the service names them."""

    def __init__(self, bundle: Path, precision: Precision, provider: Provider) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        graphs = manifest["precisions"]["int8" if precision == "int8" else "fp16"]["graphs"]
        self._embed, self._step = (
            _session(bundle / graphs[role]["file"], precision, provider) for role in ("embed", "step")
        )
        self._tokenizer = Tokenizer.from_file(str(bundle / manifest["tokenizer"]["file"]))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._max_tokens, self._tail_tokens = manifest["max_tokens"], manifest["tail_tokens"]
        self._temperatures = manifest["calibration"]["temperatures"]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._cut(encoding.ids) for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self._max_tokens:
            return ids
        return ids[: self._max_tokens - self._tail_tokens] + ids[len(ids) - self._tail_tokens :]

    def run(self, ids: Sequence[Sequence[int]], iterations: int, exit_threshold: float = 1) -> list[FloatArray]:
        """Probabilities (texts, classes) after each iteration; below a threshold of 1, until every text reaches it."""
        lengths = np.array([len(row) for row in ids])
        mask_BL = np.arange(lengths.max()) < lengths[:, None]
        ids_BL = np.zeros(mask_BL.shape, dtype=np.int64)
        ids_BL[mask_BL] = np.concatenate([np.asarray(row) for row in ids])
        (hidden_BLD,) = self._embed.run(["hidden"], {"ids": ids_BL})
        after = []
        for iteration in range(iterations):
            hidden_BLD, logits_BC = self._step.run(["next_hidden", "logits"], {"hidden": hidden_BLD, "mask": mask_BL})
            temperature = self._temperatures[min(iteration, len(self._temperatures) - 1)]
            after.append(_softmax(logits_BC / temperature))
            if exit_threshold < 1 and after[-1].max(axis=1).min() >= exit_threshold:
                break
        return after


def _session(path: Path, precision: Precision, provider: Provider) -> ort.InferenceSession:
    if provider == "cuda":  # to find its libraries and to widen weights takes more than a session
        from service.engine import open_graph

        return open_graph(path, provider, precision, threads=1)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not has_vnni():  # without those instructions the fast kernel saturates its sums; with them it is exact
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")  # which some CPUs are slow on
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU says that it multiplies 8-bit numbers without saturating; no where it does not say anything."""
    try:
        words = cpuinfo.read_text(encoding="utf-8").split()
    except OSError:
        return False
    return "avx512_vnni" in words or "avx_vnni" in words


def _softmax(logits_BC: FloatArray) -> FloatArray:
    powers_BC = np.exp(logits_BC - logits_BC.max(axis=1, keepdims=True))
    return np.asarray(powers_BC / powers_BC.sum(axis=1, keepdims=True))


def prepare(job: dict[str, Any]) -> Callable[[], Any]:
    """The job, with its model loaded and warm."""
    model = RawModel(Path(job["bundle"]), job["precision"], job["provider"])
    model.run(model.tokenize(job["texts"][:8]), job["iterations"])
    do = {"batches": batches, "calls": calls, "answers": answers}[job["do"]]
    return lambda: do(model, job)


@dataclass
class _Batch:
    """Texts that run together, and what each of their runs took, in seconds, tokenizing left out."""

    texts: list[str]
    running: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def run(self, model: RawModel, iterations: int) -> None:
        ids = model.tokenize(self.texts)
        began, cpu = time.perf_counter(), time.process_time()
        model.run(ids, iterations)
        self.cpu.append(time.process_time() - cpu)
        self.running.append(time.perf_counter() - began)


def batches(model: RawModel, job: dict[str, Any]) -> dict[str, float]:
    """Texts a second at fixed depth, batches of `size` sorted by length; all of them at least once.

    Each batch counts by its own mean time, in a random order, so that it does not matter where the time is up.
    """
    ordered = sorted(job["texts"], key=lambda text: len(model.tokenize([text])[0]))
    parts = [_Batch(ordered[start : start + job["size"]]) for start in range(0, len(ordered), job["size"])]
    rng, deadline = random.Random(job["seed"]), time.perf_counter() + job["seconds"]
    passes = (rng.sample(parts, len(parts)) for _ in count())
    for number, part in enumerate(chain.from_iterable(passes)):
        if number >= len(parts) and time.perf_counter() >= deadline:
            break
        part.run(model, job["iterations"])
    running = sum(fmean(part.running) for part in parts)
    return {
        "texts_per_second": len(ordered) / running,
        "cpu_ms_per_text": 1000 * sum(fmean(part.cpu) for part in parts) / len(ordered),
    }


def calls(model: RawModel, job: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds from one text to its probabilities, over and over; with a threshold, as early as it is sure."""
    texts = job["texts"]
    milliseconds: list[float] = []
    deadline, cpu = time.perf_counter() + job["seconds"], time.process_time()
    while (began := time.perf_counter()) < deadline or not milliseconds:
        model.run(model.tokenize([texts[len(milliseconds) % len(texts)]]), job["iterations"], job["exit_threshold"])
        milliseconds.append(1000 * (time.perf_counter() - began))
    return {"milliseconds": milliseconds, "cpu_ms": 1000 * (time.process_time() - cpu) / len(milliseconds)}


def answers(model: RawModel, job: dict[str, Any]) -> list[dict[str, Any]]:
    """For each text its tokens and, after each iteration, its probabilities."""
    tokenized = model.tokenize(job["texts"])
    found: list[dict[str, Any]] = [{} for _ in tokenized]
    by_length = sorted(range(len(tokenized)), key=lambda place: len(tokenized[place]))
    for start in range(0, len(by_length), job["size"]):
        places = by_length[start : start + job["size"]]
        after = model.run([tokenized[place] for place in places], job["iterations"])
        for row, place in enumerate(places):
            scores = [scores_BC[row].tolist() for scores_BC in after]
            found[place] = {"tokens": len(tokenized[place]), "scores": scores}
    return found


if __name__ == "__main__":
    workers.serve(prepare)
