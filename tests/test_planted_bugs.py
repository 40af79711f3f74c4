"""The law test is worth something: rules altered on purpose are caught by it."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives as p

import compaware_jax as ca
from compaware_jax.rules import RULES, Rule
from compaware_jax.rules.families import bind, elementwise, reduction
from tests.law import law_errors, random_keep
from tests.programs import random_program

pytestmark = pytest.mark.usefixtures("x64")


def worst_error(seeds):
    errors = []
    for seed in seeds:
        apply, variables, x = random_program(seed)
        groups = ca.find_groups(apply, variables, x)
        keep = random_keep(groups, np.random.default_rng(seed))
        try:
            errors.append(max(law_errors(apply, variables, x, keep=keep, groups=groups)))
        except Exception:
            errors.append(np.inf)
    return max(errors)


def plant(monkeypatch, primitive, change):
    monkeypatch.setitem(RULES, primitive, change(RULES[primitive]))


SEEDS = range(8)


def test_unaltered_rules_pass():
    assert worst_error(SEEDS) <= 1e-10


def test_sigmoid_said_to_keep_zeros(monkeypatch):
    monkeypatch.setitem(RULES, p.exp_p, RULES[p.exp_p])
    elementwise(p.exp_p, lambda eqn, zero, uniform: zero[0])
    monkeypatch.setitem(RULES, p.logistic_p, RULES[p.logistic_p])
    elementwise(p.logistic_p, lambda eqn, zero, uniform: zero[0])
    try:
        assert worst_error(SEEDS) > 1e-6
    finally:
        for primitive in (p.exp_p, p.logistic_p):
            elementwise(primitive, lambda eqn, zero, uniform: False)


def test_maximum_said_to_ignore_zeros(monkeypatch):
    old = RULES[p.reduce_max_p]
    reduction(p.reduce_max_p, sums=True)
    try:
        apply = lambda v, x: (x @ v["a"] - 5) * jnp.max(x @ v["a"] - 5, -1, keepdims=True) @ v["b"]  # noqa: E731
        rng = np.random.default_rng(0)
        variables = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(4, 2))}
        x = rng.normal(size=(2, 3))
        groups = ca.find_groups(apply, variables, x)
        keep = np.array([True, False, True, False])
        # The shift loses the zero flag: without it the altered rule would be un-cut all the same.
        shifted = lambda v, x: jnp.max(-jnp.abs(x @ v["a"]) - 0.0, -1) @ v["c"]  # noqa: E731
        assert max(law_errors(apply, variables, x, keep=keep, groups=groups)) <= 1e-10
        variables = {"a": variables["a"], "c": rng.normal(size=(2, 2))}
        groups = ca.find_groups(shifted, variables, x)
        assert max(law_errors(shifted, variables, x, keep=keep, groups=groups)) > 1e-6
    finally:
        RULES[p.reduce_max_p] = old


def test_split_that_takes_the_wrong_half(monkeypatch):
    def change(rule):
        def slim(eqn, operands, kept):
            return rule.slim(eqn, operands, kept)[::-1]

        return Rule(rule.couple, slim, rule.work)

    plant(monkeypatch, lax.split_p, change)
    assert worst_error(SEEDS) > 1e-6


def test_contraction_that_forgets_to_tie(monkeypatch):
    def change(rule):
        def couple(ledger, eqn, inputs):
            left, right = inputs
            untied = type(left)(left.shape, (), left.uniform)
            return rule.couple(ledger, eqn, (untied, right))

        return Rule(couple, rule.slim, rule.work)

    plant(monkeypatch, p.dot_general_p, change)
    assert worst_error(SEEDS) > 1e-6


def test_broadcast_that_keeps_the_old_shape(monkeypatch):
    plant(
        monkeypatch,
        p.broadcast_in_dim_p,
        lambda rule: Rule(rule.couple, lambda eqn, xs, kept: bind(eqn, [xs[0].array]), None),
    )
    assert worst_error(SEEDS) > 1e-6
