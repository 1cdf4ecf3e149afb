"""safety_critics.py: the fixed points of its critic against numbers by hand and linear solves, the
shield and its density against a truncated normal, the natural gradient against a dense matrix; what
an accident is; promises of its own, commands, learning."""

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import safety_critics as sc
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
from safety_critics import Agent, Args, Batch, Ledger, Transitions, train

TINY = dict(total_timesteps=400, num_envs=2, num_steps=40, width=8, value_updates=3)
TINY |= dict(safety_updates=5, batch_size=32, eval_episodes=2, eval_frequency=150)
TINY |= dict(log_frequency=80, checkpoint_frequency=150)
SILENT = dict(eval_episodes=0, eval_frequency=0, log_frequency=10**6)


# ------------------------------------------------------------ fixed points of the safety critic
def fixed_point(rows, pi, args, clip=False, sweeps=60):
    """Q_C (S, A) where the script's own loss is least, y with it; rows (s, a, c, over, s') are
    equally likely. In a table the loss is a parabola in each entry, whose curvature is the share of
    its rows: one Newton step is at the minimum."""
    s, a, cost, over, after = (torch.tensor(x) for x in zip(*rows))
    share = torch.zeros_like(pi)
    share.index_put_((s, a), torch.full_like(cost, 1 / len(rows)).double(), accumulate=True)
    Q = torch.zeros_like(pi)
    for _ in range(sweeps):
        batch = Transitions(None, None, cost, over, None)
        y = sc.td_target(batch, (pi * Q).sum(1)[after], args)
        table = Q.clone().requires_grad_()
        loss = sc.safety_loss(table[s, a], (pi * table).sum(1)[s], y, args)
        (slope,) = torch.autograd.grad(loss, table)
        Q = Q - torch.where(share > 0, slope / share.clamp(min=1e-30), 0)
        Q = Q.clamp(0, 1) if clip else Q
    return Q


def times(n: int, *row) -> list:
    return n * [tuple(row)]


# s0: safe -> s1, risky -> accident 0.2, else the goal; s1: safe -> goal, risky -> accident 0.4.
# b = (0.8, 0.2) in both, pi = (0.5, 0.5).
TWO = times(20, 0, 0, 0.0, 0.0, 1) + times(1, 0, 1, 1.0, 1.0, 0) + times(4, 0, 1, 0.0, 1.0, 0)
TWO += times(20, 1, 0, 0.0, 1.0, 0) + times(2, 1, 1, 1.0, 1.0, 0) + times(3, 1, 1, 0.0, 1.0, 0)
PI = torch.full((2, 2), 0.5, dtype=torch.float64)
HAND = {  # conservative, alpha, clip: Q(s0), Q(s1), V(s0)
    ("off", 0.05, False): ((0.2, 0.2), (0, 0.4), 0.2),
    ("eq2", 0.05, False): ((0.209375, 0.275), (-0.01875, 0.475), 0.2421875),
    ("eq2", 0.2, False): ((0.2375, 0.5), (-0.075, 0.7), 0.36875),
    ("eq1", 0.05, False): ((0.309375, 0.325), (0.03125, 0.525), 0.3171875),
    ("eq1", 0.2, False): ((0.6375, 0.7), (0.125, 0.9), 0.66875),
    ("eq2", 0.05, True): ((0.21875, 0.275), (0, 0.475), 0.246875),
    ("eq2", -0.05, False): ((0.190625, 0.125), (0.01875, 0.325), 0.1578125),  # CQL's own sign
}


@pytest.mark.parametrize("case", HAND, ids=str)
def test_two_states_by_hand(case):
    conservative, alpha, clip = case
    args = Args(conservative=conservative, safety_alpha=alpha, safety_gamma=1.0)
    Q = fixed_point(TWO, PI, args, clip)
    q0, q1, v0 = HAND[case]
    assert np.allclose(Q[0], q0, atol=1e-9) and np.allclose(Q[1], q1, atol=1e-9)
    assert abs(float((PI * Q).sum(1)[0]) - v0) < 1e-6


def test_the_clip_can_break_the_bound_of_eq2():
    """One state, Q = (0.5, 1), alpha 0.2: unclipped V is 0.8625, above 0.75, clipped 0.7125."""
    rows = times(4, 0, 0, 1.0, 1.0, 0) + times(4, 0, 0, 0.0, 1.0, 0) + times(2, 0, 1, 1.0, 1.0, 0)
    args = Args(safety_alpha=0.2, safety_gamma=1.0)
    values = [float((PI[:1] * fixed_point(rows, PI[:1], args, x)).sum()) for x in (0, 1)]
    assert np.allclose(values, (0.8625, 0.7125))


P = gym.make("FrozenLake-v1").unwrapped.P
HOLES, GOAL = (5, 7, 11, 12), 15
LIVE = [s for s in range(15) if s not in HOLES]


