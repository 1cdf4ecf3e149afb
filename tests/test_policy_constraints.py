"""policy_constraints.py: divergences and weights against closed forms and numbers by hand, each
solver against the bandit's exact answer, one resume, and runs that learn what their data does not
show."""

import copy
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import cql_continuous as cql
import numpy as np
import policy_constraints as pc
import pytest
import torch
import tyro
from conftest import (
    ROOT,
    assert_same_checkpoint,
    metrics,
    one_thread,
    only_run,
    refused,
    run_script,
    stop_at,
)
from policy_constraints import Args, Policy, train
from test_cql_continuous_math import UP, curve
from test_cql_continuous_runs import point_data

CPU = torch.device("cpu")
B, Q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([1.0, 2.0, 0.0])  # a bandit of three arms


def planted(mean, std, args=None, modes: int = 1, weights=None) -> Policy:
    """A policy that ignores its observation, of given means and deviations of u, (K, act)."""
    mean, std = (torch.as_tensor(x, dtype=torch.float32).reshape(modes, -1) for x in (mean, std))
    policy = Policy(2, mean.shape[1], args or Args(width=8, depth=1), modes)
    torch.nn.init.zeros_(policy.head.weight)
    policy.head.bias.data = torch.cat([mean, std.log()], 1).flatten()
    if modes > 1:
        torch.nn.init.zeros_(policy.logits.weight)
        policy.logits.bias.data = torch.tensor(weights).log()
    return policy


# --------------------------------------------------------------------------------- divergences
def test_mmd_by_hand():
    """k = exp(-|x - y|), X = {0, 1}, Y = {0, 2}: (1 - 1/e) / 2; at sigma 20 nearly the energy
    distance over 2 sigma; the U-form is what remains without the diagonals."""
    x, y = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.0], [2.0]]])
    v = float(pc.mmd(x, y, "laplacian", 0.5) ** 2 - 1e-6)
    assert abs(v - (1 - math.exp(-1)) / 2) < 1e-6
    assert abs(v - (2 - math.exp(-1) - math.exp(-2)) / 2 - (math.exp(-2) - 1) / 2) < 1e-6
    assert abs(float(pc.mmd(x, y, "laplacian", 20) ** 2 - 1e-6) - 0.0123450) < 1e-6
    gaussian = 0.5 * (1 + math.exp(-0.5)) + 0.5 * (1 + math.exp(-2))
    gaussian -= (1 + math.exp(-2) + math.exp(-0.5) + math.exp(-0.5)) / 2
    assert abs(float(pc.mmd(x, y, "gaussian", 1.0) ** 2 - 1e-6) - gaussian) < 1e-6


def test_mmd_of_gaussians_and_its_bias():
    """Two draws of one distribution: 2/N (1 - E k) on average, 0.124343 at N = 4, d = 6; and of a
    shift by 1 the population's 0.0428504, once N is large."""
    torch.manual_seed(1)
    x, y = torch.randn(2, 20_000, 4, 6)
    found = (pc.mmd(x, y, "gaussian", 20.0) ** 2 - 1e-6).mean()
    assert abs(found - 2 / 4 * (1 - (1 + 2 / 20) ** -3)) < 5e-4
    x, y = torch.randn(50, 1000, 1), torch.randn(50, 1000, 1) + 1
    found = (pc.mmd(x, y, "gaussian", 20.0) ** 2 - 1e-6).mean()
    bias = 2 / 1000 * (1 - 1.1**-0.5)
    assert abs(found - bias - 0.0428504) < 1e-3


def test_kl_and_w2_in_closed_form():
    """KL(N(0,1) || N(1,4)) = log 2 - 1/4, and its reverse; W_2^2 of N(0,1), N(1,4) is 1 + 1."""
    zero, one, log2 = torch.zeros(1, 1), torch.ones(1, 1), torch.full((1, 1), math.log(2))
    assert abs(float(pc.gaussian_kl(zero, zero, one, log2)) - 0.443147) < 1e-6
    assert abs(float(pc.gaussian_kl(one, log2, zero, zero)) - 1.306853) < 1e-6
    assert abs(float(pc.squared_w2(zero, zero, one, log2)) - 2.0) < 1e-6


