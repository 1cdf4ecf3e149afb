r"""Conservative Q-learning (CQL) for continuous actions: offline RL that explains itself.

Kumar, Zhou, Tucker, Levine, "Conservative Q-Learning for Offline Reinforcement Learning", arXiv 2006.04779,
on top of soft actor-critic, arXiv 1812.05905. Q-learning from a fixed dataset D fails because the backup asks
for Q at actions that D never shows, and the policy seeks out those that are overestimated. CQL pushes Q down
at the actions of a distribution mu and up at those of the data:

  CQL(H)    min_Q alpha E_s[ log sum_a exp Q(s,a) - E_{a~D} Q(s,a) ]      + 1/2 E_D (Q - T Q)^2    (Eq. 4)
  CQL(rho)  min_Q alpha E_s[ log E_{a~rho} exp Q(s,a) - E_{a~D} Q(s,a) ]  + 1/2 E_D (Q - T Q)^2    (Eq. 3)
  Eq. 2     min_Q alpha ( E_{a~mu} Q(s,a) - E_{a~D} Q(s,a) )              + 1/2 E_D (Q - T Q)^2
  Eq. 1     min_Q alpha   E_{a~mu} Q(s,a)                                 + 1/2 E_D (Q - T Q)^2

with T Q = r + gamma (1 - done) E_{a'~pi(.|s')} min_i Q_target_i(s',a'). (H) and (rho) are what is left when
mu maximises its term less the regulariser KL(mu || Unif), KL(mu || rho). Two scales differ from the paper:
the squared error has no 1/2, as in its authors' code, so that --cql-alpha 5 is alpha = 2.5 above; and the
log-sum-exp, an integral over the action box [-1, 1]^d, is reported as the log of a *mean* (less d log 2), so
that a Q which ignores the action has a gap of 0. rho is pi, unless --cql-proposals says otherwise.

Where to read: networks, losses and Learner.update are the algorithm; train() is the loop. The readers of
files and the blocks marked `shared`, which sibling scripts have too, can be skipped at first.

  symbol             in the code                            shape
  s, a, r, s', done  batch.obs .act .rew .next_obs .done    (B, obs) (B, act) (B,) (B, obs) (B,)
  Q_i(s,a)           critic(obs, act)                       (n, B), or (n, B, M) for M actions a state
  phi_i(s,a)         critic.features(obs, act)[0]           (n, B, D), what the last linear layer reads
  mu, rho            proposals()                            (B, M, act), log p - log Unif (B, M)
  y                  backup()                               (B,)
  pi(a|s)            actor                                  tanh of a Gaussian
  2 alpha            --cql-alpha, log_cql_alpha             scalar, the conservative weight
  (SAC's) alpha      --alpha, log_alpha                     scalar, the entropy temperature
  tau                --tau                                  Polyak rate of the target critic

Quick, on data that it makes itself; the same without conservatism (naive offline SAC: watch q_max):
  python cql_continuous.py
  python cql_continuous.py --cql-alpha 0

A serious run on a D4RL file:
  python cql_continuous.py --env Hopper-v5 --dataset hopper_medium_replay-v2.hdf5 --num-updates 1_000_000 \
      --critic-depth 3 --policy-depth 3 --cql-samples 10 --bc-steps 40_000

While it trains, `diagnostics/q_data` should move from 0 to its level, up or down, and stay (a rise that is
followed by a fall is overfitting); `diagnostics/cql_gap` be small, not hugely negative;
`diagnostics/td_error_holdout` stay near `td_error`. The run ends with a verdict computed from these, the
numbers that it rests on, and the flag to try next.

Known limits: vector observations and box actions; the online phase resumes with a new episode (the offline
phase resumes bitwise). Left out on purpose: policy constraints (BEAR, BRAC), pixels (cql_atari.py), the many
forms of DR3 and the rank penalty (dr3_analysis.py).
"""

import copy
import ctypes
import hashlib
import importlib
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import timeit
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seeds networks, minibatches, collection and evaluation"""
    torch_deterministic: bool = True
    """use deterministic PyTorch kernels only (cuDNN)"""
    cuda: bool = True
    """use the GPU if there is one"""
    track: bool = False
    """log to Weights & Biases as well (needs `pip install wandb`)"""
    wandb_project_name: str = "offline-rl"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "Pendulum-v1"
    """Gymnasium environment that evaluates the policy, and collects if no --dataset is given"""
    dataset: str | None = None
    """D4RL HDF5 file, Minari folder or id; not given: collect --collect-steps transitions and keep them"""
    run_dir: str = "runs"
    """folder that holds the run folders"""
    resume: str | None = None
    """run folder or checkpoint to go on from; `auto`: the newest one with these arguments, if any"""
    checkpoint_frequency: int = 1_000
    """updates between checkpoints (0: only at the end)"""
    eval_frequency: int = 1_000
    """updates between evaluations, one more when cloning ends (0: only then and at the end)"""
    eval_episodes: int = 10
    """episodes of each evaluation (0: no evaluation, no environment needed with --dataset)"""
    log_frequency: int = 100
    """updates between logged losses and checks for non-finite numbers"""
    diagnostics_frequency: int = 250
    """updates between diagnostics (0: none, hence no verdict)"""
    compile: bool = False
    """run the losses through torch.compile"""
    cudagraphs: bool = True
    """on a GPU: capture the whole update in a CUDA graph"""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """bf16: critics on the sampled actions only; tf32: matrix products on a GPU"""

    # --- length, size and data
    num_updates: int = 8_000
    """updates on the dataset (the serious run: 1_000_000)"""
    online_steps: int = 0
    """environment steps of fine-tuning after the offline phase, one update each"""
    offline_share: float = 0.5
    """share of offline data in each minibatch of the fine-tuning"""
    batch_size: int = 256
    """B, transitions in a minibatch"""
    holdout: float = 0.05
    """share of episodes kept out of the losses, to measure the TD error on (0 when comparing with peers)"""
    collect_steps: int = 8_000
    """environment steps of the self-made replay (without --dataset)"""
    normalize_obs: bool = True
    """standardise observations by the mean and deviation of the whole dataset"""
    reward_scale: float = 1.0
    """rewards are multiplied by this, then shifted"""
    reward_shift: float = 0.0
    """added to the scaled reward"""

    # --- actor-critic
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak rate of the target critic"""
    policy_lr: float = 1e-4
    """learning rate of policy and temperature (authors' recipe for gym tasks)"""
    q_lr: float = 3e-4
    """learning rate of the critics"""
    alpha: float | None = None
    """entropy temperature; not given: tuned to an entropy of -dim(A)"""
    backup: Literal["sac", "mean", "max", "sarsa"] = "sac"
    """a' of the target. sac: a sample of pi; mean: its mean; max: the best of N samples; sarsa: the data's"""
    backup_entropy: bool = False
    """subtract alpha log pi(a'|s') in the target (SAC's soft backup)"""
    critic_updates: int = 1
    """G_Q, critic steps an update (Algorithm 1)"""
    policy_updates: int = 1
    """G_pi, policy steps an update (Algorithm 1)"""
    bc_steps: int = 1_000
    """first updates in which the policy clones the data instead (authors: 40_000 of 3_000_000)"""

    # --- CQL
    cql_alpha: float = 5.0
    """weight of the conservative term, the authors' scale (2 x the paper's alpha); 0: naive offline SAC"""
    cql_variant: Literal["H", "rho", "eq2", "eq1"] = "H"
    """which objective: CQL(H), CQL(rho), Eq. 2 or Eq. 1"""
    cql_proposals: Literal["three-sets", "mixture", "policy"] | None = None
    """where actions are drawn: three-sets (H's default); mixture, 1/2 pi + 1/2 Unif; policy, pi (others')"""
    cql_samples: int = 4
    """N, sampled actions of each proposal set (authors: 10)"""
    cql_temperature: float = 1.0
    """T in T log E exp(Q / T)"""
    cql_clip_diff: float | None = None
    """lower clip of the conservative term of one state (AntMaze: -208.9, which is -200 on CORL's scale)"""
    cql_target_gap: float | None = None
    """Lagrange threshold of losses/cql_loss; --cql-alpha is then where the multiplier starts. For CQL(H) with
    three sets it is tau - d log 2 - log(3N) for JaxCQL's and CORL's tau (AntMaze's 0.8: -8.1), and
    tau / w - d log 2 - log(3N) for the authors' tau and weight w"""

    # --- networks and representation
    num_critics: int = 2
    """n, size of the ensemble (1 to 20); the backup takes its minimum"""
    critic_width: int = 256
    """units in a hidden layer of the critic"""
    critic_depth: int = 2
    """hidden layers of the critic (authors: 3)"""
    policy_width: int = 256
    """units in a hidden layer of the policy"""
    policy_depth: int = 2
    """hidden layers of the policy (authors: 3)"""
    residual: bool = False
    """residual connections between the critic's hidden layers"""
    layer_norm: bool = False
    """layer norm (no gain, no bias) before each ReLU of the critic"""
    dropout: float = 0.0
    """dropout rate after each ReLU of the critic, off in the target critic"""
    unit_norm: bool = False
    """divide the features phi by their norm"""
    dr3_coef: float = 0.0
    """weight of the mean dot product phi(s,a).phi(s',a') (arXiv 2112.04716; try 0.001 to 0.1)"""
    vib_coef: float = 0.0
    """weight of the variational information bottleneck on the features (arXiv 2109.10813; try 0.01)"""
    vib_dim: int = 16
    """width of that bottleneck"""


LIMITS = {"gamma": (0, 0.99999), "tau": (1e-9, 1), "holdout": (0, 0.9), "dropout": (0, 0.99)}  # least, most
LIMITS |= {"offline_share": (0, 1), "num_critics": (1, 20), "critic_depth": (1, 64), "policy_depth": (1, 64)}
LIMITS |= dict.fromkeys(["reward_shift", "cql_target_gap", "cql_clip_diff"], (-1e18, 1e18))
LIMITS |= dict.fromkeys(["policy_lr", "q_lr", "reward_scale", "cql_temperature"], (1e-12, 1e12))
LIMITS |= dict.fromkeys(["critic_width", "policy_width", "vib_dim", "batch_size", "cql_samples"], (1, 1e6))
LIMITS |= dict.fromkeys(["critic_updates", "num_updates", "collect_steps", "log_frequency"], (1, 1e12))


