r"""Conservative safety critics (arXiv 2010.14497): fewer accidents while a policy still learns.

An agent that learns by trying has accidents. Let V_C be the probability of one from a state on,
discounted by gamma_C, under pi. Wanted is the largest return with V_C <= chi at every iteration,
not only at the end:

  max_pi  E_pi[return]   such that   V_C <= chi   and   KL(pi_old || pi) <= delta

The critic Q_C learns from D, all steps so far. c = 1: an accident; over = 1: nothing follows.

  y = c + gamma_C (1 - over) Q_target(s',a'),  a' ~ pi(.|s')
  min_Q   1/2 E_D (Q_C - y)^2 - alpha (E_{D,a~pi} Q_C - E_D Q_C)            eq2
  min_Q   1/2 E_D (Q_C - y)^2 - alpha  E_{D,a~pi} Q_C                       eq1

This is conservative Q-learning (CQL, arXiv 2006.04779; its Eqs. 1 and 2) turned round: Q_C is a
cost, and to err on the safe side it must be too high. With CQL's own sign, as slides print the term
for this purpose, too, accidents look less likely than they are. Let b be the policy that made D. In
a table, where b takes all actions, the least loss is at

  eq2  Q_C = y + alpha (pi / b - 1)     too high on average over pi: a bound of V_C, not of Q_C
  eq1  Q_C = y + alpha pi / b           too high at each action

Where D has no action the term alone has no least value. So Q_C is a sigmoid here: in [0, 1], with
a gradient that dies at both ends. Cut at 1, eq2 may lose its bound of V_C. Q_C is used thrice:

  shield      draw a ~ pi until Q_C(s,a) <= eps, at most --shield-draws times, else take the least
              risky; eps is --threshold, or `paper`: (1 - gamma_C)(chi - V_C)
  policy      p = pi / P(safe|s) is the density behind the shield; without P pi may drift to what
              is barred. Natural gradient of E[p / p_old A] - lambda E_{a~pi_old}[pi / pi_old
              (Q_C - V_C)] and a line search (TRPO, arXiv 1502.05477); A has deviation 1, so that
              lambda does not depend on the scale of rewards
  multiplier  lambda <- max(0, lambda + rate (V_C - chi)). V_C is a mean over the rollout's states:
              chi bounds pi without its shield, on states that are visited with it

  Q_C, y         Agent.risk, td_target (B,)       alpha, gamma_C  --safety-alpha, --safety-gamma
  pi, A          Agent.actor, Batch.advantage     eps, chi        --threshold, --accident-limit
  lambda, delta  Learner.multiplier, --max-kl     P(safe|s), D    surrogate's p_safe, Replay

A trap; TRPO; multiplier alone, alpha 0; shield alone; the other bound; alpha 0; a pole; a hopper:
  python safety_critics.py
  python safety_critics.py --shield off --no-lagrange
  python safety_critics.py --shield off --conservative off
  python safety_critics.py --no-lagrange
  python safety_critics.py --conservative eq1
  python safety_critics.py --conservative off
  python safety_critics.py --env InvertedPendulum-v5 --normalize-obs
  python safety_critics.py --env Hopper-v5 --total-timesteps 500_000 --normalize-obs \
      --normalize-reward
Watch `charts/accidents`; `refused`, `fallbacks`, `predicted` beside `realised` (diagnostics/).
docs/safety.md has numbers. Left out: discrete actions, a critic trained beforehand.
"""

import copy
import ctypes
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # seeds networks, actions and environments
    cuda: bool = True  # use the GPU if there is one
    threads: int = 1  # CPU threads of PyTorch (0: all cores; slow where something else runs too)
    track: bool = False  # log to Weights & Biases as well (needs `pip install wandb`)
    wandb_project_name: str = "offline-rl"  # project of --track
    wandb_entity: str | None = None  # team of --track
    # Gymnasium environment, `module:Id` where a package has to be imported for it
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "Navigation-v0"
    run_dir: str = "runs"  # folder that holds the run folders
    resume: str | None = None  # run folder to go on from; its arguments hold unless given again
    checkpoint_frequency: int = 100_000  # environment steps between checkpoints (0: at the end)
    eval_frequency: int = 10_000  # steps between evaluations and diagnostics (0: at the end)
    eval_episodes: int = 20  # episodes of each evaluation (0: diagnostics only)
    log_frequency: int = 2_000  # environment steps between logged losses

    # length and data
    total_timesteps: int = 40_000  # environment steps
    num_envs: int = 4  # N, environments stepped together
    num_steps: int = 250  # T, steps of each environment for one policy step
    normalize_obs: bool = False  # running standardisation of observations (MuJoCo: on)
    # rewards divided by the running deviation of their discounted sum so far (MuJoCo: on)
    normalize_reward: bool = False

    # policy
    gamma: float = 0.99  # discount factor of rewards
    gae_lambda: float = 0.95  # lambda of the advantage estimate
    max_kl: float = 0.01  # delta, trust region of a policy step
    damping: float = 0.1  # l of F d + l d = g
    cg_steps: int = 10  # steps of conjugate gradients
    value_updates: int = 40  # steps of Adam on the value of each rollout
    value_lr: float = 1e-3  # their learning rate

    # the safety critic
    safety_gamma: float = 0.8  # gamma_C: below 1 an accident far ahead counts less
    conservative: Literal["eq2", "eq1", "off"] = "eq2"  # form of the conservative term
    safety_alpha: float = 0.005  # alpha, weight of the conservative term
    safety_updates: int = 250  # minibatches of the safety critic for each rollout
    safety_lr: float = 1e-3  # their learning rate
    batch_size: int = 256  # B, transitions in one of them
    tau: float = 0.01  # Polyak rate of the target of the safety critic
    # shield
    shield: Literal["rejection", "off"] = "rejection"  # draw until Q_C <= eps, or once
    # eps; paper: (1 - gamma_C)(chi - V_C) from the next update on, 1 in a new run's first rollout
    threshold: float | Literal["paper"] = 0.2
    shield_draws: int = 100  # most actions drawn in a state
    # constraint
    lagrange: bool = True  # hold V_C below chi by a multiplier
    accident_limit: float = 0.02  # chi, of the mean of V_C over a rollout's states
    multiplier_lr: float = 10.0  # rate of the multiplier's ascent, once a rollout

    # networks
    width: int = 64  # units in a hidden layer
    depth: int = 2  # hidden layers, tanh
    log_std_init: float = 0.0  # of the policy at the start; the action box is [-1, 1]


# a resumed run must have these as before: its networks, environments and data would not fit
FIXED = """env_id seed num_envs num_steps normalize_obs normalize_reward width depth
log_std_init""".split()
OWN_DRAWS = 10  # actions of pi in each state, for V_C and the constraint's gradient


def check(args: Args):
    """Refuse what no run could use, before anything starts."""
    check_numbers(args, "seed eval_frequency checkpoint_frequency", 0, 1e12)
    check_numbers(args, "damping safety_alpha", 0, 1e12)
    check_numbers(args, "max_kl value_lr safety_lr multiplier_lr", 1e-12, 1e12)
    check_numbers(args, "total_timesteps log_frequency num_envs num_steps batch_size", 1, 1e12)
    check_numbers(args, "width depth value_updates safety_updates cg_steps", 1, 1e12)
    check_numbers(args, "threads eval_episodes", 0, 1e4)
    check_numbers(args, "shield_draws", 2, 1e4)
    check_numbers(args, "gamma gae_lambda safety_gamma accident_limit", 0, 1)
    check_numbers(args, "tau", 1e-9, 1)
    check_numbers(args, "log_std_init", -20, 20)
    if args.threshold != "paper":
        check_numbers(args, "threshold", 0, 1)
    elif args.safety_gamma == 1:
        fail("--threshold paper is (1 - gamma_C)(chi - V_C): it needs --safety-gamma below 1")
    check_effect(args, "safety_alpha", args.conservative != "off", "with --conservative off")
    check_effect(args, "threshold shield_draws", args.shield != "off", "with --shield off")
    check_effect(args, "multiplier_lr", args.lagrange, "with --no-lagrange")
    bounded = args.lagrange or args.threshold == "paper"
    check_effect(args, "accident_limit", bounded, "without --lagrange or --threshold paper")
    if args.num_envs * args.num_steps == 1:
        fail("--num-steps 1 --num-envs 1: one advantage alone has no standard deviation")


