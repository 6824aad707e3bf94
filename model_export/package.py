"""A run in, a bundle out: written beside, proved, given its manifest last, and only then renamed into place."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from onnx import ModelProto
from pydantic import ValidationError

from model_export import ops
from model_export.calibrate import calibrate
from model_export.errors import ExportError
from model_export.graphs import Graphs, describe, export_graphs, finish, to_fp16, unroll
from model_export.parity import (
    FP32_TOLERANCE,
    FloatArray,
    Tolerances,
    fp32_difference,
    precision_difference,
    run_engine,
    run_portable,
)
from model_export.quantize import measure_ranges, quantize_embedding, quantize_step
from service.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    Calibration,
    Difference,
    Graph,
    GraphRole,
    Manifest,
    Parity,
    Precision,
    Quality,
    StoredFile,
    StoredPrecision,
    Training,
    content_version,
    first_problem,
)
from service.engine import Engine
from training import run as runs
from training.architectures.encoder import Encoder
from training.batches import pad, sorted_batches
from training.data import Dataset, load_dataset
from training.run import RunInfo
from training.scores import score
from training.tokenizer import encode

RANGE_TEXTS = 512
THREADS = 2


@dataclass(frozen=True)
class ExportOptions:
    """What to put into a bundle and where its data set lies."""

    run: Path
    out: Path
    data_dir: Path | None
    precisions: tuple[StoredPrecision, ...]
    portable: bool
    tolerances: Tolerances


@dataclass(frozen=True)
class _Source:
    """A run, opened."""

    info: RunInfo
    model: Encoder
    dataset: Dataset
    train_ids: list[list[int]]
    validation_ids: list[list[int]]

    @property
    def iterations(self) -> int:
        return self.model.config.iterations


def export(options: ExportOptions) -> Path:
    """Writes the bundle and returns its directory; on ExportError there is none, and an old one stands as it was."""
    if not _replaceable(options.out):
        raise ExportError(f"{options.out} exists and is not a bundle: it will not be replaced")
    if not options.precisions:
        raise ExportError("no precision to export: name fp16, int8 or both")
    source = _open(options)
    partial = options.out.with_name(f".{options.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = _write(source, options, partial)
        runs.replace(partial / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
        _move_into_place(partial, options.out)
    except ValidationError as error:  # as of a task whose name cannot be a bundle's
        raise ExportError(f"the manifest would not be valid: {first_problem(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return options.out


def _replaceable(out: Path) -> bool:
    return not out.exists() or (out / MANIFEST).exists() or (out.is_dir() and not any(out.iterdir()))


def _open(options: ExportOptions) -> _Source:
    info = runs.read_info(options.run)
    model = runs.read_model(options.run)
    tokenizer = runs.read_tokenizer(options.run)
    dataset = load_dataset(info.options["dataset"], options.data_dir)
    if list(dataset.labels) != info.labels:
        raise ExportError(f"{dataset.name} has labels {', '.join(dataset.labels)}, the run {', '.join(info.labels)}")
    texts = dataset.train.texts
    measured = texts[:: max(1, len(texts) // RANGE_TEXTS)]
    limit = model.config.max_tokens
    return _Source(
        info, model, dataset, encode(tokenizer, measured, limit), encode(tokenizer, dataset.validation.texts, limit)
    )


def _write(source: _Source, options: ExportOptions, directory: Path) -> Manifest:
    """Everything but the manifest, which it returns."""
    fp32 = export_graphs(source.model)
    engines = {"fp32": _save_and_open(fp32, directory / "fp32", "fp32")}
    difference, cases = fp32_difference(source.model, engines["fp32"], source.iterations)
    stored: dict[StoredPrecision, Graphs] = {}
    for precision in options.precisions:
        stored[precision] = to_fp16(fp32) if precision == "fp16" else _to_int8(fp32, source)
        engines[precision] = _save_and_open(stored[precision], directory / precision, precision)
    logits_RNC = {
        name: run_engine(engine, source.validation_ids, source.iterations) for name, engine in engines.items()
    }

    def difference_of(name: str, logits_NC: FloatArray) -> Difference:
        truth = source.dataset.validation.labels
        return precision_difference(name, "validation", logits_RNC["fp32"][-1], logits_NC, truth, options.tolerances)

    against_fp32 = {name: difference_of(name, logits_RNC[name][-1]) for name in stored}
    shutil.rmtree(directory / "fp32")
    portable: dict[StoredPrecision, ModelProto] = {}
    if options.portable:
        portable = {name: _write_portable(source, graphs, directory / name) for name, graphs in stored.items()}
        for name in portable:
            found_NC = run_portable(directory / name / "portable.onnx", source.validation_ids)
            difference_of(f"the portable {name} graph", found_NC)
    shutil.copy(options.run / runs.TOKENIZER, directory / runs.TOKENIZER)
    return _manifest(
        source,
        directory,
        {name: _precision(graphs, name, directory, portable.get(name)) for name, graphs in stored.items()},
        {"validation": {name: _quality(source, found) for name, found in logits_RNC.items()}},
        calibrate("validation", logits_RNC, source.dataset.validation.labels),
        Parity(
            fp32_against_pytorch=difference,
            fp32_cases=cases,
            fp32_tolerance=FP32_TOLERANCE,
            against_fp32=against_fp32,
        ),
    )


def _save_and_open(graphs: Graphs, directory: Path, precision: Literal["fp32", "fp16", "int8"]) -> Engine:
    directory.mkdir()
    paths: dict[GraphRole, Path] = {}
    for role, graph in graphs.items():
        paths[role] = directory / f"{role}.onnx"
        paths[role].write_bytes(graph.SerializeToString(deterministic=True))
    return Engine(paths, provider="cpu", precision=precision, threads=THREADS)


def _to_int8(fp32: Graphs, source: _Source) -> Graphs:
    def drive(session: onnxruntime.InferenceSession) -> Iterator[Sequence[FloatArray]]:
        embed = onnxruntime.InferenceSession(fp32["embed"].SerializeToString())
        for batch in _equal_lengths(source.train_ids):
            ids_BL, _ = pad([source.train_ids[index] for index in batch])
            (hidden_BLD,) = embed.run(None, {"ids": ids_BL.numpy()})
            for _ in range(source.iterations):
                outputs = session.run(None, {"hidden": hidden_BLD, "mask": np.ones(ids_BL.shape, dtype=bool)})
                hidden_BLD = outputs[0]
                yield outputs

    step = quantize_step(fp32["step"], measure_ranges(fp32["step"], drive))
    return {"embed": finish(quantize_embedding(fp32["embed"])), "step": finish(step)}


def _equal_lengths(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Batches without padding, whose activations would count as if they were real."""
    lengths = [len(row) for row in ids]
    for length in sorted(set(lengths)):
        same = [index for index, one in enumerate(lengths) if one == length]
        yield from ([same[place] for place in batch] for batch in sorted_batches([length] * len(same), 32))


