import time

STARTED = time.monotonic()
"""When this package was imported: for a command, before PyTorch, which takes seconds to import."""
