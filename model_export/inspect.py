"""Says what is in a bundle, for a person."""

from pathlib import Path

from model_export.card import read_of
from service.bundle import load_bundle
from service.manifest import Calibration, Graph, Manifest, Precision

SAVING_AIMED_AT = 0.25
"""Share of the iterations that leaving early should save to be worth its name."""


def inspect(path: Path) -> str:
    """A verified bundle's facts as text; BundleError where it does not hold together."""
    manifest = load_bundle(path).manifest
    return "\n".join(
        [
            f"{manifest.name}@{manifest.version}: {manifest.task}, {manifest.architecture}",
            f"  labels      {', '.join(manifest.labels)}",
            f"  shape       {manifest.parameters:,} parameters, {manifest.iterations} iterations, "
            f"texts of up to {manifest.max_tokens} tokens, of longer ones {read_of(manifest)}",
            f"  operators   ONNX opset {manifest.opset}, {manifest.custom_op_domain} {manifest.custom_op_version}",
            f"  trained on  {manifest.training.dataset} ({manifest.training.texts}), seed {manifest.training.seed}",
            f"  run         {manifest.training.run_id}, commit {manifest.training.commit}",
            *(line for name, precision in manifest.precisions.items() for line in _graph_lines(name, precision)),
            *_quality_lines(manifest),
            *_calibration_lines(manifest.calibration),
            *_exit_lines(manifest.calibration),
            *(f"  left out    {why}" for why in manifest.left_out.values()),
            *_parity_lines(manifest),
        ]
    )


def _graph_lines(name: str, precision: Precision) -> list[str]:
    graphs: dict[str, Graph] = dict(precision.graphs.items())
    if precision.portable:
        graphs["portable"] = precision.portable
    return [
        f"  {name:<5} {role:<9} {graph.bytes / 1e6:6.2f} MB  {_signature(graph.inputs)} -> {_signature(graph.outputs)}"
        for role, graph in graphs.items()
    ]


def _signature(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in values.items())


def _quality_lines(manifest: Manifest) -> list[str]:
    return [
        f"  {split:<22} {precision:<5} accuracy at each iteration: {', '.join(f'{q.accuracy:.4f}' for q in found)}"
        for split, by_precision in manifest.quality.items()
        for precision, found in by_precision.items()
    ]


def _calibration_lines(calibration: Calibration) -> list[str]:
    temperatures = ", ".join(f"{one:.4f}" for one in calibration.temperatures)
    return [
        f"  calibration temperature of each iteration: {temperatures} ({calibration.split}, {calibration.texts} texts)",
        *(
            f"  calibration {precision:<5} calibration error without and with it: "
            + ", ".join(f"{one.before:.4f} -> {one.after:.4f}" for one in found)
            for precision, found in calibration.ece.items()
        ),
    ]


def _exit_lines(calibration: Calibration) -> list[str]:
    curves = calibration.exit_curve
    if not curves:
        return ["  exit        one iteration, so no text leaves early"]
    rows = [("threshold", [f"{name}: accuracy, mean iterations" for name in curves])]
    for points in zip(*curves.values(), strict=True):
        name = f"{points[0].threshold:g}" if points[0].threshold < 1 else "never"
        marked = name + " *" * (points[0].threshold == calibration.exit_threshold)
        rows.append((marked, [f"{point.accuracy:.4f}, {point.mean_iterations:.2f}" for point in points]))
    return [
        f"  exit        {_default(calibration)}",
        *(f"  exit        {name:<11}" + "".join(f"{cell:<34}" for cell in cells).rstrip() for name, cells in rows),
    ]


def _default(calibration: Calibration) -> str:
    chosen = calibration.exit_threshold
    if chosen is None:
        return f"by default never: {calibration.texts} texts show no threshold that saves and surely costs nothing"
    curves = calibration.exit_curve.values()
    full_depth = next(iter(curves))[-1].mean_iterations
    points = [point for curve in curves for point in curve if point.threshold == chosen]
    saved, changed = 1 - max(point.mean_iterations for point in points) / full_depth, max(p.changed for p in points)
    said = f"by default at {chosen:g}: makes {changed} of {calibration.texts} texts right or wrong, saves {saved:.0%}"
    return f"{said} of the iterations" + f", not the {SAVING_AIMED_AT:.0%} aimed at" * (saved < SAVING_AIMED_AT)


def _parity_lines(manifest: Manifest) -> list[str]:
    parity = manifest.parity
    return [
        f"  parity      fp32 against PyTorch: {parity.fp32_against_pytorch:.1e} over {parity.fp32_cases} texts",
        *(
            f"  parity      {name} against fp32: {one.labels_agree:.4f} of labels agree, "
            f"{one.accuracy_lost:+.4f} accuracy lost ({one.split}, {one.texts} texts)"
            for name, found in parity.against_fp32.items()
            for one in found
        ),
    ]
