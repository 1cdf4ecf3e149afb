r"""Proximal policy optimisation (PPO): clipped policy gradients for vectors and Atari frames.

Schulman, Wolski, Dhariwal, Radford, Klimov, "Proximal Policy Optimization Algorithms", arXiv 1707.06347. Each
batch of experience serves several epochs of minibatch steps. The clipped ratio keeps the new policy near the
one that played; generalised advantage estimation (arXiv 1506.02438) says which actions were good:

  L    = E[ min( w A, clip(w, 1 - eps, 1 + eps) A ) ],   w = pi(a|s) / pi_old(a|s)            (Eq. 7)
  A_t  = sum_k (gamma lambda)^k delta_{t+k},   delta_t = r_t + gamma V(s_{t+1}) - V(s_t)      (Eqs. 11, 12)
       = (1 - lambda) sum_n lambda^(n-1) (the advantage by n-step returns)
  loss = -L + c_v (V(s) - V_target)^2 / 2 - c_e H(pi(.|s)),   V_target = A + V    (Eq. 9, c_1 = c_v / 2)

The sum stops where the episode ends, and V(s_{t+1}) is 0 after a termination, not after a time-out.
With --clip-vloss, the default, V(s) is moreover held to V_old(s) +- eps; the larger of the two errors counts.
lambda trades bias for variance: 0 trusts the critic after one step, 1 trusts the sampled return alone.

  symbol       in the code                    shape
  s_t          obs                            (T + 1, N, ...), T steps of N environments
  a_t, r_t     act, rew                       (T, N, ...), (T, N)
  V(s)         value                          (T + 1, N)
  A, V_target  advantage, target              (T, N)
  w, eps       ratio, --clip-coef             (B,), scalar
  lambda       --gae-lambda                   scalar
  c_v, c_e     --vf-coef, --ent-coef          scalars

The details that matter (Huang et al., "The 37 implementation details of PPO", 2022) are marked where they
happen: [1] to [13] in all environments ([13] not for frames), [C1] to [C9] for continuous actions, [A1] to
[A9] for Atari.

Where to read: networks, ppo_loss, Learner.update and gae (in the block `rollouts`) are the algorithm;
Player.collect makes a rollout; train() is the loop. The other blocks marked `shared`, which sibling scripts
have too, can wait.

CartPole, then the same faster:
  python ppo.py
  python ppo.py --total-timesteps 100_000 --num-envs 8 --num-steps 32 --num-minibatches 1 \
      --update-epochs 20 --learning-rate 1e-3 --gamma 0.98 --gae-lambda 0.8 --ent-coef 0

Acrobot, Pendulum, MuJoCo, Atari:
  python ppo.py --env Acrobot-v1 --num-envs 16 --num-steps 256 --gae-lambda 0.94 --ent-coef 0 \
      --normalize-obs --normalize-reward
  python ppo.py --env Pendulum-v1 --total-timesteps 200_000 --num-steps 256 --update-epochs 10 \
      --num-minibatches 16 --learning-rate 1e-3 --gamma 0.9 --ent-coef 0 --no-clip-vloss \
      --recompute-advantages
  python ppo.py --env HalfCheetah-v5 --total-timesteps 1_000_000 --num-envs 8 --num-steps 256 \
      --num-minibatches 32 --update-epochs 10 --learning-rate 3e-4 --ent-coef 0 --no-clip-vloss \
      --norm-adv none --recompute-advantages --log-std-init -0.5 --normalize-obs --normalize-reward
  python ppo.py --env ALE/Pong-v5 --total-timesteps 10_000_000 --num-envs 8 --clip-coef 0.1

MuJoCo's settings are those of Tianshou's benchmark. CleanRL's (1 x 2,048 steps, value clipping, standardised
minibatches, one estimate of advantages, deviation 1) end at 1,600 on HalfCheetah where these end at 4,400.

While it trains, `charts/episodic_return` should rise; `losses/explained_variance` approach 1;
`losses/approx_kl` stay near 0.01 and `losses/clipfrac` near 0.1 (much more: a smaller --learning-rate);
both are means over all minibatches of the update (CleanRL logs the last).
Resume is bitwise on Gymnasium's classic control and MuJoCo environments; elsewhere new episodes start.

Known limits: flat observation vectors or Atari frames, Box or Discrete actions. Left out on purpose:
recurrent policies, action masks, several GPUs.
"""

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
    """seeds networks, actions, minibatches and environments"""
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
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "CartPole-v1"
    """Gymnasium environment; ALE/... runs in ale_py's native vector environment"""
    run_dir: str = "runs"
    """folder that holds the run folders"""
    resume: str | None = None
    """run folder or checkpoint to go on from; `auto`: the newest one with these arguments, if any"""
    checkpoint_frequency: int = 100_000
    """environment steps between checkpoints (0: only at the end)"""
    eval_frequency: int = 50_000
    """environment steps between evaluations (0: only at the end)"""
    eval_episodes: int = 10
    """episodes of each evaluation (0: no evaluation)"""
    log_frequency: int = 5_000
    """environment steps between logged losses"""
    diagnostics_frequency: int = 50_000
    """environment steps between feature diagnostics (0: none)"""
    compile: bool = False
    """run the loss through torch.compile"""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """bf16: the encoder of Atari frames, in rollouts and losses; tf32: matrix products on a GPU"""

    # --- length and data
    total_timesteps: int = 500_000
    """environment steps"""
    num_envs: int = 4
    """N, environments stepped together"""
    num_steps: int = 128
    """T, steps of each environment between updates"""
    normalize_obs: bool = False
    """running standardisation of observations (MuJoCo: on)"""
    normalize_reward: bool = False
    """rewards divided by the running deviation of their discounted sum so far (MuJoCo: on)"""
    sticky: float = 0.25
    """Atari: probability that the game repeats the last action"""

    # --- PPO
    learning_rate: float = 2.5e-4
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to 0 at --total-timesteps"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the advantage estimate"""
    num_minibatches: int = 4
    """minibatches an epoch"""
    update_epochs: int = 4
    """epochs on each batch"""
    norm_adv: Literal["minibatch", "batch", "none"] = "minibatch"
    """what advantages are standardised over"""
    recompute_advantages: bool = False
    """estimate the advantages anew, with the critic of the moment, before each epoch"""
    clip_coef: float = 0.2
    """eps: the ratio is clipped to 1 - eps .. 1 + eps"""
    clip_vloss: bool = True
    """hold V to V_old +- eps as well, eps in units of return: off where returns are large and unscaled"""
    ent_coef: float = 0.01
    """c_e, weight of the entropy"""
    entropy: Literal["bonus", "return"] = "bonus"
    """bonus: c_e H in the loss; return: -c_e log pi(a|s) in each reward, the critic predicts it too"""
    vf_coef: float = 0.5
    """c_v, on the squared error with its 1/2"""
    max_grad_norm: float = 0.5
    """bound of the gradient's norm"""
    target_kl: float | None = None
    """stop the epochs on a batch when the policy has moved further than this; not given: never"""
    bootstrap_truncation: bool = True
    """value the state at which a time limit cut the episode; off: treat it as an end, as older code does"""

    # --- networks (vectors; Atari has the Nature network)
    width: int = 64
    """units in a hidden layer"""
    depth: int = 2
    """hidden layers"""
    activation: Literal["tanh", "relu"] = "tanh"
    """activation of the hidden layers"""
    orthogonal: bool = True
    """orthogonal initialisation"""
    log_std_init: float = 0.0
    """log standard deviation of a continuous policy at the start"""


