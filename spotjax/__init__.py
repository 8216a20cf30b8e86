"""Serves language models on machines that can be taken away."""

__version__ = "0.1.0"
