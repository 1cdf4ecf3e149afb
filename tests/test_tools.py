"""tools/play.py, rollouts.py and convert.py, on tiny runs and on files of others."""

import importlib
import os
import pickle
import sys
from functools import cache
from types import SimpleNamespace

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "tools"))
SMALL = {"eval_episodes": 1, "cuda": False}
ONLINE = SMALL | {"total_timesteps": 300, "learning_starts": 200, "batch_size": 32, "width": 16}
ROLLOUT = SMALL | {"total_timesteps": 256, "num_envs": 1, "num_steps": 128}
OFFLINE = SMALL | {"collect_steps": 500, "num_updates": 5}
RUNS = {"sac": ONLINE, "td3": ONLINE, "ppo": ROLLOUT, "kfac_npg": ROLLOUT}
RUNS |= {"cql_continuous": OFFLINE, "cql_atari": OFFLINE | {"env_id": ("CartPole-v1",)}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """script -> (the folder of a tiny run of it, its summary)."""

    @cache
    def get(script, *changes):
        module, home = importlib.import_module(script), tmp_path_factory.mktemp(script)
        summary = module.train(module.Args(run_dir=str(home), **RUNS[script] | dict(changes)))
        return next(home.iterdir()), summary

    return get


@pytest.fixture
def tool(monkeypatch, capsys):
    def run(name, *words, status=0) -> str:
        """What it printed; with a status, the one line of its refusal."""
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        code = 0
        try:
            importlib.import_module(name).main()
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        assert code == status and (code == 0 or err.startswith("error: ") and err.count("\n") == 1)
        return err if code else out

    return run


@pytest.mark.parametrize("script", RUNS)
def test_play_films_the_evaluation(trained, tool, script):
    from moviepy import VideoFileClip

    run, summary = trained(script)
    printed = tool("play", run, "--out", "film.mp4")
    assert f"episode 1: return {summary['final_return_mean']:.1f}\n" in printed
    with VideoFileClip("film.mp4") as film:
        frames = film.duration * film.fps
        assert (film.get_frame(0) != film.get_frame(film.duration / 2)).any()
    pendulum = summary["final_return_mean"] < 0
    assert abs(frames - (200 if pendulum else summary["final_return_mean"])) <= 1  # CartPole's


def test_play_takes_one_checkpoint_and_says_what_it_cannot_do(trained, tool, tmp_path):
    run, _ = trained("td3")
    words = ("--episodes", 2, "--seed", 7, "--out", "a.gif")
    assert tool("play", run / "checkpoint.pt", *words).count("return") == 2
    assert (tmp_path / "a.gif").read_bytes()[:6] == b"GIF89a"
    assert "FileNotFoundError" in tool("play", "nothing", status=2)
    torch.save({"script": "../../evil", "format": 4}, "evil.pt")
    assert "of a script here" in tool("play", "evil.pt", status=2)


def test_play_without_a_display_names_the_way(trained, tmp_path):
    run, _ = trained("sac", ("env_id", "Hopper-v5"), ("total_timesteps", 9))
    env = {"DISPLAY": "", "WAYLAND_DISPLAY": "", "MUJOCO_GL": "glfw"}
    done = run_script("tools/play.py", run, cwd=tmp_path, check=False, env=env)
    assert done.returncode == 2 and "MUJOCO_GL=egl" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", ["sac", "td3"])
def test_rollouts_are_what_the_policy_did(trained, tool, script):
    run, _ = trained(script)
    for name in ("a", "b"):
        words = ("rollouts", run, "--steps", 450, "--out", f"{name}.hdf5")
        assert "2 whole episodes" in tool(*words)
    assert "exists already" in tool(*words, status=2)
    with h5py.File("a.hdf5") as a, h5py.File("b.hdf5") as b:
        c = {name: a[name][()] for name in a}
        assert all((c[name] == b[name][()]).all() for name in c)
    assert np.flatnonzero(c["timeouts"]).tolist() == [199, 399, 449] and not c["terminals"].any()
    assert (c["next_observations"][:-1] == c["observations"][1:]).all(1)[~c["timeouts"][:-1]].all()
    cos, sin, speed = c["observations"].T
    cost = np.arctan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * c["actions"][:, 0] ** 2
    np.testing.assert_allclose(c["rewards"], -cost, atol=1e-4)  # Pendulum's own
    speed = (speed + 0.75 * sin + 0.15 * c["actions"][:, 0]).clip(-8, 8)
    angle = np.arctan2(sin, cos) + 0.05 * speed
    moved = np.stack([np.cos(angle), np.sin(angle), speed], 1)
    np.testing.assert_allclose(c["next_observations"], moved, atol=1e-4)  # at time-outs, too
    tool("rollouts", run, "--steps", 50, "--out", "g.hdf5", "--greedy")
    net = torch.load(run / "checkpoint.pt", weights_only=True)["networks"]
    with h5py.File("g.hdf5") as f:
        x = torch.as_tensor(f["observations"][()])
        for i in (0, 2, 4):  # the actor's layers by hand
            x = x @ net[f"actor.net.{i}.weight"].T + net[f"actor.net.{i}.bias"]
            x = x.relu() if i < 4 else 2 * torch.tanh(x[:, :1])
        np.testing.assert_allclose(f["actions"][()], x, atol=1e-5)


def test_convert_reads_the_replay_of_stable_baselines(tool, tmp_path):
    when = np.float32([[4, 4], [5, 5], [2, 2], [3, 3]])  # a ring of two environments, 2 is first
    buffer = SimpleNamespace(buffer_size=4, n_envs=2, pos=2, full=True)
    buffer.action_space = gym.spaces.Box(np.float32([0]), np.float32([10]))
    buffer.observations = np.stack([when, when + [0, 10]], -1)
    buffer.next_observations = buffer.observations + 1
    buffer.actions, buffer.rewards = when[..., None] / 5, when
    buffer.dones = np.float32([[0, 0], [0, 0], [0, 1], [1, 0]])
    buffer.timeouts = np.float32([[0, 0], [0, 0], [0, 1], [0, 0]])
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(buffer))
    assert "8 transitions, 1 terminals, 3 time-outs" in tool("convert", "b.pkl", "b.hdf5")
    with h5py.File("b.hdf5") as f:
        assert f["rewards"][()].tolist() == [2, 3, 4, 5] * 2
        assert f["observations"][:, 1].tolist() == [2, 3, 4, 5, 12, 13, 14, 15]
        np.testing.assert_allclose(f["actions"][:4, 0], [7, 8, 9, 10])  # bounds 0 to 10
        assert np.flatnonzero(f["terminals"][()]).tolist() == [1]
        assert np.flatnonzero(f["timeouts"][()]).tolist() == [3, 4, 7]
    # optimize_memory_usage: the newest next observation lies in the oldest row, which is left out
    buffer.observations[2] += 100
    buffer.next_observations = None
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(buffer))
    assert "6 transitions" in tool("convert", "b.pkl", "c.hdf5")
    with h5py.File("c.hdf5") as f:
        assert f["observations"][:, 1].tolist() == [3, 4, 5, 13, 14, 15]


