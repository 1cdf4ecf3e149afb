"""dr3_analysis.py: dynamic programming, targets, cures, data and diagnostics against loops, closed
forms and a plain network trained by itself; what members of a seed share; the promises that are its
own; commands; and TD's rank falling below SARSA's."""

import hashlib
import itertools
import json
import math
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import dr3_analysis as d
import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
import tyro
from conftest import (
    ROOT,
    assert_equal,
    assert_same_checkpoint,
    load,
    metrics,
    only_run,
    refused,
    run_script,
    stop_at,
    write_d4rl,
)
from minari.data_collector import EpisodeBuffer

CPU = torch.device("cpu")
ALL = ("mc", "oracle", "sarsa", "td", "td10", "q", "moving")
CURES = ("dr3:0.02", "dr3abs:0.03", "dr3stop:0.04", "sl:0.05", "rank:0.01", "unit", "layer")
CURES += ("dropout:0.3", "tau:0.5", "l2:0.06")
GRID = dict(problem="gridworld", grid=3, transitions=300, width=8, batch_size=8, num_updates=40)
GRID |= dict(diagnostics_frequency=8, checkpoint_frequency=0, gamma=0.99)


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def reports(monkeypatch):
    """The folders that were handed to tools/report.py, which test_report.py tests."""
    folders = []
    monkeypatch.setattr(d, "report", folders.append)
    return folders


@pytest.fixture
def quick_clone(monkeypatch):
    clone = d.clone
    monkeypatch.setattr(d, "clone", lambda *args: clone(*args, steps=5))


def tiny(**changes) -> d.Args:
    return d.Args(**GRID | changes)


class Planned:
    """A behaviour whose actions are a function of the state and the draw's number."""

    def fresh(self, obs, draw):
        return torch.stack([torch.cos(obs[:, :2] + j) for j in range(10)], 1)

    candidates = fresh


def a_problem(n=40, obs_dim=3, act_dim=2, seed=5, **changes) -> d.Problem:
    """Random transitions, every seventh terminal; each target's truth is another random column."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g) * 2 - 1
    done = (torch.arange(n) % 7 == 6).to(torch.get_default_dtype())
    columns = (rand(n, obs_dim), rand(n, act_dim), rand(n), done, rand(n, obs_dim))
    columns += (rand(n, act_dim), rand(n))
    behaviour = d.Behaviour(-torch.ones(act_dim), torch.ones(act_dim))
    problem = d.Problem(*columns, behaviour, None, truth={target: rand(n) for target in ALL})
    return problem._replace(greedy_returns=lambda net: [0.0] * len(net.unit))._replace(**changes)


def a_learner(problem=None, **changes) -> d.Learner:
    args = dict(targets=ALL, cures=CURES, width=6, batch_size=5, learning_rate=1e-2, tau=0.1)
    return d.Learner(problem or a_problem(), tiny(**args | changes), CPU)


# ------------------------------------------------------------------------------ dynamic programming
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
    assert Q.dtype == np.float64 and np.abs(Q.flatten() - np.linalg.solve(A, b)).max() < 1e-10


@pytest.mark.parametrize("gamma", [0.5, 0.99])
def test_the_optimal_q_is_the_best_of_all_policies(gamma):
    """All 4^8 deterministic policies of the 3 x 3 grid, each by its own 9 x 9 system."""
    P, r = grid_by_hand(3)
    policies = np.array([(*p, 0) for p in itertools.product(range(4), repeat=8)])
    best, s = np.full(9, -np.inf), np.arange(9)
    for some in np.array_split(policies, 16):
        A, b = np.eye(9) - gamma * P[s, some], r[s, some][..., None]
        best = np.maximum(best, np.linalg.solve(A, b)[..., 0].max(0))
    assert np.abs(d.optimal_q(P, r, gamma) - (r + gamma * P @ best)).max() < 1e-10


# -------------------------------------------------------------------------------------------- data
def discounted(rew, over, gamma, i):
    """The return from row i, by a loop."""
    total, discount = 0.0, 1.0
    for j in range(i, len(rew)):
        total, discount = total + discount * float(rew[j]), discount * gamma
        if over[j]:
            break
    return total


def test_gridworld_data_and_truths():
    p = d.gridworld(tiny(grid=4, transitions=1500, gamma=0.95), CPU)
    P, r = grid_by_hand(4)
    features = np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)
    every = torch.from_numpy(p.standardise(features))
    find = lambda x: (x[:, None] - every[None]).abs().amax(-1).min(1)
    assert max(find(x).values.max() for x in (p.obs, p.next_obs)) < 1e-5
    s, after = (find(x).indices.numpy() for x in (p.obs, p.next_obs))
    a, done, n, goal = p.act.argmax(1).numpy(), p.done.numpy() > 0, len(p.rew), 15
    assert 1300 < n <= 1500 and (s != goal).all() and np.array_equal(done, after == goal)
    assert (P[s, a, after] > 0).all() and (s[1:] == after[:-1])[~done[:-1]].all()
    assert np.array_equal(p.rew.numpy(), np.where(after == goal, 1, -0.1).astype(np.float32))
    assert 0.03 < (after != P[s, a].argmax(1)).mean() < 0.11  # the intended move, 0.925 of the time
    assert torch.equal(p.next_act[:-1][~done[:-1]], p.act[1:][~done[:-1]])
    assert len(set(s[np.append(True, done[:-1])][1:])) > 10  # new episodes start anywhere
    for i in range(0, np.flatnonzero(done)[-1], 50):
        assert abs(discounted(p.rew, done, 0.95, i) - float(p.mc[i])) < 1e-5
    beta, best = d.evaluate_policy(P, r, np.full((16, 4), 0.25), 0.95), d.optimal_q(P, r, 0.95)
    for target in ALL:
        expected = (best if target == "q" else beta)[s, a]
        assert np.abs(p.truth[target].numpy() - expected).max() < 1e-6
    error = (p.mc - p.truth["mc"]).numpy()  # the returns scatter around Q^beta
    assert abs(error.mean()) < 0.25 and error.std() > 0.1 and p.held is None
    g = torch.Generator().manual_seed(0)
    counts = p.behaviour.fresh(p.obs[:500], g).sum((0, 1)) / 5000
    assert counts.sum() == 1 and (counts - 0.25).abs().max() < 0.03
    assert torch.equal(p.behaviour.candidates(p.obs[:7], g), torch.eye(4).expand(7, 4, 4))


def test_greedy_returns_are_those_of_each_members_own_table():
    args = tiny(targets=("td", "q"), cures=(), seeds=2)
    p = d.gridworld(args, CPU)
    learner, (P, r) = d.Learner(p, args, CPU), grid_by_hand(3)
    features = np.random.default_rng(1).normal(size=(9, 16)).astype(np.float32)
    seen = torch.from_numpy(p.standardise(features)).repeat_interleave(4, 0)
    pairs = torch.cat([seen, torch.eye(4).repeat(9, 1)], -1)
    with torch.no_grad():
        for W in learner.net.weights:
            W.normal_()
        found = d.diagnose(learner)
        for i, one in enumerate(found):
            best = learner.net(pairs[None], [i])[0].view(9, 4).argmax(1).numpy()
            A = np.eye(9) - 0.99 * P[np.arange(9), best]
            V = np.linalg.solve(A, r[np.arange(9), best])
            assert abs(one["greedy_return"] - V[:8].mean()) < 1e-6
    assert len({one["greedy_return"] for one in found}) == 4


class Clock(gym.Env):
    """Observes (episode, time); pays its action, plus 1 at the end of an episode of `ends`."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([-2.0]), np.array([6.0]), dtype=np.float64)
    log, seeds = [], []

    def __init__(self, ends=10**9, times_out=False, bad=None):
        self.episode, self.t, self.ends, self.times_out, self.bad = -1, 0, ends, times_out, bad
        Clock.log.clear(), Clock.seeds.clear()

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        Clock.seeds.append(seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        over = self.t == self.ends
        reward = math.nan if self.t == self.bad else float(action[0]) + over
        Clock.log.append((self.episode, self.t - 1, float(action[0]), reward))
        obs, done = np.array([self.episode, float(self.t)]), over and not self.times_out
        return obs, np.array([reward]), done, over and self.times_out, {}  # rewards as arrays

    def close(self):
        Clock.log.append("closed")


class Unbounded(Clock):
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))


