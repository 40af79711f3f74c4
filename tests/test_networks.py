"""Networks of blocks: the law holds, and the units are exactly those that the blocks say.

Fewer units would tie channels that could leave separately, more would release channels that cannot.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compaware_jax as ca
from compaware_jax.law import law_errors, random_keep
from tests.networks import random_network

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("part", range(4))
@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(number=st.integers(0, 2**29))
def test_units_and_law(part, number):
    apply, variables, x, units = random_network(4 * number + part)
    groups = ca.find_groups(apply, variables, x, strict=True)
    assert groups.units == units
    rng = np.random.default_rng(number)
    keep = random_keep(groups, rng)
    if number % 3 == 0:  # One group leaves altogether.
        groups = ca.constrain(groups, may_empty="*")
        keep[groups.groups[rng.integers(len(groups.groups))].slice] = False
    errors = law_errors(apply, variables, x, keep=keep, groups=groups)
    assert max(errors) <= 1e-10
