"""kfac_npg.py: Fisher matrices, Kronecker factors, solvers and trust region against independent answers; a
linear regulator against the Riccati equation; promises of its own, commands, learning. Advantage estimates
and rollouts are ppo.py's shared block, tested in test_ppo.py."""

import copy
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import kfac_npg as k
import numpy as np
import pytest
import test_ppo  # noqa: F401, its environments are registered there
import torch
import tyro
from conftest import ROOT, assert_same_checkpoint, metrics, one_thread, only_run, run_script

CPU = torch.device("cpu")
OBS = gym.spaces.Box(-np.inf, np.inf, (3,))
BOX, FOUR = gym.spaces.Box(-2, 2, (2,)), gym.spaces.Discrete(4)
SPACES = pytest.mark.parametrize("space", [BOX, FOUR], ids=["gaussian", "categorical"])
TINY = dict(
    total_timesteps=400, num_envs=2, num_steps=40, width=8, eval_episodes=2, eval_frequency=200
)
TINY |= dict(
    diagnostics_frequency=100, log_frequency=80, checkpoint_frequency=150, critic_updates=3
)


@pytest.fixture(autouse=True)
def double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def a_learner(space=BOX, obs_dim=3, **changes):
    args = k.Args(**dict(width=5, depth=1, log_std_init=-0.4) | changes)
    k.check(args)
    obs_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,))
    learner = k.Learner(obs_space, space, args, CPU)
    for p in learner.agent.actor.parameters():  # the small head and zero biases would hide mistakes
        p.data += 0.4 * torch.randn_like(p)
    return learner, args


def a_batch(agent, n=50, obs_dim=3):
    obs = torch.randn(n, obs_dim) * torch.linspace(0.5, 2, obs_dim)
    with torch.no_grad():
        head, value = agent(obs)
        act = agent.sample(head)
        logp = agent.log_prob(head, act)
    return k.Batch(obs, act, logp, torch.randn(n), value + torch.randn(n))


def kl_hessian(agent, obs):
    """The Fisher matrix as the Hessian of KL(old || new) at new = old, by double differentiation."""
    params = agent.policy_parameters()
    with torch.no_grad():
        head = agent.actor(obs)
        log_std = None if agent.discrete else agent.log_std.clone()
    kl = agent.kl(head, log_std, agent.actor(obs)).mean()
    slope = k.flat(torch.autograd.grad(kl, params, create_graph=True))
    options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    rows = [k.flat(torch.autograd.grad(x, params, **options)) for x in slope]
    return torch.stack(rows)


def homogeneous_order(net, layer):
    """Positions of [W b], row-major, of one layer among the flattened parameters W, b, W, b, ..."""
    start = sum(m.weight.numel() + m.bias.numel() for m in net.layers[:layer])
    m = net.layers[layer]
    w = start + torch.arange(m.weight.numel()).view_as(m.weight)
    b = start + m.weight.numel() + torch.arange(m.bias.numel())
    return torch.cat([w, b[:, None]], 1).flatten()


# ------------------------------------------------------------------------------------ Fisher matrices
@SPACES
def test_the_dense_fisher_is_the_hessian_of_the_kl(space):
    learner, _ = a_learner(space)
    obs = torch.randn(20, 3)
    F = k.dense_fisher(learner.agent, obs)
    H = kl_hessian(learner.agent, obs)
    if space is BOX:  # the KL of a Gaussian mixes mean and deviation nowhere at the optimum
        assert torch.allclose(F[-2:, -2:], 2 * torch.eye(2)) and (F[-2:, :-2] == 0).all()
    assert torch.allclose(F, H, atol=1e-10)


def test_the_dense_fisher_is_the_mean_outer_product_of_scores():
    """Categorical: the expectation over actions by enumeration."""
    learner, _ = a_learner(FOUR)
    agent, obs = learner.agent, torch.randn(6, 3)
    F = 0
    for x in obs:
        p = torch.softmax(agent.actor(x[None]), -1)[0].detach()
        for a in range(4):
            logp = agent.log_prob(agent.actor(x[None]), torch.tensor([a]))[0]
            score = k.flat(torch.autograd.grad(logp, agent.policy_parameters()))
            F = F + p[a] * torch.outer(score, score) / 6
    assert torch.allclose(k.dense_fisher(agent, obs), F, atol=1e-10)


@SPACES
def test_products_and_quadratics_are_those_of_the_dense_matrix(space):
    learner, _ = a_learner(space, depth=2)
    agent, obs = learner.agent, torch.randn(30, 3)
    F = k.dense_fisher(agent, obs)
    d = [torch.randn_like(p) for p in agent.policy_parameters()]
    assert torch.allclose(k.flat(k.fisher_product(agent, obs, d)), F @ k.flat(d), atol=1e-9)
    assert torch.allclose(k.quadratic(agent, obs, d), k.flat(d) @ F @ k.flat(d), rtol=1e-9)