CLOCKS = {"Clock-v0": {}, "Clock7-v0": {"ends": 7}, "ClockNaN-v0": {"bad": 500}}
CLOCKS |= {"ClockOut-v0": {"ends": 6, "times_out": True}, "ClockUnbounded-v0": {}}
for name in {*CLOCKS} - {*gym.registry}:
    kind = Unbounded if "Unbounded" in name else Clock
    gym.register(name, entry_point=kind, kwargs=CLOCKS[name])


@pytest.mark.parametrize("env_id, length", [("Clock-v0", 1008), ("Clock7-v0", 7)])
def test_data_of_an_environment(env_id, length, monkeypatch):
    """gamma 0.5: 1,000 steps and 8 more, or until the environment ends them."""
    monkeypatch.setattr(d, "from_episodes", lambda *args: args)
    c, behaviour, *_ = d.continuous(d.Args(env_id=env_id, transitions=1200, gamma=0.5), CPU)
    assert Clock.log.pop() == "closed" and Clock.seeds[:3] == [1, 1001, 2001]
    episode, t, act, rew = np.array(Clock.log).T
    assert np.array_equal(c["obs"], np.stack([episode, t], 1))
    assert np.array_equal(c["next_obs"], np.stack([episode, t + 1], 1))
    assert np.allclose(c["act"][:, 0], (act - 2) / 4)  # [-2, 6] seen as [-1, 1]
    assert -1 <= c["act"].min() < -0.99 and 0.99 < c["act"].max() <= 1
    end = t == length - 1
    assert np.array_equal(c["rew"], rew) and (end == np.append(np.diff(episode) > 0, True)).all()
    assert np.array_equal(c["done"], end & (length == 7))
    assert np.array_equal(c["cut"], end & (length > 7))
    assert 0 <= len(rew) - 1.008 * (1200 + 9000) < length
    g = torch.Generator().manual_seed(0)
    for draw in (behaviour.fresh, behaviour.candidates):
        x = draw(torch.zeros(300, 2), g)
        assert x.shape == (300, 10, 1) and -1 <= x.min() < -0.99 and 0.99 < x.max() <= 1
        assert abs(float(x.var()) - 1 / 3) < 0.02


UNFIT = [
    ("ClockOut-v0", "0 of 10080 rows have a next action and a return"),
    ("Nope-v0", "NameNotFound"),
]
UNFIT += [("ClockUnbounded-v0", "finite bounds"), ("CartPole-v1", "expected a Box")]
UNFIT += [("FrozenLake-v1", "expected a Box"), ("ClockNaN-v0", "step 499 gives")]


@pytest.mark.parametrize("env_id, named", UNFIT)
def test_environments_that_nothing_can_be_learned_from(env_id, named, capsys):
    Clock.log.clear()
    with pytest.raises(SystemExit) as stop:
        d.train(d.Args(env_id=env_id, gamma=0.5))
    err, started = capsys.readouterr().err, env_id in ("ClockOut-v0", "ClockNaN-v0")
    assert named in err and err.count("\n") == 1 and not Path("runs").exists()
    assert stop.value.code == (3 if "NaN" in env_id else 2)
    assert started == (Clock.log[-1:] == ["closed"])


def whole_rows(done, cut, gamma) -> list:
    """Rows with a next action (or none needed) whose return is cut by less than 1 %, by loops."""
    rows, last = [], len(done) - 1
    for i in range(len(done)):
        j = next(j for j in range(i, last + 1) if done[j] or cut[j] or j == last)
        if done[j] or (j > i and gamma ** (j - i + 1) < 0.01):
            rows.append(i)
    return rows


def some_columns(n: int, length=100) -> dict:
    """Random episodes, in turn terminated and timed out."""
    rng, end = np.random.default_rng(0), np.arange(1, n + 1) % length == 0
    odd = np.arange(n) // length % 2 == 1
    c = {"obs": rng.normal(size=(n, 3)), "act": rng.normal(size=(n, 2)), "rew": rng.normal(size=n)}
    return c | {"next_obs": rng.normal(size=(n, 3)), "done": end & ~odd, "cut": end & odd}


