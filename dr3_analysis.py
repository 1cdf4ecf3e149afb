r"""What bootstrapping does to deep Q-functions, and what helps: one network, the same batches, other targets.

Supervised learning and Q-learning fit the same network by the same optimiser; the target differs. Here it
differs in one thing at a time, and the features phi(s,a), which the last linear layer reads, tell the story:

  mc      y = the return that followed                        supervised
  oracle  y = Q(s,a) by dynamic programming                   supervised, without noise (gridworld)
  sarsa   y = r + gamma Q'(s', a'),  a' the data's next       bootstrapped, on pairs that are trained on
  td      y = r + gamma Q'(s', a'),  a' ~ behaviour, fresh    bootstrapped, on pairs that may never be so
  td10    y = r + gamma mean of ten such Q'                   the same, a tenth of a single draw's variance
  q       y = r + gamma max of Q'(s', a), ten uniform a       control (gridworld: all a)
  moving  y of another seed's td network                      a moving target, but not by its own doing

with Q' the target network; where s' is terminal, Q' and phi(s',a') count as 0. Claims (arXiv 2010.14498,
arXiv 2112.04716): with bootstrapping on unseen actions the rank of phi falls below that of sarsa, and the
dot products phi(s,a).phi(s',a') rise, even when Q has settled. Why: the noise of gradient descent acts like a
regulariser of the features. In supervised learning it adds sum phi.phi, which keeps them small; with
bootstrapping it adds

  R(phi) = sum [ phi(s,a).phi(s,a) - gamma phi(s,a).phi(s',a') ]

whose second term rewards features that are alike on both sides of the backup (logged as means over rows:
reg_td, its first term alone reg_sl; reg_td_full, reg_sl_full: with grad Q by all weights in place of phi).
DR3 cancels that term: loss + c mean phi(s,a).phi(s',a').

Cures, each a run of its own on --cure-target, c the weight of a term in the loss:

  dr3:c dr3abs:c dr3stop:c   DR3 signed, absolute, or without gradient through phi(s',a')
  sl:c  rank:c               mean phi.phi; s_max^2 - s_min^2 of the batch's features (arXiv 2010.14498)
  unit  layer  dropout:p     phi / |phi|; layer norm before each ReLU; dropout after it
  tau:t  l2:c  refit:k       target rate; |weights|^2 without biases; a new network every k updates, fitted to
                             the last one

  symbol        in the code          shape
  Q(s,a)        net.q(phi)           (n, B), n members: targets and cures x seeds
  phi(s,a)      phi                  (n, B, width)
  y             targets()            (n, B)

Where to read: Members, Learner.targets and Learner.loss are the algorithm; diagnose and claims look at it;
train() is the loop. The blocks marked `shared`, which sibling scripts have too, can be skipped at first.

Quick, six minutes on two cores; then the same in small steps, and many targets and cures:
  python dr3_analysis.py
  python dr3_analysis.py --num-updates 100_000 --transitions 2_000 --batch-size 256 \
      --learning-rate 3e-4 --tau 0.005
  python dr3_analysis.py --seeds 5 --targets mc sarsa td td10 q moving \
      --cures dr3:1e-5 dr3:1e-4 dr3:1e-3 unit layer

Errors to the truth, on a gridworld; your own data:
  python dr3_analysis.py --problem gridworld --targets mc oracle sarsa td q
  python dr3_analysis.py --problem dataset --dataset replay.hdf5

All members train together as one batched network. A small dataset is learned by heart, the noise of its
returns included, so errors are compared on held-out episodes. The run ends with a figure, a table, and a
list that says which claims hold in how many of its seeds and by what numbers, also where an effect is absent.

Known limits: observation vectors; the rank needs more transitions than --width. Left out on purpose: pixels.
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
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
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
    """the first of --seeds seeds, and the one of the data"""
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
    run_dir: str = "runs"
    """folder that holds the run folders"""
    resume: str | None = None
    """run folder or checkpoint to go on from; `auto`: the newest one with these arguments, if any"""
    checkpoint_frequency: int = 5_000
    """updates between checkpoints (0: only at the end)"""
    diagnostics_frequency: int = 1_000
    """updates between measurements of all members (0: only after a quarter, a half, and at the end)"""
    precision: Literal["fp32", "tf32"] = "fp32"
    """tf32: matrix products on a GPU, never in the measurements"""

    # --- what is compared
    problem: Literal["continuous", "gridworld", "dataset"] = "continuous"
    """an environment under a uniform policy; a gridworld solved exactly; a D4RL-layout file"""
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "HalfCheetah-v5"
    """environment of --problem continuous (the other problems are filed under their own name)"""
    dataset: str | None = None
    """D4RL-layout HDF5 file of --problem dataset"""
    transitions: int = 1_000
    """size of the data (of --problem dataset its first rows, 0: all)"""
    grid: int = 8
    """side of the gridworld"""
    targets: tuple[Literal["mc", "oracle", "sarsa", "td", "td10", "q", "moving"], ...] = ("mc", "sarsa", "td")
    """which targets"""
    cures: tuple[str, ...] = ("dr3:3e-5",)
    """cures on --cure-target, each a run of its own"""
    cure_target: Literal["mc", "sarsa", "td", "td10", "q"] = "td"
    """the target that the cures are tried on"""
    seeds: int = 3
    """networks of each kind; those of one seed share initial weights and batches"""

    # --- training
    num_updates: int = 15_000
    """gradient steps"""
    batch_size: int = 128
    """B, transitions in a minibatch"""
    learning_rate: float = 1e-3
    """learning rate of Adam"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.05
    """Polyak rate of the target networks"""
    width: int = 256
    """units in a hidden layer"""
    depth: int = 2
    """hidden layers"""


LIMITS = {"gamma": (0, 0.99999), "tau": (1e-9, 1), "grid": (3, 32), "depth": (1, 64)}  # least, most
LIMITS |= {"learning_rate": (1e-12, 1e12), "seed": (0, 1e9), "transitions": (0, 1e7)}
LIMITS |= dict.fromkeys(["seeds", "width", "batch_size", "num_updates"], (1, 1e9))
NUMBERED = ("dr3", "dr3abs", "dr3stop", "sl", "rank", "dropout", "tau", "l2", "refit")
CURES = dict.fromkeys(NUMBERED, 1) | {"unit": 0, "layer": 0}  # how many numbers each takes


