"""Application metrics of an autoencoder: is the image still good, is the latent still useful?"""

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

__all__ = ["knn_accuracy", "linear_accuracy", "probe_accuracy", "psnr", "ssim", "worst_class_psnr"]

_CHUNK = 512


def psnr(
    images: Float[ArrayLike, "*images"],
    reference: Float[ArrayLike, "*reference"],
    peak: float = 1.0,
) -> Float[Array, ""]:
    """Peak signal-to-noise ratio, `10 log10(peak^2 / mean squared error)`, in dB.

    The error is averaged over all elements before the logarithm: the figure of a data set is that
    of its mean error, not the mean of its images' figures.
    Can be jitted, vmapped and differentiated.

    Args:
      images: any shape, floating.
      reference: the same shape.
      peak: the largest possible pixel value.

    Returns:
      A scalar; infinite (and without a gradient) for equal images.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> round(float(psnr(jnp.full((2, 3), 0.5), jnp.full((2, 3), 0.6))), 3)
      20.0
    """
    images, reference = _pair("psnr", images, reference)
    return 10.0 * jnp.log10(peak**2 / jnp.mean(jnp.square(images - reference)))


def worst_class_psnr(
    images: Float[ArrayLike, "n *image"],
    reference: Float[ArrayLike, "n *image"],
    labels: Int[ArrayLike, " m"],
    classes: int,
    peak: float = 1.0,
) -> Float[Array, ""]:
    """Peak signal-to-noise ratio of the class that is reconstructed worst, in dB.

    A mean over all images hides a class that a small model gave up. Can be jitted, vmapped and
    differentiated (by the worst class alone).

    Args:
      images: (n, ...), floating.
      reference: the same shape.
      labels: (n,), integer, in [0, classes).
      classes: how many there are; those without an image are passed over.
      peak: the largest possible pixel value.

    Returns:
      A scalar: the smallest of the classes' figures, each that of its mean error.

    Raises:
      ValueError: if the shapes differ, or there is not one label an image.
    """
    images, reference = _pair("worst_class_psnr", images, reference)
    labels = jnp.asarray(labels)
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"worst_class_psnr: got labels of shape {labels.shape} for images of shape {images.shape}; "
            "expected one an image; take both from the same batch."
        )
    errors = jnp.mean(jnp.square(images - reference).reshape(len(labels), -1), axis=1)
    total = jax.ops.segment_sum(errors, labels, classes)
    count = jax.ops.segment_sum(jnp.ones_like(errors), labels, classes)
    return 10.0 * jnp.log10(peak**2 / jnp.max(total / jnp.maximum(count, 1)))


def ssim(images: Float[ArrayLike, "*images"], reference: Float[ArrayLike, "*reference"]) -> Float[Array, ""]:
    """Mean structural similarity, window gaussian 11x11 with sigma 1.5, without unit, at most 1.

    Can be jitted, vmapped and differentiated.

    Args:
      images: (B, H, W, C) in [0, 1], floating, H and W at least 11.
      reference: the same shape.

    Returns:
      A scalar, the mean over images and channels.

    Raises:
      ValueError: if the shapes differ or are not as above.

    References:
      Wang, Bovik, Sheikh, Simoncelli: Image quality assessment: from error visibility to structural
      similarity. IEEE Transactions on Image Processing 13 (4), 2004.
    """
    images, reference = _pair("ssim", images, reference)
    if images.ndim != 4 or min(images.shape[1:3]) < 11:
        raise ValueError(
            f"ssim: got images of shape {images.shape}; expected (B, H, W, C) with H and W at "
            "least 11; add missing axes, or pad the images."
        )
    # dm_pix annotates with chex.Array, which is wider than what it passes to the filter.
    values = dm_pix.ssim(
        images,
        reference,
        filter_fn=_gaussian_window,  # pyright: ignore[reportArgumentType]
    )
    return jnp.mean(values)


def _gaussian_window(images: Array) -> Array:
    # dm_pix filters by convolutions, which XLA runs slowly on the CPU; two products do the same.
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights /= weights.sum()

    def band(size: int) -> Array:
        rows = [np.pad(weights, (start, size - 11 - start)) for start in range(size - 10)]
        return jnp.asarray(np.stack(rows), images.dtype)

    height, width = images.shape[-3:-1]
    # Variances are small differences of these means: reduced precision on an accelerator shows.
    return jnp.einsum(
        "yh,...hwc,xw->...yxc",
        band(height),
        images,
        band(width),
        precision=lax.Precision.HIGHEST,
    )