@pytest.mark.parametrize("n, transitions", [(1000, 0), (950, 0), (1000, 210), (20_000, 100)])
def test_rows_that_are_trained_on_and_held_out(n, transitions, capsys):
    c, args = some_columns(n), d.Args(gamma=0.9, transitions=transitions)
    whole = whole_rows(c["done"], c["cut"], 0.9)
    if not transitions:  # those that time out lose their last 43; the last episode is cut at 950
        assert len(whole) == (5 * 100 + 5 * 57 if n == 1000 else 5 * 100 + 4 * 57 + 7)
    rows = whole[: transitions or n]
    p = d.from_episodes(c, None, args, CPU)
    scale, over = np.abs(c["rew"][rows]).max(), c["done"] | c["cut"]
    mean, std = c["obs"][rows].mean(0), c["obs"][rows].std(0) + 1e-3
    live, after = ~c["done"][rows], np.minimum(np.array(rows) + 1, n - 1)
    assert np.allclose(p.rew, c["rew"][rows] / scale) and np.allclose(p.act, c["act"][rows])
    assert np.allclose(p.obs, (c["obs"][rows] - mean) / std, atol=1e-5)
    assert np.allclose(p.next_obs, (c["next_obs"][rows] - mean) / std, atol=1e-5)
    assert np.array_equal(p.done, c["done"][rows])
    assert np.allclose(p.next_act[live], c["act"][after][live])
    for k in range(0, len(rows), 23):
        assert abs(discounted(c["rew"] / scale, over, 0.9, rows[k]) - float(p.mc[k])) < 1e-5
    held = [i for i in whole if i // 100 > rows[-1] // 100][:8000]  # of later episodes
    held = held[:: 1 if n < 20_000 else 4]
    assert (p.held is None) == (not held) == ("of errors" in capsys.readouterr().out)
    if held:
        assert np.allclose(p.held[0], (c["obs"][held] - mean) / std, atol=1e-5)
        assert np.allclose(p.held[1], c["act"][held])
        expected = [discounted(c["rew"] / scale, over, 0.9, i) for i in held]
        assert np.allclose(p.held[2], expected, atol=1e-5)


def test_returns_that_time_outs_cut_ask_for_a_smaller_discount(capsys):
    """Pendulum's episodes: 200 steps, no terminals. Half of the rows have 101 rewards or more:
    0.01^(1/100.5) = 0.955."""
    c = some_columns(4000)
    c |= {"done": np.zeros(4000), "cut": np.arange(1, 4001) % 200 == 0}
    args = d.Args(gamma=0.99, transitions=0)
    err = refused(capsys, lambda: d.from_episodes(c, None, args, CPU))
    assert "0 of 4000 rows" in err and "--gamma 0.955" in err
    args.gamma = None
    p = d.from_episodes(c, None, args, CPU)
    assert args.gamma == 0.955 and "--gamma 0.955" in capsys.readouterr().out
    assert len(p.rew) == 20 * 100
    args.gamma = None
    d.from_episodes(some_columns(4000, length=2000), None, args, CPU)
    assert args.gamma == 0.99


# ------------------------------------------------------------------------------------ data: files
def from_file(path, **changes) -> d.Args:
    return d.Args(**dict(problem="dataset", dataset=str(path), transitions=0, gamma=0.9) | changes)


def minari_set(h: dict, where=None):
    """The rows of a D4RL-layout file as the Minari set our/set-v0; `where`: observations (T, 3) as
    they stand in a Dict space."""
    ends, buffers, box = np.flatnonzero(h["timeouts"] | h["terminals"]) + 1, [], gym.spaces.Box
    for first, last in zip([0, *ends], ends):
        rows = slice(first, last)
        obs = np.vstack([h["observations"][rows], h["next_observations"][last - 1]])
        parts = {"observations": where(obs) if where else obs, "rewards": h["rewards"][rows]}
        flags = {"terminations": h["terminals"][rows], "truncations": h["timeouts"][rows]}
        buffers.append(EpisodeBuffer(**parts, **flags, actions=h["actions"][rows]))
    space = box(-9, 9, (3,))
    if where:
        space = gym.spaces.Dict({"z": gym.spaces.Discrete(2), "a": space})
    spaces = {"observation_space": space, "description": "ours"}
    spaces["action_space"] = gym.spaces.Discrete(3) if where else box(-2, 2, (1,))
    minari.create_dataset_from_buffers("our/set-v0", buffers, **spaces)


@pytest.mark.parametrize("kind", ["D4RL", "buffer", "no timeouts", "minari", "dict"])
def test_what_other_programs_write_reads_alike(kind, monkeypatch, capsys):
    """Columns (N, 1), flags as numbers; episodes whose ends next_observations alone show; Minari
    sets by id, folder and file, with Dict observations and discrete actions, too."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", os.path.abspath("sets"))
    with h5py.File(write_d4rl("x.hdf5", n=1000)) as f:
        h = {k: v[()] for k, v in f.items()}
    h["rewards"] = np.random.default_rng(0).integers(-3, 3, 1000)
    h["next_observations"][99::100] += 1  # the last observation of an episode begins no other
    as_written, paths, obs = dict(h), ["other.hdf5"], ("observations", "next_observations")
    if kind == "buffer":
        as_written |= {k: h[k][:, None].astype(float) for k in ("rewards", "terminals")}
        as_written["timeouts"] = h["timeouts"].astype(np.uint8)
    elif kind == "no timeouts":
        as_written["timeouts"] = None
    elif kind in ("minari", "dict"):
        paths = ["our/set-v0", "sets/our/set-v0", "sets/our/set-v0/data/main_data.hdf5"]
        part = lambda obs: {"a": obs, "z": (obs[:, 0] > 0).astype(int)}
        if kind == "dict":
            h["actions"] = np.random.default_rng(0).integers(3, size=1000)
        minari_set(h, part if kind == "dict" else None)
        if kind == "dict":
            h |= {k: np.hstack([h[k], np.eye(2)[part(h[k])["z"]]]) for k in obs}
    expected = [h[k] for k in (obs[0], "actions", "rewards", "terminals", obs[1], "timeouts")]
    write_d4rl("other.hdf5", **as_written)
    for path in paths:
        set_of = d.find_minari(path)
        c = d.read_minari(set_of) if set_of else d.read_d4rl(Path(path))
        for name, x in zip(d.COLUMNS, expected, strict=True):
            assert c[name].shape == x.shape and np.allclose(c[name][:-1], x[:-1]), (path, name)


def test_one_file_from_end_to_end(quick_clone, capsys):
    """Without next_observations; discrete actions; terminals where a time-out is marked, too."""
    act, end = np.random.default_rng(0).integers(3, size=1000), np.arange(1, 1001) % 50 == 0
    about = {"actions": act, "terminals": end, "timeouts": end}
    write_d4rl("x.hdf5", n=1000, next_obs=False, rewards=np.ones(1000), **about)
    p = d.dataset(from_file("x.hdf5"), CPU)
    out, g = capsys.readouterr().out, torch.Generator().manual_seed(0)
    assert "odd: 20 terminals are timeouts as well" in out and "all rewards are 1" in out
    assert np.array_equal(p.act, np.eye(3)[act]) and np.array_equal(p.done, end)
    assert torch.equal(p.next_obs[:49], p.obs[1:50])
    fresh = p.behaviour.fresh(p.obs[:50], g)
    assert fresh.shape == (50, 10, 3) and (fresh.sum(-1) == fresh.amax(-1)).all()
    assert torch.equal(p.behaviour.candidates(p.obs[:4], g), torch.eye(3).expand(4, 3, 3))
    write_d4rl("x.hdf5", n=1000, next_obs=False, timeouts=None)
    d.dataset(from_file("x.hdf5"), CPU)
    assert "episodes are taken to end at terminals only" in capsys.readouterr().out


def test_the_clone_is_the_same_when_a_resumed_run_has_other_batches(quick_clone):
    """It is no part of the checkpoint: what it depends on must not change."""
    write_d4rl("x.hdf5", n=400)
    actions = []
    for batch_size in (8, 32):
        torch.manual_seed(0)
        problem = d.dataset(from_file("x.hdf5", batch_size=batch_size), CPU)
        actions.append(problem.behaviour.fresh(problem.obs[:9], torch.Generator().manual_seed(0)))
    assert torch.equal(*actions)


def test_the_clone_finds_a_gaussian_and_a_categorical_policy():
    rng = np.random.default_rng(0)
    p = a_problem(n=4000, obs=torch.from_numpy(rng.normal(size=(4000, 2)).astype(np.float32)))
    act = np.tanh(p.obs[:, :1]) + 0.3 * torch.from_numpy(rng.normal(size=(4000, 1))).float()
    g, usual = torch.Generator().manual_seed(0), p.obs[:, 0].abs() < 1.5
    policy = d.clone(p._replace(act=act), False, 256, steps=400)
    behaviour = d.Behaviour(act.amin(0), act.amax(0), False, policy)
    fresh = torch.cat([behaviour.fresh(p.obs, g) for _ in range(20)], 1)
    assert fresh.shape == (4000, 200, 1) and not fresh.requires_grad
    error = fresh.mean(1)[usual] - np.tanh(p.obs[usual, :1])
    assert error.abs().mean() < 0.05 and abs(fresh.std(1)[usual].mean() - 0.3) < 0.03
    low, high = act.min(), act.max()
    assert low <= fresh.min() and fresh.max() <= high
    x = behaviour.candidates(p.obs, g)
    assert low <= x.min() < low + 0.01 and high - 0.01 < x.max() <= high
    chance = torch.sigmoid(2 * p.obs[:, 0])
    second = (torch.rand(4000, generator=g) < chance).long()
    policy = d.clone(p._replace(act=torch.eye(2)[second]), True, 256, steps=400)
    fresh = d.Behaviour(torch.zeros(2), torch.ones(2), True, policy).fresh
    share = torch.cat([fresh(p.obs, g) for _ in range(20)], 1).mean(1)[:, 1]
    assert (share - chance)[usual].abs().mean() < 0.07


def with_value(row, value, columns=()):
    x = np.zeros((1000, *columns))
    x[row] = value
    return x


BAD_DATA = [
    ({"rewards": None}, "needs observations, actions, rewards, terminals, holds actions, next_obs"),
    ({"actions": np.zeros((7, 1))}, "(7, 1)"),
    ({"actions": np.zeros(1000)}, "(1000,)"),
    ({"observations": np.zeros((1000, 3, 2))}, "(1000, 3, 2)"),
    ({"rewards": np.zeros((1000, 2))}, "(2000,)"),
    ({"timeouts": np.zeros(10)}, "(10,)"),
    ({"next_observations": np.zeros((1000, 2))}, "(1000, 2)"),
    ({"rewards": with_value(17, math.nan)}, "'rew' is nan at row 17"),
    ({"actions": with_value(5, math.inf, [1])}, "'act' is inf at row 5"),
    ({"next_observations": with_value(9, 1e300, [3])}, "'next_obs' is inf at row 9"),
    ({"timeouts": np.ones(1000), "terminals": np.zeros(1000)}, "0 of 1000 rows"),
    ({"rewards": np.array([b"x"] * 1000)}, "no appropriate function"),
]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(
    "changes, named", BAD_DATA, ids=[" ".join([*x[0], x[1]]) for x in BAD_DATA]
)
def test_a_bad_dataset_is_refused_in_one_line(changes, named, capsys):
    write_d4rl("x.hdf5", n=1000, **changes)
    err = refused(capsys, lambda: d.train(from_file("x.hdf5", cures=())))
    assert named in err and "x.hdf5" in err and not Path("runs").exists()


def test_both_kinds_of_ends_in_one_column_are_nothing_odd(quick_clone, capsys):
    """d3rlpy 1: episode_terminals; terminals are some of them."""
    end = np.arange(1, 1001) % 50 == 0
    write_d4rl("x.hdf5", n=1000, timeouts=None, terminals=end & (np.arange(1000) % 100 < 50))
    with h5py.File("x.hdf5", "a") as f:
        f["episode_terminals"] = end
    d.dataset(from_file("x.hdf5"), CPU)
    assert "odd" not in capsys.readouterr().out


def test_a_file_that_is_none_is_refused(capsys):
    empty = {"observations": np.zeros((0, 3)), "actions": np.zeros((0, 1)), "rewards": np.zeros(0)}
    write_d4rl("empty", n=0, terminals=np.zeros(0), next_obs=False, timeouts=None, **empty)
    Path("cut").write_bytes(write_d4rl("x", n=1000).read_bytes()[:5000])
    Path("pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    np.savez(open("recording", "wb"), obs=np.zeros(3))
    write_d4rl("wrapped", n=1000, actions=np.arange(-1, 999))
    named = {"cut": "damaged, incomplete", "pointer": "git lfs pull", "recording": "convert.py"}
    named |= {"empty": "no transitions", "no/set-v0": "minari download no/set-v0"}
    named["wrapped"] = "an action is -1"
    for path, word in named.items():
        err = refused(capsys, lambda path=path: d.dataset(from_file(path), CPU))
        assert word in err and path in err


# ----------------------------------------------------------------- what the members of a seed share
def fingerprint(*tensors) -> str:
    parts = [x.detach().contiguous().numpy().tobytes() for x in tensors]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_every_layer_starts_as_torchs_linear_and_from_numbers_of_its_own():
    """Uniform within 1 / sqrt(inputs)."""
    net = a_learner(targets=("td",), cures=(), seeds=2, width=40, depth=3).net
    for W, b, fan_in in zip(net.weights, net.biases, (5, 40, 40, 40)):
        bound = fan_in**-0.5
        assert W.shape[1] == fan_in and W.abs().max() <= bound and b.abs().max() <= bound
        assert W.abs().max() > 0.9 * bound and not torch.equal(W[0], W[1])
    first = [W[0].flatten()[:40] / W[0].abs().max() for W in net.weights]
    for x, y in itertools.combinations(first, 2):
        assert not torch.allclose(x, y, atol=0.2)


def test_members_of_a_seed_start_alike_and_see_the_same_batches():
    learners = (a_learner(seeds=3), a_learner(seeds=3, targets=("td",), cures=()))
    weights, batches = {}, {}
    for one, step in itertools.product(learners, range(4)):
        batch = one.sample()
        for i, m in enumerate(one.members):
            batches.setdefault((step, m.seed), set()).add(fingerprint(*[x[i] for x in batch]))
            for net in (one.net, one.target) if step == 0 else ():
                found = fingerprint(*[p[i] for p in net.parameters()])
                weights.setdefault(m.seed, set()).add(found)
        one.update()  # which draws another one
    for shared, different in ((weights, 3), (batches, 12)):
        assert all(len(x) == 1 for x in shared.values())
        assert len(set.union(*shared.values())) == different


def test_targets_of_a_seed_differ_only_in_y():
    """From the same weights, the networks of two targets part by nothing but y."""
    p = a_problem()
    same = p._replace(mc=p.rew, truth=dict.fromkeys(ALL, p.rew))
    learner = a_learner(same, seeds=2, cures=(), gamma=0.0)
    for _ in range(3):
        learner.update()
    for w in learner.net.parameters():
        assert torch.equal(w, w[:2].repeat(7, *[1] * (w.dim() - 1)))
    learner = a_learner(p, seeds=2, cures=(), learning_rate=1e-3)
    for _ in range(200):
        learner.update()
    for i, j in itertools.combinations(range(14), 2):  # nor is moving td over again
        assert any((w[i] - w[j]).abs().max() > 1e-3 for w in learner.net.parameters()), (i, j)


# --------------------------------------------- the ensemble and separate networks, each cure
class Plain:
    """One network trained by itself: matrices, loops over rows for y, an Adam of its own."""

    def __init__(self, learner, i):
        self.args, self.m, self.p = learner.args, learner.members[i], learner.problem
        pairs = zip(learner.net.weights, learner.net.biases)
        self.start = [x[i].detach().clone() for pair in pairs for x in pair]
        self.target = self.start
        self.params = [x.clone().requires_grad_() for x in self.start]
        self.optim = torch.optim.Adam(self.params, lr=self.args.learning_rate)

    def phi(self, params, x, noise=None):
        for W, b in zip(params[:-2:2], params[1:-2:2]):
            x = x @ W + b
            if self.m.cure == "layer":
                x = x - x.mean(-1, keepdim=True)
                x = x / ((x**2).mean(-1, keepdim=True) + 1e-5).sqrt()
            x = x.clamp(min=0)
            if self.m.cure == "dropout" and noise is not None:
                x = torch.where(noise < self.m.number, 0, x / (1 - self.m.number))
        return x / (x**2).sum(-1, keepdim=True).sqrt() if self.m.cure == "unit" else x

    def q(self, params, s, a):
        return (self.phi(params, torch.cat([s, a], -1)) @ params[-2] + params[-1])[..., 0]

    def y(self, rows, fresh, candidates, bootstrap):
        """By loops; `bootstrap` is the network whose target network is asked."""
        p, kind, y, acts = self.p, self.m.target, [], []
        for j, row in enumerate(rows.tolist()):
            ask = lambda a: float(bootstrap.q(bootstrap.target, p.next_obs[row], a))  # noqa: B023
            a = fresh[j, 0] if kind in ("td", "moving", "td10") else p.next_act[row]
            a = max(candidates[j], key=ask) if kind == "q" else a
            value = sum(map(ask, fresh[j])) / 10 if kind == "td10" else ask(a)
            y.append(float(p.rew[row]) + (0 if p.done[row] else self.args.gamma * value))
            if kind in ("mc", "oracle"):
                y[-1] = float(p.mc[row] if kind == "mc" else p.truth["oracle"][row])
            acts.append(a)
        return torch.tensor(y), torch.stack(acts)

    def loss(self, rows, y, next_act, noise):
        p, cure, c = self.p, self.m.cure, self.m.number
        phi = self.phi(self.params, torch.cat([p.obs[rows], p.act[rows]], -1), noise)
        error = (((phi @ self.params[-2] + self.params[-1])[:, 0] - y) ** 2).sum() / len(rows)
        if cure.startswith("dr3"):
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

    def step(self, rows, y, next_act, noise):
        error, penalty = self.loss(rows, y, next_act, noise)
        self.optim.zero_grad()
        (error + penalty).backward()
        self.optim.step()
        tau = self.m.number if self.m.cure == "tau" else self.args.tau
        moved = zip(self.target, self.params)
        self.target = [(1 - tau) * old + tau * x.detach() for old, x in moved]
        return error, penalty


@pytest.mark.parametrize(
    "cure_target, depth, batch_size", [("td", 2, 5), ("q", 1, 9), ("mc", 3, 5)]
)
def test_the_ensemble_is_separate_networks_trained_one_by_one(
    cure_target, depth, batch_size, double, monkeypatch
):
    """Every target and cure, two seeds, eight updates: losses, penalties, weights and targets. The
    batch is once smaller and once larger than the network is wide (6): the rank penalty's forms."""
    noise = torch.rand(batch_size, 6)  # dropout's draws, the same table for everyone
    monkeypatch.setattr(torch, "rand_like", lambda x: noise.expand_as(x))
    learner = a_learner(cure_target=cure_target, depth=depth, batch_size=batch_size, seeds=2)
    plains = {}
    for i, m in enumerate(learner.members):
        plains[m.target, m.label, m.seed] = Plain(learner, i)
    assert len(plains) == len(learner.members) == 2 * (len(ALL) + len(CURES))
    draw = learner.sample
    for t in range(1, 9):
        batch = draw()
        learner.sample = lambda batch=batch: batch
        error, penalty = d.losses(learner, batch)
        assert torch.equal(learner.update(), error)
        y = {}
        for i, (key, plain) in enumerate(plains.items()):
            source = plains["td", "none", 3 - key[2]] if key[0] == "moving" else plain
            y[key] = plain.y(*[x[i] for x in batch], source)
        for i, (key, plain) in enumerate(plains.items()):
            e, p = plain.step(batch.rows[i], *y[key], noise)
            assert torch.isclose(e, error[i], rtol=1e-5), (t, key)
            assert torch.isclose(p, penalty[i], atol=1e-9), (t, key)
            assert (p != 0) == (plain.m.cure in "dr3 dr3abs dr3stop sl rank l2".split())
        for i, (key, plain) in enumerate(plains.items()):
            for k, (W, T) in enumerate(zip(plain.params, plain.target)):
                for net, expected in ((learner.net, W), (learner.target, T)):
                    found = (net.biases if k % 2 else net.weights)[k // 2][i]
                    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7), (t, key)
    x = torch.rand(len(plains), 11, 5)
    learner.net.eval()
    for i, (key, plain) in enumerate(plains.items()):
        expected = plain.q(plain.params, x[i, :, :3], x[i, :, 3:])
        assert torch.allclose(learner.net(x)[i], expected, atol=1e-6), key
        assert torch.allclose(learner.net(x[[i]], [i])[0], expected, atol=1e-6), key


def test_gradients_of_the_penalties_by_finite_differences(double):
    """Of the penalty alone, in every weight below the features: both sides, absolute, one side."""
    grads = {}
    for cure in ("dr3:1", "dr3abs:1", "dr3stop:1", "sl:1", "rank:1"):
        learner = a_learner(targets=("td",), cures=(cure,), seeds=1, width=4, depth=1, batch_size=6)
        batch, W = learner.sample(), learner.net.weights[0]
        (grad,) = torch.autograd.grad(d.losses(learner, batch)[1].sum(), W)
        assert (grad[0] == 0).all()
        numeric = torch.zeros_like(grad[1])
        for k, sign in itertools.product(range(numeric.numel()), (1, -1)):
            with torch.no_grad():
                W[1].view(-1)[k] += sign * 1e-6
                numeric.view(-1)[k] += sign * d.losses(learner, batch)[1][1] / 2e-6
                W[1].view(-1)[k] -= sign * 1e-6
        same = torch.allclose(grad[1], numeric, atol=1e-5)
        assert same == (cure != "dr3stop:1"), cure  # whose gradient is of one side only
        grads[cure] = grad[1]
    assert torch.allclose(grads["dr3abs:1"], grads["dr3:1"])  # features of ReLU networks are >= 0
    assert grads["dr3stop:1"].norm() > 0
    assert not torch.allclose(grads["dr3stop:1"], grads["dr3:1"])


def test_dr3abs_differs_where_dots_are_negative(double):
    learner = a_learner(targets=("td",), cures=("dr3:1", "dr3abs:1"), seeds=1)
    features = learner.net.features
    turned = lambda x, who=slice(None): features(x, who) * x[..., :1].sign()
    learner.net.features, batch = turned, learner.sample()
    dots, p = [], learner.problem
    _, next_act = d.backup(learner, batch)
    for row, a in zip(batch.rows[0], next_act[0]):
        phi = turned(torch.cat([p.obs[row], p.act[row]]).expand(3, 1, 5))[0, 0]
        phi_next = turned(torch.cat([p.next_obs[row], a]).expand(3, 1, 5))[0, 0]
        dots.append((phi @ phi_next).item() * (1 - float(p.done[row])))
    assert min(dots) < 0 < max(dots)
    expected = torch.tensor([0, sum(dots), sum(map(abs, dots))]) / len(dots)
    assert torch.allclose(d.losses(learner, batch)[1], expected)


def test_dropout_drops_its_share_in_training_alone():
    learner = a_learner(targets=("td",), cures=("dropout:0.4", "unit"), seeds=1, width=400, depth=1)
    x = torch.rand(3, 200, 5)
    on = learner.net.features(x)
    learner.net.eval()
    off = learner.net.features(x)
    assert torch.equal(on[0], off[0]) and torch.equal(on[2], off[2])
    alive, kept = off[1] > 0, on[1] > 0
    assert abs(float((~kept[alive]).float().mean()) - 0.4) < 0.01
    assert torch.allclose(on[1][kept], off[1][kept] / 0.6) and not learner.target.training


# --------------------------------------------------------------------------------------- measuring
def test_diagnostics_by_loops():
    """(The shared ones on planted features: test_online.py.)"""
    p = a_problem(n=50, behaviour=Planned())  # so that the order of rows does not matter
    learner = a_learner(p, seeds=1, cures=("unit", "layer", "dropout:0.5"), gamma=0.9, width=7)
    for _ in range(19):
        learner.update()
    state, n = torch.get_rng_state(), len(learner.members)
    found = d.diagnose(learner)
    assert torch.equal(state, torch.get_rng_state()) and learner.net.training
    net, rows = learner.net.eval(), torch.arange(50)
    with torch.no_grad():
        y, a = d.backup(learner, d.Batch(*(x.expand(n, *x.shape) for x in p.batch(rows, None))))
        here = torch.cat([p.obs, p.act], -1).expand(n, -1, -1)
        after = torch.cat([p.next_obs.expand(n, -1, -1), a], -1)
        full, full_next = d.gradient_dots(net, here, after)
        for i, m in enumerate(learner.members):
            layers = [h[0] for h in net.hidden(here[[i]], [i])]
            phi, phi_next = layers[-1], net.features(after[[i]], [i])[0]
            q, target = (x.double().numpy() for x in (net(here[[i]], [i])[0], y[i]))
            live = [j for j in range(50) if not p.done[j]]
            dots = sum(float(phi[j] @ phi_next[j]) for j in live) / 50
            squares = float(sum(x @ x for x in phi)) / 50
            truth = p.truth[m.target].double().numpy()
            expected = d.spectrum(phi) | d.alignment(phi, phi_next, 1 - p.done)
            expected |= {
                "dormant": d.dormant(layers),
                "q_mean": np.mean(q),
                "td_error": np.mean((q - target) ** 2) / np.var(target, ddof=1),
                "reg_sl": squares,
                "reg_td": squares - 0.9 * dots,
                "reg_sl_full": full[i].mean(),
                "reg_td_full": (full[i].sum() - 0.9 * full_next[i, live].sum()) / 50,
                "truth": truth.mean(),
                "q_error": np.mean((q - truth) ** 2) / truth.var(ddof=1),
                "greedy_return": 0,
            }
            assert found[i].keys() == expected.keys()
            for k, value in expected.items():
                assert abs(found[i][k] - value) < 1e-4 * max(1, abs(value)), (m, k)


def test_measured_rows_are_drawn_from_all_and_gradients_from_256_of_them(monkeypatch):
    seen, dots = [], d.gradient_dots
    monkeypatch.setattr(
        d, "gradient_dots", lambda net, x, y: seen.append((x, y)) or dots(net, x, y)
    )
    obs = torch.arange(3000.0)[:, None].expand(3000, 3)
    p = a_problem(n=3000, obs=obs, next_obs=obs + 0.5)
    d.diagnose(a_learner(p, seeds=1, cures=(), targets=("td",)))
    x, x_next = (rows[0, :, 0] for rows in seen[0])
    assert len(set(x.tolist())) == 256 and torch.equal(x_next, x + 0.5)
    assert abs((x >= 1500).float().mean() - 0.5) < 0.15


@pytest.mark.parametrize("scale", [1, 0])  # 0: nothing varies
def test_errors_to_trained_and_to_held_out_returns(scale):
    held, mc = a_problem(n=30, seed=8), scale * torch.linspace(-2, 5, 30)
    p = a_problem(n=50, truth=None, held=(held.obs, held.act, mc))
    p = p._replace(mc=scale * p.mc, rew=scale * p.rew)
    learner = a_learner(p, seeds=2, cures=("unit",), targets=("mc", "td", "q"), gamma=0.0)
    for i, (m, found) in enumerate(zip(learner.members, d.diagnose(learner))):
        assert ("return_error_holdout" in found) == ("return_error" in found) == (m.target != "q")
        assert all(math.isfinite(x) for x in found.values())
        for name, at, true in (("return_error", p, p.mc), ("return_error_holdout", held, mc)):
            q = learner.net(torch.cat([at.obs, at.act], -1)[None], [i])[0].detach().numpy()
            expected = np.mean((q - true.numpy()) ** 2) / max(np.var(true.numpy(), ddof=1), 1e-12)
            assert m.target == "q" or abs(found[name] / expected - 1) < 1e-4, (m, name)


def test_full_gradients_by_autograd_of_one_row(double):
    learner = a_learner(targets=("td",), cures=("unit", "layer"), cure_target="td", depth=2)
    net, n = learner.net.eval(), len(learner.members)
    x, x_next = torch.randn(2, n, 4, 5)
    own, cross = d.gradient_dots(net, x, x_next)

    def gradient(i, row):
        q = net(row.expand(n, 1, -1))[i, 0]
        parts = torch.autograd.grad(q, list(net.parameters()))
        return torch.cat([p[i].flatten() for p in parts])

    for i, b in itertools.product(range(n), range(4)):
        mine, other = gradient(i, x[i, b]), gradient(i, x_next[i, b])
        torch.testing.assert_close(own[i, b], mine @ mine)
        torch.testing.assert_close(cross[i, b], mine @ other)


def test_intervals():
    """Against 97.5 % quantiles from Student's density."""
    assert d.interval(np.array([5.0])) == 0
    for n in range(2, 60):
        x = np.linspace(0, 20, 200_001)
        density = (1 + x**2 / (n - 1)) ** (-n / 2) / math.sqrt((n - 1) * math.pi)
        density *= math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))
        quantile = x[np.searchsorted(np.cumsum(density) * x[1], 0.475)]
        values = np.arange(n, dtype=float)
        expected = quantile * values.std(ddof=1) / math.sqrt(n)
        assert abs(d.interval(values) / expected - 1) < (0.002 if n <= 10 else 0.02), n


