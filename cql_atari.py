r"""Conservative Q-learning (CQL) for discrete actions: offline RL from pixels or vectors.

Kumar, Zhou, Tucker, Levine, arXiv 2006.04779. Q-learning asks for the best action, also where the
data D never tried it, and finds the most overestimated one. Over finitely many actions the
log-sum-exp is exact:

  min_Q  alpha E_s[ log sum_a exp Q(s,a) - Q(s, a_data) ]  +  E_D[ TD error ]               (Eq. 4)

What alpha multiplies is a cross-entropy with Q as logits: behaviour cloning's loss beside
Q-learning's. What a value is, and with it the TD error, is the head's matter:

  c51  51 atoms z from v_min to v_max, cross-entropy to the projected R + gamma^m z'    1707.06887
  qr   200 quantiles, Huber quantile loss                                               1710.10044
  dqn  a number, Huber loss                                                          Nature 518:529
  rem  200 numbers, Huber loss of a random convex mixture of them                       1907.04543

  symbol         in the code            shape
  s, a           batch.obs .act         (B, 4, 84, 84) uint8 or (B, d); (B,)
  R              batch.rew              (B,), r_0 + gamma r_1 + ..., at most n rewards
  s'             batch.next_obs         as s, m <= n steps later; unused where terminated
  gamma^m        batch.discount         (B,), 0 where the episode terminated
  phi(s)         net.features(obs)      (B, D), what the last linear layer reads
  logits, atoms  net.heads[g](phi)      (B, A, K), each game g has its own actions A
  Q(s,a)         net.q(out)             (B, A), the mean over the head
  alpha          --cql-alpha            authors, QR head: 4 at 1 % of DQN Replay, 1 at 10 %

phi depends on the state alone, so that DR3 (arXiv 2112.04716) is the mean of phi(s).phi(s') here,
terminal rows counted as 0. With --n-step above 1 the rewards of the data's own actions count as if
the greedy policy had taken them: faster, and biased. Several games share the encoder; a minibatch
holds as many rows of one as of another.

Quick, on random play that it records itself; 1 % of DQN Replay; two games; four processes:
  python cql_atari.py
  python cql_atari.py --env ALE/Breakout-v5 --dataset Breakout/1/replay_logs --fraction 0.01 \
      --width 32 --cql-alpha 4 --n-step 1 --learning-rate 5e-5 --target-network-frequency 2_000 \
      --num-updates 6_250_000
  python cql_atari.py --env ALE/Pong-v5 ALE/Breakout-v5 --encoder resnet
  torchrun --nproc_per_node=4 cql_atari.py --batch-size 128

While it trains, `diagnostics/q_data` should settle and not fall, `td_error` be small, `srank` not
collapse; --cql-alpha 0 shows what alpha is for. The run ends with a verdict and the flag to try.
(The bare run's is underfitting: 20 rewards of random play are noisy targets.)

Networks, losses and Learner.update are the algorithm, Data stacks frames, train() is the loop.
Readers of files and the blocks marked "shared", which sibling scripts have too, can wait. Known
limits: discrete actions; pixels of environments other than ALE's must be (H, W) uint8 frames. Left
out on purpose: prioritised replay, continuous control from pixels.
"""

import copy
import ctypes
import gzip
import hashlib
import io
import json
import math
import mmap
import os
import pickletools
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_type_hints

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
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # seeds network, minibatches, random play and evaluation
    cuda: bool = True  # use the GPU if there is one
    threads: int = 1  # CPU threads of PyTorch (0: all cores; slow where something else runs too)
    compile: bool = False  # run the loss through torch.compile
    cudagraphs: bool = True  # on a GPU, in one process, --storage device: capture the whole update
    track: bool = False  # log to Weights & Biases as well (needs `pip install wandb`)
    wandb_project_name: str = "offline-rl"  # project of --track
    wandb_entity: str | None = None  # team of --track
    # one environment or several: ALE/Name-v5, or any with discrete actions and vectors or (H, W)
    # frames to see, `module:Id` where a package has to be imported for it
    env_id: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--env"])] = ("ALE/SpaceInvaders-v5",)
    run_dir: str = "runs"  # folder that holds the run folders
    resume: str | None = None  # run folder to go on from; its arguments hold unless given again
    checkpoint_frequency: int = 1_000  # updates between checkpoints (0: only at the end)
    eval_frequency: int = 2_000  # updates between evaluations (0: only at the end)
    eval_episodes: int = 10  # episodes of each evaluation, side by side (0: no evaluation)
    log_frequency: int = 100  # updates between logged losses
    diagnostics_frequency: int = 250  # updates between diagnostics (0: nothing to judge by)

    # length and data
    num_updates: int = 4_000  # gradient steps (12_500_000 in the authors' defaults)
    batch_size: int = 32  # B, transitions in a minibatch of all games and processes together
    # for each environment a DQN Replay folder, a Minari id or folder, or what this script has made
    # under --data-dir; not given: collect random play and keep it
    dataset: tuple[str, ...] = ()
    data_dir: str = "datasets"  # folder that keeps what is collected or unpacked
    collect_steps: int = 40_000  # rows of random play of each game
    collect_repeat: float = 0.95  # chance that random play repeats its action: moves reach further
    fraction: float = 1.0  # share of a DQN Replay folder that is read
    # the first rows of each file (the authors' loader), episodes drawn from all, the oldest rows
    subset: Literal["prefix", "uniform", "first"] = "prefix"
    # where the frames lie: the device, main memory, or a file (larger than memory)
    storage: Literal["device", "memory", "mmap"] = "device"
    holdout: float = 0.05  # share of episodes kept out of training, for the TD error (peers: 0)
    clip_rewards: bool = True  # train on the sign of the rewards

    # Q-learning
    head: Literal["c51", "qr", "dqn", "rem"] = "qr"  # what a value is (table above)
    v_min: float = -10.0  # least atom of c51
    v_max: float = 10.0  # largest atom of c51
    gamma: float = 0.99  # discount factor
    n_step: int = 20  # rewards before the bootstrap (authors: 1); 20 for random play, else 1 to 5
    double: bool = True  # the network chooses a', its target values it (authors: off)
    learning_rate: float = 1e-4  # of Adam (authors: 5e-5), whose epsilon is 0.01 / 32
    target_network_frequency: int = 100  # updates between copies to the target (authors: 2_000)

    # CQL and representation
    cql_alpha: float = 0.1  # weight of the conservative term; more for few or narrow data; 0: naive
    dr3_coef: float = 0.0  # weight of the mean of phi(s).phi(s') (authors: 0.1 with a DQN head)
    unit_norm: bool = False  # divide the features phi by their norm (arXiv 2211.15144)
    dropout: float = 0.0  # rate on the features, off in the target network
    # auto: nature for frames, mlp for vectors; resnet: group norm and learned spatial embeddings
    encoder: Literal["auto", "nature", "resnet", "mlp"] = "auto"
    width: int = 16  # channels of the first layer (authors: 32); phi has 16 times as many entries


# a resumed run must have these as before: its networks and its data would not fit
FIXED = "env_id seed head v_min v_max encoder width holdout clip_rewards".split()


