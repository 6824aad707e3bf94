"""Masked-language-model pretraining: an encoder learns from texts without labels, to be trained further by `train`.

Devlin et al. 2018, arXiv 1810.04805, with packed rows, and with a loss at every iteration of the recurrent model.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import run as runs
from training.architectures.encoder import Encoder
from training.architectures.leaves import RMSNorm
from training.batches import pad
from training.config import PretrainConfig
from training.data import Dataset, draw_share, unlabelled
from training.loop import alone, denormals_as_zero, make_accelerator, run_loop
from training.objectives import Objective
from training.prepare import prepare_run
from training.run import RunInfo
from training.tokenizer import MASK_ID, SPECIAL_TOKENS, encode_whole

MASKED, REPLACED = 0.8, 0.1
"""Of the tokens to be guessed; the rest stay as they are."""


ROWS_AT_ONCE = 64  # while validating


@denormals_as_zero()
def pretrain(config: PretrainConfig) -> Path:
    """Pretrains (or resumes); the run directory it returns is for `train --init-from`."""
    accelerator = make_accelerator(config)
    dataset = draw_share(unlabelled(config.datasets, config.data_dir), config.train_share, config.seed)
    with alone(config, accelerator):
        with accelerator.main_process_first():
            info = prepare_run(config, dataset) if accelerator.is_main_process else runs.read_info(config.output_dir)
        return run_loop(config, accelerator, MaskedLanguage(config, dataset, info))


class MaskedLanguageModel(nn.Module):
    """An encoder with a head that scores every word of the vocabulary; its last matrix is the embedding itself."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        width, vocabulary = encoder.config.width, encoder.config.vocabulary
        self.encoder = encoder
        self.encoder.head.requires_grad_(False)  # nobody asks it, and several processes wait for every gradient
        self.norm = RMSNorm(width)
        self.transform = nn.Linear(width, width)
        self.transformed_norm = RMSNorm(width)
        self.bias_V = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, ids_BL: Tensor, mask_BL: Tensor | None, chosen_BL: Tensor, iterations: int | None) -> Tensor:
        """The logits of every iteration for the N chosen tokens, (R, N, V)."""
        h_BLD = self.encoder.embed(ids_BL)
        logits_NV = []
        for _ in range(iterations or self.encoder.config.iterations):
            h_BLD = self.encoder.iterate(h_BLD, mask_BL)
            logits_NV.append(self._score(h_BLD[chosen_BL]))
        return torch.stack(logits_NV)

    def _score(self, h_ND: Tensor) -> Tensor:
        h_ND = self.transformed_norm(F.silu(self.transform(self.norm(h_ND))))
        return F.linear(h_ND, self.encoder.embedding.weight, self.bias_V)


class MaskedLanguage(Objective[MaskedLanguageModel]):
    """Cross-entropy with the words that were masked."""

    def __init__(self, config: PretrainConfig, dataset: Dataset, info: RunInfo) -> None:
        self.config, self.info = config, info
        tokenizer = runs.read_tokenizer(config.output_dir)
        self.ids, self.held_out = (
            pack(encode_whole(tokenizer, split.texts), config.max_tokens)
            for split in (dataset.train, dataset.validation)
        )

    def build_model(self) -> MaskedLanguageModel:
        return MaskedLanguageModel(self.info.build_model())

    def loss(self, model: nn.Module, batch: Sequence[int], iterations: int | None) -> Tensor:
        logits_RNV, words_N = self._guess(model, [self.ids[index] for index in batch], iterations)
        return F.cross_entropy(logits_RNV.flatten(0, 1), words_N.repeat(len(logits_RNV)))

    @torch.inference_mode()
    def validate(self, model: MaskedLanguageModel) -> list[dict[str, float]]:
        """Loss and share of words guessed, always on the same masks."""
        torch.manual_seed(self.config.seed)
        model.eval()
        losses_RN, right_RN = [], []
        for start in range(0, len(self.held_out), ROWS_AT_ONCE):
            logits_RNV, words_N = self._guess(model, self.held_out[start : start + ROWS_AT_ONCE], None)
            losses_RN.append(torch.stack([F.cross_entropy(one, words_N, reduction="none") for one in logits_RNV]))
            right_RN.append((logits_RNV.argmax(-1) == words_N).float())
        model.train()
        loss_R, accuracy_R = (torch.cat(parts, dim=1).mean(1).tolist() for parts in (losses_RN, right_RN))
        return [{"loss": loss, "accuracy": share} for loss, share in zip(loss_R, accuracy_R, strict=True)]

    def weights(self, model: MaskedLanguageModel) -> Mapping[str, Tensor]:
        """The encoder alone: its classification head has learned nothing, and this one has served."""
        weights = model.encoder.state_dict()
        return {name: tensor for name, tensor in weights.items() if not name.startswith(runs.HEAD)}

    def _guess(self, model: nn.Module, rows: Sequence[Sequence[int]], iterations: int | None) -> tuple[Tensor, Tensor]:
        """Logits (R, N, V) in float32, and the N words that stood there."""
        device = next(model.parameters()).device
        ids_BL, mask_BL = pad(rows)
        masked_BL, chosen_BL = mask_words(ids_BL, self.config.mask_share, self.info.encoder["vocabulary"])
        mask_BL = None if mask_BL is None else mask_BL.to(device)
        logits_RNV = model(masked_BL.to(device), mask_BL, chosen_BL.to(device), iterations).float()
        return logits_RNV, ids_BL[chosen_BL].to(device)


def pack(texts: Iterable[Sequence[int]], length: int) -> list[Sequence[int]]:
    """One text after another, cut into rows of `length`: nothing is left out, and only the last row may be shorter."""
    stream = array("i")  # four bytes a token, where a list takes 36
    for ids in texts:
        stream.extend(ids)
    return [stream[start : start + length] for start in range(0, len(stream), length)]


def mask_words(ids_BL: Tensor, share: float, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The ids as the model sees them, and where it must guess: exactly that share of the words, at least one.

    Special tokens and padding are never chosen.
    """
    lottery_BL = torch.rand(ids_BL.shape).masked_fill(ids_BL < len(SPECIAL_TOKENS), 2.0)
    count = max(1, round(share * int((lottery_BL < 1).sum())))
    chosen_BL = lottery_BL <= lottery_BL.flatten().kthvalue(count).values
    fate_BL = torch.rand(ids_BL.shape)
    other_BL = torch.randint(len(SPECIAL_TOKENS), vocabulary, ids_BL.shape)
    seen_BL = torch.where(chosen_BL & (fate_BL < MASKED), MASK_ID, ids_BL)
    replaced_BL = chosen_BL & (fate_BL >= MASKED) & (fate_BL < MASKED + REPLACED)
    return torch.where(replaced_BL, other_BL, seen_BL), chosen_BL
