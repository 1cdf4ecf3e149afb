"""sac.py and td3.py together: environments, replay, counting, datasets, what a run leaves behind,
and the promises of the blocks whose canonical copies are in sac.py."""

import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import h5py
import numpy as np
import pytest
import sac
import td3
import torch
import tyro
from conftest import (
    ROOT,
    Counting,
    assert_equal,
    assert_same_checkpoint,
    load,
    metrics,
    one_thread,
    only_run,
    refused,
    run_script,
    stop_at,
    summary,
    write_d4rl,
)

CPU = torch.device("cpu")
TINY = dict(width=16, batch_size=16, log_frequency=20, eval_episodes=1)
TINY |= dict(eval_frequency=60, checkpoint_frequency=40, total_timesteps=120, learning_starts=30)
SCRIPTS = pytest.mark.parametrize("script", [sac, td3], ids=["sac", "td3"])


def tiny(script, **changes):
    return script.Args(**TINY | changes)


@pytest.fixture
def stack():
    with sac.ExitStack() as stack:
        yield stack


# ----------------------------------------------------------------------------------- environments
V5 = [i for i in gym.registry if i.endswith("-v5")]
CLASSIC = ["Pendulum-v1", "MountainCarContinuous-v0", "CartPole-v1", "Acrobot-v1", "MountainCar-v0"]


@pytest.mark.parametrize("env_id", V5 + CLASSIC)
def test_environments_are_restored_bitwise(env_id, stack):
    """Where they stand is told by seed, episode and actions: also after an earlier episode."""
    envs, others = (sac.make_envs(env_id, 2, stack) for _ in range(2))
    rng = np.random.default_rng(0)

    def act():
        """Small actions, so that some walker still stands when the state is taken."""
        box = envs.single_action_space
        if isinstance(box, gym.spaces.Discrete):
            return rng.integers(0, 2, 2)
        return rng.uniform(-0.1, 0.1, (2, *box.shape)).astype(box.dtype)

    envs.reset(seed=[1, 2])
    for _ in range(17):
        envs.step(act())
    envs.envs[0].reset()
    for _ in range(9):
        envs.step(act())
    torch.save([e.state_dict() for e in envs.envs], "s.pt")
    others.reset(seed=[7, 8])
    assert all(e.load_state_dict(s) for e, s in zip(others.envs, load("s.pt")))
    for e in (*envs.envs, *others.envs):
        e.set_wrapper_attr("_elapsed_steps", e.spec.max_episode_steps - 5)
    ends = 0
    for _ in range(30):
        a = act()
        x, y = envs.step(a), others.step(a)
        assert all(np.array_equal(p, q) for p, q in zip(x[:4], y[:4]))
        ends += (x[2] | x[3]).sum()
    assert ends >= 2


def test_no_two_environments_share_a_seed():
    """Environment i of seed s is not environment i - 1 of seed s + 1, and no evaluation's."""
    seeds = [sac.env_seeds(s, 8, e) for s in range(20) for e in (False, True)]
    assert len({x for some in seeds for x in some}) == 20 * 2 * 8
    assert sac.env_seeds(3, 8)[:4] == sac.env_seeds(3, 4)


class Odd(Counting):
    """Infos of any type and shape, and rewards as arrays of one number."""

    def step(self, action):
        obs, rew, terminated, truncated, _ = super().step(action)
        infos = {"x": np.zeros((self.t, 2)), "x_": object(), "final_obs": 3, "n": [1] * self.t}
        return obs, np.array([rew]), terminated, truncated, infos


class Dictionary(gym.ObservationWrapper):
    def __init__(self, env):
        super().__init__(env)
        box = env.observation_space
        self.observation_space = gym.spaces.Dict({"b": box, "a": box})

    def observation(self, obs):
        return {"b": obs + 100, "a": obs}


class Stateful(gym.Wrapper):
    """Remembers across episodes: an episode does not follow from its seed."""

    seen = 0

    def step(self, action):
        Stateful.seen += 1
        obs, *rest = self.env.step(action)
        return obs + Stateful.seen, *rest


class Broken(gym.Env):
    alive = 0
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self):
        Broken.alive += 1
        if Broken.alive > 1:
            raise RuntimeError("port 5005 is in use")


def box_of(low, high, dtype=np.float32):
    env = Counting()
    env.action_space = gym.spaces.Box(np.array(low), np.array(high), dtype=dtype)
    return env


BIG = np.finfo(np.float32).max
for name, make in {
    "Odd": Odd,
    "Dict": lambda: Dictionary(Counting()),
    "Stateful": lambda: Stateful(gym.make("Pendulum-v1")),
    "Broken": Broken,
    "Huge": lambda: box_of([-BIG, -BIG], [BIG, BIG]),
    "OneSided": lambda: box_of([0.0, 0.0], [np.inf, 1.0]),
    "Stuck": lambda: box_of([0.0, 1.0], [1.0, 1.0]),
    "Integers": lambda: box_of([0, 0], [3, 3], np.int64),
}.items():
    gym.register(f"{name}-v0", entry_point=make, max_episode_steps=100)
gym.register("Timeless-v0", entry_point=Counting)


@SCRIPTS
def test_infos_are_not_read_and_rewards_may_be_arrays(script):
    args = tiny(script, env_id="Odd-v0", eval_episodes=2)
    script.train(replace(args, env_id="Counting-v0", exp_name="plain"))
    script.train(replace(args, exp_name="odd"))
    odd, plain = (next(Path("runs").glob(f"*__{n}__*")) for n in ("odd", "plain"))
    assert metrics(odd) == metrics(plain)


