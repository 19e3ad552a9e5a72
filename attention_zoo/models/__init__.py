"""Blocks and whole models that take any registered attention."""
