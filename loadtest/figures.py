"""From what was seen of one load to its figures: rates, latencies, memory, CPU time and its cost."""

from collections.abc import Sequence

from loadtest.driver import Driven
from loadtest.job import NOT_SENT, Answer
from loadtest.options import Load, Options
from loadtest.recording import has_enough, latencies, percentiles
from loadtest.target import Metrics

PERCENTS = (50, 90, 95, 99, 99.9)
CURVE = (*range(1, 100), *(99 + tenth / 10 for tenth in range(1, 10)))
"""The percents of a latency curve: every one, and the last one in tenths."""
ALL_OURS = 0.05
"""The service's own count of answers may differ from ours by this share; else its figures are of other requests too."""
_MEMORY = "process_resident_memory_bytes"
_CPU = "process_cpu_seconds_total"
_REFUSALS = ("HTTP 429", "HTTP 503 too_many_connections", "HTTP 504", NOT_SENT)


def is_refusal(failure: str) -> bool:
    """Whether a failure is of a service that has too much to do: what a search for the knee looks for."""
    return failure.startswith(_REFUSALS)


def figures_of(
    driven: Driven, load: Load, options: Options, architectures: Sequence[str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """All figures of a load, and, where several architectures were asked, the latencies of each."""
    trace = driven.trace
    figures = {"generator_cores": trace.generator_cores, "requests": float(len(trace.answers))}
    if load.shape == "step":
        held = [step for step in trace.steps if step.holds(options.service_level_ms)]
        best = max(held, key=lambda step: step.rate, default=None)
        rate = best.rate if best else 0.0  # left out, a round in which none held would raise the median of the others
        figures |= {"level_requests_per_second": rate, "level_texts_per_second": rate * load.list_size}
        if best and best.p50_ms is not None and best.late_p99_ms is not None:
            figures |= {"level_p50_ms": best.p50_ms, "late_p99_ms": best.late_p99_ms}
    elif trace.answers:
        rate = len(trace.answers) / trace.seconds
        figures |= {"requests_per_second": rate, "texts_per_second": rate * load.list_size}
        figures |= latencies([one.milliseconds for one in trace.answers], PERCENTS)
        if load.arrivals != "users":
            (figures["late_p99_ms"],) = percentiles([one.late_ms for one in trace.answers], [99])
    figures |= cpu_figures(driven, load.list_size, options)
    each = {name: [one for one in trace.answers if one.architecture == name] for name in architectures}
    apart = len(architectures) > 1 and load.shape != "step"
    return figures, {
        name: latencies([one.milliseconds for one in own], PERCENTS) for name, own in each.items() if own and apart
    }


def curve(answers: Sequence[Answer]) -> list[float]:
    """Latency in milliseconds at each percent of CURVE for which there are answers enough."""
    known = [percent for percent in CURVE if has_enough(percent, len(answers))]
    return percentiles([one.milliseconds for one in answers], known)


def course(answers: Sequence[Answer]) -> list[dict[str, float]]:
    """For each second in which answered requests were due: how many, their p50, and the slowest."""
    seconds: dict[int, list[float]] = {}
    for one in answers:
        seconds.setdefault(int(one.due), []).append(one.milliseconds)
    told = []
    for second, values in sorted(seconds.items()):
        (p50,) = percentiles(values, [50])
        told.append({"second": second, "answered": len(values), "p50_ms": p50, "slowest_ms": max(values)})
    return told


def cpu_figures(driven: Driven, list_size: int, options: Options) -> dict[str, float]:
    """CPU time of the service and its cost; empty when /metrics is not to be had, or is not of our requests alone."""
    used, counted = driven.grown(_CPU), driven.grown("refrain_requests_total", code="200")
    answered = len(driven.trace.answers)
    if not used or not answered or counted is None or abs(counted - answered) > ALL_OURS * answered:
        return {}
    seconds = used / answered / list_size * 1e6
    figures = {
        "cpu_seconds_per_million_texts": seconds,
        "cost_per_million_texts": seconds / 3600 * options.cost_per_core_hour,
        "service_cores": used / driven.trace.seconds,
    }
    if driven.others_cpu_seconds is not None and not options.host:
        figures["other_cores"] = max(driven.others_cpu_seconds - used, 0.0) / driven.seconds
    taken, texts = driven.grown("refrain_iterations_sum"), driven.grown("refrain_iterations_count")
    return figures | ({"mean_iterations": taken / texts} if taken and texts else {})


def memory_figures(
    idle: Metrics | None, loaded: Sequence[Metrics | None], architectures: Sequence[str], task: str
) -> dict[str, float]:
    """Bytes: of the service's processes before the load and at their most, and of these models in all of them."""
    models = [idle.total("refrain_model_memory_bytes", architecture=name, task=task) for name in architectures if idle]
    peaks = [scrape.total(_MEMORY) for scrape in loaded if scrape]
    figures = {
        "idle_memory_bytes": idle.total(_MEMORY) if idle else None,
        "peak_memory_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "model_memory_bytes": sum(filter(None, models)) or None,
    }
    return {name: value for name, value in figures.items() if value is not None}