LIMITS = {"gamma": (0, 0.99999), "gae_lambda": (0, 1), "sticky": (0, 1), "depth": (1, 64)}  # least, most
LIMITS |= {"log_std_init": (-20, 20), "clip_coef": (1e-9, 1e9), "seed": (0, 1e6)}
LIMITS |= dict.fromkeys(["learning_rate", "max_grad_norm"], (1e-12, 1e12))
LIMITS |= dict.fromkeys(["num_envs", "num_minibatches", "update_epochs", "width"], (1, 1e6))
LIMITS["num_steps"] = (4, 1e6)  # two valid rows even where every second one is a reset
LIMITS |= dict.fromkeys(["total_timesteps", "log_frequency"], (1, 1e12))


def check(args: Args):
    """Refuse values and combinations that make no sense or would be ignored, before anything starts."""
    check_limits(args, LIMITS)
    atari = args.env_id.startswith("ALE/")
    only_if(args, atari, "outside Atari", "sticky")
    only_if(args, not atari, "on Atari, which has the Nature network", "width", "depth", "activation")
    only_if(args, not atari, "on Atari, whose frames are scaled by 255", "normalize_obs")
    only_if(args, not atari, "on Atari, whose rewards are clipped", "normalize_reward")
    only_if(args, not atari, "on Atari", "capture_video")
    only_if(args, args.ent_coef > 0, "with --ent-coef 0", "entropy")
    only_if(args, args.update_epochs > 1, "with --update-epochs 1", "recompute_advantages", "target_kl")
    only_if(args, args.eval_episodes > 0, "with --eval-episodes 0", "capture_video")
    only_if(args, args.track, "without --track", "wandb_project_name", "wandb_entity")
    if args.precision == "bf16" and not atari:
        fail("--precision bf16 has no effect outside Atari")
    if atari and not re.fullmatch(r"ALE/\w+-v5", args.env_id):
        fail(f"--env-id {args.env_id}: expected ALE/ and a game's name and -v5, the one version here")
    if (rows := args.num_envs * args.num_steps) < 2 * args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches}: expected two rows in each, a batch has {rows}")


