"""kfac_npg.py: Fisher matrices, Kronecker factors, solvers and trust region against independent
answers; a linear regulator against the Riccati equation; promises of its own, commands, learning.
The rollouts are ppo.py's shared block, tested in test_ppo.py."""

import copy
import inspect
import math
import re
import shlex
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

CPU = torch.device("cpu")
OBS = gym.spaces.Box(-np.inf, np.inf, (3,))
BOX, FOUR = gym.spaces.Box(-2, 2, (2,)), gym.spaces.Discrete(4)
SPACES = pytest.mark.parametrize("space", [BOX, FOUR], ids=["gaussian", "categorical"])
TINY = dict(total_timesteps=400, num_envs=2, num_steps=40, width=8, critic_updates=3)
TINY |= dict(eval_episodes=2, eval_frequency=150, log_frequency=80, checkpoint_frequency=150)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


double_precision = pytest.mark.usefixtures("double")


def a_learner(space=BOX, **changes):
    args = k.Args(**dict(width=5, depth=1, log_std_init=-0.4) | changes)
    k.check(args)
    learner = k.Learner(OBS, space, args, CPU)
    for p in learner.agent.actor.parameters():  # the small head and zero biases hide mistakes
        p.data += 0.4 * torch.randn_like(p)
    return learner


def a_batch(agent, n=50):
    obs = torch.randn(n, 3) * torch.linspace(0.5, 2, 3)
    with torch.no_grad():
        head, value = agent(obs)
        act = agent.sample(head)
        logp = agent.log_prob(head, act)
    return k.Batch(obs, act, logp, torch.randn(n), value + torch.randn(n))


def gradient(learner, batch) -> list:
    objective = k.surrogate(learner.agent, batch, learner.args)
    return [*torch.autograd.grad(objective, learner.agent.policy_parameters())]


def like(params) -> list:
    return [torch.randn_like(p) for p in params]


def order_of_layers(net) -> list:
    """For each layer the positions of [W b], row-major, among flattened W, b, W, b, ..."""
    out, start = [], 0
    for m in net[::2]:
        w = start + torch.arange(m.weight.numel()).view_as(m.weight)
        start += m.weight.numel() + m.out_features
        b = torch.arange(start - m.out_features, start)
        out.append(torch.cat([w, b[:, None]], 1).flatten())
    return out


# -------------------------------------------------------------------------------- Fisher matrices
@SPACES
@double_precision
def test_the_dense_fisher_is_the_hessian_of_the_kl(space):
    """Of KL(old || new) at new = old, by double differentiation."""
    learner, obs = a_learner(space), torch.randn(20, 3)
    agent, params = learner.agent, learner.agent.policy_parameters()
    head = agent.actor(obs).detach()
    log_std = None if agent.discrete else agent.log_std.detach().clone()
    kl = agent.kl(head, log_std, agent.actor(obs)).mean()
    slope = k.flat(torch.autograd.grad(kl, params, create_graph=True))
    options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    H = torch.stack([k.flat(torch.autograd.grad(x, params, **options)) for x in slope])
    assert torch.allclose(k.dense_fisher(agent, obs), H, atol=1e-10)


@double_precision
def test_the_dense_fisher_is_the_mean_outer_product_of_scores():
    """Categorical: the expectation over actions by enumeration."""
    agent, obs, F = a_learner(FOUR).agent, torch.randn(6, 3), 0
    for x in obs:
        p = torch.softmax(agent.actor(x[None]), -1)[0].detach()
        for a in range(4):
            logp = agent.log_prob(agent.actor(x[None]), torch.tensor([a]))[0]
            score = k.flat(torch.autograd.grad(logp, agent.policy_parameters()))
            F = F + p[a] * torch.outer(score, score) / 6
    assert torch.allclose(k.dense_fisher(agent, obs), F, atol=1e-10)


