"""python -m service.bulk IN OUT: the command line of bulk classification, and its last line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from service.bulk.rows import is_unicode
from service.errors import BulkError, StartError

DESCRIPTION = """\
Classify every row of IN with the engine of the service, and write shards of answers to OUT.

IN   a file, a folder or a pattern in quotes: .jsonl, .csv, .parquet, or .txt with one text in each line;
     all but parquet also with .gz (such a file is one unit of work: split it if it is large)
OUT  a folder: part-000000.parquet and so on, in the order of the rows, one for each unit of work, and job.json

Each row keeps its columns and gets label, score, scores, iterations, tokens, truncated, model; a column of its own that
is called so is kept as input_NAME, and one called input_NAME as input_input_NAME. A row that has no text to classify
gets a reason in the column `error` instead.
The same command after an interruption, whatever it was, does the shards that are missing.
"""
EPILOG = """\
examples:
  python -m service.bulk reviews.jsonl answers
  python -m service.bulk 'logs/*.csv.gz' answers --column message --keep id,day --architecture baseline
  python -m service.bulk lake/ answers --exit-threshold 1 --address 10.0.0.5:6379

With --address the units run on that Ray cluster: the same release, IN, OUT and the bundle must be there under the same
paths on each of its machines. If it asks for a token, Ray takes it from RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.
exit status: 0 all shards are there, 1 not all (the reason is on stderr), 2 wrong options,
130 interrupted: the same command goes on
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do a job; the answer is the process's exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except argparse.ArgumentError as error:
        parser.error(str(error))
    except StartError as error:
        print(f"refrain: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("refrain: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m service.bulk",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="IN")
    parser.add_argument("out", metavar="OUT", type=Path)
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, metavar="DIR", help="a bundle; otherwise one of --models-dir")
    model.add_argument("--models-dir", type=Path, default=Path("models"), metavar="DIR", help="default: %(default)s")
    model.add_argument("--task", default="sentiment", help="default: %(default)s")
    model.add_argument("--architecture", default="recurrent", help="default: %(default)s")
    model.add_argument(
        "--provider",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: CUDA if it is there and the bundle has fp16",
    )
    model.add_argument(
        "--precision", choices=("auto", "fp32", "fp16", "int8"), default="auto", help="as in the service"
    )
    answers = parser.add_argument_group("answers, as in a request to /classify")
    answers.add_argument("--max-iterations", type=int, metavar="N", help="default: as the model was trained")
    answers.add_argument(
        "--exit-threshold", type=float, metavar="P", help="default: the model's own; 1: none leaves early"
    )
    answers.add_argument("--raw-scores", action="store_true", help="logits in place of probabilities")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--column", type=_names, default="text", metavar="NAME", help="the column with the text; default: %(default)s"
    )
    files.add_argument(
        "--keep", type=_names, metavar="NAME,...", help="input columns to keep, '' for none; default: all"
    )
    files.add_argument(
        "--format", choices=("parquet", "jsonl"), help="of OUT; default: jsonl for .jsonl, parquet for the others"
    )
    files.add_argument(
        "--shard-bytes", type=_positive, metavar="N", help="input in one shard; default: by the input's size"
    )
    again = files.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the job in OUT, if there is one: the default")
    again.add_argument("--overwrite", action="store_true", help="drop the job in OUT and begin anew")
    work = parser.add_argument_group("work")
    work.add_argument(
        "--concurrency", type=_positive, metavar="N", help="workers; default: one for each core, on CUDA for each GPU"
    )
    work.add_argument("--batch-tokens", type=_positive, metavar="N", help="in one batch; default: 256, on CUDA 8192")
    work.add_argument(
        "--address", metavar="HOST:PORT", help="a Ray cluster; default: one on this machine, for this job"
    )
    return parser


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value} is no whole number above 0")
    return int(value)


def _names(value: str) -> str:
    if not is_unicode(value):
        raise argparse.ArgumentTypeError(f"{value!a} is not UTF-8")
    return value


def _run(options: argparse.Namespace) -> int:
    from service.bulk.asking import choose_bundle, read_answering, what_is_asked
    from service.bulk.job import alone_in, open_job
    from service.bulk.on_ray import run_units
    from service.bulk.summary import Summary
    from service.loading import BATCH_TOKENS

    answering = read_answering(options)
    bundle = choose_bundle(options)
    asked = what_is_asked(options, bundle, answering)
    with alone_in(options.out):
        job = open_job(asked, options.out, overwrite=options.overwrite)
        missing = job.missing(options.out)
        done = run_units(
            missing,
            out=options.out,
            bundle=bundle.path,
            batch_tokens=options.batch_tokens or BATCH_TOKENS[asked.provider],
            workers=options.concurrency,
            gpus=int(asked.provider == "cuda"),
            address=options.address,
        )
        summary = Summary(shards=len(job.units), there=len(job.units) - len(missing))
        summary.gather(done)
    print(summary.line(options.out))
    if summary.problems:
        raise BulkError("\n".join(sorted(set(summary.problems))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