def check(args: Args):
    """Refuse values and combinations that make no sense or would be ignored, before anything starts."""
    check_limits(args, LIMITS)
    only_if(args, args.problem == "dataset", f"with --problem {args.problem}", "dataset")
    only_if(args, args.problem == "gridworld", f"with --problem {args.problem}", "grid")
    if args.env_id != args.problem:  # train() sets it to that, and the command to go on passes it back
        only_if(args, args.problem == "continuous", f"with --problem {args.problem}", "env_id")
    only_if(args, args.cures, "without --cures", "cure_target")
    only_if(args, {*args.targets} - {"mc", "oracle"}, "without a target that bootstraps", "tau")
    only_if(args, args.track, "without --track", "wandb_project_name", "wandb_entity")
    if args.problem == "dataset" and args.dataset is None:
        fail("--problem dataset needs --dataset FILE")
    if args.transitions < 32 and (args.transitions or args.problem != "dataset"):
        fail(f"--transitions {args.transitions}: expected 32 or more")
    if "oracle" in args.targets and args.problem != "gridworld":
        fail("--targets oracle: only the gridworld has one")
    if "moving" in args.targets and "td" not in args.targets:
        fail("--targets moving needs td, whose target it takes")
    if "moving" in args.targets and args.seeds < 2:
        fail("--targets moving needs --seeds 2 or more: it takes the target of another seed's td")
    twice = any(len(set(x)) < len(x) for x in (args.targets, args.cures))
    if twice or not args.targets:
        fail("--targets and --cures: expected different ones, and at least one target")
    for cure in args.cures:
        parse(cure)
        if cure.startswith("none"):
            fail(f"--cures {cure}: the target without a cure is always there")
    if args.cures and args.cure_target not in args.targets:
        fail(f"--cure-target {args.cure_target}: not among --targets, nothing to compare the cures with")


def parse(cure: str) -> tuple[str, float]:
    """`dr3:1e-4` as ("dr3", 1e-4); "none" as ("none", 0)."""
    name, _, number = cure.partition(":")
    try:
        value = float(number) if number else 0.0
    except ValueError:
        value = math.nan
    if name != "none" and (name not in CURES or bool(number) != CURES[name] or not 0 <= value < math.inf):
        fail(f"--cures {cure}: expected one of {', '.join(k + ':NUMBER' * v for k, v in CURES.items())}")
    if name == "refit" and (value < 1 or value % 1):
        fail(f"--cures {cure}: expected a whole number of updates")
    most = {"dropout": 0.99, "tau": 1}.get(name)
    if most and not 0 < value <= most:
        fail(f"--cures {cure}: expected 0 < NUMBER <= {most}")
    return name, value


# -------------------------------------------------------------------------------------------- problems
class Problem(NamedTuple):
    """Transitions of a known (or cloned) behaviour policy, N rows; actions as the network sees them."""

    obs: torch.Tensor  # (N, obs), standardised
    act: torch.Tensor  # (N, act)
    rew: torch.Tensor  # (N,), divided by the largest absolute one
    done: torch.Tensor  # (N,)
    next_obs: torch.Tensor  # (N, obs)
    next_act: torch.Tensor  # (N, act), the data's own next action
    mc: torch.Tensor  # (N,), the discounted return that followed, whole
    fresh: Callable  # (next_obs rows, m, generator) -> actions of the behaviour policy, (rows, m, act)
    choices: Callable  # the same for the maximum: uniform samples, or all actions
    truth: dict  # target -> Q at the rows, by dynamic programming; {} where unknown
    greedy_return: Callable | None  # Q of all (state, action) pairs -> expected return of its greedy policy
    all_pairs: tuple | None  # (obs, act) of all pairs, for greedy_return
    held: tuple | None = None  # (obs, act, mc) of episodes that are not trained on


def discounted_sums(rew, over, gamma: float):
    """The discounted sum of rewards to the end of each row's episode (or of the array)."""
    out, total = np.zeros(len(rew)), 0.0
    for i in reversed(range(len(rew))):
        total = rew[i] + gamma * (0.0 if over[i] else total)
        out[i] = total
    return out


def continuous(args: Args, device) -> Problem:
    """--transitions steps of a uniform policy, then 8,000 that are held out; a tail after each 1,000 makes
    their returns whole to 1 %."""
    tail, episode = math.ceil(math.log(0.01) / math.log(max(args.gamma, 1e-9))) + 1, 1000
    try:
        env = gym.make(args.env_id, max_episode_steps=episode + tail)
    except Exception as e:
        fail(f"--env-id {args.env_id}: {type(e).__name__}: {first_line(e)}")
    box = env.action_space
    bounded = isinstance(box, gym.spaces.Box) and box.is_bounded()
    if not bounded or len(box.shape) != 1 or len(env.observation_space.shape or ()) != 1:
        found = f"{env.observation_space} and {box}"
        fail(f"--env-id {args.env_id}: found {found}, expected vectors and a bounded Box".replace("\n", " "))
    rng, wanted, rows = np.random.default_rng(args.seed), {"keep": args.transitions, "held": 8_000}, 0
    columns = {x: [] for x in ("obs", "act", "rew", "done", "next", "use")}
    while use := next((k for k in wanted if wanted[k] > 0), ""):  # of the rows of this episode
        obs, _ = env.reset(seed=args.seed + rows)
        for t in range(episode + tail):
            act = rng.uniform(-1, 1, box.shape)
            next_obs, rew, terminated, truncated, _ = env.step(box.low + (act + 1) / 2 * (box.high - box.low))
            used = t < episode and wanted[use] > 0  # the tail is played and not used
            wanted[use], rows = wanted[use] - used, rows + used
            for name, x in zip(columns, (obs, act, rew, terminated, next_obs, use if used else "")):
                columns[name].append(x)
            obs = next_obs
            if terminated or truncated:
                break
        if not terminated and t + 1 < episode + tail:
            fail(f"--env-id {args.env_id}: has a time limit of its own, after {t + 1} steps")
    use = np.array(columns.pop("use"))
    c = {name: np.array(x, np.float32) for name, x in columns.items()}
    over = (c["done"] > 0) | np.append((c["next"][:-1] != c["obs"][1:]).any(1), True)
    uniform = lambda s, m, g: torch.rand(len(s), m, *box.shape, generator=g, device=device) * 2 - 1
    keep, held = use == "keep", use == "held"
    return from_columns(c, over, keep, held, uniform, uniform, args, device)