def check(args: Args):
    """Refuse values and combinations that make no sense or would be ignored, before anything starts."""
    check_limits(args, LIMITS)
    only_if(args, args.cql_alpha > 0, "with --cql-alpha 0", "cql_variant", "cql_proposals", "cql_target_gap")
    only_if(args, args.cql_alpha > 0, "with --cql-alpha 0", "cql_clip_diff", "cql_temperature")
    sampled = args.cql_alpha > 0 or args.backup == "max"
    only_if(args, sampled, f"with --cql-alpha 0 and --backup {args.backup}", "cql_samples")
    only_if(args, args.cql_variant in ("H", "rho"), "on Eqs. 1 and 2", "cql_temperature")
    only_if(args, args.cql_variant != "eq1", "on Eq. 1, which has no gap to the data", "cql_target_gap")
    only_if(args, args.backup == "sac", f"with --backup {args.backup}", "backup_entropy")
    only_if(args, args.backup != "sarsa", "with --backup sarsa: a replay has no next action", "online_steps")
    only_if(args, args.dataset is None, "with --dataset", "collect_steps")
    only_if(args, args.online_steps > 0, "without --online-steps", "offline_share")
    only_if(args, args.vib_coef > 0, "without --vib-coef", "vib_dim")
    only_if(args, args.critic_depth > 1, "with --critic-depth 1", "residual")
    only_if(args, args.track, "without --track", "wandb_project_name", "wandb_entity")
    if args.precision == "bf16" and args.cql_alpha == 0:
        fail("--precision bf16 has no effect with --cql-alpha 0: it covers the sampled actions")


def proposal_kind(args: Args) -> str:
    return args.cql_proposals or ("three-sets" if args.cql_variant == "H" else "policy")


# ------------------------------------------------------------------------------------------- networks
class Actor(nn.Module):
    """Tanh-squashed Gaussian policy pi(a|s) on the box [-1, 1]^act."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim] + [args.policy_width] * args.policy_depth
        hidden = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(sizes[-1], 2 * act_dim))

    def forward(self, obs):
        """Mean and log standard deviation of u, where a = tanh(u); each (B, act)."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(-5, 2)  # the authors' bounds

    def sample(self, obs, n: int, generator=None):
        """n reparameterised actions a state, (B, n, act), and their log pi(a|s), (B, n)."""
        mean, log_std = (x[:, None] for x in self(obs))
        noise = torch.randn(len(obs), n, mean.shape[-1], generator=generator, device=obs.device)
        u = mean + log_std.exp() * noise
        return torch.tanh(u), squashed_log_prob(u, mean, log_std)

    def log_prob(self, obs, act):
        """log pi(a|s) of given actions (B, n, act), as (B, n)."""
        mean, log_std = (x[:, None] for x in self(obs))
        return squashed_log_prob(torch.atanh(act.clamp(-1 + 1e-6, 1 - 1e-6)), mean, log_std)


def squashed_log_prob(u, mean, log_std):
    """log density of a = tanh(u), u ~ N(mean, std^2): log N(u) - sum log(1 - tanh(u)^2), the last term in
    the form that neither overflows nor cancels for large |u|: 2 (log 2 - u - softplus(-2u))."""
    log_normal = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


