r"""What bootstrapping does to deep Q-functions, and what helps.

Supervised learning and Q-learning fit the same network by the same optimiser; the target differs.
Here it differs in one thing at a time, on the same batches, from the same weights, and the features
phi(s,a), which the last linear layer reads, tell the story:

  mc      y = the return that followed                      supervised
  oracle  y = Q(s,a) by dynamic programming                 supervised, no noise (gridworld)
  sarsa   y = r + gamma Q'(s',a'),  a' the data's next      bootstrapped, on pairs trained on
  td      y = r + gamma Q'(s',a'),  a' ~ behaviour, fresh   bootstrapped, on pairs perhaps unseen
  td10    y = r + gamma mean of ten such Q'                 the same, a tenth of a draw's variance
  q       y = r + gamma max of Q'(s',a), ten uniform a      control (discrete actions: all a)
  moving  y of another seed's td network                    a moving target not of its own doing

with Q' the target network, 0 after a terminal. Claims (arXiv 2010.14498, 2112.04716): with
bootstrapping on unseen actions the rank of phi falls below that of sarsa, and the dot products
phi(s,a).phi(s',a') rise, even when Q has settled. Why: the noise of gradient descent acts like a
regulariser of the features. In supervised learning it adds sum phi.phi, which keeps them small;
with bootstrapping it adds

  R(phi) = sum [ phi(s,a).phi(s,a) - gamma phi(s,a).phi(s',a') ]

whose second term rewards features that are alike on both sides of the backup. DR3 cancels it: loss
+ c mean phi(s,a).phi(s',a'). Cures, each a run of its own on --cure-target:

  dr3:c dr3abs:c dr3stop:c   DR3 signed, absolute, or without gradient through phi(s',a')
  sl:c  rank:c               mean phi.phi; s_max^2 - s_min^2 of the batch's phi (arXiv 2010.14498)
  unit  layer  dropout:p     phi / |phi|; layer norm before each ReLU; dropout after it
  tau:t  l2:c                Polyak rate; sum of squared weights

  Q(s,a)     net(x), x = (s,a)   (n, B), n networks: targets and cures x seeds
  phi(s,a)   net.features(x)     (n, B, width)
  y, a'      backup()            (n, B), (n, B, act)

Quick; in small steps; many cures; errors to the truth; your own data:
  python dr3_analysis.py
  python dr3_analysis.py --num-updates 100_000 --transitions 2_000 --batch-size 256 \
      --learning-rate 3e-4 --tau 0.005
  python dr3_analysis.py --seeds 5 --targets mc sarsa td td10 q moving \
      --cures dr3:1e-5 dr3:1e-4 dr3:1e-3 unit layer
  python dr3_analysis.py --problem gridworld --targets mc oracle sarsa td q
  python dr3_analysis.py --problem dataset --dataset replay.hdf5

Members, backup, losses and Learner.update are the algorithm. A small dataset is learned by heart,
its noise included: compare errors on held-out episodes. Known limits: observation vectors; the rank
needs more transitions than --width. Left out on purpose: pixels.
"""

import copy
import ctypes
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack, closing, contextmanager, suppress
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

Target = Literal["mc", "oracle", "sarsa", "td", "td10", "q", "moving"]


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # the first of --seeds seeds, and the one of the data
    cuda: bool = True  # use the GPU if there is one
    threads: int = 1  # CPU threads of PyTorch (0: all cores; slow where something else runs too)
    track: bool = False  # log to Weights & Biases as well (needs `pip install wandb`)
    wandb_project_name: str = "offline-rl"  # project of --track
    wandb_entity: str | None = None  # team of --track
    # environment of --problem continuous, `module:Id` where a package has to be imported for it
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "HalfCheetah-v5"
    run_dir: str = "runs"  # folder that holds the run folders
    resume: str | None = None  # run folder to go on from; its arguments hold unless given again
    checkpoint_frequency: int = 5_000  # updates between checkpoints (0: only at the end)
    # updates between measurements (0: only after a quarter, a half, and at the end)
    diagnostics_frequency: int = 1_000
    log_frequency: int = 500  # updates between logged losses

    # what is compared
    # an environment under a uniform policy; a gridworld that is solved exactly; a file
    problem: Literal["continuous", "gridworld", "dataset"] = "continuous"
    dataset: str | None = None  # D4RL-layout HDF5 file, or a Minari set's id or folder
    transitions: int = 1_000  # size of the data (of --dataset its first rows, 0: all)
    grid: int = 8  # side of the gridworld
    targets: tuple[Target, ...] = ("mc", "sarsa", "td")  # what the networks are fitted to
    cures: tuple[str, ...] = ("dr3:3e-5",)  # cures on --cure-target, each a run of its own
    cure_target: Target = "td"  # the target that the cures are tried on
    seeds: int = 3  # networks of each kind; those of one seed share initial weights and batches

    # training
    num_updates: int = 10_000  # gradient steps
    batch_size: int = 128  # B, transitions in a minibatch
    learning_rate: float = 1e-3  # of Adam
    # discount factor; not given: 0.99, or less where time-outs cut the returns of --dataset
    gamma: float | None = None
    tau: float = 0.05  # Polyak rate of the target networks
    width: int = 256  # units in a hidden layer
    depth: int = 2  # hidden layers


