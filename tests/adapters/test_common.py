"""What the adapters share, and that the optional frameworks stay optional."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import compaware_jax as ca
from compaware_jax.adapters import linen as linen_adapter
from compaware_jax.adapters import nnx as nnx_adapter
from compaware_jax.adapters.rebuilt import relative_difference
from compaware_jax.adapters.widths import surviving_blocks
from compaware_jax.coupling.groups import Leaf
from compaware_jax.errors import PlanError
from compaware_jax.paths import named_leaves


def test_plan_of_another_model():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    apply, variables = nnx_adapter.functional(model)
    plan = ca.plan_units(ca.find_groups(apply, variables, jnp.ones((1, 3))), np.ones(0, bool))
    with pytest.raises(PlanError, match="no sub-tree has the leaves of the plan"):
        nnx_adapter.slimmed(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), plan)
    module = linen.Dense(2)
    foreign = module.init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.raises(PlanError, match="plan has no leaf `params/kernel`"):
        linen_adapter.feature_counts(module, foreign, plan, jnp.ones((1, 3)))


def test_uneven_groups_of_a_convolution_are_refused():
    plan = ca.Plan((Leaf("k", (3, 2, 6), "float32"),), ((None, None, (0, 1, 2)),), ())
    with pytest.raises(PlanError, match=r"its 3 groups keep \[2, 1\] channels"):
        surviving_blocks(plan, "k", 3)
    assert surviving_blocks(plan, "k", 1) == (1, 3)


def test_relative_difference():
    assert relative_difference({"a": jnp.ones(4)}, {"a": jnp.full(4, 2.0)}) == pytest.approx(0.5)
    assert named_leaves({"a": 1}) == [("a", 1)]


@pytest.mark.parametrize(("package", "install"), [("haiku", "dm-haiku"), ("equinox", "equinox")])
def test_optional_frameworks_stay_optional(package, install):
    code = (
        "import sys, compaware_jax, compaware_jax.adapters\n"
        f"assert {package!r} not in sys.modules\n"
        f"sys.modules[{package!r}] = None\n"
        f"try:\n    import compaware_jax.adapters.{package}\n"
        f"except ImportError as error:\n    assert 'pip install {install}' in str(error), error\n"
        "else:\n    raise SystemExit('imported')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
