"""Whole runs of cql_continuous.py: every variant learns, real runs get the right verdict, the bare
kind of run leaves what it should, and what makes no sense is refused in one line."""

import json
import shlex
from pathlib import Path

import cql_continuous as cql
import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import metrics, only_run, refused, run_script, write_d4rl
from cql_continuous import Args, train


class Point(gym.Env):
    """A point on a line: x' = x + a / 4, reward -|x'|, 20 steps. Standing still earns about -10,
    going home -1.5; the best action is in the data of a random policy, and is not its mean."""

    observation_space = gym.spaces.Box(-4, 4, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1)
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x = float(np.clip(self.x + action[0] / 4, -4, 4))
        return np.array([self.x], np.float32), -abs(self.x), False, False, {}


gym.register("Point-v0", Point, max_episode_steps=20)


def point_data(path, episodes=200, reward=None, ends=False, **changes) -> str:
    """Episodes of a uniformly random policy; `reward` of next x replaces the environment's, and
    with `ends` an episode is over beyond -1 and 1."""
    env, rng, rows = Point(), np.random.default_rng(0), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=episode)
        for t in range(20):
            act = rng.uniform(-1, 1, 1).astype(np.float32)
            after, rew, *_ = env.step(act)
            dead = ends and abs(after[0]) > 1
            rew = rew if reward is None else reward(after[0])
            rows.append((obs, act, rew, after, dead, t == 19))
            obs = after
            if dead:
                break
    obs, act, rew, after, dead, end = (np.array(x, np.float32) for x in zip(*rows))
    columns = dict(observations=obs, actions=act, rewards=rew, next_observations=after)
    columns |= dict(terminals=dead, timeouts=end * (1 - dead))
    return str(write_d4rl(path, n=len(obs), **columns | changes))


FAST = """--env Point-v0 --num-updates 400 --bc-steps 0 --width 32 --batch-size 128 --q-lr 0.003
--policy-lr 0.003 --tau 0.05 --gamma 0.9 --eval-frequency 0 --diagnostics-frequency 20
--cql-alpha 0.2"""


def run(words: str, data: str) -> dict:
    return train(tyro.cli(Args, args=shlex.split(f"{FAST} --dataset {data} {words}")))


