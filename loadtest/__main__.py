"""`python -m loadtest`: the rounds in turn, then the table, the notes and the files."""

import signal
import sys
from collections.abc import Sequence

from tqdm import tqdm

from loadtest import figure, report
from loadtest.errors import LoadTestError
from loadtest.options import ARCHITECTURES, Options, parse
from loadtest.rounds import Round, run


def main(arguments: Sequence[str] | None = None) -> int:
    """The process's exit status; see `--help`."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the children as Ctrl-C does
    try:
        rounds = _all_rounds(options)
    except LoadTestError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("loadtest: interrupted; the processes it started have ended, no report was written", file=sys.stderr)
        return 130
    _report(rounds, options)
    return int(any(one.failed for one in rounds))


def _all_rounds(options: Options) -> list[Round]:
    """Alternating, so that a machine that slows down slows both."""
    turns = [(name, number) for number in range(1, options.rounds + 1) for name in ARCHITECTURES]
    rounds = []
    with tqdm(turns, unit="round") as progress:
        for name, number in progress:
            progress.set_description(f"{name} {number} of {options.rounds}")
            rounds.append(run(name, number, options))
            rate = rounds[-1].figures.get("requests_per_second", 0)
            progress.set_postfix_str(f"{name}: {rate:.0f} requests/s")
    return rounds


def _report(rounds: Sequence[Round], options: Options) -> None:
    written = [*report.write(rounds, options), figure.write(rounds, options)]
    print(report.table(rounds))
    for note in report.notes(rounds, options):
        print(f"\n{note}")
    print("\nwritten:", *written)


if __name__ == "__main__":
    sys.exit(main())