@pytest.mark.parametrize("constraint", ["kl", "forward-kl"])
def test_sampled_kl_after_the_tanh_is_the_closed_form_before_it(constraint):
    """Of the tanh's densities, by samples; the mixture's average of two equal Gaussians agrees."""
    torch.manual_seed(2)
    args = Args(width=8, depth=1, constraint=constraint, divergence_samples=4_000)
    learner = SimpleNamespace(actor=planted([0.2, -0.5], [0.5, 0.8]))
    learner.clone = planted([0.6, 0.0], [0.7, 0.6])
    obs = torch.randn(50, 2)
    exact = pc.divergence(learner, learner.actor(obs), obs, args)
    p, q = learner.actor, learner.clone
    p, q = (p, q) if constraint == "kl" else (q, p)
    act, logp = p.sample(obs, 4_000)
    assert abs((logp - q.log_prob(q(obs), act)).mean() - exact.mean()) < 0.02
    learner.clone = planted([0.6, 0.0] * 2, [0.7, 0.6] * 2, modes=2, weights=[0.3, 0.7])
    args.behaviour_modes = 2
    assert abs(pc.divergence(learner, learner.actor(obs), obs, args).mean() - exact.mean()) < 0.02


def test_w2_after_the_tanh_is_another_number():
    """In one dimension W_2 couples quantiles: by quadrature, 2.0 before and 0.206 after."""
    z = torch.special.ndtri((torch.arange(200_000) + 0.5) / 200_000)
    before, after = (f(z) - f(1 + 2 * z) for f in (lambda x: x, torch.tanh))
    assert abs((before**2).mean() - 2.0) < 1e-2
    assert abs((after**2).mean() - 0.206) < 1e-3


def test_a_mixtures_density_integrates_to_one_and_fits_its_samples():
    policy = planted([-0.8, 0.7], [0.3, 0.5], modes=2, weights=[0.25, 0.75])
    obs, edges = torch.zeros(1, 2), torch.linspace(-1, 1, 4_001)
    middle = (edges[1:] + edges[:-1]) / 2
    density = policy.log_prob(policy(obs), middle[None, :, None])[0].exp()
    assert abs(density.sum() * 2 / 4_000 - 1) < 1e-3
    act, logp = policy.sample(obs, 100_000)
    assert abs((act < 0).float().mean() - density[middle < 0].sum() * 2 / 4_000) < 5e-3
    assert torch.allclose(logp, policy.log_prob(policy(obs), act), atol=1e-3)
    assert abs(policy.mode(obs).item() - math.tanh(0.7)) < 1e-6


def test_three_modes_are_drawn_by_their_weights():
    """Of two, noise of the wrong sign would do."""
    torch.manual_seed(11)
    weights = [0.6, 0.3, 0.1]
    policy = planted([-2.0, 0.0, 2.0], [0.1] * 3, modes=3, weights=weights)
    u = policy.draw(policy(torch.zeros(1_000, 2)), 50)
    shares = [((u > low) & (u < low + 2)).float().mean() for low in (-3, -1, 1)]
    assert torch.allclose(torch.stack(shares), torch.tensor(weights), atol=0.01)