def test_dict_observations_are_flattened_by_gymnasiums_rule(stack):
    envs = sac.make_envs("Dict-v0", 1, stack)
    obs, _ = envs.reset(seed=[0])
    assert obs.tolist() == [[0, 0, 100, 100]]  # a before b, whatever the order they were given in


@pytest.mark.parametrize("env_id", ["Huge-v0", "OneSided-v0", "Stuck-v0", "Integers-v0"])
def test_boxes_that_no_scaling_fits_are_refused(env_id, stack, capsys):
    envs = sac.make_envs(env_id, 1, stack)
    assert env_id in refused(capsys, lambda: sac.check_boxes(envs, env_id))


def test_an_environment_shows_its_own_reason(stack, capsys):
    err = refused(capsys, lambda: sac.make_envs("Broken-v0", 2, stack))
    assert "port 5005 is in use" in err and "--eval-episodes 0" in err
    assert "doesn't exist" in refused(capsys, lambda: sac.make_envs("Nope-v0", 1, stack))
    err = refused(capsys, lambda: sac.make_envs("no_such_package:Nope-v0", 1, stack))
    assert "no_such_package" in err
    mine = "import gymnasium as g\ng.register('Mine-v0', 'conftest:Counting', max_episode_steps=9)"
    Path("package_of_mine.py").write_text(mine)
    sys.path.insert(0, os.getcwd())
    try:
        assert sac.make_envs("package_of_mine:Mine-v0", 1, stack).num_envs == 1
    finally:
        sys.path.remove(os.getcwd())


def test_without_evaluation_one_instance_is_enough_and_every_one_is_closed():
    code = """
import gymnasium as gym, sys
class One(gym.Env):
    alive = 0
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))
    def __init__(self):
        assert One.alive == 0, "a second instance"
        One.alive += 1
    def reset(self, seed=None, options=None): return self.observation_space.sample() * 0, {}
    def step(self, a): return self.observation_space.sample() * 0, 0.0, False, False, {}
    def close(self): print("CLOSED", flush=True)
gym.register("One-v0", entry_point=One, max_episode_steps=20)
"""
    Path("one_env.py").write_text(code)
    line = ["--env", "one_env:One-v0", "--total-timesteps", 50, "--learning-starts", 50]
    path = {"PYTHONPATH": os.getcwd()}
    done = run_script("sac.py", *line, "--eval-episodes", 0, cwd=".", env=path)
    assert done.stdout.count("CLOSED") == 1
    done = run_script("sac.py", *line, cwd=".", env=path, check=False)
    assert done.returncode == 2 and "a second instance" in done.stderr and "CLOSED" in done.stdout


# ------------------------------------------------------------------------------- replay, counting
def collect_into(script, args, n=24):
    """The replay of a training without an update."""
    script.train(replace(args, total_timesteps=n, learning_starts=n, eval_episodes=0))
    return load(only_run(".") / "checkpoint.pt")["replay"]["rows"]


@SCRIPTS
def test_no_false_row_no_lost_observation_no_time_out_as_an_end(script):
    """Every row is one step of one episode; the last has its true next_obs; done is termination."""
    c = collect_into(script, tiny(script, env_id="Counting-v0", num_envs=2), n=48)
    c = {k: x.numpy() for k, x in c.items()}
    assert len(c["rew"]) == 48 and (c["rew"] == c["next_obs"][:, 1]).all()
    assert (c["obs"][:, 0] == c["next_obs"][:, 0]).all(), "a row joins two episodes"
    assert (c["next_obs"][:, 1] == c["obs"][:, 1] + 1).all()
    last = c["next_obs"][:, 1] == 3 + c["obs"][:, 0] % 3
    even = c["obs"][:, 0] % 2 == 0
    assert (c["done"] == (last & even)).all() and (c["cut"] == (last & ~even)).all()
    steps = [(e, t) for e in range(9) for t in range(3 + e % 3)]
    for i in (0, 1):  # nothing is missing: each environment's rows count on without a gap
        assert [tuple(x) for x in c["obs"][i::2]] == steps[:24]


def a_row(i, width=1):
    x = torch.full((1, width), float(i))
    return x, x, x[:, 0], x, x[:, 0] * 0, x[:, 0] * 0


@SCRIPTS
def test_the_ring_keeps_the_newest_rows(script, stack):
    envs = script.make_envs("Pendulum-v1", 1, stack)
    envs.reset(seed=[0])
    replay, other = (script.Replay(5, 1, 1, CPU) for _ in range(2))
    for i in range(7):
        replay.add(*a_row(i))
    assert sorted(replay.columns["rew"].tolist()) == [2, 3, 4, 5, 6] and float(replay.size) == 5
    other.load_state_dict(replay.state_dict(envs), envs)
    samples = []
    for r in (replay, other):
        torch.manual_seed(0)
        samples.append(r.sample(50).rew)
    assert torch.equal(*samples) and set(samples[0].tolist()) == {2, 3, 4, 5, 6}
    other.add(*a_row(9))
    assert sorted(other.columns["rew"].tolist()) == [3, 4, 5, 6, 9]