VARIANTS = {
    "CQL(H), three sets": "",
    "CQL(H), mixture": "--cql-proposals mixture",
    "CQL(rho)": "--cql-variant rho",
    "Eq. 2": "--cql-variant eq2",
    "Eq. 1": "--cql-variant eq1",
    "Lagrange": "--cql-target-gap 0.0",
    "clipped": "--cql-clip-diff -1.0 --cql-temperature 0.5",
    "naive SAC": "--cql-alpha 0 --backup-entropy",
    "max backup, one critic": "--backup max --num-critics 1",
    "backup of the mean, five critics": "--backup mean --num-critics 5",
    "bf16 on the sampled actions": "--precision bf16 --num-updates 200 --cql-samples 2",
    "two of the samples backward": "--cql-backward 2",
    "representation": "--layer-norm --residual --dropout 0.02 --dr3-coef 0.001",
    "unit norm": "--unit-norm --alpha 0.01",
    "VIB": "--vib-coef 0.0001",
    "cloning first": "--bc-steps 100",
    "raw observations, scaled rewards": "--no-normalize-obs --reward-scale 2 --reward-shift 0.5",
    "fine-tuning": "--num-updates 5 --online-steps 400 --offline-share 0.25",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns(name):
    """Far better than the random data (about -13) and than standing still (about -10)."""
    out = run(VARIANTS[name], point_data("point.hdf5"))
    assert out["final_return_mean"] > -5, (name, out["final_return_mean"])
    assert out["dataset_return_mean"] < -8 and out["verdict"]


def test_cloning_only_gives_the_data_and_sarsa_improves_one_step():
    """Behaviour cloning of a random policy stands still on average: about -8 here. SARSA evaluates
    the data's policy, and acting greedily on that already goes home."""
    data = point_data("point.hdf5")
    cloned = run("--bc-steps 400 --cql-alpha 0", data)
    assert -14 < cloned["final_return_mean"] < -6.5
    assert cloned["bc_return_mean"] == cloned["final_return_mean"]
    assert run("--backup sarsa --cql-alpha 0", data)["final_return_mean"] > -5


LAST = np.arange(4_000) % 20 == 19  # of each episode of point_data()
SAME = {"reward": lambda x: 1.0, "terminals": LAST, "timeouts": 0 * LAST}
FEW = {"episodes": 5, "reward": lambda x: abs(x)}
REAL = [  # verdict, flags, data
    ("no sign of trouble", "", {}),
    ("no sign of trouble", "", {"reward": lambda x: 2 - abs(x)}),
    ("sarsa passes", "--backup sarsa --cql-alpha 0", {}),
    ("nothing to learn from", "--num-updates 20", {"reward": lambda x: 0.0}),
    ("nothing to learn from", "--num-updates 20", {"reward": lambda x: -1.0}),
    ("nothing to learn from", "--num-updates 20", {"reward": lambda x: float(abs(x) < 1e-4)}),
    ("nothing to learn from", "--num-updates 20", {"reward": lambda x: 0.0, "ends": True}),
    ("nothing to learn from", "--num-updates 20", SAME),  # all ended ones are of one length
    ("underfitting", "", {"reward": lambda x: 1.0, "ends": True}),  # to live longer pays
    ("no sign of trouble", "", {"reward": lambda x: -1.0, "ends": True}),
    ("too short to judge", "--num-updates 15 --diagnostics-frequency 1", {}),
    ("too short to judge", "--diagnostics-frequency 100", {}),
    ("too short to judge", "--gamma 0.99 --tau 0.01", {"reward": lambda x: 2 - abs(x)}),
    ("too short to judge", "--gamma 0.99 --tau 0.01 --cql-alpha 0", {"reward": lambda x: x - 5}),
    ("underfitting", "--width 2 --depth 1", {"reward": lambda x: np.sign(np.sin(25 * x))}),
    ("alpha too large", "--cql-alpha 100", {"reward": lambda x: 2 - abs(x), "ends": True}),
    ("overfitting", "--holdout 0.5 --width 64", {"episodes": 4}),
    ("divergence", "--cql-alpha 0 --backup max --cql-samples 10 --tau 1", FEW),
]


@pytest.mark.parametrize("expected, words, data", REAL)
def test_verdicts_of_real_runs(expected, words, data):
    words = f"--num-updates 600 --batch-size 64 --eval-episodes 2 {words}"
    out = run(words, point_data("point.hdf5", **data))
    assert out["verdict"] == expected, out["verdict_text"]
    assert "the policy returns" in out["verdict_text"]


def test_evaluation_by_hand():
    """Two episodes, of 3 and of 5 steps, which pay 1, 2, 3 ...: what the first environment does
    while the second goes on is not counted, nor shifted."""
    args = Args(env_id="Counting-v0", width=8, gamma=0.5, reward_scale=2.0, reward_shift=-1.0)
    learner = cql.Learner(2, 2, args, torch.device("cpu"))
    for p in learner.critic.parameters():
        p.data.zero_()
    learner.critic.head.bias.data += torch.tensor([7.0, 8.0])[:, None, None]
    with cql.ExitStack() as stack:
        envs = cql.make_envs("Counting-v0", 2, stack)
        envs.envs[1].unwrapped.episode = 1
        out = cql.evaluate(learner, envs, args)
    assert (out["final_return_mean"], out["final_return_std"]) == (10.5, 4.5)  # 6 and 15
    achieved = [sum((2 * (t + 1) - 1) * 0.5**t for t in range(n)) for n in (3, 5)]
    assert out["overestimation"] == pytest.approx(7 - np.mean(achieved))


def test_the_rows_of_the_collector():
    """Episodes of 3, 4 and 5 steps: ended, cut, ended; rewards scaled, actions in [-1, 1]."""
    args = Args(env_id="Counting-v0", width=8, reward_scale=2.0, reward_shift=-1.0)
    learner, returns = cql.Learner(2, 2, args, torch.device("cpu")), []
    replay = cql.Replay(12, 2, 2, torch.device("cpu"))
    with cql.ExitStack() as stack:
        env = cql.make_envs("Counting-v0", 1, stack)
        obs, _ = env.reset(seed=1)
        for _ in range(12):
            obs, ended = cql.interact(learner, env, replay, obs)
            returns += ended
    raw = np.array([[e, t] for e, n in enumerate((3, 4, 5)) for t in range(n)])
    rows = {name: x.numpy() for name, x in replay.columns.items()}
    assert np.array_equal(rows["obs"], raw) and np.array_equal(rows["next_obs"], raw + [0, 1])
    assert np.array_equal(rows["rew"], 2 * (raw[:, 1] + 1) - 1) and returns == [6.0, 10.0, 15.0]
    assert np.flatnonzero(rows["done"]).tolist() == [2, 11]
    assert np.flatnonzero(rows["cut"]).tolist() == [6] and len(np.unique(rows["act"])) == 24


def test_the_bare_kind_of_run_leaves_what_the_plan_says(tmp_path):
    """It collects, here only random steps, trains, writes every file; a second run has its data."""
    words = """--collect-steps 300 --num-updates 60 --bc-steps 20 --width 16 --batch-size 32
    --eval-episodes 2 --diagnostics-frequency 20 --log-frequency 20 --eval-frequency 20"""
    done = run_script("cql_continuous.py", *words.split(), cwd=tmp_path)
    folder = only_run(tmp_path)
    files = {x.name for x in folder.iterdir()}
    assert {"args.json", "metrics.csv", "checkpoint.pt", "selected.pt", "summary.json"} <= files
    found, keys = (
        json.loads((folder / "summary.json").read_text()),
        """final_return_mean
    final_return_std eval_episodes wall_seconds device num_updates updates_per_second verdict
    selected_return_mean selected_step dataset_return_mean normalized_score bc_return_mean""",
    )
    assert set(keys.split()) <= found.keys() and found["normalized_score"] is None
    assert "verdict: too short to judge" in done.stdout and "collecting" not in done.stderr
    tags = """episodic_return SPS updates_per_second qf1_loss qf2_loss qf_loss actor_loss cql_loss
    alpha cql_ess srank rank_pca effective_rank sigma_max sigma_min feature_dot feature_cos dormant
    feature_norm q_data q_pi q_rand q_max q_bound q_range q_lift td_error td_error_holdout v_s0
    cql_gap overestimation"""
    rows = metrics(folder) + [(0, "charts/SPS", ""), (0, "charts/updates_per_second", "")]
    assert set(tags.split()) <= {tag.split("/")[1] for _, tag, _ in rows}
    again = run_script("cql_continuous.py", *words.split(), cwd=tmp_path)
    assert "using datasets" in again.stdout
    one, two = (metrics(x) for x in (tmp_path / "runs").iterdir())
    assert one == two


IGNORED = """
--cql-alpha 0 --cql-variant rho; --cql-alpha 0 --cql-target-gap 1;
--cql-alpha 0 --precision bf16; --cql-alpha 0 --cql-backward 1;
--cql-variant eq1 --cql-backward 1; --cql-backward 1 --dropout 0.1;
--cql-backward 2 --vib-coef 0.1; --cql-backward 5; --cql-variant eq2 --cql-temperature 2;
--cql-variant eq1 --cql-target-gap 1; --backup max --backup-entropy;
--backup sarsa --online-steps 9; --depth 1 --residual; --action-low -1;
--dataset x --action-high data; --dataset no/such/file.hdf5 --eval-episodes 0"""


@pytest.mark.parametrize("words", IGNORED.strip().replace("\n", " ").split("; "))
def test_what_would_be_ignored_is_refused(words, capsys):
    refused(capsys, lambda: train(tyro.cli(Args, args=words.split())))
    assert not Path("runs").exists()


def test_the_commands_of_the_docstring_run():
    text = cql.__doc__.replace("\\\n", " ")
    lines = [shlex.split(x)[2:] for x in text.splitlines() if x.startswith("  python cql_")]
    small = "--num-updates 3 --bc-steps 1 --width 8 --batch-size 8 --eval-episodes 1"
    for words in lines:
        if "--dataset" in words:
            file = write_d4rl("data.hdf5", n=200, obs_dim=11, act_dim=3, length=50, scale=0.9)
            words[words.index("--dataset") + 1] = str(file)
        few = [] if "--dataset" in words else ["--collect-steps", "60"]
        assert train(tyro.cli(Args, args=words + small.split() + few))["num_updates"] == 3
    assert len(lines) == 3
