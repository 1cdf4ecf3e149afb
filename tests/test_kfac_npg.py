"""kfac_npg.py: Fisher matrices, Kronecker factors, solvers and trust region against independent
answers; a linear regulator against the Riccati equation; promises of its own, commands, learning.
The rollouts are ppo.py's shared block, tested in test_ppo.py."""

import copy
import inspect
import math
import re
import shlex
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import kfac_npg as k
import numpy as np
import pytest
import torch
import tyro
from conftest import (
    ROOT,
    assert_equal,
    assert_same_checkpoint,
    load,
    metrics,
    only_run,
    refused,
    run_script,
    stop_at,
)
from torch import nn

OBS, BOX = gym.spaces.Box(-np.inf, np.inf, (3,)), gym.spaces.Box(-2, 2, (2,))
FOUR = gym.spaces.Discrete(4)
SPACES = pytest.mark.parametrize("space", [BOX, FOUR], ids=["gaussian", "categorical"])
TINY = dict(total_timesteps=400, num_envs=2, num_steps=40, width=8, critic_updates=3)
TINY |= dict(eval_episodes=2, eval_frequency=150, log_frequency=80, checkpoint_frequency=150)
SILENT = dict(eval_episodes=0, eval_frequency=0, log_frequency=10**6)


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def train(args: k.Args) -> dict:
    torch.set_default_dtype(torch.float32)
    return k.train(args)


def a_learner(space=BOX, obs_space=OBS, **changes):
    args = k.Args(**dict(width=5, depth=1, log_std_init=-0.4) | changes)
    k.check(args)
    return k.Learner(obs_space, space, args, torch.device("cpu"))


def a_case(space=BOX, n=50, **changes):
    """A learner, its agent, a batch and its gradient; the small head and the zero biases, which
    hide mistakes, are stirred."""
    learner = a_learner(space, **changes)
    agent = learner.agent
    for p in agent.actor.parameters():
        p.data += 0.4 * torch.randn_like(p)
    obs = torch.randn(n, 3) * torch.linspace(0.5, 2, 3)
    with torch.no_grad():
        head, value = agent(obs)
        act = agent.sample(head)
        logp = agent.log_prob(head, act)
    batch = k.Batch(obs, act, logp, torch.randn(n), value + torch.randn(n))
    return learner, agent, batch, gradient(learner, batch)


def gradient(learner, batch) -> list:
    objective = k.surrogate(learner.agent, batch, learner.args)
    return [*torch.autograd.grad(objective, learner.agent.policy_parameters())]


def blocks(factors, net) -> list:
    """S (x) A of each layer, and where its [W b], row-major, stands among flattened W, b, W, b."""
    out, start = [], 0
    for m, (A, S) in zip(net[::2], factors.factors(), strict=True):
        w = start + torch.arange(m.weight.numel()).view_as(m.weight)
        start += m.weight.numel() + m.out_features
        b = torch.arange(start - m.out_features, start)
        out.append((torch.kron(S, A), torch.cat([w, b[:, None]], 1).flatten()))
    return out


# -------------------------------------------------------------------------------- Fisher matrices
@SPACES
def test_the_dense_fisher_is_the_hessian_of_the_kl(space):
    """Of KL(old || new) at new = old, by double differentiation; products are the matrix's."""
    _, agent, (obs, *_), d = a_case(space, depth=2, n=20)
    params = agent.policy_parameters()
    log_std = None if agent.discrete else agent.log_std.detach().clone()
    kl = agent.kl(agent.actor(obs).detach(), log_std, agent.actor(obs)).mean()
    slope = k.flat(torch.autograd.grad(kl, params, create_graph=True))
    options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    H = torch.stack([k.flat(torch.autograd.grad(x, params, **options)) for x in slope])
    assert torch.allclose(k.dense_fisher(agent, obs), H, atol=1e-10)
    damped = k.flat(k.fisher_product(agent, obs, d, 0.3))
    assert torch.allclose(damped, H @ k.flat(d) + 0.3 * k.flat(d), atol=1e-9)
    assert torch.allclose(k.quadratic(agent, obs, d), k.flat(d) @ H @ k.flat(d), rtol=1e-9)