@SPACES
@double_precision
def test_products_and_quadratics_are_those_of_the_dense_matrix(space):
    agent, obs = a_learner(space, depth=2).agent, torch.randn(30, 3)
    F, d = k.dense_fisher(agent, obs), like(agent.policy_parameters())
    product = F @ k.flat(d)
    assert torch.allclose(k.flat(k.fisher_product(agent, obs, d)), product, atol=1e-9)
    damped = k.flat(k.fisher_product(agent, obs, d, 0.3))
    assert torch.allclose(damped, product + 0.3 * k.flat(d), atol=1e-9)
    assert torch.allclose(k.quadratic(agent, obs, d), k.flat(d) @ product, rtol=1e-9)


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
    assert torch.allclose(agent.kl(head, log_std, new), expected, atol=1e-6)


# ------------------------------------------------------------------------------ Kronecker factors
def kron(factors) -> list:
    return [torch.kron(S, A) for A, S in factors.factors()]


@SPACES
@double_precision
def test_for_one_state_each_block_is_exact(space):
    """B = 1 and one action: S (x) A is the outer product of that score's layer."""
    learner, obs = a_learner(space, depth=2), torch.randn(1, 3)
    agent, factors = learner.agent, learner.policy_factors
    head = factors.record(agent.actor, obs)
    act = agent.sample(head.detach())
    factors.update(agent.log_prob(head, act).sum())
    logp = agent.log_prob(agent.actor(obs), act).sum()
    score = k.flat(torch.autograd.grad(logp, agent.policy_parameters()))
    for block, order in zip(kron(factors), order_of_layers(agent.actor), strict=True):
        assert torch.allclose(block, torch.outer(score[order], score[order]), atol=1e-12)


@double_precision
def test_for_a_linear_gaussian_policy_the_expected_factors_are_exact():
    """S = 1 / sigma^2 whatever the state: S (x) A is the dense matrix. Sampled factors tend to
    it, and the advantages and actions of the batch are no part of them."""
    learner = a_learner(BOX, depth=0)
    agent, factors, batch = learner.agent, learner.policy_factors, a_batch(learner.agent, 4096)
    a = torch.cat([batch.obs, torch.ones(4096, 1)], 1)
    S, A = torch.diag(torch.exp(-2 * agent.log_std)).detach(), a.T @ a / 4096
    (order,) = order_of_layers(agent.actor)
    F = k.dense_fisher(agent, batch.obs)[:-2, :-2][order][:, order]
    assert torch.allclose(F, torch.kron(S, A), atol=1e-10)
    far = batch._replace(act=5 + batch.act, advantage=9 * batch.advantage)
    learner.natural(far, gradient(learner, far))
    ((sampled_A, sampled_S),) = factors.factors()
    assert torch.allclose(sampled_A, A) and (sampled_S - S).norm() / S.norm() < 0.1


