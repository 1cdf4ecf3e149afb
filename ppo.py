r"""Proximal policy optimisation (PPO): clipped policy gradients for vectors and Atari frames.

Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347. Each rollout serves
several epochs of minibatch steps; the clipped ratio w keeps the new policy near the one that
played. Generalised advantage estimation (GAE, arXiv 1506.02438) says which actions were good:

  L    = E[ min( w A, clip(w, 1 - eps, 1 + eps) A ) ],   w = pi(a|s) / pi_old(a|s)         (Eq. 7)
  A_t  = sum_k (gamma lambda)^k delta_{t+k},  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)   (Eq. 11)
  loss = -L + c_v (V(s) - V_target)^2 / 2 - c_e H(pi(.|s)),  V_target = A + V, c_1 = c_v / 2 (Eq. 9)

The sum ends with the episode or the rollout; V(s_{t+1}) is 0 after a termination, not a time-out.
lambda trades bias for variance: 0 trusts the critic after one step, 1 only after the last one.
With --clip-vloss V(s) is held to V_old(s) +- eps, too; the larger of the two errors counts.

  symbol             in the code                       shape
  s_t                rollout.states                    (T N, ...), T steps of N environments
  a_t, r_t, V(s_t)   rollout.act .rew .value           (T, N)
  A, V_target        batch.advantage .target           (B,) in a minibatch
  w, eps, lambda     ratio, --clip-coef, --gae-lambda  (B,), scalars
  c_v, c_e           --vf-coef, --ent-coef             scalars

CartPole; the same faster; MuJoCo by the settings of Tianshou's benchmark (4,400 on HalfCheetah
after 500,000 steps, where CleanRL's 1 x 2,048 steps with value clipping end at 1,500); Atari:
  python ppo.py
  python ppo.py --total-timesteps 100_000 --num-envs 8 --num-steps 32 --num-minibatches 1 \
      --update-epochs 20 --learning-rate 1e-3 --gamma 0.98 --gae-lambda 0.8 --ent-coef 0
  python ppo.py --env HalfCheetah-v5 --total-timesteps 1_000_000 --num-envs 8 --num-steps 256 \
      --num-minibatches 32 --update-epochs 10 --learning-rate 3e-4 --ent-coef 0 --no-clip-vloss \
      --no-norm-adv --recompute-advantages --normalize-obs --normalize-reward
  python ppo.py --env ALE/Pong-v5 --total-timesteps 10_000_000 --num-envs 8 --clip-coef 0.1

While it trains, `charts/episodic_return` should rise, `losses/explained_variance` approach 1,
`losses/approx_kl` stay near 0.01 and `losses/clipfrac` near 0.1 (much more: a smaller
--learning-rate); both are means over all minibatches of an update (CleanRL logs the last).

Networks, ppo_loss, Learner.update, and gae and Collector in the block "rollouts" are the
algorithm, train() is the loop. The other blocks marked "shared", which sibling scripts have too,
can wait. The details that matter (Huang et al., "The 37 implementation details of PPO", 2022) are
marked where they happen: [1] to [13], [C1] to [C9] for continuous actions, [A1] to [A9] for Atari.
Known limits: observation vectors or Atari frames, Box or Discrete actions. Left out on purpose:
recurrent policies, action masks, several GPUs.
"""

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
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # seeds networks, actions, minibatches and environments
    cuda: bool = True  # use the GPU if there is one
    threads: int = 1  # CPU threads of PyTorch (0: all cores; slow where something else runs too)
    compile: bool = False  # run the loss through torch.compile
    track: bool = False  # log to Weights & Biases as well (needs `pip install wandb`)
    wandb_project_name: str = "offline-rl"  # project of --track
    wandb_entity: str | None = None  # team of --track
    # Gymnasium environment, `module:Id` where a package has to be imported for it; ALE/Game-v5
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "CartPole-v1"
    run_dir: str = "runs"  # folder that holds the run folders
    resume: str | None = None  # run folder to go on from; its arguments hold unless given again
    checkpoint_frequency: int = 100_000  # steps between checkpoints (0: only at the end)
    eval_frequency: int = 50_000  # steps between evaluations and diagnostics (0: only at the end)
    eval_episodes: int = 10  # episodes of each evaluation (0: diagnostics only)
    log_frequency: int = 5_000  # environment steps between logged losses

    # length and data
    total_timesteps: int = 500_000  # environment steps
    num_envs: int = 4  # N, environments stepped together
    num_steps: int = 128  # T, steps of each environment in a rollout
    normalize_obs: bool = False  # running standardisation of observations (MuJoCo: on)
    normalize_reward: bool = False  # over the deviation of their discounted sums (MuJoCo: on)
    sticky: float = 0.25  # Atari: probability that the game repeats the last action

    # PPO
    learning_rate: float = 2.5e-4  # learning rate of Adam
    anneal_lr: bool = True  # let the learning rate fall linearly to 0 at --total-timesteps
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of the advantage estimate
    num_minibatches: int = 4  # minibatches an epoch
    update_epochs: int = 4  # epochs on each rollout
    norm_adv: bool = True  # standardise the advantages of each minibatch
    recompute_advantages: bool = False  # before each epoch, with the critic of the moment
    clip_coef: float = 0.2  # eps: the ratio is clipped to 1 - eps .. 1 + eps
    clip_vloss: bool = True  # hold V to V_old +- eps, too; off where returns are large, unscaled
    ent_coef: float = 0.01  # c_e, weight of the entropy
    # bonus: c_e H in the loss; return: -c_e log pi(a|s) in each reward, so that V predicts it, too
    entropy: Literal["bonus", "return"] = "bonus"
    vf_coef: float = 0.5  # c_v, on the squared error with its 1/2
    max_grad_norm: float = 0.5  # bound of the gradient's norm
    target_kl: float | None = None  # no further epoch once the policy has moved more than this

    # networks (vectors; Atari has the Nature network)
    width: int = 64  # units in a hidden layer
    depth: int = 2  # hidden layers
    log_std_init: float = -0.5  # log of a continuous policy's first deviation (CleanRL: 0)