# --------------------------------------------------------------------------------------- networks
def layer_init(layer, gain: float = 2**0.5):
    """Orthogonal weights, zero bias."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(fan_in: int, hidden: list[int], fan_out: int, gain: float) -> nn.Sequential:
    """Hidden layers with tanh; the last layer's gain is small for a policy, which then starts near
    uniform."""
    sizes = [fan_in, *hidden]
    layers = []
    for i, o in zip(sizes, hidden):
        layers += [layer_init(nn.Linear(i, o)), nn.Tanh()]
    return nn.Sequential(*layers, layer_init(nn.Linear(sizes[-1], fan_out), gain))


class Agent(nn.Module):
    """Gaussian policy on [-1, 1]^act, clipped there by the environment; value; safety critic."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        hidden, self.args = [args.width] * args.depth, args
        self.actor = mlp(obs_dim, hidden, act_dim, 0.01)
        self.log_std = nn.Parameter(torch.full((act_dim,), args.log_std_init))
        self.critic = mlp(obs_dim, hidden, 1, 1.0)
        self.safety = mlp(obs_dim + act_dim, hidden, 1, 0.01)
        # Q_C starts near 0.05: before the first accidents nothing is known to be unsafe
        nn.init.constant_(self.safety[-1].bias, -3.0)
        self.safety_target = copy.deepcopy(self.safety).requires_grad_(False)
        eps = 1.0 if args.threshold == "paper" else args.threshold  # until V_C is known
        self.register_buffer("eps", torch.tensor(eps))
        # of the run so far: actions, those whose first draw the shield refused, fall-backs
        self.register_buffer("counts", torch.zeros(3, dtype=torch.float64))

    def forward(self, obs):
        """Mean of the policy (B, act) and V(s) (B,)."""
        return self.actor(obs), self.critic(obs)[:, 0]

    def policy(self, obs):
        """What sample() needs: observations and means."""
        return obs, self.actor(obs)

    def policy_parameters(self) -> list:
        return [*self.actor.parameters(), self.log_std]

    def features(self, obs) -> dict:
        """What the last layers read, (B, D) each, for the diagnostics."""
        pair = torch.cat([obs, self.actor(obs).clamp(-1, 1)], -1)
        found = {"policy": self.actor[:-1](obs), "value": self.critic[:-1](obs)}
        return found | {"safety": self.safety[:-1](pair)}

    def risk(self, obs, act, target: bool = False):
        """Q_C(s,a) in [0, 1], (B,); of M actions a state, (B, M, act), (B, M). The action is what
        the environment makes of it, in the box."""
        obs = obs if act.dim() == 2 else obs[:, None].expand(-1, act.shape[1], -1)
        net = self.safety_target if target else self.safety
        return net(torch.cat([obs, act.clamp(-1, 1)], -1))[..., 0].sigmoid()

    def draw(self, mean, n: int, generator=None):
        """n actions of pi without its shield in each state, (B, n, act)."""
        noise = torch.randn(len(mean), n, mean.shape[1], generator=generator)
        return mean[:, None] + self.log_std.exp() * noise.to(mean)

    def sample(self, seen):
        """Executed actions, (B, act), of (observations, means); the shield's work is counted."""
        obs, mean = seen
        act = self.draw(mean, 1)
        if self.args.shield == "off":
            return act[:, 0]
        chosen, fallbacks = act[:, 0].clone(), 0
        refused = (self.risk(obs, act) > self.eps)[:, 0]
        if refused.any():
            more = self.draw(mean[refused], self.args.shield_draws - 1)
            draws = torch.cat([act[refused], more], 1)
            chosen[refused], found = self.shielded(obs[refused], draws)
            fallbacks = int((~found).sum())
        made = [len(obs), int(refused.sum()), fallbacks]
        self.counts += torch.tensor(made).to(self.counts)
        return chosen

    def shielded(self, obs, draws):
        """Of draws (B, M, act) the first with Q_C <= eps, else the least risky, (B, act); whether
        there was such a one, (B,)."""
        risk = self.risk(obs, draws)
        safe, rows = risk <= self.eps, torch.arange(len(obs), device=obs.device)
        found = safe.any(1)
        first = safe.long().argmax(1)  # of equal values torch takes the first
        return draws[rows, torch.where(found, first, risk.argmin(1))], found

    def log_prob(self, mean, act):
        """log pi(a|s) without the shield, (B,), or (B, M) of means (B, 1, act)."""
        z = (act - mean) / self.log_std.exp()
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def kl(self, mean, log_std, new_mean):
        """KL(old || now), (B,), of an old mean and log_std; now is new_mean and this agent's."""
        variance = torch.exp(2 * log_std) + (mean - new_mean) ** 2
        return (self.log_std - log_std + variance / (2 * torch.exp(2 * self.log_std)) - 0.5).sum(-1)


# ------------------------------------------------------------------ losses of the safety critic
class Transitions(NamedTuple):
    obs: torch.Tensor  # (B, obs), as the environment gave it
    act: torch.Tensor  # (B, act)
    cost: torch.Tensor  # (B,), 1 where there was an accident
    over: torch.Tensor  # (B,), 1 where nothing follows: accident or end, no time limit
    next_obs: torch.Tensor  # (B, obs)


def td_target(batch: Transitions, next_risk, args: Args):
    """y = c + gamma_C (1 - over) Q_target(s', a'), (B,)."""
    return batch.cost + args.safety_gamma * (1 - batch.over) * next_risk


def safety_loss(q, q_pi, y, args: Args):
    """1/2 (Q_C - y)^2 - alpha (Q_C at actions of pi, less that at the data's in eq2), (B,) each."""
    gap = q_pi.mean() - (q.mean() if args.conservative == "eq2" else 0)
    alpha = 0 if args.conservative == "off" else args.safety_alpha
    return 0.5 * ((q - y) ** 2).mean() - alpha * gap


# ----------------------------------------------------------------------- the policy's objective
class Batch(NamedTuple):
    obs: torch.Tensor  # (B, obs), standardised
    act: torch.Tensor  # (B, act), executed
    logp: torch.Tensor  # (B,), log pi_old(a|s)
    advantage: torch.Tensor  # (B,), standardised
    target: torch.Tensor  # (B,), V_target
    own: torch.Tensor  # (B, K, act), drawn from pi_old without its shield
    own_logp: torch.Tensor  # (B, K)
    own_advantage: torch.Tensor  # (B, K), Q_C - V_C
    own_safe: torch.Tensor  # (B, K), 1 / (safe draws) where one of them is safe, else 0


def surrogate(agent: Agent, batch: Batch, multiplier):
    """E[ p / p_old A ] - lambda E_{a~pi_old}[ pi / pi_old (Q_C - V_C) ].

    p = pi / P(safe|s) is the density of what the shield lets through. Where none of the OWN_DRAWS
    is safe P is unknown, and the first term 0: there the reward has no say."""
    mean = agent.actor(batch.obs)
    ratio = (agent.log_prob(mean, batch.act) - batch.logp).exp()
    own_ratio = (agent.log_prob(mean[:, None], batch.own) - batch.own_logp).exp()
    gain = batch.advantage * ratio
    if agent.args.shield != "off":
        p_safe = (batch.own_safe * own_ratio).sum(1)  # P(safe|s) of pi over that of pi_old
        gain = gain / p_safe.clamp(min=1e-6) * (p_safe > 0)
    return gain.mean() - multiplier * (own_ratio * batch.own_advantage).mean()


# ----------------------------------------------------------------------- the natural gradient
# Directions d are lists like the policy's parameters.
def flat(d: list):
    return torch.cat([x.reshape(-1) for x in d])


def unflat(v, like: list) -> list:
    return [x.view_as(p) for x, p in zip(v.split([p.numel() for p in like]), like)]


def conjugate_gradients(product, g: list, steps: int) -> list:
    """Approximates d with product(d) = g, from d = 0; residual r = g - product(d), search
    direction p."""
    d, r, p = torch.zeros_like(flat(g)), flat(g), flat(g)
    rr = start = r @ r
    for _ in range(steps):
        if rr < 1e-12 * start:
            break
        q = flat(product(unflat(p, g)))
        if p @ q <= 0:  # not positive definite in floating point, or g = 0
            break
        alpha = rr / (p @ q)
        d, r = d + alpha * p, r - alpha * q
        rr_new = r @ r
        p, rr = r + rr_new / rr * p, rr_new
    return unflat(d, g)


def fisher(agent: Agent, obs):
    """The product d -> F d, F the Hessian at pi_old of E_s KL(pi_old || pi): Fisher's matrix."""
    params, mean = agent.policy_parameters(), agent.actor(obs)
    kl = agent.kl(mean.detach(), agent.log_std.detach(), mean).mean()
    slope = flat(torch.autograd.grad(kl, params, create_graph=True))

    def product(d: list) -> list:
        return [*torch.autograd.grad(slope @ flat(d), params, retain_graph=True)]

    return product


