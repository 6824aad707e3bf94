"""From options to what is asked of a job: the bundle, where and how precisely it runs, and the checks of a request."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort
from pydantic import ValidationError

from service.bulk.job import Asked, list_files
from service.bulk.shards import Format
from service.bundle import Bundle, find_bundles, load_bundle
from service.engine import CPU, CUDA, choose_precision, choose_provider
from service.errors import BulkError
from service.schemas import Options

ASKING_SECONDS = 120


def choose_bundle(options: argparse.Namespace) -> Bundle:
    """The bundle that is named, or the one for the task and architecture; raises BundleError or BulkError."""
    if options.model is not None:
        return load_bundle(options.model)
    there = [load_bundle(path) for path in find_bundles(options.models_dir)]
    wanted = options.task, options.architecture
    found = [bundle for bundle in there if (bundle.manifest.task, bundle.manifest.architecture) == wanted]
    if len(found) != 1:
        known = ", ".join(f"{bundle.manifest.task} {bundle.manifest.architecture}" for bundle in there)
        number = "more than one bundle" if found else "no bundle"
        raise BulkError(f"{number} in {options.models_dir} for {' '.join(wanted)}; there is {known}")
    return found[0]


def what_is_asked(options: argparse.Namespace, bundle: Bundle, answering: Options) -> Asked:
    """What decides the job's answers; `auto` is settled here, so that all workers and later runs do the same.

    Raises BulkError for the input or the asking, SettingsError for a provider or precision not to be had.
    """
    available = [CPU] if options.provider == "cpu" else usable_providers()
    provider = choose_provider(bundle.manifest, options.provider, options.precision, available)
    files = list_files(options.input, options.out)
    follows: Format = "jsonl" if Path(files[0].path.removesuffix(".gz")).suffix == ".jsonl" else "parquet"
    return Asked(
        model=bundle.id,
        provider=provider,
        precision=choose_precision(bundle.manifest, provider, options.precision)[0],
        options=answering,
        column=options.column,
        keep=None if options.keep is None else [name for name in options.keep.split(",") if name],
        format=options.format or follows,
        shard_bytes=options.shard_bytes,
        files=files,
    )


def usable_providers() -> list[str]:
    """What the workers' sessions get; another process asks, since whoever has opened CUDA keeps some of its memory."""
    if CUDA not in ort.get_available_providers():
        return [CPU]
    asking = "import service.engine as engine; print(engine.CUDA in engine.usable_providers())"
    command = [sys.executable, "-c", asking]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ASKING_SECONDS, check=True)
    except subprocess.SubprocessError as error:
        raise BulkError(
            f"ONNX Runtime does not say whether it has CUDA: {error}; --provider cpu does not ask"
        ) from error
    return [CUDA, CPU] if asked.stdout.endswith("True\n") else [CPU]


def read_answering(options: argparse.Namespace) -> Options:
    """What a request could ask for too; raises ArgumentError for a value out of range."""
    given: dict[str, Any] = {
        name: getattr(options, name) for name in ("max_iterations", "exit_threshold", "raw_scores")
    }
    try:
        return Options(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise argparse.ArgumentError(None, f"argument --{option}: {first['input']}: {first['msg']}") from None
