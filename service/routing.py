"""Who answers a request that names no architecture: policies as plain functions, chosen by one setting at start."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from service.errors import SettingsError

Policy = Callable[[str, str], str]  # (task, request's key) -> architecture
Loaded = Mapping[str, Sequence[str]]  # task -> its architectures


def build_policy(setting: str, loaded: Loaded) -> Policy:
    """Turn the setting into a policy that names only what is loaded; SettingsError says what would be right."""
    kind, _, argument = setting.partition(":")
    if kind == "fixed" and argument:
        return fixed(argument, loaded)
    if kind == "split" and argument:
        return split(_parse_weights(setting, argument), loaded)
    raise SettingsError(f"REFRAIN_ROUTING={setting}: must be fixed:NAME or split:NAME=WEIGHT,NAME=WEIGHT")


def fixed(name: str, loaded: Loaded) -> Policy:
    """Always the named architecture; a task that lacks it falls to the only one that it has."""
    chosen = {task: name if name in names else _only(task, names, [name]) for task, names in loaded.items()}
    return lambda task, key: chosen[task]


def split(weights: Mapping[str, float], loaded: Loaded) -> Policy:
    """Share requests by weight; the same key always goes to the same architecture, on every process and restart."""
    there = {name for names in loaded.values() for name in names}
    if missing := [name for name in weights if name not in there]:
        raise SettingsError(f"REFRAIN_ROUTING names {', '.join(missing)}, but loaded are {', '.join(sorted(there))}")
    shares = {task: _shares(task, names, weights) for task, names in loaded.items()}

    def policy(task: str, key: str) -> str:
        point = position(key)
        return next(name for name, upper in shares[task] if point < upper)

    return policy


def position(key: str) -> float:
    """Map a key onto [0, 1) evenly, and the same everywhere."""
    digest = hashlib.blake2b(key.encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _shares(task: str, names: Sequence[str], weights: Mapping[str, float]) -> list[tuple[str, float]]:
    """Give each architecture the upper edge of its part of [0, 1); the last lies beyond, whatever rounding does."""
    present = {name: weight for name, weight in weights.items() if name in names and weight > 0}
    if not present:
        return [(_only(task, names, list(weights)), 2.0)]
    total, edge, shares = sum(present.values()), 0.0, []
    for name, weight in present.items():
        edge += weight / total
        shares.append((name, edge))
    return [*shares[:-1], (shares[-1][0], 2.0)]


def _only(task: str, names: Sequence[str], wanted: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    raise SettingsError(
        f"REFRAIN_ROUTING names {', '.join(wanted)}, but task {task} has {', '.join(sorted(names))}: name one of those"
    )


def _parse_weights(setting: str, argument: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in argument.split(","):
        name, _, weight = (piece.strip() for piece in part.partition("="))
        if not name or name in weights or not weight.isdecimal():
            raise SettingsError(
                f"REFRAIN_ROUTING={setting}: {part!r} must be NAME=WEIGHT, the weight a whole number, each name once"
            )
        weights[name] = float(weight)
    if sum(weights.values()) == 0:
        raise SettingsError(f"REFRAIN_ROUTING={setting}: one weight must be above 0")
    return weights