# a resumed run must have these as before: its networks or its data would not fit
FIXED = "env_id seed transitions grid targets cures cure_target seeds gamma width depth".split()

# the least and the most that a cure's number may be; (0, 0): it takes none
CURES = dict.fromkeys("dr3 dr3abs dr3stop sl rank l2".split(), (0, 1e9))
CURES.update(tau=(1e-9, 1), dropout=(1e-9, 0.99))
CURES.update(dict.fromkeys(("unit", "layer", "none"), (0, 0)))


def parse_cure(label: str) -> tuple[str, float]:
    """`dr3:1e-4` as ("dr3", 1e-4), `unit` as ("unit", 0)."""
    cure, _, number = label.partition(":")
    least, most = CURES.get(cure, (1, 0))
    with suppress(ValueError):
        value = float(number) if most else float(number or 0)
        if least <= value <= most:
            return cure, value
    fail(f"--cures {label}: expected NAME:NUMBER (NAME where that is 0) within {CURES}")


def check(args: Args):
    """Refuse what no run could use, before anything starts."""
    check_numbers(args, "seed checkpoint_frequency diagnostics_frequency", 0, 1e9)
    check_numbers(args, "num_updates batch_size log_frequency width depth", 1, 1e9)
    check_numbers(args, "learning_rate", 1e-12, 1e12)
    check_numbers(args, "gamma", 0, 0.99999)
    check_numbers(args, "tau", 1e-9, 1)
    check_numbers(args, "seeds", 1, 1e4)
    check_numbers(args, "grid", 3, 32)
    check_numbers(args, "threads", 0, 1e4)
    check_numbers(args, "transitions", 0 if args.dataset else 32, 1e7)
    if (args.problem == "dataset") != (args.dataset is not None):
        fail("--dataset FILE and --problem dataset go together")
    if args.env_id != args.problem:  # which stands for it in the folder's name
        check_effect(args, "env_id", args.problem == "continuous", f"with --problem {args.problem}")
    check_effect(args, "grid", args.problem == "gridworld", f"with --problem {args.problem}")
    check_effect(args, "cure_target", bool(args.cures), "without --cures")
    for given in (args.targets, ("none", *args.cures)):
        if len({*given}) < len(given) or not given:
            fail(f"--targets, --cures: found {given}, expected different ones, at least one target")
    for cure in args.cures:
        parse_cure(cure)
    if args.cures and args.cure_target not in {*args.targets} - {"moving"}:
        fail(f"--cure-target {args.cure_target}: expected one of --targets, and not moving")
    if "oracle" in args.targets and args.problem != "gridworld":
        fail("--targets oracle: only the gridworld has one")
    if "moving" in args.targets and ("td" not in args.targets or args.seeds < 2):
        fail("--targets moving is fitted to another seed's td: it needs td and --seeds 2 or more")


# -------------------------------------------------------------------------- networks: n as one
class Member(NamedTuple):
    target: str
    cure: str  # `dr3`, or `none`
    number: float  # of the cure
    label: str  # the cure as it was written, `dr3:1e-4`
    seed: int


def all_members(args: Args) -> list[Member]:
    kinds = [(target, "none") for target in args.targets]
    kinds += [(args.cure_target, label) for label in args.cures]
    seeds = range(args.seed, args.seed + args.seeds)
    return [Member(t, *parse_cure(label), label, seed) for t, label in kinds for seed in seeds]


class Members(nn.Module):
    """n Q-networks of one shape, one batched product a layer for all; those of a seed start from
    the same weights."""

    def __init__(self, inputs: int, members: list[Member], args: Args):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        sizes = [inputs] + [args.width] * args.depth + [1]
        for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
            draws = []
            for m in members:
                draw = torch.Generator().manual_seed(1_000 * m.seed + i)
                u = torch.rand(fan_in + 1, fan_out, generator=draw) * 2 - 1
                draws.append(u * fan_in**-0.5)  # nn.Linear's scale
            both = torch.stack(draws)
            self.weights.append(nn.Parameter(both[:, :-1].clone()))  # (n, in, out)
            self.biases.append(nn.Parameter(both[:, -1:].clone()))  # (n, 1, out)
        self.cures = {m.cure for m in members}
        for cure in ("unit", "layer", "dropout"):  # (n, 1, 1): who has it, at which rate
            values = [(m.number or 1.0) if m.cure == cure else 0.0 for m in members]
            self.register_buffer(cure, torch.tensor(values)[:, None, None], persistent=False)

    def hidden(self, x, who=slice(None), sums: list | None = None) -> list:
        """Each hidden layer's activations, (k, B, width), of x (k, B, in) in the networks `who`;
        the last are the features. `sums` receives what goes into the activations."""
        activations = []
        for W, b in zip(self.weights[:-1], self.biases[:-1]):
            x = torch.baddbmm(b[who], x, W[who])
            if sums is not None:
                sums.append(x)
            if "layer" in self.cures:
                x = torch.where(self.layer[who] > 0, F.layer_norm(x, x.shape[-1:]), x)
            x = F.relu(x)
            if "dropout" in self.cures and self.training:
                rate = self.dropout[who]
                x = x * (torch.rand_like(x) >= rate) / (1 - rate)
            activations.append(x)
        if "unit" in self.cures:
            activations[-1] = torch.where(self.unit[who] > 0, F.normalize(x, dim=-1), x)
        return activations

    def features(self, x, who=slice(None)):
        """phi, (k, B, width)."""
        return self.hidden(x, who)[-1]

    def q(self, phi, who=slice(None)):
        """(k, B)"""
        return torch.baddbmm(self.biases[-1][who], phi, self.weights[-1][who]).squeeze(-1)

    def forward(self, x, who=slice(None)):
        return self.q(self.features(x, who), who)


