"""Data sets in files: preparing, cache, no network. No test needs a network or TensorFlow."""

import contextlib
import dataclasses
import functools
import gzip
import http.server
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from compaware_jax import data
from compaware_jax.data import files, sources

SMALL = {"train": 120, "test": 30}


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def change(monkeypatch):
    """Changes what is known of both data sets."""
    monkeypatch.setenv("NO_PROXY", "*")

    def change(**fields):
        for name in ("MNIST", "FASHION_MNIST"):
            monkeypatch.setattr(sources, name, dataclasses.replace(getattr(sources, name), **fields))

    return change


@pytest.fixture
def no_network(change):
    change(url=f"http://127.0.0.1:{closed_port()}/", installed=None)


def random_digits(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(seed)
    images = random.randint(0, 256, (count, 28, 28, 1)).astype(np.uint8)
    return images, (np.arange(count) % 10).astype(np.uint8)


def write_idx(folder: Path) -> None:
    for seed, (split, name) in enumerate({"train": "train", "test": "t10k"}.items()):
        images, labels = random_digits(SMALL[split], seed)
        for kind, header, values in (
            ("images-idx3", [2051, *images.shape[:3]], images),
            ("labels-idx1", [2049, len(labels)], labels),
        ):
            content = np.array(header, ">i4").tobytes() + values.tobytes()
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@contextlib.contextmanager
def served(folder: Path):
    handler = functools.partial(Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def small_mnist(tmp_path, change):
    """IDX files of a few random images at the place of the official ones."""
    source = tmp_path / "idx"
    source.mkdir()
    write_idx(source)
    with served(source) as url:
        change(url=url, counts=SMALL, installed=None)
        yield tmp_path


def in_order(images: np.ndarray, labels: np.ndarray) -> list[tuple[bytes, int]]:
    return sorted((i.tobytes(), int(n)) for i, n in zip(images, labels, strict=True))


def everything(digits: data.ImageSet) -> list[data.Split]:
    return [digits.train, digits.valid, digits.test]


def test_prepares_from_idx_files_and_reads_back_the_same(small_mnist):
    digits = data.mnist("tfds", data_dir=small_mnist / "tfds", cache_dir=small_mnist / "cache")
    assert digits.source == "tfds"
    assert "110 train" in digits.note
    assert "10 valid" in digits.note
    assert "30 test" in digits.note
    assert list((small_mnist / "tfds" / "mnist" / "3.0.1").glob("*.array_record*"))
    learned = [
        np.concatenate([getattr(digits.train, field), getattr(digits.valid, field)])
        for field in ("images", "labels")
    ]
    assert in_order(*learned) == in_order(*random_digits(120, seed=0))
    assert in_order(digits.test.images, digits.test.labels) == in_order(*random_digits(30, seed=1))
    np.testing.assert_array_equal(np.bincount(digits.valid.labels), np.ones(10))


def test_a_prepared_set_needs_no_network(small_mnist, change, monkeypatch):
    folders = {"data_dir": small_mnist / "tfds", "cache_dir": small_mnist / "cache"}
    first = data.mnist("tfds", **folders)
    change(url=f"http://127.0.0.1:{closed_port()}/")
    monkeypatch.setenv("TFDS_DATA_DIR", str(folders["data_dir"]))
    again = data.mnist("auto", cache_dir=small_mnist / "other")
    for a, b in zip(everything(first), everything(again), strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)


def test_a_set_prepared_as_tfrecord_does_not_block(small_mnist):
    blocked = small_mnist / "tfds" / "mnist" / "3.0.1"
    blocked.mkdir(parents=True)
    (blocked / "mnist-train.tfrecord-00000-of-00001").write_bytes(b"")
    digits = data.mnist("tfds", data_dir=small_mnist / "tfds", cache_dir=small_mnist / "cache")
    assert len(digits.test.labels) == 30
    assert list((small_mnist / "cache" / "tfds" / "mnist").glob("*/*.array_record*"))


def test_cache_is_used_and_a_corrupt_one_is_rebuilt(small_mnist, monkeypatch, caplog):
    folders = {"data_dir": small_mnist / "tfds", "cache_dir": small_mnist / "cache"}
    first = data.mnist("tfds", **folders)
    (cached,) = (small_mnist / "cache").glob("*.npz")
    intact = cached.read_bytes()

    def no_decoding(*arguments):
        raise AssertionError("decoded although cached")

    with monkeypatch.context() as patched:
        patched.setattr(files, "_decode", no_decoding)
        assert data.mnist("tfds", **folders).note == first.note

    flipped = bytearray(intact)
    flipped[len(intact) // 2] ^= 255
    other = small_mnist / "other.npz"
    np.savez(other, train_images=np.zeros((3, 28, 28, 1), np.uint8))
    for content in (intact[: len(intact) // 2], bytes(flipped), b"", other.read_bytes()):
        cached.write_bytes(content)
        caplog.clear()
        again = data.mnist("tfds", **folders)
        assert "rebuilding the corrupt cache" in caplog.text
        np.testing.assert_array_equal(again.train.images, first.train.images)
        assert len(cached.read_bytes()) == len(intact)
    assert [f.name for f in (small_mnist / "cache").iterdir()] == [cached.name]


def test_a_cache_that_cannot_be_written_is_no_obstacle(small_mnist, caplog):
    (small_mnist / "file").write_bytes(b"")
    folders = {"data_dir": small_mnist / "tfds", "cache_dir": small_mnist / "file"}
    assert len(data.mnist("tfds", **folders).test.labels) == 30
    assert "cannot keep decoded images" in caplog.text


def test_a_set_of_the_wrong_size_is_refused(small_mnist, change):
    folders = {"data_dir": small_mnist / "tfds", "cache_dir": small_mnist / "cache"}
    change(counts={"train": 120, "test": 31})
    with pytest.raises(ValueError, match=r"mnist: got 30 images in split 'test'; expected 31"):
        data.mnist("tfds", **folders)


def test_falls_back_fast_and_loudly(no_network, tmp_path, caplog):
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        digits = data.mnist("auto", data_dir=tmp_path / "none", cache_dir=tmp_path / "cache")
    assert time.perf_counter() - start < 3
    assert digits.source == "embedded"
    assert "EMBEDDED DATA" in digits.note
    assert "neither prepared nor" in digits.note
    assert digits.note in caplog.text
    assert str(tmp_path / "none") in caplog.text
    assert str(tmp_path) not in digits.note, "a note goes into reports: no local paths"


def test_a_silent_host_is_given_up_in_time(change, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        change(url=f"http://127.0.0.1:{listener.getsockname()[1]}/")
        start = time.perf_counter()
        digits = data.mnist("auto", data_dir=tmp_path, cache_dir=tmp_path)
        assert time.perf_counter() - start < 3
    assert digits.source == "embedded"


def test_the_full_set_asked_for_and_absent_is_an_error(no_network, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)mnist: got no array_record.*set TFDS_DATA_DIR"):
        data.mnist("tfds", data_dir=tmp_path, cache_dir=tmp_path)


def test_neither_tensorflow_nor_slow_packages_are_imported(small_mnist):
    data.mnist("tfds", data_dir=small_mnist / "tfds", cache_dir=small_mnist / "cache")
    program = f"""
import dataclasses, sys
from compaware_jax import data
from compaware_jax.data import sources
slow = ("tensorflow", "tensorflow_datasets", "mlxtend", "pandas", "sklearn")
assert not [m for m in slow if m in sys.modules], "importing data"
sources.MNIST = dataclasses.replace(sources.MNIST, counts={SMALL})
data.mnist("embedded")
assert "pandas" not in sys.modules and "sklearn" not in sys.modules, "embedded"
data.mnist("tfds", data_dir=sys.argv[1], cache_dir=sys.argv[2])
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules, "tfds"
"""
    folders = [str(small_mnist / "tfds"), str(small_mnist / "new")]
    run = subprocess.run(
        [sys.executable, "-c", program, *folders],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(data.__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr


def same_splits(one: data.ImageSet, other: data.ImageSet) -> bool:
    pairs = list(zip(everything(one), everything(other), strict=True))
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for a, b in pairs for f in ("images", "labels"))


def test_fashion_mnist_is_the_same_from_every_source(small_mnist, change):
    folders = {"data_dir": small_mnist / "tfds", "cache_dir": small_mnist / "cache"}
    downloaded = data.fashion_mnist(**folders)
    assert downloaded.source == "fashion"
    assert downloaded.note.startswith(
        "full Fashion-MNIST (tensorflow-datasets fashion_mnist/3.0.1): 110 train and 10 valid"
    )
    assert list((small_mnist / "tfds" / "fashion_mnist" / "3.0.1").glob("*.array_record*"))
    assert [f.name[:20] for f in (small_mnist / "cache").iterdir()] == ["fashion_mnist-3.0.1-"]
    assert in_order(downloaded.test.images, downloaded.test.labels) == in_order(*random_digits(30, seed=1))

    change(url=f"http://127.0.0.1:{closed_port()}/", installed=small_mnist / "idx")
    installed = data.fashion_mnist(data_dir=small_mnist / "none", cache_dir=small_mnist / "none")
    assert installed.note.startswith("full Fashion-MNIST (IDX files): 110 train and 10 valid")
    assert same_splits(installed, downloaded)
    assert not (small_mnist / "none").exists(), "reading IDX files writes nothing"
    assert data.fashion_mnist(**folders).note == downloaded.note, "a prepared set comes first"

    change(installed=None)
    named = data.fashion_mnist(idx_dir=small_mnist / "idx", **folders)
    assert named.note == installed.note, "a folder that is given is read"
    assert same_splits(named, downloaded)


def test_installed_files_are_passed_over_where_one_is_missing(small_mnist, change):
    (small_mnist / "half").mkdir()
    (small_mnist / "half" / "train-images-idx3-ubyte.gz").write_bytes(b"")
    change(installed=small_mnist / "half")
    found = data.fashion_mnist(data_dir=small_mnist / "tfds", cache_dir=small_mnist / "cache")
    assert "tensorflow-datasets" in found.note


def test_fashion_mnist_out_of_reach_is_an_error(no_network, change, tmp_path):
    change(installed=tmp_path / "debian")
    with pytest.raises(RuntimeError) as raised:
        data.fashion_mnist(data_dir=tmp_path, cache_dir=tmp_path)
    message = str(raised.value)
    assert message.startswith("fashion_mnist: got no array_record data set fashion_mnist/* under")
    assert f"no IDX files in {tmp_path / 'debian'}" in message
    for remedy in ("TFDS_DATA_DIR", "connect to the network", "package dataset-fashion-mnist", "as idx_dir"):
        assert remedy in message
    assert "embedded" not in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t10k-labels-idx1-ubyte.gz", None, "without t10k-labels-idx1-ubyte.gz; expected the four gzipped"),
        ("t10k-images-idx3-ubyte.gz", b"no gzip", "got broken files in .*; fetch them again"),
        (
            "t10k-images-idx3-ubyte.gz",
            gzip.compress(bytes(16 + 783), mtime=0),
            "got broken files in .*reshape",
        ),
        (
            "t10k-images-idx3-ubyte.gz",
            gzip.compress(bytes(16 + 784), mtime=0),
            "got labels of shape .* for 1 images",
        ),
    ],
)
def test_idx_files_that_are_missing_or_broken_are_refused(small_mnist, name, content, message):
    file = small_mnist / "idx" / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.fashion_mnist(idx_dir=small_mnist / "idx")


def test_idx_files_of_the_wrong_size_are_refused(small_mnist, change):
    change(counts={"train": 120, "test": 31})
    with pytest.raises(ValueError, match=r"fashion_mnist: got 30 images in split 'test'; .*IDX files again"):
        data.fashion_mnist(idx_dir=small_mnist / "idx")


@pytest.mark.full_data
def test_full_set_where_it_is_prepared():
    folder = os.environ.get("TFDS_DATA_DIR")
    if not folder or not list(Path(folder, "mnist").glob("*/*.array_record*")):
        pytest.skip("TFDS_DATA_DIR names no directory with MNIST prepared as array_record")
    digits = data.mnist("tfds")
    assert [len(s.labels) for s in everything(digits)] == [55_000, 5_000, 10_000]
    assert np.bincount(digits.test.labels).tolist() == [
        *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    ]
    share = np.bincount(digits.valid.labels) / np.bincount(digits.train.labels)
    np.testing.assert_allclose(share, 1 / 11, atol=2e-4)
    # Every embedded digit is one of the training part: same data, up to the last grey level.
    assert abs(digits.train.images.mean() - 33.3) < 0.3


@pytest.mark.full_data
def test_full_fashion_mnist_where_it_is_at_hand():
    prepared = list(Path(os.environ.get("TFDS_DATA_DIR", ""), "fashion_mnist").glob("*/*.array_record*"))
    if not prepared and not sources.FASHION_MNIST.installed.exists():
        pytest.skip("Fashion-MNIST is neither prepared in TFDS_DATA_DIR nor installed as Debian's package")
    found = data.fashion_mnist()
    for split, count in zip(everything(found), (5_500, 500, 1_000), strict=True):
        np.testing.assert_array_equal(np.bincount(split.labels), np.full(10, count))
    # Mean and standard deviation of the official training part, of which the valid split is a twelfth.
    assert abs(found.train.images.mean() / 255 - 0.2860) < 1e-3
    assert abs(found.train.images.std() / 255 - 0.3530) < 1e-3