def check(args: Args):
    """Refuse what no run could use, before anything starts."""
    check_numbers(args, "seed checkpoint_frequency eval_frequency diagnostics_frequency", 0, 1e12)
    check_numbers(args, "log_frequency num_updates batch_size target_network_frequency", 1, 1e12)
    check_numbers(args, "threads eval_episodes cql_alpha dr3_coef", 0, 1e4)
    check_numbers(args, "gamma dropout holdout collect_repeat", 0, 0.99999)
    check_numbers(args, "n_step width", 1, 4096)
    check_numbers(args, "collect_steps", 2, 1e12)
    check_numbers(args, "fraction learning_rate", 1e-12, 1)
    check_numbers(args, "v_min v_max", -1e12, 1e12)
    games, sets = len(args.env_id), len(args.dataset)
    if games == 0 or len(set(args.env_id)) < games:
        fail(f"--env-id {' '.join(args.env_id)}: expected one or several different environments")
    if sets not in (0, games):
        fail(f"--dataset names {sets} sets, --env-id {games} environments")
    check_effect(args, "collect_steps collect_repeat", sets == 0, "with --dataset")
    check_effect(args, "fraction", sets > 0, "without a DQN Replay --dataset")
    check_effect(args, "subset", args.fraction < 1, "with --fraction 1")
    if args.v_min >= args.v_max:
        fail(f"--v-min {args.v_min} is not below --v-max {args.v_max}")
    check_effect(args, "v_min v_max", args.head == "c51", f"with --head {args.head}")
    parts = games * processes()[1]
    if args.batch_size % parts:
        fail(f"--batch-size {args.batch_size} is not a multiple of {parts}, games x processes")


# --------------------------------------------------------------------------------------- networks
class Block(nn.Module):
    """Two 3 x 3 convolutions with group norm, added to a 1 x 1 projection of their input."""

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
    """Where, not only what: each channel's map against 5 learned ones, (B, C, H, W) to (B, 5 C)."""

    def __init__(self, shape):
        super().__init__()
        self.maps = nn.Parameter(torch.randn(*shape, 5) / (shape[1] * shape[2]) ** 0.5)

    def forward(self, x):
        return torch.einsum("bchw,chwf->bcf", x, self.maps).flatten(1)


class Network(nn.Module):
    """Encoder to phi (B, D), D = 16 x width, and a linear head for each game, (B, A, K)."""

    def __init__(self, shape: tuple, actions: list[int], args: Args):
        super().__init__()
        self.args, self.image = args, len(shape) == 3
        w, D = args.width, 16 * args.width
        auto = "nature" if self.image else "mlp"
        self.kind = auto if args.encoder == "auto" else args.encoder
        if (self.kind == "mlp") == self.image:
            fail(f"--encoder {self.kind} does not fit observations of shape {shape}")
        layers = []
        if self.kind == "mlp":
            layers = [nn.Linear(shape[0], D), nn.ReLU(), nn.Linear(D, D), nn.ReLU()]
        elif self.kind == "nature":  # no padding: 84 x 84 ends as 7 x 7 (authors: padded, 11 x 11)
            sizes = [(shape[0], w, 8, 4), (w, 2 * w, 4, 2), (2 * w, 2 * w, 3, 1)]
            for fan_in, fan_out, kernel, stride in sizes:
                layers += [nn.Conv2d(fan_in, fan_out, kernel, stride), nn.ReLU()]
            layers.append(nn.Flatten())
        else:  # 84 -> 42, then 42, 21, 11, 6
            if w % 4 or w < 8:  # PyTorch 2.13 crashes in the backward pass on a CPU at width 4
                fail(f"--width {w}: --encoder resnet needs a multiple of 4, its groups, from 8 on")
            layers = [nn.Conv2d(shape[0], w, 3, 2, 1), nn.ReLU()]
            sizes = [w, w, 2 * w, 4 * w, 4 * w]
            for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
                layers += [Block(fan_in, fan_out, 2 if i else 1), Block(fan_out, fan_out, 1)]
        if self.image:
            with torch.no_grad(), failing(f"frames of {shape[1:]} are too small", RuntimeError):
                maps = nn.Sequential(*layers)(torch.zeros(1, *shape))
            if self.kind == "resnet":
                layers.append(SpatialEmbeddings(maps.shape[1:]))
                maps = layers[-1](maps)
            layers += [nn.Linear(maps.shape[1], D), nn.ReLU()]
        self.encoder = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.K = {"c51": 51, "qr": 200, "dqn": 1, "rem": 200}[args.head]
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(D, A * self.K), nn.Unflatten(1, (A, self.K))) for A in actions
        )
        self.register_buffer("z", torch.linspace(args.v_min, args.v_max, 51))
        if args.head == "c51":  # a peak at 0: from a uniform start Q takes long to settle
            for head, A in zip(self.heads, actions):
                head[0].bias.data -= (self.z.abs() / (self.z[1] - self.z[0])).repeat(A)
        self.register_buffer("mean", torch.zeros(() if self.image else shape))
        self.register_buffer("std", torch.ones(() if self.image else shape))

    def features(self, obs, record: list | None = None):
        """phi(s), (B, D). `record` receives each layer's activations, units last."""
        if self.image:
            x = obs.contiguous(memory_format=torch.channels_last).float().div_(255)
        else:
            x = (obs.float() - self.mean) / self.std
        for layer in self.encoder:
            x = layer(x)
            if record is not None and isinstance(layer, nn.ReLU | Block):
                record.append(x.movedim(1, -1).flatten(0, -2))
        if self.args.unit_norm:
            x = F.normalize(x, dim=-1)
        return F.dropout(x, self.args.dropout, self.training)

    def q(self, out, mixture=None):
        """Q(s,a), (B, A), of a head's output (B, A, K): its mean, or rem's mixture (K,) of it."""
        if self.args.head == "c51":
            return (torch.softmax(out, -1) * self.z).sum(-1)
        return out.mean(-1) if mixture is None else (out * mixture).sum(-1)


# ------------------------------------------------------------------------- losses and the learner
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
    """Mass of R + gamma^m z, probabilities p (B, K), on the atoms z (K,): (B, K).

    An atom that lands between two neighbours is shared by nearness, one outside goes to the edge
    (arXiv 1707.06887, Algorithm 1)."""
    moved = (rew[:, None] + discount[:, None] * z).clamp(z[0], z[-1])
    share = (1 - (moved[:, :, None] - z).abs() / (z[1] - z[0])).clamp(min=0)  # (B, from, to)
    return (p[:, :, None] * share).sum(1)


def quantile_huber(theta, y):
    """Huber quantile loss (kappa 1) of theta (B, K) to samples y (B, M), a number a row: the sum
    over K of the mean over M (arXiv 1710.10044)."""
    theta, y = torch.broadcast_tensors(theta[:, :, None], y[:, None, :])  # (B, K, M)
    tau = (torch.arange(theta.shape[1], device=theta.device) + 0.5)[:, None] / theta.shape[1]
    weight = torch.where(y < theta, 1 - tau, tau)
    return (weight * F.smooth_l1_loss(theta, y, reduction="none")).mean(2).sum(1)


def greedy(net, g: int, phi_next, out_next, mixture, args: Args):
    """a' (B,): the target network's choice in out_next (B, A, K); --double: the network's."""
    out = net.heads[g](phi_next) if args.double else out_next
    return net.q(out, mixture).argmax(-1)


def td_loss(net, out, out_next, next_act, batch: Batch, mixture, args: Args):
    """TD error of each row, (B,): out, out_next (B, A, K) of network and target network, next_act
    a' (B,); mixture (K,) sums to 1: rem's random weights, None for the others."""
    chosen, following = pick(out, batch.act), pick(out_next, next_act)
    if args.head == "c51":
        y = project(net.z, torch.softmax(following, -1), batch.rew, batch.discount)
        return -(y * torch.log_softmax(chosen, -1)).sum(-1)
    if mixture is not None:
        chosen = (chosen * mixture).sum(-1, keepdim=True)
        following = (following * mixture).sum(-1, keepdim=True)
    y = batch.rew[:, None] + batch.discount[:, None] * following
    if args.head == "qr":
        return quantile_huber(chosen, y)
    return F.smooth_l1_loss(chosen, y, reduction="none")[:, 0]


