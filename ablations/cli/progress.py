"""Progress of a run on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress() -> Iterator[Callable[[int, int, str, str], None]]:
    """Yield a function that shows progress: as a bar on a terminal, otherwise as a line per change."""
    console = Console(stderr=True)
    columns = (
        BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(compact=True),
        TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    said = ""
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=1) as bar:
        task = bar.add_task("planning")

        def tell(number: int, total: int, what: str, where: str) -> None:
            nonlocal said
            bar.update(task, total=total, completed=number, description=what)
            if not console.is_terminal and where + what != said:
                said = where + what
                print(said, file=sys.stderr, flush=True)

        yield tell
        bar.update(task, completed=bar.tasks[0].total, description="done")
