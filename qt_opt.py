r"""QT-Opt: Q-learning for continuous actions without an actor, offline and then online.

Kalashnikov et al., arXiv 1806.10293. The policy is the maximum of Q itself, found by the
cross-entropy method (CEM). One network learns; the target takes the lesser of two slow copies:

  pi(s) = argmax_a Q(s,a)
  y     = r + gamma (1 - done) min(Q_1(s',a'), Q_2(s',a')),   a' = argmax_a Q_1(s',a)
  min_Q   E (Q(s,a) - y)^2, or with returns in [0, 1] the cross-entropy of Q = sigmoid(logit) and y
  Q_1     Polyak average of Q;   Q_2   Q_1 as it was --lag updates ago, at first untrained

  CEM     mu = 0, sigma = --cem-std;  --cem-iterations times:
            a_1 .. a_M ~ N(mu, sigma^2), clipped to [-1, 1]^d
            mu, sigma = mean, deviation of the --cem-elites samples of highest Q

The same update serves offline (all transitions from a dataset) and online (a share of each
minibatch from it): the paper's robot grasped 87 % offline, 96 % after fine-tuning. Offline the
argmax asks for Q where no data is, as any actor does. Against that stands CQL(rho)'s term (arXiv
2006.04779), rho being all samples that CEM draws at s from the present Q; weight 0 leaves it out:

  + --cql-alpha E_s[log mean_m exp Q(s,a_m) - E_{a~D} Q(s,a)]

The best of n samples of a clone instead is `policy_constraints.py --extract best-of-n`.

  symbol             in the code                            shape
  s, a, r, s', done  batch.obs .act .rew .next_obs .done    (B, obs) (B, act) (B,) (B, obs) (B,)
  Q(s,a)             critic(obs, act)                       (B,); (B, M) for M actions a state
  Q_1, Q_2           target, past[0]                        as Q
  argmax_a Q         cem()                                  (B, act)
  y                  backup()                               (B,)

On data that it makes itself; the same and online; the serious run on a D4RL file; from scratch:
  python qt_opt.py
  python qt_opt.py --online-steps 2_000
  python qt_opt.py --env Hopper-v5 --dataset hopper_medium_replay-v2.hdf5 --width 256 \
      --batch-size 256 --num-updates 500_000 --online-steps 100_000 --cem-iterations 3
  python qt_opt.py --collect-steps 1_000 --num-updates 0 --online-steps 5_000 --offline-share 0.1

Watch `diagnostics/argmax_share`: what CEM finds, of what lies between a uniform action and the best
one known (1 is all). About two iterations suit two action dimensions, three suit three, five six.
docs/qt_opt.md measures it. Left out: pixels, asynchronous workers, momentum (here Adam)."""

import copy
import ctypes
import hashlib
import importlib
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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # seeds networks, minibatches, collection and evaluation
    cuda: bool = True  # use the GPU if there is one
    threads: int = 1  # CPU threads of PyTorch (0: all cores; slow where something else runs too)
    compile: bool = False  # run the losses through torch.compile
    cudagraphs: bool = True  # on a GPU: capture the whole update in a CUDA graph
    track: bool = False  # log to Weights & Biases as well (needs `pip install wandb`)
    wandb_project_name: str = "offline-rl"  # project of --track
    wandb_entity: str | None = None  # team of --track
    # Gymnasium environment, `module:Id` where a package has to be imported for it
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "Pendulum-v1"
    run_dir: str = "runs"  # folder that holds the run folders
    resume: str | None = None  # run folder to go on from; its arguments hold unless given again
    checkpoint_frequency: int = 1_000  # updates between checkpoints (0: only at the end)
    eval_frequency: int = 1_000  # updates between evaluations (0: after either phase)
    eval_episodes: int = 10  # episodes of each evaluation (0: none, no environment needed)
    diagnostics_frequency: int = 500  # updates between diagnostics (0: nothing to judge by)
    log_frequency: int = 250  # updates between logged losses

    # length and data
    num_updates: int = 6_000  # updates on the dataset (the serious run: 500_000); 0: online at once
    online_steps: int = 0  # environment steps of fine-tuning after them, one update each
    offline_share: float = 0.5  # share of offline data in the minibatches of the fine-tuning
    batch_size: int = 64  # B, transitions in a minibatch (the serious run: 256)
    # D4RL HDF5 file, d3rlpy's dump, Minari id, folder or file; not given: collect and keep
    dataset: str | None = None
    collect_steps: int = 4_000  # environment steps of the self-made replay (without --dataset)
    data_dir: str = "datasets"  # folder that keeps self-made replays
    holdout: float = 0.05  # share of episodes kept out of the losses (0 to compare with peers)
    # bounds of the actions where there is no environment: numbers, or `data` for their range
    action_low: tuple[float, ...] | Literal["data"] | None = None
    action_high: tuple[float, ...] | Literal["data"] | None = None  # likewise; not given: -1, 1
    clip_actions: bool = False  # clip the dataset's actions to their bounds instead of refusing it
    normalize_obs: bool = True  # standardise observations by the dataset's mean and deviation
    reward_scale: float = 1.0  # rewards are multiplied by this, then shifted
    reward_shift: float = 0.0  # added to the scaled reward

    # Q-learning
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak rate of Q_1
    # updates that Q_2 is behind Q_1 (0.9 to 1 of it), in tens; 0: no Q_2. A Q that rises takes
    # (lag + 1/tau) / (1 - gamma) updates, for then Q_2 is the lesser
    lag: int = 100
    q_lr: float = 1e-3  # learning rate
    # squared error, or cross-entropy for returns in [0, 1], whose Q is a sigmoid
    loss: Literal["squared", "cross-entropy"] = "squared"
    # weight of CQL(rho)'s term (2 x its paper's alpha); 0: plain QT-Opt
    cql_alpha: float = 0.0

    # argmax by CEM
    cem_samples: int = 64  # M, actions drawn in an iteration: more find a higher Q, at their price
    cem_elites: int = 6  # the best of them, the next mean and deviation: fewer settle sooner
    cem_iterations: int = 2  # about 3 for three action dimensions, 5 for six: see argmax_share
    cem_std: float = 0.5  # first deviation; in one dimension the mean can move three of them
    cem_min_std: float = 0.01  # floor of the deviation: elites at a bound coincide
    # the best sample of the last iteration, or its elites' mean, which may lie between two maxima
    cem_choice: Literal["best", "mean"] = "best"

    # exploration, online
    epsilon: float = 0.2  # share of uniform actions
    exploration_noise: float = 0.0  # deviation of Gaussian noise on the others

    # network
    width: int = 128  # units in a hidden layer (the serious run: 256)
    depth: int = 2  # hidden layers


# a resumed run must have these as before: its network and its data would not fit
FIXED = """env_id seed width depth lag loss holdout action_low action_high clip_actions
normalize_obs reward_scale reward_shift""".split()
# of the self-made replay's collector: QT-Opt online, without the Q_2 that is at first untrained
COLLECTOR, COLLECTED_BY = {"lag": 0}, "qt-opt"
NOVEL = 3.3  # novelty of a policy whose Q is a guess: good runs reach 3.0, bad ones 4.0 and more
COPIES = 10  # of Q_1, a tenth of --lag apart: with a single one Q_2 would be 0 to lag behind


