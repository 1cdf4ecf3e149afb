"""Where cql_continuous.py plays: evaluation, the player that fills a replay, the online phase, the selected
checkpoint; each against numbers known beforehand."""

from dataclasses import replace
from pathlib import Path

import cql_continuous as cql
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import metrics, only_run, write_d4rl

CPU = torch.device("cpu")
SMALL = dict(critic_width=8, policy_width=8, batch_size=8, bc_steps=0)


class Counting(gym.Env):
    """Observes (episode, time); episode e lasts 3 + e % 3 steps; even ones terminate, odd ones time out; the
    reward is the time. Notes the actions that it gets."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([-3.0, 0.0]), np.array([1.0, 4.0]), dtype=np.float64)

    def __init__(self):
        self.episode, self.t, self.seen = -1, 0, []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        self.seen.append(np.array(action))
        self.t += 1
        over, even = self.t == 3 + self.episode % 3, self.episode % 2 == 0
        return (
            np.array([self.episode, float(self.t)]),
            float(self.t),
            over and even,
            over and not even,
            {},
        )


if "CQLCounting-v0" not in gym.registry:
    gym.register("CQLCounting-v0", Counting, max_episode_steps=100)


def a_learner(**changes):
    """Observations are standardised by mean 1 and deviation 2; Q says 7, its second member 8."""
    args = cql.Args(env_id="CQLCounting-v0", **SMALL | changes)
    learner = cql.Learner(2, 2, args, CPU)
    learner.obs_mean.fill_(1.0), learner.obs_std.fill_(2.0)
    for p in learner.critic.parameters():
        p.data.zero_()
    learner.critic.head.bias.data += torch.tensor([7.0, 8.0])[:, None, None]
    return learner, args


def greedy(learner, obs) -> np.ndarray:
    """tanh(mean) for observations as the environment has them, in its bounds."""
    x = (torch.tensor(obs, dtype=torch.float32) - 1) / 2
    act = torch.tanh(learner.actor(x)[0]).detach().numpy()
    return np.array([-3.0, 0.0]) + (act + 1) / 2 * 4


def test_evaluation_by_hand():
    """Two episodes, of 3 and of 5 steps: what the first does while the second goes on is not counted."""
    learner, args = a_learner(gamma=0.5, reward_scale=2.0, reward_shift=-1.0)
    envs = cql.make_envs(args.env_id, 2)
    envs.envs[1].unwrapped.episode = 1
    returns, overestimation = cql.evaluate(learner, envs, args)
    assert returns.tolist() == [6.0, 15.0]  # raw: 1 + 2 + 3, 1 + ... + 5
    achieved = [sum((2 * (t + 1) - 1) * 0.5**t for t in range(n)) for n in (3, 5)]
    assert abs(overestimation - (7 - np.mean(achieved))) < 1e-6
    for env, episode in zip(envs.envs, (0, 2)):
        expected = greedy(learner, [[episode, t] for t in range(3)])
        assert np.allclose(env.unwrapped.seen[:3], expected, atol=1e-5)
    assert learner.critic.training


def test_evaluations_differ_by_the_seed_alone():
    args = cql.Args(**SMALL)
    learner = cql.Learner(3, 1, args, CPU)
    many = [replace(args, seed=seed) for seed in (1, 1, 2)]
    returns = [cql.evaluate(learner, cql.make_envs("Pendulum-v1", 1), x)[0].tolist() for x in many]
    assert returns[0] == returns[1] != returns[2]


def test_the_players_rows():
    learner, args = a_learner(reward_scale=2.0, reward_shift=-1.0)
    env = gym.make(args.env_id)
    player = cql.Player(env, 12, learner, args)
    for _ in range(12):  # episodes of 3, 4 and 5 steps: ended, cut, ended
        player.step()
    b = {k: v.numpy() for k, v in player.buffer.items()}
    raw = np.array([[e, t] for e, n in enumerate((3, 4, 5)) for t in range(n)], float)
    assert np.allclose(b["obs"], (raw - 1) / 2) and np.allclose(
        b["next_obs"], (raw + [0, 1] - 1) / 2
    )
    assert np.allclose(b["rew"], 2 * (raw[:, 1] + 1) - 1) and player.returns == [6.0, 10.0, 15.0]
    assert np.flatnonzero(b["done"]).tolist() == [2, 11] and np.flatnonzero(
        b["timeout"]
    ).tolist() == [6]
    played = np.array([-3.0, 0.0]) + (b["act"] + 1) / 2 * 4
    assert np.allclose(env.unwrapped.seen, played, atol=1e-5)
    assert np.abs(played - greedy(learner, raw)).max() > 0.5  # sampled, not the mean
    batch = player.sample(500)
    assert set(batch.done.tolist()) == {0.0, 1.0} and len(batch.obs.unique(dim=0)) == 12


def quick(path, **changes) -> cql.Args:
    return cql.Args(**SMALL | dict(env_id="Pendulum-v1", dataset=str(path), num_updates=20, eval_episodes=2)
                    | dict(diagnostics_frequency=5, eval_frequency=0) | changes)  # fmt: skip


@pytest.mark.parametrize("share, parts", [(0.25, (2, 6)), (0.0, (0, 8)), (1.0, (8, 0))])
def test_the_online_phase_mixes_as_it_says(share, parts, monkeypatch):
    """Offline minibatches of 8, then of both sources; the workflow looks at offline moments alone."""
    asked = {"data": [], "player": []}
    data, player = cql.Data.sample, cql.Player.sample
    monkeypatch.setattr(
        cql.Data, "sample", lambda self, n: asked["data"].append(n) or data(self, n)
    )
    monkeypatch.setattr(
        cql.Player, "sample", lambda self, n: asked["player"].append(n) or player(self, n)
    )
    out = cql.train(quick(write_d4rl("x.hdf5"), online_steps=10, offline_share=share))
    k = len(asked["player"]) // 10  # minibatches an update
    assert k and asked == {
        "data": [8] * 20 * k + [parts[0]] * 10 * k,
        "player": [parts[1]] * 10 * k,
    }
    saved = torch.load(only_run(".") / "checkpoint.pt", weights_only=True)
    assert [h["step"] for h in saved["history"]] == [5, 10, 15, 20] and out["num_updates"] == 30
    assert len(saved["player"]["buffer"]["rew"]) == 10


def test_the_selected_policy_is_the_one_of_the_peak(monkeypatch):
    """The second of four moments is made the peak: its networks are kept, loaded, and evaluated."""
    monkeypatch.setattr(cql, "peak", lambda history, args: (history[min(1, len(history) - 1)], 0.0))
    args = quick(write_d4rl("x.hdf5"), policy_lr=0.05)
    out = cql.train(args)
    run = only_run(".")
    assert out["selected_step"] == 10
    scores = {}
    for name in ("selected.pt", "checkpoint.pt"):
        saved = torch.load(Path(run) / name, weights_only=True)
        learner = cql.Learner(3, 1, args, CPU)
        learner.load_state_dict(saved.get("learner", saved)["networks"])
        scores[name] = float(cql.evaluate(learner, cql.make_envs("Pendulum-v1", 2), args)[0].mean())
    assert scores["selected.pt"] != scores["checkpoint.pt"]
    assert abs(out["selected_return_mean"] - scores["selected.pt"]) < 1e-6
    assert abs(out["final_return_mean"] - scores["checkpoint.pt"]) < 1e-6


def test_cloning_ends_where_it_says(monkeypatch):
    """Seven updates of it; the evaluations, at 5, 7, 10, 15, 20 and of the selected policy, are numbered."""
    flags, real, scores = [], cql.Learner.update, iter(range(1, 7))

    def update(learner, sample, cloning):
        flags.append(cloning)
        return real(learner, sample, cloning)

    monkeypatch.setattr(cql, "evaluate", lambda *_: (np.full(2, float(next(scores))), 0.0))
    monkeypatch.setattr(cql.Learner, "update", update)
    out = cql.train(quick(write_d4rl("x.hdf5"), bc_steps=7, eval_frequency=5))
    assert flags == [True] * 7 + [False] * 13
    assert [out[f"{k}_return_mean"] for k in ("bc", "final", "selected")] == [2.0, 5.0, 6.0]


def test_the_online_return_is_of_the_last_five_episodes():
    """Episodes of 3, 4 and 5 steps pay 6, 10 and 15; the seventh ends with step 27."""
    actions = np.random.default_rng(0).uniform(0, 1, (2000, 2)).astype(np.float32)
    path = write_d4rl("x.hdf5", obs_dim=2, act_dim=2, actions=actions)
    changes = dict(env_id="CQLCounting-v0", online_steps=27, eval_episodes=0, log_frequency=1)
    cql.train(quick(path, **changes))
    shown = {
        step: float(v) for step, tag, v in metrics(only_run(".")) if tag == "charts/online_return"
    }
    assert min(shown) == 23 and shown[23] == 6.0 and shown[27] == 8.0
    assert shown[47] == pytest.approx((15 + 6 + 10 + 15 + 6) / 5)


def test_observations_are_standardised_unless_told_otherwise():
    path = write_d4rl("x.hdf5")
    for on in (True, False):
        cql.train(quick(path, normalize_obs=on, eval_episodes=0, run_dir=f"runs_{on}"))
        (run,) = Path(f"runs_{on}").iterdir()
        networks = torch.load(run / "checkpoint.pt", weights_only=True)["learner"]["networks"]
        as_it_is = torch.equal(networks["obs_mean"], torch.zeros(3)) and torch.equal(
            networks["obs_std"], torch.ones(3)
        )
        assert as_it_is != on


def test_members_start_apart_and_learn_at_their_own_rates():
    args = cql.Args(q_lr=1e-3, policy_lr=2e-4, **SMALL)
    learner = cql.Learner(3, 1, args, CPU)
    for layer in (*learner.critic.layers, learner.critic.head):
        assert not torch.equal(layer.weight[0], layer.weight[1])
        assert not torch.equal(layer.bias[0], layer.bias[1])
    rates = {name: optim.param_groups[0]["lr"] for name, optim in learner.optim.items()}
    assert rates == {"critic": 1e-3, "cql_alpha": 1e-3, "actor": 2e-4, "alpha": 2e-4}


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_a_fixed_temperature_stays_and_another_moves(alpha):
    learner = cql.Learner(3, 1, cql.Args(alpha=alpha, **SMALL), CPU)
    batch = cql.Batch(
        *(torch.randn(8, n) for n in (3, 1)),
        torch.randn(8),
        torch.randn(8, 3),
        torch.zeros(8),
        torch.randn(8, 1),
    )
    before = float(learner.log_alpha.exp().detach())
    assert abs(before - (alpha or 1.0)) < 1e-6
    learner.update(lambda: batch, False)
    assert (float(learner.log_alpha.exp().detach()) == before) == (alpha is not None)
