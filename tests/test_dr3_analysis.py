"""dr3_analysis.py: dynamic programming, targets, cures, data and diagnostics against loops, closed forms and
a plain network trained by itself; what members of a seed share; the logic of the claims on planted curves;
the promises that apply; commands; and TD's rank falling below SARSA's."""

import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dr3_analysis as d
import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import tyro
from conftest import (
    ROOT,
    assert_same_checkpoint,
    flatten,
    metrics,
    one_thread,
    only_run,
    run_script,
    write_d4rl,
)

CPU = torch.device("cpu")
ALL = ("mc", "oracle", "sarsa", "td", "td10", "q", "moving")
CURES = (
    "dr3:0.02",
    "dr3abs:0.03",
    "dr3stop:0.04",
    "sl:0.05",
    "rank:0.01",
    "unit",
    "layer",
    "dropout:0.3",
)
CURES += ("tau:0.5", "l2:0.06", "refit:3")
GRID = dict(problem="gridworld", grid=3, transitions=300, width=8, batch_size=8, num_updates=40)
GRID |= dict(diagnostics_frequency=8, checkpoint_frequency=0)


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def tiny(**changes) -> d.Args:
    return d.Args(**GRID | changes)


def a_problem(n=40, obs_dim=3, act_dim=2, seed=5, **changes) -> d.Problem:
    """Random transitions, every seventh terminal; the truth of each target is another random column."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g) * 2 - 1
    done = (torch.arange(n) % 7 == 6).to(torch.get_default_dtype())
    some = lambda s, m, g: torch.rand(len(s), m, act_dim, generator=g) * 2 - 1
    columns = (
        rand(n, obs_dim),
        rand(n, act_dim),
        rand(n),
        done,
        rand(n, obs_dim),
        rand(n, act_dim),
        rand(n),
    )
    truth = {target: rand(n) for target in ALL}
    return d.Problem(*columns, some, some, truth, None, None)._replace(**changes)


def a_learner(problem=None, **changes) -> d.Learner:
    args = tiny(
        **dict(
            targets=ALL, cures=CURES, width=6, depth=2, batch_size=5, learning_rate=1e-2, tau=0.1
        )
        | changes
    )
    return d.Learner(problem or a_problem(), args, CPU)


def refused(call, capsys, named="", status=2):
    with pytest.raises(SystemExit) as stop:
        call()
    err = capsys.readouterr().err
    assert stop.value.code == status and named in err and err.strip().count("\n") == 0, err
    return err


# --------------------------------------------------------------------------------- dynamic programming
def grid_by_hand(k: int):
    """(P, r) from the words: nine times in ten the move, else a random one of four; walls hold."""
    goal, P, r = (k - 1, k - 1), np.zeros((k, k, 4, k, k)), np.zeros((k, k, 4))
    moves = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    for x, y, a, b in itertools.product(range(k), range(k), range(4), range(4)):
        if (x, y) != goal:
            u, v = x + moves[b][0], y + moves[b][1]
            u, v = (u, v) if 0 <= u < k and 0 <= v < k else (x, y)
            chance = 0.9 * (a == b) + 0.025
            P[x, y, a, u, v] += chance
            r[x, y, a] += chance * (1.0 if (u, v) == goal else -0.1)
    return P.reshape(k * k, 4, k * k), r.reshape(k * k, 4)


@pytest.mark.parametrize("k", [3, 5])
def test_the_grid_is_the_one_described(k):
    for found, expected in zip(d.grid_model(k), grid_by_hand(k)):
        assert found.dtype == np.float64 and np.abs(found - expected).max() < 1e-14


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.999])
def test_q_of_a_policy_solves_the_linear_system_over_pairs(gamma):
    P, r = grid_by_hand(4)
    policy = np.random.default_rng(0).dirichlet(np.ones(4), 16)
    A, b = np.eye(64), r.flatten()
    for s, a, t, c in itertools.product(range(16), range(4), range(16), range(4)):
        A[4 * s + a, 4 * t + c] -= gamma * P[s, a, t] * policy[t, c]
    Q = d.evaluate_policy(P, r, policy, gamma)
    assert Q.dtype == np.float64 and np.abs(Q - np.linalg.solve(A, b).reshape(16, 4)).max() < 1e-10


@pytest.mark.parametrize("gamma", [0.5, 0.99])
def test_the_optimal_q_is_the_best_of_all_policies(gamma):
    """All 4^8 deterministic policies of the 3 x 3 grid, each by its own 9 x 9 system."""
    P, r = grid_by_hand(3)
    policies = np.array([(*p, 0) for p in itertools.product(range(4), repeat=8)])
    best = np.full(9, -np.inf)
    for some in np.array_split(policies, 16):
        s = np.arange(9)
        V = np.linalg.solve(np.eye(9) - gamma * P[s, some], r[s, some][..., None])[..., 0]
        best = np.maximum(best, V.max(0))
    assert np.abs(d.optimal_q(P, r, gamma) - (r + gamma * P @ best)).max() < 1e-10


# ------------------------------------------------------------------------------------- data: gridworld
def grid_states(problem):
    """State of each row of obs and next_obs, found among the rows of `everything`."""
    every = problem.all_pairs[0].reshape(-1, 4, 16)[:, 0]
    assert torch.equal(problem.all_pairs[0], every.repeat_interleave(4, 0))
    assert torch.equal(problem.all_pairs[1], torch.eye(4).repeat(len(every), 1))
    find = lambda x: (x[:, None] - every[None]).abs().amax(-1).min(1)
    for x in (problem.obs, problem.next_obs):
        assert find(x).values.max() < 1e-5
    return find(problem.obs).indices.numpy(), find(problem.next_obs).indices.numpy()


def test_gridworld_data_and_truths():
    args = tiny(grid=4, transitions=1500, gamma=0.95)
    p = d.gridworld(args, CPU)
    s, after = grid_states(p)
    a, done = p.act.argmax(1).numpy(), p.done.numpy() > 0
    n, goal = len(s), 15
    P, r = grid_by_hand(4)
    assert 1300 < n <= 1500 and done[-1] and (s != goal).all()
    assert (P[s, a, after] > 0).all() and np.array_equal(done, after == goal)
    assert np.array_equal(p.rew.numpy(), np.where(after == goal, 1, -0.1).astype(np.float32))
    assert (s[1:] == after[:-1])[~done[:-1]].all()
    usual = P[s, a].argmax(1)  # the intended move, 0.925 or more of the time
    assert 0.03 < (after != usual).mean() < 0.11
    assert torch.equal(p.next_act[:-1][~done[:-1]], p.act[1:][~done[:-1]])
    starts = np.append(True, done[:-1])
    assert len(set(s[starts][1:])) > 10  # new episodes start anywhere
    for i in range(0, n, 50):
        total, discount = 0.0, 1.0
        for j in range(i, n):
            total, discount = total + discount * float(p.rew[j]), discount * 0.95
            if done[j]:
                break
        assert abs(total - float(p.mc[i])) < 1e-5
    beta = d.evaluate_policy(P, r, np.full((16, 4), 0.25), 0.95)
    best = d.optimal_q(P, r, 0.95)
    for target in ALL:
        assert (
            np.abs(p.truth[target].numpy() - (best if target == "q" else beta)[s, a]).max() < 1e-6
        )
    error = (p.mc - p.truth["mc"]).numpy()  # the returns scatter around Q^beta
    assert abs(error.mean()) < 0.25 and error.std() > 0.1
    policy = np.eye(4)[best.argmax(1)]
    assert abs(p.greedy_return(best) - (best * policy).sum(1)[:goal].mean()) < 1e-9
    assert p.greedy_return(best) >= p.greedy_return(beta) > p.greedy_return(-best)
    g = torch.Generator().manual_seed(0)
    counts = p.fresh(p.obs[:500], 10, g).sum((0, 1)) / 5000
    assert counts.sum() == 1 and (counts - 0.25).abs().max() < 0.03
    assert torch.equal(p.choices(p.obs[:7], 10, g), torch.eye(4).expand(7, 4, 4))


# ------------------------------------------------------------------------------------ data: continuous
class Clock(gym.Env):
    """Observes (episode, time); pays its action, plus 1 at the end of an episode of `ends` steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([-2.0]), np.array([6.0]), dtype=np.float64)
    log = []

    def __init__(self, ends=10**9, times_out=False):
        self.episode, self.t, self.ends, self.times_out = -1, 0, ends, times_out
        Clock.log.clear()

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        over = self.t == self.ends
        reward = float(action[0]) + over
        Clock.log.append((self.episode, self.t - 1, float(action[0]), reward))
        end = (over and not self.times_out, over and self.times_out)
        return np.array([self.episode, float(self.t)]), reward, *end, {}


class Unbounded(Clock):
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))


for name, kind, kwargs in (
    ("Clock-v0", Clock, {}),
    ("Clock7-v0", Clock, {"ends": 7}),
    ("ClockOut-v0", Clock, {"ends": 20, "times_out": True}),
    ("ClockUnbounded-v0", Unbounded, {}),
):
    if name not in gym.registry:
        gym.register(name, entry_point=kind, kwargs=kwargs)


def test_every_episode_starts_from_a_seed_of_its_own(monkeypatch):
    seeds, reset = [], Clock.reset
    monkeypatch.setattr(
        Clock, "reset", lambda self, seed=None, **k: seeds.append(seed) or reset(self, seed, **k)
    )
    for seed in (3, 4):
        seeds.clear()
        d.continuous(d.Args(env_id="Clock-v0", transitions=1_500, gamma=0.5, seed=seed), CPU)
        assert seeds[0] == seed and len(set(seeds)) == len(seeds) == 2 + 8


@pytest.mark.parametrize("env_id, kept, length", [("Clock-v0", 1000, 1008), ("Clock7-v0", 7, 7)])
def test_continuous_data(env_id, kept, length):
    """gamma 0.5: a tail of 8 steps makes returns whole to 1 %. Terminal steps stay, cut ones do not exist.
    8,000 rows of later episodes are held out, every fourth of them."""
    p = d.continuous(d.Args(env_id=env_id, transitions=1200, gamma=0.5), CPU)
    log = np.array(Clock.log)
    episode, t, act, rew = log.T
    rows = np.flatnonzero(t < kept)[:1200]
    ends = np.append(np.flatnonzero(np.diff(episode)), len(log) - 1)
    assert len(p.rew) == len(rows) == 1200 and set(t[ends]) == {length - 1}
    scale = np.abs(rew[rows]).max()
    assert np.allclose(p.rew, rew[rows] / scale, atol=1e-6)
    assert np.allclose(p.act[:, 0], (act[rows] - 2) / 4, atol=1e-6)  # [-2, 6] seen as [-1, 1]
    assert -1 <= p.act.min() < -0.98 and 0.98 < p.act.max() <= 1
    terminal = (t[rows] == length - 1) & (length == 7)
    assert np.array_equal(p.done > 0, terminal) and terminal.any() == (length == 7)
    assert np.allclose(p.next_act[~terminal, 0], (act[rows + 1][~terminal] - 2) / 4, atol=1e-6)
    obs = np.stack([episode, t], 1)
    mean, std = obs[rows].mean(0), obs[rows].std(0) + 1e-3
    assert np.allclose(p.obs, (obs[rows] - mean) / std, atol=1e-4)
    assert np.allclose(p.next_obs, (obs[rows] + [0, 1] - mean) / std, atol=1e-4)
    held = np.flatnonzero((t < kept) & (episode > episode[rows[-1]]))[:8000:4]
    assert held.max() >= len(log) - max(length, 2 * 7), "more is played than is used"
    assert [len(x) for x in p.held] == [2000] * 3
    assert np.allclose(p.held[0], (obs[held] - mean) / std, atol=1e-4)
    assert np.allclose(p.held[1][:, 0], (act[held] - 2) / 4, atol=1e-6)
    for found, at in ((p.mc, rows), (p.held[2], held)):
        for i in range(0, 1200, 37):
            end = ends[np.searchsorted(ends, at[i])] + 1
            total = sum(0.5**j * x / scale for j, x in enumerate(rew[at[i] : end]))
            assert abs(float(found[i]) - total) < 1e-5
    assert p.truth == {} and p.greedy_return is None and p.all_pairs is None
    g = torch.Generator().manual_seed(0)
    for draw in (p.fresh, p.choices):
        x = draw(p.obs[:300], 10, g)
        assert x.shape == (300, 10, 1) and -1 <= x.min() < -0.99 and 0.99 < x.max() <= 1
        assert abs(float(x.var()) - 1 / 3) < 0.02


