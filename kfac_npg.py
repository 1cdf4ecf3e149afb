r"""Natural policy gradient by K-FAC, by conjugate gradients (TRPO), or by the exact Fisher matrix.

A policy gradient g depends on how the policy is written down; the natural one, F^-1 g, does not. It
is the steepest ascent where distance is the change of the distribution: KL = x^T F x / 2 for a
small step x (TRPO, arXiv 1502.05477).

  F = E_s E_{a~pi} [ grad log pi(a|s) grad log pi(a|s)^T ]                   the Fisher matrix
  max g^T x  s.t.  x^T F x / 2 <= delta   =>   x = sqrt(2 delta / d^T F d) d,   d = F^-1 g

Solvers differ in how well d solves F d = g. The squared length d^T F d is exact for all of them
(one forward-mode product), so that each step has a KL of delta to second order, also where d is
only approximate.

F has a row for each parameter, 4,610 for a small policy here. K-FAC (arXiv 1503.05671; for
policies ACKTR, arXiv 1708.05144) writes it in small factors. For a layer z = W h, h with a 1
appended for the bias, let e = grad_z log pi in each row, G the part of g that is shaped like W, and
(x) the Kronecker product:

  grad_W log pi = e h^T,    vec(e h^T) = e (x) h          (row-major, as torch flattens W)
  F_W = E[ e e^T (x) h h^T ]  ~  E[e e^T] (x) E[h h^T] = S (x) A
  (S (x) A)^-1 vec(G) = vec( S^-1 G A^-1 )

Two approximations: no terms between layers, and a product's expectation is the product of the
expectations. All solvers damp, (F + l I) d = g; K-FAC splits l over its factors. The critic's F is
the Gauss-Newton matrix, e = dV/dz: nothing is sampled. The log-deviations of a Gaussian policy are
no layer: their Fisher matrix is 2 I exactly.

  symbol      in the code                  shape
  h, z        a layer's input, output      (B, in), (B, out)
  A, S        buffers of KFAC              (in + 1, in + 1), (out, out)
  g, d        g, d                         lists, shaped like the parameters
  delta, l    --max-kl, --damping          scalars

K-FAC; TRPO; the exact F; the plain gradient by Adam, an actor-critic; K-FAC's direction beside
the exact one (`diagnostics/fisher_cosine_kfac`, at most 2,000 parameters); MuJoCo:
  python kfac_npg.py
  python kfac_npg.py --solver cg --line-search --damping 0.1
  python kfac_npg.py --solver exact --width 16
  python kfac_npg.py --solver none --num-envs 8 --num-steps 16 --learning-rate 1e-3
  python kfac_npg.py --width 16
  python kfac_npg.py --env HalfCheetah-v5 --total-timesteps 1_000_000 --num-envs 1 \
      --num-steps 2048 --normalize-obs --normalize-reward

While it trains, `eval/episodic_return` should rise and `diagnostics/kl` stay near --max-kl. What
the factors alone say, `kl_kfac`, can be several times smaller: they leave out what the layers do
together. Networks to Learner are the algorithm, train() is the loop; the blocks marked "shared" can
wait. Known limits: observation vectors, Box or Discrete actions. Left out on purpose: convolutions
(KFC), momentum, EKFAC, several epochs on a rollout (ppo.py).
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
import warnings
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
    seed: int = 1  # seeds networks, actions and environments
    cuda: bool = True  # use the GPU if there is one
    threads: int = 1  # CPU threads of PyTorch (0: all cores; slow where something else runs too)
    track: bool = False  # log to Weights & Biases as well (needs `pip install wandb`)
    wandb_project_name: str = "offline-rl"  # project of --track
    wandb_entity: str | None = None  # team of --track
    # Gymnasium environment, `module:Id` where a package has to be imported for it
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "CartPole-v1"
    run_dir: str = "runs"  # folder that holds the run folders
    resume: str | None = None  # run folder to go on from; its arguments hold unless given again
    checkpoint_frequency: int = 100_000  # environment steps between checkpoints (0: at the end)
    eval_frequency: int = 50_000  # steps between evaluations and diagnostics (0: at the end)
    eval_episodes: int = 10  # episodes of each evaluation (0: diagnostics only)
    log_frequency: int = 5_000  # environment steps between logged losses

    # length and data
    total_timesteps: int = 200_000  # environment steps
    num_envs: int = 4  # N, environments stepped together
    num_steps: int = 512  # T, steps of each environment for one policy step
    normalize_obs: bool = False  # running standardisation of observations (MuJoCo: on)
    # rewards divided by the running deviation of their discounted sum so far (MuJoCo: on)
    normalize_reward: bool = False

    # policy
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of the advantage estimate
    ent_coef: float = 0.0  # weight of an entropy bonus
    # of F d = g. kfac: Kronecker factors; cg: conjugate gradients; exact: dense F; none: Adam on g
    solver: Literal["kfac", "cg", "exact", "none"] = "kfac"
    max_kl: float = 0.01  # delta, trust region of a policy step (ACKTR: 0.0005 to 0.002)
    line_search: bool = False  # shorten the step until the surrogate gains and the KL holds (TRPO)
    damping: float = 0.01  # l, split over the factors by kfac, F + l I for cg and exact (TRPO: 0.1)
    cg_steps: int = 10  # steps of conjugate gradients
    learning_rate: float = 3e-4  # of Adam, with --solver none

    # K-FAC and the critic
    stats_decay: float = 0.95  # of the factors' running average, at each step on them
    critic_updates: int = 20  # Gauss-Newton steps by K-FAC on the value of each rollout
    critic_damping: float = 0.1  # l of the critic's factors

    # networks
    width: int = 64  # units in a hidden layer
    depth: int = 2  # hidden layers, tanh (0: linear)
    log_std_init: float = 0.0  # of a continuous policy at the start; the action box is [-1, 1]


# a resumed run must have these as before: its networks and environments would not fit
FIXED = "env_id seed num_envs normalize_obs normalize_reward width depth log_std_init".split()


def check(args: Args):
    """Refuse what no run could use, before anything starts."""
    check_numbers(args, "seed eval_frequency checkpoint_frequency", 0, 1e12)
    check_numbers(args, "ent_coef damping critic_damping", 0, 1e12)
    check_numbers(args, "max_kl learning_rate", 1e-12, 1e12)
    check_numbers(args, "total_timesteps log_frequency num_envs num_steps", 1, 1e12)
    check_numbers(args, "width critic_updates cg_steps", 1, 1e12)
    check_numbers(args, "threads eval_episodes depth", 0, 1e4)
    check_numbers(args, "stats_decay", 0, 0.99999)
    check_numbers(args, "gamma gae_lambda", 0, 1)
    if args.num_envs * args.num_steps == 1:
        fail("--num-steps 1 --num-envs 1: one advantage alone has no standard deviation")
    check_numbers(args, "log_std_init", -20, 20)
    plain, solver = args.solver == "none", f"with --solver {args.solver}"
    check_effect(args, "learning_rate", plain, f"{solver}, whose step --max-kl sets")
    natural = f"{solver}, whose step --learning-rate sets"
    check_effect(args, "max_kl line_search damping", not plain, natural)
    check_effect(args, "cg_steps", args.solver == "cg", solver)
    if args.solver == "exact" and args.damping == 0:
        fail("--solver exact needs --damping above 0: the Fisher matrix of a softmax is singular")


# --------------------------------------------------------------------------------------- networks
def layer_init(layer, gain: float = 2**0.5):
    """Orthogonal weights, zero bias."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(fan_in: int, hidden: list[int], fan_out: int, gain: float) -> nn.Sequential:
    """Hidden layers with tanh; the last layer's gain is small for a policy, which then starts near
    uniform."""
    sizes = [fan_in, *hidden]
    layers = []
    for i, o in zip(sizes, hidden):
        layers += [layer_init(nn.Linear(i, o)), nn.Tanh()]
    return nn.Sequential(*layers, layer_init(nn.Linear(sizes[-1], fan_out), gain))