def test_what_the_page_says_of_each_divergence(monkeypatch):
    """docs/constraints.md: numbers by the grid of benchmarks/runs/divergences.py, KL also by hand:
    -log of the mode's share where modes do not overlap."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "runs"))
    import divergences as d

    large, gap, small = (d.measures("gap", mean, 0.1) for mean in (-0.5, 0.0, 0.5))
    assert abs(large["kl"] + math.log(0.9)) < 1e-4 and abs(small["kl"] + math.log(0.1)) < 1e-4
    assert large["kl"] < small["kl"] < gap["kl"] and abs(gap["kl"] - 9.55) < 0.05
    for name in ("forward-kl", "mmd, N = 4"):
        assert large[name] < gap[name] < small[name]
    inside = [d.measures("uniform", x, 0.1)["kl"] for x in (0.0, 0.25, 0.5)]
    assert max(inside) - min(inside) < 1e-3 and d.measures("uniform", 0.9, 0.1)["kl"] > 5
    for n, least in ((4, 0.65), (10, 0.85), (100, 1.0)):
        widths = torch.linspace(0.5, 1.2, 15).tolist()
        found = min(widths, key=lambda std: d.measures("width", 0.0, std)[f"mmd, N = {n}"])
        assert abs(found - least) < 0.01
    means = {
        case: [d.best(*args)[0] for args in ((b, "kl", peak), (b, "mmd, N = 4", peak))]
        for case, (b, peak) in d.BEST.items()
    }
    assert means["reward in the gap"][0] < -0.2 and abs(means["reward in the gap"][1]) < 1e-6
    assert means["reward at the small mode"] == pytest.approx([0.5, 0.5])
    assert means["reward near the border"] == pytest.approx([0.7, 0.65])


def test_the_clone_has_a_floor_and_the_actor_its_authors_bounds():
    """Both heads ask for no deviation at all."""
    learner, obs = learner_of(behaviour_min_std=0.3, behaviour_modes=2), torch.randn(4, 2)
    for policy, floor in ((learner.clone, math.log(0.3)), (learner.actor, -5.0)):
        torch.nn.init.constant_(policy.head.bias, -50.0)
        log_std = policy(obs)[1]
        assert torch.allclose(log_std, torch.full_like(log_std, floor))


# ------------------------------------------------------------------------------------- solvers
def test_the_dual_finds_the_multiplier_of_the_bandit():
    """max E Q - alpha KL has pi = b exp(Q / alpha) / Z; KL = 0.1 asks for alpha = 1.492501."""
    log_alpha = torch.nn.Parameter(torch.zeros(()))
    optim = torch.optim.Adam([log_alpha], lr=0.02)
    for _ in range(1_500):
        pi = (B.log() + Q / log_alpha.detach().exp()).softmax(0)
        excess = (pi * (pi / B).log()).sum() - 0.1
        optim.zero_grad()
        pc.dual_loss(log_alpha, excess).backward()
        optim.step()
    assert abs(log_alpha.exp() - 1.492501) < 1e-3
    assert torch.allclose(pi, torch.tensor([0.420656, 0.493245, 0.0861]), atol=1e-4)
    assert abs((pi * Q).sum() - 1.407145) < 1e-4


@pytest.mark.parametrize("baseline", [0.0, 1.1, -3.0])
def test_weighted_likelihood_is_kls_maximiser(baseline):
    """On exact counts the categorical of largest weighted likelihood is b w / sum, for any V."""
    for temperature, expected in (
        (1.0, [0.359956, 0.587076, 0.052968]),
        (0.5, [0.182230, 0.807905, 0.009865]),
    ):
        args = Args(extract="exp", temperature=temperature, max_weight=1e6)
        w, _ = pc.advantage_weights(Q - baseline, args)
        assert torch.allclose(B * w / (B * w).sum(), torch.tensor(expected), atol=1e-6)
        args.normalise_weights = True
        w, _ = pc.advantage_weights(Q - baseline, args)
        assert torch.allclose(B * w / (B * w).sum(), torch.tensor(expected), atol=1e-6)
    w, _ = pc.advantage_weights(Q - 1.1, Args(extract="binary"))
    assert w.tolist() == [0, 1, 0]
    assert pc.advantage_weights(torch.zeros(2), Args(extract="binary"))[0].tolist() == [0, 0]


def test_weighted_likelihood_of_a_gaussian():
    """b = N(0,1), Q = -(a - 1)^2 / 2, lambda 1/2: N(2/3, 1/3), and a share of 0.570889."""
    torch.manual_seed(3)
    a = torch.randn(400_000)
    w, info = pc.advantage_weights(-0.5 * (a - 1) ** 2, Args(extract="exp", temperature=0.5))
    mean = (w * a).sum() / w.sum()
    std = ((w * (a - mean) ** 2).sum() / w.sum()).sqrt()
    assert abs(mean - 2 / 3) < 5e-3 and abs(std - 3**-0.5) < 5e-3
    assert abs(info["weights_share"] - 0.570889) < 3e-3 and info["weights_capped"] == 0
    assert abs(info["weights_mean"] - math.exp(-1 / 3) / 3**0.5) < 3e-3


def test_only_a_soft_baseline_weighs_states_alike():
    """Two states, two actions each, Q = (1, 0) and (5, 0), V = their mean: with or without the
    minibatch's softmax one state has 15.5 % of the weight and the other 84.5 %, though both have a
    best action; V = lambda log mean exp(Q / lambda) gives each half, and weights of mean 1."""
    q = torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    for softmax in (False, True):
        args = Args(extract="exp", normalise_weights=softmax)
        w, _ = pc.advantage_weights((q - q.mean(1, keepdim=True)).flatten(), args)
        share = w.view(2, 2).sum(1) / w.sum()
        assert torch.allclose(share, torch.tensor([0.155, 0.845]), atol=5e-4)
        soft = torch.logsumexp(q, 1, keepdim=True) - math.log(2)
        w, _ = pc.advantage_weights((q - soft).flatten(), args)
        assert torch.allclose(w.view(2, 2).mean(1), torch.ones(2), atol=1e-6)


@pytest.mark.parametrize("baseline", ["mean", "max", "soft"])
def test_the_likelihood_loss_is_its_formula(baseline):
    """w(Q - V) log pi at the data's actions, V from the actor's samples, or softly the clone's."""
    torch.manual_seed(9)
    flags = dict(extract="exp", temperature=0.3, advantage_samples=5, advantage_baseline=baseline)
    learner, batch = learner_of(**flags, num_critics=3), some_batch(40)
    state = torch.get_rng_state()
    loss, info = pc.likelihood_loss(learner, batch, learner.args)
    torch.set_rng_state(state)
    act, _ = (learner.clone if baseline == "soft" else learner.actor).sample(batch.obs, 5)
    q = torch.stack([learner.critic(batch.obs, act[:, k]).min(0).values for k in range(5)], 1)
    v = {"mean": q.mean(1), "max": q.max(1).values, "soft": 0.3 * (q / 0.3).exp().mean(1).log()}
    advantage = learner.critic(batch.obs, batch.act).min(0).values - v[baseline]
    logp = learner.actor.log_prob(learner.actor(batch.obs), batch.act[:, None])[:, 0]
    expected = -((advantage / 0.3).exp().clamp(max=100).detach() * logp).mean()
    assert torch.allclose(loss, expected, atol=1e-5)
    loss.backward()
    assert all(p.grad is None for net in (learner.critic, learner.clone) for p in net.parameters())