# ---------------------------------------------------------------------------------------- mistakes
BAD = """--cures dr4:1 | --cures dr3 | --cures dr3: | --cures dr3:x | --cures dr3:nan
--cures dr3:inf | --cures dr3:-1 | --cures dr3:1:2 | --cures unit:3 | --cures none | --cures none:3
--cures dropout:0 | --cures dropout:1 | --cures tau:0 | --cures tau:1.5
--cures unit unit | --targets td td | --targets | --targets oracle td
--targets moving sarsa --cures | --targets td moving --seeds 1 | --cure-target q | --resume nowhere
--env-id Hopper-v5 --problem gridworld | --dataset x.hdf5 | --problem dataset | --transitions 0
--grid 2 | --transitions 31 | --gamma 1 | --tau 0 | --learning-rate 0 | --seeds 0 | --seed -1
--num-updates 0 | --width 0"""
BAD = [line.strip() for line in re.split(r"\||\n", BAD)]


@pytest.mark.parametrize("line", BAD)
def test_a_users_mistake_is_one_line_and_status_2(line, capsys):
    err = refused(capsys, lambda: d.train(tyro.cli(d.Args, args=line.split())))
    assert (line.split()[0] in err or "nowhere" in err) and not Path("runs").exists()


def test_sizes_that_no_machine_has_are_refused_at_once(capsys):
    for changes in ({"width": 10**6}, {"seeds": 10**4, "width": 4000}):
        assert "GiB" in refused(capsys, lambda: d.train(tiny(**changes)))  # noqa: B023
    few = tiny(grid=9, transitions=40)
    assert "of 40 rows" in refused(capsys, lambda: d.train(few)) and not Path("runs").exists()