def from_columns(c, over, keep, held, fresh, choices, args: Args, device) -> Problem:
    """`keep`, `held` (rows): which are trained on, and which, thinned to 2,048 at most, are held out."""
    rew = c["rew"] / np.abs(c["rew"][keep]).max().clip(1e-30)
    mc = discounted_sums(rew, over, args.gamma)
    mean, std = c["obs"][keep].mean(0), c["obs"][keep].std(0) + 1e-3
    next_act = np.roll(c["act"], -1, 0)
    arrays = ((c["obs"] - mean) / std, c["act"], rew, c["done"], (c["next"] - mean) / std, next_act, mc)
    take = lambda x, rows: torch.from_numpy(np.ascontiguousarray(x[rows], np.float32)).to(device)
    problem = Problem(*(take(x, keep) for x in arrays), fresh, choices, {}, None, None)
    held = np.flatnonzero(held)[:: math.ceil(held.sum() / 2048) or 1]  # neighbours are alike
    return problem._replace(held=[take(arrays[i], held) for i in (0, 1, 6)]) if len(held) else problem


def dataset(args: Args, device) -> Problem:
    """A D4RL-layout file; rows without a whole return or next action left out; the behaviour is cloned. Of
    the episodes after those that --transitions takes, 8,000 rows are held out.

    Without `timeouts` an episode also ends where next_observations is not the next row."""
    h5py, path = need("h5py"), args.dataset
    try:
        with h5py.File(path) as f:
            names = {"obs": "observations", "act": "actions", "rew": "rewards", "done": "terminals"}
            c = {k: np.asarray(f[v], np.float32) for k, v in names.items()}
            found = set(f)
            timeout = np.asarray(f["timeouts"]) > 0 if "timeouts" in f else np.zeros(c["rew"].shape, bool)
            c["next"] = np.asarray(f["next_observations"], np.float32) if "next_observations" in f else None
    except (OSError, KeyError, ValueError, TypeError) as e:
        fail(f"--dataset {path}: {first_line(e)}; expected a D4RL-layout HDF5 file")
    n = c["rew"].size
    infer = "timeouts" not in found and c["next"] is not None
    if c["next"] is None:
        c["next"] = np.roll(c["obs"], -1, 0)
    shapes = {k: x.shape for k, x in (c | {"timeouts": timeout}).items()}
    rows = {k: s[:1] if k in ("obs", "act", "next") else s for k, s in shapes.items()}
    vectors = c["obs"].ndim == c["act"].ndim == 2 and shapes["next"] == shapes["obs"]
    if not vectors or {*rows.values()} != {(n,)}:
        fail(f"--dataset {path}: shapes {shapes}, expected rows of vectors, one number a row of the others")
    for k, x in c.items():
        if len(bad := np.argwhere(~np.isfinite(x))):
            key, row = names.get(k, "next_observations"), bad[0][0]
            fail(f"--dataset {path}: '{key}' is {x[tuple(bad[0])]} at row {row}, expected finite numbers")
    if infer:
        timeout[:-1] = (c["next"][:-1] != c["obs"][1:]).any(1)
    elif "timeouts" not in found:
        print(f"{path}: no 'timeouts', episodes are taken to end at terminals only")
    over = (c["done"] > 0) | timeout
    over[-1] = True
    left = discounted_sums(np.ones(n), over, 1.0)  # rows to the end of the episode, itself included
    ends = np.flatnonzero(over)[np.searchsorted(np.flatnonzero(over), np.arange(n))]
    whole = (c["done"][ends] > 0) | (args.gamma**left < 0.01)
    usable = whole & (~over | (c["done"] > 0))
    keep = usable & (np.cumsum(usable) <= (args.transitions or n))
    if keep.sum() < 32:
        fail(f"--dataset {path}: {keep.sum()} rows with a whole return and next action, expected 32 or more")
    episode = np.cumsum(over) - over
    held = usable & (episode > episode[keep].max())
    held &= np.cumsum(held) <= 8_000
    if held.sum() < 32:
        held[:] = False
        print(f"{path}: no episodes are left to be held out, nothing is said of errors")
    problem = from_columns(c, over, keep, held, None, None, args, device)
    low, high = problem.act.amin(0), problem.act.amax(0)
    actor = clone(problem, args, device)

    def fresh(s, m, g):
        mean, log_std = actor(s).detach().chunk(2, -1)
        noise = torch.randn(len(s), m, mean.shape[-1], generator=g, device=device)
        return (mean[:, None] + log_std.clamp(-5, 2).exp()[:, None] * noise).clamp(low, high)

    choices = lambda s, m, g: low + torch.rand(len(s), m, len(low), generator=g, device=device) * (high - low)
    return problem._replace(fresh=fresh, choices=choices)