def cql_term(q, act):
    """log sum_a exp Q(s,a) - Q(s, a_data), exact: (B,)."""
    return torch.logsumexp(q, -1) - q.gather(1, act[:, None])[:, 0]


def q_loss(net, target, batches: list[Batch], mixture, args: Args):
    """TD error + alpha x conservative term + c x DR3, mean over the rows of all games."""
    sizes = [len(b.act) for b in batches]
    next_obs = torch.cat([b.next_obs for b in batches])
    phi = net.features(torch.cat([b.obs for b in batches]))
    with torch.no_grad():
        phi_target = target.features(next_obs).split(sizes)
    if args.double or args.dr3_coef > 0:  # DR3 has a gradient through both sides
        with torch.set_grad_enabled(args.dr3_coef > 0):
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
    info = {"td_loss": td, "cql_loss": conservative, "q_values": q_data}
    info = {name: torch.cat(rows).mean() for name, rows in info.items()}
    loss = info["td_loss"] + args.cql_alpha * info["cql_loss"]
    if args.dr3_coef > 0:
        bootstraps = (torch.cat([b.discount for b in batches]) > 0).float()
        info["dr3_loss"] = ((phi * phi_next).sum(-1) * bootstraps).mean()
        loss = loss + args.dr3_coef * info["dr3_loss"]
    info["loss"] = loss
    return loss, {name: x.detach() for name, x in info.items()}


class Learner(nn.Module):
    """Network, target network, optimiser."""

    def __init__(self, shape: tuple, actions: list[int], args: Args, device):
        super().__init__()
        self.args, self.device = args, device
        self.net = Network(shape, actions, args)
        self.target = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.to(device)
        self.loss = torch.compile(q_loss) if args.compile else q_loss
        flags = {"eps": 0.01 / 32, "fused": True, "capturable": device.type == "cuda"}
        self.optim = torch.optim.Adam(self.net.parameters(), lr=args.learning_rate, **flags)

    def update(self, batches: list[Batch]) -> dict:
        """One gradient step, of all processes together; the caller moves the target network."""
        mixture = None
        if self.args.head == "rem":  # another one each time
            mixture = torch.rand(self.net.K, device=self.device)
            mixture = mixture / mixture.sum()
        loss, info = self.loss(self.net, self.target, batches, mixture, self.args)
        self.optim.zero_grad()
        loss.backward()
        average_gradients(self.net.parameters())
        self.optim.step()
        return info

    def refresh_target(self):
        self.target.load_state_dict(self.net.state_dict())

    def standardise(self, games: list):
        """Vector observations to mean 0 and deviation 1; the networks keep both for acting."""
        frames = torch.cat([data.frames for data in games])
        std, mean = torch.std_mean(frames, dim=0, correction=0)
        for net in (self.net, self.target):
            net.mean.copy_(mean)
            net.std.copy_(std + 1e-3)  # an entry that never varies stays 0

    @torch.no_grad()
    def q(self, obs, game: int):
        """Q(s,a) (B, A) without gradient, in chunks that bound the memory of activations."""
        head = self.net.heads[game]
        return torch.cat([self.net.q(head(self.net.features(x))) for x in obs.split(256)])


# ------------------------------------------------------------------------------ several processes
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
            fail(f"more processes here than GPUs ({torch.cuda.device_count()}): add --no-cuda")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(hours=3))
    if rank:
        sys.stdout = open(os.devnull, "w")


def reduced(x, how):
    """x summed, or its maximum taken, over all processes."""
    try:
        dist.all_reduce(x, how)
    except RuntimeError as e:
        fail(f"another process is gone ({e}); the last checkpoint is intact", 1)
    return x


def average_gradients(parameters):
    """The mean over processes: their shares are equal, so it is that of the joined batch."""
    if dist.is_initialized():
        gradients = [p.grad for p in parameters]
        joined = reduced(torch.cat([g.flatten() for g in gradients]), dist.ReduceOp.SUM)
        parts = (joined / processes()[1]).split([g.numel() for g in gradients])
        for g, mean in zip(gradients, parts):
            g.copy_(mean.view_as(g))


def agree(value: int) -> int:
    """The largest of all processes' values; every one must call it at the same point."""
    return int(reduced(torch.tensor(value), dist.ReduceOp.MAX)) if dist.is_initialized() else value


# ------------------------------------------------------------------------------------------- data
STACK = 4  # frames that a network sees


class Data:
    """Rows of one game: row i is (frame, action, reward) i; the frames lie where --storage says.

    `real` rows are transitions; unless it is terminal, a row's next state is the row after it. The
    others only hold a frame: the last one of an episode, which one that was cut, by time or by the
    end of a file, must have, or one before its start. `age` counts the frames of the same episode
    before a row, up to 3: beyond them a stack is zero. `train` and `holdout` list real rows, split
    by episodes; `starts` the first rows of episodes; `returns_to_go` is NaN where a cut hides more
    than 1 % of it."""

    def __init__(self, frames, columns: dict, args: Args, device):
        """frames (rows, H, W) uint8 or (rows, d) float32; columns: numpy arrays (rows,)."""
        self.args, self.device, self.stacks = args, device, 0
        self.mapped = frames._mmap if isinstance(frames, np.memmap) else None
        if self.mapped:
            self.mapped.madvise(mmap.MADV_RANDOM)  # else each of a batch's reads fetches 128 KiB
        with warnings.catch_warnings(action="ignore"):  # "not writable": nor are they to be
            self.frames = torch.from_numpy(frames)
        if args.storage == "device" and device.type != "cpu":
            reserve(frames.nbytes, "frames", device)
            self.frames = self.frames.to(device)
        for name, array in columns.items():
            setattr(self, name, torch.from_numpy(array).to(device))
        self.back = torch.arange(STACK - 1, -1, -1, device=device) if frames.ndim == 3 else None
        self.gammas = args.gamma ** torch.arange(args.n_step + 1, device=device)

    def stack(self, rows):
        """Observations of rows (B,): (B, 4, H, W), the latest frame last, in one gather; or
        vectors (B, d)."""
        where = rows if self.back is None else (rows[:, None] - self.back).clamp(min=0)
        x = self.frames[where.to(self.frames.device)].to(self.device)
        self.stacks += 1
        if self.mapped and self.stacks % 100 == 0:
            self.mapped.madvise(mmap.MADV_DONTNEED)  # else all pages read so far stay resident
        if self.back is None:
            return x
        return x * (self.back <= self.age[rows][:, None])[..., None, None]

    def batch(self, rows) -> Batch:
        """Transitions of n steps; an episode's end shortens them, a terminal one the bootstrap."""
        at, steps = rows, torch.zeros_like(rows)
        rew = torch.zeros(len(rows), device=self.device)
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
        """This process's share of n rows that all draw alike: their number changes no result."""
        rows = self.train[torch.randint(len(self.train), (n,), device=self.device)]
        return self.batch(rows[rank::size])


# --------------------------------------------------------------- environments: playing, evaluating
class Plain(gym.Wrapper):
    """Infos are dropped, since packages put anything there; a reward is a number. NaN, and what
    float32 cannot hold, ends the run with status 3."""

    episode = -1

    def reset(self, **options):
        self.episode, self.steps = self.episode + 1, 0
        return self.finite(self.env.reset(**options)[0], "an observation"), {}

    def step(self, action):
        self.steps += 1
        obs, rew, terminated, truncated, _ = self.env.step(action)
        rew = self.finite(np.asarray(rew, dtype=np.float64).item(), "a reward")
        return self.finite(obs, "an observation"), rew, terminated, truncated, {}

    def finite(self, x, what: str):
        if not (np.abs(x) < 3.4e38).all():
            at = f"step {self.steps} of episode {self.episode}"
            fail(f"{at}: {what} of the environment is not finite; what was saved before stands", 3)
        return x


class Envs:
    """n environments of one game; where an episode ends the next starts in the same step. They show
    stacks of the last four frames of an episode, zeros before its start, or vectors.

    ALE's games: sticky actions (0.25), four frames a step, raw rewards, neither no-ops nor fire at
    a reset, at most 27,000 steps. `stack` closes them."""

    def __init__(self, env_id: str, n: int, stack: ExitStack):
        self.name, self.n, self.game = env_id, n, None
        how = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
        hint = "ALE/Name-v5; a package's own: package:Id; of one instance only: --eval-episodes 0"
        with failing(f"--env-id {env_id} ({hint})", Exception):  # with the environment's own reason
            if env_id.startswith("ALE/"):
                import ale_py
                from ale_py.vector_env import AtariVectorEnv

                gym.register_envs(ale_py)
                self.game = gym.spec(env_id).kwargs["game"]
                how |= {"noop_max": 0, "use_fire_reset": False, "repeat_action_probability": 0.25}
                self.envs = AtariVectorEnv(self.game, n, reward_clipping=False, **how)
            else:
                self.envs = gym.vector.SyncVectorEnv([self.make] * n, **how)
        stack.callback(self.envs.close)
        space, obs = self.envs.single_action_space, self.envs.single_observation_space
        if not isinstance(space, gym.spaces.Discrete) or space.start != 0:
            fail(f"--env-id {env_id}: actions are {space}, expected Discrete from 0")
        stacks = len(obs.shape) == 3 and obs.shape[0] == STACK and obs.dtype == np.uint8
        if len(obs.shape) != 1 and not stacks:
            fail(f"--env-id {env_id}: shows {obs}, expected vectors or (H, W) frames of uint8")
        if not self.game and self.envs.envs[0].spec.max_episode_steps is None:
            say(f"{env_id} has no time limit: evaluations last until the policy ends its episodes")
        self.shape, self.actions, self.frames = obs.shape, int(space.n), stacks
        self.frame_shape = obs.shape[-2:]  # of a vector its own
        self.dtype = np.uint8 if stacks else np.float32  # of what is kept

    def make(self):
        env = gym.make(self.name)
        space = env.observation_space
        if not isinstance(space, gym.spaces.Box):  # Dict, Discrete, ...
            env = gym.wrappers.FlattenObservation(env)
        elif len(space.shape) == 2:
            env = gym.wrappers.FrameStackObservation(env, STACK, padding_type="zero")
        return Plain(env)

    def reset(self, seed: int, evaluation: bool = False):
        """First observations; seeds are shared with no other run's and no evaluation's."""
        seeds = np.random.SeedSequence([seed, evaluation]).generate_state(self.n)
        seeds = (seeds >> 1).astype(np.int64)  # ALE takes 31 bits
        return self.envs.reset(seed=seeds if self.game else seeds.tolist())[0]


@torch.no_grad()
def evaluate(learner, envs: Envs, game: int, args: Args) -> tuple[np.ndarray, float]:
    """One episode in each environment, epsilon-greedy with 0.001 (authors): raw returns (n,), and
    the mean overestimation, max_a Q(s0, a) less the discounted return that followed, rewards as
    trained on. Draws no torch random number."""
    obs, draw = envs.reset(args.seed, evaluation=True), np.random.default_rng(args.seed)
    alive, returns, discounted = np.ones(envs.n, bool), np.zeros(envs.n), np.zeros(envs.n)
    discount, predicted = 1.0, None
    learner.net.eval()
    while alive.any():
        q = learner.q(torch.as_tensor(obs, device=learner.device), game).cpu().numpy()
        predicted = q.max(1) if predicted is None else predicted
        anew = draw.random(envs.n) < 0.001
        act = np.where(anew, draw.integers(envs.actions, size=envs.n), q.argmax(1))
        obs, rew, terminated, truncated, _ = envs.envs.step(act)
        returns += alive * rew
        discounted += alive * discount * (np.sign(rew) if args.clip_rewards else rew)
        alive &= ~(terminated | truncated)  # what follows the first episode does not count
        discount *= args.gamma
    learner.net.train()
    return returns, float((predicted - discounted).mean())


def collect(envs: Envs, args: Args, run) -> Path:
    """Random play in long moves, kept under --data-dir: --collect-steps rows; after an episode's
    last transition comes one that holds its last frame."""
    env_id = envs.name
    name = f"{env_id}_random_{args.collect_steps}_{args.collect_repeat}_seed{args.seed}"
    folder = Path(args.data_dir) / re.sub(r"[^\w.-]", "_", name)
    if (folder / "columns.npz").exists():
        say(f"no --dataset: using {folder}, made by an earlier run")
        return folder
    say(f"no --dataset: {args.collect_steps:,} steps of random play of {env_id}")
    rows, draw = args.collect_steps, np.random.default_rng(args.seed)
    with ExitStack() as stack, new_set(folder) as make:
        envs = envs if envs.n == 1 else Envs(env_id, 1, stack)  # of some only one can exist
        frames, columns = make((rows, *envs.frame_shape), envs.dtype)
        obs = envs.reset(args.seed)
        act = draw.integers(envs.actions, size=1)
        at = first = 0  # the row, and the first one of its episode
        while at < rows - 1:
            if draw.random() >= args.collect_repeat:
                act = draw.integers(envs.actions, size=1)
            frames[at] = obs[0, -1] if envs.frames else obs[0]
            obs, rew, terminated, truncated, infos = envs.envs.step(act)
            over = bool(terminated[0] or truncated[0])
            last = infos["final_obs"][0] if over else obs[0]
            row = {"act": act[0], "rew": rew[0], "terminal": terminated[0], "real": True}
            for column, x in row.items():
                columns[column][at] = x
            columns["begins"][first] = True
            columns["whole"][first] = over
            at += 1
            if over or at == rows - 1:
                frames[at] = last[-1] if envs.frames else last
                at += 1
                first = at
            if run.signum:
                say("stopped while collecting: nothing is kept, the same command starts again")
                raise SystemExit(128 + run.signum)
    return folder


# ------------------------------------------------------------------------------------ diagnostics
def measure(learner, g: int, data: Data, rows, args: Args) -> tuple[dict, list, list]:
    """What the networks of game g make of `rows`: numbers; features of s and s', and which rows
    bootstrap; and of each 256 rows the mean activity of each layer's units. The TD error is that
    of Q(s,a), whatever the head, in units of the target's variance."""
    net, target = learner.net, learner.target
    q, y, features, activity = [], [], [], []
    for part in rows.split(256):  # bounds the memory of activations
        batch, record = data.batch(part), []
        phi, phi_next = net.features(batch.obs, record), net.features(batch.next_obs)
        out_next = target.heads[g](target.features(batch.next_obs))
        next_act = greedy(net, g, phi_next, out_next, None, args)
        value = target.q(out_next).gather(1, next_act[:, None])[:, 0]
        q.append(net.q(net.heads[g](phi)))
        y.append(batch.rew + batch.discount * value)
        features.append((phi, phi_next, (batch.discount > 0).float()))
        activity.append([h.abs().mean(0, keepdim=True) for h in record])
    q, y = torch.cat(q), torch.cat(y)
    variance = y.var(correction=0)
    q_data = q.gather(1, data.act[rows][:, None])[:, 0]
    numbers = {
        "q_data": q_data.mean(),
        "q_pi": q.amax(1).mean(),
        "q_rand": q.mean(),
        "q_max": q.max(),
        "cql_gap": (q.logsumexp(1) - math.log(q.shape[1]) - q_data).mean(),
        "td_error": (q_data - y).pow(2).mean() / variance.clamp(min=1e-12),
        "target_variance": variance,
    }
    if args.head in ("dqn", "rem"):  # of the others Q gives way by less than alpha
        numbers["cql_push"] = args.cql_alpha / (q_data - y).pow(2).mean().sqrt().clamp(min=1e-12)
    to_go = data.returns_to_go[rows]
    known = ~to_go.isnan()
    if known.sum() >= 32:
        numbers["q_minus_return"] = (q_data - to_go)[known].mean()
        numbers["return_std"] = to_go[known].std()
    return numbers, features, activity


