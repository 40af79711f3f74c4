"""The training loop: chunks, history, hooks, interruption."""

import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compaware_jax.errors import CheckpointError, RequestError
from compaware_jax.training import loop
from compaware_jax.training.loop import run_once, run_steps


def step(state, index):
    new = {"x": state["x"] * 0.9 + index, "empty": state["empty"]}
    return new, {"x": new["x"], "index": index}


def start():
    return {"x": jnp.float32(1.0), "empty": jnp.zeros(0)}


def run(steps, **options):
    return run_steps(step, start(), steps, label="test", progress=False, **options)


def plain(steps):
    x = 1.0
    for index in range(steps):
        x = x * 0.9 + index
    return x


@pytest.mark.parametrize(
    ("steps", "chunks"),
    [(1, [1]), (7, [7]), (20, [10] * 2), (26, [13] * 2), (45, [9] * 5), (23, [10, 10, 3])],
)
def test_any_number_of_steps(steps, chunks):
    """In chunks of one length, if there is one near the length that was asked for: they compile once."""
    state, history = run(steps, chunk=10)
    assert float(state["x"]) == pytest.approx(plain(steps), rel=1e-5)
    assert history["x"].shape == (len(chunks),)
    middles = np.cumsum(chunks) - (np.array(chunks) + 1) / 2
    np.testing.assert_allclose(history["index"], middles)


class _StoppedError(Exception):
    pass


def test_goes_on_where_it_was(tmp_path):
    def stop(state):
        raise _StoppedError

    with pytest.raises(_StoppedError):
        run(40, chunk=5, directory=tmp_path, every=2, between={15: lambda s: s, 25: stop})
    calls = []
    state, history = run(
        40, chunk=5, directory=tmp_path, every=2, between={15: calls.append, 25: lambda s: s}
    )
    assert calls == [], "step 15 lies before the checkpoint of step 20"
    expected, expected_history = run(40, chunk=5)
    assert state["x"] == expected["x"]
    for name, values in history.items():
        np.testing.assert_array_equal(values, expected_history[name])