# ------------------------------------------------------------------------------------- the data
class Replay:
    """All transitions of the run, on the device."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device):
        reserve(4 * capacity * (2 * obs_dim + act_dim + 2), "replay of the whole run", device)
        shapes = Transitions([obs_dim], [act_dim], [], [], [obs_dim])
        self.columns = Transitions(*(torch.zeros(capacity, *s, device=device) for s in shapes))
        self.size = 0

    def add(self, transitions: Transitions):
        rows = slice(self.size, self.size + len(transitions.obs))
        for column, x in zip(self.columns, transitions):
            column[rows] = torch.as_tensor(x)
        self.size = rows.stop

    def sample(self, n: int) -> Transitions:
        rows = torch.randint(self.size, (n,)).to(self.columns.cost.device)
        return Transitions(*(x[rows] for x in self.columns))

    def state_dict(self) -> dict:
        # a part is copied, for torch.save would write the whole tensor
        return {k: x[: self.size].cpu().clone() for k, x in self.columns._asdict().items()}

    def load_state_dict(self, saved: dict):
        self.size = 0
        self.add(Transitions(**saved))


class Accidents(gym.Wrapper):
    """Notes at each step s', which is gone where an episode ends and the next begins in the same
    step, and whether it was an accident: a positive info["cost"], or in an environment that gives
    none a termination."""

    def __init__(self, env):
        super().__init__(env)
        self.notes = []

    def step(self, action):
        obs, rew, terminated, truncated, info = self.env.step(action)
        with failing('info["cost"]: expected one number', TypeError, ValueError):
            cost = np.asarray(info.get("cost", terminated), dtype=float)
        if cost.size != 1 or np.isnan(cost):
            fail(f'info["cost"] is {info["cost"]}: expected one number')
        self.notes.append((np.array(obs), cost.item() > 0))  # a copy: obs may be written again
        return obs, rew, terminated, truncated, info


def transitions(rollout, envs) -> Transitions:
    """A rollout in the replay's form, each field (T, N, ...), with what Accidents has noted since
    the last one; after an accident nothing counts, also where the environment goes on."""
    notes = [zip(*env.env.notes) for env in envs.envs]
    next_obs, accident = (np.stack(x, 1) for x in zip(*notes))
    for env in envs.envs:
        env.env.notes.clear()
    over = rollout.terminated.cpu().numpy() | accident
    columns = (np.stack(rollout.raw_obs), rollout.act.clamp(-1, 1), accident, over, next_obs)
    return Transitions(*map(torch.as_tensor, columns))


class Ledger:
    """Episodes so far, which had an accident, and what Q_C said of them at their first step.

    predicted: V_C(s_0) by the critic that played, of pi without its shield. realised: gamma_C^t if
    an accident came after t steps, 0 if none did."""

    def __init__(self, n: int):
        self.accidents = 0  # at most one an episode, in those that still go on, too
        self.now = np.zeros((n, 4))  # of each: steps so far, predicted, realised, accident
        self.episodes = []  # (step of its end, predicted, realised, accident)

    def take(self, step: int, rollout, risk, accident, gamma: float):
        """A rollout that began at `step`, with V_C (T, N) of its states and accidents (T, N)."""
        over, risk = (rollout.terminated | rollout.truncated).cpu().numpy(), risk.cpu().numpy()
        for t, i in np.ndindex(over.shape):
            if self.now[i, 0] == 0:
                self.now[i] = 0, risk[t, i], 0, 0
            if accident[t, i] and not self.now[i, 3]:
                self.accidents += 1
                self.now[i, 2:] = gamma ** self.now[i, 0], 1
            self.now[i, 0] += 1
            if over[t, i]:
                self.episodes.append((step + (t + 1) * len(self.now), *self.now[i, 1:].tolist()))
                self.now[i] = 0

    def means(self, first: float, last: float) -> dict:
        """Over the episodes that ended after step `first`, up to step `last`; {} if none did."""
        rows = [row[1:3] for row in self.episodes if first < row[0] <= last]
        return dict(zip(("predicted", "realised"), np.mean(rows, axis=0).tolist())) if rows else {}

    def rate(self, first: float, last: float) -> float:
        """Accidents in a thousand steps, in the same span."""
        accidents = sum(row[3] for row in self.episodes if first < row[0] <= last)
        return 1000 * accidents / (last - first)

    def state_dict(self) -> dict:
        episodes = torch.tensor(self.episodes, dtype=torch.float64)  # as Python has them
        arrays = {"now": torch.tensor(self.now), "episodes": episodes}
        return arrays | {"accidents": self.accidents}

    def load_state_dict(self, saved: dict):
        self.accidents, self.now = saved["accidents"], saved["now"].numpy()
        self.episodes = [tuple(row) for row in saved["episodes"].tolist()]


class Learner(nn.Module):
    """Agent, running statistics, multiplier and optimisers."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device):
        super().__init__()
        self.args, self.device = args, device
        self.agent = Agent(obs_dim, act_dim, args)
        self.obs_stats = RunningMeanStd((obs_dim,)) if args.normalize_obs else None
        self.return_stats = RunningMeanStd(()) if args.normalize_reward else None
        self.register_buffer("multiplier", torch.zeros(()))
        self.register_buffer("counted", torch.zeros_like(self.agent.counts))  # already logged
        self.to(device)
        agent, adam = self.agent, torch.optim.Adam
        self.optim = {
            "value": adam(agent.critic.parameters(), lr=args.value_lr, fused=True),
            "safety": adam(agent.safety.parameters(), lr=args.safety_lr, fused=True),
        }

    def standardised(self, obs):
        """Observations of an environment (numpy) as the networks see them, on the device."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return self.obs_stats.standardise(obs).clamp(-10, 10) if self.obs_stats else obs

    @torch.no_grad()
    def act(self, obs, explore: bool):
        """Actions for an environment's observations: of pi behind its shield, or pi's mean, where
        the shield refuses it the first draw that passes; these draws are always the same."""
        seen = self.agent.policy(self.standardised(obs))
        if explore:
            return self.agent.sample(seen)
        obs, mean = seen
        if self.args.shield == "off":
            return mean
        draws = self.agent.draw(mean, self.args.shield_draws, torch.Generator().manual_seed(0))
        return self.agent.shielded(obs, torch.cat([mean[:, None], draws], 1))[0]

    @torch.no_grad()
    def policy_risk(self, obs):
        """V_C(s) of standardised observations: Q_C at actions of pi without its shield, (B,)."""
        agent = self.agent
        return agent.risk(obs, agent.draw(agent.actor(obs), OWN_DRAWS)).mean(1)

    def update(self, rollout, replay: Replay) -> tuple[dict, dict]:
        """The safety critic, the multiplier, the policy and its value, after a rollout that is
        already in the replay: losses, and what to watch. The statistics of observations take it in
        last."""
        args, agent = self.args, self.agent
        batch = self.batch_of(rollout)  # first: what was safe is what the critic that played said
        for _ in range(args.safety_updates):
            losses = self.safety_step(replay.sample(args.batch_size))
        with torch.no_grad():
            risk = agent.risk(batch.obs, batch.own)
            # less the mean of the other draws: no bias, less noise
            centred = (risk - risk.mean(1, keepdim=True)) * OWN_DRAWS / (OWN_DRAWS - 1)
            batch, v_c = batch._replace(own_advantage=centred), risk.mean()
            above = (risk > 0.95).float().mean()
        if args.lagrange:
            ascent = args.multiplier_lr * (v_c - args.accident_limit)
            self.multiplier.copy_((self.multiplier + ascent).clamp(min=0))
        else:  # also on resume
            self.multiplier.zero_()
        if args.threshold == "paper":
            agent.eps.copy_((1 - args.safety_gamma) * (args.accident_limit - v_c))
        numbers = self.policy_step(batch) | self.shield_numbers(agent.counts - self.counted)
        self.counted.copy_(agent.counts)
        for _ in range(args.value_updates):
            loss = 0.5 * ((agent.critic(batch.obs)[:, 0] - batch.target) ** 2).mean()
            self.optim["value"].zero_grad()
            loss.backward()
            self.optim["value"].step()
        losses["value_loss"] = loss.detach()
        unexplained = (batch.target - rollout.value.flatten()).var()
        losses["explained_variance"] = 1 - unexplained / batch.target.var().clamp(min=1e-8)
        if args.normalize_obs:
            self.obs_stats.update(torch.from_numpy(np.concatenate(rollout.raw_obs)))
        numbers |= {"v_c": v_c, "multiplier": self.multiplier, "risk_above_95": above}
        return losses, numbers | {"eps": agent.eps}

    def safety_step(self, batch: Transitions) -> dict:
        """One minibatch of Q_C and of its target network."""
        args, agent = self.args, self.agent
        obs, next_obs = self.standardised(batch.obs), self.standardised(batch.next_obs)
        with torch.no_grad():
            next_act = agent.draw(agent.actor(next_obs), 1)[:, 0]
            y = td_target(batch, agent.risk(next_obs, next_act, target=True), args)
            act = agent.draw(agent.actor(obs), 1)[:, 0]
        q, q_pi = agent.risk(obs, batch.act), agent.risk(obs, act)
        loss = safety_loss(q, q_pi, y, args)
        self.optim["safety"].zero_grad()
        loss.backward()
        self.optim["safety"].step()
        with torch.no_grad():
            for target, p in zip(agent.safety_target.parameters(), agent.safety.parameters()):
                target.lerp_(p, args.tau)
            error, q, q_pi = ((q - y) ** 2).mean(), q.detach(), q_pi.detach()
        return {"safety_error": error, "risk_data": q.mean(), "risk_policy": q_pi.mean()}

    @torch.no_grad()
    def batch_of(self, rollout) -> Batch:
        """The rollout's rows, and draws of pi in each; own_advantage is still to come."""
        args, value, over = self.args, rollout.value, rollout.terminated | rollout.truncated
        advantage = gae(rollout.rew, value, rollout.next_value, over, args.gamma, args.gae_lambda)
        target = advantage + value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        columns = [x.flatten(0, 1) for x in (rollout.act, rollout.logp, advantage, target)]
        obs = rollout.states[: target.numel()]
        mean = self.agent.actor(obs)
        own = self.agent.draw(mean, OWN_DRAWS)
        safe = (self.agent.risk(obs, own) <= self.agent.eps).float()
        safe = safe / safe.sum(1, keepdim=True).clamp(min=1)
        own_logp = self.agent.log_prob(mean[:, None], own)
        return Batch(obs, *columns, own, own_logp, torch.zeros_like(own_logp), safe)

    def policy_step(self, batch: Batch) -> dict:
        """theta <- theta + sqrt(2 delta / d^T F d) d, d ~ F^-1 g, shortened until the objective
        gains and the KL holds."""
        args, agent, params = self.args, self.agent, self.agent.policy_parameters()
        objective = surrogate(agent, batch, self.multiplier)
        g = torch.autograd.grad(objective, params)
        product = fisher(agent, batch.obs)
        damped = lambda d: [x + args.damping * y for x, y in zip(product(d), d)]
        d = conjugate_gradients(damped, g, args.cg_steps)
        full = (2 * args.max_kl / (flat(d) @ flat(product(d))).clamp(min=1e-30)).sqrt()
        with torch.no_grad():
            mean, old = agent.actor(batch.obs), [p.clone() for p in params]
            # a full step lands just above or below max_kl: one back is common; the last is 0
            for backtracks in range(16):
                scale = full * 0.8**backtracks if backtracks < 15 else 0 * full
                for p, p_old, x in zip(params, old, d):
                    p.copy_(p_old + scale * x)
                kl = agent.kl(mean, old[-1], agent.actor(batch.obs)).mean()
                gain = surrogate(agent, batch, self.multiplier) - objective
                if kl <= args.max_kl and gain > 0:
                    break
        return {"kl": kl, "gain": gain, "backtracks": backtracks, "grad_norm": flat(g).norm()}

    def shield_numbers(self, counts) -> dict:
        """Of Agent.counts: share of states whose first draw the shield refused, and of actions that
        are the least risky of many."""
        if self.args.shield == "off" or counts[0] == 0:  # 0: a finished run, resumed
            return {}
        return dict(zip(("refused", "fallbacks"), (counts[1:] / counts[0]).tolist()))