# ------------------------------------------------------------------------------------------- networks
def layer(fan_in: int, fan_out: int, gain: float, args: Args, kind=nn.Linear, **shape) -> nn.Module:
    """[2] Orthogonal weights, zero bias."""
    m = kind(fan_in, fan_out, **shape)
    if args.orthogonal:
        nn.init.orthogonal_(m.weight, gain)
        nn.init.zeros_(m.bias)
    return m


def mlp(fan_in: int, fan_out: int, gain: float, args: Args) -> nn.Sequential:
    """Hidden layers of --width; the last gain is small for a policy, so that it starts near uniform."""
    sizes, act = [fan_in] + [args.width] * args.depth, {"tanh": nn.Tanh, "relu": nn.ReLU}[args.activation]
    hidden = [m for i, o in zip(sizes, sizes[1:]) for m in (layer(i, o, 2**0.5, args), act())]
    return nn.Sequential(*hidden, layer(sizes[-1], fan_out, gain, args))


class Agent(nn.Module):
    """Policy and value. `head` is what the policy's last layer says: logits (B, actions) of a categorical, or
    the mean (B, d) of a Gaussian [C1] of independent dimensions [C3] whose log_std is a parameter [C2]."""

    def __init__(self, obs_space, act_space, args: Args):
        super().__init__()
        self.discrete, self.image = isinstance(act_space, gym.spaces.Discrete), len(obs_space.shape) == 3
        self.bf16 = args.precision == "bf16"
        outputs = int(act_space.n) if self.discrete else act_space.shape[0]
        if self.image:  # [A8] the Nature network, shared by policy and value
            convs = [(4, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)]
            parts = [
                (layer(i, o, 2**0.5, args, nn.Conv2d, kernel_size=k, stride=s), nn.ReLU())
                for i, o, k, s in convs
            ]
            dense = (nn.Flatten(), layer(64 * 7 * 7, 512, 2**0.5, args), nn.ReLU())
            self.encoder = nn.Sequential(*(m for part in parts for m in part), *dense)
            self.actor, self.critic = layer(512, outputs, 0.01, args), layer(512, 1, 1.0, args)
            self.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        else:  # [13] [C4] separate networks
            self.actor = mlp(obs_space.shape[0], outputs, 0.01, args)
            self.critic = mlp(obs_space.shape[0], 1, 1.0, args)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((outputs,), args.log_std_init))

    def encode(self, obs):
        """What policy and value read: frames through the shared network, vectors as they are; (B, D)."""
        if not self.image:
            return obs
        x = obs.contiguous(memory_format=torch.channels_last).float().div_(255)  # [A9] to [0, 1]
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16 and self.training):
            return self.encoder(x).float()

    def forward(self, obs):
        """head (B, outputs) and V(s) (B,)."""
        x = self.encode(obs)
        return self.actor(x), self.critic(x)[:, 0]

    def policy(self, obs):
        """head alone, for a step of the environments."""
        return self.actor(self.encode(obs))

    def features(self, obs):
        """What the last linear layers of policy and value read, each (B, D), for the diagnostics."""
        if self.image:
            phi = self.encode(obs)
            return phi, phi
        return self.actor[:-1](obs), self.critic[:-1](obs)

    def sample(self, head):
        if self.discrete:
            return torch.distributions.Categorical(logits=head, validate_args=False).sample()
        return head + self.log_std.exp() * torch.randn_like(head)

    def mode(self, head):
        return head.argmax(-1) if self.discrete else head

    def log_prob(self, head, act):
        """log pi(a|s), (B,)."""
        if self.discrete:
            return F.log_softmax(head, -1).gather(-1, act[:, None])[:, 0]
        z = (act - head) / self.log_std.exp()
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, head):
        """H(pi(.|s)), (B,)."""
        if self.discrete:
            logp = F.log_softmax(head, -1)
            return -(logp.exp() * logp).sum(-1)
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(head))