def lake(counts) -> list:
    """FrozenLake's rows, holes being accidents: each of an action's three outcomes, counts[s, a]
    times."""
    rows = []
    for s in LIVE:
        for a, outcomes in P[s].items():
            for _, after, _, end in outcomes:
                rows += times(int(counts[s, a]), s, a, float(after in HOLES), float(end), after)
    return rows


def solved(pi, gamma):
    """The exact probability of an accident, (16, 4), by a linear solve."""
    M, c = np.zeros((64, 64)), np.zeros(64)
    for s in LIVE:
        for a, outcomes in P[s].items():
            for p, after, _, end in outcomes:
                c[4 * s + a] += p * (after in HOLES)
                M[4 * s + a, 4 * after : 4 * after + 4] += p * gamma * (not end) * pi[after].numpy()
    return torch.tensor(np.linalg.solve(np.eye(64) - M, c).reshape(16, 4))


@pytest.mark.parametrize("gamma, expected", [(1.0, 0.986060), (0.99, 0.924189), (0.9, 0.558369)])
def test_frozen_lake_by_a_linear_solve(gamma, expected):
    pi = torch.full((16, 4), 0.25, dtype=torch.float64)
    args, exact = Args(conservative="off", safety_gamma=gamma), solved(pi, gamma)
    assert abs(float(exact[0].mean()) - expected) < 5e-7
    Q = fixed_point(lake(torch.ones(16, 4)), pi, args, sweeps=1000)
    assert torch.allclose(Q, exact, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.003, 0.05, 0.5])
def test_at_full_support_eq2_bounds_v_and_eq1_bounds_q(alpha):
    """CQL's own sign lowers V."""
    draw = torch.Generator().manual_seed(3)
    pi = torch.rand(16, 4, generator=draw, dtype=torch.float64) + 0.1
    pi, rows = pi / pi.sum(1, keepdim=True), lake(torch.randint(1, 5, (16, 4), generator=draw))
    exact, gaps = solved(pi, 0.9), {}
    for name, a in (("eq1", alpha), ("eq2", alpha), ("CQL's", -alpha)):
        form = "eq1" if name == "eq1" else "eq2"
        args = Args(conservative=form, safety_alpha=a, safety_gamma=0.9)
        gaps[name] = (fixed_point(rows, pi, args, sweeps=150) - exact)[LIVE]
    v = {name: (pi[LIVE] * gap).sum(1) for name, gap in gaps.items()}
    assert (gaps["eq1"] > 0).all() and (v["eq2"] > 0).all() and (v["CQL's"] < 0).all()


def test_the_critic_is_a_probability_whose_gradient_dies():
    agent = Agent(3, 2, Args(width=8))
    obs, act = torch.randn(5, 3), 9 * torch.randn(5, 2)
    assert abs(agent.risk(obs, act).mean().item() - 1 / (1 + math.exp(3))) < 0.03
    assert torch.equal(agent.risk(obs, act), agent.risk(obs, act.clamp(-1, 1)))
    many = agent.risk(obs, torch.stack([act, 0 * act], 1))
    assert torch.allclose(many[:, 0], agent.risk(obs, act)) and many.shape == (5, 2)
    for bias, sign in ((30.0, 1), (-60.0, 0)):
        torch.nn.init.constant_(agent.safety[-1].bias, bias)
        q = agent.risk(obs, act)
        loss = sc.safety_loss(q, q, torch.full((5,), 0.5), Args(conservative="eq1"))
        slopes = torch.autograd.grad(loss, [*agent.safety.parameters()])
        assert (q == sign).all() or q.max() < 1e-20
        assert all(x.abs().max() < 1e-9 for x in slopes)


# ----------------------------------------------------------------------- shield, density, policy
def a_wall(**changes) -> Agent:
    """An agent of one action whose Q_C is 1 above 0.3, its mean 0.1, deviation 0.7; eps 0.5."""
    args = Args(**dict(width=4, depth=1, log_std_init=math.log(0.7), threshold=0.5) | changes)
    sc.check(args)
    agent = Agent(1, 1, args)
    torch.nn.init.zeros_(agent.actor[-1].weight)
    torch.nn.init.constant_(agent.actor[-1].bias, 0.1)
    agent.risk = lambda obs, act, target=False: (act[..., 0] > 0.3).to(act)
    return agent


def density(x, mean=0.1, std=0.7):
    """Of the normal cut off above 0.3."""
    z, top = (x - mean) / std, torch.special.ndtr(torch.tensor((0.3 - mean) / std))
    return torch.where(x <= 0.3, torch.exp(-0.5 * z**2) / (std * math.sqrt(2 * math.pi) * top), 0)