# --------------------------------------------------------------------------- an environment
class Navigation(gym.Env):
    """A point in a square of 10 by 10 goes from the left to the goal at the right; a trap, 2 by 2,
    lies between. To touch the trap or the border is an accident, and ends the episode, as the goal
    does. An action moves it by 0.5 at most in each direction, with noise of 0.1. The reward is how
    much nearer to the goal it came, less 0.1 a step; an accident costs nothing more."""

    observation_space = gym.spaces.Box(-6, 6, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    GOAL, TRAP, HALF = np.array([4.0, 0.0]), np.array([0.0, -0.5]), np.array([1.0, 1.0])

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = np.array([-3.0, 0.0]) + self.np_random.normal(0, 0.25, 2)
        return self.at.astype(np.float32), {}

    def step(self, action):
        far = np.linalg.norm(self.at - self.GOAL)
        self.at = self.at + 0.5 * np.clip(action, -1, 1) + self.np_random.normal(0, 0.1, 2)
        near = np.linalg.norm(self.at - self.GOAL)
        trapped = (np.abs(self.at - self.TRAP) < self.HALF).all()
        accident = bool(trapped or np.abs(self.at).max() > 5)
        info, over = {"cost": float(accident)}, accident or bool(near < 0.75)
        return self.at.astype(np.float32), float(far - near - 0.1), over, False, info

    def render(self):
        """(200, 200, 3): the trap red, the goal green, the point black."""
        places = np.stack(np.meshgrid(np.linspace(-5, 5, 200), np.linspace(5, -5, 200)), -1)
        image = np.full((200, 200, 3), 255, np.uint8)
        image[(np.abs(places - self.TRAP) < self.HALF).all(-1)] = (213, 94, 0)
        image[np.linalg.norm(places - self.GOAL, axis=-1) < 0.75] = (0, 158, 115)
        image[np.linalg.norm(places - self.at, axis=-1) < 0.2] = 0
        return image


def register():
    """Navigation-v0, for gym.make."""
    if "Navigation-v0" not in gym.registry:
        gym.register("Navigation-v0", entry_point=Navigation, max_episode_steps=50)


# ----------------------------------------------------------------------------------- training
def verdict(summary: dict, args: Args) -> tuple[str, str]:
    """What became of the accidents, in words, and the flag to try next."""
    if summary["episodes"] < 10 or args.total_timesteps < 5 * args.num_envs * args.num_steps:
        return "too short to judge", "less than 10 episodes or 5 rollouts: more --total-timesteps"
    if not summary["accidents"]:
        return "no accidents", 'nothing to learn from; does info["cost"] tell of them?'
    plain_critic = args.conservative == "off"
    if summary["risk_above_95"] > 0.5:
        flag = "--safety-gamma" if plain_critic else "--safety-alpha"
        seen = "most of the last rollout's actions have Q_C above 0.95"
        return "everything unsafe", f"{seen}: a smaller {flag}"
    predicted, realised = summary["predicted"], summary["realised"]
    if predicted < 0.8 * realised - 0.01:
        seen = f"in the second half V_C(s0) was {predicted:.2f}, what followed {realised:.2f}"
        mend = "--conservative eq2" if plain_critic else "a larger --safety-alpha"
        return "critic under-estimates", f"{seen}: {mend}, more --safety-updates"
    if summary.get("fallbacks", 0) > 0.5:
        return "threshold too low", "most actions are the least risky of many: a larger --threshold"
    if summary.get("refused", 1) < 0.001:
        return "shield never active", "it refused next to no draw: a smaller --threshold"
    early, late = summary["rate_early"], summary["rate_late"]
    course = f"{early:.3g} accidents in 1,000 steps in the first fifth, {late:.3g} in the last"
    if late >= early:
        mend = "a smaller --accident-limit" if args.lagrange else "--lagrange"
        return "not fewer accidents", f"{course}: {mend}"
    plain = args.shield == "off" and not args.lagrange
    other = "--shield rejection --lagrange" if plain else "--shield off --no-lagrange"
    return "fewer accidents", f"{course}; compare with {other}"


def summarise(args: Args, learner, ledger: Ledger, numbers: dict, step: int) -> dict:
    """Accidents and the shield's work over the whole run, and the verdict. predicted, realised: of
    its second half, for at first the critic knows nothing; of all if no episode ended there.
    rate_early, rate_late: accidents in a thousand steps, in the first and the last fifth.
    risk_above_95, multiplier and v_c are the last rollout's."""
    out = {"accidents": ledger.accidents, "episodes": len(ledger.episodes)}
    out |= ledger.means(step / 2, step) or ledger.means(0, step)
    out |= {"rate_early": ledger.rate(0, step / 5), "rate_late": ledger.rate(0.8 * step, step)}
    out |= learner.shield_numbers(learner.agent.counts)
    out |= {name: numbers[name] for name in ("risk_above_95", "multiplier", "v_c")}
    name, sentence = verdict(out, args)
    say(f"{out['accidents']:,} accidents in {out['episodes']:,} episodes while training")
    say(f"verdict: {name}. {sentence}")
    return out | {"verdict": name, "verdict_text": sentence}


def train(args: Args) -> dict:
    """Train as `args` says; returns what summary.json holds."""
    check(args)
    register()
    device = set_up(args)
    with Run(args, args.total_timesteps) as run:
        envs = make_envs(args.env_id, args.num_envs, run)
        eval_envs = make_envs(args.env_id, args.eval_episodes, run)
        sizes, rows = check_boxes(envs, args.env_id), args.num_envs * args.num_steps
        for env in envs.envs:  # Episodes drops infos: Accidents goes between it and what it steps
            env.env = Accidents(env.env)
        units = OWN_DRAWS * args.width * args.depth
        reserve(16 * rows * units, "rollout and update, roughly", device)
        learner = Learner(*sizes, args, device)
        replay = Replay(rows * math.ceil(args.total_timesteps / rows), *sizes, device)
        collector, ledger = Collector(envs, args), Ledger(args.num_envs)
        step, last_return, returns, numbers = 0, math.nan, np.zeros(0), {}
        if run.saved:
            step, last_return = run.saved["step"], run.saved["last_return"]
            returns, numbers = np.array(run.saved["returns"]), run.saved["numbers"]
            run.restore(learner, learner.optim)
            if args.threshold != "paper":  # given anew it holds; `paper` from the next update on
                learner.agent.eps.fill_(args.threshold)
            collector.load_state_dict(run.saved["collector"], step)
            ledger.load_state_dict(run.saved["ledger"])
            replay.load_state_dict(run.saved["replay"])
            for i, env in enumerate(envs.envs):
                env.env.notes.clear()  # the open episode was played again: its steps are known
                if not env.actions:  # it did not repeat itself, and a new one began
                    ledger.now[i] = 0
        run.open()

        def save():
            parts = {"collector": collector, "ledger": ledger, "replay": replay}
            state = {name: x.state_dict() for name, x in parts.items()}
            state |= {"last_return": last_return, "returns": returns.tolist(), "numbers": numbers}
            run.save(step, learner, learner.optim, **state)

        while step < args.total_timesteps and not run.signum:
            rollout, ended = collector.collect(learner)
            new = transitions(rollout, envs)
            risk = learner.policy_risk(rollout.states[:rows]).view_as(rollout.rew)
            ledger.take(step, rollout, risk, new.cost, args.safety_gamma)
            replay.add(Transitions(*(x.flatten(0, 1) for x in new)))
            before, step = step, step + rows
            losses, numbers = learner.update(rollout, replay)
            numbers = {name: float(x) for name, x in (numbers | ledger.means(before, step)).items()}

            run.log(step, {"charts/accidents": ledger.accidents})
            if ended:  # means of the episodes that ended in this rollout
                last_return, length = np.mean(ended, axis=0).tolist()
                run.log(step, {"charts/episodic_return": last_return})
                run.log(step, {"charts/episodic_length": length})
            evaluating = every(args.eval_frequency, before, step) or step >= args.total_timesteps
            if every(args.log_frequency, before, step) or evaluating:
                run.log(step, {"losses/" + name: x for name, x in losses.items()})
                run.log(step, {"diagnostics/" + name: x for name, x in numbers.items()})
                run.log(step, {"charts/SPS": run.rate(step)})
                done, accidents = min(step, args.total_timesteps), ledger.accidents
                run.show(done, accidents=accidents, last_return=last_return, KL=numbers["kl"])
            if evaluating:
                with run.paused():
                    returns = evaluate(learner, eval_envs, args)
                    seen = diagnose(learner, rollout)
                run.log(step, {"diagnostics/" + name: x for name, x in seen.items()})
                if eval_envs:
                    run.log(step, {"eval/episodic_return": returns.mean()})
            if every(args.checkpoint_frequency, before, step):
                save()
        save()
        run.stop_if_asked()
        summary = {"global_step": step, "steps_per_second": run.rate(step)}
        if len(returns):
            say(f"last evaluation: {returns.mean():.1f} +- {returns.std():.1f}")
            summary |= {"final_return_mean": returns.mean(), "final_return_std": returns.std()}
        return run.finish(summary | summarise(args, learner, ledger, numbers, step))


# === shared: rollouts (canonical copy: ppo.py) ===
# Needs env_seeds(), play() and to_env() of the block "environments", fail() and say() of "run",
# and for diagnose() the block "diagnostics". A learner has .agent, .device, .standardised(obs),
# .return_stats, .act(obs, explore); an agent .policy(obs) -> head, .sample(head), .log_prob(head,
# act), .features(obs) -> {"policy": phi, "value": phi}, and itself: agent(obs) -> head, V(s).
class RunningMeanStd(nn.Module):
    """Running mean and variance, merged batch by batch (Chan et al.), in float64; as buffers they
    are part of the checkpoint."""

    def __init__(self, shape: tuple):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x):
        """x: (rows, *shape), at least one row."""
        x, n = x.to(self.mean), len(x)
        total = self.count + n
        gap = x.mean(0) - self.mean
        within = self.var * self.count + x.var(0, correction=0) * n
        self.var.copy_((within + gap**2 * self.count * n / total) / total)
        self.mean += gap * n / total
        self.count.copy_(total)

    def standardise(self, x):
        return (x - self.mean.float()) / (self.var.float() + 1e-8).sqrt()


