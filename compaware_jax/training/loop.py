"""The one training loop: compiled chunks of steps, progress, history, checkpoints, resumption."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from compaware_jax.errors import CheckpointError, RequestError, gist
from compaware_jax.placement import is_weak, weakened
from compaware_jax.settings import whole_number
from compaware_jax.training.interruption import Interruption

Step = Callable[[Any, jax.Array], tuple[Any, dict[str, jax.Array]]]
"""``(state, index) -> (state, info)``, pure; the index is the only data position."""


def run_steps(
    step: Step,
    state: Any,
    steps: int,
    *,
    label: str,
    chunk: int = 100,
    directory: str | os.PathLike[str] | None = None,
    job: Mapping[str, Any] | None = None,
    every: int | None = None,
    between: Mapping[int, Callable[[Any], Any]] | None = None,
    check: Callable[[Any, Mapping[str, Any]], None] = lambda state, means: None,
    progress: bool = True,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Run a pure step function for a number of steps, in compiled chunks.

    Interrupted by Ctrl-C, it ends and saves the chunk that runs; by another one, it ends at once. Killed at
    any moment and started again with the same arguments, it ends in the same state, bit for bit, as an
    undisturbed run.

    Args:
      step: ``(state, index) -> (state, info)``; info is a dict of arrays.
      state: a pytree of arrays.
      steps: how many steps in all, those done before an interruption included.
      label: what the progress bar says.
      chunk: about how many steps per compiled call: the divisor of their number that is nearest, within a
        factor of two, so that one program serves all calls.
      directory: where checkpoints go; None for none.
      job: what identifies the run (JSON values); a checkpoint of another job is refused.
      every: chunks between checkpoints; None for five, or as many more as keep saving to a tenth of the time.
      between: functions of the state, run on the host before the step of that number, from 0 on, or after the
        last one where the number is `steps`; they must not change shapes or dtypes. A chunk ends before each.
      check: called with the state after every chunk and the means of its info; it may raise.
      progress: show a progress bar.

    Returns:
      The final state, and per info entry its mean over each chunk, shape (chunks, ...).

    Raises:
      CheckpointError: the directory holds a checkpoint that is corrupt or of another job.
      RequestError: the steps are no whole number, something is to run between steps that there are not, or
        the directory is no path.
    """
    weak = jax.tree.map(is_weak, state)
    steps, between = whole_number(steps, f"{label}: steps"), between or {}
    if outside := [step for step in between if not 0 <= step <= steps]:
        raise RequestError(f"{label}: between={outside}, expected numbers of steps from 0 to {steps}.")
    edges = _edges(steps, chunk, between)
    chunks = len(edges) - 1
    state = _owned(state)
    open_step, held, (_, shapes) = _opened(step, state, jnp.int32(0))
    history = {name: np.full((chunks, *info.shape), np.nan, np.float64) for name, info in shapes.items()}
    # Each chunk takes the memory of the state before it: a state is as large as variables and moments.
    compiled = jax.jit(_chunk_runner(open_step), static_argnames="length", donate_argnames="state")
    store = (
        None
        if directory is None
        else _Store(
            folder_of(directory, label),
            {"steps": steps, "chunk": chunk, "between": sorted(between), **(job or {})},
        )
    )
    done, running = 0, None
    try:
        if store is not None:
            done, state, history = store.restore(state, history)
        bar = tqdm(total=steps, initial=edges[done], desc=label, disable=not progress)
        with bar, Interruption() as interruption:
            try:
                bar.set_postfix_str("compiling" if done < chunks else "")
                while done < chunks:
                    start, length = edges[done], edges[done + 1] - edges[done]
                    # Until the chunk has begun, an interruption must find the state before it.
                    begin = _owned(between[start](state)) if start in between else state
                    state, running = compiled(held, begin, jnp.int32(start), length=length)
                    means = _noted(history, done, running)
                    done, running = done + 1, None
                    check(state, means)
                    if store is not None:
                        # Not before the first chunk, which takes long to compile: nothing is lost there.
                        interruption.hold()
                    bar.update(length)
                    bar.set_postfix({n: f"{h[done - 1]:.4g}" for n, h in history.items() if h.ndim == 1})
                    if store is not None and (done == chunks or store.is_due(done, every)):
                        store.save(done, state, history)
                    if interruption.came:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                if store is not None and running is not None:
                    # What was before this chunk is gone, so it is waited for.
                    _noted(history, done, running)
                    done += 1
                if store is not None and done and not _is_gone(state):
                    store.save(done, state, history)
                raise
        if steps in between:
            state = between[steps](state)
    finally:
        if store is not None:
            store.close()
    # Loops make arrays strong that were weak, which would change the dtypes of what comes next.
    return jax.tree.map(lambda x, was: weakened(x) if was else x, state, weak), history


def _noted(history: Mapping[str, np.ndarray], chunk: int, info: Any) -> dict[str, Any]:
    """The means of a chunk, once it is finished, put down in the history."""
    means = jax.device_get(info)
    for name, value in means.items():
        history[name][chunk] = value
    return means


@jax.jit
def _owned(tree: Any) -> Any:
    """The tree in memory of its own: a chunk may take it, and the caller's arrays stay."""
    return jax.tree.map(jnp.copy, tree)


