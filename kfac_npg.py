r"""Natural policy gradient by K-FAC, conjugate gradients (TRPO) or the exact Fisher matrix; or the plain one.

A policy gradient g depends on how the policy is written down; the natural one, F^-1 g, does not. It is the
steepest ascent when distance is the change of the *distribution*, to second order KL = x^T F x / 2, with

  F = E_s E_{a~pi} [ grad log pi(a|s) grad log pi(a|s)^T ]                         the Fisher matrix
  maximise g^T x  subject to  x^T F x / 2 <= delta   =>   x = sqrt(2 delta / d^T F d) d,   d = F^-1 g

Solvers differ in how well d solves F d = g. Its length d^T F d is exact for all of them (one forward-mode
product), so that each step has the predicted KL delta, also where d is only an approximation.

F has a row for each parameter: 4,610 for a small policy here, 60 million for AlexNet. K-FAC (Martens, Grosse,
arXiv 1503.05671; for policies ACKTR, arXiv 1708.05144) writes it in small factors. In the papers' letters,
which mean other things elsewhere: a layer s = W a, its input a with a 1 appended for the bias. With
e = grad_s log pi for each row, G the part of g that is shaped like W, and (x) the Kronecker product:

  grad_W log pi = e a^T,    vec(e a^T) = e (x) a          (row-major, as torch flattens W)
  F_W = E[ e e^T (x) a a^T ]  ~  E[e e^T] (x) E[a a^T] = S (x) A
  (S (x) A)^-1 vec(G) = vec( S^-1 G A^-1 )

so that AlexNet's last layer, 1000 x 4096, needs matrices of 1000 and 4097 rows instead of one of 4 million.
Two approximations: F is block-diagonal, no terms between layers; and the expectation of a product is taken
as the product of expectations. The other solvers, too, solve a damped system, (F + l I) d = g; here l is
split over the factors, A + w sqrt(l) I and S + sqrt(l) / w I, w^2 = (tr A / dim A) / (tr S / dim S). For the
critic F is the Gauss-Newton matrix, e = dV/ds: nothing is sampled. The log-deviations of a Gaussian policy
are no layer: their Fisher matrix is 2 I exactly, their step g / (2 + l).

  symbol        in the code                       shape
  a, s          inputs and outputs of a Linear    (B, in), (B, out)
  A, S          factors()                         (in + 1, in + 1), (out, out)
  g, d          gradient and direction            a list like the parameters
  delta         --max-kl                          scalar, trust region
  l             --damping                         scalar
  d^T F d       quadratic()                       scalar, exact, by one forward-mode product
  A_t, V(s)     advantage, value                  (T, N), (T + 1, N)

Where to read: from the Fisher matrix to Learner.critic_step, and gae (in the block `rollouts`), is the
algorithm; train() is the loop. The other blocks marked `shared`, which sibling scripts have too, can wait
(marks like [C5] and remarks on Atari there are ppo.py's).

K-FAC; TRPO (arXiv 1502.05477); the exact Fisher matrix of a small network:
  python kfac_npg.py
  python kfac_npg.py --solver cg --line-search --damping 0.1
  python kfac_npg.py --solver exact --width 16

The plain gradient, an advantage actor-critic:
  python kfac_npg.py --solver none --num-envs 8 --num-steps 16 --learning-rate 1e-3

K-FAC's direction beside the exact one (`diagnostics/fisher_cosine_kfac`, for at most 2,000 parameters):
  python kfac_npg.py --width 16

MuJoCo:
  python kfac_npg.py --env HalfCheetah-v5 --total-timesteps 1_000_000 --num-envs 1 --num-steps 2048 \
      --normalize-obs --normalize-reward

While it trains, `charts/episodic_return` should rise; `diagnostics/kl` stay near --max-kl (a single step's
may be 7 % off at 0.01; far above: a smaller --max-kl). `kl_predicted` is --max-kl by construction when no
line search acts. `kl_kfac`, what the factors alone say, can be several times smaller than `kl`: they leave
out what the layers do together.
Resume is bitwise on Gymnasium's classic control and MuJoCo environments; elsewhere new episodes start.

Known limits: observation vectors and MLPs. Left out on purpose: convolutions (KFC), momentum, EKFAC, several
epochs on a batch (ppo.py).
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
    """seeds networks, actions and environments"""
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
    """Gymnasium environment"""
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
    """environment steps between feature and curvature diagnostics (0: none)"""
    precision: Literal["fp32", "tf32"] = "fp32"
    """tf32: matrix products of the networks on a GPU, never in the factors"""

    # --- length and data
    total_timesteps: int = 200_000
    """environment steps"""
    num_envs: int = 4
    """N, environments stepped together"""
    num_steps: int = 512
    """T, steps of each environment for one policy step"""
    normalize_obs: bool = False
    """running standardisation of observations (MuJoCo: on)"""
    normalize_reward: bool = False
    """rewards divided by the running deviation of their discounted sum so far (MuJoCo: on)"""

    # --- policy gradient
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the advantage estimate"""
    ent_coef: float = 0.0
    """weight of an entropy bonus"""
    solver: Literal["kfac", "cg", "exact", "none"] = "kfac"
    """of F d = g. kfac: Kronecker factors; cg: conjugate gradients; exact: a dense F; none: Adam on g"""
    max_kl: float = 0.01
    """delta, trust region of a policy step (ACKTR: 0.0005 to 0.002; TRPO: 0.01)"""
    line_search: bool = False
    """shorten the step until the surrogate improves and the KL holds (TRPO)"""
    damping: float = 0.01
    """l, split over the factors by kfac, F + l I for cg and exact (TRPO: 0.1)"""
    learning_rate: float = 3e-4
    """learning rate of Adam, with --solver none"""

    # --- K-FAC
    stats_decay: float = 0.95
    """decay of the factors' running average; the first batches are averaged plainly"""
    refresh: int = 1
    """policy steps between factorisations of the factors"""
    empirical_fisher: bool = False
    """factors from advantage-weighted gradients of the taken actions: not the Fisher matrix, to compare"""
    cg_steps: int = 10
    """steps of conjugate gradients"""

    # --- critic
    critic_updates: int = 20
    """steps on the value of each rollout"""
    critic_solver: Literal["kfac", "adam"] = "kfac"
    """Gauss-Newton by K-FAC, the step along its direction that is best for the linearised V; or Adam"""
    critic_lr: float = 1e-3
    """learning rate of Adam, with --critic-solver adam"""
    critic_damping: float = 0.1
    """l of the critic's factors"""

    # --- networks
    width: int = 64
    """units in a hidden layer"""
    depth: int = 2
    """hidden layers, tanh (0: linear)"""
    log_std_init: float = 0.0
    """log standard deviation of a continuous policy at the start"""


