"""The recurrent Transformer: a few layers, run several times over on the same weights."""

from torch import Tensor

from training.architectures.encoder import Encoder

CARRY = 0.5
"""How much of the state before an iteration is added to what its layers return: h <- Layers(h) + CARRY * h."""


class RecurrentTransformer(Encoder):
    """Each iteration's answer is usable by itself, so the number of iterations is the caller's choice."""

    def iterate(self, h_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        return self.run_layers(h_BLD, mask_BL) + CARRY * h_BLD