# ----------------------------------------------------------------------------- targets and losses
class Behaviour(NamedTuple):
    """The policy that the data come from, known or cloned. Actions lie in a box, or are one-hot."""

    low: torch.Tensor  # (act,)
    high: torch.Tensor
    discrete: bool = False
    clone: Callable | None = None  # observations -> mean and log std, or logits; None: uniform

    def fresh(self, obs, draw):
        """Ten actions of this policy for each row, (rows, 10, act)."""
        n, device = len(self.low), obs.device
        if self.clone is None and not self.discrete:
            return self.candidates(obs, draw)
        if self.clone is None:
            which = torch.randint(n, (len(obs), 10), generator=draw, device=device)
            return torch.eye(n, device=device)[which]
        out = self.clone(obs).detach()
        if self.discrete:
            which = out.softmax(-1).multinomial(10, replacement=True, generator=draw)
            return torch.eye(n, device=device)[which]
        mean, log_std = gaussian(out.unsqueeze(1))
        noise = torch.randn(len(obs), 10, n, generator=draw, device=device)
        return (mean + log_std.exp() * noise).clamp(self.low, self.high)

    def candidates(self, obs, draw):
        """For the maximum over actions: ten uniform ones, or all, (rows, m, act)."""
        if self.discrete:
            return torch.eye(len(self.low), device=obs.device).expand(len(obs), -1, -1)
        u = torch.rand(len(obs), 10, len(self.low), generator=draw, device=obs.device)
        return self.low + u * (self.high - self.low)


class Problem(NamedTuple):
    """N transitions, and what is known of them."""

    obs: torch.Tensor  # (N, obs), standardised
    act: torch.Tensor  # (N, act)
    rew: torch.Tensor  # (N,), divided by the largest absolute one
    done: torch.Tensor  # (N,), 1 where the episode terminated
    next_obs: torch.Tensor  # (N, obs)
    next_act: torch.Tensor  # (N, act), the data's own next action
    mc: torch.Tensor  # (N,), the discounted return that followed
    behaviour: Behaviour
    standardise: Callable  # observations as the networks see them
    held: tuple | None = None  # (obs, act, mc) of episodes that are not trained on
    truth: dict | None = None  # target -> Q at the rows by dynamic programming, where known
    greedy_returns: Callable | None = None  # of the networks' greedy policies, where known

    def batch(self, rows, draw):
        s = self.next_obs[rows]
        return Batch(rows, self.behaviour.fresh(s, draw), self.behaviour.candidates(s, draw))


class Batch(NamedTuple):  # of one seed; Learner.sample() puts an axis for the n members first
    rows: torch.Tensor  # (B,), of the problem
    fresh: torch.Tensor  # (B, 10, act), actions of the behaviour policy at s'
    candidates: torch.Tensor  # (B, m, act), actions at s' for the maximum


@torch.no_grad()
def backup(learner, batch: Batch):
    """What the members are fitted to, y (n, B), and its a' (n, B, act): of td10's ten the first."""
    p = learner.problem
    y, next_act = p.mc[batch.rows], p.next_act[batch.rows]
    for kind in learner.args.targets:
        who = learner.chosen(target=kind)
        rows, source = batch.rows[who], who
        if kind == "oracle":
            y[who] = p.truth["oracle"][rows]
        if kind in ("mc", "oracle"):
            continue
        act = batch.fresh[who]  # (k, B, m, act)
        if kind == "sarsa":
            act = next_act[who].unsqueeze(2)
        elif kind == "q":
            act = batch.candidates[who]
        elif kind != "td10":
            act = act[:, :, :1]
        if kind == "moving":  # the next seed's td; its own seed's would make it td over again
            source = learner.chosen(target="td", cure="none")
            source = source[1:] + source[:1]
        obs = p.next_obs[rows].unsqueeze(2).expand(-1, -1, act.shape[2], -1)
        q = learner.target(torch.cat([obs, act], -1).flatten(1, 2), source).view(act.shape[:3])
        value = q.mean(-1)
        next_act[who] = act[:, :, 0]
        if kind == "q":
            value, best = q.max(-1)
            next_act[who] = act.take_along_dim(best[..., None, None], 2).squeeze(2)
        y[who] = p.rew[rows] + learner.args.gamma * (1 - p.done[rows]) * value
    return y, next_act


