"""sac.py: its mathematics against independent answers, the shared replay and environments (whose canonical
copy is there), accounting, promises of its own, and short trainings that must learn."""

import importlib
import itertools
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cql_continuous
import gymnasium as gym
import h5py
import numpy as np
import pytest
import sac
import td3
import torch
import tyro
from conftest import ROOT, assert_same_checkpoint, metrics, one_thread, only_run, run_script, summary

CPU = torch.device("cpu")
TINY = dict(critic_width=16, policy_width=16, batch_size=16, log_frequency=20)
TINY |= dict(eval_episodes=1, eval_frequency=60, diagnostics_frequency=50, checkpoint_frequency=40)
SCRIPTS = pytest.mark.parametrize("script", [sac, td3], ids=["sac", "td3"])


def tiny(script, **changes):
    return script.Args(**TINY | dict(total_timesteps=120, learning_starts=30) | changes)


def a_batch(script, n=64, obs_dim=3, act_dim=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)
    done = (torch.rand(n, generator=g) < 0.3).float()
    return script.Batch(r(n, obs_dim), r(n, act_dim).tanh(), r(n), r(n, obs_dim), done)


# ---------------------------------------------------------------------------------------- mathematics
def test_squashed_density_integrates_to_one_and_has_the_sampled_moments():
    mean, log_std = torch.tensor([[0.4]]), torch.tensor([[-0.7]])
    a = torch.linspace(-1, 1, 400_001, dtype=torch.float64)[1:-1]
    density = sac.squashed_log_prob(torch.atanh(a)[:, None], mean.double(), log_std.double()).exp()
    assert abs(float(density.sum() * (a[1] - a[0])) - 1) < 1e-5
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)  # E tanh(u)^k, without the density
    for k in (1, 2):
        expected = (weights * np.tanh(0.4 + math.exp(-0.7) * nodes) ** k).sum() / weights.sum()
        assert abs(float((density * a**k).sum() * (a[1] - a[0])) - expected) < 1e-5


def test_squashed_density_is_finite_far_out():
    u = torch.tensor([[40.0], [-40.0], [0.0]])
    logp = sac.squashed_log_prob(u, torch.zeros(3, 1), torch.full((3, 1), 2.0))
    assert torch.isfinite(logp).all() and logp[0] == logp[1]


def test_backup_and_critic_loss_by_hand():
    """Eq. 5 written out again in float64 numpy, the policy's action replayed from the same seed."""
    args = sac.Args(num_critics=3, critic_width=8, policy_width=8, gamma=0.9, alpha=0.3)
    learner, batch = sac.Learner(3, 2, args, CPU), a_batch(sac)
    for p in learner.target.parameters():
        p.data.normal_(std=0.5)
    torch.manual_seed(5)
    mean, log_std = learner.actor(batch.next_obs)
    noise = torch.randn(mean.shape)
    u = (mean + log_std.exp() * noise).double().detach().numpy()
    std = log_std.exp().double().detach().numpy()
    logp = -0.5 * noise.double().numpy() ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    logp = (logp - np.log1p(-(np.tanh(u) ** 2))).sum(1)

    def q(critic, obs, act):
        out = []
        for i in range(3):
            h = np.hstack([obs, act])
            for layer in (*critic.layers, critic.head):
                h = h @ layer.weight[i].detach().double().numpy() + layer.bias[i].detach().double().numpy()
                h = np.maximum(h, 0) if layer is not critic.head else h
            out.append(h[:, 0])
        return np.array(out)

    b = {k: v.double().numpy() for k, v in batch._asdict().items()}
    soft_value = q(learner.target, b["next_obs"], np.tanh(u)).min(0) - 0.3 * logp
    y = b["rew"] + 0.9 * (1 - b["done"]) * soft_value
    expected = 0.5 * ((q(learner.critic, b["obs"], b["act"]) - y) ** 2).mean(1).sum()
    torch.manual_seed(5)
    loss, info = sac.critic_loss(learner, batch, args)
    assert abs(float(loss.detach()) - expected) < 1e-5 * expected
    assert info["qf1_loss"] != info["qf2_loss"] and not info["qf_loss"].requires_grad


@pytest.mark.parametrize("subset", [1, 2, 4])
def test_the_target_takes_the_minimum_over_a_random_subset(subset):
    """REDQ: over many draws, the mean of the minimum is the mean over all subsets of that size."""
    args = sac.Args(num_critics=4, target_subset=subset, gamma=1 - 1e-5)
    q = torch.tensor([1.0, 2.0, 4.0, 8.0])
    actor = SimpleNamespace(sample=lambda obs, generator: (obs[:, :1], torch.zeros(len(obs))))
    learner = SimpleNamespace(actor=actor, log_alpha=torch.zeros(()))
    learner.target = lambda obs, act: q[:, None].expand(4, len(obs))
    zero = torch.zeros(1)
    batch = sac.Batch(zero[:, None], zero[:, None], zero, zero[:, None], zero)
    values = torch.cat([sac.backup(learner, batch, args)[1] for _ in range(4000)])
    expected = [float(min(q[list(c)])) for c in itertools.combinations(range(4), subset)]
    assert abs(values.mean() - np.mean(expected)) < 4 * max(values.std() / 4000**0.5, 1e-3)
    assert set(values.round().tolist()) == set(expected)


@pytest.mark.parametrize("kind", ["min", "mean"])
def test_the_policy_climbs_the_minimum_or_the_mean(kind):
    args = sac.Args(num_critics=2, actor_q=kind, critic_width=8, policy_width=8, alpha=0.5)
    learner, batch = sac.Learner(3, 2, args, CPU), a_batch(sac)
    learner.critic.head.bias.data[1] += 5.0
    torch.manual_seed(1)
    loss, _ = sac.actor_loss(learner, batch, args)
    torch.manual_seed(1)
    act, logp = learner.actor.sample(batch.obs)
    q = learner.critic(batch.obs, act)
    assert torch.allclose(loss, (0.5 * logp - (q[0] if kind == "min" else q.sum(0) / 2)).mean())