LIMITS = {"gamma": (0, 0.99999), "gae_lambda": (0, 1), "depth": (0, 64), "seed": (0, 1e6)}  # least, most
LIMITS |= {"log_std_init": (-20, 20), "stats_decay": (0, 0.99999)}
LIMITS |= dict.fromkeys(["damping", "critic_damping"], (0, 1e12))
LIMITS |= dict.fromkeys(["max_kl", "learning_rate", "critic_lr"], (1e-12, 1e12))
LIMITS |= dict.fromkeys(["num_envs", "width", "refresh", "cg_steps", "critic_updates"], (1, 1e6))
LIMITS["num_steps"] = (4, 1e6)  # two valid rows even where every second one is a reset
LIMITS |= dict.fromkeys(["total_timesteps", "log_frequency"], (1, 1e12))


def check(args: Args):
    """Refuse values and combinations that make no sense or would be ignored, before anything starts."""
    check_limits(args, LIMITS)
    only_if(args, args.solver != "none", "with --solver none", "max_kl", "line_search", "damping")
    only_if(args, args.solver == "none", f"with --solver {args.solver}", "learning_rate")
    only_if(args, args.solver == "kfac", f"with --solver {args.solver}", "empirical_fisher", "refresh")
    only_if(args, args.solver == "cg", f"with --solver {args.solver}", "cg_steps")
    only_if(args, "kfac" in (args.solver, args.critic_solver), "without K-FAC", "stats_decay")
    only_if(args, args.critic_solver == "adam", "with --critic-solver kfac", "critic_lr")
    only_if(args, args.critic_solver == "kfac", "with --critic-solver adam", "critic_damping")
    only_if(args, args.depth > 0, "with --depth 0", "width")
    only_if(args, args.eval_episodes > 0, "with --eval-episodes 0", "capture_video")
    only_if(args, args.track, "without --track", "wandb_project_name", "wandb_entity")
    if args.solver == "exact" and args.damping == 0:
        fail("--solver exact needs --damping above 0: the Fisher matrix of a softmax is singular")