class Rollout(NamedTuple):
    """T steps of N environments. Where an episode ends, the next row is a new one's first."""

    # every s_t, step by step; the N that follow the last step; and the true last observations of
    # the K truncated episodes: standardised, or frames
    states: torch.Tensor  # (T N + N + K, ...)
    act: torch.Tensor  # (T, N) or (T, N, d), as sampled
    logp: torch.Tensor  # (T, N), log pi(a|s)
    value: torch.Tensor  # (T, N), V(s)
    next_value: torch.Tensor  # (T, N), V(s'), see assess()
    rew: torch.Tensor  # (T, N), as the training sees it
    terminated: torch.Tensor  # (T, N), bool
    truncated: torch.Tensor  # (T, N), bool, never where terminated
    raw_obs: list  # T arrays (N, ...), as the environments gave them


def assess(agent, states, terminated, truncated) -> tuple:
    """Of a rollout's states: head (T N, outputs), V(s) and V(s'), each (T, N). V(s') is 0 after a
    termination, and the value of the true last observation after a truncation."""
    parts = [agent(x) for x in states.split(1024)]
    head, value = (torch.cat(x) for x in zip(*parts))
    (T, N), rows = terminated.shape, terminated.numel()
    next_value = value[N : rows + N].view(T, N).masked_fill(terminated, 0)
    next_value[truncated] = value[rows + N :]
    return head[:rows], value[:rows].view(T, N), next_value


def gae(rew, value, next_value, over, gamma: float, lam: float):
    """A_t = delta_t + gamma lambda A_{t+1}, cut where an episode is over [5]; all (T, N)."""
    delta = (rew + gamma * next_value - value).cpu().numpy()
    weight = gamma * lam * (~over).cpu().numpy()
    advantage, later = np.zeros_like(delta), 0.0
    for t in reversed(range(len(delta))):
        advantage[t] = later = delta[t] + weight[t] * later
    return torch.from_numpy(advantage).to(rew)


