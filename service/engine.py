"""Runs padded batches of one bundle on ONNX Runtime; hidden states go in and come out."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.bundle import Bundle
from service.errors import BundleError, SettingsError
from service.manifest import GraphRole, Manifest, StoredPrecision

FloatArray = NDArray[np.float32]
Provider = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "fp16", "int8"]

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
FloatingPointState = ctypes.c_uint32 * 8  # x86-64's fenv_t
MXCSR, FLUSH_TO_ZERO, DENORMALS_ARE_ZERO = 7, 1 << 15, 1 << 6  # a word of it, and bits of that
# One that keeps the interpreter's lock, which to give away costs more than these calls.
LIBM = ctypes.PyDLL("libm.so.6") if (sys.platform, platform.machine()) == ("linux", "x86_64") else None


class Engine:
    """A text is embedded once, then stepped as often as its caller likes; the state between is the caller's to keep.

    On a CPU a text's result does not depend on the others in its batch nor on the padding, to the last bit in every
    precision that was tried: scales are constants of the graph, and the runtime sums each row in its own order.
    """

    def __init__(
        self,
        graphs: Mapping[GraphRole, Path],
        *,
        provider: Literal["cpu", "cuda"],
        precision: Literal["fp32", "fp16", "int8"],
        threads: int,
    ) -> None:
        """Opens an `embed` and a `step` graph; BundleError where ONNX Runtime refuses one."""
        self.provider, self.precision = provider, precision
        self.model_bytes = sum(path.stat().st_size for path in graphs.values())
        self.embed_session = _open_session(graphs["embed"], provider, threads)
        self.step_session = _open_session(graphs["step"], provider, threads)

    def embed(self, ids: Sequence[Sequence[int]]) -> list[FloatArray]:
        """The first hidden state (length, width) of each text; none may be empty."""
        with _denormals_as_zero():
            (hidden_BLD,) = self.embed_session.run(["hidden"], {"ids": pad_ids(ids)})
        return [hidden_BLD[row, : len(text)] for row, text in enumerate(ids)]

    def step(self, hidden: Sequence[FloatArray]) -> tuple[list[FloatArray], FloatArray]:
        """One iteration: each text's next hidden state, and the logits (texts, classes)."""
        lengths = [len(state_LD) for state_LD in hidden]
        hidden_BLD = pad_states(hidden)
        mask_BL = np.arange(max(lengths)) < np.array(lengths)[:, None]
        given = {"hidden": hidden_BLD, "mask": mask_BL}
        with _denormals_as_zero():
            next_BLD, logits_BC = self.step_session.run(["next_hidden", "logits"], given)
        return [next_BLD[row, :length] for row, length in enumerate(lengths)], logits_BC


@contextmanager
def _denormals_as_zero() -> Iterator[None]:
    """Has this thread take numbers below 1e-38 for zero meanwhile, on Linux and x86-64.

    Where a token attends to nothing but a few others, the rest get such weights, and Intel's CPUs take many times as
    long for each. The runtime's own switch reaches its pool and the thread that opens a process's first session alone.
    """
    if LIBM is None:
        yield
        return
    state = FloatingPointState()
    LIBM.fegetenv(state)
    before = state[MXCSR]
    state[MXCSR] = before | FLUSH_TO_ZERO | DENORMALS_ARE_ZERO
    LIBM.fesetenv(state)
    try:
        yield
    finally:
        state[MXCSR] = before
        LIBM.fesetenv(state)


