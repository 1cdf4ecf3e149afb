"""Reading of datasets in cql_continuous.py: each row where it belongs, each bad file refused in one line."""

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cql_continuous as cql
import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, one_thread, only_run, write_d4rl
from cql_continuous import (
    Args,
    Batch,
    Data,
    Learner,
    collect,
    dataset_path,
    diagnose,
    load,
    make_env,
    returns_to_go,
    train,
)

# numpy's warnings would be further lines on the user's stderr, which promises a single one
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

CPU = torch.device("cpu")
FLOATS = ("observations", "actions", "rewards", "next_observations")
FLAG_KEYS = ("terminals", "timeouts")
MINARI_KEYS = ("observations", "actions", "rewards", "terminations", "truncations")
SMALL = dict(
    env_id="Pendulum-v1",
    critic_width=8,
    policy_width=8,
    batch_size=4,
    num_updates=1,
    eval_episodes=0,
)


# ------------------------------------------------------------------------- files made by hand, and loops
def episode(first: int, length: int, end: str, obs_dim=2, act_dim=1) -> dict:
    """One episode whose every number is its own and exact in float32 and float16: a row that is lost, doubled
    or joined to a wrong neighbour cannot look right. `end` is terminal, timeout, both or open."""
    t = np.arange(first, first + length + 1)
    obs = np.stack([t + 0.25 * j for j in range(obs_dim)], 1)
    act = np.stack([(t[:-1] * 7 + 3 * j) % 127 / 64 - 63 / 64 for j in range(act_dim)], 1)
    return {"obs": obs, "act": act, "rew": t[:-1] / 4 - 20, "end": end}


def three_episodes(obs_dim=2, act_dim=1) -> list[dict]:
    """Terminal, time-out, unfinished; numbers jump between them, as they do where an episode is reset."""
    shape = obs_dim, act_dim
    return [
        episode(*e, *shape) for e in ((0, 4, "terminal"), (100, 3, "timeout"), (200, 5, "open"))
    ]


def random_episodes(
    rng, count: int, longest: int, ends=("terminal", "timeout", "both")
) -> list[dict]:
    """Episodes of random length (many of one step) and end; the last may be left open."""
    first, out = 0, []
    for i in range(count):
        length = int(rng.integers(1, longest + 1)) if rng.random() < 0.7 else 1
        choice = (*ends, "open") if i == count - 1 else ends
        out.append(episode(first, length, str(rng.choice(choice))))
        first += length + 10
    return out


def write_flat(path, episodes: list[dict], next_obs=True, timeouts=True) -> Path:
    """The episodes as a D4RL file: row after row, s' only if asked for, both flags on the last row."""
    rows = [(e, t) for e in episodes for t in range(len(e["rew"]))]
    last = [t == len(e["rew"]) - 1 for e, t in rows]
    with h5py.File(path, "w") as f:
        f["observations"] = np.array([e["obs"][t] for e, t in rows], np.float32)
        f["actions"] = np.array([e["act"][t] for e, t in rows], np.float32)
        f["rewards"] = np.array([e["rew"][t] for e, t in rows], np.float32)
        f["terminals"] = np.array(
            [x and e["end"] in ("terminal", "both") for (e, _), x in zip(rows, last)]
        )
        if timeouts:
            f["timeouts"] = np.array(
                [x and e["end"] in ("timeout", "both") for (e, _), x in zip(rows, last)]
            )
        if next_obs:
            f["next_observations"] = np.array([e["obs"][t + 1] for e, t in rows], np.float32)
    return Path(path)


def write_minari(path, episodes: list[dict], dtype=np.float64) -> Path:
    """The episodes in Minari's HDF5 layout, T + 1 observations each, float64 as Minari leaves them."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        for i, e in enumerate(episodes):
            last = np.arange(len(e["rew"])) == len(e["rew"]) - 1
            group = f.create_group(f"episode_{i}")
            group["observations"], group["actions"] = e["obs"].astype(dtype), e["act"].astype(dtype)
            group["rewards"] = e["rew"].astype(dtype)
            group["terminations"] = last & (e["end"] in ("terminal", "both"))
            group["truncations"] = last & (e["end"] in ("timeout", "both"))
    return Path(path)


def expected_rows(episodes: list[dict], has_final=True, backup="sac") -> list[tuple]:
    """By the definition: (s, a, r, s', done, a') of every step, None for what has no meaning (an s' that the
    file does not hold, an a' where the episode is over), less the two exceptions of traps 35."""
    rows = []
    for e in episodes:
        for t in range(len(e["rew"])):
            ends = t == len(e["rew"]) - 1
            done = ends and e["end"] in ("terminal", "both")
            next_obs = None if ends and not has_final else e["obs"][t + 1]
            next_act = None if ends else e["act"][t + 1]
            if not done and (next_obs is None or (backup == "sarsa" and next_act is None)):
                continue  # nothing to bootstrap from
            rows.append((e["obs"][t], e["act"][t], e["rew"][t], next_obs, float(done), next_act))
    return rows


def assert_rows(data: Data, rows: list[tuple], sarsa=False, indices=None, low=-1.0, high=1.0):
    """The transitions at `indices` (all that are trained on) are exactly `rows`, in their order."""
    batch = data.batch(data.train if indices is None else indices)
    assert len(batch.obs) == len(rows)
    for i, row in enumerate(rows):
        for name, value in zip(batch._fields, row):
            if value is None or (name == "next_act" and not sarsa and row[4]):
                continue
            got = getattr(batch, name)[i].numpy()
            if name in ("act", "next_act"):
                np.testing.assert_allclose((got + 1) / 2 * (high - low) + low, value, atol=1e-6)
            else:
                np.testing.assert_array_equal(got, np.float32(value), f"{name} of row {i}")


def read(path, env=None, **changes) -> Data:
    """load() with nothing held out, so that `train` holds every usable row."""
    return load(Path(path), Args(**({"env_id": "Pendulum-v1", "holdout": 0.0} | changes)), env, CPU)


def number(text: str, pattern: str) -> int:
    """The count that the report prints at (#) of `pattern`."""
    found = re.search(pattern.replace("#", r"([\d,]+)"), text)
    assert found, f"{pattern!r} not in {text!r}"
    return int(found[1].replace(",", ""))


# ------------------------------------------------------------------------------------------ transitions
@pytest.mark.parametrize("backup", ["sac", "sarsa"])
@pytest.mark.parametrize("next_obs", [True, False])
def test_three_episodes_row_by_row(tmp_path, capsys, next_obs, backup):
    """An episode's last step is neither lost nor joined to the next one, but for the counted exceptions."""
    episodes = three_episodes()
    data = read(write_flat(tmp_path / "d.hdf5", episodes, next_obs), backup=backup)
    rows = expected_rows(episodes, next_obs, backup)
    assert len(rows) == (
        12 if next_obs and backup == "sac" else 10
    )  # the time-out and the open end drop out
    assert_rows(data, rows, backup == "sarsa")
    assert data.train.tolist() == [i for i in range(12) if len(rows) == 12 or i not in (6, 11)]
    assert data.starts.tolist() == [0, 4, 7]
    out = capsys.readouterr().out
    assert number(out, "# transitions in") == 12 and number(out, "in # episodes") == 3
    assert number(out, "# ended by a terminal") == 1 and number(out, "# by a time-out") == 2
    assert number(out, "# transitions to train on") == len(rows) and number(out, "# held out") == 0
    assert number(out, r"# dropped") == 12 - len(rows)
    assert f"no next {'action' if backup == 'sarsa' else 'observation'}" in out
    assert data.info["terminals"] == 1
    assert data.info["dataset_return_mean"] == np.mean([e["rew"].sum() for e in episodes])
    assert data.info["reward_min"] == -20 and data.info["reward_max"] == 204 / 4 - 20


@pytest.mark.parametrize("layout", ["flat", "flat without next_observations", "minari"])
def test_random_episodes_row_by_row(tmp_path, layout):
    """Episodes of one step, rows flagged terminal *and* timed out, any last end: still row by row."""
    rng = np.random.default_rng(3)
    for _ in range(12):
        episodes = random_episodes(rng, count=int(rng.integers(2, 9)), longest=6)
        has_final = layout != "flat without next_observations"
        if layout == "minari":
            path = write_minari(tmp_path / "m.hdf5", episodes)
        else:
            path = write_flat(tmp_path / "d.hdf5", episodes, next_obs=has_final)
        for backup in ("sac", "sarsa"):
            rows = expected_rows(episodes, has_final, backup)
            if rows:
                data = read(path, backup=backup)
                assert_rows(data, rows, backup == "sarsa")
                first = [e["obs"][0] for e in episodes]
                np.testing.assert_array_equal(data.obs[data.starts].numpy(), np.float32(first))


def test_without_timeouts_and_without_next_observations(tmp_path, capsys):
    """Old files: only terminals end an episode. The cut at row 6 cannot be seen, and the reader says so."""
    path = write_flat(tmp_path / "d.hdf5", three_episodes(), next_obs=False, timeouts=False)
    data = read(path)
    out = capsys.readouterr().out
    assert "timeouts" in out and "terminals only" in out
    assert number(out, "in # episodes") == 2 and data.starts.tolist() == [0, 4]
    assert data.train.tolist() == list(range(11)) and number(out, "# dropped") == 1
    np.testing.assert_array_equal(data.batch(torch.tensor([6])).next_obs[0].numpy(), [200, 200.25])


@pytest.mark.parametrize("backup", ["sac", "sarsa"])
def test_without_timeouts_but_with_next_observations(tmp_path, capsys, backup):
    """Where s' is not the next row's s, an episode must have ended: all rows as if the flags were there. One
    entry that differs is enough, as where a robot is put back to the same height."""
    episodes = three_episodes()
    for e in episodes:
        e["obs"][:, 1] = 7
    data = read(write_flat(tmp_path / "d.hdf5", episodes, timeouts=False), backup=backup)
    out = capsys.readouterr().out
    assert "timeouts" in out and "next_observations" in out and "terminals only" not in out
    assert number(out, "in # episodes") == 3 and data.starts.tolist() == [0, 4, 7]
    assert_rows(data, expected_rows(episodes, True, backup), backup == "sarsa")


@pytest.mark.parametrize("dtype", ["f2", "f8", ">f4", ">f8", "f16"])
def test_float_columns_of_any_width(tmp_path, dtype):
    """float64 is what Minari and gymnasium's MuJoCo write (traps 34), float16 what saves disk."""
    path = write_flat(tmp_path / "d.hdf5", three_episodes())
    with h5py.File(path, "a") as f:
        for key in FLOATS:
            x = f[key][()]
            del f[key]
            f[key] = x.astype(np.longdouble if dtype == "f16" else dtype)
    data = read(path)
    assert_rows(data, expected_rows(three_episodes()))
    assert all(x.dtype == torch.float32 for x in data.batch(data.train))


@pytest.mark.parametrize("dtype", ["u1", "?", "i4", "i8", "f4", "f8"])
def test_flags_of_any_type(tmp_path, dtype):
    path = write_flat(tmp_path / "d.hdf5", three_episodes())
    with h5py.File(path, "a") as f:
        for key in FLAG_KEYS:
            x = f[key][()]
            del f[key]
            f[key] = x.astype(dtype)
    data = read(path, backup="sarsa")
    assert_rows(data, expected_rows(three_episodes(), backup="sarsa"), sarsa=True)


def test_compressed_and_chunked_columns(tmp_path):
    """D4RL's own files are gzip-compressed in chunks, and carry keys that are not ours (infos, metadata)."""
    path = write_flat(tmp_path / "d.hdf5", three_episodes())
    with h5py.File(path, "a") as f:
        for key in (*FLOATS, *FLAG_KEYS):
            x = f[key][()]
            del f[key]
            f.create_dataset(key, data=x, compression="gzip", chunks=(5, *x.shape[1:]))
        f["infos/qpos"] = np.full((12, 3), np.nan)
        f["metadata/algorithm"] = "SAC"
    assert_rows(read(path), expected_rows(three_episodes()))


# -------------------------------------------------------------------------------------- returns to go
def plain_returns(rew, lengths, gamma: float) -> np.ndarray:
    """The backward recursion G_t = r_t + gamma G_{t+1}, episode by episode, in float64."""
    out, i = np.zeros(len(rew)), 0
    for length in lengths:
        g = 0.0
        for t in reversed(range(i, i + length)):
            out[t] = g = float(rew[t]) + gamma * g
        i += length
    return out


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 0.99, 0.99999])
def test_returns_to_go_against_a_backward_loop(gamma):
    """Doubling must stop at the episode's end, whatever its length: powers of two, one more, one less, 1."""
    rng = np.random.default_rng(5)
    cases = [rng.integers(1, 70, size=rng.integers(1, 30)).tolist() for _ in range(30)]
    cases += [[1], [2], [3], [1, 1, 1], [1000], [64, 63, 65, 128, 127, 129, 1], [1023, 1, 1025]]
    for lengths in cases:
        rew = rng.normal(size=sum(lengths)).astype(np.float32)
        last = np.repeat(np.cumsum(lengths) - 1, lengths).astype(np.int32)
        before, g = rew.copy(), returns_to_go(rew, last, gamma)
        np.testing.assert_array_equal(rew, before)  # the rewards are still wanted
        np.testing.assert_allclose(g, plain_returns(rew, lengths, gamma), rtol=1e-5, atol=2e-4)
        assert g.dtype == np.float32


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("layout", ["flat", "minari"])
def test_returns_are_hidden_exactly_where_a_time_out_cuts_more_than_one_percent(
    tmp_path, layout, gamma
):
    """The missing share by definition: of a reward of 1 for ever, what is in the data over what would be."""
    rng = np.random.default_rng(6)
    for trial in range(4):
        ends = [
            ("terminal", "timeout", "both", "open")[trial],
            *rng.choice(["terminal", "timeout"], size=5),
        ]
        lengths = rng.permutation([1, 2, 30, 470, 700, int(rng.integers(3, 20))])
        episodes = [
            episode(i * 800, int(n), str(e)) for i, (n, e) in enumerate(zip(lengths, ends[::-1]))
        ]
        if layout == "flat":
            path = write_flat(tmp_path / "d.hdf5", episodes)
        else:
            path = write_minari(tmp_path / "m.hdf5", episodes)
        data = read(path, gamma=gamma, reward_scale=0.5, reward_shift=2.0)
        rew = np.concatenate([0.5 * e["rew"] + 2.0 for e in episodes])
        truth, i = plain_returns(rew, lengths, gamma), 0
        for e in episodes:
            n = len(e["rew"])
            for t in range(n):
                present = sum(gamma**k for k in range(n - t)) * (1 - gamma)
                if e["end"] in ("timeout", "open") and 1 - present > 0.01:
                    truth[i + t] = np.nan
            i += n
        assert np.isnan(truth).any() == (gamma > 0) and not np.isnan(truth).all()
        # with all rows usable (s' is in the file), train lists the transitions in their order
        np.testing.assert_allclose(
            data.returns_to_go[data.train].numpy(), truth, rtol=2e-5, atol=2e-3
        )
        np.testing.assert_allclose(data.rew[data.train].numpy(), rew, rtol=1e-6)


