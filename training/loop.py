"""The training loop, to be read top to bottom.

Whatever is random (order, dropout, masks) follows from the seed and the step alone, so a resumed run needs no
generator's state to end where an uninterrupted one would have.
"""

import math
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from training import run as runs
from training.batches import epoch_batches
from training.config import RunConfig, TrainConfig
from training.errors import TrainingError
from training.metrics import Log, Meter
from training.objectives import Classification, Objective, StateGuessing
from training.prepare import prepare_dataset, prepare_run
from training.states import read_states
from training.stopping import StopRequest, stop_on_signal
from training.teacher import check_teachers, teach

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


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Has PyTorch take numbers below 1e-38 for zero meanwhile, where the CPU can.

    Where a token attends to nothing but a few others, the rest get such weights, and Intel's CPUs take a hundred times
    as long for each. To be entered before PyTorch's threads are made: they take over what their maker has set.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@denormals_as_zero()
def train(config: TrainConfig) -> Path:
    """Trains (or resumes) until done, patience ends, or a signal asks to stop; returns the run directory."""
    accelerator = make_accelerator(config)
    dataset = prepare_dataset(config)
    check_teachers(config.teacher, dataset.labels, config.output_dir)
    states = read_states(config.states) if config.states else None
    if states and not states.know_any_of(dataset.train.texts):
        raise TrainingError(
            f"--states {config.states} knows none of the {len(dataset.train):,} training texts: give the --dataset, "
            "--train-share and --seed that it was made with"
        )
    with alone(config, accelerator):
        with accelerator.main_process_first():
            info = prepare_run(config, dataset) if accelerator.is_main_process else runs.read_info(config.output_dir)
            taught_NC = teach(config.teacher, dataset.train.texts, config.output_dir, accelerator.device)
        classification = Classification(config, dataset, info, taught_NC)
        return run_loop(config, accelerator, StateGuessing(classification, states) if states else classification)


def make_accelerator(config: RunConfig) -> Accelerator:
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise TrainingError("--mixed-precision fp16 needs CUDA; on a CPU take bf16 or no")
    # Said outright, because without a GPU several processes would otherwise train one model each, in one directory.
    return Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.accelerator.is_available())


def alone(config: RunConfig, accelerator: Accelerator) -> AbstractContextManager[None]:
    """No other training in this run meanwhile; of several processes of one the first sees to it."""
    return runs.hold(config.output_dir) if accelerator.is_main_process else nullcontext()


def run_loop(config: RunConfig, accelerator: Accelerator, objective: Objective[Any]) -> Path:
    loop = Loop(config, accelerator, objective)
    with stop_on_signal() as asked_to_stop, _attention_kernel(accelerator):
        loop.run(asked_to_stop)
    accelerator.end_training()
    return config.output_dir