# ------------------------------------------------------------------------------------------- networks
class MLP(nn.Module):
    """Linear layers with tanh between; `record` collects (a, s) of each, what goes in and what comes out."""

    def __init__(self, fan_in: int, fan_out: int, gain: float, args: Args):
        super().__init__()
        sizes = [fan_in] + [args.width] * args.depth + [fan_out]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:]))
        for i, m in enumerate(self.layers):
            nn.init.orthogonal_(m.weight, 2**0.5 if i < args.depth else gain)
            nn.init.zeros_(m.bias)

    def forward(self, a, record: list | None = None):
        for i, m in enumerate(self.layers):
            s = m(a)
            if record is not None:
                record.append((a, s))
            a = torch.tanh(s) if i < len(self.layers) - 1 else s
        return a


class Agent(nn.Module):
    """Policy and value, apart. `head` is what the policy's last layer says: logits (B, actions) of a
    categorical, or the mean (B, d) of a Gaussian of independent dimensions whose log_std is a parameter."""

    def __init__(self, obs_space, act_space, args: Args):
        super().__init__()
        self.discrete = isinstance(act_space, gym.spaces.Discrete)
        inputs, outputs = obs_space.shape[0], int(act_space.n) if self.discrete else act_space.shape[0]
        self.actor, self.critic = MLP(inputs, outputs, 0.01, args), MLP(inputs, 1, 1.0, args)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((outputs,), args.log_std_init))

    def forward(self, obs):
        """head (B, outputs) and V(s) (B,)."""
        return self.actor(obs), self.critic(obs)[:, 0]

    def policy(self, obs):
        """head alone, for a step of the environments."""
        return self.actor(obs)

    def policy_parameters(self) -> list:
        """W and b of each layer in turn, then log_std if there is one."""
        return [*self.actor.parameters()] + ([] if self.discrete else [self.log_std])

    def features(self, obs):
        """What the last linear layers of policy and value read, each (B, D), for the diagnostics."""
        actor, critic = [], []
        self.actor(obs, actor)
        self.critic(obs, critic)
        return actor[-1][0], critic[-1][0]

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

    def kl(self, head, log_std, new_head):
        """KL(old || new), (B,): an old head and log_std (None if discrete), a new head, log_std as it is."""
        if self.discrete:
            logp, new = F.log_softmax(head, -1), F.log_softmax(new_head, -1)
            return (logp.exp() * (logp - new)).sum(-1)
        variance = torch.exp(2 * log_std) + (head - new_head) ** 2
        return (self.log_std - log_std + variance / (2 * torch.exp(2 * self.log_std)) - 0.5).sum(-1)


# ------------------------------------------------------------------------- the Fisher matrix, exactly
# F = E_s[ J^T M J ]: J the Jacobian of the head (logits or mean), M the Fisher matrix of the head itself.
def metric(agent: Agent, head, t):
    """The Fisher matrix of the *head*, per state, times a tangent t (B, outputs): I / sigma^2 for the mean of
    a Gaussian, diag(p) - p p^T for logits."""
    if not agent.discrete:
        return t / torch.exp(2 * agent.log_std)
    p = F.softmax(head, -1)
    return p * (t - (p * t).sum(-1, keepdim=True))


def tangent(net: MLP, obs, d: list):
    """net(obs) and its derivative along d, by forward-mode differentiation; each (B, outputs). What d holds
    beyond the network's parameters, a log_std, is left out."""
    params = dict(net.named_parameters())
    call = lambda p: torch.func.functional_call(net, p, (obs,))
    return torch.func.jvp(call, (params,), (dict(zip(params, d)),))


