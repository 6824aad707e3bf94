"""Who answers a request that names no architecture: policies as plain functions, chosen by one setting at start."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from service.errors import SettingsError

DIGITS = 9  # of a weight: enough for any share, and never infinite as a float

Who = TypeVar("Who")
Other = TypeVar("Other")


@dataclass(frozen=True, slots=True)
class Plan(Generic[Who]):
    """What is to run for a request: a policy names architectures, the runtime puts models in their place.

    `then` answers each text of which `first` is less sure than `threshold`. `shadow` runs too, but answers nobody.
    """

    first: Who
    then: Who | None = None
    threshold: float = 0.0
    shadow: Who | None = None

    def resolve(self, find: Callable[[Who], Other]) -> Plan[Other]:
        """The same plan, with what `find` has for each name."""
        then = None if self.then is None else find(self.then)
        shadow = None if self.shadow is None else find(self.shadow)
        return Plan(find(self.first), then, self.threshold, shadow)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a policy may look at. `key` is what it sticks to: the caller's, or else the request's own id."""

    task: str
    id: str
    key: str
    seconds_ahead: Callable[[str], float]  # architecture -> how long the work takes that waits for it


Policy = Callable[[Facts], Plan[str]]
Loaded = Mapping[str, Sequence[str]]  # task -> its architectures


def build_policy(setting: str, loaded: Loaded) -> Policy:
    """Turn the setting into a policy that names only what is loaded; SettingsError says what would be right."""
    kind, _, argument = setting.partition(":")
    if kind not in KINDS or not argument:
        forms = [f"{kind}:{form}" for kind, (form, _) in KINDS.items()]
        raise SettingsError(f"REFRAIN_ROUTING={setting}: must be {', '.join(forms[:-1])} or {forms[-1]}")
    form, build = KINDS[kind]
    try:
        return build(argument, loaded)
    except ValueError as error:
        raise SettingsError(f"REFRAIN_ROUTING={setting}: must be {kind}:{form}; {error}") from None


def fixed(argument: str, loaded: Loaded) -> Policy:
    """Always the named architecture; a task that lacks it falls to the only one that it has."""
    _check_known([argument], loaded)
    plans: dict[str, Plan[str]] = {task: Plan(_present(task, loaded, [argument])[0]) for task in loaded}
    return lambda facts: plans[facts.task]


def split(argument: str, loaded: Loaded) -> Policy:
    """Share requests by weight; the same key always goes to the same architecture, on every process and restart."""
    weights = _parse_weights(argument)
    _check_known(weights, loaded)
    taking = {name: weight for name, weight in weights.items() if weight > 0}
    shares = {task: _shares(_present(task, loaded, list(taking)), taking) for task in loaded}

    def policy(facts: Facts) -> Plan[str]:
        point = position(facts.key)
        return Plan(next(name for name, upper in shares[facts.task] if point < upper))

    return policy


def shadow(argument: str, loaded: Loaded) -> Policy:
    """The first answers, and of a share of requests the second learns too; a task without it has no shadow."""
    (primary, second), share = _parse_pair(argument)
    _check_known([primary, second], loaded)
    firsts = {task: _present(task, loaded, [primary])[0] for task in loaded}

    def policy(facts: Facts) -> Plan[str]:
        first = firsts[facts.task]
        # By the request, not by the caller's key: a share of few keys could be all requests or none.
        drawn = position(facts.id) < share and second != first and second in loaded[facts.task]
        return Plan(first, shadow=second if drawn else None)

    return policy


def cascade(argument: str, loaded: Loaded) -> Policy:
    """The second answers where the first is unsure; a task that has one of them is answered by that alone."""
    names, threshold = _parse_pair(argument)
    _check_known(names, loaded)
    plans: dict[str, Plan[str]] = {}
    for task in loaded:
        first, *rest = _present(task, loaded, names)
        plans[task] = Plan(first, then=rest[0], threshold=threshold) if rest else Plan(first)
    return lambda facts: plans[facts.task]