def test_the_cap_is_counted():
    args = Args(extract="exp", temperature=0.5, max_weight=10)
    w, info = pc.advantage_weights(torch.tensor([5.0, 0.0, 0.0, 0.0]), args)
    assert torch.allclose(w, torch.tensor([10.0, 1, 1, 1])) and info["weights_capped"] == 0.25
    assert abs(info["weights_share"] - 13**2 / (4 * 103)) < 1e-6


def learner_of(**settings) -> pc.Learner:
    args = Args(**{"width": 16, "depth": 1, "eval_episodes": 0} | settings)
    return pc.Learner(2, 1, args, CPU)


def constant_critic(learner):
    for net in (learner.critic, learner.target):
        for p in net.parameters():
            p.data.zero_()


def some_batch(n=256) -> pc.Batch:
    return pc.Batch(
        torch.randn(n, 2),
        torch.rand(n, 1) * 2 - 1,
        torch.randn(n),
        torch.randn(n, 2),
        torch.zeros(n),
    )


@pytest.mark.parametrize("constraint", ["kl", "forward-kl", "w2", "mmd"])
def test_where_q_is_silent_the_constraint_alone_moves_the_policy(constraint):
    """Learner.update with a tuned weight; the gradient of D is there (that of d3rlpy 2's BEAR
    cancels). The limit is the clone; of mmd with N = 4 it has 0.6 to 0.7 of its deviation."""
    torch.manual_seed(4)
    learner = learner_of(constraint=constraint, threshold=0.001, policy_lr=1e-2, q_lr=1e-12)
    constant_critic(learner)
    learner.clone, learner.actor = planted([0.5], [0.8]), planted([-0.5], [0.3])
    learner.optim["actor"] = torch.optim.Adam(learner.actor.parameters(), lr=1e-2)
    batch, before = some_batch(512), learner.log_weight.item()
    learner.update(lambda: batch._replace(rew=torch.zeros(512)), cloning=False)
    assert learner.log_weight.item() > before
    for step in range(600):
        if step == 300:
            learner.optim["actor"].param_groups[0]["lr"] = 1e-3
        learner.update(lambda: batch._replace(rew=torch.zeros(512)), cloning=False)
    mean, log_std, _ = learner.actor(batch.obs)
    ratio = log_std.exp().mean().item() / 0.8
    assert abs(mean.mean() - 0.5) < 0.05
    assert 0.55 < ratio < 0.75 if constraint == "mmd" else abs(ratio - 1) < 0.05


