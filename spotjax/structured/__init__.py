"""Structured output: grammars over a model's tokens, and what they allow a sequence to go on with."""
