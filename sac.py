r"""Soft actor-critic (SAC): off-policy reinforcement learning with maximum entropy.

Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905. The policy, a
Gaussian squashed by tanh, maximises the discounted sum of rewards and of alpha times its entropy.
Three losses on minibatches of a replay buffer D, for n critics Q_i and their slow targets Qt_i:

  J(Q_i)   = 1/2 E_D[ (Q_i(s,a) - y)^2 ]                                              (Eq. 5)
         y = r + gamma (1 - done) (min_j Qt_j(s',a') - alpha log pi(a'|s')),  a' ~ pi(.|s')
  J(pi)    = E_D[ alpha log pi(a|s) - min_i Q_i(s,a) ],  a = tanh(mean + std noise)   (Eqs. 7, 9)
  J(alpha) = E_D[ -alpha (log pi(a|s) + H_target) ]                                   (Eq. 18)

The minimum over critics counters overestimation: the policy seeks out actions whose Q is too large
by accident. REDQ (arXiv 2101.05982) and DroQ (arXiv 2110.02034) make many updates in each step of
the environment and keep Q in check by a random subset of a large ensemble, or by dropout and layer
norm; their policy climbs the mean over critics.

  symbol             in the code                            shape
  s, a, r, s', done  batch.obs .act .rew .next_obs .done    (B, obs) (B, act) (B,) (B, obs) (B,)
  Q_i(s,a)           critic(obs, act)                       (n, B)
  y                  backup()                               (B,)
  pi(a|s)            actor.sample(obs)                      (B, act) in [-1, 1], log pi (B,)
  alpha, H_target    log_alpha, --target-entropy            scalars

Quick, Pendulum; a MuJoCo baseline; its replay as a dataset for cql_continuous.py; DroQ; REDQ (their
H_target: -1 Hopper, -2 Humanoid, -3 HalfCheetah and Walker2d, -4 Ant):
  python sac.py
  python sac.py --env HalfCheetah-v5 --total-timesteps 1_000_000 --learning-starts 10_000
  python sac.py --env Hopper-v5 --total-timesteps 100_000 --save-dataset replay.hdf5
  python sac.py --env Hopper-v5 --learning-starts 5_000 --utd 20 --policy-frequency 20 \
      --actor-q mean --target-entropy -1 --layer-norm --dropout 0.01
  python sac.py --env Hopper-v5 --learning-starts 5_000 --utd 20 --policy-frequency 20 \
      --actor-q mean --target-entropy -1 --num-critics 10 --target-subset 2

While it trains, `eval/episodic_return` should rise, `losses/entropy` fall to H_target and stay (if
alpha grows for ever, H_target is out of reach), `diagnostics/q_max` stay below `q_bound` or near
it (Pendulum: 8.0 over 3.3). The `overestimation` is positive while Q has a large entropy bonus,
then negative for a long time: Q needs 1 / (tau (1 - gamma)) = 20,000 updates to reach its level.

Networks, losses and Learner.update are the algorithm, train() is the loop. The blocks marked
"shared", which sibling scripts have too, can wait. Known limits: vector observations, box actions.
Left out on purpose: observation normalisation (the paper has none), n-step targets, pixels.
"""

import copy
import ctypes
import importlib.util
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
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # seeds networks, exploration, minibatches and environments
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
    checkpoint_frequency: int = 10_000  # environment steps between checkpoints (0: only at the end)
    eval_frequency: int = 2_000  # steps between evaluations and diagnostics (0: only at the end)
    eval_episodes: int = 10  # episodes of each evaluation (0: diagnostics only)
    log_frequency: int = 500  # environment steps between logged losses
    save_dataset: str | None = None  # HDF5 file for the replay at the end, in D4RL's layout

    # length and data
    total_timesteps: int = 20_000  # environment steps
    num_envs: int = 1  # environments stepped together
    utd: float = 1.0  # update-to-data ratio: updates for each step after --learning-starts
    learning_starts: int = 1_000  # environment steps with uniform actions, before the first update
    buffer_size: int = 1_000_000  # capacity of the replay
    batch_size: int = 256  # B, transitions in a minibatch

    # SAC (arXiv 1812.05905, Table 1)
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak rate of the target critics (1: no lag)
    policy_lr: float = 3e-4  # learning rate of policy and temperature
    q_lr: float = 3e-4  # learning rate of the critics
    alpha: float | None = None  # entropy temperature; not given: tuned to --target-entropy
    target_entropy: float | None = None  # H_target of actions in [-1, 1]; not given: -dim(A)
    policy_frequency: int = 1  # critic updates for each policy update (REDQ, DroQ: 20)

    # networks, REDQ and DroQ
    width: int = 256  # units in a hidden layer
    depth: int = 2  # hidden layers
    num_critics: int = 2  # n, size of the ensemble (REDQ: 10)
    target_subset: int | None = None  # critics drawn for each target's minimum (REDQ: 2)
    actor_q: Literal["min", "mean"] = "min"  # Q that the policy climbs, over critics
    layer_norm: bool = False  # layer norm before each ReLU of the critic, without gain and bias
    dropout: float = 0.0  # rate in the critic and in its target (DroQ: 0.01)