class Collector:
    """Steps the environments, --num-steps at a time."""

    def __init__(self, envs, args):
        self.envs, self.args = envs, args
        self.obs, _ = envs.reset(seed=env_seeds(args.seed, envs.num_envs))
        self.discounted = np.zeros(envs.num_envs)  # running discounted sums of rewards

    @torch.no_grad()
    def collect(self, learner) -> tuple[Rollout, list]:
        """A rollout, and (return, length) of each episode that ended in it. The statistics of the
        observations stand still meanwhile, so that the policy that plays is the one that is
        updated; those of the rewards take the rollout in first."""
        agent, args = learner.agent, self.args
        for name, x in agent.named_parameters():
            if not x.isfinite().all():  # of NaN nothing can be sampled
                fail(f"{name} is not finite; the last checkpoint is from before", 3)
        obs, acts, steps, last_obs, raw_obs, ended = [], [], [], [], [], []
        for _ in range(args.num_steps):
            raw_obs.append(self.obs)
            obs.append(learner.standardised(self.obs))
            acts.append(agent.sample(agent.policy(obs[-1])))
            step = self.envs.step(to_actions(acts[-1], self.envs))
            self.obs, rew, terminated, truncated, infos = step
            truncated = truncated & ~terminated
            steps.append((rew, terminated, truncated))
            if truncated.any():
                last_obs.append(learner.standardised(np.stack(infos["final_obs"][truncated])))
            for i in np.flatnonzero(infos.get("_final_info", False)):
                info = infos["final_info"]
                ended.append((float(info["return"][i]), int(info["length"][i])))
        obs.append(learner.standardised(self.obs))
        rew, terminated, truncated = (np.stack(x) for x in zip(*steps))
        rew = rew.astype(np.float32)
        if args.normalize_reward:
            rew = self.scaled(rew, terminated | truncated, learner.return_stats)
        states, act = torch.cat(obs + last_obs), torch.stack(acts)
        columns = (torch.from_numpy(x).to(states.device) for x in (rew, terminated, truncated))
        rew, terminated, truncated = columns
        head, value, next_value = assess(agent, states, terminated, truncated)
        logp = agent.log_prob(head, act.flatten(0, 1)).view(rew.shape)
        ends = (terminated, truncated)
        return Rollout(states, act, logp, value, next_value, rew, *ends, raw_obs), ended

    def scaled(self, rew, over, stats: RunningMeanStd):
        """Rewards over the running deviation of their discounted sum so far, clipped [C8] [C9]."""
        sums = np.zeros(rew.shape)
        for t in range(len(rew)):
            sums[t] = self.discounted * self.args.gamma + rew[t]
            self.discounted = sums[t] * ~over[t]
        stats.update(torch.from_numpy(sums).flatten())
        return (rew / float((stats.var + 1e-8).sqrt())).clip(-10, 10).astype(np.float32)

    def state_dict(self) -> dict:
        envs = [env.state_dict() for env in getattr(self.envs, "envs", [])]
        return {"envs": envs, "discounted": torch.from_numpy(self.discounted)}

    def load_state_dict(self, saved: dict, step: int):
        """The environments go on where they were, if they can."""
        if not saved["envs"]:
            say("Atari cannot be repeated from its seed: new episodes start")
            seeds = env_seeds(self.args.seed + 10**13 * step, self.envs.num_envs)
            self.obs, _ = self.envs.reset(seed=seeds)  # no other seed's and no other step's
            return
        self.discounted = saved["discounted"].numpy()
        for i, (env, state) in enumerate(zip(self.envs.envs, saved["envs"])):
            if not env.load_state_dict(state):
                say(f"environment {i} does not repeat itself from its seed: a new episode starts")
                self.discounted[i] = 0
        self.obs = np.stack([env.obs for env in self.envs.envs]).astype(self.obs.dtype)


def to_actions(act, envs) -> np.ndarray:
    """What environments take: of a Discrete, numbers from its first one on; of a Box, [-1, 1]
    scaled to its bounds and clipped there [C5], while the sample stays as it was."""
    space = envs.single_action_space
    if isinstance(space, gym.spaces.Discrete):
        return act.cpu().numpy() + space.start
    return to_env(act, envs)


@torch.no_grad()
def evaluate(learner, envs, args) -> np.ndarray:
    """Returns (n,) of one episode in each of `envs` by the policy's mode. Statistics stand still,
    no random number is drawn."""
    if envs is None:
        return np.zeros(0)
    _, rewards, _ = play(learner, envs, args.seed, to_actions)
    return rewards.sum(0)


@torch.no_grad()
def diagnose(learner, rollout: Rollout) -> dict:
    """Ranks and dormant units of the features of policy and value, on at most 2,048 rows of the
    rollout; a fresh generator each time."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randperm(rollout.rew.numel(), generator=draw)[:2048].to(learner.device)
    numbers = {}
    for name, phi in learner.agent.features(rollout.states[rows]).items():
        own = spectrum(phi) | {"dormant": dormant([phi]), "feature_norm": phi.norm(dim=-1).mean()}
        numbers |= {f"{key}_{name}": x for key, x in own.items()}
    return numbers


# === end shared ===


# === shared: environments (canonical copy: sac.py) ===
# Needs fail(), failing() and say() of the block "run".
class Episodes(gym.Wrapper):
    """Gives each episode a seed of its own: where a deterministic environment stands is then told
    by its seed, the episode's number and the actions in it. Infos are dropped, since packages put
    anything there; an ended episode has `return` and `length`. The first reset needs a seed."""

    def reset(self, *, seed: int | None = None, options=None):
        if seed is not None:
            self.seed, self.episode = seed, -1
        self.episode, self.actions, self.total = self.episode + 1, [], 0.0
        own = np.random.SeedSequence([self.seed, self.episode]).generate_state(1)[0]
        self.obs, _ = self.env.reset(seed=int(own), options=options)
        self.check((np.abs(self.obs) < 3.4e38).all(), "an observation")
        return self.obs, {}

    def step(self, action):
        self.actions.append(np.array(action))
        self.obs, rew, terminated, truncated, _ = self.env.step(action)
        rew = np.asarray(rew, dtype=np.float64).item()  # some hand out an array of one number
        self.check((np.abs(self.obs) < 3.4e38).all(), "an observation")  # nor beyond float32
        self.check(abs(rew) < 3.4e38, "a reward")
        self.total += rew
        ended = {"return": self.total, "length": len(self.actions)}
        return self.obs, rew, terminated, truncated, ended if terminated or truncated else {}

    def check(self, finite: bool, what: str):
        if not finite:
            at = f"step {len(self.actions)} of episode {self.episode}"
            fail(f"{at}: {what} of the environment is not finite; what was saved before stands", 3)

    def state_dict(self) -> dict:
        arrays = {"obs": np.array(self.obs), "actions": np.array(self.actions)}
        state = {name: torch.from_numpy(x) for name, x in arrays.items()}
        return state | {"seed": self.seed, "episode": self.episode}

    def load_state_dict(self, saved: dict) -> bool:
        """Plays the episode again; whether that led to the same place. If not, the next begins."""
        self.seed, self.episode = saved["seed"], saved["episode"] - 1
        self.reset()
        for action in saved["actions"].numpy():
            self.step(action)
        same = np.array_equal(self.obs, saved["obs"].numpy())
        if not same:
            self.reset()
        return same


def make_envs(env_id: str, n: int, stack: ExitStack) -> gym.vector.SyncVectorEnv | None:
    """n environments stepped together; where an episode ends the next starts in the same step.
    `stack` closes them."""

    def make():
        env = gym.make(env_id)
        if isinstance(env.observation_space, gym.spaces.Dict):
            env = gym.wrappers.FlattenObservation(env)
        return Episodes(env)

    if n == 0:
        return None
    hint = "a package's own: package:Id; of one instance: --eval-episodes 0; Atari: ppo.py"
    with failing(f"--env-id {env_id} ({hint})", Exception):  # with the environment's own reason
        same_step = gym.vector.AutoresetMode.SAME_STEP
        envs = gym.vector.SyncVectorEnv([make] * n, autoreset_mode=same_step)
    stack.callback(envs.close)
    if envs.envs[0].spec.max_episode_steps is None:
        say(f"{env_id} has no time limit: an evaluation lasts until the policy ends its episodes")
    return envs


def env_seeds(seed: int, n: int, evaluation: bool = False) -> list[int]:
    """Seeds of n environments, shared with no other run's and with no evaluation's."""
    return np.random.SeedSequence([seed, evaluation]).generate_state(n, np.uint64).tolist()


def check_boxes(envs, env_id: str) -> tuple[int, int]:
    """Widths of the observation vector and of the action box; other spaces are refused."""
    obs, box = envs.single_observation_space, envs.single_action_space
    for space, what in ((obs, "observations"), (box, "actions")):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            fail(f"--env-id {env_id}: {what} are {space}, expected a Box of one dimension")
    span = box.high.astype(float) - box.low
    if box.dtype.kind != "f" or not ((span > 0) & (span < 1e12)).all():
        fail(f"--env-id {env_id}: actions are {box}, expected floats with low < high, both finite")
    return obs.shape[0], box.shape[0]


def to_env(act, envs) -> np.ndarray:
    """Actions from [-1, 1] to the environment's bounds; the clip absorbs rounding."""
    box, act = envs.single_action_space, act.cpu().numpy()
    if not np.isfinite(act).all():
        fail("the policy's action is not finite; the last checkpoint is from before", 3)
    return (box.low + (act + 1) / 2 * (box.high - box.low)).clip(box.low, box.high)