def _is_gone(tree: Any) -> bool:
    """Whether a chunk has taken a tree's memory."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def _edges(steps: int, chunk: int, between: Iterable[int]) -> list[int]:
    """Where chunks begin, and where the last one ends."""
    edges: list[int] = []
    for start, stop in itertools.pairwise(sorted({0, steps, *between})):
        length = stop - start
        even = [n for n in range((chunk + 1) // 2, min(2 * chunk, length) + 1) if length % n == 0]
        edges += range(start, stop, min(even, key=lambda n: (abs(n - chunk), n), default=chunk))
    return [*edges, steps]


def run_once(function: Callable[..., Any], *args: Any) -> Any:
    """Compile a function and call it, with what it closes over as arguments of the program.

    Args:
      function: pure, of pytrees of arrays.
      *args: its arguments.
    """
    open_function, held, _ = _opened(function, *args)
    return jax.jit(open_function)(held, *args)


def _opened(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[Any], Any]:
    """A function of what it closes over and of its arguments; what that is; the shapes that it returns.

    Data of gigabytes are arguments then; as constants they would be copied into the program.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    structure = jax.tree.structure(shapes)

    def open_function(held: list[Any], *args: Any) -> Any:
        results = jex.jaxpr_as_fun(traced.replace(consts=held))(*jax.tree.leaves(args))
        return jax.tree.unflatten(structure, results)

    return open_function, list(traced.consts), shapes


def _chunk_runner(step: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    def run_chunk(held: Any, state: Any, start: jax.Array, *, length: int) -> tuple[Any, Any]:
        steps = start + jnp.arange(length, dtype=jnp.int32)
        state, infos = jax.lax.scan(partial(step, held), state, steps)
        return state, jax.tree.map(lambda x: x.astype(float).mean(0), infos)

    return run_chunk


def digest(tree: Any) -> str:
    """A hash of the values in a tree (16 hexadecimal digits): ties a checkpoint to where it started."""
    values = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        values.update(np.ascontiguousarray(leaf).tobytes())
    return values.hexdigest()[:16]


# Chunks between checkpoints at least, and the largest share of the time that saving them may take.
_EVERY, _SHARE = 5, 0.1


class _Store:
    """Checkpoints of one run in one directory."""

    def __init__(self, directory: Path, job: dict[str, Any]):
        self.directory = directory.absolute()
        # As it is read again: a list for a tuple, a number for numpy's.
        self.job = json.loads(json.dumps(job, default=_plain))
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
        )
        self.saved_at, self.took = time.monotonic(), 0.0

    def is_due(self, done: int, every: int | None) -> bool:
        """Whether the chunk that is done is to be saved."""
        if every is not None:
            return done % every == 0
        return done % _EVERY == 0 and time.monotonic() - self.saved_at >= self.took * (1 / _SHARE - 1)

    def restore(self, state: Any, history: Any) -> tuple[int, Any, Any]:
        done = self.manager.latest_step()
        if done is None:
            return 0, state, history
        job = self.read(done, job=ocp.args.JsonRestore()).job
        if job != self.job:
            differ = {
                name: (job.get(name), self.job.get(name))
                for name in sorted(set(job) | set(self.job))
                if job.get(name) != self.job.get(name)
            }
            raise CheckpointError(
                f"run_steps: {self.directory} holds a checkpoint of another job; (found, expected) "
                f"differ in {differ}. Nothing was changed. Choose another directory; or delete "
                "the numbered folders in this one, to start anew."
            )
        kept = {"state": state, "history": history}
        found = self.read(done, run=ocp.args.StandardRestore(_storable(kept))).run
        found = jax.tree.map(lambda old, new: new if np.size(old) else old, kept, found)
        return int(done), found["state"], jax.tree.map(np.array, found["history"])

    def read(self, done: int, **items: Any) -> Any:
        try:
            return self.manager.restore(done, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self.corrupt(done, error) from error

    def corrupt(self, done: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"run_steps: the checkpoint {self.directory / str(done)} cannot be read "
            f"({gist(error)}). Nothing was changed. Delete that folder to go on from the checkpoint before "
            "it, or all numbered folders beside it to start anew."
        )

    def save(self, done: int, state: Any, history: Any) -> None:
        if self.manager.latest_step() == done:
            return
        start = time.monotonic()
        self.manager.save(
            done,
            args=ocp.args.Composite(
                run=ocp.args.StandardSave(_storable({"state": state, "history": history})),
                job=ocp.args.JsonSave(self.job),
            ),
        )
        self.saved_at = time.monotonic()
        self.took = self.saved_at - start

    def close(self) -> None:
        self.manager.close()


def folder_of(directory: Any, caller: str) -> Path:
    """Where checkpoints go, as a path.

    Args:
      directory: what was given.
      caller: the function that asks, for messages.

    Raises:
      RequestError: it is no path.
      CheckpointError: there is a file.
    """
    if not isinstance(directory, (str, os.PathLike)):
        raise RequestError(f"{caller}: directory={directory!r}, expected the path of a folder, or None.")
    folder = Path(directory)
    if file := next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None):
        raise CheckpointError(f"{caller}: {file} is a file, expected a folder for checkpoints, or a new one.")
    return folder


def _plain(value: Any) -> Any:
    """What JSON has for a number or an array of numpy or JAX."""
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _storable(tree: Any) -> Any:
    """The tree with a stand-in for arrays of size zero, which Orbax refuses to write."""
    return jax.tree.map(lambda x: x if np.size(x) else np.zeros(1, np.float32), tree)