@SCRIPTS
@pytest.mark.parametrize(
    "utd, envs, frequency", [(1, 1, 1), (3, 1, 2), (0.5, 1, 1), (1, 3, 2), (0.1, 4, 3)]
)
def test_updates_are_counted_exactly(script, utd, envs, frequency, monkeypatch):
    counts = {"update": 0, "policy": 0, "polyak": 0}
    update, polyak = script.Learner.update, script.Learner.polyak

    def counted(learner, batch, with_policy):
        counts["update"] += 1
        counts["policy"] += with_policy
        return update(learner, batch, with_policy)

    def counted_polyak(*a):
        counts["polyak"] += 1
        polyak(*a)

    monkeypatch.setattr(script.Learner, "update", counted)
    monkeypatch.setattr(script.Learner, "polyak", counted_polyak)
    args = tiny(script, env_id="Counting-v0", utd=utd, num_envs=envs, policy_frequency=frequency)
    result = script.train(replace(args, eval_episodes=0))
    steps = result["global_step"]
    assert 120 <= steps < 120 + envs
    assert result["updates"] == counts["update"] == int(utd * (steps - 30) + 1e-9)
    assert counts["policy"] == counts["update"] // frequency
    assert counts["polyak"] == (counts["update"] if script is sac else 2 * counts["policy"])


@SCRIPTS
def test_the_first_steps_are_uniform(script):
    args = tiny(script, env_id="Counting-v0", total_timesteps=3000, learning_starts=3000)
    script.train(replace(args, save_dataset="d.hdf5", eval_episodes=0, eval_frequency=0))
    with h5py.File("d.hdf5") as f:
        act = f["actions"][()]
    for i, (low, high) in enumerate([(-3, 1), (0, 4)]):  # each action fills its own bounds evenly
        counts, _ = np.histogram(act[:, i], 8, (low, high))
        assert counts.sum() == 3000 and (abs(counts - 375) < 5 * 375**0.5).all()


def d4rl_episodes(path):
    """Episodes as D4RL's own loop cuts them: (observations, rewards, terminated) each."""
    with h5py.File(path) as f:
        d = {k: f[k][()] for k in f}
    ends = np.flatnonzero(d["terminals"] | d["timeouts"]) + 1
    assert ends[-1] == len(d["rewards"])
    rows = [slice(a, b) for a, b in itertools.pairwise([0, *ends])]
    return [(d["observations"][r], d["rewards"][r], d["terminals"][r][-1]) for r in rows]


@SCRIPTS
def test_datasets_hold_whole_episodes_one_environment_after_the_other(script):
    """Counting-v0 in two environments: episode e lasts 3 + e % 3 steps, even ones terminate."""
    script.train(tiny(script, env_id="Counting-v0", num_envs=2, save_dataset="d.hdf5"))
    episodes = d4rl_episodes("d.hdf5")
    lengths = [3 + e % 3 for e in range(15)]  # 60 steps in each
    assert [len(r) for _, r, _ in episodes] == 2 * lengths
    assert [sum(r) for _, r, _ in episodes] == [n * (n + 1) / 2 for n in 2 * lengths]
    assert [bool(t) for *_, t in episodes] == 2 * [e % 2 == 0 for e in range(15)]
    with h5py.File("d.hdf5") as f:
        assert not (f["terminals"][()] & f["timeouts"][()]).any()


@SCRIPTS
def test_saved_returns_are_the_ones_that_were_seen(script):
    args = tiny(script, total_timesteps=500, num_envs=2, save_dataset="d.hdf5", learning_starts=60)
    script.train(args)
    seen = [float(v) for _, tag, v in metrics(only_run(".")) if tag == "charts/episodic_return"]
    returns = [r.sum() for _, r, _ in d4rl_episodes("d.hdf5") if len(r) == 200]
    assert (
        len(seen) == 1 and len(returns) == 2
    )  # both ended at the same step: their mean was logged
    assert np.allclose(np.mean(returns), seen, rtol=1e-5)


# ------------------------------------------------------------------------------- numbers of a run
@SCRIPTS
def test_what_a_run_leaves_behind(script):
    result = script.train(tiny(script, eval_frequency=50))
    run = only_run(".")
    assert summary(run) == result
    keys = "final_return_mean final_return_std eval_episodes wall_seconds device global_step"
    assert {*keys.split(), "steps_per_second", "updates"} <= result.keys()
    tags = {tag for _, tag, _ in metrics(run)}
    names = "srank rank_pca effective_rank sigma_max sigma_min feature_dot feature_cos feature_norm"
    names += " dormant q_data q_pi q_rand q_max q_bound td_error v_s0 overestimation"
    assert {f"diagnostics/{n}" for n in names.split()} <= tags
    assert {"losses/qf1_loss", "losses/qf1_values", "losses/actor_loss", "charts/updates"} <= tags
    steps = [s for s, tag, _ in metrics(run) if tag == "eval/episodic_return"]
    assert steps == [50, 100, 120] and ("losses/alpha" in tags) == (script is sac)
    about = json.loads((run / "args.json").read_text())
    assert (
        about["args"]["seed"] == 1 and {"torch", "numpy", "gymnasium"} <= about["versions"].keys()
    )


@SCRIPTS
def test_overestimation_is_predicted_less_achieved(script, stack):
    """A critic that says 7 everywhere, on Counting-v0: an episode's discounted return is known."""
    args = tiny(script, env_id="Counting-v0", gamma=0.5)
    learner = script.Learner(2, 2, args, CPU)
    for p in learner.critic.parameters():
        p.data.zero_()
    learner.critic.head.bias.data += torch.tensor([7.0, 8.0])[:, None, None]
    envs = script.make_envs("Counting-v0", 2, stack)
    envs.envs[1].unwrapped.episode = 1  # its next lasts 5 steps: the other goes on meanwhile
    returns, said = script.evaluate(learner, envs, args)
    assert returns.tolist() == [6.0, 15.0]  # 1 + 2 + 3, 1 + ... + 5
    achieved = [sum((t + 1) * 0.5**t for t in range(n)) for n in (3, 5)]
    assert said["v_s0"] == 7 and abs(said["overestimation"] - (7 - np.mean(achieved))) < 1e-9