def pad_ids(ids: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """One row for each text, (texts, longest), zeros behind its end."""
    ids_BL = np.zeros((len(ids), max(map(len, ids))), dtype=np.int64)
    for row, text in enumerate(ids):
        ids_BL[row, : len(text)] = text
    return ids_BL


def pad_states(hidden: Sequence[FloatArray]) -> FloatArray:
    """One row for each hidden state, (texts, longest, width), zeros behind its end."""
    hidden_BLD = np.zeros((len(hidden), max(map(len, hidden)), hidden[0].shape[1]), dtype=np.float32)
    for row, state_LD in enumerate(hidden):
        hidden_BLD[row, : len(state_LD)] = state_LD
    return hidden_BLD


def open_engine(bundle: Bundle, *, provider: Provider, precision: Precision, threads: int) -> Engine:
    """The engine for a bundle.

    Raises SettingsError for a provider or a precision that is not there, BundleError for a graph that does not load.
    """
    chosen_provider = provider_for(bundle, provider, precision)
    chosen_precision, stored = choose_precision(bundle.manifest, chosen_provider, precision)
    graphs = {role: bundle.path / graph.file for role, graph in bundle.manifest.precisions[stored].graphs.items()}
    return Engine(graphs, provider=chosen_provider, precision=chosen_precision, threads=threads)


def _open_session(path: Path, provider: Literal["cpu", "cuda"], threads: int) -> ort.InferenceSession:
    providers = [CUDA, CPU] if provider == "cuda" else [CPU]
    try:
        with _denormals_as_zero():  # whatever the runtime sets in this thread does not last
            return ort.InferenceSession(path, _session_options(threads), providers=providers)
    except Exception as error:  # the runtime's exceptions share no base class of its own
        reason = str(error).strip().splitlines()[0]
        raise BundleError(f"{path}: ONNX Runtime does not load it: {reason}") from error


def _session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors: what it warns of (a cast it inserts) is by design
    options.enable_mem_pattern = False  # a pattern is kept for every shape met, and our shapes never end
    if not has_vnni():  # without, the fast 8-bit kernel saturates its sums; this asks for the one that does not
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")  # in the pool; see _denormals_as_zero
    # Idle threads must not spin: the interpreter and the other engines need the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies 8-bit numbers without saturating; no where it does not say."""
    try:
        words = set(cpuinfo.read_text(encoding="utf-8").split())
    except OSError:
        return False
    return not words.isdisjoint({"avx512_vnni", "avx_vnni"})


def provider_for(bundle: Bundle, asked: Provider, precision: Precision) -> Literal["cpu", "cuda"]:
    """What `choose_provider` says here; raises SettingsError, and BundleError for a graph that does not load."""
    available = [CPU] if asked == "cpu" else usable_providers(bundle)
    return choose_provider(bundle.manifest, asked, precision, available)


def usable_providers(bundle: Bundle) -> list[str]:
    """What a session gets: the CUDA build names CUDA without a GPU too, and then quietly takes the CPU."""
    if CUDA not in ort.get_available_providers():
        return [CPU]
    ort.preload_dlls()  # CUDA's libraries come as Python packages, where the loader does not look
    stored = next(iter(bundle.manifest.precisions.values()))
    session = _open_session(bundle.path / stored.graphs["embed"].file, "cuda", threads=1)
    return list(session.get_providers())


def choose_provider(
    manifest: Manifest, asked: Provider, precision: Precision, available: Sequence[str]
) -> Literal["cpu", "cuda"]:
    """CUDA where ONNX Runtime offers it, unless told otherwise; SettingsError if it is asked for and not there.

    A bundle without fp16 graphs runs on the CPU even then, unless a precision is asked for: CUDA has no kernels for its
    int8, and one such bundle must not keep those beside it from the GPU.
    """
    if asked == "cuda" and CUDA not in available:
        raise SettingsError(
            "REFRAIN_PROVIDER=cuda: ONNX Runtime has no CUDA here; install the extra 'gpu', and see that the driver is "
            "there and lets this process have a GPU"
        )
    fits = precision != "auto" or "fp16" in manifest.precisions
    return "cuda" if asked != "cpu" and CUDA in available and fits else "cpu"


def choose_precision(
    manifest: Manifest, provider: Literal["cpu", "cuda"], asked: Precision
) -> tuple[Literal["fp32", "fp16", "int8"], StoredPrecision]:
    """The precision to name and the stored graphs to open; SettingsError where the bundle lacks them.

    fp32 and, on a CPU, fp16 open the same graphs: a CPU has no FP16 matrix kernels, and computes them in FP32.
    """
    if asked == "auto":
        asked = "int8" if provider == "cpu" and "int8" in manifest.precisions else "fp16"
    if asked == "fp32" and provider == "cuda":
        raise SettingsError("REFRAIN_PRECISION=fp32: on CUDA the stored fp16 graphs run as they are; take fp16 or auto")
    stored: StoredPrecision = "int8" if asked == "int8" else "fp16"
    if stored not in manifest.precisions:
        there, why = ", ".join(manifest.precisions), manifest.left_out.get(stored)
        source = "" if stored == asked else f", which {asked} is computed from"
        said = f"REFRAIN_PRECISION={asked}: bundle {manifest.name} has no {stored} graphs{source}, only {there}"
        raise SettingsError(f"{said} ({why})" if why else said)
    return ("fp32" if stored == "fp16" and provider == "cpu" else stored), stored