def test_the_actors_step_leaves_the_critic_alone():
    args = sac.Args(critic_width=8, policy_width=8)
    learner, batch = sac.Learner(3, 2, args, CPU), a_batch(sac)
    before = [p.clone() for p in learner.critic.parameters()]
    loss, _ = sac.actor_loss(learner, batch, args)
    learner.minimise("actor", loss)
    assert all(p.grad is None for p in learner.critic.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, learner.critic.parameters()))


def test_the_temperatures_gradient_against_finite_differences():
    """d/d log alpha of E[-alpha (log pi + H)], and its sign: too little entropy raises alpha."""
    for entropy, target in [(-3.0, -2.0), (1.0, -2.0)]:
        x = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(sac.temperature_loss(x, entropy, target), x)
        j = lambda log_alpha: -math.exp(log_alpha) * (-entropy + target)  # noqa: B023
        assert abs(float(slope) - (j(-0.4 + 1e-6) - j(-0.4 - 1e-6)) / 2e-6) < 1e-8
        assert (float(slope) < 0) == (entropy < target)


def test_alpha_falls_more_slowly_than_with_log_alpha_in_its_place():
    """At a constant gap: Adam takes the size out of a gradient that stays, not out of one that shrinks."""
    ends = []
    for loss in (sac.temperature_loss, lambda x, entropy, target: x * (entropy - target)):
        log_alpha = torch.nn.Parameter(torch.zeros(()))
        optim = torch.optim.Adam([log_alpha], lr=3e-4)
        for _ in range(5000):
            optim.zero_grad()
            loss(log_alpha, 0.0, -6.0).backward()
            optim.step()
        ends.append(float(log_alpha.detach().exp()))
    assert ends == pytest.approx([0.290, 0.223], abs=0.001)  # the second: exp(-5000 lr)


def bandit(q, alpha: float, steps: int = 1500):
    """The script's actor fitted with the script's loss to one state's given Q(a)."""
    args = sac.Args(policy_width=16, policy_depth=1, alpha=alpha)
    learner = SimpleNamespace(actor=sac.Actor(1, 1, args), log_alpha=torch.tensor(alpha).log())
    learner.critic = lambda obs, act, bf16: q(act[:, 0])[None]
    optim = torch.optim.Adam(learner.actor.parameters(), lr=3e-3)
    batch = SimpleNamespace(obs=torch.ones(512, 1))
    for _ in range(steps):
        loss, _ = sac.actor_loss(learner, batch, args)
        optim.zero_grad()
        loss.backward()
        optim.step()
    with torch.no_grad():
        many = SimpleNamespace(obs=torch.ones(100_000, 1))
        value = -float(sac.actor_loss(learner, many, args)[0])
    mean, log_std = learner.actor(torch.ones(1, 1))
    return float(mean), float(log_std.exp()), value


def soft_value(q, alpha: float) -> float:
    """V = alpha log int exp(Q(a) / alpha) da over [-1, 1], by quadrature."""
    a = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    return float(alpha * torch.logsumexp(q(a) / alpha, 0) + alpha * math.log(a[1] - a[0]))


def test_the_soft_optimum_where_the_policy_can_represent_it():
    """Q = alpha log p + 2 with p a tanh-Gaussian: then V = 2 and pi = exp((Q - V) / alpha) = p."""
    m, s, alpha = torch.tensor(0.5), torch.tensor(0.4), 0.7

    def q(a):
        u = torch.atanh(a.clamp(-1 + 1e-6, 1 - 1e-6))
        return 2 + alpha * sac.squashed_log_prob(u[:, None], m, s.log())

    assert abs(soft_value(q, alpha) - 2) < 1e-3
    mean, std, value = bandit(q, alpha)
    assert abs(mean - 0.5) < 0.05 and abs(std - 0.4) < 0.04 and abs(value - 2) < 0.01


def test_the_soft_value_bounds_every_policy():
    """A quadratic Q: the fitted actor comes close to alpha log int exp(Q / alpha) from below; less
    temperature, less spread."""
    q = lambda a: -3 * (a - 0.3) ** 2
    spread = {}
    for alpha in (0.1, 1.0):
        _, spread[alpha], value = bandit(q, alpha)
        best = soft_value(q, alpha)
        assert best - 0.05 < value < best + 0.01
    assert spread[0.1] < spread[1.0]


def test_maximisation_bias_and_its_cure_by_a_second_estimator():
    """Seed 004's ten actions at B, all worth 0, seen through unit noise: the best-looking one seems to be
    worth E max = 1.54. The minimum with an independent second estimate of that action takes the bias away."""
    n, k = 20_000, 10
    noise = torch.randn(2, n, k)
    best = noise[0].argmax(1)  # the policy climbs the first critic
    batch = a_batch(sac, n, obs_dim=1, act_dim=1)._replace(rew=torch.zeros(n), done=torch.zeros(n))
    actor = SimpleNamespace(sample=lambda obs, generator: (best[:, None], torch.zeros(n)))
    learner = SimpleNamespace(actor=actor, log_alpha=torch.tensor(-100.0))
    means = {}
    for critics in (1, 2):
        learner.target = lambda obs, act: noise[:critics].gather(2, act.expand(critics, n, 1))[..., 0]  # noqa: B023
        args = sac.Args(num_critics=critics, gamma=0.99999)
        means[critics] = float(sac.backup(learner, batch, args)[1].mean())
    assert abs(means[1] - 1.5388) < 0.02 and -0.2 < means[2] < 0