def test_the_dense_fisher_is_the_mean_outer_product_of_scores():
    """Categorical: the expectation over actions by enumeration."""
    _, agent, (obs, *_), _ = a_case(FOUR, n=6)
    F = 0
    for x in obs:
        p = torch.softmax(agent.actor(x[None]), -1)[0].detach()
        for a in range(4):
            logp = agent.log_prob(agent.actor(x[None]), torch.tensor([a]))[0]
            score = k.flat(torch.autograd.grad(logp, agent.policy_parameters()))
            F = F + p[a] * torch.outer(score, score) / 6
    assert torch.allclose(k.dense_fisher(agent, obs), F, atol=1e-10)


@SPACES
def test_kl_is_torchs(space):
    agent, D = a_learner(space).agent, torch.distributions
    head, new = torch.randn(2, 40, 4 if space is FOUR else 2)
    log_std = None if space is FOUR else torch.tensor([0.3, -0.9])
    if space is FOUR:
        expected = D.kl_divergence(D.Categorical(logits=head), D.Categorical(logits=new))
    else:
        normals = D.Normal(head, log_std.exp()), D.Normal(new, agent.log_std.exp())
        expected = D.kl_divergence(*normals).sum(-1)
    assert torch.allclose(agent.kl(head, log_std, new), expected)


# ------------------------------------------------------------------------------ Kronecker factors
@SPACES
def test_for_one_state_each_block_is_exact(space):
    """B = 1 and one action: S (x) A is the outer product of that score's layer."""
    learner, agent, (obs, act, *_), _ = a_case(space, depth=2, n=1)
    factors = learner.policy_factors
    factors.update(agent.log_prob(factors.record(agent.actor, obs), act).sum())
    logp = agent.log_prob(agent.actor(obs), act).sum()
    score = k.flat(torch.autograd.grad(logp, agent.policy_parameters()))
    for block, order in blocks(factors, agent.actor):
        assert torch.allclose(block, torch.outer(score[order], score[order]), atol=1e-12)


def test_for_a_linear_gaussian_policy_the_expected_factors_are_exact():
    """S = 1 / sigma^2 whatever the state: S (x) A is the dense matrix. Sampled factors tend to it;
    the batch's own actions and advantages are no part of them. The log-deviations have 2 I."""
    learner, agent, batch, g = a_case(n=4096, depth=0, damping=0.5)
    a = torch.cat([batch.obs, torch.ones(4096, 1)], 1)
    S, A = torch.diag(torch.exp(-2 * agent.log_std)).detach(), a.T @ a / 4096
    far = batch._replace(act=5 + batch.act, advantage=9 * batch.advantage)
    d = learner.natural(far, g)
    ((sampled_A, sampled_S),) = learner.policy_factors.factors()
    assert torch.allclose(sampled_A, A) and (sampled_S - S).norm() / S.norm() < 0.1
    ((_, order),) = blocks(learner.policy_factors, agent.actor)
    F = k.dense_fisher(agent, batch.obs)[order][:, order]
    assert torch.allclose(F, torch.kron(S, A), atol=1e-10)
    assert torch.allclose(d[-1], g[-1] / 2.5)


