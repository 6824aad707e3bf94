"""A bulk job without Ray: its answers are a request's, its shards whole or not there, and it goes on where it was."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.bulk.__main__ import main
from service.bulk.classifier import Classifier, UnitWorker, result_fields
from service.bulk.job import JOB_FILE, Asked, Job, alone_in, list_files, open_job
from service.bulk.rows import BadText, Chunk
from service.bulk.shards import RESULT_FIELDS, JsonLinesWriter, ParquetWriter, new_shard
from service.engine import CPU, CUDA
from service.errors import BulkError
from service.schemas import Options
from tests.service.fakes import FakeEngine, fake_app, fake_bundle, running

MODELS = Path(__file__).resolve().parents[2] / "models"
TEXTS = [f"{'a long way to say: ' * (n % 3)}film {n}" for n in range(60)]
CALIBRATED = {"temperatures": (1.3, 0.7), "exit_threshold": 0.6}


def classified(
    texts: Sequence[str | BadText], *, batch_tokens: int = 64, chunk: int = 1000, **options: Any
) -> list[Any]:
    """The results' fields, by the fake engine."""
    classifier = Classifier(
        fake_bundle(**CALIBRATED), FakeEngine(), batch_tokens=batch_tokens, options=Options(**options)
    )
    try:
        parts = [texts[start : start + chunk] for start in range(0, len(texts), chunk)]
        return [result_fields(outcome) for part in parts for outcome in classifier.classify(part)]
    finally:
        classifier.close()


@pytest.mark.parametrize(
    "options", [{}, {"max_iterations": 1}, {"exit_threshold": 0.9, "max_iterations": 4}, {"raw_scores": True}]
)
def test_answers_are_those_of_a_request_whatever_the_batch(options: dict[str, Any]) -> None:
    with running(fake_app([fake_bundle(**CALIBRATED)])) as client:
        results = client.post("/classify", json={"inputs": TEXTS, **options}).json()["results"]
    assert len({result["truncated"] for result in results}) == 2, "both kinds of text must be among them"
    for batch_tokens, chunk in ((64, 1000), (1, 7), (100_000, 60)):
        for result, fields in zip(
            results, classified(TEXTS, batch_tokens=batch_tokens, chunk=chunk, **options), strict=True
        ):
            assert fields.pop("error") is None
            assert fields == {name: result[name] for name in fields}


def test_a_text_that_fails_or_is_none_costs_the_others_nothing() -> None:
    engine = FakeEngine()
    engine.fail_for("film 3")
    classifier = Classifier(fake_bundle(), engine, batch_tokens=512, options=Options())
    outcomes = [result_fields(found) for found in classifier.classify(["film 1", BadText("empty"), "film 3", "film 4"])]
    classifier.close()
    assert [fields["error"] for fields in outcomes] == [None, "empty", "Inference failed for this text.", None]
    assert outcomes[1]["label"] is outcomes[2]["scores"] is None
    assert outcomes[0] == classified_alone("film 1")
    assert outcomes[3] == classified_alone("film 4")


def classified_alone(text: str) -> Any:
    classifier = Classifier(fake_bundle(), FakeEngine(), batch_tokens=512, options=Options())
    (outcome,) = classifier.classify([text])
    classifier.close()
    return result_fields(outcome)


@dataclass
class Place:
    """An input of three units and an output folder."""

    input: Path
    out: Path

    def asked(self, **changes: Any) -> Asked:
        """The job, or one like it."""
        first: dict[str, Any] = {
            "model": "m@1",
            "provider": "cpu",
            "precision": "int8",
            "options": Options(),
            "column": "text",
            "keep": None,
            "format": "jsonl",
            "shard_bytes": 300,
            "files": list_files(str(self.input), self.out),
        }
        return Asked(**first | changes)

    def open(self, *, overwrite: bool = False, **changes: Any) -> Job:
        return open_job(self.asked(**changes), self.out, overwrite=overwrite)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    lines = [json.dumps({"id": number, "text": f"film {number}"}) for number in range(25)]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    return Place(tmp_path / "in", tmp_path / "out")