def test_executed_actions_have_the_density_of_pi_given_that_they_are_safe():
    agent = a_wall()
    with torch.no_grad():
        act = agent.sample(agent.policy(torch.zeros(40_000, 1)))[:, 0]
    assert act.max() <= 0.3
    edges = torch.linspace(-2, 0.3, 24)
    counts = torch.histogram(act, edges)[0]
    fine = torch.linspace(-2, 0.3, 23 * 50 + 1)
    mass = torch.cumulative_trapezoid(density(fine), fine)
    expected = 40_000 * torch.diff(torch.cat([torch.zeros(1), mass[49::50]]))
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 3).all()
    actions, refused, fallbacks = agent.counts.tolist()
    accept = float(torch.special.ndtr(torch.tensor(0.2 / 0.7)))
    assert actions == 40_000 and fallbacks == 0
    assert abs(refused / actions - (1 - accept)) < 0.01


def test_the_surrogate_is_the_policy_gradient_of_the_density_behind_the_shield():
    """Against quadrature, of an advantage that does not average 0. In the first term without the
    shield the gradient is another; the constraint's is that of E_{a~pi} Q_C."""
    learner = a_learner()
    agent, n = learner.agent, 60_000
    obs = torch.zeros(n, 1)
    with torch.no_grad():
        act = agent.sample(agent.policy(obs))
        good = torch.sin(3 * act[:, 0]) + 1.5
        rollout = SimpleNamespace(rew=good[None], value=0 * good[None], next_value=0 * good[None])
        rollout.logp = agent.log_prob(agent.actor(obs), act)[None]
        rollout.states, rollout.act = obs, act[None]
        rollout.terminated = rollout.truncated = torch.ones(1, n, dtype=torch.bool)
        batch = learner.batch_of(rollout)
        batch = batch._replace(advantage=good, own_advantage=agent.risk(obs, batch.own))
    x = torch.linspace(-5, 0.3, 20_001, dtype=torch.float64)

    def exact(mean):
        return float(torch.trapezoid(density(x, mean) * (torch.sin(3 * x) + 1.5), x))

    def bad(mean):
        return float(torch.special.ndtr(torch.tensor((mean - 0.3) / 0.7, dtype=torch.float64)))

    def slope(multiplier, **changes):
        value = sc.surrogate(agent, batch._replace(**changes), multiplier)
        return float(torch.autograd.grad(value, agent.actor[-1].bias)[0])

    expected = (exact(0.101) - exact(0.099)) / 0.002
    risk = (bad(0.101) - bad(0.099)) / 0.002
    first = slope(0.0)
    assert abs(first - expected) < 0.03 and abs(expected) > 0.1
    assert abs(slope(0.0, own_safe=torch.full_like(batch.own_safe, 0.1)) - expected) > 0.3
    assert abs(first - slope(1.0) - risk) < 0.02 and risk > 0.3
    agent.args = replace(agent.args, shield="off")  # TRPO's: nothing but A pi / pi_old
    ratio = (agent.log_prob(agent.actor(obs), act) - batch.logp).exp()
    plain = torch.autograd.grad((good * ratio).mean(), agent.actor[-1].bias)[0]
    assert abs(slope(0.0) - float(plain)) < 1e-9 + 1e-6 * abs(float(plain))


def a_learner(**changes):
    """A learner around a_wall()."""
    agent = a_wall(**changes)
    learner = sc.Learner(1, 1, agent.args, torch.device("cpu"))
    learner.agent = agent
    return learner


def test_the_first_safe_draw_or_the_least_risky():
    agent = a_wall()
    agent.risk = lambda obs, act, target=False: act[..., 0]  # eps is 0.5
    draws = torch.tensor([[0.9, 0.4, 0.1], [0.9, 0.7, 0.8], [0.2, 0.1, 0.9]])[..., None]
    act, found = agent.shielded(torch.zeros(3, 1), draws)
    assert torch.allclose(act[:, 0], torch.tensor([0.4, 0.7, 0.2]))
    assert found.tolist() == [True, False, True]


def test_an_evaluation_takes_the_mean_or_what_the_shield_lets_through():
    learner, obs = a_learner(), np.zeros((3, 1))
    assert (learner.act(obs, explore=False) == 0.1).all()
    torch.nn.init.constant_(learner.agent.actor[-1].bias, 0.5)
    act = learner.act(obs, explore=False)
    assert (act <= 0.3).all() and torch.equal(act, learner.act(obs, explore=False))


def test_where_nothing_passes_the_policy_gets_no_gradient_of_its_reward():
    learner = a_learner()
    learner.agent.risk = lambda obs, act, target=False: torch.full(act.shape[:-1], 0.9)
    obs = torch.zeros(50, 1)
    act = learner.agent.sample(learner.agent.policy(obs)).detach()
    assert learner.agent.counts.tolist() == [50, 50, 50]
    ones = torch.ones(1, 50)
    r = SimpleNamespace(rew=torch.randn(1, 50), value=0 * ones, next_value=0 * ones, logp=0 * ones)
    r.states, r.act, r.terminated, r.truncated = obs, act[None], ones > 0, ones > 1
    batch = learner.batch_of(r)
    value = sc.surrogate(learner.agent, batch, 1.0)
    slopes = torch.autograd.grad(value, learner.agent.policy_parameters())
    assert all((x.abs() < 1e-6).all() for x in slopes)


