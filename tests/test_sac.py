"""sac.py: its mathematics against independent answers. The replay, the environments, promises and
commands of sac.py and td3.py are tested together in test_online.py."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import sac
import torch

CPU = torch.device("cpu")


def a_batch(script, n=64, obs_dim=3, act_dim=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    obs, act, rew = (torch.randn(n, *w, generator=g) for w in ([obs_dim], [act_dim], []))
    next_obs = torch.randn(n, obs_dim, generator=g)
    done = (torch.rand(n, generator=g) < 0.3).float()
    return script.Batch(obs, act.tanh(), rew, next_obs, done)


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
    args = sac.Args(num_critics=3, width=8, gamma=0.9, alpha=0.3)
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
                h = (
                    h @ layer.weight[i].detach().double().numpy()
                    + layer.bias[i].detach().double().numpy()
                )
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
    assert info["qf1_loss"] != info["qf_loss"] and not info["qf_loss"].requires_grad


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
    args = sac.Args(num_critics=2, actor_q=kind, width=8, alpha=0.5)
    learner, batch = sac.Learner(3, 2, args, CPU), a_batch(sac)
    learner.critic.head.bias.data[1] += 5.0
    torch.manual_seed(1)
    loss, _ = sac.actor_loss(learner, batch, args)
    torch.manual_seed(1)
    act, logp = learner.actor.sample(batch.obs)
    q = learner.critic(batch.obs, act)
    assert torch.allclose(loss, (0.5 * logp - (q[0] if kind == "min" else q.sum(0) / 2)).mean())


def test_the_actors_step_leaves_the_critic_alone():
    args = sac.Args(width=8)
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
    """At a constant gap: Adam takes the size out of a gradient, unless that shrinks."""
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
    args = sac.Args(width=16, depth=1, alpha=alpha)
    learner = SimpleNamespace(actor=sac.Actor(1, 1, args), log_alpha=torch.tensor(alpha).log())
    learner.critic = lambda obs, act: q(act[:, 0])[None]
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
    """Seed 004's ten actions at B, all worth 0, seen through unit noise: the best-looking one seems
    to be worth E max = 1.54. The minimum with an independent second estimate takes that away."""
    n, k = 20_000, 10
    noise = torch.randn(2, n, k)
    best = noise[0].argmax(1)  # the policy climbs the first critic
    batch = a_batch(sac, n, obs_dim=1, act_dim=1)._replace(rew=torch.zeros(n), done=torch.zeros(n))
    actor = SimpleNamespace(sample=lambda obs, generator: (best[:, None], torch.zeros(n)))
    learner = SimpleNamespace(actor=actor, log_alpha=torch.tensor(-100.0))
    means = {}
    for critics in (1, 2):
        seen = noise[:critics]
        learner.target = lambda obs, act, seen=seen: seen.gather(2, act.expand(*seen.shape[:2], 1))[
            ..., 0
        ]
        args = sac.Args(num_critics=critics, gamma=0.99999)
        means[critics] = float(sac.backup(learner, batch, args)[1].mean())
    assert abs(means[1] - 1.5388) < 0.02 and -0.2 < means[2] < 0


@pytest.mark.parametrize("policy", [True, False])
@pytest.mark.parametrize("alpha", [None, 0.2])
def test_policy_and_temperature_wait_and_a_fixed_temperature_stays(policy, alpha):
    learner, batch = sac.Learner(3, 2, sac.Args(width=8, alpha=alpha), CPU), a_batch(sac)
    nets = {k: getattr(learner, k) for k in ("actor", "critic", "target")}
    before = {k: [p.detach().clone() for p in net.parameters()] for k, net in nets.items()}
    temperature = learner.log_alpha.item()
    info = learner.update(batch, with_policy=policy)
    moved = {}
    for k, net in nets.items():
        moved[k] = any(not torch.equal(p, q) for p, q in zip(before[k], net.parameters()))
    assert moved == {"critic": True, "actor": policy, "target": True}
    assert ("actor_loss" in info) == policy
    assert (learner.log_alpha.item() != temperature) == (policy and alpha is None)
    assert abs(info["alpha"] - learner.log_alpha.exp()) < 1e-7


@pytest.mark.parametrize("training", [True, False])
def test_droqs_layers_by_hand(training):
    """Linear, dropout, layer norm, ReLU, in this order; dropout in training alone."""
    args = sac.Args(width=32, layer_norm=True, dropout=0.3)
    critic = sac.Critic(3, 2, args).train(training)
    x = torch.randn(2, 10, 5)[:1].expand(2, -1, -1)
    torch.manual_seed(0)
    ours = critic.hidden(x[0, :, :3], x[0, :, 3:])
    torch.manual_seed(0)
    for layer, h in zip(critic.layers, ours):
        z = torch.einsum("nbi,nio->nbo", x, layer.weight) + layer.bias
        if training:
            z = z * (torch.empty_like(z).bernoulli_(0.7) / 0.7)
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        x = z.clamp(min=0)
        assert torch.allclose(h, x, atol=1e-5)


def test_polyak():
    learner = sac.Learner(3, 2, sac.Args(width=8, tau=0.25), CPU)
    net, target = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    net.weight.data, target.weight.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]])
    learner.polyak(net, target)
    assert torch.allclose(target.weight, torch.tensor([[2.5, -1.0]]))
    learner.args.tau = 1.0  # no lag
    learner.polyak(net, target)
    assert torch.equal(target.weight, net.weight) and torch.equal(target.bias, net.bias)


def test_entropy_bonus_is_the_uniform_policys():
    learner = sac.Learner(3, 2, sac.Args(alpha=0.5, gamma=0.9, width=8), CPU)
    assert abs(learner.entropy_bonus() - 0.9 * 0.5 * 2 * math.log(2)) < 1e-6


def test_dropout_is_on_in_the_target_and_off_in_evaluation():
    args = sac.Args(width=16, dropout=0.5)
    learner = sac.Learner(3, 1, args, CPU)
    obs, act = torch.randn(4, 3), torch.rand(4, 1)
    twice = [learner.target.hidden(obs, act)[-1] for _ in range(2)]
    assert not torch.equal(*twice)
    with sac.ExitStack() as stack:
        envs, state = sac.make_envs("Pendulum-v1", 2, stack), torch.get_rng_state()
        first, again = (sac.evaluate(learner, envs, args) for _ in range(2))
    assert (first[0] == again[0]).all() and first[1] == again[1]
    assert torch.equal(state, torch.get_rng_state()) and learner.critic.training


FAST = dict(learning_starts=500, batch_size=128, width=64, policy_lr=1e-3, q_lr=1e-3)
FAST |= dict(eval_frequency=0, checkpoint_frequency=0)


def test_sac_learns_pendulum():
    """A random policy has about -1,200, standing up about -150."""
    assert sac.train(sac.Args(total_timesteps=4_500, **FAST))["final_return_mean"] > -400


def test_droq_learns_pendulum_from_fewer_steps():
    droq = dict(utd=5, policy_frequency=5, actor_q="mean", layer_norm=True, dropout=0.01)
    result = sac.train(sac.Args(total_timesteps=2_400, **droq, **FAST))
    assert result["final_return_mean"] > -600
