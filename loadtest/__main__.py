"""`python -m loadtest`: the rounds in turn, then verdict, tables, notes and the files."""

import signal
import sys
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from loadtest import machine, report
from loadtest.command_line import parse
from loadtest.errors import LoadTestError
from loadtest.options import Options
from loadtest.rounds import Round, expected_seconds, run, subjects
from loadtest.summary import summarise
from loadtest.verdict import verdict

GENERATOR_WAS_THE_LIMIT = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """The process's exit status; see `--help`."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the children as Ctrl-C does
    about = machine.describe()  # now: what is checked out may be another commit in the end
    try:
        rounds = _all_rounds(options)
    except LoadTestError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("loadtest: interrupted; the processes it started have ended, no report was written", file=sys.stderr)
        return 130
    _report(rounds, options, about)
    if any(one.failed for one in rounds):
        return 1
    return GENERATOR_WAS_THE_LIMIT if any(one.generator_limited for one in rounds) else 0


def _all_rounds(options: Options) -> list[Round]:
    """Alternating, so that a machine that slows down slows all."""
    turns = [(name, number) for number in range(1, options.rounds + 1) for name in subjects(options)]
    each, rounds = expected_seconds(options), list[Round]()
    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left"
    with tqdm(total=each * len(turns), bar_format=form) as progress:
        for done, (name, number) in enumerate(turns):
            progress.set_description(f"round {number} of {options.rounds}, {name}")

            def passed(seconds: float, end: float = each * (done + 1)) -> None:
                progress.update(min(seconds, end - progress.n))
                progress.refresh()  # the time goes on, also where a search takes longer than the bar thought

            rounds.append(run(name, number, options, passed))
            progress.update(each * (done + 1) - progress.n)
    return rounds


def _report(rounds: Sequence[Round], options: Options, about: Mapping[str, str]) -> None:
    from loadtest import figure  # takes a second to import, which --help should not

    written = report.write(rounds, options, about, figure.draw(rounds, options))
    summary = summarise(rounds)
    for load in options.loads():
        print(f"\n{load.title}\n{report.table(summary, load.name, report.rows(load))}")
    print(f"\n{report.overview(summary, options.loads(), options.service_level_ms)}\n")
    print(report.as_lines(verdict(summary, options)).replace("**", ""))
    for note in report.notes(rounds, options):
        print(f"\n{note}")
    print("\nwritten:", *written)


if __name__ == "__main__":
    sys.exit(main())