# ---------------------------------------------------------------------------------------- promises
FULL = dict(targets=ALL, cures=("dr3:0.01", "rank:1e-4", "dropout:0.2"), seeds=2)


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path, reports):
    """By SIGTERM at update 13; the printed command goes on."""
    line = "--problem gridworld --grid 3 --transitions 300 --width 8 --seeds 2 --num-updates 40"
    line = f"{line} --diagnostics-frequency 8 --checkpoint-frequency 11 --targets {' '.join(ALL)}"
    line = f"{line} --cures {' '.join(FULL['cures'])}".split()
    whole = d.train(replace(tyro.cli(d.Args, args=line), run_dir="whole"))
    done = stop_at("dr3_analysis", "Learner.update", 13, *line, cwd=tmp_path)
    assert done.returncode == 143, done.stderr
    run, (other,) = only_run("."), Path("whole").iterdir()
    assert load(run / "checkpoint.pt")["step"] == 13
    command = shlex.split(done.stdout.split("to go on:")[1].strip())
    assert command[-2] == "--resume"
    done = run_script("dr3_analysis.py", *command[-2:], cwd=tmp_path)
    assert only_run(".") == run and reports == [other]
    assert_same_checkpoint(run / "checkpoint.pt", other / "checkpoint.pt")
    assert metrics(run) == metrics(other) and len(metrics(run)) > 1000
    found = json.loads((run / "summary.json").read_text())
    assert found["results"] == whole["results"]
    assert (run / "figure.png").exists() and "- with mc targets" in done.stdout  # by the report