def test_the_gradient_loss_is_its_formula():
    """alpha log pi - min Q + weight D on planted networks, D in closed form."""
    torch.manual_seed(5)
    learner = learner_of(weight=3.0, alpha=0.2, num_critics=3)
    batch = some_batch()
    state = torch.get_rng_state()
    loss, info = pc.gradient_loss(learner, batch, learner.args)
    torch.set_rng_state(state)
    act, logp = learner.actor.sample(batch.obs, 1)
    q = torch.stack([learner.critic(batch.obs, act[:, 0])[i] for i in range(3)]).min(0).values
    d = pc.divergence(learner, learner.actor(batch.obs), batch.obs, learner.args)
    expected = (0.2 * logp[:, 0] - q + 3 * d).mean()
    assert abs(loss - expected) < 1e-5 and abs(info["divergence"] - d.mean()) < 1e-6


def test_the_targets_value():
    """The best of m samples by 3/4 min + 1/4 max over critics, less weight D(s')."""
    torch.manual_seed(6)
    learner = learner_of(backup_samples=5, min_share=0.75, where="value", weight=2.0)
    batch = some_batch(32)._replace(done=(torch.arange(32) % 4 == 0).float())
    state = torch.get_rng_state()
    next_act, y = pc.backup(learner, batch, learner.args)
    torch.set_rng_state(state)
    act, _ = learner.actor.sample(batch.next_obs, 5)
    d = pc.divergence(learner, learner.actor(batch.next_obs), batch.next_obs, learner.args)
    for i in range(32):
        q = [learner.target(batch.next_obs[i : i + 1], act[i : i + 1, k])[:, 0] for k in range(5)]
        mixed = torch.stack([0.75 * x.min() + 0.25 * x.max() for x in q])
        expected = batch.rew[i] + 0.99 * (1 - batch.done[i]) * (mixed.max() - 2 * d[i])
        assert abs(y[i] - expected) < 1e-5
        assert torch.equal(next_act[i], act[i, mixed.argmax()])


def test_brac_v_with_a_uniform_clone_is_sacs_soft_backup():
    """KL(pi || Unif) = E log pi + d log 2: targets differ by alpha gamma d log 2, row by row where
    both have the same action."""
    torch.manual_seed(7)
    common = dict(alpha=0.3, weight=0.3, behaviour_modes=2, divergence_samples=3)
    soft = learner_of(**common, backup_entropy=True)
    batch = some_batch(400)
    d = batch.act.shape[1]
    u = torch.randn(400, 1, d)
    soft.actor.draw = lambda modes, n, generator=None: u.expand(-1, n, -1)
    penalised = copy.copy(soft)
    penalised.args = Args(**vars(soft.args) | {"backup_entropy": False, "where": "value"})
    penalised.clone = copy.deepcopy(soft.clone)
    penalised.clone.density = lambda modes, u: torch.full(u.shape[:2], -d * math.log(2))
    y, penalised_y = (pc.backup(x, batch, x.args)[1] for x in (soft, penalised))
    expected = 0.3 * 0.99 * (1 - batch.done) * d * math.log(2)
    assert (y - penalised_y - expected).abs().max() < 1e-5 and y.std() > 0.1


class Slope(torch.nn.Module):
    """Q = -(u - 1)^2 / 2 of u = atanh(a)."""

    def forward(self, obs, act):
        return -0.5 * (torch.atanh(act.clamp(-1 + 1e-6, 1 - 1e-6)) - 1).pow(2).sum(-1)[None]


def best_gaussian(constraint: str, w: float, m: float, s: float) -> tuple[float, float]:
    """Mean and deviation of the pi that maximises E Q - w D for b = N(m, s): no slope is left."""
    if constraint == "kl":
        return (1 + w * m / s**2) / (1 + w / s**2), (w / (1 + w / s**2)) ** 0.5
    if constraint == "w2":
        return (1 + 2 * w * m) / (1 + 2 * w), 2 * w * s / (1 + 2 * w)
    v = s**2  # forward: 1 - mean = w (mean - m) / v, v^2 + w v = w (s^2 + (mean - m)^2)
    for _ in range(10_000):
        mean = (1 + w * m / v) / (1 + w / v)
        v = 0.5 * v + 0.5 * ((w**2 / 4 + w * (s**2 + (mean - m) ** 2)) ** 0.5 - w / 2)
    return mean, v**0.5


WEIGHTED = [(c, w) for c in ("kl", "forward-kl", "w2") for w in (0.5, 1e4)] + [("mmd", 1e4)]