class Residual(torch.nn.Module):
    """Layers without bias, activations in place, an addition."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.first = torch.nn.Linear(3, 6)
        self.second = torch.nn.Linear(6, 6, bias=False)
        self.last = torch.nn.Linear(6, 2)
        self.inplace = inplace

    def forward(self, x):
        h = torch.nn.functional.relu(self.first(x), self.inplace)
        h = h + torch.nn.functional.relu(self.second(h), self.inplace)
        return self.last(h)


def test_the_class_alone_is_right_on_other_networks(double):
    """Copied into a file with PyTorch: for one row, and for layers without bias and activations
    in place, too, S (x) A and its inverse are those of the exact score."""
    names = {"torch": torch, "nn": torch.nn, "warnings": warnings}
    exec(inspect.getsource(k.KFAC), names)
    x, torch_state = torch.randn(1, 3), torch.get_rng_state()
    for inplace in (True, False):
        torch.set_rng_state(torch_state)
        net = Residual(inplace)
        kfac = names["KFAC"](net, 0.2, 0.9)
        params = list(net.parameters())
        out = kfac.record(net, x)
        g = torch.autograd.grad(out.square().sum(), params, retain_graph=True)
        kfac.update(out.sin().sum())
        score = torch.autograd.grad(net(x).sin().sum(), params)
        d = kfac.solve(g)
        for (A, S), G, D, e in zip(kfac.factors(), *map(kfac.joined, (g, d, score)), strict=True):
            e = e.flatten()
            assert torch.allclose(torch.kron(S, A), torch.outer(e, e), atol=1e-12)
            w = ((A.trace() / len(A)) / (S.trace() / len(S))).sqrt()
            A = A + w * 0.2**0.5 * torch.eye(len(A))
            S = S + 0.2**0.5 / w * torch.eye(len(S))
            assert torch.allclose(torch.kron(S, A) @ D.flatten(), G.flatten(), atol=1e-9)
        assert [x.shape for x in d] == [p.shape for p in params]


def test_networks_that_the_class_cannot_do_are_refused_in_words():
    nn, x = torch.nn, torch.randn(5, 3)
    layer = nn.Linear(3, 3)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    for net in (nn.Sequential(layer, nn.LayerNorm(3)), nn.Sequential(nn.Conv1d(3, 3, 1)), tied):
        with pytest.raises(ValueError, match="no parameters but theirs"):
            k.KFAC(net, 0.1, 0.9)
    net = nn.Sequential(layer, nn.Tanh(), layer)
    with pytest.raises(ValueError, match="each layer once"):
        k.KFAC(net, 0.1, 0.9).record(net, x)


@double_precision
def test_undamped_steps_do_not_see_an_invertible_map_of_the_inputs():
    """x -> M x with first-layer weights W M^-1 is the same policy; K-FAC's step is the same
    function. (Of a Gaussian: the S of logits is singular, for a constant added to them changes
    nothing.)"""
    torch.manual_seed(3)
    learner, other = a_learner(damping=0.0), a_learner(damping=0.0)
    M = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 0.3], [1.0, 0.0, 3.0]])
    other.load_state_dict(learner.state_dict())
    other.agent.actor[0].weight.data @= torch.linalg.inv(M)
    batch = a_batch(learner.agent, 400)
    natural, plain = [], []
    for x, obs in ((learner, batch.obs), (other, batch.obs @ M.T)):
        b = batch._replace(obs=obs)
        g = gradient(x, b)
        torch.manual_seed(9)  # the same sampled actions
        natural.append(k.tangent(x.agent.actor, obs, x.natural(b, g))[1])
        plain.append(k.tangent(x.agent.actor, obs, g)[1])
    assert torch.allclose(*natural, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(*plain, rtol=0.05)


@double_precision
def test_running_averages():
    learner, seen = a_learner(stats_decay=0.75), []
    for _ in range(7):
        batch = a_batch(learner.agent)
        a = torch.cat([batch.obs, torch.ones(50, 1)], 1)
        seen.append(a.T @ a / 50)
        learner.natural(batch, gradient(learner, batch))
    expected = sum(seen[:4]) / 4  # weights 1, 1/2, 1/3, 1/4, then 1/4 for ever
    for x in seen[4:]:
        expected = 0.75 * expected + 0.25 * x
    assert torch.allclose(learner.policy_factors.A0, expected)


@double_precision
def test_a_factor_that_is_not_positive_definite_raises_the_damping_until_the_next_update():
    """One that is not finite makes a direction that is not."""
    learner = a_learner(damping=1e-12)
    factors, batch = learner.policy_factors, a_batch(learner.agent)
    learner.policy_step(batch)
    factors.A0.copy_(torch.diag(torch.tensor([1.0, 1.0, 1.0, -1e-3])))
    factors.S0.copy_(torch.eye(5))
    with pytest.warns(UserWarning, match="damping raised"):
        factors.roots = factors.factorise()
    assert factors.damping > 1e-6
    d = factors.solve(like(learner.agent.actor.parameters()))
    assert k.flat(d).isfinite().all()
    factors.A0.copy_(torch.eye(4))
    learner.policy_step(batch)
    assert factors.damping == 1e-12
    factors.S1[0, 0] = math.inf
    factors.roots = factors.factorise()
    assert factors.solve(d)[2].isnan().all()


# ---------------------------------------------------------------------------- solvers, trust region
@SPACES
@double_precision
def test_conjugate_gradients_and_the_exact_solve_agree(space):
    learner = a_learner(space, solver="cg", cg_steps=60, damping=0.1)
    batch = a_batch(learner.agent)
    g = gradient(learner, batch)
    F = k.dense_fisher(learner.agent, batch.obs) + 0.1 * torch.eye(len(k.flat(g)))
    expected = torch.linalg.solve(F, k.flat(g))
    error = k.flat(learner.natural(batch, g)) - expected  # residual 1e-6 |g|, F at least 0.1
    assert error.norm() <= 1e-6 * k.flat(g).norm() / 0.1
    learner.args = replace(learner.args, cg_steps=10)
    assert (k.flat(learner.natural(batch, g)) - expected).norm() < 0.1 * expected.norm()
    learner.args = replace(learner.args, solver="exact")
    assert torch.allclose(k.flat(learner.natural(batch, g)), expected)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_conjugate_gradients_stop_relative_to_the_gradient(scale, double):
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
def test_predicted_and_measured_kl_agree(space, solver, delta, double):
    """2 % for the exact Fisher matrix, solved densely or by conjugate gradients. K-FAC's direction
    is another one: 2 % of the mean of a step and its opposite, whose odd terms cancel, and 8 % of a
    side at 0.01."""
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
        advantage = (good - good.mean()) / good.std()
        _, info = learner.policy_step(batch._replace(advantage=advantage))
        assert abs(info["kl_predicted"] / delta - 1) < 1e-6 and (info["gain"] > 0) == (sign > 0)
        measured.append(float(info["kl"]) / delta)
    assert abs(sum(measured) / 2 - 1) < 0.02
    side = 0.025 + 0.6 * delta**0.5 if solver == "kfac" else 0.02
    assert max(abs(x - 1) for x in measured) < side


@double_precision
def test_the_log_deviations_step():
    """Their Fisher matrix is 2 I: d = g / (2 + damping), and no layer's factor is involved."""
    learner = a_learner(damping=0.5)
    batch = a_batch(learner.agent)
    g = gradient(learner, batch)
    assert torch.allclose(learner.natural(batch, g)[-1], g[-1] / 2.5)