def test_an_environment_with_its_own_time_limit_or_without_bounds_is_refused(capsys):
    args = d.Args(gamma=0.5)
    refused(
        lambda: d.continuous(replace(args, env_id="ClockOut-v0"), CPU),
        capsys,
        "time limit of its own",
    )
    refused(
        lambda: d.continuous(replace(args, env_id="ClockUnbounded-v0"), CPU), capsys, "bounded Box"
    )


# --------------------------------------------------------------------------------------- data: dataset
@pytest.fixture
def quick_clone(monkeypatch):
    clone = d.clone
    monkeypatch.setattr(
        d, "clone", lambda problem, args, device: clone(problem, args, device, steps=5)
    )


def dataset_args(path, **changes) -> d.Args:
    return d.Args(**dict(problem="dataset", dataset=str(path), transitions=0, gamma=0.9) | changes)


def whole_rows(terminal, timeout, gamma) -> list:
    """Rows with a next action (or none needed) whose return is cut by no more than 1 %, by loops."""
    rows = []
    for i in range(len(terminal)):
        j = next(
            j
            for j in range(i, len(terminal))
            if terminal[j] or timeout[j] or j == len(terminal) - 1
        )
        if terminal[j] or (j > i and gamma ** (j - i + 1) < 0.01):
            rows.append(i)
    return rows


@pytest.mark.parametrize("n", [1000, 950])  # the last episode ends in a time-out, or in the middle
@pytest.mark.parametrize("keys", ["all", "no next_observations", "no timeouts"])
def test_dataset_rows(n, keys, quick_clone, capsys):
    drop = (
        {}
        if keys == "all"
        else {"timeouts": None}
        if keys == "no timeouts"
        else {"next_obs": False}
    )
    with h5py.File(write_d4rl("x.hdf5", n=n, act_dim=2, **drop)) as f:
        h = {k: v[()] for k, v in f.items()}
    timeout = h.get("timeouts", np.zeros(n, bool))
    rows = whole_rows(h["terminals"], timeout, 0.9)
    if keys == "all":  # episodes of 100, in turn terminated and timed out, which lose their last 43
        assert len(rows) == (5 * 100 + 5 * 57 if n == 1000 else 5 * 100 + 4 * 57 + 7)
    p = d.dataset(dataset_args("x.hdf5"), CPU)
    scale = np.abs(h["rewards"][rows]).max()
    assert np.allclose(p.rew, h["rewards"][rows] / scale) and np.array_equal(
        p.act, h["actions"][rows]
    )
    assert np.array_equal(p.done, h["terminals"][rows].astype(np.float32))
    mean, std = h["observations"][rows].mean(0), h["observations"][rows].std(0) + 1e-3
    assert np.allclose(p.obs, (h["observations"][rows] - mean) / std, atol=1e-5)
    live, after = ~h["terminals"][rows], np.minimum(np.array(rows) + 1, n - 1)
    assert np.allclose(p.next_obs[live], ((h["observations"][after] - mean) / std)[live], atol=1e-5)
    assert np.array_equal(p.next_act[live], h["actions"][after][live])
    for k in range(0, len(rows), 23):
        total, i = 0.0, rows[k]
        for j in range(i, n):
            total += 0.9 ** (j - i) * h["rewards"][j] / scale
            if h["terminals"][j] or timeout[j]:
                break
        assert abs(total - float(p.mc[k])) < 1e-5
    few = d.dataset(dataset_args("x.hdf5", transitions=210), CPU)
    units = np.abs(h["rewards"][rows[:210]]).max() / scale
    assert torch.allclose(few.rew * units, p.rew[:210]) and torch.allclose(
        few.mc * units, p.mc[:210]
    )
    assert p.held is None and "nothing is said of errors" in capsys.readouterr().out
    later = [
        i for i in rows if i // 100 > rows[209] // 100
    ]  # of whole episodes after the last one used
    mean, std = h["observations"][rows[:210]].mean(0), h["observations"][rows[:210]].std(0) + 1e-3
    assert np.allclose(few.held[0], (h["observations"][later] - mean) / std, atol=1e-5)
    assert np.array_equal(few.held[1], h["actions"][later]) and len(later) > 300
    assert torch.allclose(few.held[2] * units, p.mc[[rows.index(i) for i in later]])


def test_at_most_8000_rows_are_held_out_and_a_quarter_of_them_measured(quick_clone):
    with h5py.File(write_d4rl("x.hdf5", n=20_000)) as f:
        rows, act = whole_rows(f["terminals"][()], f["timeouts"][()], 0.9), f["actions"][()]
    p = d.dataset(dataset_args("x.hdf5", transitions=100), CPU)
    assert np.array_equal(p.held[1], act[[i for i in rows if i >= 100][:8000:4]])


def test_without_timeouts_episodes_end_where_next_observations_jump(quick_clone):
    with h5py.File(write_d4rl("x.hdf5", n=1000)) as f:
        h = {k: v[()] for k, v in f.items()}
    h["next_observations"][99::100] += 1  # the last observation of an episode begins no other
    write_d4rl("with.hdf5", n=1000, next_observations=h["next_observations"])
    write_d4rl("without.hdf5", n=1000, next_observations=h["next_observations"], timeouts=None)
    one, other = (d.dataset(dataset_args(name), CPU) for name in ("with.hdf5", "without.hdf5"))
    assert (
        all(torch.equal(x, y) for x, y in zip(one[:7], other[:7]))
        and len(one.rew) == 5 * 100 + 5 * 57
    )


def test_the_files_next_observations_are_used(quick_clone):
    other = np.random.default_rng(3).normal(size=(1000, 3)).astype(np.float32)
    with h5py.File(write_d4rl("x.hdf5", n=1000, next_observations=other)) as f:
        rows = whole_rows(f["terminals"][()], f["timeouts"][()], 0.9)
        obs = f["observations"][()][rows]
    p = d.dataset(dataset_args("x.hdf5"), CPU)
    assert np.allclose(p.next_obs, (other[rows] - obs.mean(0)) / (obs.std(0) + 1e-3), atol=1e-5)


def test_the_clone_finds_a_gaussian_policy():
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(4000, 2)).astype(np.float32)
    noise = 0.3 * rng.normal(size=(4000, 1)).astype(np.float32)
    act = np.tanh(obs[:, :1]) + noise
    write_d4rl(
        "x.hdf5", n=4000, observations=obs, actions=act, next_observations=np.roll(obs, -1, 0)
    )
    clone, d.clone = d.clone, lambda problem, args, device: clone(problem, args, device, steps=400)
    try:
        p = d.dataset(dataset_args("x.hdf5", batch_size=256), CPU)
    finally:
        d.clone = clone
    # standardised observations: undo it for the expected mean
    with h5py.File("x.hdf5") as f:
        rows = whole_rows(f["terminals"][()], f["timeouts"][()], 0.9)
    fresh = p.fresh(p.obs, 200, torch.Generator().manual_seed(0))
    assert fresh.shape == (len(rows), 200, 1) and not fresh.requires_grad
    usual = np.abs(obs[rows, 0]) < 1.5
    error = fresh.mean(1)[:, 0].numpy()[usual] - np.tanh(obs[rows, 0][usual])
    assert np.abs(error).mean() < 0.05 and abs(fresh.std(1)[usual].mean() - 0.3) < 0.03
    low, high = p.act.min(), p.act.max()
    assert low <= fresh.min() and fresh.max() <= high
    x = p.choices(p.obs, 10, torch.Generator().manual_seed(0))
    assert low <= x.min() < low + 0.01 and high - 0.01 < x.max() <= high


def with_value(n, row, value, columns=None):
    x = np.zeros((n, columns) if columns else n)
    x[row] = value
    return x


BAD_DATA = [
    ({"rewards": None}, "rewards"),
    ({"terminals": None}, "terminals"),
    ({"actions": np.zeros((7, 1))}, "(7, 1)"),
    ({"actions": np.zeros(1000)}, "(1000,)"),
    ({"observations": np.zeros((1000, 3, 2))}, "(1000, 3, 2)"),
    ({"rewards": np.zeros((1000, 1))}, "(1000, 1)"),
    ({"rewards": np.float32(3)}, "expected rows"),
    ({"terminals": np.zeros(10)}, "(10,)"),
    ({"timeouts": np.zeros(10)}, "(10,)"),
    ({"next_observations": np.zeros((1000, 2))}, "(1000, 2)"),
    ({"rewards": with_value(1000, 17, math.nan)}, "'rewards' is nan at row 17"),
    ({"actions": with_value(1000, 5, math.inf, 1)}, "'actions' is inf at row 5"),
    ({"next_observations": with_value(1000, 9, 1e300, 3)}, "'next_observations' is inf at row 9"),
    ({"timeouts": np.ones(1000), "terminals": np.zeros(1000)}, "0 rows"),
    ({"observations": np.array([b"x"] * 1000)}, "expected a D4RL-layout"),
]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(
    "changes, named", BAD_DATA, ids=[" ".join([*x[0], x[1]]) for x in BAD_DATA]
)
def test_a_bad_dataset_is_refused_in_one_line(changes, named, capsys):
    write_d4rl("x.hdf5", n=1000, **changes)
    err = refused(lambda: d.train(dataset_args("x.hdf5", cures=())), capsys, named)
    assert "x.hdf5" in err and not Path("runs").exists()


def test_a_file_that_is_none_is_refused(capsys):
    Path("x.hdf5").write_text("not HDF5")
    for path in ("x.hdf5", "nowhere.hdf5"):
        refused(lambda: d.train(dataset_args(path)), capsys, path)  # noqa: B023
    write_d4rl("cut.hdf5", n=1000)
    Path("cut.hdf5").write_bytes(Path("cut.hdf5").read_bytes()[:5000])
    refused(lambda: d.train(dataset_args("cut.hdf5")), capsys, "cut.hdf5")