def least_loaded(argument: str, loaded: Loaded) -> Policy:
    """Whichever has the least work ahead, in measured seconds; a task that has one of them always takes that."""
    names = _parse_names(argument)
    _check_known(names, loaded)
    present = {task: _present(task, loaded, names) for task in loaded}

    def policy(facts: Facts) -> Plan[str]:
        there = present[facts.task]
        return Plan(there[shortest([facts.seconds_ahead(name) for name in there])])

    return policy


KINDS: Mapping[str, tuple[str, Callable[[str, Loaded], Policy]]] = {
    "fixed": ("NAME", fixed),
    "split": ("NAME=WEIGHT,NAME=WEIGHT", split),
    "shadow": ("PRIMARY,SHADOW=SHARE", shadow),
    "cascade": ("FIRST,SECOND=THRESHOLD", cascade),
    "least-loaded": ("NAME,NAME", least_loaded),
}


def position(key: str) -> float:
    """Map a key onto [0, 1) evenly, and the same everywhere."""
    digest = hashlib.blake2b(key.encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def shortest(seconds: Sequence[float]) -> int:
    """The place of the least; of equal ones the first."""
    return min(range(len(seconds)), key=seconds.__getitem__)


def _shares(names: Sequence[str], weights: Mapping[str, float]) -> list[tuple[str, float]]:
    """Give each architecture the upper edge of its part of [0, 1); the last lies beyond, whatever rounding does."""
    total, edge, shares = sum(weights.get(name, 1.0) for name in names), 0.0, []
    for name in names:  # one without a weight is the only one that its task has
        edge += weights.get(name, 1.0) / total
        shares.append((name, edge))
    return [*shares[:-1], (shares[-1][0], 2.0)]


def _present(task: str, loaded: Loaded, wanted: Sequence[str]) -> list[str]:
    """Those of the wanted that a task has; where there are none, the only one that it has."""
    names = loaded[task]
    if present := [name for name in wanted if name in names]:
        return present
    if len(names) == 1:
        return list(names)
    raise SettingsError(
        f"REFRAIN_ROUTING names {', '.join(wanted)}, but task {task} has {', '.join(sorted(names))}: name one of those"
    )


def _check_known(names: Iterable[str], loaded: Loaded) -> None:
    there = {name for names in loaded.values() for name in names}
    if missing := [name for name in names if name not in there]:
        raise SettingsError(f"REFRAIN_ROUTING names {', '.join(missing)}, but loaded are {', '.join(sorted(there))}")


def _parse_weights(argument: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in argument.split(","):
        name, _, weight = (piece.strip() for piece in part.partition("="))
        if not name or name in weights or not weight.isdecimal() or len(weight) > DIGITS:
            raise ValueError(
                f"{part!r} is not: the weight is a whole number of at most {DIGITS} digits, each name comes once"
            )
        weights[name] = float(weight)
    if len(weights) < 2:
        raise ValueError(f"two names are needed, and fixed:{name} is for one")
    if sum(weights.values()) == 0:
        raise ValueError("one weight must be above 0")
    return weights


def _parse_pair(argument: str) -> tuple[list[str], float]:
    listed, equals, number = argument.rpartition("=")
    if not equals:
        raise ValueError("the number is missing")
    names = _parse_names(listed)
    if len(names) > 2:
        raise ValueError("two names and no more")
    try:
        part = float(number)
    except ValueError:
        part = 0.0
    if not 0 < part <= 1:
        raise ValueError(f"{number!r} is not a number above 0 and at most 1")
    return names, part


def _parse_names(argument: str) -> list[str]:
    names = [name.strip() for name in argument.split(",")]
    if len(names) < 2 or not all(names) or len(set(names)) < len(names):
        raise ValueError("two different names are needed")
    return names