def losses(learner, batch: Batch):
    """Each member's mean squared error, (n,), and c times the term of its cure, (n,)."""
    p, net = learner.problem, learner.net
    y, next_act = backup(learner, batch)
    phi = net.features(torch.cat([p.obs[batch.rows], p.act[batch.rows]], -1))
    error = ((net.q(phi) - y) ** 2).mean(1)
    penalty = torch.zeros_like(error)
    for cure in ("dr3", "dr3abs", "dr3stop", "sl", "rank", "l2"):
        if who := learner.chosen(cure=cure):
            term = cure_term(cure, learner, who, phi[who], batch.rows[who], next_act[who])
            at = torch.tensor(who, device=term.device)
            penalty = penalty.index_add(0, at, learner.numbers[who] * term)
    return error, penalty


def cure_term(cure: str, learner, who: list, phi, rows, next_act):
    """What a cure adds to the loss of the members `who`, without its weight c, (k,)."""
    p, net = learner.problem, learner.net
    if cure == "sl":
        return (phi**2).sum(-1).mean(1)
    if cure == "l2":
        return sum((W[who] ** 2).sum((1, 2)) for W in net.weights)
    if cure == "rank":  # squared singular values, from the smaller Gram matrix
        tall = phi if phi.shape[1] > phi.shape[2] else phi.mT
        gram = (tall.mT @ tall).nan_to_num(0, 0, 0)  # eigvalsh raises on NaN
        eigenvalues = torch.linalg.eigvalsh(gram)
        return eigenvalues[:, -1] - eigenvalues[:, 0]
    phi_next = net.features(torch.cat([p.next_obs[rows], next_act], -1), who)
    if cure == "dr3stop":
        phi_next = phi_next.detach()
    dot = (phi * phi_next).sum(-1) * (1 - p.done[rows])
    return (dot.abs() if cure == "dr3abs" else dot).mean(1)


class Learner(nn.Module):
    """All members, their target networks, and one Adam, which mixes no two weights."""

    def __init__(self, problem: Problem, args: Args, device):
        super().__init__()
        self.args, self.problem = args, problem
        self.members = all_members(args)
        self.attributes = [m._asdict().items() for m in self.members]
        inputs = problem.obs.shape[1] + problem.act.shape[1]
        # weights six times (target, gradient, moments), activations of ten next actions
        floats = 6 * args.width * (inputs + args.width * (args.depth - 1))
        floats += 12 * max(args.batch_size, 2048) * (inputs + args.width * args.depth)
        reserve(4 * len(self.members) * floats, "networks and one update, roughly", device)
        self.net = Members(inputs, self.members, args)
        self.target = copy.deepcopy(self.net).requires_grad_(False).eval()
        taus = [m.number if m.cure == "tau" else args.tau for m in self.members]
        self.register_buffer("taus", torch.tensor(taus)[:, None, None], persistent=False)
        numbers = torch.tensor([m.number for m in self.members])
        self.register_buffer("numbers", numbers, persistent=False)
        self.to(device)
        self.optim = torch.optim.Adam(self.net.parameters(), lr=args.learning_rate, fused=True)
        seeds = range(args.seed, args.seed + args.seeds)
        self.draws = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.seeds = torch.tensor([m.seed - args.seed for m in self.members], device=device)

    def chosen(self, **wanted) -> list[int]:
        """Positions of the members with these attributes."""
        return [i for i, x in enumerate(self.attributes) if wanted.items() <= x]

    def sample(self) -> Batch:
        """A batch for each seed: its members differ in nothing but target and cure."""
        p, drawn = self.problem, []
        for draw in self.draws:
            shape, device = (self.args.batch_size,), p.rew.device
            rows = torch.randint(len(p.rew), shape, generator=draw, device=device)
            drawn.append(p.batch(rows, draw))
        return Batch(*(torch.stack(x)[self.seeds] for x in zip(*drawn)))

    def update(self):
        """One step of every member; their errors, (n,)."""
        error, penalty = losses(self, self.sample())
        self.optim.zero_grad()
        (error + penalty).sum().backward()
        self.optim.step()
        with torch.no_grad():
            for p, p_target in zip(self.net.parameters(), self.target.parameters()):
                p_target.lerp_(p, self.taus)  # target <- target + tau (p - target)
        return error.detach()


# ------------------------------------------------------------------------------------------- data
COLUMNS = ("obs", "act", "rew", "done", "next_obs", "cut")  # cut: the episode ends, not terminally


