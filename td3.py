r"""Twin delayed deep deterministic policy gradient (TD3): off-policy actor-critic; it writes datasets, too.

Fujimoto, van Hoof, Meger, "Addressing Function Approximation Error in Actor-Critic Methods", arXiv
1802.09477, Algorithm 1. A deterministic policy that climbs the critic (DDPG, arXiv 1509.02971) exploits the
critic's errors: it moves to actions whose Q is too high by accident. Three answers: the smaller of two
critics in the target; noise on the target's action, so that Q is fitted to an average over nearby actions
and narrow peaks are flattened; a policy updated less often than the critics. It acts with noise of its own,
a = clip(pi(s) + sigma_e noise, -1, 1), and learns on minibatches of a replay buffer D:

  J(Q_i) = E_D[ (Q_i(s,a) - y)^2 ]
       y = r + gamma (1 - done) min_j Qt_j(s', a'),   a' = clip(pit(s') + clip(sigma noise, -c, c), -1, 1)
  every d-th update:
    J(pi) = E_D[ -Q_1(s, pi(s)) ]
    Qt <- Qt + tau (Q - Qt),   pit <- pit + tau (pi - pit)                       the target networks

  symbol             in the code                            shape
  s, a, r, s', done  batch.obs .act .rew .next_obs .done    (B, obs) (B, act) (B,) (B, obs) (B,)
  Q_i(s,a)           critic(obs, act)                       (n, B)
  y                  backup()                               (B,)
  pi(s)              actor                                  (B, act), actions in [-1, 1]
  sigma_e            --exploration-noise                    in units of [-1, 1] actions
  sigma, c           --policy-noise, --noise-clip           likewise
  d                  --policy-frequency                     updates
  tau                --tau                                  Polyak rate of the targets

Where to read: networks, losses and Learner.update are the algorithm; train() is the loop. The blocks marked
`shared`, which sibling scripts have too, can be skipped at first.

Quick, Pendulum:
  python td3.py

A MuJoCo baseline:
  python td3.py --env HalfCheetah-v5 --total-timesteps 1_000_000 --learning-starts 25_000 \
      --eval-frequency 10_000 --checkpoint-frequency 100_000

DDPG, which is three switches:
  python td3.py --env Hopper-v5 --num-critics 1 --policy-noise 0 --policy-frequency 1

In the runs that CleanRL, Tianshou and Spinning Up publish, DDPG with today's settings reaches two thirds to
a fifth of TD3 on Hopper, Walker2d and Ant, and is level or ahead on HalfCheetah: compare on the former.

Datasets for cql_continuous.py, in D4RL's layout: random; medium-replay; medium, that run's policy; expert:
  python td3.py --env Hopper-v5 --total-timesteps 100_000 --learning-starts 100_000 --save-dataset random.hdf5
  python td3.py --env Hopper-v5 --total-timesteps 100_000 --exp-name medium --save-dataset replay.hdf5
  python td3.py --resume runs/MEDIUM --rollout-dataset medium.hdf5 --rollout-steps 100_000
  python td3.py --env Hopper-v5 --total-timesteps 1_000_000 --exp-name expert
  python td3.py --resume runs/EXPERT --rollout-dataset expert.hdf5 --rollout-steps 100_000

While it trains, `eval/episodic_return` should rise; `diagnostics/q_max` stay below `q_bound`,
`overestimation` near 0 or below it.
Resume is bitwise on Gymnasium's classic control and MuJoCo environments; elsewhere new episodes start.
`--num-envs` does not change the updates per step: `--utd` counts stored steps of all environments.

Known limits: vector observations and box actions. Left out on purpose: observation normalisation (the paper
has none), prioritised replay, n-step targets, pixels.
"""

