"""The full MNIST in a tensorflow-datasets directory, without TensorFlow.

A prepared data set is read from array_record, a missing one is prepared by decoding the IDX files
with numpy, and the decoded arrays are kept in a cache. `tensorflow_datasets` is imported only where
it is used.
"""

import gzip
import hashlib
import http.client
import io
import logging
import os
import tempfile
import threading
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from compaware_jax.data.images import SHAPE, check_images

__all__ = ["UnavailableError", "load_arrays"]

logger = logging.getLogger(__name__)

URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
COUNTS = {"train": 60_000, "test": 10_000}
_IDX_NAMES = {"train": "train", "test": "t10k"}
_CORRUPT = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


class UnavailableError(RuntimeError):
    """The full set is neither prepared nor can it be downloaded."""


def load_arrays(data_dir: Path, cache: Path, patience: float) -> tuple[dict[str, np.ndarray], str]:
    """Loads the official splits, prepared before where they are not yet.

    Args:
      data_dir: tfds directory.
      cache: where decoded images are kept, and the data set if `data_dir` holds it as tfrecord.
      patience: how long to wait for the download server's first answer, in seconds.

    Returns:
      The arrays "train_images", "train_labels", "test_images" and "test_labels" (uint8
      (n, 28, 28, 1) and int32 (n,)) in the order of the data set, and its version.

    Raises:
      UnavailableError: if the set is neither prepared nor can be downloaded.
      ValueError: if the prepared data set is not MNIST.
    """
    # A set that TensorFlow prepared as tfrecord blocks its directory: ours then goes to the cache.
    roots = (data_dir, cache / "tfds")
    found = [path for root in roots for path in _prepared(root)]
    if not found:
        root = next((r for r in roots if not (r / "mnist").exists()), roots[-1])
        _prepare(root, patience)
        found = _prepared(root)
    return _cached(found[0], cache), found[0].name


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
        raise UnavailableError(
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
        raise UnavailableError(f"mnist: preparing the data set in {root} failed: {error}") from error


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
