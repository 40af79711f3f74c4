"""Labelled images in host memory, their checks, and batches of them, or of any arrays, on the device."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, PRNGKeyArray, UInt8

__all__ = ["SHAPE", "ImageSet", "Split", "check_images", "resident", "stratified", "whole"]

SHAPE = (28, 28, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images in [0, 255] as uint8 (or in [0, 1] as float) and their labels, in host memory."""

    images: UInt8[np.ndarray, "n 28 28 1"] | Float[np.ndarray, "n 28 28 1"]
    labels: Int32[np.ndarray, " n"]

    def __post_init__(self) -> None:
        check_images(self.images, self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Three disjoint splits, what they are ("tfds" or "embedded": MNIST; "fashion"), and what to report."""

    train: Split
    valid: Split
    test: Split
    source: str
    note: str


def check_images(images: Any, labels: Any) -> None:
    """Checks that arrays are usable as a split.

    Args:
      images: expected uint8 in [0, 255] or floating in [0, 1], shape (n, 28, 28, 1), n >= 1.
      labels: expected int32, shape (n,).

    Raises:
      ValueError: if a type, dtype, shape or value differs; the message says which and the remedy.
    """

    def require(holds: bool | np.bool, got: str, expected: str, remedy: str) -> None:
        if not holds:
            raise ValueError(f"check_images: got {got}; expected {expected}; {remedy}.")

    for name, array in (("images", images), ("labels", labels)):
        got = f"{name} of type {type(array).__name__}"
        require(isinstance(array, np.ndarray), got, "a numpy array", "call np.asarray on it")
    floating = np.issubdtype(images.dtype, np.floating)
    got, remedy = f"images of dtype {images.dtype}", "cast the images"
    require(images.dtype == np.uint8 or floating, got, "uint8 or floating in [0, 1]", remedy)
    got, remedy = f"images of shape {images.shape}", "a missing channel axis: images[..., None]"
    require(images.ndim == 4 and images.shape[1:] == SHAPE, got, "(n, 28, 28, 1)", remedy)
    require(len(images) > 0, "no images", "at least one", "check what was filtered before")
    got, remedy = f"labels of dtype {labels.dtype}", "call labels.astype(np.int32)"
    require(labels.dtype == np.int32, got, "int32", remedy)
    got = f"labels of shape {labels.shape} for {len(images)} images"
    require(labels.shape == images.shape[:1], got, "one an image", "take both from the same rows")
    if floating:
        broken = images.size - np.count_nonzero(np.isfinite(images))
        require(broken == 0, f"{broken} non-finite pixels", "none", "drop or repair these images")
        low, high = images.min(), images.max()
        remedy = "divide by the largest possible value (255 for 8-bit images)"
        require(low >= 0 and high <= 1, f"pixels in [{low:g}, {high:g}]", "[0, 1]", remedy)


def stratified(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws rows with each class at its share, the same ones under every version of numpy.

    Args:
      labels: (n,), integer.
      count: how many rows to draw, at most n.
      seed: of the draw and of the order.

    Returns:
      The numbers of the drawn rows, (count,), and of the others, (n - count,), both shuffled.
    """
    # RandomState: its stream is frozen, that of numpy's Generator may change between versions.
    random = np.random.RandomState(seed)
    order = random.permutation(len(labels))
    _, sizes = np.unique(labels, return_counts=True)
    share = sizes * count / len(labels)
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: count - take.sum()]] += 1
    chosen = np.zeros(len(labels), bool)
    for label, number in zip(np.unique(labels), take, strict=True):
        chosen[order[labels[order] == label][:number]] = True
    # Shuffled once more: `order` lists first the classes whose share was taken early.
    return random.permutation(np.flatnonzero(chosen)), random.permutation(np.flatnonzero(~chosen))


def resident(split: Any, batch_size: int, key: PRNGKeyArray) -> Callable[[Int[Array, ""] | int], Any]:
    """Puts a split on the device once and draws batches there.

    Batch number `step` is drawn with replacement from `fold_in(key, step)`: the position in the
    data is the step, so a resumed run sees the same batches, and steps can be scanned or vmapped.

    Args:
      split: a `Split`, or any pytree of arrays with an example per row, n of them each.
      batch_size: examples per batch, B.
      key: a scalar random key.

    Returns:
      A pure function of the step (int32 scalar) giving the rows drawn, in the structure of the split;
      of a `Split` {"image": float32 (B, 28, 28, 1) in [0, 1], "label": int32 (B,)}. It is a pytree as
      well: passed to a jitted function as an argument, the data stay a device buffer and are not
      compiled in as a constant.

    Raises:
      ValueError: if `batch_size` is not positive, or the arrays are none or differ in their rows.
    """
    if batch_size < 1:
        raise ValueError(
            f"resident: got batch_size={batch_size}; expected at least 1; pass a positive number."
        )
    rows, shown = _rows_of(split, "resident")
    return jax.tree_util.Partial(functools.partial(_draw, batch_size, shown), rows, key)


def _rows_of(split: Any, caller: str) -> tuple[Any, Callable[[Any], Any]]:
    """The arrays of a split on the device, and what becomes of rows of them."""
    if isinstance(split, Split):
        return {"image": jnp.asarray(split.images), "label": jnp.asarray(split.labels)}, _as_images
    if isinstance(split, ImageSet):
        raise ValueError(f"{caller}: got all of a data set; expected a part of it, such as `.train`.")
    rows = jax.tree.map(jnp.asarray, split)
    counts = {x.shape[:1] for x in jax.tree.leaves(rows)}
    if len(counts) != 1 or not all(min(count, default=0) for count in counts):
        got = [x.shape for x in jax.tree.leaves(rows)]
        raise ValueError(
            f"{caller}: got arrays of shapes {got[:4]}; expected one or more, all of as many "
            "rows; pass an example per row."
        )
    return rows, _as_it_is


def _draw(
    batch_size: int, shown: Callable[[Any], Any], rows: Any, key: PRNGKeyArray, step: Int[Array, ""] | int
) -> Any:
    count = jax.tree.leaves(rows)[0].shape[0]
    drawn = jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, count)
    return shown(jax.tree.map(lambda x: x[drawn], rows))


def whole(split: Any, limit: int | None = None) -> Any:
    """The split as one batch on the device.

    Args:
      split: a `Split`, or any pytree of arrays with an example per row.
      limit: how many examples from the start; default: all.

    Returns:
      The rows, in the structure of the split; of a `Split` {"image": float32 (n, 28, 28, 1) in [0, 1],
      "label": int32 (n,)}.

    Raises:
      ValueError: if `limit` is not positive, or the arrays are none or differ in their rows.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"whole: got limit={limit}; expected at least 1; pass a positive number or None.")
    rows, shown = _rows_of(split, "whole")
    return shown(jax.tree.map(lambda x: x[:limit], rows))


def _as_images(rows: dict[str, Array]) -> dict[str, Array]:
    return rows | {"image": _unit_range(rows["image"])}


def _as_it_is(rows: Any) -> Any:
    return rows


def _unit_range(images: Array) -> Float32[Array, "n 28 28 1"]:
    scale = 255.0 if images.dtype == jnp.uint8 else 1.0
    return images.astype(jnp.float32) / scale