# a resumed run must have these as before: its replay, networks and counters would not fit
FIXED = "env_id seed num_envs utd learning_starts buffer_size alpha width depth num_critics".split()


def check(args: Args):
    """Refuse what no run could use, before anything starts."""
    check_numbers(args, "seed learning_starts eval_frequency checkpoint_frequency alpha", 0, 1e12)
    check_numbers(args, "total_timesteps buffer_size batch_size policy_frequency", 1, 1e12)
    check_numbers(args, "log_frequency num_envs width depth num_critics target_subset", 1, 1e12)
    check_numbers(args, "threads eval_episodes", 0, 1e4)
    check_numbers(args, "utd policy_lr q_lr", 1e-9, 1e3)
    check_numbers(args, "gamma dropout", 0, 0.99999)
    check_numbers(args, "tau", 1e-9, 1)
    check_numbers(args, "target_entropy", -1e6, 1e6)
    if args.target_subset and args.target_subset > args.num_critics:
        fail(f"--target-subset {args.target_subset} of --num-critics {args.num_critics}")
    check_effect(args, "target_entropy", args.alpha is None, "with a fixed --alpha")
    if args.learning_starts >= args.total_timesteps:
        say(f"--learning-starts {args.learning_starts}: uniform actions to the end, no update")
    if args.save_dataset:
        writable("--save-dataset", Path(args.save_dataset).parent)
        if Path(args.save_dataset).exists():
            fail(f"--save-dataset {args.save_dataset} exists already: give another name")
        if importlib.util.find_spec("h5py") is None:
            fail("--save-dataset needs `pip install h5py`")
        if args.buffer_size < args.total_timesteps + args.num_envs:
            fail("--save-dataset writes the whole replay: it needs a larger --buffer-size")


# --------------------------------------------------------------------------------------- networks
class Actor(nn.Module):
    """Tanh-squashed Gaussian policy pi(a|s) on the box [-1, 1]^act."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim] + [args.width] * args.depth
        layers = []
        for fan_in, fan_out in zip(sizes, sizes[1:]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 2 * act_dim))

    def forward(self, obs):
        """Mean and log standard deviation of u, where a = tanh(u); each (B, act)."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(-20, 2)  # the authors' bounds

    def sample(self, obs, generator=None):
        """A reparameterised action for each state, (B, act), and its log pi(a|s), (B,)."""
        mean, log_std = self(obs)
        noise = torch.randn(mean.shape, generator=generator, device=obs.device)
        u = mean + log_std.exp() * noise
        return torch.tanh(u), squashed_log_prob(u, mean, log_std)


def squashed_log_prob(u, mean, log_std):
    """log density of a = tanh(u), u ~ N(mean, std^2): log N(u) - sum log(1 - tanh(u)^2), the last
    term as 2 (log 2 - u - softplus(-2u)), which neither overflows nor cancels for large |u|."""
    z = (u - mean) / log_std.exp()
    log_normal = -0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_jacobian = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return (log_normal - log_jacobian).sum(-1)


class StackedLinear(nn.Module):
    """n independent linear layers as one batched product: (n, B, in) -> (n, B, out)."""

    def __init__(self, n: int, fan_in: int, fan_out: int):
        super().__init__()
        bound = fan_in**-0.5  # nn.Linear's; torch.nn.init would misread a 3-D tensor's fan
        self.weight = nn.Parameter(torch.empty(n, fan_in, fan_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, fan_out).uniform_(-bound, bound))

    def forward(self, x):
        if self.weight.shape[-1] == 1:  # w . x: on a CPU three times as fast as the product
            return (x * self.weight.mT).sum(-1, keepdim=True) + self.bias
        return torch.baddbmm(self.bias, x, self.weight)