def fill(script, replay, n, rew, done=None):
    g = torch.Generator().manual_seed(0)
    obs = torch.randn(n, replay.columns["obs"].shape[1], generator=g)
    act = torch.randn(n, replay.columns["act"].shape[1], generator=g).tanh()
    done = torch.zeros(n) if done is None else done
    replay.add(obs, act, rew, obs.flip(0), done, torch.zeros(n))
    return script.Batch(obs, act, rew, obs.flip(0), done)


@SCRIPTS
def test_reported_q_and_td_error_by_hand(script):
    """Policies without noise, so that the target is known. Q is the minimum of as many critics as
    the target takes, the TD error the mean over all, in units of the target's variance."""
    if script is sac:
        args = tiny(sac, num_critics=3, target_subset=2, alpha=0.0, gamma=0.9)
    else:
        args = tiny(td3, num_critics=3, policy_noise=0.0, gamma=0.9)
    learner, replay = script.Learner(3, 2, args, CPU), script.Replay(300, 3, 2, CPU)
    if script is sac:
        learner.actor.net[-1].weight.data[2:], learner.actor.net[-1].bias.data[2:] = 0.0, -20.0
        for layer in (*learner.target.layers, learner.target.head):
            for p in layer.parameters():
                p.data[1:] = p.data[:1]  # any two have one minimum
    b = fill(script, replay, 300, torch.randn(300), (torch.rand(300) < 0.3).float())
    out = script.diagnose(learner, replay, args)
    target_policy = getattr(learner, "target_actor", None)
    target_policy = target_policy or (lambda obs: torch.tanh(learner.actor(obs)[0]))
    with torch.no_grad():
        value = learner.target(b.next_obs, target_policy(b.next_obs)).amin(0)
        y = b.rew + 0.9 * (1 - b.done) * value
        q = learner.critic(b.obs, b.act)
        q_pi = learner.critic(b.obs, learner.act(b.obs, explore=False))
    few = 2 if script is sac else 3
    assert abs(out["td_error"] - float(((q - y) ** 2).mean() / y.var(correction=0))) < 1e-5
    assert abs(out["q_data"] - float(q[:few].amin(0).mean())) < 1e-6
    assert abs(out["q_pi"] - float(q_pi[:few].amin(0).mean())) < 1e-6
    assert out["q_max"] >= max(float(x[:few].amin(0).max()) for x in (q, q_pi)) - 1e-6


@SCRIPTS
def test_q_bound(script):
    """r_max / (1 - gamma), with the entropy; r_max where each reward costs and episodes end."""
    args = tiny(script, gamma=0.9)
    learner = script.Learner(1, 1, args, CPU)
    bonus = 0.9 * math.log(2) if script is sac else 0.0  # alpha is 1 at the start
    for shift, ends, bound in ((0, 0, 20), (-4, 0, -20), (-4, 1, -2)):
        replay, done = script.Replay(300, 1, 1, CPU), torch.zeros(300)
        done[7] = ends
        fill(script, replay, 300, torch.linspace(-3, 2, 300) + shift, done)
        expected = bound + (bonus if ends else 10 * bonus)
        assert abs(script.diagnose(learner, replay, args)["q_bound"] - expected) < 1e-3


def test_ranks_and_dots_of_planted_features():
    """A matrix of known singular values, and vectors whose products are known."""
    u, _ = torch.linalg.qr(torch.randn(200, 6, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    s = torch.tensor([10.0, 5.0, 1.0, 0.1, 0.01, 0.0], dtype=torch.float64)
    out = sac.spectrum((u * s) @ v)
    assert out["srank"] == 3 and out["rank_pca"] == 2  # 16 / 16.11 = 0.993; 125 / 126.01 = 0.992
    share = s[:5] / s.sum()
    assert abs(out["effective_rank"] - (-(share * share.log()).sum()).exp()) < 1e-4
    assert abs(out["sigma_max"] - 10 / 200**0.5) < 1e-5 and out["sigma_min"] < 1e-5
    phi, phi_next = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 9.0]])
    out = sac.alignment(phi, phi_next, torch.tensor([1.0, 0.0]))
    assert out["feature_dot"] == 24 and abs(out["feature_cos"] - 0.96) < 1e-6
    assert abs(out["feature_norm"] - 3) < 1e-6
    assert sac.dormant([torch.tensor([[1.0, 0.0, 0.005]]), torch.zeros(1, 3)]) == 5 / 6
    for bad in (math.nan, math.inf):  # torch.linalg.svdvals raises there
        phi[1, 1] = bad
        assert math.isnan(sac.spectrum(phi)["effective_rank"])


# --------------------------------------------------------------------------------------- promises
LINE = ["--width", 16, "--batch-size", 16, "--learning-starts", 30, "--log-frequency", 20]
LINE += ["--eval-frequency", 60, "--eval-episodes", 2, "--checkpoint-frequency", 50]
LINE += ["--total-timesteps", 260]
ENSEMBLE = ["--utd", 2, "--dropout", 0.1, "--num-critics", 3, "--target-subset", 2]
RING = ["--num-envs", 3, "--buffer-size", 100, "--total-timesteps", 700]


