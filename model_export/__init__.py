"""A run in, a proved bundle out."""

import service  # noqa: F401  # first of all: it keeps ONNX Runtime from reporting usage