class Critic(nn.Module):
    """An ensemble of n Q-functions on the same input."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.n, self.layer_norm, self.dropout = args.num_critics, args.layer_norm, args.dropout
        sizes = [obs_dim + act_dim] + [args.width] * args.depth
        self.layers = nn.ModuleList(
            StackedLinear(self.n, fan_in, fan_out) for fan_in, fan_out in zip(sizes, sizes[1:])
        )
        self.head = StackedLinear(self.n, sizes[-1], 1)

    def hidden(self, obs, act) -> list:
        """Each hidden layer's activations, (n, B, width); the last are the features phi(s,a)."""
        h = torch.cat([obs, act], dim=-1).expand(self.n, -1, -1)
        activations = []
        for layer in self.layers:
            h = F.dropout(layer(h), self.dropout, self.training)
            if self.layer_norm:
                h = F.layer_norm(h, h.shape[-1:])
            h = F.relu(h, inplace=True)
            activations.append(h)
        return activations

    def forward(self, obs, act):
        """Q(s,a) of each critic, (n, B)."""
        return self.head(self.hidden(obs, act)[-1]).squeeze(-1)


# --------------------------------------------------------------------- losses: one function each
class Batch(NamedTuple):
    obs: torch.Tensor  # (B, obs)
    act: torch.Tensor  # (B, act), in [-1, 1]
    rew: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, obs)
    done: torch.Tensor  # (B,), 1 where the episode terminated; a time-out is 0


def backup(learner, batch: Batch, args: Args, generator=None):
    """The target's actions a', (B, act), and y, (B,): the soft Bellman backup of Eq. 5."""
    next_act, next_logp = learner.actor.sample(batch.next_obs, generator)
    q = learner.target(batch.next_obs, next_act)  # (n, B)
    if args.target_subset:  # REDQ: another random subset at each update
        order = torch.rand(len(q), generator=generator, device=q.device).argsort()
        q = q[order[: args.target_subset]]
    value = q.amin(0) - learner.log_alpha.exp() * next_logp  # the minimum over critics
    return next_act, batch.rew + args.gamma * (1 - batch.done) * value


def critic_loss(learner, batch: Batch, args: Args):
    """1/2 (Q_i(s,a) - y)^2, mean over the minibatch, sum over the ensemble (Eq. 5); logged without
    the 1/2."""
    with torch.no_grad():
        _, y = backup(learner, batch, args)
    q = learner.critic(batch.obs, batch.act)
    loss = ((q - y) ** 2).mean(1)  # (n,)
    info = {"qf_loss": loss.mean(), "qf1_loss": loss[0], "qf1_values": q[0].mean()}
    return 0.5 * loss.sum(), {name: x.detach() for name, x in info.items()}


def actor_loss(learner, batch: Batch, args: Args):
    """E[alpha log pi(a|s) - Q(s,a)], Q the ensemble's minimum or mean (Eqs. 7 and 9)."""
    act, logp = learner.actor.sample(batch.obs)
    q = learner.critic(batch.obs, act)
    q = q.amin(0) if args.actor_q == "min" else q.mean(0)
    loss = (learner.log_alpha.exp().detach() * logp - q).mean()
    return loss, {"actor_loss": loss.detach(), "entropy": -logp.mean().detach()}


def temperature_loss(log_alpha, entropy, target_entropy: float):
    """E[-alpha (log pi(a|s) + H_target)] (Eq. 18), entropy = -E[log pi(a|s)], detached. Alpha falls
    while entropy exceeds H_target. (Stable-Baselines3 has log alpha for the factor alpha.)"""
    return log_alpha.exp() * (entropy - target_entropy)