def check(args: Args):
    """Refuse what no run could use, before anything starts."""
    check_numbers(args, "seed num_updates online_steps checkpoint_frequency", 0, 1e12)
    check_numbers(args, "diagnostics_frequency eval_frequency lag cql_alpha", 0, 1e12)
    check_numbers(args, "collect_steps batch_size log_frequency", 1, 1e12)
    check_numbers(args, "width depth cem_iterations", 1, 1e6)
    check_numbers(args, "cem_samples cem_elites", 2, 1e6)
    check_numbers(args, "threads eval_episodes", 0, 1e4)
    check_numbers(args, "q_lr reward_scale cem_std", 1e-12, 1e12)
    check_numbers(args, "cem_min_std exploration_noise", 0, 1e12)
    check_numbers(args, "reward_shift", -1e18, 1e18)
    check_numbers(args, "gamma holdout", 0, 0.99999)
    check_numbers(args, "offline_share epsilon", 0, 1)
    check_numbers(args, "tau", 1e-9, 1)
    if args.num_updates + args.online_steps == 0:
        fail("--num-updates 0 leaves nothing to do: give --online-steps")
    if args.cem_elites >= args.cem_samples:
        fail(f"--cem-elites {args.cem_elites}: fewer than --cem-samples, {args.cem_samples}")
    if args.cem_min_std > args.cem_std:
        fail(f"--cem-min-std {args.cem_min_std}: at most --cem-std, {args.cem_std}")
    if args.loss == "cross-entropy" and args.cql_alpha:
        fail("--cql-alpha is for --loss squared: a Q in [0, 1] makes exp Q nearly constant")
    online = "offline_share epsilon exploration_noise"
    check_effect(args, online, args.online_steps > 0, "without --online-steps")
    several, one = args.cem_iterations > 1, "with --cem-iterations 1"
    narrow, few = args.cem_std < Args.cem_min_std, args.cem_samples <= Args.cem_elites
    check_effect(args, "cem_min_std", several or narrow, one)
    check_effect(args, "cem_elites", several or args.cem_choice == "mean" or few, one)
    check_effect(args, "clip_actions", args.dataset is not None, "without --dataset")
    check_effect(args, "collect_steps data_dir", args.dataset is None, "with --dataset")
    if args.lag % COPIES:
        fail(f"--lag {args.lag}: a multiple of {COPIES}, or 0")
    played = not args.dataset or args.eval_episodes or args.online_steps
    if (args.action_low or args.action_high) and played:
        fail("--action-low, --action-high: for a --dataset with --eval-episodes 0")


# ---------------------------------------------------------------------------------------- network
class Critic(nn.Module):
    """Q(s,a): (B,) for actions (B, act); (B, M) for M actions a state, (B, M, act)."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.squash = nn.Sigmoid() if args.loss == "cross-entropy" else nn.Identity()
        self.register_buffer("mean", torch.zeros(obs_dim))  # of the dataset's observations
        self.register_buffer("std", torch.ones(obs_dim))
        sizes = [obs_dim + act_dim] + [args.width] * args.depth
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:]))
        self.head = nn.Linear(args.width, 1)

    def hidden(self, obs, act) -> list:
        """Each hidden layer's activations, (B, width) or (B, M, width); the last are the features
        phi(s,a). The first layer's part of a state is computed once for its M actions."""
        first, *others = self.layers
        w_obs, w_act = first.weight.split([obs.shape[-1], act.shape[-1]], dim=1)
        of_state = F.linear((obs - self.mean) / self.std, w_obs, first.bias)
        of_act = F.linear(act, w_act)
        activations = [F.relu(of_act + (of_state if act.dim() == 2 else of_state[:, None]))]
        for layer in others:
            activations.append(F.relu(layer(activations[-1])))
        return activations

    def logit(self, obs, act):
        return self.head(self.hidden(obs, act)[-1]).squeeze(-1)

    def forward(self, obs, act):
        return self.squash(self.logit(obs, act))


# ----------------------------------------------------------------------------------------- argmax
class Argmax(NamedTuple):
    act: torch.Tensor  # (B, act), argmax_a Q(s,a)
    tried: torch.Tensor  # (B, iterations * M, act), all samples
    q: torch.Tensor  # (B, iterations * M), their values


@torch.no_grad()
def cem(critic, obs, act_dim: int, args: Args, generator=None) -> Argmax:
    """argmax_a critic(s,a) of B states at once by the cross-entropy method, with iterations * M * B
    values: of Q, or of its logit, which a sigmoid keeps apart only up to 17 in fp32.

    With 6 elites of 64 and one dimension, on a slope the mean moves 1.8 deviations in an iteration
    and the deviation shrinks to 0.41, so that they reach 3.0 first deviations and no farther; at a
    quadratic's top it shrinks to 0.07. Samples are clipped, for bounds are often best."""
    mean, std = obs.new_zeros(len(obs), 1, act_dim), args.cem_std
    rows, tried, values = torch.arange(len(obs), device=obs.device)[:, None], [], []
    for _ in range(args.cem_iterations):
        shape = len(obs), args.cem_samples, act_dim
        noise = torch.randn(shape, generator=generator, device=obs.device)
        act = (mean + std * noise).clamp(-1, 1)
        q = critic(obs, act)  # (B, M)
        elites = act[rows, q.topk(args.cem_elites).indices]  # (B, elites, act), the best first
        std, mean = torch.std_mean(elites, dim=1, keepdim=True)
        std = std.clamp(min=args.cem_min_std)
        tried.append(act)
        values.append(q)
    best = mean[:, 0] if args.cem_choice == "mean" else elites[:, 0]
    return Argmax(best, torch.cat(tried, dim=1), torch.cat(values, dim=1))


# --------------------------------------------------------------------- losses: one function each
class Batch(NamedTuple):
    obs: torch.Tensor  # (B, obs)
    act: torch.Tensor  # (B, act), in [-1, 1]
    rew: torch.Tensor  # (B,), scaled and shifted
    next_obs: torch.Tensor  # (B, obs)
    done: torch.Tensor  # (B,), 1 where the episode terminated; a time-out is 0


@torch.no_grad()
def backup(learner, batch: Batch, args: Args, generator=None):
    """a' = argmax_a Q_1(s',a), (B, act); y = r + gamma (1 - done) min(Q_1, Q_2)(s',a'), (B,), for
    the cross-entropy clipped to [0, 1]."""
    next_act = cem(learner.target.logit, batch.next_obs, learner.act_dim, args, generator).act
    value = learner.target(batch.next_obs, next_act)
    if args.lag:
        value = torch.minimum(value, learner.past[0](batch.next_obs, next_act))
    y = batch.rew + args.gamma * (1 - batch.done) * value
    return next_act, y.clamp(0, 1) if args.loss == "cross-entropy" else y


def td_loss(logit, y, args: Args):
    """Mean over the minibatch of (Q - y)^2, or of -y log Q - (1 - y) log(1 - Q)."""
    if args.loss == "cross-entropy":
        return F.binary_cross_entropy_with_logits(logit, y)
    return F.mse_loss(logit, y)


def softmax_draw(logits):
    """An index of each row by its softmax weight, (B, 1). Gumbel's way, since a CUDA graph cannot
    hold torch.multinomial's check."""
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=1, keepdim=True)


def conservative_loss(learner, batch: Batch, q, args: Args):
    """E_s[log mean_m exp Q(s,a_m) - Q(s,a)] over CEM's own samples a_m: its value, and what has
    the same gradient in expectation, Q at one sample drawn by its softmax weight less Q(s,a)."""
    argmax = cem(learner.critic.logit, batch.obs, learner.act_dim, args)
    rows, drawn = torch.arange(len(q), device=q.device), softmax_draw(argmax.q)
    pushed = learner.critic(batch.obs, argmax.tried[rows[:, None], drawn])[:, 0]
    log_mean_exp = argmax.q.logsumexp(dim=1) - math.log(argmax.q.shape[1])
    return (log_mean_exp - q).mean(), (pushed - q).mean()


def critic_loss(learner, batch: Batch, args: Args):
    """The TD error's loss, and with --cql-alpha the conservative term."""
    _, y = backup(learner, batch, args)
    logit = learner.critic.logit(batch.obs, batch.act)
    q = learner.critic.squash(logit)
    loss = td_loss(logit, y, args)
    info = {"qf_loss": loss, "qf1_values": q.mean()}
    if args.cql_alpha:
        info["cql_loss"], surrogate = conservative_loss(learner, batch, q, args)
        loss = loss + args.cql_alpha * surrogate
    return loss, {name: x.detach() for name, x in info.items()}