def test_interrupt_saves_the_last_chunk(tmp_path):
    def interrupt(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(40, chunk=5, directory=tmp_path, every=100, between={25: interrupt})
    assert [p.name for p in tmp_path.iterdir()] == ["5"]


@pytest.mark.parametrize("changed", [{"steps": 20}, {"chunk": 10}])
def test_other_lengths_are_another_job(tmp_path, changed):
    run(40, chunk=5, directory=tmp_path)
    settings = {"steps": 40, "chunk": 5} | changed
    with pytest.raises(CheckpointError, match=f"differ in .*{next(iter(changed))}"):
        run(settings["steps"], chunk=settings["chunk"], directory=tmp_path)


@pytest.mark.parametrize("between", [{}, {15: lambda state: {**state, "x": 2 * state["x"]}}])
def test_interrupted_while_a_chunk_runs(tmp_path, monkeypatch, between):
    """Ctrl-C mostly lands where the loop waits for a chunk: neither it nor what came before it is done."""
    calls = []
    wait = jax.device_get

    def interrupted(tree):
        calls.append(tree)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return wait(tree)

    monkeypatch.setattr(jax, "device_get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(40, chunk=5, directory=tmp_path, between=between)
    state, _ = run(40, chunk=5, directory=tmp_path, between=between)
    assert state["x"] == run(40, chunk=5, between=between)[0]["x"]


@pytest.fixture
def ctrl_c():
    """Interrupts this process, whose handler is Python's own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_inside_a_callback(tmp_path, ctrl_c):
    """A callback that raises is a program that fails, with the state that it took."""

    def row(index):
        if index == 13 and not list(tmp_path.iterdir()):
            ctrl_c()
        return np.float32(index)

    def read(state, index):
        new = {"x": state["x"] + jax.pure_callback(row, jax.ShapeDtypeStruct((), "float32"), index)}
        return new, {"x": new["x"]}

    def run(**options):
        return run_steps(read, {"x": jnp.float32(0)}, 40, label="test", chunk=5, progress=False, **options)

    with pytest.raises(KeyboardInterrupt):
        run(directory=tmp_path, every=100)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [p.name for p in tmp_path.iterdir()] == ["3"]
    assert run(directory=tmp_path)[0]["x"] == sum(range(40))


def test_ctrl_c_during_a_save(tmp_path, ctrl_c, monkeypatch):
    save = loop._Store.save

    def interrupted(*args):
        ctrl_c()
        save(*args)

    monkeypatch.setattr(loop._Store, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(40, chunk=5, directory=tmp_path, every=2)
    assert [p.name for p in tmp_path.iterdir()] == ["2"]


def test_ctrl_c_after_the_last_chunk(tmp_path, ctrl_c, monkeypatch):
    """It is not swallowed, or whatever comes next would begin."""
    close = loop.Interruption.__exit__

    def late(self, *error):
        ctrl_c()
        close(self, *error)

    monkeypatch.setattr(loop.Interruption, "__exit__", late)
    with pytest.raises(KeyboardInterrupt):
        run(40, chunk=5, directory=tmp_path)
    assert "8" in [p.name for p in tmp_path.iterdir()]


def test_saving_takes_a_tenth_of_the_time(tmp_path, monkeypatch):
    """A chunk of a second, a save of five: the next one is due after forty-five."""
    clock = [0.0]
    save, noted = loop._Store.save, loop._noted
    saved = []

    def passing(function, seconds):
        def call(*args, **kwargs):
            clock[0] += seconds
            return function(*args, **kwargs)

        return call

    def saving(self, done, *args):
        saved.append(done)
        save(self, done, *args)

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(loop, "_noted", passing(noted, 1.0))
    monkeypatch.setattr(loop._Store, "save", saving)
    manager = loop.ocp.CheckpointManager
    monkeypatch.setattr(manager, "save", passing(manager.save, 5.0))
    run(121, chunk=1, directory=tmp_path)
    assert saved == [5, 50, 95, 121]


def test_weak_types_stay(tmp_path):
    def doubled(state, index):
        return {"s": state["s"] * jnp.float32(2), "x": state["x"]}, {}

    given = {"s": jnp.array(1.0), "x": jnp.ones(2)}
    state, _ = run_steps(doubled, given, 3, label="test", directory=tmp_path, progress=False)
    assert (float(state["s"]), state["s"].weak_type, state["x"].weak_type) == (8.0, True, False)


def test_a_second_ctrl_c_is_not_held_back(tmp_path, ctrl_c):
    def twice(state):
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
        return state

    with pytest.raises(KeyboardInterrupt):
        run(40, chunk=5, directory=tmp_path, between={25: twice})
    assert [p.name for p in tmp_path.iterdir()] == ["5", "6"]


def test_interrupted_after_a_chunk_took_the_state(tmp_path):
    """Nothing of it can be saved then; what was saved before is good."""

    def lost(state):
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(40, chunk=5, directory=tmp_path, every=2, between={25: lost})
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [2, 4]
    state, _ = run(40, chunk=5, directory=tmp_path, every=2, between={25: lambda s: s})
    assert state["x"] == run(40, chunk=5)[0]["x"]


def test_the_callers_arrays_stay():
    """Chunks take the memory of the state, but not that of the first one, nor of what hooks hand in."""
    given, mine = start(), jnp.float32(2.0)
    run_steps(
        step, given, 20, label="test", chunk=5, between={10: lambda s: {**s, "x": mine}}, progress=False
    )
    assert float(given["x"]) == 1.0
    assert float(mine) == 2.0


def test_a_state_is_held_once():
    """A run of large variables needs their memory once, beside the caller's."""
    held = []

    def look(state):
        held.append(sum(x.nbytes for x in jax.live_arrays() if x.nbytes == given.nbytes))
        return state

    given = jnp.ones(2**20)
    run_steps(lambda s, i: (0.5 * s, {"x": s[0]}), given, 20, label="x", between={20: look}, progress=False)
    assert held == [2 * given.nbytes]


def test_finished_run_returns_at_once(tmp_path):
    first, _ = run(20, chunk=5, directory=tmp_path, between={0: lambda s: s})
    seen = []
    again, _ = run(20, chunk=5, directory=tmp_path, between={0: seen.append})
    assert seen == []
    assert again["x"] == first["x"]


def test_other_job_and_other_shapes_are_refused(tmp_path):
    run(20, chunk=5, directory=tmp_path, job={"seed": 1})
    with pytest.raises(CheckpointError, match=r"differ in \{'seed': \(1, 2\)\}"):
        run(20, chunk=5, directory=tmp_path, job={"seed": 2})
    with pytest.raises(CheckpointError, match="cannot be read"):
        run_steps(
            lambda s, i: (s, {"y": jnp.zeros(3)}), {"other": jnp.zeros((2, 2))}, 20, label="test",
            chunk=5, directory=tmp_path, job={"seed": 1}, progress=False,
        )  # fmt: skip


def test_jobs_may_hold_tuples_and_numbers_of_numpy(tmp_path):
    job = {"rate": np.float32(0.5), "steps": np.int64(3), "shape": (1, 2), "key": jnp.arange(2)}
    run(20, chunk=5, directory=tmp_path, job=job)
    run(20, chunk=5, directory=tmp_path, job=job)
    with pytest.raises(CheckpointError, match="another job"):
        run(20, chunk=5, directory=tmp_path, job=job | {"key": jnp.arange(1, 3)})


def test_a_chunk_ends_before_what_happens_between(tmp_path):
    """Whatever the numbers of steps are: the chunks stay long."""
    seen = []

    def look(state):
        seen.append(float(state["x"]))
        return state

    state, history = run(25, chunk=10, between={13: look, 25: look})
    assert seen == [pytest.approx(plain(13), rel=1e-5), pytest.approx(plain(25), rel=1e-5)]
    assert float(state["x"]) == seen[-1]
    np.testing.assert_allclose(history["index"], [6.0, 18.5])


def test_resumed_with_other_breaks_is_another_job(tmp_path):
    run(25, chunk=10, directory=tmp_path, between={13: lambda s: s})
    with pytest.raises(CheckpointError, match=r"differ in .*'between': \(\[13\], \[12\]\)"):
        run(25, chunk=10, directory=tmp_path, between={12: lambda s: s})


@pytest.fixture
def no_constants():
    """JAX warns of data that become a part of the program, which is an error here."""
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", 10_000)
    yield
    jax.config.update("jax_captured_constants_warn_bytes", before)


def test_data_around_the_step_are_no_part_of_the_program(no_constants):
    rows = jnp.ones((2**12, 8))

    def take(state, index):
        return state + rows[index].sum(), {"sum": state}

    with pytest.warns(UserWarning, match="constants were captured"):
        jax.jit(take)(jnp.float32(0), 0)
    state, _ = run_steps(take, jnp.float32(0), 3, label="test", progress=False)
    assert float(state) == 24.0
    assert float(run_once(lambda x: take(x, 1)[0], jnp.float32(0))) == 8.0


@pytest.mark.parametrize("place", [-1, 21])
def test_between_steps_that_there_are_not(place):
    with pytest.raises(RequestError, match=rf"between=\[{place}\], expected numbers of steps from 0 to 20"):
        run_steps(lambda s, i: (s, {}), 0.0, 20, label="x", between={place: lambda s: s}, progress=False)
