"""Tables and figures from the results files. Nothing here needs PyTorch."""
