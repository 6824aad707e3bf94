"""A run in, a bundle out: written beside, proved, given its manifest last, and only then renamed into place."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from onnx import ModelProto
from pydantic import BaseModel, ValidationError

from model_export import ops
from model_export.calibrate import calibrate
from model_export.card import README, render, write_card
from model_export.errors import ExportError
from model_export.graphs import Graphs, describe, export_graphs, finish, to_fp16, unroll
from model_export.judge import SplitLogits, Splits, open_splits
from model_export.parity import (
    FP32_TOLERANCE,
    FloatArray,
    Tolerances,
    fp32_difference,
    precision_difference,
    run_portable,
)
from model_export.quantize import measure_ranges, quantize_embedding, quantize_step
from service.bundle import MANIFEST
from service.engine import Engine
from service.manifest import (
    SCHEMA_VERSION,
    Difference,
    Graph,
    GraphRole,
    Label,
    Manifest,
    Name,
    Parity,
    Precision,
    StoredFile,
    StoredPrecision,
    Training,
    content_version,
    first_problem,
)
from training import run as runs
from training.architectures.encoder import Encoder
from training.batches import pad, sorted_batches
from training.data import load_dataset
from training.prepare import check_source
from training.run import RunInfo
from training.shapes import AS_IN_TRAINING, Reading
from training.tokenizer import encode, encode_whole

RANGE_TEXTS = 512
THREADS = 2


class _Names(BaseModel):
    """A run's own words in a manifest: what no bundle may have is refused before anything is computed."""

    name: Name
    task: Name
    labels: list[Label]


@dataclass(frozen=True)
class ExportOptions:
    """What to put into a bundle and where its data set lies."""

    run: Path
    out: Path
    data_dir: Path | None
    precisions: tuple[StoredPrecision, ...]
    portable: bool
    tolerances: Tolerances
    judge_on: tuple[str, ...] = ()
    reading: Reading = AS_IN_TRAINING


@dataclass(frozen=True)
class _Source:
    """A run, opened. `train_lengths` are those of all its training texts, uncut; `train_ids` are of some."""

    info: RunInfo
    model: Encoder
    splits: Splits
    train_ids: list[list[int]]
    train_lengths: list[int]

    @property
    def iterations(self) -> int:
        return self.model.config.iterations


@dataclass
class _Stored:
    """The precisions that hold, why the others do not, and what each answered."""

    logits: dict[str, SplitLogits]
    graphs: dict[StoredPrecision, Graphs] = field(default_factory=dict)
    differences: dict[StoredPrecision, list[Difference]] = field(default_factory=dict)
    left_out: dict[StoredPrecision, str] = field(default_factory=dict)