# a resumed run must have these as before: its networks and environments would not fit
FIXED = "env_id seed num_envs normalize_obs normalize_reward width depth log_std_init".split()


def check(args: Args):
    """Refuse what no run could use, before anything starts."""
    check_numbers(args, "seed eval_frequency checkpoint_frequency", 0, 1e12)
    check_numbers(args, "total_timesteps log_frequency num_envs num_steps", 1, 1e12)
    check_numbers(args, "num_minibatches update_epochs width depth", 1, 1e12)
    check_numbers(args, "threads eval_episodes", 0, 1e4)
    check_numbers(args, "learning_rate clip_coef max_grad_norm", 1e-12, 1e12)
    check_numbers(args, "ent_coef vf_coef target_kl", 0, 1e12)
    check_numbers(args, "gamma gae_lambda sticky", 0, 1)
    check_numbers(args, "log_std_init", -20, 20)
    if (rows := args.num_envs * args.num_steps) < 2 * args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches}: a rollout has {rows} rows, each needs two")
    several, one = args.update_epochs > 1, "with --update-epochs 1"
    check_effect(args, "recompute_advantages target_kl", several, one)
    check_effect(args, "entropy", args.ent_coef > 0, "with --ent-coef 0")
    check_effect(args, "clip_vloss", args.vf_coef > 0, "with --vf-coef 0")
    vectors, atari = not args.env_id.startswith("ALE/"), "on Atari"
    check_effect(args, "normalize_obs", vectors, f"{atari}, whose frames are scaled")
    check_effect(args, "normalize_reward", vectors, f"{atari}, whose rewards are clipped")
    check_effect(args, "width depth", vectors, f"{atari}, which has the Nature network")
    check_effect(args, "sticky", not vectors, "outside Atari")


