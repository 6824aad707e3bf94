"""A bundle's calibration as one picture: how far its probabilities hold, and what leaving early brings."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model_export.errors import ExportError
from service.bundle import load_bundle
from service.manifest import Bin, Calibration, Reliability

_WITHOUT, _WITH = "#999999", "#0072b2"
_COLOURS = {"fp32": "#0072b2", "fp16": "#009e73", "int8": "#e69f00"}  # told apart by colour-blind readers too
_MARKERS = {"fp32": "o", "fp16": "s", "int8": "^"}


def draw(bundle: Path, path: Path) -> None:
    """Writes a PNG: reliability at each iteration, and the exit curve; ExportError where it cannot be written."""
    manifest = load_bundle(bundle).manifest
    calibration = manifest.calibration
    panels = len(calibration.reliability) + (2 if calibration.exit_curve else 0)
    figure = Figure(figsize=(4.4 * panels, 4.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for place, reliability in enumerate(calibration.reliability):
        _reliability(axes[place], reliability, calibration, place)
    if calibration.exit_curve:
        _standard_error(axes[-2], calibration)
        _exit_curve(axes[-2], calibration, "accuracy")
        _exit_curve(axes[-1], calibration, "mean_iterations")
    figure.suptitle(f"{manifest.name}@{manifest.version}\n{calibration.split}, {calibration.texts} texts")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror}") from error


def _reliability(panel: Axes, reliability: Reliability, calibration: Calibration, place: int) -> None:
    error, temperature = calibration.ece["fp32"][place], calibration.temperatures[place]
    panel.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    _bins(panel, reliability.before, _WITHOUT, f"as trained, error {error.before:.3f}")
    _bins(panel, reliability.after, _WITH, f"temperature {temperature:.2f}, error {error.after:.3f}")
    panel.set(title=f"Iteration {place + 1}, FP32", xlabel="best probability", ylabel="share that is right")
    lowest = min(one.confidence for one in (*reliability.before, *reliability.after))
    panel.set(xlim=(max(0.0, lowest - 0.05), 1.01), ylim=(0, 1.03))
    panel.legend(loc="lower right", frameon=False)
    panel.spines[["top", "right"]].set_visible(False)


def _bins(panel: Axes, found: list[Bin], colour: str, label: str) -> None:
    """A bar is one standard error of the share."""
    deviations = [(one.accuracy * (1 - one.accuracy) / one.texts) ** 0.5 for one in found]
    confidences, shares = [one.confidence for one in found], [one.accuracy for one in found]
    panel.errorbar(confidences, shares, deviations, color=colour, marker="o", markersize=4, capsize=2, label=label)


def _exit_curve(panel: Axes, calibration: Calibration, field: str) -> None:
    """Every precision's curve over the thresholds; full depth stands at 1."""
    for name, points in calibration.exit_curve.items():
        thresholds, values = [point.threshold for point in points], [getattr(point, field) for point in points]
        panel.plot(thresholds, values, color=_COLOURS[name], marker=_MARKERS[name], markersize=4, alpha=0.8, label=name)
    if calibration.exit_threshold is not None:
        panel.axvline(calibration.exit_threshold, color="black", linewidth=0.8, linestyle=":", label="default")
    panel.set(title=field.replace("_", " ").capitalize(), xlabel="exit threshold (1: never)")
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)


def _standard_error(panel: Axes, calibration: Calibration) -> None:
    """What lies within the band, one standard error of the full depth's accuracy, a split of this size hardly tells."""
    accuracy = calibration.exit_curve["fp32"][-1].accuracy
    error = (accuracy * (1 - accuracy) / calibration.texts) ** 0.5
    panel.axhspan(accuracy - error, accuracy + error, color="#dddddd", label="one standard error")
