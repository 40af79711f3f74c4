"""Results of long experiments, kept as files: what is finished is not computed again.

A cell is one result, named by a key: a JSON file, or arrays in an npz file. An interrupted experiment goes on
where it was, and several workers share its cells.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

Key = tuple[Any, ...]
"""What identifies a cell: strings and numbers."""


@dataclass(frozen=True)
class Cells:
    """Finished cells of an experiment.

    Attributes:
      folder: where their files are.
      worker: this worker's number and how many there are; None to compute whatever is asked for.
    """

    folder: Path
    worker: tuple[int, int] | None = None

    def path(self, key: Key, suffix: str = ".json") -> Path:
        """The file of a cell."""
        text = json.dumps(key)
        name = "".join(c if c.isalnum() or c in ".-" else "_" for c in text.strip("[]").replace('"', ""))
        return self.folder / f"{name[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}{suffix}"

    def has(self, key: Key) -> bool:
        """Whether a cell is finished."""
        return self.path(key).exists()

    def all(self, work: Mapping[Key, Callable[[], Any]]) -> dict[Key, Any]:
        """The results of cells: this worker's share is computed, the rest waited for.

        Args:
          work: per cell what makes its result, JSON-able; called if no file holds it.

        Returns:
          Per cell its result, as read from JSON.
        """
        for key, compute in work.items():
            if self._mine(key) and not self.has(key):
                start = time.perf_counter()
                _write(self.path(key), json.dumps(compute()).encode())
                print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)
        for key in work:
            while not self.has(key):
                time.sleep(5)
        return {key: self.read(key) for key in work}

    def one(self, key: Key, compute: Callable[[], Any]) -> Any:
        """The result of one cell; see `all`."""
        return self.all({key: compute})[key]

    def read(self, key: Key) -> Any:
        """The result of a finished cell."""
        return json.loads(self.path(key).read_text())

    def arrays(self, key: Key, like: Any, compute: Callable[[], Any]) -> Any:
        """A pytree of arrays, computed by whichever worker asks for it first.

        Args:
          key: of the cell.
          like: a pytree with its structure.
          compute: makes it.
        """
        path = self.path(key, ".npz")
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.npz")
            np.savez(part, *map(np.asarray, jax.tree.leaves(compute())))
            part.replace(path)
        with np.load(path) as held:
            return jax.tree.unflatten(jax.tree.structure(like), [held[name] for name in held])

    def _mine(self, key: Key) -> bool:
        if self.worker is None:
            return True
        number, workers = self.worker
        return zlib.crc32(json.dumps(key).encode()) % workers == number


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