@pytest.mark.parametrize(
    "script, more",
    [
        ("sac", ["--env", "HalfCheetah-v5", "--policy-frequency", 3, *ENSEMBLE]),
        ("sac", RING),
        ("td3", ["--env", "Hopper-v5"]),
    ],
)
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(script, more, tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    run_script(f"{script}.py", *LINE, *more, cwd=tmp_path / "whole")
    step = 211 if more is RING else 231  # an odd count of updates; of the ring episodes have ended
    done = stop_at(script, "Replay.add", step, *LINE, *more, cwd=tmp_path / "parts")
    assert done.returncode == 143 and "to go on" in done.stdout, done.stdout + done.stderr
    run = only_run(tmp_path / "parts")
    time.sleep(1.1)  # another second: another time stamp, if a new folder were made
    done = run_script(f"{script}.py", "--resume", run, cwd=tmp_path / "parts")
    assert "so far" not in done.stdout and only_run(tmp_path / "parts") == run
    whole = only_run(tmp_path / "whole")
    assert_same_checkpoint(run / "checkpoint.pt", whole / "checkpoint.pt")
    assert metrics(run) == metrics(whole) and len(metrics(run)) > 100


@SCRIPTS
def test_diagnostics_logging_and_evaluation_change_nothing(script):
    on = tiny(script, exp_name="on")
    if script is sac:
        on = replace(on, dropout=0.1, layer_norm=True)
    off = replace(on, exp_name="off", eval_episodes=0, eval_frequency=0, log_frequency=1000)
    for args in (on, replace(off, checkpoint_frequency=0)):
        script.train(args)
    a, b = (load(next(Path("runs").glob(f"*__{k}__*")) / "checkpoint.pt") for k in ("on", "off"))
    keys = ("networks", "optim", "random", "replay")
    assert_equal({k: a[k] for k in keys}, {k: b[k] for k in keys})


@SCRIPTS
def test_same_seed_same_numbers_another_seed_others(script):
    results = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        script.train(tiny(script, seed=seed, exp_name=name))
        results.append(metrics(next(Path("runs").glob(f"*__{name}__*"))))
    assert results[0] == results[1] != results[2]


@SCRIPTS
def test_finished_runs_go_on_a_thousandfold_or_leave_things_be(script, capsys):
    args = tiny(script, total_timesteps=60, exp_name="x")
    first = script.train(args)
    run = only_run(".")
    before = metrics(run)
    again = script.train(replace(args, resume=str(run)))  # nothing is left to do
    clocks = ("wall_seconds", "steps_per_second")
    assert {k: v for k, v in again.items() if k not in clocks} == {
        k: v for k, v in first.items() if k not in clocks
    }
    assert metrics(run) == before
    assert "beyond 40" in refused(
        capsys, lambda: script.train(replace(args, resume=str(run), total_timesteps=40))
    )
    shown = script.Run.show

    def stop_early(self, step, **numbers):
        shown(self, step, **numbers)
        self.signum = int(signal.SIGTERM)

    script.Run.show = stop_early
    try:
        with pytest.raises(SystemExit) as stop:
            script.train(replace(args, resume=str(run), total_timesteps=60_000))
    finally:
        script.Run.show = shown
    assert stop.value.code == 143 and "min left" in capsys.readouterr().out


@SCRIPTS
def test_what_is_given_anew_takes_effect_or_is_refused(script, capsys):
    script.train(tiny(script, total_timesteps=60))
    run = only_run(".")
    again = tiny(script, resume=str(run), q_lr=0.5)
    script.train(replace(again, total_timesteps=61))
    assert "--q-lr 0.5, 0.0003 so far" in capsys.readouterr().out
    before, after = (load(run / "checkpoint.pt") for _ in range(2))
    moved = float(before["networks"]["critic.head.bias"].abs().max())
    assert moved > 0.3, "Adam went on with the old learning rate"
    assert len(json.loads((run / "args.json").read_text())["command"]) == 2  # the first one, too
    changed = {"width": 17, "env_id": "Hopper-v5", "seed": 2, "num_envs": 2, "exp_name": "other"}
    for name, value in changed.items():
        err = refused(capsys, lambda n=name, v=value: script.train(replace(again, **{n: v})))
        assert name.replace("_", "-") in err
    other = td3 if script is sac else sac
    assert "script" in refused(capsys, lambda: other.train(tiny(other, resume=str(run))))
    assert_equal(after, load(run / "checkpoint.pt"))


@SCRIPTS
def test_a_run_that_never_updates_says_so(script, capsys):
    script.train(tiny(script, learning_starts=120))
    assert "--learning-starts 120: uniform actions to the end, no update" in capsys.readouterr().out
    script.train(tiny(script, learning_starts=119))
    assert "--learning-starts" not in capsys.readouterr().out


@SCRIPTS
def test_a_finished_run_resumed_with_evaluations_has_none_to_tell(script):
    script.train(tiny(script, total_timesteps=60, eval_episodes=0))
    run = only_run(".")
    again = script.train(tiny(script, total_timesteps=60, eval_episodes=2, resume=str(run)))
    assert "final_return_mean" not in again
    json.loads((run / "summary.json").read_text(), parse_constant=pytest.fail)  # NaN, Infinity


@SCRIPTS
def test_an_environment_that_raises_leaves_the_last_checkpoint_and_is_closed(script, monkeypatch):
    """Its own error is shown, for it is no mistake of the command line."""
    step, closed = Counting.step, []

    def broken(self, action):
        if self.episode == 12 and self.t == 2:
            raise ConnectionError("the simulator is gone")
        return step(self, action)

    monkeypatch.setattr(Counting, "step", broken)
    monkeypatch.setattr(Counting, "close", lambda self: closed.append(1))
    with pytest.raises(ConnectionError, match="is gone"):
        script.train(tiny(script, env_id="Counting-v0", eval_episodes=2))
    assert load(only_run(".") / "checkpoint.pt")["step"] == 40 and len(closed) == 3


def test_no_home_and_no_name_for_the_user(tmp_path):
    """A container with a number for a user, who is not in /etc/passwd."""
    stranger = "import os, pwd\ndef none(uid): raise KeyError(uid)\npwd.getpwuid = none\n"
    (tmp_path / "sitecustomize.py").write_text(stranger + "os.environ.pop('HOME', None)\n")
    words = [*SHORT, "--total-timesteps", 60]
    done = run_script("sac.py", *words, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and load(only_run(tmp_path) / "checkpoint.pt")["step"] == 60
    data = write_d4rl(tmp_path / "x.hdf5", obs_dim=3, act_dim=1, scale=0.9)
    words = ["--dataset", data, "--num-updates", 3, "--eval-episodes", 0, "--width", 8]
    done = run_script("cql_continuous.py", *words, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "verdict" in done.stdout


def test_the_line_of_progress_leaves_out_what_is_not_known_yet(capsys):
    run = SimpleNamespace(rate=lambda step: 2.0, total=10)
    sac.Run.show(run, 5, Q=torch.tensor(math.nan), last_return=1.5)
    assert capsys.readouterr().out == "5/10 (50%), 2.0/s, 0.0 min left, last_return 1.5\n"


def test_a_checkpoint_that_another_process_wrote_meanwhile_is_not_overwritten(capsys):
    """It had the lock while this one loaded, and let it go before this one asked for it."""
    sac.train(tiny(sac, total_timesteps=60))
    run = only_run(".")
    with sac.Run(tiny(sac, resume=str(run)), 100) as late:
        os.utime(run / "checkpoint.pt", ns=(1, 1))
        assert "another process" in refused(capsys, late.open)


def test_a_place_that_cannot_be_written_is_refused_first(monkeypatch, capsys):
    """Also a colleague's run: nothing is opened in it."""
    sac.train(tiny(sac, total_timesteps=60))
    run = only_run(".")
    before = {p.name: p.stat().st_mtime_ns for p in run.iterdir()}

    def read_only(**where):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sac.tempfile, "TemporaryFile", read_only)
    assert "--run-dir runs" in refused(capsys, lambda: sac.train(tiny(sac)))
    err = refused(capsys, lambda: sac.train(tiny(sac, resume=str(run))))
    assert "--resume" in err and "copy" in err
    assert {p.name: p.stat().st_mtime_ns for p in run.iterdir()} == before


def test_another_optimiser_resumes_too(monkeypatch):
    for optimiser in ("SGD", "RMSprop", "AdamW"):
        cls = getattr(torch.optim, optimiser)
        plain = lambda params, lr, cls=cls, **flags: cls(params, lr=lr)  # noqa: E731
        with monkeypatch.context() as m:
            m.setattr(torch.optim, "Adam", plain)
            args = tiny(sac, total_timesteps=60, exp_name=optimiser)
            sac.train(args)
            run = next(Path("runs").glob(f"*__{optimiser}__*"))
            sac.train(replace(args, resume=str(run), total_timesteps=90))
        assert summary(run)["global_step"] == 90


def test_an_environment_that_does_not_repeat_itself_starts_anew(capsys):
    """A stateful wrapper: a line says so, and the cut episode is not joined to the next one."""
    args = tiny(sac, env_id="Stateful-v0", eval_episodes=0)
    sac.train(args)
    run = str(only_run("."))
    sac.train(replace(args, total_timesteps=160, resume=run, save_dataset="d.hdf5"))
    assert "does not repeat itself" in capsys.readouterr().out
    assert [len(r) for _, r, _ in d4rl_episodes("d.hdf5")] == [
        100,
        20,
        40,
    ]  # a time-out, the cut, the end


@SCRIPTS
def test_non_finite_numbers_stop_the_run_before_a_checkpoint(script, monkeypatch, capsys):
    """Parameters that turn NaN at the 75th step: status 3, whoever notices first."""
    add, count = script.Replay.add, [0]

    def poisoned(replay, *columns):
        add(replay, *columns)
        count[0] += 1
        if count[0] >= 75:
            replay.columns["rew"][:] = math.nan

    monkeypatch.setattr(script.Replay, "add", poisoned)
    with pytest.raises(SystemExit) as stop:
        script.train(tiny(script, env_id="Counting-v0"))
    assert stop.value.code == 3 and "not finite" in capsys.readouterr().err
    assert load(only_run(".") / "checkpoint.pt")["step"] == 40


@SCRIPTS
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e39])  # 1e39: beyond float32
@pytest.mark.parametrize("where, named", [(0, "an observation"), (1, "a reward")])
def test_a_nan_of_the_environment_never_reaches_the_replay(
    script, where, named, bad, monkeypatch, capsys
):
    step = Counting.step

    def poisoned(self, action):
        out = list(step(self, action))
        if self.episode == 12 and self.t == 3:
            out[where] = out[where] * 0.0 + bad
        return tuple(out)

    monkeypatch.setattr(Counting, "step", poisoned)
    with pytest.raises(SystemExit) as stop:
        script.train(tiny(script, env_id="Counting-v0", eval_episodes=0))
    err = capsys.readouterr().err
    assert stop.value.code == 3 and f"step 3 of episode 12: {named} of the environment" in err
    assert load(only_run(".") / "checkpoint.pt")["step"] == 40