def quadratic(agent: Agent, obs, d: list):
    """d^T F d, exactly, over all layers at once: E_s[t^T F_head t] + 2 |d_log_std|^2."""
    with strict_fp32():
        head, t = tangent(agent.actor, obs, d)
        return (t * metric(agent, head, t)).sum(-1).mean() + (0 if agent.discrete else 2 * (d[-1] ** 2).sum())


def fisher_product(agent: Agent, obs, d: list) -> list:
    """F d: forward through the network, the metric at its head, and back."""
    with strict_fp32():
        head, t = tangent(agent.actor, obs, d)
        weight = metric(agent, head, t) / len(obs)
        with torch.enable_grad():
            weighted = (agent.actor(obs) * weight).sum()
        back = torch.autograd.grad(weighted, list(agent.actor.parameters()))
    return [*back] + ([] if agent.discrete else [2 * d[-1]])


def dense_fisher(agent: Agent, obs):
    """F (n, n) of all policy parameters from the Jacobian of each state's head. For small networks."""
    params = dict(agent.actor.named_parameters())
    one = lambda p, x: torch.func.functional_call(agent.actor, p, (x,))
    with strict_fp32():
        jacobian = torch.func.vmap(torch.func.jacrev(one), (None, 0))(params, obs)
        J = torch.cat([j.flatten(2) for j in jacobian.values()], 2)  # (B, outputs, n)
        head = agent.actor(obs)
        MJ = metric(agent, head[:, None], J.transpose(1, 2))  # (B, n, outputs)
        fisher = torch.einsum("boi,bjo->ij", J, MJ) / len(obs)
        if agent.discrete:
            return fisher
        return torch.block_diag(fisher, torch.diag(torch.full_like(agent.log_std, 2).to(fisher)))


def flat(d: list):
    return torch.cat([x.reshape(-1) for x in d])


def unflat(v, like: list) -> list:
    return [x.view_as(p) for x, p in zip(v.split([p.numel() for p in like]), like)]


def conjugate_gradients(product, g: list, steps: int) -> list:
    """Approximates d with product(d) = g, from d = 0: residual r = g - product(d), search direction p."""
    d, r, p = torch.zeros_like(flat(g)), flat(g), flat(g)
    rr = start = r @ r
    for _ in range(steps):
        if rr < 1e-12 * start:
            break
        q = flat(product(unflat(p, g)))
        if p @ q <= 0:  # not positive definite in floating point, or g = 0
            break
        alpha = rr / (p @ q)
        d, r = d + alpha * p, r - alpha * q
        rr_new = r @ r
        p, rr = r + rr_new / rr * p, rr_new
    return unflat(d, g)