def play(learner, envs, seed: int, convert=to_env):
    """A whole episode in each of `envs` without exploration: first observations (n, ...), rewards
    (T, n), 0 after its end, and whether each still belongs to it, (T, n)."""
    obs, _ = envs.reset(seed=env_seeds(seed, envs.num_envs, evaluation=True))
    s0, rewards, alive = obs, [], [np.ones(envs.num_envs, bool)]
    while alive[-1].any():
        act = convert(learner.act(obs, explore=False), envs)
        obs, rew, terminated, truncated, _ = envs.step(act)
        rewards.append(np.where(alive[-1], rew, 0.0))
        alive.append(alive[-1] & ~(terminated | truncated))
    return s0, np.array(rewards), np.array(alive[:-1])


# === end shared ===


# === shared: diagnostics (canonical copy: sac.py) ===
def spectrum(phi) -> dict:
    """Ranks of the features phi (B, D), uncentred, from their singular values s.

    srank: least k with s_1 + .. + s_k >= 0.99 of the sum (arXiv 2010.14498); rank_pca: the same of
    s^2; effective_rank: exp of the entropy of s / sum(s); sigma_max, sigma_min: of phi / sqrt(B)"""
    s = torch.linalg.svdvals(phi.float().nan_to_num(0, 0, 0)).double()
    s = s + 0 * phi.abs().max()  # NaN where phi is not finite, for which svdvals would raise

    def reach(x):  # 1e-9 absorbs rounding
        return (x.cumsum(0) < (0.99 - 1e-9) * x.sum()).sum() + 1

    entropy = torch.special.entr(s / s.sum().clamp(min=1e-30)).sum()
    ranks = {"srank": reach(s), "rank_pca": reach(s**2), "effective_rank": entropy.exp()}
    return ranks | {"sigma_max": s[0] / len(phi) ** 0.5, "sigma_min": s[-1] / len(phi) ** 0.5}


def alignment(phi, phi_next, weight) -> dict:
    """Mean dot product and cosine of phi(s,a) and phi(s',a'), both (B, D), over the rows that
    bootstrap, where weight (B,) is 1 (arXiv 2112.04716), and the mean norm of phi."""
    dot, norm = (phi * phi_next).sum(-1), phi.norm(dim=-1)
    cos = dot / (norm * phi_next.norm(dim=-1)).clamp(min=1e-30)
    share = weight / weight.sum().clamp(min=1)
    means = {"feature_dot": (share * dot).sum(), "feature_cos": (share * cos).sum()}
    return means | {"feature_norm": norm.mean()}


def dormant(activations: list):
    """Share of hidden units, over all layers (B, width), whose mean absolute activation is at or
    below 0.025 of their layer's mean (arXiv 2302.12902); a layer of zeros is all dormant."""
    means = [h.abs().mean(0) for h in activations]
    return torch.cat([m <= 0.025 * m.mean() for m in means]).float().mean()


# === end shared ===


# === shared: run (canonical copy: sac.py) ===
# Needs FIXED, the names of the arguments that a resumed run must have as before.
SCRIPT, FORMAT = Path(__file__).stem, 4  # FORMAT: of checkpoints


def say(text: str, stream=None, end: str = "\n"):
    """Print, whatever has become of the terminal: a run does not depend on its reader."""
    try:
        print(text, end=end, file=stream or sys.stdout, flush=True)
    except UnicodeEncodeError:
        say(text.encode("ascii", "backslashreplace").decode(), stream, end)
    except OSError:  # the reader is gone: from here on to nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def fail(message: str, status: int = 2):
    """End the program with one line: status 2 for bad input, 3 for non-finite numbers."""
    say(f"error: {' '.join(message.split())[:500]}", sys.stderr)
    raise SystemExit(status)


@contextmanager
def failing(what: str, *kinds):
    """Errors of these kinds end the program in one line: `what`, and the error's own words."""
    try:
        yield
    except kinds as e:
        reason = (str(e).splitlines() or [""])[0]
        fail(f"{what}: {type(e).__name__} {reason}")


def parse(Args, description: str):
    """The command line. With --resume the defaults are that run's arguments, not the script's."""
    args = tyro.cli(Args, description=description)
    if args.resume is not None:
        saved = load_checkpoint(args.resume)["args"]
        known = {f.name: saved[f.name] for f in fields(Args) if f.name in saved}
        args = tyro.cli(Args, description=description, default=Args(**known))
    return args


def check_numbers(args, names: str, least: float, most: float):
    """Refuse what is given and not within least to most, NaN included."""
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            name = name.replace("_", "-")
            fail(f"--{name} {value}: expected a number from {least:g} to {most:g}")


def check_effect(args, names: str, used: bool, where: str):
    """Refuse flags that are given where nothing reads them, but for what a run must keep."""
    for name in names.split():
        default, kept = getattr(type(args), name), args.resume and name in FIXED
        if not used and not kept and getattr(args, name) != default:
            flag = f"--{name.replace('_', '-')}"
            fail(f"{flag} has no effect {where}: leave it out, or on resume at {default}")


def set_up(args, distributed: bool = False) -> torch.device:
    """Choices (Python takes any), descriptors, threads, seed, device: before a file is opened."""
    for name, kind in get_type_hints(type(args)).items():
        given, parts = vars(args)[name], (kind, *get_args(kind))  # of a union or a tuple
        choices = [x for part in parts for x in get_args(part) if isinstance(x, str)]
        for x in given if isinstance(given, tuple | list) else [given]:
            if choices and isinstance(x, str) and x not in choices:
                fail(f"--{name.replace('_', '-')} {x}: expected one of {', '.join(choices)}")
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # stdin, stdout or stderr was closed: no file must be taken for it
    os.close(descriptor)
    if "WORLD_SIZE" in os.environ and not distributed:
        fail(f"{SCRIPT}.py trains in one process: start it with python, not torchrun")
    if getattr(args, "compile", False):
        if not shutil.which(os.environ.get("CXX", "g++")):
            fail("--compile needs a C++ compiler: g++, or the one that CXX names")
        torch._inductor.config.fallback_random = True  # the uncompiled script's random numbers
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: glibc keeps large blocks,
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: a quarter off a CPU update
    torch.set_num_threads(args.threads or os.cpu_count())
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def reserve(size: int, what: str, device):
    """Print how many bytes are about to be taken; refuse what the device has not."""
    free, memory = size, Path("/proc/meminfo")
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif memory.exists():
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", memory.read_text())[1])
    say(f"{what}: {size / 2**20:,.1f} MiB on {device}")
    if size > free:
        fail(f"{what} needs {size / 2**30:.1f} GiB, {device} has {free / 2**30:.1f} GiB free")


def writable(flag: str, folder: Path):
    """Refuse a place that cannot be written before any work is done for it."""
    hint = ": copy the run first" if flag == "--resume" else ""
    with failing(f"{flag} {folder} cannot be written{hint}", OSError):
        above = (folder.absolute(), *folder.absolute().parents)
        place = next((p for p in above if p.exists()), folder)
        tempfile.TemporaryFile(dir=place).close()


def every(n: int, before: int, step: int) -> bool:
    """Whether a multiple of n was passed on the way from `before` to `step`; never for n = 0."""
    return n > 0 and step // n > before // n


@contextmanager
def write_beside(path: Path):
    """A temporary path beside the target; flushed, and moved into place on success."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with failing(f"{path} not written; what was there is intact", OSError, RuntimeError):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "r+b") as f:
                os.fsync(f.fileno())  # the bytes reach the disk before the name does
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def load_checkpoint(folder: str, name: str = "checkpoint.pt") -> dict:
    """Tensors and plain Python only: a crafted pickle is refused, as is another script's file."""
    path = Path(folder) / name
    with failing(f"{path}: expected a checkpoint of {SCRIPT}.py", Exception):
        written = path.stat().st_mtime_ns
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not compare checksums
                raise ValueError(f"{damaged} is damaged")
        saved = torch.load(path, "cpu", weights_only=True)
        if (saved.get("script"), saved.get("format")) != (SCRIPT, FORMAT):
            raise ValueError("of another script or format")
    return saved | {"written": written}


