"""What the two architectures have in common: embed, run the layers, answer. Each adds its own `iterate`."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from training.architectures.leaves import Head, Layer, rope_tables
from training.shapes import EncoderConfig


class Encoder(nn.Module, ABC):
    """ids -> `embed` -> hidden; (hidden, mask) -> `step` -> (hidden, logits), once per iteration.

    `iterate` is a step that does not answer.

    A mask is True where there is a token; None means that every position is one.
    """

    cos_MJ: Tensor
    sin_MJ: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            Layer(config.width, config.heads, config.feed_forward, config.dropout) for _ in range(config.layers)
        )
        self.head = Head(config.width, config.classes, config.dropout, config.pooling)
        cos_MJ, sin_MJ = rope_tables(config.max_tokens, config.width // config.heads)
        self.register_buffer("cos_MJ", cos_MJ, persistent=False)
        self.register_buffer("sin_MJ", sin_MJ, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: normal(0, 0.02), what writes into the residual stream divided by sqrt(its number of additions)."""
        additions = 2 * self.config.layers * self.config.iterations
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                writes_residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(additions) if writes_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def embed(self, ids_BL: Tensor) -> Tensor:
        h_BLD: Tensor = self.embedding_dropout(self.embedding(ids_BL))
        return h_BLD

    def run_layers(self, h_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        batch, length = h_BLD.shape[:2]
        # The query axis is spelt out because ONNX Runtime's attention does not broadcast it.
        mask_B1LL = None if mask_BL is None else mask_BL[:, None, None, :].expand(-1, 1, length, -1)
        cos_BLJ, sin_BLJ = (table_MJ[:length].expand(batch, -1, -1) for table_MJ in (self.cos_MJ, self.sin_MJ))
        for layer in self.layers:
            h_BLD = layer(h_BLD, mask_B1LL, cos_BLJ, sin_BLJ)
        return h_BLD

    @abstractmethod
    def iterate(self, h_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        """One iteration: the next hidden state."""

    def step(self, h_BLD: Tensor, mask_BL: Tensor | None) -> tuple[Tensor, Tensor]:
        """One iteration: the next hidden state and its logits (B, C)."""
        h_BLD = self.iterate(h_BLD, mask_BL)
        return h_BLD, self.head(h_BLD, mask_BL)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor | None = None, iterations: int | None = None) -> Tensor:
        """The logits of every iteration, (R, B, C); R is the configuration's unless given."""
        h_BLD = self.embed(ids_BL)
        logits_BC = []
        for _ in range(self.config.iterations if iterations is None else iterations):
            h_BLD, step_logits_BC = self.step(h_BLD, mask_BL)
            logits_BC.append(step_logits_BC)
        return torch.stack(logits_BC)