class Agent(nn.Module):
    """Policy and value, apart. `head` is what the policy's last layer says: logits (B, actions) of
    a categorical, or the mean (B, d) of a Gaussian of independent dimensions whose log_std is a
    parameter. A Box of actions is [-1, 1] here."""

    def __init__(self, obs_space, act_space, args: Args):
        super().__init__()
        self.discrete = isinstance(act_space, gym.spaces.Discrete)
        outputs = int(act_space.n) if self.discrete else act_space.shape[0]
        fan_in, hidden = obs_space.shape[0], [args.width] * args.depth
        self.actor = mlp(fan_in, hidden, outputs, 0.01)
        self.critic = mlp(fan_in, hidden, 1, 1.0)
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

    def features(self, obs) -> dict:
        """What the last layers of policy and value read, (B, D) each, for the diagnostics."""
        return {"policy": self.actor[:-1](obs), "value": self.critic[:-1](obs)}

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

    def kl(self, head, log_std, new_head):
        """KL(old || now), (B,), of an old head and log_std (None if discrete); now is new_head and
        this agent's log_std."""
        if self.discrete:
            logp, new = F.log_softmax(head, -1), F.log_softmax(new_head, -1)
            return (logp.exp() * (logp - new)).sum(-1)
        variance = torch.exp(2 * log_std) + (head - new_head) ** 2
        return (self.log_std - log_std + variance / (2 * torch.exp(2 * self.log_std)) - 0.5).sum(-1)