import copy
import ctypes
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
    """seeds networks, exploration, minibatches and environments"""
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
    capture_video: bool = False
    """record an episode at each evaluation, under the run folder's videos/"""
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "Pendulum-v1"
    """Gymnasium environment"""
    run_dir: str = "runs"
    """folder that holds the run folders"""
    resume: str | None = None
    """run folder or checkpoint to go on from; `auto`: the newest one with these arguments, if any"""
    checkpoint_frequency: int = 10_000
    """environment steps between checkpoints (0: only at the end)"""
    checkpoint_replay: bool = True
    """keep the replay in the checkpoint; without it a resumed run first refills --learning-starts steps"""
    eval_frequency: int = 2_000
    """environment steps between evaluations (0: only at the end)"""
    eval_episodes: int = 10
    """episodes of each evaluation (0: no evaluation)"""
    log_frequency: int = 500
    """environment steps between logged losses and checks for non-finite numbers"""
    diagnostics_frequency: int = 2_000
    """environment steps between diagnostics (0: none)"""
    compile: bool = False
    """run the losses through torch.compile"""
    cudagraphs: bool = True
    """on a GPU: capture the whole update in a CUDA graph"""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """bf16: hidden layers of the online critics inside the losses; tf32: matrix products on a GPU"""
    save_dataset: str | None = None
    """file that the whole replay is written to at the end, D4RL layout (HDF5)"""
    rollout_dataset: str | None = None
    """file that --rollout-steps of the policy of --resume are written to; nothing is trained"""
    rollout_steps: int = 100_000
    """length of --rollout-dataset"""

    # --- length and data
    total_timesteps: int = 20_000
    """environment steps"""
    num_envs: int = 1
    """environments stepped together"""
    utd: float = 1.0
    """update-to-data ratio: updates for each environment step after --learning-starts"""
    learning_starts: int = 1_000
    """environment steps with uniform actions, before the first update"""
    buffer_size: int = 1_000_000
    """capacity of the replay"""
    batch_size: int = 256
    """B, transitions in a minibatch"""

    # --- TD3 (sizes and rates of its authors' code; the paper's text has rates of 1e-3 and batches of 100)
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak rate of the targets (1: no target networks)"""
    policy_lr: float = 3e-4
    """learning rate of the policy"""
    q_lr: float = 3e-4
    """learning rate of the critics"""
    exploration_noise: float = 0.1
    """deviation of the acting policy's Gaussian noise, in units of [-1, 1] actions"""
    policy_noise: float = 0.2
    """deviation of the noise on the target's action (DDPG: 0)"""
    noise_clip: float = 0.5
    """bound of that noise"""
    policy_frequency: int = 2
    """d, critic updates for each update of the policy and the targets (DDPG: 1)"""

    # --- networks
    num_critics: int = 2
    """n, critics whose minimum is the target (DDPG: 1)"""
    critic_width: int = 256
    """units in a hidden layer of the critic"""
    critic_depth: int = 2
    """hidden layers of the critic"""
    policy_width: int = 256
    """units in a hidden layer of the policy"""
    policy_depth: int = 2
    """hidden layers of the policy"""


LIMITS = {"gamma": (0, 0.99999), "tau": (1e-9, 1), "num_critics": (1, 100), "utd": (1e-3, 1e3)}  # least, most
LIMITS |= {"critic_depth": (1, 64), "policy_depth": (1, 64), "buffer_size": (2, 1e12)}
LIMITS |= dict.fromkeys(["policy_lr", "q_lr"], (1e-12, 1e12))
LIMITS |= dict.fromkeys(["critic_width", "policy_width", "batch_size", "num_envs"], (1, 1e6))
LIMITS |= dict.fromkeys(["policy_frequency", "total_timesteps", "rollout_steps", "log_frequency"], (1, 1e12))


def check(args: Args):
    """Refuse values and combinations that make no sense or would be ignored, before anything starts."""
    check_limits(args, LIMITS)
    check_dataset_flags(args)
    only_if(args, args.policy_noise > 0, "without --policy-noise", "noise_clip")
    only_if(args, args.eval_episodes > 0, "with --eval-episodes 0", "capture_video")
    only_if(args, args.track, "without --track", "wandb_project_name", "wandb_entity")


# ------------------------------------------------------------------------------------------- networks
class Actor(nn.Module):
    """Deterministic policy pi(s) on the box [-1, 1]^act."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim] + [args.policy_width] * args.policy_depth
        hidden = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(sizes[-1], act_dim), nn.Tanh())

    def forward(self, obs):
        return self.net(obs)


class StackedLinear(nn.Module):
    """n independent linear layers as one batched product: (n, B, in) -> (n, B, out)."""

    def __init__(self, n: int, fan_in: int, fan_out: int):
        super().__init__()
        bound = fan_in**-0.5  # nn.Linear's; torch.nn.init would misread a 3-D tensor's fan
        self.weight = nn.Parameter(torch.empty(n, fan_in, fan_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x):
        weight, bias = self.weight[: len(x)], self.bias[: len(x)]  # the policy asks the first critic only
        if weight.shape[-1] == 1:  # w . x: three times as fast on a CPU as a product with one column
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)


class Critic(nn.Module):
    """An ensemble of n Q-functions on the same input."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.n = args.num_critics
        sizes = [obs_dim + act_dim] + [args.critic_width] * args.critic_depth
        self.layers = nn.ModuleList(StackedLinear(self.n, i, o) for i, o in zip(sizes, sizes[1:]))
        self.head = StackedLinear(self.n, sizes[-1], 1)

    def hidden(self, obs, act, n: int | None = None):
        """Activations of the hidden layers: a list of (n, B, width); the last are the features phi(s,a)."""
        h = torch.cat([obs, act], dim=-1).expand(n or self.n, -1, -1)
        activations = []
        for layer in self.layers:
            h = F.relu(layer(h), inplace=True)
            activations.append(h)
        return activations

    def forward(self, obs, act, bf16: bool = False, n: int | None = None):
        """Q(s,a) of each critic, or of the first n, (n, B); bf16 concerns the hidden layers."""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=bf16):
            phi = self.hidden(obs, act, n)[-1]
        return self.head(phi.float()).squeeze(-1)