@pytest.mark.parametrize("policy", [True, False])
@pytest.mark.parametrize("alpha", [None, 0.2])
def test_policy_and_temperature_wait_and_a_fixed_temperature_stays(policy, alpha):
    learner, batch = (
        sac.Learner(3, 2, sac.Args(critic_width=8, policy_width=8, alpha=alpha), CPU),
        a_batch(sac),
    )
    nets = {k: getattr(learner, k) for k in ("actor", "critic", "target")}
    before = {k: [p.detach().clone() for p in net.parameters()] for k, net in nets.items()}
    temperature = learner.log_alpha.item()
    info = learner.update(batch, policy=policy)
    moved = {k: any(not torch.equal(p, q) for p, q in zip(before[k], nets[k].parameters())) for k in nets}
    assert moved == {"critic": True, "actor": policy, "target": True} and ("actor_loss" in info) == policy
    assert (learner.log_alpha.item() != temperature) == (policy and alpha is None)
    assert abs(info["alpha"] - learner.log_alpha.exp()) < 1e-7


@pytest.mark.parametrize("training", [True, False])
def test_droqs_layers_by_hand(training):
    """Linear, dropout, layer norm, ReLU, in this order; dropout in training alone."""
    args = sac.Args(critic_width=32, layer_norm=True, dropout=0.3)
    critic = sac.Critic(3, 2, args).train(training)
    x = torch.randn(2, 10, 5)[:1].expand(2, -1, -1)
    torch.manual_seed(0)
    ours = critic.hidden(x[0, :, :3], x[0, :, 3:])
    torch.manual_seed(0)
    for layer, h in zip(critic.layers, ours):
        z = torch.einsum("nbi,nio->nbo", x, layer.weight) + layer.bias
        if training:
            z = z * (torch.empty_like(z).bernoulli_(0.7) / 0.7)
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = z.clamp(min=0)
        assert torch.allclose(h, x, atol=1e-5)


def test_polyak():
    net, target = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    net.weight.data, target.weight.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]])
    sac.polyak(net, target, 0.25)
    assert torch.allclose(target.weight, torch.tensor([[2.5, -1.0]]))
    sac.polyak(net, target, 1.0)  # no target network
    assert torch.equal(target.weight, net.weight) and torch.equal(target.bias, net.bias)


def test_entropy_bonus_is_the_uniform_policys():
    learner = sac.Learner(3, 2, sac.Args(alpha=0.5, gamma=0.9, critic_width=8, policy_width=8), CPU)
    assert abs(learner.entropy_bonus() - 0.9 * 0.5 * 2 * math.log(2)) < 1e-6


def test_dropout_is_on_in_the_target_and_off_in_evaluation_and_diagnostics():
    args = tiny(sac, dropout=0.5)
    learner = sac.Learner(3, 1, args, CPU)
    obs, act = torch.randn(4, 3), torch.rand(4, 1)
    assert not torch.equal(learner.target.hidden(obs, act)[-1], learner.target.hidden(obs, act)[-1])
    envs = sac.make_envs("Pendulum-v1", 2)
    state = torch.get_rng_state()
    first, again = (sac.evaluate(learner, envs, args) for _ in range(2))
    assert (first[0] == again[0]).all() and first[1] == again[1]
    assert torch.equal(state, torch.get_rng_state()) and learner.critic.training