@SCRIPTS
def test_a_nan_of_a_reset_is_named(script, monkeypatch, capsys):
    reset = Counting.reset

    def poisoned(self, **options):
        obs, info = reset(self, **options)
        return obs * (math.nan if self.episode == 2 else 1), info

    monkeypatch.setattr(Counting, "reset", poisoned)
    with pytest.raises(SystemExit) as stop:
        script.train(tiny(script, env_id="Counting-v0", eval_episodes=0))
    assert stop.value.code == 3
    assert "step 0 of episode 2: an observation of the env" in capsys.readouterr().err


def test_evaluating_at_every_step_is_no_fault():
    """One transition, or constant targets, have no variance to divide by."""
    sac.train(tiny(sac, eval_frequency=1, total_timesteps=20, gamma=0.0))


def test_memory_is_said_first_and_a_replay_that_cannot_fit_refused(tmp_path):
    huge = ["--total-timesteps", 10**12, "--buffer-size", 10**12]
    done = run_script("sac.py", *huge, cwd=tmp_path, check=False)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert done.stderr.count("\n") == 1 and "replay buffer needs" in done.stderr
    assert done.stdout.startswith("replay buffer: ")


BAD = [  # what no run could use, or what would have no effect
    ("sac", "--env CartPole-v1", "CartPole-v1"),
    ("sac", "--alpha 0.2 --target-entropy -3", "--target-entropy"),
    ("sac", "--target-subset 3", "--target-subset"),
    ("sac", "--save-dataset there.hdf5", "there.hdf5"),
    ("sac", "--save-dataset there.hdf5/x.hdf5", "cannot be written"),
    ("td3", "--save-dataset there.hdf5/deep/x.hdf5", "cannot be written"),
    ("sac", "--save-dataset x.hdf5 --buffer-size 100", "--buffer-size"),
    ("sac", "--resume nowhere", "nowhere"),
    ("sac", "--resume there.hdf5", "there.hdf5"),
    ("sac", "--run-dir there.hdf5", "--run-dir"),
    ("td3", "--env FrozenLake-v1", "FrozenLake-v1"),
]


