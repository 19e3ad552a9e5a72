"""A keyed results file: each row is appended and synced, so that a run is resumable at any moment."""

import contextlib
import csv
import fcntl
import io
import os
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from attention_zoo import InvalidOption
from profiling.schema.row import ROW
from profiling.schema.table import Schema, as_text

FAILED = ("oom", "timeout", "crash", "incorrect", "unsupported", "error")


class StoreError(RuntimeError):
    """The results cannot be written; the message says why. Earlier rows are intact."""


class Store:
    """The rows of one sweep on one device, of one schema.

    Opening removes an incomplete last line, as after a killed run. A file of another schema is rejected.

    Raises:
        SchemaError: ``path`` holds other content than rows of this schema.
        StoreError: ``path`` cannot be written.
    """

    def __init__(self, path: Path, schema: Schema = ROW) -> None:
        self.path, self.schema = path, schema
        self._header = ",".join(schema.columns) + "\n"
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(path, self._header)
            self._status = dict(self._keys())
            if not path.exists() or path.stat().st_size == 0:
                _append(path, self._header)

    def finished(self, key: tuple[str, ...], retry_failed: bool = False) -> bool:
        """Whether the case has a row, other than of a failure to be retried."""
        status = self._status.get(_joined(key))
        return status is not None and not (retry_failed and status in FAILED)

    def append(self, row: dict[str, Any]) -> None:
        """Validate a row and write it to disk; it replaces a row of the same key."""
        self.schema.validate([row])
        self.merge([[as_text(row.get(name)) for name in self.schema.columns]])

    def merge(self, rows: Iterable[list[str]]) -> None:
        """Write valid rows, as text, to disk; a later row replaces one of the same key."""
        latest = {self._key(text): text for text in rows}
        new = {key: text for key, text in latest.items() if key not in self._status}
        with _explained(self.path):
            if len(new) < len(latest):
                self._replace(latest)
            elif new:
                _append(self.path, "".join(map(_line, new.values())))
        self._status |= {key: text[len(self.schema.key)] for key, text in latest.items()}

    def frame(self) -> pd.DataFrame:
        """All rows."""
        return self.schema.load(self.path)

    def archive(self) -> Path | None:
        """Rename the file and start an empty one; returns the new path of the old file, None if it had no rows."""
        if not self._status:
            return None
        aside = self.path.with_suffix(datetime.now().strftime(".%Y%m%dT%H%M%S.%f") + ".csv.old")
        with _explained(self.path):
            self.path.rename(aside)
            _append(self.path, self._header)
        self._status.clear()
        return aside

    def _keys(self) -> Iterator[tuple[str, str]]:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        self.schema.load(self.path)
        for text in read(self.path):
            yield self._key(text), text[len(self.schema.key)]

    def _key(self, text: list[str]) -> str:
        return _joined(text[: len(self.schema.key)])

    def _replace(self, latest: dict[str, list[str]]) -> None:
        kept = [text for text in read(self.path) if self._key(text) not in latest]
        concurrent = self.path.with_suffix(".tmp")
        concurrent.unlink(missing_ok=True)
        _append(concurrent, "".join(map(_line, [list(self.schema.columns), *kept, *latest.values()])))
        concurrent.replace(self.path)


def read(path: Path) -> Iterator[list[str]]:
    """Yield the rows of a file as text, without an incomplete last line; nothing if there is no file."""
    with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8", newline="") as file:
        whole = (line for line in file if line.endswith("\n"))
        for number, text in enumerate(csv.reader(whole)):
            if number:
                yield text


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock ``folder`` for one run; StoreError if another run has locked it."""
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "run.lock").open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise StoreError(f"{folder} is in use by another run (process {holder}); wait for it to end") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def check_results_folder(folder: Path) -> None:
    """InvalidOption unless ``folder`` is, or can become, a folder that this process can write to."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise InvalidOption(f"--results {folder}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InvalidOption(f"--results {folder}: no permission to write to {nearest}")


def _append(path: Path, text: str) -> None:
    """Append all of ``text``, or nothing if the disk is full."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            data = text.encode()
            while data:
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def _cut_torn_line(path: Path, first_line: str) -> None:
    if not path.exists():
        return
    data, header = path.read_bytes(), first_line.encode()
    if not (data.startswith(header) or header.startswith(data)):
        # Not a file of this schema: do not change it.
        return
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))


def _joined(key: Iterable[str]) -> str:
    # One string takes a tenth of the memory of a tuple of them.
    return "\n".join(key)


def _line(values: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise StoreError(f"cannot write {path}: {problem.strerror or problem}") from problem