# ------------------------------------------------------------------- environments, replay, accounting
class Counting(gym.Env):
    """Observes (episode, time); episode e lasts 3 + e % 3 steps; even ones terminate, odd ones time out."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([-3.0, 0.0]), np.array([1.0, 4.0]), dtype=np.float64)

    def __init__(self):
        self.episode, self.t = -1, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        over = self.t == 3 + self.episode % 3
        even = self.episode % 2 == 0
        return np.array([self.episode, float(self.t)]), float(self.t), over and even, over and not even, {}


if "Counting-v0" not in gym.registry:
    gym.register("Counting-v0", entry_point=Counting, max_episode_steps=100)


@SCRIPTS
def test_no_false_row_no_lost_observation_no_time_out_as_an_end(script):
    """Every stored row is one step of one episode; the last has its true next_obs; `done` is termination."""
    envs = script.make_envs("Counting-v0", 2)
    replay, player = script.Replay(100, 2, 2, CPU), script.Player(envs, seed=0)
    ended = []
    for _ in range(30):
        rows, episodes = player.step(torch.rand(2, 2) * 2 - 1, replay)
        ended += episodes
    c = {k: v[: replay.added].numpy() for k, v in replay.column(replay.rows).items()}
    assert (c["obs"][:, 0] == c["next_obs"][:, 0]).all(), "a row joins two episodes"
    assert (c["next_obs"][:, 1] == c["obs"][:, 1] + 1).all() and (c["rew"][:, 0] == c["next_obs"][:, 1]).all()
    length = 3 + c["obs"][:, 0] % 3
    assert (c["obs"][:, 1] < length).all(), "the final observation was acted upon"
    last, even = c["next_obs"][:, 1] == length, c["obs"][:, 0] % 2 == 0
    assert (c["done"][:, 0] == (last & even)).all() and (c["timeout"][:, 0] == (last & ~even)).all()
    for i in (0, 1):  # nothing is missing: each environment's rows count on without a gap
        mine = c["obs"][c["env"][:, 0] == i]
        expected = [(e, t) for e in range(9) for t in range(3 + e % 3)][: len(mine)]
        assert [tuple(x) for x in mine] == expected and len(mine) == 24  # 30 steps, 6 of them resets
    assert ended[0] == (6.0, 3) and ended[2] == (10.0, 4)
    batch = replay.batch(torch.arange(replay.added))  # what the losses get: `done` is the column of that name
    for name, x in batch._asdict().items():
        assert np.array_equal(x.reshape(replay.added, -1).numpy(), c[name]), name


@SCRIPTS
def test_the_ring_keeps_the_newest_rows(script):
    replay = script.Replay(5, 1, 1, CPU)
    for i in range(7):
        replay.add(np.full((1, 7), float(i)))
    assert sorted(replay.rows[:, 0].tolist()) == [2, 3, 4, 5, 6] and float(replay.size) == 5
    other = script.Replay(5, 1, 1, CPU)
    other.restore(replay.checkpoint(), continues=True)
    torch.manual_seed(0)
    a = replay.sample(50).rew
    torch.manual_seed(0)
    assert torch.equal(a, other.sample(50).rew) and set(a.tolist()) == {2, 3, 4, 5, 6}
    other.add(np.full((2, 7), 9.0))
    assert sorted(other.rows[:, 0].tolist()) == [4, 5, 6, 9, 9]


@SCRIPTS
@pytest.mark.parametrize("capacity, cut", [(5, []), (9, [4, 6])])
def test_new_episodes_cut_the_old_ones_where_the_file_can_be_written(script, capacity, cut):
    """Two environments take turns; each one's last row ends its episode, but in a ring that has wrapped:
    there the last index is not the newest row, and write() refuses anyway."""
    replay = script.Replay(capacity, 1, 1, CPU)
    for i in (0, 1, 0, 1, 1, 0, 0):
        replay.add(np.array([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, float(i)]]))
    other = script.Replay(capacity, 1, 1, CPU)
    other.restore(replay.checkpoint(), continues=False)
    assert other.column(other.rows)["timeout"][:, 0].nonzero()[:, 0].tolist() == cut


class Tally:
    """Counts what a training does, at the places where it is done."""

    def __init__(self, script, monkeypatch):
        self.updates = self.policy = self.polyak = 0
        update, polyak = script.Learner.update, script.polyak

        def counted(learner, batch, policy):
            self.updates, self.policy = self.updates + 1, self.policy + policy
            return update(learner, batch, policy)

        def counted_polyak(*a):
            self.polyak += 1
            polyak(*a)

        monkeypatch.setattr(script.Learner, "update", counted)
        monkeypatch.setattr(script, "polyak", counted_polyak)


@SCRIPTS
@pytest.mark.parametrize("utd, envs, frequency", [(1, 1, 1), (3, 1, 2), (0.5, 1, 1), (1, 3, 2), (0.1, 4, 3)])
def test_updates_are_counted_exactly(script, utd, envs, frequency, monkeypatch):
    tally = Tally(script, monkeypatch)
    args = tiny(script, env_id="Counting-v0", utd=utd, num_envs=envs, policy_frequency=frequency)
    result = script.train(replace(args, eval_episodes=0, diagnostics_frequency=0))
    steps = result["global_step"]
    assert 120 <= steps < 120 + envs
    assert result["updates"] == tally.updates == int(utd * (steps - 30) + 1e-9)
    assert tally.policy == tally.updates // frequency
    assert tally.polyak == (tally.updates if script is sac else 2 * tally.policy)


@SCRIPTS
def test_the_first_steps_are_uniform(script):
    path = Path("d.hdf5")
    args = tiny(script, env_id="Counting-v0", total_timesteps=3000, learning_starts=3000, eval_episodes=0)
    script.train(replace(args, save_dataset=str(path), diagnostics_frequency=0))
    with h5py.File(path) as f:
        act = f["actions"][()]
    for i, (low, high) in enumerate([(-3, 1), (0, 4)]):  # each action fills its own bounds evenly
        counts, _ = np.histogram(act[:, i], 8, (low, high))
        assert counts.sum() == 3000 and (abs(counts - 375) < 5 * 375**0.5).all()


@SCRIPTS
def test_terminations_and_returns_survive_the_way_to_cql_continuous(script):
    """Counting-v0, one environment: episode e lasts 3 + e % 3 steps, even ones terminate."""
    script.train(tiny(script, env_id="Counting-v0", total_timesteps=120, save_dataset="d.hdf5"))
    env = gym.make("Counting-v0")
    data = cql_continuous.load(Path("d.hdf5"), cql_continuous.Args(dataset="d.hdf5", holdout=0.0), env, CPU)
    lengths = [3 + e % 3 for e in range(30)]  # 3 + 4 + 5 steps, ten times
    assert np.flatnonzero(np.append(True, np.diff(data.obs[:, 0]) != 0)).tolist() == data.starts.tolist()
    assert np.diff([*data.starts, 120]).tolist() == lengths
    ends = np.cumsum(lengths) - 1
    assert np.flatnonzero(data.done).tolist() == ends[::2].tolist()
    expected = np.mean([n * (n + 1) / 2 for n in lengths])
    assert abs(data.info["dataset_return_mean"] - expected) < 1e-6


@SCRIPTS
def test_datasets_are_read_back_by_cql_continuous(script):
    """Two environments' rows come out episode by episode, with the returns that were seen."""
    script.train(tiny(script, total_timesteps=500, num_envs=2, save_dataset="d.hdf5", learning_starts=60))
    run = only_run(".")
    seen = sorted(float(v) for _, tag, v in metrics(run) if tag == "charts/episodic_return")
    args = cql_continuous.Args(dataset="d.hdf5", holdout=0.0)
    data = cql_continuous.load(Path("d.hdf5"), args, gym.make("Pendulum-v1"), CPU)
    assert len(data.train) >= 500 and len(data.starts) == 4  # two of 200 steps and two that were cut
    with h5py.File("d.hdf5") as f:
        rew, end = f["rewards"][()], f["timeouts"][()]
        assert (
            not f["terminals"][()].any()
            and (f["next_observations"][:-1] == f["observations"][1:]).all(1).sum() == len(end) - 4
        )
    returns = sorted(x.sum() for x in np.split(rew, np.flatnonzero(end) + 1)[:-1] if len(x) == 200)
    assert len(seen) == 2 and np.allclose(returns, seen, rtol=1e-5)
    assert abs(data.info["collector_return_mean"] - summary(run)["final_return_mean"]) < 1e-6