# --------------------------------------------------------------------- the Fisher matrix, exactly
# F = E_s[ J^T M J ], J the Jacobian of the head, M the Fisher matrix of the head itself. Directions
# d are lists like the policy's parameters.
def metric(agent: Agent, head, t):
    """M t for each state, t (B, outputs): M is I / sigma^2 for a Gaussian's mean, diag(p) - p p^T
    for logits."""
    if not agent.discrete:
        return t / torch.exp(2 * agent.log_std)
    p = F.softmax(head, -1)
    return p * (t - (p * t).sum(-1, keepdim=True))


def tangent(net: nn.Module, obs, d: list) -> tuple:
    """net(obs) and J d, its derivative along d by forward-mode differentiation; each (B, outputs).
    What d holds beyond the network's parameters, a log_std, is left out."""
    params = dict(net.named_parameters())
    return torch.func.jvp(
        lambda p: torch.func.functional_call(net, p, (obs,)), (params,), (dict(zip(params, d)),)
    )


@torch.no_grad()
def quadratic(agent: Agent, obs, d: list):
    """d^T F d, exactly: E_s[ (J d)^T M (J d) ] + 2 |d_log_std|^2."""
    head, t = tangent(agent.actor, obs, d)
    log_std_part = 0 if agent.discrete else 2 * (d[-1] ** 2).sum()
    return (t * metric(agent, head, t)).sum(-1).mean() + log_std_part


@torch.no_grad()
def fisher_product(agent: Agent, obs, d: list, damping: float = 0.0) -> list:
    """(F + l I) d: forward through the network, the metric at its head, and back."""
    head, t = tangent(agent.actor, obs, d)
    weight = metric(agent, head, t) / len(obs)
    with torch.enable_grad():
        weighted = (agent.actor(obs) * weight).sum()
    Fd = [*torch.autograd.grad(weighted, list(agent.actor.parameters()))]
    Fd += [] if agent.discrete else [2 * d[-1]]
    return [x + damping * y for x, y in zip(Fd, d)]


@torch.no_grad()
def dense_fisher(agent: Agent, obs):
    """F (n, n) from the Jacobian of each state's head. For small networks."""
    jacobian = torch.func.jacrev(lambda p, x: torch.func.functional_call(agent.actor, p, (x,)))
    parts = torch.func.vmap(jacobian, (None, 0))(dict(agent.actor.named_parameters()), obs)
    J = torch.cat([j.flatten(2) for j in parts.values()], 2)  # (B, outputs, n)
    MJ = metric(agent, agent.actor(obs)[:, None], J.transpose(1, 2))  # (B, n, outputs)
    fisher = torch.einsum("boi,bjo->ij", J, MJ) / len(obs)
    if agent.discrete:
        return fisher
    return torch.block_diag(fisher, torch.diag(torch.full_like(agent.log_std, 2)))


