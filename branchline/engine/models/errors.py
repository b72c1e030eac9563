"""The error that model code raises, apart from `protocol` so that naming it does not import torch."""


class ModelError(ValueError):
    """A model or draft head that can't be served; the message says why (missing weights, wrong sizes, …)."""