# --------------------------------------------------------------------------- the loss and the update
class Batch(NamedTuple):
    obs: torch.Tensor  # (B, ...), standardised or frames
    act: torch.Tensor  # (B,) or (B, d)
    logp: torch.Tensor  # (B,), log pi_old(a|s)
    value: torch.Tensor  # (B,), V_old(s)
    advantage: torch.Tensor  # (B,)
    target: torch.Tensor  # (B,)


def ppo_loss(agent: Agent, batch: Batch, args: Args):
    """-L + c_v (V - target)^2 / 2 - c_e H (Eqs. 7 and 9), and what to watch [12]."""
    head, value = agent(batch.obs)
    advantage = batch.advantage
    if args.norm_adv == "minibatch":  # [7] standardised advantages
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    log_ratio = agent.log_prob(head, batch.act) - batch.logp
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()  # [8] clipped surrogate
    error = (value - batch.target) ** 2
    if args.clip_vloss:  # [9] clipped value
        near = batch.value + (value - batch.value).clamp(-args.clip_coef, args.clip_coef)
        error = torch.max(error, (near - batch.target) ** 2)
    value_loss, entropy = 0.5 * error.mean(), agent.entropy(head).mean()
    bonus = args.ent_coef if args.entropy == "bonus" else 0.0
    loss = policy_loss + args.vf_coef * value_loss - bonus * entropy  # [10] entropy bonus
    with torch.no_grad():  # two estimates of KL(pi_old || pi), unbiased on fresh rows, one never below 0
        info = {"old_approx_kl": -log_ratio.mean(), "approx_kl": (ratio - 1 - log_ratio).mean()}
        info["clipfrac"] = ((ratio - 1).abs() > args.clip_coef).float().mean()
    terms = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    return loss, info | {k: v.detach() for k, v in terms.items()}