def test_a_job_goes_on_with_the_shards_that_are_missing(place: Place) -> None:
    job = place.open()
    assert job.missing(place.out) == [0, 1, 2]
    (place.out / job.shard(1)).write_text("done")
    (place.out / ".part-000002.jsonl.0123.tmp").write_text("half do")
    again = place.open()
    assert again == job
    assert again.missing(place.out) == [0, 2]
    assert sorted(path.name for path in place.out.iterdir()) == [JOB_FILE, "part-000001.jsonl"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "m@2"}, "model was 'm@1', now it is 'm@2'"),
        ({"precision": "fp32"}, "precision was 'int8'"),
        ({"column": "review"}, "column was 'text', now it is 'review'"),
        ({"keep": ["id"]}, "keep was None"),
        ({"options": Options(exit_threshold=0.9)}, "exit_threshold was None, now it is 0.9"),
        ({"format": "parquet"}, "format was 'jsonl'"),
        ({"shard_bytes": None}, "shard_bytes was 300"),
    ],
)
def test_a_job_does_not_go_on_as_another(changes: dict[str, Any], said: str, place: Place) -> None:
    place.open()
    with pytest.raises(BulkError) as raised:
        place.open(**changes)
    assert said in str(raised.value)
    assert "--overwrite" in str(raised.value)


def test_nor_with_other_input(place: Place) -> None:
    place.open()
    (place.input / "b.jsonl").write_text("{}\n")
    with pytest.raises(BulkError, match=r"b\.jsonl is new"):
        place.open()
    (place.input / "b.jsonl").unlink()
    with (place.input / "a.jsonl").open("a") as file:
        file.write("\n{}")
    with pytest.raises(BulkError, match=r"a\.jsonl has changed"):
        place.open()


def test_overwrite_drops_the_job_and_nothing_else(place: Place) -> None:
    (place.out / place.open().shard(0)).write_text("done")
    (place.out / "notes.md").write_text("mine")
    job = place.open(overwrite=True, column="id")
    assert job.missing(place.out) == [0, 1, 2]
    assert (place.out / "notes.md").exists()


def test_a_folder_that_is_somebody_else_s_is_left_alone(place: Place) -> None:
    (place.out / "part-000000.jsonl").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(BulkError, match="empty or new"):
            place.open(overwrite=overwrite)
    assert (place.out / "part-000000.jsonl").read_text() == "mine"
    with pytest.raises(BulkError, match="shards of this one"):
        list_files(str(place.input), place.input / "out")


def test_two_runs_do_not_work_in_one_folder(place: Place) -> None:
    with alone_in(place.out), pytest.raises(BulkError, match="another run"), alone_in(place.out):
        pass
    with alone_in(place.out):
        pass


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_shard_has_its_name_only_when_it_is_whole(form: Any, tmp_path: Path) -> None:
    path = tmp_path / f"part-000000.{form}"
    chunk, fields = Chunk(["a"], [{"text": "a"}]), [result_fields(BadText("empty"))]
    with suppress(KeyError), new_shard(path, form, ["no", "yes"], ["text"]) as writer:
        writer.write(chunk, fields)
        raise KeyError
    assert not list(tmp_path.iterdir())
    with new_shard(path, form, ["no", "yes"], ["text"]) as writer:
        writer.write(chunk, fields)
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_full_disk_is_not_left_with_half_a_shard(form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: Any = JsonLinesWriter if form == "jsonl" else ParquetWriter
    close = writes.close

    def refuse(self: object) -> None:
        close(self)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writes, "close", refuse)
    with (
        pytest.raises(OSError, match="No space"),
        new_shard(tmp_path / "part", form, ["no", "yes"], ["text"]) as writer,
    ):
        writer.write(Chunk(["a"], [{"text": "a"}]), [result_fields(BadText("empty"))])
    assert not list(tmp_path.iterdir())


def read_shards(out: Path) -> list[dict[str, Any]]:
    """All rows in the order of the shards' names."""
    rows: list[dict[str, Any]] = []
    for path in sorted(out.glob("part-*")):
        lines = path.suffix == ".jsonl"
        rows += map(json.loads, path.read_text().splitlines()) if lines else pq.read_table(path).to_pylist()
    return rows


