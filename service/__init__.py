"""The service: a bundle in, answers over HTTP out; never imports torch."""

__version__ = "0.1.0"