def random_batch(agent, n=200) -> Batch:
    obs = torch.randn(n, 3)
    with torch.no_grad():
        mean = agent.actor(obs)
        act, own = agent.draw(mean, 1)[:, 0], agent.draw(mean, 4)
        logs = agent.log_prob(mean, act), agent.log_prob(mean[:, None], own)
    safe = torch.full((n, 4), 0.25)
    return Batch(obs, act, logs[0], torch.randn(n), torch.randn(n), own, logs[1], 0 * safe, safe)


def test_the_fisher_product_is_that_of_the_scores_and_the_step_keeps_its_kl():
    args = Args(width=6, depth=1, log_std_init=-0.4, shield="off", lagrange=False, max_kl=1e-3)
    learner = sc.Learner(3, 2, args, torch.device("cpu"))
    agent, batch = learner.agent, random_batch(learner.agent)
    for p in agent.actor.parameters():
        p.data += 0.3 * torch.randn_like(p)
    batch = random_batch(agent)
    names = dict(agent.actor.named_parameters())
    one = lambda p, x: torch.func.functional_call(agent.actor, p, (x,))
    parts = torch.func.vmap(torch.func.jacrev(one), (None, 0))(names, batch.obs)
    J = torch.cat([x.flatten(2) for x in parts.values()], 2)  # (B, act, n)
    F = torch.einsum("boi,boj,o->ij", J, J, torch.exp(-2 * agent.log_std)) / len(batch.obs)
    F = torch.block_diag(F, 2 * torch.eye(2)).detach()
    d = [torch.randn_like(p) for p in agent.policy_parameters()]
    assert torch.allclose(sc.flat(sc.fisher(agent, batch.obs)(d)), F @ sc.flat(d), atol=1e-4)
    before = [p.detach().clone() for p in agent.policy_parameters()]
    info = learner.policy_step(batch)
    moved = sc.flat([p.detach() - x for p, x in zip(agent.policy_parameters(), before)])
    assert 0 < info["kl"] <= 1e-3 and info["gain"] > 0
    predicted = 0.5 * moved @ F @ moved
    assert abs(info["kl"] / predicted - 1) < 0.03
    g = torch.autograd.grad(sc.surrogate(agent, batch, 0.0), agent.policy_parameters())
    assert moved @ sc.flat(g) > 0


def test_a_step_that_gains_nothing_is_not_taken(monkeypatch):
    """A gradient, and all of it lost again at any distance."""
    learner = sc.Learner(3, 2, Args(width=4, depth=1), torch.device("cpu"))
    agent = learner.agent
    before = sc.flat(agent.policy_parameters()).detach()

    def deceptive(agent, batch, multiplier):
        moved = sc.flat(agent.policy_parameters()) - before
        return (moved - 1e12 * moved**2).sum()

    monkeypatch.setattr(sc, "surrogate", deceptive)
    info = learner.policy_step(random_batch(agent))
    assert torch.equal(sc.flat(agent.policy_parameters()), before) and info["backtracks"] == 15


def test_a_step_of_the_safety_critic_by_hand():
    """Rows of the replay are standardised; y is the target network's, of pi's action at s'; the
    target network follows."""
    args = Args(width=6, depth=1, normalize_obs=True, tau=0.1, log_std_init=-20.0)
    learner = sc.Learner(2, 1, args, torch.device("cpu"))
    agent = learner.agent
    learner.obs_stats.update(torch.randn(50, 2) * 3 + 5)
    for p in [*agent.actor.parameters(), *agent.safety_target.parameters()]:
        p.data += torch.randn_like(p)
    obs, next_obs, act = torch.randn(20, 2) + 4, torch.randn(20, 2) + 6, torch.rand(20, 1)
    cost, over = (torch.rand(20) < 0.3).float(), (torch.rand(20) < 0.5).float()
    with torch.no_grad():
        seen, then = (learner.obs_stats.standardise(x) for x in (obs, next_obs))
        follow = agent.risk(then, agent.actor(then), target=True)
        y = cost + 0.8 * (1 - over) * follow
        expected = ((agent.risk(seen, act) - y) ** 2).mean()
        policy = agent.risk(seen, agent.actor(seen)).mean()
        before = [p.clone() for p in agent.safety_target.parameters()]
    losses = learner.safety_step(Transitions(obs, act, cost, over, next_obs))
    assert torch.allclose(losses["safety_error"], expected)
    assert torch.allclose(losses["risk_policy"], policy)
    for old, now, p in zip(before, agent.safety_target.parameters(), agent.safety.parameters()):
        assert torch.allclose(now, 0.9 * old + 0.1 * p, atol=1e-6)