class Learner(nn.Module):
    """All that learns, with its optimiser; the collector and the run have one each."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device):
        super().__init__()
        self.args, self.device, self.act_dim = args, device, act_dim
        self.critic = Critic(obs_dim, act_dim, args)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)  # Q_1
        copies = COPIES if args.lag else 0
        self.past = nn.ModuleList(copy.deepcopy(self.target) for _ in range(copies))  # oldest first
        self.to(device)
        self.loss = torch.compile(critic_loss) if args.compile else critic_loss
        flags = {"fused": True, "capturable": device.type == "cuda"}
        adam = torch.optim.Adam(self.critic.parameters(), lr=args.q_lr, **flags)
        self.optim = {"critic": adam}
        self.noise = torch.Generator(device)  # of evaluations, which must not change the training

    def standardise(self, obs):
        """Makes observations of the dataset (N, obs) have mean 0 and deviation 1."""
        std, mean = torch.std_mean(obs, dim=0, correction=0)
        for net in (self.critic, self.target, *self.past):
            net.mean.copy_(mean)
            net.std.copy_(std + 1e-3)  # an entry that never varies stays 0

    @torch.no_grad()
    def act(self, obs, explore: bool):
        """Actions in [-1, 1] for an environment's observations: argmax_a Q, with exploration; or
        without it, by the same random numbers in each call."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        args, generator = self.args, None if explore else self.noise.manual_seed(0)
        act = cem(self.critic.logit, obs, self.act_dim, args, generator).act
        if not explore:
            return act
        noisy = (act + args.exploration_noise * torch.randn_like(act)).clamp(-1, 1)
        uniform = torch.rand(len(act), 1, device=act.device) < args.epsilon
        return torch.where(uniform, torch.rand_like(act) * 2 - 1, noisy)

    def update(self, sample, shift: bool = False) -> dict:
        """A step on a minibatch from sample(). With `shift`, every tenth of --lag, each copy in
        `past` first becomes the next newer one, the newest Q_1, and past[0] is Q_2."""
        if shift:
            for older, newer in zip(self.past, [*self.past[1:], self.target]):
                for p, p_newer in zip(older.parameters(), newer.parameters()):
                    p.copy_(p_newer)
        loss, info = self.loss(self, sample(), self.args)
        self.optim["critic"].zero_grad()
        loss.backward()
        self.optim["critic"].step()
        with torch.no_grad():
            for p, p_target in zip(self.critic.parameters(), self.target.parameters()):
                p_target.lerp_(p, self.args.tau)  # Q_1 <- Q_1 + tau (Q - Q_1)
        return info

    def least_q(self, obs, act):
        """Q(s,a), by evaluate()'s name: elsewhere there are several critics."""
        return self.critic(obs, act)


# ------------------------------------------------------------------------------ diagnostics, advice
@torch.no_grad()
def argmax_share(learner, obs, args: Args, generator) -> torch.Tensor:
    """Of what lies between a uniform action's Q and the largest that a search eight times as
    wide and four times as long finds, the share that the policy's argmax has; mean over states."""
    wide = replace(args, cem_samples=8 * args.cem_samples, cem_elites=8 * args.cem_elites)
    wide = replace(wide, cem_iterations=4 * args.cem_iterations)
    uniform = torch.rand(len(obs), 64, learner.act_dim, generator=generator, device=obs.device)
    q_rand = learner.critic(obs, 2 * uniform - 1)
    act = cem(learner.critic.logit, obs, learner.act_dim, args, generator).act
    q_pi = learner.critic(obs, act)
    found = cem(learner.critic.logit, obs, learner.act_dim, wide, generator).q.amax(1)
    found = learner.critic.squash(found)
    best = torch.maximum(torch.maximum(found, q_rand.amax(1)), q_pi)
    base = q_rand.mean(1)
    return (q_pi - base).sum() / (best - base).sum().clamp(min=1e-12)


def novelty(learner, batch: Batch) -> torch.Tensor:
    """How far the policy acts from the data: the distance of its action from the mean action of
    the ten most similar states of the batch, in units of their deviation (at least 0.02); mean
    over 256 states. About 1 for the data's own actions."""
    obs = (batch.obs - learner.critic.mean) / learner.critic.std
    neighbours = torch.cdist(obs[:256], obs).topk(11, largest=False).indices[:, 1:]  # not itself
    known = batch.act[neighbours]  # (256, 10, act)
    mean, chosen = known.mean(1), learner.act(batch.obs[:256], explore=False)
    std = (known - mean[:, None]).pow(2).sum(-1).mean(1).sqrt()
    return ((chosen - mean).norm(dim=-1) / std.clamp(min=0.02)).mean()


def diagnose(learner, data, args: Args) -> dict:
    """The numbers of one moment on at most 1,024 transitions, in fp32; the TD error and Q against
    the data's returns on held-out episodes, too.

    A fresh generator each time. The TD error is in units of the variance of y; argmax_share is of
    64 states, cql_gap the log mean exp of Q at 64 uniform actions less q_data. Rows of `data` from
    its size on are held out."""
    size, draw = int(data.size), torch.Generator(data.device).manual_seed(0)

    def probe(rows, n: int = 1024):
        return rows[torch.randperm(len(rows), generator=draw, device=data.device)[:n]]

    rows, numbers = torch.arange(data.capacity, device=data.device), {}
    with strict_fp32():
        for suffix, some in (("_holdout", probe(rows[size:])), ("", probe(rows[:size]))):
            if len(some) == 0:
                continue
            batch, to_go = data.batch(some), data.columns["to_go"][some]
            next_act, y = backup(learner, batch, args, draw)
            q = learner.critic(batch.obs, batch.act)
            squared_error, variance = (q - y).pow(2).mean(), y.var(correction=0)
            if suffix and variance == 0:  # of one row, or of one target
                continue
            numbers["td_error" + suffix] = squared_error / variance.clamp(min=1e-12)
            known = ~to_go.isnan()
            if known.sum() >= 32:
                numbers["q_minus_return" + suffix] = (q - to_go)[known].mean()
                numbers["return_std" + suffix] = to_go[known].std()
        shape = len(q), 64, learner.act_dim
        uniform = torch.rand(shape, generator=draw, device=data.device) * 2 - 1
        q_rand = learner.critic(batch.obs, uniform)
        s0 = data.columns["obs"][probe(rows[data.columns["start"] > 0])]
        numbers["q_data"], numbers["q_rand"] = q.mean(), q_rand.mean()
        q_pi = learner.critic(batch.obs, learner.act(batch.obs, explore=False))
        numbers["q_pi"] = q_pi.mean()
        numbers["v_s0"] = learner.critic(s0, learner.act(s0, explore=False)).mean()
        numbers["q_max"] = torch.maximum(torch.maximum(q_rand.max(), q.max()), q_pi.max())
        numbers["argmax_share"] = argmax_share(learner, batch.obs[:64], args, draw)
        if size > 10:  # ten neighbours, and the state itself
            numbers["novelty"] = novelty(learner, data.batch(probe(rows[:size], 8192)))
        hidden = learner.critic.hidden(batch.obs, batch.act)
        phi_next = learner.critic.hidden(batch.next_obs, next_act)[-1]
        numbers |= spectrum(hidden[-1]) | alignment(hidden[-1], phi_next, 1 - batch.done)
        numbers["dormant"] = dormant(hidden)
        # the most that the rewards allow; where all of them are costs, to end at once is best
        low, high, horizon = data.info["reward_min"], data.info["reward_max"], 1 / (1 - args.gamma)
        ending = high < 0 and data.columns["done"].any()
        numbers["q_bound"] = high if ending else horizon * high
        numbers["q_range"] = horizon * (high - low)
        if args.cql_alpha:  # on the scale of (Q - y)^2 / 2
            weight = torch.tensor(args.cql_alpha / 2)
            numbers["cql_gap"] = (q_rand.logsumexp(1) - math.log(64) - q).mean()
            numbers["q_lift"] = horizon * weight
            numbers["cql_push"] = weight / squared_error.sqrt().clamp(min=1e-12)
    return {name: float(x) for name, x in numbers.items()}


def advice(args: Args) -> dict:
    """The flags that each verdict recommends."""
    squared = "--loss squared " if args.loss == "cross-entropy" else ""
    stronger = f"{squared}--cql-alpha {max(5, 3 * args.cql_alpha):g}"
    wider, smaller = f"--width {max(256, 2 * args.width)}", f"--width {max(1, args.width // 4)}"
    return {
        "divergence": stronger,
        "overfitting": f"{smaller} or {stronger}",
        "underfitting": f"{wider} or --depth {args.depth + 1}",
        "alpha too large": f"--cql-alpha {args.cql_alpha / 3:.3g}",
    }


