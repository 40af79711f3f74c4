"""Labelled images in host memory, their checks, and batches of them on the device."""

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


def resident(
    split: Split, batch_size: int, key: PRNGKeyArray
) -> Callable[[Int[Array, ""] | int], dict[str, Array]]:
    """Puts a split on the device once and draws batches there.

    Batch number `step` is drawn with replacement from `fold_in(key, step)`: the position in the
    data is the step, so a resumed run sees the same batches, and steps can be scanned or vmapped.

    Args:
      split: the images and labels.
      batch_size: images per batch, B.
      key: a scalar random key.

    Returns:
      A pure function of the step (int32 scalar) giving {"image": float32 (B, 28, 28, 1) in [0, 1],
      "label": int32 (B,)}. It is a pytree as well: passed to a jitted function as an argument, the
      images stay a device buffer and are not compiled in as a constant.

    Raises:
      ValueError: if `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(
            f"resident: got batch_size={batch_size}; expected at least 1; pass a positive number."
        )
    draw = functools.partial(_draw, batch_size)
    return jax.tree_util.Partial(draw, jnp.asarray(split.images), jnp.asarray(split.labels), key)


def _draw(
    batch_size: int, images: Array, labels: Array, key: PRNGKeyArray, step: Int[Array, ""] | int
) -> dict[str, Array]:
    count = images.shape[0]
    rows = jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, count)
    return {"image": _unit_range(images[rows]), "label": labels[rows]}


def whole(split: Split, limit: int | None = None) -> dict[str, Array]:
    """The split as one batch on the device.

    Args:
      split: the images and labels.
      limit: how many images from the start; default: all.

    Returns:
      {"image": float32 (n, 28, 28, 1) in [0, 1], "label": int32 (n,)}.

    Raises:
      ValueError: if `limit` is not positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"whole: got limit={limit}; expected at least 1; pass a positive number or None.")
    images, labels = jnp.asarray(split.images[:limit]), jnp.asarray(split.labels[:limit])
    return {"image": _unit_range(images), "label": labels}


def _unit_range(images: Array) -> Float32[Array, "n 28 28 1"]:
    scale = 255.0 if images.dtype == jnp.uint8 else 1.0
    return images.astype(jnp.float32) / scale
