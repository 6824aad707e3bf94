"""Prints what is in a bundle, for a person."""

from pathlib import Path

from service.bundle import Graph, Manifest, Precision, load_bundle


def inspect(path: Path) -> str:
    """A verified bundle's facts as text; BundleError where it does not hold together."""
    manifest = load_bundle(path).manifest
    return "\n".join(
        [
            f"{manifest.name}@{manifest.version}: {manifest.task}, {manifest.architecture}",
            f"  labels      {', '.join(manifest.labels)}",
            f"  shape       {manifest.parameters:,} parameters, {manifest.iterations} iterations, "
            f"texts of up to {manifest.max_tokens} tokens",
            f"  operators   ONNX opset {manifest.opset}, {manifest.custom_op_domain} {manifest.custom_op_version}",
            f"  trained on  {manifest.training.dataset} ({manifest.training.texts}), seed {manifest.training.seed}",
            f"  run         {manifest.training.run_id}, commit {manifest.training.commit}",
            *(line for name, precision in manifest.precisions.items() for line in _graph_lines(name, precision)),
            *_quality_lines(manifest),
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
        f"  {split:<11} {precision:<5} accuracy at each iteration: {', '.join(f'{q.accuracy:.4f}' for q in found)}"
        for split, by_precision in manifest.quality.items()
        for precision, found in by_precision.items()
    ]


def _parity_lines(manifest: Manifest) -> list[str]:
    parity = manifest.parity
    return [
        f"  parity      fp32 against PyTorch: {parity.fp32_against_pytorch:.1e} over {parity.fp32_cases} texts",
        *(
            f"  parity      {name} against fp32: {one.labels_agree:.4f} of labels agree, "
            f"{one.accuracy_lost:+.4f} accuracy lost ({one.split}, {one.texts} texts)"
            for name, one in parity.against_fp32.items()
        ),
    ]