@SCRIPTS
def test_rollouts_of_a_run_are_a_dataset(script, capsys):
    script.train(tiny(script, env_id="Counting-v0"))
    run = only_run(".")
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    args = script.Args(resume=str(run), rollout_dataset="r.hdf5", rollout_steps=50, seed=3)
    with pytest.raises(SystemExit):
        script.train(replace(args, env_id="Hopper-v5"))
    assert "--env-id Hopper-v5 has no effect" in capsys.readouterr().err
    result = script.train(args)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before, "the run was touched"
    with h5py.File("r.hdf5") as f:
        assert len(f["rewards"]) == 50 and f.attrs["policy_step"] == 120 and result["episodes"] == 12
        assert f["timeouts"][()].sum() + f["terminals"][()].sum() == 13  # the last one cut
        assert abs(f.attrs["collector_return_mean"] - result["rollout_return_mean"]) < 1e-9


@SCRIPTS
def test_a_rollout_plays_the_policy_of_the_checkpoint(script):
    """A policy that presses every action to its upper bound: an untrained one stays near the middle."""
    script.train(tiny(script, env_id="Counting-v0", eval_episodes=0))
    path = only_run(".") / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    (last,) = [k for k in saved["learner"]["networks"] if k == "actor.net.4.bias"]
    saved["learner"]["networks"][last][:2] = 50.0
    torch.save(saved, path)
    script.train(script.Args(resume=str(path), rollout_dataset="r.hdf5", rollout_steps=30))
    with h5py.File("r.hdf5") as f:
        act = f["actions"][()]
    assert (act > [1 - 1.2, 4 - 1.2]).all() and (act.mean(0) > [1 - 0.3, 4 - 0.3]).all()


ENVS = [i for i in gym.registry if i.endswith("-v5")]
ENVS += ["Pendulum-v1", "MountainCarContinuous-v0", "CartPole-v1", "Acrobot-v1", "MountainCar-v0"]


@pytest.mark.parametrize("env_id", ENVS)
def test_environments_are_restored_bitwise(env_id):
    """Also over an autoreset, and with one environment just about to reset."""
    envs, others = (sac.make_envs(env_id, 2) for _ in range(2))
    rng = np.random.default_rng(0)

    def steps(n, *all_envs):
        """Small actions, so that some walker still stands when the state is taken."""
        for _ in range(n):
            box = envs.single_action_space
            act = rng.uniform(-0.1, 0.1, (2, *box.shape)) if isinstance(box, gym.spaces.Box) else None
            act = rng.integers(0, 2, 2) if act is None else act.astype(box.dtype)
            yield [e.step(act) for e in all_envs]

    envs.reset(seed=1)
    others.reset(seed=7)
    over = np.zeros(2, bool)
    for (x,) in steps(17, envs):
        over = x[2] | x[3]
    envs.envs[0].set_wrapper_attr("_elapsed_steps", envs.envs[0].spec.max_episode_steps - 5)
    states = torch.save(sac.env_states(envs), "s.pt") or torch.load("s.pt", weights_only=True)
    sac.restore_envs(others, states, over)
    ends = 0
    for a, b in steps(60, envs, others):
        for x, y in zip(a[:4], b[:4]):
            assert np.array_equal(x, y)
        ends += (a[2] | a[3]).sum()
    assert ends >= 1


def test_an_environment_that_is_not_known_starts_new_episodes(capsys):
    sac.train(tiny(sac, env_id="Counting-v0", eval_episodes=0))
    run = only_run(".")
    sac.train(tiny(sac, env_id="Counting-v0", eval_episodes=0, total_timesteps=160, resume=str(run)))
    assert "cannot be restored exactly" in capsys.readouterr().out
    assert summary(run)["global_step"] == 160 and summary(run)["updates"] == 130


# ------------------------------------------------------------------------------------------- promises
def words(script, *more) -> list:
    line = ["--critic-width", 16, "--policy-width", 16, "--batch-size", 16, "--learning-starts", 30]
    line += [
        "--log-frequency",
        20,
        "--eval-frequency",
        60,
        "--eval-episodes",
        2,
        "--checkpoint-frequency",
        50,
    ]
    return [*line, "--diagnostics-frequency", 40, "--total-timesteps", 260, *more]


def stop_at(script: str, step: int, line, cwd, send=signal.SIGTERM) -> subprocess.CompletedProcess:
    """The script in a process of its own that sends itself a signal in its `step`-th player step."""
    code = f"""
import os, sys, signal
sys.path.insert(0, {str(ROOT)!r})
import {script} as s, tyro
step, count = s.Player.step, [0]
def counted(*a):
    count[0] += 1
    if count[0] == {step}: os.kill(os.getpid(), {int(send)})
    return step(*a)
s.Player.step = counted
s.train(tyro.cli(s.Args, args={[str(x) for x in line]!r}))
"""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=one_thread(), timeout=180)


@pytest.mark.parametrize(
    "script, more",
    [
        (
            "sac",
            [
                "--env",
                "HalfCheetah-v5",
                "--utd",
                2,
                "--dropout",
                0.1,
                "--num-critics",
                3,
                "--target-subset",
                2,
            ],
        ),
        ("sac", ["--env", "Pendulum-v1", "--num-envs", 3, "--buffer-size", 100, "--total-timesteps", 700]),
        ("td3", ["--env", "Hopper-v5"]),
    ],
)
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(script, more, tmp_path):
    line = words(script, *more)
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    run_script(f"{script}.py", *line, cwd=tmp_path / "whole")
    # an odd count of updates: td3.py's policy is due next; with three environments episodes have ended
    step = 211 if "--num-envs" in more else 231
    done = stop_at(script, step, line, tmp_path / "parts")
    assert done.returncode == 143 and "to go on" in done.stdout, done.stdout + done.stderr
    run = only_run(tmp_path / "parts")
    time.sleep(1.1)  # another second: another time stamp, if a new folder were made
    run_script(f"{script}.py", *line, "--resume", run, cwd=tmp_path / "parts")
    assert only_run(tmp_path / "parts") == run
    whole = only_run(tmp_path / "whole")
    assert_same_checkpoint(run / "checkpoint.pt", whole / "checkpoint.pt")
    assert metrics(run) == metrics(whole) and len(metrics(run)) > 100