# --------------------------------------------------------------------------------------- networks
def layer_init(layer, gain: float = 2**0.5):
    """[2] Orthogonal weights, zero bias."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(fan_in: int, hidden: list[int], fan_out: int, gain: float) -> nn.Sequential:
    """Hidden layers with tanh; a small gain of the last one lets a policy start near uniform."""
    sizes = [fan_in, *hidden]
    layers = []
    for i, o in zip(sizes, hidden):
        layers += [layer_init(nn.Linear(i, o)), nn.Tanh()]
    return nn.Sequential(*layers, layer_init(nn.Linear(sizes[-1], fan_out), gain))


class Agent(nn.Module):
    """Policy and value. `head` is what the policy's last layer says: logits (B, actions) of a
    categorical, or the mean (B, d) of a Gaussian [C1] of independent dimensions [C3] whose log_std
    is a parameter [C2]. A Box of actions is [-1, 1] here."""

    def __init__(self, obs_space, act_space, args: Args):
        super().__init__()
        self.discrete = isinstance(act_space, gym.spaces.Discrete)
        self.image = len(obs_space.shape) == 3
        outputs = int(act_space.n) if self.discrete else act_space.shape[0]
        if self.image:  # [A8] the Nature network, shared by policy and value
            self.encoder = nn.Sequential(
                layer_init(nn.Conv2d(4, 32, kernel_size=8, stride=4)),
                nn.ReLU(),
                layer_init(nn.Conv2d(32, 64, kernel_size=4, stride=2)),
                nn.ReLU(),
                layer_init(nn.Conv2d(64, 64, kernel_size=3, stride=1)),
                nn.ReLU(),
                nn.Flatten(),
                layer_init(nn.Linear(64 * 7 * 7, 512)),
                nn.ReLU(),
            )
            fan_in, hidden = 512, []
        else:  # [13] [C4] separate networks
            self.encoder = nn.Identity()
            fan_in, hidden = obs_space.shape[0], [args.width] * args.depth
        self.actor = mlp(fan_in, hidden, outputs, 0.01)
        self.critic = mlp(fan_in, hidden, 1, 1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((outputs,), args.log_std_init))
        self.to(memory_format=torch.channels_last)  # convolutions: twice as fast on a CPU

    def encode(self, obs):
        """What policy and value read: vectors as they are, frames through the network; (B, D)."""
        if self.image:  # [A9] to [0, 1]
            obs = obs.contiguous(memory_format=torch.channels_last).float().div_(255)
        return self.encoder(obs)

    def forward(self, obs):
        """head (B, outputs) and V(s) (B,)."""
        x = self.encode(obs)
        return self.actor(x), self.critic(x)[:, 0]

    def policy(self, obs):
        """head alone, for a step of the environments."""
        return self.actor(self.encode(obs))

    def features(self, obs) -> dict:
        """What the last layers of policy and value read, (B, D) each, for the diagnostics."""
        x = self.encode(obs)
        return {"policy": self.actor[:-1](x), "value": self.critic[:-1](x)}

    def sample(self, head):
        if self.discrete:
            return torch.multinomial(head.softmax(-1), 1)[:, 0]
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


# ----------------------------------------------------------------------------- loss and update
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
    if args.norm_adv:  # [7]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    log_ratio = agent.log_prob(head, batch.act) - batch.logp
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()  # [8]
    error = (value - batch.target) ** 2
    if args.clip_vloss:  # [9]
        near = batch.value + (value - batch.value).clamp(-args.clip_coef, args.clip_coef)
        error = torch.max(error, (near - batch.target) ** 2)
    value_loss = 0.5 * error.mean()
    entropy = agent.entropy(head).mean()
    bonus = args.ent_coef if args.entropy == "bonus" else 0.0
    loss = policy_loss + args.vf_coef * value_loss - bonus * entropy  # [10]
    info = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        # KL(pi_old || pi) by two estimates, unbiased on rows not trained on; the second is >= 0
        "old_approx_kl": -log_ratio.mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
    }
    return loss, {name: x.detach() for name, x in info.items()}


class Learner(nn.Module):
    """Agent, running statistics and optimiser."""

    def __init__(self, obs_space, act_space, args: Args, device):
        super().__init__()
        self.args, self.device = args, device
        self.agent = Agent(obs_space, act_space, args)
        self.obs_stats = RunningMeanStd(obs_space.shape) if args.normalize_obs else None
        self.return_stats = RunningMeanStd(()) if args.normalize_reward else None
        self.to(device)
        self.loss = torch.compile(ppo_loss) if args.compile else ppo_loss
        adam = {"lr": args.learning_rate, "eps": 1e-5, "fused": True}  # [3] a larger epsilon
        self.optim = {"agent": torch.optim.Adam(self.agent.parameters(), **adam)}

    def standardised(self, obs):
        """Observations of an environment (numpy) as the networks see them, on the device: frames
        as they are, vectors standardised [C6] and clipped [C7] if --normalize-obs."""
        obs = torch.as_tensor(obs, device=self.device)
        if self.agent.image:
            return obs
        obs = obs.float()
        return self.obs_stats.standardise(obs).clamp(-10, 10) if self.obs_stats else obs

    @torch.no_grad()
    def act(self, obs, explore: bool):
        """Actions for an environment's observations: a sample of pi, or its mode."""
        head = self.agent.policy(self.standardised(obs))
        return self.agent.sample(head) if explore else self.agent.mode(head)

    def update(self, rollout) -> dict:
        """--update-epochs passes over the rollout in shuffled minibatches [6]; mean losses. The
        statistics of the observations take the rollout in last."""
        args, infos, batch = self.args, [], self.batch_of(rollout)
        unexplained = (batch.target - batch.value).var() / batch.target.var().clamp(min=1e-8)
        for epoch in range(args.update_epochs):
            if epoch and args.recompute_advantages:
                batch = self.batch_of(rollout)
            order = torch.randperm(len(batch.logp), device=self.device)
            columns = [x[order].tensor_split(args.num_minibatches) for x in batch]
            for minibatch in zip(*columns):
                loss, info = self.loss(self.agent, Batch(*minibatch), args)
                self.optim["agent"].zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.agent.parameters(), args.max_grad_norm)  # [11]
                self.optim["agent"].step()
                infos.append(info)
            kl = sum(x["approx_kl"] for x in infos[-args.num_minibatches :]) / args.num_minibatches
            if args.target_kl is not None and kl > args.target_kl:
                break
        if args.normalize_obs:
            self.obs_stats.update(torch.from_numpy(np.concatenate(rollout.raw_obs)))
        means = {name: torch.stack([x[name] for x in infos]).mean() for name in infos[0]}
        return means | {"explained_variance": 1 - unexplained, "epochs": epoch + 1}

    @torch.no_grad()
    def batch_of(self, rollout) -> Batch:
        """Advantages, targets and the rest, flat."""
        args, r = self.args, rollout
        value, next_value = r.value, r.next_value
        if args.recompute_advantages:
            _, value, next_value = assess(self.agent, r.states, r.terminated, r.truncated)
        rew = r.rew - args.ent_coef * r.logp if args.entropy == "return" else r.rew
        over = r.terminated | r.truncated
        advantage = gae(rew, value, next_value, over, args.gamma, args.gae_lambda)
        columns = (r.act, r.logp, r.value, advantage, advantage + value)
        return Batch(r.states[: rew.numel()], *(x.flatten(0, 1) for x in columns))