def test_an_update_by_hand():
    """What was safe is what the critic that played said; the constraint is the new critic's, with
    K / (K - 1), and turns the policy away from what is risky whatever the reward says."""
    learner = a_learner(normalize_obs=True, safety_updates=1, value_updates=1)
    agent, n = learner.agent, 2000
    obs = torch.zeros(n, 1)
    act = agent.sample(agent.policy(obs)).detach()
    zeros = torch.zeros(1, n)
    rollout = SimpleNamespace(rew=act.T, value=zeros, next_value=zeros, states=obs, act=act[None])
    rollout.logp = agent.log_prob(agent.actor(obs), act).detach()[None]
    rollout.terminated, rollout.truncated, rollout.raw_obs = (
        zeros == 0,
        zeros > 0,
        [np.ones((n, 1))],
    )

    def learn(batch):  # from now on all above 0 is risky
        agent.risk = lambda obs, act, target=False: (act[..., 0] > 0).to(act)
        return {}

    seen, step = [], learner.policy_step
    learner.safety_step = learn
    learner.policy_step = lambda batch: seen.append(batch) or step(batch)
    learner.multiplier.fill_(100)
    learner.update(rollout, SimpleNamespace(sample=lambda n: None))
    (batch,) = seen
    assert torch.equal(batch.own_safe > 0, batch.own[..., 0] <= 0.3)
    risk = (batch.own[..., 0] > 0).float()
    assert torch.allclose(batch.own_advantage, (risk - risk.mean(1, keepdim=True)) / 0.9, atol=1e-6)
    assert agent.actor[-1].bias < 0.1  # the reward is the action itself
    assert learner.obs_stats.count == n and learner.obs_stats.mean == 1


def test_the_multiplier_and_the_papers_threshold():
    """Ascent on V_C - chi, never below 0; eps = (1 - gamma_C)(chi - V_C)."""
    args = Args(**TINY, threshold="paper", accident_limit=0.3, multiplier_lr=2.0)
    learner = sc.Learner(2, 2, args, torch.device("cpu"))
    replay = sc.Replay(80, 2, 2, torch.device("cpu"))
    zeros = torch.zeros(40, 2)
    columns = (torch.zeros(80, 2), torch.zeros(80, 2), torch.zeros(80), torch.zeros(80))
    replay.add(Transitions(*columns, torch.zeros(80, 2)))
    rollout = SimpleNamespace(states=torch.zeros(80, 2), rew=zeros, value=zeros, next_value=zeros)
    rollout.act, rollout.logp = torch.randn(40, 2, 2), zeros
    rollout.terminated = rollout.truncated = zeros > 0
    for v_c, before, after in ((0.5, 1.0, 1.4), (0.1, 1.0, 0.6), (0.1, 0.1, 0.0)):
        learner.agent.risk = lambda obs, act, v=v_c: torch.full(act.shape[:-1], v)
        learner.safety_step = lambda batch: {}
        learner.multiplier.fill_(before)
        _, numbers = learner.update(rollout, replay)
        assert abs(float(numbers["multiplier"]) - after) < 1e-6
        assert abs(float(learner.agent.eps) - 0.2 * (0.3 - v_c)) < 1e-6


# ----------------------------------------------------------------------------- what an accident is
class Spill(gym.Env):
    """Observes (episode, time), always in the same array. Costs something at its second step and
    goes on; every other episode has no cost and terminates, the others time out."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, cost=None):
        self.episode, self.cost, self.obs = -1, cost, np.zeros(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        self.obs[:] = self.episode, 0
        return self.obs, {}

    def step(self, action):
        self.t += 1
        odd, last = self.episode % 2 == 1, self.t == 5
        cost = {"cost": self.cost or 0.5 * (self.t in (2, 4) and not odd)}
        self.obs[:] = self.episode, self.t
        return self.obs, 0.0, odd and last, last and not odd, cost


class Restless(Spill):
    """Never the same observation; every episode costs something at its second step."""

    steps = 0

    def step(self, action):
        obs, *_ = super().step(action)
        Restless.steps += 1
        return obs + Restless.steps, 0.0, False, self.t == 5, {"cost": float(self.t == 2)}


if "Spill-v0" not in gym.registry:
    gym.register("Spill-v0", entry_point=Spill, max_episode_steps=100)
    gym.register("BadSpill-v0", entry_point=Spill, kwargs={"cost": [0.0, 1.0]})
    gym.register("BadSpill-v1", entry_point=Spill, kwargs={"cost": math.nan})
    gym.register("BadSpill-v2", entry_point=Spill, kwargs={"cost": {"walls": 1.0}})
    gym.register("Restless-v0", entry_point=Restless)


@pytest.mark.parametrize("env_id", ["Counting-v0", "Spill-v0"])
def test_accidents_are_costs_or_terminations_and_never_time_limits(env_id):
    """In the replay each row has its own s', also where an episode ends."""
    out = train(Args(**TINY, env_id=env_id))
    rows = load(only_run(".") / "checkpoint.pt")["replay"]
    obs, over, accident = rows["obs"], rows["over"] > 0, rows["cost"] > 0
    assert len(obs) == 400 and torch.equal(rows["next_obs"], obs + torch.tensor([0.0, 1.0]))
    episode, t = obs.long().T
    if env_id == "Counting-v0":
        expected = (t == 2 + episode % 3) & (episode % 2 == 0)
    else:  # after an accident nothing counts; odd episodes end without one
        expected = (episode % 2 == 0) & ((t == 1) | (t == 3))
    assert torch.equal(accident, expected)
    ends = (episode % 2 == 1) & (t == 4) if env_id == "Spill-v0" else False
    assert torch.equal(over, expected | ends)
    assert abs(out["accidents"] / out["episodes"] - 0.5) < 0.05