class Evil:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_convert_reads_lists_of_dicts_and_npz_and_runs_no_code(tool, tmp_path):
    episode = {"obs": np.arange(4.0)[:, None], "acts": np.ones((3, 1)), "rews": np.ones(3)}
    demos = [episode | {"terminated": True, "info": Evil()}, episode]
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(demos))
    tool("convert", "d.pkl", "d.hdf5")
    assert not (tmp_path / "it_ran").exists()
    with h5py.File("d.hdf5") as f:
        assert f["next_observations"][:, 0].tolist() == [1, 2, 3] * 2
        assert np.flatnonzero(f["terminals"]) == [2] and np.flatnonzero(f["timeouts"]) == [5]
    columns = {name: np.ones((3, 1)) for name in ("observations", "actions", "rewards")}
    np.savez("r.npz", dones=[0, 1, 0], **columns)
    assert "3 transitions, 1 terminals, 1 time-outs" in tool("convert", "r.npz", "r.hdf5")
    assert "exists" in tool("convert", "r.npz", "r.hdf5", status=2)
    starts = {k: np.ones((6, 1)) for k in columns} | {"episode_starts": [1, 0, 1, 0, 0, 1]}
    np.savez("sb2.npz", **starts)  # Stable-Baselines 2: expert data
    ends = {k: np.ones((6, 1)) for k in columns} | {"terminals": [0, 0, 0, 1, 0, 0]}
    with h5py.File("d3rlpy1.h5", "w") as f:
        f.update(ends | {"episode_terminals": [0, 1, 0, 1, 0, 1]})
    (tmp_path / "columns.pkl").write_bytes(pickle.dumps(ends | {"timeouts": [0, 1, 0, 0, 0, 1]}))
    found = {}
    for name in ("sb2.npz", "d3rlpy1.h5", "columns.pkl"):
        tool("convert", name, name + ".hdf5")
        with h5py.File(name + ".hdf5") as f:
            found[name] = [np.flatnonzero(f[x]).tolist() for x in ("terminals", "timeouts")]
            assert set(f) == {"observations", "actions", "rewards", "terminals", "timeouts"}
    assert found == {
        "sb2.npz": [[], [1, 4, 5]],
        "d3rlpy1.h5": [[3], [1, 5]],
        "columns.pkl": [[3], [1, 5]],
    }
    (tmp_path / "pointer.pkl").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in tool("convert", "pointer.pkl", "y.hdf5", status=2)
    (tmp_path / "none.pkl").write_bytes(pickle.dumps([]))
    assert "list of episodes" in tool("convert", "none.pkl", "y.hdf5", status=2)
    np.savez("bad.npz", **columns | {"rewards": np.full(3, np.nan)})
    assert "NaN" in tool("convert", "bad.npz", "x.hdf5", status=2)


def test_a_replay_becomes_a_minari_set_with_the_same_returns(trained, tool, tmp_path, monkeypatch):
    trained("sac", ("total_timesteps", 450), ("save_dataset", "r.hdf5"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    tool("convert", "r.hdf5", "pendulum/sac-v0", "--env", "Pendulum-v1")
    found = minari.load_dataset("pendulum/sac-v0")
    assert found.spec.env_spec.id == "Pendulum-v1" and found.total_steps == 450
    episodes = list(found.iterate_episodes())
    with h5py.File("r.hdf5") as f:
        returns = np.add.reduceat(f["rewards"][()], [0, 200, 400])
        np.testing.assert_array_equal(episodes[0].observations[-1], f["next_observations"][199])
    np.testing.assert_allclose([e.rewards.sum() for e in episodes], returns, rtol=1e-5)
    assert [len(e.actions) for e in episodes] == [200, 200, 50] and episodes[0].truncations[-1]