@pytest.mark.parametrize("inplace", [True, False])
def test_the_class_alone_is_right_on_another_network(inplace):
    """Pasted into a file with PyTorch alone; a layer without bias, activations in place. For one
    row S (x) A is the score's outer product, and solve() the inverse of the damped one."""
    names = {"torch": torch, "nn": nn, "warnings": warnings}
    exec(inspect.getsource(k.KFAC), names)
    relu, x = nn.ReLU(inplace), torch.randn(1, 3)
    net = nn.Sequential(nn.Linear(3, 6), relu, nn.Linear(6, 5, bias=False), relu, nn.Linear(5, 2))
    kfac, params = names["KFAC"](net, 0.2, 0.9), list(net.parameters())
    out = kfac.record(net, x)
    g = torch.autograd.grad(out.square().sum(), params, retain_graph=True)
    kfac.update(out.sin().sum())
    score = torch.autograd.grad(net(x).sin().sum(), params)
    d = kfac.solve(g)
    assert [x.shape for x in d] == [p.shape for p in params]
    for (A, S), e, G, D in zip(kfac.factors(), *map(kfac.joined, (score, g, d)), strict=True):
        assert torch.allclose(torch.kron(S, A), torch.outer(e.flatten(), e.flatten()), atol=1e-12)
        w = ((A.trace() / len(A)) / (S.trace() / len(S))).sqrt()
        A, S = A + w * 0.2**0.5 * torch.eye(len(A)), S + 0.2**0.5 / w * torch.eye(len(S))
        assert torch.allclose(torch.kron(S, A) @ D.flatten(), G.flatten(), atol=1e-9)


def test_networks_that_the_class_cannot_do_are_refused_in_words():
    layer, tied = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    twice, norm = nn.Sequential(layer, nn.Tanh(), layer), nn.Sequential(layer, nn.LayerNorm(3))
    for net in (tied, twice, norm, nn.Conv1d(3, 3, 1), nn.ModuleList([layer])):
        with pytest.raises(ValueError, match="expected an nn.Sequential"):
            k.KFAC(net, 0.1, 0.9)