@SCRIPTS
def test_diagnostics_logging_evaluation_and_video_change_nothing(script):
    on = (
        tiny(script, exp_name="on", dropout=0.1, layer_norm=True)
        if script is sac
        else tiny(script, exp_name="on")
    )
    off = replace(on, exp_name="off", eval_episodes=0, diagnostics_frequency=0, log_frequency=1000)
    off = replace(off, checkpoint_frequency=0)
    script.train(replace(on, capture_video=True))
    script.train(off)
    runs = {p.name.split("__")[1]: p for p in Path("runs").iterdir()}
    a, b = (torch.load(runs[k] / "checkpoint.pt", weights_only=True) for k in ("on", "off"))
    for k, v in a["learner"]["networks"].items():
        assert torch.equal(v, b["learner"]["networks"][k]), k
    assert torch.equal(a["random"]["cpu"], b["random"]["cpu"])
    assert len(list((runs["on"] / "videos").glob("step-*/*.mp4"))) == 2


@SCRIPTS
def test_same_seed_same_numbers_another_seed_others(script):
    results = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        script.train(tiny(script, seed=seed, exp_name=name))
        (run,) = Path("runs").glob(f"*__{name}__*")
        results.append(metrics(run))
    assert results[0] == results[1] != results[2]


@SCRIPTS
def test_without_its_replay_a_resumed_run_refills_before_it_updates(script):
    args = tiny(script, checkpoint_replay=False, eval_episodes=0)
    script.train(args)
    run = only_run(".")
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["replay"] is None and saved["updates"] == 90
    result = script.train(replace(args, total_timesteps=200, resume=str(run)))
    assert result["updates"] == 90 + 200 - 120 - 30  # learning_starts steps without an update


def test_memory_is_said_first_and_a_replay_that_cannot_fit_refused(tmp_path):
    done = run_script(
        "sac.py", "--total-timesteps", 10**12, "--buffer-size", 10**12, cwd=tmp_path, check=False
    )
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert done.stderr.count("\n") == 1 and "replay buffer needs" in done.stderr
    assert done.stdout.startswith("replay buffer: ")


@SCRIPTS
def test_non_finite_numbers_stop_the_run_before_a_checkpoint(script, monkeypatch, capsys):
    """A NaN that appears in the replay at the 75th step: the run stops by the next check with status 3."""
    step, count = script.Player.step, [0]

    def poisoned(self, act, replay):
        out = step(self, act, replay)
        count[0] += 1
        if count[0] >= 75:
            replay.rows[:, replay.widths["obs"] + replay.widths["act"]] = math.nan
        return out

    monkeypatch.setattr(script.Player, "step", poisoned)
    with pytest.raises(SystemExit) as stop:
        script.train(tiny(script))
    assert stop.value.code == 3 and "not finite" in capsys.readouterr().err
    assert torch.load(only_run(".") / "checkpoint.pt", weights_only=True)["step"] == 40


@SCRIPTS
def test_a_nan_of_the_environment_never_reaches_the_replay(script, monkeypatch, capsys):
    monkeypatch.setattr(Counting, "step", lambda self, a: (np.zeros(2), math.nan, False, False, {}))
    with pytest.raises(SystemExit) as stop:
        script.train(tiny(script, env_id="Counting-v0"))
    assert stop.value.code == 3 and "a reward is not finite" in capsys.readouterr().err


def test_a_cut_replay_is_not_joined_to_the_episodes_that_follow():
    """An environment that cannot be restored: the last row of each is marked as cut on resume."""
    sac.train(tiny(sac, env_id="Counting-v0", num_envs=2, eval_episodes=0, total_timesteps=101))
    args = tiny(
        sac, env_id="Counting-v0", num_envs=2, eval_episodes=0, total_timesteps=160, save_dataset="d.hdf5"
    )
    sac.train(replace(args, resume=str(only_run("."))))
    with h5py.File("d.hdf5") as f:
        end = f["terminals"][()] | f["timeouts"][()]
        joined = (f["next_observations"][:-1] != f["observations"][1:]).any(1)
        assert len(end) >= 160 and not (joined & ~end[:-1]).any()


BAD = [
    ("sac", ["--env", "CartPole-v1"], "CartPole-v1"),
    ("sac", ["--env", "NoSuch-v1"], "NoSuch"),
    ("sac", ["--env", "no-such-module:Env-v0"], "no-such-module"),
    ("sac", ["--gamma", "nan"], "--gamma"),
    ("sac", ["--tau", "0"], "--tau"),
    ("sac", ["--utd", "0"], "--utd"),
    ("sac", ["--num-envs", "0"], "--num-envs"),
    ("sac", ["--q-lr", "-1"], "--q-lr"),
    ("sac", ["--alpha", "-1"], "--alpha"),
    ("sac", ["--target-subset", "3"], "--target-subset"),
    ("sac", ["--num-critics", "1", "--actor-q", "mean"], "--actor-q"),
    ("sac", ["--alpha", "0.2", "--target-entropy", "-3"], "--target-entropy"),
    ("sac", ["--rollout-steps", "5"], "--rollout-steps"),
    ("sac", ["--rollout-dataset", "x.hdf5", "--rollout-steps", "0"], "--rollout-steps"),
    ("sac", ["--save-dataset", "there.hdf5/x.hdf5"], "there.hdf5/x.hdf5"),
    ("sac", ["--rollout-dataset", "x.hdf5"], "--resume"),
    ("sac", ["--rollout-dataset", "x.hdf5", "--resume", "nowhere"], "nowhere"),
    ("sac", ["--save-dataset", "nowhere/x.hdf5"], "nowhere/x.hdf5"),
    ("sac", ["--save-dataset", "there.hdf5"], "there.hdf5"),
    ("sac", ["--save-dataset", "x.hdf5", "--buffer-size", "100"], "--buffer-size"),
    ("sac", ["--wandb-entity", "me"], "--track"),
    ("sac", ["--precision", "tf32"], "GPU"),
    ("sac", ["--resume", "nowhere"], "nowhere"),
    ("sac", ["--resume", "there.hdf5"], "there.hdf5"),
    ("td3", ["--env", "CartPole-v1"], "CartPole-v1"),
    ("td3", ["--policy-noise", "0", "--noise-clip", "0.3"], "--noise-clip"),
    ("td3", ["--exploration-noise", "nan"], "--exploration-noise"),
    ("td3", ["--num-critics", "0"], "--num-critics"),
]


