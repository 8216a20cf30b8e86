"""Readers of recorded traces, and generators of synthetic ones. One file per format."""