@pytest.mark.parametrize("constraint, weight", WEIGHTED)
def test_the_policy_that_a_fixed_weight_allows(constraint, weight):
    """Where Q rises towards u = 1; of a large weight the clone, of mmd with N = 4 its narrower
    minimiser."""
    torch.manual_seed(9)
    learner = learner_of(constraint=constraint, weight=weight, divergence_samples=4)
    learner.critic, obs = Slope(), torch.randn(4_000, 2)
    learner.clone, learner.actor = planted([-0.4], [0.6]), planted([0.2], [0.4])
    batch, bias = some_batch(4_000)._replace(obs=obs), learner.actor.head.bias
    optim, found = torch.optim.Adam([bias], lr=0.02), []
    for step in range(500):
        optim.zero_grad()
        pc.gradient_loss(learner, batch, learner.args)[0].backward()
        optim.step()
        optim.param_groups[0]["lr"] = 0.02 * 0.99**step
        found += [bias.detach().clone()] * (step >= 400)
    mean, std = torch.stack(found).mean(0).tolist()
    std = math.exp(std)
    if constraint == "mmd":
        assert abs(mean + 0.4) < 0.05 and 0.6 < std / 0.6 < 0.7
        return
    expected = best_gaussian(constraint, weight, -0.4, 0.6)
    assert abs(mean - expected[0]) < 0.02 and abs(std - expected[1]) < 0.02
    assert weight < 1 or abs(expected[0] + 0.4) + abs(expected[1] - 0.6) < 1e-3


def test_weight_0_is_naive_sac():
    """Bitwise the updates of cql_continuous.py with --cql-alpha 0, from the same weights."""
    common = dict(width=16, depth=2, alpha=0.1, backup_entropy=True)
    ours = pc.Learner(2, 1, Args(**common, weight=0.0), CPU)
    theirs = cql.Learner(2, 1, cql.Args(**common, cql_alpha=0.0), CPU)
    for net in ("actor", "critic", "target"):
        mine, its = (list(getattr(x, net).parameters()) for x in (ours, theirs))
        for p, q in zip(mine, its, strict=True):
            q.data.copy_(p.data)
    rows = [some_batch() for _ in range(10)]
    for learner, kind in ((ours, pc.Batch), (theirs, cql.Batch)):
        torch.manual_seed(8)
        batches = iter([kind(*x) for x in rows])
        for _ in range(5):
            learner.update(lambda batches=batches: next(batches), cloning=False)
    for net in ("actor", "critic", "target"):
        mine, its = (list(getattr(x, net).parameters()) for x in (ours, theirs))
        assert all(torch.equal(p, q) for p, q in zip(mine, its))


def test_the_best_of_n_and_samples_of_an_evaluation():
    """The chosen action has the largest Q of its draws; evaluations draw no number of training."""
    learner = learner_of(act="best-of-n", candidates=7)
    obs, state = torch.randn(5, 2), torch.get_rng_state()
    learner.noise.manual_seed(3)
    chosen = learner.act(obs, explore=False)
    assert torch.equal(state, torch.get_rng_state())
    draws, _ = learner.actor.sample(obs, 7, torch.Generator().manual_seed(3))
    best = learner.least_q(obs, draws).argmax(1)
    assert torch.equal(chosen, draws[torch.arange(5), best])
    learner = learner_of(extract="best-of-n", act="best-of-n", candidates=7)
    assert learner.policy is learner.clone
    torch.manual_seed(3)
    draws, _ = learner.clone.sample(obs, 7)
    torch.manual_seed(3)
    best = learner.least_q(obs, draws).argmax(1)
    assert torch.equal(learner.act(obs, explore=True), draws[torch.arange(5), best])


# ------------------------------------------------------------------------------------ whole runs
FAST = """--env Point-v0 --num-updates 500 --behaviour-steps 150 --behaviour-lr 0.01 --width 32
--batch-size 128 --q-lr 0.003 --policy-lr 0.003 --tau 0.05 --gamma 0.9 --eval-frequency 0
--diagnostics-frequency 20"""


def run(words: str, data: str) -> dict:
    return train(tyro.cli(Args, args=shlex.split(f"{FAST} --dataset {data} {words}")))