# ------------------------------------------------------------------------- losses: one function each
class Batch(NamedTuple):
    obs: torch.Tensor  # (B, obs)
    act: torch.Tensor  # (B, act), in [-1, 1]
    rew: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, obs)
    done: torch.Tensor  # (B,), 1 where the episode terminated; a time-out is 0


def backup(learner, batch: Batch, args: Args, generator=None):
    """The target's actions a', (B, act), and y, (B,). Actions are in units of [-1, 1], so that one clip
    holds each of them to its own bounds."""
    noise = torch.randn(batch.act.shape, generator=generator, device=batch.act.device) * args.policy_noise
    noise = noise.clamp(-args.noise_clip, args.noise_clip)
    next_act = (learner.target_actor(batch.next_obs) + noise).clamp(-1, 1)
    value = learner.target(batch.next_obs, next_act).amin(0)
    return next_act, batch.rew + args.gamma * (1 - batch.done) * value


def critic_loss(learner, batch: Batch, args: Args):
    """(Q_i(s,a) - y)^2, mean over the minibatch, sum over the ensemble."""
    with torch.no_grad():
        _, y = backup(learner, batch, args)
    q = learner.critic(batch.obs, batch.act, args.precision == "bf16")
    td_loss = ((q - y) ** 2).mean(1)  # (n,)
    info = {f"qf{i + 1}_loss": td_loss[i] for i in range(min(2, len(q)))} | {"qf_loss": td_loss.mean()}
    info |= {f"qf{i + 1}_values": q[i].mean() for i in range(min(2, len(q)))}
    return td_loss.sum(), {k: v.detach() for k, v in info.items()}


def actor_loss(learner, batch: Batch, args: Args):
    """E[-Q_1(s, pi(s))]: its gradient is the deterministic policy gradient. Q_1, not the minimum."""
    q = learner.critic(batch.obs, learner.actor(batch.obs), args.precision == "bf16", n=1)
    loss = -q.mean()
    return loss, {"actor_loss": loss.detach()}


def memory(args: Args, inputs: int) -> int:
    """Bytes, roughly: weights five times (target, gradient, two moments of Adam), activations with their
    gradients in three passes."""
    n, width, depth = args.num_critics, args.critic_width, args.critic_depth
    actor = args.policy_width * (inputs + args.policy_width * args.policy_depth)
    return 20 * (actor + n * width * (inputs + width * depth)) + 24 * args.batch_size * n * width * depth


