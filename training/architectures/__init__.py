"""The architectures by name.

To add one: subclass `Encoder`, name it here and in `training.config`'s `architecture`, its shape in `training.shapes`.
"""

from collections.abc import Mapping

from training.architectures.baseline import StandardTransformer
from training.architectures.encoder import Encoder
from training.architectures.recurrent import RecurrentTransformer

ARCHITECTURES: Mapping[str, type[Encoder]] = {"recurrent": RecurrentTransformer, "baseline": StandardTransformer}
