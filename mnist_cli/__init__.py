"""A config-driven command line for small, honest PyTorch baselines."""

__version__ = "0.1.0"