# ------------------------------------------------------------------------------------ environments
class Atari(gym.vector.VectorWrapper):
    """ale_py's vector environment: noops [A1], frames skipped and max-pooled [A2], fire pressed on
    reset [A4], 84 x 84 grey [A5], four frames stacked [A7]. With `training` a lost life terminates
    [A3], without a reset, and rewards are clipped to their sign [A6]; returns are the true ones of
    whole games. After a lost life the policy must press fire itself; if it never does, the game
    ends by the usual cap of 108,000 frames, in evaluations too."""

    def __init__(self, args: Args, n: int, training: bool):
        import ale_py
        from ale_py.vector_env import AtariVectorEnv

        gym.register_envs(ale_py)
        game = gym.spec(args.env_id).kwargs["game"]  # ale_py's own list: tic_tac_toe_3d
        self.training = training
        envs = AtariVectorEnv(
            game,
            n,
            reward_clipping=False,
            repeat_action_probability=args.sticky,
            life_loss_info=training,
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
        )
        super().__init__(envs)

    def reset(self, *, seed: list[int], options=None):
        seeds = np.array([s % 2**31 for s in seed])  # ale_py's are 32 bits wide
        obs, info = self.env.reset(seed=seeds)
        self.lives = info["lives"]
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        return obs, {}

    def step(self, act):
        """Infos like those of the other environments: where a game ended, its last observation,
        return and length. A terminated row with fewer lives than before is a lost life; after a
        game's end the lives are the next one's, also where one was left (Adventure)."""
        obs, rew, terminated, truncated, info = self.env.step(act)
        over = terminated & (info["lives"] >= self.lives) | truncated
        self.lives = info["lives"]
        self.returns += rew
        self.lengths += 1
        infos = {}
        if over.any():
            ended = {"return": self.returns.copy(), "length": self.lengths.copy()}
            infos = {"final_obs": info["final_obs"], "final_info": ended, "_final_info": over}
            self.returns[over] = self.lengths[over] = 0
        return obs, np.sign(rew) if self.training else rew, terminated, truncated, infos