@pytest.mark.parametrize("script, line, named", BAD, ids=[x[1] for x in BAD])
def test_a_users_mistake_is_one_line_and_status_2(script, line, named, capsys):
    Path("there.hdf5").write_text("not a checkpoint")
    module = {"sac": sac, "td3": td3}[script]
    args = tyro.cli(module.Args, args=line.split())
    assert named in refused(capsys, lambda: module.train(args))
    assert not Path("runs").exists() and Path("there.hdf5").read_text() == "not a checkpoint"


# ---------------------------------------------------------------- a run survives its surroundings
SHORT = [*LINE, "--total-timesteps", 150, "--eval-episodes", 0]


@pytest.mark.parametrize("how", ["reader ends", "closed at the start", "ascii"])
def test_a_run_does_not_depend_on_its_output(how, tmp_path):
    words = shlex.join(map(str, [sys.executable, ROOT / "sac.py", *SHORT]))
    env = {k: v for k, v in one_thread().items() if k != "PYTHONUNBUFFERED"}
    if how == "reader ends":
        command = f"{words} | head -n 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    elif how == "closed at the start":
        command = f"{words} <&- >&- 2>&-"
    else:
        env |= {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
        command = f"{words} --run-dir l\u00e4ufe"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, timeout=120)
    assert done.returncode == 0
    (run,) = (tmp_path / ("l\u00e4ufe" if how == "ascii" else "runs")).iterdir()
    assert summary(run)["global_step"] == 150
    assert (run / "metrics.csv").read_text().startswith("step,tag,value\n")
    assert "replay buffer" not in (run / "metrics.csv").read_text()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_prints_the_command_that_goes_on(signum, tmp_path):
    done = stop_at("sac", "Replay.add", 77, *SHORT, cwd=tmp_path, signum=signum)
    assert done.returncode == 128 + signum, done.stderr
    run = only_run(tmp_path)
    assert load(run / "checkpoint.pt")["step"] == 77
    (command,) = re.findall(r"to go on:\n  (.*)", done.stdout)
    words = shlex.split(command.replace("sac.py", str(ROOT / "sac.py"), 1))
    assert words[0].startswith("python")
    words[0] = sys.executable
    subprocess.run(words, cwd=tmp_path, check=True, env=one_thread(), stdout=subprocess.DEVNULL)
    assert summary(run)["global_step"] == 150


def test_what_the_process_was_told_to_ignore_stays_ignored(tmp_path):
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    done = stop_at(
        "sac", "Replay.add", 77, *SHORT, cwd=tmp_path, signum=signal.SIGHUP, preexec_fn=ignore
    )
    assert done.returncode == 0 and summary(only_run(tmp_path))["global_step"] == 150


def test_handlers_are_restored_and_threads_may_train():
    import threading

    usual = signal.getsignal(signal.SIGTERM)
    sac.train(tiny(sac, eval_episodes=0))
    assert signal.getsignal(signal.SIGTERM) is usual
    worker = threading.Thread(target=lambda: sac.train(tiny(sac, eval_episodes=0, exp_name="t")))
    worker.start(), worker.join()
    assert summary(next(Path("runs").glob("*__t__*")))["global_step"] == 120


def test_two_processes_on_one_folder(capsys):
    args = tiny(sac, eval_episodes=0)
    sac.train(args)
    run = only_run(".")
    before = (run / "metrics.csv").read_bytes()
    with open(run / "metrics.csv", "a") as f:
        import fcntl

        fcntl.flock(f, fcntl.LOCK_EX)
        err = refused(capsys, lambda: sac.train(replace(args, resume=str(run))))
    assert "another process" in err and (run / "metrics.csv").read_bytes() == before
    sac.train(replace(args, resume=str(run)))  # the lock went with its holder


