"""How long a text takes in each stored precision of some bundles, all taking turns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from tqdm import tqdm

from model_export.errors import ExportError
from model_export.parity import run_engine
from service.bundle import load_bundle
from service.engine import open_engine
from training.examples import read_records
from training.tokenizer import encode

THREADS = 1


def speed(bundles: Sequence[Path], texts: Path, most: int, rounds: int) -> dict[str, dict[str, Mapping[str, Any]]]:
    """By bundle's directory and precision: milliseconds per text at full depth, in batches sorted by length.

    Medians over rounds in which all take turns, one thread; `texts` is a file of records with a `text`.
    """
    if rounds < 1 or most < 1:
        raise ExportError(f"--rounds {rounds} --most {most}: at least 1 of each is needed")
    inputs = [record["text"] for record in read_records(texts)][:most]
    opened = [load_bundle(path) for path in bundles]
    engines = {
        (bundle.path.name, name): open_engine(bundle, provider="auto", precision=name, threads=THREADS)
        for bundle in opened
        for name in bundle.manifest.precisions
    }
    ids = {bundle.path.name: encode(bundle.tokenizer, inputs, bundle.manifest.max_tokens) for bundle in opened}
    depths = {bundle.path.name: bundle.manifest.iterations for bundle in opened}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
    for _ in tqdm(range(rounds), desc="speed", unit="round", leave=False):
        for key, engine in engines.items():
            started = perf_counter()
            run_engine(engine, ids[key[0]], depths[key[0]], THREADS)
            seconds[key].append(perf_counter() - started)
    found: dict[str, dict[str, Mapping[str, Any]]] = {bundle.path.name: {} for bundle in opened}
    for (bundle_name, precision), engine in engines.items():
        found[bundle_name][precision] = {
            "milliseconds_per_text": median(seconds[bundle_name, precision]) * 1000 / len(inputs),
            "bytes": engine.model_bytes,
            "run_as": f"{engine.precision} on {engine.provider}",
        }
    return found
