"""Application metrics against scikit-image and scikit-learn, and under transformations."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from compaware_jax import metrics
from compaware_jax.metrics import knn_accuracy, linear_accuracy, probe_accuracy, psnr, ssim, worst_class_psnr


def pictures(channels: int = 1, count: int = 4) -> tuple[jax.Array, jax.Array]:
    random = np.random.RandomState(0)
    coarse = random.rand(count, 7, 8, channels)
    images = np.kron(coarse, np.ones((1, 4, 4, 1)))
    noisy = np.clip(images + 0.1 * random.randn(*images.shape), 0, 1)
    return jnp.asarray(noisy, jnp.float32), jnp.asarray(images, jnp.float32)


def test_psnr_is_the_reference_value():
    noisy, clean = pictures()
    expected = peak_signal_noise_ratio(np.asarray(clean), np.asarray(noisy), data_range=1.0)
    np.testing.assert_allclose(psnr(noisy, clean), expected, rtol=1e-5)
    np.testing.assert_allclose(psnr(255 * noisy, 255 * clean, peak=255.0), expected, rtol=1e-5)
    assert np.isposinf(psnr(clean, clean))


def test_psnr_is_of_the_mean_error():
    reference = jnp.zeros((2, 3), jnp.float32)
    images = jnp.asarray([[0.1] * 3, [0.3] * 3], jnp.float32)
    np.testing.assert_allclose(psnr(images, reference), -10 * np.log10(0.05), rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_the_reference_value(channels):
    noisy, clean = pictures(channels)
    expected = [
        structural_similarity(
            np.asarray(a, np.float64),
            np.asarray(b, np.float64),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=-1,
        )
        for a, b in zip(noisy, clean, strict=True)
    ]
    assert 0.3 < np.mean(expected) < 0.95
    np.testing.assert_allclose(ssim(noisy, clean), np.mean(expected), atol=2e-5)
    np.testing.assert_allclose(ssim(clean, clean), 1.0, atol=1e-6)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_jit_vmap_grad(metric):
    noisy, clean = pictures()
    value = metric(noisy, clean)
    assert value.shape == ()
    assert value.dtype == jnp.float32
    compiled = jax.jit(metric)
    np.testing.assert_allclose(compiled(noisy, clean), value, rtol=1e-5)
    worse = clean + 2 * (noisy - clean)
    both = jax.jit(jax.vmap(metric, in_axes=(0, None)))(jnp.stack([noisy, worse]), clean)
    np.testing.assert_allclose(both, [value, compiled(worse, clean)], rtol=1e-5)
    assert both[1] < both[0]
    slope = jax.jit(jax.grad(metric))(noisy, clean)
    assert np.all(np.isfinite(slope))
    step = 1e-2 * slope / jnp.linalg.norm(slope)
    rise = (compiled(noisy + step, clean) - compiled(noisy - step, clean)) / 2
    np.testing.assert_allclose(rise, jnp.vdot(slope, step), rtol=0.03)


def test_ssim_gradient_is_finite_on_blank_images():
    blank = jnp.zeros((2, 12, 12, 1), jnp.float32)
    assert np.all(np.isfinite(jax.jit(jax.grad(ssim))(blank, blank)))


def test_image_metrics_refuse_mismatches():
    noisy, clean = pictures()
    with pytest.raises(ValueError, match=r"psnr: got shapes \(4, 28, 32, 1\) and \(3, 28, 32, 1\)"):
        psnr(noisy, clean[:3])
    with pytest.raises(ValueError, match="ssim: got shapes"):
        ssim(noisy, clean[..., 0])
    with pytest.raises(ValueError, match=r"ssim: got images of shape \(4, 28, 10, 1\)"):
        ssim(noisy[:, :, :10], clean[:, :, :10])
    with pytest.raises(ValueError, match=r"ssim: got images of shape \(28, 32, 1\)"):
        ssim(noisy[0], clean[0])


def clusters(count: int, classes: int = 5, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(1)
    centres = random.randn(classes, 8)
    labels = random.randint(0, classes, count)
    latent = centres[labels] + spread * random.randn(count, 8)
    # Far from the origin: squared norms must not swallow the distances.
    return (latent + 50).astype(np.float32), (3 * labels - 4).astype(np.int32)


@functools.cache
def leave_one_out(k: int) -> float:
    latent, labels = clusters(100)
    points, hits = latent.astype(np.float64), []
    for left_out in range(len(points)):
        others = np.arange(len(points)) != left_out
        # The tree is exact as well, and skips the look for threading libraries at each fit.
        model = KNeighborsClassifier(k, algorithm="kd_tree").fit(points[others], labels[others])
        hits.append(model.predict(points[[left_out]])[0] == labels[left_out])
    return float(np.mean(hits))


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("chunk", [32, 512])
def test_knn_is_leave_one_out_of_scikit_learn(k, chunk, monkeypatch):
    latent, labels = clusters(100)
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    expected = leave_one_out(k)
    assert 0.3 < expected < 0.95
    assert float(knn_accuracy(latent, labels, k)) == pytest.approx(expected, abs=1e-6)


def test_knn_does_not_count_the_point_itself():
    latent = jnp.arange(6, dtype=jnp.float32)[:, None]
    assert float(knn_accuracy(latent, jnp.arange(6), k=1)) == 0.0


def test_knn_under_transformations():
    latent, labels = clusters(100)
    wide, _ = clusters(100, spread=3.0)
    value = jax.jit(lambda z: knn_accuracy(z, labels))(latent)
    assert value.dtype == jnp.float32
    both = jax.jit(jax.vmap(lambda z: knn_accuracy(z, labels)))(jnp.stack([latent, wide]))
    np.testing.assert_allclose(both, [value, knn_accuracy(wide, labels)], atol=1e-6)
    assert both[1] < both[0]
    slope = jax.jit(jax.grad(lambda z: knn_accuracy(z, labels)))(latent)
    np.testing.assert_array_equal(slope, 0.0)


def test_knn_memory_is_linear_in_points():
    latent = jax.ShapeDtypeStruct((10_000, 32), jnp.float32)
    labels = jax.ShapeDtypeStruct((10_000,), jnp.int32)
    analysis = jax.jit(knn_accuracy).lower(latent, labels).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 10_000 * 10_000 * 4 / 4


def test_knn_refusals():
    latent, labels = clusters(10)
    with pytest.raises(ValueError, match="knn_accuracy: got k=10 for 10 points; expected 1 <= k"):
        knn_accuracy(latent, labels, k=10)
    with pytest.raises(ValueError, match="knn_accuracy: got k=0"):
        knn_accuracy(latent, labels, k=0)
    with pytest.raises(ValueError, match=r"got labels of shape \(9,\) for 10 points"):
        knn_accuracy(latent, labels[:9])


def test_probe_reads_linear_structure_only():
    latent, labels = clusters(400, spread=0.3)
    accuracy = probe_accuracy(latent[:300], labels[:300], latent[300:], labels[300:])
    assert isinstance(accuracy, float)
    assert accuracy > 0.97
    scaled = latent * np.logspace(-3, 3, 8, dtype=np.float32)
    again = probe_accuracy(scaled[:300], labels[:300], scaled[300:], labels[300:])
    assert again == pytest.approx(accuracy, abs=0.02)
    random = np.random.RandomState(0)
    plane = random.randn(600, 2).astype(np.float32)
    parity = (plane[:, 0] * plane[:, 1] > 0).astype(np.int32)
    assert probe_accuracy(plane[:400], parity[:400], plane[400:], parity[400:]) < 0.7


def test_probe_takes_device_arrays():
    latent, labels = map(jnp.asarray, clusters(60, classes=2, spread=0.2))
    assert probe_accuracy(latent, labels, latent, labels) == 1.0


def test_worst_class_psnr_is_that_of_the_worst_class():
    noisy, clean = pictures()
    labels = jnp.array([0, 3, 3, 0])
    each = [float(psnr(noisy[labels == c], clean[labels == c])) for c in (0, 3)]
    got = jax.jit(worst_class_psnr, static_argnums=3)(noisy, clean, labels, 5)
    np.testing.assert_allclose(got, min(each), rtol=1e-5)
    slope = jax.grad(worst_class_psnr)(noisy, clean, labels, 5)
    touched = np.abs(np.asarray(slope)).reshape(4, -1).sum(1) > 0
    np.testing.assert_array_equal(touched, labels == (0, 3)[int(np.argmin(each))])
    with pytest.raises(ValueError, match="worst_class_psnr: got labels of shape"):
        worst_class_psnr(noisy, clean, labels[:3], 5)


def test_linear_accuracy_is_that_of_scikit_learn():
    latent, labels = clusters(400, spread=2.0)
    labels = np.unique(labels, return_inverse=True)[1].astype(np.int32)
    model = make_pipeline(StandardScaler(), RidgeClassifier(200 * 1e-3)).fit(latent[::2], labels[::2])
    expected = model.score(latent[1::2], labels[1::2])
    got = float(jax.jit(linear_accuracy, static_argnums=2)(latent, labels, 5))
    assert 0.3 < expected < 0.95
    assert got == pytest.approx(expected, abs=0.011)
    with pytest.raises(ValueError, match="linear_accuracy: got labels of shape"):
        linear_accuracy(latent, labels[:3], 5)


def test_images_of_whole_numbers_are_refused():
    """Squares of bytes would wrap around."""
    image = np.full((1, 12, 12, 1), 10, np.uint8)
    for metric in (metrics.psnr, metrics.ssim):
        with pytest.raises(ValueError, match=r"uint8 and uint8, expected floating-point"):
            # Without the annotations that tests check.
            inspect.unwrap(metric)(image, image + 32)


def test_half_precision_is_summed_in_full():
    images = jax.random.uniform(jax.random.key(0), (2000, 6)).astype(jnp.bfloat16)
    other = jax.random.uniform(jax.random.key(1), (2000, 6)).astype(jnp.bfloat16)
    labels = jnp.zeros(2000, int)
    full = metrics.worst_class_psnr(images.astype(jnp.float32), other.astype(jnp.float32), labels, 1)
    assert float(metrics.worst_class_psnr(images, other, labels, 1)) == pytest.approx(float(full), abs=1e-4)