class Learner(nn.Module):
    """All that learns, with its optimisers."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device):
        super().__init__()
        self.args, self.device = args, device
        self.actor = Actor(obs_dim, act_dim, args)
        self.critic = Critic(obs_dim, act_dim, args)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.to(device)
        if args.compile:
            torch._inductor.config.fallback_random = True  # the random numbers of the uncompiled script
        compiled = torch.compile if args.compile else lambda loss: loss
        self.critic_loss, self.actor_loss = compiled(critic_loss), compiled(actor_loss)
        flags = {"fused": True, "capturable": device.type == "cuda"}
        self.optim = {
            "critic": torch.optim.Adam(self.critic.parameters(), lr=args.q_lr, **flags),
            "actor": torch.optim.Adam(self.actor.parameters(), lr=args.policy_lr, **flags),
        }

    @torch.no_grad()
    def act(self, obs, explore: bool):
        """Actions in [-1, 1] for an environment's observations: pi(s), with noise to explore. (Noise with a
        memory would have to go into checkpoint(), and be cleared where episodes end.)"""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        act = self.actor(obs)
        if explore:  # a draw for each environment and dimension
            act = (act + self.args.exploration_noise * torch.randn_like(act)).clamp(-1, 1)
        return act

    def update(self, batch: Batch, policy: bool) -> dict:
        """A critic step; if `policy`, every d-th time, also a policy step and the target networks move."""
        args = self.args
        loss, info = self.critic_loss(self, batch, args)
        self.minimise("critic", loss)
        if policy:
            loss, pi_info = self.actor_loss(self, batch, args)
            self.minimise("actor", loss)
            polyak(self.critic, self.target, args.tau)
            polyak(self.actor, self.target_actor, args.tau)
            info |= pi_info
        return info

    def least_q(self, obs, act):
        """min Q(s,a), (B,), as in the target: what is reported as Q."""
        return self.critic(obs, act).amin(0)

    def minimise(self, name: str, loss):
        params = self.optim[name].param_groups[0]["params"]
        self.optim[name].zero_grad()
        loss.backward(inputs=params)  # only these: the actor's loss costs no critic weight gradients
        self.optim[name].step()

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


# ------------------------------------------------------------------------------------------- training
def train(args: Args) -> dict:
    """Train as `args` says; returns what summary.json holds."""
    check(args)
    if args.rollout_dataset:
        return write_rollouts(args)
    device, saved = set_up(args), find_checkpoint(args)
    past = finished(saved, "global_step", args.total_timesteps) if saved else None
    if past and not args.save_dataset:
        return past
    step, updates, idle_steps = 0, 0, args.learning_starts  # updates = utd (step - idle_steps)
    recent_returns, returns, info = [], np.full(1, math.nan), {}
    envs = make_envs(args.env_id, args.num_envs)
    obs_dim, act_dim = check_boxes(envs, args.env_id)
    eval_envs = make_envs(args.env_id, args.eval_episodes) if args.eval_episodes else None
    longest = max(args.total_timesteps, saved["step"] if saved else 0)
    capacity = min(args.buffer_size, longest + args.num_envs)
    replay = Replay(capacity, obs_dim, act_dim, device)
    reserve(memory(args, obs_dim + act_dim), "networks and one update, roughly", device)
    learner, player = Learner(obs_dim, act_dim, args, device), Player(envs, args.seed)
    if saved:
        step, updates, idle_steps = (saved[k] for k in ("step", "updates", "idle_steps"))
        recent_returns, returns = saved["recent_returns"], np.array(saved["returns"])
        info = {k: v.to(device) for k, v in saved["losses"].items()}
        learner.restore(saved["learner"])
        player.restore(saved["player"], args.seed + step)
        if saved["replay"]:
            replay.restore(saved.pop("replay"), continues=saved["player"]["envs"] is not None)
        elif args.save_dataset:
            fail(f"--save-dataset: {saved['folder']} was saved without its replay")
        else:  # refill before the next update
            idle_steps = step + args.learning_starts - updates / args.utd
        restore_random_state(saved["random"])
    if args.learning_starts >= args.total_timesteps:
        print(f"--learning-starts {args.learning_starts:,}: every action is random, nothing is trained")
    video = Video(args.env_id) if args.capture_video else None
    run = Run(args, {}, saved)

    greedy = lambda obs: to_env(learner.act(obs[None], explore=False)[0], envs.single_action_space)

    def update_once(policy: bool):
        return learner.update(replay.sample(args.batch_size), policy)

    def save():
        check_finite(step, info | dict(learner.named_parameters()))
        state = {"learner": learner.checkpoint(), "player": player.checkpoint(), "random": random_state()}
        state |= {"step": step, "updates": updates, "idle_steps": idle_steps, "losses": info}
        state |= {"recent_returns": recent_returns, "returns": returns.tolist()}
        run.save("checkpoint.pt", state | {"replay": replay.checkpoint() if args.checkpoint_replay else None})

    update = GraphedUpdate(update_once, args.cudagraphs and device.type == "cuda")
    progress = Progress("training", args.total_timesteps, step)
    with StopSignal() as stop:
        while step < args.total_timesteps and not stop.signum:
            act = learner.act(player.obs, explore=True)
            if step < args.learning_starts:
                act = torch.rand_like(act) * 2 - 1
            stored, ended = player.step(act, replay)
            before, step = step, step + stored
            while updates < int(args.utd * (step - idle_steps) + 1e-9):
                updates += 1
                info |= update(updates % args.policy_frequency == 0)

            every = lambda n: n > 0 and step // n > before // n  # noqa: B023
            diagnosing, logging = updates and every(args.diagnostics_frequency), every(args.log_frequency)
            scoring = eval_envs and (every(args.eval_frequency) or step >= args.total_timesteps)
            if diagnosing or scoring or logging:
                check_finite(step, info | dict(learner.named_parameters()))
            for episode in ended:
                run.scalars(dict(zip(("charts/episodic_return", "charts/episodic_length"), episode)), step)
                recent_returns = [*recent_returns, episode[0]][-10:]
            if logging:
                run.scalars({"losses/" + k: v for k, v in info.items()}, step)
                run.scalars({"charts/SPS": progress.rate(step), "charts/updates": updates}, step)
            with progress.paused(diagnosing or scoring):
                moment = diagnose(learner, replay, args, bonus=0.0) if diagnosing else {}
                if scoring:
                    returns, against_achieved = evaluate(learner, eval_envs, args)
                    run.scalars({"eval/episodic_return": returns.mean()}, step)
                    moment |= against_achieved
                    if video:
                        video.record(greedy, run.dir / "videos", 1_000_000 + 1_000 * args.seed, step)
                run.scalars({"diagnostics/" + k: v for k, v in moment.items()}, step)
            if every(args.checkpoint_frequency) and step < args.total_timesteps:
                save()
            recent = {"return": np.mean(recent_returns or [math.nan]), "eval": returns.mean()}
            progress.show(min(step, args.total_timesteps), recent | {"Q": info.get("qf1_values", math.nan)})
        save()
        if stop.signum:
            run.stopped(stop.signum)
    summary = {"global_step": step, "updates": updates, "steps_per_second": progress.rate(step)}
    summary["eval_episodes"] = args.eval_episodes
    if eval_envs:
        summary |= {"final_return_mean": float(returns.mean()), "final_return_std": float(returns.std())}
        print(f"last evaluation: {returns.mean():.1f} +- {returns.std():.1f}, {len(returns)} episodes")
    summary = run.finish(past or summary)  # past: it came back for --save-dataset alone
    if args.save_dataset:
        made_by = {"collector_return_mean": returns.mean()} if eval_envs and updates else {}
        replay.write(Path(args.save_dataset), envs.single_action_space, **made_by)
    return summary


# === shared: replay (canonical copy: sac.py) ===
class Replay:
    """Transitions on the device, a row of one tensor each: allocated once, filled in a ring, sampled by one
    gather. `rows` (capacity, width), `size` on the device because CUDA graphs cannot read a Python number."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device):
        self.widths = {"obs": obs_dim, "act": act_dim, "rew": 1, "next_obs": obs_dim, "done": 1}
        self.widths |= {"timeout": 1, "env": 1}  # for the file that write() makes
        reserve(4 * capacity * sum(self.widths.values()), "replay buffer", device)
        self.rows = torch.zeros(capacity, sum(self.widths.values()), device=device)
        self.size = torch.zeros((), dtype=torch.float64, device=device)
        self.added = 0

    def add(self, rows: np.ndarray):
        """Append transitions (k, width), columns as in `widths`; the oldest make room."""
        at = torch.arange(self.added, self.added + len(rows), device=self.rows.device) % len(self.rows)
        self.rows[at] = torch.from_numpy(rows).to(self.rows.device, torch.float32)
        self.added += len(rows)
        self.size.fill_(min(self.added, len(self.rows)))

    def column(self, rows) -> dict:
        return dict(zip(self.widths, rows.split(list(self.widths.values()), dim=1)))

    def batch(self, rows) -> Batch:
        c = self.column(self.rows[rows])
        return Batch(c["obs"], c["act"], c["rew"][:, 0], c["next_obs"], c["done"][:, 0])

    def sample(self, n: int) -> Batch:
        u = torch.rand(n, dtype=torch.float64, device=self.rows.device)
        return self.batch((u * self.size).long())

    def checkpoint(self) -> dict:
        full = self.added >= len(self.rows)  # a part is copied: torch.save would write the whole tensor
        return {"rows": self.rows if full else self.rows[: self.added].cpu().clone(), "added": self.added}

    def restore(self, saved: dict, continues: bool):
        """`continues`: the environments go on where they were; else each one's last episode is cut here."""
        self.rows[: len(saved["rows"])] = saved["rows"]
        self.added = saved["added"]
        self.size.fill_(len(saved["rows"]))
        if not continues and self.added <= len(self.rows):  # of a ring that has wrapped write() makes no file
            c = self.column(self.rows)
            for env in c["env"][: self.added].unique():
                newest = (c["env"][: self.added, 0] == env).nonzero()[-1]
                c["timeout"][newest] = 1 - c["done"][newest]

    def write(self, path: Path, box, **attributes):
        """The transitions as a D4RL-layout HDF5 file, environment by environment, actions in its bounds."""
        if self.added > len(self.rows):
            fail(f"{path}: the replay holds only the last {len(self.rows):,} of {self.added:,} transitions")
        c = {k: v.cpu() for k, v in self.column(self.rows[: self.added]).items()}
        order = c["env"][:, 0].argsort(stable=True).numpy()
        c = {k: v.numpy()[order] for k, v in c.items()}
        c["timeout"][np.append(np.diff(c["env"][:, 0]) != 0, True)] = 1  # cut here, whatever follows
        done = c["done"][:, 0] > 0
        act = to_env(torch.from_numpy(c["act"]), box).astype(np.float32)
        try:
            with write_beside(path) as temporary, need("h5py").File(temporary, "w") as f:
                f["observations"], f["next_observations"], f["actions"] = c["obs"], c["next_obs"], act
                f["rewards"], f["terminals"] = c["rew"][:, 0], done
                f["timeouts"] = (c["timeout"][:, 0] > 0) & ~done
                f.attrs.update(attributes)
        except (OSError, RuntimeError) as e:
            fail(f"{path} could not be written ({first_line(e)})")
        print(f"{path}: {len(done):,} transitions, {int(done.sum()):,} of them terminal")