def export(options: ExportOptions) -> Path:
    """Writes the bundle and returns its directory; on ExportError there is none, and an old one stands as it was."""
    _check_replaceable(options.out, _name(runs.read_info(options.run)))
    if not options.precisions:
        raise ExportError("no precision to export: name fp16, int8 or both")
    partial = options.out.with_name(f".{options.out.name}.partial")
    try:
        source = _open(options)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        manifest = _write(source, options, partial)
        runs.replace(partial / README, render(manifest).encode())
        runs.replace(partial / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
        _move_into_place(partial, options.out)
    except ValidationError as error:  # as of a task whose name cannot be a bundle's
        raise ExportError(f"the manifest would not be valid: {first_problem(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return options.out


def _name(info: RunInfo) -> str:
    return f"{info.task}-{info.architecture}"


def _check_replaceable(out: Path, name: str) -> None:
    """ExportError where something else stands there than a bundle of the same task and architecture."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).exists():
        raise ExportError(f"{out} exists and is not a bundle: it will not be replaced")
    try:
        standing = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["name"]
    except (ValueError, TypeError, KeyError):
        return  # a broken bundle, to be replaced
    if standing != name:
        raise ExportError(
            f"{out} holds {standing}, which {name} will not replace: name another directory (for make export, TASK)"
        )


def _open(options: ExportOptions) -> _Source:
    info = runs.read_info(options.run)
    model = runs.read_model(options.run, options.reading)
    _Names(name=_name(info), task=info.task, labels=info.labels)
    tokenizer = runs.read_tokenizer(options.run)
    dataset = load_dataset(info.options["dataset"], options.data_dir)
    if list(dataset.labels) != info.labels:
        raise ExportError(f"{dataset.name} has labels {', '.join(dataset.labels)}, the run {', '.join(info.labels)}")
    check_source(options.run, info, dataset)
    splits = open_splits(dataset, options.judge_on, options.data_dir, tokenizer, model.config)
    texts = dataset.train.texts
    measured = texts[:: max(1, len(texts) // RANGE_TEXTS)]
    lengths = [len(ids) for ids in encode_whole(tokenizer, texts)]
    return _Source(info, model, splits, encode(tokenizer, measured, model.config), lengths)


def _write(source: _Source, options: ExportOptions, directory: Path) -> Manifest:
    """Everything but the manifest, which it returns."""
    fp32 = export_graphs(source.model)
    engine = _save_and_open(fp32, directory / "fp32", "fp32")
    difference, cases = fp32_difference(source.model, engine, source.iterations)
    stored = _Stored({"fp32": source.splits.run(engine, source.iterations)})
    shutil.rmtree(directory / "fp32")
    for precision in options.precisions:
        graphs = to_fp16(fp32) if precision == "fp16" else _to_int8(fp32, source)
        _store(stored, precision, graphs, source, options, directory)
    if not stored.graphs:
        raise ExportError("; ".join(stored.left_out.values()))
    portable: dict[StoredPrecision, ModelProto] = {}
    if options.portable:
        portable = {name: _write_portable(source, stored, name, options, directory) for name in stored.graphs}
    shutil.copy(options.run / runs.TOKENIZER, directory / runs.TOKENIZER)
    parity = Parity(
        fp32_against_pytorch=difference,
        fp32_cases=cases,
        fp32_tolerance=FP32_TOLERANCE,
        against_fp32=stored.differences,
    )
    return _manifest(source, directory, stored, portable, parity)


def _store(
    stored: _Stored, name: StoredPrecision, graphs: Graphs, source: _Source, options: ExportOptions, directory: Path
) -> None:
    """Keeps a precision if it is near enough to FP32 on every split, else the reason why it is not."""
    engine = _save_and_open(graphs, directory / name, name)
    found = source.splits.run(engine, source.iterations)
    try:
        stored.differences[name] = source.splits.differences(name, stored.logits["fp32"], found, options.tolerances)
    except ExportError as error:
        stored.left_out[name] = str(error)
        shutil.rmtree(directory / name)
    else:
        stored.graphs[name], stored.logits[name] = graphs, found


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
        yield from ([same[place] for place in batch] for batch in sorted_batches([length] * len(same), 32 * length))


def _write_portable(
    source: _Source, stored: _Stored, name: StoredPrecision, options: ExportOptions, directory: Path
) -> ModelProto:
    """One graph with the iterations unrolled, held to FP32 on the validation split."""
    unrolled = unroll(stored.graphs[name], source.iterations)
    path = directory / name / "portable.onnx"
    path.write_bytes(unrolled.SerializeToString(deterministic=True))
    found_NC = run_portable(path, source.splits.validation_ids)
    fp32_NC, truth = stored.logits["fp32"]["validation"][-1], source.splits.examples["validation"].labels
    precision_difference(f"the portable {name} graph", "validation", fp32_NC, found_NC, truth, options.tolerances)
    return unrolled


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
    stored: _Stored,
    portable: dict[StoredPrecision, ModelProto],
    parity: Parity,
) -> Manifest:
    info, model, splits = source.info, source.model, source.splits
    validation = {name: logits["validation"] for name, logits in stored.logits.items()}
    quality = {name: splits.quality(logits) for name, logits in stored.logits.items()}
    fp32 = stored.logits["fp32"]
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=_name(info),
        task=info.task,
        architecture=info.architecture,
        version="0" * 12,
        labels=info.labels,
        max_tokens=model.config.max_tokens,
        tail_tokens=model.config.tail_tokens,
        parameters=sum(weight.numel() for weight in model.parameters()),
        iterations=source.iterations,
        tokenizer=StoredFile(**_stored(runs.TOKENIZER, directory)),
        opset=ops.OPSET,
        custom_op_domain=ops.DOMAIN,
        custom_op_version=ops.DOMAIN_VERSION,
        precisions={
            name: _precision(graphs, name, directory, portable.get(name)) for name, graphs in stored.graphs.items()
        },
        left_out=stored.left_out,
        training=Training(**{name: info.provenance[name] for name in Training.model_fields}),
        card=write_card(info, source.train_lengths, model.config, splits, fp32),
        quality={split: {name: found[split] for name, found in quality.items()} for split in splits.examples},
        calibration=calibrate("validation", validation, splits.examples["validation"].labels),
        parity=parity,
    )
    return manifest.model_copy(update={"version": content_version(manifest)})


def _move_into_place(partial: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    try:
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        partial.rename(out)
    except BaseException:  # Ctrl-C too
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
