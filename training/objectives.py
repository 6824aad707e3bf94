"""What a training is for: the loop asks an objective for the loss of some texts, and how good the model is by now."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import run as runs
from training.architectures.encoder import Encoder
from training.batches import pad
from training.config import TrainConfig
from training.data import Dataset
from training.evaluate import predict
from training.run import RunInfo
from training.scores import score
from training.tokenizer import CLASSIFY_ID, MASK_ID, PAD_ID, encode

Model = TypeVar("Model", bound=nn.Module)


class Objective(ABC, Generic[Model]):
    """`ids` are the training texts; a batch is places among them."""

    ids: Sequence[Sequence[int]]

    @abstractmethod
    def build_model(self) -> Model:
        """A model before its first step, of random weights or those it shall start from."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Sequence[int], iterations: int | None) -> Tensor:
        """The mean over all iterations, as many as configured unless given: each must answer by itself.

        `model` is what `build_model` made, perhaps wrapped for several processes.
        """

    @abstractmethod
    def validate(self, model: Model) -> list[dict[str, float]]:
        """The figures of each iteration on texts that it is not trained on; the last one's accuracy decides."""

    @abstractmethod
    def weights(self, model: Model) -> Mapping[str, Tensor]:
        """What the run keeps of the model."""


class Classification(Objective[Encoder]):
    """Cross-entropy with the labels, and with what teachers say of each text where there are some."""

    def __init__(self, config: TrainConfig, dataset: Dataset, info: RunInfo, taught_NC: Tensor | None) -> None:
        self.config, self.dataset, self.info, self.taught_NC = config, dataset, info, taught_NC
        self.tokenizer = runs.read_tokenizer(config.output_dir)
        self.ids = encode(self.tokenizer, dataset.train.texts, config.max_tokens)

    def build_model(self) -> Encoder:
        model = self.info.build_model()
        if self.config.init_from:
            runs.initialise(model, self.info.labels, self.config.init_from)
        return model

    def loss(self, model: nn.Module, batch: Sequence[int], iterations: int | None) -> Tensor:
        device = next(model.parameters()).device
        ids_BL, mask_BL = pad([self.ids[index] for index in batch])
        ids_BL = drop_tokens(ids_BL, self.config.token_dropout).to(device)
        labels_B = torch.tensor([self.dataset.train.labels[index] for index in batch], device=device)
        logits_RBC = model(ids_BL, None if mask_BL is None else mask_BL.to(device), iterations).float()
        loss = F.cross_entropy(
            logits_RBC.flatten(0, 1), labels_B.repeat(len(logits_RBC)), label_smoothing=self.config.label_smoothing
        )
        if self.taught_NC is None:
            return loss
        taught = distillation_loss(logits_RBC, self.taught_NC[list(batch)].to(device), self.config.temperature)
        return (1 - self.config.teacher_weight) * loss + self.config.teacher_weight * taught

    def validate(self, model: Encoder) -> list[dict[str, float]]:
        validation = self.dataset.validation
        logits_RNC = predict(model, self.tokenizer, validation.texts, self.config.max_tokens)
        figures = [score(validation.labels, n, self.dataset.labels) for n in logits_RNC.argmax(-1).tolist()]
        return [{name: one[name] for name in ("accuracy", "macro_f1")} for one in figures]

    def weights(self, model: Encoder) -> Mapping[str, Tensor]:
        return model.state_dict()


def drop_tokens(ids_BL: Tensor, share: float) -> Tensor:
    """Replaces a share of the tokens by [MASK]: no word may be relied on alone. Padding and [CLS] stay."""
    if share == 0:
        return ids_BL
    dropped_BL = (torch.rand(ids_BL.shape) < share) & (ids_BL != PAD_ID) & (ids_BL != CLASSIFY_ID)
    return ids_BL.masked_fill(dropped_BL, MASK_ID)


def distillation_loss(logits_RBC: Tensor, taught_BC: Tensor, temperature: float) -> Tensor:
    """How far each iteration's softened probabilities are from the teacher's: T^2 * KL(teacher || student), their mean.

    T^2 keeps the gradient's size whatever the temperature. Hinton, Vinyals and Dean 2015, arXiv 1503.02531.
    """
    student_RBC = F.log_softmax(logits_RBC / temperature, dim=-1)
    teacher_RBC = F.log_softmax(taught_BC / temperature, dim=-1).expand_as(student_RBC)
    divergence_RBC = F.kl_div(student_RBC, teacher_RBC, log_target=True, reduction="none")
    return divergence_RBC.sum(-1).mean() * temperature**2
