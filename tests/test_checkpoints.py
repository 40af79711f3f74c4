"""Runs that were interrupted: resumed bit for bit, and never taken for another's."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import pytest

import compaware_jax as ca
from compaware_jax.errors import CheckpointError
from compaware_jax.search import job
from tests import tasks

SCRIPT = """
import json, sys
from pathlib import Path
import compaware_jax as ca
from tests import tasks
folder = Path(sys.argv[1])
variables = tasks.dense(100)
result = tasks.compress(
    (variables, tasks.groups(variables)), directory=folder / "checkpoints", allow_failing=True,
    search=ca.GradientSearch(steps=2000), fine_tune=2000,
)
result.plan.save(folder / "plan.json")
small = {k: {n: x.tolist() for n, x in v.items()} for k, v in result.variables.items()}
(folder / "metrics.json").write_text(json.dumps([small, [v.after for v in result.verdicts]]))
"""


def test_killed_and_started_again(tmp_path, environment):
    """kill -9 in the search and again in the fine-tune: the same files, bit for bit."""

    def start(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        # A kill may leave half a compiled program: nobody else is to read it.
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
        return folder, subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder)],
            env=environment(Path(__file__).parents[1]) | compiled,
            stderr=subprocess.PIPE,
        )

    def finish(name):
        folder, process = start(name)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
        return (folder / "plan.json").read_bytes(), (folder / "metrics.json").read_bytes()

    for phase in ("search", "fine-tune"):
        folder, process = start("killed")
        deadline = time.monotonic() + 120
        # A finished checkpoint bears a plain number; one being written has a longer name.
        while not any(p.name.isdigit() for p in folder.glob(f"checkpoints/{phase}/*")):
            assert process.poll() is None, "finished before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (folder / "metrics.json").exists()
    killed = finish("killed")
    assert killed == finish("undisturbed")
    assert json.loads(killed[0])["format"] == "compaware_jax plan 1"


def test_foreign_and_corrupt_checkpoints(trained, tmp_path):
    tasks.compress(trained, directory=tmp_path, fine_tune=20)
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    contents = [p.read_bytes() for p in files]
    with pytest.raises(CheckpointError, match=r"another job.*budget"):
        tasks.compress(trained, directory=tmp_path, fine_tune=20, budget=ca.params(0.4))
    assert [p.read_bytes() for p in files] == contents
    latest = max((tmp_path / "search").iterdir(), key=lambda p: int(p.name))
    for path in latest.rglob("*"):
        if path.is_file() and "run" in path.parts:
            path.write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        tasks.compress(trained, directory=tmp_path, fine_tune=20)


def test_checkpoints_are_of_the_same_demands(trained, tmp_path):
    variables, groups = trained
    whole = ca.constrain(groups, whole=groups.groups[0].name)
    tasks.compress((variables, whole), directory=tmp_path, fine_tune=20)
    with pytest.raises(CheckpointError, match=r"another job.*groups"):
        tasks.compress(
            (variables, ca.constrain(groups, whole=groups.groups[2].name)), directory=tmp_path, fine_tune=20
        )
    tasks.compress((variables, whole), directory=tmp_path, fine_tune=20)


def test_jobs_of_other_outputs_in_use_are_others():
    """A budget of FLOPs is of these outputs."""

    def apply(v, x):
        h = jnp.tanh(x @ v["a"])
        return {"used": h @ v["b"], "more": h}

    variables = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    all_of_them, named, one = (
        job._mark(ca.find_groups(apply, variables, jnp.ones((1, 3)), released=("more",), deployed=names))
        for names in ((), ("used", "more"), ("used",))
    )
    assert all_of_them == named != one


def test_checkpoints_are_of_the_same_score(trained, tmp_path):
    def worst(groups, variables):
        return -ca.importance.l2(groups, variables)

    scores = {"score": lambda groups, variables: ca.importance.l2(groups, variables)}
    tasks.compress(trained, directory=tmp_path, fine_tune=20, **scores)
    with pytest.raises(CheckpointError, match=r"another job.*score"):
        tasks.compress(trained, directory=tmp_path, fine_tune=20, score=lambda groups, v: worst(groups, v))
    tasks.compress(trained, directory=tmp_path, fine_tune=20, **scores)


class Rated:
    """A search of one's own that shows no settings."""

    def __init__(self, rate):
        self._rate = rate

    def build(self, problem):
        return ca.GradientSearch(steps=2, learning_rate=self._rate).build(problem)


def test_checkpoints_are_of_the_same_search(trained, tmp_path):
    asked = {"criteria": [], "fine_tune": 2, "directory": tmp_path}
    first = tasks.compress(trained, search=Rated(1e-3), **asked)
    again = tasks.compress(trained, search=Rated(1e-3), **asked)
    assert again.plan == first.plan
    with pytest.raises(CheckpointError, match=r"another job.*search"):
        tasks.compress(trained, search=Rated(2e-3), **asked)


def test_checkpoints_are_of_the_same_loss_and_data(trained, tmp_path):
    tasks.compress(trained, directory=tmp_path, fine_tune=20)

    def run(loss, batches):
        variables, groups = trained
        return ca.compress(
            tasks.apply, variables, loss, batches, groups=groups, budget=ca.params(0.5),
            search=tasks.SEARCH, fine_tune=20, criteria=[tasks.BOUND], held_out=tasks.held_out(),
            learning_rate=1e-2, directory=tmp_path, progress=False,
        )  # fmt: skip

    with pytest.raises(CheckpointError, match=r"another job.*loss"):
        run(lambda *args: 2 * tasks.loss(*args), tasks.batches)
    variables, _ = trained

    def and_to_be_as_it_was(apply, v, batch):
        return tasks.loss(apply, v, batch) + ((apply(v, batch) - tasks.apply(variables, batch)) ** 2).mean()

    with pytest.raises(CheckpointError, match=r"another job.*loss"):
        run(and_to_be_as_it_was, tasks.batches)
    with pytest.raises(CheckpointError, match=r"another job.*data"):
        run(tasks.loss, lambda step: tasks.batches(step + 1))
    run(tasks.loss, tasks.batches)


def test_checkpoints_are_of_the_same_metric(trained, tmp_path):
    def run(metric):
        criterion = ca.at_most("error", metric, 10.0, trainable=False)
        tasks.compress(trained, directory=tmp_path, fine_tune=5, criteria=[criterion])

    run(tasks.error)
    with pytest.raises(CheckpointError, match=r"another job.*before"):
        run(lambda *args: 2 * tasks.error(*args))
    run(tasks.error)


def test_trainings_are_told_apart(trained, tmp_path):
    fit = partial(ca.fit, tasks.apply, trained[0], steps=5, directory=tmp_path, progress=False)
    fit(tasks.loss, tasks.batches)
    with pytest.raises(CheckpointError, match=r"another job.*'loss'"):
        fit(tasks.error, tasks.batches)
    with pytest.raises(CheckpointError, match=r"another job.*'data'"):
        fit(tasks.loss, lambda step: tasks.batches(step + 7))