def test_finished_runs_go_on_a_thousandfold(monkeypatch, capsys):
    args = tiny(num_updates=8, checkpoint_frequency=2)
    first = d.train(args)
    run, again = str(only_run(".")), ["--resume", str(only_run("."))]
    monkeypatch.setattr(sys, "argv", ["dr3_analysis.py", *again])
    assert d.train(d.parse(d.Args, ""))["results"] == first["results"]  # nothing was left to do
    done = stop_at("dr3_analysis", "Learner.update", 3, *again, "--num-updates", "8000", cwd=".")
    assert done.returncode == 143 and "--num-updates 8000, 8 so far" in done.stdout
    assert load(only_run(".") / "checkpoint.pt")["step"] == 11
    assert d.train(replace(args, resume=run, num_updates=11))["num_updates"] == 11  # ends there
    d.train(replace(args, resume=run, num_updates=12, learning_rate=1.0, tau=0.5))
    assert "from here on --learning-rate 1.0" in capsys.readouterr().out
    whole = d.train(tiny(num_updates=12, run_dir="other"))
    assert whole["results"] != json.loads((Path(run) / "summary.json").read_text())["results"]


def test_resume_with_what_does_not_fit_is_refused(quick_clone, capsys):
    d.train(tiny(num_updates=10))
    run = str(only_run("."))
    changes = dict(cures=("unit",), targets=("td",), gamma=0.9, grid=4, seeds=4, seed=5, width=9)
    for name, value in changes.items():
        args = tiny(num_updates=10, resume=run, **{name: value})
        assert f"--{name}" in refused(capsys, lambda: d.train(args))  # noqa: B023
    write_d4rl("x.hdf5", n=1000)
    args = from_file("x.hdf5", run_dir="more", num_updates=5, width=8, seeds=1)
    d.train(args)
    write_d4rl("x.hdf5", n=1000, seed=1)
    (run,) = Path("more").iterdir()
    resumed = replace(args, resume=str(run), num_updates=6, env_id="dataset")
    assert "other data" in refused(capsys, lambda: d.train(resumed))


