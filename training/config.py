"""The options of a training: what `train`, `pretrain`, `linear` and `states` take, and a run keeps in `config.json`."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from training.errors import TrainingError
from training.shapes import SHAPES, EncoderConfig, Pooling, check_max_tokens, check_tail_tokens

SMALLEST_VOCABULARY = 260
"""Every byte and the four special tokens."""
SEEDS = 2**32
"""What scikit-learn takes; PyTorch would take more."""


def check_seed(seed: int) -> None:
    if not 0 <= seed < SEEDS:
        raise TrainingError(f"--seed is {seed}; a whole number from 0 to {SEEDS - 1} is needed")


def check_share(train_share: float) -> None:
    if not 0 < train_share <= 1:
        raise TrainingError(f"--train-share {train_share}: a share above 0 and up to 1 is needed")


@dataclass(frozen=True)
class RunConfig:
    """What both kinds of training take: where, which network, and how it learns."""

    data_dir: Path | None = None
    """Read NAME/{train,validation,test}.{jsonl,csv,tsv,parquet} (text also .gz) here instead of from the hub."""
    train_share: float = 1.0
    """Train on this share of the training texts, drawn by the seed."""
    output_dir: Path = Path("runs/default")
    """The run directory. A run that stands there unfinished is resumed when the options are the same."""

    architecture: Literal["recurrent", "baseline"] = "recurrent"
    recurrent_depth: int = 2
    """Iterations of the recurrent model's shared layers; the baseline always takes one."""
    sample_iterations: int | None = None
    """Each training step draws from 1 to this many iterations; validation takes --recurrent-depth all the same."""
    layers: int | None = None
    """Layers, hidden width, heads, feed-forward width: the architecture's own unless given."""
    width: int | None = None
    heads: int | None = None
    feed_forward: int | None = None
    pooling: Pooling = "mean"
    """What the head reads: the mean of all tokens, or the first one alone, as in BERT."""
    max_tokens: int = 256
    """Longer texts are cut, in training and in serving; pretraining goes on with the rest in another row."""
    tokenizer: Literal["wordpiece", "bpe"] = "wordpiece"
    vocabulary: int = 4096

    batch_size: int = 32
    """Texts per process in one forward pass."""
    gradient_accumulation: int = 1
    """Batches per optimiser step."""
    learning_rate: float = 5e-4
    """The peak; linear warm-up to it, cosine decay to zero."""
    warmup_share: float = 0.06
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    num_epochs: int = 10
    early_stopping_patience: int = 3
    """Epochs without a better validation accuracy before training stops."""
    dropout: float = 0.1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """fp16 needs CUDA."""
    seed: int = 13
    validations_per_epoch: int = 1
    """How often the validation split is measured, and the best weights kept; patience counts epochs all the same."""
    checkpoint_steps: int = 500
    """Optimiser steps between two checkpoints."""

    counts: ClassVar[tuple[str, ...]] = (
        "recurrent_depth", "sample_iterations", "layers", "width", "heads", "feed_forward", "max_tokens", "vocabulary",
        "batch_size", "gradient_accumulation", "num_epochs", "early_stopping_patience", "validations_per_epoch",
        "checkpoint_steps",
    )  # fmt: skip
    shares: ClassVar[tuple[str, ...]] = ("warmup_share", "dropout")
    amounts: ClassVar[tuple[str, ...]] = ("learning_rate", "clip_norm")

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in self.counts:
            if (value := getattr(self, name)) is not None and value < 1:
                raise TrainingError(f"--{name.replace('_', '-')} is {value}; at least 1 is needed")
        for name in self.shares:
            if not 0 <= (value := getattr(self, name)) < 1:
                raise TrainingError(f"--{name.replace('_', '-')} is {value}; a share from 0 to below 1 is needed")
        for name in self.amounts:
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise TrainingError(f"--{name.replace('_', '-')} is {value}; a number above 0 is needed")
        if not 0 <= self.weight_decay < math.inf:
            raise TrainingError(f"--weight-decay is {self.weight_decay}; 0 or a number above is needed")
        check_share(self.train_share)
        check_max_tokens(self.max_tokens)
        if self.vocabulary < SMALLEST_VOCABULARY:
            raise TrainingError(f"--vocabulary is {self.vocabulary}; at least {SMALLEST_VOCABULARY} are needed")
        if self.sample_iterations and self.architecture != "recurrent":
            raise TrainingError(f"--sample-iterations is for a recurrent model only, not {self.architecture}")

    def encoder(self, classes: int, vocabulary: int) -> EncoderConfig:
        """The network's shape: the architecture's own, with what the options override."""
        shape = dict(SHAPES[self.architecture])
        if self.architecture == "recurrent":
            shape["iterations"] = self.recurrent_depth
        given = {name: getattr(self, name) for name in ("layers", "width", "heads", "feed_forward")}
        shape |= {name: value for name, value in given.items() if value is not None}
        return EncoderConfig(
            **shape,
            classes=classes,
            vocabulary=vocabulary,
            max_tokens=self.max_tokens,
            dropout=self.dropout,
            pooling=self.pooling,
        )


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Trains one model on one data set and writes a run directory."""

    dataset: str = "sst2"
    """sst2, imdb, yelp_polarity, amazon_polarity, ag_news, 20newsgroups, sentiment (a mix), sentences or passages (of
    that mix), domain, excerpts (of domain's reviews, and these), or a folder of --data-dir."""
    init_from: Path | None = None
    """Start from the weights of this run, with its tokenizer; the shape must be the same. The head is new where that
    run was pretrained, or decided between other labels."""
    teacher: tuple[Path, ...] = ()
    """Learn also from what these runs say of each training text; they may have any shape, and their mean counts."""
    temperature: float = 2.0
    """Softens the probabilities of teacher and student for their comparison."""
    teacher_weight: float = 0.5
    """The teacher's share of the loss; the labels have the rest."""
    states: Path | None = None
    """Learn also to guess what a language model made of each word: a directory that `states` has written. A review's
    are those of its passages."""
    states_weight: float = 16.0
    """What such a guess counts in the loss, where labels and teachers count one."""
    tail_tokens: int = 0
    """Of a text with more than --max-tokens, how many of those that are read are its last ones; the others are its
    first."""
    token_dropout: float = 0.1
    """Share of tokens replaced by [MASK] in training."""
    label_smoothing: float = 0.0

    shares: ClassVar[tuple[str, ...]] = (*RunConfig.shares, "token_dropout", "label_smoothing")
    amounts: ClassVar[tuple[str, ...]] = (*RunConfig.amounts, "temperature", "states_weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.teacher_weight <= 1:
            raise TrainingError(f"--teacher-weight is {self.teacher_weight}; a share from 0 to 1 is needed")
        check_tail_tokens(self.tail_tokens, self.max_tokens)

    def encoder(self, classes: int, vocabulary: int) -> EncoderConfig:
        return replace(super().encoder(classes, vocabulary), tail_tokens=self.tail_tokens)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Has a model guess masked words of training texts, without their labels; `train --init-from` goes on from it."""

    datasets: tuple[str, ...] = ("imdb", "yelp_polarity", "amazon_polarity", "sst2")
    """Only their training texts are read."""
    mask_share: float = 0.2
    """Share of the tokens to be guessed: of these 80 % are masked, 10 % replaced by others, 10 % left."""
    max_tokens: int = 128
    """Tokens in a row. Rows are full: texts follow one another, and long ones go on in the next."""
    batch_size: int = 64
    """Rows per process in one forward pass."""
    learning_rate: float = 1e-3
    num_epochs: int = 3
    dropout: float = 0.0

    shares: ClassVar[tuple[str, ...]] = (*RunConfig.shares, "mask_share")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.datasets:
            raise TrainingError("--datasets names none; at least one is needed")


@dataclass(frozen=True)
class LinearConfig:
    """Fits a logistic regression on words and pairs of words: the floor for a network, and a cheap teacher for one."""

    dataset: str = "sst2"
    """As of `train`."""
    data_dir: Path | None = None
    """Read NAME/{train,validation,test}.{jsonl,csv,tsv,parquet} (text also .gz) here instead of from the hub."""
    output_dir: Path = Path("runs/linear")
    """The run directory."""
    seed: int = 13

    def __post_init__(self) -> None:
        check_seed(self.seed)


@dataclass(frozen=True)
class StatesConfig:
    """Keeps what a language model makes of each word of a data set's training texts, for `train --states`.

    Started several times with the same options, the processes share the work, and go on where others were stopped.
    """

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """A causal language model built like Llama: a hub id, a folder that transformers reads, or a .gguf file."""
    layer: int = 15
    """Whose states are kept; those above it are not run."""
    columns: int = 128
    """How many principal components of each state are kept."""
    max_tokens: int = 128
    """The language model's tokens that are read of a text."""
    dataset: str = "passages"
    """As of `train`."""
    data_dir: Path | None = None
    """Read NAME/{train,validation,test}.{jsonl,csv,tsv,parquet} (text also .gz) here instead of from the hub."""
    train_share: float = 1.0
    """Ask about this share of the training texts, drawn by the seed."""
    output_dir: Path = Path("runs/states")
    seed: int = 13

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("layer", "columns", "max_tokens"):
            if (value := getattr(self, name)) < 1:
                raise TrainingError(f"--{name.replace('_', '-')} is {value}; at least 1 is needed")
        check_share(self.train_share)