class Player:
    """Steps the environments and stores what they show.

    After an episode's last step, gymnasium's NEXT_STEP autoreset spends a row on the reset: its action is
    ignored, and it is neither stored nor counted. The row before it holds the true last observation as
    next_obs, so that only `terminated`, never a time-out, cuts the bootstrap.
    """

    def __init__(self, envs, seed: int):
        if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
            fail(f"autoreset of {envs}: expected NEXT_STEP, whose rows are counted here")
        self.envs, self.n = envs, envs.num_envs
        self.obs, _ = envs.reset(seed=seed)
        self.over = np.zeros(self.n, bool)  # episodes that ended with the last step
        self.returns, self.lengths = np.zeros(self.n), np.zeros(self.n, int)

    def step(self, act, replay: Replay) -> tuple[int, list]:
        """Actions (n, act) in [-1, 1]; how many rows were stored, and (return, length) of ended episodes."""
        act = act.cpu()
        obs, rew, terminated, truncated, _ = self.envs.step(to_env(act, self.envs.single_action_space))
        real, number = ~self.over, np.arange(self.n)
        columns = (self.obs, act.numpy(), rew, obs, terminated, truncated & ~terminated, number)
        rows = np.column_stack(columns)[real]
        if not np.isfinite(rows).all():  # it would stay in the replay, and in the checkpoints
            what = "an action" if not np.isfinite(columns[1]).all() else "an observation or a reward"
            fail(
                f"transition {replay.added}: {what} is not finite; the last checkpoint is from before",
                status=3,
            )
        replay.add(rows)
        self.returns, self.lengths = (self.returns + rew) * real, (self.lengths + 1) * real
        self.obs, self.over = obs, terminated | truncated
        ended = [(float(self.returns[i]), int(self.lengths[i])) for i in np.flatnonzero(self.over)]
        return int(real.sum()), ended

    def checkpoint(self) -> dict:
        names = ("obs", "over", "returns", "lengths")
        return {k: torch.from_numpy(getattr(self, k)) for k in names} | {"envs": env_states(self.envs)}

    def restore(self, saved: dict, seed: int):
        if saved["envs"] is None:
            print("these environments cannot be restored exactly: new episodes start")
            self.obs, _ = self.envs.reset(seed=seed)
            return
        for k in ("obs", "over", "returns", "lengths"):
            setattr(self, k, saved[k].numpy())
        restore_envs(self.envs, saved["envs"], self.over)


