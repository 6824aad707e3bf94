"""A bundle in, answers over HTTP out."""

import os

# ONNX Runtime's Linux wheels report usage to their maker unless told not to, and read this when first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