class Learner(nn.Module):
    """Agent, normalisers and optimiser."""

    def __init__(self, obs_space, act_space, args: Args, device):
        super().__init__()
        self.args, self.device = args, device
        self.agent = Agent(obs_space, act_space, args)
        self.obs_stats = Moments(obs_space.shape) if args.normalize_obs else None
        self.return_stats = Moments(()) if args.normalize_reward else None
        self.to(device)
        self.loss = torch.compile(ppo_loss) if args.compile else ppo_loss
        # [3] Adam's epsilon: 1e-5
        self.optim = torch.optim.Adam(self.agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    def standardised(self, obs):
        """Observations of an environment (numpy) as the networks see them, on the device:
        standardised [C6] and clipped [C7]."""
        obs = torch.as_tensor(obs, device=self.device)
        if obs.ndim == 4:  # frames
            return obs
        obs = obs.float()
        return self.obs_stats.standardise(obs).clamp(-10, 10) if self.args.normalize_obs else obs

    def update(self, rollout) -> dict:
        """--update-epochs passes over the rollout's valid rows in shuffled minibatches [6]; mean losses.
        train() moves the learning rate and, afterwards, the observations' normaliser."""
        args, infos, batch = self.args, [], self.batch_of(rollout)
        unexplained = (batch.target - batch.value).var() / batch.target.var().clamp(min=1e-8)
        for epoch in range(args.update_epochs):
            if epoch and args.recompute_advantages:
                batch = self.batch_of(rollout)
            n = len(batch.logp)
            parts = max(1, min(args.num_minibatches, n // 2))  # one row has no standard deviation
            order = torch.randperm(n, device=self.device)
            columns = (x[order].tensor_split(parts) for x in batch)  # one gather an epoch, then views
            for minibatch in zip(*columns):
                loss, info = self.loss(self.agent, Batch(*minibatch), args)
                self.optim.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.agent.parameters(), args.max_grad_norm, foreach=True)  # [11]
                self.optim.step()
                infos.append(info)
            kl = torch.stack([i["approx_kl"] for i in infos[-parts:]]).mean()
            if args.target_kl is not None and kl > args.target_kl:
                break
        out = {k: torch.stack([i[k] for i in infos]).mean() for k in infos[0]}
        epochs = torch.tensor(epoch + 1.0, device=self.device)
        return out | {"explained_variance": 1 - unexplained, "epochs": epochs}

    @torch.no_grad()
    def batch_of(self, rollout) -> Batch:
        """Advantages and the flat batch of valid rows: rows of a reset are left out."""
        args, value = self.args, rollout.value
        if args.recompute_advantages:  # a critic's pass over (T + 1) x N rows
            value = in_chunks(self.agent, rollout.obs)[1]
        end = rollout.terminated if args.bootstrap_truncation else rollout.over
        rew = rollout.rew
        if args.entropy == "return":
            rew = rew - args.ent_coef * rollout.logp
        arrays = [x.cpu().numpy() for x in (rew, value, end, rollout.over)]
        advantage = torch.from_numpy(gae(*arrays, args.gamma, args.gae_lambda)).to(value)
        target = advantage + value[:-1]
        rows = rollout.valid.flatten().nonzero()[:, 0]
        columns = (rollout.obs[:-1], rollout.act, rollout.logp, rollout.value[:-1], advantage, target)
        batch = Batch(*(x.flatten(0, 1)[rows] for x in columns))
        if args.norm_adv == "batch":
            spread = batch.advantage.std() + 1e-8
            batch = batch._replace(advantage=(batch.advantage - batch.advantage.mean()) / spread)
        return batch

    def checkpoint(self) -> dict:
        return {"networks": self.state_dict(), "optim": self.optim.state_dict()}

    def restore(self, saved: dict):
        self.load_state_dict(saved["networks"])
        load_optimizer(self.optim, saved["optim"])


# ---------------------------------------------------------------------------------------- environments
def atari(args: Args, n: int, training: bool):
    """ale_py's vector environment: noops [A1], frames skipped and max-pooled [A2], fire on reset [A4],
    84 x 84 gray [A5], four frames stacked [A7]. Lives are reported here, and rewards are true: the rollout
    ends learning's episodes with a life and clips. Fire is pressed after a real reset only. After a lost
    life the policy must press it itself; if it never does, the episode runs to the usual cap of 108,000
    frames, in evaluations too."""
    need("ale_py")
    game = re.sub(r"(?<!^)(?=[A-Z])", "_", args.env_id.removeprefix("ALE/").split("-")[0]).lower()
    try:
        vector = importlib.import_module("ale_py.vector_env").AtariVectorEnv
        options = {"reward_clipping": False, "repeat_action_probability": args.sticky}
        return vector(game, n, life_loss_info=training, **options)  # episodic_life would restart the game
    except Exception as e:
        fail(f"--env-id {args.env_id}: {type(e).__name__}: {first_line(e)}")


def make_train_envs(args: Args):
    game = args.env_id.startswith("ALE/")
    envs = atari(args, args.num_envs, True) if game else make_envs(args.env_id, args.num_envs)
    act, obs = envs.single_action_space, envs.single_observation_space
    frames = game and obs.dtype == np.uint8 and obs.shape == (4, 84, 84)
    if not isinstance(obs, gym.spaces.Box) or not (len(obs.shape) == 1 or frames):
        fail(f"--env-id {args.env_id}: observations are {obs}, expected a Box of one dimension, or ALE/...")
    discrete, box = (isinstance(act, kind) for kind in (gym.spaces.Discrete, gym.spaces.Box))
    if not discrete and not (box and len(act.shape) == 1):
        fail(f"--env-id {args.env_id}: actions are {act}, expected Discrete or a Box of one dimension")
    only_if(args, not discrete, "with discrete actions", "log_std_init")
    return envs


def make_eval_envs(args: Args):
    n = args.eval_episodes
    return atari(args, n, False) if args.env_id.startswith("ALE/") else make_envs(args.env_id, n)


def reserve_rollout(envs, args: Args, device):
    """Says what a rollout takes: observations three times (its stack, the valid rows, the same shuffled);
    the rest is small."""
    shape = envs.single_observation_space.shape
    row = math.prod(shape) * (1 if len(shape) == 3 else 4)  # frames stay bytes
    reserve(3 * args.num_envs * (args.num_steps + 1) * (row + 64), "rollout, roughly", device)


# ------------------------------------------------------------------------------------------- training
def train(args: Args) -> dict:
    """Train as `args` says; returns what summary.json holds."""
    check(args)
    device, saved = set_up(args), find_checkpoint(args)
    if saved and (past := finished(saved, "global_step", args.total_timesteps)):
        return past
    if saved and args.anneal_lr and saved["args"]["total_timesteps"] != args.total_timesteps:
        print(f"--anneal-lr: the learning rate now falls to 0 at step {args.total_timesteps:,}")
    envs = make_train_envs(args)
    eval_envs = make_eval_envs(args) if args.eval_episodes else None
    learner = Learner(envs.single_observation_space, envs.single_action_space, args, device)
    reserve_rollout(envs, args, device)
    player = Player(envs, args.seed)
    step, episodes, returns, info = 0, [], np.full(1, math.nan), {}
    if saved:
        step, episodes, returns = saved["step"], saved["episodes"], np.array(saved["returns"])
        learner.restore(saved["learner"])
        player.restore(saved["player"], args.seed + step)
        restore_random_state(saved["random"])
    video = Video(args.env_id) if args.capture_video else None
    run = Run(args, {}, saved)
    greedy = lambda obs: acting(learner, obs[None], envs.single_action_space)[0]

    def save():
        check_finite(step, info | dict(learner.named_parameters()))
        state = {"learner": learner.checkpoint(), "player": player.checkpoint(), "random": random_state()}
        state |= {"step": step, "episodes": episodes, "returns": returns.tolist()}
        run.save("checkpoint.pt", state)

    progress = Progress("training", args.total_timesteps, step)
    with StopSignal() as stop:
        while step < args.total_timesteps and not stop.signum:
            if args.anneal_lr:  # [4] the learning rate falls to 0
                learner.optim.param_groups[0]["lr"] = args.learning_rate * (1 - step / args.total_timesteps)
            rollout, ended = player.collect(learner, args)  # [1] vectorised: N environments, T steps
            info = learner.update(rollout)
            before, step = step, step + int(rollout.valid.sum())
            check_finite(step, info | dict(learner.named_parameters()))  # before NaN is sampled from
            if args.normalize_obs:
                learner.obs_stats.update(rollout.raw_obs)

            every = lambda n: n > 0 and step // n > before // n  # noqa: B023
            diagnosing, logging = every(args.diagnostics_frequency), every(args.log_frequency)
            scoring = eval_envs and (every(args.eval_frequency) or step >= args.total_timesteps)
            episodes = [*episodes, *ended][-100:]
            if ended:
                score, length = np.mean(ended, axis=0)  # of the episodes that ended in this rollout
                run.scalars({"charts/episodic_return": score, "charts/episodic_length": length}, step)
            if logging:
                lr = learner.optim.param_groups[0]["lr"]
                run.scalars({"losses/" + k: v for k, v in info.items()}, step)
                run.scalars({"charts/SPS": progress.rate(step), "charts/learning_rate": lr}, step)
            with progress.paused(diagnosing or scoring):
                if diagnosing:
                    moment = diagnose(learner, rollout)
                    run.scalars({"diagnostics/" + k: v for k, v in moment.items()}, step)
                if scoring:
                    returns = evaluate(learner, eval_envs, args)
                    run.scalars({"eval/episodic_return": returns.mean()}, step)
                    if video:
                        video.record(greedy, run.dir / "videos", 1_000_000 + 1_000 * args.seed, step)
            if every(args.checkpoint_frequency) and step < args.total_timesteps:
                save()
            recent = {"return": np.mean([r for r, _ in episodes[-20:]] or [math.nan]), "eval": returns.mean()}
            progress.show(min(step, args.total_timesteps), recent | {"KL": info["approx_kl"]})
        save()
        if stop.signum:
            run.stopped(stop.signum)
    summary = {"global_step": step, "steps_per_second": progress.rate(step)}
    summary["eval_episodes"] = args.eval_episodes
    summary["train_return_mean"] = float(np.mean([r for r, _ in episodes])) if episodes else None
    if eval_envs:
        summary |= {"final_return_mean": float(returns.mean()), "final_return_std": float(returns.std())}
        print(f"last evaluation: {returns.mean():.1f} +- {returns.std():.1f}, {len(returns)} episodes")
    return run.finish(summary)


# === shared: rollouts (canonical copy: ppo.py) ===
class Moments(nn.Module):
    """Running mean and variance, merged batch by batch (Chan et al.), in float64; part of the checkpoint."""

    def __init__(self, shape: tuple):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x):
        """x: (rows, *shape); no rows change nothing."""
        if len(x) == 0:
            return
        x, n = x.to(self.mean), len(x)
        gap, total = x.mean(0) - self.mean, self.count + n
        m2 = self.var * self.count + x.var(0, unbiased=False) * n + gap**2 * self.count * n / total
        self.mean += gap * n / total
        self.var.copy_(m2 / total)
        self.count += n

    def standardise(self, x):
        return (x - self.mean.float()) / (self.var.float() + 1e-8).sqrt()


class Rollout(NamedTuple):
    """T steps of N environments. The row after an episode's end is gymnasium's NEXT_STEP reset, not `valid`:

    t      obs[t]               over[t]  valid[t]
    k      s                    1        1
    k + 1  the true last one    0        0         its action is ignored, its reward 0
    k + 2  a new episode's s_0  0        1
    """

    obs: torch.Tensor  # (T + 1, N, ...), standardised or frames
    act: torch.Tensor  # (T, N) or (T, N, d)
    logp: torch.Tensor  # (T, N)
    value: torch.Tensor  # (T + 1, N)
    rew: torch.Tensor  # (T, N), scaled or clipped as the training sees it
    terminated: torch.Tensor  # (T, N)
    over: torch.Tensor  # (T, N), terminated (in Atari also by a lost life, without a reset) or truncated
    valid: torch.Tensor  # (T, N)
    raw_obs: torch.Tensor | None  # (valid rows, obs), for the normaliser


def gae(rew, value, end, over, gamma: float, lam: float):
    """A_t = delta_t + gamma lambda A_{t+1} within an episode [5]; rew, end, over (T, N), value (T + 1, N).

    `end` cuts the bootstrap (termination), `over` the sum (any end of an episode). After a truncation
    value[t + 1] is the value of the true last observation. What stands in a reset's row goes nowhere: the
    `over` of the row before keeps it out. (Where environments reset at once there is no such row, and
    value[t + 1] is a new episode's: add gamma V(last observation) to a truncated row's rew, end = over.)"""
    delta = rew + gamma * value[1:] * (1 - end) - value[:-1]
    advantage, last = np.zeros_like(delta), 0.0
    for t in reversed(range(len(delta))):
        last = delta[t] + gamma * lam * (1 - over[t]) * last
        advantage[t] = last
    return advantage


def in_chunks(agent, obs) -> tuple:
    """head and V(s) of all rows of obs (T, N, ...), 1,024 at a time: (T, N, outputs) and (T, N)."""
    pairs = [agent(x) for x in obs.flatten(0, 1).split(1024)]
    return tuple(torch.cat(x).unflatten(0, obs.shape[:2]) for x in zip(*pairs))


class Player:
    """Steps the environments, T at a time."""

    def __init__(self, envs, seed: int):
        if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
            fail(f"autoreset of {envs}: expected NEXT_STEP, whose rows are counted here")
        self.envs, self.n = envs, envs.num_envs
        self.obs, _ = envs.reset(seed=seed)
        self.over = np.zeros(self.n, bool)  # where the next row is a reset
        self.returns, self.lengths = np.zeros(self.n), np.zeros(self.n, int)
        self.discounted = np.zeros(self.n)

    @torch.no_grad()
    def collect(self, learner, args: Args) -> tuple[Rollout, list]:
        """A rollout, and (return, length) of the episodes that ended in it. The observations' normaliser
        stands still meanwhile, so that the policy that played is the policy that is updated; the scale of
        the rewards takes the rollout in first."""
        T, N, device, space = args.num_steps, self.n, learner.device, self.envs.single_action_space
        rew, terminated, over = (np.zeros((T, N), np.float32) for _ in range(3))
        valid = np.zeros((T, N), bool)
        observations, actions, raw, ended = [], [], [], []
        for t in range(T):
            must_be_finite(self.obs, "an observation", args)  # before NaN is sampled from
            observations.append(learner.standardised(self.obs))
            actions.append(learner.agent.sample(learner.agent.policy(observations[t])))
            valid[t] = ~self.over
            if args.normalize_obs:
                raw.append(torch.as_tensor(self.obs)[torch.from_numpy(~self.over)])
            self.obs, rew[t], ended_here, cut, infos = self.envs.step(clip_to_env(actions[t], space))
            terminated[t], over[t] = ended_here, ended_here | cut
            lives = infos["lives"] if self.obs.ndim == 4 else 0
            self.over = cut | ended_here & (lives == 0)  # [A3] a lost life is not the game's end
            self.returns, self.lengths = self.returns + rew[t], self.lengths + valid[t]
            for i in np.flatnonzero(self.over):
                ended.append((float(self.returns[i]), int(self.lengths[i])))
                self.returns[i], self.lengths[i] = 0.0, 0
        must_be_finite(self.obs, "an observation", args)
        must_be_finite(rew, "a reward", args)
        obs, act = torch.stack([*observations, learner.standardised(self.obs)]), torch.stack(actions)
        head, value = in_chunks(learner.agent, obs)  # once a rollout is cheaper than once a step
        logp = learner.agent.log_prob(head[:-1].flatten(0, 1), act.flatten(0, 1)).view(T, N)
        if self.obs.ndim == 4:  # frames
            rew = np.sign(rew)  # [A6] clipped rewards
        elif args.normalize_reward:
            rew = self.scaled(rew, over, valid, learner, args)
        rew, terminated, over, valid = (
            torch.from_numpy(x).to(device) for x in (rew, terminated, over, valid)
        )
        raw = torch.cat(raw) if raw else None
        return Rollout(obs, act, logp, value, rew, terminated, over, valid, raw), ended

    def scaled(self, rew, over, valid, learner, args: Args):
        """Rewards over the running deviation of their discounted sum so far, then clipped: [C8] [C9]."""
        sums = np.zeros_like(rew, dtype=np.float64)
        for t in range(len(rew)):
            sums[t] = self.discounted = self.discounted * args.gamma + rew[t]
            self.discounted = self.discounted * (1 - over[t])
        learner.return_stats.update(torch.from_numpy(sums[valid]))
        return np.clip(rew / float((learner.return_stats.var + 1e-8).sqrt()), -10, 10).astype(np.float32)

    def checkpoint(self) -> dict:
        names = ("obs", "over", "returns", "lengths", "discounted")
        return {k: torch.from_numpy(getattr(self, k).copy()) for k in names} | {"envs": env_states(self.envs)}

    def restore(self, saved: dict, seed: int):
        if saved["envs"] is None:
            print("these environments cannot be restored exactly: new episodes start")
            self.obs, _ = self.envs.reset(seed=seed)
            return
        for k in ("obs", "over", "returns", "lengths", "discounted"):
            setattr(self, k, saved[k].numpy())
        restore_envs(self.envs, saved["envs"], self.over)


def must_be_finite(x: np.ndarray, what: str, args):
    """Stop with status 3 if an environment hands out a NaN or an infinity."""
    if not np.isfinite(x).all():
        fail(f"--env-id {args.env_id}: {what} is not finite; the last checkpoint is from before", 3)


def clip_to_env(act, space) -> np.ndarray:
    """[C5] Actions as the environment takes them: a Box's are clipped here, a Discrete's counted from
    its first; the sample stays as it was."""
    act = act.cpu().numpy()
    box = isinstance(space, gym.spaces.Box)
    return np.clip(act, space.low, space.high) if box else act + space.start


@torch.no_grad()
def acting(learner, obs, space) -> np.ndarray:
    """The policy's mode, for evaluation."""
    head = learner.agent.policy(learner.standardised(obs))
    return clip_to_env(learner.agent.mode(head), space)


def evaluate(learner, envs, args: Args) -> np.ndarray:
    """Returns (episodes,) of one episode in each of `envs` from fixed seeds, by the policy's mode, with true
    rewards and standing normalisers. Draws no torch random number."""
    obs, _ = envs.reset(seed=1_000_000 + 1_000 * args.seed)
    alive, returns = np.ones(len(obs), bool), np.zeros(len(obs))
    learner.eval()
    while alive.any():
        obs, rew, terminated, truncated, _ = envs.step(acting(learner, obs, envs.single_action_space))
        returns += alive * rew
        alive &= ~(terminated | truncated)  # what an environment does after its first episode is not counted
    learner.train()
    return returns


def diagnose(learner, rollout: Rollout) -> dict:
    """Ranks and dormant units of the features of policy and value, on at most 2,048 rows of the rollout, in
    fp32 and eval mode."""
    rows = rollout.valid.flatten().nonzero()[:, 0]
    rows = rows[torch.from_numpy(np.random.default_rng(0).permutation(len(rows))[:2048]).to(rows)]
    out = {}
    learner.eval()
    with strict_fp32():
        features = learner.agent.features(rollout.obs[:-1].flatten(0, 1)[rows])
        for name, phi in zip(("policy", "value"), features):
            out |= {f"{k}_{name}": v for k, v in spectrum(phi).items()}
            out |= {f"dormant_{name}": dormant([phi]), f"feature_norm_{name}": phi.norm(dim=-1).mean()}
    learner.train()
    return {k: float(v) for k, v in out.items()}


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
