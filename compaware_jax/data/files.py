"""Full data sets in IDX files or in a tensorflow-datasets directory, without TensorFlow.

A prepared data set is read from array_record, a missing one is prepared by decoding the IDX files
with numpy, and the decoded arrays are kept in a cache. `tensorflow_datasets` is imported only where
it is used.
"""

import dataclasses
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from compaware_jax.data.images import SHAPE, check_images

__all__ = ["IdxSet", "UnavailableError", "load_arrays", "read_folder"]

logger = logging.getLogger(__name__)

_CORRUPT = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class IdxSet:
    """A data set of labelled grey images, 28 by 28 pixels, published as four gzipped IDX files.

    Attributes:
      name: in tensorflow-datasets, in messages and in the cache.
      title: its name in notes.
      url: the folder it is downloaded from, with the slash at its end.
      builder: the class in tensorflow_datasets.image_classification.mnist that prepares it.
      idx_names: by split, how the names of its two files begin.
      counts: by split, how many images it has.
      remedy: what else helps where it is neither prepared nor can be downloaded; ends an enumeration.
      installed: the folder in which an operating system's package puts the IDX files, if one does.
    """

    name: str
    title: str
    url: str
    builder: str
    idx_names: Mapping[str, str]
    counts: Mapping[str, int]
    remedy: str
    installed: Path | None = None

    def files(self, split: str) -> tuple[str, str]:
        """Names of a split's files: images, labels."""
        start = self.idx_names[split]
        return f"{start}-images-idx3-ubyte.gz", f"{start}-labels-idx1-ubyte.gz"


class UnavailableError(RuntimeError):
    """The full set is neither prepared nor installed nor can it be downloaded."""


def load_arrays(
    idx_set: IdxSet, data_dir: Path, cache: Path, patience: float
) -> tuple[dict[str, np.ndarray], str]:
    """Loads the official splits: prepared ones, else installed ones, else prepared from a download.

    Args:
      idx_set: which data set.
      data_dir: tfds directory.
      cache: where decoded images are kept, and the data set if `data_dir` holds it as tfrecord.
      patience: how long to wait for the download server's first answer, in seconds.

    Returns:
      The arrays "train_images", "train_labels", "test_images" and "test_labels" (uint8
      (n, 28, 28, 1) and int32 (n,)), in the same order wherever they come from, and where that is.

    Raises:
      UnavailableError: if the set is neither prepared nor installed nor can be downloaded.
      ValueError: if the files that were found do not hold the data set.
    """
    # A set that TensorFlow prepared as tfrecord blocks its directory: ours then goes to the cache.
    roots = (data_dir, cache / "tfds")
    found = [path for root in roots for path in _prepared(idx_set, root)]
    if not found and idx_set.installed and not _missing(idx_set, idx_set.installed):
        return read_folder(idx_set, idx_set.installed)
    if not found:
        root = next((r for r in roots if not (r / idx_set.name).exists()), roots[-1])
        _prepare(idx_set, root, patience)
        found = _prepared(idx_set, root)
    return _cached(idx_set, found[0], cache), f"tensorflow-datasets {idx_set.name}/{found[0].name}"


def read_folder(idx_set: IdxSet, folder: Path) -> tuple[dict[str, np.ndarray], str]:
    """Reads the official splits from IDX files as they are published.

    Args:
      idx_set: which data set.
      folder: where its four files are.

    Returns:
      The arrays and where they come from, as `load_arrays` does.

    Raises:
      ValueError: if a file is missing or broken, or holds another number of images.
    """
    if missing := _missing(idx_set, folder):
        raise ValueError(
            f"{idx_set.name}: got a folder {folder} without {', '.join(missing)}; expected the four gzipped "
            "IDX files as they are published; pass the folder that holds them."
        )
    arrays: dict[str, np.ndarray] = {}
    try:
        for split in idx_set.counts:
            images, labels = (folder / name for name in idx_set.files(split))
            arrays[f"{split}_images"] = _read_idx(images, 16)
            arrays[f"{split}_labels"] = _read_idx(labels, 8).astype(np.int32)
    except _CORRUPT as error:
        raise ValueError(
            f"{idx_set.name}: got broken files in {folder} ({error}); expected gzipped IDX files; "
            "fetch them again."
        ) from error
    _check_counts(idx_set, arrays, "fetch the IDX files again")
    for split, count in idx_set.counts.items():
        # The order in which tfds stores the rows, so that every source gives the same splits.
        keys = [hashlib.md5(f"{split}{row}".encode(), usedforsecurity=False).digest() for row in range(count)]
        order = sorted(range(count), key=keys.__getitem__)
        for field in ("images", "labels"):
            arrays[f"{split}_{field}"] = arrays[f"{split}_{field}"][order]
    return arrays, "IDX files"