VARIANTS = {  # with weights that fit a toy's rewards
    "BRAC-p": "--weight 0.1",
    "BRAC-v": "--where value --weight 0.1",
    "BEAR": """--constraint mmd --threshold 0.3 --backup-samples 10 --min-share 0.75
        --act best-of-n""",
    "forward KL": "--constraint forward-kl --weight 0.1",
    "Wasserstein": "--constraint w2 --threshold 1.0 --weight-lr 0.01",
    "a mixture": "--behaviour-modes 3 --weight 0.1",
    "AWAC": "--extract exp --temperature 0.1 --normalise-weights --advantage-samples 1",
    "exp, capped": "--extract exp --temperature 0.05 --max-weight 20",
    "CRR": "--extract binary --act best-of-n",
    "CRR, max": "--extract binary --advantage-baseline max --advantage-samples 2",
    "BCQ": """--extract best-of-n --act best-of-n --backup-samples 10 --min-share 0.75
        --candidates 50""",
    "naive": "--weight 0 --alpha auto",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns(name):
    """Random data earn about -10 on the line, going home -1.5."""
    out = run(VARIANTS[name], point_data("point.hdf5"))
    assert out["final_return_mean"] > -4 > out["dataset_return_mean"], out["final_return_mean"]


def test_cloning_gives_the_data_and_a_heavy_weight_stays_there():
    data = point_data("point.hdf5")
    clone = run("--behaviour-steps 500", data)
    near = run("--weight 1000", data)
    for out in (clone, near):
        assert abs(out["final_return_mean"] - out["dataset_return_mean"]) < 4
    assert near["verdict"] == "policy equals clone" and "--weight 100" in near["verdict_text"]
    assert near["bc_return_mean"] is not None


def test_verdicts_of_the_constraint():
    data = point_data("point.hdf5")
    out = run("--constraint mmd --threshold 0.001", data)
    assert out["verdict"] == "constraint not met"
    assert "of the clone itself" in out["verdict_text"]
    assert run("--threshold 0.001", data)["verdict"] == "constraint not met"
    assert run("--threshold 1000", data)["verdict"] == "constraint inactive"


MOMENTS = {  # what late diagnostics say of D, at --threshold 1: name, and what the sentence holds
    "met": ({"divergence": 1.09}, "no sign of trouble", ""),
    "not met": ({"divergence": 1.11}, "constraint not met", "--num-updates"),
    "floor": ({"divergence": 1.11, "divergence_floor": 0.95}, "constraint not met", "old 1.9"),
    "limit": ({"divergence": 1.11, "weight": 2.1e4}, "constraint not met", "limit: out of reach"),
    "low floor": ({"divergence": 1.11, "divergence_floor": 0.85}, "constraint not met", "--num-u"),
    "slack": ({"divergence": 0.51}, "no sign of trouble", ""),
    "inactive": ({"divergence": 0.49}, "constraint inactive", "--threshold 0.49"),
    "clone": ({"divergence": 1.0, "distance": 0.019}, "policy equals clone", "--threshold 10"),
    "diverged": ({"divergence": 0.4, "q_max": 1e9}, "divergence", "constraint inactive"),
    "on its way": ({"divergence": 1.2, "q_data": range(40)}, "too short to judge", "not met"),
}


@pytest.mark.parametrize("case", MOMENTS)
def test_judgement_of_planted_moments(case):
    numbers, name, words = MOMENTS[case]
    numbers = {"distance": 0.5, "weight": 3.0, "cql_gap": math.nan} | numbers
    found, sentence = pc.judge(curve(UP, **numbers), Args(threshold=1.0, num_updates=4_000), 1.0)
    assert found == name and words in sentence, sentence


def flags_of(advised: str) -> list[list[str]]:
    return [x.split() for x in advised.split(" or ")]


OTHERS = ["--weight 0 --behaviour-steps 0", "--extract best-of-n --act best-of-n"]


@pytest.mark.parametrize("words", [*VARIANTS.values(), *OTHERS])
def test_what_a_verdict_recommends_is_accepted(words, capsys):
    """And is not what the run had."""
    given = shlex.split(words)
    for factor in (3, 0.1):
        args = tyro.cli(Args, args=given)
        every = [*pc.advice(args).values(), pc.nearer(args, factor)]
        for flag in [flag for advised in every for flag in flags_of(advised)]:
            changed = tyro.cli(Args, args=given + flag)
            assert changed != args, flag
            if not flag[0] == "--extract":  # that goes with other flags
                pc.check(changed)


def test_that_all_updates_clone_is_said_where_it_is_so(capsys):
    for online_steps, said in ((0, True), (10, False)):
        pc.check(Args(num_updates=10, behaviour_steps=10, online_steps=online_steps))
        assert ("all updates of the policy are cloning" in capsys.readouterr().out) == said


@pytest.mark.parametrize("words", ["--weight 0.1", "--extract exp --temperature 0.1"])
def test_fine_tuning_goes_on_from_the_data(words):
    """From an offline phase that was far too short, on its own data alone."""
    words += " --num-updates 60 --behaviour-steps 30 --online-steps 500 --eval-episodes 3"
    words += " --offline-share 0"
    out = run(words, point_data("point.hdf5"))
    assert out["num_updates"] == 560
    assert out["bc_return_mean"] < -8 and out["final_return_mean"] > -4


def test_the_collector_is_that_of_cql_continuous(monkeypatch):
    """One file under one name, whichever script made it."""
    for script in (pc, cql):
        monkeypatch.setattr(script, "RANDOM_STEPS", 260)
        args = script.Args(
            collect_steps=300, num_updates=1, eval_episodes=0, data_dir=script.__name__
        )
        script.train(args)
    (one,), (two,) = (list(Path(x.__name__).iterdir()) for x in (pc, cql))
    assert one.name == two.name
    one, two = (pc.read_hdf5(x) for x in (one, two))
    assert all(np.array_equal(one[key], two[key]) for key in two)


@pytest.mark.parametrize("n", [40, 130])
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(n, tmp_path):
    """Stopped while cloning and after it; evaluations by samples have numbers of their own."""
    data = str(Path(point_data("point.hdf5")).absolute())
    words = f"{FAST} --num-updates 160 --behaviour-steps 80 --constraint mmd --threshold 0.2"
    words += f" --act sample --eval-frequency 15 --eval-episodes 2 --dataset {data}"
    words = words.replace("Point-v0", "test_cql_continuous_runs:Point-v0").split()
    here = {"PYTHONPATH": str(Path(__file__).parent)}
    for place in ("whole", "half"):
        (tmp_path / place).mkdir()
    run_script("policy_constraints.py", *words, cwd=tmp_path / "whole", env=here)
    half = {"cwd": tmp_path / "half", "env": one_thread() | here}
    done = stop_at("policy_constraints", "Learner.update", n, *words, **half)
    assert done.returncode == 143, done.stderr
    folder = only_run(tmp_path / "half")
    run_script("policy_constraints.py", "--resume", folder, cwd=tmp_path / "half", env=here)
    whole = only_run(tmp_path / "whole")
    assert_same_checkpoint(whole / "checkpoint.pt", folder / "checkpoint.pt")
    assert_same_checkpoint(whole / "selected.pt", folder / "selected.pt")
    assert metrics(whole) == metrics(folder)


IDLE = """--extract exp --weight 2 | --temperature 2 | --mmd-sigma 3 | --divergence-samples 9
--extract best-of-n | --extract best-of-n --act best-of-n --where value | --behaviour-steps 0
--extract exp --advantage-baseline soft --behaviour-steps 0
--constraint w2 --behaviour-modes 2 | --backup-entropy | --extract binary --normalise-weights
--candidates 4 | --extract exp --alpha 0.1 | --extract exp --normalise-weights --max-weight 3
--advantage-samples 2 | --action-low data --action-high data | --weight-lr 0.1
--extract exp --where value --threshold 0.3 | --num-critics 1 --min-share 0.5
--weight 0 --threshold 1 | --extract binary --advantage-baseline max --temperature 3"""


@pytest.mark.parametrize("words", [x.strip() for x in IDLE.replace("\n", "|").split("|")])
def test_what_would_be_ignored_is_refused(words, capsys):
    refused(capsys, lambda: train(tyro.cli(Args, args=words.split())))
    assert not list(Path().glob("runs/*"))


def test_the_commands_of_the_docstring_run(capsys):
    commands = [x.strip() for x in pc.__doc__.replace("\\\n", " ").splitlines() if "python" in x]
    assert len(commands) == 9
    for command in commands:
        args = tyro.cli(Args, args=shlex.split(command, comments=True)[2:])
        cloning = min(args.behaviour_steps, 2 if args.behaviour_steps <= 2_000 else 4)
        changes = dict(num_updates=4, behaviour_steps=cloning, collect_steps=1_005, width=8)
        if args.dataset:
            continue
        train(Args(**vars(args) | changes | dict(eval_episodes=1)))
        assert "verdict" in capsys.readouterr().out
