"""The command line of a load test, parsed and checked in one place."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

from loadtest.job import Arrivals
from loadtest.options import ARCHITECTURES, KEY_NAME, LIST_SIZE, QUICK_DIR, STEP_LEVELS, Architecture, Options
from loadtest.schedule import Shape

_DESCRIPTION = """\
Compare the recurrent model with the baseline under load, and say which one to take for which load.

Starts the service with one architecture at a time, in turn, then with both; drives it with Locust and reports
throughput within the service level, latency, memory, CPU time and its cost: medians over the rounds, with the lowest
and the highest. With --host it drives a service that already runs, and picks the architecture in each request.

Without --shape three loads are measured: single texts of some users, lists of 32 texts, and single texts that arrive
at random, faster in every step until the service level breaks. Arrivals are due at moments fixed beforehand, and
their latency runs from then, whether or not the load generator was free."""

_EPILOG = f"""\
examples:
  python -m loadtest
  python -m loadtest --quick
  python -m loadtest --rounds 5 --users 64 --lengths sentences
  python -m loadtest --texts reviews.jsonl.gz --task sentiment --exit-threshold 1
  python -m loadtest --shape step --rate 100 --service-level-ms 50
  python -m loadtest --shape spike --rate 400 --duration 30
  python -m loadtest --shape ramp --arrivals users --users 64 --duration 30
  {KEY_NAME}=... python -m loadtest --host https://classify.example.org --architectures recurrent

environment: {KEY_NAME} is sent as X-API-Key, and shown nowhere

exit status: 0 every request answered; 1 a request failed, or the service did not start or stop as it should;
2 a wrong option; 3 the load generator, not the service, was the limit, so a figure says too little; 130 interrupted"""

_QUICK = {"rounds": 1, "duration": 3.0, "step_seconds": 1.2, "warmup": 1.0, "output_dir": QUICK_DIR}
"""One round, and each part as short as percentiles allow."""


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line; argparse ends the process with status 2 and one line when one is wrong."""
    parser, words = _parser(), sys.argv[1:] if arguments is None else list(arguments)
    if "--quick" in words:
        parser.set_defaults(**_QUICK)
    given = vars(parser.parse_args(words))
    del given["quick"]
    options = Options(**given)
    if not options.shape and (options.arrivals, options.rate) != (Options.arrivals, Options.rate):
        parser.error("--arrivals and --rate go with --shape")
    if options.shape == "step" and options.arrivals == "users":
        parser.error("--shape step goes with --arrivals poisson or constant: users slow down with the service")
    if not can_be_written(options.output_dir):
        parser.error(f"--output-dir {options.output_dir} cannot be written")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m loadtest",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_load(parser.add_argument_group("load"))
    _add_level(parser.add_argument_group("service level and cost"))
    _add_texts(parser.add_argument_group("texts"))
    _add_service(parser.add_argument_group("service"))
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Options.output_dir,
        metavar="DIR",
        help="where loadtest.json, .md, .html and .png go (default: %(default)s)",
    )
    return parser


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--shape", choices=get_args(Shape), help="one load of this shape, instead of the three (step: to the knee)"
    )
    group.add_argument(
        "--arrivals",
        choices=get_args(Arrivals),
        default=Options.arrivals,
        help="with --shape: requests at random moments, at even ones, or users who wait (default: %(default)s)",
    )
    _add(group, "--rate", _positive, Options.rate, "R", "with --shape: requests/s at its height; where steps begin")
    _add(group, "--users", _whole, Options.users, "N", "who each send their next request on the last answer")
    group.add_argument(
        "--list-size",
        type=_whole,
        metavar="N",
        help=f"texts in a list (default: {LIST_SIZE} in the comparison, 1 with --shape)",
    )
    _add(group, "--rounds", _whole, Options.rounds, "N", "rounds for each architecture, alternating")
    _add(group, "--duration", _positive, Options.duration, "S", "seconds of a load without steps")
    steps = f"seconds of a step, at least {STEP_LEVELS} service levels"
    _add(group, "--step-seconds", _positive, Options.step_seconds, "S", steps)
    _add(group, "--warmup", _seconds, Options.warmup, "S", "seconds of load before a round's measured part")
    group.add_argument(
        "--quick",
        action="store_true",
        help="one or two minutes: one short round, for a first look, written to runs/quick",
    )


def _add(group: argparse._ArgumentGroup, name: str, kind: object, default: object, metavar: str, text: str) -> None:
    group.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{text} (default: {default})")  # type: ignore[arg-type]  # argparse's own type is private


def _add_level(group: argparse._ArgumentGroup) -> None:
    level = "the 99th percentile stays below so many ms"
    _add(group, "--service-level-ms", _positive, Options.service_level_ms, "MS", level)
    _add(group, "--most-rate", _positive, Options.most_rate, "R", "steps go no higher than so many requests/s")
    cost = "what a core costs for an hour; the default, in US dollars, is about what general-purpose machines cost"
    _add(group, "--cost-per-core-hour", _seconds, Options.cost_per_core_hour, "X", cost)


def _add_texts(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--texts",
        type=_file,
        metavar="FILE",
        help='real texts: one a line, or JSON Lines with "text" where the name ends in .jsonl; also with .gz '
        "(default: composed texts as long as real reviews)",
    )
    group.add_argument(
        "--lengths",
        choices=("mixed", "sentences"),
        default=Options.lengths,
        help="of the composed texts; mixed: a tenth are reviews of 100 to 300 words (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=Options.seed, metavar="N", help="of the composed texts (default: %(default)s)"
    )

    _add(group, "--task", str, Options.task, "NAME", "what is to be decided, as /models names it")
    group.add_argument(
        "--exit-threshold",
        type=_share,
        metavar="P",
        help="above 0, up to 1: a text leaves once it is so sure; 1: never (default: each model's own)",
    )


def _add_service(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--architectures",
        type=_architectures,
        default=Options.architectures,
        metavar="NAMES",
        help=f"which to measure, comma-separated (default: {','.join(ARCHITECTURES)})",
    )
    group.add_argument("--host", type=_url, metavar="URL", help="a running service; nothing is started")
    group.add_argument(
        "--service-python",
        default=Options.service_python,
        metavar="PYTHON",
        help="the interpreter that runs `-m service` (default: the one that runs this)",
    )
    group.add_argument(
        "--log-level", default=Options.log_level, metavar="LEVEL", help="of the started service (default: %(default)s)"
    )
    group.add_argument(
        "--ready-timeout",
        type=_seconds,
        default=Options.ready_timeout,
        metavar="S",
        help="seconds the service may take until /readyz says yes (default: %(default)s)",
    )
    group.add_argument(
        "--stop-timeout",
        type=_seconds,
        default=Options.stop_timeout,
        metavar="S",
        help="seconds the service may take to end after SIGTERM (default: %(default)s)",
    )


def can_be_written(folder: Path) -> bool:
    """Whether files can be put there, be it once it is made: asked before anything is measured."""
    there = next(path for path in (folder, *folder.parents) if os.access(path, os.F_OK))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 0 or more")
    return value


def _positive(text: str) -> float:
    if value := _seconds(text):
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def _share(text: str) -> float:
    if (value := _positive(text)) <= 1:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, up to 1")


def _architectures(text: str) -> tuple[Architecture, ...]:
    named = text.split(",")
    if wrong := [name for name in named if name not in ARCHITECTURES]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(ARCHITECTURES)}")
    return tuple(architecture for architecture in ARCHITECTURES if architecture in named)


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL like http://127.0.0.1:8000")
    return text.rstrip("/")