def test_459_steps_at_gamma_099(tmp_path):
    """traps 9: log(0.01) / log(0.99) = 458.2, so the last 458 steps before a time-out know too little."""
    path = write_flat(
        tmp_path / "d.hdf5", [episode(0, 1000, "timeout"), episode(2000, 1000, "terminal")]
    )
    hidden = read(path, gamma=0.99).returns_to_go.isnan()
    assert hidden[:2000].nonzero().flatten().tolist() == list(range(542, 1000))


# ------------------------------------------------------------------------------------------- actions
def fake_env(low, high, obs_dim=2):
    """Only the two spaces of an environment, which is all that load() looks at."""
    box = gym.spaces.Box(np.float32(low), np.float32(high))
    return SimpleNamespace(
        action_space=box, observation_space=gym.spaces.Box(-np.inf, np.inf, (obs_dim,))
    )


@pytest.mark.parametrize("low, high", [(-1, 1), (-2, 2), (-0.4, 0.4), (0, 5)])
def test_actions_just_outside_are_clipped_and_counted(tmp_path, capsys, low, high):
    """0.1 % of the range is rounding (traps 34); a whisker more is a file in other units."""
    path, size = tmp_path / "d.hdf5", high - low
    act = np.linspace(low + 0.1 * size, high - 0.1 * size, 12, dtype=np.float32)[:, None]
    act[2], act[5], act[11] = high + 0.0009 * size, low - 0.0009 * size, high + 0.0002 * size
    write_flat(path, three_episodes())
    with h5py.File(path, "a") as f:
        f["actions"][...] = act
    data = read(path, fake_env([low], [high]))
    assert number(capsys.readouterr().out, "# clipped") == 3
    assert [data.act[i].item() for i in (2, 5, 11)] == [1, -1, 1]
    scaled = 2 * (act - low) / size - 1
    np.testing.assert_allclose(data.act[:12].numpy(), scaled.clip(-1, 1), atol=1e-5)
    for value, row in (
        (high + 0.0012 * size, 7),
        (low - 0.0012 * size, 0),
        (high + 0.0012 * size, 11),
    ):
        changed = act.copy()
        changed[row] = value
        with h5py.File(path, "a") as f:
            f["actions"][...] = changed
        with pytest.raises(SystemExit) as stop:
            read(path, fake_env([low], [high]))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
        assert f"{path}" in err and "'actions'" in err and re.search(rf"row {row}\b", err)


def test_actions_inside_bounds_are_not_counted_as_clipped(tmp_path, capsys):
    """Actions *on* the bounds are the commonest of all (a saturated policy): none of them is a clip."""
    path = write_flat(tmp_path / "d.hdf5", three_episodes())
    for low, high in ((-1, 1), (-0.4, 0.4), (-2, 2)):
        with h5py.File(path, "a") as f:
            f["actions"][...] = np.where(np.arange(12) % 2, low, high).astype(np.float32)[:, None]
        read(path, fake_env([low], [high]))
        assert number(capsys.readouterr().out, "# clipped") == 0


def test_action_scaling_there_and_back_on_pendulum(tmp_path):
    """[-2, 2] in the file, [-1, 1] for the networks, [-2, 2] again for the environment."""
    env = make_env("Pendulum-v1")
    path = write_d4rl(tmp_path / "d.hdf5", n=500, scale=2.0)
    with h5py.File(path) as f:
        raw = f["actions"][()]
    data = read(path, env)
    np.testing.assert_allclose(data.act[:500].numpy(), raw / 2, atol=1e-6)
    np.testing.assert_allclose(cql.to_env(data.act[:500], env.action_space), raw, atol=1e-6)
    assert 1.9 < raw.max() and env.action_space.contains(
        cql.to_env(torch.ones(1), env.action_space)
    )


