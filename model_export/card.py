"""A model's card: what one should know before relying on it, measured for the manifest and rendered from it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from model_export.judge import SplitLogits, Splits
from service.manifest import Card, LengthQuarter, Lengths, Manifest, Origin, Weakness
from training.data import origins
from training.run import RunInfo, language_models, learned_from
from training.scores import score
from training.shapes import EncoderConfig
from training.tokenizer import Window

README = "README.md"
QUARTERS = 4


def write_card(info: RunInfo, train_lengths: Sequence[int], window: Window, splits: Splits, fp32: SplitLogits) -> Card:
    """The card of a run that reads this window now; `train_lengths` are in tokens, before anything was cut."""
    trained = EncoderConfig(**info.encoder)
    sources = {(name, one): None for dataset in learned_from(info) for name, one in origins(dataset).items()}
    data = [Origin(name=name, hub=one.hub, kind=one.kind, language=one.language) for name, one in sources]
    lengths = Lengths(
        median=int(np.median(train_lengths)),
        percentile_95=int(np.percentile(train_lengths, 95)),
        share_cut=float((np.array(train_lengths) > trained.max_tokens).mean()),
    )
    return Card(
        data=data,
        recipe=dict(info.options),
        lengths=lengths,
        weakest=[_weakest(splits, split, logits_RNC) for split, logits_RNC in fp32.items()],
        by_length=_by_length(splits, fp32),
        limits=_limits(data, language_models(info), splits.labels, window, trained, lengths),
    )


def _weakest(splits: Splits, split: str, logits_RNC: Any) -> Weakness:
    found = score(splits.examples[split].labels, logits_RNC[-1].argmax(-1).tolist(), splits.labels)
    there = {label: one for label, one in found["per_class"].items() if one["texts"]}
    label, one = min(there.items(), key=lambda item: item[1]["recall"])
    return Weakness(split=split, label=label, recall=one["recall"], texts=one["texts"])


def _by_length(splits: Splits, fp32: SplitLogits) -> list[LengthQuarter]:
    lengths_N = np.array([len(ids) for ids in splits.validation_ids])
    right_N = fp32["validation"][-1].argmax(-1) == np.array(splits.examples["validation"].labels)
    return [
        LengthQuarter(
            shortest=int(lengths_N[places].min()),
            longest=int(lengths_N[places].max()),
            texts=len(places),
            accuracy=float(right_N[places].mean()),
        )
        for places in np.array_split(np.argsort(lengths_N, kind="stable"), QUARTERS)
        if len(places)
    ]


def _limits(
    data: Sequence[Origin],
    teachers: Sequence[str],
    labels: Sequence[str],
    window: Window,
    trained: Window,
    lengths: Lengths,
) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for one in data:
        kinds.setdefault(one.language, []).append(one.kind)
    learned = "; ".join(f"{language} ({', '.join(those)})" for language, those in kinds.items()) or "texts of one's own"
    return [
        f"Learned from: {learned}. How good it is on other languages and other sorts of text was not measured.",
        *(
            f"Learned also what the language model {name} makes of words: texts that it has read, those of a test "
            "among them perhaps, are not known here."
            for name in teachers
        ),
        f"Every text is given one of {', '.join(labels)}: there is no answer for what is none of them, or several.",
        f"Of a text longer than {window.max_tokens} tokens only {read_of(window)} count; in training it was "
        f"{read_of(trained)}, and {lengths.share_cut:.1%} of the texts were longer.",
        "The weights kept, the temperatures and the exit threshold were chosen on the validation split: expect a "
        "little less on texts of your own.",
    ]


def read_of(window: Window) -> str:
    """What is read of a longer text, in words."""
    last = f" and the last {window.tail_tokens}" if window.tail_tokens else ""
    return f"the first {window.max_tokens - window.tail_tokens}{last}"


def render(manifest: Manifest) -> str:
    """The card as Markdown, from the manifest alone."""
    card = manifest.card
    weakest = [[one.split, one.label, f"{one.recall:.4f}", str(one.texts)] for one in card.weakest]
    quarters = [[f"{one.shortest} to {one.longest}", str(one.texts), f"{one.accuracy:.4f}"] for one in card.by_length]
    parts = [
        f"# {manifest.name}@{manifest.version}",
        f"Sorts texts of up to {manifest.max_tokens} tokens into {', '.join(manifest.labels)}. "
        f"Architecture {manifest.architecture}, {manifest.parameters:,} parameters, {manifest.iterations} "
        f"iteration{'s' * (manifest.iterations > 1)}; stored as {', '.join(manifest.precisions)}.",
        *(f"Left out: {why}." for why in manifest.left_out.values()),
        "## Limits",
        "\n".join(f"- {limit}" for limit in card.limits),
        "## Quality",
        _quality(manifest),
        "## Weaknesses",
        "Least recall of a label on each split, at the last iteration in FP32:",
        _grid(["split", "label", "recall", "texts"], weakest),
        "Quarters of the validation split by length in tokens:",
        _grid(["tokens", "texts", "accuracy"], quarters),
        "## Training",
        *_training(manifest),
        "Written from manifest.json by the export.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _training(manifest: Manifest) -> list[str]:
    card, training = manifest.card, manifest.training
    texts = ", ".join(f"{count:,} texts for {split}" for split, count in training.texts.items())
    begun = f"; begun from run {training.initialised_from}" if training.initialised_from else ""
    told = {name: ", ".join(value) if isinstance(value, list) else value for name, value in card.recipe.items()}
    recipe = ", ".join(f"{name} {value}" for name, value in told.items() if value not in (None, ""))
    several = card.recipe.get("averaged")
    count = len(several) if isinstance(several, list) else 0
    mean = f" (the mean of the weights of {count} runs; told is what the last of them was)" if count else ""
    return [
        f"Run {training.run_id}{mean}, commit {training.commit}, seed {training.seed}, data set `{training.dataset}`: "
        f"{texts}{begun}. Training texts have {card.lengths.median} tokens in the median, 95 % have at most "
        f"{card.lengths.percentile_95}.",
        "\n".join(f"- {one.name}: {one.kind}, {one.language}; public as {one.hub}" for one in card.data),
        f"Recipe: {recipe}.",
    ]


def _quality(manifest: Manifest) -> str:
    rows = [
        [split, precision, str(iteration), f"{one.accuracy:.4f}", f"{one.macro_f1:.4f}"]
        for split, by_precision in manifest.quality.items()
        for precision, found in by_precision.items()
        for iteration, one in enumerate(found, start=1)
    ]
    return _grid(["split", "precision", "after iteration", "accuracy", "macro F1"], rows)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