def from_episodes(c: dict, behaviour, args: Args, device, truth=None) -> Problem:
    """The problem of these COLUMNS. Trained on are the first --transitions rows with a next action
    and a return of which less than 1 % is missing: it ends at a terminal, or gamma^k < 0.01 for its
    k rewards. Held out are at most 8,000 such rows of later episodes, thinned to 2,048."""
    what = f"--dataset {args.dataset}" if args.dataset else f"--env-id {args.env_id}"
    c = {name: np.asarray(x, np.float32) for name, x in c.items()}
    for name, x in c.items():
        if len(bad := np.argwhere(~np.isfinite(x))):
            found = f"'{name}' is {x[tuple(bad[0])]} at row {bad[0][0]}"
            fail(f"{what}: {found}, expected finite numbers", 2 if args.dataset else 3)
    n, done = len(c["rew"]), c["done"] > 0
    over = done | (c["cut"] > 0)
    over[-1:] = True
    point_out(done, c["cut"] > 0, None)
    left = discounted_sums(np.ones(n), over, 1.0)  # rewards to the end of the episode
    left[done[np.arange(n) + left.astype(int) - 1]] = np.inf  # ends at a terminal: whole
    fits = (math.ceil(1_000 * 0.01 ** (1 / np.median(left))) - 1) / 1_000 if n else 0
    if args.gamma is None:
        args.gamma = min(0.99, fits)
        say(f"{what}: --gamma {args.gamma}, which leaves half of the returns whole, or more")
    usable = (args.gamma**left < 0.01) & (done | ~over)
    keep = usable & (np.cumsum(usable) <= (args.transitions or n))
    if keep.sum() < 32:
        found = f"{keep.sum()} of {n} rows have a next action and a return that is whole to 1 %"
        fail(f"{what}: {found}, expected 32; with --gamma {fits} half of the returns are whole")
    episode = np.cumsum(over) - over
    held = np.flatnonzero(usable & (episode > episode[keep].max()))[:8_000]
    held = held[:: math.ceil(len(held) / 2048) or 1]  # neighbours are alike
    if np.ptp(c["rew"][keep]) == 0:
        say(f"{what}: all rewards are {c['rew'][keep][0]}, there is nothing to learn")
    scale = np.abs(c["rew"][keep]).max().clip(1e-30)
    mc = discounted_sums(c["rew"] / scale, over, args.gamma)
    mean, std = c["obs"][keep].mean(0), c["obs"][keep].std(0) + 1e-3

    def standardise(obs):
        return (obs - mean) / std

    def take(x, rows=keep):
        return torch.from_numpy(np.asarray(x[rows], np.float32)).to(device)

    obs, next_obs = standardise(c["obs"]), standardise(c["next_obs"])
    columns = (obs, c["act"], c["rew"] / scale, c["done"], next_obs, np.roll(c["act"], -1, 0), mc)
    problem = Problem(*(take(x) for x in columns), behaviour, standardise)
    if truth:
        return problem._replace(truth={name: take(q / scale) for name, q in truth.items()})
    if len(held) < 32:
        say(f"{what}: no episodes are left to be held out, nothing is said of errors")
        return problem
    return problem._replace(held=tuple(take(x, held) for x in (obs, c["act"], mc)))


def discounted_sums(rew, over, gamma: float):
    """The discounted sum of rewards from each row to the end of its episode, (N,)."""
    sums, total = np.zeros(len(rew)), 0.0
    for i in reversed(range(len(rew))):
        total = rew[i] + gamma * (0.0 if over[i] else total)
        sums[i] = total
    return sums


def continuous(args: Args, device) -> Problem:
    """Episodes of a uniform policy: 1,000 steps, and a tail that makes their returns whole. Of
    9,000 rows more than --transitions 8,000 are held out."""
    what = f"--env-id {args.env_id}"
    tail = math.ceil(math.log(0.01) / math.log(max(args.gamma, 1e-9))) + 1
    with failing(f"{what} (a package's own: --env-id package:Id)", Exception):
        env = gym.make(args.env_id, max_episode_steps=1_000 + tail)
    if isinstance(env.observation_space, gym.spaces.Dict):
        env = gym.wrappers.FlattenObservation(env)
    for space in (env.observation_space, env.action_space):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            fail(f"{what}: found {space}, expected a Box of one dimension")
    box = env.action_space
    low, span = box.low.astype(float), box.high.astype(float) - box.low
    if box.dtype.kind != "f" or not (span < 1e12).all():
        fail(f"{what}: actions are {box}, expected floats with finite bounds")
    rng, seed = np.random.default_rng(args.seed), args.seed
    rows, over = [], True
    with closing(env):
        while not over or len(rows) < (1 + tail / 1_000) * (args.transitions + 9_000):
            if over:
                obs, _ = env.reset(seed=seed)
                seed += 1_000
            act = rng.uniform(-1, 1, box.shape)
            next_obs, rew, done, cut, _ = env.step(low + (act + 1) / 2 * span)
            rew = np.asarray(rew, dtype=float).item()  # some hand out an array of one number
            if not (np.abs(np.append(next_obs, rew)) < 3.4e38).all():
                fail(f"{what}: step {len(rows)} gives an observation or reward not finite", 3)
            rows.append((np.array(obs), act, rew, done, np.array(next_obs), cut))
            obs, over = next_obs, done or cut
    columns = [np.array(x) for x in zip(*rows)]
    ones = torch.ones(len(low), device=device)
    return from_episodes(dict(zip(COLUMNS, columns)), Behaviour(-ones, ones), args, device)