class Run(ExitStack):
    """A run's folder: args.json, metrics.csv, TensorBoard events, checkpoint.pt, summary.json.

    saved: the checkpoint of --resume, or None. signum: the signal that came, or 0; SIGINT, SIGTERM
    and SIGHUP only set it, for the loop to read between updates, and a second one acts as usual."""

    def __init__(self, args, total: int):
        super().__init__()
        self.args, self.total, self.signum = args, total, 0
        self.saved = load_checkpoint(args.resume) if args.resume else None
        flag = "--resume" if args.resume else "--run-dir"
        writable(flag, Path(args.resume or args.run_dir))
        self.began = time.time() - (self.saved["wall"] if self.saved else 0)
        if self.saved:
            self.compare(asdict(args), self.saved["args"])
        with suppress(ValueError):  # outside the main thread there are no signals
            for s in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
                usual = signal.getsignal(s)
                if usual not in (signal.SIG_IGN, self.note):  # what nohup ignores stays ignored
                    signal.signal(s, self.note)
                    self.callback(signal.signal, s, usual)

    def note(self, signum, frame):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)

    def compare(self, args: dict, before: dict):
        """Arguments changed on resume are printed; those in FIXED and the name must not change."""
        before = {name: getattr(type(self.args), name) for name in args} | before  # of older runs
        for name, value in args.items():
            if name not in ("resume", "run_dir") and value != before[name]:
                flag = "--" + name.replace("_", "-")
                if name in (*FIXED, "exp_name"):
                    fail(f"--resume: that run has {flag} {before[name]}, not {value}")
                say(f"from here on {flag} {value}, {before[name]} so far")
        if self.total < min(self.saved["step"], self.saved["total"]):
            fail(f"--resume: that run is at step {self.saved['step']:,}, beyond {self.total:,}")

    def open(self, **info):
        """Makes the run's folder, or goes on in it. `info`, what is known of the data, stands in
        args.json, checkpoints and summary."""
        args, saved = self.args, self.saved
        saved = saved or {"csv_bytes": 0, "step": -1, "busy": 0, "wandb": None, "command": []}
        device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu"
        self.about = {"script": SCRIPT, "format": FORMAT, "total": self.total, "device": device}
        self.about |= {"args": asdict(args), "info": info}
        self.about["command"] = [*saved.get("command", []), shlex.join(sys.argv)]
        self.about["versions"] = {x.__name__: str(x.__version__) for x in (torch, np, gym)}
        with failing("copy the folder, or give another --run-dir", OSError):
            name = "+".join(np.atleast_1d(args.env_id))
            name = f"{name}__{args.exp_name}__{args.seed}__{int(time.time())}"
            name = re.sub(r'[<>:"/\\|?*\s]', "_", name)  # what Windows or rsync refuse
            self.dir = Path(args.resume or Path(args.run_dir) / name)
            try:
                self.dir.mkdir(parents=True, exist_ok=bool(args.resume))
            except FileExistsError:  # a sweep starts many in one second
                self.dir = self.dir.with_name(f"{name}-{time.time_ns()}")
                self.dir.mkdir()
            self.csv = open(self.dir / "metrics.csv", "a")
            try:  # a second process on one folder is refused; the lock ends with its process
                import fcntl

                fcntl.flock(self.csv, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f"{self.dir}: another process is running it")
            except (ImportError, OSError) as e:  # Windows; a file system without locks
                say(f"{self.dir} is not locked ({e}): let only one process run it")
            checkpoint = self.dir / "checkpoint.pt"
            if self.saved and checkpoint.stat().st_mtime_ns != saved["written"]:
                fail(f"{self.dir}: another process went on with it meanwhile; start again")
            end = self.csv.truncate(min(self.csv.tell(), saved["csv_bytes"]))
            if self.csv.seek(end) == 0:  # rows after the checkpoint come again
                self.csv.write("step,tag,value\n")
            (self.dir / "args.json").write_text(json.dumps(self.about, indent=2))
        self.wandb = None
        if args.track:
            with failing("--track: pip install wandb, wandb login", Exception):
                import wandb

                where = {"project": args.wandb_project_name, "entity": args.wandb_entity}
                where |= {"id": saved["wandb"], "resume": "allow", "name": self.dir.name}
                self.callback(wandb.finish)  # another train() in this process is another run
                self.wandb = wandb.init(config=asdict(args), sync_tensorboard=True, **where)
        self.writer = SummaryWriter(str(self.dir), purge_step=saved["step"] + 1)
        say(f"run folder: {self.dir}")
        self.clock = time.perf_counter() - saved["busy"]
        self.saved = None  # its replay may be large

    def restore(self, learner: nn.Module, optim: dict):
        """Networks, optimisers and random numbers; learning rates are the command line's."""
        learner.load_state_dict(self.saved["networks"])
        for name, x in optim.items():  # settings stay: a GPU's `capturable` must not come to a CPU
            settings = x.state_dict()["param_groups"]
            x.load_state_dict({"state": self.saved["optim"][name], "param_groups": settings})
        torch.set_rng_state(self.saved["random"])
        if self.saved["cuda_random"] and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(self.saved["cuda_random"][0])

    def rate(self, step: int) -> float:
        return step / max(time.perf_counter() - self.clock, 1e-9)

    @contextmanager
    def paused(self):
        """What is done inside does not count for rate()."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # queued updates are not part of the pause
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def show(self, step: int, **numbers):
        """How far the run is, NaN left out: one line on a terminal, a line each time elsewhere."""
        rate, tty = self.rate(step), sys.stdout is not None and sys.stdout.isatty()
        parts = [f"{step:,}/{self.total:,} ({step / self.total:.0%})", f"{rate:.1f}/s"]
        parts += [f"{(self.total - step) / max(rate, 1e-9) / 60:.1f} min left"]
        line = ", ".join(parts + [f"{k} {float(x):.4g}" for k, x in numbers.items() if x == x])
        say(f"\r\033[K{line}" if tty else line, end="" if tty and step < self.total else "\n")

    def log(self, step: int, scalars: dict):
        """Write scalars; the first one that is NaN or infinite ends the run with status 3."""
        with failing(f"{self.dir}: not written; the last checkpoint is intact", OSError):
            for tag, value in scalars.items():
                value = float(value)
                if not math.isfinite(value):
                    fail(f"step {step}: {tag} is {value}; the last checkpoint is from before", 3)
                self.csv.write(f"{step},{tag},{value!r}\n")
                self.writer.add_scalar(tag, value, step)
            self.csv.flush()

    def save(self, step: int, learner: nn.Module, optim: dict, name="checkpoint.pt", **state):
        """Tensors and plain Python only; of a learner that is not finite nothing is written."""
        networks = learner.state_dict()
        for key, x in networks.items():
            if not x.isfinite().all():
                fail(f"step {step}: {key} is not finite; the last checkpoint is from before", 3)
        with write_beside(self.dir / name) as temporary:
            os.fsync(self.csv.fileno())
            state |= self.about | {
                "step": step,
                "networks": networks,
                "optim": {key: x.state_dict()["state"] for key, x in optim.items()},
                "random": torch.get_rng_state(),
                "cuda_random": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
                "csv_bytes": self.csv.tell(),
                "wall": time.time() - self.began,
                "busy": time.perf_counter() - self.clock,
                "wandb": self.wandb.id if self.wandb else None,
            }
            torch.save(state, temporary)

    def stop_if_asked(self, *start: str):
        """After the last save: say how to go on, by python or what `start` says, and end."""
        if self.signum:
            called = sys.argv[0] if Path(sys.argv[0]).stem == SCRIPT else __file__
            start = start or (Path(sys.executable).name,)
            command = shlex.join([*start, called, "--resume", str(self.dir)])
            say(f"\nstopped and saved; to go on:\n  {command}")
            raise SystemExit(128 + self.signum)

    def finish(self, summary: dict) -> dict:
        summary |= self.about["info"] | {"wall_seconds": time.time() - self.began}
        summary["device"] = self.about["device"]
        summary["eval_episodes"] = getattr(self.args, "eval_episodes", 0)
        with write_beside(self.dir / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=2))
        return summary

    def __exit__(self, kind, error, trace):
        for file in (getattr(self, "csv", None), getattr(self, "writer", None)):
            with suppress(OSError):  # a full disk has been reported
                file and file.close()
        swallowed = super().__exit__(kind, error, trace)
        of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if of_memory or "can't allocate memory" in str(error):  # of a CPU, in PyTorch
            fail(f"out of memory: smaller networks or batches? What was saved stands. {error}")
        return swallowed


# === end shared ===


if __name__ == "__main__":
    train(parse(Args, __doc__))
