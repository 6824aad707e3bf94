"""What the README shows is what there is: the answer to its curl, its figures, its commands, its tree."""

import json
import re
import shlex
from pathlib import Path
from statistics import fmean

import pytest
from fastapi.testclient import TestClient

from loadtest.options import Load
from loadtest.report import overview
from loadtest.summary import from_json
from service.app import create_app
from service.settings import Settings
from tests.service.fakes import wait_until
from training.experiments.gather import Result
from training.experiments.report import groups
from training.tables import spread

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


OVERLOAD = {
    "goodput / capacity": "of its capacity",
    "memory, late / early, PSS": "times",
    "slowest probe of the service, of an idle server, ms": "ms",
}


def cells(text: str) -> list[list[str]]:
    """A table's rows."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


ANSWER_PART = README.split("## Is the recurrent model worth it?\n")[1].split("\n## ")[0]
ANSWER = cells(ANSWER_PART)
PROSE = " ".join(ANSWER_PART.split())
MIX = "validation"
"""What is told of its parts alone."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(Settings(models_dir=ROOT / "models"))) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, seconds=60)
        yield client


def test_curl_gets_the_answer_that_is_shown(client: TestClient) -> None:
    (command,) = (block for block in blocks("sh") if block.startswith("curl"))
    body = shlex.split(command)[-1]
    (shown,) = map(json.loads, blocks("json"))
    answer = client.post("/classify", content=body).json()
    assert answer.keys() == shown.keys()
    assert answer["timings_ms"].keys() == shown["timings_ms"].keys()
    for result, expected in zip(answer["results"], shown["results"], strict=True):
        assert result.pop("scores") == pytest.approx(expected.pop("scores"), abs=1e-3)
        assert result.pop("score") == pytest.approx(expected.pop("score"), abs=1e-3)
        assert result == expected


def test_either_architecture_answers(client: TestClient) -> None:
    for architecture in ("recurrent", "baseline"):
        answer = client.post("/classify", json={"inputs": "a charming journey", "architecture": architecture})
        assert answer.json()["results"][0]["architecture"] == architecture


def test_fields_of_a_request_are_all_described(client: TestClient) -> None:
    fields = client.get("/openapi.json").json()["components"]["schemas"]["ClassifyRequest"]["properties"]
    assert set(fields) == set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE))


def test_the_answer_is_what_the_load_test_measured() -> None:
    shown = {row[0]: row[1:] for row in ANSWER[2:]}
    measured = [row for row in load_test_rows() if row[0] in shown]
    assert len(measured) == 5
    assert {row[0]: [figure.split(" ")[0] for figure in row[1:3]] for row in measured} == {
        row[0]: shown[row[0]] for row in measured
    }
    report = (ROOT / "docs/results/loadtest.md").read_text(encoding="utf-8")
    assert "**Take recurrent" in report and "**Take baseline" not in report and "On a CPU, yes" in PROSE
    assert ("**No clear difference in**" in report) == ("no clear difference" in PROSE)
    times = [float(row[3]) for row in load_test_rows() if row[0].endswith("texts/s")]
    assert f"{min(times):.1f} to {max(times):.1f} times the texts" in PROSE
    compared = (ROOT / "docs/results/bench.md").read_text(encoding="utf-8").split("## Texts/s of one mode")[1]
    modes = cells(compared.split("\n## ")[0])[2:]
    depth, leaving = ([float(row[place].split(" ")[0]) for row in modes if row[place] != "-"] for place in (1, 2))
    assert f"At full depth it is {min(depth):.1f} to {max(depth):.1f} times" in PROSE
    assert f"brings {min(leaving):.1f} to {max(leaving):.1f} times that" in PROSE


def test_the_answer_has_the_manifests_accuracy_and_size() -> None:
    shown = [row[1:] for row in ANSWER if row[0].startswith("accuracy")]
    quality = [row.split(" | ") for row in [*quality_rows("sentiment"), *quality_rows("domain")]]
    assert shown == [[row[1].split(" / ")[0], row[3].split(" / ")[0]] for row in quality]  # in INT8, as served
    for architecture, size in zip(("recurrent", "baseline"), ANSWER[2][1:], strict=True):
        manifest = json.loads((ROOT / f"models/sentiment-{architecture}/manifest.json").read_text())
        assert size.endswith(f", {manifest['parameters'] / 1e6:.2f} M")


def load_test_rows() -> list[list[str]]:
    written = json.loads((ROOT / "docs/results/loadtest.json").read_text(encoding="utf-8"))
    loads = [Load(**load) for load in written["loads"]]
    return cells(overview(from_json(written["summary"]), loads, written["service_level_ms"]))[2:]