class Learner(nn.Module):
    """All that learns, with its optimisers."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args, device):
        super().__init__()
        self.args, self.device, self.act_dim = args, device, act_dim
        self.actor = Actor(obs_dim, act_dim, args)
        self.critic = Critic(obs_dim, act_dim, args)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        alpha = 1.0 if args.alpha is None else max(args.alpha, 1e-30)  # log 0 is not finite
        self.log_alpha = nn.Parameter(torch.tensor(alpha).log())
        self.target_entropy = -act_dim if args.target_entropy is None else args.target_entropy
        self.to(device)
        compiled = torch.compile if args.compile else lambda fn: fn
        self.critic_loss, self.actor_loss = compiled(critic_loss), compiled(actor_loss)
        flags = {"fused": True, "capturable": device.type == "cuda"}
        self.optim = {
            "critic": torch.optim.Adam(self.critic.parameters(), lr=args.q_lr, **flags),
            "actor": torch.optim.Adam(self.actor.parameters(), lr=args.policy_lr, **flags),
            "alpha": torch.optim.Adam([self.log_alpha], lr=args.policy_lr, **flags),
        }

    @torch.no_grad()
    def act(self, obs, explore: bool):
        """Actions in [-1, 1] for an environment's observations: a sample of pi, or tanh(mean)."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return self.actor.sample(obs)[0] if explore else torch.tanh(self.actor(obs)[0])

    def update(self, batch: Batch, with_policy: bool) -> dict:
        """A critic step; with_policy, a policy and a temperature step; then the targets move."""
        loss, info = self.critic_loss(self, batch, self.args)
        self.minimise("critic", loss)
        if with_policy:
            loss, pi_info = self.actor_loss(self, batch, self.args)
            self.minimise("actor", loss)
            info |= pi_info
            if self.args.alpha is None:
                loss = temperature_loss(self.log_alpha, info["entropy"], self.target_entropy)
                self.minimise("alpha", loss)
        self.polyak(self.critic, self.target)
        return info | {"alpha": self.log_alpha.detach().exp()}

    @torch.no_grad()
    def polyak(self, net, target):
        """target <- target + tau (net - target)."""
        for p, p_target in zip(net.parameters(), target.parameters()):
            p_target.lerp_(p, self.args.tau)

    def minimise(self, name: str, loss):
        optim = self.optim[name]
        optim.zero_grad()
        loss.backward(inputs=optim.param_groups[0]["params"])  # the actor's loss moves no critic
        optim.step()

    def least_q(self, obs, act):
        """min Q(s,a), (B,), over as many critics as in the target: what is reported as Q."""
        return self.critic(obs, act)[: self.args.target_subset].amin(0)

    def entropy_bonus(self):
        """The most that the entropy adds to a reward in Eq. 5: gamma alpha times a uniform
        policy's. It falls with alpha at once, Q slowly: early on Q may pass its bound."""
        return self.args.gamma * self.log_alpha.detach().exp() * self.act_dim * math.log(2)


# --------------------------------------------------------------------------------------- training
def train(args: Args) -> dict:
    """Train as `args` says; returns what summary.json holds."""
    check(args)
    device = set_up(args)
    with Run(args, args.total_timesteps) as run:
        envs = make_envs(args.env_id, args.num_envs, run)
        eval_envs = make_envs(args.env_id, args.eval_episodes, run)
        obs_dim, act_dim = check_boxes(envs, args.env_id)
        capacity = min(args.buffer_size, args.total_timesteps + args.num_envs)
        replay = Replay(capacity, obs_dim, act_dim, device)
        learner = Learner(obs_dim, act_dim, args, device)
        obs, _ = envs.reset(seed=env_seeds(args.seed, args.num_envs))
        step, updates, last_return = 0, 0, math.nan
        info, returns = {}, np.zeros(0)
        if run.saved:
            step, updates, last_return = (run.saved[k] for k in ("step", "updates", "last_return"))
            info, returns = run.saved["losses"], np.array(run.saved["returns"])
            run.restore(learner, learner.optim)
            obs = replay.load_state_dict(run.saved["replay"], envs)
        run.open()

        def save():
            numbers = {"updates": updates, "last_return": last_return, "returns": returns.tolist()}
            losses = {name: float(x) for name, x in info.items()}
            replayed = replay.state_dict(envs)
            run.save(step, learner, learner.optim, replay=replayed, losses=losses, **numbers)

        def update(with_policy: bool) -> dict:
            return learner.update(replay.sample(args.batch_size), with_policy)

        if args.cudagraphs and device.type == "cuda":
            update = GraphedUpdate(update)
        while step < args.total_timesteps and not run.signum:
            act = learner.act(obs, explore=True)
            if step < args.learning_starts:
                act = torch.rand_like(act) * 2 - 1
            next_obs, rew, terminated, truncated, infos = envs.step(to_env(act, envs))
            over, last_obs = terminated | truncated, next_obs.copy()
            if over.any():  # there next_obs is the next episode's first
                last_obs[over] = np.stack(infos["final_obs"][over])
            replay.add(obs, act.cpu().numpy(), rew, last_obs, terminated, truncated)
            obs, before, step = next_obs, step, step + args.num_envs
            while updates < int(args.utd * (step - args.learning_starts) + 1e-9):  # 1e-9: rounding
                updates += 1
                info |= update(updates % args.policy_frequency == 0)

            if over.any():
                last_return = float(infos["final_info"]["return"][over].mean())
                length = infos["final_info"]["length"][over].mean()
                run.log(step, {"charts/episodic_return": last_return})
                run.log(step, {"charts/episodic_length": length})
            if every(args.log_frequency, before, step):
                run.log(step, {"losses/" + name: x for name, x in info.items()})
                run.log(step, {"charts/SPS": run.rate(step), "charts/updates": updates})
                run.show(step, Q=info.get("qf1_values", math.nan), last_return=last_return)
            if every(args.eval_frequency, before, step) or step >= args.total_timesteps:
                with run.paused():
                    returns, numbers = evaluate(learner, eval_envs, args)
                    numbers |= diagnose(learner, replay, args)
                run.log(step, {"diagnostics/" + name: x for name, x in numbers.items()})
                if eval_envs:
                    run.log(step, {"eval/episodic_return": returns.mean()})
            if every(args.checkpoint_frequency, before, step):
                save()
        save()
        run.stop_if_asked()
        if args.save_dataset:
            replay.write(Path(args.save_dataset), envs)
        summary = {"global_step": step, "updates": updates, "steps_per_second": run.rate(step)}
        if len(returns):
            say(f"last evaluation: {returns.mean():.1f} +- {returns.std():.1f}")
            summary |= {"final_return_mean": returns.mean(), "final_return_std": returns.std()}
        return run.finish(summary)


