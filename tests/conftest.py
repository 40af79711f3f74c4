"""Test set-up: strict types and dtypes, so that what passes here passes everywhere."""

import os

# Before JAX starts: two devices' worth of threads are plenty for two test workers.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")

import jax
import matplotlib as mpl
import pytest
from jaxtyping import install_import_hook

mpl.use("Agg")
install_import_hook("compaware_jax", "beartype.beartype")


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield
