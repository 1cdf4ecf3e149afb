r"""Conservative Q-learning (CQL) for discrete actions, pixels or vectors: offline RL that explains itself.

Kumar, Zhou, Tucker, Levine, arXiv 2006.04779. Q-learning asks for the best action, also where the data D
never tried it, and finds the most overestimated one. Over finitely many actions the log-sum-exp is exact:

  min_Q  alpha E_s[ log sum_a exp Q(s,a) - Q(s, a_data) ]  +  E_D[ TD error ]                      (Eq. 4)

What alpha multiplies is a cross-entropy with Q as logits: behaviour cloning's loss beside Q-learning's. What
a value is, and with it the TD error, is the head's matter; Q(s,a) above is its mean:

  c51  51 atoms z in [v_min, v_max], cross-entropy to the projected R + gamma^m z'      arXiv 1707.06887
  qr   200 quantiles, Huber quantile loss                                               arXiv 1710.10044
  dqn  a number, Huber loss                                                             Nature 518:529
  rem  200 numbers, Huber loss of a random convex mixture of them                       arXiv 1907.04543

  symbol           in the code                          shape
  s, a             batch.obs .act                       (B, 4, 84, 84) uint8 or (B, d); (B,)
  R                batch.rew                            (B,), r_0 + gamma r_1 + ..., at most n rewards
  s'               batch.next_obs                       as s, m <= n steps later; unused where terminated
  gamma^m          batch.discount                       (B,), 0 where the episode terminated
  phi(s)           net.features(obs)                    (B, D), what the last linear layer reads
  logits, atoms    net.heads[g](phi)                    (B, A, K), each game g has its own actions A
  Q(s,a)           net.q(out)                           (B, A)
  alpha            --cql-alpha                          authors, QR head: 4 at 1 % of DQN Replay, 1 at 10 %

phi depends on the state alone, so that DR3 here is the mean of phi(s).phi(s') over the minibatch, terminal
rows counted as 0 (the authors' Atari code takes its absolute value, the same after a ReLU, and keeps them);
with one output an action, phi(s,a).phi(s',a') would be 0 where a' is not a (arXiv 2112.04716). --unit-norm
divides phi by its norm (arXiv 2211.15144). With --n-step above 1 the rewards of the data's own actions count
as if the greedy policy had taken them: faster, and biased.
Several games share the encoder; each minibatch holds as many rows of one as of another.

Where to read: networks, q_loss and td_loss are the algorithm; Data stacks frames; train() is the loop. The
readers of files and the blocks marked `shared`, which sibling scripts have too, can be skipped at first.

Quick, on data that it makes itself; the same without conservatism:
  python cql_atari.py
  python cql_atari.py --cql-alpha 0

A serious run on 1 % of DQN Replay:
  python cql_atari.py --env ALE/Breakout-v5 --dataset Breakout/1/replay_logs --fraction 0.01 --width 32 \
      --cql-alpha 4 --n-step 1 --learning-rate 5e-5 --target-network-frequency 2_000 \
      --num-updates 6_250_000

Two games; four processes; two machines (this line on each, with its own node_rank):
  python cql_atari.py --env ALE/Pong-v5 ALE/Breakout-v5 --encoder resnet
  torchrun --nproc_per_node=4 cql_atari.py --batch-size 128
  torchrun --nnodes=2 --node_rank=0 --master_addr=host --nproc_per_node=8 cql_atari.py --batch-size 512

While it trains, `diagnostics/q_data` should settle and not fall, `td_error` be small, `srank` not collapse.
The run ends with a verdict, the numbers that it rests on, and the flag to try next. (The bare run's verdict
is *underfitting*, in part for a reason that no network mends: 20 rewards of random play are noisy targets.)

--dataset takes a folder written by an earlier run; a DQN Replay folder (`$store$_observation_ckpt.N.gz` ...,
ROMs of 2019, rewards clipped); or a Minari id. --fraction 0.01 is 1 % of it: the first 10,000 rows of every
checkpoint of a million (--subset prefix, as the authors' loader reads it), whole episodes drawn uniformly
(uniform), or the oldest 1 % (first). Frames are kept once and stacked when sampled.
With several processes the batch stays --batch-size: all draw the same rows, each works on its share, so
that a run may resume with another number of them (under torchrun; only --dropout's masks depend on it).
Evaluation: sticky actions (0.25), no no-ops, no fire on reset.

Known limits: discrete actions; image environments other than ALE's must give (H, W) uint8 frames.
Left out on purpose: prioritised replay, continuous control from pixels.
"""

import copy
import ctypes
import gzip
import hashlib
import importlib
import json
import math
import mmap
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import timeit
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seeds network, minibatches, collection and evaluation"""
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
    env_id: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--env"])] = ("ALE/SpaceInvaders-v5",)
    """one environment or several: ALE/..., or any with discrete actions and vector or (H, W) observations"""
    dataset: tuple[str, ...] = ()
    """a folder or Minari id for each environment; not given: collect --collect-steps rows and keep them"""
    run_dir: str = "runs"
    """folder that holds the run folders"""
    resume: str | None = None
    """run folder or checkpoint to go on from; `auto`: the newest one with these arguments, if any"""
    checkpoint_frequency: int = 1_000
    """updates between checkpoints (0: only at the end)"""
    eval_frequency: int = 2_000
    """updates between evaluations (0: only at the end)"""
    eval_episodes: int = 10
    """episodes of each evaluation, in parallel (0: no evaluation)"""
    max_episode_steps: int = 27_000
    """steps after which an episode of an ALE game is cut (authors: 27_000)"""
    log_frequency: int = 100
    """updates between logged losses and checks for non-finite numbers"""
    diagnostics_frequency: int = 500
    """updates between diagnostics (0: none, hence no verdict)"""
    compile: bool = False
    """run the loss through torch.compile"""
    cudagraphs: bool = True
    """on a GPU and in one process: capture the whole update in a CUDA graph"""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """bf16: the encoder inside the loss; tf32: matrix products and convolutions on a GPU"""

    # --- length, size and data
    num_updates: int = 6_000
    """gradient steps (12_500_000 in the authors' defaults)"""
    batch_size: int = 32
    """B, transitions in a minibatch of all games and processes together"""
    collect: Literal["random", "dqn"] = "random"
    """who plays without --dataset: random actions, or the same network learning online without CQL"""
    collect_steps: int = 40_000
    """rows of the self-made set of each game"""
    collect_repeat: float = 0.95
    """chance that a random action is the last one once more: longer moves reach further"""
    checkpoints: tuple[int, ...] = ()
    """which checkpoints of a DQN Replay folder (default: all)"""
    fraction: float = 1.0
    """share of the dataset that is read"""
    subset: Literal["prefix", "uniform", "first"] = "prefix"
    """the first rows of every file; episodes drawn uniformly; the oldest rows"""
    storage: Literal["device", "memory", "mmap"] = "device"
    """where the frames lie: the device, main memory, or a file (larger than memory)"""
    holdout: float = 0.05
    """share of episodes kept out of training, on which the TD error is measured (0 to compare with peers)"""
    clip_rewards: bool = True
    """train on the sign of the rewards"""

    # --- Q-learning
    head: Literal["c51", "qr", "dqn", "rem"] = "qr"
    """what a value is (table above)"""
    v_min: float = -10.0
    """least atom of c51"""
    v_max: float = 10.0
    """largest atom of c51"""
    gamma: float = 0.99
    """discount factor"""
    n_step: int = 20
    """steps of reward before the bootstrap (authors: 1); 20 suits random play in long moves, 1 to 5 others"""
    double: bool = True
    """the online network chooses a', the target network values it (authors: off)"""
    learning_rate: float = 1e-4
    """learning rate of Adam, whose epsilon is 0.01 / 32 (authors: 5e-5)"""
    target_network_frequency: int = 100
    """updates between copies into the target network (authors: 2_000)"""

    # --- CQL and representation
    cql_alpha: float = 0.1
    """weight of the conservative term; 0: naive offline Q-learning; little for random play, more for few or
    narrow data (authors, 1 % of DQN Replay: 4)"""
    dr3_coef: float = 0.0
    """weight of the mean dot product phi(s).phi(s') (authors: 0.1 with a DQN head)"""
    unit_norm: bool = False
    """divide the features phi by their norm"""
    dropout: float = 0.0
    """dropout rate on the features, off in the target network"""
    encoder: Literal["auto", "nature", "resnet", "mlp"] = "auto"
    """auto: nature for images, mlp for vectors; resnet: group norm and learned spatial embeddings"""
    width: int = 16
    """channels of the first layer (authors: 32); phi has 16 times as many entries"""


LIMITS = {"gamma": (0, 0.99999), "holdout": (0, 0.9), "dropout": (0, 0.99), "collect_repeat": (0, 0.99)}
LIMITS |= {"fraction": (1e-9, 1), "n_step": (1, 100), "learning_rate": (1e-12, 1e3)}
LIMITS |= dict.fromkeys(["v_min", "v_max"], (-1e18, 1e18)) | {"seed": (0, 1e6), "collect_steps": (100, 1e12)}
LIMITS |= {"width": (1, 4096), "max_episode_steps": (1, 1e9), "target_network_frequency": (1, 1e12)}
LIMITS |= dict.fromkeys(["batch_size", "num_updates", "log_frequency"], (1, 1e12))


def check(args: Args):
    """Refuse values and combinations that make no sense or would be ignored, before anything starts."""
    check_limits(args, LIMITS)
    only_if(args, args.head == "c51", f"with --head {args.head}", "v_min", "v_max")
    only_if(args, not args.dataset, "with --dataset", "collect", "collect_steps")
    random = args.collect == "random" and not args.dataset
    only_if(args, random, "unless random actions are collected", "collect_repeat")
    only_if(args, args.dataset, "without --dataset", "checkpoints", "fraction")
    only_if(args, args.fraction < 1, "with --fraction 1", "subset")
    only_if(args, args.track, "without --track", "wandb_project_name", "wandb_entity")
    ale = any(name.startswith("ALE/") for name in args.env_id)
    only_if(args, ale, "without an ALE game", "max_episode_steps")
    if args.v_min >= args.v_max:
        fail(f"--v-min {args.v_min} is not below --v-max {args.v_max}")
    if args.dataset and len(args.dataset) != len(args.env_id):
        fail(f"--dataset names {len(args.dataset)} sets, --env-id {len(args.env_id)} environments")
    for name in args.env_id:
        if name.startswith("ALE/") and not re.fullmatch(r"ALE/\w+-v5", name):
            fail(f"--env-id {name}: expected ALE/ and a game's name and -v5, the one version here")
    if len(set(args.env_id)) < len(args.env_id) or not args.env_id:
        fail(f"--env-id {' '.join(args.env_id) or '(none)'}: expected one environment or several different")
    parts = len(args.env_id) * processes()[1]
    if args.batch_size % parts:
        fail(f"--batch-size {args.batch_size} is not a multiple of {parts}, games x processes")


# ------------------------------------------------------------------------------------------- networks
class Block(nn.Module):
    """Two 3 x 3 convolutions with group norm (4 groups), added to a 1 x 1 projection of the input."""

    def __init__(self, fan_in: int, fan_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(4, fan_out), nn.GroupNorm(4, fan_out)
        same = (fan_in, stride) == (fan_out, 1)
        self.skip = nn.Identity() if same else nn.Conv2d(fan_in, fan_out, 1, stride)

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


class SpatialEmbeddings(nn.Module):
    """Where, not only what: each channel's map (H, W) against 5 learned maps, (B, C, H, W) -> (B, 5 C)."""

    def __init__(self, shape):
        super().__init__()
        self.maps = nn.Parameter(torch.randn(*shape, 5) / (shape[1] * shape[2]) ** 0.5)

    def forward(self, x):
        return torch.einsum("bchw,chwf->bcf", x, self.maps).flatten(1)


class Network(nn.Module):
    """Encoder to phi (B, D), D = 16 x width, and a linear head for each game, (B, A, K)."""

    def __init__(self, shape: tuple, actions: list[int], args: Args):
        super().__init__()
        w, self.args, self.image = args.width, args, len(shape) == 3
        D, kind = 16 * w, args.encoder if args.encoder != "auto" else ("nature" if self.image else "mlp")
        if (kind == "mlp") == self.image:
            fail(f"--encoder {kind} does not fit observations of shape {shape}")
        if kind == "mlp":
            layers = [nn.Linear(shape[0], D), nn.ReLU(), nn.Linear(D, D), nn.ReLU()]
        elif kind == "nature":  # no padding: 84 x 84 ends as 7 x 7 (TensorFlow's `same` ends as 11 x 11)
            sizes = ((shape[0], w, 8, 4), (w, 2 * w, 4, 2), (2 * w, 2 * w, 3, 1))
            layers = [m for i, o, k, s in sizes for m in (nn.Conv2d(i, o, k, s), nn.ReLU())] + [nn.Flatten()]
        else:  # 84 -> 42, then 42, 21, 11, 6
            if w % 4 or w < 8:  # torch 2.13 crashes in the backward pass on a CPU at width 4
                fail(f"--width {w}: --encoder resnet needs a multiple of 4, its groups, from 8 on")
            layers, sizes = [nn.Conv2d(shape[0], w, 3, 2, 1), nn.ReLU()], (w, w, 2 * w, 4 * w, 4 * w)
            for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
                layers += [Block(fan_in, fan_out, 2 if i else 1), Block(fan_out, fan_out, 1)]
        if kind != "mlp":
            try:
                with torch.no_grad():
                    maps = nn.Sequential(*layers)(torch.zeros(1, *shape))
            except RuntimeError:
                fail(f"--encoder {kind}: frames of {shape[1:]} are too small")
            if kind == "resnet":
                layers += [SpatialEmbeddings(maps.shape[1:])]
                maps = layers[-1](maps)
            layers += [nn.Linear(maps.shape[1], D), nn.ReLU()]
        self.encoder = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.K = {"c51": 51, "qr": 200, "dqn": 1, "rem": 200}[args.head]
        head = lambda A: nn.Sequential(nn.Linear(D, A * self.K), nn.Unflatten(1, (A, self.K)))
        self.heads = nn.ModuleList(head(A) for A in actions)
        self.register_buffer("z", torch.linspace(args.v_min, args.v_max, 51))
        if args.head == "c51":  # a peak at 0: from a uniform start Q takes hundreds of copies to settle
            for head, A in zip(self.heads, actions):
                head[0].bias.data -= (self.z.abs() / (self.z[1] - self.z[0])).repeat(A)
        self.register_buffer("mean", torch.zeros(shape if not self.image else ()))
        self.register_buffer("std", torch.ones(shape if not self.image else ()))

    def features(self, obs, record: list | None = None):
        """phi(s), (B, D). `record` receives the activations of the layers before it, units last."""
        if self.image:
            x = obs.contiguous(memory_format=torch.channels_last).float().div_(255)
        else:
            x = (obs - self.mean) / self.std
        half = self.args.precision == "bf16" and self.training and torch.is_grad_enabled()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            for layer in self.encoder:
                x = layer(x)
                if record is not None and isinstance(layer, nn.ReLU | Block):
                    record.append(x.movedim(1, -1).flatten(0, -2))
        x = x.float()
        if self.args.unit_norm:
            x = F.normalize(x, dim=-1)
        return F.dropout(x, self.args.dropout, self.training)

    def q(self, out, mixture=None):
        """Q(s,a), (B, A), of a head's output (B, A, K): its mean, or rem's mixture (K,) of it."""
        if self.args.head == "c51":
            return (torch.softmax(out, -1) * self.z).sum(-1)
        return out.mean(-1) if mixture is None else (out * mixture).sum(-1)


# -------------------------------------------------------------------------------------------- losses
class Batch(NamedTuple):
    obs: torch.Tensor  # (B, 4, H, W) uint8 or (B, d)
    act: torch.Tensor  # (B,)
    rew: torch.Tensor  # (B,), r_0 + gamma r_1 + ... until n steps, the end, or a time-out
    next_obs: torch.Tensor  # as obs
    discount: torch.Tensor  # (B,), gamma^m after m steps; 0 where the episode terminated


def pick(out, act):
    """out (B, A, K) at act (B,): (B, K)."""
    return out[torch.arange(len(act), device=act.device), act]


def project(z, p, rew, discount):
    """Mass of R + gamma^m z, probabilities p (B, K), on the atoms z (K,): (B, K) (arXiv 1707.06887, Alg. 1).

    An atom that lands between two neighbours is shared by nearness, one outside goes to the edge.
    """
    moved = (rew[:, None] + discount[:, None] * z).clamp(z[0], z[-1])
    share = (1 - (moved[:, :, None] - z).abs() / (z[1] - z[0])).clamp(min=0)  # (B, from, to)
    return (p[:, :, None] * share).sum(1)


def quantile_huber(theta, y):
    """Huber quantile loss (kappa 1) of theta (B, K) to samples y (B, M), a number a row: the sum over K of
    the mean over M (arXiv 1710.10044)."""
    theta, y = torch.broadcast_tensors(theta[:, :, None], y[:, None, :])  # (B, K, M)
    tau = (torch.arange(theta.shape[1], device=theta.device) + 0.5)[:, None] / theta.shape[1]
    weight = torch.where(y < theta, 1 - tau, tau)
    return (weight * F.smooth_l1_loss(theta, y, reduction="none")).mean(2).sum(1)


def greedy(net, g: int, phi_next, out_next, mixture, args: Args):
    """a' (B,): the target network's choice in out_next (B, A, K); --double: the network's at phi_next."""
    out = net.heads[g](phi_next) if args.double else out_next
    return net.q(out, mixture).argmax(-1)


def td_loss(net, out, out_next, next_act, batch: Batch, mixture, args: Args):
    """TD error of each row, (B,): out, out_next (B, A, K) of network and target network, next_act a' (B,).

    mixture (K,) sums to 1: rem's random weights, None for the others."""
    chosen, following = pick(out, batch.act), pick(out_next, next_act)
    if args.head == "c51":
        y = project(net.z, torch.softmax(following, -1), batch.rew, batch.discount)
        return -(y * torch.log_softmax(chosen, -1)).sum(-1)
    if mixture is not None:
        chosen, following = ((x * mixture).sum(-1, keepdim=True) for x in (chosen, following))
    y = batch.rew[:, None] + batch.discount[:, None] * following
    if args.head == "qr":
        return quantile_huber(chosen, y)
    return F.smooth_l1_loss(chosen, y, reduction="none")[:, 0]


def cql_term(q, act):
    """log sum_a exp Q(s,a) - Q(s, a_data), exact: (B,)."""
    return torch.logsumexp(q, -1) - q.gather(1, act[:, None])[:, 0]


def q_loss(net, target, batches: list[Batch], mixture, args: Args):
    """TD error + alpha x conservative term + c x DR3, mean over the rows of all games."""
    obs, next_obs = (torch.cat([getattr(b, k) for b in batches]) for k in ("obs", "next_obs"))
    sizes, phi = [len(b.act) for b in batches], net.features(obs)
    with torch.no_grad():
        phi_target = target.features(next_obs).split(sizes)
    if args.double or args.dr3_coef > 0:  # phi(s') of the online network: double Q's chooser, DR3's partner
        with torch.set_grad_enabled(args.dr3_coef > 0):  # gradient through both sides
            phi_next = net.features(next_obs)
    td, conservative, q_data = [], [], []
    for g, (batch, phi_g) in enumerate(zip(batches, phi.split(sizes))):
        out = net.heads[g](phi_g)
        with torch.no_grad():
            out_next = target.heads[g](phi_target[g])
            phi_next_g = phi_next.split(sizes)[g] if args.double else None
            next_act = greedy(net, g, phi_next_g, out_next, mixture, args)
        q = net.q(out)
        td.append(td_loss(net, out, out_next, next_act, batch, mixture, args))
        conservative.append(cql_term(q, batch.act))
        q_data.append(q.gather(1, batch.act[:, None])[:, 0])
    td, conservative, q_data = (torch.cat(x).mean() for x in (td, conservative, q_data))
    loss = td + args.cql_alpha * conservative
    info = {"td_loss": td, "cql_loss": conservative, "q_values": q_data}
    if args.dr3_coef > 0:
        bootstraps = (torch.cat([b.discount for b in batches]) > 0).float()
        info["dr3_loss"] = ((phi * phi_next).sum(-1) * bootstraps).mean()
        loss = loss + args.dr3_coef * info["dr3_loss"]
    return loss, {k: v.detach() for k, v in (info | {"loss": loss}).items()}


def memory(args: Args, net: Network, shape: tuple) -> int:
    """Bytes: weights five times (target, gradient, two moments of Adam); activations with their gradients."""
    weights = sum(p.numel() for p in net.parameters())
    first = args.width * (shape[1] // 4 if net.image else 4) ** 2  # the largest layer
    return 20 * weights + 4 * args.batch_size * (3 * math.prod(shape) + 8 * first)


class Learner(nn.Module):
    """Network, target network, optimiser."""

    def __init__(self, shape: tuple, actions: list[int], args: Args, device):
        super().__init__()
        self.args, self.device = args, device
        self.net = Network(shape, actions, args)
        self.target = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.to(device)
        if args.compile:
            torch._inductor.config.fallback_random = True  # the random numbers of the uncompiled script
        self.loss = torch.compile(q_loss) if args.compile else q_loss
        flags = {"fused": True, "capturable": device.type == "cuda"}
        self.optim = torch.optim.Adam(self.net.parameters(), lr=args.learning_rate, eps=0.01 / 32, **flags)

    def update(self, batches: list[Batch], alone: bool = False) -> dict:
        """One gradient step; unless `alone`, together with the other processes. The target network moves when
        the caller asks: refresh_target()."""
        mixture = torch.rand(self.net.K, device=self.device)  # by all heads: the measured runs' random stream
        mixture = mixture / mixture.sum() if self.args.head == "rem" else None
        loss, info = self.loss(self.net, self.target, batches, mixture, self.args)
        self.optim.zero_grad()
        loss.backward()
        if not alone:
            average_gradients(self.net.parameters())
        self.optim.step()
        return info

    def refresh_target(self):
        self.target.load_state_dict(self.net.state_dict())

    def standardise(self, games: list):
        """Vector observations to mean 0 and deviation 1; the networks keep both for acting."""
        std, mean = torch.std_mean(torch.cat([data.frames for data in games]), dim=0)
        for net in (self.net, self.target):
            net.mean.copy_(mean)
            net.std.copy_(std + 1e-3)  # an entry that never varies stays 0

    @torch.no_grad()
    def q(self, obs, game: int):
        """Q(s,a) (B, A) without gradient, in chunks that bound the memory of activations."""
        return torch.cat([self.net.q(self.net.heads[game](self.net.features(x))) for x in obs.split(256)])

    def checkpoint(self) -> dict:
        return {"networks": self.state_dict(), "optim": self.optim.state_dict()}

    def restore(self, saved: dict):
        self.load_state_dict(saved["networks"])
        load_optimizer(self.optim, saved["optim"])


# ------------------------------------------------------------------------------------ several processes
def processes() -> tuple[int, int]:
    """Rank and number of processes, as torchrun tells; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(args: Args):
    """Meet the other processes; all but the first one keep silent."""
    rank, size = processes()
    if size == 1:
        return
    gpu = args.cuda and torch.cuda.is_available()
    if gpu:
        local = int(os.environ.get("LOCAL_RANK", rank))
        if local >= torch.cuda.device_count():
            fail(f"more processes here than GPUs ({torch.cuda.device_count()}): start fewer, or --no-cuda")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(hours=3))
    if rank:
        sys.stdout = open(os.devnull, "w")


def reduced(x, how):
    """x summed, or its maximum taken, over all processes."""
    try:
        dist.all_reduce(x, how)
    except RuntimeError as e:
        fail(f"another process is gone ({first_line(e)}); the last checkpoint is intact", 1)
    return x


def average_gradients(parameters):
    """The mean over processes: their shares are equal, so it is the gradient of the joined batch."""
    if processes()[1] > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        joined = reduced(torch.cat([g.flatten() for g in gradients]), dist.ReduceOp.SUM) / processes()[1]
        for g, x in zip(gradients, joined.split([g.numel() for g in gradients])):
            g.copy_(x.view_as(g))


AGREE = 10  # updates between the moments at which processes ask each other whether to stop


def agree(value: int) -> int:
    """The largest of all processes' values; every one must call it at the same point."""
    return value if processes()[1] == 1 else int(reduced(torch.tensor(value), dist.ReduceOp.MAX))


# ----------------------------------------------------------------------------------------------- data
STACK = 4  # frames that a network sees


class Data:
    """Rows of one game: row i is (frame, action, reward) i; the frames lie where --storage says.

    `real` rows are transitions; unless it is terminal, a row's next state is the row after it. An episode
    that was cut, by time or by the end of a file, ends with a row that is not real and only holds its last
    frame. `age` counts the frames of the same episode before a row, up to 3: beyond them a stack is zero.
    `train` and `holdout` list real rows, split by episodes; `starts` the first rows of episodes;
    `returns_to_go` is discounted, NaN where a cut hides more than 1 % of it.
    """

    def __init__(self, frames, columns: dict, args: Args, device):
        """frames (rows, H, W) uint8 or (rows, d) float32; columns: numpy arrays (rows,)."""
        self.args, self.device, self.stacks = args, device, 0
        self.mapped = frames._mmap if isinstance(frames, np.memmap) else None
        if self.mapped:
            self.mapped.madvise(mmap.MADV_RANDOM)  # else each of a batch's reads fetches 128 KiB
        with warnings.catch_warnings(action="ignore"):  # "not writable": mapped frames are not to be
            self.frames = torch.from_numpy(frames)
        if args.storage == "device":
            self.frames = self.frames.to(device)
        for name, array in columns.items():
            setattr(self, name, torch.from_numpy(array).to(device))
        self.back = torch.arange(STACK - 1, -1, -1, device=device) if frames.ndim == 3 else None
        self.gammas = args.gamma ** torch.arange(args.n_step + 1, device=device)

    def stack(self, rows):
        """Observations (B, 4, H, W), the latest frame last, of rows (B,); of vectors (B, d). One gather."""
        where = rows if self.back is None else (rows[:, None] - self.back).clamp(min=0)
        x = self.frames[where.to(self.frames.device)].to(self.device)
        self.stacks += 1
        if self.mapped and self.stacks % 100 == 0:
            self.mapped.madvise(mmap.MADV_DONTNEED)  # else all pages read so far stay resident
        if self.back is None:
            return x
        return x * (self.back <= self.age[rows][:, None])[..., None, None]

    def batch(self, rows) -> Batch:
        """Transitions of n steps; an episode's end shortens them, and termination stops the bootstrap."""
        rew, at, steps = torch.zeros(len(rows), device=self.device), rows, torch.zeros_like(rows)
        going, terminated = self.real[rows], torch.zeros_like(rows, dtype=torch.bool)
        for k in range(self.args.n_step):
            rew = rew + going * self.gammas[k] * self.rew[at]
            steps = steps + going
            terminated = terminated | (going & self.terminal[at])
            at = at + (going & ~terminated)
            going = going & ~terminated & self.real[at]
        discount = self.gammas[steps] * ~terminated
        return Batch(self.stack(rows), self.act[rows], rew, self.stack(at), discount)

    def sample(self, n: int, rank: int = 0, size: int = 1) -> Batch:
        """This process's share of n rows that all draw alike, so that their number changes no result."""
        rows = self.train[torch.randint(len(self.train), (n,), device=self.device)]
        return self.batch(rows[rank::size])


# ---------------------------------------------------------------------- environments: collect, evaluate
class Envs:
    """n environments of one game, with stacks of our own that are zero before an episode's start."""

    def __init__(self, env_id: str, n: int, args: Args):
        self.name, self.n = env_id, n
        try:
            if env_id.startswith("ALE/"):
                options = {"noop_max": 0, "use_fire_reset": False, "repeat_action_probability": 0.25}
                options |= {"max_num_frames_per_episode": 4 * args.max_episode_steps, "stack_num": 1}
                need("ale_py")
                vector = importlib.import_module("ale_py.vector_env").AtariVectorEnv
                self.envs = vector(game_of(env_id), n, reward_clipping=False, **options)
                self.frame_shape = (84, 84)
            else:
                self.envs = gym.vector.SyncVectorEnv([lambda: gym.make(env_id)] * n)
                self.frame_shape = self.envs.single_observation_space.shape
        except Exception as e:  # registration, missing packages or ROMs, a namespace's own errors
            fail(f"--env-id {env_id}: {type(e).__name__}: {first_line(e)}")
        space, obs = self.envs.single_action_space, self.envs.single_observation_space
        if not isinstance(space, gym.spaces.Discrete) or space.start != 0:
            fail(f"--env-id {env_id}: actions are {space}, expected Discrete from 0")
        ndim = len(obs.shape) if isinstance(obs, gym.spaces.Box) else 0
        frames = len(self.frame_shape or ()) == 2 and obs.dtype == np.uint8
        if not ndim or not (frames or len(self.frame_shape) == 1):
            fail(f"--env-id {env_id}: observations are {obs}, expected vectors or (H, W) uint8 frames")
        if not env_id.startswith("ALE/") and self.envs.envs[0].spec.max_episode_steps is None:
            fail(f"--env-id {env_id}: has no time limit (max_episode_steps), an evaluation might never end")
        self.actions = int(space.n)
        self.shape = (STACK, *self.frame_shape) if frames else self.frame_shape

    def reset(self, seed: int):
        obs, _ = self.envs.reset(seed=seed)
        self.over, self.begins = np.zeros(self.n, bool), np.ones(self.n, bool)
        self.stacks = np.zeros((self.n, *self.shape), np.uint8 if len(self.shape) == 3 else np.float32)
        return self.see(obs)

    def see(self, obs):
        """The stacks with this observation as the latest frame."""
        obs = obs.reshape(self.n, *self.frame_shape)
        if len(self.shape) == 1:
            return obs.astype(np.float32)
        self.stacks[self.begins] = 0
        self.stacks = np.concatenate([self.stacks[:, 1:], obs[:, None]], 1)
        return self.stacks

    def step(self, act):
        """Stacks, rewards, terminated, truncated. The step after an end is a reset, its action ignored."""
        obs, rew, terminated, truncated, _ = self.envs.step(act)
        self.begins, self.over = self.over, terminated | truncated
        return self.see(obs), rew, terminated, truncated


@torch.no_grad()
def evaluate(learner, envs: Envs, game: int, args: Args) -> tuple[np.ndarray, float]:
    """One episode in each environment, epsilon-greedy with 0.001 (authors). Draws no torch random number.

    Returns the raw returns (episodes,) and the mean overestimation: max_a Q(s0, a) less the discounted return
    that followed, rewards as trained on."""
    obs, draw = envs.reset(seed=1_000_000 + 1_000 * args.seed), np.random.default_rng(args.seed)
    alive, returns, discounted = np.ones(envs.n, bool), np.zeros(envs.n), np.zeros(envs.n)
    discount, predicted = 1.0, None
    learner.net.eval()
    while alive.any():
        q = learner.q(torch.from_numpy(obs).to(learner.device), game)
        if predicted is None:
            predicted = q.amax(1).cpu().numpy()
        act = np.where(
            draw.random(envs.n) < 0.001, draw.integers(envs.actions, size=envs.n), q.argmax(1).cpu().numpy()
        )
        obs, rew, terminated, truncated = envs.step(act)
        returns += alive * rew
        discounted += alive * discount * (np.sign(rew) if args.clip_rewards else rew)
        alive &= ~(terminated | truncated)
        discount *= args.gamma
    learner.net.train()
    return returns, float((predicted - discounted).mean())


PLAYERS = 8  # environments that collect side by side, each a stream of rows


def collect(env_id: str, args: Args, device) -> Path:
    """Rows of a random or of a learning player, kept under datasets/.

    The learner is this script's own, without CQL and DR3: epsilon from 1 to 0.05 over the first half, an
    update every 4 rows after the first 1,000."""
    names = ["max_episode_steps", "collect_repeat"]
    if args.collect == "dqn":
        names += """head v_min v_max gamma n_step double learning_rate target_network_frequency encoder width
        batch_size clip_rewards precision""".split()
    key = hashlib.sha256(repr([getattr(args, name) for name in names]).encode()).hexdigest()[:8]
    name = f"{env_id.replace('/', '_')}_{args.collect}_{args.collect_steps}_seed{args.seed}_{key}"
    folder = Path("datasets") / name
    if folder.exists():
        print(f"no --dataset: using {folder}, made by an earlier run")
        return folder
    what = f"{args.collect_steps:,} steps of {env_id} ({args.collect})"
    print(f"no --dataset: collecting {what}, into {folder}")
    envs, T = Envs(env_id, PLAYERS, args), math.ceil(args.collect_steps / PLAYERS)
    rows, shape = PLAYERS * T, envs.frame_shape
    kind = np.uint8 if len(shape) == 2 else np.float32
    reserve(rows * math.prod(shape) * np.dtype(kind).itemsize, "replay", torch.device("cpu"))
    frames, learning = np.zeros((rows, *shape), kind), args.collect == "dqn"
    types = dict(act=np.int64, rew=np.float32, terminal=bool, real=bool, begins=bool, age=np.uint8)
    raw = {k: np.zeros(rows, t) for k, t in types.items()}
    online = replace(args, cql_alpha=0.0, dr3_coef=0.0, unit_norm=False, dropout=0.0, storage="memory")
    if learning:
        learner = Learner(envs.shape, [envs.actions], online, device)
        replay = Data(frames, {k: v.copy() for k, v in raw.items()}, online, device)
        usable, count, updates = torch.zeros(rows, dtype=torch.int64, device=device), 0, 0
    obs, draw, act = envs.reset(args.seed), np.random.default_rng(args.seed), 0
    age, running, ended = np.full(PLAYERS, -1), np.zeros(PLAYERS), [math.nan]
    progress = Progress("collecting", rows)
    with StopSignal() as stop:
        for t in range(T):  # after an end: envs.over, the row holds the last frame, the action only resets
            at, seen = np.arange(PLAYERS) * T + t, (t + 1) * PLAYERS
            anew, chance = draw.integers(envs.actions, size=PLAYERS), draw.random(PLAYERS)
            if learning:
                explore = 1.0 if seen < 1_000 else max(0.05, 1 - 0.95 * seen / (rows / 2))
                with torch.no_grad():
                    best = learner.q(torch.from_numpy(obs).to(device), 0).argmax(1).cpu().numpy()
                act = np.where(chance < explore, anew, best)
            else:
                act = np.where((chance < args.collect_repeat) & (t > 0), act, anew)
            age = np.where(envs.begins, 0, np.minimum(age + 1, STACK - 1))
            closed = envs.over  # whose row holds the last frame of an episode
            row = {"act": act, "begins": envs.begins, "real": ~closed & (t < T - 1), "age": age}
            frames[at] = obs[:, -1] if len(shape) == 2 else obs
            obs, rew, terminated, truncated = envs.step(act)
            row |= {"rew": rew, "terminal": terminated & row["real"]}
            running += rew
            for i in np.flatnonzero(terminated | truncated):
                ended.append(running[i])
                running[i] = 0.0
            for k, v in row.items():
                raw[k][at] = v
            if learning:
                row["rew"] = np.sign(rew) if args.clip_rewards else rew
                for k, v in row.items():
                    column = getattr(replay, k)
                    column[torch.from_numpy(at).to(device)] = torch.from_numpy(np.asarray(v)).to(column)
                complete = at[:0] if t < args.n_step else at - args.n_step  # their n steps lie behind us
                complete = torch.from_numpy(complete[raw["real"][complete]])
                usable[count : count + len(complete)] = complete.to(device)
                count += len(complete)
                replay.train = usable[:count]
                for _ in range(PLAYERS // 4 if seen > 1_000 else 0):
                    learner.update([replay.sample(args.batch_size)], alone=True)
                    updates += 1
                    if updates % args.target_network_frequency == 0:
                        learner.refresh_target()
            if stop.signum:
                print("\nstopped while collecting: nothing is kept, the same command starts again")
                raise SystemExit(128 + stop.signum)
            progress.show(seen, {"return": np.nanmean(ended[-20:]) if len(ended) > 1 else math.nan})
    begins = np.flatnonzero(raw["begins"])
    last = np.append(begins[1:], rows) - 1
    # pieces that the end of a stream did not cut; its last row may have closed an episode, too
    raw["whole"] = (last % T < T - 1) | closed[last // T]
    if learning:
        returns, _ = evaluate(learner, Envs(env_id, 10, args), 0, args)
        raw["made_by"] = {"collector_return_mean": float(returns.mean())}

    def fill(out):
        out[:] = frames

    write_own(folder, raw | {"frames": (frames.shape, kind)}, fill)
    return folder


# -------------------------------------------------------------------------- the numbers of one moment
def diagnose(learner: Learner, games: list[Data], args: Args) -> dict:
    """The numbers of one moment, on fixed probes of at most 2,048 transitions of all games, fp32, eval mode.

    Means over games, but for q_max and the bounds. The TD error is that of Q(s,a), whatever the head, in
    units of the target's variance; features are those of s, and of the s' that the backup looks at; v_s0
    is at the data's first states."""
    net, target = learner.net, learner.target
    moments, pieces, activity = [], [], []

    def probe(rows):
        n = min(2048 // len(games), len(rows))
        chosen = np.random.default_rng(0).choice(len(rows), n, replace=False)
        return rows[torch.from_numpy(chosen).to(rows.device)]

    def judge(g, data, rows, suffix=""):
        """One game's TD error, and its Q against the data's returns; also Q, features, units' activity."""
        q, y, found, active = [], [], [], []
        for part in rows.split(256):  # bounds the memory of activations
            record, batch = [], data.batch(part)
            phi, phi_next = net.features(batch.obs, record), net.features(batch.next_obs)
            out_next = target.heads[g](target.features(batch.next_obs))
            next_act = greedy(net, g, phi_next, out_next, None, args)
            y.append(batch.rew + batch.discount * target.q(out_next).gather(1, next_act[:, None])[:, 0])
            q.append(net.q(net.heads[g](phi)))
            active.append([h.abs().mean(0, keepdim=True) for h in record])
            found.append((phi, phi_next, (batch.discount > 0).float()))
        q, y = torch.cat(q), torch.cat(y)
        q_data, to_go = q.gather(1, data.act[rows][:, None])[:, 0], data.returns_to_go[rows]
        known = ~to_go.isnan()
        out = {"td_error" + suffix: (q_data - y).pow(2).mean() / y.var()}
        if known.sum() >= 32:
            out["q_minus_return" + suffix] = (q_data - to_go)[known].mean()
            out["return_std" + suffix] = to_go[known].std()
        return out, q, q_data, found, active

    net.eval()
    with strict_fp32():
        for g, data in enumerate(games):
            held = judge(g, data, probe(data.holdout), "_holdout")[0] if len(data.holdout) else {}
            out, q, q_data, found, active = judge(g, data, probe(data.train))
            pieces, activity = pieces + found, activity + active
            out |= held | {"q_data": q_data.mean(), "q_pi": q.amax(1).mean(), "q_rand": q.mean()}
            out |= {
                "q_max": q.max(),
                "v_s0": learner.q(data.stack(probe(data.starts)[:256]), g).amax(1).mean(),
            }
            out["cql_gap"] = (torch.logsumexp(q, 1) - math.log(q.shape[1]) - q_data).mean()
            low, high = data.info["reward_min"], data.info["reward_max"]
            out["q_bound"] = high if high < 0 and data.info["terminals"] else high / (1 - args.gamma)
            out["q_range"] = (high - low) / (1 - args.gamma)
            # Huber's slope is 1: dqn and rem rest at Q - y <= alpha up to alpha 1, qr much lower up to 0.5;
            # beyond that only the softmax holds them. c51's atoms end at v_max.
            out["q_lift"] = args.cql_alpha / (1 - args.gamma**args.n_step)
            moments.append({k: float(v) for k, v in out.items()})
        phi, phi_next, weight = (torch.cat(x) for x in zip(*pieces))
        shared = spectrum(phi) | alignment(phi, phi_next, weight)
        shared["dormant"] = dormant([torch.cat(layer).mean(0, keepdim=True) for layer in zip(*activity)])
    net.train()
    out = {k: float(np.mean([m[k] for m in moments])) for k in moments[0] if all(k in m for m in moments)}
    out |= {k: max(m[k] for m in moments) for k in ("q_max", "q_bound", "q_range", "q_lift")}
    return out | {k: float(v) for k, v in shared.items()}


def advice(args: Args) -> dict:
    """The flags that a verdict recommends; what is already on is not among them."""
    flags = {
        "divergence": [f"--cql-alpha {max(1, 2 * args.cql_alpha):g}", "--unit-norm"],
        "overfitting": ["--dropout 0.1", "a smaller --width"],
        "alpha too large": [f"--cql-alpha {args.cql_alpha / 2:g}"],
        "underfitting": [f"--width {max(32, 2 * args.width)}", "--encoder resnet", "--dr3-coef 0.1"],
    }
    if args.n_step > 1:
        flags["underfitting"] += [f"--n-step {args.n_step // 2}: the noise of so many rewards is part of it"]
    on = {flag(k) for k in ("unit_norm", "dropout", "dr3_coef") if getattr(args, k)}
    on |= {"--encoder"} if args.encoder == "resnet" else set()
    return {name: " or ".join(x for x in v if x.split()[0] not in on) for name, v in flags.items()}


# ------------------------------------------------------------------------------------------- training
def summary_of(kind: str, returns: list, args: Args) -> dict:
    """Mean and deviation of the returns (means over games), and the score against a person where known."""
    means = [float(x.mean()) for x in returns]
    scores = [normalized_score(name, x) for name, x in zip(args.env_id, means)]
    out = {f"{kind}_return_mean": float(np.mean(means))}
    out[f"{kind}_return_std"] = float(np.mean([x.std() for x in returns]))
    if kind == "final":
        out["normalized_score"] = None if None in scores else float(np.mean(scores))
    if len(means) > 1:
        out[f"{kind}_games"] = dict(zip(args.env_id, means))
    return out


def train(args: Args) -> dict:
    """Train as `args` says; returns what summary.json holds."""
    check(args)
    join(args)
    first = processes()[0] == 0
    device, saved = set_up(args), find_checkpoint(args)
    if saved and (past := finished(saved, "num_updates", args.num_updates)):
        return past
    envs = [Envs(name, max(1, args.eval_episodes), args) for name in args.env_id]
    if len({e.shape for e in envs}) > 1:
        fail(f"--env-id: observations differ in shape, {[e.shape for e in envs]}: no shared encoder fits")
    makes = not args.dataset or args.storage == "mmap"
    if makes and not first:
        agree(0)  # the first process collects or unpacks, the others wait
    paths = args.dataset or [str(collect(name, args, device)) for name in args.env_id]
    games = [load(path, args, e, device) for path, e in zip(paths, envs)]
    if makes and first:
        agree(0)
    digest = "+".join(data.info["dataset_sha256"] for data in games)
    if saved and saved["info"]["dataset_sha256"] != digest:
        fail(f"--resume {args.resume}: that run had other data: {saved['info']['dataset']}")
    shape, actions = envs[0].shape, [e.actions for e in envs]
    reserve(memory(args, Network(shape, actions, args), shape), "networks and one update, roughly", device)
    torch.manual_seed(args.seed)  # again: collecting has drawn from it
    learner = Learner(shape, actions, args, device)
    if not learner.net.image:
        learner.standardise(games)
    step, history, returns, info = 0, [], [np.full(1, math.nan)] * len(games), {}
    if saved:
        learner.restore(saved["learner"])
        step, history = saved["step"], saved["history"]
        returns = [np.array(x) for x in saved["returns"]]
        restore_random_state(saved["random"])
    facts = {"dataset": " ".join(paths), "dataset_sha256": digest}
    for key in ("dataset_return_mean", "collector_return_mean"):
        values = [data.info[key] for data in games if key in data.info]
        facts |= {key: float(np.mean(values))} if values else {}
    run = Run(args, facts, saved) if first else None
    share = args.batch_size // len(games)
    graphs = args.cudagraphs and device.type == "cuda" and processes()[1] == 1
    draw = lambda: [data.sample(share, *processes()) for data in games]
    if args.storage == "device":
        update = GraphedUpdate(lambda: learner.update(draw()), graphs)
    else:  # a graph cannot fetch: it reads what is put into these tensors
        rows = torch.zeros(share // processes()[1], dtype=torch.int64, device=device)
        staged = [data.batch(data.train[rows]) for data in games]
        replayed = GraphedUpdate(lambda: learner.update(staged), graphs)

        def update():
            for old, new in zip(staged, draw()):
                for x, y in zip(old, new):
                    x.copy_(y)
            return replayed()

    def save():
        check_finite(step, info | dict(learner.named_parameters()))
        state = {"learner": learner.checkpoint(), "step": step, "history": history, "random": random_state()}
        if first:
            run.save("checkpoint.pt", state | {"returns": [x.tolist() for x in returns]})

    def score():
        """Evaluate every game; the tags carry a game's name where there are several."""
        found = [evaluate(learner, e, g, args) for g, e in enumerate(envs)]
        tags = [f"/{name}" if len(envs) > 1 else "" for name in args.env_id]
        for (game_returns, overestimation), tag, name in zip(found, tags, args.env_id):
            mean = game_returns.mean()
            scores = {"charts/episodic_return": mean, "eval/episodic_return": mean}
            scores["charts/normalized_score"] = normalized_score(name, mean)
            scores["diagnostics/overestimation"] = overestimation
            run.scalars({k + tag: v for k, v in scores.items()}, step)
        return [r for r, _ in found]

    every = lambda n: n > 0 and step % n == 0
    progress = Progress("training", args.num_updates, step)
    with StopSignal() as stop:
        signum = 0
        while step < args.num_updates and not signum:
            info = update()
            step += 1
            if every(args.target_network_frequency):
                learner.refresh_target()
            diagnosing = every(args.diagnostics_frequency)
            scoring = args.eval_episodes and (every(args.eval_frequency) or step == args.num_updates)
            if diagnosing or scoring or every(args.log_frequency):
                check_finite(step, info | dict(learner.named_parameters()))
            if first and every(args.log_frequency):
                rate = progress.rate(step)
                run.scalars({"losses/" + k: v for k, v in info.items()}, step)
                run.scalars({"charts/updates_per_second": rate, "charts/SPS": rate}, step)
            with progress.paused(first and (diagnosing or scoring)):
                if first and diagnosing:
                    moment = diagnose(learner, games, args)
                    run.scalars({"diagnostics/" + k: v for k, v in moment.items()}, step)
                    history.append(moment | {"step": step})
                    if peak(history, args)[0] is history[-1]:  # the workflow's choice so far
                        run.save("selected.pt", {"networks": learner.state_dict(), "step": step})
                if first and scoring:
                    returns = score()
            if every(args.checkpoint_frequency) and step < args.num_updates:
                save()
            mean = np.mean([x.mean() for x in returns])
            progress.show(step, {"loss": info["loss"], "Q": info["q_values"], "return": mean})
            if step % AGREE == 0 or processes()[1] == 1:
                signum = agree(stop.signum)
        save()
        if not first:
            raise SystemExit(128 + signum if signum else 0)
        summary = facts | {"num_updates": step, "updates_per_second": progress.rate(step)}
        if args.eval_episodes:
            summary |= summary_of("final", returns, args)
        if args.eval_episodes and step == args.num_updates and (run.dir / "selected.pt").is_file():
            chosen = load_checkpoint(run.dir / "selected.pt")
            learner.load_state_dict(chosen["networks"])
            selected = [evaluate(learner, e, g, args)[0] for g, e in enumerate(envs)]
            summary |= {"selected_step": chosen["step"]} | summary_of("selected", selected, args)
        if signum:
            run.stopped(signum)
    name, sentence = verdict(history, args)
    summary |= {"verdict": name, "verdict_text": sentence, "eval_episodes": args.eval_episodes}
    known = ((k, summary.get(f"{k}_return_mean")) for k in ("dataset", "selected", "final", "collector"))
    print("returns: " + ", ".join(f"{k} {v:.1f}" for k, v in known if v is not None))
    print(f"verdict: {name}. {sentence}")
    return run.finish(summary)


# ---------------------------------------------------------------------- files of data, Atari's scores
def prepare(path, raw: dict, args: Args, actions: int, device) -> Data:
    """Check, describe and split what a reader found: frames, act, rew, terminal, real, begins, whole, note.

    `begins` marks the first row of each episode or piece of one, `whole` the pieces that are complete."""
    frames, rew, terminal, real = (raw[k] for k in ("frames", "rew", "terminal", "real"))
    rows = np.arange(len(real))
    if not real.any():
        fail(f"{path}: holds no transitions")
    bad = np.flatnonzero(real & ((raw["act"] < 0) | (raw["act"] >= actions)))
    if len(bad):
        fail(f"{path}: row {bad[0]} has action {raw['act'][bad[0]]}, the environment has {actions}")
    bad = np.flatnonzero(~np.isfinite(rew))
    if len(bad):
        fail(f"{path}: row {bad[0]} has reward {rew[bad[0]]}, expected finite numbers")
    bad = np.flatnonzero(real & ~terminal & np.append(raw["begins"][1:], True))
    if len(bad):
        fail(f"{path}: row {bad[0]} has no next state, its episode ends there without being over")
    if frames.dtype != np.uint8 and not np.isfinite(frames).all():
        fail(f"{path}: the observation of row {np.argwhere(~np.isfinite(frames))[0][0]} is not finite")
    age = rows - np.maximum.accumulate(np.where(raw["begins"], rows, 0))
    episode = np.cumsum(raw["begins"]) - 1
    # the real rows alone: each piece is contiguous among them
    at = np.flatnonzero(real)
    change = np.flatnonzero(np.diff(episode[at]))
    first, last = np.append(0, change + 1), np.append(change, len(at) - 1)
    returns = np.add.reduceat(rew[at], first, dtype=np.float64)
    whole, ended = raw["whole"][episode[at[first]]], terminal[at[last]]
    if args.clip_rewards:
        np.sign(rew, out=rew)
    lasts = np.repeat(last, last - first + 1)
    left = lasts - np.arange(len(at)) + np.float32(1)
    g = returns_to_go(rew[at], lasts.astype(np.int32), args.gamma)
    g[~np.repeat(ended, last - first + 1) & (args.gamma**left > 0.01)] = np.nan
    held = np.zeros(len(first), bool)
    if args.holdout and len(first) > 1:
        order = np.random.default_rng(args.seed).permutation(len(first))
        held[order[: max(1, round(args.holdout * len(first)))]] = True
    held_rows = np.repeat(held, last - first + 1)
    if held_rows.all():
        fail(f"{path}: nothing to train on, all {len(at)} transitions are held out")
    digest = hashlib.sha256()
    some = (frames[0], frames[len(frames) // 2], frames[-1])
    for array in (raw["act"], rew, terminal, real, raw["begins"], *some):
        digest.update(np.ascontiguousarray(array))
    returns = returns[whole] if whole.any() else returns
    of = f"the {whole.sum():,} whole ones" if whole.any() else "these pieces, none of them whole,"
    mean = float(returns.mean())
    to_go = np.full(len(real), np.nan, np.float32)
    to_go[at] = g
    columns = {"act": raw["act"].astype(np.int64), "rew": rew, "terminal": terminal, "real": real}
    columns |= {"age": np.minimum(age, STACK - 1).astype(np.uint8), "returns_to_go": to_go}
    columns |= {"train": at[~held_rows], "holdout": at[held_rows], "starts": at[first][age[at[first]] == 0]}
    if not len(columns["starts"]):  # pieces of DQN Replay all begin with three frames of their past
        columns["starts"] = at[first]
    data = Data(frames, columns, args, device)
    data.info = {"dataset": str(path), "dataset_sha256": digest.hexdigest(), "dataset_return_mean": mean}
    data.info |= {"reward_min": float(rew[real].min()), "reward_max": float(rew[real].max())}
    data.info |= {"terminals": int(terminal[at].sum())} | raw.get("made_by", {})
    print(
        f"{path}: {len(at):,} transitions in {len(first):,} episodes, {ended.sum():,} ended by a terminal "
        f"state{raw['note']}\n  returns of {of} {mean:.1f} mean, "
        f"{returns.min():.1f} min, {returns.max():.1f} max\n"
        f"  {len(data.train):,} transitions to train on, {len(data.holdout):,} held out"
    )
    return data


def read_own(folder: Path, args: Args, device) -> dict:
    """What collect() and unpack() write: .npy files, mapped into memory or read."""
    arrays, kinds = {}, {"observations": "uf", "actions": "iu", "rewards": "iuf"}
    for name in ("observations", "actions", "rewards", "terminals", "real", "begins"):
        path = folder / f"{name}.npy"
        try:
            x = arrays[name] = np.load(path, "r", allow_pickle=False)  # "c" fails beyond the memory's size
            dims = {"u": 3, "f": 2}.get(x.dtype.kind) if name == "observations" else 1
            if x.ndim != dims or x.dtype.kind not in kinds.get(name, "biu"):
                raise ValueError(f"shape {x.shape} of {x.dtype}")
        except Exception as e:  # np.load raises half a dozen kinds of it
            fail(f"{path}: missing or damaged ({type(e).__name__}: {first_line(e)})")
        if len(arrays[name]) != len(arrays["observations"]):
            fail(f"{path}: {len(arrays[name])} rows, observations.npy has {len(arrays['observations'])}")
    try:
        made_by = json.loads((folder / "made_by.json").read_text())
        whole = np.array(made_by["whole"], bool)
        if len(whole) != arrays["begins"].sum() or not arrays["begins"][0]:
            raise ValueError(f"{len(whole)} episodes, begins.npy has {arrays['begins'].sum()}")
    except (OSError, ValueError, LookupError, TypeError) as e:
        fail(f"{folder / 'made_by.json'}: missing or damaged ({first_line(e)})")
    frames = arrays["observations"]
    if args.storage != "mmap":
        reserve(frames.nbytes, "frames", device if args.storage == "device" else torch.device("cpu"))
        frames = np.array(frames)
    raw = {"frames": frames, "act": np.array(arrays["actions"])}
    raw["rew"] = np.array(arrays["rewards"], np.float32)
    names = {"terminal": "terminals", "real": "real", "begins": "begins"}
    raw |= {k: np.array(arrays[name], bool) for k, name in names.items()}
    return raw | {"whole": whole, "note": "", "made_by": made_by["info"]}


def write_own(folder: Path, raw: dict, fill):
    """The folder that read_own() reads, complete or not at all; fill(observations) writes the frames."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        shape, dtype = raw["frames"]
        frames = np.lib.format.open_memmap(temporary / "observations.npy", "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # a full disk says so here; a mapped write would kill the process
            with open(temporary / "observations.npy", "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, f.seek(0, os.SEEK_END))
        fill(frames)
        names = {"act": "actions", "rew": "rewards", "terminal": "terminals"}
        names |= {"real": "real", "begins": "begins"}
        for key, name in names.items():
            np.save(temporary / f"{name}.npy", raw[key])
        whole = raw["whole"].tolist()
        (temporary / "made_by.json").write_text(json.dumps({"whole": whole, "info": raw.get("made_by", {})}))
        os.replace(temporary, folder)
    except OSError as e:
        if not folder.is_dir():  # else another run has just made the same set
            fail(f"{folder} could not be written ({e})")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def opened(path: Path):
    """A .npy array inside a .gz file: its stream after the header, its shape and type."""
    try:
        with gzip.open(path) as f:
            version = np.lib.format.read_magic(f)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, by_column, dtype = read[version](f)
            if by_column or dtype.hasobject:
                raise ValueError("not a plain array")
            yield f, shape, dtype
    except Exception as e:  # gzip, zlib and numpy's header raise a dozen kinds of it
        fail(f"{path}: missing or damaged ({type(e).__name__}: {first_line(e)})")


def fill_from(f, out):
    """Bytes of a stream into rows `out`, without a copy of the whole."""
    view = memoryview(out.reshape(-1).view(np.uint8))
    while len(view):
        n = f.readinto(view[: 1 << 24])
        if not n:
            raise EOFError("the file ends too early")
        view = view[n:]


def finish(f):
    """The stream ends here; only now has gzip compared its checksum."""
    if f.read(1):
        raise ValueError("longer than its header says")


def read_column(folder: Path, name: str, number: int, kinds: str):
    path = folder / f"$store$_{name}_ckpt.{number}.gz"
    with opened(path) as (f, shape, dtype):
        if len(shape) != 1 or dtype.kind not in kinds:
            raise ValueError(f"shape {shape} of {dtype}")
        out = np.empty(shape, dtype)
        fill_from(f, out)
        finish(f)
    return out


def read_dqn_replay(folder: Path, args: Args, device) -> dict:
    """A DQN Replay folder: circular buffers of single frames, dumped at each checkpoint N.

    Three rows of zeros stand before each episode. Nothing is a transition whose stack or next frame would
    reach across an episode's end, the write cursor (add_count) or the end of what is read.
    """
    pattern = r"\$store\$_(?:observation|action|reward|terminal)_ckpt\.(\d+)\.gz"
    numbers = sorted({int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(pattern, p.name))})
    missing = [n for n in args.checkpoints if n not in numbers]
    if missing:
        fail(f"{folder}: no checkpoint {missing[0]}, it has {numbers[0]} to {numbers[-1]}")
    numbers = sorted(set(args.checkpoints)) if args.checkpoints else numbers
    files, draw, notes = [], np.random.default_rng(args.seed), set()
    for n in numbers:
        columns = {
            k: read_column(folder, k, n, kinds)
            for k, kinds in (("action", "iu"), ("reward", "iuf"), ("terminal", "biu"))
        }
        path = folder / f"$store$_observation_ckpt.{n}.gz"
        with opened(path) as (_, shape, dtype):
            if len(shape) != 3 or dtype != np.uint8:
                raise ValueError(f"shape {shape} of {dtype}, expected (rows, height, width) of uint8")
        lengths = {len(x) for x in columns.values()} | {shape[0]}
        if len(lengths) > 1 or (files and shape[1:] != files[0]["shape"][1:]):
            fail(f"{path}: shape {shape} does not fit the other files, whose lengths are {sorted(lengths)}")
        size = cursor = shape[0]
        count_file = folder / f"add_count_ckpt.{n}.gz"
        if count_file.exists():
            with opened(count_file) as (f, _, dtype):
                if dtype.kind not in "iu":
                    raise ValueError(f"{dtype}")
                count = np.empty(1, dtype)
                fill_from(f, count)
                finish(f)
                count = int(count[0])
                if count < 0:
                    raise ValueError(f"{count}")
            size, cursor = (count, count) if count < size else (size, count % max(size, 1))
        else:
            notes.add("; no add_count: files are taken to be written from row 0 on")
        files.append({"path": path, "shape": shape, "size": size, "cursor": cursor} | columns)
    budget, pieces = round(args.fraction * sum(x["size"] for x in files)), []
    for x in files:  # which rows of each file are read, [lo, hi)
        end = np.flatnonzero(x["terminal"][: x["size"]]) + 1
        bounds = np.unique(np.r_[0, end, x["cursor"] if 0 < x["cursor"] < x["size"] else 0, x["size"]])
        spans = list(zip(bounds, bounds[1:]))
        if args.subset == "uniform" and args.fraction < 1:
            spans = [s for s in spans if draw.random() < args.fraction]
        else:
            first = args.subset == "first"
            n = min(budget, x["size"]) if first else max(1, round(args.fraction * x["size"]))
            oldest = x["cursor"] if first else 0
            left = [n - (lo - oldest) % x["size"] for lo, _ in spans]  # of the n rows, from lo on; < 0: none
            spans = [(lo, min(hi, lo + k)) for (lo, hi), k in zip(spans, left)]
            budget -= n
        pieces += [(x, int(lo), int(hi)) for lo, hi in spans if hi - lo >= STACK]  # the others hold no stack
    if not pieces:
        fail(f"{folder}: --fraction {args.fraction} leaves nothing to read")
    lengths = np.array([hi - lo for _, lo, hi in pieces])
    after = np.append(0, np.cumsum(lengths))  # first row of each piece, and the number of rows
    raw = {
        k: np.concatenate([x[name][lo:hi] for x, lo, hi in pieces])
        for k, name in (("act", "action"), ("rew", "reward"), ("terminal", "terminal"))
    }
    raw |= {"rew": raw["rew"].astype(np.float32), "terminal": raw["terminal"] != 0, "note": "".join(notes)}
    raw["begins"] = np.zeros(after[-1], bool)
    raw["begins"][after[:-1]] = True
    age = np.arange(after[-1]) - np.repeat(after[:-1], lengths)
    raw["real"] = age >= STACK - 1
    raw["real"][after[1:] - 1] &= raw["terminal"][after[1:] - 1]
    begun = [lo not in (0, x["cursor"]) and bool(x["terminal"][lo - 1]) for x, lo, _ in pieces]
    raw["whole"] = np.array(begun) & raw["terminal"][after[1:] - 1]

    def fill(out):
        at = 0
        for x in files:
            with opened(x["path"]) as (f, shape, _):
                row, position = 0, f.tell()
                for _, lo, hi in [p for p in pieces if p[0] is x]:
                    if lo != row:
                        f.seek(position + lo * shape[1] * shape[2])
                    fill_from(f, out[at : at + hi - lo])
                    at, row = at + hi - lo, hi
                if args.fraction == 1:
                    f.seek(position + math.prod(shape))
                    finish(f)

    shape = (int(after[-1]), *files[0]["shape"][1:])
    if args.storage == "mmap":  # unpacked once
        stamps = [p.stat().st_mtime_ns for p in sorted(folder.glob("*_ckpt.*.gz"))]
        key = f"{folder.resolve()}{numbers}{stamps}{args.fraction}{args.subset}{args.seed}"
        key = hashlib.sha256(key.encode())
        unpacked = Path("datasets") / f"unpacked_{key.hexdigest()[:16]}"
        if not unpacked.exists():
            print(f"unpacking {math.prod(shape) / 2**30:.1f} GiB of {folder} into {unpacked}")
            write_own(unpacked, raw | {"frames": (shape, np.uint8)}, fill)
        return read_own(unpacked, args, device) | {"note": raw["note"]}
    reserve(math.prod(shape), "frames", device if args.storage == "device" else torch.device("cpu"))
    frames = np.empty(shape, np.uint8)
    fill(frames)
    return raw | {"frames": frames}


def to_frames(obs, path):
    """Minari's observations of an episode as (T, 84, 84) uint8 or (T, d) float32."""
    obs = np.asarray(obs)
    if obs.ndim == 2:
        return obs.astype(np.float32)
    if obs.ndim == 4 and obs.shape[-1] == 3:  # luminance, as ALE's grey screen
        obs = obs @ np.array([0.299, 0.587, 0.114], np.float32)
    elif obs.ndim == 4 and obs.shape[-1] == 1:
        obs = obs[..., 0]
    elif obs.ndim == 4:
        obs = obs[:, -1]  # the latest of a stack
    if obs.ndim != 3:
        fail(f"{path}: observations of shape {obs.shape[1:]}, expected frames or vectors")
    if obs.shape[1:] != (84, 84):
        obs = F.interpolate(torch.from_numpy(obs.astype(np.float32))[:, None], (84, 84), mode="area")[:, 0]
    return np.asarray(obs).round().astype(np.uint8)


def read_minari(name: str, args: Args, device) -> dict:
    """A Minari set: every episode has one observation more than actions."""
    minari, columns = need("minari"), {k: [] for k in ("frames", "act", "rew", "terminal", "real", "begins")}
    try:
        episodes = list(minari.load_dataset(name).iterate_episodes())
    except Exception as e:  # of its storage, of the network, of h5py
        fail(f"--dataset {name}: no such folder, and not a Minari id ({type(e).__name__}: {first_line(e)})")
    for i, e in enumerate(episodes):
        frames, T = to_frames(e.observations, f"{name} episode {i}"), len(e.actions)
        if len(frames) != T + 1 or len(e.rewards) != T or np.ndim(e.actions) != 1:
            fail(
                f"{name} episode {i}: {len(frames)} observations, actions {np.shape(e.actions)}, "
                f"{len(e.rewards)} rewards, expected T + 1, (T,), T"
            )
        row = np.arange(T + 1)
        columns["frames"].append(frames)
        columns["act"].append(np.append(e.actions, 0))
        columns["rew"].append(np.append(e.rewards, 0).astype(np.float32))
        columns["terminal"].append(np.append(e.terminations, False).astype(bool))
        columns["real"].append(row < T)
        columns["begins"].append(row == 0)
    reserve(2 * sum(x.nbytes for x in columns["frames"]), "frames", torch.device("cpu"))
    raw = {k: np.concatenate(v) for k, v in columns.items()}
    return raw | {"whole": np.ones(len(episodes), bool), "note": ""}


def load(name: str, args: Args, envs, device) -> Data:
    """The game's data from a folder of ours, a DQN Replay folder or a Minari set."""
    path = Path(name)
    replay = any(path.glob("$store$_*_ckpt.*.gz"))
    only_if(args, replay, f"with {name}, no DQN Replay folder", "checkpoints", "fraction")
    if not path.is_dir() and args.storage == "mmap":
        fail(f"--storage mmap reads folders, {name} is none")
    if not path.is_dir():
        raw = read_minari(name, args, device)
    elif (path / "made_by.json").exists() or (path / "observations.npy").exists():
        raw = read_own(path, args, device)
    elif replay:
        raw = read_dqn_replay(path, args, device)
    else:
        fail(f"{path}: neither a set of this script nor a DQN Replay folder ($store$_observation_ckpt.N.gz)")
    if raw["frames"].shape[1:] != envs.frame_shape:
        fail(f"{path}: frames of shape {raw['frames'].shape[1:]}, {envs.name} has {envs.frame_shape}")
    return prepare(path, raw, args, envs.actions, device)


HUMAN = {  # scores of a random player and of a person, as google-deepmind/dqn_zoo lists them for Atari-57
    "alien": (227.8, 7127.7), "amidar": (5.8, 1719.5), "assault": (222.4, 742),
    "asterix": (210, 8503.3), "asteroids": (719.1, 47388.7), "atlantis": (12850, 29028.1),
    "bank_heist": (14.2, 753.1), "battle_zone": (2360, 37187.5), "beam_rider": (363.9, 16926.5),
    "berzerk": (123.7, 2630.4), "bowling": (23.1, 160.7), "boxing": (0.1, 12.1),
    "breakout": (1.7, 30.5), "centipede": (2090.9, 12017), "chopper_command": (811, 7387.8),
    "crazy_climber": (10780.5, 35829.4), "defender": (2874.5, 18688.9), "demon_attack": (152.1, 1971),
    "double_dunk": (-18.6, -16.4), "enduro": (0, 860.5), "fishing_derby": (-91.7, -38.7),
    "freeway": (0, 29.6), "frostbite": (65.2, 4334.7), "gopher": (257.6, 2412.5),
    "gravitar": (173, 3351.4), "hero": (1027, 30826.4), "ice_hockey": (-11.2, 0.9),
    "jamesbond": (29, 302.8), "kangaroo": (52, 3035), "krull": (1598, 2665.5),
    "kung_fu_master": (258.5, 22736.3), "montezuma_revenge": (0, 4753.3), "ms_pacman": (307.3, 6951.6),
    "name_this_game": (2292.3, 8049), "phoenix": (761.4, 7242.6), "pitfall": (-229.4, 6463.7),
    "pong": (-20.7, 14.6), "private_eye": (24.9, 69571.3), "qbert": (163.9, 13455),
    "riverraid": (1338.5, 17118), "road_runner": (11.5, 7845), "robotank": (2.2, 11.9),
    "seaquest": (68.4, 42054.7), "skiing": (-17098.1, -4336.9), "solaris": (1236.3, 12326.7),
    "space_invaders": (148, 1668.7), "star_gunner": (664, 10250), "surround": (-10, 6.5),
    "tennis": (-23.8, -8.3), "time_pilot": (3568, 5229.2), "tutankham": (11.4, 167.6),
    "up_n_down": (533.4, 11693.2), "venture": (0, 1187.5), "video_pinball": (16256.9, 17667.9),
    "wizard_of_wor": (563.5, 4756.5), "yars_revenge": (3092.9, 54576.9), "zaxxon": (32.5, 9173.3),
}  # fmt: skip


def game_of(env_id: str) -> str:
    """ALE/SpaceInvaders-v5 is space_invaders."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", env_id.removeprefix("ALE/").split("-")[0]).lower()


def normalized_score(env_id: str, value: float) -> float | None:
    """0 for a random player, 100 for the human of HUMAN; None where there is no reference."""
    low, high = HUMAN.get(game_of(env_id), (None, None))
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
