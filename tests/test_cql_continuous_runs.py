"""Whole runs of cql_continuous.py: every variant must learn, every documented command must start, every
mistake on the command line must be one line and status 2."""

import json
import re
import shlex
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import tyro
from conftest import ROOT, TINY, only_run, run_script, write_d4rl
from cql_continuous import Args, check, train


class Point(gym.Env):
    """A point on a line: x' = x + a / 4, reward -|x'|, 20 steps. Standing still earns about -10, going home
    -1.5; the best action is in the data of a random policy, and is not its mean."""

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


@pytest.fixture(scope="module")
def point_data(tmp_path_factory):
    """4,000 steps of a uniformly random policy."""
    env, rng, rows = Point(), np.random.default_rng(0), []
    for episode in range(200):
        obs, _ = env.reset(seed=episode)
        for t in range(20):
            act = rng.uniform(-1, 1, 1).astype(np.float32)
            after, rew, *_ = env.step(act)
            rows.append((obs, act, rew, after, t == 19))
            obs = after
    obs, act, rew, after, end = (np.array(x) for x in zip(*rows))
    columns = dict(
        observations=obs, actions=act, rewards=rew.astype(np.float32), next_observations=after
    )
    path = tmp_path_factory.mktemp("data") / "point.hdf5"
    return write_d4rl(path, n=len(obs), **columns, terminals=np.zeros(len(obs), bool), timeouts=end)


FAST = """--env Point-v0 --num-updates 400 --bc-steps 0 --critic-width 32 --policy-width 32 --batch-size 128
--q-lr 0.003 --policy-lr 0.003 --tau 0.05 --gamma 0.9 --eval-frequency 0 --diagnostics-frequency 100
--cql-alpha 0.2""".split()