@SPACES
def test_kl_is_torchs(space):
    learner, _ = a_learner(space)
    agent = learner.agent
    head, new = torch.randn(2, 40, 4 if space is FOUR else 2)
    log_std = None if space is FOUR else torch.tensor([0.3, -0.9])
    D = torch.distributions
    if space is FOUR:
        expected = D.kl_divergence(D.Categorical(logits=head), D.Categorical(logits=new))
    else:
        normals = D.Normal(head, log_std.exp()), D.Normal(new, agent.log_std.exp())
        expected = D.kl_divergence(*normals).sum(-1)
    assert torch.allclose(agent.kl(head, log_std, new), expected)


# ---------------------------------------------------------------------------------- Kronecker factors
def test_kronecker_identities():
    """What the docstring uses, for torch's row-major flatten."""
    A, S, G = torch.randn(4, 4), torch.randn(3, 3), torch.randn(3, 4)
    A, S = A @ A.T + torch.eye(4), S @ S.T + torch.eye(3)
    K = torch.kron(S, A)
    assert torch.allclose(K @ G.flatten(), (S @ G @ A).flatten())
    assert torch.allclose(torch.linalg.inv(K), torch.kron(torch.linalg.inv(S), torch.linalg.inv(A)))
    g, a = torch.randn(3), torch.randn(4)
    outer = torch.outer(g, a).flatten()
    assert torch.allclose(
        torch.outer(outer, outer), torch.kron(torch.outer(g, g), torch.outer(a, a))
    )


@SPACES
def test_for_one_state_each_block_is_exact(space):
    """B = 1 and one action: S (x) A is the outer product of that score's layer."""
    learner, _ = a_learner(space, depth=2)
    agent = learner.agent
    obs, record = torch.randn(1, 3), []
    head = agent.actor(obs, record)
    act = agent.sample(head.detach())
    factors = learner.policy_factors.factors(record, agent.log_prob(head, act).sum())
    logp = agent.log_prob(agent.actor(obs), act).sum()
    score = k.flat(torch.autograd.grad(logp, agent.policy_parameters()))
    for layer in range(3):
        part = score[homogeneous_order(agent.actor, layer)]
        block = torch.kron(factors[f"S{layer}"], factors[f"A{layer}"])
        assert torch.allclose(block, torch.outer(part, part), atol=1e-12)


def test_for_a_linear_gaussian_policy_the_expected_factors_are_exact():
    """S = 1 / sigma^2 whatever the state: A (x) S is the dense matrix. And sampled factors tend to it."""
    learner, _ = a_learner(BOX, depth=0, width=64)
    agent, obs = learner.agent, torch.randn(4096, 3)
    a = torch.cat([obs, torch.ones(4096, 1)], 1)
    S, A = torch.diag(torch.exp(-2 * agent.log_std)).detach(), a.T @ a / 4096
    order = homogeneous_order(agent.actor, 0)
    F = k.dense_fisher(agent, obs)[:-2, :-2][order][:, order]
    assert torch.allclose(F, torch.kron(S, A), atol=1e-10)
    record = []
    head = agent.actor(obs, record)
    factors = learner.policy_factors.factors(
        record, agent.log_prob(head, agent.sample(head.detach())).sum()
    )
    assert torch.allclose(factors["A0"], A) and (factors["S0"] - S).norm() / S.norm() < 0.1


def test_solve_is_the_inverse_of_the_damped_kronecker_product():
    learner, _ = a_learner(BOX, damping=0.3)
    agent, factors = learner.agent, learner.policy_factors
    batch, record = a_batch(agent), []
    head = agent.actor(batch.obs, record)
    factors.update(record, agent.log_prob(head, batch.act).sum())
    g = [torch.randn_like(p) for p in agent.actor.parameters()]
    d = factors.solve(g)
    for i, m in enumerate(agent.actor.layers):
        A, S = getattr(factors, f"A{i}"), getattr(factors, f"S{i}")
        pi = math.sqrt((A.trace() / len(A)) / (S.trace() / len(S)))
        A = A + pi * 0.3**0.5 * torch.eye(len(A))
        S = S + 0.3**0.5 / pi * torch.eye(len(S))
        vec = lambda x: torch.cat([x[2 * i], x[2 * i + 1][:, None]], 1).flatten()  # noqa: B023
        assert torch.allclose(torch.kron(S, A) @ vec(d), vec(g), atol=1e-9)
        assert len(vec(d)) == m.weight.numel() + m.bias.numel()