def flat(d: list):
    return torch.cat([x.reshape(-1) for x in d])


def unflat(v, like: list) -> list:
    return [x.view_as(p) for x, p in zip(v.split([p.numel() for p in like]), like)]


def conjugate_gradients(product, g: list, steps: int) -> list:
    """Approximates d with product(d) = g, from d = 0; residual r = g - product(d), search
    direction p."""
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


# ------------------------------------------------------------------------------------------ K-FAC
class KFAC(nn.Module):
    """The factors A and S of a network's linear layers, their running averages, and (S (x) A)^-1.

    Needs PyTorch alone. `net` is an nn.Sequential of nn.Linear layers, with bias or without, and of
    activations, in place or not; x are rows (B, in); fp32 without tf32.

      out = kfac.record(net, x)
      g = torch.autograd.grad(loss(out), list(net.parameters()), retain_graph=True)
      kfac.update(log_prob(out, sampled).sum())
      d = kfac.solve(g)"""

    def __init__(self, net: nn.Sequential, damping: float, decay: float):
        super().__init__()
        parts = net if isinstance(net, nn.Sequential) else []
        self.layers = [m for m in parts if isinstance(m, nn.Linear)]
        covered = [id(p) for m in self.layers for p in m.parameters()]
        if covered != [id(p) for p in net.parameters()]:
            raise ValueError("K-FAC: expected an nn.Sequential with no parameters but nn.Linear's")
        self.least_damping = self.damping = damping
        self.decay = decay
        for i, m in enumerate(self.layers):
            inputs, outputs = m.in_features + (m.bias is not None), m.out_features
            self.register_buffer(f"A{i}", m.weight.new_zeros(inputs, inputs))
            self.register_buffer(f"S{i}", m.weight.new_zeros(outputs, outputs))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def factors(self) -> list:
        """(A, S) of each layer."""
        return [(getattr(self, f"A{i}"), getattr(self, f"S{i}")) for i in range(len(self.layers))]

    def record(self, net: nn.Sequential, x):
        """net(x), with a note of each layer's A on the way, and of where its z is in the graph:
        z itself may be overwritten by an activation in place."""
        self.notes = []
        for m in net:
            h, x = x.detach(), m(x)
            if isinstance(m, nn.Linear):
                if m.bias is not None:
                    h = nn.functional.pad(h, (0, 1), value=1.0)  # homogeneous coordinates
                edge = torch.autograd.graph.get_gradient_edge(x)
                self.notes.append((h.T @ h / len(h), edge))
        return x

    @torch.no_grad()
    def update(self, scalar):
        """Merge the recorded pass's factors, the k-th with weight max(1 / k, 1 - decay). Frees the
        graph: take other gradients before.

        e = grad_z of each row's own term of `scalar`, a sum over rows, not a mean. For a policy it
        is the sum of log pi of sampled actions; for a squared error of one output, as V, v.sum();
        of several outputs it would be (out * torch.randn_like(out)).sum()."""
        self.count += 1
        weight = 1 - min(1 - 1 / int(self.count), self.decay)
        slopes = torch.autograd.grad(scalar, [edge for _, edge in self.notes])
        for (A, S), (new_A, _), e in zip(self.factors(), self.notes, slopes):
            A.lerp_(new_A, weight)
            S.lerp_(e.T @ e / len(e), weight)
        self.notes = []
        self.damping = self.least_damping
        self.roots = self.factorise()

    def factorise(self) -> list:
        """Cholesky factors of A + w sqrt(l) I and S + sqrt(l) / w I of each layer, where
        w^2 = (tr A / dim A) / (tr S / dim S). If one is not positive definite in floating point, l
        is raised tenfold until the next update; if one is not finite, its directions are NaN."""
        roots = []
        for A, S in self.factors():
            mean_A, mean_S = ((x.trace() / len(x)).clamp(min=1e-30) for x in (A, S))
            w = (mean_A / mean_S).sqrt().clamp(1e-6, 1e6)
            roots.append([])
            for x, scale in ((A, w), (S, 1 / w)):
                eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
                root, bad = torch.linalg.cholesky_ex(x + scale * self.damping**0.5 * eye)
                if bad and x.isfinite().all() and math.isfinite(self.damping):
                    self.damping = max(10 * self.damping, 1e-8)
                    warnings.warn(f"K-FAC: damping raised to {self.damping:g}", stacklevel=2)
                    return self.factorise()
                roots[-1].append(root + 0 * x.sum())
        return roots

    def joined(self, tensors: list) -> list:
        """[W b] of each layer from a list like the parameters; what follows them is left out."""
        tensors, out = iter(tensors), []
        for m in self.layers:
            W = next(tensors)
            out.append(W if m.bias is None else torch.cat([W, next(tensors)[:, None]], 1))
        return out

    @torch.no_grad()
    def solve(self, gradients: list) -> list:
        """S^-1 G A^-1 of each layer's G = [G_W G_b], in a list like the parameters."""
        out = []
        for m, G, (LA, LS) in zip(self.layers, self.joined(gradients), self.roots):
            d = torch.cholesky_solve(torch.cholesky_solve(G, LS).T, LA).T
            out += [d] if m.bias is None else [d[:, :-1], d[:, -1]]
        return out

    @torch.no_grad()
    def quadratic(self, d: list):
        """d^T (S (x) A) d, the sum over layers of tr(D^T S D A): what the factors, undamped, say of
        d^T F d."""
        return sum((D * (S @ D @ A)).sum() for D, (A, S) in zip(self.joined(d), self.factors()))

    def condition(self) -> float:
        """The largest condition number of a damped factor."""
        values = [torch.linalg.svdvals(root) for pair in self.factorise() for root in pair]
        return max(float((s[0] / s[-1]) ** 2) for s in values)