def gridworld(args: Args, device) -> Problem:
    """--transitions steps of a uniform policy on a grid; a state is seen as 16 random numbers."""
    P, r = grid_model(args.grid)
    S, rng = len(P), np.random.default_rng(args.seed)
    features = rng.normal(size=(S, 16)).astype(np.float32)
    one_hot = np.eye(4, dtype=np.float32)
    s, rows = 0, []
    for _ in range(args.transitions):
        a = rng.integers(4)
        after = rng.choice(S, p=P[s, a])
        rows.append((s, a, after))
        s = after if after != S - 1 else rng.integers(S - 1)
    state, act, after = np.array(rows).T
    done = after == S - 1
    row = (features[state], one_hot[act], np.where(done, 1, -0.1), done, features[after], 0 * done)
    uniform_q = evaluate_policy(P, r, np.full((S, 4), 0.25), args.gamma)[state, act]
    truth = dict.fromkeys(("mc", "oracle", "sarsa", "td", "td10", "moving"), uniform_q)
    truth["q"] = optimal_q(P, r, args.gamma)[state, act]
    ones = torch.ones(4, device=device)
    behaviour = Behaviour(0 * ones, ones, discrete=True)
    problem = from_episodes(dict(zip(COLUMNS, row)), behaviour, args, device, truth)
    seen = torch.from_numpy(problem.standardise(features)).to(device)
    every = torch.cat([seen.repeat_interleave(4, 0), torch.eye(4, device=device).repeat(S, 1)], -1)

    def greedy_returns(net):
        """From a start anywhere but at the goal, one for each network."""
        q = net(every.expand(len(net.unit), -1, -1)).view(-1, S, 4)
        returns = []
        for policy in one_hot[q.cpu().numpy().argmax(-1)]:
            V = (policy * evaluate_policy(P, r, policy, args.gamma)).sum(1)
            returns.append(V[: S - 1].mean())
        return returns

    return problem._replace(greedy_returns=greedy_returns)


def grid_model(k: int):
    """P (S, 4, S), r (S, 4), absorbing goal S - 1: four moves, one in ten slips to a random one; a
    step costs 0.1, the far corner pays 1."""
    S, step = k * k, np.zeros((k * k, 4, k * k))
    x, y = np.divmod(np.arange(S), k)
    for a, (dx, dy) in enumerate(((0, 1), (0, -1), (1, 0), (-1, 0))):
        after = (x + dx).clip(0, k - 1) * k + (y + dy).clip(0, k - 1)
        step[np.arange(S), a, after] = 1
    P = 0.9 * step + 0.1 * step.mean(1, keepdims=True)
    r = -0.1 + 1.1 * P[:, :, S - 1]
    P[S - 1], r[S - 1] = 0, 0
    return P, r


def evaluate_policy(P, r, policy, gamma: float):
    """Q (S, 4) of a policy (S, 4), by a linear solve for its V (S,) in float64."""
    P_pi, r_pi = np.einsum("sa,sat->st", policy, P), (policy * r).sum(1)
    return r + gamma * P @ np.linalg.solve(np.eye(len(P)) - gamma * P_pi, r_pi)


def optimal_q(P, r, gamma: float):
    """Q* by value iteration to rounding."""
    Q, better = np.inf, r
    while np.abs(better - Q).max() > 1e-12:
        Q, better = better, r + gamma * P @ better.max(1)
    return better


def dataset(args: Args, device) -> Problem:
    """A file's transitions; its behaviour policy is cloned."""
    path, folder = Path(args.dataset), find_minari(args.dataset)
    if not folder and not path.is_file():
        fail(f"--dataset {path}: {kind_of(path)}")
    with failing(f"--dataset {path} is {kind_of(folder or path)}", Exception):
        c = read_minari(folder) if folder else read_d4rl(path)
    if not len(c["rew"]):
        fail(f"--dataset {path}: no transitions")
    discrete = c["act"].dtype.kind in "iu" and c["act"].size == len(c["act"])
    if discrete:
        if c["act"].min(initial=0) < 0:
            hint = "expected numbers from 0 on: integers are taken for discrete actions"
            fail(f"--dataset {path}: an action is {c['act'].min()}, {hint}")
        c["act"] = np.eye(c["act"].max(initial=0) + 1)[c["act"].reshape(-1)]
    vectors = c["obs"].ndim == c["act"].ndim == 2 and c["obs"].shape == c["next_obs"].shape
    if not vectors or len({len(x) for x in c.values()}) > 1:
        shapes = {name: x.shape for name, x in c.items()}
        fail(f"--dataset {path}: shapes {shapes}, expected rows of vectors, and of one number each")
    problem = from_episodes(c, None, args, device)
    low, high = problem.act.amin(0), problem.act.amax(0)
    policy = clone(problem, discrete)
    return problem._replace(behaviour=Behaviour(low, high, discrete, policy))


def gaussian(out):
    """Mean and log standard deviation, (rows, act) each, from a network's output."""
    mean, log_std = out.chunk(2, -1)
    return mean, log_std.clamp(-5, 2)