def diagnose(learner: Learner, games: list[Data], args: Args) -> dict:
    """The numbers of one moment, in eval mode, on at most 2,048 transitions, always the same: means
    over games, but for q_max and the bounds. v_s0 is at the data's first states."""
    moments, features, activity = [], [], []

    def probe(rows):
        n = min(2048 // len(games), len(rows))
        chosen = np.random.default_rng(0).choice(len(rows), n, replace=False)
        return rows[torch.from_numpy(chosen).to(rows.device)]

    learner.net.eval()
    with strict_fp32():
        for g, data in enumerate(games):
            numbers, some, active = measure(learner, g, data, probe(data.train), args)
            features, activity = features + some, activity + active
            if len(data.holdout):
                held, _, _ = measure(learner, g, data, probe(data.holdout), args)
                known = ["q_minus_return", "return_std"]
                if held["target_variance"] > 0:  # else the TD error has no unit
                    known.append("td_error")
                numbers |= {f"{name}_holdout": held[name] for name in known if name in held}
            del numbers["target_variance"]
            numbers["v_s0"] = learner.q(data.stack(probe(data.starts)[:256]), g).amax(1).mean()
            low, high = data.reward_range
            numbers["q_bound"] = high / (1 - args.gamma)
            if high < 0 and data.terminals:
                numbers["q_bound"] = high  # where every reward costs, ending at once is best
            numbers["q_range"] = (high - low) / (1 - args.gamma)
            # Huber's slope is 1: dqn and rem rest at Q - y <= alpha up to alpha 1, qr much lower up
            # to 0.5; beyond that only the softmax holds them. c51's atoms end at v_max.
            numbers["q_lift"] = args.cql_alpha / (1 - args.gamma**args.n_step)
            moments.append({name: float(x) for name, x in numbers.items()})
        phi, phi_next, bootstraps = (torch.cat(x) for x in zip(*features))
        units = [torch.cat(layer).mean(0, keepdim=True) for layer in zip(*activity)]
        out = spectrum(phi) | alignment(phi, phi_next, bootstraps) | {"dormant": dormant(units)}
    learner.net.train()
    for name in moments[0]:
        if all(name in m for m in moments):
            join = max if name in ("q_max", "q_bound", "q_range", "q_lift") else np.mean
            out[name] = join([m[name] for m in moments])
    return {name: float(x) for name, x in out.items()}


def advice(args: Args) -> dict:
    """The flags that a verdict recommends: of those that this run would accept and has not got."""
    flags = {
        "divergence": [f"--cql-alpha {max(1, 2 * args.cql_alpha):g}"],
        "overfitting": [] if args.dropout else ["--dropout 0.1"],
        "alpha too large": [f"--cql-alpha {args.cql_alpha / 2:g}"],
        "underfitting": [f"--width {min(4096, max(32, 2 * args.width))}"],
    }
    flags["divergence"] += [] if args.unit_norm else ["--unit-norm"]
    flags["overfitting"] += ["a smaller --width"]
    flags["underfitting"] += ["--encoder resnet"] if args.encoder == "nature" else []
    flags["underfitting"] += [] if args.dr3_coef else ["--dr3-coef 0.1"]
    if args.n_step > 1:
        noise = "the noise of so many rewards is part of it"
        flags["underfitting"] += [f"--n-step {args.n_step // 2}: {noise}"]
    return {name: " or ".join(parts) for name, parts in flags.items()}


# --------------------------------------------------------------------------------------- training
AGREE = 10  # updates between the moments at which processes ask each other whether to stop


def train(args: Args) -> dict:
    """Train as `args` says; returns what summary.json holds."""
    check(args)
    device = set_up(args, distributed=True)
    join(args)
    rank, size = processes()
    with Run(args, args.num_updates) as run:
        n = max(1, args.eval_episodes) if rank == 0 else 1  # one, for its spaces
        envs = [Envs(name, n, run) for name in args.env_id]
        if len({e.shape for e in envs}) > 1:
            fail(f"--env-id: no encoder fits observations of shapes {[e.shape for e in envs]}")
        games, facts = load_games(args, envs, device, run)
        learner = Learner(envs[0].shape, [e.actions for e in envs], args, device)
        if not learner.net.image:
            learner.standardise(games)
        step, history, scores = 0, [], []
        if run.saved:
            if run.saved["info"]["dataset_sha256"] != facts["dataset_sha256"]:
                fail(f"--resume: that run had other data: {run.saved['info']['dataset']}")
            step, history, scores = (run.saved[k] for k in ("step", "history", "scores"))
            run.restore(learner, {"net": learner.optim})
        if rank == 0:
            run.open(**facts)

        def save():
            run.save(step, learner, {"net": learner.optim}, history=history, scores=scores)

        def update() -> dict:
            n = args.batch_size // len(games)
            return learner.update([data.sample(n, rank, size) for data in games])

        if args.cudagraphs and device.type == "cuda" and size == 1 and args.storage == "device":
            update = GraphedUpdate(update)
        stop = 0
        while step < args.num_updates and not stop:
            info, before, step = update(), step, step + 1
            if every(args.target_network_frequency, before, step):
                learner.refresh_target()
            if size == 1 or step % AGREE == 0:
                stop = agree(run.signum)
            if rank > 0:
                continue

            diagnosing = every(args.diagnostics_frequency, before, step)
            scoring = every(args.eval_frequency, before, step) or step == args.num_updates
            if every(args.log_frequency, before, step) or diagnosing:
                rate = run.rate(step)
                run.log(step, {"losses/" + name: x for name, x in info.items()})
                run.log(step, {"charts/updates_per_second": rate, "charts/SPS": rate})
                last_return = np.mean([x["returns"] for x in scores]) if scores else math.nan
                run.show(step, loss=info["loss"], Q=info["q_values"], last_return=last_return)
            if diagnosing:
                with run.paused():
                    moment = diagnose(learner, games, args)
                run.log(step, {"diagnostics/" + name: x for name, x in moment.items()})
                history.append(moment | {"step": step})
                if selects(history, args):  # the workflow's choice so far
                    run.save(step, learner, {}, "selected.pt")
            if args.eval_episodes and scoring:
                with run.paused():
                    scores = score(learner, envs, args)
                run.log(step, tags(scores, envs))
            if every(args.checkpoint_frequency, before, step):
                save()
        if rank > 0:
            raise SystemExit(128 + stop if stop else 0)
        save()
        run.signum = run.signum or stop
        if size > 1:
            run.stop_if_asked("torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}")
        run.stop_if_asked()
        summary = {"num_updates": step, "updates_per_second": run.rate(step)}
        if scores:
            summary |= summary_of("final", scores, envs)
        if args.eval_episodes and (run.dir / "selected.pt").is_file():
            chosen = load_checkpoint(run.dir, "selected.pt")
            learner.load_state_dict(chosen["networks"])
            summary |= summary_of("selected", score(learner, envs, args), envs)
            summary["selected_step"] = chosen["step"]
        known = replace(args, encoder=learner.net.kind)
        settling = args.target_network_frequency / (1 - args.gamma**args.n_step)
        rewarded = max(data.rewarded for data in games)
        said = verdict(history, known, rewarded, settling)
        return run.finish(conclude(*said, summary | facts))


def score(learner, envs: list[Envs], args: Args) -> list[dict]:
    """Of each game's evaluation the returns of its episodes, and the overestimation."""
    found = [evaluate(learner, e, g, args) for g, e in enumerate(envs)]
    return [{"returns": returns.tolist(), "overestimation": over} for returns, over in found]


def tags(scores: list[dict], envs: list[Envs]) -> dict:
    """What is logged of an evaluation; the game's name ends a tag where there are several."""
    out = {}
    for x, e in zip(scores, envs):
        mean, name = np.mean(x["returns"]), f"/{e.name}" if len(envs) > 1 else ""
        out |= {f"charts/episodic_return{name}": mean, f"eval/episodic_return{name}": mean}
        out[f"diagnostics/overestimation{name}"] = x["overestimation"]
        if e.game in HUMAN:
            out[f"charts/normalized_score{name}"] = normalized_score(e.game, mean)
    return out


def summary_of(kind: str, scores: list[dict], envs: list[Envs]) -> dict:
    """Of the final or the selected policy: means over games."""
    means = [float(np.mean(x["returns"])) for x in scores]
    out = {f"{kind}_return_mean": float(np.mean(means))}
    out[f"{kind}_return_std"] = float(np.mean([np.std(x["returns"]) for x in scores]))
    if kind == "final":
        out["overestimation"] = float(np.mean([x["overestimation"] for x in scores]))
        out["normalized_score"] = None
        if all(e.game in HUMAN for e in envs):
            parts = [normalized_score(e.game, mean) for e, mean in zip(envs, means)]
            out["normalized_score"] = float(np.mean(parts))
    return out


# ---------------------------------------------------------------------------------- files of data
def load_games(args: Args, envs: list[Envs], device, run) -> tuple[list[Data], dict]:
    """The data of each environment, and what is known of all. What has to be collected or unpacked
    first, the first process makes, and the others wait."""
    rank, making = processes()[0], not args.dataset or args.storage == "mmap"
    if making and rank > 0:
        agree(0)
    paths = args.dataset or [str(collect(e, args, run)) for e in envs]
    games = [load(path, args, e, device) for path, e in zip(paths, envs)]
    if making and rank == 0:
        agree(0)
    facts = {"dataset": " ".join(paths), "dataset_sha256": "+".join(x.sha256 for x in games)}
    return games, facts | {"dataset_return_mean": float(np.mean([x.return_mean for x in games]))}


def load(name: str, args: Args, envs: Envs, device) -> Data:
    """A game's data from a folder of ours, a DQN Replay folder or a Minari set."""
    path = Path(name)
    replay, own = dqn_replay(path), (path / "columns.npz").exists()
    read = read_dqn_replay if replay else read_minari
    if args.fraction < 1 and (own or not replay):
        fail(f"--fraction {args.fraction}: {name} is no DQN Replay folder")
    if own:
        frames, columns = read_own(path, args)
    elif args.storage == "mmap":  # unpacked once
        source = replay or find_minari(name) or path
        key = [str(source.resolve()), envs.frame_shape]
        key += [p.stat().st_mtime_ns for p in sorted(source.glob("*"))]
        if args.fraction < 1:
            key += [args.fraction, args.subset, args.seed if args.subset == "uniform" else 0]
        key = repr(key).encode()
        folder = Path(args.data_dir) / f"unpacked_{hashlib.sha256(key).hexdigest()[:16]}"
        if not (folder / "columns.npz").exists():
            with new_set(folder) as make:
                read(replay or name, args, envs, make)
        frames, columns = read_own(folder, args)
    else:
        frames, columns = read(replay or name, args, envs, in_memory)
    if frames.shape[1:] != envs.frame_shape:
        fail(f"{path}: shows {frames.shape[1:]}, {envs.name} {envs.frame_shape}")
    return prepare(path, frames, columns, args, envs.actions, device)


def prepare(path, frames, columns: dict, args: Args, actions: int, device) -> Data:
    """Check, describe and split what a reader found."""
    act, rew, terminal, real, begins, whole = (columns[name] for name in COLUMNS)
    if not real.any():
        fail(f"{path}: no transitions")
    finite = np.isfinite(frames).all(1) if frames.ndim == 2 else np.ones(len(real), bool)
    for bad, what in (
        (real & ((act < 0) | (act >= actions)), f"the environment has {actions} actions"),
        (~np.isfinite(rew), "rewards have to be finite"),
        (~finite, "its observation is not finite"),
        (real & ~terminal & np.append(begins[1:], True), "no next state, and the end is not there"),
    ):
        if bad.any():
            i = int(bad.argmax())
            fail(f"{path}: row {i} (action {act[i]}, reward {rew[i]}): {what}")
    begin = np.maximum.accumulate(np.where(begins, np.arange(len(real)), 0))  # of a row's piece
    age = np.minimum(np.arange(len(real)) - begin, STACK - 1).astype(np.uint8)
    # of the real rows alone, where each piece is contiguous
    at = np.flatnonzero(real)
    first = np.flatnonzero(np.diff(begin[at], prepend=-1))
    last = np.append(first[1:], len(at)) - 1
    lengths, complete, ended = last - first + 1, whole[begin[at[first]]], terminal[at[last]]
    returns = np.add.reduceat(rew[at], first, dtype=np.float64)
    if args.clip_rewards:
        rew = np.sign(rew)
    lasts = np.repeat(last, lengths).astype(np.int32)
    to_go = np.full(len(real), np.nan, np.float32)
    to_go[at] = returns_to_go(rew[at], lasts, args.gamma)
    hidden = args.gamma ** (lasts - np.arange(len(at)) + np.float32(1)) > 0.01
    to_go[at[hidden & ~np.repeat(ended, lengths)]] = np.nan
    held = np.zeros(len(first), bool)
    if args.holdout and len(first) > 1:
        n = min(max(1, round(args.holdout * len(first))), len(first) - 1)
        held[np.random.default_rng(args.seed).permutation(len(first))[:n]] = True
    held = np.repeat(held, lengths)
    tensors = {"act": act, "rew": rew, "terminal": terminal, "real": real, "age": age}
    tensors |= {"train": at[~held], "holdout": at[held], "starts": at[first]}
    data = Data(frames, tensors | {"returns_to_go": to_go}, args, device)
    digest = hashlib.sha256()
    some = (frames[0], frames[len(frames) // 2], frames[-1])
    for array in (act, rew, terminal, real, begins, *some):
        digest.update(np.ascontiguousarray(array))
    point_out(terminal[at], np.isin(np.arange(len(at)), last) & ~terminal[at], None)
    data.sha256, data.terminals = digest.hexdigest(), int(terminal[at].sum())
    data.reward_range = float(rew[at].min()), float(rew[at].max())
    values, counts = np.unique(rew[at], return_counts=True)
    data.rewarded = 1 - counts.max() / len(at)
    pays = values[counts.argmax()] != 0 and data.terminals
    if pays and (data.terminals == 1 or np.ptp(lengths[ended]) > 0):
        data.rewarded = 1.0  # then an episode's length pays
    of = f"the {complete.sum():,} whole ones" if complete.any() else "these pieces"
    returns = returns[complete] if complete.any() else returns
    data.return_mean = float(returns.mean())
    say(f"{path}: {len(at):,} transitions, {held.sum():,} of them held out")
    say(f"  {len(first):,} episodes, {ended.sum():,} ended by a terminal state; returns of {of}:")
    say(f"  {returns.mean():.1f} mean, {returns.min():.1f} to {returns.max():.1f}")
    if data.rewarded <= 0.001:
        signs = "'s signs" if args.clip_rewards else "s"
        say(f"  only {data.rewarded:.2%} of the reward{signs} differ from the others")
    return data


# of a set, for each row; `begins` marks first rows of episodes or of pieces of one, `whole` those
# of complete ones
COLUMNS = {"act": np.int64, "rew": np.float32, "terminal": bool, "real": bool, "begins": bool}
COLUMNS |= {"whole": bool}


def in_memory(shape: tuple, dtype) -> tuple:
    """Frames and columns for a reader to fill."""
    reserve(math.prod(shape) * np.dtype(dtype).itemsize, "frames", torch.device("cpu"))
    return np.empty(shape, dtype), {k: np.zeros(shape[0], kind) for k, kind in COLUMNS.items()}


@contextmanager
def new_set(folder: Path):
    """Yields what in_memory() is, for frames that lie in a file of the folder; the set is complete
    when its columns.npz is there."""
    columns = {}

    def make(shape: tuple, dtype) -> tuple:
        shape = tuple(map(int, shape))  # of NumPy's integers it could not read the header again
        frames = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
        say(f"{folder}: {frames.nbytes / 2**20:,.1f} MiB on disk")
        if hasattr(os, "posix_fallocate"):  # else a full disk kills the process at some write
            with open(temporary, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, temporary.stat().st_size)
        columns.update({k: np.zeros(shape[0], kind) for k, kind in COLUMNS.items()})
        return frames, columns

    with failing(f"--data-dir {folder.parent}", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    with write_beside(folder / "frames.npy") as temporary:
        yield make
    with write_beside(folder / "columns.npz") as temporary, open(temporary, "wb") as f:
        np.savez(f, **columns)


def read_own(folder: Path, args: Args) -> tuple:
    """What new_set() has made: frames, mapped into memory or read, and columns."""
    with failing(f"{folder / 'frames.npy'}: missing or damaged", Exception):
        frames = np.load(folder / "frames.npy", "r")
    path = folder / "columns.npz"
    with failing(f"{path}: missing or damaged", Exception), np.load(path) as f:
        columns = {name: f[name].astype(kind, casting="safe") for name, kind in COLUMNS.items()}
        if {x.shape for x in columns.values()} != {frames.shape[:1]} or not columns["begins"][0]:
            raise ValueError(f"its rows do not fit {len(frames)} frames")
    if args.storage != "mmap":
        reserve(frames.nbytes, "frames", torch.device("cpu"))
        frames = np.array(frames)
    return frames, columns


def dqn_replay(path: Path) -> Path | None:
    """The folder of Dopamine's files: `path`, one within it, or if it does not exist the one that
    it would lie in."""
    start = path.parent if path.name == "replay_logs" and not path.exists() else path
    found = sorted({p.parent for p in start.glob("**/$store$_*_ckpt.*.gz")})
    if len(found) > 1:
        fail(f"--dataset {path}: {len(found)} DQN Replay folders, name one of them: {found[0]} ...")
    return found[0] if found else None


def read_gz(path: Path, kinds: str):
    """Numbers of a .npy file in a .gz file. A set, as Dopamine pickles it, is not unpickled: its
    numbers, NumPy's or Python's, are picked out of the opcodes."""
    with failing(f"{path}: missing or damaged", Exception), gzip.open(path) as f:
        data = f.read()  # to the end, where gzip compares its checksum
        if data[:6] == b"\x93NUMPY":
            x = np.load(io.BytesIO(data))
        else:
            ops = [(op.name, arg) for op, arg, _ in pickletools.genops(data)]
            x = [int.from_bytes(arg, "little") for name, arg in ops if name == "SHORT_BINBYTES"]
            x = np.array(x or [arg for name, arg in ops if name.startswith("BININT")], np.int64)
        if x.ndim > 1 or x.dtype.kind not in kinds:
            raise ValueError(f"shape {x.shape} of {x.dtype}")
    return x


def read_checkpoint(folder: Path, number: int) -> dict:
    """One of Dopamine's dumps, without its frames: columns, the rows after which an episode ends,
    how many rows are filled and which is the oldest."""

    def file(name: str) -> Path:
        return folder / f"{name}_ckpt.{number}.gz"

    x = {"frames": file("$store$_observation")}
    for name, kinds in (("action", "iu"), ("reward", "iuf"), ("terminal", "biu")):
        x[name] = read_gz(file(f"$store$_{name}"), kinds)
    rows = count = len(x["terminal"])
    ends = np.flatnonzero(x["terminal"]) + 1
    if file("add_count").exists():
        count = int(read_gz(file("add_count"), "iu"))
    else:
        say(f"{folder}: no add_count, files are taken to be written from row 0 on")
    if file("episode_end_indices").exists():  # with those that a time-out ended
        ends = np.union1d(ends, read_gz(file("episode_end_indices"), "iu") + 1)
    if not len(x["action"]) == len(x["reward"]) == rows or count < 0:
        fail(f"{folder}: columns of checkpoint {number} do not fit together")
    oldest = count % rows if count > rows else 0
    return x | {"ends": ends, "size": min(count, rows), "oldest": oldest}


def read_dqn_replay(folder: Path, args: Args, envs: Envs, make) -> tuple:
    """A DQN Replay folder: circular buffers of single frames, dumped at each checkpoint N.

    Three rows of zeros stand before each episode. Nothing is a transition whose stack or next frame
    would reach across an episode's end, the oldest row, or the end of what is read."""
    names = [re.search(r"_ckpt\.(\d+)\.gz$", p.name) for p in folder.iterdir()]
    files = [read_checkpoint(folder, n) for n in sorted({int(m[1]) for m in names if m})]
    budget, draw = args.fraction * sum(x["size"] for x in files), np.random.default_rng(args.seed)
    for x in files:  # which rows of each file are read, [lo, hi)
        size, begin = x["size"], 0
        cuts = np.union1d(x["ends"], [0, x["oldest"], size])
        spans = list(zip(cuts[cuts < size], cuts[1:]))
        if args.subset == "uniform" and args.fraction < 1:
            spans = [span for span in spans if draw.random() < args.fraction]
        else:
            n = max(1, round(args.fraction * size))
            if args.subset == "first":
                n, begin = min(round(budget), size), x["oldest"]
            budget -= n
            left = [n - (lo - begin) % size for lo, _ in spans]  # of n rows, from lo on
            spans = [(lo, min(hi, lo + k)) for (lo, hi), k in zip(spans, left)]
        x["spans"] = [(lo, hi) for lo, hi in spans if hi - lo >= STACK]  # the others hold no stack
    rows = sum(hi - lo for x in files for lo, hi in x["spans"])
    frames, columns = make((rows, *envs.frame_shape), np.uint8)
    at = 0
    for x in files:
        with failing(f"{x['frames']}: missing or damaged", Exception), gzip.open(x["frames"]) as f:
            np.lib.format.read_magic(f)
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(f)
            expected = (len(x["terminal"]), *envs.frame_shape)
            if (shape, dtype, by_column) != (expected, np.uint8, False):
                raise ValueError(f"{shape} of {dtype}, expected {expected} of uint8")
            start, frame = f.tell(), math.prod(envs.frame_shape)
            for lo, hi in x["spans"]:
                f.seek(start + lo * frame)
                for row in range(lo, hi, 1_000):  # a thousand frames at a time: no second copy
                    part = frames[at + row - lo : at + min(row + 1_000, hi) - lo]
                    part[:] = np.frombuffer(f.read(part.nbytes), np.uint8).reshape(part.shape)
                end, over = at + hi - lo, x["terminal"][hi - 1] != 0
                columns["act"][at:end] = x["action"][lo:hi]
                columns["rew"][at:end] = x["reward"][lo:hi]
                columns["terminal"][at:end] = x["terminal"][lo:hi]
                columns["real"][at + STACK - 1 : end if over else end - 1] = True
                columns["begins"][at] = True
                columns["whole"][at] = over and lo in x["ends"]
                at = end
            if args.fraction == 1:  # at its end gzip compares the checksum
                f.seek(start + math.prod(shape))
                if f.read(1):
                    raise ValueError("longer than its header says")
    return frames, columns


def read_minari(name: str, args: Args, envs: Envs, make) -> tuple:
    """A Minari set, an episode at a time; each has one observation more than actions."""
    folder = find_minari(name)
    if folder is None:
        what = kind_of(Path(name))
        fail(f"--dataset {name}: {what}; expected a folder of DQN Replay, Minari or this script")
    with failing(f"--dataset {name} is {kind_of(folder)}", Exception):
        data = open_minari(folder)
        from minari.dataset.minari_storage import is_image_space

        space, indices = data.observation_space, data.episode_indices
        lengths = [m["total_steps"] for m in data.storage.get_episode_metadata(indices)]
        if envs.frames and not isinstance(space, gym.spaces.Box):
            raise ValueError(f"shows {space}, expected pictures")
        if envs.frames:
            say(f"{name}: {space.dtype} {space.shape} become grey frames {envs.frame_shape}")
            size = (max(lengths, default=0) + 1) * math.prod(space.shape) * space.dtype.itemsize
            size *= 4.5 if data.storage.FORMAT == "arrow" else 1.25  # copies on the way
            reserve(size, "its longest episode, decoded", torch.device("cpu"))
            if is_image_space(space) and data.storage.jpeg_encoding:
                say("  kept as JPEG: up to 40 of 255 off what the environment shows in evaluations")
        frames, columns = make((sum(lengths) + len(indices), *envs.frame_shape), envs.dtype)
        at, unit = 0, None  # the next row; 1 or 255, once a picture is not black
        for i in indices:
            (e,) = data.iterate_episodes([i])
            obs, T = e.observations, len(e.rewards)
            act = np.reshape(e.actions, -1)
            if not isinstance(space, gym.spaces.Box):
                obs = flat(space, obs, T + 1)
            if (len(obs), len(act)) != (T + 1, T) or act.dtype.kind not in "iu":
                what = f"{len(obs)} observations, {T} rewards, {len(act)} actions of {act.dtype}"
                raise ValueError(f"episode {i}: {what}")
            if envs.frames:
                if unit is None and obs.max() > 0:
                    unit = 1 if obs.dtype.kind == "f" and obs.max() <= 1 else 255
                to_grey(obs, frames[at : at + T + 1], unit or 255)
            elif obs.shape[1:] != envs.frame_shape:
                raise ValueError(f"shape {obs.shape[1:]}, {envs.name} shows {envs.frame_shape}")
            else:
                frames[at : at + T + 1] = obs
            row = {"act": act, "rew": e.rewards, "terminal": e.terminations, "real": True}
            for column, x in row.items():
                columns[column][at : at + T] = x
            columns["begins"][at] = columns["whole"][at] = True
            at += T + 1
            del e, obs  # before the next one is decoded
    return frames, columns


def to_grey(obs, out, unit: float):
    """Pictures (T, ...) of 0 to `unit` into `out` (T, H, W), uint8: of a stack, its channels first
    or last, the last frame; of RGB the luminance, as ALE's grey screen."""
    for start in range(0, len(obs), 16):  # bounds what is held as floats
        x = obs[start : start + 16]
        if x.ndim == 4:
            axes = [axis for axis in (1, 3) if x.shape[axis] in (1, 3, STACK)]
            if len(axes) != 1:
                raise ValueError(f"shape {x.shape[1:]}, expected 1, 3 or 4 channels, first or last")
            x = np.moveaxis(x, axes[0], -1)
            rgb = x.shape[-1] == 3
            x = x @ np.array([0.299, 0.587, 0.114], np.float32) if rgb else x[..., -1]
        if x.ndim != 3 or not (x.min() >= 0 and x.max() <= unit + 1e-3):
            what = f"shape {x.shape[1:]}, {x.min():.3g} to {x.max():.3g}"
            raise ValueError(f"{what}: expected pictures, 0 to {unit}")
        x = x * np.float32(255 / unit)
        if x.shape[1:] != out.shape[1:]:
            x = torch.from_numpy(x)[:, None]
            x = F.interpolate(x, out.shape[1:], mode="area")[:, 0].numpy()
        out[start : start + 16] = x.round()


HUMAN = {  # scores of a random player and of a person, as google-deepmind/dqn_zoo lists them
    "alien": (227.8, 7127.7), "amidar": (5.8, 1719.5), "assault": (222.4, 742),
    "asterix": (210, 8503.3), "asteroids": (719.1, 47388.7), "atlantis": (12850, 29028.1),
    "bank_heist": (14.2, 753.1), "battle_zone": (2360, 37187.5), "beam_rider": (363.9, 16926.5),
    "berzerk": (123.7, 2630.4), "bowling": (23.1, 160.7), "boxing": (0.1, 12.1),
    "breakout": (1.7, 30.5), "centipede": (2090.9, 12017), "chopper_command": (811, 7387.8),
    "crazy_climber": (10780.5, 35829.4), "defender": (2874.5, 18688.9),
    "demon_attack": (152.1, 1971), "double_dunk": (-18.6, -16.4), "enduro": (0, 860.5),
    "fishing_derby": (-91.7, -38.7), "freeway": (0, 29.6), "frostbite": (65.2, 4334.7),
    "gopher": (257.6, 2412.5), "gravitar": (173, 3351.4), "hero": (1027, 30826.4),
    "ice_hockey": (-11.2, 0.9), "jamesbond": (29, 302.8), "kangaroo": (52, 3035),
    "krull": (1598, 2665.5), "kung_fu_master": (258.5, 22736.3), "montezuma_revenge": (0, 4753.3),
    "ms_pacman": (307.3, 6951.6), "name_this_game": (2292.3, 8049), "phoenix": (761.4, 7242.6),
    "pitfall": (-229.4, 6463.7), "pong": (-20.7, 14.6), "private_eye": (24.9, 69571.3),
    "qbert": (163.9, 13455), "riverraid": (1338.5, 17118), "road_runner": (11.5, 7845),
    "robotank": (2.2, 11.9), "seaquest": (68.4, 42054.7), "skiing": (-17098.1, -4336.9),
    "solaris": (1236.3, 12326.7), "space_invaders": (148, 1668.7), "star_gunner": (664, 10250),
    "surround": (-10, 6.5), "tennis": (-23.8, -8.3), "time_pilot": (3568, 5229.2),
    "tutankham": (11.4, 167.6), "up_n_down": (533.4, 11693.2), "venture": (0, 1187.5),
    "video_pinball": (16256.9, 17667.9), "wizard_of_wor": (563.5, 4756.5),
    "yars_revenge": (3092.9, 54576.9), "zaxxon": (32.5, 9173.3),
}  # fmt: skip


def normalized_score(game: str, value: float) -> float:
    """0 for a random player, 100 for the person of HUMAN."""
    low, high = HUMAN[game]
    return 100 * (value - low) / (high - low)


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
