"""The experiments, run as a user runs them, with few steps; and the report that they write."""

import csv
import importlib.metadata
import json
import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compaware_jax as ca

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(environment):
    """Runs an experiment."""

    def run(script, *arguments):
        done = subprocess.run(
            [sys.executable, str(ROOT / "experiments" / script), *arguments],
            env=environment(ROOT),
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.mark.parametrize("model", ["dense", "conv"])
def test_main_job(run, tmp_path, model):
    steps, batch, rivals = ("30", "128", True) if model == "dense" else ("10", "16", False)
    arguments = (
        "--data", "embedded", "--model", model, "--budget", "0.3", "--batch", batch,
        "--rivals" if rivals else "--no-rivals", "--timing", "0",
        "--dense-steps", steps, "--fine-tune", steps, "--search.steps", steps,
        "--name", "run", "--out", str(tmp_path),
    )  # fmt: skip
    output = run("mnist_autoencoder.py", *arguments)
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["data"]["source"] == "embedded"
    assert "EMBEDDED DATA" in output
    assert "EMBEDDED DATA" in metrics["data"]["note"]
    dense = metrics["models"]["dense"]["parameters"]
    assert len(metrics["models"]) == (5 if rivals else 2)
    for name, row in metrics["models"].items():
        assert name in output
        share = row["parameters"] / dense
        assert share == 1 if name == "dense" else 0.2985 <= share <= 0.3
    plan = ca.Plan.load(folder / "plan.json")
    assert plan.parameters == metrics["models"]["compressed"]["parameters"]
    html = (folder / "report.html").read_text()
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/png;base64,', html)) == 6
    assert "EMBEDDED DATA" in html
    assert not re.search(r'(src|href)="(?!data:)', html), "the report holds everything itself"
    if model == "dense":
        # Run again, it restores everything and writes the same.
        before = (folder / "metrics.json").read_bytes()
        run("mnist_autoencoder.py", *arguments)
        assert (folder / "metrics.json").read_bytes() == before


def test_sweep(run, tmp_path):
    output = run(
        "sweep_budgets.py", "--budgets", "0.1", "0.4", "--seeds", "1", "--data", "embedded",
        "--dense-steps", "20", "--search.steps", "20", "--fine-tune", "20", "--out", str(tmp_path),
    )  # fmt: skip
    assert "compilations of the training program: 1" in output
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["budget"] for row in rows] == ["0.1", "0.4"]
    assert all(99.5 <= float(row["of budget"].rstrip("%")) <= 100 for row in rows)
    assert (tmp_path / "sweep" / "trade_off.png").stat().st_size > 10_000