def check_boxes(envs, env_id: str) -> tuple[int, int]:
    """Widths of the observation vector and of the action box; other spaces are refused."""
    box, obs = envs.single_action_space, envs.single_observation_space
    for space, what in ((box, "actions"), (obs, "observations")):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            fail(f"--env-id {env_id}: {what} are {space}, expected a Box of one dimension")
    if not np.isfinite([box.low, box.high]).all():
        fail(f"--env-id {env_id}: actions are {box}, expected a bounded Box")
    return obs.shape[0], box.shape[0]


def check_dataset_flags(args: Args):
    """What would only fail hours later, when the file is written."""
    only_if(args, args.rollout_dataset is not None, "without --rollout-dataset", "rollout_steps")
    only_if(args, args.rollout_dataset is None, "with --rollout-dataset", "save_dataset")
    name = "rollout_dataset" if args.rollout_dataset else "save_dataset"
    path = getattr(args, name)
    if path is not None:
        need("h5py")
        folder = Path(path).parent
        if Path(path).exists() or not folder.is_dir() or not os.access(folder, os.W_OK):
            fail(f"{flag(name)} {path}: exists already, or its folder cannot be written")
    enough = args.total_timesteps + args.num_envs - 1  # the last step may store num_envs rows
    if args.save_dataset and (args.buffer_size < enough or not args.checkpoint_replay):
        fail(f"--save-dataset writes the whole replay: it needs --checkpoint-replay, --buffer-size {enough}")


def to_env(act, box) -> np.ndarray:
    """Actions from [-1, 1] to the environment's bounds; the clip absorbs rounding."""
    return np.clip(box.low + (act.cpu().numpy() + 1) / 2 * (box.high - box.low), box.low, box.high)


