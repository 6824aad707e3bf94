"""The training loop, to be read top to bottom.

Whatever is random (order, dropout) follows from the seed and the step alone, so a resumed run needs no generator's
state to end where an uninterrupted one would have.
"""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from training import run as runs
from training.architectures.encoder import Encoder
from training.batches import epoch_batches, pad
from training.config import TrainConfig
from training.data import Dataset
from training.errors import TrainingError
from training.evaluate import predict
from training.prepare import prepare_dataset, prepare_run
from training.run import RunInfo
from training.scores import score
from training.tokenizer import CLASSIFY_ID, MASK_ID, PAD_ID, encode

LOG_STEPS = 50


@dataclass
class Progress:
    """Where a training stands; with the seed it decides everything that follows."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    finished: bool = False


def train(config: TrainConfig) -> Path:
    """Trains (or resumes) until done, patience ends, or a signal asks to stop; returns the run directory."""
    accelerator = _accelerator(config)
    dataset = prepare_dataset(config)
    with accelerator.main_process_first():
        info = prepare_run(config, dataset) if accelerator.is_main_process else runs.read_info(config.output_dir)
    loop = Loop(config, accelerator, dataset, info)
    with _stop_on_signal() as asked_to_stop, _attention_kernel(accelerator):
        loop.run(asked_to_stop)
    accelerator.end_training()
    return config.output_dir


class Loop:
    """Model, optimiser and progress of one training."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, dataset: Dataset, info: RunInfo) -> None:
        self.config, self.accelerator, self.dataset, self.info = config, accelerator, dataset, info
        self.run_dir = config.output_dir
        self.tokenizer = runs.read_tokenizer(self.run_dir)
        self.train_ids = encode(self.tokenizer, dataset.train.texts, config.max_tokens)
        self.steps_per_epoch = len(self._epoch(0))
        self.progress = Progress()
        torch.manual_seed(config.seed)
        model = info.build_model()
        if config.init_from:
            runs.read_weights(config.init_from, model)
        optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), fused=True)
        if checkpoint := runs.read_checkpoint(self.run_dir):
            self._restore(checkpoint, model, optimizer)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.log = Log(self.run_dir / runs.METRICS, self.progress) if accelerator.is_main_process else None

    def run(self, asked_to_stop: "StopRequest") -> None:
        """Steps through the epochs; validates within and after each."""
        progress, total = self.progress, self.steps_per_epoch * self.config.num_epochs
        bar = tqdm(
            total=total, initial=progress.step, unit="step", disable=not self.accelerator.is_main_process, smoothing=0.1
        )
        with bar:
            while not progress.finished:
                for group in self._epoch(progress.epoch)[progress.step_in_epoch :]:
                    self._optimise(group, total, bar)
                    if self._validation_is_due():
                        self._validate(bar)
                    if self._all_stop(asked_to_stop):
                        self.save()
                        raise KeyboardInterrupt
                    if progress.step % self.config.checkpoint_steps == 0:
                        self.save()
                self._end_epoch(bar)
                self.save()

    def save(self) -> None:
        """Writes the latest checkpoint; before the first validation its weights are also the best there are."""
        if not self.accelerator.is_main_process:
            return
        model = self.accelerator.unwrap_model(self.model)
        scaler = self.accelerator.scaler
        runs.write_checkpoint(
            self.run_dir,
            {
                "model": model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else {},
                "progress": asdict(self.progress),
                "processes": self.accelerator.num_processes,
            },
        )
        if self.progress.best_accuracy < 0:
            runs.write_weights(self.run_dir, model)

    def _restore(self, checkpoint: dict[str, Any], model: Encoder, optimizer: torch.optim.Optimizer) -> None:
        processes, before = self.accelerator.num_processes, checkpoint["processes"]
        if processes != before:
            raise TrainingError(
                f"{self.run_dir} was begun with {before} processes, and {processes} would take other steps: "
                f"resume with {before}, or choose another --output-dir"
            )
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if self.accelerator.scaler and checkpoint["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])
        self.progress = Progress(**checkpoint["progress"])

    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        """This process's share of an epoch: per optimiser step, the batches whose gradients it adds up."""
        lengths = [len(ids) for ids in self.train_ids]
        batches = epoch_batches(lengths, self.config.batch_size, self.config.seed, epoch)
        per_step = self.accelerator.num_processes * self.config.gradient_accumulation
        batches = batches[: len(batches) // per_step * per_step] or batches * per_step
        return [
            batches[i : i + per_step][self.accelerator.process_index :: self.accelerator.num_processes]
            for i in range(0, len(batches), per_step)
        ]

    def _optimise(self, group: list[list[int]], total: int, bar: "tqdm[Any]") -> None:
        started, progress = time.perf_counter(), self.progress
        rate = learning_rate(progress.step, total, self.config)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        torch.manual_seed(hash((self.config.seed, progress.step, self.accelerator.process_index)) % 2**63)
        loss, tokens = torch.zeros((), device=self.accelerator.device), 0
        for i, batch in enumerate(group):
            last = i == len(group) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                batch_loss = self._loss(batch) / len(group)
                self.accelerator.backward(batch_loss)
            loss += batch_loss.detach()
            tokens += sum(len(self.train_ids[index]) for index in batch)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        progress.step_in_epoch += 1
        self._report(loss, tokens * self.accelerator.num_processes / (time.perf_counter() - started), rate, bar)

    def _loss(self, batch: list[int]) -> Tensor:
        """The mean of the cross-entropies of all iterations: each must answer by itself."""
        ids_BL, mask_BL = pad([self.train_ids[index] for index in batch])
        ids_BL = drop_tokens(ids_BL, self.config.token_dropout).to(self.accelerator.device)
        labels_B = torch.tensor([self.dataset.train.labels[index] for index in batch], device=self.accelerator.device)
        logits_RBC = self.model(ids_BL, None if mask_BL is None else mask_BL.to(self.accelerator.device))
        return F.cross_entropy(
            logits_RBC.flatten(0, 1).float(),
            labels_B.repeat(len(logits_RBC)),
            label_smoothing=self.config.label_smoothing,
        )

    def _report(self, loss: Tensor, tokens_per_second: float, rate: float, bar: "tqdm[Any]") -> None:
        bar.update()
        if self.log and self.progress.step % LOG_STEPS == 0:
            value = loss.item()
            bar.set_postfix(epoch=self.progress.epoch, loss=f"{value:.3f}", tokens_s=f"{tokens_per_second:,.0f}")
            self.log.write(
                step=self.progress.step,
                epoch=self.progress.epoch,
                loss=round(value, 4),
                learning_rate=rate,
                tokens_per_second=round(tokens_per_second),
            )

    def _validation_is_due(self) -> bool:
        """Whether one falls due within the epoch; the one at its end comes anyway."""
        between = math.ceil(self.steps_per_epoch / self.config.validations_per_epoch)
        step = self.progress.step_in_epoch
        return step % between == 0 and step < self.steps_per_epoch

    def _end_epoch(self, bar: "tqdm[Any]") -> None:
        """Validates, and decides whether to go on."""
        progress = self.progress
        progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
        self._validate(bar)
        patience_ended = progress.epoch - progress.best_epoch >= self.config.early_stopping_patience
        progress.finished = patience_ended or progress.epoch == self.config.num_epochs

    def _validate(self, bar: "tqdm[Any]") -> None:
        """Measures the validation split, and keeps the weights if they are the best so far."""
        progress, validation = self.progress, self.dataset.validation
        model = self.accelerator.unwrap_model(self.model)
        logits_RNC = predict(model, self.tokenizer, validation.texts, self.config.max_tokens)
        figures = [score(validation.labels, n, self.dataset.labels) for n in logits_RNC.argmax(-1).tolist()]
        accuracy = figures[-1]["accuracy"]
        better = accuracy > progress.best_accuracy
        if better:
            progress.best_accuracy = accuracy
            progress.best_epoch = math.ceil(progress.step / self.steps_per_epoch)
            if self.accelerator.is_main_process:
                runs.write_weights(self.run_dir, model)
        if self.log:
            per_iteration = [{name: round(f[name], 4) for name in ("accuracy", "macro_f1")} for f in figures]
            self.log.write(step=progress.step, epoch=progress.epoch, validation=per_iteration)
            verdict = ", the best" if better else ""
            bar.write(f"step {progress.step}: validation accuracy {accuracy:.4f}{verdict}")

    def _all_stop(self, asked_to_stop: "StopRequest") -> bool:
        """All processes stop at the same step, or the others would wait for gradients that never come."""
        if self.accelerator.num_processes == 1:
            return asked_to_stop.asked
        asked = torch.tensor([int(asked_to_stop.asked)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum").item())


class Log:
    """`metrics.jsonl`; a resumed run drops the lines of steps, and of validations, that it takes again."""

    def __init__(self, path: Path, progress: Progress) -> None:
        lines = [(json.loads(line), line) for line in path.read_text().splitlines()] if path.exists() else []
        kept = [line for at, line in lines if at["step"] <= progress.step and at["epoch"] <= progress.epoch]
        path.write_text("".join(f"{line}\n" for line in kept))
        self.path = path

    def write(self, **figures: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(figures) + "\n")


class StopRequest:
    """Set by the first SIGINT or SIGTERM; the loop ends at the next step. A later one ends at once.

    Within a second it is taken for the same: launchers pass on what the terminal has sent to every process already.
    """

    asked_at: float | None = None

    @property
    def asked(self) -> bool:
        return self.asked_at is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
        elif now - self.asked_at > 1:
            raise KeyboardInterrupt


@contextmanager
def _stop_on_signal() -> Iterator[StopRequest]:
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _attention_kernel(accelerator: Accelerator) -> Any:
    """On a CPU, PyTorch's flash attention in bf16 takes a fifth of a short batch's time in its backward pass alone."""
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then half a cosine down to zero."""
    warmup = max(1, round(total * config.warmup_share))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def drop_tokens(ids_BL: Tensor, share: float) -> Tensor:
    """Replaces a share of the tokens by [MASK]: no word may be relied on alone. Padding and [CLS] stay."""
    if share == 0:
        return ids_BL
    dropped_BL = (torch.rand(ids_BL.shape) < share) & (ids_BL != PAD_ID) & (ids_BL != CLASSIFY_ID)
    return ids_BL.masked_fill(dropped_BL, MASK_ID)


def _parameter_groups(model: Encoder, weight_decay: float) -> list[dict[str, Any]]:
    """Decay acts on matrices only; norms and biases are left alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _accelerator(config: TrainConfig) -> Accelerator:
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise TrainingError("--mixed-precision fp16 needs CUDA; on a CPU take bf16 or no")
    # Said outright, because without a GPU several processes would otherwise train one model each, in one directory.
    return Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.accelerator.is_available())