def _write_portable(source: _Source, graphs: Graphs, directory: Path) -> ModelProto:
    unrolled = unroll(graphs, source.iterations)
    (directory / "portable.onnx").write_bytes(unrolled.SerializeToString(deterministic=True))
    return unrolled


def _quality(source: _Source, logits_RNC: FloatArray) -> list[Quality]:
    truth, labels = source.dataset.validation.labels, source.dataset.labels
    figures = [score(truth, predicted, labels) for predicted in logits_RNC.argmax(-1).tolist()]
    return [Quality(accuracy=one["accuracy"], macro_f1=one["macro_f1"]) for one in figures]


def _precision(graphs: Graphs, name: StoredPrecision, directory: Path, portable: ModelProto | None) -> Precision:
    return Precision(
        graphs={role: _graph(graph, f"{name}/{role}.onnx", directory) for role, graph in graphs.items()},
        portable=_graph(portable, f"{name}/portable.onnx", directory) if portable else None,
    )


def _graph(model: ModelProto, file: str, directory: Path) -> Graph:
    return Graph(**_stored(file, directory), inputs=describe(model.graph.input), outputs=describe(model.graph.output))


def _stored(file: str, directory: Path) -> dict[str, Any]:
    content = (directory / file).read_bytes()
    return {"file": file, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _manifest(
    source: _Source,
    directory: Path,
    precisions: dict[StoredPrecision, Precision],
    quality: dict[str, dict[str, list[Quality]]],
    calibration: Calibration,
    parity: Parity,
) -> Manifest:
    info, model = source.info, source.model
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=f"{info.task}-{info.architecture}",
        task=info.task,
        architecture=info.architecture,
        version="0" * 12,
        labels=info.labels,
        max_tokens=model.config.max_tokens,
        parameters=sum(weight.numel() for weight in model.parameters()),
        iterations=source.iterations,
        tokenizer=StoredFile(**_stored(runs.TOKENIZER, directory)),
        opset=ops.OPSET,
        custom_op_domain=ops.DOMAIN,
        custom_op_version=ops.DOMAIN_VERSION,
        precisions=precisions,
        training=Training(**{name: info.provenance[name] for name in Training.model_fields}),
        quality=quality,
        calibration=calibration,
        parity=parity,
    )
    return manifest.model_copy(update={"version": content_version(manifest)})


def _move_into_place(partial: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