@torch.no_grad()
def evaluate(learner, envs, args) -> tuple[np.ndarray, dict]:
    """One episode in each of `envs` without exploration: its returns (n,); the mean of predicted
    Q(s0, a0), and its excess over the discounted return that followed. Draws no random number."""
    if envs is None:
        return np.zeros(0), {}
    learner.eval()
    s0, rewards, _ = play(learner, envs, args.seed)
    s0 = torch.as_tensor(s0, dtype=torch.float32, device=learner.device)
    predicted = learner.least_q(s0, learner.act(s0, explore=False)).cpu().numpy()
    learner.train()
    discounted = (args.gamma ** np.arange(len(rewards))) @ rewards
    numbers = {"v_s0": predicted.mean(), "overestimation": (predicted - discounted).mean()}
    return rewards.sum(0), numbers


@torch.no_grad()
def diagnose(learner, replay, args) -> dict:
    """Q-values, TD error and features on at most 2,048 transitions of the replay, in eval mode.

    A fresh generator each time. Every Q is learner.least_q(obs, act); the TD error is in units of
    the variance of y; features are those of the first critic."""
    size, device = int(replay.size), replay.device
    draw = torch.Generator(device).manual_seed(0)
    batch = replay.batch(torch.randperm(size, generator=draw, device=device)[:2048])
    uniform = torch.rand(batch.act.shape, generator=draw, device=device) * 2 - 1
    learner.eval()
    next_act, y = backup(learner, batch, args, draw)
    q_data = learner.least_q(batch.obs, batch.act)
    q_pi = learner.least_q(batch.obs, learner.act(batch.obs, explore=False))
    q_rand = learner.least_q(batch.obs, uniform)
    squared_error = (learner.critic(batch.obs, batch.act) - y).pow(2).mean()
    hidden = [h[0] for h in learner.critic.hidden(batch.obs, batch.act)]
    phi_next = learner.critic.hidden(batch.next_obs, next_act)[-1][0]
    learner.train()
    q_bound = (replay.columns["rew"][:size].max() + learner.entropy_bonus()) / (1 - args.gamma)
    if q_bound < 0 and replay.columns["done"][:size].any():
        q_bound = q_bound * (1 - args.gamma)  # where every reward costs, ending at once is best
    numbers = {
        "q_data": q_data.mean(),
        "q_pi": q_pi.mean(),
        "q_rand": q_rand.mean(),
        "q_max": torch.stack([q_data, q_pi, q_rand]).max(),
        "q_bound": q_bound,
        "td_error": squared_error / y.var(correction=0).clamp(min=1e-12),
        "dormant": dormant(hidden),
    }
    return numbers | spectrum(hidden[-1]) | alignment(hidden[-1], phi_next, 1 - batch.done)


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