def test_a_run_goes_on_on_another_device():
    """Whose generators have another state: batches are drawn anew."""
    d.train(tiny(num_updates=10))
    path = only_run(".") / "checkpoint.pt"
    saved = load(path)
    torch.save(saved | {"draws": [torch.zeros(16, dtype=torch.uint8) for _ in range(3)]}, path)
    assert d.train(tiny(num_updates=12, resume=str(path.parent)))["num_updates"] == 12


def test_measuring_logging_and_saving_change_nothing():
    runs = []
    for name, n in (("often", 1), ("seldom", 0)):
        often = dict(diagnostics_frequency=n, checkpoint_frequency=3 * n, log_frequency=n or 500)
        d.train(tiny(**FULL | often, num_updates=20, run_dir=name))
        runs += Path(name).iterdir()
    a, b = ({k: load(run / "checkpoint.pt")[k] for k in ("networks", "optim")} for run in runs)
    assert_equal(a, b)
    measured = [[r for r in metrics(run) if r[1].startswith("diagn")] for run in runs]
    steps = [sorted({s for s, _, _ in rows}) for rows in measured]
    assert steps == [list(range(1, 21)), [5, 10, 20]]  # never without what the claims need
    assert [r for r in measured[0] if r[0] in steps[1]] == measured[1]