def test_pendulum_is_swung_up_by_one_who_knows_its_state(monkeypatch):
    """The task can be solved: what the model is taught balances the pendulum, and doing nothing does not."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    from pendulum import SIDE, expert, frames_of, move, seen, swing_up

    start = jnp.stack([jnp.pi + jnp.linspace(-0.5, 0.5, 8), jnp.zeros(8)], -1)
    state = start
    for _ in range(150):
        state = move(state, expert(state))
    assert float(jnp.cos(state[:, 0]).min()) > 0.999
    still = swing_up(lambda view: jnp.zeros(len(view)), start, 150)
    assert float(jnp.cos(still).max()) < -0.8
    # The camera sees the tip where it is: below the middle while it hangs, above it when upright.
    low, high = frames_of(jnp.array([[jnp.pi, 0.0], [0.0, 0.0]]))
    assert seen(low, high).shape == (SIDE, SIDE, 2)
    assert low[SIDE // 2 :].sum() > 5 * low[: SIDE // 2].sum()
    np.testing.assert_allclose(high, low[::-1], atol=1e-5)


def test_world_model(tmp_path, monkeypatch, capsys):
    """The tables of two models that were not trained: what is shown of them is what they are."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import world_model
    from mnist_task import uniform_plan
    from pendulum import WorldModel, apply, batches

    batch = batches(4, jax.random.key(0))(0)
    view, actions, frames = batch["view"], batch["actions"], batch["frames"]
    np.testing.assert_allclose(view[..., 1], frames[:, 0])
    variables = WorldModel().init(jax.random.key(1), view, actions)
    groups = ca.find_groups(apply, variables, view, actions)
    plan = uniform_plan(groups, variables, 0.1)
    models = {
        "dense": world_model.Model(apply, variables),
        "uniform L2, for both": world_model.Model(ca.slim(apply, plan), ca.shrink(variables, plan), plan),
    }
    criteria = [
        ca.at_least("upright", world_model.upright_of, 0.5, trainable=False),
        ca.at_least("PSNR (dB)", world_model.psnr_of, 1.0),
    ]
    held_out = batch | {"start": world_model.hanging(8, jax.random.key(2))}
    monkeypatch.setattr(world_model, "latencies", partial(world_model.latencies, seconds=0.0))
    world_model.write(tmp_path, models, criteria, groups, held_out)

    found = json.loads((tmp_path / "metrics.json").read_text())
    small = found["uniform L2, for both"]
    assert 0.0995 <= small["left"] <= 0.1
    assert set(small["components"]) == {"encoder", "dynamics", "decoder", "policy"}
    assert small["upright"] < 0, "an untrained model leaves it hanging"
    error = np.mean((np.asarray(apply(variables, view, actions)["frames"]) - frames) ** 2)
    assert found["dense"]["PSNR (dB)"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    shown = capsys.readouterr().out
    assert f"{small['upright']:.3f} not kept" in shown
    assert f"{small['components']['policy']:.1%}" in shown
    assert ca.Plan.load(tmp_path / "plan-uniform-L2-for-both.json") == plan
    assert (tmp_path / "swing_up.png").stat().st_size > 10_000


def test_comparison(run, tmp_path):
    """Without a peer's environment: ours, fresh models, and the table; a second run reads its cells."""
    arguments = (
        "--data", "embedded", "--seeds", "1", "--budgets", "0.1", "--rates", "2e-3",
        "--random-widths", "1", "--random-budgets", "0.1", "--extra", "450",
        "--dense-steps", "20", "--search.steps", "20", "--fine-tune", "20", "--out", str(tmp_path),
    )  # fmt: skip
    first = run("compare.py", *arguments)
    folder = tmp_path / "dense-embedded"
    table = (folder / "table.md").read_text()
    assert table.strip() in first
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", table, re.MULTILINE))
    assert {name for name, figure in rows.items() if re.fullmatch(r"\d+\.\d\d", figure)} >= {
        "ours",
        "ours, channels only",
        "our plan, from scratch",
        "uniform, from scratch",
        "best of random widths, from scratch",
    }
    assert run("compare.py", *arguments, "--finished").strip() == table.strip()


def test_ablations(tmp_path, monkeypatch, capsys):
    """Each variant's request differs from the whole method's by what it is without; nothing is trained."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import ablations
    from mnist_task import Task
    from protocol import Config, Seed

    from compaware_jax.cost import parameter_cost
    from compaware_jax.search.select import keep_units, round_counts

    asked = []

    def search(self, method, dense, groups, budget, key):
        cost, limit = parameter_cost(groups), ca.params(budget).limit(groups)
        counts = round_counts(cost, np.ones(len(groups.groups)), limit)
        asked.append((method, groups, cost.exact(counts) / limit))
        return ca.plan_units(groups, keep_units(groups, np.arange(groups.units), counts)), dense, 0.0

    def tuned(self, candidate, rates):
        assert rates == (2e-3,)
        return {"0.002": 30.0 - len(asked)}

    monkeypatch.setattr(Task, "search", search)
    monkeypatch.setattr(Task, "dense", lambda self, *_: self.model.init(self.init_key))
    monkeypatch.setattr(Seed, "tuned", tuned)
    config = Config(data="embedded", seeds=1, budgets=(0.1,), rates=(2e-3,), out=tmp_path)
    ablations.main(config)

    def changes(method, groups):
        """What is not as the whole method has it."""
        ours, latent = config.search, [group.coupling for group in groups.groups]
        found = {n for n, value in vars(method).items() if value != getattr(ours, n)}
        found |= {"latent"} if (groups.floors == groups.sizes)[latent].all() else set()
        found |= {"counts"} if (groups.floors == groups.ceilings).all() else set()
        found |= {"boundary"} if len(groups.groups) == 5 else set()
        return found

    assert [changes(method, groups) for method, groups, _ in asked] == [
        set(),
        {"travel"},
        {"travel", "latent"},
        {"counts"},
        {"learning_rate"},
        {"noise", "edge"},
        {"boundary"},
        {"boundary", "counts"},
        {"boundary", "counts", "latent"},
    ]
    assert all(0.99 < spent <= 1 for *_, spent in asked)
    table = (tmp_path / "dense-embedded" / "ablations.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == list(ablations.VARIANTS)
    assert [float(row[1]) for row in rows] == [29.0 - n for n in range(9)]
    assert [float(row[2]) for row in rows[1:]] == [*range(1, 9)]


def test_no_experiment_hides_a_package():
    """A script's folder comes first on the path: a `requests.py` there broke the download of MNIST."""
    named = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    installed = set(importlib.metadata.packages_distributions())
    assert "requests" in installed, "what downloads the data is looked for under its name"
    assert not named & (installed | sys.stdlib_module_names)


def test_unknown_data_source_is_refused(run, tmp_path):
    with pytest.raises(AssertionError, match="invalid choice"):
        run("mnist_autoencoder.py", "--data", "cifar", "--out", str(tmp_path))


def test_every_data_set_has_a_schedule_for_every_preset(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    from mnist_task import SCHEDULES, Data, Preset

    named = set(product(get_args(Preset), get_args(Data)))
    assert named - set(SCHEDULES) == {("dense", "auto"), ("conv", "auto")}, "auto is one of the others"
