"""MNIST: splits, checks, batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compaware_jax import data
from compaware_jax.data.images import stratified


@pytest.fixture(scope="module")
def embedded():
    return data.mnist("embedded")


def everything(digits: data.ImageSet) -> list[data.Split]:
    return [digits.train, digits.valid, digits.test]


def test_unknown_source():
    with pytest.raises(ValueError, match=r"mnist: got source='kaggle'; expected 'auto', 'tfds'"):
        data.mnist("kaggle")


def test_embedded_splits_are_balanced_disjoint_and_fixed(embedded):
    for split, count in zip(everything(embedded), (400, 50, 50), strict=True):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        np.testing.assert_array_equal(np.bincount(split.labels), np.full(10, count))
        assert split.images.max() == 255
        # Shuffled: a prefix holds every class.
        assert len(set(split.labels[:100])) == 10
    pictures = [i.tobytes() for split in everything(embedded) for i in split.images]
    assert len(set(pictures)) == len(pictures) == 5000
    again = data.mnist("embedded")
    for a, b in zip(everything(embedded), everything(again), strict=True):
        np.testing.assert_array_equal(a.images, b.images)
    # Fixed across versions of numpy as well: these are the labels that 2.4 gave.
    assert embedded.test.labels[:10].tolist() == [6, 5, 3, 5, 7, 5, 7, 0, 5, 1]


def test_stratified_gives_each_class_its_share():
    labels = np.repeat([3, 5, 8], [100, 10, 7]).astype(np.int32)
    chosen, rest = stratified(labels, 12, seed=0)
    assert len(chosen) == 12
    np.testing.assert_array_equal(np.sort(np.concatenate([chosen, rest])), np.arange(117))
    # Shares of 10.26, 1.03 and 0.72.
    assert np.bincount(labels[chosen])[[3, 5, 8]].tolist() == [10, 1, 1]


IMAGES = np.zeros((4, 28, 28, 1), np.uint8)
LABELS = np.zeros(4, np.int32)
NOT_FINITE = np.zeros((4, 28, 28, 1), np.float32)
NOT_FINITE[1, 2, 3] = np.nan


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.tolist(), LABELS, "got images of type list; expected a numpy array"),
        (IMAGES, jnp.asarray(LABELS), "got labels of type ArrayImpl; expected a numpy array"),
        (IMAGES.astype(np.int32), LABELS, "got images of dtype int32; expected uint8"),
        (IMAGES[..., 0], LABELS, r"got images of shape \(4, 28, 28\); .*images\[..., None\]"),
        (IMAGES[:, :27], LABELS, r"got images of shape \(4, 27, 28, 1\)"),
        (IMAGES[:0], LABELS[:0], "got no images"),
        (IMAGES, LABELS.astype(np.int64), r"got labels of dtype int64; .*astype\(np.int32\)"),
        (IMAGES, LABELS[:3], r"got labels of shape \(3,\) for 4 images"),
        (NOT_FINITE, LABELS, "got 1 non-finite pixels"),
        (IMAGES + np.float32(200), LABELS, r"got pixels in \[200, 200\]; .*divide by"),
    ],
)
def test_check_images_says_what_is_wrong(images, labels, message):
    with pytest.raises(ValueError, match=f"check_images: {message}"):
        data.check_images(images, labels)


def test_a_split_is_checked():
    with pytest.raises(ValueError, match="check_images: got 1 non-finite pixels"):
        data.Split(NOT_FINITE, LABELS)


def test_resident_draws_by_step(embedded):
    batches = data.resident(embedded.valid, 16, jax.random.key(3))
    batch = jax.jit(batches)(jnp.int32(5))
    assert batch["image"].shape == (16, 28, 28, 1)
    assert batch["image"].dtype == jnp.float32
    assert batch["label"].shape == (16,)
    assert batch["label"].dtype == jnp.int32
    assert float(batch["image"].max()) == 1.0
    assert float(batch["image"].min()) == 0.0
    pictures = {i.tobytes(): n for i, n in zip(embedded.valid.images, embedded.valid.labels, strict=True)}
    drawn = np.asarray(batch["image"]) * 255, np.asarray(batch["label"])
    for image, label in zip(*drawn, strict=True):
        assert pictures[np.round(image).astype(np.uint8).tobytes()] == label

    stacked = jax.jit(jax.vmap(batches))(jnp.arange(4, 7))
    _, scanned = jax.lax.scan(lambda c, step: (c, batches(step)), None, jnp.arange(4, 7))
    passed = jax.jit(lambda draw, step: draw(step))(batches, 5)
    for field in ("image", "label"):
        np.testing.assert_array_equal(stacked[field][1], batch[field])
        np.testing.assert_array_equal(scanned[field], stacked[field])
        np.testing.assert_array_equal(passed[field], batch[field])
    assert not np.array_equal(stacked["image"][0], stacked["image"][1])
    other = data.resident(embedded.valid, 16, jax.random.key(4))(5)
    assert not np.array_equal(other["image"], batch["image"])


def test_resident_and_whole_take_any_arrays():
    rows = {"x": np.arange(12.0).reshape(6, 2), "y": (np.arange(6),)}
    batches = data.resident(rows, 4, jax.random.key(0))
    batch = batches(1)
    assert batch["x"].shape == (4, 2)
    np.testing.assert_array_equal(batch["x"][:, 0], 2 * batch["y"][0])
    assert not np.array_equal(batch["y"][0], batches(2)["y"][0])
    np.testing.assert_array_equal(data.whole(rows, 5)["x"], rows["x"][:5])
    for wrong in ({}, {"x": np.ones((3, 2)), "y": np.ones(4)}, np.float32(1.0), np.ones((0, 2))):
        with pytest.raises(ValueError, match="resident: got arrays of shapes"):
            data.resident(wrong, 4, jax.random.key(0))


def test_resident_takes_a_part_of_a_data_set(embedded):
    with pytest.raises(ValueError, match=r"got all of a data set; expected a part of it, such as `\.train`"):
        data.resident(embedded, 8, jax.random.key(0))


def test_resident_and_whole_refuse_no_images(embedded):
    with pytest.raises(ValueError, match="resident: got batch_size=0; expected at least 1"):
        data.resident(embedded.valid, 0, jax.random.key(0))
    with pytest.raises(ValueError, match="whole: got limit=0; expected at least 1"):
        data.whole(embedded.valid, 0)


def test_whole_is_the_split_in_float(embedded):
    batch = data.whole(embedded.test)
    assert batch["image"].dtype == jnp.float32
    assert batch["label"].dtype == jnp.int32
    np.testing.assert_allclose(batch["image"], embedded.test.images / np.float32(255), rtol=1e-6)
    np.testing.assert_array_equal(batch["label"], embedded.test.labels)
    few = data.whole(embedded.test, 7)
    np.testing.assert_array_equal(few["image"], batch["image"][:7])
    floating = data.Split(np.asarray(few["image"]), np.asarray(few["label"]))
    np.testing.assert_array_equal(data.whole(floating)["image"], few["image"])