def clone(problem: Problem, discrete: bool, batch_size: int = 128, steps: int = 3_000):
    """A Gaussian or categorical policy by maximum likelihood; on resume it is fitted again."""
    (n, obs_dim), act_dim = problem.obs.shape, problem.act.shape[1]
    layers = [nn.Linear(obs_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    layers.append(nn.Linear(256, act_dim if discrete else 2 * act_dim))
    policy = nn.Sequential(*layers).to(problem.obs.device)
    optim = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        rows = torch.randint(n, (batch_size,), device=problem.obs.device)
        out, act = policy(problem.obs[rows]), problem.act[rows]
        if discrete:
            loss = F.cross_entropy(out, act)
        else:
            mean, log_std = gaussian(out)
            loss = (0.5 * ((act - mean) / log_std.exp()) ** 2 + log_std).sum(-1).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
    return policy


def read_d4rl(path: Path) -> dict:
    """The COLUMNS of a D4RL-layout file. Without timeouts an episode ends where next_observations
    is not the next row."""
    with failing("a dataset needs `pip install h5py`", ImportError):
        import h5py

    keys = "observations actions rewards terminals next_observations timeouts".split()
    needed = keys[:4]
    with h5py.File(path) as f:
        if not {*needed} <= {*f}:
            fail(f"--dataset {path}: needs {', '.join(needed)}, holds {', '.join(sorted(f)[:9])}")
        if "episode_terminals" in f:  # d3rlpy 1.x, the ends of both kinds
            keys[-1] = "episode_terminals"
        found = {name: key for name, key in zip(COLUMNS, keys) if key in f}
        reserve(sum(4 * f[key].size for key in found.values()), "dataset", torch.device("cpu"))
        c = {name: f[key].astype(np.float32)[()] for name, key in found.items()}
        if f["actions"].dtype.kind in "iu":  # perhaps discrete
            c["act"] = f["actions"][()]
        for name in {"rew", "done", "cut"} & {*c}:
            c[name] = c[name].reshape(-1)  # rlkit's buffers have (N, 1)
        if keys[-1] == "episode_terminals" and "cut" in c:
            c["cut"] *= 1 - c["done"]
        if "cut" not in c:
            c["cut"] = np.zeros(len(c["rew"]))
            if "next_obs" in c:
                c["cut"][:-1] = (c["next_obs"][:-1] != c["obs"][1:]).any(1) & (c["done"][:-1] == 0)
            else:
                say(f"{path}: no 'timeouts', episodes are taken to end at terminals only")
        return {"next_obs": np.roll(c["obs"], -1, 0)} | c


def read_minari(folder: Path) -> dict:
    """The COLUMNS of a Minari set."""
    data, parts = open_minari(folder), {column: [] for column in COLUMNS}
    for episode in data.iterate_episodes():
        n, done = len(episode.rewards), episode.terminations
        obs = flat(data.observation_space, episode.observations, n + 1)
        act = episode.actions
        if isinstance(data.action_space, gym.spaces.Dict):
            act = flat(data.action_space, act, n)
        last = np.arange(n) == n - 1
        row = (obs[:-1], act, episode.rewards, done, obs[1:], last & ~done)
        for part, x in zip(parts.values(), row):
            part.append(x)
    return {column: np.concatenate(part or [[]]) for column, part in parts.items()}


# -------------------------------------------------------------------------------------- measuring
@torch.no_grad()
def diagnose(learner) -> list[dict]:
    """For each member, on at most 2,048 rows, in eval mode: the shared diagnostics; the regulariser
    R with the features, and (on 256 rows) with the gradients of all weights in their place; mean Q
    and its error: to the truth where that is known, else to the returns that followed, which a
    network can learn by heart, and to those of held-out episodes (not for q, which learns another
    policy's value)."""
    p, net, gamma = learner.problem, learner.net, learner.args.gamma
    n, device = len(learner.members), p.rew.device
    rows = torch.from_numpy(np.random.default_rng(0).permutation(len(p.rew))[:2048]).to(device)
    batch = p.batch(rows, torch.Generator(device).manual_seed(0))
    net.eval()
    y, next_act = backup(learner, Batch(*(x.expand(n, *x.shape) for x in batch)))
    x = torch.cat([p.obs[rows], p.act[rows]], -1).expand(n, -1, -1)
    x_next = torch.cat([p.next_obs[rows].expand(n, -1, -1), next_act], -1)
    hidden, phi_next = net.hidden(x), net.features(x_next)
    phi, q = hidden[-1], net.q(hidden[-1])
    full, full_dot = gradient_dots(net, x[:, :256], x_next[:, :256])
    q_held = net(torch.cat(p.held[:2], -1).expand(n, -1, -1)) if p.held else None
    greedy = p.greedy_returns(net) if p.greedy_returns else None
    net.train()
    bootstraps, found = 1 - p.done[rows], []
    for i, m in enumerate(learner.members):
        own, dot = (phi[i] ** 2).sum(-1), (phi[i] * phi_next[i]).sum(-1)
        numbers = {
            **spectrum(phi[i]),
            **alignment(phi[i], phi_next[i], bootstraps),
            "dormant": dormant([h[i] for h in hidden]),
            "q_mean": q[i].mean(),
            "td_error": relative_error(q[i], y[i]),
            "reg_sl": own.mean(),
            "reg_td": (own - gamma * bootstraps * dot).mean(),
            "reg_sl_full": full[i].mean(),
            "reg_td_full": (full[i] - gamma * bootstraps[:256] * full_dot[i]).mean(),
        }
        if p.truth:
            true = p.truth[m.target][rows]
            numbers.update(truth=true.mean(), q_error=relative_error(q[i], true))
            numbers["greedy_return"] = greedy[i]
        elif m.target != "q":
            true = p.mc[rows]
            numbers.update(truth=true.mean(), return_error=relative_error(q[i], true))
            if p.held:
                numbers["return_error_holdout"] = relative_error(q_held[i], p.held[2])
        found.append({name: float(x) for name, x in numbers.items()})
    return found


def relative_error(found, true):
    return (found - true).pow(2).mean() / true.var().clamp(min=1e-12)


def gradient_dots(net: Members, x, x_next):
    """grad Q(x).grad Q(x) and grad Q(x).grad Q(x'), by all weights and biases; (n, B) each.

    A layer s = W a + b has grad_W Q = g a^T and grad_b Q = g, g = dQ/ds. Two such have the dot
    product (a.a' + 1)(g.g'), so none is ever formed. In the last layer g = 1."""
    passes = []
    for inputs in (x, x_next):
        sums = []
        with torch.enable_grad():
            hidden = net.hidden(inputs, sums=sums)
            gradients = torch.autograd.grad(net.q(hidden[-1]).sum(), sums)
        one = torch.ones_like(inputs[..., :1])
        passes.append(list(zip([inputs, *hidden], [*gradients, one])))

    def dots(one, other):
        return sum(((a * b).sum(-1) + 1) * (g * h).sum(-1) for (a, g), (b, h) in zip(one, other))

    return dots(passes[0], passes[0]).detach(), dots(*passes).detach()


def collect_results(learner, history: dict) -> dict:
    """results[target][cure][metric]: `quarter` and `final`, means over seeds, and half the width of
    their 95 % intervals. history: step -> what diagnose() found."""
    results, total = {}, max(history)
    quarter = min(history, key=lambda step: abs(step - total / 4))
    for m in learner.members:
        mine = learner.chosen(target=m.target, label=m.label)
        entries = results.setdefault(m.target, {}).setdefault(m.label, {})
        for metric in history[total][mine[0]]:
            entry = entries[metric] = {}
            for when, step in (("quarter", quarter), ("final", total)):
                values = np.array([history[step][i][metric] for i in mine])
                entry[when], entry[when + "_interval"] = values.mean(), interval(values)
    return results


def interval(values) -> float:
    """Half the width of the 95 % interval of a mean, by Student's t; 0 for a single value."""
    t = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, n = 2 to 10
    n = len(values)
    if n < 2:
        return 0.0
    quantile = t[n - 2] if n <= 10 else 1.96 + 2.6 / (n - 1)
    return quantile * values.std(ddof=1) / n**0.5


# --------------------------------------------------------------------------------------- training
def train(args: Args) -> dict:
    """Train as `args` says; returns what summary.json holds."""
    check(args)
    if args.problem != "continuous":
        args = replace(args, env_id=args.problem)  # names the run's folder
    if args.gamma is None and args.problem != "dataset":
        args = replace(args, gamma=0.99)
    device = set_up(args)
    with Run(args, args.num_updates) as run:
        make = {"continuous": continuous, "gridworld": gridworld, "dataset": dataset}
        problem = make[args.problem](args, device)
        columns = [x.cpu().numpy().tobytes() for x in (*problem[:7], *(problem.held or ()))]
        digest = hashlib.sha256(b"".join(columns)).hexdigest()
        learner = Learner(problem, args, device)
        names = [f"{m.target}/{m.label}/{m.seed}" for m in learner.members]
        step, history = 0, {}  # of measurements, by their steps
        if run.saved:
            if run.saved["info"]["data_sha256"] != digest:
                fail(f"--resume {args.resume}: that run was trained on other data")
            step, history = run.saved["step"], run.saved["history"]
            run.restore(learner, {"adam": learner.optim})
            with suppress(RuntimeError):  # those of another device do not fit: batches start anew
                for draw, state in zip(learner.draws, run.saved["draws"]):
                    draw.set_state(state)
        info = {"transitions": len(problem.rew), "members": len(learner.members)}
        run.open(**info, data_sha256=digest)
        say(f"{len(problem.rew):,} transitions, {len(learner.members)} networks")

        def save():
            draws = [draw.get_state() for draw in learner.draws]
            run.save(step, learner, {"adam": learner.optim}, history=history, draws=draws)

        def measure():
            with run.paused():
                history[step] = diagnose(learner)
            for name, numbers in zip(names, history[step]):
                run.log(step, {f"diagnostics/{name}/{k}": x for k, x in numbers.items()})

        moments = (args.num_updates // 4, args.num_updates // 2)
        while step < args.num_updates and not run.signum:
            step += 1
            error = learner.update()
            if every(args.log_frequency, step - 1, step):
                run.log(step, {f"losses/{name}": x for name, x in zip(names, error)})
                run.log(step, {"charts/updates_per_second": run.rate(step)})
                run.show(step, loss=error.mean())
            if every(args.diagnostics_frequency, step - 1, step) or step in moments:
                measure()
            if every(args.checkpoint_frequency, step - 1, step):
                save()
        if step not in history and not run.signum:
            measure()
        save()
        run.stop_if_asked()
        summary = {"num_updates": step, "updates_per_second": run.rate(step)}
        summary = run.finish(summary | {"results": collect_results(learner, history)})
    report(run.dir)
    return summary


def report(folder: Path):
    """Claims, table and figure by tools/report.py, where that lies beside this script."""
    tool, figure = Path(__file__).parent / "tools" / "report.py", folder / "figure.png"
    words = [str(folder), "--figure", str(figure)]
    if tool.exists():
        subprocess.run([sys.executable, str(tool), *words])
    else:
        command = shlex.join(["python", "tools/report.py", *words])
        say(f"which of the claims hold, a table and a figure:\n  {command}")


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
