"""Finished cells of experiments: computed once, by whoever is first, and never lost."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def cells(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    from cells import Cells

    return lambda: Cells(tmp_path)


SHARE = """
import sys, time
from pathlib import Path
from cells import Cells

folder = Path(sys.argv[1])


def compute(number):
    with (folder / "calls").open("a") as file:
        file.write(f"{number}\\n")
    time.sleep(0.05)
    return number**2


found = Cells(folder / "cells").all({("square", n): lambda n=n: compute(n) for n in range(12)})
assert found == {("square", n): n**2 for n in range(12)}
"""


def test_processes_share_the_work(tmp_path, environment):
    command = [sys.executable, "-c", SHARE, str(tmp_path)]
    workers = [subprocess.Popen(command, env=environment(EXPERIMENTS)) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    calls = (tmp_path / "calls").read_text().split()
    assert sorted(map(int, calls)) == list(range(12)), "each is computed once"


def test_a_torn_line_is_forgotten(cells):
    """A process that is killed while it writes costs its own figure only."""
    cells().one(("a", 0.1), lambda: {"psnr": 1.0})
    whole = cells().record.read_bytes()
    with cells().record.open("ab") as file:
        file.write(b'{"key": ["b"], "resu')
    assert cells().read(("a", 0.1)) == {"psnr": 1.0}
    assert not cells().has(("b",))
    assert cells().one(("b",), lambda: 2) == 2
    assert cells().record.read_bytes().startswith(whole)
    assert cells().one(("b",), lambda: pytest.fail("it is finished")) == 2
    assert cells().read(("a", 0.1)) == {"psnr": 1.0}


@pytest.mark.parametrize("change", [lambda old: old[1:], lambda old: ['{"key": ["new"], "result": 0}', *old]])
def test_the_record_may_be_replaced(cells, change):
    """By a checkout, say, while an experiment runs."""
    running = cells()
    for number in range(3):
        running.one((number,), lambda number=number: number)
    lines = change(running.record.read_text().splitlines())
    running.record.write_text("\n".join(lines) + "\n")
    running.one(("next",), lambda: 7)
    found = [json.loads(line)["key"] for line in running.record.read_text().splitlines()]
    assert found == [*(json.loads(line)["key"] for line in lines), ["next"]]
    assert cells().read(("next",)) == running.read(("next",)) == 7
    assert running.has((0,)) == ([0] in found)


def test_what_is_large_has_files_of_its_own(cells):
    tree = {"w": jnp.arange(3.0), "b": jnp.zeros((2, 2))}
    for compute in (lambda: tree, lambda: pytest.fail("it is finished")):
        held = cells().arrays(("weights", 0), tree, compute)
        assert held.keys() == tree.keys()
        np.testing.assert_array_equal(held["w"], tree["w"])
    for compute in (lambda: [1, 2], lambda: pytest.fail("it is finished")):
        assert cells().large(("list",), compute) == [1, 2]
    assert not cells().record.exists()


PSNR = {0: {1e-3: 20.0, 2e-3: 20.8, 4e-3: 21.0}, 1: {2e-3: 22.0, 4e-3: 21.0}, 2: {2e-3: 21.5, 4e-3: 21.2}}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    from protocol import Config, Study

    return lambda **settings: Study(Config(**{"data": "embedded", "seeds": 3, "out": tmp_path} | settings))


def test_rates_far_behind_are_not_tried_again(study, monkeypatch):
    """The best one of all seeds counts, be it not the first seed's; each figure is computed once."""
    from protocol import Candidate, Seed

    tried = []

    def tuned(seed, candidate, rates):
        tried.append((seed.seed, tuple(rates)))
        return {f"{rate:g}": PSNR[seed.seed][rate] for rate in rates}

    monkeypatch.setattr(Seed, "tuned", tuned)
    for _ in range(2):
        found = study()
        assert not tried or found.reached(("model",))
        found.tune({("model",): lambda seed: Candidate(None, None, {"kept": [1]})})
    assert tried == [(0, (1e-3, 2e-3, 4e-3)), (1, (2e-3, 4e-3)), (2, (2e-3, 4e-3))]
    assert found.reached(("model",)) == [20.8, 22.0, 21.5]
    assert found.cells.read(("model", 0))["kept"] == [1]
    assert found.reached(("another",)) == []


def test_lanes_give_what_one_by_one_gives(study, tmp_path):
    """Masked at full width, many at once: by the law the same figures; of the whole model, too."""
    from protocol import Candidate

    def uniform(seed, share):
        return Candidate(seed.plan_of(seed.uniform(share), seed.fresh), seed.fresh, {"share": share})

    work = {("uniform", share): partial(uniform, share=share) for share in (0.1, 0.3)}
    work["whole",] = lambda seed: Candidate(None, seed.fresh)
    found = {}
    for lanes in (1, 4):
        run = study(lanes=lanes, fine_tune=20, rates=(2e-3, 4e-3), out=tmp_path / str(lanes))
        run.tune_on(run.seeds[0], work)
        found[lanes] = [run.figures(key, run.seeds[0]) for key in work]
        assert run.cells.read(("uniform", 0.1, 0))["share"] == 0.1
    for one, many in zip(found[1], found[4], strict=True):
        assert many == pytest.approx(one, abs=1e-3)
    assert len({round(figures["0.002"], 2) for figures in found[1]}) == 3, "they are three models"


def test_figures_of_other_settings_are_refused(study):
    study(fine_tune=10).settle(("extra",), 4_000)
    with pytest.raises(SystemExit, match=r"'fine_tune': '10'.* expected .*'fine_tune': '20'.*--out"):
        study(fine_tune=20)
    with pytest.raises(SystemExit, match="4000, expected 2000"):
        study(fine_tune=10).settle(("extra",), 2_000)
