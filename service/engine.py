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
from service.device_graphs import gathering_graph, widened
from service.errors import BundleError, SettingsError
from service.manifest import GraphRole, Manifest, StoredPrecision

FloatArray = NDArray[np.float32]
Provider = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "fp16", "int8"]

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
NO_CUDA = (
    "ONNX Runtime has no CUDA here; install the extra 'gpu', and see that the driver is there and lets this process "
    "have a GPU"
)
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
        """Opens an `embed` and a `step` graph; BundleError where ONNX Runtime refuses one, SettingsError without CUDA.

        In fp32, CUDA computes stored fp16 graphs with their weights widened; a CPU does so of its own accord.
        """
        self.provider, self.precision = provider, precision
        self.model_bytes = sum(path.stat().st_size for path in graphs.values())
        self.embed_session, self.step_session = (
            open_graph(graphs[role], provider, precision, threads) for role in ("embed", "step")
        )

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
    available = [CPU] if provider == "cpu" else usable_providers()
    chosen_provider = choose_provider(bundle.manifest, provider, precision, available)
    chosen_precision, stored = choose_precision(bundle.manifest, chosen_provider, precision)
    graphs = {role: bundle.path / graph.file for role, graph in bundle.manifest.precisions[stored].graphs.items()}
    return Engine(graphs, provider=chosen_provider, precision=chosen_precision, threads=threads)


def open_graph(
    path: Path, provider: Literal["cpu", "cuda"], precision: Literal["fp32", "fp16", "int8"], threads: int
) -> ort.InferenceSession:
    """A session for a stored graph; BundleError where ONNX Runtime refuses it, SettingsError without CUDA."""
    graph: Path | bytes = path
    try:
        if provider == "cuda" and precision == "fp32":
            graph = widened(path)
        return start_session(graph, provider, threads)
    except SettingsError:
        raise
    except Exception as error:  # those of the runtime and of onnx share no base class of their own
        reason = str(error).strip().splitlines()[0]
        raise BundleError(f"{path}: ONNX Runtime does not load it: {reason}") from error


def start_session(graph: Path | bytes, provider: Literal["cpu", "cuda"], threads: int) -> ort.InferenceSession:
    """A session, whichever exception ONNX Runtime raises; SettingsError where it takes the CPU in place of CUDA."""
    providers: list[str | tuple[str, dict[str, str]]] = [CPU]
    if provider == "cuda":
        ort.preload_dlls()  # CUDA's libraries come as Python packages, where the loader does not look
        # TF32 rounds what it multiplies, so that a sum in another order, of another batch, would show.
        providers = [(CUDA, {"use_tf32": "0"}), CPU]
    with _denormals_as_zero():  # whatever the runtime sets in this thread does not last
        session = ort.InferenceSession(graph, _session_options(threads), providers=providers)
    if provider == "cuda" and CUDA not in session.get_providers():
        raise SettingsError(NO_CUDA)
    return session


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


def usable_providers() -> list[str]:
    """What a session gets here: the CUDA build names CUDA without a GPU too, and then quietly takes the CPU."""
    if CUDA not in ort.get_available_providers():
        return [CPU]
    try:
        start_session(gathering_graph(), "cuda", threads=1)
    except SettingsError:
        return [CPU]
    return [CUDA, CPU]


def choose_provider(
    manifest: Manifest, asked: Provider, precision: Precision, available: Sequence[str]
) -> Literal["cpu", "cuda"]:
    """CUDA where ONNX Runtime offers it, unless told otherwise; SettingsError if it is asked for and not there.

    A bundle without fp16 graphs runs on the CPU even then, unless a precision is asked for: CUDA has no kernels for its
    int8, and one such bundle must not keep those beside it from the GPU.
    """
    if asked == "cuda" and CUDA not in available:
        raise SettingsError(f"REFRAIN_PROVIDER=cuda: {NO_CUDA}")
    fits = precision != "auto" or "fp16" in manifest.precisions
    return "cuda" if asked != "cpu" and CUDA in available and fits else "cpu"


def choose_precision(
    manifest: Manifest, provider: Literal["cpu", "cuda"], asked: Precision
) -> tuple[Literal["fp32", "fp16", "int8"], StoredPrecision]:
    """The precision to name and the stored graphs to open; SettingsError where the bundle lacks them.

    fp32 and, on a CPU, fp16 open the same graphs: a CPU has no FP16 matrix kernels, and computes them in FP32. So does
    CUDA unless fp16 is asked for: there a text's scores would depend on its batch by up to 1e-3, since another size of
    batch is added up in another order, and that shows once every sum is rounded to FP16.
    """
    if asked == "auto":
        asked = "int8" if provider == "cpu" and "int8" in manifest.precisions else "fp32"
    stored: StoredPrecision = "int8" if asked == "int8" else "fp16"
    if stored not in manifest.precisions:
        there, why = ", ".join(manifest.precisions), manifest.left_out.get(stored)
        source = "" if stored == asked else f", which {asked} is computed from"
        said = f"REFRAIN_PRECISION={asked}: bundle {manifest.name} has no {stored} graphs{source}, only {there}"
        raise SettingsError(f"{said} ({why})" if why else said)
    return ("fp32" if asked == "fp16" and provider == "cpu" else asked), stored
