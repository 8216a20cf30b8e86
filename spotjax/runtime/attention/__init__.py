"""Attention over KV pages, one backend for each platform."""