# ----------------------------------------------------------------------------------------------- K-FAC
class KFAC(nn.Module):
    """The factors A and S of an MLP's layers, their running averages, and (S (x) A)^-1 by Cholesky.

    net.layers is a list of nn.Linear with bias, in float32; `record` holds (input, output) of each, (B, .).
    update() frees the graph: take the gradient of a loss on the same pass before it, with retain_graph."""

    def __init__(self, net: MLP, damping: float, decay: float):
        super().__init__()
        self.least_damping = self.damping = damping
        self.decay = decay
        for i, m in enumerate(net.layers):
            for name, n in ((f"A{i}", m.in_features + 1), (f"S{i}", m.out_features)):
                self.register_buffer(name, torch.zeros(n, n))
                self.register_buffer("L" + name, torch.eye(n))  # Cholesky factor of the damped one
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.num_layers = len(net.layers)

    def factors(self, record: list, scalar):
        """A = E[a a^T] and S = E[e e^T] from a recorded pass, e = grad_s of each row's own term of `scalar`.

        `scalar` is a sum over rows, not a mean: so e has no 1 / B. For a policy it is the sum of log pi of
        sampled actions; for a squared error of one output, as V, v.sum(); of several outputs it would be
        (out * torch.randn_like(out)).sum(), since out.sum() gives an S of rank 1."""
        out = {}
        with strict_fp32():
            backpropagated = torch.autograd.grad(scalar, [s for _, s in record])
            for i, ((a, _), e) in enumerate(zip(record, backpropagated)):
                a = torch.cat([a, torch.ones_like(a[:, :1])], 1)  # homogeneous coordinates
                out[f"A{i}"], out[f"S{i}"] = a.T @ a / len(a), e.T @ e / len(e)
        return out

    def update(self, record: list, scalar, refresh: bool = True):
        """Merge this batch's factors, the k-th with weight max(1 / k, 1 - decay), and factorise."""
        self.count += 1
        keep = min(1 - 1 / int(self.count), self.decay)
        for name, x in self.factors(record, scalar).items():
            getattr(self, name).lerp_(x, 1 - keep)
        if refresh:
            self.damping = self.least_damping
            self.factorise()

    def factorise(self):
        """Cholesky of A + w sqrt(l) I and S + sqrt(l) / w I. If one is not positive definite in floating
        point, the damping is raised tenfold until the next refresh, and a line says so."""
        for i in range(self.num_layers):
            A, S = getattr(self, f"A{i}"), getattr(self, f"S{i}")
            if not (torch.isfinite(A).all() and torch.isfinite(S).all()):
                fail(f"K-FAC: the factors of layer {i} are not finite; the last checkpoint is from before", 3)
            mean_A, mean_S = ((x.trace() / len(x)).clamp(min=1e-30) for x in (A, S))
            w = (mean_A / mean_S).sqrt().clamp(1e-6, 1e6)
            for name, x, scale in ((f"A{i}", A, w), (f"S{i}", S, 1 / w)):
                eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
                L, bad = torch.linalg.cholesky_ex(x + scale * self.damping**0.5 * eye)
                if bad:
                    self.damping = max(10 * self.damping, 1e-8)
                    print(f"K-FAC: a factor is not positive definite, damping raised to {self.damping:g}")
                    return self.factorise()
                getattr(self, "L" + name).copy_(L)

    def solve(self, gradients: list) -> list:
        """S^-1 [G_W G_b] A^-1 for each layer; gradients W, b, W, b, ..."""
        out = []
        with strict_fp32():
            for i in range(self.num_layers):
                G = torch.cat([gradients[2 * i], gradients[2 * i + 1][:, None]], 1)  # (out, in + 1)
                d = torch.cholesky_solve(G, getattr(self, f"LS{i}"))
                d = torch.cholesky_solve(d.T, getattr(self, f"LA{i}")).T
                out += [d[:, :-1], d[:, -1]]
        return out

    def kronecker_quadratic(self, d: list):
        """d^T (S (x) A) d = sum over layers of tr(D^T S D A): what the factors, undamped, say of d^T F d."""
        total = 0.0
        with strict_fp32():
            for i in range(self.num_layers):
                D = torch.cat([d[2 * i], d[2 * i + 1][:, None]], 1)
                total = total + (D * (getattr(self, f"S{i}") @ D @ getattr(self, f"A{i}"))).sum()
        return total

    def condition(self) -> float:
        """The largest condition number of a damped factor."""
        values = [torch.linalg.svdvals(x) for n, x in self.named_buffers() if n.startswith("L")]
        return max(float((s[0] / s[-1]) ** 2) for s in values)


# ------------------------------------------------------------------------------ the loss and the update
class Batch(NamedTuple):
    obs: torch.Tensor  # (B, obs), standardised
    act: torch.Tensor  # (B,) or (B, d)
    logp: torch.Tensor  # (B,), log pi_old(a|s)
    advantage: torch.Tensor  # (B,), standardised
    target: torch.Tensor  # (B,), V_target


def surrogate(agent: Agent, batch: Batch, args: Args):
    """E[ pi / pi_old A ] + c_e H: its gradient at pi_old is the policy gradient."""
    head = agent.actor(batch.obs)
    ratio = (agent.log_prob(head, batch.act) - batch.logp).exp()
    return (ratio * batch.advantage).mean() + args.ent_coef * agent.entropy(head).mean()