def test_load_test_table_is_the_one_that_the_command_wrote() -> None:
    written = json.loads((ROOT / "docs/results/loadtest.json").read_text(encoding="utf-8"))
    loads = [Load(**load) for load in written["loads"]]
    table = overview(from_json(written["summary"]), loads, written["service_level_ms"])
    part = README[README.index("`make loadtest` starts") : README.index("Accuracy on SST-2's validation split")]
    assert table in part
    assert len(table.splitlines()) > 10
    assert table in (ROOT / "docs/results/loadtest.md").read_text(encoding="utf-8")


def test_benchmark_tables_are_those_that_the_command_wrote() -> None:
    written = (ROOT / "docs/results/bench.md").read_text(encoding="utf-8").splitlines()
    part = README[README.index("`make bench` measures") : README.index("## Train on your own texts")]
    table = [line for line in part.splitlines() if line.startswith("|")]
    assert table
    assert set(table) <= set(written)


def test_what_twice_the_capacity_does_is_what_the_command_wrote() -> None:
    written = (ROOT / "docs/results/bench.md").read_text(encoding="utf-8").split("## Overload")[1]
    told = README[README.index("Arrivals at twice the capacity") :].partition("\n\n")[0]
    rows = {name: values for name, values in cells(written) if values}
    for name, unit in OVERLOAD.items():
        assert f"{rows[name].split(' and ')[0]} {unit}" in " ".join(told.split())
    assert rows["ended in any other way, lost"] == "0, 0"


def test_quality_is_the_manifests() -> None:
    for architecture in ("recurrent", "baseline"):
        manifest = json.loads((ROOT / f"models/sentiment-{architecture}/manifest.json").read_text())
        for precision in ("fp32", "fp16", "int8"):
            figures = manifest["quality"]["sst2 validation"][precision]
            shown = " / ".join(f"{one['accuracy']:.4f}" for one in figures)
            stored = manifest["precisions"].get(precision)  # FP32 has no files of its own
            size = f" {sum(graph['bytes'] for graph in stored['graphs'].values()) / 1e6:.1f} " if stored else "  "
            row = rf"^\| {architecture} .*\| {precision} \|{size}\| {re.escape(shown)} \|"
            assert re.search(row, README, flags=re.MULTILINE)


def test_exits_and_calibration_are_the_manifests() -> None:
    sentiment, domain = (
        json.loads((ROOT / f"models/{task}-recurrent/manifest.json").read_text())["calibration"]
        for task in ("sentiment", "domain")
    )
    threshold = sentiment["exit_threshold"]
    assert f"the model's: recurrent {threshold:g}, for `domain` {domain['exit_threshold']:g} |" in README
    part = " ".join(
        README[README.index("Probabilities are calibrated") : README.index("Errors are `application")].split()
    )
    first, last = sentiment["ece"]["fp32"]
    assert f"after its first iteration from {first['before']:.3f} to {first['after']:.3f}" in part
    assert f"after its last from {last['before']:.3f} to {last['after']:.3f}" in part
    assert f"FP32, {sentiment['texts']:,} texts" in part
    curves = sentiment["exit_curve"].values()
    points = [(point, curve[-1]) for curve in curves for point in curve if point["threshold"] == threshold]
    assert (
        f"this saves {1 - max(point['mean_iterations'] for point, _ in points) / 2:.0%} of".replace("%", " %") in part
    )
    assert f"costs {100 * max(full['accuracy'] - point['accuracy'] for point, full in points):.1f} points" in part


def test_quality_on_other_splits_is_the_manifests() -> None:
    part = README[README.index("| accuracy / macro F1") : README.index("The `sentiment` models learned")]
    shown = [line.split(" | ", 1)[1].rstrip(" |") for line in part.strip().splitlines()[2:]]
    assert shown == [*quality_rows("sentiment"), *quality_rows("domain")]


def quality_rows(task: str) -> list[str]:
    """Each split's last figures: of both architectures, in FP32 and in INT8; not the validation split of a mix, whose
    parts judge."""
    recurrent, baseline = (
        json.loads((ROOT / f"models/{task}-{architecture}/manifest.json").read_text())["quality"]
        for architecture in ("recurrent", "baseline")
    )
    lasts = {
        split: [quality[split][precision][-1] for quality in (recurrent, baseline) for precision in ("fp32", "int8")]
        for split in recurrent
        if split != MIX
    }
    return [
        " | ".join(f"{last['accuracy']:.4f} / {last['macro_f1']:.4f}" for last in found) for found in lasts.values()
    ]


def test_accuracy_as_served_is_what_the_command_wrote() -> None:
    part = README[README.index("As they are served, in INT8") : README.index("So early exit, whose threshold")]
    rows = served_rows("sentiment") + served_rows("domain")
    assert [row[1:] for row in cells(part)[2:]] == rows
    less = [-float(row[-2].split(" ")[0]) for row in rows]
    assert f"accuracy from {-min(less):.1f} points more to {max(less):.1f} points less on six sets of texts" in PROSE