@torch.no_grad()
def evaluate(learner, envs, args: Args) -> tuple[np.ndarray, dict]:
    """One episode in each of `envs` from fixed seeds, without exploration. Draws no torch random number.

    Returns the returns (episodes,); and v_s0, the mean of least_q(s0, a0), with the overestimation, that
    less the discounted return that followed (an episode cut at T steps misses gamma^T of it; SAC's Q speaks
    of the sampled policy and holds its entropy).
    """
    obs, _ = envs.reset(seed=1_000_000 + 1_000 * args.seed)
    alive, returns, discounted = np.ones(len(obs), bool), np.zeros(len(obs)), np.zeros(len(obs))
    discount, predicted = 1.0, None
    learner.critic.eval()
    while alive.any():
        act = learner.act(obs, explore=False)
        if predicted is None:
            x = torch.as_tensor(obs, dtype=torch.float32, device=act.device)
            predicted = learner.least_q(x, act).cpu().numpy()
        obs, rew, terminated, truncated, _ = envs.step(to_env(act, envs.single_action_space))
        returns += alive * rew
        discounted += alive * discount * rew
        alive &= ~(terminated | truncated)  # what an environment does after its first episode is not counted
        discount *= args.gamma
    learner.critic.train()
    return returns, {"v_s0": predicted.mean(), "overestimation": (predicted - discounted).mean()}


def diagnose(learner, replay: Replay, args: Args, bonus: float) -> dict:
    """The numbers of one moment, on at most 2,048 transitions of the replay, in fp32 and eval mode.

    Its generators start anew at each call. Every Q is least_q; the TD error is the ensemble's mean, in units
    of the target's variance; features are those of the first critic. `bonus` is the most that the entropy
    can add to a reward: with it r_max / (1 - gamma) bounds Q.
    """
    critic, target, device = learner.critic, learner.target, replay.rows.device
    draw = torch.Generator(device).manual_seed(0)
    rows = np.random.default_rng(0).choice(int(replay.size), min(int(replay.size), 2048), replace=False)
    batch = replay.batch(torch.from_numpy(rows).to(device))
    uniform = torch.rand(batch.act.shape, generator=draw, device=device) * 2 - 1
    critic.eval(), target.eval()
    with strict_fp32():
        next_act, y = backup(learner, batch, args, draw)
        choices = {"data": batch.act, "pi": learner.act(batch.obs, explore=False), "rand": uniform}
        q = {f"q_{k}": learner.least_q(batch.obs, act) for k, act in choices.items()}
        out = {k: v.mean() for k, v in q.items()} | {"q_max": torch.stack([*q.values()]).max()}
        out["td_error"] = (critic(batch.obs, batch.act) - y).pow(2).mean() / y.var()
        activations = critic.hidden(batch.obs, batch.act)
        phi, phi_next = activations[-1][0], critic.hidden(batch.next_obs, next_act)[-1][0]
        out |= spectrum(phi) | alignment(phi, phi_next, 1 - batch.done)
        out["dormant"] = dormant([h[0] for h in activations])
    critic.train(), target.train()
    seen = replay.column(replay.rows[: replay.added])
    r_max = seen["rew"].max() + bonus
    ends = bool(seen["done"].any())  # where all rewards are negative and episodes end, ending at once is best
    out["q_bound"] = r_max if r_max < 0 and ends else r_max / (1 - args.gamma)
    return {k: float(v) for k, v in out.items()}


def write_rollouts(args: Args) -> dict:
    """--rollout-dataset: the exploring policy of --resume, run for --rollout-steps, as a dataset."""
    if args.resume in (None, "auto"):
        fail("--rollout-dataset needs --resume RUN_FOLDER, the run whose policy it plays")
    path = checkpoint_path(args)
    saved = load_checkpoint(path)
    given = {k: getattr(args, k) for k in ("seed", "cuda", "rollout_dataset", "rollout_steps", "resume")}
    for k, v in asdict(args).items():
        same = v == saved["args"].get(k, getattr(Args, k))  # a flag that the run did not know yet
        only_if(args, k in given or same, "with --rollout-dataset: the run's is used", k)
    args = Args(**saved["args"] | given | {"precision": "fp32", "compile": False})
    device = set_up(args)
    envs = make_envs(args.env_id, 1)
    sizes = check_boxes(envs, args.env_id)
    learner, replay = Learner(*sizes, args, device), Replay(args.rollout_steps, *sizes, device)
    learner.load_state_dict(saved["learner"]["networks"])
    player, returns = Player(envs, 2_000_000 + args.seed), []
    progress = Progress("rolling out", args.rollout_steps)
    with StopSignal() as stop:
        while replay.added < args.rollout_steps:
            _, episodes = player.step(learner.act(player.obs, explore=True), replay)
            returns += [r for r, _ in episodes]
            progress.show(replay.added, {"return": np.mean(returns[-10:] or [math.nan])})
            if stop.signum:
                print("\nstopped while rolling out: nothing is kept, the same command starts again")
                raise SystemExit(128 + stop.signum)
    made_by = {"policy": str(path), "policy_step": saved["step"]}
    if returns:
        made_by["collector_return_mean"] = np.mean(returns)
        print(f"{len(returns)} whole episodes, mean return {np.mean(returns):.1f}")
    replay.write(Path(args.rollout_dataset), envs.single_action_space, **made_by)
    return {"episodes": len(returns), "rollout_return_mean": float(np.mean(returns)) if returns else None}