VARIANTS = {
    "CQL(H), three sets": "",
    "CQL(H), mixture": "--cql-proposals mixture",
    "CQL(rho)": "--cql-variant rho",
    "Eq. 2": "--cql-variant eq2",
    "Eq. 1": "--cql-variant eq1",
    "Lagrange": "--cql-target-gap 0.0",
    "clipped": "--cql-clip-diff -1.0 --cql-temperature 0.5",
    "naive SAC": "--cql-alpha 0 --backup-entropy",
    "max backup": "--backup max",
    "backup of the mean": "--backup mean",
    "five critics": "--num-critics 5",
    "bf16 on the sampled actions": "--precision bf16 --num-updates 200 --cql-samples 2",
    "representation": "--layer-norm --residual --dropout 0.02 --dr3-coef 0.001",
    "unit norm": "--unit-norm",
    "VIB": "--vib-coef 0.0001 --vib-dim 8",
    "G steps, fixed temperature": "--critic-updates 2 --policy-updates 2 --alpha 0.01",
    "cloning first": "--bc-steps 100",
    "raw observations, scaled rewards": "--no-normalize-obs --reward-scale 2 --reward-shift 0.5",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns(name, point_data, capsys):
    """Far better than the random data (about -13) and than standing still (about -10)."""
    out = train(
        tyro.cli(Args, args=FAST + ["--dataset", str(point_data)] + shlex.split(VARIANTS[name]))
    )
    assert out["final_return_mean"] > -5, (
        name,
        out["final_return_mean"],
        out["dataset_return_mean"],
    )
    assert out["verdict"] != "none"


def test_cloning_only_gives_the_data_and_sarsa_improves_one_step(point_data):
    """Behaviour cloning of a random policy stands still on average: about -8 here. SARSA evaluates the data's
    policy, and acting greedily on that already goes home."""
    words = FAST + ["--dataset", str(point_data)]
    cloned = train(tyro.cli(Args, args=words + ["--bc-steps", "400", "--cql-alpha", "0"]))
    assert -14 < cloned["final_return_mean"] < -6.5
    sarsa = train(tyro.cli(Args, args=words + ["--backup", "sarsa", "--cql-alpha", "0"]))
    assert sarsa["final_return_mean"] > -5 and sarsa["verdict"].startswith("sarsa")


def test_fine_tuning_learns_from_its_own_replay(point_data):
    """An offline phase too short to learn anything, then online steps."""
    words = FAST + ["--dataset", str(point_data), "--num-updates", "5", "--online-steps", "400"]
    out = train(tyro.cli(Args, args=words + ["--offline-share", "0.25"]))
    assert out["final_return_mean"] > -5 and out["num_updates"] == 405


def test_the_bare_kind_of_run_leaves_what_the_plan_says(tmp_path):
    """No dataset: it collects (here only random steps), trains offline, writes every file, and a second run
    reuses the data. In a subprocess, as a user sees it."""
    words = [
        *TINY,
        "--collect-steps",
        300,
        "--num-updates",
        60,
        "--bc-steps",
        20,
        "--eval-episodes",
        2,
    ]
    words += ["--diagnostics-frequency", 20, "--log-frequency", 20, "--eval-frequency", 20]
    done = run_script("cql_continuous.py", *words, cwd=tmp_path)
    run = only_run(tmp_path)
    assert {"args.json", "metrics.csv", "checkpoint.pt", "selected.pt", "summary.json"} <= {
        p.name for p in run.iterdir()
    }
    assert any(p.name.startswith("events.out.tfevents") for p in run.iterdir())
    summary = json.loads((run / "summary.json").read_text())
    for key in (
        "final_return_mean final_return_std eval_episodes wall_seconds device num_updates updates_per_second "
        "verdict selected_return_mean selected_step dataset_return_mean normalized_score bc_return_mean "
        "collector_return_mean"
    ).split():
        assert key in summary, key
    assert summary["normalized_score"] is None  # Pendulum has no reference
    assert "verdict:" in done.stdout and "collecting" in done.stdout
    tags = {line.split(",")[1] for line in (run / "metrics.csv").read_text().splitlines()}
    wanted = """charts/episodic_return eval/episodic_return charts/SPS charts/updates_per_second
    losses/qf1_loss
    losses/qf2_loss losses/qf_loss losses/actor_loss losses/cql_loss losses/alpha losses/cql_ess
    diagnostics/srank diagnostics/rank_pca diagnostics/effective_rank diagnostics/sigma_max
    diagnostics/sigma_min
    diagnostics/feature_dot diagnostics/feature_cos diagnostics/feature_norm diagnostics/dormant
    diagnostics/q_data diagnostics/q_pi diagnostics/q_rand diagnostics/q_max diagnostics/q_bound
    diagnostics/td_error diagnostics/td_error_holdout diagnostics/v_s0 diagnostics/cql_gap
    diagnostics/overestimation"""
    assert set(wanted.split()) <= tags
    again = run_script("cql_continuous.py", *words, "--seed", 1, cwd=tmp_path)
    assert "using datasets" in again.stdout


BAD = [
    "--env NoSuchEnv-v0",
    "--env CartPole-v1",  # discrete actions
    "--cql-alpha nan",
    "--q-lr 0",
    "--tau 2",
    "--gamma 1.0",
    "--num-critics 0",
    "--batch-size 0",
    "--dropout 1.0",
    "--seed -1",
    "--holdout -0.1",
    "--cql-alpha 0 --cql-variant rho",
    "--cql-alpha 0 --cql-target-gap 1",
    "--cql-alpha 0 --precision bf16",
    "--cql-variant eq1 --cql-target-gap 1",
    "--cql-variant eq2 --cql-temperature 2",
    "--backup max --backup-entropy",
    "--backup mean --backup-entropy",
    "--backup sarsa --online-steps 10",
    "--offline-share 0.9",
    "--vib-dim 8",
    "--precision tf32",
    "--dataset no/such/file.hdf5",
    "--dataset FILE --collect-steps 5000",
    "--dataset FILE --env Hopper-v5",  # shapes do not fit
    "--dataset FILE --resume no/such/run",
    "--dataset FILE --run-dir FILE",
    "--dataset FILE --track",  # wandb is not installed here
]


@pytest.mark.parametrize("words", BAD)
def test_mistakes_are_one_line_and_status_2(words, tmp_path, capsys):
    file = write_d4rl(tmp_path / "file.hdf5")
    line = [
        "--env",
        "Pendulum-v1",
        "--num-updates",
        "1",
        *shlex.split(words.replace("FILE", str(file))),
    ]
    with pytest.raises(SystemExit) as stop:
        train(tyro.cli(Args, args=line))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error


IGNORED = """--cql-alpha 0 --cql-proposals mixture; --cql-alpha 0 --cql-clip-diff -1; --wandb-entity x
--cql-alpha 0 --cql-temperature 2; --cql-alpha 0 --cql-samples 9; --cql-variant eq1 --cql-temperature 2
--critic-depth 1 --residual; --backup sarsa --backup-entropy; --wandb-project-name x"""


@pytest.mark.parametrize("words", IGNORED.replace("\n", "; ").split("; "))
def test_what_would_be_ignored_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        check(tyro.cli(Args, args=words.split()))
    assert stop.value.code == 2 and "has no effect" in capsys.readouterr().err


def test_what_may_not_be_zero(capsys):
    names = """tau policy_lr q_lr reward_scale cql_temperature critic_width policy_width vib_dim batch_size
    cql_samples critic_updates num_updates collect_steps log_frequency critic_depth policy_depth"""
    for name in names.split():
        with pytest.raises(SystemExit):
            check(replace(Args(vib_coef=0.1), **{name: 0}))
        assert "expected a number from" in capsys.readouterr().err, name


def test_tyro_refuses_what_is_no_number(capsys):
    for words in (["--num-updates", "1e6"], ["--no-such-flag"], ["--backup", "td"]):
        with pytest.raises(SystemExit) as stop:
            tyro.cli(Args, args=words)
        assert stop.value.code == 2


def documented_commands() -> list[str]:
    """Every `python cql_continuous.py ...` of README and docstring, continued lines joined."""
    commands = []
    for file in ("README.md", "benchmarks/README.md", "cql_continuous.py"):
        text = (ROOT / file).read_text().replace("\\\\\n", " ").replace("\\\n", " ")
        text = text if file.endswith(".md") else text.split('"""')[1]
        commands += re.findall(r"python cql_continuous\.py[^\n`#&|;]*", text)
    return sorted({" ".join(c.split()) for c in commands})


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_run(command, tmp_path):
    """Parsed as written, then cut to 3 updates of a tiny network, on made-up data of the right shape."""
    args = tyro.cli(Args, args=shlex.split(command)[2:])
    small = dict(
        num_updates=3,
        critic_width=8,
        policy_width=8,
        batch_size=8,
        eval_episodes=min(args.eval_episodes, 1),
    )
    small |= dict(
        bc_steps=min(args.bc_steps, 1), online_steps=min(args.online_steps, 3), log_frequency=1
    )
    small |= dict(resume=None, track=False, diagnostics_frequency=2)
    if args.dataset is None:
        small["collect_steps"] = 60
    else:
        known = {
            "HalfCheetah-v5": (17, 6),
            "Hopper-v5": (11, 3),
            "Walker2d-v5": (17, 6),
            "Pendulum-v1": (3, 1),
        }
        shape = known.get(args.env_id, (5, 2))
        if args.env_id not in known:  # an environment that requirements.txt does not install
            small |= dict(eval_episodes=0, online_steps=0)
        path = tmp_path / "data.hdf5"
        write_d4rl(path, n=400, obs_dim=shape[0], act_dim=shape[1], length=50, scale=0.9)
        small["dataset"] = str(path)
    assert train(replace(args, **small))["num_updates"] >= 3


def test_the_readmes_way_to_load_a_policy_works(point_data):
    """Its lines as they stand but for the environment, after a run whose policy has learnt to go home."""
    train(tyro.cli(Args, args=[*FAST, "--dataset", str(point_data), "--eval-episodes", "0"]))
    only_run(".").rename("runs/THAT_RUN")
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    before, lines = lines.split('env = gym.make("Pendulum-v1")\nobs, _ = env.reset()\n')
    env = gym.make("Point-v0")
    obs, total = env.reset(seed=0)[0], 0.0
    for _ in range(20):
        names = {"env": env, "obs": obs}
        exec(before + lines, names)
        obs, rew, *_ = env.step(names["action"])
        total += rew
    assert total > -4