def test_the_ledger_gets_each_states_own_risk_and_gamma_c(monkeypatch):
    """V_C is episode / 100 at an episode's first step, and beyond 1 at the others."""
    risk = lambda self, obs: obs[:, 0] / 100 + obs[:, 1]
    monkeypatch.setattr(sc.Learner, "policy_risk", risk)
    train(Args(**TINY, env_id="Spill-v0", safety_gamma=0.7))
    _, predicted, realised, _ = load(only_run(".") / "checkpoint.pt")["ledger"]["episodes"].T
    episode = torch.arange(40).repeat_interleave(2).double()
    assert torch.allclose(predicted, episode / 100)
    expected = 0.7 * (episode % 2 == 0).double()
    assert torch.allclose(realised, expected, rtol=0, atol=1e-15)  # a float32 is off by 1e-8


def test_what_cannot_be_repeated_begins_anew_in_the_ledger_too():
    """42 steps of two environments are nine episodes begun, each with an accident."""
    short = TINY | dict(num_steps=42, env_id="Restless-v0")
    assert train(Args(**short | dict(total_timesteps=84)))["accidents"] == 18
    again = Args(**short | dict(total_timesteps=168), resume=str(only_run(".")))
    assert train(again)["accidents"] == 36


@pytest.mark.parametrize("env_id", ["BadSpill-v0", "BadSpill-v1", "BadSpill-v2"])
def test_a_cost_that_is_no_number_is_one_line(env_id, capsys):
    said = refused(capsys, lambda: train(Args(**TINY, env_id=env_id)))
    assert 'info["cost"]' in said and "expected one number" in said


def test_a_finished_run_resumed_with_the_shield_has_a_summary_without_nan():
    """Nothing was drawn, so no share of it was refused."""
    train(Args(**TINY, env_id="Spill-v0", shield="off"))
    folder = only_run(".")
    out = train(Args(**TINY, env_id="Spill-v0", resume=str(folder)))
    assert "refused" not in out and "NaN" not in (folder / "summary.json").read_text()


def test_the_ledger_by_hand():
    """Two environments, three and two steps; gamma 0.5. A second accident in an episode is none."""
    ledger, no = Ledger(2), torch.zeros(3, 2, dtype=torch.bool)
    r = SimpleNamespace(terminated=no.clone(), truncated=no.clone())
    r.terminated[1, 0] = r.truncated[2, 1] = True
    accident = np.array([[0, 1], [1, 1], [0, 0]], dtype=bool)
    risk = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    ledger.take(100, r, risk, accident, 0.5)
    first, second = ledger.episodes
    assert np.allclose(first, (104, 0.1, 0.5, 1)) and np.allclose(second, (106, 0.2, 1, 1))
    assert ledger.accidents == 2 and np.allclose(ledger.now, [[1, 0.5, 0, 0], [0, 0, 0, 0]])
    assert ledger.rate(100, 106) == 1000 / 3 and ledger.rate(104, 106) == 500
    assert ledger.means(104, 106)["realised"] == 1 and ledger.means(106, 200) == {}
    other = Ledger(2)
    other.load_state_dict(ledger.state_dict())
    for x in (ledger, other):
        x.take(
            106, SimpleNamespace(terminated=no[:2], truncated=~no[:2]), risk[:2], no.numpy(), 0.5
        )
    assert other.episodes == ledger.episodes and len(other.episodes) == 6
    assert np.allclose(other.episodes[2], (108, 0.5, 0, 0))


def test_navigation():
    """A straight line ends in the trap; around it is the goal, which is no accident."""
    sc.register()
    env = gym.make("Navigation-v0")
    for detour, cost in ((False, 1.0), (True, 0.0)):
        env.reset(seed=1)
        for t in range(20):
            up = detour * float((t < 3) - (10 <= t < 13))
            obs, rew, terminated, truncated, info = env.step(np.array([1.0, up], np.float32))
            assert env.observation_space.contains(obs)
            if terminated:
                break
        assert terminated and info["cost"] == cost and (abs(obs[0]) < 1.1) == (cost == 1)


VERDICTS = {
    "too short to judge": dict(episodes=3),
    "no accidents": dict(accidents=0),
    "everything unsafe": dict(risk_above_95=0.9),
    "critic under-estimates": dict(predicted=0.05),
    "threshold too low": dict(fallbacks=0.8),
    "shield never active": dict(refused=0.0),
    "fewer accidents": {},
    "not fewer accidents": dict(rate_late=60.0),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name):
    summary = dict(episodes=50, accidents=20, rate_early=50.0, rate_late=10.0)
    summary |= dict(predicted=0.3, realised=0.2, refused=0.1, fallbacks=0.1, risk_above_95=0.0)
    assert sc.verdict(summary | VERDICTS[name], Args())[0] == name


