"""The law test is worth something: rules altered on purpose are caught by it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives as p

import compaware_jax as ca
from compaware_jax.coupling.rules import RULES
from compaware_jax.coupling.rules.arrays import bind
from compaware_jax.coupling.rules.families import elementwise, reduction
from compaware_jax.law import law_errors, random_keep
from tests.networks import random_network
from tests.programs import random_program

pytestmark = pytest.mark.usefixtures("x64")


SEEDS = range(8)


def outcomes(seeds=SEEDS):
    """Per program its law error, or the exception that running it raised."""
    results = []
    for seed in seeds:
        apply, variables, x = random_program(seed)
        groups = ca.find_groups(apply, variables, x)
        keep = random_keep(groups, np.random.default_rng(seed))
        try:
            errors = law_errors(apply, variables, x, keep=keep, groups=groups)
            results.append(max(errors))
        except (TypeError, ValueError, AssertionError) as error:
            results.append(error)
    return results


def crashes(results):
    return [r for r in results if isinstance(r, Exception)]


def test_unaltered_rules_pass():
    results = outcomes()
    assert not crashes(results)
    assert max(results) <= 1e-10


def test_sigmoid_said_to_keep_zeros(monkeypatch):
    def apply(v, x):
        h = jax.nn.sigmoid(x @ v["a"])
        return (h - h.mean(-1, keepdims=True)) @ v["b"]

    rng = np.random.default_rng(0)
    variables = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(4, 2))}
    x = rng.normal(size=(2, 3))
    groups = ca.find_groups(apply, variables, x)
    keep = np.array([True, False, True, True])
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= 1e-10
    for primitive in (p.exp_p, p.logistic_p):
        monkeypatch.setitem(RULES, primitive, RULES[primitive])
        elementwise(primitive, lambda eqn, zero, uniform: zero[0])
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) > 1e-6


def test_maximum_said_to_ignore_zeros(monkeypatch):
    def apply(v, x):
        return jnp.max(-jnp.abs(x @ v["a"]), -1, keepdims=True) * (x @ v["a"]) @ v["b"]

    rng = np.random.default_rng(0)
    variables = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(4, 2))}
    x = rng.normal(size=(2, 3))
    groups = ca.find_groups(apply, variables, x)
    keep = np.array([True, False, True, False])
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= 1e-10
    # The removed channels are zero and all others negative: leaving them out changes the maximum.
    monkeypatch.setitem(RULES, p.reduce_max_p, RULES[p.reduce_max_p])
    reduction(p.reduce_max_p, sums=True)
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) > 1e-6


def alter(monkeypatch, primitive, couple=None, slim=None):
    rule = RULES[primitive]
    altered = replace(rule, couple=couple or rule.couple, slim=slim or rule.slim)
    monkeypatch.setitem(RULES, primitive, altered)
    return rule


def test_reversal_that_forgets_to_reverse(monkeypatch):
    def apply(v, x):
        return jnp.tanh(x @ v["a"])[:, ::-1] @ v["b"]

    rng = np.random.default_rng(0)
    variables = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(4, 2))}
    x = rng.normal(size=(2, 3))
    groups = ca.find_groups(apply, variables, x)
    keep = np.array([True, False, True, True])
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= 1e-10
    alter(monkeypatch, p.rev_p, slim=lambda eqn, operands, kept: [operands[0].array])
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) > 1e-6


def test_contraction_said_to_sum_zeros(monkeypatch):
    """Halves are left where a sigmoid's input left: a product with a constant matrix has to see them."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, 4))

    def apply(v, x):
        return jax.nn.sigmoid(x @ v["a"]) @ mixing @ v["b"]

    variables = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(4, 2))}
    x = rng.normal(size=(2, 3))
    groups = ca.find_groups(apply, variables, x)
    keep = np.arange(groups.units) != 1
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= 1e-10

    def slim(eqn, operands, kept):
        return rule.slim(eqn, [replace(x, zero=(True,) * len(x.zero)) for x in operands], kept)

    rule = alter(monkeypatch, p.dot_general_p, slim=slim)
    assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) > 1e-6


def test_broadcast_that_keeps_the_old_shape(monkeypatch):
    alter(
        monkeypatch,
        p.broadcast_in_dim_p,
        slim=lambda eqn, operands, kept: bind(eqn, [operands[0].array]),
    )
    assert crashes(outcomes())


def miscounted(seeds=range(40)):
    """Networks whose units are not those that their blocks say."""
    wrong = []
    for seed in seeds:
        apply, variables, x, units = random_network(seed)
        try:
            found = ca.find_groups(apply, variables, x).units
        except Exception as error:
            found = error
        if found != units:
            wrong.append(seed)
    return wrong


def test_unaltered_rules_count_right():
    assert not miscounted()


def test_count_sees_a_contraction_that_forgets_to_tie(monkeypatch):
    def couple(ledger, eqn, inputs):
        left, right = inputs
        return rule.couple(ledger, eqn, (type(left)(left.shape, (), left.uniform), right))

    rule = alter(monkeypatch, p.dot_general_p, couple=couple)
    assert miscounted()


def test_count_sees_a_concatenation_that_ties_its_pieces(monkeypatch):
    def couple(ledger, eqn, inputs):
        for x in inputs[1:]:
            for mine, first in zip(x.factors, inputs[0].factors, strict=False):
                if mine.axes == first.axes == (eqn.params["dimension"],):
                    ledger.equate(mine.ids.ravel()[:1], first.ids.ravel()[:1])
        return rule.couple(ledger, eqn, inputs)

    rule = alter(monkeypatch, p.concatenate_p, couple=couple)
    assert miscounted()


def test_count_sees_a_look_up_that_forgets_the_order(monkeypatch):
    def couple(ledger, eqn, inputs):
        (out,) = rule.couple(ledger, eqn, inputs)
        for factor in out.factors:
            ledger.equate(factor.ids.ravel()[:1], factor.ids.ravel()[-1:])
        return [out]

    rule = alter(monkeypatch, p.gather_p, couple=couple)
    assert miscounted()