@pytest.mark.parametrize("sign, far", [(-1, 0.0), (1, math.inf)])
def test_the_line_search_refuses_what_does_not_help_or_goes_too_far(sign, far, double):
    """A step against the gradient; one whose KL is too large at any length: after 15 trials the
    policy is as it was."""
    learner = a_learner(line_search=True)
    batch, params = a_batch(learner.agent), learner.agent.policy_parameters()
    before, natural, kl = k.flat(params).detach(), learner.natural, learner.agent.kl
    learner.natural = lambda batch, g: [sign * x for x in natural(batch, g)]
    if far:
        learner.agent.kl = lambda *x: torch.where(kl(*x) > 0, far, 0.0)
    _, info = learner.policy_step(batch)
    assert torch.equal(k.flat(params), before) and info["backtracks"] == 15
    for name in ("step_scale", "gain", "gain_predicted", "kl", "kl_predicted", "kl_kfac"):
        assert info[name] == 0, name


@double_precision
def test_what_is_logged_is_of_the_step_that_was_taken():
    learner = a_learner(line_search=True, max_kl=1e-3)
    batch, agent, factors = a_batch(learner.agent), learner.agent, learner.policy_factors
    params, kl, natural, calls, d = agent.policy_parameters(), agent.kl, learner.natural, [], []
    before, g = [p.detach().clone() for p in params], k.flat(gradient(learner, batch))
    learner.natural = lambda batch, g: d.extend(natural(batch, g)) or d
    agent.kl = lambda *a: kl(*a) + (len(calls) < 2) * (calls.append(1) or 1.0)  # twice too far
    _, info = learner.policy_step(batch)
    scale = info["step_scale"]
    assert info["backtracks"] == 2 and 0 < info["kl"] <= 1e-3 and info["gain"] > 0
    for p, old, x in zip(params, before, d):
        assert torch.allclose(p, old + scale * x)
    assert torch.allclose(info["kl_predicted"], torch.tensor(1e-3 * 0.8**4))
    assert torch.allclose(info["gain_predicted"], scale * g @ k.flat(d))
    own = 2 * (d[-1] ** 2).sum()
    for block, order in zip(kron(factors), order_of_layers(agent.actor), strict=True):
        own = own + k.flat(d)[order] @ block @ k.flat(d)[order]
    assert torch.allclose(info["kl_kfac"], 0.5 * scale**2 * own)