# ---------------------------------------------------------------------------- loss and the update
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
    """Agent, running statistics, factors and optimiser."""

    def __init__(self, obs_space, act_space, args: Args, device):
        super().__init__()
        self.args, self.device = args, device
        self.agent = Agent(obs_space, act_space, args)
        self.obs_stats = RunningMeanStd(obs_space.shape) if args.normalize_obs else None
        self.return_stats = RunningMeanStd(()) if args.normalize_reward else None
        self.policy_factors = KFAC(self.agent.actor, args.damping, args.stats_decay)
        self.critic_factors = KFAC(self.agent.critic, args.critic_damping, args.stats_decay)
        self.to(device)
        params = self.agent.policy_parameters()
        self.optim = {"policy": torch.optim.Adam(params, lr=args.learning_rate, fused=True)}

    def standardised(self, obs):
        """Observations of an environment (numpy) as the networks see them, on the device."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return self.obs_stats.standardise(obs).clamp(-10, 10) if self.obs_stats else obs

    @torch.no_grad()
    def act(self, obs, explore: bool):
        """Actions for an environment's observations: a sample of pi, or its mode."""
        head = self.agent.policy(self.standardised(obs))
        return self.agent.sample(head) if explore else self.agent.mode(head)

    def update(self, rollout, diagnosing: bool) -> tuple[dict, dict]:
        """One policy step, then --critic-updates value steps, each on the whole rollout: losses,
        and what to watch. The observations' statistics take the rollout in last."""
        batch = self.batch_of(rollout)
        losses, numbers = self.policy_step(batch, diagnosing)
        for _ in range(self.args.critic_updates):
            losses["value_loss"] = self.critic_step(batch)
        unexplained = (batch.target - rollout.value.flatten()).var()
        losses["explained_variance"] = 1 - unexplained / batch.target.var().clamp(min=1e-8)
        if self.args.normalize_obs:
            self.obs_stats.update(torch.from_numpy(np.concatenate(rollout.raw_obs)))
        return losses, numbers

    @torch.no_grad()
    def batch_of(self, rollout) -> Batch:
        args, value, over = self.args, rollout.value, rollout.terminated | rollout.truncated
        advantage = gae(rollout.rew, value, rollout.next_value, over, args.gamma, args.gae_lambda)
        target = advantage + value
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        columns = (rollout.act, rollout.logp, advantage, target)
        obs = rollout.states[: target.numel()]
        return Batch(obs, *(x.flatten(0, 1) for x in columns))

    def policy_step(self, batch: Batch, diagnosing: bool) -> tuple[dict, dict]:
        """theta <- theta + sqrt(2 delta / d^T F d) d, d ~ F^-1 g; with --solver none Adam on g."""
        args, agent, params = self.args, self.agent, self.agent.policy_parameters()
        objective = surrogate(agent, batch, args)
        g = torch.autograd.grad(objective, params)
        with torch.no_grad():
            head, old = agent.actor(batch.obs), [p.clone() for p in params]
            losses = {"entropy": agent.entropy(head).mean()}
        numbers = {"grad_norm": flat(g).norm()}

        @torch.no_grad()
        def moved() -> dict:
            """KL from the old policy, and what the surrogate has gained."""
            kl = agent.kl(head, None if agent.discrete else old[-1], agent.actor(batch.obs))
            return {"kl": kl.mean(), "gain": surrogate(agent, batch, args) - objective}

        if args.solver == "none":
            for p, x in zip(params, g):
                p.grad = -x  # Adam minimises
            self.optim["policy"].step()
            return losses, numbers | moved()
        d = self.natural(batch, g)
        if diagnosing and args.solver == "kfac":
            numbers |= self.curvature(batch, g, d)
        dFd = quadratic(agent, batch.obs, d)
        full = (2 * args.max_kl / dFd.clamp(min=1e-30)).sqrt()
        # the full step lands just above or below max_kl, so that one back is common; the last is 0
        for backtracks in range(16 if args.line_search else 1):
            scale = full * 0.8**backtracks if backtracks < 15 else 0 * full
            with torch.no_grad():
                for p, p_old, x in zip(params, old, d):
                    p.copy_(p_old + scale * x)
            step = moved()
            if step["kl"] <= args.max_kl and step["gain"] > 0:
                break
        numbers |= step | {"step_scale": scale, "backtracks": backtracks}
        numbers["kl_predicted"] = 0.5 * scale**2 * dFd
        numbers["gain_predicted"] = scale * flat(g) @ flat(d)
        if args.solver == "kfac":
            log_std_part = 0 if agent.discrete else 2 * (d[-1] ** 2).sum()
            own = self.policy_factors.quadratic(d) + log_std_part
            numbers |= {"kl_kfac": 0.5 * scale**2 * own, "damping": self.policy_factors.damping}
        return losses, numbers

    def natural(self, batch: Batch, g: list) -> list:
        """d = (F + l I)^-1 g by the solver asked for."""
        args, agent, factors = self.args, self.agent, self.policy_factors
        if args.solver == "cg":
            return conjugate_gradients(
                lambda d: fisher_product(agent, batch.obs, d, args.damping), g, args.cg_steps
            )
        if args.solver == "exact":
            return self.exact(batch, g)
        head = factors.record(agent.actor, batch.obs)
        # Actions of the policy itself, drawn anew: weighted by the advantages of those taken, as is
        # often done, it would not be the Fisher matrix.
        factors.update(agent.log_prob(head, agent.sample(head.detach())).sum())
        return factors.solve(g) + ([] if agent.discrete else [g[-1] / (2 + args.damping)])

    def exact(self, batch: Batch, g: list) -> list:
        damped = dense_fisher(self.agent, batch.obs)
        damped.diagonal().add_(self.args.damping)
        return unflat(torch.linalg.solve(damped, flat(g)), g)

    def critic_step(self, batch: Batch):
        """One step on (V - target)^2 / 2. Along K-FAC's direction d, V moves by J d; the best
        multiple is that of the Gauss-Newton model, -<V - target, J d> / |J d|^2: no learning
        rate."""
        critic, factors = self.agent.critic, self.critic_factors
        v = factors.record(critic, batch.obs)[:, 0]
        error = v - batch.target
        loss = 0.5 * (error**2).mean()
        g = torch.autograd.grad(loss, list(critic.parameters()), retain_graph=True)
        factors.update(v.sum())  # e = dV/dz
        d = factors.solve(g)
        with torch.no_grad():
            Jd = tangent(critic, batch.obs, d)[1][:, 0]
            best = (error @ Jd) / (Jd @ Jd).clamp(min=1e-30)
            for p, x in zip(critic.parameters(), d):
                p.sub_(best * x)
        return loss.detach()

    def curvature(self, batch: Batch, g: list, d: list) -> dict:
        """Worst condition numbers of the policy's damped factors, and of the critic's before its
        steps. For at most 2,000 parameters, and with damping, also the cosine of K-FAC's d, and of
        g itself, with the exact natural gradient at the same l, in the Fisher inner product
        <x, y> = x^T F y. (Split over the factors l adds cross terms: below 1 even where S (x) A is
        F.)"""
        agent, obs = self.agent, batch.obs
        out = {"policy_condition": self.policy_factors.condition()}
        out["critic_condition"] = self.critic_factors.condition()
        if len(flat(g)) <= 2000 and self.args.damping > 0:  # F alone is singular for a softmax
            best = self.exact(batch, g)
            F_best = flat(fisher_product(agent, obs, best))
            for name, x in (("kfac", d), ("gradient", g)):
                norms = quadratic(agent, obs, x) * quadratic(agent, obs, best)
                out["fisher_cosine_" + name] = flat(x) @ F_best / norms.clamp(min=1e-30).sqrt()
        return out