class StackedLinear(nn.Module):
    """n independent linear layers as one batched product: (n, B, in) -> (n, B, out)."""

    def __init__(self, n: int, fan_in: int, fan_out: int):
        super().__init__()
        bound = fan_in**-0.5  # nn.Linear's; torch.nn.init would misread a 3-D tensor's fan
        self.weight = nn.Parameter(torch.empty(n, fan_in, fan_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x):
        if self.weight.shape[-1] == 1:  # w . x: three times as fast on a CPU as a product with one column
            return (x * self.weight.mT).sum(-1, keepdim=True) + self.bias
        return torch.baddbmm(self.bias, x, self.weight)


class Critic(nn.Module):
    """An ensemble of n Q-functions on the same input."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.n, self.args = args.num_critics, args
        sizes = [obs_dim + act_dim] + [args.critic_width] * args.critic_depth
        self.layers = nn.ModuleList(StackedLinear(self.n, i, o) for i, o in zip(sizes, sizes[1:]))
        if args.vib_coef > 0:
            self.bottleneck = StackedLinear(self.n, sizes[-1], 2 * args.vib_dim)
            sizes.append(args.vib_dim)
        self.head = StackedLinear(self.n, sizes[-1], 1)

    def hidden(self, obs, act):
        """Activations of the hidden layers at rows (R, obs), (R, act): a list of (n, R, width)."""
        h = torch.cat([obs, act], dim=-1).expand(self.n, -1, -1)
        activations = []
        for layer in self.layers:
            z = layer(h)
            if self.args.layer_norm:
                z = F.layer_norm(z, z.shape[-1:])
            z = F.dropout(F.relu(z, inplace=True), self.args.dropout, self.training)
            h = h + z if self.args.residual and activations else z
            activations.append(h)
        return activations

    def features(self, obs, act):
        """phi(s,a), what the head reads, (n, R, D), and the bottleneck's KL to N(0, I), (n, R), or 0."""
        phi, kl = self.hidden(obs, act)[-1], torch.zeros((), device=obs.device)
        if self.args.vib_coef > 0:
            mean, log_std = self.bottleneck(phi).chunk(2, dim=-1)
            log_std = log_std.clamp(-5, 2)
            kl = 0.5 * (mean**2 + torch.exp(2 * log_std) - 2 * log_std - 1).sum(-1)
            phi = mean + log_std.exp() * torch.randn_like(mean) if self.training else mean
        if self.args.unit_norm:
            phi = F.normalize(phi, dim=-1)
        return phi, kl

    def forward(self, obs, act):
        """Q(s,a): (n, B) for actions (B, act), (n, B, M) for M actions a state, (B, M, act)."""
        if act.dim() == 3:
            m = act.shape[1]
            q = self(obs.repeat_interleave(m, 0), act.flatten(0, 1))
            return q.view(self.n, -1, m)
        return self.head(self.features(obs, act)[0]).squeeze(-1)


# ------------------------------------------------------------------------- losses: one function each
class Batch(NamedTuple):
    obs: torch.Tensor  # (B, obs), standardised
    act: torch.Tensor  # (B, act), in [-1, 1]
    rew: torch.Tensor  # (B,), scaled and shifted
    next_obs: torch.Tensor  # (B, obs)
    done: torch.Tensor  # (B,), 1 where the episode terminated; a time-out is 0
    next_act: torch.Tensor  # (B, act), the data's own next action (SARSA)


def backup(learner, batch: Batch, args: Args, generator=None):
    """The target's actions a', (B, act), and y = r + gamma (1 - done) min_i Q_i(s', a'), (B,).

    With `max` each critic takes its own best of the samples, and a' is the best one of their minimum; with
    --backup-entropy the minimum is less alpha log pi(a'|s'), as in SAC.
    """
    if args.backup == "sarsa":
        next_act = batch.next_act[:, None]
    elif args.backup == "mean":
        next_act = torch.tanh(learner.actor(batch.next_obs)[0])[:, None]
    else:
        m = args.cql_samples if args.backup == "max" else 1
        next_act, next_logp = learner.actor.sample(batch.next_obs, m, generator)  # (B, m, act), (B, m)
    q = learner.target(batch.next_obs, next_act)  # (n, B, m): the max of each critic, then the ensemble's min
    value = q.amax(-1).amin(0)
    if args.backup_entropy:
        value = value - learner.log_alpha.exp() * next_logp[:, 0]
    best = q.amin(0).argmax(-1)
    next_act = next_act[torch.arange(len(best), device=best.device), best]
    return next_act, batch.rew + args.gamma * (1 - batch.done) * value


def proposals(actor, obs, next_obs, kind: str, n: int, generator=None):
    """Sampled actions (B, M, act) at which Q is pushed down, and their log p(a|s) - log Unif(a), (B, M).

    policy: p = pi, M = n. mixture: p = 1/2 pi + 1/2 Unif, M = 2n; no importance weight exceeds 2.
    three-sets: the authors' estimator, M = 3n: n of Unif, of pi(.|s) and of pi(.|s') (scored at s), each
    weighted by the density it was drawn from; the weights have no bound, and infinite variance.
    Of `actor`: sample(obs, n, generator) and log_prob(obs, act), as Actor's.
    """
    act, logp = actor.sample(obs, n, generator)
    log_unif = -act.shape[-1] * math.log(2)
    if kind == "policy":
        return act, logp - log_unif
    uniform = torch.rand(act.shape, generator=generator, device=act.device) * 2 - 1
    if kind == "mixture":
        logp = torch.cat([actor.log_prob(obs, uniform), logp], 1)
        log_ratio = torch.logaddexp(logp - log_unif, torch.zeros_like(logp)) - math.log(2)
        return torch.cat([uniform, act], 1), log_ratio
    assert kind == "three-sets", kind
    next_act, next_logp = actor.sample(next_obs, n, generator)
    log_ratio = torch.cat([torch.zeros_like(logp), logp - log_unif, next_logp - log_unif], 1)
    return torch.cat([uniform, act, next_act], 1), log_ratio


def log_mean_exp(q, log_ratio, temperature: float = 1.0):
    """T log E_{a~Unif} exp(Q(s,a) / T), estimated from a ~ p by importance weights: (..., M) -> (...).

    Its exp is unbiased, it itself is low (Jensen). With log_ratio = 0 it is T log E_{a~p} exp(Q / T), that is
    CQL(rho) with rho = p. (The authors divide log p by T as well; at T = 1 that is the same.)
    """
    log_w = q / temperature - log_ratio
    return temperature * (torch.logsumexp(log_w, dim=-1) - math.log(q.shape[-1]))


def conservative_term(q, log_ratio, q_data, args: Args):
    """What alpha multiplies in Eqs. 1 to 4, for each state: q (n, B, M), q_data (n, B) -> (n, B)."""
    if args.cql_variant in ("eq1", "eq2"):
        pushed_down = q.mean(-1)
    else:
        assert args.cql_variant in ("H", "rho"), args.cql_variant
        pushed_down = log_mean_exp(q, log_ratio if args.cql_variant == "H" else 0.0, args.cql_temperature)
    term = pushed_down if args.cql_variant == "eq1" else pushed_down - q_data
    return term if args.cql_clip_diff is None else term.clamp(min=args.cql_clip_diff)


def conservative_loss(learner, batch: Batch, q_data, args: Args):
    """The conservative term of each critic on the minibatch, (n,); q_data (n, B) is Q(s,a) of the data."""
    with torch.no_grad():
        kind, n = proposal_kind(args), args.cql_samples
        act, log_ratio = proposals(learner.actor, batch.obs, batch.next_obs, kind, n)
    with torch.autocast(batch.obs.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        q = learner.critic(batch.obs, act)  # (n, B, M): nearly all of the work
    q = q.float()
    term = conservative_term(q, log_ratio, q_data, args)
    info = {"cql_loss": term.mean()}
    if args.cql_variant == "H":  # the share of the samples that carries the estimate, 1/M to 1
        weight = torch.softmax((q / args.cql_temperature - log_ratio).detach(), -1)
        info["cql_ess"] = (1 / (weight**2).sum(-1) / weight.shape[-1]).mean()
    return term.mean(1), info


def critic_loss(learner, batch: Batch, args: Args):
    """Squared TD error + alpha x conservative term + regularisers, summed over the ensemble (Eqs. 1 to 4)."""
    with torch.no_grad():
        next_act, y = backup(learner, batch, args)
    phi, kl = learner.critic.features(batch.obs, batch.act)
    q_data = learner.critic.head(phi).squeeze(-1)  # (n, B)
    td_loss = ((q_data - y) ** 2).mean(1)  # (n,), without the paper's 1/2
    shown = range(min(2, args.num_critics))
    info = {f"qf{i + 1}_loss": td_loss[i] for i in shown} | {"qf_loss": td_loss.mean()}
    info |= {f"qf{i + 1}_values": q_data[i].mean() for i in shown}
    loss = td_loss.sum()
    if args.cql_alpha > 0:
        term, cql_info = conservative_loss(learner, batch, q_data, args)
        cql_alpha = learner.log_cql_alpha.detach().exp()  # moves with --cql-target-gap only
        loss = loss + cql_alpha * term.sum()
        info |= cql_info | {"cql_alpha": cql_alpha}
    if args.dr3_coef > 0:
        phi_next, _ = learner.critic.features(batch.next_obs, next_act)  # gradient through both sides
        dot = ((phi * phi_next).sum(-1) * (1 - batch.done)).mean(1).sum()
        loss = loss + args.dr3_coef * dot
        info["dr3_loss"] = dot / len(phi)
    if args.vib_coef > 0:
        loss = loss + args.vib_coef * kl.mean(1).sum()
        info["vib_loss"] = kl.mean()
    return loss, {k: v.detach() for k, v in info.items()}


def actor_loss(learner, batch: Batch, args: Args):
    """SAC's policy objective, E[alpha log pi(a|s) - min_i Q_i(s, a)] (Algorithm 1, line 4)."""
    act, logp = learner.actor.sample(batch.obs, 1)
    q = learner.critic(batch.obs, act).amin(0)  # (B, 1)
    loss = (learner.log_alpha.exp().detach() * logp - q).mean()
    return loss, {"actor_loss": loss.detach(), "entropy": -logp.detach().mean()}


def cloning_loss(learner, batch: Batch, args: Args):
    """Behaviour cloning, -log pi(a_data|s), alone (the authors' code adds the entropy bonus)."""
    loss = -learner.actor.log_prob(batch.obs, batch.act[:, None]).mean()
    with torch.no_grad():
        _, logp = learner.actor.sample(batch.obs, 1)  # the temperature is tuned meanwhile, as theirs is
    return loss, {"actor_loss": loss.detach(), "entropy": -logp.mean()}


def dual_loss(log_x, excess):
    """Descending this raises x while excess > 0: x is the multiplier of the constraint excess <= 0."""
    return -log_x.exp() * excess


def memory(args: Args, inputs: int) -> int:
    """Bytes, roughly: weights five times (target, gradient, two moments of Adam), activations twice."""
    n, width, depth = args.num_critics, args.critic_width, args.critic_depth
    sets = {"three-sets": 3, "mixture": 2, "policy": 1}[proposal_kind(args)] if args.cql_alpha else 0
    rows = args.batch_size * max(1 + sets * args.cql_samples, args.cql_samples * (args.backup == "max"))
    actor = args.policy_width * (inputs + args.policy_width * args.policy_depth)
    return 20 * (actor + n * width * (inputs + width * depth)) + 8 * rows * n * (inputs + 2 * width * depth)


class Learner(nn.Module):
    """All that learns, with its optimisers; the collector and the offline phase have one each."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device):
        super().__init__()
        self.args, self.device, self.act_dim = args, device, act_dim
        self.actor = Actor(obs_dim, act_dim, args)
        self.critic = Critic(obs_dim, act_dim, args)
        self.target = copy.deepcopy(self.critic).eval().requires_grad_(False)
        alphas = (1.0 if args.alpha is None else args.alpha, args.cql_alpha)
        self.log_alpha, self.log_cql_alpha = (nn.Parameter(torch.tensor(max(x, 1e-30)).log()) for x in alphas)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.to(device)
        if args.compile:
            torch._inductor.config.fallback_random = True  # the random numbers of the uncompiled script
        compiled = torch.compile if args.compile else lambda loss: loss
        self.critic_loss, self.actor_loss = compiled(critic_loss), compiled(actor_loss)
        self.cloning_loss = compiled(cloning_loss)
        flags = {"fused": True, "capturable": device.type == "cuda"}
        self.optim = {
            "critic": torch.optim.Adam(self.critic.parameters(), lr=args.q_lr, **flags),
            "cql_alpha": torch.optim.Adam([self.log_cql_alpha], lr=args.q_lr, **flags),
            "actor": torch.optim.Adam(self.actor.parameters(), lr=args.policy_lr, **flags),
            "alpha": torch.optim.Adam([self.log_alpha], lr=args.policy_lr, **flags),
        }

    def standardised(self, obs):
        """An environment's observation as the networks see it."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return (obs - self.obs_mean) / self.obs_std

    def minimise(self, name: str, loss):
        params = self.optim[name].param_groups[0]["params"]
        self.optim[name].zero_grad()
        loss.backward(inputs=params)  # only these: the actor's loss costs no critic weight gradients
        self.optim[name].step()

    def update(self, sample, cloning: bool) -> dict:
        """G_Q critic steps and G_pi policy steps, a fresh minibatch `sample()` for each (Algorithm 1)."""
        args, info = self.args, {}
        policy_loss = self.cloning_loss if cloning else self.actor_loss
        for _ in range(args.critic_updates):
            loss, q_info = self.critic_loss(self, sample(), args)
            self.minimise("critic", loss)
            polyak(self.critic, self.target, args.tau)
            if args.cql_target_gap is not None:
                excess = q_info["cql_loss"] - args.cql_target_gap
                self.minimise("cql_alpha", dual_loss(self.log_cql_alpha, excess))
                # the authors clamp in the loss, whose gradient is 0 above the bound: it would stay there
                self.log_cql_alpha.data.clamp_(max=math.log(1e6))
            info |= q_info
        for _ in range(args.policy_updates):
            loss, pi_info = policy_loss(self, sample(), args)
            self.minimise("actor", loss)
            if args.alpha is None:  # target entropy -d (arXiv 1812.05905)
                self.minimise("alpha", dual_loss(self.log_alpha, -self.act_dim - pi_info["entropy"]))
            info |= pi_info
        return info | {"alpha": self.log_alpha.detach().exp()}

    def checkpoint(self) -> dict:
        return {"networks": self.state_dict(), "optim": {k: o.state_dict() for k, o in self.optim.items()}}

    def restore(self, saved: dict):
        self.load_state_dict(saved["networks"])
        for name, optim in self.optim.items():
            load_optimizer(optim, saved["optim"][name])


@torch.no_grad()
def polyak(net, target, tau: float):
    """target <- target + tau (net - target)."""
    for p, p_target in zip(net.parameters(), target.parameters()):
        p_target.lerp_(p, tau)


# ----------------------------------------------------------------------------------------------- data
class Data:
    """Transitions on the device: row i is (obs, act, rew, next_obs, done, next_act)[i].

    Without `next_observations` in the file, next_obs is a *view* of obs shifted by a row (no second copy), as
    next_act is of act. `train` and `holdout` list the usable rows, split by episodes; `starts` the first rows
    of episodes; `returns_to_go` is discounted, NaN where a time-out cuts off more than 1 % of it.
    """

    def __init__(self, device, info: dict, **arrays):
        self.info = info
        for name, array in arrays.items():
            setattr(self, name, None if array is None else torch.from_numpy(array).to(device))
        self.shifted = self.next_obs is None
        self.next_obs = self.obs[1:] if self.shifted else self.next_obs
        self.next_act = self.act[1:]

    def batch(self, rows) -> Batch:
        columns = (self.obs, self.act, self.rew, self.next_obs, self.done, self.next_act)
        return Batch(*(x[rows] for x in columns))

    def sample(self, n: int) -> Batch:
        return self.batch(self.train[torch.randint(len(self.train), (n,), device=self.train.device)])

    def standardise(self, learner):
        """Observations to mean 0 and deviation 1, in place; the learner keeps both for acting."""
        std, mean = torch.std_mean(self.obs, dim=0)
        learner.obs_mean.copy_(mean)
        learner.obs_std.copy_(std + 1e-3)  # an entry that never varies stays 0
        for x in (self.obs,) if self.shifted else (self.obs, self.next_obs):
            x.sub_(learner.obs_mean).div_(learner.obs_std)


# ----------------------------------------------------------------------- environment: collect, evaluate
def make_env(env_id: str, needed: bool = True) -> gym.Env | None:
    """The environment, checked. If wanted only for its bounds and not installed: None, and a line."""
    try:
        env = gym.make(env_id)
    except Exception as e:  # registration, missing packages, a namespace's own errors
        if needed:
            fail(f"--env-id {env_id}: {type(e).__name__}: {first_line(e)}")
        print(f"{env_id} is not installed here: actions are taken to lie in [-1, 1]")
        return None
    box, obs = env.action_space, env.observation_space
    if not isinstance(box, gym.spaces.Box) or len(box.shape) != 1 or not box.is_bounded():
        fail(f"--env-id {env_id}: actions are {box}, expected a bounded Box of one dimension")
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1:
        fail(f"--env-id {env_id}: observations are {obs}, expected a Box of one dimension")
    if env.spec.max_episode_steps is None:
        fail(f"--env-id {env_id}: has no time limit (max_episode_steps), an evaluation might never end")
    return env


def make_envs(env_id: str, n: int) -> gym.vector.SyncVectorEnv:
    return gym.vector.SyncVectorEnv([lambda: gym.make(env_id)] * n)


def to_env(act, box) -> np.ndarray:
    """Actions from [-1, 1] to the environment's bounds; the clip absorbs rounding."""
    return np.clip(box.low + (act.cpu().numpy() + 1) / 2 * (box.high - box.low), box.low, box.high)


@torch.no_grad()
def evaluate(learner, envs, args: Args) -> tuple[np.ndarray, float]:
    """One episode in each of `envs` from fixed seeds, acting by tanh(mean). Draws no torch random number.

    Returns the raw returns (episodes,) and the mean overestimation: min_i Q_i(s0, a0) less the discounted
    return that followed, with scaled rewards (an episode cut at T steps misses gamma^T of it; the policy
    that Q speaks of is sampled, and with --backup-entropy Q holds its entropy).
    """
    obs, _ = envs.reset(seed=1_000_000 + 1_000 * args.seed)
    alive, returns, discounted = np.ones(len(obs), bool), np.zeros(len(obs)), np.zeros(len(obs))
    discount, predicted = 1.0, None
    learner.critic.eval()
    while alive.any():
        x = learner.standardised(obs)
        act = torch.tanh(learner.actor(x)[0])
        if predicted is None:
            predicted = learner.critic(x, act).amin(0).cpu().numpy()
        obs, rew, terminated, truncated, _ = envs.step(to_env(act, envs.single_action_space))
        returns += alive * rew
        discounted += alive * discount * (rew * args.reward_scale + args.reward_shift)
        alive &= ~(terminated | truncated)  # what an environment does after its first episode is not counted
        discount *= args.gamma
    learner.critic.train()
    return returns, float((predicted - discounted).mean())


class Player:
    """One environment and the replay it fills: the collector's loop, and the fine-tuning's."""

    def __init__(self, env: gym.Env, capacity: int, learner, args: Args):
        o, a, device = env.observation_space.shape, env.action_space.shape, learner.device
        reserve(4 * capacity * (2 * o[0] + a[0] + 3), "replay buffer", device)
        shapes = dict(obs=o, act=a, rew=(), next_obs=o, done=(), timeout=())
        self.buffer = {k: torch.zeros(capacity, *shape, device=device) for k, shape in shapes.items()}
        self.rows = 0
        self.size = torch.zeros((), dtype=torch.float64, device=device)  # rows, as CUDA graphs can read it
        self.env, self.learner, self.args, self.seed = env, learner, args, args.seed
        self.obs, self.returns, self.episode_return = None, [], 0.0

    @torch.no_grad()
    def step(self, random: bool = False):
        """Act once, uniformly or by pi, and store the transition, observations standardised."""
        if self.obs is None:
            self.obs, self.seed = self.learner.standardised(self.env.reset(seed=self.seed)[0]), None
        act = self.learner.actor.sample(self.obs[None], 1)[0][0, 0]
        if random:
            act = torch.rand_like(act) * 2 - 1
        next_obs, rew, terminated, truncated, _ = self.env.step(to_env(act, self.env.action_space))
        next_obs = self.learner.standardised(next_obs)
        scaled = float(rew) * self.args.reward_scale + self.args.reward_shift
        row = (self.obs, act, scaled, next_obs, float(terminated), float(truncated and not terminated))
        for column, value in zip(self.buffer.values(), row):
            column[self.rows] = value
        self.rows += 1
        self.size.fill_(self.rows)
        self.obs, self.episode_return = next_obs, self.episode_return + float(rew)
        if terminated or truncated:
            self.returns.append(self.episode_return)
            self.obs, self.episode_return = None, 0.0

    def sample(self, n: int) -> Batch:
        rows = (torch.rand(n, dtype=torch.float64, device=self.size.device) * self.size).long()
        obs, act, rew, next_obs, done, _ = (column[rows] for column in self.buffer.values())
        return Batch(obs, act, rew, next_obs, done, next_act=act)  # nothing reads next_act here

    def checkpoint(self) -> dict:
        kept = {k: v[: self.rows].clone() for k, v in self.buffer.items()}
        return {"buffer": kept, "returns": self.returns}

    def restore(self, saved: dict):
        """The replay comes back whole; the environment starts a new episode."""
        self.rows, self.returns = len(saved["buffer"]["rew"]), saved["returns"]
        self.size.fill_(self.rows)
        self.seed = self.args.seed + self.rows
        for k, v in saved["buffer"].items():
            self.buffer[k][: self.rows] = v


RANDOM_STEPS = 1_000  # uniform actions before the collector's first update


def collect(args: Args, env: gym.Env, device) -> Path:
    """The replay of a soft actor-critic trained online, kept as a D4RL-layout file under datasets/.

    The collector has its paper's settings (arXiv 1812.05905), networks and learning rates of its own.
    """
    name = f"{args.env_id.replace('/', '_')}_sac-replay_{args.collect_steps}_seed{args.seed}_v1.hdf5"
    path = Path("datasets") / name
    if path.exists():
        print(f"no --dataset: using {path}, made by an earlier run")
        return path
    h5py = need("h5py")
    what = f"{args.collect_steps:,} steps of {args.env_id} by online SAC"
    print(f"no --dataset: collecting {what}, into {path}")
    online = Args(env_id=args.env_id, seed=args.seed, cql_alpha=0.0, backup_entropy=True)
    online.policy_lr = online.q_lr = 3e-4
    learner = Learner(env.observation_space.shape[0], env.action_space.shape[0], online, device)
    player = Player(env, args.collect_steps, learner, online)
    graphs = args.cudagraphs and device.type == "cuda"
    update = GraphedUpdate(lambda: learner.update(lambda: player.sample(online.batch_size), False), graphs)
    progress = Progress("collecting", args.collect_steps)
    with StopSignal() as stop:
        for step in range(1, args.collect_steps + 1):
            player.step(random=step <= RANDOM_STEPS)
            if step > RANDOM_STEPS:
                update()
            if stop.signum:
                print("\nstopped while collecting: nothing is kept, the same command starts again")
                raise SystemExit(128 + stop.signum)
            progress.show(step, {"return": np.mean(player.returns[-5:] or [math.nan])})
    returns, _ = evaluate(learner, make_envs(args.env_id, 10), online)
    b = {k: v.cpu().numpy() for k, v in player.buffer.items()}
    with write_beside(path) as temporary, h5py.File(temporary, "w") as f:
        f["observations"], f["next_observations"], f["rewards"] = b["obs"], b["next_obs"], b["rew"]
        f["actions"] = to_env(player.buffer["act"], env.action_space).astype(np.float32)
        f["terminals"], f["timeouts"] = b["done"].astype(bool), b["timeout"].astype(bool)
        f.attrs["collector_return_mean"] = returns.mean()
    return path


# -------------------------------------------------------------------------- the numbers of one moment
def diagnose(learner: Learner, data: Data, args: Args) -> dict:
    """The numbers of one moment, on fixed probes of at most 2,048 transitions, in fp32 and eval mode.

    Its generators start anew at each call, so that what moves is the network and not the sample. Every Q is
    the ensemble's minimum; the TD error is the ensemble's mean, in units of the target's variance; features
    are those of the first critic; v_s0 is at the data's first states.
    """
    device, actor, critic = learner.device, learner.actor, learner.critic
    draw = torch.Generator(device).manual_seed(0)

    def probe(rows):
        return rows[torch.from_numpy(np.random.default_rng(0).permutation(len(rows))[:2048]).to(device)]

    def q_of(obs, act):
        return critic(obs, act).amin(0)

    def judge(rows, suffix=""):
        """TD error and Q against the data's returns; also Q, (rows,), and the target's actions."""
        batch, g = data.batch(rows), data.returns_to_go[rows]
        next_act, y = backup(learner, batch, args, draw)
        q = critic(batch.obs, batch.act)
        out["td_error" + suffix] = (q - y).pow(2).mean() / y.var()
        q, known = q.amin(0), ~g.isnan()
        if known.sum() >= 32:
            out["q_minus_return" + suffix] = (q - g)[known].mean()
            out["return_std" + suffix] = g[known].std()
        return q, next_act

    out, rows = {}, probe(data.train)
    batch = data.batch(rows)
    critic.eval()
    with strict_fp32():
        q, next_act = judge(rows)
        if len(data.holdout):
            judge(probe(data.holdout), "_holdout")
        uniform = torch.rand(batch.act.shape, generator=draw, device=device) * 2 - 1
        out |= {"q_data": q.mean(), "q_rand": q_of(batch.obs, uniform).mean()}
        out["q_pi"] = q_of(batch.obs, torch.tanh(actor(batch.obs)[0])).mean()
        s0 = data.obs[probe(data.starts)]
        out["v_s0"] = q_of(s0, torch.tanh(actor(s0)[0])).mean()
        obs, next_obs = batch.obs[:256], batch.next_obs[:256]  # 64 actions each: Jensen's bias is small
        act, log_ratio = proposals(actor, obs, next_obs, "mixture", 32, draw)
        q_box = q_of(obs, act)
        out["cql_gap"] = (log_mean_exp(q_box, log_ratio) - q[:256]).mean()
        out["q_max"] = torch.maximum(q_box.max(), q.max())
        phi = critic.features(batch.obs, batch.act)[0][0]
        phi_next = critic.features(batch.next_obs, next_act)[0][0]
        out |= spectrum(phi) | alignment(phi, phi_next, 1 - batch.done)
        out["dormant"] = dormant([h[0] for h in critic.hidden(batch.obs, batch.act)])
    critic.train()
    # The most that these rewards allow, with a uniform policy's entropy if the backup is soft; where all
    # rewards are negative and episodes end, ending at once is best.
    r_min, r_max = data.info["reward_min"], data.info["reward_max"]
    if args.backup_entropy:
        r_max = r_max + args.gamma * float(learner.log_alpha.detach().exp()) * learner.act_dim * math.log(2)
    out["q_bound"] = r_max if r_max < 0 and data.info["terminals"] else r_max / (1 - args.gamma)
    out["q_range"] = (r_max - r_min) / (1 - args.gamma)
    # the data's actions come to rest at 2 (Q - y) <= weight, at every step of the backup
    weight = 0.0 if args.cql_variant == "eq1" else float(learner.log_cql_alpha.detach().exp())
    out["q_lift"] = weight / 2 / (1 - args.gamma)
    return {k: float(v) for k, v in out.items()}


def advice(args: Args) -> dict:
    """The flags that a verdict recommends; what is already on is not among them."""
    stronger, weaker = f"--cql-alpha {max(5, 2 * args.cql_alpha):g}", f"--cql-alpha {args.cql_alpha / 2:g}"
    if args.cql_target_gap is not None:
        stronger, weaker = "a lower --cql-target-gap", "a higher --cql-target-gap"
    wider, smaller = (
        f"--critic-width {x}" for x in (max(256, 2 * args.critic_width), args.critic_width // 4)
    )
    deeper = f"--critic-depth {args.critic_depth + 1}"
    flags = {
        "divergence": [stronger, "--layer-norm"],
        "sarsa fails": [f"--num-updates {2 * args.num_updates}", wider, "a larger --tau"],
        "overfitting": ["--dropout 0.1", "--vib-coef 0.01", smaller],
        "alpha too large": [weaker],
        "underfitting": [wider, deeper, "--residual", "--dr3-coef 0.01"],
    }
    switches = ("layer_norm", "dropout", "vib_coef", "residual", "dr3_coef")
    on = {flag(k) for k in switches if getattr(args, k) or (k == "residual" and args.critic_depth == 1)}
    return {name: " or ".join(x for x in v if x.split()[0] not in on) for name, v in flags.items()}


# ------------------------------------------------------------------------------------------- training
def train(args: Args) -> dict:
    """Train as `args` says; returns what summary.json holds."""
    check(args)
    device, saved = set_up(args), find_checkpoint(args)
    total = args.num_updates + args.online_steps
    if saved and (past := finished(saved, "num_updates", total)):
        return past
    env = make_env(args.env_id, needed=not args.dataset or args.eval_episodes > 0 or args.online_steps > 0)
    envs = make_envs(args.env_id, args.eval_episodes) if args.eval_episodes else None
    path = collect(args, env, device) if args.dataset is None else dataset_path(args.dataset)
    data = load(path, args, env, device)
    if saved and saved["info"]["dataset_sha256"] != data.info["dataset_sha256"]:
        fail(f"--resume {args.resume}: that run had other data: {saved['info']}")
    size = memory(args, data.obs.shape[1] + data.act.shape[1])
    reserve(size, "networks and one update, roughly", device)
    torch.manual_seed(args.seed)  # again: collecting has drawn from it
    learner = Learner(data.obs.shape[1], data.act.shape[1], args, device)
    if args.normalize_obs:
        data.standardise(learner)
    player = Player(env, args.online_steps, learner, args) if args.online_steps else None
    step, history, bc_return, returns = 0, [], None, np.full(1, math.nan)
    if saved:
        learner.restore(saved["learner"])
        step, history, bc_return = saved["step"], saved["history"], saved["bc_return"]
        returns = np.array(saved["returns"])
        before = saved["args"]["num_updates"]
        if step > before and (args.num_updates != before or args.online_steps < step - before):
            keep = f"--num-updates {before}, --online-steps from {step - before}"
            fail(f"--resume: online already, keep {keep}")
        if step > before:
            player.restore(saved["player"])
        restore_random_state(saved["random"])
    run, info = Run(args, data.info, saved), {}

    def sample_both():
        n = round(args.offline_share * args.batch_size)
        return Batch(*map(torch.cat, zip(data.sample(n), player.sample(args.batch_size - n))))

    def update_once(cloning: bool, online: bool):
        return learner.update(sample_both if online else lambda: data.sample(args.batch_size), cloning)

    def save():
        check_finite(step, info | dict(learner.named_parameters()))
        state = {"learner": learner.checkpoint(), "step": step, "history": history, "random": random_state()}
        state |= {"bc_return": bc_return, "returns": returns.tolist()}
        run.save("checkpoint.pt", state | {"player": player.checkpoint() if player else None})

    update = GraphedUpdate(update_once, args.cudagraphs and device.type == "cuda")
    every = lambda n: n > 0 and step % n == 0
    progress = Progress("training", total, step)
    with StopSignal() as stop:
        while step < total and not stop.signum:
            online = step >= args.num_updates
            if online:
                player.step()
            info = update(step < args.bc_steps, online)
            step += 1
            diagnosing = every(args.diagnostics_frequency)
            scoring = envs and (every(args.eval_frequency) or step in (args.bc_steps, total))
            if diagnosing or scoring or every(args.log_frequency):
                check_finite(step, info | dict(learner.named_parameters()))
            if every(args.log_frequency):
                rate = progress.rate(step)
                run.scalars({"losses/" + k: v for k, v in info.items()}, step)
                run.scalars({"charts/updates_per_second": rate, "charts/SPS": rate}, step)
                if online and player.returns:
                    run.scalars({"charts/online_return": np.mean(player.returns[-5:])}, step)
            with progress.paused(diagnosing or scoring):
                if diagnosing:
                    moment = diagnose(learner, data, args)
                    run.scalars({"diagnostics/" + k: v for k, v in moment.items()}, step)
                if diagnosing and not online:
                    history.append(moment | {"step": step})
                    if peak(history, args)[0] is history[-1]:  # the workflow's choice so far
                        run.save("selected.pt", {"networks": learner.state_dict(), "step": step})
                if scoring:
                    returns, overestimation = evaluate(learner, envs, args)
                    score = {"charts/episodic_return": returns.mean(), "eval/episodic_return": returns.mean()}
                    score["charts/normalized_score"] = normalized_score(args.env_id, returns.mean())
                    run.scalars(score | {"diagnostics/overestimation": overestimation}, step)
                    bc_return = float(returns.mean()) if step == args.bc_steps else bc_return
            if every(args.checkpoint_frequency) and step < total:
                save()
            progress.show(step, {"loss": info["qf_loss"], "Q": info["qf1_values"], "return": returns.mean()})
        save()
        summary = data.info | {"num_updates": step, "updates_per_second": progress.rate(step)}
        if envs:
            summary |= {"final_return_mean": float(returns.mean()), "final_return_std": float(returns.std())}
            summary["normalized_score"] = normalized_score(args.env_id, returns.mean())
        if envs and step == total and (run.dir / "selected.pt").is_file():
            chosen = load_checkpoint(run.dir / "selected.pt")
            learner.load_state_dict(chosen["networks"])
            selected = evaluate(learner, envs, args)[0].mean()
            summary |= {"selected_step": chosen["step"], "selected_return_mean": float(selected)}
        if stop.signum:
            run.stopped(stop.signum)
    name, sentence = verdict(history, args, 1.0)
    summary |= {"verdict": name, "verdict_text": sentence, "eval_episodes": args.eval_episodes}
    summary["bc_return_mean"] = bc_return
    names = ("dataset", "bc", "selected", "final", "collector")
    known = {k: summary.get(f"{k}_return_mean") for k in names}
    print("returns: " + ", ".join(f"{k} {v:.1f}" for k, v in known.items() if v is not None))
    if summary.get("normalized_score") is not None:
        print(f"D4RL score of the final policy: {summary['normalized_score']:.1f}")
    print(f"verdict: {name}. {sentence}")
    return run.finish(summary)


# ----------------------------------------------------------------------- files of data, D4RL's scores
FLAGS = ("terminals", "timeouts", "terminations", "truncations")


def columns(f, keys: list[str], where: str) -> dict:
    """The HDF5 arrays of these names, refused unless each is there and of the right rank, kind and width."""
    found = {}
    for key in keys:
        try:
            found[key] = h = f[key]
        except (KeyError, OSError):
            fail(f"{where}: no key '{key}' (found: {', '.join(f) or 'none'}), expected a D4RL or Minari file")
        rank = 1 if key in FLAGS or key == "rewards" else 2
        kinds, what = ("biuf", "flags") if key in FLAGS else ("f", "floats")
        if getattr(h, "shape", None) is None:
            fail(f"{where}: '{key}' is not an array (Dict spaces must be flattened first)")
        if len(h.shape) != rank or h.dtype.kind not in kinds:
            fail(f"{where}: '{key}' is {len(h.shape)}-D {h.dtype}, expected {rank}-D {what}")
        if 0 in h.shape[1:]:
            fail(f"{where}: '{key}' has shape {h.shape}, expected at least one column")
    return found


def read_floats(h, out: np.ndarray, where: str):
    """An HDF5 array of any float type straight into float32 rows; NaN and infinity are refused."""
    if h.size:
        h.read_direct(out)
    with np.errstate(invalid="ignore"):  # NaN and inf survive a sum: one pass, no temporary
        finite = np.isfinite(np.sum(out, dtype=np.float64))
    if not finite:
        row, *column = np.argwhere(~np.isfinite(out))[0]
        key = h.name.rsplit("/", 1)[-1]
        fail(f"{where}: '{key}' row {row} holds {out[row, *column]}, expected finite numbers")


def read_flags(h, where: str) -> np.ndarray:
    x = h[()]
    bad = np.flatnonzero((x != 0) & (x != 1))
    if len(bad):
        fail(f"{where}: '{h.name.rsplit('/', 1)[-1]}' row {bad[0]} is {x[bad[0]]}, expected 0 or 1")
    return x.astype(bool)


def read_d4rl(f, path: Path, device) -> dict:
    """D4RL layout, flat arrays. The one row of padding at the end keeps views shifted by a row in bounds."""
    keys = ["observations", "actions", "rewards", "terminals"]
    h = columns(f, keys + [k for k in ("timeouts", "next_observations") if k in f], path)
    n, width = h["observations"].shape
    for key, array in h.items():
        if len(array) != n or (key == "next_observations" and array.shape[1] != width):
            fail(f"{path}: '{key}' has shape {array.shape}, 'observations' {(n, width)}")
    if n == 0:
        fail(f"{path}: holds no transitions")
    reserve(sum(4 * array.size for array in h.values()) + 24 * n, "dataset", device)

    def padded(key):
        x = np.zeros((n + 1, *h[key].shape[1:]), np.float32)
        read_floats(h[key], x[:n], path)
        x[n] = x[n - 1]
        return x

    raw = {"obs": padded("observations"), "act": padded("actions"), "rew": padded("rewards"), "note": ""}
    raw["next_obs"] = padded("next_observations") if "next_observations" in h else None
    terminal, timeout = read_flags(h["terminals"], path), np.zeros(n, bool)
    if "timeouts" in h:
        timeout = read_flags(h["timeouts"], path)
    elif raw["next_obs"] is None:
        raw["note"] = ". No 'timeouts': episodes are taken to end at terminals only"
    else:
        timeout[:-1] = (raw["next_obs"][: n - 1] != raw["obs"][1:n]).any(1)
        raw["note"] = ". No 'timeouts': episodes are taken to end where next_observations is not the next row"
    terminal, timeout = (np.append(x, False) for x in (terminal, timeout))
    end = terminal | timeout
    end[n - 1] = True  # the file ends here, whatever its flags say
    real = np.arange(n + 1) < n
    has_next = real & (terminal | ~end) if raw["next_obs"] is None else real
    raw |= {"terminal": terminal, "end": end, "real": real, "has_next": has_next}
    return raw | {"locate": lambda row: f"{path}: 'actions' row {row}"}


def read_minari(f, path: Path, device) -> dict:
    """Minari layout, a group an episode with T + 1 observations: the last row of each is no transition."""
    names = [k for k in f if k.startswith("episode_")]
    for name in names:
        if not name[8:].isdigit() or not hasattr(f.get(name), "keys"):
            fail(f"{path}: '{name}' is not an episode's group")
    names.sort(key=lambda name: int(name[8:]))
    keys = ["observations", "actions", "rewards", "terminations", "truncations"]
    episodes = [columns(f[name], keys, f"{path}/{name}") for name in names]
    width = {k: episodes[0][k].shape[1] for k in ("observations", "actions")}
    for name, h in zip(names, episodes):
        shapes, t = {k: array.shape for k, array in h.items()}, len(h["rewards"])
        expected = {k: (t + (k == "observations"), *([width[k]] if k in width else [])) for k in keys}
        if shapes != expected:
            key = next(k for k in keys if shapes[k] != expected[k])
            wrong = f"'{key}' has shape {shapes[key]}, expected {expected[key]} beside {t} rewards"
            fail(f"{path}/{name}: {wrong}")
    first = np.cumsum([0] + [len(h["observations"]) for h in episodes])
    n = int(first[-1])
    reserve(4 * n * (sum(width.values()) + 8), "dataset", device)
    raw = {"obs": np.zeros((n, width["observations"]), np.float32)}
    raw |= {"act": np.zeros((n, width["actions"]), np.float32)}
    raw |= {"rew": np.zeros(n, np.float32), "next_obs": None, "note": ""}
    raw |= {k: np.zeros(n, bool) for k in ("terminal", "end", "real")}
    for name, h, i, j in zip(names, episodes, first, first[1:] - 1):  # rows i to j - 1 are transitions
        where = f"{path}/{name}"
        read_floats(h["observations"], raw["obs"][i : j + 1], where)
        read_floats(h["actions"], raw["act"][i:j], where)
        read_floats(h["rewards"], raw["rew"][i:j], where)
        raw["terminal"][i:j] = read_flags(h["terminations"], where)
        raw["end"][i:j] = raw["terminal"][i:j] | read_flags(h["truncations"], where)
        raw["end"][max(i, j - 1) : j] = raw["real"][i:j] = True
    raw["has_next"] = raw["real"]

    def locate(row):
        episode = int(np.searchsorted(first, row, "right")) - 1
        return f"{path}/{names[episode]}: 'actions' row {row - first[episode]}"

    return raw | {"locate": locate}


def load(path: Path, args: Args, env, device) -> Data:
    """Read, check and describe a dataset; a bad one ends the program in one line (status 2)."""
    h5py = need("h5py")
    if not path.is_file():
        fail(f"--dataset {path}: no such file, Minari folder or downloaded Minari id")
    try:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        with h5py.File(path) as f:
            minari = "observations" not in f and any(k.startswith("episode_") for k in f)
            raw = (read_minari if minari else read_d4rl)(f, path, device)
            made_by = {k: float(v) for k, v in f.attrs.items() if k.startswith("collector_")}
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as e:  # h5py has all these for damage
        fail(f"{path}: not readable as HDF5, is it complete? ({first_line(e)})")
    obs, act, rew, terminal, end, real = (raw[k] for k in ("obs", "act", "rew", "terminal", "end", "real"))
    if not real.any():
        fail(f"{path}: holds no transitions")
    low, high = -np.ones(act.shape[1]), np.ones(act.shape[1])
    if env is not None:
        low, high = env.action_space.low, env.action_space.high
        widths, expected = (obs.shape[1], act.shape[1]), (env.observation_space.shape[0], len(low))
        if widths != expected:
            ant = "; D4RL's ant needs include_cfrc_ext_in_observation=False" if widths[0] == 27 else ""
            fail(f"{path}: observations and actions are {widths} wide, {args.env_id} has {expected}{ant}")
    # Episodes: their first rows, returns (before scaling), and for each row the last row of its episode
    start = real & np.append(True, (end | ~real)[:-1])
    rew[~real] = 0
    returns = np.add.reduceat(rew, np.flatnonzero(start), dtype=np.float64)
    ends, rows = np.flatnonzero(end).astype(np.int32), np.arange(len(real), dtype=np.int32)
    last = ends[np.minimum(np.searchsorted(ends, rows), len(ends) - 1)]
    usable = raw["has_next"] & (terminal | ~end) if args.backup == "sarsa" else raw["has_next"]
    dropped = int(real.sum() - usable.sum())
    held = np.zeros(len(returns), bool)
    if args.holdout and len(returns) > 1:
        order = np.random.default_rng(args.seed).permutation(len(returns))
        held[order[: max(1, round(args.holdout * len(returns)))]] = True
    held = held[np.cumsum(start) - 1]
    if not (usable & ~held).any():
        why = f"of {real.sum()} rows {dropped} lack s' or a', {held.sum()} are held out"
        fail(f"{path}: nothing to train on: {why}")

    # Actions to [-1, 1], rewards to their scale
    span = f"{act[real].min():.3g} to {act[real].max():.3g}"
    act -= ((high + low) / 2).astype(np.float32)
    act /= ((high - low) / 2).astype(np.float32)
    beyond = np.where(real, np.abs(act).max(1) - 1, 0)
    if beyond.max() > 2e-3:  # 0.1 % of the range, which is 2
        row, box = int(beyond.argmax()), f"{low.tolist()} to {high.tolist()}"
        fail(f"{raw['locate'](row)} is outside {box} by {beyond[row] / 2:.1%} of the range")
    np.clip(act, -1, 1, out=act)
    rew *= args.reward_scale
    rew += args.reward_shift
    g = returns_to_go(rew, last, args.gamma)
    g[~real | ~terminal[last] & (args.gamma ** (last - rows + np.float32(1)) > 0.01)] = np.nan

    n_end, kind = int(terminal.sum()), "action" if args.backup == "sarsa" else "observation"
    info = made_by | {"dataset": str(path), "dataset_sha256": digest}
    info |= {"dataset_return_mean": float(returns.mean())}
    info |= {"reward_min": float(rew[real].min()), "reward_max": float(rew[real].max()), "terminals": n_end}
    data = Data(
        device, info, obs=obs, act=act, rew=rew, next_obs=raw["next_obs"], done=terminal.astype(np.float32),
        returns_to_go=g, train=np.flatnonzero(usable & ~held), holdout=np.flatnonzero(usable & held),
        starts=np.flatnonzero(start),
    )  # fmt: skip
    print(
        f"{path}: {real.sum():,} transitions in {len(returns):,} episodes, {n_end:,} ended by a terminal "
        f"state, {len(returns) - n_end:,} by a time-out or the file's end{raw['note']}\n"
        f"  returns {returns.mean():.1f} mean, {returns.min():.1f} min, {returns.max():.1f} max; actions "
        f"{span}, {(beyond > 0).sum():,} clipped\n"
        f"  {len(data.train):,} transitions to train on, {len(data.holdout):,} held out, {dropped:,} dropped "
        f"(no next {kind})"
    )
    return data


def dataset_path(name: str) -> Path:
    """A file; a Minari folder; or a Minari id under MINARI_DATASETS_PATH (default ~/.minari/datasets)."""
    root = Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets"))
    inside = ("main_data.hdf5", "data/main_data.hdf5")
    candidates = [Path(name)] + [folder / x for folder in (Path(name), root / name) for x in inside]
    return next((p for p in candidates if p.is_file()), Path(name))


D4RL_REFERENCE = {  # returns of a random and an expert policy, D4RL's infos.py
    "halfcheetah": (-280.178953, 12135.0), "hopper": (-20.272305, 3234.3), "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0), "ant": (-325.6, 3879.7), "adroithandpen": (96.262799, 3076.8331017826877),
    "adroithandhammer": (-274.856578, 12794.134825156867), "adroithanddoor": (-56.512833, 2880.5693087298737),
    "adroithandrelocate": (-6.425911, 4233.877797728884), "frankakitchen": (0.0, 4.0),
}  # fmt: skip


def normalized_score(env_id: str, value: float) -> float | None:
    """D4RL's score, 0 for a random and 100 for an expert policy; None where there is no reference."""
    name = re.split("[-_]", env_id.split("/")[-1].lower())[0]
    low, high = D4RL_REFERENCE.get(name, (None, None))
    return None if low is None else 100 * (value - low) / (high - low)


# === shared: graph capture (canonical copy: cql_continuous.py) ===
class GraphedUpdate:
    """`fn(*key)`, on a GPU captured into a CUDA graph for each key: one launch an update instead of hundreds.

    Every call is exactly one real update: the first three of a key run eagerly (warm-up), the fourth is
    captured and replayed. Capture freezes Python values: all that varies must be in `key` or in a device
    tensor.
    """

    def __init__(self, fn, enabled: bool):
        self.fn, self.enabled, self.calls, self.graphs = fn, enabled, {}, {}
        self.stream = torch.cuda.Stream() if enabled else None  # one: each has workspaces of its own

    def __call__(self, *key) -> dict:
        if not self.enabled:
            return self.fn(*key)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                out = self.fn(*key)
            torch.cuda.current_stream().wait_stream(self.stream)
            return out
        if key not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self.graphs[key] = graph, self.fn(*key)
        graph, out = self.graphs[key]
        graph.replay()
        return out


# === end shared ===


# === shared: diagnostics (canonical copy: cql_continuous.py) ===
def spectrum(phi) -> dict:
    """Ranks of the features phi (B, D), uncentred, from one svdvals; s are the singular values.

    srank: least k with s_1 + .. + s_k >= 0.99 of the sum (arXiv 2010.14498); rank_pca: the same with s^2;
    effective_rank: exp of the entropy of s / sum(s); sigma_max, sigma_min: of phi / sqrt(B).
    """
    assert phi.ndim == 2, phi.shape
    s = torch.linalg.svdvals(phi.float()).double()

    def reach(x):  # least k whose first k entries hold 0.99 of the sum; 1e-9 absorbs rounding
        return int((x.cumsum(0) < (0.99 - 1e-9) * x.sum()).sum()) + 1

    p = s / s.sum().clamp(min=1e-30)
    sigma = s / len(phi) ** 0.5
    ranks = {"srank": reach(s), "rank_pca": reach(s**2), "effective_rank": torch.special.entr(p).sum().exp()}
    return ranks | {"sigma_max": sigma[0], "sigma_min": sigma[-1]}


def alignment(phi, phi_next, weight) -> dict:
    """Mean dot product and cosine of phi(s,a) and phi(s',a'), both (B, D), over the rows of weight (B,) 1,
    those that bootstrap (arXiv 2112.04716; a' as in the backup), and the mean norm of phi."""
    assert weight.ndim == 1, weight.shape
    dot, norm, norm_next = (phi * phi_next).sum(-1), phi.norm(dim=-1), phi_next.norm(dim=-1)
    cos = dot / (norm * norm_next).clamp(min=1e-30)
    dot, cos = ((x * weight).sum() / weight.sum().clamp(min=1) for x in (dot, cos))
    return {"feature_dot": dot, "feature_cos": cos, "feature_norm": norm.mean()}


def dormant(activations: list) -> torch.Tensor:
    """Share of hidden units, pooled over layers (B, width), whose mean absolute activation is at or below
    0.025 of their layer's mean (arXiv 2302.12902); a layer of zeros is all dormant."""
    means = [h.abs().mean(0) for h in activations]
    return torch.cat([m <= 0.025 * m.mean() for m in means]).float().mean()


@contextmanager
def strict_fp32():
    """No gradients, no tf32: reduced precision inflates ranks (a true rank of 5 reads 96 in bf16)."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


# === end shared ===


# === shared: workflow (canonical copy: cql_continuous.py) ===
# Needs NumPy, and advice(args) of the script: the flags to try, by the name of the verdict.
LOW_TD = 0.1  # TD error below a tenth of the target's variance: the transient is over
UNTRAINED = 1.0  # about the largest Q of a network that has learned nothing


def returns_to_go(rew, last, gamma: float):
    """G_i = sum_k gamma^k r_{i+k} up to row last[i], the end of its episode; by doubling k."""
    g, k, rows = rew.copy(), 1, np.arange(len(rew), dtype=np.int32)
    while k <= (last - rows).max():
        g[:-k] += np.where(rows[:-k] + k <= last[:-k], np.float32(gamma**k) * g[k:], 0)
        k *= 2
    return g


def q_unit(moment: dict) -> float:
    """The scale for differences of Q: the deviation of the data's discounted return, or where
    time-outs hide that a tenth of the range of Q."""
    return moment.get("return_std") or moment["q_range"] / 10 or 1.0


def peak(history: list[dict], args) -> tuple[dict, float]:
    """The moment to which the dataset's Q rose before it fell, and that rise; the last one and 0
    if it never rose.

    Q first drifts from 0 to its level, with negative rewards downwards: nothing counts before the
    TD error was first low, nor in the first tenth of the run, and a peak ends a *rise*."""
    best, rise, trough = history[-1], 0.0, 0.0  # Q of the untrained network is about 0
    settled = False
    for h in history:
        settled = settled or (h["td_error"] < LOW_TD and h["step"] >= args.num_updates / 10)
        if settled:
            trough = min(trough, h["q_data"])
            higher = rise == 0 or h["q_data"] > best["q_data"]
            if h["q_data"] - trough > 0.1 * q_unit(h) and higher:
                best, rise = h, h["q_data"] - trough
    return best, rise


def on_its_way(history: list[dict]) -> bool:
    """Whether the dataset's Q is still on its way from 0 to its level: farther from 0 in each of
    the last three fifths of the run, and in the last one by an eighth of the whole way. (On a
    straight line that is a fifth; after 1 / (tau (1 - gamma)) updates about an eighth.)"""
    fifths = [history[len(history) * k // 5 - 1]["q_data"] for k in (2, 3, 4, 5)]
    way = np.abs(fifths)
    same_side = min(fifths) > 0 or max(fifths) < 0
    return bool(same_side and (np.diff(way) > 0).all() and way[2] <= 0.875 * way[3])


def verdict(history: list[dict], args, rewarded: float) -> tuple[str, str]:
    """What a run shows: a name, and a sentence with the numbers it rests on and the flag to try.

    Only from what an offline user sees (arXiv 2109.10813): the share of rows whose reward is not
    the usual one, and the diagnostics' mean over the last fifth of the run. The TD error is in units
    of its target's variance, Q in units of q_unit(), cql_gap in units of Q, whose exp it averages."""
    flags, longer = advice(args), f"--num-updates {2 * args.num_updates}"
    if rewarded <= 0.001:
        return "nothing to learn from", f"only {rewarded:.2%} of the rewards differ from the others"
    if len(history) < 10:
        closer = f"--diagnostics-frequency {max(1, args.num_updates // 20)}"
        few = f"{len(history)} diagnostics, ten are the least"
        return "too short to judge", f"{few}: try {longer}, or {closer} if it is long enough"

    end, late = history[-1], history[-(len(history) // 5) :]
    before, midway, unit = history[-1 - len(late)], history[len(history) // 2], q_unit(end)

    def mean(key: str) -> float:
        return float(np.mean([h.get(key, math.nan) for h in late]))

    td, held, gap = mean("td_error"), mean("td_error_holdout"), mean("cql_gap")
    off, off_held = mean("q_minus_return") / unit, mean("q_minus_return_holdout") / unit
    numbers = f"TD error {td:.3f} of the target's variance"
    numbers += "" if math.isnan(held) else f" ({held:.3f} held out)"
    numbers += f", cql_gap {gap:.1f}"
    numbers += "" if math.isnan(off) else f", Q {off:+.1f} deviations from the data's returns"
    drift, moving = (end["q_data"] - before["q_data"]) / unit, on_its_way(history)
    moved = f"Q went from {before['q_data']:.3g} to {end['q_data']:.3g} in the last fifth"
    advised = f"try {longer}"
    if off > 0.5 and drift > 0:  # more updates may be the way into divergence
        advised = "above those returns: a better policy's value, or overestimation (see that after "
        advised += f"an evaluation); beside it try {flags['divergence']}"

    # the most that the rewards allow, and what raising Q at the data's actions may add to it
    scale = max(end["q_range"], abs(end["q_bound"]))
    allowed = end["q_bound"] + end["q_lift"] + 0.05 * scale + UNTRAINED
    # but Q starts at 0, and to a bound below that it has to come down
    step_down = before["q_data"] - end["q_data"]
    risen = step_down <= 0 or end["q_max"] > max(UNTRAINED, history[0]["q_max"])
    settled = not moving and end["q_max"] - 5 * step_down > allowed
    if end["q_max"] > allowed and (risen or settled):
        too_high = f"Q reaches {end['q_max']:.3g}, these rewards allow about {allowed:.3g}"
        cause = "the backup feeds on overestimated actions"
        return "divergence", f"{too_high}: {cause}. Try {flags['divergence']}"

    if getattr(args, "backup", "") == "sarsa":
        if moving:
            return "too short to judge", f"{numbers}. {moved}: try {longer}"
        error = np.nanmax(np.abs([off, off_held, 0]))
        if np.nanmax([td, held]) < 2 * LOW_TD and error < 0.5:
            basics = "the basics hold without a policy in the backup"
            return "sarsa passes", f"{numbers}: {basics}. Go on to --backup sac"
        return "sarsa fails", f"{numbers}: mend this first. Try {flags['sarsa fails']}"

    top, rise = peak(history, args)
    since = [h["q_data"] for h in late if h["step"] > top["step"]]
    fall = (top["q_data"] - np.mean(since)) / unit if rise and since else 0.0
    cure = f"Take selected.pt; try {flags['overfitting']}"
    if fall > 0.1:
        peaked = f"the dataset's Q rose to {top['q_data']:.3g} until update {top['step']:,}"
        return "overfitting", f"{numbers}: {peaked} and fell to {np.mean(since):.3g} since. {cure}"
    if held > max(5 * td, LOW_TD):
        times = held / max(td, 1e-9)
        return "overfitting", f"{numbers}: {times:.0f} times as large on held-out episodes. {cure}"

    # on its way up: the second half of the run made good a tenth of what is missing
    enough = (end["q_data"] - midway["q_data"]) / unit > -0.1 * off
    rising = drift > 0 and (moving or enough)
    if args.cql_alpha > 0 and gap < -0.5 and off < -1 and not rising:
        cause = "the conservative term outweighs the TD error"
        return "alpha too large", f"{numbers}: {cause}. Try {flags['alpha too large']}"
    if moving:
        return "too short to judge", f"{numbers}. {moved}: {advised}"
    if td > LOW_TD and td > 0.6 * midway["td_error"] and gap > -0.5:
        cause = "both stay high, this critic cannot lower them"
        return "underfitting", f"{numbers}: {cause}. Try {flags['underfitting']}"
    healthy = f"{numbers}, and the dataset's Q has not fallen from a peak"
    return "no sign of trouble", healthy + (f". {moved}: {advised}" if abs(drift) > 0.1 else "")


def evaluated(summary: dict) -> str:
    """What evaluations add to the verdict's sentence: "" where there were none."""
    if "final_return_mean" not in summary:
        return ""
    text = f" (What an offline user would not have: the policy returns {summary['final_return_mean']:.1f}"
    text += f", its data {summary['dataset_return_mean']:.1f}"
    if "overestimation" in summary:
        text += f"; at first states Q is {summary['overestimation']:+.1f} off what followed"
    return text + ")"


# === end shared ===


# === shared: run (canonical copy: cql_continuous.py) ===
FORMAT = 3  # of checkpoints
# Arguments (of all scripts) that may differ on --resume; every other one must be the same.
MAY_CHANGE = """total_timesteps num_updates online_steps checkpoint_frequency checkpoint_replay run_dir resume
eval_frequency eval_episodes log_frequency diagnostics_frequency compile cudagraphs cuda track capture_video
wandb_project_name wandb_entity save_dataset rollout_dataset rollout_steps""".split()


def fail(message: str, status: int = 2):
    """End the program with one line: 2 for a user's mistake, 3 for non-finite numbers."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


def first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:200]


def need(package: str):
    """An optional package, imported where it is needed, or one line that says what to install."""
    try:
        return importlib.import_module(package)
    except ImportError:
        fail(f"{package} is not installed: pip install {package}")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_limits(args, limits: dict):
    """Refuse numbers outside limits[name] = (least, most), by default (0, 1e18), and NaN."""
    limits = {"eval_episodes": (0, 1e5)} | limits  # as many environments
    for name, value in asdict(args).items():
        least, most = limits.get(name, (0, 1e18))
        if isinstance(value, (int, float)) and not least <= value <= most:
            fail(f"{flag(name)} {value}: expected a number from {least:g} to {most:g}")


def only_if(args, condition, otherwise: str, *names: str):
    """Refuse arguments that are not at their default while the condition under which they act is false."""
    for name in names:
        if getattr(args, name) != getattr(type(args), name) and not condition:
            fail(f"{flag(name)} {getattr(args, name)} has no effect {otherwise}")


def set_up(args) -> torch.device:
    """Seed, device and precision. Tells glibc to keep large blocks: worth a quarter of a CPU update."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.precision == "tf32" and device.type == "cpu":
        fail("--precision tf32 needs a GPU")
    if args.precision != "fp32" and device.type == "cuda" and torch.cuda.get_device_capability()[0] < 8:
        fail(f"--precision {args.precision} needs a GPU of compute capability 8.0 or higher")
    if args.precision == "bf16" and device.type == "cpu":
        x, seconds = torch.ones(512, 512), []
        for y in (x, x.bfloat16()):
            seconds.append(min(timeit.repeat(lambda: y @ y, number=1, repeat=3)))  # noqa: B023
        if seconds[1] > seconds[0]:
            print(f"--precision bf16: {seconds[1] / seconds[0]:.1f} times slower than fp32 on this processor")
    return device


def reserve(size: int, what: str, device):
    """Print how many bytes are about to be taken; refuse what the device has not."""
    free = size
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else what PyTorch keeps for itself counts as taken
        free = torch.cuda.mem_get_info(device)[0]
    elif os.path.exists("/proc/meminfo"):
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    print(f"{what}: {size / 2**20:,.1f} MiB on {device}")
    if size > free:
        fail(f"{what} needs {size / 2**30:.1f} GiB, {device} has {free / 2**30:.1f} GiB free")


class StopSignal:
    """SIGINT and SIGTERM only set `signum`, for the loop to read between updates; a second acts as usual."""

    def __enter__(self):
        self.signum, self.usual = 0, {}
        if threading.current_thread() is threading.main_thread():
            self.usual = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, signum, frame):
        self.signum = signum
        signal.signal(signum, self.usual[signum])

    def __exit__(self, *_):
        for s, handler in self.usual.items():
            signal.signal(s, handler)


class Progress:
    """One line on a terminal, a line every ten seconds elsewhere; the rate leaves out what was paused."""

    def __init__(self, label: str, total: int, start: int = 0):
        self.label, self.total, self.start, self.tty = label, total, start, sys.stdout.isatty()
        self.begin, self.shown = time.perf_counter(), 0.0

    @contextmanager
    def paused(self, really: bool = True):
        if really and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # queued updates are not part of the pause
        paused = time.perf_counter()
        yield
        self.begin += time.perf_counter() - paused

    def rate(self, step: int) -> float:
        return (step - self.start) / max(time.perf_counter() - self.begin, 1e-9)

    def show(self, step: int, values: dict):
        if time.perf_counter() - self.shown < (0.5 if self.tty else 10) and step < self.total:
            return  # before any float(value): reading a loss waits for the GPU
        self.shown, rate = time.perf_counter(), self.rate(step)
        left = timedelta(seconds=round((self.total - step) / max(rate, 1e-9)))
        text = ", ".join(f"{k} {float(v):.4g}" for k, v in values.items())
        line = f"{self.label} {step:,}/{self.total:,} ({step / self.total:.0%}), {rate:.1f}/s, {left} left"
        carriage, newline = ("\r\033[K", "\n" * (step == self.total)) if self.tty else ("", "\n")
        print(f"{carriage}{line}, {text}", end=newline, flush=True)


def check_finite(step: int, tensors: dict):
    """Stop with status 3, naming the first tensor that holds a NaN or an infinity. One host sync."""
    fine = torch.stack([torch.isfinite(v.detach()).all() for v in tensors.values()]).tolist()
    if not all(fine):
        name = list(tensors)[fine.index(False)]
        fail(f"step {step}: {name} is not finite; the last checkpoint is from before", status=3)


@contextmanager
def write_beside(path: Path):
    """A temporary path beside the target; flushed and moved into place on success, removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")

    def flush(p: Path):
        descriptor = os.open(p, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    try:
        yield temporary
        flush(temporary)  # the bytes reach the disk before the name does
        os.replace(temporary, path)
        flush(path.parent)  # and so does the folder's entry
    finally:
        temporary.unlink(missing_ok=True)


def random_state() -> dict:
    """Of the CPU, and of the one GPU that a run uses."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": gpu}


def restore_random_state(saved: dict):
    torch.set_rng_state(saved["cpu"])
    if saved["cuda"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(saved["cuda"][0])


def load_checkpoint(path: Path) -> dict:
    """Tensors and plain Python only: a crafted pickle is refused, as is another script's file."""
    script = Path(__file__).stem
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        saved = {} if damaged else torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or (saved.get("script"), saved.get("format")) != (script, FORMAT):
            raise ValueError(f"{damaged} is damaged" if damaged else "of another script or format")
    except Exception as e:  # torch.load raises a dozen kinds of it
        fail(f"{path}: not a checkpoint of {script} ({type(e).__name__}: {first_line(e)})")
    return saved | {"folder": path.parent}


def load_optimizer(optim, saved: dict):
    """Its state without its flags: a GPU's checkpoint must not bring them to a CPU."""
    flags = {k: optim.param_groups[0][k] for k in ("fused", "capturable")}
    optim.load_state_dict(saved)
    optim.param_groups[0].update(flags)


def checkpoint_path(args) -> Path:
    """The file that --resume, a run folder or a checkpoint, names."""
    path = Path(args.resume) / "checkpoint.pt" if Path(args.resume).is_dir() else Path(args.resume)
    if not path.is_file():
        fail(f"--resume {args.resume}: no checkpoint at {path}")
    return path


def newest_checkpoint(args, given: dict) -> Path | None:
    """Of the runs with the arguments `given`, the newest one's."""
    given = json.loads(json.dumps(given))  # tuples become lists, as in args.json
    for path in sorted(Path(args.run_dir).glob("*/checkpoint.pt"), key=lambda p: -p.stat().st_mtime):
        try:
            header = json.loads((path.parent / "args.json").read_text())
            if header["script"] == Path(__file__).stem and given.items() <= header["args"].items():
                return path
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # not a run's folder, or not one of ours
    print(f"--resume auto: no run in {args.run_dir} has these arguments, a new one starts")


def find_checkpoint(args) -> dict | None:
    """What --resume names, refused if its arguments differ in one that changes the numbers."""
    given = {k: v for k, v in asdict(args).items() if k not in MAY_CHANGE}
    if args.resume is None:
        return None
    path = newest_checkpoint(args, given) if args.resume == "auto" else checkpoint_path(args)
    if path is None:
        return None
    saved = load_checkpoint(path)
    if "random" not in saved:
        fail(f"--resume {path}: holds networks only, expected a checkpoint.pt")
    for k, v in given.items():
        before = saved["args"].get(k, getattr(type(args), k, None))  # a flag that the run did not know yet
        if before != v:
            fail(f"--resume {args.resume}: that run has {flag(k)} {before}, this command {v}")
    for k, v in saved["learner"]["networks"].items():
        if not v.isfinite().all():
            fail(f"--resume {path}: {k} is not finite")
    return saved


def finished(saved: dict, counter: str, total: int) -> dict | None:
    """The summary of a run of which nothing is left to do, for a resume that shall leave it as it is."""
    path = saved["folder"] / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    if saved["step"] < total or summary.get(counter) != saved["step"]:
        return None  # a summary of another step is from before the run was made longer
    longer = "--total-timesteps" if counter == "global_step" else "--num-updates"
    print(f"{path.parent}: complete at step {saved['step']:,}; a larger {longer} goes on")
    return summary


def command(args, folder: Path | None = None) -> str:
    """The command line that gives these arguments, and goes on from `folder`."""
    many = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
    words = ["torchrun", f"--nproc_per_node={many}"] if many else ["python"]
    words.append(Path(__file__).name)
    for f in fields(args):
        value = getattr(args, f.name)
        if isinstance(value, bool) and value != f.default:
            words.append(flag(f.name) if value else flag("no_" + f.name))
        elif value != f.default and f.name != "resume":
            words += [flag(f.name), *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words + (["--resume", str(folder)] if folder else []))


class Run:
    """A run's folder: args.json, metrics.csv, TensorBoard events, checkpoints, summary.json."""

    def __init__(self, args, info: dict, saved: dict | None):
        self.args, self.info, self.begin = args, info, time.time() - (saved["wall_seconds"] if saved else 0)
        device = torch.cuda.get_device_name() if args.cuda and torch.cuda.is_available() else "cpu"
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
        self.header = {"script": Path(__file__).stem, "args": asdict(args), "command": command(args)}
        self.header |= {"device": device, "info": info}
        self.header["versions"] = versions | {"gymnasium": gym.__version__}
        if args.track:
            wandb = need("wandb")
        self.dir = saved["folder"] if saved else self.new_folder()
        if args.track:
            where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": self.dir.name}
            wandb.init(**where, config=asdict(args), sync_tensorboard=True)
        (self.dir / "args.json").write_text(json.dumps(self.header, indent=2))
        self.csv = open(self.dir / "metrics.csv", "a")
        size = os.fstat(self.csv.fileno()).st_size  # rows after the checkpoint will come again
        self.csv.seek(self.csv.truncate(min(size, saved["csv_bytes"]) if saved else 0))
        self.writer = SummaryWriter(str(self.dir), purge_step=saved["step"] + 1 if saved else None)
        if not saved:
            self.csv.write("step,tag,value\n")
            table = "".join(f"\n|{k}|{v}|" for k, v in asdict(args).items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|{table}")
        print(f"run folder: {self.dir}")

    def new_folder(self) -> Path:
        args = self.args
        env = args.env_id if isinstance(args.env_id, str) else "+".join(args.env_id)
        name = f"{env.replace('/', '_')}__{args.exp_name}__{args.seed}__{int(time.time())}"
        for suffix in ("", *(f"-{i}" for i in range(1, 10_000))):  # a sweep starts many in one second
            folder = Path(args.run_dir) / (name + suffix)
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue
            except OSError as e:
                fail(f"--run-dir {args.run_dir}: {e}")

    def scalars(self, values: dict, step: int):
        for tag, value in values.items():
            if value is not None:
                value = float(value)
                self.csv.write(f"{step},{tag},{value!r}\n")
                self.writer.add_scalar(tag, value, step)
        try:
            self.csv.flush()
        except OSError as e:
            fail(f"{self.dir / 'metrics.csv'} could not be written ({e}); the last checkpoint is intact")

    def save(self, name: str, state: dict):
        """A checkpoint; `state` of tensors and plain Python only, for load_checkpoint refuses the rest."""
        os.fsync(self.csv.fileno())
        state |= {"script": Path(__file__).stem, "format": FORMAT}
        state |= {"args": self.header["args"], "info": self.info}
        state |= {"csv_bytes": self.csv.tell(), "wall_seconds": time.time() - self.begin}
        try:
            with write_beside(self.dir / name) as temporary:
                torch.save(state, temporary)
        except (OSError, RuntimeError) as e:
            fail(f"{self.dir / name} could not be written ({e}); the one before it is intact")

    def stopped(self, signum: int):
        self.close()
        print(f"\nstopped and saved; to go on:\n  {command(self.args, self.dir)}", flush=True)
        raise SystemExit(128 + signum)

    def finish(self, summary: dict) -> dict:
        summary |= {"wall_seconds": time.time() - self.begin, "device": self.header["device"]}
        with write_beside(self.dir / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=2))
        self.close()
        return summary

    def close(self):
        self.csv.close()
        self.writer.close()


# === end shared ===


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