def test_undamped_steps_do_not_see_an_invertible_map_of_the_inputs():
    """x -> M x with first-layer weights W M^-1 is the same policy; K-FAC's step is the same
    function. (Of a Gaussian: a constant added to logits changes nothing, their S is singular.)"""
    learner, _, batch, _ = a_case(n=400, damping=0.0)
    other, M = a_learner(damping=0.0), torch.tensor([[2.0, 1, 0], [0, 0.5, 0.3], [1, 0, 3]])
    other.load_state_dict(learner.state_dict())
    other.agent.actor[0].weight.data @= torch.linalg.inv(M)
    natural, plain = [], []
    for x, obs in ((learner, batch.obs), (other, batch.obs @ M.T)):
        g = gradient(x, batch._replace(obs=obs))
        torch.manual_seed(9)  # the same sampled actions
        d = x.natural(batch._replace(obs=obs), g)
        natural.append(k.tangent(x.agent.actor, obs, d)[1])
        plain.append(k.tangent(x.agent.actor, obs, g)[1])
    assert torch.allclose(*natural, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(*plain, rtol=0.05)


def test_running_averages():
    """Weights 1, 1/2, 1/3, 1/4, then 1/4 for ever."""
    learner, _, batch, g = a_case(stats_decay=0.75)
    seen = []
    for _ in range(7):
        a = torch.cat([torch.randn(50, 3), torch.ones(50, 1)], 1)
        seen.append(a.T @ a / 50)
        learner.natural(batch._replace(obs=a[:, :3]), g)
    expected = sum(seen[:4]) / 4
    for x in seen[4:]:
        expected = 0.75 * expected + 0.25 * x
    assert torch.allclose(learner.policy_factors.A0, expected)


def test_a_factor_that_is_not_positive_definite_raises_the_damping_until_the_next_update():
    """One that is not finite makes a direction that is not."""
    learner, _, batch, g = a_case(damping=1e-12)
    factors = learner.policy_factors
    factors.A0.copy_(torch.diag(torch.tensor([1.0, 1.0, 1.0, -1e-3])))
    factors.S0.copy_(torch.eye(5))
    with pytest.warns(UserWarning, match="damping raised"):
        factors.roots = factors.factorise()
    assert factors.damping > 1e-6 and k.flat(factors.solve(g)).isfinite().all()
    learner.policy_step(batch, False)  # its first update replaces the factors
    assert factors.damping == 1e-12
    most = torch.finfo(factors.S1.dtype).max
    factors.S1.copy_(most * (1 - torch.eye(len(factors.S1))))  # no damping is enough
    with pytest.warns(UserWarning, match="damping raised to inf"):
        factors.roots = factors.factorise()
    assert not k.flat(factors.solve(g)).isfinite().all()
    factors.damping = 1e-12
    factors.S1.copy_(torch.eye(len(factors.S1)))
    factors.S1[0, 0] = math.inf
    factors.roots = factors.factorise()
    assert factors.solve(g)[2].isnan().all()


# ---------------------------------------------------------------------------- solvers, trust region
@SPACES
def test_conjugate_gradients_and_the_exact_solve_agree(space):
    learner, agent, batch, g = a_case(space, solver="cg", cg_steps=60, damping=0.1)
    F = k.dense_fisher(agent, batch.obs) + 0.1 * torch.eye(len(k.flat(g)))
    expected = torch.linalg.solve(F, k.flat(g))
    error = k.flat(learner.natural(batch, g)) - expected  # residual 1e-6 |g|, F at least 0.1
    assert error.norm() <= 1e-6 * k.flat(g).norm() / 0.1
    learner.args = replace(learner.args, cg_steps=10)
    assert (k.flat(learner.natural(batch, g)) - expected).norm() < 0.1 * expected.norm()
    learner.args = replace(learner.args, solver="exact")
    assert torch.allclose(k.flat(learner.natural(batch, g)), expected)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_conjugate_gradients_stop_relative_to_the_gradient(scale):
    M, g, calls = torch.diag(torch.tensor([1.0, 2.0, 5.0])), torch.tensor([1.0, -1.0, 2.0]), []
    (d,) = k.conjugate_gradients(lambda d: calls.append(1) or [M @ d[0]], [scale * g], 10)
    assert torch.allclose(d / scale, torch.linalg.solve(M, g), rtol=1e-5) and len(calls) == 3


@pytest.mark.parametrize("last, g", [(-9.0, 1.0), (0.0, 0.0)])
def test_conjugate_gradients_stop_where_there_is_no_curvature(last, g):
    """A matrix that rounding made indefinite; a gradient of zeros."""
    M = torch.diag(torch.tensor([1.0, 1.0, last]))
    (d,) = k.conjugate_gradients(lambda d: [M @ d[0]], [g * torch.ones(3)], 10)
    assert (d == 0).all()


@SPACES
@pytest.mark.parametrize("solver", ["kfac", "cg", "exact"])
@pytest.mark.parametrize("delta", [1e-4, 1e-3, 1e-2])
def test_predicted_and_measured_kl_agree(space, solver, delta):
    """2 % for the exact Fisher matrix, solved densely or by conjugate gradients. K-FAC's direction
    is another one: 2 % of the mean of a step and its opposite, whose odd terms cancel, and 8 % of a
    side at 0.01."""
    measured, damping = [], {} if solver == "kfac" else {"damping": 0.1}
    for sign in (1, -1):
        torch.manual_seed(0)
        learner = a_learner(space, solver=solver, max_kl=delta, width=32, depth=2, **damping)
        obs = torch.randn(1000, 3) * torch.linspace(0.5, 2, 3)
        with torch.no_grad():
            act = learner.agent.sample(learner.agent.actor(obs))
            logp = learner.agent.log_prob(learner.agent.actor(obs), act)
        good = (act if space is FOUR else act.sum(-1)) * obs[:, 0].sin() + obs[:, 1]
        batch = k.Batch(obs, act, logp, (good - good.mean()) / good.std(), logp)
        natural = learner.natural
        learner.natural = lambda b, g: [sign * x for x in natural(b, g)]  # noqa: B023
        _, info = learner.policy_step(batch, False)
        assert abs(info["kl_predicted"] / delta - 1) < 1e-6 and (info["gain"] > 0) == (sign > 0)
        measured.append(float(info["kl"]) / delta)
    assert abs(sum(measured) / 2 - 1) < 0.02
    side = 0.025 + 0.6 * delta**0.5 if solver == "kfac" else 0.02
    assert max(abs(x - 1) for x in measured) < side


@pytest.mark.parametrize("sign, far", [(-1, 0.0), (1, math.inf)])
def test_the_line_search_refuses_what_does_not_help_or_goes_too_far(sign, far):
    """A step against the gradient; one whose KL is too large at any length: after 15 trials the
    policy is as it was."""
    learner, agent, batch, _ = a_case(line_search=True)
    params, natural, kl = agent.policy_parameters(), learner.natural, agent.kl
    before = k.flat(params).detach()
    learner.natural = lambda batch, g: [sign * x for x in natural(batch, g)]
    if far:
        agent.kl = lambda *x: torch.where(kl(*x) > 0, far, 0.0)
    _, info = learner.policy_step(batch, False)
    assert torch.equal(k.flat(params), before) and info["backtracks"] == 15
    for name in ("step_scale", "gain", "gain_predicted", "kl", "kl_predicted", "kl_kfac"):
        assert info[name] == 0, name


def test_what_is_logged_is_of_the_step_that_was_taken():
    learner, agent, batch, g = a_case(line_search=True, max_kl=1e-3)
    params, kl, natural, calls, d = agent.policy_parameters(), agent.kl, learner.natural, [], []
    before = [p.detach().clone() for p in params]
    learner.natural = lambda batch, g: d.extend(natural(batch, g)) or d
    agent.kl = lambda *a: kl(*a) + (len(calls) < 2) * (calls.append(1) or 1.0)  # twice too far
    _, info = learner.policy_step(batch, False)
    scale = info["step_scale"]
    assert info["backtracks"] == 2 and 0 < info["kl"] <= 1e-3 and info["gain"] > 0
    for p, old, x in zip(params, before, d):
        assert torch.allclose(p, old + scale * x)
    assert torch.allclose(info["kl_predicted"], torch.tensor(1e-3 * 0.8**4))
    assert torch.allclose(info["gain_predicted"], scale * k.flat(g) @ k.flat(d))
    own = 2 * (d[-1] ** 2).sum()
    for block, order in blocks(learner.policy_factors, agent.actor):
        own = own + k.flat(d)[order] @ block @ k.flat(d)[order]
    assert torch.allclose(info["kl_kfac"], 0.5 * scale**2 * own)


def test_solver_none_is_adam_on_the_policy_gradient():
    learner, agent, batch, _ = a_case(solver="none", learning_rate=0.01, ent_coef=0.1)
    other = copy.deepcopy(agent)
    head = other.actor(batch.obs)
    loss = -(batch.advantage * other.log_prob(head, batch.act)).mean()
    (loss - 0.1 * other.entropy(head).mean()).backward()
    torch.optim.Adam(other.policy_parameters(), lr=0.01).step()
    learner.policy_step(batch, False)
    expected = k.flat(other.policy_parameters())
    assert torch.allclose(k.flat(agent.policy_parameters()), expected, atol=1e-6)


def test_cosines_in_the_fisher_inner_product():
    """Of the policy before the step; not without damping, where F alone may be singular."""
    learner, agent, batch, g = a_case(n=300, width=8)
    F, undamped = k.dense_fisher(agent, batch.obs), copy.deepcopy(learner)
    undamped.args = replace(learner.args, damping=0.0)
    _, out = learner.policy_step(batch, diagnosing=True)
    best = torch.linalg.solve(F + 0.01 * torch.eye(len(F)), k.flat(g))
    natural = k.flat(learner.policy_factors.solve(g) + [g[-1] / 2.01])
    for name, x in (("gradient", k.flat(g)), ("kfac", natural)):
        cosine = x @ F @ best / ((x @ F @ x) * (best @ F @ best)).sqrt()
        assert abs(out[f"fisher_cosine_{name}"] - cosine) < 1e-9 and cosine > 0.3
    pairs = learner.policy_factors.roots
    conditions = [float(torch.linalg.cond(L @ L.T)) for pair in pairs for L in pair]
    assert len(conditions) == 4 and abs(out["policy_condition"] / max(conditions) - 1) < 1e-6
    assert abs(out["critic_condition"] - 1) < 1e-9  # the critic has not stepped yet
    assert "fisher_cosine_kfac" not in undamped.policy_step(batch, diagnosing=True)[1]


# --------------------------------------------------------------------------- the critic, the batch
def test_the_critic_of_a_linear_value_is_least_squares_in_one_step():
    """Gauss-Newton is exact there, and the best multiple undoes the damping's shortening."""
    learner, agent, batch, _ = a_case(n=200, depth=0, critic_damping=1e-9)
    learner.critic_step(batch)
    X = torch.cat([batch.obs, torch.ones(200, 1)], 1)
    fit = X @ torch.linalg.lstsq(X, batch.target[:, None]).solution[:, 0]
    assert torch.allclose(agent.critic(batch.obs)[:, 0], fit, atol=1e-4)


def test_the_critics_factors_are_of_the_value_not_of_its_error():
    """Gauss-Newton: for one row S (x) A of a layer is the outer product of dV/d[W b]; the error,
    which is large here, is no part of it."""
    learner, agent, batch, _ = a_case(n=1, width=6, depth=2)
    value = agent.critic(batch.obs).sum()
    slope = k.flat(torch.autograd.grad(value, [*agent.critic.parameters()]))
    learner.critic_step(batch._replace(target=batch.target + 30))
    for block, order in blocks(learner.critic_factors, agent.critic):
        assert torch.allclose(block, torch.outer(slope[order], slope[order]))


def test_the_critics_loss_falls():
    learner, _, batch, _ = a_case(n=300, width=32, depth=2)
    batch = batch._replace(target=torch.randn(300).cumsum(0) / 10)
    losses = [float(learner.critic_step(batch)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(b < a * 1.02 for a, b in zip(losses, losses[1:]))


def test_a_batch_is_the_rollouts_rows_with_their_own_targets():
    """A + V by the sum of an episode's TD errors, row by row; advantages standardised. Explained
    variance is finite where nothing varies."""
    learner = a_learner(gamma=0.9, gae_lambda=0.8)
    numbers = {name: torch.randn(5, 2) for name in ("logp", "value", "next_value", "rew")}
    ends = {name: torch.zeros(5, 2, dtype=torch.bool) for name in ("terminated", "truncated")}
    ends["terminated"][1, 0] = ends["truncated"][2, 1] = True
    r = SimpleNamespace(states=torch.randn(13, 3), act=torch.randn(5, 2, 2), **numbers, **ends)
    batch, delta = learner.batch_of(r), r.rew + 0.9 * r.next_value - r.value
    for row in range(10):
        t, i = divmod(row, 2)
        expected, weight = r.value[t, i].clone(), 1.0
        for later in range(t, 5):
            expected += weight * delta[later, i]
            weight *= 0.72 * (not (r.terminated | r.truncated)[later, i])
        assert abs(batch.target[row] - expected) < 1e-9
        assert torch.equal(batch.obs[row], r.states[row])
        assert torch.equal(batch.act[row], r.act[t, i]) and batch.logp[row] == r.logp[t, i]
    advantage = batch.target - r.value.flatten()
    assert torch.allclose(batch.advantage * advantage.std() + advantage.mean(), advantage)
    r.rew, r.value, r.next_value = torch.zeros(3, 5, 2)
    losses, numbers = learner.update(r, False)
    assert all(math.isfinite(float(x)) for x in [*losses.values(), *numbers.values()])


# ---------------------------------------------------------------------- linear quadratic regulator
A, B, R = np.array([[1.0, 0.2], [-0.1, 0.9]]), np.array([[0.0], [0.5]]), np.array([[0.5]])
GAMMA = 0.9


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
    A1 = np.block([[A, np.zeros((2, 1))], [np.zeros((1, 2)), np.eye(1)]])
    B1 = np.vstack([B, [[0.0]]])
    T, M = A1 + B1 @ Wb, np.diag([1.0, 1.0, 0.0]) + Wb.T @ R @ Wb
    P = np.linalg.solve(np.eye(9) - GAMMA * np.kron(T.T, T.T), M.flatten()).reshape(3, 3)
    after = np.hstack([x, np.ones((len(x), 1))]) @ A1.T + u @ B1.T
    return (x**2).sum(1) + (u @ R * u).sum(1) + GAMMA * ((after @ P) * after).sum(1)


@pytest.mark.parametrize("solver", ["kfac", "cg", "exact"])
def test_the_gain_of_a_linear_policy_reaches_the_riccati_solution(solver):
    """Seed 004: policy gradients converge globally for linear systems. Exact advantages, sampled
    actions, from a policy that is worse than none."""
    args = dict(solver=solver, depth=0, log_std_init=-0.5, damping=1e-3)
    box, rng = gym.spaces.Box(-np.inf, np.inf, (2,)), np.random.default_rng(0)
    learner = a_learner(gym.spaces.Box(-9, 9, (1,)), box, **args)
    (layer,) = learner.agent.actor
    layer.weight.data, layer.bias.data = torch.tensor([[0.1, 0.1]]), torch.tensor([0.5])
    for step in range(300):
        learner.args = replace(learner.args, max_kl=0.02 if step < 200 else 5e-4)
        x = rng.normal(size=(1000, 2))
        obs = torch.from_numpy(x)
        with torch.no_grad():
            act = learner.agent.sample(learner.agent.actor(obs))
            logp = learner.agent.log_prob(learner.agent.actor(obs), act)
        W, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        advantage = q_values(W, b, x, x @ W.T + b) - q_values(W, b, x, act.numpy())
        advantage = torch.from_numpy(advantage / advantage.std())
        learner.policy_step(k.Batch(obs, act, logp, advantage, logp), False)
    K = riccati()
    assert np.abs(K).min() > 0.4
    assert np.abs(W + K).max() < 0.03 and abs(b[0]) < 0.03, (W, -K, b)


# --------------------------------------------------------------------- promises, mistakes, learning
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path):
    line = "--env Hopper-v5 --normalize-obs --normalize-reward --total-timesteps 700 --num-steps 50"
    line += " --width 16 --log-frequency 60 --eval-frequency 300 --eval-episodes 1"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    run_script("kfac_npg.py", *line.split(), cwd=whole)
    done = stop_at("kfac_npg", "Collector.collect", 2, *line.split(), cwd=parts)
    assert done.returncode == 143 and "to go on" in done.stdout, done.stdout + done.stderr
    run = only_run(parts)
    assert load(run / "checkpoint.pt")["step"] == 400
    run_script("kfac_npg.py", "--resume", run, cwd=parts)
    assert_same_checkpoint(run / "checkpoint.pt", only_run(whole) / "checkpoint.pt")
    assert metrics(run) == metrics(only_run(whole)) and len(metrics(run)) > 60


def test_a_finished_run_can_be_made_a_thousand_times_as_long(monkeypatch, capsys):
    train(k.Args(**TINY))
    collect, run = k.Collector.collect, only_run(".")

    def then_stop(*a):
        signal.raise_signal(signal.SIGTERM)
        return collect(*a)

    monkeypatch.setattr(k.Collector, "collect", then_stop)
    with pytest.raises(SystemExit) as stop:
        train(k.Args(**TINY | {"total_timesteps": 400_000}, resume=str(run)))
    assert stop.value.code == 143 and "480/400,000 (0%)" in capsys.readouterr().out
    assert load(run / "checkpoint.pt")["step"] == 480


@pytest.mark.parametrize("solver", ["kfac", "cg", "exact", "none"])
def test_diagnostics_logging_and_evaluation_change_nothing(solver):
    on = k.Args(**TINY, exp_name="on", solver=solver)
    train(on)
    train(replace(on, exp_name="off", checkpoint_frequency=0, **SILENT))
    runs = {p.name.split("__")[1]: p for p in Path("runs").iterdir()}
    saved = [load(runs[x] / "checkpoint.pt") for x in ("on", "off")]
    for key in ("networks", "optim", "random"):
        assert_equal(*({key: x[key]} for x in saved))
    expected = {"losses/entropy", "losses/value_loss", "losses/explained_variance"}
    names = "kl srank_policy" + " kl_kfac policy_condition gain_predicted" * (solver == "kfac")
    expected |= {"diagnostics/" + name for name in names.split()} | {"eval/episodic_return"}
    assert expected <= {tag for _, tag, _ in metrics(runs["on"])}


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_non_finite_parameters_never_reach_the_sampler(env_id, monkeypatch, capsys):
    update = k.Learner.update

    def poisoned(self, *args, **options):
        out = update(self, *args, **options)
        self.agent.actor[-1].bias.data[0] = math.nan
        return out

    monkeypatch.setattr(k.Learner, "update", poisoned)
    with pytest.raises(SystemExit) as stop:
        train(k.Args(**TINY | SILENT, env_id=env_id))
    assert stop.value.code == 3 and "actor.4.bias is not finite" in capsys.readouterr().err
    assert not (only_run(".") / "checkpoint.pt").exists()


BAD = {
    "--env FrozenLake-v1": "FrozenLake",
    "--solver none --max-kl 0.1": "--max-kl",
    "--learning-rate 0.1": "--learning-rate",
    "--solver exact --damping 0": "--damping",
    "--num-steps 1 --num-envs 1": "--num-steps",
    "--solver exact --width 512": "exact Fisher matrix",
    "--log-std-init 1": "--log-std-init",
}


@pytest.mark.parametrize("line", BAD)
def test_a_users_mistake_is_one_line_and_status_2(line, capsys):
    assert BAD[line] in refused(capsys, lambda: train(tyro.cli(k.Args, args=line.split())))
    assert not Path("runs").exists()


def documented_commands() -> list:
    commands = []
    for file in (*ROOT.glob("**/*.md"), ROOT / "kfac_npg.py"):
        text = file.read_text().replace("\\\\\n", " ").replace("\\\n", " ")
        text = text if file.suffix == ".md" else text.split('"""')[1]
        commands += re.findall(r"python kfac_npg\.py[^\n`#&|;]*", text)
    return sorted({" ".join(c.split()) for c in commands})


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_run(command):
    """Parsed as written, then cut to a few short rollouts. Beside a small network the cosine."""
    args = tyro.cli(k.Args, args=shlex.split(command)[2:])
    short = dict(total_timesteps=60, num_steps=16, eval_episodes=1, critic_updates=2)
    assert train(replace(args, **short))["global_step"] >= 60
    tags = {tag for _, tag, _ in metrics(only_run("."))}
    small = args.solver == "kfac" and args.width == 16
    assert ("diagnostics/fisher_cosine_kfac" in tags) == small


def test_kfac_learns_cartpole():
    """Balancing by chance lasts about 20 steps, the limit is 500."""
    assert train(k.Args(total_timesteps=25_000, eval_frequency=0))["final_return_mean"] > 300


class Target(gym.Env):
    """One step long: the reward of action a is -(a - 0.7 s)^2, s = +-1 is seen."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-2, 2, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.s = np.float32([self.np_random.choice([-1, 1])])
        return self.s.copy(), {}

    def step(self, action):
        return self.s, -float((action[0] - 0.7 * self.s[0]) ** 2), True, False, {}


SOLVERS = {
    "kfac": {},
    "trpo": dict(solver="cg", line_search=True, damping=0.1),
    "exact": dict(solver="exact", width=8, damping=0.1),
    "none": dict(solver="none", learning_rate=0.02),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_learns_a_continuous_target(name):
    """From -0.49 at a = 0 to near 0."""
    if "KTarget-v0" not in gym.registry:
        gym.register("KTarget-v0", entry_point=Target, max_episode_steps=100)
    args = dict(env_id="KTarget-v0", total_timesteps=8_000, num_envs=8, num_steps=32)
    args |= dict(log_std_init=-1.4, eval_frequency=0)
    assert train(k.Args(**args | SOLVERS[name]))["final_return_mean"] > -0.03
