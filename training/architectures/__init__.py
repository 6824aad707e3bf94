"""The architectures by name. To add one: subclass `Encoder`, name it here, its shape in `training.shapes`, and `--architecture` in `training.config`."""

from collections.abc import Mapping

from training.architectures.baseline import StandardTransformer
from training.architectures.encoder import Encoder
from training.architectures.recurrent import RecurrentTransformer

ARCHITECTURES: Mapping[str, type[Encoder]] = {"recurrent": RecurrentTransformer, "baseline": StandardTransformer}