def make(args: Args, n: int, run: ExitStack, training: bool):
    """n environments stepped together, or None for n = 0."""
    if n == 0 or not args.env_id.startswith("ALE/"):
        return make_envs(args.env_id, n, run)
    with failing(f"--env-id {args.env_id} (pip install ale_py; games are ALE/Name-v5)", Exception):
        envs = Atari(args, n, training)
    run.callback(envs.close)
    return envs


def check_spaces(envs, args: Args, device):
    """Refuse what the networks cannot read or write, and rollouts beyond the memory."""
    obs, act = envs.single_observation_space, envs.single_action_space
    discrete = isinstance(act, gym.spaces.Discrete)
    vectors = isinstance(obs, gym.spaces.Box) and len(obs.shape) == 1
    if not vectors and not isinstance(envs, Atari):
        fail(f"--env-id {args.env_id}: observations are {obs}, expected vectors, or ALE/...")
    if not discrete:
        check_boxes(envs, args.env_id)
    check_effect(args, "log_std_init", not discrete, "with discrete actions")
    row = 3 * math.prod(obs.shape) * (4 if vectors else 1) + 200  # raw, as states, shuffled
    reserve(args.num_envs * (args.num_steps + 1) * row, "rollout, roughly", device)


# --------------------------------------------------------------------------------------- training
def train(args: Args) -> dict:
    """Train as `args` says; returns what summary.json holds."""
    check(args)
    device = set_up(args)
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # no tf32: ranks need full precision
    with Run(args, args.total_timesteps) as run:
        envs = make(args, args.num_envs, run, training=True)
        eval_envs = make(args, args.eval_episodes, run, training=False)
        check_spaces(envs, args, device)
        learner = Learner(envs.single_observation_space, envs.single_action_space, args, device)
        collector = Collector(envs, args)
        step, last_return, returns = 0, math.nan, np.zeros(0)
        if run.saved:
            step, last_return = run.saved["step"], run.saved["last_return"]
            returns = np.array(run.saved["returns"])
            run.restore(learner, learner.optim)
            collector.load_state_dict(run.saved["collector"], step)
        run.open()

        def save():
            numbers = {"last_return": last_return, "returns": returns.tolist()}
            run.save(step, learner, learner.optim, collector=collector.state_dict(), **numbers)

        while step < args.total_timesteps and not run.signum:
            lr = args.learning_rate
            if args.anneal_lr:  # [4]
                lr *= 1 - step / args.total_timesteps
            learner.optim["agent"].param_groups[0]["lr"] = lr
            rollout, ended = collector.collect(learner)  # [1] N environments, T steps
            info = learner.update(rollout)
            before, step = step, step + args.num_envs * args.num_steps

            if ended:  # means of the episodes that ended in this rollout
                last_return, length = np.mean(ended, axis=0).tolist()
                run.log(step, {"charts/episodic_return": last_return})
                run.log(step, {"charts/episodic_length": length})
            evaluating = every(args.eval_frequency, before, step) or step >= args.total_timesteps
            if every(args.log_frequency, before, step) or evaluating:
                run.log(step, {"losses/" + name: x for name, x in info.items()})
                run.log(step, {"charts/SPS": run.rate(step), "charts/learning_rate": lr})
                done = min(step, args.total_timesteps)
                run.show(done, KL=info["approx_kl"], last_return=last_return)
            if evaluating:
                with run.paused():
                    returns = evaluate(learner, eval_envs, args)
                    numbers = diagnose(learner, rollout)
                run.log(step, {"diagnostics/" + name: x for name, x in numbers.items()})
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
        return run.finish(summary)


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