class Learner(nn.Module):
    """Agent, normalisers, factors and optimisers."""

    def __init__(self, obs_space, act_space, args: Args, device):
        super().__init__()
        self.args, self.device = args, device
        self.agent = Agent(obs_space, act_space, args)
        self.obs_stats = Moments(obs_space.shape) if args.normalize_obs else None
        self.return_stats = Moments(()) if args.normalize_reward else None
        self.policy_factors = KFAC(self.agent.actor, args.damping, args.stats_decay)
        self.critic_factors = KFAC(self.agent.critic, args.critic_damping, args.stats_decay)
        self.to(device)
        adam = lambda params, lr: torch.optim.Adam(params, lr=lr, fused=True)
        self.optim = {"critic": adam(self.agent.critic.parameters(), args.critic_lr)}
        self.optim["policy"] = adam(self.agent.policy_parameters(), args.learning_rate)

    def standardised(self, obs):
        """Observations of an environment (numpy) as the networks see them, on the device."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return self.obs_stats.standardise(obs).clamp(-10, 10) if self.args.normalize_obs else obs

    def update(self, rollout, diagnosing: bool = False) -> dict:
        """One policy step, then --critic-updates value steps, on all valid rows. Afterwards train() moves the
        observations' normaliser."""
        batch = self.batch_of(rollout)
        before = self.agent.critic(batch.obs)[:, 0].detach()
        info = self.policy_step(batch, diagnosing)
        for _ in range(self.args.critic_updates):
            info["value_loss"] = self.critic_step(batch)
        unexplained = (batch.target - before).var() / batch.target.var().clamp(min=1e-8)
        info["explained_variance"] = 1 - unexplained
        return {k: torch.as_tensor(v, device=self.device).detach() for k, v in info.items()}

    @torch.no_grad()
    def batch_of(self, rollout) -> Batch:
        """Advantages and the flat batch of valid rows: rows of a reset are left out."""
        columns = (rollout.rew, rollout.value, rollout.terminated, rollout.over)
        rew, value, end, over = (x.cpu().numpy() for x in columns)
        advantage = gae(rew, value, end, over, self.args.gamma, self.args.gae_lambda)
        advantage = torch.from_numpy(advantage).to(rollout.value)
        target = advantage + rollout.value[:-1]
        rows = rollout.valid.flatten().nonzero()[:, 0]
        columns = (rollout.obs[:-1], rollout.act, rollout.logp, advantage, target)
        batch = Batch(*(x.flatten(0, 1)[rows] for x in columns))
        scaled = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
        return batch._replace(advantage=scaled)

    def policy_step(self, batch: Batch, diagnosing: bool = False) -> dict:
        """theta <- theta + sqrt(2 delta / d^T F d) d, d ~ F^-1 g; with --solver none a step of Adam on g."""
        args, agent, params = self.args, self.agent, self.agent.policy_parameters()
        objective = surrogate(agent, batch, args)
        g = [*torch.autograd.grad(objective, params)]
        with torch.no_grad():
            head = agent.actor(batch.obs)
            log_std = None if agent.discrete else agent.log_std.clone()
        info = {"policy_loss": -objective, "entropy": agent.entropy(head).mean(), "grad_norm": flat(g).norm()}
        if args.solver == "none":
            for p, x in zip(params, g):
                p.grad = -x  # Adam minimises
            self.optim["policy"].step()
            return info | {"kl": agent.kl(head, log_std, agent.actor(batch.obs)).mean()}
        d = self.natural(batch, g)
        if diagnosing and args.solver == "kfac":
            info |= self.curvature(batch, g, d)
        dFd = quadratic(agent, batch.obs, d)
        full = (2 * args.max_kl / dFd.clamp(min=1e-30)).sqrt()
        old = [p.detach().clone() for p in params]
        # The full step lands just above or below max_kl, so that one step back is common.
        for backtracks in range(15 if args.line_search else 1):
            scale = full * 0.8**backtracks
            with torch.no_grad():
                for p, p_old, x in zip(params, old, d):
                    p.copy_(p_old + scale * x)
                kl = agent.kl(head, log_std, agent.actor(batch.obs)).mean()
                gain = surrogate(agent, batch, args) - objective
            if not args.line_search or (kl <= args.max_kl and gain > 0):
                break
        else:  # no step of this direction helps
            with torch.no_grad():
                for p, p_old in zip(params, old):
                    p.copy_(p_old)
            scale, kl, gain = (torch.zeros_like(x) for x in (scale, kl, gain))
        info |= {"step_scale": scale, "backtracks": backtracks}
        info |= {"kl": kl, "kl_predicted": 0.5 * scale**2 * dFd}
        info |= {"gain": gain, "gain_predicted": scale * flat(g) @ flat(d)}
        if args.solver == "kfac":
            own = self.policy_factors.kronecker_quadratic(d)
            own = own + (0 if agent.discrete else 2 * (d[-1] ** 2).sum())
            info |= {"kl_kfac": 0.5 * scale**2 * own, "damping": self.policy_factors.damping}
        return info

    def natural(self, batch: Batch, g: list) -> list:
        """d = (F + l I)^-1 g by the solver asked for."""
        args, agent = self.args, self.agent
        if args.solver == "cg":
            damped = lambda d: [x + args.damping * y for x, y in zip(fisher_product(agent, batch.obs, d), d)]
            return conjugate_gradients(damped, g, args.cg_steps)
        if args.solver == "exact":
            return self.exact(batch, g)
        record = []
        head = agent.actor(batch.obs, record)
        if args.empirical_fisher:  # what is often called Fisher and is not: weighted by how well it went
            score = batch.advantage * agent.log_prob(head, batch.act)
        else:  # the true one: actions of the policy itself, drawn anew
            score = agent.log_prob(head, agent.sample(head.detach()))
        refresh = int(self.policy_factors.count) % args.refresh == 0
        self.policy_factors.update(record, score.sum(), refresh)
        return self.policy_factors.solve(g) + ([] if agent.discrete else [g[-1] / (2 + args.damping)])

    def exact(self, batch: Batch, g: list) -> list:
        fisher = dense_fisher(self.agent, batch.obs)
        eye = torch.eye(len(fisher), dtype=fisher.dtype, device=fisher.device)
        return unflat(torch.linalg.solve(fisher + self.args.damping * eye, flat(g)), g)

    def critic_step(self, batch: Batch):
        """One step on (V - target)^2 / 2. Along K-FAC's direction d, V moves by J d; the best multiple is
        that of the Gauss-Newton model, -<V - target, J d> / |J d|^2: no learning rate."""
        critic, args, record = self.agent.critic, self.args, []
        v = critic(batch.obs, record)[:, 0]
        loss = 0.5 * ((v - batch.target) ** 2).mean()
        params = list(critic.parameters())
        g = torch.autograd.grad(loss, params, retain_graph=True)
        if args.critic_solver == "adam":
            for p, x in zip(params, g):
                p.grad = x
            self.optim["critic"].step()
            return loss.detach()
        self.critic_factors.update(record, v.sum())  # e = dV/ds: Gauss-Newton, nothing sampled
        d = self.critic_factors.solve([-x for x in g])
        with strict_fp32():
            Jd = tangent(critic, batch.obs, d)[1][:, 0]
            best = -((v - batch.target) @ Jd) / (Jd @ Jd).clamp(min=1e-30)
            for p, x in zip(params, d):
                p.add_(best * x)
        return loss.detach()

    def curvature(self, batch: Batch, g: list, d: list) -> dict:
        """Of K-FAC's direction d for the gradient g: the worst condition number of the policy's factors, and
        of the critic's before its steps; for at most 2,000 parameters, and with damping, also the cosine of
        d, and of g itself, with the exact natural gradient at the same l, in the Fisher inner product
        <x, y> = x^T F y. (Split over the factors l adds cross terms: below 1 even where S (x) A is F.)"""
        out = {"policy_condition": self.policy_factors.condition()}
        if self.args.critic_solver == "kfac":
            out["critic_condition"] = self.critic_factors.condition()
        if len(flat(g)) > 2000 or self.args.damping == 0:  # F alone is singular for a softmax
            return out
        best, F_of = self.exact(batch, g), lambda x: flat(fisher_product(self.agent, batch.obs, x))
        for name, x in (("kfac", d), ("gradient", g)):
            norms = (flat(x) @ F_of(x)) * (flat(best) @ F_of(best))
            out[f"fisher_cosine_{name}"] = float(flat(x) @ F_of(best) / norms.clamp(min=1e-30).sqrt())
        return out

    def checkpoint(self) -> dict:
        damping = [self.policy_factors.damping, self.critic_factors.damping]
        optim = {k: o.state_dict() for k, o in self.optim.items()}
        return {"networks": self.state_dict(), "optim": optim, "damping": damping}

    def restore(self, saved: dict):
        self.load_state_dict(saved["networks"])
        self.policy_factors.damping, self.critic_factors.damping = saved["damping"]
        for name, optim in self.optim.items():
            load_optimizer(optim, saved["optim"][name])