def test_same_seed_same_numbers_another_seed_others():
    numbers = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        d.train(tiny(run_dir=name, seed=seed, num_updates=10))
        numbers.append([r[2] for r in metrics(next(Path(name).iterdir()))])
    assert numbers[0] == numbers[1] != numbers[2]


def test_one_member_with_nan_stops_the_run_before_a_checkpoint(monkeypatch, capsys):
    real, steps = d.Learner.update, itertools.count(1)

    def poisoned(self):
        if next(steps) == 21:
            self.net.weights[0].data[self.chosen(target="sarsa", seed=2), 0, 0] = math.nan
        return real(self)

    monkeypatch.setattr(d.Learner, "update", poisoned)
    with pytest.raises(SystemExit) as stop:
        d.train(tiny(checkpoint_frequency=5))
    assert stop.value.code == 3
    assert "step 24: diagnostics/sarsa/none/2/" in capsys.readouterr().err
    assert load(only_run(".") / "checkpoint.pt")["step"] == 20


@pytest.mark.parametrize("changes", [{"cures": ("rank:1",)}, {"depth": 6}, {"num_updates": 4}])
def test_divergence_ends_with_status_3(changes, capsys):
    """Also where singular values of what is not finite are asked for."""
    args = tiny(**dict(learning_rate=1e12, depth=3, targets=("td",), cures=()) | changes)
    with pytest.raises(SystemExit) as stop:
        d.train(replace(args, diagnostics_frequency=1))
    err = capsys.readouterr().err
    assert stop.value.code == 3 and re.search(r"is (nan|-?inf)", err) and err.count("\n") == 1


def test_what_a_run_leaves_behind(capsys, reports):
    result = d.train(tiny(**FULL, num_updates=48))
    out, run = capsys.readouterr().out, only_run(".")
    assert re.search(r"networks and one update, roughly: [\d.]+ MiB on", out) and reports == [run]
    assert run.name.startswith("gridworld__dr3_analysis__1__")
    assert json.loads((run / "summary.json").read_text()) == result
    keys = {"num_updates", "updates_per_second", "wall_seconds", "device", "results"}
    assert keys < result.keys() and result["num_updates"] == 48
    info = json.loads((run / "args.json").read_text())["info"]
    assert info["members"] == 20 and len(info["data_sha256"]) == 64
    names = "srank rank_pca effective_rank sigma_max sigma_min feature_dot feature_cos feature_norm"
    names += " dormant q_mean q_error td_error truth reg_sl reg_td reg_sl_full reg_td_full"
    rows = {(step, tag): float(value) for step, tag, value in metrics(run)}
    assert len(rows) == len(metrics(run)) and {s for s, _ in rows} == {8, 12, 16, 24, 32, 40, 48}
    kinds = [(t, "none") for t in ALL] + [("td", c) for c in FULL["cures"]]
    assert sum(len(cures) for cures in result["results"].values()) == len(kinds)
    for target, cure in kinds:
        found = result["results"][target][cure]
        assert found.keys() == {*names.split(), "greedy_return"}
        moments = (("quarter", 12), ("final", 48))
        for (metric, entry), (when, step) in itertools.product(found.items(), moments):
            a, b = (rows[step, f"diagnostics/{target}/{cure}/{seed}/{metric}"] for seed in (1, 2))
            assert abs(entry[when] - (a + b) / 2) < 1e-9 * max(1, abs(a), abs(b))
            half = 12.71 * abs(a - b) / 2  # two values: sd / sqrt(2) is half their distance
            assert abs(entry[when + "_interval"] - half) < 1e-6 * max(1, half)


def test_without_the_report_installed_a_run_says_what_to_run(monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(d, "__file__", "/elsewhere/dr3_analysis.py")
    d.report(Path("runs/x"))
    out = capsys.readouterr().out
    assert "python tools/report.py runs/x --figure runs/x/figure.png" in out


TEXT = (ROOT / "dr3_analysis.py").read_text().split('"""')[1] + (ROOT / "README.md").read_text()
TEXT = TEXT.replace("\\\n", " ")
COMMANDS = sorted({*re.findall(r"python dr3_analysis\.py[^\n`#&|;]*", TEXT)})


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_run(command, quick_clone):
    """Parsed as written, then cut to a few updates of tiny networks."""
    args = tyro.cli(d.Args, args=shlex.split(command)[2:])
    if args.dataset:
        write_d4rl(args.dataset, n=3000, length=700)
    assert len(COMMANDS) >= 4
    short = dict(num_updates=12, width=16, batch_size=16, seeds=2, diagnostics_frequency=6)
    result = d.train(replace(args, **short))
    labels = {(t, c) for t, cures in result["results"].items() for c in cures}
    expected = {(t, "none") for t in args.targets} | {(args.cure_target, c) for c in args.cures}
    assert result["num_updates"] == 12 and labels == expected


def test_tds_rank_falls_below_sarsas():
    """Fifteen seconds of HalfCheetah-v5, with larger steps than the defaults."""
    small = dict(learning_rate=3e-3, num_updates=2_000, seeds=1, diagnostics_frequency=0)
    results = d.train(d.Args(targets=("sarsa", "td"), cures=(), **small))["results"]
    sarsa, td = results["sarsa"]["none"]["srank"], results["td"]["none"]["srank"]
    assert td["final"] < 0.85 * sarsa["final"] and td["final"] < 0.9 * td["quarter"]
    assert sarsa["final"] > 0.95 * sarsa["quarter"]