@double_precision
def test_solver_none_is_adam_on_the_policy_gradient():
    learner = a_learner(solver="none", learning_rate=0.01, ent_coef=0.1)
    batch, agent = a_batch(learner.agent), learner.agent
    params = [p.detach().clone().requires_grad_() for p in agent.policy_parameters()]
    head = agent.actor(batch.obs)
    loss = -(batch.advantage * agent.log_prob(head, batch.act)).mean()
    loss = loss - 0.1 * agent.entropy(head).mean()
    grads = torch.autograd.grad(loss, agent.policy_parameters())
    for p, g in zip(params, grads):
        p.grad = g
    torch.optim.Adam(params, lr=0.01).step()
    learner.policy_step(batch)
    for p, expected in zip(agent.policy_parameters(), params):
        assert torch.allclose(p, expected, atol=1e-6)


@double_precision
def test_cosines_in_the_fisher_inner_product():
    learner = a_learner(width=8)
    batch, before = a_batch(learner.agent, 300), copy.deepcopy(learner.agent)
    grads, factors = gradient(learner, batch), learner.policy_factors
    F = k.dense_fisher(learner.agent, batch.obs)
    _, out = learner.policy_step(batch, diagnosing=True)  # of the policy before the step
    best = torch.linalg.solve(F + 0.01 * torch.eye(len(F)), k.flat(grads))

    def cosine(x):
        return float(x @ F @ best / ((x @ F @ x) * (best @ F @ best)).sqrt())

    assert abs(out["fisher_cosine_gradient"] - cosine(k.flat(grads))) < 1e-9
    d = k.flat(factors.solve(grads) + [grads[-1] / 2.01])
    assert abs(out["fisher_cosine_kfac"] - cosine(d)) < 1e-9 and cosine(d) > 0.3
    conditions = [float(torch.linalg.cond(L @ L.T)) for pair in factors.roots for L in pair]
    assert len(conditions) == 4 and abs(out["policy_condition"] / max(conditions) - 1) < 1e-6
    assert abs(out["critic_condition"] - 1) < 1e-9  # the critic has not stepped yet
    learner.agent, learner.args = before, replace(learner.args, damping=0.0)
    _, out = learner.policy_step(batch, diagnosing=True)  # F alone may be singular
    assert "fisher_cosine_kfac" not in out and out["policy_condition"] > 1


# ------------------------------------------------------------------------------------- the critic
@double_precision
def test_the_critic_of_a_linear_value_is_least_squares_in_one_step():
    """Gauss-Newton is exact there, and the best multiple undoes the damping's shortening."""
    learner = a_learner(depth=0, critic_damping=1e-9)
    batch = a_batch(learner.agent, 200)
    learner.critic_step(batch)
    X = torch.cat([batch.obs, torch.ones(200, 1)], 1)
    fit = X @ torch.linalg.lstsq(X, batch.target[:, None]).solution[:, 0]
    assert torch.allclose(learner.agent.critic(batch.obs)[:, 0], fit, atol=1e-4)


@double_precision
def test_the_critics_factors_are_of_the_value_not_of_its_error():
    """Gauss-Newton: for one row S (x) A of a layer is the outer product of dV/d[W b]; the error,
    which is large here, is no part of it."""
    learner = a_learner(width=6, depth=2)
    batch = a_batch(learner.agent, 1)
    critic, factors = learner.agent.critic, learner.critic_factors
    slope = k.flat(torch.autograd.grad(critic(batch.obs).sum(), [*critic.parameters()]))
    learner.critic_step(batch._replace(target=batch.target + 30))
    for block, order in zip(kron(factors), order_of_layers(critic), strict=True):
        assert torch.allclose(block, torch.outer(slope[order], slope[order]))