@pytest.mark.parametrize("name", VERDICTS)
def test_no_verdict_before_a_fifth_of_the_run_is_a_rollout(name):
    """In the first fifth and the last one there must be an update between: with three rollouts
    both were played by nearly the same policy."""
    summary = dict(episodes=50, accidents=20, rate_early=50.0, rate_late=10.0)
    summary |= dict(predicted=0.3, realised=0.2, refused=0.1, fallbacks=0.1, risk_above_95=0.0)
    for rollouts, num_envs in ((1, 1), (4, 1), (4, 3), (5, 1), (5, 3)):
        args = Args(num_envs=num_envs)
        args.total_timesteps = rollouts * num_envs * args.num_steps
        found, advice = sc.verdict(summary | VERDICTS[name], args)
        assert found == ("too short to judge" if rollouts < 5 else name)
        assert rollouts > 4 or "--total-timesteps" in advice


@pytest.mark.parametrize("name", VERDICTS)
def test_a_verdict_recommends_what_the_run_would_take(name):
    """A number only where it is read, and no switch that is on already."""
    summary = dict(episodes=50, accidents=20, rate_early=50.0, rate_late=10.0)
    summary |= dict(predicted=0.3, realised=0.2, refused=0.1, fallbacks=0.1, risk_above_95=0.0)
    for changes in ({}, {"conservative": "off"}, {"lagrange": False}):
        args = Args(**changes)
        text = sc.verdict(summary | VERDICTS[name], args)[1]
        assert "--safety-alpha" not in text or args.conservative != "off"
        assert "--conservative eq2" not in text or args.conservative == "off"
        assert "--accident-limit" not in text or args.lagrange
        assert "--lagrange" not in text or not args.lagrange


def test_the_summary_by_hand():
    """Fifths for the rates, the second half for what was predicted, the last rollout's numbers."""
    ledger = Ledger(1)
    ledger.episodes = [(100, 0.1, 1, 1), (200, 0.1, 1, 1), (450, 0.1, 1, 0)]
    ledger.episodes += [(600, 0.3, 0.2, 0), (900, 0.5, 0.4, 1)]
    ledger.accidents = 3
    learner = sc.Learner(2, 1, Args(width=4), torch.device("cpu"))
    learner.agent.counts.copy_(torch.tensor([200, 50, 10]))
    numbers = dict(risk_above_95=0.25, multiplier=2.0, v_c=0.1, kl=0.01)
    out = sc.summarise(Args(), learner, ledger, numbers, 1000)
    assert out["rate_early"] == 10 and out["rate_late"] == 5
    assert np.allclose((out["predicted"], out["realised"]), (0.4, 0.3))
    assert (out["refused"], out["fallbacks"], out["v_c"]) == (0.25, 0.05, 0.1)
    ledger.episodes = ledger.episodes[:2]
    assert sc.summarise(Args(), learner, ledger, numbers, 1000)["realised"] == 1


# --------------------------------------------------------------------- promises, mistakes, learning
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path):
    line = "--env Hopper-v5 --normalize-obs --normalize-reward --total-timesteps 700 --num-steps 50"
    line += " --width 16 --log-frequency 60 --eval-frequency 300 --eval-episodes 1"
    line += " --threshold paper --safety-updates 20"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    run_script("safety_critics.py", *line.split(), cwd=whole)
    done = stop_at("safety_critics", "Collector.collect", 2, *line.split(), cwd=parts)
    assert done.returncode == 143 and "to go on" in done.stdout, done.stdout + done.stderr
    run = only_run(parts)
    assert load(run / "checkpoint.pt")["step"] == 400
    run_script("safety_critics.py", "--resume", run, cwd=parts)
    assert_same_checkpoint(run / "checkpoint.pt", only_run(whole) / "checkpoint.pt")
    assert metrics(run) == metrics(only_run(whole)) and len(metrics(run)) > 60


def test_what_is_given_anew_on_resume_holds(capsys):
    """Also where the run becomes longer than its replay was."""
    train(Args(**TINY, multiplier_lr=1e4, accident_limit=0.0))
    run = only_run(".")
    before = load(run / "checkpoint.pt")["networks"]
    assert before["multiplier"] > 0 and abs(before["agent.eps"] - 0.2) < 1e-6
    longer = TINY | dict(total_timesteps=800)
    train(Args(**longer, lagrange=False, threshold=0.5, resume=str(run)))
    assert "from here on --threshold 0.5, 0.2 so far" in capsys.readouterr().out
    saved = load(run / "checkpoint.pt")
    assert saved["networks"]["multiplier"] == 0 and saved["networks"]["agent.eps"] == 0.5
    assert len(saved["replay"]["obs"]) == saved["step"] == 800
    err = refused(capsys, lambda: train(Args(**longer | dict(num_steps=30), resume=str(run))))
    assert "--num-steps 40, not 30" in err
    off = Args(**longer, shield="off", threshold=0.5, resume=str(run))
    assert "or on resume at 0.2" in refused(capsys, lambda: train(off))