def knn_accuracy(
    latent: Float[ArrayLike, "n d"], labels: Int[ArrayLike, " m"], k: int = 5
) -> Float[Array, ""]:
    """Leave-one-out accuracy of k-nearest-neighbour classification (Euclidean distance).

    Each point is classified by the vote of its k nearest others, a tie going to the smallest label.
    Runs on the device in chunks of queries (memory 512 n, not n^2). Can be jitted and vmapped; the
    accuracy is piecewise constant, so its gradient is zero.

    Args:
      latent: (n, d), floating.
      labels: (n,), integer.
      k: neighbours that vote, less than n.

    Returns:
      A scalar in [0, 1], float32.

    Raises:
      ValueError: if there is not one label a point, or k is not in [1, n - 1].
    """
    latent, labels = jnp.asarray(latent, jnp.float32), jnp.asarray(labels)
    count = latent.shape[0]
    if labels.shape != (count,):
        raise ValueError(
            f"knn_accuracy: got labels of shape {labels.shape} for {count} points; expected one a "
            "point; take both from the same batch."
        )
    if not 1 <= k < count:
        raise ValueError(
            f"knn_accuracy: got k={k} for {count} points; expected 1 <= k <= {count - 1}; lower k "
            "or pass more points."
        )
    # Distances are differences of squared norms: centred points lose fewer digits.
    latent = latent - jnp.mean(latent, axis=0, keepdims=True)
    norms = jnp.sum(jnp.square(latent), axis=1)

    def predict(index: Array) -> Array:
        products = jnp.dot(latent, latent[index], precision=lax.Precision.HIGHEST)
        nearness = jnp.where(jnp.arange(count) == index, -jnp.inf, 2.0 * products - norms)
        _, neighbours = lax.top_k(nearness, k)
        votes = labels[neighbours]
        counts = jnp.sum(votes[:, None] == votes[None, :], axis=1)
        none = jnp.iinfo(votes.dtype).max
        return jnp.min(jnp.where(counts == jnp.max(counts), votes, none))

    predicted = lax.map(predict, jnp.arange(count), batch_size=min(_CHUNK, count))
    return jnp.mean(predicted == labels, dtype=jnp.float32)


def linear_accuracy(
    latent: Float[ArrayLike, "n d"], labels: Int[ArrayLike, " m"], classes: int, ridge: float = 1e-3
) -> Float[Array, ""]:
    """Accuracy of a linear classifier of latents, fitted to every other point, on the points between.

    Ridge regression onto the classes' indicators, in closed form: unlike `probe_accuracy` it can be jitted
    and vmapped, so it can be a criterion. Latents are standardised.

    Args:
      latent: (n, d), floating, in an order that is random in the labels.
      labels: (n,), integer, in [0, classes).
      classes: how many there are.
      ridge: added to the variances (which are one).

    Returns:
      A scalar in [0, 1], float32.

    Raises:
      ValueError: if there is not one label a point.
    """
    latent, labels = jnp.asarray(latent, jnp.float32), jnp.asarray(labels)
    if labels.shape != latent.shape[:1]:
        raise ValueError(
            f"linear_accuracy: got labels of shape {labels.shape} for {latent.shape[0]} points; expected one "
            "a point; take both from the same batch."
        )
    fitted, tested = latent[::2], latent[1::2]
    mean, spread = fitted.mean(0), fitted.std(0)
    fitted, tested = ((x - mean) / jnp.where(spread == 0, 1.0, spread) for x in (fitted, tested))
    targets = jax.nn.one_hot(labels[::2], classes) - 1 / classes
    offset = targets.mean(0)
    gram = jnp.dot(fitted.T, fitted, precision=lax.Precision.HIGHEST) / len(fitted)
    cross = jnp.dot(fitted.T, targets - offset, precision=lax.Precision.HIGHEST) / len(fitted)
    weights = jnp.linalg.solve(gram + ridge * jnp.eye(len(gram)), cross)
    return jnp.mean(jnp.argmax(tested @ weights + offset, 1) == labels[1::2], dtype=jnp.float32)


def probe_accuracy(
    train_latent: Float[ArrayLike, "n d"],
    train_labels: Int[ArrayLike, " n"],
    test_latent: Float[ArrayLike, "m d"],
    test_labels: Int[ArrayLike, " m"],
) -> float:
    """Test accuracy of a linear probe: logistic regression on standardised latents.

    Fitted on the host by scikit-learn: it can be neither jitted nor differentiated. Standardising
    makes the figure independent of the scale of each latent, which training leaves free.

    Args:
      train_latent: (n, d), floating.
      train_labels: (n,), integer, at least two classes.
      test_latent: (m, d), floating.
      test_labels: (m,), integer.

    Returns:
      A fraction in [0, 1].

    Raises:
      ValueError: if the latents are not finite or sizes differ (from scikit-learn).

    References:
      Alain, Bengio: Understanding intermediate layers using linear classifier probes.
      arXiv 1610.01644.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(np.asarray(train_latent), np.asarray(train_labels))
    return float(probe.score(np.asarray(test_latent), np.asarray(test_labels)))


def _pair(function: str, images: ArrayLike, reference: ArrayLike) -> tuple[Array, Array]:
    images, reference = jnp.asarray(images), jnp.asarray(reference)
    if images.shape != reference.shape:
        raise ValueError(
            f"{function}: got shapes {images.shape} and {reference.shape}; expected equal ones; "
            "compare each image with its own reference."
        )
    if not (jnp.issubdtype(images.dtype, jnp.floating) and jnp.issubdtype(reference.dtype, jnp.floating)):
        raise ValueError(
            f"{function}: got {images.dtype} and {reference.dtype}, expected floating-point images; convert "
            "them, e.g. with x.astype(float) / 255."
        )
    # Sums over many small numbers are not for half precision.
    dtype = jnp.promote_types(jnp.promote_types(images.dtype, reference.dtype), jnp.float32)
    return images.astype(dtype), reference.astype(dtype)