def test_quality_over_seeds_is_what_the_command_wrote() -> None:
    pages = [(ROOT / f"docs/results/seeds-{task}.md").read_text(encoding="utf-8") for task in ("sentiment", "domain")]
    part = README[README.index("With three seeds of the last stage") : README.index("### Against the bare runtime")]
    written = [row[1:] for page in pages for row in cells(page)[2:] if row[0] != MIX]
    assert [row[1:] for row in cells(part)[2:]] == written
    for task, dataset in (("sentiment", "sentiment"), ("domain", "excerpts")):
        for run in json.loads((ROOT / f"docs/results/seeds-{task}.json").read_text(encoding="utf-8"))["runs"]:
            assert run["validation"]["dataset"] == dataset


def served_rows(task: str) -> list[list[str]]:
    """Each split: its texts, recurrent's accuracy and iterations, baseline's, their difference, the linear one's."""
    linear = json.loads((ROOT / f"docs/results/linear-{task}.json").read_text(encoding="utf-8"))
    written = json.loads((ROOT / f"docs/results/evaluate-{task}.json").read_text(encoding="utf-8"))
    figures = {(one["bundle"], one["split"]): one for one in written["figures"] if one["precision"] == "int8"}
    rows = []
    for apart in written["comparisons"]:
        if apart["precision"] != "int8" or apart["split"] == MIX:
            continue
        recurrent, baseline = (figures[f"{task}-{name}", apart["split"]] for name in ("recurrent", "baseline"))
        for one in (recurrent, baseline):
            assert one["iterations"][-1]["accuracy"] == one["manifest"][-1]["accuracy"]
        rows.append(
            [
                f"{recurrent['texts']:,}",
                f"{recurrent['as_served']['accuracy']:.4f}",
                f"{recurrent['as_served']['mean_iterations']:.2f} of {len(recurrent['iterations'])}",
                f"{baseline['as_served']['accuracy']:.4f}",
                f"{100 * apart['difference']:+.2f} ± {100 * apart['standard_error']:.2f}",
                f"{linear[apart['split']]['iterations']['1']['accuracy']:.4f}",
            ]
        )
    return rows


def test_experiments_are_those_that_the_command_wrote() -> None:
    found = experiment_figures("transfer", "100 %")
    for name in ("data-size", "length", "yelp", "domain"):
        found |= experiment_figures(name)
    part = README[README.index("| trained on | tested on |") : README.index("An interrupted training goes on")]
    shown = [line.strip("| ").split(" | ", 2) for line in part.strip().splitlines()[2:]]
    assert len(shown) == 9
    for row, test, figures in shown:
        where = row.removeprefix("SST-2, "), test
        assert figures == f"{found[*where, 'baseline']} | {found[*where, 'recurrent']}"


def test_what_the_second_iteration_brings_is_what_the_command_wrote() -> None:
    results = json.loads((ROOT / "docs/results/recurrence.json").read_text(encoding="utf-8"))["results"]
    accuracy = {
        (test, model): fmean(one.last["accuracy"] for one in several)
        for (_, test, model), several in groups([Result(**one) for one in results]).items()
    }
    tests = ("random test part", "official validation")
    more, cost = (
        " and ".join(f"{100 * (accuracy[test, model] - accuracy[test, other]):.1f}" for test in tests)
        for model, other in (("recurrent", "recurrent, once"), ("baseline 256", "recurrent"))
    )
    assert f": {more} points on phrases and on new sentences, and {cost}, the spread" in " ".join(README.split())


def experiment_figures(name: str, row: str | None = None) -> dict[tuple[str, str, str], str]:
    """By row (or the one given), test and model: the accuracy at full depth over the seeds, and the published one."""
    results = json.loads((ROOT / f"docs/results/{name}.json").read_text(encoding="utf-8"))["results"]
    found = groups([Result(**one) for one in results])
    return {
        (row or of, test, model): " | ".join(
            [
                spread([one.last["accuracy"] for one in several]),
                "-" if several[0].published is None else f"{several[0].published:.4f}",
            ]
        )
        for (of, test, model), several in found.items()
    }


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            to = page.parent / path if path else page
            assert to.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(to), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """What a link into a page may name, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_make_targets_and_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    tree = README[README.index("## Where things are") :].split("```")[1]
    named = re.findall(r"^(\S+/)", tree, flags=re.MULTILINE) + tree.strip().splitlines()[-1].split()
    assert len(named) > 12
    assert all((ROOT / name).exists() for name in named)
