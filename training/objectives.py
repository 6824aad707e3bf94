"""What a training is for: the loop asks an objective for the loss of some texts, and how good the model is by now."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import run as runs
from training.architectures.encoder import Encoder
from training.architectures.leaves import RMSNorm
from training.batches import pad, round_up
from training.config import TrainConfig
from training.data import Dataset
from training.evaluate import predict
from training.run import RunInfo
from training.scores import score
from training.states import States, last_tokens
from training.tokenizer import CLASSIFY_ID, MASK_ID, PAD_ID, cut, encode, encode_offsets

FARTHEST = 6.0
"""In standard deviations: what a state may be away from the mean and still be meant as it is."""

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
        self.ids = encode(self.tokenizer, dataset.train.texts, config)

    def build_model(self) -> Encoder:
        model = self.info.build_model()
        if self.config.init_from:
            runs.initialise(model, self.info.labels, self.config.init_from)
        return model

    def loss(self, model: nn.Module, batch: Sequence[int], iterations: int | None) -> Tensor:
        ids_BL, mask_BL = self.inputs(batch, next(model.parameters()).device)
        return self.loss_of(model(ids_BL, mask_BL, iterations), batch)

    def inputs(self, batch: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Ids, some of them masked, and the mask of tokens."""
        ids = [self.ids[index] for index in batch]
        ids_BL, mask_BL = pad(ids, round_up(max(map(len, ids)), self.config.max_tokens))
        ids_BL = drop_tokens(ids_BL, self.config.token_dropout).to(device)
        return ids_BL, None if mask_BL is None else mask_BL.to(device)

    def loss_of(self, logits_RBC: Tensor, batch: Sequence[int]) -> Tensor:
        """What every iteration's answers to these texts cost."""
        logits_RBC = logits_RBC.float()
        labels_B = torch.tensor([self.dataset.train.labels[index] for index in batch], device=logits_RBC.device)
        loss = F.cross_entropy(
            logits_RBC.flatten(0, 1), labels_B.repeat(len(logits_RBC)), label_smoothing=self.config.label_smoothing
        )
        if self.taught_NC is None:
            return loss
        taught_BC = self.taught_NC[list(batch)].to(logits_RBC.device)
        taught = distillation_loss(logits_RBC, taught_BC, self.config.temperature)
        return (1 - self.config.teacher_weight) * loss + self.config.teacher_weight * taught

    def validate(self, model: Encoder) -> list[dict[str, float]]:
        validation = self.dataset.validation
        logits_RNC = predict(model, self.tokenizer, validation.texts)
        figures = [score(validation.labels, n, self.dataset.labels) for n in logits_RNC.argmax(-1).tolist()]
        return [{name: one[name] for name in ("accuracy", "macro_f1")} for one in figures]

    def weights(self, model: Encoder) -> Mapping[str, Tensor]:
        return model.state_dict()


class StateGuesser(nn.Module):
    """An encoder that also guesses, from its hidden state of a word's last token, a language model's of that word."""

    def __init__(self, encoder: Encoder, columns: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = RMSNorm(encoder.config.width)
        self.guess = nn.Linear(encoder.config.width, columns)

    def forward(
        self, ids_BL: Tensor, mask_BL: Tensor | None, words_W: tuple[Tensor, Tensor], iterations: int | None
    ) -> tuple[Tensor, Tensor]:
        """Every iteration's logits (R, B, C), and its guesses (R, W, columns) for the words of rows and places."""
        h_BLD = self.encoder.embed(ids_BL)
        logits_BC, guesses_WC = [], []
        for _ in range(iterations or self.encoder.config.iterations):
            h_BLD, step_logits_BC = self.encoder.step(h_BLD, mask_BL)
            logits_BC.append(step_logits_BC)
            guesses_WC.append(self.guess(self.norm(h_BLD[words_W])))
        return torch.stack(logits_BC), torch.stack(guesses_WC)


class StateGuessing(Objective[StateGuesser]):
    """Classification, and for each word that a language model was asked about, how far the guess of its state is."""

    def __init__(self, classification: Classification, states: States) -> None:
        self.classification, self.states, self.ids = classification, states, classification.ids
        config, texts = classification.config, classification.dataset.train.texts
        # Of each text its words and their last tokens; arrays, as millions of words in dictionaries take gigabytes.
        self.ends = [
            np.array([*last_tokens(text, cut(offsets, config)).items()], np.int32).reshape(-1, 2)
            for text, offsets in zip(texts, encode_offsets(classification.tokenizer, texts), strict=True)
        ]

    def build_model(self) -> StateGuesser:
        return StateGuesser(self.classification.build_model(), self.states.columns)

    def loss(self, model: nn.Module, batch: Sequence[int], iterations: int | None) -> Tensor:
        device = next(model.parameters()).device
        ids_BL, mask_BL = self.classification.inputs(batch, device)
        rows_W, places_W, states_WC = (part.to(device) for part in self._words(batch))
        logits_RBC, guesses_RWC = model(ids_BL, mask_BL, (rows_W, places_W), iterations)
        # Half a square near the state and a line farther off: a few words are many deviations from the mean.
        distance = F.smooth_l1_loss(guesses_RWC.float(), states_WC.expand_as(guesses_RWC), reduction="none")
        guessing = self.classification.config.states_weight * distance.sum() / max(1, distance.numel())
        return self.classification.loss_of(logits_RBC, batch) + guessing

    def _words(self, batch: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Row and place of the last token of every known word whose end is read, (W,) twice, and its states (W, C)."""
        none = torch.zeros(0, dtype=torch.long)
        rows, places, states = [none], [none], [torch.zeros(0, self.states.columns)]
        for row, index in enumerate(batch):
            states_WC = self.states.of(self.classification.dataset.train.texts[index])
            if states_WC is None:
                continue
            words_W, places_W = torch.from_numpy(self.ends[index]).long().unbind(1)
            known_W = ~states_WC[words_W, 0].isnan()
            places.append(places_W[known_W])
            rows.append(torch.full_like(places[-1], row))
            states.append(states_WC[words_W[known_W]].float().clamp(-FARTHEST, FARTHEST))
        return torch.cat(rows), torch.cat(places), torch.cat(states)

    def validate(self, model: StateGuesser) -> list[dict[str, float]]:
        return self.classification.validate(model.encoder)

    def weights(self, model: StateGuesser) -> Mapping[str, Tensor]:
        """The encoder alone, as of any training."""
        return model.encoder.state_dict()


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