# -------------------------------------------------------------------- what the members of a seed share
def fingerprint(*tensors) -> str:
    return hashlib.sha256(
        b"".join(x.detach().contiguous().numpy().tobytes() for x in tensors)
    ).hexdigest()


def test_every_layer_starts_as_torchs_linear_and_from_numbers_of_its_own():
    """Uniform within 1 / sqrt(inputs)."""
    learner = a_learner(targets=("td",), cures=(), seeds=2, width=40, depth=3)
    pairs = list(zip(learner.net.weights, learner.net.biases))
    for (W, b), fan_in in zip(pairs, (5, 40, 40, 40)):
        assert (
            W.shape[1] == fan_in and W.abs().max() <= fan_in**-0.5 and b.abs().max() <= fan_in**-0.5
        )
        assert W.abs().max() > 0.9 * fan_in**-0.5 and not torch.equal(W[0], W[1])
    assert not torch.isclose(pairs[1][0], pairs[2][0]).any(1).all() and W.shape[2] == 1
    first = [W[0].flatten()[:40] for W, _ in pairs]
    for x, y in itertools.combinations([x / x.abs().max() for x in first], 2):
        assert not torch.allclose(x, y, atol=0.2)


def test_members_of_a_seed_start_alike_and_see_the_same_batches():
    learner = a_learner(seeds=3)
    other = a_learner(seeds=3, targets=("td",), cures=())
    weights = {}
    for one in (learner, other):
        for i, m in enumerate(one.members):
            for net in (one.net, one.target):
                weights.setdefault(m.seed, set()).add(
                    fingerprint(*[p[i] for p in net.parameters()])
                )
    assert all(len(x) == 1 for x in weights.values()) and len(set.union(*weights.values())) == 3
    batches = {}
    for step in range(4):
        for one in (learner, other):
            batch = one.batch()
            for i, m in enumerate(one.members):
                batches.setdefault((step, m.seed), set()).add(fingerprint(*[x[i] for x in batch]))
            one.update(step + 1)  # which draws another one
    assert all(len(x) == 1 for x in batches.values()) and len(set.union(*batches.values())) == 12


def test_the_batch_is_drawn_from_the_seeds_own_generator():
    p = a_problem()
    learner = a_learner(p, seed=4, seeds=2, targets=("sarsa", "td"), cures=())
    for _ in range(2):
        found = learner.batch()
    for i, seed in enumerate((4, 5, 4, 5)):
        g = torch.Generator().manual_seed(seed)
        for _ in range(2):
            rows = torch.randint(40, (5,), generator=g)
            fresh, choices = (torch.rand(5, 10, 2, generator=g) * 2 - 1 for _ in range(2))
        assert all(torch.equal(x[i], y) for x, y in zip(found, (rows, fresh, choices)))


def test_targets_of_a_seed_differ_only_in_y():
    """One update from the same weights: the networks of two targets part by nothing but y."""
    p = a_problem()
    same = p._replace(mc=p.rew, truth=dict.fromkeys(ALL, p.rew))
    learner = a_learner(same, seeds=2, cures=(), gamma=0.0)
    for step in range(1, 4):
        learner.update(step)
    for w in learner.net.parameters():
        assert torch.equal(w, w[:2].repeat(7, *[1] * (w.dim() - 1)))
    learner = a_learner(p, seeds=2, cures=(), learning_rate=1e-3)
    for step in range(1, 201):
        learner.update(step)
    for i, j in itertools.combinations(range(14), 2):  # nor is moving td over again
        assert any((w[i] - w[j]).abs().max() > 1e-3 for w in learner.net.parameters()), (i, j)


# --------------------------------------------------------------------------------------------- targets
def test_targets_by_hand():
    """Q'(s, a) = c relu(s + 3 a) + 1 with c = 2 for td, 6 for the td of the second seed, 4 for the others;
    gamma 0.5."""
    column = lambda *x: torch.tensor(x)[:, None]
    p = d.Problem(
        obs=column(0.0, 0.0, 0.0),
        act=column(0.0, 0.0, 0.0),
        rew=torch.tensor([10.0, 20.0, 30.0]),
        done=torch.tensor([0.0, 0.0, 1.0]),
        next_obs=column(1.0, -2.0, 5.0),
        next_act=column(1.0, 0.0, 1.0),
        mc=torch.tensor([7.0, 8.0, 9.0]),
        fresh=None,
        choices=None,
        truth={"oracle": torch.tensor([-1.0, -2.0, -3.0])},
        greedy_return=None,
        all_pairs=None,
    )
    learner = a_learner(p, seeds=2, cures=(), width=1, depth=1, batch_size=3, gamma=0.5)
    target = learner.target
    for i, m in enumerate(learner.members):
        c = 4.0 if m.target != "td" else 2.0 if m.seed == 1 else 6.0
        target.weights[0][i] = torch.tensor([[1.0], [3.0]])
        target.weights[1][i], target.biases[0][i], target.biases[1][i] = c, 0.0, 1.0
    rows = torch.tensor([0, 1, 2]).expand(14, 3)
    fresh = torch.tensor([2.0, 1.0, 0, 0, 0, 0, 0, 0, 0, -1.0])[None, :, None].repeat(3, 1, 1)
    choices = torch.tensor([-1.0, 0.5, 3.0, 0, 0, 0, 0, 0, 0, 0])[None, :, None].repeat(3, 1, 1)
    y, act = learner.targets(rows, fresh.expand(14, 3, 10, 1), choices.expand(14, 3, 10, 1))
    expected = {
        "mc": ([7, 8, 9], [1, 0, 1]),
        "oracle": ([-1, -2, -3], [1, 0, 1]),
        "sarsa": ([10 + 0.5 * 17, 20 + 0.5 * 1, 30], [1, 0, 1]),  # relu(1 + 3), relu(-2)
        "td": ([10 + 0.5 * 15, 20 + 0.5 * 9, 30], [2, 2, 2]),  # relu(1 + 6), relu(-2 + 6)
        # s' = 1: 7 + 4 + 7 * 1 + 0; s' = -2: 4 + 1
        "td10": ([10 + 0.5 * (4 * 1.8 + 1), 20 + 0.5 * (4 * 0.5 + 1), 30], [2, 2, 2]),
        "q": ([10 + 0.5 * 41, 20 + 0.5 * 29, 30], [3, 3, 3]),  # relu(1 + 9), relu(-2 + 9)
        "moving": (
            [10 + 0.5 * 43, 20 + 0.5 * 25, 30],
            [2, 2, 2],
        ),  # the other seed's td, not its own net
    }
    for i, m in enumerate(learner.members):
        if m.seed == 2:
            continue
        assert torch.allclose(y[i], torch.tensor(expected[m.target][0], dtype=y.dtype)), m.target
        assert act[i, :, 0].tolist() == expected[m.target][1], m.target


def test_fresh_actions_differ_where_they_should():
    learner = a_learner(
        seeds=2, cures=(), targets=("sarsa", "td", "td10", "q", "moving"), batch_size=32
    )
    seen = set()
    for _ in range(3):
        rows, fresh, choices = learner.batch()
        _, act = learner.targets(rows, fresh, choices)
        at = {(m.target, m.seed): act[i] for i, m in enumerate(learner.members)}
        data = learner.problem.next_act[rows[0]]
        for seed in (1, 2):
            assert torch.equal(at["td", seed], at["moving", seed])
            assert torch.equal(at["td", seed], at["td10", seed])  # the first of ten
            assert not torch.isclose(at["td", seed], at["sarsa", seed]).any()
            assert not torch.isclose(at["td", seed], at["q", seed]).all()
            seen.add(fingerprint(at["td", seed]))
        assert torch.equal(at["sarsa", 1], data)
    assert len(seen) == 6


# ------------------------------------------------- the batched ensemble and separate networks, each cure
EPS = 1e-13  # of Adam, small: what the ensemble does after a refit is exact but for it