@pytest.mark.parametrize("script, line, named", BAD, ids=[" ".join(x[1]) for x in BAD])
def test_a_users_mistake_is_one_line_and_status_2(script, line, named, capsys):
    Path("there.hdf5").write_text("not a checkpoint")
    module = {"sac": sac, "td3": td3}[script]
    with pytest.raises(SystemExit) as stop:
        module.train(tyro.cli(module.Args, args=line))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and named in err and err.strip().count("\n") == 0
    assert not Path("runs").exists() and Path("there.hdf5").read_text() == "not a checkpoint"


def test_td3_refuses_sacs_checkpoint(capsys):
    sac.train(tiny(sac, eval_episodes=0))
    with pytest.raises(SystemExit) as stop:
        td3.train(tiny(td3, resume=str(only_run(".")), eval_episodes=0))
    assert stop.value.code == 2 and "another script" in capsys.readouterr().err


# -------------------------------------------------------------------------- numbers of a run, commands
@SCRIPTS
def test_what_a_run_leaves_behind(script):
    result = script.train(tiny(script))
    run = only_run(".")
    assert json.loads((run / "summary.json").read_text()) == result
    keys = {"final_return_mean", "final_return_std", "eval_episodes", "wall_seconds", "device", "global_step"}
    assert keys | {"steps_per_second", "updates"} <= result.keys()
    tags = {tag for _, tag, _ in metrics(run)}
    names = "srank rank_pca effective_rank sigma_max sigma_min feature_dot feature_cos feature_norm dormant"
    names += " q_data q_pi q_rand q_max q_bound td_error v_s0 overestimation"
    assert {f"diagnostics/{n}" for n in names.split()} <= tags
    losses = {"losses/qf1_loss", "losses/qf1_values", "losses/actor_loss"} | (
        {"losses/alpha"} if script is sac else set()
    )
    assert losses | {"eval/episodic_return", "charts/updates"} <= tags
    assert [s for s, tag, _ in metrics(run) if tag == "eval/episodic_return"] == [60, 120]


@SCRIPTS
def test_overestimation_is_predicted_less_achieved(script):
    """A critic that says 7 everywhere, on Counting-v0: the discounted return of an episode is known."""
    args = tiny(script, env_id="Counting-v0", gamma=0.5)
    learner = script.Learner(2, 2, args, CPU)
    for p in learner.critic.parameters():
        p.data.zero_()
    learner.critic.head.bias.data += torch.tensor([7.0, 8.0])[:, None, None]
    envs = script.make_envs("Counting-v0", 2)
    envs.envs[
        1
    ].unwrapped.episode = 1  # its next lasts 5 steps: the first goes on into a second one meanwhile
    returns, said = script.evaluate(learner, envs, args)
    assert returns.tolist() == [6.0, 15.0]  # 1 + 2 + 3, 1 + ... + 5
    achieved = [sum((t + 1) * 0.5**t for t in range(n)) for n in (3, 5)]
    assert said["v_s0"] == 7 and abs(said["overestimation"] - (7 - np.mean(achieved))) < 1e-9


@SCRIPTS
def test_reported_q_and_td_error_by_hand(script):
    """Policies without noise, so that the target is known; Q is the minimum of as many critics as the target
    takes, the TD error the mean over all, in units of the target's variance."""
    if script is sac:
        args = tiny(sac, num_critics=3, target_subset=2, alpha=0.0, gamma=0.9)
    else:
        args = tiny(td3, num_critics=3, policy_noise=0.0, gamma=0.9)
    learner, replay = script.Learner(3, 2, args, CPU), script.Replay(300, 3, 2, CPU)
    if script is sac:
        learner.actor.net[-1].weight.data[2:], learner.actor.net[-1].bias.data[2:] = 0.0, -20.0
        learner.target.head.weight.data[1:] = learner.target.head.weight.data[:1]  # any two have one minimum
        for layer in (*learner.target.layers, learner.target.head):
            for p in layer.parameters():
                p.data[1:] = p.data[:1]
    b = a_batch(script, 300)
    columns = (b.obs, b.act, b.rew[:, None], b.next_obs, b.done[:, None], torch.zeros(300, 2))
    replay.add(torch.cat(columns, 1).numpy())
    out = script.diagnose(learner, replay, args, 0.0)
    policy = getattr(learner, "target_actor", None) or (lambda obs: torch.tanh(learner.actor(obs)[0]))
    with torch.no_grad():
        y = b.rew + 0.9 * (1 - b.done) * learner.target(b.next_obs, policy(b.next_obs)).amin(0)
        q, q_pi = learner.critic(b.obs, b.act), learner.critic(b.obs, learner.act(b.obs, explore=False))
    few = 2 if script is sac else 3
    assert abs(out["td_error"] - float(((q - y) ** 2).mean() / y.var())) < 1e-5
    assert abs(out["q_data"] - float(q[:few].amin(0).mean())) < 1e-6
    assert abs(out["q_pi"] - float(q_pi[:few].amin(0).mean())) < 1e-6
    assert out["q_max"] >= max(float(x[:few].amin(0).max()) for x in (q, q_pi)) - 1e-6