def judge(history: list[dict], args: Args, rewarded: float) -> tuple[str, str]:
    """The verdict of the offline phase; in its last fifth whether the policy left the data, and
    whether the argmax was good. These name the verdict if the critic shows no sign of trouble."""
    if args.num_updates == 0:
        return "not judged", "there was no offline phase"
    rising = bool(history) and history[-1]["q_bound"] > 0  # then Q_2 is the lesser
    settling = (1 / args.tau + rising * args.lag) / (1 - args.gamma)
    name, sentence = verdict(history, args, rewarded, settling)
    if len(history) < 10 or name == "nothing to learn from":
        return name, sentence
    share, novel = late_means(history, "argmax_share", "novelty")
    if novel > NOVEL:
        found = "acts beyond the data"
        why = f"{novel:.1f} deviations from the actions of similar states, where Q is a guess: "
        why += f"try {advice(args)['divergence']}"
    elif share < 0.9:
        found = "argmax too weak"
        why = f"CEM finds {share:.0%} of what a longer search does: "
        why += f"try --cem-iterations {2 * args.cem_iterations + 1} or a larger --cem-std"
    else:
        return name, sentence
    return found if name == "no sign of trouble" else name, f"{sentence}. {found}: {why}"


# --------------------------------------------------------------------------------------- training
def train(args: Args) -> dict:
    """Train as `args` says; returns what summary.json holds."""
    check(args)
    device, total = set_up(args), args.num_updates + args.online_steps
    with Run(args, total) as run:
        eval_envs = make_envs(args.env_id, args.eval_episodes, run)
        env = find_env(args, eval_envs, run)
        data = load(args.dataset or str(collect(args, env, run, device)), args, env, device)
        check_returns(data, args)
        torch.manual_seed(args.seed)  # again: collecting has drawn from it
        sizes = data.columns["obs"].shape[1], data.columns["act"].shape[1]
        learner = Learner(*sizes, args, device)
        if args.normalize_obs:
            learner.standardise(data.columns["obs"])
        if args.online_steps:
            replay = Replay(args.online_steps, *sizes, device)
            obs, _ = env.reset(seed=env_seeds(args.seed, 1))
        step, history, results = 0, [], {}
        if run.saved:
            check_resumed(run.saved, data, args)
            step, history, results = (run.saved[k] for k in ("step", "history", "results"))
            run.restore(learner, learner.optim)
            if args.online_steps and run.saved["replay"]:
                obs = replay.load_state_dict(run.saved["replay"], env)
        run.open(**data.info)

        def save():
            state = {"history": history, "results": results}
            state["replay"] = replay.state_dict(env) if args.online_steps else None
            run.save(step, learner, learner.optim, **state)

        def sample(online: bool) -> Batch:
            if not online:
                return data.sample(args.batch_size)
            n = round(args.offline_share * args.batch_size)
            pairs = zip(data.sample(n), replay.sample(args.batch_size - n))
            return Batch(*(torch.cat(pair) for pair in pairs))

        def update(online: bool, shift: bool) -> dict:
            return learner.update(lambda: sample(online), shift)

        if args.cudagraphs and device.type == "cuda":
            update = GraphedUpdate(update)
        while step < total and not run.signum:
            online = step >= args.num_updates
            if online:
                obs, ended = interact(learner, env, replay, obs)
            before, step = step, step + 1
            info = update(online, every(args.lag // COPIES, before, step))
            diagnosing = every(args.diagnostics_frequency, before, step)
            if online and ended:
                run.log(step, {"charts/online_return": ended[0]})
            if every(args.log_frequency, before, step) or diagnosing:
                run.log(step, {"losses/" + name: x for name, x in info.items()})
                rate = run.rate(step)
                run.log(step, {"charts/updates_per_second": rate, "charts/SPS": rate})
                last_return = results.get("final_return_mean", math.nan)
                run.show(step, loss=info["qf_loss"], Q=info["qf1_values"], last_return=last_return)
            if diagnosing:
                with run.paused():
                    numbers = diagnose(learner, data, args)
                run.log(step, {"diagnostics/" + name: x for name, x in numbers.items()})
                if not online:
                    history.append(numbers | {"step": step})
                    if selects(history, args):  # the workflow's choice so far
                        run.save(step, learner, {}, "selected.pt")
            scoring = every(args.eval_frequency, before, step) or step == total
            if eval_envs and (scoring or step == args.num_updates):
                with run.paused():
                    results |= evaluate(learner, eval_envs, args)
                if step == args.num_updates:
                    results["offline_return_mean"] = results["final_return_mean"]
                run.log(step, {tag: results[x] for tag, x in TAGS.items() if x in results})
            if every(args.checkpoint_frequency, before, step):
                save()
        save()
        run.stop_if_asked()
        summary = {"num_updates": step, "updates_per_second": run.rate(step)}
        summary |= {"normalized_score": None} | results | data.info
        if eval_envs and (run.dir / "selected.pt").exists():
            chosen = load_checkpoint(run.dir, "selected.pt")
            learner.load_state_dict(chosen["networks"])
            selected = evaluate(learner, eval_envs, args)["final_return_mean"]
            summary |= {"selected_step": chosen["step"], "selected_return_mean": selected}
        return run.finish(conclude(*judge(history, args, summary["rewarded"]), summary))


def check_returns(data, args: Args):
    """For the cross-entropy rewards lie in [0, 1 - gamma], or else all returns-to-go that no
    time-out hides in [0, 1]."""
    low, high, to_go = data.info["reward_min"], data.info["reward_max"], data.columns["to_go"]
    known = to_go[~to_go.isnan()]
    small = 0 <= low and high <= 1.0001 * (1 - args.gamma)
    if args.loss == "squared" or small or len(known) and 0 <= known.min() <= known.max() <= 1:
        return
    found = f"rewards from {low:.3g} to {high:.3g}, returns-to-go "
    found += f"from {known.min():.3g} to {known.max():.3g}" if len(known) else "unknown"
    fail(f"--loss cross-entropy: {found}, not in [0, 1]; try --reward-scale and --reward-shift")


# === shared: offline (canonical copy: cql_continuous.py) ===
# Needs the blocks "files", "environments", "replay", "run" and "workflow"; of the script Args,
# Learner, COLLECTOR, the settings by which it learns online, and COLLECTED_BY, their name.
RANDOM_STEPS = 1_000  # uniform actions before the collector's first update


def find_env(args, eval_envs, run):
    """The environment to collect and fine-tune in, whose bounds the actions have; None where a
    dataset is enough and --env-id is registered nowhere, or --action-low or -high is given."""
    if args.dataset and not args.online_steps:
        if eval_envs or args.action_low or args.action_high:
            return eval_envs  # no more: of some simulators one instance can exist
        module, _, name = args.env_id.rpartition(":")
        try:
            if module:
                importlib.import_module(module)
            gym.spec(name)
        except (gym.error.UnregisteredEnv, ImportError) as e:
            say(f"{args.env_id}: {e}. Actions are taken to lie in [-1, 1]")
            return None
    return make_envs(args.env_id, 1, run)


def interact(learner, envs, replay, obs, uniform: bool = False) -> tuple[np.ndarray, list]:
    """A step of the environment, by pi or uniformly, into the replay, with scaled reward; the
    observation to act on next, and the return of an episode that ended."""
    args, act = learner.args, learner.act(obs, explore=True)
    if uniform:
        act = torch.rand_like(act) * 2 - 1
    next_obs, rew, terminated, truncated, infos = envs.step(to_env(act, envs))
    over, last_obs = terminated | truncated, next_obs.copy()
    if over.any():  # there next_obs is the next episode's first
        last_obs[over] = np.stack(infos["final_obs"][over])
    rew = args.reward_scale * rew + args.reward_shift
    replay.add(obs, act.cpu().numpy(), rew, last_obs, terminated, truncated)
    return next_obs, infos["final_info"]["return"][over].tolist() if over.any() else []


def collect(args, env, run, device) -> Path:
    """The replay of a learner trained online, kept as a D4RL-layout file in --data-dir.

    The collector has networks and settings of its own, COLLECTOR's."""
    sizes = check_boxes(env, args.env_id)
    name = f"{args.env_id}_{COLLECTED_BY}-replay_{args.collect_steps}_seed{args.seed}_v4.hdf5"
    path = Path(args.data_dir) / re.sub(r"[/:]", "_", name)
    if path.exists():
        say(f"no --dataset: using {path}, made by an earlier run")
        return path
    writable("--data-dir", path.parent)
    steps = f"{args.collect_steps:,} steps of {args.env_id} by online {COLLECTED_BY}"
    say(f"no --dataset: {steps}, into {path}")
    online = Args(env_id=args.env_id, **COLLECTOR)
    learner = Learner(*sizes, online, device)
    replay = Replay(args.collect_steps, *sizes, device)
    obs, returns = env.reset(seed=env_seeds(args.seed, 1))[0], [math.nan]
    for step in range(args.collect_steps):
        obs, ended = interact(learner, env, replay, obs, uniform=step < RANDOM_STEPS)
        returns += ended
        if step >= RANDOM_STEPS:
            learner.update(lambda: replay.sample(online.batch_size))
        if step % 1_000 == 999:
            say(f"collected {step + 1:,}/{args.collect_steps:,}, last return {returns[-1]:.4g}")
        if run.signum:
            say("stopped while collecting: nothing is kept, the same command starts again")
            raise SystemExit(128 + run.signum)
    replay.write(path, env)
    return path


def read_minari(folder: Path) -> dict:
    """A Minari set by its own library, as the columns of a D4RL file."""
    found = open_minari(folder)
    spaces = found.observation_space, found.action_space
    width = 2 * gym.spaces.flatdim(spaces[0]) + gym.spaces.flatdim(spaces[1]) + 3
    reserve(8 * found.total_steps * width, "dataset, roughly", torch.device("cpu"))
    keys = "observations next_observations actions rewards terminals timeouts".split()
    columns = {key: [] for key in keys}
    for e in found.iterate_episodes():
        n = len(e.rewards)  # of steps, one less than of observations
        obs, act = flat(spaces[0], e.observations, n + 1), flat(spaces[1], e.actions, n)
        if (len(obs), len(act)) != (n + 1, n):
            found = f"{len(obs)} observations, {len(act)} actions, {n} rewards"
            fail(f"{folder}, episode {e.id}: {found}")
        timeout = ~np.asarray(e.terminations)
        timeout[:-1] = False
        rows = obs[:-1], obs[1:], act, e.rewards, e.terminations, timeout
        for key, x in zip(keys, rows):
            columns[key].append(x)
    return {key: np.concatenate(x or [[]]) for key, x in columns.items()}


def read_hdf5(path: Path) -> dict:
    """The columns of a D4RL file, or of d3rlpy's dump, which has arrays for each episode."""
    with failing("a dataset needs `pip install h5py`", ImportError):
        import h5py

    def column(key: str):
        if not hasattr(f.get(key), "dtype"):
            found = ", ".join([*list(f)[:9], "..."][: len(f)]) or "nothing"
            hint = "Minari's without metadata.json" if "episode_0" in f else "try tools/convert.py"
            fail(f"{path}: no array '{key}' (found: {found}): {hint}")
        if f[key].dtype.kind not in "biuf":
            fail(f"{path}: '{key}' holds {f[key].dtype}, expected numbers")
        x = f[key] if f[key].dtype.kind == "b" else f[key].astype(np.float32)
        return np.atleast_1d(x[()])

    with h5py.File(path) as f:
        numbers = sum(getattr(x, "size", 0) for x in f.values())
        reserve(8 * numbers, "dataset, roughly", torch.device("cpu"))
        keys = ["observations", "actions", "rewards"]
        if "observations_0" not in f:
            optional = "next_observations timeouts episode_terminals".split()
            keys += ["terminals"] + [key for key in optional if key in f]
            columns = {key: column(key) for key in keys}
            if "episode_terminals" in columns:  # d3rlpy 1: both kinds of end
                ends = columns.pop("episode_terminals")
                columns["timeouts"] = ends * (1 - columns["terminals"])
            return columns
        episodes = range(sum(key.startswith("rewards_") for key in f))
        columns = {k: np.concatenate([column(f"{k}_{i}") for i in episodes]) for k in keys}
        last = np.cumsum([len(f[f"rewards_{i}"]) for i in episodes]) - 1
        ended = np.array([bool(column(f"terminated_{i}")) for i in episodes])
        rows = np.arange(len(columns["rewards"]))
        columns["terminals"] = np.isin(rows, last[ended])
        columns["timeouts"] = np.isin(rows, last[~ended])
        return columns


def read(name: str) -> dict:
    """The columns of a dataset by D4RL's names: float32, flags as bool, one row a transition."""
    path, folder = Path(name), find_minari(name)
    if not folder and not path.is_file():
        fail(f"--dataset {name}: {kind_of(path)}")
    damage = (OSError, RuntimeError, LookupError, ValueError, TypeError, AssertionError)
    with failing(f"{name} is {kind_of(folder or path)}", *damage):
        columns = read_minari(folder) if folder else read_hdf5(path)
    n = len(columns["rewards"])
    if n == 0:
        fail(f"{name}: no transitions")
    for key, x in columns.items():
        vector = not key.endswith(("observations", "actions"))
        if vector and x.shape == (n, 1):  # as rlkit's buffers write them
            x = x[:, 0]
        width = columns["observations"].shape[1:] if key == "next_observations" else x.shape[1:]
        if x.ndim != 2 - vector or x.shape != (n, *width) or 0 in width:
            expected = f"({n},)" if vector else f"({n}, {width[0] if len(width) == 1 else 'width'})"
            fail(f"{name}: '{key}' has shape {x.shape}, expected {expected}")
        flags = vector and key != "rewards"
        bad = (x != 0) & (x != 1) if flags else ~np.isfinite(x)
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            expected = "0 or 1" if flags else "finite numbers"
            fail(f"{name}: '{key}' row {at[0]} holds {x[at]}, expected {expected}")
        columns[key] = np.ascontiguousarray(x, dtype=bool if flags else np.float32)
    return columns


def find_ends(columns: dict, limit: int | None) -> tuple[np.ndarray, str]:
    """Each episode's last row, and how that was told. Flags are read as they are."""
    terminal, timeout = columns["terminals"], columns.get("timeouts")
    note, rows = "as its timeouts say", np.arange(len(terminal))
    if timeout is None and "next_observations" in columns:
        note = "no timeouts: where next_observations is not the next row"
        jumps = (columns["next_observations"][:-1] != columns["observations"][1:]).any(1)
        timeout = np.append(jumps, False) & ~terminal
    elif timeout is None:
        note = f"no timeouts: cut at the environment's limit, {limit or 'unknown'}"
        if not limit:
            say("odd: nothing tells time-outs: the next row passes for what follows, resets or not")
        step = rows - np.maximum.accumulate(rows * np.append(True, terminal[:-1])) + 1
        timeout = (step % (limit or len(rows)) == 0) & ~terminal
    point_out(terminal, timeout, limit)
    end = terminal | timeout
    end[-1] = True  # the file ends here, whatever its flags say
    return end, note


def scale_actions(act, args, box, name: str) -> tuple[str, list]:
    """Actions to [-1, 1] in place: from the environment's box, or from what the flags say."""
    low, high = (-1.0, 1.0) if box is None else (box.low, box.high)
    low = act.min(0) if args.action_low == "data" else args.action_low or low
    high = act.max(0) if args.action_high == "data" else args.action_high or high
    with failing(f"--action-low, --action-high: one number, or {act.shape[1]}", ValueError):
        low, high = (np.broadcast_to(np.float32(x), act.shape[1]) for x in (low, high))
    if not (low < high).all():
        fail(f"actions from {low.tolist()} to {high.tolist()}: expected low < high")
    bounds = f"{np.unique(low.round(4))} to {np.unique(high.round(4))}"
    said = f"actions {act.min():.3g} to {act.max():.3g}, bounds {bounds}"
    if np.allclose([act.min(0), -act.max(0)], -1, atol=0.02) and (high - low).max() > 2.1:
        say(f"odd: actions reach -1 and 1 of bounds {bounds}: were they scaled? Scale them back")
    act -= (high + low) / 2
    act /= (high - low) / 2
    beyond = np.abs(act).max(1) - 1
    if beyond.max() > 2e-3 and not args.clip_actions:  # 0.1 % of the range, which is 2
        row, share = int(beyond.argmax()), (beyond > 2e-3).mean()
        most = f"row {row} by {beyond[row] / 2:.1%} of their range"
        mend = "--clip-actions clips them"
        mend += "" if box is not None else ", --action-low and --action-high set others"
        fail(f"{name}: 'actions' of {share:.1%} of the rows leave {bounds}, {most}: {mend}")
    act.clip(-1, 1, out=act)
    return f"{said}, {(beyond > 0).sum():,} clipped", [low.tolist(), high.tolist()]


def check_widths(widths: tuple, env, env_id: str):
    """Observations and actions of the data must be as wide as the environment's."""
    expected, space = check_boxes(env, env_id), env.envs[0].unwrapped.observation_space
    hint = "for data alone: --env and a name of your own, --eval-episodes 0"
    if parts := parts_of(space):
        lacking = expected[0] - widths[0]
        names = [key for key in space if gym.spaces.flatdim(space[key]) == lacking]
        hint = f"its observations are {parts}"
        hint += f"; the data lack {' or '.join(names) or 'some'}" if lacking > 0 else ""
    elif widths[0] in (27, 111):  # D4RL's ant, without or with 84 zeros
        hint = "D4RL's ant: take the first 27 columns, and an Ant-v5 that was registered with "
        hint += "include_cfrc_ext_in_observation=False"
    if widths != expected:
        fail(f"observations and actions are {widths} wide, {env_id} has {expected}; {hint}")


def load(name: str, args, env, device):
    """Read, check and describe a dataset; a bad one ends the program in one line (status 2).

    The Replay has the training rows first, its `size`, then those held out. Beside the usual
    columns there are next_act, `start` of an episode, and `to_go`, the discounted return from there
    on, NaN where a time-out cuts off more than 1 % of it. Its `info` stands in the summary."""
    columns, sarsa = read(name), getattr(args, "backup", "") == "sarsa"
    obs, act, rew, terminal = (columns[k] for k in "observations actions rewards terminals".split())
    digest = hashlib.sha256()
    for key in sorted(columns):
        digest.update(columns[key])
    limit = box = None
    if env:
        check_widths((obs.shape[1], act.shape[1]), env, args.env_id)
        limit, box = env.envs[0].spec.max_episode_steps, env.single_action_space
    span, bounds = scale_actions(act, args, box, name)
    end, note = find_ends(columns, limit)
    n, first = len(rew), np.flatnonzero(np.append(True, end[:-1]))
    length = np.diff(np.append(first, n))
    returns = np.add.reduceat(rew, first, dtype=np.float64)
    rew = (args.reward_scale * rew + args.reward_shift).astype(np.float32)
    last = np.repeat(first + length - 1, length).astype(np.int32)
    g = returns_to_go(rew, last, args.gamma)
    left = (last - np.arange(n) + 1).astype(np.float32)
    g[~terminal[last] & (args.gamma**left > 0.01)] = np.nan

    # s' and a' are the next row's within an episode; s' may be in the file
    following = np.minimum(np.arange(n) + 1, n - 1)
    next_obs = columns.get("next_observations", obs[following])
    usable = terminal | ~end
    if "next_observations" in columns and not sarsa:
        usable[:] = True
    held = np.zeros(len(first), bool)
    if args.holdout and len(first) > 1:
        order = np.random.default_rng(args.seed).permutation(len(first))
        held[order[: max(1, round(args.holdout * len(first)))]] = True
    held = np.repeat(held, length)
    train, holdout = np.flatnonzero(usable & ~held), np.flatnonzero(usable & held)

    ended, rewarded = int(terminal.sum()), float((rew != np.median(rew)).mean())
    whole = length[terminal[end]]  # lengths of episodes that end by a terminal
    if ended and np.median(rew) != 0 and (ended == 1 or np.ptp(whole) > 0):
        rewarded = 1.0  # then an episode's length pays
    rows, lacking = np.append(train, holdout), "action" if sarsa else "state"
    say(f"{name}: {n:,} transitions, {len(first):,} episodes ({note}), {ended:,} terminal")
    say(f"  returns {returns.mean():.1f} mean, {returns.min():.1f} to {returns.max():.1f}; {span}")
    lost = f"{n - len(rows):,} lack a next {lacking}"
    say(f"  {len(train):,} to train on, {len(holdout):,} held out, {lost}")
    if rewarded <= 0.001:
        say(f"only {rewarded:.2%} of the rewards differ from the others: nothing to learn from")
    if not len(train):
        fail(f"{name}: nothing to train on")
    data = Replay(len(rows), obs.shape[1], act.shape[1], device)
    table = {"obs": obs, "act": act, "rew": rew, "next_obs": next_obs, "done": terminal}
    table |= {"next_act": act[following], "start": np.append(True, end[:-1]), "to_go": g}
    for key, x in table.items():
        data.columns[key] = torch.as_tensor(x[rows], dtype=torch.float32, device=device)
    data.size.fill_(len(train))
    data.info = {"dataset": name, "dataset_sha256": digest.hexdigest(), "rewarded": rewarded}
    data.info |= {"dataset_return_mean": float(returns.mean()), "action_bounds": bounds}
    data.info |= {"reward_min": float(rew.min()), "reward_max": float(rew.max())}
    return data


D4RL_REFERENCE = {  # returns of a random and an expert policy, D4RL's infos.py
    "halfcheetah": (-280.178953, 12135.0), "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3), "antmaze": (0.0, 1.0), "ant": (-325.6, 3879.7),
    "adroithandpen": (96.262799, 3076.8331017826877), "frankakitchen": (0.0, 4.0),
    "adroithandhammer": (-274.856578, 12794.134825156867),
    "adroithanddoor": (-56.512833, 2880.5693087298737),
    "adroithandrelocate": (-6.425911, 4233.877797728884),
}  # fmt: skip


def normalized_score(env_id: str, value: float) -> float | None:
    """D4RL's score, 0 for a random and 100 for an expert policy; None without a reference."""
    name = re.split("[-_]", re.split("[:/]", env_id)[-1].lower())[0]
    low, high = D4RL_REFERENCE.get(name, (None, None))
    return None if low is None else 100 * (value - low) / (high - low)


@torch.no_grad()
def evaluate(learner, envs, args) -> dict:
    """One episode in each of `envs` without exploration: mean and deviation of the returns, as the
    environment pays them; `overestimation`, the mean of Q(s0, a0) less the discounted return that
    followed, both scaled (an episode cut at T steps misses gamma^T). Draws no random number."""
    learner.eval()
    s0, rewards, alive = play(learner, envs, args.seed)
    s0 = torch.as_tensor(s0, dtype=torch.float32, device=learner.device)
    predicted = learner.least_q(s0, learner.act(s0, explore=False)).cpu().numpy()
    learner.train()
    scaled = args.reward_scale * rewards + args.reward_shift * alive
    discounted = (args.gamma ** np.arange(len(rewards))) @ scaled
    returns = rewards.sum(0)
    numbers = {"final_return_mean": returns.mean(), "final_return_std": returns.std()}
    numbers["overestimation"] = (predicted - discounted).mean()
    if (score := normalized_score(args.env_id, returns.mean())) is not None:
        numbers["normalized_score"] = score
    return {name: float(x) for name, x in numbers.items()}


TAGS = {  # of an evaluation; CleanRL's name, too, for an offline run has no other episodes
    "charts/episodic_return": "final_return_mean",
    "eval/episodic_return": "final_return_mean",
    "charts/normalized_score": "normalized_score",
    "diagnostics/overestimation": "overestimation",
}


def check_resumed(saved: dict, data, args):
    """Refuse other data, and a longer offline phase after the online one has begun."""
    if saved["info"]["dataset_sha256"] != data.info["dataset_sha256"]:
        fail(f"--resume: that run had other data, give --dataset {saved['info']['dataset']}")
    if args.num_updates != saved["args"]["num_updates"] < saved["step"]:
        fail("--resume: that run is online already, its --num-updates must stay")


# === end shared ===


# === shared: workflow (canonical copy: cql_continuous.py) ===
# Needs NumPy, say() of the block "run", and advice(args) of the script: the flags to try, by the
# name of the verdict.
LOW_TD = 0.1  # TD error below a tenth of the target's variance: the transient is over
UNTRAINED = 1.0  # about the largest Q of a network that has learned nothing
FELL = 0.1  # in units of Q: less below its peak is noise


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


def selects(history: list[dict], args) -> bool:
    """Whether selected.pt is this moment: Q has not fallen by FELL since its peak."""
    top, _ = peak(history, args)
    least = min(h["q_data"] for h in history if h["step"] >= top["step"])
    return top["q_data"] - least <= FELL * q_unit(history[-1])


def on_its_way(history: list[dict]) -> bool:
    """Whether the dataset's Q is still on its way from 0 to its level: farther from 0 in each of
    the last three fifths of the run, and in the last one by a seventh of the whole way. (On a
    straight line that is a fifth; after 0.8 / (tau (1 - gamma)) updates a seventh.)"""
    fifths = [history[round(len(history) * k / 5) - 1]["q_data"] for k in (2, 3, 4, 5)]
    way, same_side = np.abs(fifths), min(fifths) > 0 or max(fifths) < 0
    return bool(same_side and (np.diff(way) > 0).all() and way[2] <= 6 / 7 * way[3])


def late_means(history: list[dict], *keys: str) -> list[float]:
    """Means of diagnostics over the last fifth of the run; NaN where one was not measured."""
    late = history[-(len(history) // 5) :]
    return [float(np.mean([h.get(key, math.nan) for h in late])) for key in keys]


def verdict(history: list[dict], args, rewarded: float, settling: float = 0) -> tuple[str, str]:
    """What a run shows: a name, and a sentence with the numbers it rests on and the flag to try.

    Only from what an offline user sees (arXiv 2109.10813): `rewarded`, the share of rows whose
    reward is not the usual one; `settling`, the updates that Q needs to come near its level; and
    the diagnostics' mean over the last fifth of the run. The TD error is in units of its target's
    variance, Q of q_unit(), cql_gap of Q, whose exp it averages."""
    flags, n = advice(args), args.num_updates
    longer = f"--num-updates {max(2 * n, 10 * args.diagnostics_frequency, round(settling / 2))}"
    if rewarded <= 0.001:
        return "nothing to learn from", f"only {rewarded:.2%} of the rewards differ from the others"
    if n < settling / 10:
        return "too short to judge", f"Q needs about {settling:,.0f} updates: try at least {longer}"
    if len(history) < 10:
        closer = f"--diagnostics-frequency {max(1, n // 20)}"
        few = f"{len(history)} diagnostics, ten are the least"
        return "too short to judge", f"{few}: try {closer}, or {longer}"

    end, late = history[-1], history[-(len(history) // 5) :]
    before, midway, unit = history[-1 - len(late)], history[len(history) // 2], q_unit(end)

    td, held = late_means(history, "td_error", "td_error_holdout")
    gap, push = late_means(history, "cql_gap", "cql_push")
    returns = late_means(history, "q_minus_return", "q_minus_return_holdout")
    off, off_held = (x / unit for x in returns)
    numbers = f"TD error {td:.3f} of the target's variance"
    numbers += "" if math.isnan(held) else f" ({held:.3f} held out)"
    numbers += "" if math.isnan(gap) else f", cql_gap {gap:.1f}"
    numbers += "" if math.isnan(off) else f", Q {off:+.1f} deviations from the data's returns"
    drift, moving = (end["q_data"] - before["q_data"]) / unit, on_its_way(history)
    moved = f"Q went from {before['q_data']:.3g} to {end['q_data']:.3g} in the last fifth"
    advised = f"try {longer}"
    if off > 0.5 and drift > 0:  # more updates may be the way into divergence
        advised = "above those returns: a better policy's value, or overestimation (see that after "
        advised += f"an evaluation); beside it try {flags['divergence']}"

    # the most that the rewards allow, and what raising Q at the data's actions may add to it
    scale = max(end["q_range"], abs(end["q_bound"]))
    allowed = end["q_bound"] + end.get("q_lift", 0) + 0.05 * scale + UNTRAINED
    # but Q starts at 0, and to a bound below that it has to come down
    step_down = before["q_data"] - end["q_data"]
    risen = step_down <= 0 or end["q_max"] > max(UNTRAINED, history[0]["q_max"])
    settled = not moving and end["q_max"] - 10 * step_down > allowed
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
    if fall > FELL:
        peaked = f"the dataset's Q rose to {top['q_data']:.3g} until update {top['step']:,}"
        return "overfitting", f"{numbers}: {peaked} and fell to {np.mean(since):.3g} since. {cure}"
    if held > max(5 * td, LOW_TD):
        times = held / max(td, 1e-9)
        return "overfitting", f"{numbers}: {times:.0f} times as large on held-out episodes. {cure}"

    # on its way up: the second half of the run made good a tenth of what is missing
    enough = (end["q_data"] - midway["q_data"]) / unit > -0.1 * off
    rising = drift > 0 and (moving or enough)
    if gap < -0.5 and off < -1 and not rising and args.cql_alpha > 0:
        cause = "the conservative term outweighs the TD error"
        return "alpha too large", f"{numbers}: {cause}. Try {flags['alpha too large']}"
    if moving:
        return "too short to judge", f"{numbers}. {moved}: {advised}"
    if td > LOW_TD and push > 1 and gap > -0.5:
        cause = "the conservative term alone explains so large a TD error"
        return "alpha too large", f"{numbers}: {cause}. Try {flags['alpha too large']}"
    if td > LOW_TD and td > 0.6 * midway["td_error"] and not gap < -0.5:
        cause = "it stays high, this critic cannot lower it"
        return "underfitting", f"{numbers}: {cause}. Try {flags['underfitting']}"
    healthy = f"{numbers}, and the dataset's Q has not fallen from a peak"
    return "no sign of trouble", healthy + (f". {moved}: {advised}" if abs(drift) > 0.1 else "")


def conclude(name: str, sentence: str, summary: dict) -> dict:
    """The verdict, with what evaluations saw, printed and added to the summary."""
    stages = "dataset bc offline selected final".split()
    means = {k: summary[f"{k}_return_mean"] for k in stages if f"{k}_return_mean" in summary}
    say("returns: " + ", ".join(f"{k} {x:.1f}" for k, x in means.items()))
    if summary.get("normalized_score") is not None:
        say(f"normalized score of the final policy: {summary['normalized_score']:.1f}")
    if "final" in means:
        seen = f"the policy returns {means['final']:.1f}, its data {means['dataset']:.1f}"
        seen += f"; at first states Q is {summary['overestimation']:+.1f} off what followed"
        sentence += f" (What an offline user would not have: {seen})"
    say(f"verdict: {name}. {sentence}")
    return summary | {"verdict": name, "verdict_text": sentence}


# === end shared ===


# === shared: files (canonical copy: cql_continuous.py) ===
# Needs failing() and say() of the block "run".
KINDS = {  # files by their first bytes
    b"\x89HDF": "HDF5 that is damaged, incomplete or no dataset",
    b"\x80": "a pickle: make an HDF5 file of it by `python tools/convert.py FILE NEW.hdf5`",
    b"(lp": "a pickle: make an HDF5 file of it by `python tools/convert.py FILE NEW.hdf5`",
    b"PK": "an npz or zip: make an HDF5 file of it by `python tools/convert.py FILE NEW.hdf5`",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: `git lfs pull`",
    b"ARROW1": "an arrow file: name the folder of its Minari set",
    b"\x1f\x8b": "gzipped: unpack it first",
    b"": "no HDF5 file",
}


def kind_of(path: Path) -> str:
    """What is there instead of a dataset, and what to do about it."""
    if (path / "main_data.hdf5").is_file():  # a Minari set's
        path = path / "main_data.hdf5"
    if path.is_dir():
        orbax = any(path.glob("**/manifest.ocdbt"))
        return "an orbax checkpoint: export it by JAX" if orbax else "a folder that is no dataset"
    if not path.exists():
        return f"not a file here, nor a Minari set's id: `minari download {path}`"
    start = b""
    with suppress(OSError), open(path, "rb") as f:
        start = f.read(32)
    return next(text for first, text in KINDS.items() if start.startswith(first))


def find_minari(name: str) -> Path | None:
    """The folder of a Minari set's data, by id, folder, or the file main_data.hdf5."""
    root = os.environ.get("MINARI_DATASETS_PATH", os.path.expanduser("~/.minari/datasets"))
    at = Path(name)
    places = [at, at / "data", Path(root) / name / "data"]
    places += [at.parent] if at.name == "main_data.hdf5" else []
    return next((p for p in places if (p / "metadata.json").is_file()), None)


def open_minari(folder: Path):
    """A set by Minari's own library."""
    with failing("a Minari set needs `pip install 'minari[hdf5,arrow]'`", ImportError):
        import minari
    found = minari.MinariDataset(folder)
    if parts := parts_of(found.observation_space):
        say(f"{folder}: observations flattened in this order: {parts}")
    return found


def flat(space, x, n: int) -> np.ndarray:
    """n values of a space as rows, (n, width): gymnasium.spaces.flatten of all of them at once."""
    if isinstance(space, gym.spaces.Dict):
        parts = [flat(part, x[key], n) for key, part in space.spaces.items()]
        return np.concatenate(parts, axis=1)
    if isinstance(space, gym.spaces.Discrete):
        return np.eye(space.n, dtype=np.float32)[np.asarray(x) - space.start]
    if not isinstance(space, gym.spaces.Box):
        each = gym.vector.utils.iterate(gym.vector.utils.batch_space(space, n), x)
        return np.stack([gym.spaces.flatten(space, one) for one in each]).astype(np.float32)
    x = np.asarray(x, dtype=np.float32)
    return x.reshape(len(x), -1)


def point_out(terminal, timeout, limit: int | None):
    """Print what looks odd in flags, which are read as they are."""
    end = terminal | timeout
    length = np.diff(np.flatnonzero(end), prepend=-1)
    if both := (terminal & timeout).sum():
        say(f"odd: {both:,} terminals are timeouts as well (Stable-Baselines3's dones are both)")
    if together := (terminal[1:] & terminal[:-1]).sum():
        say(f"odd: {together:,} terminals follow a terminal (as in AntMaze): episodes of one step")
    longest = np.diff(np.flatnonzero(np.append(end[:-1], True)), prepend=-1).max()
    if limit and longest > limit:
        say(f"odd: an episode of {longest:,} steps in an environment of {limit:,}: no time-outs?")
    alike = len(length) > 1 and (length == (limit or length[0])).all()
    if alike and length[0] > 1 and terminal[end].all():
        say(f"odd: every episode ends by a terminal after {length[0]} steps; is that a time limit?")


def parts_of(space) -> str:
    """The entries of a Dict space in gymnasium's order, with their widths; "" of another space."""
    parts = space.spaces.items() if isinstance(space, gym.spaces.Dict) else ()
    return ", ".join(f"{key} ({gym.spaces.flatdim(part)})" for key, part in parts)


# === end shared ===


# === shared: precision (canonical copy: cql_continuous.py) ===
@contextmanager
def strict_fp32():
    """No gradients, no tf32: reduced precision inflates ranks (a true rank of 5 reads 96 in bf16).
    Works whichever of PyTorch's two interfaces to precision the program uses."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = products.fp32_precision, convolutions.fp32_precision
    products.fp32_precision = convolutions.fp32_precision = "ieee"
    try:
        with torch.no_grad():
            yield
    finally:
        products.fp32_precision, convolutions.fp32_precision = before


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


# === shared: replay (canonical copy: sac.py) ===
# Needs Batch, whose fields are columns here; to_env() of the block "environments"; fail(), say(),
# reserve() and write_beside() of "run".
class Replay:
    """A ring of transitions on the device. `size` is a tensor so that CUDA graphs can read it."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device):
        reserve(4 * capacity * (2 * obs_dim + act_dim + 3), "replay buffer", device)
        shapes = {"obs": [obs_dim], "act": [act_dim], "rew": [], "next_obs": [obs_dim]}
        shapes |= {"done": [], "cut": []}  # cut: by a time-out, or where a new episode started
        self.columns = {k: torch.zeros(capacity, *s, device=device) for k, s in shapes.items()}
        self.capacity, self.device = capacity, device
        self.added = 0  # Python's: nothing that a CUDA graph captures may read it
        self.size = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, *columns):
        """Append a transition of each environment (numpy arrays); the oldest make room."""
        n = len(columns[0])
        rows = torch.arange(self.added, self.added + n, device=self.device) % self.capacity
        self.added += n
        for column, x in zip(self.columns.values(), columns, strict=True):
            column[rows] = torch.as_tensor(x, dtype=torch.float32, device=self.device)
        self.size.fill_(min(self.added, self.capacity))

    def batch(self, rows) -> Batch:
        return Batch(*(self.columns[name][rows] for name in Batch._fields if name in self.columns))

    def sample(self, n: int) -> Batch:
        u = torch.rand(n, dtype=torch.float64, device=self.device)
        return self.batch((u * self.size).long())

    def state_dict(self, envs) -> dict:
        """Of the transitions, and of the environments that they come from."""
        n = int(self.size)  # a part is copied, for torch.save would write the whole tensor
        full = n == self.capacity
        rows = {k: x.cpu() if full else x[:n].cpu().clone() for k, x in self.columns.items()}
        return {"added": self.added, "rows": rows, "envs": [e.state_dict() for e in envs.envs]}

    def load_state_dict(self, saved: dict, envs) -> np.ndarray:
        """The environments go on where they were, if they can; their observations."""
        self.added = saved["added"]
        self.size.fill_(min(self.added, self.capacity))
        for name, x in saved["rows"].items():
            self.columns[name][: len(x)] = x
        for i, (env, state) in enumerate(zip(envs.envs, saved["envs"])):
            if not env.load_state_dict(state):
                say(f"environment {i} does not repeat itself from its seed: a new episode starts")
                self.columns["cut"][(self.added - envs.num_envs + i) % self.capacity] = 1
        return np.stack([env.obs for env in envs.envs])

    def write(self, path: Path, envs, **attributes):
        """The transitions as a D4RL-layout HDF5 file, one environment after the other."""
        import h5py

        n = envs.num_envs
        in_order = torch.arange(self.added).view(-1, n).T.flatten()
        c = {name: x.cpu()[in_order].numpy() for name, x in self.columns.items()}
        c["cut"].reshape(n, -1)[:, -1] = 1  # the recording stops here, whatever follows
        done = c["done"] > 0
        with write_beside(path) as temporary, h5py.File(temporary, "w") as f:
            f["observations"], f["next_observations"] = c["obs"], c["next_obs"]
            f["actions"] = to_env(torch.from_numpy(c["act"]), envs).astype(np.float32)
            f["rewards"], f["terminals"], f["timeouts"] = c["rew"], done, (c["cut"] > 0) & ~done
            f.attrs.update(attributes)
        say(f"{path}: {self.added:,} transitions, {done.sum():,} of them terminal")


# === end shared ===


# === shared: graph capture (canonical copy: sac.py) ===
# Needs PyTorch alone, as does the block "diagnostics".
class GraphedUpdate:
    """`fn(*key)` captured into a CUDA graph for each key: one launch an update.

    Every call is exactly one real update: the first three of a key run eagerly (warm-up), the
    fourth is captured and replayed. Capture freezes Python values: all that varies must be in
    `key` or in a device tensor."""

    def __init__(self, fn):
        self.fn, self.calls, self.graphs = fn, {}, {}
        self.stream = torch.cuda.Stream()  # one for all graphs: cuBLAS keeps a workspace for each

    def __call__(self, *key) -> dict:
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