def test_bounds_hold_without_evaluation(capsys):
    """--eval-episodes 0 must not change what an action means: the environment still says its bounds. Where it
    is not installed (a run on a cluster without MuJoCo) they are taken to be [-1, 1], which is said."""
    path = write_d4rl("d.hdf5", n=40, length=8, scale=2.0)
    for env_id in ("Pendulum-v1", "NotInstalled-v0"):
        args = Args(**SMALL | {"dataset": str(path), "env_id": env_id})
        if env_id == "Pendulum-v1":
            assert train(args)["num_updates"] == 1
        else:
            refused(capsys, path, "'actions'", "[-1.0] to [1.0]", env_id=env_id, run_dir="others")
            write_d4rl(path, n=40, length=8, scale=1.0)
            assert train(args)["num_updates"] == 1
            assert "NotInstalled-v0" in capsys.readouterr().out


def test_an_environment_that_is_to_be_played_must_be_there(capsys):
    """Only its bounds can be done without."""
    path = str(write_d4rl("d.hdf5", n=40, length=8, scale=1.0))
    for words in ({"online_steps": 5}, {"eval_episodes": 1}):
        refused(
            capsys, "", "--env-id NotInstalled-v0", dataset=path, env_id="NotInstalled-v0", **words
        )


BOX = gym.spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    "act, obs, steps, word",
    [
        (gym.spaces.Box(-np.inf, np.inf, (2,)), BOX, 9, "actions"),
        (gym.spaces.Box(-1, 1, (2, 2)), BOX, 9, "actions"),
        (BOX, gym.spaces.Box(-1, 1, (2, 2)), 9, "observations"),
        (BOX, gym.spaces.Discrete(3), 9, "observations"),
        (BOX, BOX, None, "max_episode_steps"),
    ],
)
def test_refuses_an_environment_of_another_kind(act, obs, steps, word, monkeypatch, capsys):
    spec = SimpleNamespace(max_episode_steps=steps)
    env = SimpleNamespace(action_space=act, observation_space=obs, spec=spec)
    monkeypatch.setattr(gym, "make", lambda _: env)
    with pytest.raises(SystemExit) as stop:
        make_env("Odd-v0")
    assert stop.value.code == 2 and word in capsys.readouterr().err


def test_action_scaling_with_lopsided_bounds(tmp_path):
    """Every dimension by its own bounds."""
    low, high = np.array([-1.0, 0.0, 2.0]), np.array([3.0, 10.0, 2.5])
    episodes = three_episodes(act_dim=3)
    for e in episodes:
        e["act"] = low + (e["act"] + 1) / 2 * (high - low)
    env = fake_env(low, high)
    data = read(write_flat(tmp_path / "d.hdf5", episodes), env, backup="sarsa")
    assert_rows(data, expected_rows(episodes, backup="sarsa"), sarsa=True, low=low, high=high)
    back = cql.to_env(data.batch(data.train).act, env.action_space)
    np.testing.assert_allclose(
        back, [row[1] for row in expected_rows(episodes, backup="sarsa")], atol=1e-5
    )


def test_rows_that_are_padding_are_not_judged(tmp_path):
    """Minari rows after an episode's end hold no action; a box that excludes 0 must not refuse them."""
    episodes = three_episodes()
    for e in episodes:
        e["act"] = e["act"] / 4 + 3  # in [2.75, 3.25]
    data = read(write_minari(tmp_path / "m.hdf5", episodes), fake_env([2.5], [3.5]))
    assert_rows(data, expected_rows(episodes), low=2.5, high=3.5)
    assert data.act.abs().max() <= 1


# ------------------------------------------------------------------------------------------- holdout
def split(path, **changes) -> tuple[set, set, Data]:
    data = read(path, **changes)
    return set(data.train.tolist()), set(data.holdout.tolist()), data