def clone(problem: Problem, args: Args, device, steps: int = 3_000):
    """A Gaussian policy by maximum likelihood, for fresh actions of td."""
    o, a = problem.obs.shape[1], problem.act.shape[1]
    actor = nn.Sequential(
        nn.Linear(o, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2 * a)
    ).to(device)
    optim = torch.optim.Adam(actor.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        rows = torch.randint(len(problem.rew), (args.batch_size,), device=device)
        mean, log_std = actor(problem.obs[rows]).chunk(2, -1)
        log_std = log_std.clamp(-5, 2)
        loss = (0.5 * ((problem.act[rows] - mean) / log_std.exp()) ** 2 + log_std).sum(-1).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
    return actor


def grid_model(k: int):
    """P (S, 4, S), r (S, 4), absorbing goal S - 1: four moves, one in ten slips to a random one; a step costs
    0.1, the far corner pays 1."""
    S, moves = k * k, ((0, 1), (0, -1), (1, 0), (-1, 0))
    step = np.zeros((S, 4, S))
    for s in range(S):
        for a, (dx, dy) in enumerate(moves):
            x, y = min(max(s // k + dx, 0), k - 1), min(max(s % k + dy, 0), k - 1)
            step[s, a, x * k + y] = 1
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
    Q = np.zeros_like(r)
    while True:
        new = r + gamma * P @ Q.max(1)
        if np.abs(new - Q).max() < 1e-12:
            return new
        Q = new


def gridworld(args: Args, device) -> Problem:
    """--transitions steps of a uniform policy on the grid; states are seen as 16 random numbers each."""
    P, r = grid_model(args.grid)
    S, rng = len(P), np.random.default_rng(args.seed)
    uniform = np.full((S, 4), 0.25)
    features = rng.normal(size=(S, 16)).astype(np.float32)
    s, rows = 0, []
    for _ in range(args.transitions):
        a = rng.integers(4)
        t = rng.choice(S, p=P[s, a])
        rows.append((s, a, -0.1 + 1.1 * (t == S - 1), t == S - 1, t))
        s = t if t != S - 1 else int(rng.integers(S - 1))
    state, act, rew, done, after = (np.array(x) for x in zip(*rows))
    one_hot = np.eye(4, dtype=np.float32)
    c = {"obs": features[state], "act": one_hot[act], "next": features[after], "rew": rew}
    c["done"] = done.astype(np.float32)
    keep = np.arange(len(state)) <= np.flatnonzero(done)[-1] if done.any() else np.zeros(len(state), bool)
    if not keep.any():
        fail(f"--transitions {args.transitions}: no episode reached the goal, take more or a smaller --grid")
    scale = np.abs(rew[keep]).max()
    fresh = lambda s, m, g: F.one_hot(torch.randint(4, (len(s), m), generator=g, device=device), 4).float()
    every = lambda s, m, g: torch.eye(4, device=device).expand(len(s), 4, 4)
    problem = from_columns(c, done > 0, keep, np.zeros_like(keep), fresh, every, args, device)
    beta, best = evaluate_policy(P, r, uniform, args.gamma) / scale, optimal_q(P, r, args.gamma) / scale
    at = lambda Q: torch.from_numpy(Q[state, act][keep].astype(np.float32)).to(device)
    truth = dict.fromkeys(("mc", "oracle", "sarsa", "td", "td10", "moving"), at(beta)) | {"q": at(best)}

    def greedy_return(Q):
        policy = np.eye(4)[Q.argmax(1)]
        return float((policy * evaluate_policy(P, r, policy, args.gamma)).sum(1)[: S - 1].mean())

    seen = torch.from_numpy(features).to(device) - torch.from_numpy(features[state][keep].mean(0)).to(device)
    seen = seen / (torch.from_numpy(features[state][keep].std(0)).to(device) + 1e-3)
    all_pairs = (seen.repeat_interleave(4, 0), torch.eye(4, device=device).repeat(S, 1))
    return problem._replace(truth=truth, greedy_return=greedy_return, all_pairs=all_pairs)


# ------------------------------------------------------------------- networks: all members as one batch
class Members(nn.Module):
    """n Q-networks of one shape, weights stacked (n, in, out): one batched product a layer serves all.

    Members of a seed start from the same weights. unit, layer, dropout (n, 1, 1) say who has which.
    """

    def __init__(self, inputs: int, members: list, args: Args):
        super().__init__()
        sizes = [inputs] + [args.width] * args.depth + [1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
            draws = {}
            for seed in sorted({m.seed for m in members}):
                g = torch.Generator().manual_seed(1_000 * seed + i)
                u = torch.rand(fan_in + 1, fan_out, generator=g) * 2 - 1
                draws[seed] = u * fan_in**-0.5  # nn.Linear's scale
            stacked = torch.stack([draws[m.seed] for m in members])
            self.weights.append(nn.Parameter(stacked[:, :-1].clone()))
            self.biases.append(nn.Parameter(stacked[:, -1:].clone()))
        for name in ("unit", "layer", "dropout"):
            values = [(m.value or 1.0) if m.cure == name else 0.0 for m in members]
            self.register_buffer(name, torch.tensor(values)[:, None, None])
        self.switches = {name: bool((getattr(self, name) > 0).any()) for name in ("unit", "layer", "dropout")}

    def features(self, x, who=slice(None), hidden: bool = False, record: list | None = None):
        """phi, (k, B, width), of inputs (k, B, in) for these k members; `hidden`: of all hidden layers.
        `record` receives each layer's input and sum, (k, B, in) and (k, B, width)."""
        out = []
        for W, b in zip(self.weights[:-1], self.biases[:-1]):
            a, x = x, torch.baddbmm(b[who], x, W[who])
            if record is not None:
                record.append((a, x))
            if self.switches["layer"]:
                x = torch.where(self.layer[who] > 0, F.layer_norm(x, x.shape[-1:]), x)
            x = F.relu(x)
            if self.switches["dropout"] and self.training:
                p = self.dropout[who]
                x = x * (torch.rand_like(x) >= p) / (1 - p)
            out.append(x)
        if self.switches["unit"]:
            x = torch.where(self.unit[who] > 0, F.normalize(x, dim=-1), x)
        return (*out[:-1], x) if hidden else x

    def q(self, phi, who=slice(None)):
        """(k, B)"""
        return torch.baddbmm(self.biases[-1][who], phi, self.weights[-1][who])[..., 0]

    def forward(self, x, who=slice(None)):
        return self.q(self.features(x, who), who)


def gradient_dots(net: Members, x, x_next):
    """grad Q(x).grad Q(x) and grad Q(x).grad Q(x'), gradients by all weights and biases: (n, B) each.

    A layer s = W a + b has grad_W Q = g a^T and grad_b Q = g, g = dQ/ds. Two such have the dot product
    (a.a' + 1)(g.g'), so none is ever formed. In the last layer g = 1: there it is phi.phi' + 1.
    """
    passes = []
    for inputs in (x, x_next):
        record = []
        with torch.enable_grad():
            phi = net.features(inputs, record=record)
            gradients = torch.autograd.grad(net.q(phi).sum(), [s for _, s in record])
        layers = [(a, g) for (a, _), g in zip(record, gradients)]
        passes.append([*layers, (phi, torch.ones_like(phi[..., :1]))])
    dots = lambda one, other: sum(
        ((a * b).sum(-1) + 1) * (g * h).sum(-1) for (a, g), (b, h) in zip(one, other)
    )
    return dots(passes[0], passes[0]).detach(), dots(*passes).detach()


class Member(NamedTuple):
    target: str
    cure: str
    value: float
    label: str  # the cure as it was written
    seed: int


def all_members(args: Args) -> list[Member]:
    kinds = [(t, "none") for t in args.targets] + [(args.cure_target, c) for c in args.cures]
    seeds = range(args.seed, args.seed + args.seeds)
    return [Member(t, *parse(c), c, s) for t, c in kinds for s in seeds]


def adam_scale(step: int) -> float:
    """Adam's correction for moments that started at 0, `step` steps ago. One Adam serves all members and
    counts the run's steps; a refitted member's steps are rescaled to its own age."""
    return (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)


class Learner(nn.Module):
    """All members, their target networks, and one optimiser for all (Adam acts on each number by itself)."""

    def __init__(self, problem: Problem, args: Args, device):
        super().__init__()
        self.args, self.problem, self.members = args, problem, all_members(args)
        self.net = Members(problem.obs.shape[1] + problem.act.shape[1], self.members, args)
        self.target = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.to(device)
        self.optim = torch.optim.Adam(self.net.parameters(), lr=args.learning_rate, fused=True)
        taus = [m.value if m.cure == "tau" else 0.0 if m.cure == "refit" else args.tau for m in self.members]
        self.register_buffer("taus", torch.tensor(taus, device=device)[:, None, None])
        self.draw = {m.seed: torch.Generator(device).manual_seed(m.seed) for m in self.members}
        self.seeds = torch.tensor([m.seed - args.seed for m in self.members], device=device)

    def chosen(self, **wanted) -> list[int]:
        """Positions of the members with these attributes."""
        return [i for i, m in enumerate(self.members) if all(getattr(m, k) == v for k, v in wanted.items())]

    def batch(self):
        """Rows (n, B) and ten fresh and ten candidate actions (n, B, 10, act) for the target: those of a
        member's seed, so that members differ in nothing but their target and cure."""
        p, args, out = self.problem, self.args, []
        for g in self.draw.values():
            rows = torch.randint(len(p.rew), (args.batch_size,), generator=g, device=p.rew.device)
            fresh, choices = (f(p.next_obs[rows], 10, g) for f in (p.fresh, p.choices))
            out.append((rows, fresh, choices))
        return [torch.stack(x)[self.seeds] for x in zip(*out)]

    def next_actions(self, rows, fresh, choices, kind: str, who: list):
        """The a' of a target, (k, B, m, act)."""
        if kind in ("td", "moving"):
            return fresh[who][:, :, :1]
        if kind in ("td10", "q"):
            return (fresh if kind == "td10" else choices)[who]
        assert kind in ("sarsa", "mc", "oracle"), kind  # the last two for DR3 and the diagnostics
        return self.problem.next_act[rows[who]][:, :, None]

    @torch.no_grad()
    def targets(self, rows, fresh, choices):
        """y (n, B), and the action of each target, (n, B, act); of td10 the first of its ten."""
        p, y = self.problem, torch.empty(rows.shape, device=rows.device)
        target_act = torch.empty(*rows.shape, p.act.shape[1], device=rows.device)
        for kind in self.args.targets:
            who = self.chosen(target=kind)
            act = self.next_actions(rows, fresh, choices, kind, who)  # (k, B, m, act)
            target_act[who] = act[:, :, 0]
            if kind in ("mc", "oracle"):
                y[who] = (p.mc if kind == "mc" else p.truth["oracle"])[rows[who]]
                continue
            sources = who
            if kind == "moving":  # the next seed's td; its own seed's would make it td over again
                sources = self.chosen(target="td", cure="none")
                sources = sources[1:] + sources[:1]
            k, B, m, _ = act.shape
            obs = p.next_obs[rows[who]][:, :, None].expand(-1, -1, m, -1)
            q = self.target(torch.cat([obs, act], -1).flatten(1, 2), sources).view(k, B, m)
            if kind == "q":
                target_act[who] = act.take_along_dim(q.argmax(-1)[..., None, None], 2)[:, :, 0]
            value = q.amax(-1) if kind == "q" else q.mean(-1)
            rows_of = rows[who]
            y[who] = p.rew[rows_of] + self.args.gamma * (1 - p.done[rows_of]) * value
        return y, target_act

    def loss(self, rows, fresh, choices):
        """Mean squared error of each member, (n,), and its regulariser, (n,), already weighted."""
        p, net = self.problem, self.net
        y, next_act = self.targets(rows, fresh, choices)
        phi = net.features(torch.cat([p.obs[rows], p.act[rows]], -1))
        error = ((net.q(phi) - y) ** 2).mean(1)
        penalty = torch.zeros_like(error)
        for cure in {m.cure for m in self.members} & {"dr3", "dr3abs", "dr3stop", "sl", "rank", "l2"}:
            who = self.chosen(cure=cure)
            weight = torch.tensor([self.members[i].value for i in who], device=error.device)
            if cure.startswith("dr3"):
                x = torch.cat([p.next_obs[rows[who]], next_act[who]], -1)
                phi_next = net.features(x, who)
                phi_next = phi_next.detach() if cure == "dr3stop" else phi_next
                dot = (phi[who] * phi_next).sum(-1) * (1 - p.done[rows[who]])
                value = (dot.abs() if cure == "dr3abs" else dot).mean(1)
            elif cure == "sl":
                value = (phi[who] ** 2).sum(-1).mean(1)
            elif cure == "rank":  # squared singular values (arXiv 2010.14498), from the smaller Gram matrix
                Phi = phi[who] if phi.shape[1] > phi.shape[2] else phi[who].mT
                eigenvalues = torch.linalg.eigvalsh((Phi.mT @ Phi).nan_to_num(0, 0, 0))  # it raises on NaN
                value = eigenvalues[:, -1] - eigenvalues[:, 0]
            elif cure == "l2":
                value = sum((W[who] ** 2).sum((1, 2)) for W in net.weights)
            penalty = penalty.index_add(0, torch.tensor(who, device=error.device), weight * value)
        return error, penalty

    def update(self, step: int) -> dict:
        """One step of every member; `step` counts from 1."""
        error, penalty = self.loss(*self.batch())
        self.optim.zero_grad()
        (error + penalty).sum().backward()
        refits = self.chosen(cure="refit")
        before = [p[refits].detach() for p in self.net.parameters()]
        self.optim.step()
        with torch.no_grad():
            for p, p_target in zip(self.net.parameters(), self.target.parameters()):
                p_target.lerp_(p, self.taus)
            for j, i in enumerate(refits):
                k = int(self.members[i].value)
                age = (step - 1) % k + 1  # Adam counts from this network's first step, not the run's
                share = adam_scale(age) / adam_scale(step)
                for p, old in zip(self.net.parameters(), before):
                    p[i] = old[j] + share * (p[i] - old[j])
                if age == k:
                    self.refit(i)
        return {"loss": error.detach()}

    def refit(self, i: int):
        """Fitted Q-iteration: the target becomes what was fitted, fitting starts from the first weights."""
        initial = Members(self.net.weights[0].shape[1], [self.members[i]], self.args).to(self.taus.device)
        for p, p_target, start in zip(self.net.parameters(), self.target.parameters(), initial.parameters()):
            p_target[i] = p[i]
            p[i] = start[0]
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optim.state[p][moment][i] = 0

    def checkpoint(self) -> dict:
        draws = {seed: g.get_state() for seed, g in self.draw.items()}
        return {"networks": self.state_dict(), "optim": self.optim.state_dict(), "draws": draws}

    def restore(self, saved: dict):
        self.load_state_dict(saved["networks"])
        load_optimizer(self.optim, saved["optim"])
        for seed, g in self.draw.items():
            if len(saved["draws"][seed]) != len(g.get_state()):
                fail(f"--resume: that run was not on {self.taus.device.type}, its random numbers differ")
            g.set_state(saved["draws"][seed])


# ------------------------------------------------------------------------------------------ measuring
def diagnose(learner: Learner, args: Args, step: int) -> list[dict]:
    """For each member, on at most 2,048 rows, in fp32 and eval mode: the shared diagnostics, the regulariser
    with the features and (on 256 rows) with the gradients of all weights in place of phi, mean Q, and its
    error: q_error to the truth where that is known; else return_error to the single returns that followed
    the trained rows, which a network can learn by heart, and return_error_holdout to those of episodes that
    it was not trained on (not for q, which is after another policy's)."""
    p, net = learner.problem, learner.net
    rows = torch.from_numpy(np.random.default_rng(0).permutation(len(p.rew))[:2048]).to(p.rew.device)
    rows, g = rows.expand(len(learner.members), -1), torch.Generator(p.rew.device).manual_seed(0)
    drawn = (f(p.next_obs[rows[0]], 10, g) for f in (p.fresh, p.choices))
    fresh, choices = (x.expand(len(rows), -1, -1, -1) for x in drawn)
    error = lambda found, true: (found - true).pow(2).mean() / true.var().clamp(min=1e-12)
    out = []
    net.eval()
    with strict_fp32():
        y, next_act = learner.targets(rows, fresh, choices)
        x, x_next = torch.cat([p.obs[rows], p.act[rows]], -1), torch.cat([p.next_obs[rows], next_act], -1)
        hidden, phi_next = net.features(x, hidden=True), net.features(x_next)
        q, bootstraps = net.q(hidden[-1]), 1 - p.done[rows[0]]
        check_finite(step, {"Q": q, "phi": hidden[-1], "phi'": phi_next, "the target": y})  # svdvals raises
        full_own, full_next = gradient_dots(net, x[:, :256], x_next[:, :256])
        pairs = p.all_pairs and torch.cat(p.all_pairs, -1).expand(len(rows), -1, -1)
        q_table = net(pairs) if pairs is not None else None
        if p.held:
            q_held = net(torch.cat(p.held[:2], -1).expand(len(rows), -1, -1))
        for i, m in enumerate(learner.members):
            phi = hidden[-1][i]
            one = spectrum(phi) | alignment(phi, phi_next[i], bootstraps) | {"q_mean": q[i].mean()}
            one["dormant"] = dormant([h[i] for h in hidden])
            one["td_error"] = error(q[i], y[i])
            one["reg_sl"] = (phi**2).sum(-1).mean()
            dot = (phi * phi_next[i]).sum(-1) * bootstraps
            one["reg_td"] = one["reg_sl"] - args.gamma * dot.mean()
            one["reg_sl_full"] = full_own[i].mean()
            one["reg_td_full"] = one["reg_sl_full"] - args.gamma * (full_next[i] * bootstraps[:256]).mean()
            known = (p.truth[m.target] if p.truth else p.mc)[rows[0]]
            if p.truth:
                one |= {"truth": known.mean(), "q_error": error(q[i], known)}
            elif m.target != "q":
                one |= {"truth": known.mean(), "return_error": error(q[i], known)}
                if p.held:
                    one["return_error_holdout"] = error(q_held[i], p.held[2])
            if q_table is not None:
                one["greedy_return"] = p.greedy_return(q_table[i].view(-1, 4).double().cpu().numpy())
            out.append({k: float(v) for k, v in one.items()})
    net.train()
    return out


def collect_results(learner: Learner, steps: list, history: list, args: Args) -> dict:
    """results[target][cure][metric]: `quarter`, `half`, `final`, means over seeds; half the width of their
    95 % intervals; and the seeds' own values."""
    results = {}
    at = {"quarter": args.num_updates / 4, "half": args.num_updates / 2, "final": args.num_updates}
    moments = {k: history[int(np.argmin([abs(s - v) for s in steps]))] for k, v in at.items()}
    for m in learner.members:
        mine = learner.chosen(target=m.target, label=m.label)
        for metric in history[-1][mine[0]]:
            entry = results.setdefault(m.target, {}).setdefault(m.label, {}).setdefault(metric, {})
            for k, moment in moments.items():
                values = np.array([moment[i][metric] for i in mine])
                entry[k], entry[k + "_interval"] = float(values.mean()), interval(values)
                entry[k + "_seeds"] = values.tolist()
    return results


T_QUANTILE = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, of 2 to 10 values


def interval(values) -> float:
    """Half the width of the 95 % interval of a mean, by Student's t; 0 for a single value."""
    n = len(values)
    if n < 2:
        return 0.0
    t = T_QUANTILE[n - 2] if n <= 10 else 1.96 + 2.6 / (n - 1)
    return float(t * values.std(ddof=1) / n**0.5)


# ----------------------------------------------------------------------------------- what it all says
def claims(results: dict) -> dict:
    """The papers' claims, checked on this run: name -> (word, a sentence of mean numbers).

    Each is decided seed by seed, against the member of the same weights and batches: `supported` if it holds
    in all seeds, `not supported` if in none, else `undecided`. A rank falls if it ends 15 % below that of
    sarsa (without sarsa: of mc); it does not for mc and oracle if at most 5 % is lost after the first
    quarter, for moving if it ends less than 15 % below sarsa's. A dot product rises if it ends above twice
    sarsa's and gains more than 10 % in the second half; while Q has settled, if it gains that where mean Q
    moves by less than 10 %. DR3 must bring the dot product to sarsa's, at least 10 % down, and move mean Q by
    less than 10 %; a rescue is a rank 5 % above that without DR3 and within 15 % of sarsa's; a larger or
    lower error is one by 10 %, on held-out episodes where the truth is unknown.
    """
    out, base = {}, next((t for t in ("sarsa", "mc") if t in results), None)
    error = "q_error" if any("q_error" in r["none"] for r in results.values()) else "return_error_holdout"
    judged = [target for target in results if error in results[target]["none"]]

    def get(target, metric, when="final", cure="none"):
        return np.array(results[target][cure][metric][when + "_seeds"])

    def gain(target, metric, since="half"):
        before = get(target, metric, since)
        return (get(target, metric) - before) / np.abs(before).clip(1e-30)

    def say(name: str, holds, *parts: str):
        word = "supported" if holds.all() else "undecided" if holds.any() else "not supported"
        out[name] = (f"{word} ({holds.sum()} of {len(holds)} seeds)", ", ".join(parts))

    if base and "td" in results:
        td, other = get("td", "srank"), get(base, "srank")
        ranks = f"srank ends at {td.mean():.0f} for td and {other.mean():.0f} for {base}"
        say("with bootstrapping on unseen actions the rank falls", td < 0.85 * other, ranks)
        ratio, rise = (
            get("td", "feature_dot") / get(base, "feature_dot").clip(1e-30),
            gain("td", "feature_dot"),
        )
        dots = f"in the second half td's dot product changes by {rise.mean():+.0%} (a rise: +10%)"
        twice = f"it ends at {ratio.mean():.1f} times that of {base} (a rise: 2)"
        steady = f"which changes by {gain(base, 'feature_dot').mean():+.0%}"
        name = "with bootstrapping on unseen actions the dot products rise"
        say(name, (ratio > 2) & (rise > 0.1), dots, twice, steady)
        moved = gain("td", "q_mean")
        settled = f"its mean Q by {moved.mean():+.0%} (settled: 10%)"
        say("the dot products rise while Q has settled", (np.abs(moved) < 0.1) & (rise > 0.1), dots, settled)
        if {"td", base} <= {*judged}:
            worse = get("td", error) / get(base, error).clip(1e-30)
            times = f"td's {error} is {worse.mean():.2f} times that of {base}"
            say("the lower rank comes with a larger error", (worse > 1.1) & (td < 0.85 * other), ranks, times)
    for target in ("oracle", "mc"):
        if target in results:
            kept = gain(target, "srank", "quarter")
            text = f"its srank changes by {kept.mean():+.0%} after the first quarter"
            say(f"with {target} targets the rank does not fall", kept > -0.05, text)
    if "moving" in results and base:
        moving, other = get("moving", "srank"), get(base, "srank")
        text = f"srank ends at {moving.mean():.0f} with td's target, {other.mean():.0f} for {base}"
        say("a moving target alone does not lower the rank", moving > 0.85 * other, text)
    for target, cure in [(t, c) for t in results for c in results[t] if c.startswith("dr3")]:
        dot, was = get(target, "feature_dot", "final", cure), get(target, "feature_dot")
        q, q_was = get(target, "q_mean", "final", cure), get(target, "q_mean")
        moved = (q - q_was) / np.abs(q_was).clip(1e-30)
        goal = np.minimum(get(base, "feature_dot") if base else was, 0.9 * was)
        texts = f"dot product {was.mean():.3g} -> {dot.mean():.3g}", f"mean Q changes by {moved.mean():+.0%}"
        name = f"{cure} on {target} lowers the dot products and leaves Q alone"
        say(name, (dot <= goal) & (np.abs(moved) < 0.1), *texts)
        rank, rank_was = get(target, "srank", "final", cure), get(target, "srank")
        text = f"srank {rank_was.mean():.0f} -> {rank.mean():.0f}"
        if base:
            other = get(base, "srank")
            holds = (rank > 1.05 * rank_was) & (rank > 0.85 * other)
            say(f"{cure} on {target} rescues the rank", holds, text, f"{other.mean():.0f} for {base}")
        if target in judged:
            e, e_was = get(target, error, "final", cure), get(target, error)
            text = f"{error} {e_was.mean():.3g} -> {e.mean():.3g}"
            say(f"{cure} on {target} lowers the error", e < 0.9 * e_was, text)
    return out


PANELS = {
    "feature_dot": "dot product of phi and phi'",
    "feature_cos": "cosine of phi and phi'",
    "srank": "srank of phi",
    "reg_td": "regulariser R(phi) with bootstrapping",
    "q_mean": "mean Q (dotted: truth)",
    "q_error": "error to truth / its variance",
    "return_error_holdout": "error to held-out returns / their variance",
    "td_error": "TD error / target's variance",
    "dormant": "share of dormant units",
}
COLOURS = {"mc": "#0072B2", "oracle": "#56B4E9", "sarsa": "#009E73", "td": "#D55E00"}  # by target
COLOURS |= {"td10": "#E69F00", "q": "#CC79A7", "moving": "#000000"}
DASHES = ["-", "--", "-.", ":", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3))]  # by cure


def draw(learner: Learner, steps: list, history: list, path: Path):
    """The panels, a line for each target and cure: mean over seeds, band of its 95 % interval."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no figure")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {k: v for k, v in PANELS.items() if any(k in one for one in history[-1])}
    figure, axes = plt.subplots(2, 4, figsize=(16, 7), sharex=True)
    kinds = list(dict.fromkeys((m.target, m.label) for m in learner.members))
    dashes = dict(zip(dict.fromkeys(label for _, label in kinds), DASHES * 9))
    for axis, (metric, title) in zip(axes.flat, panels.items()):
        for target, label in kinds:
            colour, mine = COLOURS.get(target, "grey"), learner.chosen(target=target, label=label)
            if metric not in history[-1][mine[0]]:
                continue
            values = np.array([[moment[i][metric] for i in mine] for moment in history])
            mean, half = values.mean(1), np.array([interval(v) for v in values])
            text = target if label == "none" else f"{target} {label}"
            axis.plot(steps, mean, linestyle=dashes[label], color=colour, label=text)
            axis.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.15)
            if metric == "q_mean" and "truth" in history[-1][mine[0]]:
                axis.axhline(history[-1][mine[0]]["truth"], color="grey", linestyle=":", linewidth=1)
        axis.set_title(title, fontsize=10)
        if metric in ("q_error", "td_error"):
            axis.set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("updates")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(results: dict) -> str:
    names = "feature_dot feature_cos srank dormant reg_td q_mean q_error return_error return_error_holdout"
    names += " td_error greedy_return"
    found = [metrics for cures in results.values() for metrics in cures.values()]
    names = [n for n in names.split() if any(n in metrics for metrics in found)]
    lines = ["target cure".ljust(22) + "".join(n.rjust(21) for n in names)]
    for target, cures in results.items():
        for cure, metrics in cures.items():
            cells = [metrics.get(n) for n in names]
            several = bool(cells[0]) and len(cells[0]["final_seeds"]) > 1
            half = lambda c: f" +- {c['final_interval']:.2g}" * several  # noqa: B023
            text = [f"{c['final']:.3g}{half(c)}" if c else "" for c in cells]
            lines.append(f"{target} {cure}".ljust(22) + "".join(x.rjust(21) for x in text))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- training
def memory(problem: Problem, args: Args) -> int:
    """Bytes, roughly: weights five times (target, gradient, two moments of Adam), activations of ten next
    actions, in an update or on the 2,048 rows of a measurement."""
    inputs = problem.obs.shape[1] + problem.act.shape[1]
    n = (len(args.targets) + len(args.cures)) * args.seeds
    weights = args.width * (inputs + args.width * (args.depth - 1))
    return 4 * n * (5 * weights + 12 * max(args.batch_size, 2048) * (inputs + args.width * args.depth))


def train(args: Args) -> dict:
    """Train as `args` says; returns what summary.json holds."""
    check(args)
    args = args if args.problem == "continuous" else replace(args, env_id=args.problem)
    device, saved = set_up(args), find_checkpoint(args)
    if saved and (past := finished(saved, "num_updates", args.num_updates)):
        return past
    make = {"continuous": continuous, "gridworld": gridworld, "dataset": dataset}[args.problem]
    problem = make(args, device)
    reserve(memory(problem, args), "networks and one update, roughly", device)
    learner, step, steps, history, info = Learner(problem, args, device), 0, [], [], {}
    tensors = [*problem[:7], *(problem.held or ())]
    digest = hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in tensors)).hexdigest()
    if saved and saved["info"].get("data_sha256") != digest:
        fail(f"--resume {args.resume}: that run was trained on other data")
    if saved:
        learner.restore(saved["learner"])
        step, steps, history = saved["step"], saved["steps"], saved["history"]
        restore_random_state(saved["random"])
    counts = {"transitions": len(problem.rew), "members": len(learner.members)}
    run = Run(args, counts | {"data_sha256": digest}, saved)
    print(f"{len(problem.rew):,} transitions, {len(learner.members)} networks")

    def check_members():
        losses = zip(learner.members, info.get("loss", ()))
        named = {f"the loss of {m.target} {m.label}, seed {m.seed},": x for m, x in losses}
        check_finite(step, named | dict(learner.net.named_parameters()))

    def save():
        check_members()
        state = {"learner": learner.checkpoint(), "step": step, "steps": steps, "history": history}
        run.save("checkpoint.pt", state | {"random": random_state()})

    every = lambda n: n > 0 and step % n == 0
    moments = (args.num_updates // 4, args.num_updates // 2, args.num_updates)  # of the claims
    progress = Progress("training", args.num_updates, step)
    with StopSignal() as stop:
        while step < args.num_updates and not stop.signum:
            step += 1
            info = learner.update(step)
            if every(args.diagnostics_frequency) or step in moments:
                check_members()
                with progress.paused():
                    steps, history = [*steps, step], [*history, diagnose(learner, args, step)]
                    for m, one in zip(learner.members, history[-1]):
                        tag = f"diagnostics/{m.target}/{m.label}/{m.seed}/"
                        run.scalars({tag + k: v for k, v in one.items()}, step)
                    run.scalars({"charts/updates_per_second": progress.rate(step)}, step)
            if every(args.checkpoint_frequency) and step < args.num_updates:
                save()
            progress.show(step, {"loss": info["loss"].mean()})
        save()
        if stop.signum:
            run.stopped(stop.signum)
    rate, results = progress.rate(step), collect_results(learner, steps, history, args)
    verdicts = claims(results)
    paragraph = "\n".join(f"- {name}: {word}. {text}" for name, (word, text) in verdicts.items())
    print(table(results) + "\n\n" + paragraph)
    summary = {"num_updates": step, "updates_per_second": rate, "results": results}
    summary = run.finish(summary | {"claims": {k: list(v) for k, v in verdicts.items()}})
    draw(learner, steps, history, run.dir / "figure.png")
    return summary


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
