"""What a load test is told on the command line, parsed and checked in one place."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

ARCHITECTURES = ("recurrent", "baseline")

_DESCRIPTION = """\
Compare the recurrent model with the baseline under load.

Starts the service with one architecture at a time, in turn, drives it with Locust, and reports requests/s, latency,
memory and CPU side by side: medians over the rounds, with the lowest and the highest. With --host it drives a service
that already runs, and picks the architecture in each request."""

_EPILOG = """\
examples:
  python -m loadtest
  python -m loadtest --rounds 5 --users 64 --mixed
  python -m loadtest --texts reviews.jsonl.gz --list-size 32
  python -m loadtest --host http://127.0.0.1:8000

exit status: 0 every request answered; 1 a request failed, or the service did not start or stop as it should;
2 a wrong option; 130 interrupted"""


@dataclass(frozen=True)
class Options:
    """One load test. Field names are the option names; durations are in seconds."""

    rounds: int = 3
    users: int = 16
    duration: int = 20
    warmup: float = 3.0
    list_size: int = 1
    task: str = "sentiment"
    texts: Path | None = None
    mixed: bool = False
    seed: int = 7
    host: str | None = None
    service_python: str = sys.executable
    log_level: str = "info"
    ready_timeout: float = 120.0
    stop_timeout: float = 45.0
    output_dir: Path = Path("docs/results")

    def load(self) -> str:
        """Who sends how much at a time, in words."""
        size = "1 text" if self.list_size == 1 else f"{self.list_size} texts"
        return f"{self.users} users, each with one request of {size} on its way"

    def command(self) -> str:
        """The command that repeats this load, without the paths and addresses of one machine."""
        words = [
            f"python -m loadtest --rounds {self.rounds} --users {self.users} --duration {self.duration}",
            f"--warmup {self.warmup:g} --list-size {self.list_size} --task {self.task} --log-level {self.log_level}",
            f"--texts {self.texts.name}" if self.texts else f"--seed {self.seed}",
        ]
        return " ".join(words + ["--mixed"] * self.mixed + ["--host URL"] * bool(self.host))


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line; argparse ends the process with status 2 and one line when one is wrong."""
    return Options(**vars(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m loadtest",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_load(parser.add_argument_group("load"))
    _add_texts(parser.add_argument_group("texts"))
    _add_service(parser.add_argument_group("service"))
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Options.output_dir,
        metavar="DIR",
        help="where loadtest.json, loadtest.md and loadtest.png go (default: %(default)s)",
    )
    return parser


def _add_load(group: argparse._ArgumentGroup) -> None:
    def add(name: str, kind: object, default: object, metavar: str, text: str) -> None:
        group.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{text} (default: {default})")  # type: ignore[arg-type]  # argparse's own type is private

    add("--rounds", _whole, Options.rounds, "N", "rounds for each architecture, alternating")
    add("--users", _whole, Options.users, "N", "connections that each send their next request on the last answer")
    add("--duration", _whole, Options.duration, "S", "seconds of measured load in a round")
    add("--warmup", _seconds, Options.warmup, "S", "seconds of load before the measured part of a round")
    add("--list-size", _whole, Options.list_size, "N", "texts in one request")
    add("--task", str, Options.task, "NAME", "what is to be decided")


def _add_texts(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--texts",
        type=_file,
        metavar="FILE",
        help='real texts: one a line, or JSON Lines with "text" where the name ends in .jsonl; also with .gz '
        "(default: composed texts as long as sentences of film reviews)",
    )
    group.add_argument(
        "--mixed", action="store_true", help="a tenth of the composed texts are reviews of 100-300 words"
    )
    group.add_argument(
        "--seed", type=int, default=Options.seed, metavar="N", help="of the composed texts (default: %(default)s)"
    )


def _add_service(group: argparse._ArgumentGroup) -> None:
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
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return value


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