def _missing(idx_set: IdxSet, folder: Path) -> list[str]:
    names = [name for split in idx_set.counts for name in idx_set.files(split)]
    return [name for name in names if not (folder / name).is_file()]


def _prepared(idx_set: IdxSet, root: Path) -> list[Path]:
    """Directories of the data set in array_record, the newest version first."""
    versions = sorted((root / idx_set.name).glob("*.*.*"), reverse=True)
    return [v for v in versions if all(any(v.glob(f"*-{s}.array_record*")) for s in idx_set.counts)]


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


def _prepare(idx_set: IdxSet, root: Path, patience: float) -> None:
    """Downloads the IDX files and writes them as a tfds data set, without TensorFlow."""
    # Without this test, a tfds download with no network fails only after 205 s of retries.
    if not _reachable(f"{idx_set.url}{idx_set.files('test')[1]}", patience):
        installed = f", no IDX files in {idx_set.installed}" if idx_set.installed else ""
        raise UnavailableError(
            f"{idx_set.name}: got no array_record data set {idx_set.name}/* under {root}{installed} and no "
            f"answer from {idx_set.url} within {patience:g} s; expected one of them; set TFDS_DATA_DIR or "
            f"data_dir to a prepared data set, connect to the network, {idx_set.remedy}."
        )
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.image_classification import mnist

    base: type[mnist.MNIST] = getattr(mnist, idx_set.builder)

    class IdxBuilder(base, skip_registration=True):
        name = idx_set.name
        url_infos = base.url_infos

        def _split_generators(self, dl_manager: Any) -> Any:
            urls = {s: [f"{idx_set.url}{name}" for name in idx_set.files(s)] for s in idx_set.counts}
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
        builder = IdxBuilder(data_dir=root)
        builder.download_and_prepare(download_config=config, file_format="array_record")
    # tfds reports a failed download with classes of its own, which it does not export.
    except Exception as error:
        raise UnavailableError(f"{idx_set.name}: preparing it in {root} failed: {error}") from error


def _read_idx(path: str | os.PathLike[str], header: int) -> np.ndarray:
    """Reads the images (header of 16 bytes) or the labels (8 bytes) of an IDX file."""
    values = np.frombuffer(gzip.decompress(Path(path).read_bytes()), np.uint8, offset=header)
    return values.reshape(-1, *SHAPE) if header == 16 else values


def _cached(idx_set: IdxSet, prepared: Path, cache: Path) -> dict[str, np.ndarray]:
    """The decoded arrays of a prepared data set, from the cache if it holds them intact."""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(prepared.iterdir())]
    key = hashlib.sha256(repr(("layout 1", files)).encode()).hexdigest()[:16]
    path = cache / f"{idx_set.name}-{prepared.name}-{key}.npz"
    remedy = "delete the prepared data set so that it is prepared again"
    if path.exists():
        try:
            with path.open("rb") as file, np.load(file) as stored:
                arrays = {name: stored[name] for name in stored.files}
            _check_counts(idx_set, arrays, remedy)
            return arrays
        except _CORRUPT as error:
            logger.warning("%s: rebuilding the corrupt cache %s (%s)", idx_set.name, path, error)
    arrays = _decode(idx_set, prepared)
    _check_counts(idx_set, arrays, remedy)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            np.savez(Path(scratch, path.name), **arrays)  # pyright: ignore[reportArgumentType]
            Path(scratch, path.name).replace(path)
    except OSError as error:
        logger.warning("%s: cannot keep decoded images in %s (%s)", idx_set.name, cache, error)
    return arrays


def _decode(idx_set: IdxSet, prepared: Path) -> dict[str, np.ndarray]:
    import tensorflow_datasets as tfds

    arrays = {}
    for split in idx_set.counts:
        builder: Any = tfds.builder_from_directory(prepared)
        records = builder.as_data_source(split)
        rows = list(tqdm(records, f"decoding {idx_set.title} {split}", disable=None))
        arrays[f"{split}_images"] = np.stack([row["image"] for row in rows])
        arrays[f"{split}_labels"] = np.array([row["label"] for row in rows], np.int32)
    return arrays


def _check_counts(idx_set: IdxSet, arrays: dict[str, np.ndarray], remedy: str) -> None:
    for split, count in idx_set.counts.items():
        check_images(arrays[f"{split}_images"], arrays[f"{split}_labels"])
        if len(arrays[f"{split}_labels"]) != count:
            raise ValueError(
                f"{idx_set.name}: got {len(arrays[f'{split}_labels'])} images in split {split!r}; expected "
                f"{count}; {remedy}."
            )