class Plain:
    """One network trained by itself: matrices, loops over rows for y, an Adam of its own."""

    def __init__(self, learner, i, args):
        self.args, self.m, self.p = args, learner.members[i], learner.problem
        pairs = zip(learner.net.weights, learner.net.biases)
        self.start = [x[i].detach().clone() for pair in pairs for x in pair]
        self.target = self.start
        self.begin()

    def begin(self):
        self.params = [x.clone().requires_grad_() for x in self.start]
        self.optim = torch.optim.Adam(self.params, lr=self.args.learning_rate, eps=EPS)

    def phi(self, params, x, noise=None):
        for W, b in zip(params[:-2:2], params[1:-2:2]):
            x = x @ W + b
            if self.m.cure == "layer":
                mean = x.mean(-1, keepdim=True)
                x = (x - mean) / (((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5).sqrt()
            x = x.clamp(min=0)
            if self.m.cure == "dropout" and noise is not None:
                x = torch.where(noise < self.m.value, 0, x / (1 - self.m.value))
        return x / (x**2).sum(-1, keepdim=True).sqrt() if self.m.cure == "unit" else x

    def q(self, params, s, a, noise=None):
        return (self.phi(params, torch.cat([s, a], -1), noise) @ params[-2] + params[-1])[..., 0]

    def y(self, rows, fresh, choices, bootstrap):
        """By loops; `bootstrap` is the network whose target network is asked."""
        p, y, acts = self.p, [], []
        for j, row in enumerate(rows.tolist()):
            ask = lambda a: float(bootstrap.q(bootstrap.target, p.next_obs[row], a))  # noqa: B023
            kind, a = self.m.target, fresh[j, 0]
            if kind in ("td", "moving"):
                value = ask(a)
            elif kind == "td10":
                value = sum(ask(x) for x in fresh[j]) / 10
            elif kind == "q":
                a = max(choices[j], key=ask)
                value = ask(a)
            else:
                a = p.next_act[row]
                value = ask(a)
            y.append(float(p.rew[row]) + (0 if p.done[row] else self.args.gamma * value))
            if kind in ("mc", "oracle"):
                y[-1] = float(p.mc[row] if kind == "mc" else p.truth["oracle"][row])
            acts.append(a)
        return torch.tensor(y), torch.stack(acts)

    def loss(self, rows, y, next_act, noise):
        p, cure, c = self.p, self.m.cure, self.m.value
        phi = self.phi(self.params, torch.cat([p.obs[rows], p.act[rows]], -1), noise)
        error = (((phi @ self.params[-2] + self.params[-1])[:, 0] - y) ** 2).sum() / len(rows)
        if cure in ("dr3", "dr3abs", "dr3stop"):
            total = 0
            for j, row in enumerate(rows.tolist()):
                other = self.phi(self.params, torch.cat([p.next_obs[row], next_act[j]]))
                dot = (phi[j] * (other.detach() if cure == "dr3stop" else other)).sum()
                total = total + (0 if p.done[row] else dot.abs() if cure == "dr3abs" else dot)
            return error, c * total / len(rows)
        if cure == "sl":
            return error, c * sum(x @ x for x in phi) / len(rows)
        if cure == "rank":
            s = torch.linalg.svdvals(phi)
            return error, c * (s[0] ** 2 - s[-1] ** 2)
        if cure == "l2":
            return error, c * sum((W**2).sum() for W in self.params[::2])
        return error, 0 * error

    def step(self, rows, y, next_act, noise, t):
        error, penalty = self.loss(rows, y, next_act, noise)
        self.optim.zero_grad()
        (error + penalty).backward()
        self.optim.step()
        cure, tau = self.m.cure, self.m.value if self.m.cure == "tau" else self.args.tau
        if cure != "refit":
            self.target = [
                (1 - tau) * old + tau * x.detach() for old, x in zip(self.target, self.params)
            ]
        elif t % self.m.value == 0:
            self.target = [x.detach() for x in self.params]
            self.begin()
        return error, penalty


@pytest.mark.parametrize(
    "cure_target, depth, batch_size", [("td", 2, 5), ("q", 1, 9), ("sarsa", 3, 5)]
)
def test_the_ensemble_is_separate_networks_trained_one_by_one(
    cure_target, depth, batch_size, double, monkeypatch
):
    """Every target and cure, two seeds, eight updates: losses, penalties, weights and target networks. The
    batch is once smaller and once larger than the network is wide (6): the rank penalty's two forms."""
    noise = torch.rand(batch_size, 6)  # dropout's draws, the same table for everyone
    monkeypatch.setattr(torch, "rand_like", lambda x: noise.expand_as(x))
    learner = a_learner(cure_target=cure_target, depth=depth, batch_size=batch_size, seeds=2)
    args = learner.args
    learner.optim.param_groups[0]["eps"] = EPS
    plains = {m[0:1] + m[3:]: Plain(learner, i, args) for i, m in enumerate(learner.members)}
    assert len(plains) == len(learner.members) == 2 * (len(ALL) + len(CURES))
    draw, batch = learner.batch, []
    learner.batch = lambda: batch
    for t in range(1, 9):
        batch = draw()
        error, penalty = learner.loss(*batch)
        told = learner.update(t)["loss"]
        assert torch.equal(told, error)
        y = {}
        for i, (key, plain) in enumerate(plains.items()):
            bootstrap = plains["td", "none", 3 - key[2]] if key[0] == "moving" else plain
            y[key] = plain.y(*[x[i] for x in batch], bootstrap)
        for i, (key, plain) in enumerate(plains.items()):
            e, p = plain.step(batch[0][i], *y[key], noise, t)
            assert torch.isclose(
                e, error[i], rtol=1e-3 if plain.m.cure == "refit" else 1e-5
            ) and torch.isclose(p, penalty[i], atol=1e-9), (t, key)
            if key[0] == cure_target and plain.m.cure in (
                "dr3",
                "dr3abs",
                "dr3stop",
                "sl",
                "rank",
                "l2",
            ):
                assert p != 0
        for i, (key, plain) in enumerate(plains.items()):
            for k, (W, T) in enumerate(zip(plain.params, plain.target)):
                at = lambda net: (net.weights if k % 2 == 0 else net.biases)[k // 2][i]  # noqa: B023
                assert torch.allclose(at(learner.net), W, rtol=1e-6, atol=1e-7), (t, key)
                assert torch.allclose(at(learner.target), T, rtol=1e-6, atol=1e-7), (t, key)
    x = torch.rand(len(plains), 11, 5)
    learner.net.eval()
    for i, (key, plain) in enumerate(plains.items()):
        expected = plain.q(plain.params, x[i, :, :3], x[i, :, 3:])
        assert torch.allclose(learner.net(x)[i], expected, atol=1e-6), key
        assert torch.allclose(learner.net(x[[i]], [i])[0], expected, atol=1e-6), key


def test_the_refit_starts_again_as_a_new_run_would(double):
    """After a refit the network and its optimiser are those of the first update; the target is the fit."""
    learner = a_learner(targets=("td",), cures=("refit:4",), seeds=1, tau=0.1)
    first = [p[1].detach().clone() for p in learner.net.parameters()]
    for t in range(1, 5):
        learner.update(t)
        fitted = [p[1].detach().clone() for p in learner.target.parameters()]
    assert all(torch.equal(p[1], x) for p, x in zip(learner.net.parameters(), first))
    assert not any(torch.equal(x, y) for x, y in zip(fitted, first))
    batch = learner.batch()
    learner.batch = lambda: batch
    before = [p[1].detach().clone() for p in learner.net.parameters()]
    learner.update(5)
    for p, old in zip(learner.net.parameters(), before):  # Adam's first step is lr times the sign
        moved = (p[1] - old)[p.grad[1].abs() > 1e-4]
        assert torch.allclose(moved.abs(), torch.full_like(moved, 1e-2), rtol=1e-2)


def test_gradients_of_dr3_by_finite_differences(double):
    """Of the penalty alone, in every weight below the features: both sides, absolute value, one side."""
    values = {}
    for cure in ("dr3:1", "dr3abs:1", "dr3stop:1", "sl:1", "rank:1"):
        learner = a_learner(targets=("td",), cures=(cure,), seeds=1, width=4, depth=1, batch_size=6)
        batch, W = learner.batch(), learner.net.weights[0]
        (grad,) = torch.autograd.grad(learner.loss(*batch)[1].sum(), W)
        assert (grad[0] == 0).all()
        numeric = torch.zeros_like(grad[1])
        for k in range(numeric.numel()):
            both = []
            for eps in (1e-6, -1e-6):
                with torch.no_grad():
                    W[1].view(-1)[k] += eps
                    both.append(float(learner.loss(*batch)[1][1]))
                    W[1].view(-1)[k] -= eps
            numeric.view(-1)[k] = (both[0] - both[1]) / 2e-6
        values[cure] = numeric
        same = torch.allclose(grad[1], numeric, atol=1e-5)
        assert same == (cure != "dr3stop:1"), cure  # whose gradient is of one side only
        if cure == "dr3:1":
            signed = grad[1]
        if cure == "dr3abs:1":  # features of ReLU networks have no negative dot products
            assert torch.allclose(grad[1], signed)
        if cure == "dr3stop:1":
            assert grad[1].norm() > 0 and not torch.allclose(grad[1], signed)


def test_dr3abs_differs_where_dots_are_negative(double):
    learner = a_learner(targets=("td",), cures=("dr3:1", "dr3abs:1"), seeds=1, cure_target="td")
    features = learner.net.features
    turned = lambda x, who=slice(None): features(x, who) * x[..., :1].sign()
    learner.net.features, batch = turned, learner.batch()
    dots, p = [], learner.problem
    _, next_act = learner.targets(*batch)
    for row, a in zip(batch[0][0], next_act[0]):
        phi = turned(torch.cat([p.obs[row], p.act[row]]).expand(3, 1, 5))[0, 0]
        phi_next = turned(torch.cat([p.next_obs[row], a]).expand(3, 1, 5))[0, 0]
        dots.append((phi @ phi_next).item() * (1 - float(p.done[row])))
    assert min(dots) < 0 < max(dots)
    expected = torch.tensor([0, sum(dots), sum(map(abs, dots))]) / len(dots)
    assert torch.allclose(learner.loss(*batch)[1], expected)


def test_dropout_drops_its_share_in_training_alone():
    learner = a_learner(targets=("td",), cures=("dropout:0.4", "unit"), seeds=1, width=400, depth=1)
    x = torch.rand(3, 200, 5)
    on = learner.net.features(x)
    learner.net.eval()
    off = learner.net.features(x)
    assert torch.equal(on[0], off[0]) and torch.equal(on[2], off[2])
    alive = off[1] > 0
    assert abs(float((on[1][alive] == 0).float().mean()) - 0.4) < 0.01
    kept = on[1][alive] > 0
    assert torch.allclose(on[1][alive][kept], off[1][alive][kept] / 0.6)
    assert not learner.target.training
    assert torch.allclose(off[2].norm(dim=-1), torch.ones(200))


# ----------------------------------------------------------------------------------------- diagnostics
def srank_by_loop(s, share=0.99) -> int:
    k, total = 0, 0.0
    while total < share * sum(s) - 1e-9 * sum(s):
        total, k = total + s[k], k + 1
    return k


def test_diagnostics_by_loops():
    """Actions that are a function of the state and the draw's number, so that row order does not matter."""
    some = lambda s, m, g: torch.stack([torch.cos(s[:, :2] + j) for j in range(m)], 1)
    p = a_problem(n=50, fresh=some, choices=some)
    learner = a_learner(p, seeds=1, cures=("unit", "layer", "dropout:0.5"), gamma=0.9, width=7)
    for t in range(1, 20):
        learner.update(t)
    state = torch.get_rng_state()
    found = d.diagnose(learner, learner.args, 19)
    assert torch.equal(state, torch.get_rng_state()) and learner.net.training
    learner.net.eval()
    rows, draws = torch.arange(50), [some(p.next_obs, 10, None)] * 2
    n = len(learner.members)
    with torch.no_grad():
        y, a = learner.targets(rows.expand(n, 50), *[x.expand(n, 50, 10, 2) for x in draws])
        here = torch.cat([p.obs, p.act], -1).expand(n, -1, -1)
        own, cross = d.gradient_dots(
            learner.net, here, torch.cat([p.next_obs.expand(n, -1, -1), a], -1)
        )
        for i, m in enumerate(learner.members):
            both = [torch.cat([p.obs, p.act], -1), torch.cat([p.next_obs, a[i]], -1)]
            (*layers, phi), (*_, phi_next) = (
                [h[0].double().numpy() for h in learner.net.features(x[None], [i], hidden=True)]
                for x in both
            )
            layers.append(phi)
            q = learner.net(torch.cat([p.obs, p.act], -1)[None], [i])[0].double().numpy()
            s = np.linalg.svd(phi, compute_uv=False)
            live = [j for j in range(50) if not p.done[j]]
            dots = [sum(phi[j] * phi_next[j]) for j in live]
            norm = lambda x: math.sqrt(sum(x**2))
            cosine = lambda x, y: sum(x * y) / max(norm(x) * norm(y), 1e-30)  # noqa: B023
            error = [(q[j] - float(y[i, j])) ** 2 for j in range(50)]
            truth = p.truth[m.target].double().numpy()
            dead = [
                (abs(h[:, k]).mean() <= 0.025 * abs(h).mean()) for h in layers for k in range(7)
            ]
            expected = {
                "srank": srank_by_loop(s),
                "rank_pca": srank_by_loop(s**2),
                "effective_rank": math.exp(-sum(x * math.log(x) for x in s / sum(s) if x > 0)),
                "sigma_max": s[0] / math.sqrt(50),
                "feature_dot": np.mean(dots),
                "feature_cos": np.mean([cosine(phi[j], phi_next[j]) for j in live]),
                "feature_norm": np.mean([norm(x) for x in phi]),
                "q_mean": np.mean(q),
                "dormant": np.mean(dead),
                "td_error": np.mean(error) / np.var(y[i].double().numpy(), ddof=1),
                "reg_sl": np.mean([norm(x) ** 2 for x in phi]),
                "reg_td": np.mean([norm(x) ** 2 for x in phi]) - 0.9 * sum(dots) / 50,
                "reg_sl_full": float(own[i].mean()),
                "reg_td_full": float(own[i].mean())
                - 0.9 * sum(float(cross[i, j]) for j in live) / 50,
                "truth": truth.mean(),
                "q_error": np.mean((q - truth) ** 2) / truth.var(ddof=1),
            }
            assert found[i].keys() == expected.keys() | {"sigma_min"}
            assert abs(found[i]["sigma_min"] - s[-1] / math.sqrt(50)) < 1e-5
            for k, value in expected.items():
                assert abs(found[i][k] - value) < 1e-4 * max(1, abs(value)), (
                    m,
                    k,
                    found[i][k],
                    value,
                )


def test_greedy_returns_are_those_of_each_members_own_table():
    args = tiny(targets=("td", "q"), cures=(), seeds=2)
    p = d.gridworld(args, CPU)
    learner, P, r = d.Learner(p, args, CPU), *grid_by_hand(3)
    with torch.no_grad():
        for W in learner.net.weights:
            W.normal_()
        found, pairs = d.diagnose(learner, args, 1), torch.cat(p.all_pairs, -1)
        for i, one in enumerate(found):
            best = learner.net(pairs[None], [i])[0].view(9, 4).argmax(1).numpy()
            V = np.linalg.solve(np.eye(9) - 0.99 * P[np.arange(9), best], r[np.arange(9), best])
            assert abs(one["greedy_return"] - V[:8].mean()) < 1e-6
    assert len({one["greedy_return"] for one in found}) == 4


def test_measured_rows_are_drawn_from_all_and_gradients_from_256_of_them(monkeypatch):
    seen, sizes, dots = [], [], d.gradient_dots
    draw = lambda s, m, g: seen.append(s[:, 0].int()) or torch.zeros(len(s), m, 2)
    monkeypatch.setattr(
        d, "gradient_dots", lambda net, x, y: sizes.append(x.shape[1]) or dots(net, x, y)
    )
    next_obs = torch.arange(3000.0)[:, None].expand(3000, 3)
    p = a_problem(n=3000, fresh=draw, choices=draw, next_obs=next_obs)
    learner = a_learner(p, seeds=1, cures=(), targets=("td",))
    d.diagnose(learner, learner.args, 1)
    assert len(set(seen[0].tolist())) == 2048 and sizes == [256]
    assert abs((seen[0] >= 1500).float().mean() - 0.5) < 0.05


def test_errors_to_trained_and_to_held_out_returns():
    held, mc = a_problem(n=30, seed=8), torch.linspace(-2, 5, 30)
    p = a_problem(n=50, truth={})._replace(held=[held.obs, held.act, mc])
    learner = a_learner(p, seeds=2, cures=("unit",), targets=("mc", "td", "q"), cure_target="td")
    found = d.diagnose(learner, learner.args, 1)
    for i, m in enumerate(learner.members):
        assert ("return_error_holdout" in found[i]) == (m.target != "q"), m
        if m.target == "q":
            continue
        for name, at, true in (("return_error", p, p.mc), ("return_error_holdout", held, mc)):
            q = learner.net(torch.cat([at.obs, at.act], -1)[None], [i])[0].detach().double().numpy()
            true = true.double().numpy()
            assert abs(found[i][name] - np.mean((q - true) ** 2) / np.var(true, ddof=1)) < 1e-4, (
                m,
                name,
            )


def test_full_gradients_by_autograd_of_one_row(double):
    learner = a_learner(targets=("td",), cures=("unit", "layer"), cure_target="td", depth=2)
    g, net = torch.Generator().manual_seed(3), learner.net.eval()
    n = len(learner.members)
    x, x_next = (torch.randn(n, 4, 5, generator=g) for _ in range(2))
    own, cross = d.gradient_dots(net, x, x_next)

    def gradient(i, row):
        q = net(row.expand(n, 1, -1))[i, 0]
        return torch.cat([p[i].flatten() for p in torch.autograd.grad(q, list(net.parameters()))])

    for i, b in itertools.product(range(n), range(4)):
        mine, other = gradient(i, x[i, b]), gradient(i, x_next[i, b])
        torch.testing.assert_close(own[i, b], mine @ mine)
        torch.testing.assert_close(cross[i, b], mine @ other)


def test_diagnostics_read_planted_spectra():
    """One layer that copies nonnegative inputs: row j is scale[j % 6] times a unit vector, so the singular
    values are scale * sqrt(10). And a measurement takes 2,048 rows at most."""
    for scale, srank, pca in (
        ([1, 1, 1, 1, 1, 1], 6, 6),
        ([100, 100, 2, 2, 0, 0], 3, 2),
        ([9, 0.05, 0.04, 0, 0, 0], 1, 1),
        ([50, 30, 19, 0.5, 0.4, 0.1], 3, 3),
        ([50, 30, 18.9, 0.6, 0.4, 0.1], 4, 3),
        ([0, 0, 0, 0, 0, 0], 1, 1),
    ):
        obs = torch.eye(6).repeat(10, 1) * torch.tensor(scale).repeat(10)[:, None]
        p = a_problem(
            n=60, obs_dim=6, act_dim=1, obs=obs, next_obs=obs.roll(6, 0), done=torch.zeros(60)
        )
        learner = a_learner(p, seeds=1, cures=(), targets=("mc",), depth=1)
        with torch.no_grad():
            learner.net.weights[0].copy_(torch.eye(7)[:, :6])
            learner.net.biases[0].zero_()
        (found,) = d.diagnose(learner, learner.args, 1)
        s = np.array(scale) / math.sqrt(6)  # over sqrt(60)
        assert (found["srank"], found["rank_pca"]) == (srank, pca), scale
        assert abs(found["sigma_max"] - s.max()) < 1e-4 and abs(found["sigma_min"] - s.min()) < 1e-4
        share = s / max(s.sum(), 1e-30)
        entropy = -sum(x * math.log(x) for x in share if x > 0)
        assert abs(found["effective_rank"] - math.exp(entropy)) < 1e-3
        dead = np.mean(np.array(scale) <= 0.025 * np.mean(scale))
        assert abs(found["dormant"] - dead) < 1e-6
        square = sum(x**2 for x in scale) / 6
        assert abs(found["feature_dot"] / max(square, 1) - square / max(square, 1)) < 1e-5
        assert abs(found["reg_td"] - (1 - learner.args.gamma) * square) < 1e-3 * max(1, square)
    seen = []
    draw = lambda s, m, g: seen.append(len(s)) or torch.zeros(len(s), m, 2)
    p = a_problem(n=3000, fresh=draw, choices=draw)
    learner = a_learner(p, seeds=1, cures=(), targets=("td",))
    d.diagnose(learner, learner.args, 1)
    assert seen == [2048, 2048]


def test_the_smallest_divergence_and_its_reading():
    """Seed 004: v(s) = w phi(s), phi(s) = 1, phi(s') = 2, no reward, only the first transition is trained.
    Fitting v(s) to gamma v(s') multiplies w by 2 gamma: it doubles without discount. TD's semi-gradient
    grows exactly where the implicit regulariser phi.phi - gamma phi.phi' is negative."""
    phi, phi_next = torch.ones(1, 1), 2 * torch.ones(1, 1)
    fitted = torch.linalg.lstsq(phi, 1.0 * phi_next * 3.0).solution  # w = 3 before
    assert fitted == 6
    for gamma in (0.0, 0.3, 0.49, 0.51, 0.9, 1.0):
        w = torch.ones(1, requires_grad=True)
        for _ in range(300):
            loss = ((phi * w - (gamma * phi_next * w).detach()) ** 2).sum() / 2
            (grad,) = torch.autograd.grad(loss, w)
            w = (w - 0.01 * grad).detach().requires_grad_()
        read = d.alignment(phi, phi_next, torch.ones(1))
        reg_td = float((phi**2).sum()) - gamma * float(read["feature_dot"])
        assert (float(w.detach()) > 1) == (reg_td < 0), gamma
        assert abs(math.log(float(w.detach())) / 300 - math.log1p(-0.01 * reg_td)) < 1e-4
        assert read["feature_cos"] == 1


def test_member_without_variance_gives_finite_numbers():
    p = a_problem(rew=torch.zeros(40), mc=torch.zeros(40), truth={})
    learner = a_learner(p, seeds=1, cures=(), targets=("mc", "td", "q"), gamma=0.0)
    found = d.diagnose(learner, learner.args, 1)
    assert all(math.isfinite(x) for one in found for x in one.values())
    names = [[k for k in one if k.endswith("_error") and k != "td_error"] for one in found]
    assert names == [["return_error"], ["return_error"], []]  # q values another policy


# ------------------------------------------------------------------------------------ intervals, claims
def t_quantile(df: int) -> float:
    """97.5 %, by Simpson's rule on Student's density and bisection."""
    c = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    low, high = 1.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        x = np.linspace(0, middle, 2001)
        f = c * (1 + x**2 / df) ** (-(df + 1) / 2)
        area = (f[0] + f[-1] + 4 * f[1:-1:2].sum() + 2 * f[2:-1:2].sum()) * (x[1] - x[0]) / 3
        low, high = (middle, high) if area < 0.475 else (low, middle)
    return low


def test_intervals():
    assert d.interval(np.array([5.0])) == 0
    assert abs(d.interval(np.array([1.0, 2.0, 3.0])) - 4.303 / math.sqrt(3)) < 1e-3
    assert abs(d.interval(np.array([0.0, 1.0])) - 12.706 / 2) < 5e-3
    for n in range(2, 60):
        values = np.arange(n, dtype=float)
        sd = math.sqrt(sum((x - values.mean()) ** 2 for x in values) / (n - 1))
        expected = t_quantile(n - 1) * sd / math.sqrt(n)
        assert abs(d.interval(values) / expected - 1) < (0.001 if n <= 10 else 0.02), n


BASE = {"srank": 240, "feature_dot": 100, "q_mean": -10, "q_error": 1.0}


def planted(**targets) -> dict:
    """results of flat curves at BASE; metric=(quarter, half, final) or one number changes one;
    `td__dr3` stands for the cure dr3:1 on td."""
    results = {}
    for name, changes in targets.items():
        target, _, cure = name.partition("__")
        curves = {k: v if isinstance(v, tuple) else (v,) * 3 for k, v in (BASE | changes).items()}
        entries = {
            k: dict(zip(("quarter_seeds", "half_seeds", "final_seeds"), ([x] for x in v)))
            for k, v in curves.items()
            if v[0] is not None
        }
        results.setdefault(target, {})[cure and "dr3:1" or "none"] = entries
    return results


RANK, DOTS = (
    "with bootstrapping on unseen actions the rank falls",
    "with bootstrapping on unseen actions the dot products rise",
)
SETTLED, ERRORS = (
    "the dot products rise while Q has settled",
    "the lower rank comes with a larger error",
)
MC, ORACLE = "with mc targets the rank does not fall", "with oracle targets the rank does not fall"
MOVING = "a moving target alone does not lower the rank"
LOWERS, RESCUES = (
    "dr3:1 on td lowers the dot products and leaves Q alone",
    "dr3:1 on td rescues the rank",
)
HELPS = "dr3:1 on td lowers the error"
RISING = (150, 250, 300)

NO = dict.fromkeys((RANK, DOTS, SETTLED, ERRORS), 0)
PLANTED = [
    # flat curves, however high, are not rising; equal ranks have not fallen
    (planted(sarsa={}, td={}), NO),
    (planted(sarsa={}, td={"feature_dot": 500}), NO),
    (planted(sarsa={}, td={"feature_dot": (300, 300, 325)}), NO),
    (planted(sarsa={}, td={"feature_dot": (100, 400, 300)}), NO),
    # rising, by the second half alone; twice the other's
    (planted(sarsa={}, td={"feature_dot": RISING}), NO | {DOTS: 1, SETTLED: 1}),
    (planted(sarsa={}, td={"feature_dot": (50, 90, 120)}), NO | {SETTLED: 1}),
    (planted(sarsa={"feature_dot": 160}, td={"feature_dot": RISING}), NO | {SETTLED: 1}),
    # rising together with Q, in either direction
    (planted(sarsa={}, td={"feature_dot": RISING, "q_mean": (-5, -10, -12)}), NO | {DOTS: 1}),
    (planted(sarsa={}, td={"feature_dot": RISING, "q_mean": (9, 10, 12)}), NO | {DOTS: 1}),
    (planted(sarsa={}, td={"feature_dot": RISING, "q_mean": (0, -10, -10.9)}), NO | {DOTS: 1, SETTLED: 1}),
    # ranks: 15 %; errors need both a fallen rank and a larger error
    (planted(sarsa={}, td={"srank": (240, 220, 205)}), NO),
    (planted(sarsa={}, td={"srank": (240, 220, 203)}), NO | {RANK: 1}),
    (planted(sarsa={}, td={"srank": 190, "q_error": 1.05}), NO | {RANK: 1}),
    (planted(sarsa={}, td={"srank": 190, "q_error": 1.5}), NO | {RANK: 1, ERRORS: 1}),
    (planted(sarsa={}, td={"srank": 230, "q_error": 1.5}), NO),
    (planted(sarsa={"q_error": None}, td={"q_error": None}), {RANK: 0, DOTS: 0, SETTLED: 0}),
    # absent: without td, without anything to compare it with; mc stands in for sarsa
    (planted(sarsa={}), {}),
    (planted(td={"feature_dot": RISING}), {}),
    (planted(mc={}, td={"srank": 150}), NO | {RANK: 1, MC: 1}),
    (planted(mc={"srank": 100}, sarsa={}, td={"srank": 150}), NO | {RANK: 1, MC: 1}),
    # supervised ranks, from a quarter of the way in
    (planted(mc={"srank": (240, 300, 230)}), {MC: 1}),
    (planted(mc={"srank": (240, 240, 225)}), {MC: 0}),
    (planted(oracle={"srank": (200, 240, 240)}, mc={"srank": (200, 150, 150)}), {ORACLE: 1, MC: 0}),
    # a moving target: beside sarsa, whatever td does
    (planted(sarsa={}, td={"srank": 150}, moving={}), NO | {RANK: 1, MOVING: 1}),
    (planted(sarsa={}, td={"srank": 150}, moving={"srank": 180}), NO | {RANK: 1, MOVING: 0}),
    (planted(td={"srank": 150}, moving={}), {}),
    # DR3: dots down to sarsa's (or by a tenth, if td's are there already), Q within a tenth
    (planted(td={"feature_dot": 300}, td__dr3={"feature_dot": 40}), {LOWERS: 1, HELPS: 0}),
    (planted(td={"feature_dot": 300}, td__dr3={"feature_dot": 300}), {LOWERS: 0, HELPS: 0}),
    (planted(td={"feature_dot": 300}, td__dr3={"feature_dot": 40, "q_mean": -8.9}), {LOWERS: 0, HELPS: 0}),
    (planted(td={"feature_dot": 300}, td__dr3={"feature_dot": 40, "q_mean": -9.1}), {LOWERS: 1, HELPS: 0}),
    (planted(td={"feature_dot": 300}, td__dr3={"feature_dot": 40, "q_mean": 10}), {LOWERS: 0, HELPS: 0}),
    (planted(td={"q_mean": 0.0}, td__dr3={"feature_dot": 40}), {LOWERS: 0, HELPS: 0}),
    (planted(sarsa={}, td={}, td__dr3={}), NO | {LOWERS: 0, HELPS: 0, RESCUES: 0}),
    (planted(sarsa={}, td={"feature_dot": 300}, td__dr3={"feature_dot": 120}),
     NO | {LOWERS: 0, HELPS: 0, RESCUES: 0}),
    (planted(sarsa={}, td={"feature_dot": 300}, td__dr3={"feature_dot": 99}),
     NO | {LOWERS: 1, HELPS: 0, RESCUES: 0}),
    # the error: down by a tenth
    (planted(td={}, td__dr3={"q_error": 0.91}), {LOWERS: 0, HELPS: 0}),
    (planted(td={}, td__dr3={"q_error": 0.89}), {LOWERS: 0, HELPS: 1}),
    # the rank: up by 5 %, and to 85 % of sarsa's
    (planted(sarsa={}, td={"srank": 150}, td__dr3={"srank": 158}),
     NO | {RANK: 1, LOWERS: 0, HELPS: 0, RESCUES: 0}),
    (planted(sarsa={}, td={"srank": 150}, td__dr3={"srank": 210}),
     NO | {RANK: 1, LOWERS: 0, HELPS: 0, RESCUES: 1}),
    (planted(sarsa={}, td={"srank": 230}, td__dr3={"srank": 240}), NO | {LOWERS: 0, HELPS: 0, RESCUES: 0}),
]  # fmt: skip


BOUNDS = [  # both sides of each bound
    # dots: above twice sarsa's, up by 10 %; Q settled within 10 %
    (planted(sarsa={}, td={"feature_dot": (150, 160, 198)}), NO | {SETTLED: 1}),
    (planted(sarsa={}, td={"feature_dot": (150, 160, 202)}), NO | {DOTS: 1, SETTLED: 1}),
    (planted(sarsa={}, td={"feature_dot": (150, 200, 219)}), NO),
    (planted(sarsa={}, td={"feature_dot": (150, 200, 221)}), NO | {DOTS: 1, SETTLED: 1}),
    (planted(sarsa={}, td={"feature_dot": RISING, "q_mean": (0, -10, -11.1)}), NO | {DOTS: 1}),
    # errors: 10 %
    (planted(sarsa={}, td={"srank": 190, "q_error": 1.09}), NO | {RANK: 1}),
    (planted(sarsa={}, td={"srank": 190, "q_error": 1.11}), NO | {RANK: 1, ERRORS: 1}),
    # a moving target: within 15 %
    (planted(sarsa={}, td={}, moving={"srank": 203}), NO | {MOVING: 0}),
    (planted(sarsa={}, td={}, moving={"srank": 205}), NO | {MOVING: 1}),
    # DR3: a tenth down where nothing else is known; the rank 5 % up and within 15 % of sarsa's
    (planted(td={}, td__dr3={"feature_dot": 91}), {LOWERS: 0, HELPS: 0}),
    (planted(td={}, td__dr3={"feature_dot": 89}), {LOWERS: 1, HELPS: 0}),
    (planted(sarsa={}, td={"srank": 200}, td__dr3={"srank": 209}),
     NO | {RANK: 1, LOWERS: 0, HELPS: 0, RESCUES: 0}),
    (planted(sarsa={}, td={"srank": 200}, td__dr3={"srank": 211}),
     NO | {RANK: 1, LOWERS: 0, HELPS: 0, RESCUES: 1}),
    (planted(sarsa={}, td={"srank": 150}, td__dr3={"srank": 203}),
     NO | {RANK: 1, LOWERS: 0, HELPS: 0, RESCUES: 0}),
    (planted(sarsa={}, td={"srank": 150}, td__dr3={"srank": 205}),
     NO | {RANK: 1, LOWERS: 0, HELPS: 0, RESCUES: 1}),
]  # fmt: skip


@pytest.mark.parametrize("results, expected", PLANTED + BOUNDS)
def test_claims_on_planted_curves(results, expected):
    found = d.claims(results)
    words = {"supported (1 of 1 seeds)": 1, "not supported (0 of 1 seeds)": 0}
    assert {k: words[word] for k, (word, _) in found.items()} == expected


def test_claims_name_their_numbers():
    results = planted(
        sarsa={}, td={"srank": 190, "feature_dot": RISING, "q_mean": -11, "q_error": 2.0}
    )
    found = d.claims(results)
    assert found[RANK][1] == "srank ends at 190 for td and 240 for sarsa"
    assert (
        "+20%" in found[DOTS][1]
        and "3.0 times that of sarsa" in found[DOTS][1]
        and "+0%" in found[DOTS][1]
    )
    assert "q_error is 2.00 times that of sarsa" in found[ERRORS][1]
    cured = {"feature_dot": 40, "q_mean": -8, "srank": 99}
    found = d.claims(planted(sarsa={}, td={"feature_dot": 300}, td__dr3=cured))
    assert found[LOWERS][1] == "dot product 300 -> 40, mean Q changes by +20%"
    assert found[RESCUES][1] == "srank 240 -> 99, 240 for sarsa"


def without_errors(results: dict, *targets: str) -> dict:
    """As outside the gridworld: errors to the returns, and none for these targets."""
    for target, cures in results.items():
        for entries in cures.values():
            error = entries.pop("q_error")
            if target not in targets:
                entries |= {
                    "return_error_holdout": error,
                    "return_error": {k: [0.0] for k in error},
                }
    return results


@pytest.mark.parametrize("order", [*itertools.permutations(("mc", "sarsa", "td"))])
def test_errors_are_compared_wherever_both_are_known(order):
    """On held-out episodes: the returns that a network was trained on, it may know by heart."""
    levels = {"mc": {}, "sarsa": {"q_error": 1.0}, "td": {"srank": 150, "q_error": 2.0}}
    results = planted(**{k: levels[k] for k in order}, td__dr3={"q_error": 1.5})
    found = d.claims(without_errors(results, "mc"))
    assert found[ERRORS][0] == found[HELPS][0] == "supported (1 of 1 seeds)"
    assert "return_error_holdout is 2.00 times that of sarsa" in found[ERRORS][1]


def test_errors_are_not_compared_where_one_is_unknown():
    for names in (("td", "mc"), ("mc", "td"), ("td", "q"), ("sarsa", "mc")):
        found = d.claims(without_errors(planted(**{k: {} for k in names}), "mc", "q"))
        assert ERRORS not in found
    results = {"mc": planted(td={}, td__dr3={})["td"]}  # a cure of mc, without held-out episodes
    assert not {HELPS, HELPS.replace("td", "mc")} & set(d.claims(without_errors(results, "mc")))


def test_claims_are_decided_seed_by_seed():
    """Paired: srank 100 against 200, then 300 against 200, whose means alone would say that nothing fell."""
    results = planted(sarsa={}, td={})
    for target, values in (("sarsa", [200, 200, 200]), ("td", [100, 150, 300])):
        for metric in results[target]["none"].values():
            for k in metric:
                metric[k] = metric[k] * 3
        results[target]["none"]["srank"]["final_seeds"] = values
    assert d.claims(results)[RANK][0] == "undecided (2 of 3 seeds)"


def test_results_are_means_over_seeds_of_the_nearest_measurements():
    learner = a_learner(targets=("sarsa", "td"), cures=("unit",), seeds=3)
    steps = [7, 9, 21, 39, 40]
    value = lambda step, i: step * 10.0 + i**2
    history = [[{"srank": value(s, i)} for i in range(9)] for s in steps]
    results = d.collect_results(learner, steps, history, replace(learner.args, num_updates=40))
    for k, (target, label) in enumerate((("sarsa", "none"), ("td", "none"), ("td", "unit"))):
        entry = results[target][label]["srank"]
        for name, step in (("quarter", 9), ("half", 21), ("final", 40)):
            mine = [value(step, i) for i in range(3 * k, 3 * k + 3)]
            mean = sum(mine) / 3
            assert abs(entry[name] - mean) < 1e-9
            sd = math.sqrt(sum((x - mean) ** 2 for x in mine) / 2)
            assert abs(entry[name + "_interval"] - 4.303 * sd / math.sqrt(3)) < 1e-9


def test_the_table_holds_the_final_means_under_their_names():
    entry = lambda x, seeds: {
        "quarter": -1.0,
        "half": -2.0,
        "final": x,
        "final_interval": x / 4,
        "final_seeds": seeds,
    }
    several = {"td": {"none": {"q_mean": entry(8.0, [7, 9]), "srank": entry(4.0, [4, 4])}}}
    several["q"] = {"dr3:1": {"srank": entry(2.0, [2, 2])}}
    head, one, other = d.table(several).splitlines()
    assert head.split() == ["target", "cure", "srank", "q_mean"]
    assert (
        one.split() == "td none 4 +- 1 8 +- 2".split()
        and other.split() == "q dr3:1 2 +- 0.5".split()
    )
    assert d.table({"mc": {"none": {"srank": entry(3.0, [3])}}}).splitlines()[1].split() == [
        "mc",
        "none",
        "3",
    ]


# --------------------------------------------------------------------------------------------- mistakes
GOOD = ["--problem", "gridworld", "--grid", "3"]
BAD = [
    ("--cures dr4:1", "dr4:1"),
    ("--cures dr3", "dr3:NUMBER"),
    ("--cures dr3:", "dr3:"),
    ("--cures dr3:x", "dr3:x"),
    ("--cures dr3:nan", "dr3:nan"),
    ("--cures dr3:inf", "dr3:inf"),
    ("--cures dr3:-1", "dr3:-1"),
    ("--cures dr3:1:2", "dr3:1:2"),
    ("--cures unit:3", "unit:3"),
    ("--cures none", "none"),
    ("--cures none:3", "none"),
    ("--cures dropout:0", "dropout:0"),
    ("--cures dropout:1", "dropout:1"),
    ("--cures tau:0", "tau:0"),
    ("--cures tau:1.5", "tau:1.5"),
    ("--cures refit:0", "refit:0"),
    ("--cures refit:2.5", "refit:2.5"),
    ("--cures unit unit", "different"),
    ("--targets td td", "different"),
    ("--targets", "at least one"),
    ("--targets oracle td", "oracle"),
    ("--targets moving sarsa --cures", "moving"),
    ("--targets td moving --seeds 1", "moving"),
    ("--targets mc sarsa", "--cure-target td"),
    ("--cure-target q", "--cure-target q"),
    ("--cure-target sarsa --cures", "--cure-target"),
    ("--problem gridworld --env Hopper-v5", "--env-id"),
    ("--problem gridworld --dataset x.hdf5", "--dataset"),
    ("--dataset x.hdf5", "--dataset"),
    ("--problem dataset", "--dataset"),
    ("--grid 5", "--grid"),
    ("--problem gridworld --grid 2", "--grid"),
    ("--problem gridworld --grid 9 --transitions 40", "no episode reached the goal"),
    ("--transitions 0", "--transitions"),
    ("--transitions 31", "--transitions"),
    ("--problem dataset --dataset x.hdf5 --transitions 31", "--transitions"),
    ("--gamma 1", "--gamma"),
    ("--gamma nan", "--gamma"),
    ("--learning-rate 0", "--learning-rate"),
    ("--tau 0", "--tau"),
    ("--seeds 0", "--seeds"),
    ("--seed -1", "--seed"),
    ("--num-updates 0", "--num-updates"),
    ("--width 0", "--width"),
    ("--wandb-entity me", "--track"),
    ("--precision tf32 --no-cuda", "GPU"),
    ("--env NoSuch-v0", "NoSuch"),
    ("--env CartPole-v1", "CartPole-v1"),
    ("--resume nowhere", "nowhere"),
    ("--problem gridworld --width 1_000_000", "GiB"),
]


@pytest.mark.parametrize("line, named", BAD, ids=[x[0] for x in BAD])
def test_a_users_mistake_is_one_line_and_status_2(line, named, capsys):
    refused(lambda: d.train(tyro.cli(d.Args, args=line.split())), capsys, named)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "line", ["--targets sarsa dqn", "--cure-target oracle", "--cure-target moving"]
)
def test_unknown_words_are_refused_by_the_command_line(line, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(d.Args, args=line.split())
    assert stop.value.code == 2


# --------------------------------------------------------------------------------------------- promises
@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(d, "draw", lambda *a: None)


FULL = dict(
    targets=ALL, cures=("dr3:0.01", "rank:1e-4", "dropout:0.2", "refit:7", "layer"), seeds=2
)


def killed_at(monkeypatch, update: int, signum=signal.SIGTERM):
    """The signal comes during this update of this process."""
    real, calls = d.Learner.update, [0]

    def counted(self, step):
        calls[0] += 1
        if calls[0] == update:
            os.kill(os.getpid(), signum)
        return real(self, step)

    monkeypatch.setattr(d.Learner, "update", counted)
    return lambda: monkeypatch.setattr(d.Learner, "update", real)


@pytest.mark.parametrize("stops", [(1,), (8, 5), (20, 19), (39,), (40,)])
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(
    stops, no_figure, monkeypatch, capsys
):
    """Each number is how many updates a process lives; 8 is a measurement, 40 the end."""
    args = tiny(**FULL, checkpoint_frequency=11)
    d.train(replace(args, run_dir="whole"))
    for n in stops:
        undo = killed_at(monkeypatch, n)
        run = str(only_run(".")) if Path("runs").exists() else None
        with pytest.raises(SystemExit) as stop:
            d.train(replace(args, resume=run))
        assert stop.value.code == 143 and "to go on" in capsys.readouterr().out
        undo()
        torch.rand(1000)  # another state of the random numbers
    run, (whole,) = only_run("."), Path("whole").iterdir()
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == sum(stops)
    result = d.train(replace(args, resume=str(run)))
    assert only_run(".") == run
    assert_same_checkpoint(run / "checkpoint.pt", whole / "checkpoint.pt")
    assert metrics(run) == metrics(whole) and len(metrics(run)) > 1000
    assert result["results"] == json.loads((whole / "summary.json").read_text())["results"]


def test_ctrl_c_in_a_real_process_and_the_printed_command(tmp_path):
    """Its default targets and cures; the command that it prints goes on, in another process."""
    line = ["--problem", "gridworld", "--grid", 3, "--width", 16, "--num-updates", 60, "--seeds", 1]
    line += ["--transitions", 300, "--diagnostics-frequency", 7]
    line = [str(x) for x in line]
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import dr3_analysis as d, tyro
update = d.Learner.update
def once(self, step):
    if step == 31: os.kill(os.getpid(), {int(signal.SIGINT)})
    return update(self, step)
d.Learner.update = once
d.train(tyro.cli(d.Args, args={line!r}))
"""
    options = dict(cwd=tmp_path, capture_output=True, text=True, env=one_thread(), timeout=180)
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 130, done.stdout + done.stderr
    run = only_run(tmp_path)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 31
    _, script, *words = shlex.split(done.stdout.split("to go on:")[1].strip())
    assert script == "dr3_analysis.py"
    done = run_script("dr3_analysis.py", *words, cwd=tmp_path)
    assert "mc none" in done.stdout
    d.train(replace(tyro.cli(d.Args, args=line), run_dir="whole"))
    (whole,) = Path("whole").iterdir()
    assert only_run(tmp_path) == run
    assert_same_checkpoint(run / "checkpoint.pt", whole / "checkpoint.pt")
    assert metrics(run) == metrics(whole)


LINES = [
    "--targets td sarsa --cures dr3:1e-3 unit",
    "--targets mc --cures",
    "--problem gridworld --seeds 3",
    "--problem dataset --dataset x.hdf5 --cure-target sarsa --no-cuda",
]


@pytest.mark.parametrize("line", LINES)
def test_the_command_that_a_stopped_run_prints_gives_its_arguments(line):
    args = tyro.cli(d.Args, args=line.split())
    d.check(args)
    _, _, *words = shlex.split(d.command(args, Path("there")))
    assert tyro.cli(d.Args, args=words) == replace(args, resume="there")


def test_resume_auto_finds_its_run(no_figure, capsys):
    args = tiny(num_updates=10, seeds=1)
    d.train(args)
    d.train(replace(args, num_updates=20, resume="auto"))
    assert torch.load(only_run(".") / "checkpoint.pt", weights_only=True)["step"] == 20
    d.train(replace(args, num_updates=20, cures=("unit",), resume="auto"))
    assert "no run" in capsys.readouterr().out and len(list(Path("runs").iterdir())) == 2


def test_resume_with_other_arguments_or_other_data_is_refused(no_figure, monkeypatch, capsys):
    d.train(tiny(num_updates=10))
    run = str(only_run("."))
    changes = dict(
        cures=("unit",),
        targets=("td",),
        gamma=0.9,
        learning_rate=2e-3,
        grid=4,
        seeds=4,
        seed=5,
        width=9,
    )
    for name, value in changes.items():
        args = tiny(num_updates=10, resume=run, **{name: value})
        refused(lambda: d.train(args), capsys, d.flag(name))  # noqa: B023
    write_d4rl("x.hdf5", n=1000)
    monkeypatch.setattr(d, "clone", lambda problem, args, device: torch.nn.Linear(3, 2))
    args = dataset_args("x.hdf5", run_dir="more", num_updates=5, width=8, seeds=1)
    d.train(args)
    write_d4rl("x.hdf5", n=1000, seed=1)
    (run,) = Path("more").iterdir()
    refused(lambda: d.train(replace(args, resume=str(run), num_updates=6)), capsys, "other data")


def test_resume_with_other_held_out_rows_is_refused(no_figure, monkeypatch, capsys):
    d.train(tiny(num_updates=10, problem="continuous", grid=8))
    make = d.continuous

    def other(args, device):
        problem = make(args, device)
        return problem._replace(held=(problem.held[0] + 1, *problem.held[1:]))

    monkeypatch.setattr(d, "continuous", other)
    args = tiny(num_updates=20, problem="continuous", grid=8, resume=str(only_run(".")))
    refused(lambda: d.train(args), capsys, "other data")


def test_a_crafted_or_foreign_checkpoint_is_refused(capsys):
    class Crafted:
        def __reduce__(self):
            return os.mkdir, ("harm",)

    d.train(tiny(num_updates=5))
    run = only_run(".")
    good = torch.load(run / "checkpoint.pt", weights_only=True)
    for bad in (good | {"extra": Crafted()}, good | {"script": "sac"}, good | {"format": 0}):
        torch.save(bad, run / "checkpoint.pt")
        refused(lambda: d.train(tiny(num_updates=9, resume=str(run))), capsys, "checkpoint.pt")
    buffer = io.BytesIO()
    torch.save(good, buffer)
    (run / "checkpoint.pt").write_bytes(buffer.getvalue()[:-100])
    refused(lambda: d.train(tiny(num_updates=9, resume=str(run))), capsys, "checkpoint.pt")
    assert not Path("harm").exists()


def test_measuring_changes_nothing(no_figure):
    """How often it is measured, saved or shown; the last measurement is the same too."""
    runs, base = [], tiny(**FULL, num_updates=20)
    for name, frequency in (("often", 1), ("seldom", 0)):
        changes = dict(diagnostics_frequency=frequency, checkpoint_frequency=3 * frequency)
        d.train(replace(base, run_dir=name, **changes))
        runs += Path(name).iterdir()
    saved = [torch.load(run / "checkpoint.pt", weights_only=True) for run in runs]
    a, b = (flatten({k: x[k] for k in ("learner", "random")}) for x in saved)
    assert a.keys() == b.keys() and len(a) > 30
    for k, x in a.items():
        assert torch.equal(x, b[k]) if isinstance(x, torch.Tensor) else x == b[k], k
    steps = [sorted({s for s, _, _ in metrics(run)}) for run in runs]
    assert steps == [list(range(1, 21)), [5, 10, 20]]  # never without what the claims need
    common = [[r for r in metrics(run) if r[0] in (5, 10, 20)] for run in runs]
    assert common[0] == common[1] and len(common[0]) > 300


def test_same_seed_same_numbers_another_seed_others(no_figure):
    numbers = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        d.train(tiny(run_dir=name, seed=seed, num_updates=10))
        numbers.append(metrics(next(Path(name).iterdir())))
    strip = lambda rows: [r[2] for r in rows]
    assert numbers[0] == numbers[1] and strip(numbers[0]) != strip(numbers[2])


def test_one_member_with_nan_stops_the_run_before_a_checkpoint(monkeypatch, capsys):
    real = d.Learner.update

    def poisoned(self, step):
        if step == 21:
            self.net.weights[0].data[self.chosen(target="sarsa", seed=2), 0, 0] = math.nan
        return real(self, step)

    monkeypatch.setattr(d.Learner, "update", poisoned)
    err = refused(lambda: d.train(tiny(checkpoint_frequency=5)), capsys, "not finite", status=3)
    assert "step 24" in err and "sarsa none, seed 2" in err
    assert torch.load(only_run(".") / "checkpoint.pt", weights_only=True)["step"] == 20


@pytest.mark.parametrize(
    "changes", [{"cures": ("rank:1",)}, {"depth": 6}, {"diagnostics_frequency": 1}]
)
def test_divergence_ends_with_status_3(changes, capsys):
    """Also where singular values of what is not finite are asked for."""
    args = tiny(**dict(learning_rate=1e12, depth=3, targets=("td",), cures=()) | changes)
    refused(lambda: d.train(args), capsys, "not finite", status=3)


def test_memory_is_said_first(capsys):
    d.train(tiny(num_updates=2))
    said = re.search(r"networks and one update, roughly: ([\d.]+) MiB on", capsys.readouterr().out)
    p = d.gridworld(tiny(), CPU)
    big = d.memory(p, tiny(width=1000, seeds=2))
    assert len(d.all_members(tiny(seeds=2))) == 8
    parameters = 8 * (20 * 1000 + 1000 * 1000)
    assert float(said[1]) > 0 and big > 4 * 4 * parameters
    assert d.memory(p, tiny(width=1000, seeds=4)) == 2 * big


@pytest.mark.parametrize(
    "changes, named", [({"seeds": 10**8}, "GiB"), ({"transitions": 10**8}, "--trans")]
)
def test_sizes_that_no_machine_has_are_refused_at_once(changes, named, capsys):
    refused(lambda: d.train(tiny(**changes)), capsys, named)


# --------------------------------------------------------------------------------- what a run leaves behind
def test_what_a_run_leaves_behind(capsys):
    args = tiny(**FULL, num_updates=48)
    result = d.train(args)
    out, run = capsys.readouterr().out, only_run(".")
    assert run.name.startswith("gridworld__dr3_analysis__1__")
    assert json.loads((run / "summary.json").read_text()) == result
    keys = {"num_updates", "updates_per_second", "wall_seconds", "device", "results", "claims"}
    assert (
        result.keys() == keys and result["num_updates"] == 48 and result["updates_per_second"] > 0
    )
    assert (run / "figure.png").read_bytes()[:4] == b"\x89PNG" and (
        run / "figure.png"
    ).stat().st_size > 20_000
    header = json.loads((run / "args.json").read_text())
    assert header["info"]["members"] == 24 and len(header["info"]["data_sha256"]) == 64
    kinds = [(t, "none") for t in ALL] + [("td", c) for c in FULL["cures"]]
    assert [(t, c) for t in ALL for c in result["results"][t]] == sorted(
        kinds, key=lambda k: ALL.index(k[0])
    )
    names = "srank rank_pca effective_rank sigma_max sigma_min feature_dot feature_cos feature_norm dormant "
    names += "q_mean q_error td_error truth reg_sl reg_td reg_sl_full reg_td_full greedy_return"
    rows = {(step, tag): float(value) for step, tag, value in metrics(run)}
    assert len(rows) == len(metrics(run)) and {s for s, _ in rows} == {8, 12, 16, 24, 32, 40, 48}
    for target, cure in kinds:
        found = result["results"][target][cure]
        assert found.keys() == set(names.split())
        for metric, entry in found.items():
            moments = ("quarter", "half", "final")
            assert entry.keys() == {m + x for m in moments for x in ("", "_interval", "_seeds")}
            for moment, step in zip(moments, (12, 24, 48)):
                a, b = (
                    rows[step, f"diagnostics/{target}/{cure}/{seed}/{metric}"] for seed in (1, 2)
                )
                assert abs(entry[moment] - (a + b) / 2) < 1e-9 * max(1, abs(a), abs(b))
                half = 12.71 * abs(a - b) / 2  # two values: sd / sqrt(2) is half their distance
                assert abs(entry[moment + "_interval"] - half) < 1e-6 * max(1, half)
    lines = out.splitlines()
    (head,) = [i for i, x in enumerate(lines) if x.startswith("target cure")]
    for target, cure in kinds:
        (line,) = [x for x in lines[head:] if x.startswith(f"{target} {cure} ")]
        assert f"{result['results'][target][cure]['srank']['final']:.3g} +- " in line
    assert {RANK, DOTS, SETTLED, ERRORS, MC, ORACLE, MOVING} <= result["claims"].keys()
    for name, (word, text) in result["claims"].items():
        assert re.fullmatch(r"(supported|not supported|undecided) \([0-2] of 2 seeds\)", word)
        assert f"- {name}: {word}. {text}" in lines


def test_the_rate_leaves_out_the_figure(monkeypatch):
    import time

    monkeypatch.setattr(d, "draw", lambda *a: time.sleep(1.5))
    result = d.train(tiny(num_updates=20, seeds=1))
    assert result["updates_per_second"] > 20 / 1.5


def test_the_figure_has_a_line_for_each_kind_and_says_what_it_shows(monkeypatch):
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    learner = a_learner(targets=("sarsa", "td"), cures=("unit",), seeds=2)
    panels = {
        k: v for k, v in d.PANELS.items() if k != "return_error_holdout"
    }  # one of the errors is there
    history = [
        [{k: 10.0 * s + i for k in panels} | {"truth": 7.0} for i in range(6)] for s in (1, 2, 3)
    ]
    d.draw(learner, [1, 2, 3], history, Path("figure.png"))
    monkeypatch.undo()
    (figure,) = figures
    axes = figure.get_axes()
    assert [a.get_title() for a in axes] == list(panels.values())
    for axis, metric in zip(axes, panels):
        lines = [x for x in axis.get_lines() if len(x.get_xdata()) == 3]
        assert [x.get_label() for x in lines] == ["sarsa", "td", "td unit"]
        for k, line in enumerate(lines):
            assert line.get_ydata().tolist() == [10 * s + 2 * k + 0.5 for s in (1, 2, 3)]
        assert len({(x.get_color(), x.get_linestyle()) for x in lines}) == 3
        assert len(axis.collections) == 3 and (len(axis.get_lines()) > 3) == (metric == "q_mean")
        band = axis.collections[0].get_paths()[0].vertices[:, 1]
        half = 12.71 / 2
        assert abs(band.min() - (10.5 - half)) < 1e-6 and abs(band.max() - (30.5 + half)) < 1e-6
    plt.close(figure)
    assert set(d.COLOURS) == set(ALL) and len(set(d.COLOURS.values())) == len(ALL)


def documented_commands() -> list:
    commands = []
    for file in ("README.md", "benchmarks/README.md", "dr3_analysis.py"):
        text = (ROOT / file).read_text().replace("\\\\\n", " ").replace("\\\n", " ")
        text = text if file.endswith(".md") else text.split('"""')[1]
        commands += re.findall(r"python dr3_analysis\.py[^\n`#&|;]*", text)
    return sorted({" ".join(c.split()) for c in commands})


def test_there_are_commands():
    assert len(documented_commands()) >= 4


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_run(command, quick_clone):
    """Parsed as written, then cut to a few updates of tiny networks."""
    args = tyro.cli(d.Args, args=shlex.split(command)[2:])
    if args.dataset:
        write_d4rl(args.dataset, n=3000, length=700)
    short = dict(num_updates=12, width=16, batch_size=16, seeds=2, diagnostics_frequency=6)
    result = d.train(replace(args, **short))
    assert result["num_updates"] == 12 and (only_run(".") / "figure.png").exists()
    labels = {(t, c) for t, cures in result["results"].items() for c in cures}
    assert labels == {(t, "none") for t in args.targets} | {
        (args.cure_target, c) for c in args.cures
    }


def test_tds_rank_falls_below_sarsas():
    """Half a minute of HalfCheetah-v5, with larger steps than the defaults."""
    small = dict(
        transitions=1_000, learning_rate=3e-3, tau=0.05, batch_size=128, num_updates=3_000, seeds=1
    )
    result = d.train(d.Args(targets=("sarsa", "td"), cures=(), **small, diagnostics_frequency=0))
    sarsa, td = (result["results"][target]["none"] for target in ("sarsa", "td"))
    assert td["srank"]["final"] < 0.85 * sarsa["srank"]["final"]
    assert td["srank"]["final"] < 0.9 * td["srank"]["quarter"]
    assert sarsa["srank"]["final"] > 0.95 * sarsa["srank"]["quarter"]
    assert td["feature_dot"]["final"] > 1.2 * sarsa["feature_dot"]["final"]
    assert result["claims"][RANK][0] == "supported (1 of 1 seeds)"


def test_another_device_s_generators_are_refused(capsys):
    learner = a_learner(targets=("sarsa", "td"), cures=())
    saved = learner.checkpoint()
    learner.restore(saved)
    saved["draws"] = {
        seed: torch.zeros(16, dtype=torch.uint8) for seed in saved["draws"]
    }  # as a GPU's are
    with pytest.raises(SystemExit) as e:
        learner.restore(saved)
    assert e.value.code == 2 and "was not on cpu" in capsys.readouterr().err
