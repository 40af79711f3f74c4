"""Figures of the MNIST experiments: images before and after, pixels at the boundary, the latent space."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from compaware_jax.report import STYLE, WIDTH

CLASS_COLOURS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]


def images_figure(rows: Mapping[str, np.ndarray]) -> Figure:
    """Images in rows.

    Args:
      rows: per row its name and images, shape (n, 28, 28, 1), in [0, 1]; n is the same for all.

    Returns:
      The figure.
    """
    count = len(next(iter(rows.values())))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(len(rows), 1, figsize=(WIDTH, 0.95 * len(rows)))
        for axes, (name, images) in zip(np.atleast_1d(grid), rows.items(), strict=True):
            strip = np.pad(images[..., 0], ((0, 0), (1, 1), (1, 1)), constant_values=1.0)
            axes.imshow(np.concatenate(list(strip), axis=1), cmap="gray", vmin=0, vmax=1)
            axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        figure.suptitle(f"{count} held-out images, one of each class", fontsize=10)
    return figure


def boundary_figure(maps: Mapping[str, np.ndarray], mean: np.ndarray) -> Figure:
    """Which pixels, or larger squares, a model reads and writes, over the mean image.

    Args:
      maps: per map its name and whether each place is in it, shape (side, side); the side divides 28.
      mean: the mean image, shape (28, 28), in [0, 1].

    Returns:
      The figure.
    """
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(maps), figsize=(WIDTH, 3.2), squeeze=False)
        for axes, (name, inside) in zip(grid[0], maps.items(), strict=True):
            axes.imshow(mean, cmap="gray_r", vmin=0, vmax=1)
            rows, columns = np.nonzero(np.kron(inside, np.ones((28 // len(inside),) * 2)))
            axes.scatter(columns, rows, s=9, marker="s", lw=0, alpha=0.6)
            axes.set_title(f"{name}: {int(inside.sum())} of {inside.size}", fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
    return figure


def latent_figure(latents: Mapping[str, np.ndarray], labels: np.ndarray) -> Figure:
    """The latent spaces, each on its first two principal components.

    Args:
      latents: per model its latents, shape (n, its latent size).
      labels: shape (n,), 0 to 9.

    Returns:
      The figure.
    """
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(latents), figsize=(WIDTH, 3.9), squeeze=False)
        for axes, (name, latent) in zip(grid[0], latents.items(), strict=True):
            pca = PCA(2, random_state=0).fit(latent)
            points = pca.transform(latent)
            for label in range(10):
                here = points[labels == label]
                axes.scatter(*here.T, s=7, color=CLASS_COLOURS[label], label=str(label), lw=0)
            explained = pca.explained_variance_ratio_.sum()
            axes.set_title(
                f"{name}: {latent.shape[1]} dimensions,\n2 components hold {explained:.0%}",
                fontsize=10,
            )
            axes.set_xticks([])
            axes.set_yticks([])
        handles, names = grid[0][0].get_legend_handles_labels()
        figure.legend(
            handles, names, ncols=10, fontsize=9, loc="outside lower center", markerscale=2,
            handletextpad=0.1, columnspacing=1.0,
        )  # fmt: skip
    return figure
