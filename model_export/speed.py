"""How long a text takes in each stored precision of some bundles, all taking turns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from tqdm import tqdm

from model_export.errors import ExportError
from model_export.evaluate import named
from model_export.parity import run_engine
from service.bundle import load_bundle
from service.engine import open_engine
from training.examples import read_records
from training.tokenizer import encode

THREADS = 1


def speed(bundles: Sequence[Path], texts: Path, most: int, rounds: int) -> dict[str, dict[str, Mapping[str, Any]]]:
    """By bundle, as `named` calls it, and precision: milliseconds per text at full depth, in batches sorted by length.

    Medians over rounds in which all take turns, one thread; `texts` is a file of records with a `text`.
    """
    if rounds < 1 or most < 1:
        raise ExportError(f"--rounds {rounds} --most {most}: at least 1 of each is needed")
    inputs = [record["text"] for record in read_records(texts)][:most]
    opened = {name: load_bundle(path) for name, path in named(bundles).items()}
    engines = {
        (name, precision): open_engine(bundle, provider="auto", precision=precision, threads=THREADS)
        for name, bundle in opened.items()
        for precision in bundle.manifest.precisions
    }
    ids = {name: encode(bundle.tokenizer, inputs, bundle.manifest) for name, bundle in opened.items()}
    depths = {name: bundle.manifest.iterations for name, bundle in opened.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
    for _ in tqdm(range(rounds), desc="speed", unit="round", leave=False):
        for key, engine in engines.items():
            started = perf_counter()
            run_engine(engine, ids[key[0]], depths[key[0]], THREADS)
            seconds[key].append(perf_counter() - started)
    found: dict[str, dict[str, Mapping[str, Any]]] = {name: {} for name in opened}
    for (bundle_name, precision), engine in engines.items():
        found[bundle_name][precision] = {
            "milliseconds_per_text": median(seconds[bundle_name, precision]) * 1000 / len(inputs),
            "bytes": engine.model_bytes,
            "run_as": f"{engine.precision} on {engine.provider}",
        }
    return found