@pytest.mark.parametrize("layout", ["flat", "minari"])
def test_holdout_takes_whole_episodes(tmp_path, capsys, layout):
    """Rows of one episode are nearly copies of each other: a split by rows would measure memory."""
    episodes = [episode(100 * i, 3 + i % 4, ("terminal", "timeout")[i % 2]) for i in range(20)]
    write = write_flat if layout == "flat" else write_minari
    path = write(tmp_path / "d.hdf5", episodes)
    all_rows, none, _ = split(path, holdout=0.0)
    assert not none and len(all_rows) == sum(len(e["rew"]) for e in episodes)
    for share, count in ((0.1, 2), (0.25, 5), (0.001, 1)):
        chosen = []
        for seed in (1, 1, 2, 3, 4, 5):
            capsys.readouterr()
            train_rows, held_rows, data = split(path, holdout=share, seed=seed)
            assert number(capsys.readouterr().out, "# held out") == len(held_rows)
            assert not train_rows & held_rows and train_rows | held_rows == all_rows
            held, kept = (
                {int(x) // 100 for x in data.obs[r][:, 0]} for r in (data.holdout, data.train)
            )
            assert len(held) == count and not held & kept
            chosen.append(frozenset(held))
        assert (
            chosen[0] == chosen[1] and len(set(chosen)) > 3
        )  # drawn by the seed, not always the first


def test_holdout_draws_no_random_number_that_training_sees(tmp_path):
    """P2, P3: the split has its own generator."""
    path = write_flat(tmp_path / "d.hdf5", three_episodes())
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()
    read(path, holdout=0.4)
    assert torch.equal(before, torch.get_rng_state()) and np.array_equal(
        state, np.random.get_state()[1]
    )


@pytest.mark.parametrize("layout", ["flat", "minari"])
def test_a_single_episode_is_trained_on(tmp_path, layout):
    """Holding it out would leave nothing."""
    episodes = [episode(0, 9, "terminal")]
    path = (write_flat if layout == "flat" else write_minari)(tmp_path / "d.hdf5", episodes)
    train_rows, held_rows, data = split(path, holdout=0.5)
    assert len(train_rows) == 9 and not held_rows
    assert_rows(data, expected_rows(episodes))


# ------------------------------------------------------------------------------------ standardisation
def learner_for(data: Data) -> Learner:
    return Learner(data.obs.shape[1], data.act.shape[1], Args(**SMALL), CPU)


def shares_memory(a, b) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize("next_obs", [True, False])
def test_standardisation(tmp_path, next_obs):
    """Mean 0, deviation 1, each observation once: s' is the same point whether it stands in s or in s'."""
    path = write_d4rl(tmp_path / "d.hdf5", n=3000, obs_dim=4, next_obs=next_obs, scale=1)
    offset, size = np.array([100, -7, 0, 3], np.float32), np.array([5, 0.5, 20, 0], np.float32)
    with h5py.File(path, "a") as f:
        for key in FLOATS[:: 3 if next_obs else 4]:
            f[key][...] = f[key][()] * size + offset
        raw = {k: f[k][()] for k in FLOATS if k in f}
        end = f["terminals"][()] | f["timeouts"][()]
    data = read(path)
    assert shares_memory(data.next_obs, data.obs) == (not next_obs) and shares_memory(
        data.next_act, data.act
    )
    learner = learner_for(data)
    data.standardise(learner)
    x = data.obs[:3000]
    assert x.mean(0).abs().max() < 3e-3
    torch.testing.assert_close(x.std(0)[:3], torch.ones(3), atol=5e-3, rtol=0)
    assert (x[:, 3] == 0).all()  # an entry that never varies stays 0
    # the same affine map for s, for s' and for what the environment hands over later
    for rows, key in ((data.obs, "observations"), (data.next_obs, "next_observations")):
        if key in raw:
            there = (
                raw[key].astype(np.float64) - learner.obs_mean.numpy()
            ) / learner.obs_std.numpy()
            np.testing.assert_allclose(rows[:3000].numpy(), there, atol=1e-4)
    torch.testing.assert_close(
        learner.standardised(raw["observations"][7]), data.obs[7], atol=1e-5, rtol=0
    )
    inner = np.flatnonzero(~end[:-1])
    assert torch.equal(data.next_obs[inner], data.obs[inner + 1])
    assert shares_memory(data.next_obs, data.obs) == (not next_obs)


def test_standardisation_is_by_all_rows_held_out_ones_too():
    path = write_flat("d.hdf5", [episode(100 * i, 8, "timeout") for i in range(10)])
    data, raw = read(path, holdout=0.5), read(path)
    data.standardise(learner := learner_for(data))
    assert torch.equal(learner.obs_mean, raw.obs.mean(0))
    torch.testing.assert_close(learner.obs_std, raw.obs.std(0) + 1e-3)


def test_standardisation_of_minari_rows(tmp_path):
    """The last observation of an episode is s' only, and a point like the others."""
    episodes = [episode(50 * i, 20, "timeout") for i in range(30)]
    data = read(write_minari(tmp_path / "m.hdf5", episodes))
    learner = learner_for(data)
    data.standardise(learner)
    batch, points = data.batch(data.train), np.concatenate([e["obs"] for e in episodes])
    mean, std = points.mean(0), points.std(0)
    rows = expected_rows(episodes)
    np.testing.assert_allclose(batch.obs, [(r[0] - mean) / std for r in rows], atol=3e-3)
    np.testing.assert_allclose(batch.next_obs, [(r[3] - mean) / std for r in rows], atol=3e-3)


def test_samples_come_from_the_training_rows_only(tmp_path):
    """Neither padding, nor dropped rows, nor held-out episodes, and every training row in its turn."""
    episodes = [episode(100 * i, 5, "timeout") for i in range(12)]
    data = read(write_flat(tmp_path / "d.hdf5", episodes, next_obs=False), holdout=0.25)
    seen = {tuple(x) for x in data.sample(3000).obs.tolist()}
    assert seen == {tuple(x) for x in data.obs[data.train].tolist()}
    assert (
        len(seen) == 9 * 4
    )  # a quarter of the episodes held out, the time-outs without s' dropped


# -------------------------------------------------------------------------------------------- Minari
def minari_set(root: Path, monkeypatch, episodes: list[dict], name="pendulum/made-v0"):
    """The episodes through minari's own writer, as a user of minari 0.5.4 would keep them."""
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    buffers = []
    for e in episodes:
        last = np.arange(len(e["rew"])) == len(e["rew"]) - 1
        buffers.append(
            EpisodeBuffer(
                observations=list(e["obs"].astype(np.float32)),
                actions=list(e["act"].astype(np.float32)),
                rewards=list(e["rew"]),
                terminations=list(last & (e["end"] in ("terminal", "both"))),
                truncations=list(last & (e["end"] in ("timeout", "both"))),
            )
        )
    return minari.create_dataset_from_buffers(
        name, buffers, env="Pendulum-v1", algorithm_name="made up", author="nobody",
        author_email="a@b.c", code_permalink="none", description="made up",
    )  # fmt: skip


@pytest.fixture
def thirteen():
    """Enough episodes for a sort by text to go wrong; widths and bounds of Pendulum-v1."""
    ends = ["terminal", "timeout", "both"]
    episodes = [episode(60 * i, 2 + i % 5, ends[i % 3], obs_dim=3) for i in range(13)]
    for e in episodes:
        e["act"] = 2 * e["act"]
    return episodes


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backup", ["sac", "sarsa"])
def test_minari_set_by_id_folder_and_file(tmp_path, monkeypatch, thirteen, backup, capsys):
    """Made by minari itself; every way to name it gives the transitions that went in."""
    root = tmp_path / "sets"
    minari_set(root, monkeypatch, thirteen)
    env, rows = make_env("Pendulum-v1"), expected_rows(thirteen, True, backup)
    folder = root / "pendulum" / "made-v0"
    names = [
        "pendulum/made-v0",
        str(folder),
        str(folder / "data"),
        str(folder / "data" / "main_data.hdf5"),
    ]
    for name in names:
        path = dataset_path(name)
        assert path == folder / "data" / "main_data.hdf5"
        data = read(path, env, backup=backup)
        assert_rows(data, rows, backup == "sarsa", low=-2.0, high=2.0)
        out = capsys.readouterr().out
        assert number(out, "in # episodes") == 13 and number(out, "# ended by a terminal") == 9
        assert number(out, "# dropped") == (4 if backup == "sarsa" else 0)
    assert shares_memory(data.next_obs, data.obs)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_id_trains(tmp_path, monkeypatch, thirteen):
    """The whole way from --dataset ID to summary.json; the run notes which file it read."""
    minari_set(tmp_path / "sets", monkeypatch, thirteen)
    summary = train(
        Args(**SMALL | dict(dataset="pendulum/made-v0", num_updates=2, eval_episodes=1))
    )
    assert summary["num_updates"] == 2 and summary["dataset"].endswith("main_data.hdf5")
    assert (only_run(".") / "summary.json").is_file()


def test_minari_id_under_home(tmp_path, monkeypatch):
    """Minari's default place, where `minari download` puts its sets."""
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".minari" / "datasets" / "a" / "b-v1" / "data" / "main_data.hdf5"
    write_minari(path, three_episodes())
    assert dataset_path("a/b-v1") == path
    assert dataset_path("a/b-v2") == Path("a/b-v2")


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_hand_written_minari_file_in_order_of_numbers(tmp_path, thirteen, dtype):
    """Plain HDF5 groups come back as 0, 1, 10, 11, 12, 2: rows must follow the numbers."""
    path = write_minari(tmp_path / "m.hdf5", thirteen, dtype)
    with h5py.File(path) as f:
        assert list(f)[2] == "episode_10"
    data = read(path, make_env("Pendulum-v1"), backup="sarsa")
    assert_rows(data, expected_rows(thirteen, backup="sarsa"), sarsa=True, low=-2.0, high=2.0)
    first = [e["obs"][0] for e in thirteen]
    np.testing.assert_array_equal(data.obs[data.starts].numpy(), np.float32(first))
    for i, row in enumerate(data.batch(data.train).obs[:, 0]):  # no final observation among the s
        assert row % 60 < 6, i


def test_minari_and_d4rl_agree(tmp_path):
    """The same episodes in both layouts: the same transitions, returns-to-go and numbers for the summary."""
    episodes = random_episodes(np.random.default_rng(1), 20, 12)
    flat = read(write_flat(tmp_path / "d.hdf5", episodes), reward_scale=3.0, reward_shift=-1.0)
    nested = read(write_minari(tmp_path / "m.hdf5", episodes), reward_scale=3.0, reward_shift=-1.0)
    for a, b in zip(flat.batch(flat.train)[:5], nested.batch(nested.train)[:5]):
        torch.testing.assert_close(a, b)
    g = [d.returns_to_go[d.train] for d in (flat, nested)]
    torch.testing.assert_close(*g, equal_nan=True)
    rew = [e["rew"] for e in episodes]
    truth = {"dataset_return_mean": np.mean([x.sum() for x in rew]), "terminals": sum(
        e["end"] in ("terminal", "both") for e in episodes)}  # fmt: skip
    truth |= {"reward_min": 3 * min(map(min, rew)) - 1, "reward_max": 3 * max(map(max, rew)) - 1}
    for data in (
        flat,
        nested,
    ):  # returns as the environment pays them, the bounds of Q as training sees them
        assert {k: data.info[k] for k in truth} == pytest.approx(truth)


# ------------------------------------------------------------------------------------------- refusals
def refused(capsys, path, *words, **changes) -> str:
    """train() ends with status 2 and one line on stderr, with the file and `words`; no run folder is made."""
    capsys.readouterr()
    args = Args(**SMALL | {"dataset": str(path)} | changes)
    with pytest.raises(SystemExit) as stop:
        train(args)
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    for word in (str(path), *words):
        assert str(word) in err, f"{word!r} not in {err!r}"
    assert not Path(args.run_dir).exists()
    return err


GOOD = {}  # bytes of the files below, which hundreds of tests spoil each in its own way


def good_file(layout="d4rl", n=40, **changes) -> Path:
    """A file that train() takes, in the current folder: five episodes of eight steps."""
    key, path = f"{layout} {n} {changes}", Path("good.hdf5")
    if key not in GOOD:
        episodes = [episode(20 * i, 8, ("terminal", "timeout")[i % 2], obs_dim=3) for i in range(5)]
        if layout == "d4rl":
            write_d4rl(path, n=n, length=8, scale=1.0, **changes)
        else:
            write_minari(path, episodes)
        GOOD[key] = path.read_bytes()
    path.write_bytes(GOOD[key])
    return path


def change(path: Path, key: str, make) -> Path:
    """Replace the array at `key` by make(array); None deletes it, a Group is put there for {}."""
    with h5py.File(path, "a") as f:
        x = f[key][()]
        del f[key]
        y = make(x)
        if isinstance(y, dict):
            f.create_group(key)["inner"] = x
        elif y is not None:
            f[key] = y
    return path


@pytest.mark.parametrize("layout", ["d4rl", "minari"])
def test_the_good_file_is_good(layout):
    """Without this, each refusal below could come from something else."""
    summary = train(Args(**SMALL | {"dataset": str(good_file(layout))}))
    assert summary["num_updates"] == 1 and (only_run(".") / "summary.json").is_file()


@pytest.mark.parametrize("kind", ["text", "empty", "directory", "missing", "pickle", "zip"])
def test_refuses_what_is_no_hdf5(tmp_path, capsys, kind):
    path = tmp_path / "set.hdf5"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(
            {"text": b"s,a,r\n1,2,3\n", "empty": b"", "pickle": b"\x80\x04}.", "zip": b"PK\3\4"}[
                kind
            ]
        )
    refused(capsys, path)


@pytest.mark.parametrize(
    "share", [0, 96, 0.5, 0.999], ids=["0", "96_bytes", "half", "99.9_percent"]
)
@pytest.mark.parametrize("layout", ["d4rl", "minari"])
def test_refuses_a_download_that_stopped(capsys, layout, share):
    path = good_file(layout, **({"n": 4000} if layout == "d4rl" else {}))
    whole = path.read_bytes()
    path.write_bytes(whole[: share if isinstance(share, int) else int(share * len(whole))])
    assert path.stat().st_size < len(whole)
    refused(capsys, path)


def test_refuses_an_empty_dataset_name(monkeypatch, capsys):
    """--dataset "$DATA" with DATA unset: the user has a file in mind, collecting one would be a surprise."""
    monkeypatch.setattr(cql, "collect", lambda *_: pytest.fail("collected its own data instead"))
    refused(capsys, "", "--dataset")


def test_refuses_an_hdf5_file_of_something_else(capsys):
    with h5py.File("other.hdf5", "w") as f:
        f["weights"] = np.zeros(3)
    refused(capsys, "other.hdf5", "observations", "weights")
    with h5py.File("other.hdf5", "w"):
        pass
    refused(capsys, "other.hdf5", "observations")


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals"])
def test_refuses_a_d4rl_file_without(capsys, key):
    refused(capsys, change(good_file(), key, lambda x: None), f"'{key}'")


@pytest.mark.parametrize("key", MINARI_KEYS)
@pytest.mark.parametrize("number", [0, 3])
def test_refuses_a_minari_file_without(capsys, key, number):
    path = change(good_file("minari"), f"episode_{number}/{key}", lambda x: None)
    refused(capsys, path, f"'{key}'", f"episode_{number}")


BAD = {  # what may stand in the place of an array of floats
    "cut": lambda x: x[:-1],
    "longer": lambda x: np.concatenate([x, x[:1]]),
    "no rows": lambda x: x[:0],
    "deeper": lambda x: x[:, None],
    "scalar": lambda x: np.float32(1),
    "null": lambda x: h5py.Empty("f4"),
    "group": lambda x: {},
    "bytes": lambda x: np.full(x.shape, b"1.0"),
    "text": lambda x: np.full(x.shape, "1.0", dtype=object),
    "complex": lambda x: x.astype(np.complex64),
    "compound": lambda x: np.zeros(x.shape, [("a", "f4")]),
}
BAD_FLOATS = {
    "ints": lambda x: np.zeros(x.shape, np.int64),
    "bytes of an image": lambda x: np.zeros(x.shape, np.uint8),
    "bools": lambda x: np.zeros(x.shape, bool),
}
BAD_FLAGS = {
    "two": lambda x: np.where(np.arange(len(x)) == 3, 2, 0),
    "minus one": lambda x: np.where(np.arange(len(x)) == 3, -1, 0),
    "a half": lambda x: np.where(np.arange(len(x)) == 3, 0.5, 0),
    "nan": lambda x: np.where(np.arange(len(x)) == 3, np.nan, 0),
}
WIDTH = {  # of arrays of rank 2
    "flat": lambda x: x[:, 0],
    "wider": lambda x: np.hstack([x, x]),
    "no columns": lambda x: x[:, :0],
}


def cases(floats, flags) -> list:
    """(key, change) for every key and all that can be wrong with it."""
    out = [(k, c) for k in (*floats, *flags) for c in BAD.items()]
    out += [(k, c) for k in floats for c in BAD_FLOATS.items()] + [
        (k, c) for k in flags for c in BAD_FLAGS.items()
    ]
    return [pytest.param(k, make, id=f"{k}-{name}") for k, (name, make) in out]


@pytest.mark.parametrize("key, make", cases(FLOATS, FLAG_KEYS))
def test_refuses_a_bad_d4rl_array(capsys, key, make):
    """The culprit is named; if it is `observations`, which sets the length, its first neighbour may be."""
    path = change(good_file(), key, make)
    err = refused(capsys, path)
    length_only = key == "observations" and make in (BAD["cut"], BAD["longer"])
    assert key in err or (length_only and "actions" in err), err
    if make in BAD_FLAGS.values():
        assert re.search(r"row 3\b", err)


@pytest.mark.parametrize("timeouts", [True, False], ids=["", "no_timeouts"])
@pytest.mark.parametrize("make", [pytest.param(m, id=name) for name, m in WIDTH.items()])
@pytest.mark.parametrize("key", ["actions", "next_observations", "observations"])
def test_refuses_a_d4rl_array_of_wrong_width(capsys, key, make, timeouts):
    """Against its neighbour (next_observations) and against the environment."""
    path = change(good_file(**({} if timeouts else {"timeouts": None})), key, make)
    err = refused(capsys, path, env_id="Pendulum-v1", eval_episodes=1)
    assert key in err or "observations and actions" in err


@pytest.mark.parametrize("timeouts", [True, False], ids=["", "no_timeouts"])
@pytest.mark.parametrize("make", [pytest.param(m, id=name) for name, m in WIDTH.items()])
def test_refuses_next_observations_of_another_width_without_an_environment(capsys, make, timeouts):
    path = change(good_file(**({} if timeouts else {"timeouts": None})), "next_observations", make)
    refused(capsys, path, "next_observations", env_id="NotInstalled-v0")


@pytest.mark.parametrize("key", ["actions", "observations"])
def test_refuses_arrays_without_columns_without_an_environment(capsys, key):
    """With --eval-episodes 0 and no such package here nothing else says how wide they should be."""
    path = change(good_file(next_obs=False), key, lambda x: x[:, :0])
    refused(capsys, path, key, env_id="NotInstalled-v0")


@pytest.mark.parametrize("number", [0, 3], ids=["first", "fourth"])
@pytest.mark.parametrize("key, make", cases(MINARI_KEYS[:3], MINARI_KEYS[3:]))
def test_refuses_a_bad_minari_array(capsys, key, make, number):
    """Whichever episode it stands in: sizes are taken from the first, so that one has pitfalls of its own."""
    path = change(good_file("minari"), f"episode_{number}/{key}", make)
    err = refused(capsys, path, f"episode_{number}")
    length_only = make in (BAD["cut"], BAD["longer"], BAD["no rows"])
    assert key in err or (length_only and "observations" in err), err
    if make in BAD_FLAGS.values():
        assert re.search(r"row 3\b", err)


@pytest.mark.parametrize("number", [0, 3], ids=["first", "fourth"])
@pytest.mark.parametrize("make", [pytest.param(m, id=name) for name, m in WIDTH.items()])
@pytest.mark.parametrize("key", ["actions", "observations"])
def test_refuses_a_minari_array_of_wrong_width(capsys, key, make, number):
    path = change(good_file("minari"), f"episode_{number}/{key}", make)
    err = refused(capsys, path)
    assert key in err, err


@pytest.mark.parametrize("episodes", ["array", "scalar", "name", "none"])
def test_refuses_strange_minari_groups(capsys, episodes):
    """An episode that is no group, one without a number."""
    path = good_file("minari")
    with h5py.File(path, "a") as f:
        if episodes == "name":
            f.move("episode_3", "episode_three")
        elif episodes == "none":
            f.move("episode_0", "episode")
            for i in range(1, 5):
                del f[f"episode_{i}"]
        else:
            del f["episode_3"]
            f["episode_3"] = np.zeros((2, 2)) if episodes == "array" else 1.0
    refused(capsys, path, {"name": "episode_three", "none": "episode"}.get(episodes, "episode_3"))


@pytest.mark.parametrize("layout", ["d4rl", "minari"])
@pytest.mark.parametrize("link", ["soft", "external"])
def test_refuses_a_link_to_nowhere(capsys, layout, link):
    """Sets are sometimes put together from links; the target did not travel along."""
    path, key = good_file(layout), "actions" if layout == "d4rl" else "episode_2/actions"
    with h5py.File(path, "a") as f:
        del f[key]
        f[key] = (
            h5py.SoftLink("/gone") if link == "soft" else h5py.ExternalLink("gone.hdf5", "/gone")
        )
    refused(capsys, path, "actions")


@pytest.mark.parametrize("row", [0, 20, 39])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", FLOATS)
def test_refuses_a_number_that_is_none(capsys, key, value, row):
    """First, middle and last row of every key, with the row and the value in the message."""

    def spoil(x):
        x[row] = value
        return x

    err = refused(capsys, change(good_file(), key, spoil), f"'{key}'", f"{value}")
    assert re.search(rf"row {row}\b", err)


@pytest.mark.parametrize("dtype", ["f2", "f8"])
@pytest.mark.parametrize("key", FLOATS)
def test_refuses_infinities_of_both_signs(capsys, key, dtype):
    """Their sum is NaN, about which numpy warns; the user is to see one line all the same."""

    def spoil(x):
        x = x.astype(dtype)
        x[4], x[6] = np.inf, -np.inf
        return x

    assert re.search(r"row 4\b", refused(capsys, change(good_file(), key, spoil), f"'{key}'"))


@pytest.mark.parametrize("key", ["observations", "next_observations"])
def test_large_finite_numbers_are_no_infinities(key):
    """A finiteness check by a float32 sum would find fault with two of them together."""

    def enlarge(x):
        x[[4, 6]] = 3e38
        return x

    data = read(change(good_file(), key, enlarge))
    assert (data.obs if key == "observations" else data.next_obs)[4].tolist() == pytest.approx(
        [3e38] * 3
    )


def test_refuses_doubles_too_large_for_float32(capsys):
    """1e300 in the file would be an infinity in training."""

    def spoil(x):
        x = x.astype(np.float64)
        x[17] = 1e300
        return x

    assert re.search(
        r"row 17\b", refused(capsys, change(good_file(), "rewards", spoil), "'rewards'")
    )


@pytest.mark.parametrize("row", [0, 4, -1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("key", MINARI_KEYS[:3])
def test_refuses_a_number_that_is_none_in_minari(capsys, key, value, row):
    def spoil(x):
        x[row] = value
        return x

    path = change(good_file("minari"), f"episode_3/{key}", spoil)
    err = refused(capsys, path, f"'{key}'", "episode_3", f"{value}")
    line = (9 if key == "observations" else 8) - 1 if row < 0 else row
    assert re.search(rf"row {line}\b", err), err


def test_refuses_a_minari_action_outside_and_names_its_episode(capsys):
    """A row number that counts through all episodes is in no file: P6 wants one that can be looked up."""

    def spoil(x):
        x[2] = 3.0
        return x

    path = change(good_file("minari"), "episode_3/actions", spoil)
    err = refused(capsys, path, "'actions'", "episode_3")
    assert re.search(r"row 2\b", err), err


@pytest.mark.parametrize("obs, act", [(4, 1), (3, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize("layout", ["d4rl", "minari"])
def test_refuses_shapes_of_another_environment(capsys, layout, obs, act):
    """With both shapes and the environment's name, so that the user sees which of the two is wrong."""
    if layout == "d4rl":
        path = write_d4rl("good.hdf5", n=40, obs_dim=obs, act_dim=act, length=8)
    else:
        path = write_minari("good.hdf5", [episode(0, 8, "terminal", obs, act)])
    refused(capsys, path, "Pendulum-v1", f"({obs}, {act})", "(3, 1)", eval_episodes=1)


def test_refuses_d4rl_ant_with_the_way_out(capsys):
    """traps 34: 27 entries in D4RL's ant, 105 in Ant-v5."""
    path = write_d4rl("ant.hdf5", n=40, obs_dim=27, act_dim=8, length=8, scale=1)
    env = fake_env([-1.0] * 8, [1.0] * 8, obs_dim=105)
    with pytest.raises(SystemExit):
        load(path, Args(**SMALL | {"env_id": "Ant-v5"}), env, CPU)
    err = capsys.readouterr().err
    assert "include_cfrc_ext_in_observation=False" in err and "27" in err and "105" in err


@pytest.mark.parametrize("backup", ["sac", "sarsa"])
@pytest.mark.parametrize("layout", ["d4rl", "minari"])
def test_one_transition(capsys, layout, backup):
    """Refused if it has no s' (or a'), else a dataset, if a poor one."""
    episodes = [episode(0, 1, "timeout", 3)]
    if layout == "d4rl":
        refused(
            capsys,
            write_flat("one.hdf5", episodes, next_obs=False),
            "nothing to train on",
            backup=backup,
        )
    path = (
        write_flat("one.hdf5", episodes) if layout == "d4rl" else write_minari("one.hdf5", episodes)
    )
    if backup == "sarsa":
        refused(capsys, path, "nothing to train on", backup=backup)
    else:
        assert_rows(read(path), expected_rows(episodes))
    episodes = [episode(0, 1, "terminal", 3)]
    path = (
        write_flat("one.hdf5", episodes) if layout == "d4rl" else write_minari("one.hdf5", episodes)
    )
    assert_rows(read(path, backup=backup), expected_rows(episodes, backup=backup))


@pytest.mark.parametrize("layout", ["d4rl", "minari"])
def test_all_episodes_of_length_one(capsys, layout):
    """Nothing to bootstrap from if all time out: refused. Bandit data (all terminal) are transitions."""
    write = write_flat if layout == "d4rl" else write_minari
    cut = [episode(5 * i, 1, "timeout", 3) for i in range(6)]
    refused(capsys, write("one.hdf5", cut), "nothing to train on", "6", backup="sarsa")
    if layout == "d4rl":
        refused(capsys, write_flat("one.hdf5", cut, next_obs=False), "nothing to train on", "6")
    bandit = [episode(5 * i, 1, "terminal", 3) for i in range(6)]
    data = read(write("one.hdf5", bandit))
    assert_rows(data, expected_rows(bandit))
    assert data.starts.tolist() == data.train.tolist()


def test_minari_episodes_without_steps_are_passed_over():
    """A reset without a step leaves one observation: no transition, no episode to start from."""
    episodes = [
        episode(0, 0, "open"),
        *three_episodes(),
        episode(300, 0, "open"),
        episode(400, 2, "terminal"),
    ]
    data = read(write_minari("m.hdf5", episodes))
    assert_rows(data, expected_rows(episodes))
    np.testing.assert_array_equal(data.obs[data.starts][:, 0].numpy(), [0, 100, 200, 400])


def test_refuses_a_minari_file_of_empty_episodes(capsys):
    refused(capsys, write_minari("m.hdf5", [episode(0, 0, "open")] * 3), "no transitions")


def test_attributes_of_other_tools_do_no_harm(capsys):
    """The reader takes what begins with `collector_` for numbers; another writer may keep its name there."""
    path = good_file()
    with h5py.File(path, "a") as f:
        f.attrs["collector_name"], f.attrs["collector_sizes"], f.attrs["algorithm"] = (
            "SAC",
            [1, 2, 3],
            "SAC",
        )
    try:
        assert_sound(read(path))
    except SystemExit as stop:
        assert stop.code == 2 and str(path) in capsys.readouterr().err


def test_without_h5py_says_what_to_install(monkeypatch, capsys):
    """--help needs five packages, reading a dataset one more: one line with its name, no traceback."""
    path = good_file()
    monkeypatch.setitem(sys.modules, "h5py", None)
    capsys.readouterr()
    for words in ({"dataset": str(path)}, {}):
        with pytest.raises(SystemExit) as stop:
            train(Args(**SMALL | words))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "h5py" in err and err.count("\n") == 1


def test_refuses_rows_that_need_more_memory_than_there_is(capsys):
    """P8, and a crafted header: 10^12 rows that were never written take no disk at all."""
    path = good_file()
    with h5py.File(path, "a") as f:
        for key, (_, *width) in {key: f[key].shape for key in f}.items():
            kind = f[key].dtype
            del f[key]
            f.create_dataset(key, shape=(10**12, *width), dtype=kind, chunks=(1000, *width))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(Args(**SMALL | {"dataset": str(path)}))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "GiB" in err


# ---------------------------------------------------------------------------------------------- fuzz
DTYPES = ("f2", "f4", "f8", ">f4", "i1", "i8", "u1", "?", "c8", "S3")
SHAPES = (
    lambda x: x[:0], lambda x: x[:1], lambda x: x[:-1], lambda x: x[1:], lambda x: np.concatenate([x, x]),
    lambda x: x[..., None], lambda x: x.reshape(-1), lambda x: x.T, lambda x: x[0], lambda x: x.flat[0],
    lambda x: x.reshape(len(x), -1)[:, :0], lambda x: np.hstack([x, x]), lambda x: h5py.Empty("f4"),
    lambda x: {},
)  # fmt: skip
VALUES = (np.nan, np.inf, -np.inf, -1.0, 0.0, 0.5, 1.0, 2.0, 1e30, -1e30)


def mutate(path: Path, rng) -> str:
    """One random change to one random array of the file; returns what was done."""
    with h5py.File(path) as f:
        keys = []
        f.visititems(lambda name, x: keys.append(name) if isinstance(x, h5py.Dataset) else None)
    keys = sorted(
        k for k in keys if not re.match("episode_[34]", k)
    )  # of five episodes three: more hits each
    key, kind = str(rng.choice(keys)), str(rng.choice(["dtype", "shape", "value", "deletion"]))
    i = int(rng.integers(1000))

    def make(x):
        if kind == "deletion":
            return None
        if kind == "dtype":
            return x.astype(DTYPES[i % len(DTYPES)])
        if kind == "shape":
            return SHAPES[i % len(SHAPES)](x)
        x = x.astype(np.float64)
        x.flat[int(rng.integers(x.size))] = VALUES[i % len(VALUES)]
        return x

    change(path, key, make)
    return f"{kind} {i} of {key}"


def assert_sound(data: Data):
    """What training relies on, whatever the file was."""
    batch = data.batch(data.train)
    assert len(batch.obs) > 0 and all(
        x.isfinite().all() and x.dtype == torch.float32 for x in batch
    )
    assert batch.act.abs().max() <= 1 and set(batch.done.tolist()) <= {0.0, 1.0}
    assert all(len(x) == len(batch.obs) for x in batch) and batch.obs.shape == batch.next_obs.shape
    assert not set(data.train.tolist()) & set(data.holdout.tolist())


@pytest.mark.parametrize(
    "layout, count", [("d4rl", 150), ("d4rl without timeouts", 100), ("minari", 100)]
)
def test_any_single_mutation_is_read_or_refused(tmp_path, capsys, layout, count):
    """Never another exception: a traceback tells a user nothing, and a silent misreading less."""
    rng, wrong, read_in, turned_down = np.random.default_rng(11), [], 0, 0
    if layout == "minari":
        good = good_file("minari").read_bytes()
    else:
        good = good_file(**({} if layout == "d4rl" else {"timeouts": None})).read_bytes()
    path = tmp_path / "mutant.hdf5"
    for _ in range(count):
        path.write_bytes(good)
        what = mutate(path, rng)
        capsys.readouterr()
        try:
            data = load(path, Args(**SMALL), None, CPU)
        except SystemExit as stop:
            err = capsys.readouterr().err
            turned_down += 1
            if not (
                stop.code == 2
                and err.startswith("error: ")
                and err.count("\n") == 1
                and str(path) in err
            ):
                wrong.append(f"{what}: exit {stop.code}, {err!r}")
        except Exception as e:
            wrong.append(f"{what}: {type(e).__name__}: {e}")
        else:
            read_in += 1
            try:
                assert_sound(data)
            except AssertionError as e:
                wrong.append(f"{what}: read, but {e}")
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(sorted(wrong))
    assert read_in > count // 20 and turned_down > count // 4


# ------------------------------------------------------------------------------- writing and collecting
def test_write_beside_is_all_or_nothing(tmp_path):
    """An interruption of any kind leaves the old file, and no litter."""
    path = tmp_path / "new" / "data.bin"
    for error in (OSError("disk full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), cql.write_beside(path) as temporary:
            temporary.write_bytes(b"half")
            assert (
                temporary.parent == path.parent and not path.exists()
            )  # same file system: the move is atomic
            raise error
        assert list(path.parent.iterdir()) == []
    with cql.write_beside(path) as temporary:
        temporary.write_bytes(b"whole")
    with pytest.raises(RuntimeError), cql.write_beside(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == b"whole"


def test_write_beside_flushes_before_it_moves(tmp_path, monkeypatch):
    """P4: without the flush a power cut can leave the new name on an empty file."""
    events, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("move"), replace(*a))[1])
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1]
    )
    path = tmp_path / "data.bin"
    with cql.write_beside(path) as temporary:
        temporary.write_bytes(b"whole")
        name = str(temporary)
    assert events == [name, "move", str(tmp_path)]


COLLECT = dict(env_id="Pendulum-v1", collect_steps=300, seed=5)  # below RANDOM_STEPS: no updates


@pytest.fixture
def quick_collect(monkeypatch):
    """collect() with the evaluation of the collector left out; every player it makes is noted."""
    assert COLLECT["collect_steps"] < cql.RANDOM_STEPS
    players, player = [], cql.Player
    monkeypatch.setattr(cql, "evaluate", lambda *_: (np.array([-7.0, -9.0]), 0.0))
    monkeypatch.setattr(cql, "Player", lambda *a: players.append(player(*a)) or players[-1])
    return players


def files(folder="datasets") -> list[Path]:
    return (
        sorted(p for p in Path(folder).rglob("*") if p.is_file()) if Path(folder).exists() else []
    )


def test_collected_file_holds_what_the_player_stored(quick_collect, capsys):
    """Written, read back, and replayed in a fresh environment: the same transitions three times."""
    args, env = Args(**COLLECT), make_env("Pendulum-v1")
    path = collect(args, env, CPU)
    assert files() == [path] and str(path) in capsys.readouterr().out
    (player,) = quick_collect
    with h5py.File(path) as f:
        columns = {k: v[()] for k, v in f.items()}
    assert columns.keys() == {*FLOATS, *FLAG_KEYS}
    assert columns["terminals"].dtype == bool and columns["timeouts"].nonzero()[0].tolist() == [199]
    data = load(path, Args(**COLLECT, holdout=0.0), env, CPU)
    assert data.train.tolist() == list(range(300)) and data.starts.tolist() == [0, 200]
    batch = data.batch(data.train)
    for name in ("obs", "rew", "next_obs", "done"):
        assert torch.equal(getattr(batch, name), player.buffer[name]), name
    torch.testing.assert_close(batch.act, player.buffer["act"], atol=1e-6, rtol=0)
    assert data.info["collector_return_mean"] == -8.0
    assert columns["actions"].min() < -1.8 and columns["actions"].max() > 1.8
    assert len(np.unique(columns["actions"])) > 290
    fresh = gym.make("Pendulum-v1")
    obs, _ = fresh.reset(seed=5)
    for i in range(300):
        np.testing.assert_allclose(columns["observations"][i], obs, atol=1e-4)
        obs, rew, terminated, truncated, _ = fresh.step(columns["actions"][i])
        np.testing.assert_allclose(columns["next_observations"][i], obs, atol=1e-4)
        np.testing.assert_allclose(columns["rewards"][i], rew, atol=1e-3)
        if truncated:
            assert i == 199
            break  # what follows starts from the environment's own random state
    assert not np.allclose(columns["observations"][200], columns["next_observations"][199])


def test_the_collector_has_settings_of_its_own(monkeypatch):
    """The file's name does not tell them: whoever changes one must change the name's version as well."""
    assert cql.RANDOM_STEPS == 1_000
    moves, updates, ended, step = [], [], [], cql.Player.step
    monkeypatch.setattr(cql, "RANDOM_STEPS", 20)
    monkeypatch.setattr(
        cql.Player, "step", lambda self, random: moves.append(random) or step(self, random)
    )
    monkeypatch.setattr(
        Learner, "update", lambda self, _, cloning: updates.append((len(moves), cloning))
    )
    monkeypatch.setattr(
        cql, "evaluate", lambda *x: (np.zeros(1), ended.append((x[0].args, x[1].num_envs)))
    )
    args = Args(
        env_id="Pendulum-v1", seed=5, collect_steps=30, gamma=0.5, cql_alpha=1.0, critic_width=8
    )
    path = collect(args, make_env("Pendulum-v1"), CPU)
    assert path.name == "Pendulum-v1_sac-replay_30_seed5_v1.hdf5"
    assert moves == [True] * 20 + [False] * 10 and updates == [(n, False) for n in range(21, 31)]
    own = Args(
        env_id="Pendulum-v1", seed=5, cql_alpha=0.0, backup_entropy=True, policy_lr=3e-4, q_lr=3e-4
    )
    assert ended == [(own, 10)]


def test_second_run_takes_the_file_that_is_there(quick_collect, capsys, monkeypatch):
    """Keyed by environment, steps and seed; what does not touch the data makes no new file."""
    env = make_env("Pendulum-v1")
    path = collect(Args(**COLLECT), env, CPU)
    before = path.stat().st_mtime_ns, path.read_bytes()
    capsys.readouterr()
    again = collect(
        Args(**COLLECT, cql_alpha=0.5, num_updates=3, policy_lr=0.1, gamma=0.9), env, CPU
    )
    assert again == path and len(quick_collect) == 1 and str(path) in capsys.readouterr().out
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before

    def started(*_):
        raise InterruptedError

    monkeypatch.setattr(cql, "Player", started)
    for other in ({"seed": 6}, {"collect_steps": 301}, {"env_id": "MountainCarContinuous-v0"}):
        changed = Args(**COLLECT | other)
        with pytest.raises(InterruptedError):
            collect(changed, make_env(changed.env_id), CPU)
    assert files() == [path]


def test_collecting_twice_gives_the_same_file(quick_collect, tmp_path, monkeypatch):
    """P2 for data: the key says what made it, so the same key must mean the same numbers."""
    contents = []
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        torch.manual_seed(seed)  # as set_up() does from --seed
        with h5py.File(
            collect(Args(**COLLECT | {"seed": seed}), make_env("Pendulum-v1"), CPU)
        ) as f:
            contents.append({k: v[()] for k, v in f.items()})
    assert all(np.array_equal(contents[0][k], contents[1][k]) for k in contents[0])
    assert not np.array_equal(contents[0]["actions"], contents[2]["actions"])
    assert not np.array_equal(contents[0]["observations"], contents[2]["observations"])


def test_a_kept_file_that_was_spoilt_is_refused(quick_collect, capsys):
    """A file under the right name is checked like any other, and named so that the user can delete it."""
    path = collect(Args(**COLLECT), make_env("Pendulum-v1"), CPU)
    path.write_bytes(path.read_bytes()[:-100])
    err = refused(capsys, "", dataset=None, **COLLECT)
    assert str(path) in err


def test_failure_while_writing_leaves_nothing(quick_collect, monkeypatch):
    """A full disk in the middle of the columns: the next run must collect anew, not read half a file."""
    put = h5py.Group.__setitem__

    def full(self, name, value):
        if name == "terminals":
            assert files()  # really in the middle
            raise OSError(28, "No space left on device")
        put(self, name, value)

    env = make_env("Pendulum-v1")
    monkeypatch.setattr(h5py.Group, "__setitem__", full)
    with pytest.raises((OSError, SystemExit)):
        collect(Args(**COLLECT), env, CPU)
    assert files() == []
    monkeypatch.setattr(h5py.Group, "__setitem__", put)
    assert (
        files() == [] and collect(Args(**COLLECT), env, CPU).is_file() and len(quick_collect) == 2
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_collecting_leaves_nothing(quick_collect, monkeypatch, name):
    """P5: status 130 or 143, and no file that a later run would take for whole."""
    env, number = make_env("Pendulum-v1"), getattr(signal, name)
    step, calls = env.step, []

    def interrupt(action):
        calls.append(1)
        if len(calls) == 50:
            os.kill(os.getpid(), number)
        return step(action)

    monkeypatch.setattr(env, "step", interrupt)
    with pytest.raises(SystemExit) as stop:
        collect(Args(**COLLECT), env, CPU)
    assert stop.value.code == 128 + number and files() == [] and len(calls) <= 51


def test_without_a_dataset_train_collects_and_reads(quick_collect, monkeypatch):
    """The bare command's way: collect, read, train; and the folder `datasets` keeps one file."""
    args = SMALL | COLLECT | dict(eval_episodes=0, num_updates=2)
    summary = train(Args(**args))
    assert files() == [Path(summary["dataset"])] and summary["num_updates"] == 2
    assert summary["collector_return_mean"] == -8.0
    train(Args(**args))
    assert len(quick_collect) == 1


# ------------------------------------------------------------------------------------ memory and time
MEASURE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from cql_continuous import Args, load

def high_water():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM")) * 1024

def current():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmRSS")) * 1024

args = Args(env_id="HalfCheetah-v5")
load(Path(sys.argv[2]), args, None, torch.device("cpu"))
before, begin = current(), time.process_time()
data = load(Path(sys.argv[3]), args, None, torch.device("cpu"))
seconds = time.process_time() - begin
print("measured", high_water() - before, seconds, current() - before, len(data.train) + len(data.holdout))
"""


def write_cheetah(path, n: int) -> int:
    """A HalfCheetah-shaped file with next_observations and time-outs every 1,000 steps; its arrays' bytes."""
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((n + 1, 17), dtype=np.float32)
    arrays = {
        "observations": obs[:-1],
        "next_observations": obs[1:],
        "actions": 2 * rng.random((n, 6), dtype=np.float32) - 1,
        "rewards": rng.random(n, dtype=np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.arange(1, n + 1) % 1000 == 0,
    }
    with h5py.File(path, "w") as f:
        for key, value in arrays.items():
            f[key] = value
    return sum(x.nbytes for x in arrays.values())


def measure_load(folder: Path, n: int) -> tuple[int, int, float]:
    """(bytes of the arrays, growth of the peak, processor seconds) of load() in a process of its own.

    The peak is /proc's VmHWM and not getrusage's ru_maxrss: that one survives exec, so that a child of a
    large pytest starts with pytest's own peak and never seems to grow.
    """
    (folder / "measure.py").write_text(MEASURE)
    write_cheetah(folder / "small.hdf5", 2000)
    size = write_cheetah(folder / "large.hdf5", n)
    line = [sys.executable, "measure.py", str(ROOT), "small.hdf5", "large.hdf5"]
    done = subprocess.run(
        line, cwd=folder, env=one_thread(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    growth, seconds, _, rows = done.stdout.splitlines()[-1].split()[1:]
    assert int(rows) == n
    return size, int(growth), float(seconds)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_and_time_of_200_000_transitions(tmp_path):
    """Rows go straight into their final arrays: no second copy at the peak, no loop over rows."""
    size, growth, seconds = measure_load(tmp_path, 200_000)
    print(f"{size / 1e6:.1f} MB of arrays, peak + {growth / 1e6:.1f} MB, {seconds:.2f} s")
    assert 0.9 * size < growth <= 1.3 * size + 10e6, (size, growth)
    assert seconds < 2


# ----------------------------------------------------------------------------------- the numbers of a moment
@pytest.mark.parametrize(
    "changes, weight",
    [({"cql_alpha": 3.0}, 3.0), ({"cql_target_gap": 2.0}, 7.0), ({"cql_variant": "eq1"}, 0.0)],
    ids=["fixed", "lagrange", "eq1"],
)
def test_diagnose_against_loops(tmp_path, changes, weight):
    write_flat(tmp_path / "d.hdf5", random_episodes(np.random.default_rng(0), 30, 12))
    sizes = dict(gamma=0.8, backup="mean", critic_width=16, policy_width=16, holdout=0.2)
    args = Args(**sizes, **changes)
    data = read(tmp_path / "d.hdf5", **sizes, **changes)
    torch.manual_seed(0)
    learner = Learner(data.obs.shape[1], data.act.shape[1], args, torch.device("cpu"))
    if args.cql_target_gap is not None:
        learner.log_cql_alpha.data.fill_(math.log(7.0))
    for p in learner.critic.parameters():
        p.data += 0.3 * torch.randn_like(p)  # away from the target network
    found = diagnose(learner, data, args)
    critic, target = learner.critic, learner.target
    one = lambda net, s, a: net(s[None], a[None])[:, 0]  # (n,)
    pi = lambda s: torch.tanh(learner.actor(s[None])[0])[0]

    def by_hand(rows):
        q, y, lows, to_go, dots = [], [], [], [], []
        for i in rows.tolist():
            b = Batch(*(x[0] for x in data.batch(torch.tensor([i]))))
            y.append(
                float(
                    b.rew
                    + args.gamma * (1 - b.done) * one(target, b.next_obs, pi(b.next_obs)).min()
                )
            )
            q.append(one(critic, b.obs, b.act).detach().numpy())
            lows.append([q[-1].min(), float(one(critic, b.obs, pi(b.obs)).min())])
            if not math.isnan(data.returns_to_go[i]):
                to_go.append((lows[-1][0], float(data.returns_to_go[i])))
            pairs = (b.obs, b.act), (b.next_obs, pi(b.next_obs))
            phi = [critic.features(s[None], a[None])[0][0, 0] for s, a in pairs]
            dots += [float(phi[0] @ phi[1])] * int(b.done == 0)
        return np.array(q), np.array(y), np.array(lows).mean(0), np.array(to_go), np.mean(dots)

    with torch.no_grad():
        q, y, (q_data, q_pi), to_go, dot = by_hand(data.train)
        assert len(to_go) >= 32
        off = (to_go[:, 0] - to_go[:, 1]).mean()
        expected = {"td_error": ((q - y[:, None]) ** 2).mean() / y.var(ddof=1)}
        expected |= {"q_data": q_data, "q_pi": q_pi}
        expected |= {
            "q_minus_return": off,
            "return_std": to_go[:, 1].std(ddof=1),
            "feature_dot": dot,
        }
        q, y, *_ = by_hand(data.holdout)
        expected["td_error_holdout"] = ((q - y[:, None]) ** 2).mean() / y.var(ddof=1)
        starts = [one(critic, data.obs[i], pi(data.obs[i])).min().item() for i in data.starts]
    low, high = data.rew.min().item(), data.rew.max().item()
    expected |= {"v_s0": np.mean(starts), "q_bound": high / 0.2, "q_range": (high - low) / 0.2}
    expected["q_lift"] = weight / 2 / 0.2
    for k, v in expected.items():
        assert abs(found[k] - v) < 1e-3 * max(1, abs(v)), (k, found[k], v)


def a_linear_q(path, weights: list[float], **changes) -> tuple[Learner, Data, dict]:
    """diagnose() where Q_1(s, a) = weights . (s, a), from features that hold its positive and its negative
    part; Q_2 is larger by 1, its features half as large. The first layer repeats the positive part."""
    changes = dict(gamma=0.8, critic_width=8, policy_width=8) | changes
    data, args = read(path, **changes), Args(**changes)
    learner = Learner(data.obs.shape[1], data.act.shape[1], args, CPU)
    for p in learner.critic.parameters():
        p.data.zero_()
    first, second = (layer.weight.data for layer in learner.critic.layers)
    for unit, sign in enumerate((1, -1, 1)):
        first[:, :, unit] = sign * torch.tensor(weights)
    second[:, 0, 0] = second[:, 1, 1] = torch.tensor([1.0, 0.5])
    learner.critic.head.weight.data[:, :2, 0] = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    learner.critic.head.bias.data[1] = 1
    return learner, data, diagnose(learner, data, args)


def test_diagnose_where_q_is_the_action():
    """Over [-1, 1] its mean is 0, its maximum 1, and log E exp Q is log sinh 1."""
    path = write_flat("d.hdf5", random_episodes(np.random.default_rng(0), 40, 12))
    _, data, found = a_linear_q(path, [0.0, 0.0, 1.0])
    rows = len(data.train)
    assert rows <= 256 and found["q_data"] == pytest.approx(
        float(data.act[data.train].mean()), abs=1e-5
    )
    assert abs(found["q_rand"]) < 4 / math.sqrt(3 * rows)
    assert 0.99 < found["q_max"] <= 1
    assert abs(found["cql_gap"] - (math.log(math.sinh(1)) - found["q_data"])) < 0.02


@pytest.mark.parametrize("known", [31, 32])
def test_returns_of_fewer_than_32_rows_say_nothing(known):
    path = write_flat("d.hdf5", [episode(0, known, "terminal"), episode(100, 9, "timeout")])
    _, _, found = a_linear_q(path, [0.0, 0.0, 1.0])
    assert ("q_minus_return" in found) == ("return_std" in found) == (known == 32)


def test_the_largest_q_is_looked_for_on_all_rows():
    """Not only where actions of the box are drawn, on 256 of them."""
    path = write_flat("d.hdf5", random_episodes(np.random.default_rng(0), 120, 12))
    _, data, found = a_linear_q(path, [1.0, 0.0, 0.0])
    assert len(data.train) > 256 and found["q_max"] == float(data.obs[data.train, 0].max())


@pytest.mark.parametrize(
    "high, ended, changes, bound",
    [
        (2.0, True, {}, 2 / 0.2),
        (-0.5, False, {}, -0.5 / 0.2),
        (-0.5, True, {}, -0.5),  # to end at once is best
        (-0.5, True, {"backup_entropy": True, "alpha": 0.3}, -0.5 + 0.8 * 0.3 * math.log(2)),
        (2.0, True, {"backup_entropy": True, "alpha": 0.3}, (2 + 0.8 * 0.3 * math.log(2)) / 0.2),
    ],
)
def test_the_most_that_rewards_allow(high, ended, changes, bound):
    """At gamma 0.8, of rewards from -3 to `high`."""
    columns = {} if ended else {"terminals": np.zeros(200, bool)}
    rewards = np.linspace(-3, high, 200, dtype=np.float32)
    path = write_d4rl("d.hdf5", n=200, length=20, scale=1.0, rewards=rewards, **columns)
    _, _, found = a_linear_q(path, [0.0] * 4, **changes)
    entropy = 0.8 * 0.3 * math.log(2) if changes else 0
    assert found["q_bound"] == pytest.approx(bound, rel=1e-5)
    assert found["q_range"] == pytest.approx((high + 3 + entropy) / 0.2, rel=1e-5)


def test_features_are_the_first_critics_at_the_datas_actions():
    """Their largest singular value and mean norm, by numpy; 5 and 6 units of its 2 x 8 never fire."""
    path = write_flat("d.hdf5", random_episodes(np.random.default_rng(0), 30, 12))
    learner, data, found = a_linear_q(path, [0.0, 0.0, 1.0])
    a = data.act[data.train, 0].double().numpy()
    phi = np.stack([np.maximum(a, 0), np.maximum(-a, 0)], 1)
    assert found["sigma_max"] == pytest.approx(np.linalg.norm(phi, 2) / math.sqrt(len(a)), rel=1e-5)
    assert found["feature_norm"] == pytest.approx(np.abs(a).mean(), rel=1e-5)
    assert found["srank"] == found["rank_pca"] == 2 and found["dormant"] == pytest.approx(11 / 16)


def test_scores_of_namesakes_are_not_given():
    score = cql.normalized_score
    assert score("Hopper-v5", -20.272305) == score("hopper-medium-v2", -20.272305) == 0.0
    assert score("antmaze-umaze-v2", 1.0) == score("AntMaze_UMaze-v4", 1.0) == 100.0
    assert score("HopperBulletEnv-v0", 1.0) is None and score("AntBall-v0", 1.0) is None
    assert score("HalfCheetah-v5", 12135.0) == score("walker2d-expert-v2", 4592.3) == 100.0
    assert score("HalfCheetah-v5", -280.178953) == score("Walker2d-v5", 1.629008) == 0.0


def test_a_reward_that_is_a_numpy_scalar_is_stored():
    env = gym.wrappers.TransformReward(gym.make("Pendulum-v1"), lambda r: np.float32(r))
    args = Args(critic_width=8, policy_width=8, reward_scale=2.0)
    learner = Learner(3, 1, args, CPU)
    player = cql.Player(env, 3, learner, args)
    player.step(random=True)
    assert player.rows == 1 and player.buffer["rew"][0] == pytest.approx(2 * player.episode_return)