def test_a_file_system_that_cannot_lock_gets_a_warning(monkeypatch, capsys):
    import fcntl

    def cannot(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", cannot)
    sac.train(tiny(sac, eval_episodes=0))
    assert "is not locked" in capsys.readouterr().out


def test_a_sweep_that_starts_in_one_second_has_a_folder_each():
    args = tiny(sac, eval_episodes=0, total_timesteps=20, exp_name='a/b:"c"')
    for _ in range(3):
        sac.train(args)
    names = [p.name for p in Path("runs").iterdir()]
    assert len(names) == 3 and not any(re.search(r'[<>:"/\\|?*\s]', n) for n in names)


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stands(tmp_path):
    limit = f"ulimit -f 60; exec {shlex.quote(sys.executable)} {ROOT / 'sac.py'}"
    words = shlex.join(map(str, [*SHORT, "--log-frequency", 1, "--checkpoint-frequency", 20]))
    done = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; {limit} {words} --total-timesteps 3000"],
        cwd=tmp_path,
        env=one_thread(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = re.findall(r"error: [^\n]*intact", done.stderr)  # TensorBoard's thread talks in between
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert "sac.py" not in done.stderr.replace(said[0], "")
    assert load(only_run(tmp_path) / "checkpoint.pt")["step"] >= 20
    assert not list(only_run(tmp_path).glob("*.tmp"))


def test_the_rules_of_windows(monkeypatch, capsys):
    """No folder is opened, fsync wants a descriptor that may be written, names hold none of
    < > : " | ? *, and there is no fcntl, hence no lock and a line about that."""
    import fcntl

    real_open, real_fsync, real_mkdir, access = os.open, os.fsync, os.mkdir, fcntl.fcntl

    def like_open(path, *how):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *how)

    def like_fsync(descriptor):
        assert access(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        return real_fsync(descriptor)

    def like_mkdir(path, *how):
        assert not re.search(r'[<>:"|?*]', Path(path).name), path
        return real_mkdir(path, *how)

    for name, like in {"open": like_open, "fsync": like_fsync, "mkdir": like_mkdir}.items():
        monkeypatch.setattr(os, name, like)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    args = tiny(sac, env_id="conftest:Counting-v0", exp_name="a:b/c", save_dataset="deep/x.hdf5")
    assert sac.train(args)["global_step"] == args.total_timesteps
    assert Path("deep/x.hdf5").exists() and "is not locked" in capsys.readouterr().out
    again = sac.train(replace(args, resume=str(only_run(".")), save_dataset=None))
    assert again["global_step"] == args.total_timesteps


def test_torchrun_is_refused_where_one_process_trains(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused(capsys, lambda: sac.train(tiny(sac)))


def test_compile_without_a_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "compiler" in refused(capsys, lambda: sac.train(tiny(sac, compile=True)))


class FakeWandb:
    """What --track asks of the package."""

    def __init__(self):
        self.calls, self.finished = [], 0

    def init(self, **where):
        self.calls.append(where)
        return type("WandbRun", (), {"id": where["id"] or f"id{len(self.calls)}"})()

    def finish(self):
        self.finished += 1


def test_the_same_wandb_run_goes_on_and_two_runs_are_two(monkeypatch, capsys):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    args = tiny(sac, track=True, eval_episodes=0)
    sac.train(args)
    run = only_run(".")
    sac.train(replace(args, resume=str(run), total_timesteps=140))
    sac.train(replace(args, exp_name="another"))
    assert [c["id"] for c in fake.calls] == [None, "id1", None] and fake.finished == 3
    assert all(c["resume"] == "allow" and c["sync_tensorboard"] for c in fake.calls)
    fake.init = lambda **_: 1 / 0
    assert "--track" in refused(capsys, lambda: sac.train(args))


@pytest.mark.parametrize("cores", [1, 2])
def test_numbers_do_not_depend_on_the_cores(cores, tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    set_cores = lambda: os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:cores])  # noqa: E731
    env = {k: v for k, v in one_thread().items() if k != "OMP_NUM_THREADS"}
    line = [sys.executable, str(ROOT / "sac.py"), *map(str, SHORT), "--width", "256"]
    subprocess.run(line, cwd=tmp_path, check=True, env=env, preexec_fn=set_cores, stdout=-3)
    (tmp_path.parent / f"cores{cores}").write_text(repr(metrics(only_run(tmp_path))))
    one, two = (tmp_path.parent / f"cores{n}" for n in (1, 2))
    assert cores == 1 or one.read_text() == two.read_text()


def test_a_program_with_pytorchs_new_precision_interface():
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
torch.backends.fp32_precision = "ieee"
import sac
sac.train(sac.Args(total_timesteps=40, learning_starts=20, width=8, eval_episodes=1))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=one_thread(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------- commands
def documented_commands() -> list:
    """Every `python sac.py ...` and `python td3.py ...` of README, docs and docstrings."""
    commands = []
    for file in (
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "sac.py",
        ROOT / "td3.py",
    ):
        text = file.read_text().replace("\\\\\n", " ").replace("\\\n", " ")
        text = text if file.suffix == ".md" else text.split('"""')[1]
        commands += re.findall(r"python (?:sac|td3)\.py[^\n`#&|;]*", text)
    return sorted(
        {" ".join(c.split()) for c in commands if not re.search(r"--resume|\$|my_env", c)}
    )


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_run(command):
    """Parsed as written, then cut to 60 steps of tiny networks."""
    _, name, *line = shlex.split(command)
    script = {"sac.py": sac, "td3.py": td3}[name]
    args = tyro.cli(script.Args, args=line)
    short = TINY | {"total_timesteps": 60, "utd": min(args.utd, 2)}
    short["learning_starts"] = 60 if args.learning_starts == args.total_timesteps else 30
    assert script.train(replace(args, **short))["global_step"] == 60
    assert args.save_dataset is None or Path(args.save_dataset).exists()