# === end shared ===


# === shared: environments (canonical copy: sac.py) ===
def make_envs(env_id: str, n: int) -> gym.vector.SyncVectorEnv:
    """n environments stepped together, NEXT_STEP autoreset; refused in one line."""
    try:
        envs = gym.vector.SyncVectorEnv([lambda: gym.make(env_id)] * n)
    except Exception as e:  # registration, missing packages, a namespace's own errors
        fail(f"--env-id {env_id}: {type(e).__name__}: {first_line(e)}")
    if envs.envs[0].spec.max_episode_steps is None:
        fail(f"--env-id {env_id}: has no time limit (max_episode_steps), an evaluation might never end")
    return envs


def env_states(envs) -> list | None:
    """What the next steps of each environment depend on, as tensors and plain numbers; None where that is not
    known to be all of it. Exact for Gymnasium's classic control and MuJoCo environments: integration state,
    and for Ant and Humanoid the positions of bodies, whose reward compares them before and after a step."""
    states = []
    if not hasattr(envs, "envs"):  # Atari's vector environment
        return None
    for env in envs.envs:
        e = env.unwrapped
        if env.spec.additional_wrappers:  # they may hold state of their own
            return None
        state = {"random": e.np_random.bit_generator.state, "elapsed": env.get_wrapper_attr("_elapsed_steps")}
        if type(e).__module__.startswith("gymnasium.envs.classic_control"):
            inner = [(k, vars(e)[k]) for k in ("state", "last_u", "steps_beyond_terminated") if k in vars(e)]
            plain = lambda v: v if v is None or isinstance(v, int) else torch.from_numpy(np.array(v))
            state["inner"] = {k: plain(v) for k, v in inner}
        elif type(e).__module__.startswith("gymnasium.envs.mujoco"):
            mujoco = importlib.import_module("mujoco")
            what = mujoco.mjtState.mjSTATE_INTEGRATION
            mujoco.mj_getState(e.model, e.data, x := np.empty(mujoco.mj_stateSize(e.model, what)), what)
            arrays = {"integration": x, "xpos": e.data.xpos, "xipos": e.data.xipos}
            state["mujoco"] = {k: torch.tensor(v) for k, v in arrays.items()}
        else:
            return None
        states.append(state)
    return states


def restore_envs(envs, states: list, over: np.ndarray):
    """The inverse of env_states; `over` tells which environments reset at their next step."""
    envs.reset(seed=0)
    for env, state in zip(envs.envs, states):
        e = env.unwrapped
        for k, v in state.get("inner", {}).items():
            setattr(e, k, v.numpy() if isinstance(v, torch.Tensor) else v)
        if "mujoco" in state:
            mujoco, saved = importlib.import_module("mujoco"), state["mujoco"]
            what = mujoco.mjtState.mjSTATE_INTEGRATION
            mujoco.mj_setState(e.model, e.data, saved["integration"].numpy(), what)
            e.data.xpos[:], e.data.xipos[:] = saved["xpos"], saved["xipos"]
        e.np_random.bit_generator.state = state["random"]
        env.set_wrapper_attr("_elapsed_steps", state["elapsed"])
    envs._autoreset_envs = over.copy()


class Video:
    """--capture-video: one episode by `act` at each evaluation, in an environment of its own."""

    def __init__(self, env_id: str):
        need("moviepy")
        try:
            env = gym.make(env_id, render_mode="rgb_array")
            env.reset(seed=0)
            env.render()
        except Exception as e:  # no rgb_array mode, no display, no OpenGL
            fail(f"--capture-video: {env_id} cannot be rendered here ({type(e).__name__}: {first_line(e)})")
        env.close()
        self.env_id = env_id

    def record(self, act, folder: Path, seed: int, step: int):
        env = gym.make(self.env_id, render_mode="rgb_array")
        env = gym.wrappers.RecordVideo(env, str(folder / f"step-{step}"), disable_logger=True)
        (obs, _), over = env.reset(seed=seed), False
        while not over:
            obs, _, terminated, truncated, _ = env.step(act(obs))
            over = terminated or truncated
        env.close()


# === end shared ===


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