# --------------------------------------------------------------------------------------- training
def check_spaces(envs, args: Args, device):
    """Refuse what the networks cannot read or write, and rollouts beyond the memory."""
    obs, act = envs.single_observation_space, envs.single_action_space
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1:
        fail(f"--env-id {args.env_id}: observations are {obs}, expected vectors")
    discrete = isinstance(act, gym.spaces.Discrete)
    check_effect(args, "log_std_init", not discrete, "with discrete actions")
    if not discrete:
        check_boxes(envs, args.env_id)
    row = 16 * (obs.shape[0] + 4 * args.width * args.depth)
    reserve(args.num_envs * args.num_steps * row, "rollout and update, roughly", device)


def train(args: Args) -> dict:
    """Train as `args` says; returns what summary.json holds."""
    check(args)
    device = set_up(args)
    with Run(args, args.total_timesteps) as run:
        envs = make_envs(args.env_id, args.num_envs, run)
        eval_envs = make_envs(args.env_id, args.eval_episodes, run)
        check_spaces(envs, args, device)
        learner = Learner(envs.single_observation_space, envs.single_action_space, args, device)
        if args.solver == "exact":  # Jacobians, their products with the metric; F and its factors
            n = len(flat(learner.agent.policy_parameters()))
            rows = args.num_envs * args.num_steps * learner.agent.actor[-1].out_features
            reserve(8 * rows * n + 16 * n**2, "exact Fisher matrix, roughly", device)
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
            rollout, ended = collector.collect(learner)
            before, step = step, step + args.num_envs * args.num_steps
            evaluating = every(args.eval_frequency, before, step) or step >= args.total_timesteps
            losses, numbers = learner.update(rollout, diagnosing=evaluating)

            if ended:  # means of the episodes that ended in this rollout
                last_return, length = np.mean(ended, axis=0).tolist()
                run.log(step, {"charts/episodic_return": last_return})
                run.log(step, {"charts/episodic_length": length})
            if every(args.log_frequency, before, step) or evaluating:
                run.log(step, {"losses/" + name: x for name, x in losses.items()})
                run.log(step, {"diagnostics/" + name: x for name, x in numbers.items()})
                run.log(step, {"charts/SPS": run.rate(step)})
                done = min(step, args.total_timesteps)
                run.show(done, KL=numbers["kl"], last_return=last_return)
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
