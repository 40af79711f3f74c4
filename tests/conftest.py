"""Test set-up: strict types and dtypes, so that what passes here passes everywhere."""

import atexit
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

# Before JAX starts: two devices, for tests of sharded arrays; all others use the first. No threads to
# compile parts of a program in, as every worker has its own programs. And no time spent to make them fast, as
# they are run a few times; where there are two ways to fuse, one takes half of the time.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_cpu_parallel_codegen_split_count=1"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)
# What one test compiled, no other compiles again: workers and what they start inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-by-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import matplotlib as mpl
import pytest
from beartype import BeartypeConf, BeartypeDecorPlace
from beartype.claw import beartype_package
from jaxtyping import install_import_hook

mpl.use("Agg")
if jax.default_backend() != "cpu":
    # There, products of float32 are of fewer bits by default; for what tests start as well.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    jax.config.update("jax_default_matmul_precision", os.environ["JAX_DEFAULT_MATMUL_PRECISION"])


def _check_types():
    """Have checked what the package's functions are given and return."""
    package = "compaware_jax"
    folder = Path(importlib.util.find_spec(package).origin).parent
    texts = {path: path.read_text("utf-8") for path in folder.rglob("*.py")}
    # To check shapes as well takes longer. By itself, beartype cannot read a NamedTuple's types.
    shaped = [path for path, text in texts.items() if "jaxtyping" in text or "NamedTuple" in text]
    names = [".".join(path.relative_to(folder.parent).with_suffix("").parts) for path in shaped]
    install_import_hook(names, "beartype.beartype")
    # Next to the function itself, as a decorator may make of it something else.
    place = BeartypeDecorPlace.FIRST
    beartype_package(package, conf=BeartypeConf(claw_is_pep526=False, claw_decor_place_func=place))


_check_types()


@pytest.fixture(scope="session")
def environment():
    """Of a process that also imports from folders."""

    def of(*folders):
        path = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}

    return of


@pytest.fixture
def x64():
    """Run a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def trained():
    """The variables and the groups of the small problem's model."""
    from tests import tasks  # After the hook above.

    variables = tasks.dense()
    return variables, tasks.groups(variables)