def work(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The command, its units done here and not by Ray."""

    def run_units(units: Sequence[int], *, out: Path, bundle: Path, batch_tokens: int, **_: Any) -> Any:
        worker = UnitWorker(str(out), str(bundle), batch_tokens)
        try:
            for unit in units:
                yield Counts(**worker({"unit": unit}))
        finally:
            worker.close()

    from service.bulk import on_ray
    from service.bulk.classifier import Counts

    monkeypatch.setattr(on_ray, "run_units", run_units)
    return main([*arguments, "--models-dir", str(MODELS)])


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_keep_their_columns(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": 1, "text": "a wonderful film", "label": "theirs"},
        {"id": 2, "text": None, "label": "theirs", "more": ["\ud800"]},
        {"id": 3, "text": "a dreadful film", "label": None},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert work([str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "--format", form], monkeypatch) == 0
    found = read_shards(tmp_path / "out")
    assert [row["id"] for row in found] == ([1, 2, 3] if form == "jsonl" else ["1", "2", "3"])
    assert [row["input_label"] for row in found] == ["theirs", "theirs", None]
    assert [row["label"] for row in found] == ["positive", None, "negative"]
    assert [row["error"] for row in found] == [None, "no text: null", None]
    more = {"jsonl": [None, ["\ud800"], None], "parquet": [None, '{"more": ["\\ud800"]}', None]}[form]
    assert [row.get("more", row.get("other_fields")) for row in found] == more
    said = capsys.readouterr().out
    assert said.startswith("3 texts in ")
    assert "1 failed" in said
    assert "1 of 1 shards" in said


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_no_two_columns_become_one_however_often_answers_are_classified(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("text,label,input_label,other_fields\na film,theirs,older,yes\n")
    first, second = tmp_path / "first", tmp_path / "second"
    assert work([str(tmp_path / "a.csv"), str(first), "--format", form], monkeypatch) == 0
    assert work([str(first / f"part-000000.{form}"), str(second), "--format", form], monkeypatch) == 0
    (row,) = read_shards(second)
    assert row["label"] == row["input_label"] == "positive"
    assert (row["input_input_label"], row["input_input_input_label"]) == ("theirs", "older")
    assert (row["other_fields"], row["input_model"]) == ("yes", row["model"])


def test_what_is_no_column_of_a_parquet_shard_is_among_the_other_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "a film", "other_fields": {"a": 1}, "\ud800": 2}, {"text": "a film", "other_fields": 3}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert work([str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "--format", "parquet"], monkeypatch) == 0
    others = [json.loads(row["other_fields"]) for row in read_shards(tmp_path / "out")]
    assert others == [{"other_fields": {"a": 1}, "\ud800": 2}, {"other_fields": 3}]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("name", "content", "keep", "kept"),
    [
        ("a.csv", "id,text\n1,a film\n", "", {}),
        ("a.jsonl", '{"id": "1", "text": "a film"}\n', "", {}),
        ("a.txt", "a film\n", "", {}),
        ("a.txt", "a film\n", "text", {"text": "a film"}),
        ("a.csv", "id,text\n1,a film\n", "id", {"id": "1"}),
    ],
)
def test_what_is_not_to_be_kept_is_left_out(
    name: str, content: str, keep: str, kept: dict[str, str], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(content)
    arguments = [str(tmp_path / name), str(tmp_path / "out"), "--keep", keep, "--format", form]
    assert work(arguments, monkeypatch) == 0
    (row,) = read_shards(tmp_path / "out")
    assert {name: value for name, value in row.items() if name not in RESULT_FIELDS} == kept
    assert (row["label"], row["error"]) == ("positive", None)


def test_a_plain_text_file_has_one_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a film\n")
    assert work([str(tmp_path / "a.txt"), str(tmp_path / "out"), "--keep", "id"], monkeypatch) == 1
    assert "a.txt: no column 'id', only 'text'" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [None, "id"])
def test_a_parquet_file_without_rows_keeps_its_columns(
    keep: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"id": pa.array([], pa.int16()), "text": pa.array([], pa.string()).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    kept = [] if keep is None else ["--keep", keep]
    assert work([str(tmp_path / "a.parquet"), str(tmp_path / "out"), *kept], monkeypatch) == 0
    shard = pq.read_table(tmp_path / "out" / "part-000000.parquet")
    assert shard.column_names[:-8] == (["id", "text"] if keep is None else ["id"])
    assert shard.schema.field("id").type == pa.int16()


def test_a_name_that_is_not_utf_8_is_said_to_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"id,te\xffxt\n1,a film\n")
    assert work([str(file), str(tmp_path / "out"), "--column", "id"], monkeypatch) == 1
    assert "a.csv: the name of the column 'te?xt' is not UTF-8" in capsys.readouterr().err
    renamed = file.rename(tmp_path / "\udcff.csv")
    assert work([str(renamed), str(tmp_path / "out")], monkeypatch) == 1
    assert "\\udcff.csv': the file's name is not UTF-8: rename it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--max-iterations", "0"], "argument --max-iterations: 0: Input should be greater than"),
        (["--exit-threshold", "1.5"], "argument --exit-threshold: 1.5: Input should be less than or equal to 1"),
        (["--column", "\udcff"], r"argument --column: '\udcff' is not UTF-8"),
        (["--keep", "a,\udcff"], r"argument --keep: 'a,\udcff' is not UTF-8"),
        (["--concurrency", "0"], "argument --concurrency: 0 is no whole number above 0"),
        (["--shard-bytes", "1e6"], "argument --shard-bytes: 1e6 is no whole number above 0"),
    ],
)
def test_a_wrong_option_says_what_would_be_right(
    option: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["in", "out", *option])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_parquet_columns_keep_their_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table(
        {"id": pa.array([1, 2], pa.int16()), "when": pa.array([3, 4], pa.timestamp("ns")), "text": ["a", "b"]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert work([str(tmp_path / "a.parquet"), str(tmp_path / "out"), "--keep", "when,id"], monkeypatch) == 0
    shard = pq.read_table(tmp_path / "out" / "part-000000.parquet")
    assert shard.select(["when", "id"]).equals(table.select(["when", "id"]))
    assert shard.column_names[2:] == ["label", "score", "scores", "iterations", "tokens", "truncated", "model", "error"]


def test_a_bad_file_does_not_keep_the_others_from_their_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a film\n")
    (tmp_path / "in" / "b.txt.gz").write_bytes(b"no gzip")
    assert work([str(tmp_path / "in"), str(tmp_path / "out"), "--format", "jsonl"], monkeypatch) == 1
    out, err = capsys.readouterr()
    assert "1 of 2 shards" in out
    assert "b.txt.gz cannot be read" in err
    assert [row["text"] for row in read_shards(tmp_path / "out")] == ["a film"]


def test_a_model_for_cpus_alone_is_run_on_one_where_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a film\n")
    monkeypatch.setattr("service.bulk.asking.usable_providers", lambda: [CUDA, CPU])
    assert work([str(tmp_path / "a.txt"), str(tmp_path / "out"), "--task", "domain"], monkeypatch) == 0
    asked = json.loads((tmp_path / "out" / JOB_FILE).read_text())["asked"]
    assert (asked["provider"], asked["precision"]) == ("cpu", "int8")


def test_the_cuda_build_without_a_gpu_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a film\n")
    monkeypatch.setattr("service.bulk.asking.ort.get_available_providers", lambda: [CUDA, CPU])
    assert work([str(tmp_path / "a.txt"), str(tmp_path / "out")], monkeypatch) == 0
    asked = json.loads((tmp_path / "out" / JOB_FILE).read_text())["asked"]
    assert (asked["provider"], asked["precision"]) == ("cpu", "int8")


def test_a_runtime_that_does_not_say_whether_it_has_cuda_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a film\n")
    monkeypatch.setattr("service.bulk.asking.ort.get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr("service.bulk.asking.sys.executable", "/bin/false")
    assert work([str(tmp_path / "a.txt"), str(tmp_path / "out")], monkeypatch) == 1
    assert "ONNX Runtime does not say whether it has CUDA: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--column", "review"], "a.csv: no column 'review', only 'id', 'text'"),
        (["--keep", "day"], "a.csv: no column 'day'"),
        (
            ["--task", "weather"],
            "for weather recurrent; "
            "there is domain baseline, domain recurrent, sentiment baseline, sentiment recurrent",
        ),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_command_says_what_would_be_right(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,a film\n")
    assert work([str(tmp_path / "a.csv"), str(tmp_path / "out"), *arguments], monkeypatch) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/part-*"))