class Loop:
    """Model, optimiser and progress of one training."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, objective: Objective[Any]) -> None:
        self.config, self.accelerator, self.objective = config, accelerator, objective
        self.run_dir = config.output_dir
        self.steps_per_epoch = len(self._epoch(0))
        self.total_steps = self.steps_per_epoch * config.num_epochs
        self.progress = Progress()
        torch.manual_seed(config.seed)
        model = objective.build_model()
        optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), fused=True)
        if checkpoint := runs.read_checkpoint(self.run_dir):
            self._restore(checkpoint, model, optimizer)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.meter, self.log = Meter(), None
        if accelerator.is_main_process:
            self.log = Log(self.run_dir / runs.METRICS, self.progress.step, self.progress.epoch)

    def run(self, asked_to_stop: StopRequest) -> None:
        """Steps through the epochs; validates within and after each."""
        progress, quiet = self.progress, not self.accelerator.is_main_process
        bar = tqdm(total=self.total_steps, initial=progress.step, unit="step", disable=quiet, smoothing=0.1)
        with bar:
            while not progress.finished:
                for group in self._epoch(progress.epoch)[progress.step_in_epoch :]:
                    self._optimise(group, bar)
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
        model = self.accelerator.unwrap_model(self.model)
        self._check_finite(model)
        if not self.accelerator.is_main_process:
            return
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
            runs.write_weights(self.run_dir, self.objective.weights(model))

    def _restore(self, checkpoint: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
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
        lengths = [len(ids) for ids in self.objective.ids]
        batches = epoch_batches(lengths, self.config.batch_size, self.config.seed, epoch)
        per_step = self.accelerator.num_processes * self.config.gradient_accumulation
        batches = batches[: len(batches) // per_step * per_step] or (batches * per_step)[:per_step]
        return [
            batches[i : i + per_step][self.accelerator.process_index :: self.accelerator.num_processes]
            for i in range(0, len(batches), per_step)
        ]

    def _optimise(self, group: list[list[int]], bar: "tqdm[Any]") -> None:
        progress = self.progress
        rate = learning_rate(progress.step, self.total_steps, self.config)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        torch.manual_seed(hash((self.config.seed, progress.step, self.accelerator.process_index)) % 2**63)
        iterations = sampled_iterations(progress.step, self.config)
        loss = torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(group):
            last = i == len(group) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                batch_loss = self.objective.loss(self.model, batch, iterations) / len(group)
                self.accelerator.backward(batch_loss)
            loss += batch_loss.detach()
            tokens = sum(len(self.objective.ids[index]) for index in batch)
            self.meter.tokens += tokens * self.accelerator.num_processes
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        progress.step_in_epoch += 1
        self._report(loss, rate, bar)

    def _report(self, loss: Tensor, rate: float, bar: "tqdm[Any]") -> None:
        bar.update()
        if self.log and self.progress.step % LOG_STEPS == 0:
            value = loss.item()  # which waits for the device, so that the meter is not read too early
            cost = self.meter.read()
            bar.set_postfix(
                epoch=self.progress.epoch, loss=f"{value:.3f}", tokens_s=f"{cost['tokens_per_second']:,.0f}"
            )
            self.log.write(
                step=self.progress.step, epoch=self.progress.epoch, loss=round(value, 4), learning_rate=rate, **cost
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
        """Measures what the model is not trained on, and keeps the weights if they are the best so far."""
        progress = self.progress
        model = self.accelerator.unwrap_model(self.model)
        self._check_finite(model)
        with self.meter.paused():
            figures = self.objective.validate(model)
        accuracy = figures[-1]["accuracy"]
        better = accuracy > progress.best_accuracy
        if better:
            progress.best_accuracy = accuracy
            progress.best_epoch = math.ceil(progress.step / self.steps_per_epoch)
            if self.accelerator.is_main_process:
                runs.write_weights(self.run_dir, self.objective.weights(model))
        if self.log:
            per_iteration = [{name: round(value, 4) for name, value in one.items()} for one in figures]
            self.log.write(step=progress.step, epoch=progress.epoch, validation=per_iteration)
            verdict = ", the best" if better else ""
            bar.write(f"step {progress.step}: validation accuracy {accuracy:.4f}{verdict}")

    def _check_finite(self, model: nn.Module) -> None:
        """Weights that are no numbers stay so: they may become neither the best ones nor a checkpoint."""
        if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
            raise TrainingError(
                f"at step {self.progress.step} the weights are no numbers any more, so training has ended; in another "
                "--output-dir try a lower --learning-rate, or a longer --warmup-share"
            )

    def _all_stop(self, asked_to_stop: StopRequest) -> bool:
        """All processes stop at the same step, or the others would wait for gradients that never come."""
        if self.accelerator.num_processes == 1:
            return asked_to_stop.asked
        asked = torch.tensor([int(asked_to_stop.asked)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum").item())


def learning_rate(step: int, total: int, config: RunConfig) -> float:
    """Linear warm-up to the peak, then half a cosine down to zero."""
    warmup = max(1, round(total * config.warmup_share))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def sampled_iterations(step: int, config: RunConfig) -> int | None:
    """How often the layers run in this step, in all processes alike; None: as often as configured."""
    if config.sample_iterations is None:
        return None
    return random.Random(f"{config.seed}/{step}").randint(1, config.sample_iterations)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay acts on matrices only; norms and biases are left alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _attention_kernel(accelerator: Accelerator) -> Any:
    """On a CPU, PyTorch's flash attention in bf16 takes a fifth of a short batch's time in its backward pass alone."""
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