def test_undamped_steps_do_not_see_an_invertible_map_of_the_inputs():
    """x -> M x with first-layer weights W M^-1 is the same policy; K-FAC's step is the same function. (Of a
    Gaussian: the S of logits is singular, since adding a constant to them changes nothing.)"""
    torch.manual_seed(3)
    space = BOX
    learner, _ = a_learner(space, depth=1, damping=0.0)
    other, _ = a_learner(space, depth=1, damping=0.0)
    M = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 0.3], [1.0, 0.0, 3.0]])
    other.load_state_dict(learner.state_dict())
    first = other.agent.actor.layers[0]
    first.weight.data = first.weight.data @ torch.linalg.inv(M)
    batch = a_batch(learner.agent, 400)
    tangents, plain = [], []
    for x, obs in ((learner, batch.obs), (other, batch.obs @ M.T)):
        b = batch._replace(obs=obs)
        g = [*torch.autograd.grad(k.surrogate(x.agent, b, x.args), x.agent.policy_parameters())]
        torch.manual_seed(9)  # the same sampled actions
        tangents.append(k.tangent(x.agent.actor, obs, x.natural(b, g))[1])
        plain.append(k.tangent(x.agent.actor, obs, g)[1])
    assert torch.allclose(tangents[0], tangents[1], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(plain[0], plain[1], rtol=0.05)


def test_running_averages_and_refresh():
    learner, _ = a_learner(BOX, stats_decay=0.75, refresh=3)
    factors, seen, changes = learner.policy_factors, [], []
    for _ in range(7):
        batch = a_batch(learner.agent)
        a = torch.cat([batch.obs, torch.ones(50, 1)], 1)
        seen.append(a.T @ a / 50)
        before = factors.LA0.clone()
        g = [torch.ones_like(p) for p in learner.agent.policy_parameters()]
        learner.natural(batch, g)
        changes.append(not torch.equal(before, factors.LA0))
    expected = sum(seen[:4]) / 4  # weights 1, 1/2, 1/3, 1/4, then 1/4 for ever
    for x in seen[4:]:
        expected = 0.75 * expected + 0.25 * x
    assert torch.allclose(factors.A0, expected) and changes == [
        True,
        False,
        False,
        True,
        False,
        False,
        True,
    ]


def test_the_true_fisher_ignores_advantages_the_empirical_one_does_not():
    for empirical in (False, True):
        learner, _ = a_learner(BOX, empirical_fisher=empirical)
        batch = a_batch(learner.agent)
        g = [torch.ones_like(p) for p in learner.agent.policy_parameters()]
        results = []
        for scale in (1.0, 5.0):
            learner.policy_factors.count.zero_()
            torch.manual_seed(0)
            learner.natural(batch._replace(advantage=scale * batch.advantage), g)
            results.append(learner.policy_factors.S1.clone())
        assert torch.allclose(results[0] * (25 if empirical else 1), results[1])


def test_a_factor_that_is_not_positive_definite_raises_the_damping_and_says_so(capsys):
    learner, _ = a_learner(BOX, damping=1e-12)
    factors = learner.policy_factors
    record = []
    head = learner.agent.actor(torch.randn(50, 3), record)
    factors.update(record, head.sum())
    factors.A0.copy_(torch.diag(torch.tensor([1.0, 1.0, 1.0, -1e-3])))
    factors.S0.copy_(torch.eye(5))
    factors.factorise()
    assert factors.damping > 1e-6 and "damping raised to" in capsys.readouterr().out
    assert all(torch.isfinite(x).all() for x in factors.buffers())


def test_a_raised_damping_lasts_until_the_next_refresh():
    learner, _ = a_learner(BOX, damping=1e-3)
    factors, batch = learner.policy_factors, a_batch(learner.agent)
    factors.damping = 10.0
    learner.policy_step(batch)
    assert factors.damping == 1e-3


# -------------------------------------------------------------------------------- solvers, trust region
@SPACES
def test_conjugate_gradients_and_the_exact_solve_agree(space):
    learner, args = a_learner(space, solver="cg", cg_steps=60, damping=0.1)
    batch = a_batch(learner.agent)
    params = learner.agent.policy_parameters()
    g = [*torch.autograd.grad(k.surrogate(learner.agent, batch, args), params)]
    F = k.dense_fisher(learner.agent, batch.obs) + 0.1 * torch.eye(sum(p.numel() for p in params))
    expected = torch.linalg.solve(F, k.flat(g))
    error = (
        k.flat(learner.natural(batch, g)) - expected
    )  # residual 1e-6 |g|, F + 0.1 I at least 0.1
    assert error.norm() <= 1e-6 * k.flat(g).norm() / 0.1
    assert torch.allclose(k.flat(learner.exact(batch, g)), expected)
    ten = k.flat(replace_solver(learner, cg_steps=10).natural(batch, g))
    assert (ten - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_conjugate_gradients_stop_relative_to_the_gradient(scale):
    M, g, calls = torch.diag(torch.tensor([1.0, 2.0, 5.0])), torch.tensor([1.0, -1.0, 2.0]), []
    product = lambda d: calls.append(1) or [M @ d[0]]
    (d,) = k.conjugate_gradients(product, [scale * g], 10)
    assert torch.allclose(d / scale, torch.linalg.solve(M, g), rtol=1e-5) and len(calls) == 3


@pytest.mark.parametrize("last, g", [(-9.0, 1.0), (0.0, 0.0)])
def test_conjugate_gradients_stop_where_there_is_no_curvature(last, g):
    """A matrix that rounding made indefinite; a gradient of zeros."""
    M = torch.diag(torch.tensor([1.0, 1.0, last]))
    (d,) = k.conjugate_gradients(lambda d: [M @ d[0]], [g * torch.ones(3)], 10)
    assert (d == 0).all()


class Precisions(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes, for each matrix product and solve inside, the precision that it runs in."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "cholesky_solve"):
            self.seen.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@SPACES
def test_no_tf32_in_the_factors(space):
    """What --precision tf32 sets on a GPU is not in force where curvature is made or used."""
    learner, _ = a_learner(space)
    agent, factors, batch = learner.agent, learner.policy_factors, a_batch(learner.agent)
    torch.set_float32_matmul_precision("high")
    record = []
    logp = agent.log_prob(agent.actor(batch.obs, record), batch.act).sum()
    d = [torch.randn_like(p) for p in agent.policy_parameters()]
    calls = {
        "factors": lambda: factors.update(record, logp),
        "solve": lambda: factors.solve(d),
        "quadratic of the factors": lambda: factors.kronecker_quadratic(d),
        "quadratic": lambda: k.quadratic(agent, batch.obs, d),
        "product": lambda: k.fisher_product(agent, batch.obs, d),
        "dense": lambda: k.dense_fisher(agent, batch.obs),
    }
    for name, call in calls.items():
        with Precisions() as noted:
            call()
        assert noted.seen and set(noted.seen) == {"highest"}, (name, noted.seen)
        assert torch.get_float32_matmul_precision() == "high", name


def test_explained_variance_is_finite_where_nothing_varies():
    args = tiny()
    envs = k.make_train_envs(args)
    learner = k.Learner(envs.single_observation_space, envs.single_action_space, args, CPU)
    r, _ = k.Player(envs, 0).collect(learner, args)
    info = learner.update(r._replace(rew=r.rew * 0, value=r.value * 0))
    assert all(torch.isfinite(x) for x in info.values()), info


def test_reset_rows_reach_neither_batch_nor_factors_and_a_time_out_bootstraps(monkeypatch):
    """Counting: episode e lasts 3 + e % 3 steps, even ones terminate, odd ones time out. With lambda 0 the
    target is r + gamma V(true last observation) after a time-out, r after a termination."""
    args = tiny(env_id="PPOCounting-v0", gae_lambda=0.0)
    envs = k.make_train_envs(args)
    learner = k.Learner(envs.single_observation_space, envs.single_action_space, args, CPU)
    r, _ = k.Player(envs, 0).collect(learner, args)
    batch, valid = learner.batch_of(r), r.valid.flatten()
    assert len(batch.obs) == int(valid.sum()) < len(valid)
    length = 3 + batch.obs[:, 0] % 3
    assert (batch.obs[:, 1] < length).all(), "a final observation was acted upon"
    last = batch.obs.clone()
    last[:, 1] += 1
    ends = (last[:, 1] == length) & (batch.obs[:, 0] % 2 == 0)
    expected = (
        last[:, 1] + args.gamma * learner.agent.critic(last)[:, 0] * ~ends
    )  # the reward is the time
    assert torch.allclose(batch.target, expected, atol=1e-4)
    rows, update = [], k.KFAC.update
    monkeypatch.setattr(k.KFAC, "update", lambda self, record, *a: rows.append(len(record[0][0])) or update(
        self, record, *a
    ))  # fmt: skip
    learner.update(r)
    assert rows == [int(valid.sum())] * (1 + args.critic_updates)


def replace_solver(learner, **changes):
    learner.args = replace(learner.args, **changes)
    return learner


@SPACES
@pytest.mark.parametrize("solver", ["kfac", "cg", "exact"])
@pytest.mark.parametrize("delta", [1e-4, 1e-3, 1e-2])
def test_predicted_and_measured_kl_agree(space, solver, delta):
    """2 % for the exact Fisher matrix, solved densely or by conjugate gradients. K-FAC's direction is another
    one: 2 % of the mean of a step and its opposite, whose odd terms cancel, and 8 % of a side at 0.01."""
    measured = []
    for sign in (1, -1):
        torch.manual_seed(0)
        damping = {} if solver == "kfac" else {"damping": 0.1}
        args = k.Args(solver=solver, max_kl=delta, width=32, log_std_init=-0.4, **damping)
        learner = k.Learner(OBS, space, args, CPU)
        batch = a_batch(learner.agent, 1000)
        act = batch.act if space is FOUR else batch.act.sum(-1)
        good = act * batch.obs[:, 0].sin() + batch.obs[:, 1]
        natural = learner.natural
        learner.natural = lambda b, g: [sign * x for x in natural(b, g)]  # noqa: B023
        info = learner.policy_step(batch._replace(advantage=(good - good.mean()) / good.std()))
        assert abs(float(info["kl_predicted"]) / delta - 1) < 1e-6 and (info["gain"] > 0) == (
            sign > 0
        )
        measured.append(float(info["kl"]) / delta)
    assert abs(sum(measured) / 2 - 1) < 0.02
    assert max(abs(x - 1) for x in measured) < (
        0.025 + 0.6 * delta**0.5 if solver == "kfac" else 0.02
    )


def test_the_log_deviations_step():
    """Their Fisher matrix is 2 I: d = g / (2 + damping), and no layer's factor is involved."""
    learner, args = a_learner(BOX, damping=0.5)
    batch = a_batch(learner.agent)
    g = [
        *torch.autograd.grad(
            k.surrogate(learner.agent, batch, args), learner.agent.policy_parameters()
        )
    ]
    assert torch.allclose(learner.natural(batch, g)[-1], g[-1] / 2.5)


@pytest.mark.parametrize("kl, sign", [(0.0, -1), (math.inf, 1)])
def test_the_line_search_refuses_what_does_not_help_or_goes_too_far(kl, sign):
    """A step against the gradient, or one whose KL is too large at any length: 15 trials, then the policy
    stays as it was."""
    learner, _ = a_learner(BOX, line_search=True)
    batch = a_batch(learner.agent)
    learner.agent.kl = lambda head, log_std, new: torch.full((len(head),), kl)
    before = k.flat(learner.agent.policy_parameters()).detach().clone()
    natural = learner.natural
    learner.natural = lambda batch, g: [sign * x for x in natural(batch, g)]
    info = learner.policy_step(batch)
    assert torch.equal(k.flat(learner.agent.policy_parameters()).detach(), before)
    assert info["backtracks"] == 14
    for name in ("step_scale", "gain", "gain_predicted", "kl", "kl_predicted", "kl_kfac"):
        assert info[name] == 0, name


def test_what_is_logged_is_of_the_step_that_was_taken():
    learner, args = a_learner(BOX, line_search=True, max_kl=1e-3)
    batch, agent = a_batch(learner.agent), learner.agent
    params, kl, calls = agent.policy_parameters(), agent.kl, []
    before = [p.detach().clone() for p in params]
    g = [*torch.autograd.grad(k.surrogate(agent, batch, args), params)]
    natural, taken = learner.natural, []
    learner.natural = lambda batch, g: taken.extend(natural(batch, g)) or taken
    agent.kl = lambda *a: (
        kl(*a) + (len(calls) < 2) * (calls.append(1) or 1.0)
    )  # two trials are too far
    info = learner.policy_step(batch)
    scale = info["step_scale"]
    assert info["backtracks"] == 2 and 0 < info["kl"] <= args.max_kl
    for p, old, x in zip(params, before, taken):
        assert torch.allclose(p, old + scale * x)
    assert torch.allclose(info["kl_predicted"], torch.tensor(args.max_kl * 0.8**4))
    assert torch.allclose(info["gain_predicted"], scale * k.flat(g) @ k.flat(taken))
    own, factors = 2 * (taken[-1] ** 2).sum(), learner.policy_factors
    for i in range(2):
        d = torch.cat([taken[2 * i], taken[2 * i + 1][:, None]], 1).flatten()
        own = own + d @ torch.kron(getattr(factors, f"S{i}"), getattr(factors, f"A{i}")) @ d
    assert torch.allclose(info["kl_kfac"], 0.5 * scale**2 * own)


def test_the_line_search_keeps_to_the_trust_region():
    learner, _ = a_learner(
        FOUR, solver="cg", line_search=True, max_kl=0.5, cg_steps=10, damping=1e-6
    )
    info = learner.policy_step(a_batch(learner.agent))
    assert 0 < info["kl"] <= 0.5 and info["gain"] > 0


def test_solver_none_is_adam_on_the_policy_gradient():
    learner, args = a_learner(BOX, solver="none", learning_rate=0.01, ent_coef=0.1)
    batch = a_batch(learner.agent)
    params = [p.detach().clone().requires_grad_() for p in learner.agent.policy_parameters()]
    head = learner.agent.actor(batch.obs)
    loss = -(batch.advantage * learner.agent.log_prob(head, batch.act)).mean()
    loss = loss - 0.1 * learner.agent.entropy(head).mean()
    grads = torch.autograd.grad(loss, learner.agent.policy_parameters())
    optim = torch.optim.Adam(params, lr=0.01)
    for p, g in zip(params, grads):
        p.grad = g
    optim.step()
    learner.policy_step(batch)
    for p, expected in zip(learner.agent.policy_parameters(), params):
        assert torch.allclose(p, expected, atol=1e-6)


def test_cosines_in_the_fisher_inner_product():
    learner, args = a_learner(BOX, width=8)
    batch, before = a_batch(learner.agent, 300), copy.deepcopy(learner.agent)
    params = learner.agent.policy_parameters()
    g = k.flat(torch.autograd.grad(k.surrogate(learner.agent, batch, args), params))
    F = k.dense_fisher(learner.agent, batch.obs)
    out = learner.policy_step(batch, diagnosing=True)  # of the policy before the step
    best = torch.linalg.solve(F + args.damping * torch.eye(len(F)), g)
    cosine = lambda x: float(x @ F @ best / ((x @ F @ x) * (best @ F @ best)).sqrt())
    assert abs(out["fisher_cosine_gradient"] - cosine(g)) < 1e-9
    grads = [*torch.autograd.grad(k.surrogate(before, batch, args), before.policy_parameters())]
    d = learner.policy_factors.solve(grads) + [grads[-1] / (2 + args.damping)]
    assert abs(out["fisher_cosine_kfac"] - cosine(k.flat(d))) < 1e-9 and cosine(k.flat(d)) > 0.3
    buffers = dict(learner.policy_factors.named_buffers())
    damped = [L @ L.T for name, L in buffers.items() if name.startswith("L")]
    assert len(damped) == 4 and torch.allclose(damped[0] - buffers["A0"], (damped[0] - buffers["A0"])[0, 0]
                                               * torch.eye(len(damped[0])), atol=1e-9)  # fmt: skip
    assert (
        abs(out["policy_condition"] / max(float(torch.linalg.cond(x)) for x in damped) - 1) < 1e-6
    )
    assert abs(out["critic_condition"] - 1) < 1e-9  # the critic has not stepped yet


def test_the_critic_of_a_linear_value_is_least_squares_in_one_step():
    """Gauss-Newton is exact there, and the best multiple undoes the damping's shortening."""
    learner, _ = a_learner(BOX, depth=0, width=64, critic_damping=1e-9)
    batch = a_batch(learner.agent, 200)
    learner.critic_step(batch)
    X = torch.cat([batch.obs, torch.ones(200, 1)], 1)
    fit = X @ torch.linalg.lstsq(X, batch.target[:, None]).solution[:, 0]
    assert torch.allclose(learner.agent.critic(batch.obs)[:, 0], fit, atol=1e-4)


def test_the_critics_factors_are_of_the_value_not_of_its_error():
    """Gauss-Newton: for one row S (x) A of a layer is the outer product of dV/d[W b]; the error, which is
    large here, is no part of it."""
    learner, _ = a_learner(BOX, width=6, depth=2)
    batch = a_batch(learner.agent, 1)
    batch = batch._replace(target=batch.target + 30)
    critic, factors = learner.agent.critic, learner.critic_factors
    slopes = torch.autograd.grad(critic(batch.obs).sum(), [*critic.parameters()])
    learner.critic_step(batch)
    for i in range(3):
        slope = torch.cat([slopes[2 * i], slopes[2 * i + 1][:, None]], 1).flatten()
        block = torch.kron(getattr(factors, f"S{i}"), getattr(factors, f"A{i}"))
        assert torch.allclose(block, torch.outer(slope, slope))


@pytest.mark.parametrize("solver", ["kfac", "adam"])
def test_the_critics_loss_falls(solver):
    learner, _ = a_learner(BOX, width=32, depth=2, critic_solver=solver)
    batch = a_batch(learner.agent, 300)._replace(target=torch.randn(300).cumsum(0) / 10)
    losses = [float(learner.critic_step(batch)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    if solver == "kfac":
        assert all(b < a * 1.02 for a, b in zip(losses, losses[1:]))


# ------------------------------------------------------------------------ linear quadratic regulator
A, B, R, GAMMA = (
    np.array([[1.0, 0.2], [-0.1, 0.9]]),
    np.array([[0.0], [0.5]]),
    np.array([[0.5]]),
    0.9,
)


def riccati():
    """The optimal gain of x' = A x + B u at cost x^T x + u^T R u, discounted: u = -K x."""
    P = np.eye(2)
    for _ in range(2000):
        K = np.linalg.solve(R + GAMMA * B.T @ P @ B, GAMMA * B.T @ P @ A)
        P = np.eye(2) + GAMMA * A.T @ P @ (A - B @ K)
    return K


def q_values(W, b, x, u):
    """-Q(x, u) up to a constant, exactly, for the policy u = W x + b + noise: x^T x + u^T R u +
    gamma z'^T P z' with z = (x, 1), where P solves P = M + gamma T^T P T for the closed loop T."""
    Wb = np.hstack([W, b[:, None]])
    A1, B1 = (
        np.block([[A, np.zeros((2, 1))], [np.zeros((1, 2)), np.eye(1)]]),
        np.vstack([B, [[0.0]]]),
    )
    T, M = A1 + B1 @ Wb, np.diag([1.0, 1.0, 0.0]) + Wb.T @ R @ Wb
    P = np.linalg.solve(np.eye(9) - GAMMA * np.kron(T.T, T.T), M.flatten()).reshape(3, 3)
    after = np.hstack([x, np.ones((len(x), 1))]) @ A1.T + u @ B1.T
    return (x**2).sum(1) + (u @ R * u).sum(1) + GAMMA * ((after @ P) * after).sum(1)


@pytest.mark.parametrize("solver", ["kfac", "cg", "exact"])
def test_the_gain_of_a_linear_policy_reaches_the_riccati_solution(solver):
    """Seed 004: policy gradients converge globally for linear systems. Exact advantages, sampled actions."""
    args = k.Args(solver=solver, depth=0, log_std_init=-0.5, damping=1e-3)
    box, rng = gym.spaces.Box(-np.inf, np.inf, (2,)), np.random.default_rng(0)
    learner = k.Learner(box, gym.spaces.Box(-9, 9, (1,)), args, CPU)
    (layer,) = learner.agent.actor.layers
    layer.weight.data, layer.bias.data = (
        torch.tensor([[0.1, 0.1]]),
        torch.tensor([0.5]),
    )  # worse than nothing
    for step in range(300):
        learner.args = replace(args, max_kl=0.02 if step < 200 else 5e-4)
        x = rng.normal(size=(1000, 2))
        obs = torch.from_numpy(x)
        with torch.no_grad():
            act = learner.agent.sample(learner.agent.actor(obs))
            logp = learner.agent.log_prob(learner.agent.actor(obs), act)
        W, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        advantage = q_values(W, b, x, x @ W.T + b) - q_values(W, b, x, act.numpy())
        learner.policy_step(
            k.Batch(obs, act, logp, torch.from_numpy(advantage / advantage.std()), logp)
        )
    K = riccati()
    assert np.abs(K).min() > 0.4 and np.abs(W + K).max() < 0.03 and abs(b[0]) < 0.03, (W, -K, b)


# ------------------------------------------------------------------------- promises, mistakes, learning
def tiny(**changes):
    torch.set_default_dtype(torch.float32)
    return k.Args(**TINY | changes)


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path):
    line = [
        "--env",
        "Hopper-v5",
        "--normalize-obs",
        "--normalize-reward",
        "--total-timesteps",
        700,
        "--num-steps",
        50,
        "--width",
        16,
    ]
    line += ["--log-frequency", 60, "--eval-frequency", 200, "--eval-episodes", 1, "--refresh", 2]
    line += ["--checkpoint-frequency", 200, "--diagnostics-frequency", 150]
    for part in ("whole", "parts"):
        (tmp_path / part).mkdir()
    run_script("kfac_npg.py", *line, cwd=tmp_path / "whole")
    code = f"""
import os, sys, signal
sys.path.insert(0, {str(ROOT)!r})
import kfac_npg as k, tyro
collect, count = k.Player.collect, [0]
def counted(*a):
    count[0] += 1
    if count[0] == 2: os.kill(os.getpid(), {int(signal.SIGTERM)})
    return collect(*a)
k.Player.collect = counted
k.train(tyro.cli(k.Args, args={[str(x) for x in line]!r}))
"""
    options = dict(
        cwd=tmp_path / "parts", capture_output=True, text=True, env=one_thread(), timeout=180
    )
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 143 and "to go on" in done.stdout, done.stdout + done.stderr
    run = only_run(tmp_path / "parts")
    time.sleep(1.1)
    run_script("kfac_npg.py", *line, "--resume", run, cwd=tmp_path / "parts")
    whole = only_run(tmp_path / "whole")
    assert_same_checkpoint(run / "checkpoint.pt", whole / "checkpoint.pt")
    assert metrics(run) == metrics(whole) and len(metrics(run)) > 60


@pytest.mark.parametrize("solver", ["kfac", "cg", "exact", "none"])
def test_diagnostics_logging_and_evaluation_change_nothing(solver):
    on = tiny(exp_name="on", solver=solver)
    off = replace(on, exp_name="off", eval_episodes=0, diagnostics_frequency=0, log_frequency=10**6)
    for args in (on, replace(off, checkpoint_frequency=0)):
        k.train(args)
    runs = {p.name.split("__")[1]: p for p in Path("runs").iterdir()}
    a, b = (torch.load(runs[x] / "checkpoint.pt", weights_only=True) for x in ("on", "off"))
    assert all(
        torch.equal(v, b["learner"]["networks"][n]) for n, v in a["learner"]["networks"].items()
    )
    assert torch.equal(a["random"]["cpu"], b["random"]["cpu"])
    tags = {tag for _, tag, _ in metrics(runs["on"])}
    expected = {
        "losses/policy_loss",
        "losses/value_loss",
        "diagnostics/kl",
        "diagnostics/srank_policy",
    }
    if solver == "kfac":
        expected |= {
            "diagnostics/kl_kfac",
            "diagnostics/policy_condition",
            "diagnostics/fisher_cosine_kfac",
        }
    assert expected <= tags


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_non_finite_parameters_never_reach_the_sampler(env_id, monkeypatch, capsys):
    update = k.Learner.update

    def poisoned(self, *args):
        info = update(self, *args)
        self.agent.actor.layers[-1].bias.data[0] = math.nan
        return info

    monkeypatch.setattr(k.Learner, "update", poisoned)
    with pytest.raises(SystemExit) as stop:
        k.train(tiny(env_id=env_id, log_frequency=10**6, eval_episodes=0, diagnostics_frequency=0))
    assert stop.value.code == 3 and "actor.layers.2.bias is not finite" in capsys.readouterr().err


def test_a_finished_run_resumed_is_left_as_it_is(capsys):
    first = k.train(tiny(depth=1, eval_episodes=0))
    run = only_run(".")
    files = lambda: {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.glob("*.*")}
    before = files()
    assert k.train(tiny(depth=1, eval_episodes=2, resume=str(run))) == first and files() == before
    assert "complete" in capsys.readouterr().out
    assert k.train(tiny(depth=1, total_timesteps=600, resume=str(run)))["global_step"] >= 600


def test_the_dense_matrix_is_reserved_before_it_is_made(monkeypatch):
    sizes, reserve = {}, k.reserve
    monkeypatch.setattr(
        k, "reserve", lambda n, what, device: sizes.update({what: n}) or reserve(n, what, device)
    )
    k.train(tiny(solver="exact", total_timesteps=80, eval_episodes=0))
    n = (
        (4 * 8 + 8) + (8 * 8 + 8) + (8 * 2 + 2)
    )  # CartPole: 4 numbers, 2 actions; two hidden layers of 8
    assert sizes["exact Fisher matrix, roughly"] == 4 * (2 * 80 * 2 * n + 4 * n * n)


BAD = [
    (["--env", "NoSuch-v1"], "NoSuch"),
    (["--max-kl", "0"], "--max-kl"),
    (["--damping", "nan"], "--damping"),
    (["--solver", "none", "--max-kl", "0.1"], "--max-kl"),
    (["--learning-rate", "0.1"], "--learning-rate"),
    (["--solver", "cg", "--refresh", "3"], "--refresh"),
    (["--cg-steps", "3"], "--cg-steps"),
    (["--critic-lr", "0.1"], "--critic-lr"),
    (["--depth", "0", "--width", "8"], "--width"),
    (["--resume", "nowhere"], "nowhere"),
    (["--num-steps", "3"], "--num-steps"),
    (["--seed", "1000001"], "--seed"),
    (["--solver", "exact", "--width", "512"], "exact Fisher matrix"),
]


@pytest.mark.parametrize("line, named", BAD, ids=[" ".join(x[0]) for x in BAD])
def test_a_users_mistake_is_one_line_and_status_2(line, named, capsys):
    with pytest.raises(SystemExit) as stop:
        k.train(tyro.cli(k.Args, args=line))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and named in err and err.strip().count("\n") == 0
    assert not Path("runs").exists()


def documented_commands() -> list:
    commands = []
    for file in ("README.md", "benchmarks/README.md", "kfac_npg.py"):
        text = (ROOT / file).read_text().replace("\\\\\n", " ").replace("\\\n", " ")
        text = text if file.endswith(".md") else text.split('"""')[1]
        commands += re.findall(r"python kfac_npg\.py[^\n`#&|;]*", text)
    return sorted({" ".join(c.split()) for c in commands})


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_run(command):
    """Parsed as written, then cut to a few short rollouts."""
    torch.set_default_dtype(torch.float32)
    args = tyro.cli(k.Args, args=shlex.split(command)[2:])
    short = dict(total_timesteps=60, num_steps=16, eval_episodes=1, critic_updates=2)
    assert k.train(replace(args, **short))["global_step"] >= 60


def test_a_documented_command_shows_the_cosine():
    """--solver kfac, and a network small enough for the exact direction beside it."""
    torch.set_default_dtype(torch.float32)
    shown = 0
    for command in documented_commands():
        args = tyro.cli(k.Args, args=shlex.split(command)[2:])
        envs = k.make_train_envs(args)
        learner = k.Learner(envs.single_observation_space, envs.single_action_space, args, CPU)
        size = len(k.flat(learner.agent.policy_parameters()))
        shown += args.solver == "kfac" and args.diagnostics_frequency > 0 and size <= 2000
    assert shown


def test_kfac_learns_cartpole():
    """Balancing by chance lasts about 20 steps, the limit is 500."""
    torch.set_default_dtype(torch.float32)
    args = k.Args(total_timesteps=25_000, eval_frequency=0, diagnostics_frequency=0)
    assert k.train(args)["final_return_mean"] > 300


@pytest.mark.parametrize(
    "more",
    [
        {},
        dict(solver="cg", line_search=True, damping=0.1),
        dict(solver="exact", width=8, damping=0.1),
        dict(solver="none", learning_rate=0.02),
    ],
    ids=["kfac", "trpo", "exact", "none"],
)
def test_every_solver_learns_a_continuous_target(more):
    """-(a - 0.7 s)^2: from -0.49 at a = 0 to near 0; mean +-0.7."""
    torch.set_default_dtype(torch.float32)
    args = dict(
        env_id="Target-v0", total_timesteps=8_000, num_envs=8, num_steps=64, log_std_init=-0.7
    )
    args |= dict(eval_frequency=0, diagnostics_frequency=0)
    assert k.train(k.Args(**args | more))["final_return_mean"] > -0.03


def test_without_damping_there_is_no_exact_direction_to_compare_with():
    """The Fisher matrix of a softmax is singular."""
    for damping in (0.0, 0.01):
        learner, _ = a_learner(gym.spaces.Discrete(3), width=8, damping=damping)
        out = learner.policy_step(a_batch(learner.agent, 300), diagnosing=True)
        assert ("fisher_cosine_kfac" in out) == (damping > 0) and out["policy_condition"] > 1
