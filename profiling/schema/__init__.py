"""The columns of a row. Needs no PyTorch."""
