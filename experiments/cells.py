"""Results of long experiments, kept as files: what is finished is not computed again.

A cell is one result, named by a key. Figures are lines of `cells.jsonl`, a record small enough to be
committed; what is large has a file of its own. An interrupted experiment goes on where it was, and the same
command, started again beside a running one, shares its work.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout

Key = tuple[Any, ...]
"""What identifies a cell: strings and numbers."""

WAIT = 2.0
"""Seconds between two looks at what other processes have finished."""


class Cells:
    """Finished cells of an experiment.

    Attributes:
      folder: where their files are.
      record: the file of all figures, a JSON object with "key", "seconds" and "result" a line.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.record = folder / "cells.jsonl"
        self._figures: dict[str, Any] = {}
        self._seen: tuple[int, ...] = ()

    def has(self, key: Key) -> bool:
        """Whether a figure is finished."""
        self._catch_up()
        return json.dumps(key) in self._figures

    def read(self, key: Key) -> Any:
        """A finished figure."""
        self._catch_up()
        return self._figures[json.dumps(key)]

    def all(self, work: Mapping[Key, Callable[[], Any]]) -> dict[Key, Any]:
        """Figures: those that no process is at are computed in order, the others waited for.

        Args:
          work: per cell what makes its figure, JSON-able; called if the record does not hold it.

        Returns:
          Per cell its figure.
        """
        while missing := [key for key in work if not self.has(key)]:
            if sum(self._try(key, work[key]) for key in missing) == 0:
                time.sleep(WAIT)
        return {key: self.read(key) for key in work}

    def one(self, key: Key, compute: Callable[[], Any]) -> Any:
        """One figure; see `all`."""
        return self.all({key: compute})[key]

    def together(self, keys: Iterable[Key], compute: Callable[[list[Key]], Mapping[Key, Any]]) -> None:
        """Compute figures in one go: those that are not finished and that no process is at.

        Args:
          keys: of the figures.
          compute: makes those of some keys.
        """
        with ExitStack() as held:
            mine = [key for key in keys if self._enter(held, key) and not self.has(key)]
            if not mine:
                return
            start = time.perf_counter()
            results = compute(mine)
            seconds = round((time.perf_counter() - start) / len(mine), 1)
            for key in mine:
                self._append({"key": key, "seconds": seconds, "result": results[key]})
            print(f"{len(mine)} figures, {seconds:.1f} s each", flush=True)

    def large(self, key: Key, compute: Callable[[], Any]) -> Any:
        """Something JSON-able that is too large for the record."""

        def write(path: Path) -> None:
            path.write_text(json.dumps(compute()))

        return json.loads(self._file(key, ".json", write).read_text())

    def arrays(self, key: Key, like: Any, compute: Callable[[], Any]) -> Any:
        """A pytree of arrays.

        Args:
          key: of the cell.
          like: a pytree with its structure.
          compute: makes it.
        """

        def write(path: Path) -> None:
            np.savez(path, *map(np.asarray, jax.tree.leaves(compute())))

        with np.load(self._file(key, ".npz", write)) as held:
            return jax.tree.unflatten(jax.tree.structure(like), [held[name] for name in held])

    def _try(self, key: Key, compute: Callable[[], Any]) -> bool:
        """Compute a figure, unless another process is at it."""
        try:
            with self._lock(key, timeout=0):
                if not self.has(key):
                    start = time.perf_counter()
                    result, seconds = compute(), round(time.perf_counter() - start, 1)
                    self._append({"key": key, "seconds": seconds, "result": result})
                    print(f"{key}: {seconds:.0f} s", flush=True)
        except Timeout:
            return False
        return True

    def _enter(self, held: ExitStack, key: Key) -> bool:
        """Take the lock of a cell, unless another process has it."""
        try:
            held.enter_context(self._lock(key, timeout=0))
        except Timeout:
            return False
        return True

    def _append(self, cell: dict[str, Any]) -> None:
        with self._lock(("the record",)):
            content = self.record.read_bytes() if self.record.exists() else b""
            with self.record.open("r+b" if content else "wb") as file:
                # What a killed process left of a line goes.
                whole = content.rfind(b"\n") + 1
                file.truncate(whole)
                file.seek(whole)
                file.write(json.dumps(cell).encode() + b"\n")

    def _catch_up(self) -> None:
        """Read the record if it changed; others may add to it, or put another one in its place."""
        if not self.record.exists():
            return
        state = self.record.stat()
        seen = (state.st_ino, state.st_size, state.st_mtime_ns)
        if seen != self._seen:
            # A line that is still being written has no end.
            *lines, _ = self.record.read_bytes().split(b"\n")
            self._figures = {json.dumps(cell["key"]): cell["result"] for cell in map(json.loads, lines)}
            self._seen = seen

    def _file(self, key: Key, suffix: str, write: Callable[[Path], None]) -> Path:
        """The file of a cell, written by whoever asks first."""
        path = self.folder / "cells" / (_name(key) + suffix)
        with self._lock(key):
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                part = path.with_suffix(f".{os.getpid()}{suffix}")
                write(part)
                part.replace(path)
        return path

    def _lock(self, key: Key, timeout: float = -1) -> FileLock:
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / _name(key), timeout=timeout)


def _name(key: Key) -> str:
    text = json.dumps(key)
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in text.strip("[]").replace('"', ""))
    return f"{name[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
