"""The standard Transformer: every layer has its own weights, and the stack runs once."""

from torch import Tensor

from training.architectures.encoder import Encoder


class StandardTransformer(Encoder):
    """The yardstick that the recurrent model is measured against."""

    def iterate(self, h_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        return self.run_layers(h_BLD, mask_BL)
