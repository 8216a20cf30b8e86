"""Decoder-only language models in Flax NNX, their logical axes, and the import of published checkpoints."""