def test_diagnostics_logging_and_evaluation_change_nothing():
    on = Args(**TINY, exp_name="on")
    train(on)
    train(replace(on, exp_name="off", checkpoint_frequency=0, **SILENT))
    runs = {p.name.split("__")[1]: p for p in Path("runs").iterdir()}
    saved = [load(runs[x] / "checkpoint.pt") for x in ("on", "off")]
    for key in ("networks", "optim", "random", "ledger", "replay"):
        assert_equal(*({key: x[key]} for x in saved))
    expected = {"charts/accidents", "losses/safety_error", "eval/episodic_return"}
    names = "kl v_c multiplier eps refused fallbacks predicted realised srank_safety".split()
    expected |= {"diagnostics/" + name for name in names}
    assert expected <= {tag for _, tag, _ in metrics(runs["on"])}


def test_seeds():
    finals = []
    for i, seed in enumerate((1, 1, 2)):
        train(Args(**TINY, seed=seed, run_dir=f"runs{i}"))
        finals.append(load(next(Path(f"runs{i}").iterdir()) / "checkpoint.pt")["networks"])
    assert_equal(finals[0], finals[1])
    assert not torch.equal(finals[0]["agent.log_std"], finals[2]["agent.log_std"])


@pytest.mark.parametrize("where", ["actor.4.bias", "safety.4.bias"])
def test_non_finite_parameters_end_the_run(where, monkeypatch, capsys):
    update = sc.Learner.update

    def poisoned(self, *args):
        out = update(self, *args)
        dict(self.agent.named_parameters())[where].data[0] = math.nan
        return out

    monkeypatch.setattr(sc.Learner, "update", poisoned)
    with pytest.raises(SystemExit) as stop:
        train(Args(**TINY | SILENT))
    assert stop.value.code == 3 and f"{where} is not finite" in capsys.readouterr().err
    assert not (only_run(".") / "checkpoint.pt").exists()


BAD = {
    "--env CartPole-v1": "CartPole",
    "--threshold 2": "--threshold",
    "--threshold paper --safety-gamma 1": "--threshold paper",
    "--threshold 0.5 --shield off": "--threshold",
    "--shield off --shield-draws 5": "--shield-draws",
    "--conservative off --safety-alpha 1": "--safety-alpha",
    "--no-lagrange --accident-limit 0.5": "--accident-limit",
    "--no-lagrange --multiplier-lr 0.5": "--multiplier-lr",
    "--num-steps 1 --num-envs 1": "--num-steps",
}


@pytest.mark.parametrize("line", BAD)
def test_a_users_mistake_is_one_line_and_status_2(line, capsys):
    assert BAD[line] in refused(capsys, lambda: train(tyro.cli(Args, args=line.split())))
    assert not Path("runs").exists()


def documented_commands() -> list:
    commands = []
    for file in (*ROOT.glob("**/*.md"), ROOT / "safety_critics.py"):
        text = file.read_text().replace("\\\\\n", " ").replace("\\\n", " ")
        text = text if file.suffix == ".md" else text.split('"""')[1]
        commands += re.findall(r"python safety_critics\.py[^\n`#&|;]*", text)
    return sorted({" ".join(c.split()) for c in commands})


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_run(command):
    """Parsed as written, then cut to a few short rollouts."""
    args = tyro.cli(Args, args=shlex.split(command)[2:])
    short = dict(total_timesteps=60, num_steps=16, eval_episodes=1, value_updates=2)
    assert train(replace(args, **short, safety_updates=3))["global_step"] >= 60


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """With all three and with none, 10,000 steps of the trap."""
    home = tmp_path_factory.mktemp("runs")
    common = dict(total_timesteps=10_000, eval_frequency=0, run_dir=str(home))
    plain = Args(**common, shield="off", lagrange=False, safety_updates=20)
    return train(Args(**common)), train(plain), home


def test_fewer_accidents_than_without_and_no_less_is_learned(runs):
    """Standing still is -5; straight into the trap about 1."""
    safe, plain, _ = runs
    assert safe["accidents"] < 0.5 * plain["accidents"] and plain["accidents"] > 300
    assert safe["final_return_mean"] > 2 and safe["verdict"] == "fewer accidents"
    assert safe["refused"] > 0.001 and "refused" not in plain


def test_play_films_the_scripts_own_environment(runs, monkeypatch, capsys):
    pytest.importorskip("moviepy")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import play

    run = next(runs[2].glob("*"))
    monkeypatch.setattr("sys.argv", ["play.py", str(run), "--out", "film.gif"])
    play.main()
    assert "episode 1: return" in capsys.readouterr().out and Path("film.gif").stat().st_size > 1000