def test_the_critics_loss_falls():
    learner = a_learner(width=32, depth=2)
    batch = a_batch(learner.agent, 300)._replace(target=torch.randn(300).cumsum(0) / 10)
    losses = [float(learner.critic_step(batch)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(b < a * 1.02 for a, b in zip(losses, losses[1:]))


def a_rollout(learner, T=5, N=2, **changes):
    terminated, truncated = torch.zeros(2, T, N, dtype=torch.bool)
    terminated[1, 0] = truncated[2, 1] = True
    states, act = torch.randn(T * N + N + 1, 3), torch.randn(T, N, 2)
    columns = dict(logp=torch.randn(T, N), value=torch.randn(T, N), rew=torch.randn(T, N))
    columns |= dict(next_value=torch.randn(T, N), terminated=terminated, truncated=truncated)
    return SimpleNamespace(states=states, act=act, **columns | changes)


def test_a_batch_is_the_rollouts_rows_with_their_own_targets():
    """A + V by the sum of an episode's TD errors, for every row; advantages standardised."""
    learner = a_learner(gamma=0.9, gae_lambda=0.8)
    r = a_rollout(learner)
    batch = learner.batch_of(r)
    delta, over = r.rew + 0.9 * r.next_value - r.value, r.terminated | r.truncated
    for row in range(10):
        t, i = divmod(row, 2)
        expected, weight = r.value[t, i].clone(), 1.0
        for later in range(t, 5):
            expected += weight * delta[later, i]
            weight *= 0.72 * (1 - int(over[later, i]))
        assert abs(batch.target[row] - expected) < 1e-5
        for x, column in ((batch.act, r.act), (batch.logp, r.logp)):
            assert torch.equal(x[row], column[t, i])
        assert torch.equal(batch.obs[row], r.states[row])
    advantage = batch.target - r.value.flatten()
    assert torch.allclose(
        batch.advantage * advantage.std() + advantage.mean(), advantage, atol=1e-5
    )


def test_explained_variance_is_finite_where_nothing_varies():
    learner, zero = a_learner(), torch.zeros(5, 2)
    losses, numbers = learner.update(a_rollout(learner, rew=zero, value=zero, next_value=zero))
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
def test_the_gain_of_a_linear_policy_reaches_the_riccati_solution(solver, double):
    """Seed 004: policy gradients converge globally for linear systems. Exact advantages, sampled
    actions, from a policy that is worse than none."""
    args = k.Args(solver=solver, depth=0, log_std_init=-0.5, damping=1e-3)
    box, rng = gym.spaces.Box(-np.inf, np.inf, (2,)), np.random.default_rng(0)
    learner = k.Learner(box, gym.spaces.Box(-9, 9, (1,)), args, CPU)
    (layer,) = learner.agent.actor
    layer.weight.data, layer.bias.data = torch.tensor([[0.1, 0.1]]), torch.tensor([0.5])
    for step in range(300):
        learner.args = replace(args, max_kl=0.02 if step < 200 else 5e-4)
        x = rng.normal(size=(1000, 2))
        obs = torch.from_numpy(x)
        with torch.no_grad():
            head = learner.agent.actor(obs)
            act = learner.agent.sample(head)
            logp = learner.agent.log_prob(head, act)
        W, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        advantage = q_values(W, b, x, x @ W.T + b) - q_values(W, b, x, act.numpy())
        advantage = torch.from_numpy(advantage / advantage.std())
        learner.policy_step(k.Batch(obs, act, logp, advantage, logp))
    K = riccati()
    assert np.abs(K).min() > 0.4
    assert np.abs(W + K).max() < 0.03 and abs(b[0]) < 0.03, (W, -K, b)


# --------------------------------------------------------------------- promises, mistakes, learning
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path):
    """And then made a thousand times as long."""
    line = "--env Hopper-v5 --normalize-obs --normalize-reward --total-timesteps 700 --num-steps 50"
    line += " --width 16 --log-frequency 60 --eval-frequency 300 --eval-episodes 1"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    run_script("kfac_npg.py", *line.split(), cwd=whole)
    done = stop_at("kfac_npg", "Collector.collect", 2, *line.split(), cwd=parts)
    assert done.returncode == 143 and "to go on" in done.stdout, done.stdout + done.stderr
    run = only_run(parts)
    assert load(run / "checkpoint.pt")["step"] == 400
    run_script("kfac_npg.py", "--resume", run, cwd=parts)
    assert_same_checkpoint(run / "checkpoint.pt", only_run(whole) / "checkpoint.pt")
    assert metrics(run) == metrics(only_run(whole)) and len(metrics(run)) > 60
    longer = ("--resume", run, "--total-timesteps", 800_000)
    done = stop_at("kfac_npg", "Collector.collect", 2, *longer, cwd=parts)
    assert done.returncode == 143 and "min left" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("solver", ["kfac", "cg", "exact", "none"])
def test_diagnostics_logging_and_evaluation_change_nothing(solver):
    on = k.Args(**TINY, exp_name="on", solver=solver)
    silent = dict(eval_episodes=0, eval_frequency=0, log_frequency=10**6, checkpoint_frequency=0)
    for args in (on, replace(on, exp_name="off", **silent)):
        k.train(args)
    runs = {p.name.split("__")[1]: p for p in Path("runs").iterdir()}
    saved = [load(runs[x] / "checkpoint.pt") for x in ("on", "off")]
    for key in ("networks", "optim", "random"):
        assert_equal(*({key: x[key]} for x in saved))
    tags = {tag for _, tag, _ in metrics(runs["on"])}
    expected = {"losses/policy_loss", "losses/value_loss", "losses/explained_variance"}
    expected |= {"diagnostics/kl", "diagnostics/srank_policy", "eval/episodic_return"}
    if solver == "kfac":
        names = "kl_kfac kl_predicted gain_predicted policy_condition fisher_cosine_kfac".split()
        expected |= {"diagnostics/" + name for name in names}
    assert expected <= tags


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_non_finite_parameters_never_reach_the_sampler(env_id, monkeypatch, capsys):
    update = k.Learner.update

    def poisoned(self, *args, **options):
        out = update(self, *args, **options)
        self.agent.actor[-1].bias.data[0] = math.nan
        return out

    monkeypatch.setattr(k.Learner, "update", poisoned)
    silent = dict(log_frequency=10**6, eval_episodes=0, eval_frequency=0)
    with pytest.raises(SystemExit) as stop:
        k.train(k.Args(**TINY | silent, env_id=env_id))
    assert stop.value.code == 3 and "actor.4.bias is not finite" in capsys.readouterr().err
    assert not (only_run(".") / "checkpoint.pt").exists()


BAD = [
    ("--env FrozenLake-v1", "FrozenLake"),
    ("--solver none --max-kl 0.1", "--max-kl"),
    ("--learning-rate 0.1", "--learning-rate"),
    ("--solver exact --damping 0", "--damping"),
    ("--num-steps 1", "--num-steps"),
    ("--solver exact --width 512", "rollout and update"),
]


@pytest.mark.parametrize("line, named", BAD, ids=[x[0] for x in BAD])
def test_a_users_mistake_is_one_line_and_status_2(line, named, capsys):
    assert named in refused(capsys, lambda: k.train(tyro.cli(k.Args, args=line.split())))
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
    assert k.train(replace(args, **short))["global_step"] >= 60
    tags = {tag for _, tag, _ in metrics(only_run("."))}
    small = args.solver == "kfac" and args.width == 16
    assert ("diagnostics/fisher_cosine_kfac" in tags) == small


def test_kfac_learns_cartpole():
    """Balancing by chance lasts about 20 steps, the limit is 500."""
    assert k.train(k.Args(total_timesteps=25_000, eval_frequency=0))["final_return_mean"] > 300


class Target(gym.Env):
    """One step long: the reward of action a is -(a - 0.7 s)^2, s = +-1 is seen."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-2, 2, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.s = np.float32([self.np_random.choice([-1, 1])])
        return self.s, {}

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
    args = dict(env_id="KTarget-v0", total_timesteps=8_000, num_envs=8, num_steps=64)
    args |= dict(log_std_init=-0.7, eval_frequency=0)
    assert k.train(k.Args(**args | SOLVERS[name]))["final_return_mean"] > -0.03
