"""tools/play.py, rollouts.py and convert.py, on tiny runs and on files of others."""

import importlib
import os
import pickle
import sys
from functools import cache
from pathlib import Path
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
OTHERS = {"policy_constraints": OFFLINE | {"behaviour_steps": 5}, "qt_opt": OFFLINE}
OTHERS |= {"safety_critics": SMALL | {"total_timesteps": 80, "num_steps": 40}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """script -> (the folder of a tiny run of it, its summary)."""

    @cache
    def get(script, *changes):
        module, home = importlib.import_module(script), tmp_path_factory.mktemp(script)
        summary = module.train(
            module.Args(run_dir=str(home), **(RUNS | OTHERS)[script] | dict(changes))
        )
        return next(home.iterdir()), summary

    return get


@pytest.fixture
def tool(monkeypatch, capsys):
    monkeypatch.setenv("MUJOCO_GL", "")  # what is chosen ends with the test

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


@pytest.mark.parametrize("script", [*RUNS, *OTHERS])
def test_play_films_the_evaluation(trained, tool, script):
    from moviepy import VideoFileClip

    run, summary = trained(script)
    printed = tool("play", run, "--out", "film.mp4")
    assert f"episode 1: return {summary['final_return_mean']:.1f}\n" in printed
    with VideoFileClip("film.mp4") as film:
        frames = film.duration * film.fps
        assert (film.get_frame(0) != film.get_frame(film.duration / 2)).any()
    if script == "safety_critics":  # Navigation: ends at the goal or in the trap
        assert 1 <= frames <= 200
        return
    pendulum = summary["final_return_mean"] < 0
    assert abs(frames - (200 if pendulum else summary["final_return_mean"])) <= 1  # CartPole's


def test_play_takes_one_checkpoint_and_says_what_it_cannot_do(trained, tool, tmp_path):
    run, _ = trained("td3")
    words = ("--episodes", 2, "--seed", 7, "--gif", "a.gif")
    assert tool("play", run / "checkpoint.pt", *words).count("return") == 2
    assert (tmp_path / "a.gif").read_bytes()[:6] == b"GIF89a"
    assert "FileNotFoundError" in tool("play", "nothing", status=2)
    torch.save({"script": "../../evil", "format": 4}, "evil.pt")
    assert "of a script in" in tool("play", "evil.pt", status=2)


@pytest.mark.parametrize("script", ["ppo", "kfac_npg", "cql_atari", "sac", "qt_opt"])
def test_tools_take_a_copy_under_another_name(script, tool, tmp_path, monkeypatch):
    """By what it can do, not by its name."""
    import play

    name = f"my_{script}"
    (tmp_path / f"{name}.py").write_text((ROOT / f"{script}.py").read_text())
    monkeypatch.setattr(play, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    module = importlib.import_module(name)
    module.train(module.Args(**(RUNS | OTHERS)[script]))
    (run,) = Path("runs").iterdir()
    if script == "qt_opt":
        assert "draws random numbers" in tool("play", run, "--export", "p.pt", status=2)
        return
    assert "differs from the original" in tool("play", run, "--export", "p.pt")
    if script == "sac":
        assert "50 transitions" in tool("rollouts", run, "--steps", 50, "--out", "r.hdf5")
    else:
        words = (run, "--steps", 50, "--out", "r.hdf5")
        assert "or a copy" in tool("rollouts", *words, status=2)


class Blind(gym.Env):
    """Without a render_mode."""

    observation_space = action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, True, False, {}


def test_an_environment_that_cannot_be_filmed_is_named(trained, tool, monkeypatch):
    spec = gym.envs.registration.EnvSpec("Blind-v0", entry_point=Blind, max_episode_steps=5)
    monkeypatch.setitem(gym.registry, "Blind-v0", spec)
    run, _ = trained("sac", ("env_id", "Blind-v0"), ("total_timesteps", 9))
    assert "no film (it takes render_mode rgb_array" in tool("play", run, status=2)


def test_play_without_a_display_names_the_way(trained, tmp_path):
    run, _ = trained("sac", ("env_id", "Hopper-v5"), ("total_timesteps", 9))
    env = {"DISPLAY": "", "WAYLAND_DISPLAY": "", "MUJOCO_GL": "glfw"}
    done = run_script("tools/play.py", run, cwd=tmp_path, check=False, env=env)
    assert done.returncode == 2 and "MUJOCO_GL=egl" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("works", ["egl osmesa", "osmesa", ""])
def test_play_chooses_how_mujoco_draws_without_a_display(tool, monkeypatch, works):
    import play

    def trial(command, env, **_):
        return SimpleNamespace(returncode=int(env["MUJOCO_GL"] not in works.split()))

    monkeypatch.setattr("subprocess.run", trial)
    monkeypatch.setattr("sys.platform", "linux")
    for name, value in (("DISPLAY", ":0"), ("WAYLAND_DISPLAY", "w"), ("MUJOCO_GL", "glfw")):
        with monkeypatch.context() as patch:
            for other in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
                patch.setenv(other, "")
            patch.setenv(name, value)
            before = os.environ["MUJOCO_GL"]
            play.choose_gl()
            assert os.environ["MUJOCO_GL"] == before
            patch.setenv(name, "")
            play.choose_gl()
            assert os.environ["MUJOCO_GL"] == works.split(" ")[0]


class Frames(gym.Env):
    """30 steps that show a dark, a grey or a bright picture and pay for its number, or the next."""

    action_space, observation_space = gym.spaces.Discrete(3), gym.spaces.Box(0, 255, (36, 36), "u1")

    def __init__(self, offset: int):
        self.offset = offset

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.shade = self.np_random.integers(3)
        noise = self.np_random.integers(50, size=(36, 36))
        return (100 * self.shade + noise).astype("u1"), {}

    def step(self, action):
        paid = float(action == (self.shade + self.offset) % 3)
        return self.reset()[0], paid, False, False, {}


for offset in (0, 1):
    gym.register(f"Frames-v{offset}", Frames, max_episode_steps=30, kwargs={"offset": offset})
PENDULUM, NORMALISED = ("env_id", "Pendulum-v1"), ("normalize_obs", True)
GAMES = ("env_id", ("Frames-v0", "Frames-v1")), ("head", "dqn"), ("gamma", 0.0), ("cql_alpha", 0.0)
GAMES += ("batch_size", 32), ("num_updates", 200), ("learning_rate", 0.001)
LONG = ("total_timesteps", 2048), ("learning_rate", 0.01)
EXPORTED = [
    ("sac", ("env_id", "Counting-v0")),  # its box is not symmetric
    ("td3", PENDULUM),
    ("ppo", *LONG),
    ("ppo", *LONG, PENDULUM, NORMALISED),
    ("kfac_npg", ("total_timesteps", 2048), NORMALISED),
    ("cql_continuous", PENDULUM),
    ("cql_atari", ("num_updates", 300)),
    ("cql_atari", *GAMES),
    ("policy_constraints", PENDULUM),
    ("safety_critics", ("shield", "off"), NORMALISED),
]


@pytest.mark.parametrize("script, changes", [(x[0], x[1:]) for x in EXPORTED])
def test_an_exported_policy_acts_as_the_evaluation_did(trained, tool, monkeypatch, script, changes):
    """Of what the environments were asked to do: the file alone gives the same from what they
    showed, one row or all at once."""
    run, _ = trained(script, *changes)
    reset, step, shown, done = gym.vector.SyncVectorEnv.reset, gym.vector.SyncVectorEnv.step, [], []

    def show(envs, **options):
        shown.append(reset(envs, **options)[0])
        return shown[-1], {}

    def act(envs, actions):
        done.append(np.array(actions))
        result = step(envs, actions)
        shown.append(result[0])
        return result

    monkeypatch.setattr(gym.vector.SyncVectorEnv, "reset", show)
    monkeypatch.setattr(gym.vector.SyncVectorEnv, "step", act)
    assert "policy.pt: differs from the original by" in tool("play", run, "--export", "policy.pt")
    policy = torch.jit.load("policy.pt")
    obs, expected = torch.as_tensor(np.concatenate(shown[:-1])), np.concatenate(done)
    obs = obs if obs.dtype == torch.uint8 else obs.float()
    found = policy(obs)
    assert len(done) > 2 and (expected != expected[0]).any() and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(policy(obs[-1:]), expected[-1:], rtol=1e-5, atol=1e-6)


ALONE = {  # flags of a run on data alone, and the bounds that its actions must have
    "bounds": ({"action_low": (-3.0,), "action_high": (5.0,)}, [[-3, -3], [5, 5]]),
    "each": ({"action_low": (-3.0, -2.0), "action_high": "data"}, [[-3, -2], [2, 4]]),
    "data": ({"action_low": "data", "action_high": "data"}, [[-2, 1], [2, 4]]),
    "none": ({}, [[-1, -1], [1, 1]]),
}


@pytest.mark.parametrize("env_id", ["Mine-v0", "Counting-v0"])
@pytest.mark.parametrize("script", ["cql_continuous", "policy_constraints"])
@pytest.mark.parametrize("case", ALONE)
def test_a_policy_of_data_alone_acts_within_the_bounds_of_its_data(tool, case, script, env_id):
    """Never within those of an environment that happens to have the name."""
    flags, bounds = ALONE[case]
    if env_id == "Counting-v0" and not flags:
        return  # then the environment's hold
    rng, n = np.random.default_rng(0), 60
    low, high = np.float32(bounds if not flags else ALONE["data"][1])
    act = low + rng.random((n, 2)) * (high - low)
    act[:2] = low, high
    ends = np.arange(n) % 20 == 19
    with h5py.File("d.hdf5", "w") as f:
        f.update({"observations": rng.normal(size=(n, 3)), "actions": act, "rewards": act[:, 0]})
        f.update({"terminals": ends, "timeouts": 0 * ends})
    module = importlib.import_module(script)
    given = SMALL | flags | {"dataset": "d.hdf5", "env_id": env_id, "eval_episodes": 0}
    given |= {"width": 16, "num_updates": 40}
    given |= {"bc_steps": 30} if script == "cql_continuous" else {"behaviour_steps": 30}
    module.train(module.Args(**given))
    (run,) = Path("runs").iterdir()
    assert "only --export" in tool("play", run, status=2)
    assert "policy.pt" in tool("play", run, "--export", "policy.pt")
    saved = module.load_checkpoint(run)
    learner = module.Learner(3, 2, module.Args(**saved["args"]), torch.device("cpu"))
    learner.load_state_dict(saved["networks"])
    obs = torch.randn(99, 3)
    unit = learner.eval().act(obs, explore=False)
    low, high = map(torch.tensor, np.float32(bounds))
    expected = low + (unit + 1) / 2 * (high - low)
    np.testing.assert_allclose(torch.jit.load("policy.pt")(obs), expected.detach(), atol=1e-5)


@pytest.mark.parametrize("script", ["sac", "ppo", "cql_atari", "cql_continuous"])
def test_an_onnx_file_acts_as_torchscript_does(trained, tool, script):
    """A Gaussian's mean and two kinds of logits; any number of rows."""
    import onnxruntime

    run, _ = trained(script)
    for name in ("p.pt", "p.onnx"):
        assert "differs from the original" in tool("play", run, "--export", name)
    session, policy = onnxruntime.InferenceSession("p.onnx"), torch.jit.load("p.pt")
    width = session.get_inputs()[0].shape[1]
    for n in (1, 50):
        obs = torch.randn(n, width)
        (found,) = session.run(["action"], {"obs": obs.numpy()})
        np.testing.assert_allclose(found, policy(obs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("script", ["sac", "ppo"])
def test_a_wrong_export_is_not_written(trained, tool, monkeypatch, tmp_path, script):
    run, _ = trained(script)
    load = torch.jit.load
    monkeypatch.setattr("torch.jit.load", lambda path: lambda obs: 1 - load(path)(obs))
    (tmp_path / "policy.pt").write_text("what was there")
    assert "not written" in tool("play", run, "--export", "policy.pt", status=2)
    assert [x.read_text() for x in tmp_path.glob("policy*")] == ["what was there"]


def test_what_play_refuses(trained, tool, tmp_path):
    run, _ = trained("sac")
    assert "expected .ts" in tool("play", run, "--export", "policy.h5", status=2)
    assert "expected .mp4" in tool("play", run, "--out", "film.avi", status=2)
    assert "--episodes 0" in tool("play", run, "--episodes", 0, status=2)
    printed = tool("play", run, "--episodes", 0, "--export", "new/policy.ts")  # random ones alone
    assert "return" not in printed and (tmp_path / "new" / "policy.ts").exists()
    many = tool("play", run, "--episodes", 3, "--out", "a.gif", "--export", "p.pt").splitlines()
    returns = [float(line.split()[-1]) for line in many[:3]]
    assert abs(float(many[3].removeprefix("mean of 3: ")) - np.mean(returns)) < 0.11
    assert many[4] == "a.gif" and many[5].startswith("p.pt") and len(many) == 6
    import play

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(play, "find_spec", lambda name: None)
        assert "pip install onnx" in tool("play", run, "--export", "policy.onnx", status=2)
    best = ("extract", "best-of-n"), ("act", "best-of-n")
    for script, *changes in (["qt_opt"], ["policy_constraints", *best], ["safety_critics"]):
        run, _ = trained(script, *changes, ("eval_episodes", 0))
        assert "random numbers" in tool("play", run, "--export", "policy.pt", status=2)


@pytest.mark.parametrize("script", ["sac", "td3"])
def test_rollouts_are_what_the_policy_did(trained, tool, script):
    run, _ = trained(script)
    for name in ("a", "b"):
        words = ("rollouts", run, "--steps", 450, "--out", f"{name}.hdf5")
        assert "2 whole episodes" in tool(*words)
    assert "exists already" in tool(*words, status=2)
    words = ("rollouts", run, "--steps", 9, "--out", "c.hdf5", "--seed", -1)
    assert "--seed -1" in tool(*words, status=2)
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


ROWS = 12  # two episodes of six steps, both cut by a time limit, or the second by a terminal
STATES = np.float64([[10 * (i // 6) + i, 1] for i in range(ROWS)])
WHOLE = {
    "observations": STATES,
    "actions": np.linspace(-1, 1, ROWS)[:, None],
    "rewards": np.ones(ROWS),
    "next_observations": STATES + [1, 0],
    "terminals": np.zeros(ROWS),
    "timeouts": np.arange(ROWS) % 6 == 5,
}
ENDED = WHOLE | {"terminals": np.arange(ROWS) == 11, "timeouts": np.arange(ROWS) == 5}
WITHOUT = ["", "timeouts", "next_observations", "terminals", "terminals timeouts"]
WITHOUT += ["timeouts next_observations", "terminals timeouts next_observations"]
SHAPES = {"as they are": lambda x: x, "(N, 1)": lambda x: x.reshape(ROWS, -1)}
SHAPES |= {"(N,)": lambda x: x[:, 0] if x.ndim == 2 else x}


@pytest.mark.parametrize("missing", WITHOUT)
@pytest.mark.parametrize("columns", [WHOLE, ENDED], ids=["cut", "ended"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_convert_writes_is_read_and_no_two_episodes_become_one(tool, columns, missing, shape):
    """Whatever a file lacks, the scripts read what is made of it as they read the file itself; and
    no column says that there were no time-outs where nothing tells."""
    module = importlib.import_module("cql_continuous")
    args = module.Args(env_id="Mine-v0", eval_episodes=0, holdout=0.0)
    columns = {k: x for k, x in columns.items() if k not in missing.split()}
    np.savez("a.npz", **{k: SHAPES[shape](x) for k, x in columns.items()})
    tool("convert", "a.npz", "a.hdf5")
    told = "timeouts" not in missing or "next_observations" not in missing
    with h5py.File("a.hdf5") as a, h5py.File("b.hdf5", "w") as b:
        assert ("timeouts" in a) == told
        width = 1 if shape == "(N,)" else 2
        cut = {k: x[:, :width] if x.ndim == 2 else x for k, x in columns.items()}
        b.update({"terminals": np.zeros(ROWS)} | cut)
    made, itself = (module.load(x, args, None, torch.device("cpu")) for x in ("a.hdf5", "b.hdf5"))
    assert made.columns["start"].sum() == (2 if told else 1)
    for name, x in itself.columns.items():
        np.testing.assert_array_equal(made.columns[name], x, err_msg=name)


@pytest.mark.parametrize("dones", [0, 11], ids=["no end among them", "one end"])
@pytest.mark.parametrize("next_obs", [True, False])
def test_dones_that_lack_the_time_outs_are_not_taken_for_all_ends(tool, dones, next_obs):
    """next_observations tell where else an episode ends; without them, and without an end, nothing
    does, and no column says that there were none."""
    columns = {k: x for k, x in WHOLE.items() if k not in ("terminals", "timeouts")}
    if not next_obs:
        del columns["next_observations"]
    np.savez("a.npz", dones=(np.arange(ROWS) == dones) * (dones > 0), **columns)
    tool("convert", "a.npz", "a.hdf5")
    with h5py.File("a.hdf5") as f:
        assert np.flatnonzero(f["terminals"]).tolist() == [11] * (dones > 0)
        assert ("timeouts" in f) == bool(next_obs or dones)
        if next_obs:
            assert np.flatnonzero(f["timeouts"]).tolist() == ([5] if dones else [5, 11])


@pytest.mark.parametrize(
    "names", ["obs act rew obs2 done", "obs act rew obs_next terminated", "states acts rews"]
)
def test_convert_knows_the_names_of_others(tool, names):
    kinds = "observations actions rewards next_observations terminals".split()
    np.savez("a.npz", **{name: WHOLE[kind] for name, kind in zip(names.split(), kinds)})
    assert "12 transitions" in tool("convert", "a.npz", "a.h5")


def test_convert_says_what_it_found_and_what_it_wants(tool, tmp_path):
    def said(columns, *words):
        np.savez("a.npz", **columns)
        return tool("convert", "a.npz", *(words or ("x.hdf5",)), status=2)

    err = said({"state": np.ones(3), "act": np.ones(3)})
    assert "found: state, act" in err and "observations observation obs states" in err
    bad = np.ones(ROWS)
    bad[7] = np.inf
    assert "row 7" in said(WHOLE | {"rewards": bad})
    assert "no transitions" in said({k: x[:0] for k, x in WHOLE.items()})
    for name, x, words in (
        ("rewards", np.ones((ROWS, 2)), "rewards have shape (12, 2), expected (12,)"),
        ("dones", np.ones((ROWS, 2)), "dones have shape (12, 2), expected (12,)"),
        ("dones", np.where(bad > 1, np.nan, 0), "dones hold NaN or infinity, first in row 7"),
        ("terminals", -WHOLE["rewards"], "terminals hold [-1.], expected 0 and 1"),
        ("next_observations", STATES * bad[:, None], "next_observations hold NaN"),
    ):
        assert words in said(WHOLE | {name: x}), name
    assert "--env names" in said(WHOLE, "x.hdf5", "--env", "Pendulum-v1")
    assert "exists already" in said(WHOLE, "gone/x.hdf5")
    for target in ("pendulum/mine", "mine.npz", "folder"):
        assert "ends in -v0" in said(WHOLE, target)
    assert {x.name for x in tmp_path.iterdir()} == {"a.npz"}  # nothing half done is left
    with h5py.File("dump.h5", "w") as f:
        f["observations_0"] = f["actions_0"] = f["rewards_0"] = np.ones((2, 1))
    assert "reads as it is" in tool("convert", "dump.h5", "x.hdf5", status=2)
    with h5py.File("group.h5", "w") as f:
        f["data/observations"] = np.ones((2, 1))
    assert "found: data" in tool("convert", "group.h5", "x.hdf5", status=2)
    episode = {k: WHOLE[k] for k in ("observations", "actions", "rewards")}
    for odd, words in (
        ({"observations": STATES, "actions": bad}, "item 1, expected a dict of arrays: no rewards"),
        ([1, 2], "item 1, expected a dict of arrays"),
        (episode | {"next_obs": STATES}, "0 and 1: only one of them has next_observations"),
    ):
        (tmp_path / "d.pkl").write_bytes(pickle.dumps([episode, odd]))
        assert words in tool("convert", "d.pkl", "x.hdf5", status=2)


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
