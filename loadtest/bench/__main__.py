"""`python -m loadtest.bench`: the run, then the tables, the notes and the files."""

import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loadtest import machine
from loadtest.bench import figure, report
from loadtest.bench.options import parse
from loadtest.bench.run import run
from loadtest.errors import LoadTestError


def main(arguments: Sequence[str]) -> int:
    """The process's exit status; see `--help`."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the children as Ctrl-C does
    about = machine.describe()  # now: what is checked out may be another commit in the end
    try:
        with tempfile.TemporaryDirectory(prefix="refrain-bench-") as folder:
            results = run(options, Path(folder))
    except LoadTestError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; the processes it started have ended, no report was written", file=sys.stderr)
        return 130
    written = [*report.write(results, options, about), figure.write(results, options)]
    print(written[1].read_text(encoding="utf-8"))
    print("written:", *written)
    return 0 if results.sound else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