@SCRIPTS
def test_q_bound(script):
    """r_max / (1 - gamma), with the entropy bonus; where all rewards are negative and episodes end, r_max."""
    args = tiny(script, gamma=0.9)
    learner, replay = script.Learner(1, 1, args, CPU), script.Replay(300, 1, 1, CPU)
    rows = np.random.default_rng(0).normal(size=(300, 7))
    rows[:, 2], rows[:, 4:] = np.linspace(-3, 2, 300), 0
    replay.add(rows)
    assert abs(script.diagnose(learner, replay, args, 0.5)["q_bound"] - 25) < 1e-4
    replay.rows[:, 2] -= 4
    assert abs(script.diagnose(learner, replay, args, 0.5)["q_bound"] + 15) < 1e-4
    replay.rows[7, 4] = 1
    assert abs(script.diagnose(learner, replay, args, 0.5)["q_bound"] + 1.5) < 1e-4


def documented_commands() -> list:
    """Every `python sac.py ...` and `python td3.py ...` of README and docstrings, continued lines joined."""
    commands = []
    for file in ("README.md", "benchmarks/README.md", "sac.py", "td3.py"):
        text = (ROOT / file).read_text().replace("\\\\\n", " ").replace("\\\n", " ")
        text = text if file.endswith(".md") else text.split('"""')[1]
        commands += re.findall(r"python (?:sac|td3)\.py[^\n`#&|;]*", text)
    return sorted({" ".join(c.split()) for c in commands})


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_run(command):
    """Parsed as written, then cut to 60 steps of tiny networks."""
    _, name, *line = shlex.split(command)
    script = {"sac.py": sac, "td3.py": td3}[name]
    args = tyro.cli(script.Args, args=line)
    small = tiny(script, total_timesteps=60)
    if args.rollout_dataset:
        script.train(small)
        result = script.train(replace(args, resume=str(only_run(".")), rollout_steps=40))
        assert result.keys() == {"episodes", "rollout_return_mean"}
        return
    short = {k: getattr(small, k) for k in TINY} | {"total_timesteps": 60, "utd": min(args.utd, 2)}
    short["learning_starts"] = 60 if args.learning_starts == args.total_timesteps else 30
    assert script.train(replace(args, **short))["global_step"] == 60
    assert args.save_dataset is None or Path(args.save_dataset).exists()


FAST = dict(learning_starts=500, batch_size=128, critic_width=64, policy_width=64, policy_lr=1e-3, q_lr=1e-3)
FAST |= dict(eval_frequency=0, diagnostics_frequency=0, checkpoint_frequency=0)


def test_sac_learns_pendulum():
    """A random policy has about -1,200, standing up about -150."""
    result = sac.train(sac.Args(total_timesteps=4_500, **FAST))
    assert result["final_return_mean"] > -400


def test_droq_learns_pendulum_from_fewer_steps():
    droq = dict(utd=5, policy_frequency=5, actor_q="mean", layer_norm=True, dropout=0.01)
    result = sac.train(sac.Args(total_timesteps=2_400, **droq, **FAST))
    assert result["final_return_mean"] > -600


@SCRIPTS
def test_a_replay_that_has_overflowed_is_not_written_as_whole(script, tmp_path, capsys):
    replay = script.Replay(5, 1, 1, CPU)
    for i in range(6):
        replay.add(np.full((1, 7), float(i)))
    with pytest.raises(SystemExit) as e:
        replay.write(tmp_path / "d.hdf5", gym.spaces.Box(-1, 1, (1,)))
    assert e.value.code == 2 and "only the last 5 of 6" in capsys.readouterr().err
    assert not (tmp_path / "d.hdf5").exists()


@SCRIPTS
def test_a_finished_run_can_still_be_written_and_keeps_its_summary(script, capsys):
    """Also one whose replay has room for just its steps, and one that did not know a flag of today."""
    args = tiny(script, eval_episodes=0, buffer_size=120)
    before = script.train(args)
    run = only_run(".")
    after = script.train(replace(args, resume=str(run), save_dataset="d.hdf5"))
    assert {**after, "wall_seconds": 0} == {**before, "wall_seconds": 0} and after["steps_per_second"] > 0
    with h5py.File("d.hdf5") as f:
        assert len(f["rewards"]) == 120
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    del saved["args"]["gamma"]
    torch.save(saved, run / "checkpoint.pt")
    script.train(script.Args(resume=str(run), rollout_dataset="r.hdf5", rollout_steps=20))
    assert Path("r.hdf5").exists()


@SCRIPTS
def test_a_flag_that_an_old_run_did_not_know_counts_as_its_default(script, capsys):
    args = tiny(script, eval_episodes=0)
    script.train(args)
    path = only_run(".") / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    del saved["args"]["gamma"]
    torch.save(saved, path)
    assert script.find_checkpoint(replace(args, resume=str(path)))["step"] == saved["step"]
    with pytest.raises(SystemExit) as e:
        script.find_checkpoint(replace(args, resume=str(path), gamma=0.5))
    assert e.value.code == 2 and "--gamma 0.99, this command 0.5" in capsys.readouterr().err


def test_an_environment_with_a_wrapper_of_its_own_is_not_called_exact():
    vector = lambda make: gym.vector.SyncVectorEnv([make])
    plain, wrapped = (vector(f) for f in (
        lambda: gym.make("Pendulum-v1"), lambda: gym.wrappers.NormalizeObservation(gym.make("Pendulum-v1"))
    ))  # fmt: skip
    plain.reset(seed=0), wrapped.reset(seed=0)
    assert len(sac.env_states(plain)) == 1 and sac.env_states(wrapped) is None


@pytest.mark.parametrize("name", ["sac", "td3", "ppo", "kfac_npg"])
def test_another_autoreset_is_refused(name, capsys):
    mode = gym.vector.AutoresetMode
    make = lambda m: gym.vector.SyncVectorEnv([lambda: gym.make("Pendulum-v1")], autoreset_mode=m)
    script = importlib.import_module(name)
    script.Player(make(mode.NEXT_STEP), 1)
    for other in (mode.SAME_STEP, mode.DISABLED):
        with pytest.raises(SystemExit) as e:
            script.Player(make(other), 1)
        assert e.value.code == 2 and "expected NEXT_STEP" in capsys.readouterr().err