def make_train_envs(args: Args):
    envs = make_envs(args.env_id, args.num_envs)
    act, obs = envs.single_action_space, envs.single_observation_space
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1:
        fail(f"--env-id {args.env_id}: observations are {obs}, expected a Box of one dimension")
    discrete, box = (isinstance(act, kind) for kind in (gym.spaces.Discrete, gym.spaces.Box))
    if not discrete and not (box and len(act.shape) == 1):
        fail(f"--env-id {args.env_id}: actions are {act}, expected Discrete or a Box of one dimension")
    only_if(args, not discrete, "with discrete actions", "log_std_init")
    return envs


# ------------------------------------------------------------------------------------------- training
LOSSES = ("policy_loss", "value_loss", "entropy", "explained_variance")


def tag(name: str) -> str:
    return ("losses/" if name in LOSSES else "diagnostics/") + name


def train(args: Args) -> dict:
    """Train as `args` says; returns what summary.json holds."""
    check(args)
    device, saved = set_up(args), find_checkpoint(args)
    if saved and (past := finished(saved, "global_step", args.total_timesteps)):
        return past
    envs = make_train_envs(args)
    eval_envs = make_envs(args.env_id, args.eval_episodes) if args.eval_episodes else None
    learner = Learner(envs.single_observation_space, envs.single_action_space, args, device)
    row = envs.single_observation_space.shape[0] + 4 * args.width * args.depth
    reserve(16 * args.num_envs * args.num_steps * row, "rollout and update, roughly", device)
    if args.solver == "exact":  # Jacobians and their products with the metric; F and its factors
        agent = learner.agent
        n, outputs = len(flat(agent.policy_parameters())), agent.actor.layers[-1].out_features
        size = 4 * (2 * args.num_envs * args.num_steps * outputs * n + 4 * n**2)
        reserve(size, "exact Fisher matrix, roughly", device)
    player, step, episodes, returns, info = Player(envs, args.seed), 0, [], np.full(1, math.nan), {}
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
            rollout, ended = player.collect(learner, args)
            before, step = step, step + int(rollout.valid.sum())
            every = lambda n: n > 0 and step // n > before // n  # noqa: B023
            diagnosing, logging = every(args.diagnostics_frequency), every(args.log_frequency)
            info = learner.update(rollout, diagnosing)
            check_finite(step, info | dict(learner.named_parameters()))  # before NaN is sampled from
            if args.normalize_obs:
                learner.obs_stats.update(rollout.raw_obs)

            scoring = eval_envs and (every(args.eval_frequency) or step >= args.total_timesteps)
            episodes = [*episodes, *ended][-100:]
            if ended:
                score, length = np.mean(ended, axis=0)  # of the episodes that ended in this rollout
                run.scalars({"charts/episodic_return": score, "charts/episodic_length": length}, step)
            if logging or diagnosing:
                run.scalars({tag(k): v for k, v in info.items()} | {"charts/SPS": progress.rate(step)}, step)
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
            progress.show(min(step, args.total_timesteps), recent | {"KL": info["kl"]})
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
