"""cql_atari.py: losses, targets and networks against loops and a plain implementation; a chain solved by
dynamic programming; stacks against a recording; Dopamine's files written as its replay buffer writes them;
collection against the environment played again; several processes against one; the promises; commands.

Where processes are needed, one server imports the script and each process is a fork of it.
"""

import gzip
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import cql_atari as c
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import (
    ROOT,
    assert_same_checkpoint,
    flatten,
    metrics,
    one_thread,
    only_run,
    summary,
)

CPU = torch.device("cpu")
HEADS = ("c51", "qr", "dqn", "rem")


class Catch(gym.Env):
    """A ball falls through 9 x 9 cells of 4 pixels; each of 8 steps pays 1 where the paddle is below it."""

    action_space = gym.spaces.Discrete(3)
    observation_space = gym.spaces.Box(0, 255, (36, 36), np.uint8)

    def picture(self):
        cells = np.zeros((9, 9), np.uint8)
        cells[self.row, self.ball], cells[8, self.paddle] = 255, 128
        return cells.repeat(4, 0).repeat(4, 1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.ball, self.paddle = 0, int(self.np_random.integers(9)), 4
        return self.picture(), {}

    def step(self, action):
        self.row, self.paddle = self.row + 1, min(8, max(0, self.paddle + int(action) - 1))
        over = self.row == 8
        return self.picture(), float(self.ball == self.paddle), over, False, {}


gym.register("Catch-v0", Catch, max_episode_steps=100)
gym.register("ShortCatch-v0", Catch, max_episode_steps=5)
gym.register(
    "OtherCartPole-v0", "gymnasium.envs.classic_control.cartpole:CartPoleEnv", max_episode_steps=30
)


@pytest.fixture(scope="module", autouse=True)
def large_blocks_are_kept():
    """What a run does at its start; without it the 200 x 200 quantile pairs are mapped anew each time."""
    c.set_up(c.Args(cuda=False))


def tiny(**changes) -> c.Args:
    return c.Args(
        **dict(env_id=("CartPole-v1",), holdout=0.0, width=2, n_step=1, cuda=False) | changes
    )


def refused(call, capsys, *named, status=2):
    """One line on stderr that names what is wrong."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    err = capsys.readouterr().err
    assert stop.value.code == status and re.fullmatch(r"error: .*\n", err), err
    for x in named:
        assert str(x) in err, err
    return err


# ------------------------------------------------------------------------------ losses against slow loops
def projected(z, p, rew, discount):
    """Algorithm 1 of arXiv 1707.06887, one atom at a time."""
    low, high, gap, m = z[0], z[-1], z[1] - z[0], [0.0] * len(z)
    for j in range(len(z)):
        b = (min(high, max(low, rew + discount * z[j])) - low) / gap
        b = round(b) if abs(b - round(b)) < 1e-9 else b
        lower, upper = math.floor(b), math.ceil(b)
        if lower == upper:
            m[lower] += p[j]
        else:
            m[lower] += p[j] * (upper - b)
            m[upper] += p[j] * (b - lower)
    return m


def test_projection_against_the_loop():
    z = torch.linspace(-2, 3, 51, dtype=torch.float64)
    p = torch.softmax(3 * torch.randn(200, 51, dtype=torch.float64), 1)
    rew, discount = torch.randn(200).double() * 3, torch.rand(200).double()
    rew[:20], discount[:20] = (torch.arange(20) - 10) * 0.1, 1.0  # on atoms, and across both edges
    discount[20:60] = 0.0  # terminal
    rew[20:30] = 0.05 * torch.arange(10)  # halfway between atoms and on them
    rew[60:65], rew[65:70] = 50.0, -50.0
    found = c.project(z, p, rew, discount)
    expected = [
        projected(z.tolist(), p[i].tolist(), rew[i].item(), discount[i].item())
        for i in range(len(p))
    ]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(found.sum(1), torch.ones(200).double())
    assert (found[60:65, -1] - 1).abs().max() < 1e-12 and (found[65:70, 0] - 1).abs().max() < 1e-12


def test_projection_by_hand():
    z, p = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([[0.5, 0.25, 0.25]])
    for rew, discount, expected in [
        (0.0, 1.0, [0.5, 0.25, 0.25]),
        (0.5, 0.0, [0.0, 0.5, 0.5]),
        (1.0, 1.0, [0.0, 0.5, 0.5]),
        (-0.25, 0.5, [0.4375, 0.5, 0.0625]),  # lands on -0.75, -0.25, 0.25
        (9.0, 0.9, [0.0, 0.0, 1.0]),
    ]:
        found = c.project(z, p, torch.tensor([rew]), torch.tensor([discount]))
        torch.testing.assert_close(found[0], torch.tensor(expected))


def huber(u: float) -> float:
    return 0.5 * u * u if abs(u) <= 1 else abs(u) - 0.5


def quantile_loss(theta: list, y: list) -> float:
    total = 0.0
    for i, t in enumerate(theta):
        for x in y:
            u = x - t
            total += abs((i + 0.5) / len(theta) - (1.0 if u < 0 else 0.0)) * huber(u) / len(y)
    return total


@pytest.mark.parametrize("K, M", [(1, 1), (5, 5), (7, 3), (20, 1)])
def test_quantile_huber_against_the_loop(K, M):
    theta, y = 2 * torch.randn(6, K), 2 * torch.randn(6, M)
    expected = [quantile_loss(a.tolist(), b.tolist()) for a, b in zip(theta, y)]
    torch.testing.assert_close(c.quantile_huber(theta, y), torch.tensor(expected))


def test_quantiles_minimise_the_loss():
    """Of samples far apart (where Huber is absolute), theta ends near the quantiles (i + 1/2) / K."""
    y = 1_000 * torch.randn(1, 801)
    theta = torch.zeros(1, 5, requires_grad=True)
    optim = torch.optim.Adam([theta], lr=30)
    for step in range(600):
        optim.param_groups[0]["lr"] = 30 * (1 - step / 600)
        optim.zero_grad()
        c.quantile_huber(theta, y).sum().backward()
        optim.step()
    expected = torch.quantile(y[0], torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    torch.testing.assert_close(theta.detach()[0], expected, atol=20, rtol=0)


def test_conservative_term_against_the_loop():
    q, act = 3 * torch.randn(9, 4), torch.randint(4, (9,))
    q[0] = torch.tensor([500.0, -500.0, 499.0, 0.0])  # no overflow
    for found, row, a in zip(c.cql_term(q, act), q.tolist(), act.tolist()):
        top = max(row)
        expected = top + math.log(sum(math.exp(x - top) for x in row)) - row[a]
        assert abs(found.item() - expected) < 1e-4
    uniform = c.cql_term(torch.full((2, 6), 3.0), torch.tensor([0, 5]))
    torch.testing.assert_close(uniform, torch.full((2,), math.log(6)))


def plain_loss(net, target, batches, mixture, args):
    """The objective by its words, row by row; targets are plain floats, so that no gradient can pass."""
    td, conservative, dots = [], [], []

    def values(out):  # (A, K) -> Q of each action
        if args.head == "c51":
            p = out.exp() / out.exp().sum(1, keepdim=True)
            return (p * net.z).sum(1)
        return out.sum(1) / out.shape[1]

    for g, batch in enumerate(batches):
        for i in range(len(batch.act)):
            a, r, discount = batch.act[i].item(), batch.rew[i].item(), batch.discount[i].item()
            out = net.heads[g](net.features(batch.obs[i : i + 1]))[0]
            phi_next = net.features(batch.next_obs[i : i + 1])
            following = target.heads[g](target.features(batch.next_obs[i : i + 1]))[0].detach()
            chooser = net.heads[g](phi_next)[0].detach() if args.double else following
            if args.head == "rem":
                score = [
                    sum(w * x for w, x in zip(mixture.tolist(), row)) for row in chooser.tolist()
                ]
            else:
                score = values(chooser).tolist()
            best = score.index(max(score))
            if args.head == "c51":
                p = torch.softmax(following[best], 0).tolist()
                y = projected(np.linspace(args.v_min, args.v_max, 51).tolist(), p, r, discount)
                logits = out[a] - out[a].exp().sum().log()
                td.append(-sum(w * x for w, x in zip(y, logits)))
            elif args.head == "qr":
                y = [r + discount * x for x in following[best].tolist()]
                terms = []
                for k, theta in enumerate(out[a]):
                    tau = (k + 0.5) / len(out[a])
                    u = torch.tensor(y) - theta
                    h = torch.where(u.abs() <= 1, 0.5 * u**2, u.abs() - 0.5)
                    terms.append((torch.where(u < 0, 1 - tau, tau) * h).mean())
                td.append(sum(terms))
            else:
                weights = mixture if args.head == "rem" else torch.ones(1)
                u = (
                    r
                    + discount * (following[best] * weights).sum().item()
                    - (out[a] * weights).sum()
                )
                td.append(0.5 * u**2 if u.abs() <= 1 else u.abs() - 0.5)
            q = values(out)
            conservative.append(q.exp().sum().log() - q[a])
            dots.append((net.features(batch.obs[i : i + 1]) * phi_next).sum() * (discount > 0))
    mean = lambda x: sum(x) / len(x)
    return mean(td) + args.cql_alpha * mean(conservative) + args.dr3_coef * mean(dots)


def random_batch(n: int, actions: int) -> c.Batch:
    discount = torch.where(torch.rand(n) < 0.3, 0.0, 0.97)
    return c.Batch(
        torch.randn(n, 5),
        torch.randint(actions, (n,)),
        2 * torch.randn(n),
        torch.randn(n, 5),
        discount,
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("double", [False, True])
def test_loss_and_gradient_are_those_of_the_plain_implementation(head, double):
    """Two games of different action sets; gradients equal those worked out game by game, row by row."""
    args = tiny(head=head, double=double, cql_alpha=0.7, dr3_coef=0.05, v_min=-3.0, v_max=3.0)
    learner = c.Learner((5,), [3, 4], args, CPU)
    for p in learner.parameters():
        p.data += 0.3 * torch.randn_like(p)  # also the target: both disagree about a'
    batches = [random_batch(6, 3), random_batch(6, 4)]
    mixture = torch.rand(learner.net.K)
    mixture /= mixture.sum()
    drawn = mixture if args.head == "rem" else None
    loss, info = c.q_loss(learner.net, learner.target, batches, drawn, args)
    loss.backward()
    found = [p.grad.clone() for p in learner.net.parameters()]
    learner.net.zero_grad()
    expected = plain_loss(learner.net, learner.target, batches, mixture, args)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=2e-4, rtol=1e-4)
    for x, p in zip(found, learner.net.parameters()):
        torch.testing.assert_close(x, p.grad, atol=2e-4, rtol=1e-3)
    assert all(p.grad is None for p in learner.target.parameters())
    total = info["td_loss"] + 0.7 * info["cql_loss"] + 0.05 * info["dr3_loss"]
    torch.testing.assert_close(info["loss"], total)


def test_the_logged_q_is_that_of_the_datas_actions_in_all_games():
    learner = c.Learner((5,), [3, 4], tiny(), CPU)
    batches = [random_batch(6, 3), random_batch(6, 4)]
    info = c.q_loss(learner.net, learner.target, batches, None, learner.args)[1]
    q = [learner.q(b.obs, g)[i, b.act[i]].item() for g, b in enumerate(batches) for i in range(6)]
    assert abs(info["q_values"].item() - np.mean(q)) < 1e-5


def test_the_two_choosers_differ():
    """Else the test above could not tell double from plain."""
    losses = []
    for double in (False, True):
        torch.manual_seed(3)
        args = tiny(head="dqn", double=double)
        learner = c.Learner((5,), [4], args, CPU)
        for p in learner.parameters():
            p.data += 0.3 * torch.randn_like(p)
        batch = random_batch(32, 4)
        losses.append(c.q_loss(learner.net, learner.target, [batch], None, args)[1]["td_loss"])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_rem_draws_a_new_convex_mixture_for_each_update():
    learner, seen = c.Learner((5,), [3], tiny(head="rem"), CPU), []
    real = learner.loss
    learner.loss = lambda net, target, batches, mixture, args: (
        seen.append(mixture) or real(net, target, batches, mixture, args)
    )
    for _ in range(3):
        learner.update([random_batch(4, 3)])
    for mixture in seen:
        assert mixture.shape == (200,) and (mixture >= 0).all() and abs(mixture.sum() - 1) < 1e-5
    assert not torch.equal(seen[0], seen[1])


def test_one_update_is_adam_on_the_gradient():
    args = tiny(head="dqn", learning_rate=1e-3)
    learner = c.Learner((5,), [3], args, CPU)
    batch, before = random_batch(8, 3), [p.detach().clone() for p in learner.net.parameters()]
    target = [p.clone() for p in learner.target.parameters()]
    learner.update([batch])
    for p, old in zip(learner.net.parameters(), before):  # first step: m = g, v = g^2
        torch.testing.assert_close(p, old - 1e-3 * p.grad / (p.grad.abs() + 0.01 / 32))
    assert all(torch.equal(p, old) for p, old in zip(learner.target.parameters(), target))
    learner.refresh_target()
    assert all(
        torch.equal(a, b) for a, b in zip(learner.target.parameters(), learner.net.parameters())
    )


# ------------------------------------------------------------------------------------------------ networks
def test_nature_sizes():
    """Without padding 84 -> 20 -> 9 -> 7; at width 32 the published 3,136 x 512 matrix."""
    net = c.Network((4, 84, 84), [6], tiny(width=32))
    shapes = [tuple(p.shape) for p in net.encoder.parameters() if p.ndim > 1]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136)]
    obs = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    sizes, x = [], obs / 255
    for layer in net.encoder:
        x = layer(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes[1::2][:3] == [(32, 20, 20), (64, 9, 9), (64, 7, 7)]
    torch.testing.assert_close(net.features(obs), x)
    assert net.heads[0](net.features(obs)).shape == (2, 6, 200)


def test_resnet_is_what_its_words_say():
    net = c.Network((4, 84, 84), [3], tiny(encoder="resnet", width=8))
    x, sizes = torch.rand(2, 4, 84, 84), []
    by_hand = x
    for layer in net.encoder:
        x = layer(x)
        sizes.append(tuple(x.shape[1:]))
        if isinstance(layer, c.Block):

            def norm(h, module):  # group norm by loops over 4 groups
                n, channels = h.shape[:2]
                groups = h.reshape(n, 4, -1)
                mean, var = (
                    groups.mean(2, keepdim=True),
                    groups.var(2, keepdim=True, unbiased=False),
                )
                h = ((groups - mean) / (var + 1e-5).sqrt()).reshape(h.shape)
                return h * module.weight[:, None, None] + module.bias[:, None, None]

            h = F.relu(norm(layer.conv1(by_hand), layer.norm1))
            by_hand = F.relu(norm(layer.conv2(h), layer.norm2) + layer.skip(by_hand))
        else:
            by_hand = layer(by_hand)
        torch.testing.assert_close(x, by_hand, atol=1e-4, rtol=1e-4)
    maps = [s for s in sizes if len(s) == 3]
    assert maps == [
        s for s in ((8, 42, 42), (8, 42, 42), (16, 21, 21), (32, 11, 11), (32, 6, 6)) for _ in "12"
    ]
    assert sizes[-3:] == [(160,), (128,), (128,)]


def test_spatial_embeddings_against_loops():
    layer, x = c.SpatialEmbeddings((3, 4, 2)), torch.randn(2, 3, 4, 2)
    found = layer(x)
    for b in range(2):
        expected = [
            sum(
                x[b, ch, i, j].item() * layer.maps[ch, i, j, f].item()
                for i in range(4)
                for j in range(2)
            )
            for ch in range(3)
            for f in range(5)
        ]
        torch.testing.assert_close(found[b], torch.tensor(expected))


def test_unit_norm_and_dropout():
    obs = torch.randn(50, 5)
    unit = c.Network((5,), [2], tiny(unit_norm=True))
    plain = c.Network((5,), [2], tiny())
    plain.load_state_dict(unit.state_dict())
    phi = plain.features(obs)
    torch.testing.assert_close(unit.features(obs), phi / phi.norm(dim=1, keepdim=True))
    learner = c.Learner((5,), [2], tiny(dropout=0.4, width=16), CPU)
    learner.net.train()
    full, dropped = learner.target.features(obs), learner.net.features(obs)
    assert torch.equal(full, learner.target.features(obs))  # off in the target
    kept, alive = dropped != 0, full != 0
    assert 0.55 < (kept & alive).sum() / alive.sum() < 0.65
    torch.testing.assert_close(dropped[kept], full[kept] / 0.6)
    learner.net.eval()
    torch.testing.assert_close(learner.net.features(obs), full)


def test_every_game_has_a_head_of_its_own_action_set():
    net = c.Network((5,), [2, 6, 3], tiny(head="c51"))
    assert [tuple(h(torch.zeros(1, net.heads[0][0].in_features)).shape) for h in net.heads] == [
        (1, 2, 51),
        (1, 6, 51),
        (1, 3, 51),
    ]
    q = net.q(net.heads[1](net.features(torch.randn(4, 5))))
    assert q.shape == (4, 6) and q.abs().max() < 1  # c51 starts near 0


def test_c51_starts_at_0_wherever_its_atoms_lie():
    """Of the atoms 0, 0.2 ... 10 a uniform start would have Q at 5."""
    net = c.Network((5,), [2], tiny(head="c51", v_min=0.0, v_max=10.0))
    assert net.q(net.heads[0](net.features(torch.zeros(1, 5)))).max() < 0.5


def test_a_spatial_embedding_starts_as_a_sum_of_variance_one():
    maps = c.SpatialEmbeddings((64, 6, 5)).maps
    assert maps.shape == (64, 6, 5, 5) and abs(maps.var() * 30 - 1) < 0.05


def test_vectors_are_standardised_over_all_games_and_in_both_networks():
    learner, scale = c.Learner((3,), [2, 2], tiny(), CPU), torch.tensor([1.0, 50.0, 0.0])
    games = [
        SimpleNamespace(frames=scale * torch.randn(n, 3) + shift)
        for n, shift in ((30, 7.0), (60, -4.0))
    ]
    x = np.concatenate([g.frames.numpy() for g in games]).astype(np.float64)
    learner.standardise(games)
    expected = torch.from_numpy((x - x.mean(0)) / (x.std(0, ddof=1) + 1e-3)).float()
    for net in (learner.net, learner.target):
        found = net.features(torch.from_numpy(x).float())
        torch.testing.assert_close(found, net.encoder(expected), atol=1e-4, rtol=1e-4)


def test_the_memory_that_is_asked_for_covers_weights_and_batch():
    """Weights, target, gradient and two moments of float32; two observations of a row as float32."""
    args, shape = tiny(width=8), (4, 84, 84)
    net = c.Network(shape, [6], args)
    weights = sum(p.numel() for p in net.parameters())
    sizes = [c.memory(replace(args, batch_size=n), net, shape) for n in (1, 33)]
    assert sizes[0] > 16 * weights and sizes[1] - sizes[0] > 32 * 2 * 4 * math.prod(shape)


def test_bf16_covers_the_encoder_of_the_loss_alone():
    learner = c.Learner((4, 36, 36), [3], tiny(precision="bf16"), CPU)
    seen = Counter()

    def note(part):
        return lambda module, inputs, out: seen.update([(part, torch.is_grad_enabled(), out.dtype)])

    learner.net.encoder[0].register_forward_hook(note("encoder"))
    learner.net.heads[0].register_forward_hook(note("head"))
    learner.target.encoder[0].register_forward_hook(note("target"))
    obs = torch.randint(256, (4, 4, 36, 36), dtype=torch.uint8)
    batch = c.Batch(obs, torch.tensor([0, 1, 2, 0]), torch.ones(4), obs, torch.ones(4))
    learner.update([batch])
    assert {k for k in seen} == {
        ("encoder", True, torch.bfloat16),
        ("encoder", False, torch.float32),  # the choice of a'
        ("head", True, torch.float32),
        ("head", False, torch.float32),
        ("target", False, torch.float32),
    }
    seen.clear()
    with torch.no_grad():
        learner.q(obs, 0)
    assert set(seen) == {("encoder", False, torch.float32), ("head", False, torch.float32)}
    assert all(p.dtype == torch.float32 for p in learner.parameters())


# --------------------------------------------------------------------- a chain, solved by dynamic programming
S, A, GAMMA = 6, 3, 0.9  # actions: left, stay, right


def chain():
    """(next state, reward, over) of every (s, a): each step costs 0.1, the last state's right ends with 1."""
    to, rew, over = np.zeros((S, A), int), np.full((S, A), -0.1), np.zeros((S, A), bool)
    for s in range(S):
        for a in range(A):
            to[s, a] = min(S - 1, max(0, s + a - 1))
    rew[S - 1, 2], over[S - 1, 2] = 1.0, True
    return to, rew, over


def best_values():
    to, rew, over = chain()
    q = np.zeros((S, A))
    for _ in range(400):
        q = rew + GAMMA * np.where(over, 0, q[to].max(2))
    return q


def chain_data(pairs, args) -> c.Data:
    """An episode of one step for each (s, a): its row, and one that holds the next state."""
    (to, rew, over), one_hot = chain(), np.eye(S, dtype=np.float32)
    raw = {k: [] for k in ("frames", "act", "rew", "terminal", "real", "begins")}
    for s, a in pairs:
        for row in ((one_hot[s], a, rew[s, a], over[s, a], True, True),
                    (one_hot[to[s, a]], 0, 0.0, False, False, False)):  # fmt: skip
            for k, v in zip(raw, row):
                raw[k].append(v)
    raw = {k: np.array(v) for k, v in raw.items()} | {
        "note": "",
        "whole": np.ones(len(pairs), bool),
    }
    return c.prepare("chain", raw | {"rew": raw["rew"].astype(np.float32)}, args, A, CPU)


def chain_q(pairs, updates=600, **changes) -> np.ndarray:
    args = dict(
        gamma=GAMMA,
        clip_rewards=False,
        cql_alpha=0.0,
        width=4,
        learning_rate=2e-3,
        target_network_frequency=40,
    )
    args = tiny(**args | dict(v_min=-1.5, v_max=1.5) | changes)
    data = chain_data(pairs, args)
    learner, everything = c.Learner((S,), [A], args, CPU), data.batch(data.train)
    for step in range(updates):
        learner.optim.param_groups[0]["lr"] = args.learning_rate * (1 - step / updates)
        learner.update([everything])
        if step % args.target_network_frequency == 0:
            learner.refresh_target()
    learner.net.eval()
    with torch.no_grad():
        return learner.q(torch.eye(S), 0).numpy()


EVERYTHING = [(s, a) for s in range(S) for a in range(A)]


@pytest.mark.parametrize(
    "head, double",
    [("dqn", True), ("dqn", False), ("c51", True), ("rem", True), ("rem", False), ("qr", True)],
)
def test_alpha_0_reaches_the_optimal_values(head, double):
    """Every (s, a) in the data: within 0.08 of Q*, which runs from 0.06 to 1, and the same best action."""
    lr = {"dqn": 2e-3, "qr": 5e-3, "c51": 5e-3, "rem": 1e-2}[
        head
    ]  # rem's numbers have small gradients
    updates = 400 if head == "qr" else 800
    q, truth = (
        chain_q(EVERYTHING, updates, head=head, double=double, learning_rate=lr),
        best_values(),
    )
    assert np.abs(q - truth).max() < 0.08, q - truth
    assert (q.argmax(1) == truth.argmax(1)).all()


def test_the_conservative_fixed_point():
    """Half the rows go right, a quarter left, a quarter stay. Where the gradient vanishes,
    Q = BQ - alpha (softmax Q - b) / b with b the data's share of the action (Huber in its quadratic part)."""
    pairs = [(s, a) for s in range(S) for a in (0, 1, 2, 2)]
    q = chain_q(pairs, 1_500, cql_alpha=0.5, head="dqn", double=False).astype(np.float64)
    to, rew, over = chain()
    backup = rew + GAMMA * np.where(over, 0, q[to].max(2))
    policy, share = np.exp(q) / np.exp(q).sum(1, keepdims=True), np.array([0.25, 0.25, 0.5])
    push = 0.5 * (policy - share) / share
    assert np.abs(push).max() > 0.1
    np.testing.assert_allclose(q, backup - push, atol=0.05)


def test_conservative_values_of_unseen_actions_lie_below_the_true_ones():
    """The data goes right only, as the best policy does: there Q is near Q*, elsewhere below it."""
    q, truth = chain_q([(s, 2) for s in range(S)], cql_alpha=1.0, head="dqn"), best_values()
    assert (q[:, :2] < truth[:, :2] - 0.3).all()
    assert np.abs(q[:, 2] - truth[:, 2]).max() < 0.3 and (q.argmax(1) == 2).all()


def test_naive_training_overestimates_what_the_data_lacks_and_cql_does_not():
    """The data never goes right, so its best return is that of going on for ever, -1 (0.1 a step, gamma 0.9)
    and Q* at the last state's unseen action is 1. The naive network's maximum lies above what the data can
    yield, the conservative one's below."""
    pairs = [(s, a) for s in range(S) for a in (0, 1)]
    naive, conservative = (chain_q(pairs, head="dqn", cql_alpha=x) for x in (0.0, 1.0))
    possible = -0.1 / (1 - GAMMA)  # of any policy within the data's actions
    assert naive.max(1).mean() > possible + 0.2
    assert (conservative[:, 2] < conservative[:, :2].max(1)).all()
    assert conservative.max(1).mean() < naive.max(1).mean() - 0.2


# ------------------------------------------------------------- stacks and n steps, against a list of episodes
def frame(number: int) -> np.ndarray:
    """A frame that no other has, and that is not zero."""
    return np.array([[number // 251, number % 251], [7, 9]], np.uint8)


def hand_made(episodes, args, vectors=False) -> tuple[c.Data, dict]:
    """Data of [(steps, ends in a terminal, rows after its last)], and row -> (episode, t) of real rows."""
    raw, where = {k: [] for k in ("frames", "act", "rew", "terminal", "real", "begins")}, {}
    for e, (T, over, after) in enumerate(episodes):
        assert over or after
        for t in range(T + after):
            if t < T:
                where[len(raw["act"])] = e, t
            number = 100 * e + t
            raw["frames"].append(np.float32([number, -number, 0.5]) if vectors else frame(number))
            raw["act"].append(number % 4 if t < T else 0)
            raw["rew"].append(((number * 7) % 11 - 5) / 4 if t < T else 0.0)
            raw["terminal"].append(over and t == T - 1)
            raw["real"].append(t < T)
            raw["begins"].append(t == 0)
    raw = {k: np.array(v) for k, v in raw.items()} | {
        "note": "",
        "whole": np.ones(len(episodes), bool),
    }
    return c.prepare("made up", raw | {"rew": raw["rew"].astype(np.float32)}, args, 4, CPU), where


EPISODES = [(9, True, 1), (1, True, 0), (4, False, 1), (2, True, 0), (1, False, 1), (13, False, 1),
            (3, True, 1), (2, False, 1), (12, True, 0)]  # fmt: skip


def expected_transition(episodes, e, t, n, gamma, clip, vectors=False):
    """(stack, action, return, next stack, discount) from the definition."""
    T, over, _ = episodes[e]

    def see(t):
        number = 100 * e + t
        if vectors:
            return np.float32([number, -number, 0.5])
        return np.stack(
            [
                frame(100 * e + i) if i >= 0 else np.zeros((2, 2), np.uint8)
                for i in range(t - 3, t + 1)
            ]
        )

    rew, steps, ended = 0.0, 0, False
    while steps < n and t + steps < T:
        r = (((100 * e + t + steps) * 7) % 11 - 5) / 4
        rew += gamma**steps * (np.sign(r) if clip else r)
        steps += 1
        ended = over and t + steps == T
    return (
        see(t),
        (100 * e + t) % 4,
        rew,
        None if ended else see(t + steps),
        0.0 if ended else gamma**steps,
    )


@pytest.mark.parametrize("n", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("vectors", [False, True])
def test_batches_against_the_list_of_episodes(n, vectors):
    """Terminals, time-outs, episodes shorter than n steps and shorter than a stack, final rows, seams."""
    rng = np.random.default_rng(n)
    more = [(int(rng.integers(1, 9)), bool(rng.random() < 0.5), 1) for _ in range(15)]
    for episodes, clip in ((EPISODES, True), (more, False), ([(1, True, 0)], True)):
        args = tiny(n_step=n, gamma=0.9, clip_rewards=clip)
        data, where = hand_made(episodes, args, vectors)
        assert sorted(data.train.tolist()) == sorted(where)
        rows = torch.tensor(list(where))
        batch = data.batch(rows)
        assert batch.obs.dtype == (torch.float32 if vectors else torch.uint8)
        for i, (e, t) in enumerate(where.values()):
            obs, act, rew, next_obs, discount = expected_transition(
                episodes, e, t, n, 0.9, clip, vectors
            )
            np.testing.assert_array_equal(batch.obs[i].numpy(), obs)
            assert batch.act[i] == act and abs(batch.rew[i] - rew) < 1e-5, (e, t)
            assert abs(batch.discount[i] - discount) < 1e-6, (e, t)
            if next_obs is not None:
                np.testing.assert_array_equal(batch.next_obs[i].numpy(), next_obs)


def test_returns_starts_and_the_part_held_out():
    args = tiny(gamma=0.6, clip_rewards=False, holdout=0.3, seed=4)
    data, where = hand_made(EPISODES, args)
    for row, (e, t) in where.items():
        T, over, _ = EPISODES[e]
        expected = sum(0.6**k * (((100 * e + t + k) * 7) % 11 - 5) / 4 for k in range(T - t))
        hidden = not over and 0.6 ** (T - t) > 0.01
        assert data.returns_to_go[row].isnan() == hidden
        assert hidden or abs(data.returns_to_go[row] - expected) < 1e-5
    held, train = ({where[r][0] for r in rows.tolist()} for rows in (data.holdout, data.train))
    assert (
        not held & train
        and held | train == set(range(len(EPISODES)))
        and len(held) == round(0.3 * 9)
    )
    assert len(data.holdout) + len(data.train) == len(where)
    assert [where[r] for r in data.starts.tolist()] == [(e, 0) for e in range(len(EPISODES))]
    returns = [
        sum((((100 * e + t) * 7) % 11 - 5) / 4 for t in range(T))
        for e, (T, _, _) in enumerate(EPISODES)
    ]
    assert abs(data.info["dataset_return_mean"] - np.mean(returns)) < 1e-6


def test_every_row_of_the_training_part_is_drawn_and_no_other():
    data, _ = hand_made(EPISODES, tiny(holdout=0.3))
    data.batch = lambda rows: rows
    assert len(data.holdout) and set(data.sample(2_000).tolist()) == set(data.train.tolist())


def test_the_seed_decides_which_episodes_are_held_out_at_least_one_of_several():
    held = []
    for seed in range(6):
        data, where = hand_made(EPISODES[:3], tiny(holdout=0.01, seed=seed))
        held.append({where[row][0] for row in data.holdout.tolist()})
    assert {len(x) for x in held} == {1} and len(set.union(*held)) > 1
    data, where = hand_made(EPISODES[:1], tiny(holdout=0.5))
    assert len(data.train) == len(where)


def test_returns_are_raw_and_of_whole_episodes_and_rewards_those_trained_on():
    """Two transitions that end in a terminal state, then one of an episode that was cut."""
    for clip, low, high in ((True, 1, 1), (False, 2, 4)):
        raw = {"frames": np.ones((5, 1), np.float32), "act": np.zeros(5, int), "note": ""}
        raw |= {"rew": np.float32([3, 2, 0, 4, 0]), "terminal": np.arange(5) == 1}
        raw |= {"real": np.array([1, 1, 0, 1, 0], bool), "begins": np.array([1, 0, 0, 1, 0], bool)}
        raw |= {"whole": np.array([True, False])}
        data = c.prepare("x", raw, tiny(clip_rewards=clip, gamma=0.5), 2, CPU)
        assert data.info["dataset_return_mean"] == 5 and data.info["terminals"] == 1
        assert (data.info["reward_min"], data.info["reward_max"]) == (low, high)
        assert data.returns_to_go[:2].tolist() == ([1.5, 1.0] if clip else [4.0, 2.0])


def test_samples_are_uniform_and_shared_out():
    data, _ = hand_made(EPISODES, tiny())
    torch.manual_seed(5)
    whole = data.sample(6)
    parts = []
    for rank in range(3):
        torch.manual_seed(5)
        parts.append(data.sample(6, rank, 3))
    for name in c.Batch._fields:
        joined = torch.stack([getattr(p, name) for p in parts], 1).flatten(0, 1)
        assert torch.equal(joined, getattr(whole, name))
    counts = Counter(data.sample(20_000).rew.mul(100).round().int().tolist())
    expected = Counter(data.batch(data.train).rew.mul(100).round().int().tolist())
    for value, n in expected.items():
        share = n / len(data.train)
        assert abs(counts[value] / 20_000 - share) < 5 * (share / 20_000) ** 0.5


# ---------------------------------------------------------------------- Dopamine's files, as it writes them
class Recorder:
    """Dopamine's circular replay buffer: three rows of zeros before each episode, one frame a row, a dump of
    all columns at every checkpoint. Remembers which episode and step each slot holds."""

    def __init__(self, capacity: int, seed=0):
        self.capacity, self.count, self.rng = capacity, 0, np.random.default_rng(seed)
        self.columns = {
            "observation": np.zeros((capacity, 2, 2), np.uint8),
            "action": np.zeros(capacity, np.int32),
        }
        self.columns |= {
            "reward": np.zeros(capacity, np.float32),
            "terminal": np.zeros(capacity, np.uint8),
        }
        self.slots, self.episode, self.t, self.log = [None] * capacity, -1, 0, {}
        self.over, self.files = True, {}

    def put(self, picture, act, rew, over, what):
        i = self.count % self.capacity
        for k, v in zip(self.columns, (picture, act, rew, over)):
            self.columns[k][i] = v
        self.slots[i], self.count = what, self.count + 1

    def play(self, steps: int):
        for _ in range(steps):
            if self.over:
                self.episode, self.t = self.episode + 1, 0
                for k in (-3, -2, -1):
                    self.put(np.zeros((2, 2)), 0, 0.0, 0, (self.episode, k))
            self.over = self.rng.random() < 0.15
            number, act = 40 * self.episode + self.t, int(self.rng.integers(4))
            rew = float(self.rng.integers(-1, 2))
            self.log[self.episode, self.t] = frame(number), act, rew, self.over
            self.put(frame(number), act, rew, self.over, (self.episode, self.t))
            self.t += 1

    def dump(self, folder: Path, number: int, add_count=True):
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"$store$_{k}": v for k, v in self.columns.items()}
        arrays |= {"add_count": np.array(self.count)} if add_count else {}
        for name, array in arrays.items():
            with gzip.open(folder / f"{name}_ckpt.{number}.gz", "wb") as f:
                np.save(f, array)
        self.files[number] = list(self.slots), self.count

    def stack(self, e, t) -> bytes:
        zero = np.zeros((2, 2), np.uint8)
        return np.stack(
            [self.log[e, i][0] if i >= 0 else zero for i in range(t - 3, t + 1)]
        ).tobytes()

    def transitions(self, number: int, rows=None) -> Counter:
        """What a file lets one train on, of the slots `rows`: the stack, and unless the episode is over the
        next frame, lie side by side among them."""
        (slots, _), found = self.files[number], []
        rows = range(len(slots)) if rows is None else rows
        for i in rows:
            if slots[i] is None or slots[i][1] < 0:
                continue
            e, t = slots[i]
            side = all(
                i + k in rows and i + k >= 0 and slots[i + k] == (e, t + k) for k in (-3, -2, -1)
            )
            _, act, rew, over = self.log[e, t]
            follows = i + 1 in rows and i + 1 < len(slots) and slots[i + 1] == (e, t + 1)
            if side and (over or follows):
                found.append((self.stack(e, t), act, rew, b"" if over else self.stack(e, t + 1)))
        return Counter(found)


def seen(data: c.Data) -> Counter:
    """The transitions that the data gives, n_step 1."""
    b = data.batch(torch.cat([data.train, data.holdout]))
    rows = zip(b.obs, b.act.tolist(), b.rew.tolist(), b.next_obs, b.discount.tolist())
    return Counter(
        (s.numpy().tobytes(), a, r, s2.numpy().tobytes() if d else b"") for s, a, r, s2, d in rows
    )


GAME = SimpleNamespace(frame_shape=(2, 2), actions=4, name="made up")


def load(folder, envs=GAME, **changes) -> c.Data:
    return c.load(str(folder), tiny(**changes), envs, CPU)


@pytest.mark.parametrize(
    "steps", [30, 150, 60 + 57, 400], ids=["partial", "wrapped", "seam", "often"]
)
def test_a_dopamine_file_gives_what_its_recording_says(steps):
    recorder = Recorder(100)
    recorder.play(steps)
    recorder.dump(Path("x"), 7)
    data = load("x")
    expected = recorder.transitions(7)
    assert seen(data) == expected and len(data.train) == sum(expected.values()) > 10
    assert data.info["terminals"] == sum(1 for x in expected.elements() if x[3] == b"")


def play_to(recorder, cursor):
    """An episode's start takes four rows, so the cursor may be passed over: on to the next round."""
    while recorder.count % recorder.capacity != cursor or recorder.count < recorder.capacity:
        recorder.play(1)


@pytest.mark.parametrize("cursor", [0, 1, 3, 50, 97, 99])
def test_the_write_cursor(cursor):
    """Wherever it stands: the row before it knows no next frame, the three after it no stack."""
    for seed in range(3):
        recorder = Recorder(100, seed)
        play_to(recorder, cursor)
        recorder.dump(Path(f"x{seed}"), 0)
        assert recorder.count % 100 == cursor
        assert seen(load(f"x{seed}")) == recorder.transitions(0)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("storage", ["device", "memory", "mmap"])
def test_several_checkpoints_and_their_storage(n, storage):
    """Nothing crosses a file's seam, all or chosen checkpoints; every storage gives the same batches."""
    recorder = Recorder(100)
    for number in (0, 1, 3):
        recorder.play(90)
        recorder.dump(Path("x"), number)
    expected = sum((recorder.transitions(k) for k in (0, 1, 3)), Counter())
    data = load("x", storage=storage)
    assert seen(data) == expected
    assert seen(
        load("x", storage=storage, checkpoints=(3, 0, 3))
    ) == expected - recorder.transitions(1)
    first = load("x", n_step=n)
    other = load("x", n_step=n, storage=storage)
    torch.manual_seed(1)
    a = first.sample(64)
    torch.manual_seed(1)
    for x, y in zip(a, other.sample(64)):
        assert torch.equal(x, y)
    if storage == "mmap":
        assert other.mapped is not None and len(list(Path("datasets").iterdir())) == 2
        recorder.play(40)
        time.sleep(0.02)
        recorder.dump(Path("x"), 3)  # the same names, other contents: what was unpacked is stale
        assert seen(load("x", storage="mmap")) == sum(
            (recorder.transitions(k) for k in (0, 1, 3)), Counter()
        )


def test_n_steps_in_dopamine_files_stay_in_their_episode():
    recorder = Recorder(200)
    recorder.play(170)
    recorder.dump(Path("x"), 0)
    data = load("x", n_step=4, gamma=0.9)
    b = data.batch(data.train)
    by_stack = {recorder.stack(*k): k for k in recorder.log}
    for i in range(len(data.train)):
        e, t = by_stack[b.obs[i].numpy().tobytes()]
        rew, m, over = 0.0, 0, False
        while (
            m < 4
            and not over
            and (e, t + m + 1) in recorder.log
            or m == 0
            and recorder.log[e, t][3]
        ):
            rew += 0.9**m * recorder.log[e, t + m][2]
            over = recorder.log[e, t + m][3]
            m += 1
            if (
                m < 4
                and not over
                and (e, t + m + 1) not in recorder.log
                and recorder.log[e, t + m][3]
            ):
                rew, over, m = rew + 0.9**m * recorder.log[e, t + m][2], True, m + 1
        assert abs(b.rew[i] - rew) < 1e-5 and abs(b.discount[i] - (0 if over else 0.9**m)) < 1e-6, (
            e,
            t,
        )
        assert over or b.next_obs[i].numpy().tobytes() == recorder.stack(e, t + m)


def test_without_add_count(capsys):
    """Then a file is taken to be written from row 0 on; and the script says so."""
    recorder = Recorder(100)
    recorder.play(200)
    while recorder.count % 100:
        recorder.play(1)
    recorder.dump(Path("x"), 0, add_count=False)
    assert seen(load("x")) == recorder.transitions(0)
    assert "no add_count" in capsys.readouterr().out


def test_episodes_of_a_dopamine_file_begin_and_pay_as_recorded():
    """Starts are the first transitions of episodes. Row 0 may lie within one: its return is unknown."""
    recorder = Recorder(300)
    recorder.play(90)
    recorder.dump(Path("x"), 0)
    data = load("x")
    first = {recorder.stack(e, 0) for e, t in recorder.log if t == 0}
    begun = [x.numpy().tobytes() for x in data.stack(data.starts)]
    assert set(begun) <= first and len(begun) >= len(first) - 1 > 5
    over = {e for (e, _), row in recorder.log.items() if row[3]} - {0}
    returns = [sum(row[2] for (k, _), row in recorder.log.items() if k == e) for e in over]
    assert abs(data.info["dataset_return_mean"] - np.mean(returns)) < 1e-6 and np.mean(returns) != 0


@pytest.fixture
def two_files():
    """Cursor in the middle of the first file, at its end in the second."""
    recorder = Recorder(400)
    for number, cursor in ((0, 150), (1, 399)):
        recorder.play(300)
        play_to(recorder, cursor)
        recorder.dump(Path("x"), number)
    return recorder


def test_fraction_prefix_reads_the_first_rows_of_every_file(two_files):
    expected = sum((two_files.transitions(k, range(80)) for k in (0, 1)), Counter())
    assert seen(load("x", fraction=0.2)) == expected


def test_fraction_first_reads_the_oldest_rows(two_files):
    """In the order of time the first file begins at its cursor. 0.2 and 0.6 of 800 rows are 160 of the first
    file; all of it and 80 of the second, whose oldest row is its last."""
    expected = two_files.transitions(0, range(150, 310))
    assert seen(load("x", fraction=0.2, subset="first")) == expected
    expected = two_files.transitions(0) + two_files.transitions(1, range(79))
    assert seen(load("x", fraction=0.6, subset="first")) == expected


def test_what_was_unpacked_is_used_for_the_same_rows_only(two_files):
    parts = [dict(fraction=0.2), dict(fraction=0.2, subset="first"), dict(fraction=0.4)]
    parts += [dict(fraction=0.4, subset="uniform", seed=seed) for seed in (1, 2)]
    for changes in parts:
        assert seen(load("x", storage="mmap", **changes)) == seen(load("x", **changes)), changes
    load("x", storage="mmap", **parts[0])
    assert len(list(Path("datasets").iterdir())) == len(parts)


def test_fraction_uniform_draws_whole_episodes(two_files):
    everything = two_files.transitions(0) + two_files.transitions(1)
    by_stack = {two_files.stack(*k): k[0] for k in two_files.log}
    episode = lambda x: by_stack[x[0]]
    sizes, draws = [], []
    for seed in range(8):
        found = seen(load("x", fraction=0.4, subset="uniform", seed=seed))
        assert not found - everything
        chosen = {episode(x) for x in found}
        both = {x for x in everything if episode(x) in chosen}
        # an episode lies whole in one file, or was cut by a seam or the cursor into at most four pieces
        lacking = Counter(episode(x) for x in both if x not in found)
        assert len(lacking) <= 4
        sizes.append(sum(found.values()) / sum(everything.values()))
        draws.append(frozenset(chosen))
    assert 0.25 < np.mean(sizes) < 0.55 and len(set(draws)) == 8
    again = seen(load("x", fraction=0.4, subset="uniform", seed=7))
    assert {episode(x) for x in again} == draws[-1]


# ---- damaged files
def rewrite(name, array):
    def change(folder):
        with gzip.open(folder / name, "wb") as f:
            np.save(f, array, allow_pickle=True)

    return change


def cut(name, share):
    def change(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return change


COLUMNS = [f"$store$_{k}_ckpt.1.gz" for k in ("observation", "action", "reward", "terminal")]
COUNT = "add_count_ckpt.1.gz"
OBS, ACT, REW, TERMINAL = COLUMNS
DAMAGES = {f"{name} cut to {share}": (name, cut(name, share)) for name in [*COLUMNS, COUNT]
           for share in (0, 0.5, 0.999)}  # fmt: skip
DAMAGES |= {f"{name} missing": (name, lambda x, name=name: (x / name).unlink()) for name in COLUMNS}
DAMAGES |= {
    f"{name} {what}": (name, rewrite(name, array))
    for name, what, array in [
        (OBS, "short", np.zeros((99, 2, 2), np.uint8)),
        (OBS, "of another shape", np.zeros((100, 3, 2), np.uint8)),
        (OBS, "flat", np.zeros((100, 4), np.uint8)),
        (OBS, "of float", np.zeros((100, 2, 2), np.float32)),
        (OBS, "by column", np.asfortranarray(np.ones((100, 2, 2), np.uint8))),
        (ACT, "of float", np.zeros(100, np.float32)),
        (ACT, "of objects", np.array([Path("x")] * 100, object)),
        (REW, "two-dimensional", np.zeros((100, 1), np.float32)),
        (TERMINAL, "of text", np.array(["no"] * 100)),
        (COUNT, "negative", np.array(-3)),
        (COUNT, "of text", np.array("many")),
        (COUNT, "complex", np.array(3j)),
    ]
}
DAMAGES["action short"] = ("ckpt.1.gz", rewrite(ACT, np.zeros(99, np.int32)))
DAMAGES["action none"] = ("ckpt.1.gz", rewrite(ACT, np.zeros(0, np.int32)))
DAMAGES["unknown action"] = ("action 9", rewrite(ACT, np.full(100, 9, np.int32)))
DAMAGES["nan"] = ("reward nan", rewrite(REW, np.full(100, np.nan, np.float32)))
DAMAGES["text"] = (ACT, lambda x: (x / ACT).write_text("no archive"))
DAMAGES["no archive"] = (
    OBS,
    lambda x: np.save(open(x / OBS, "wb"), np.zeros((100, 2, 2), np.uint8)),
)
DAMAGES["empty archive"] = (REW, lambda x: gzip.open(x / REW, "wb").close())
DAMAGES["pickle"] = (ACT, rewrite(ACT, np.array([{}], object)))


@pytest.fixture(scope="module")
def dopamine(tmp_path_factory):
    folder, recorder = tmp_path_factory.mktemp("dopamine"), Recorder(100)
    for number in (0, 1):
        recorder.play(150)
        recorder.dump(folder, number)
    return folder


def copied(folder: Path, to="copy") -> Path:
    Path(to).mkdir()
    for path in folder.iterdir():
        (Path(to) / path.name).write_bytes(path.read_bytes())
    return Path(to)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dopamine_file_is_named_in_one_line(damage, dopamine, capsys):
    named, change = DAMAGES[damage]
    folder = copied(dopamine)
    change(folder)
    refused(lambda: load(folder), capsys, named)
    refused(lambda: load(folder, storage="mmap"), capsys, named)
    left = [p.name for p in Path("datasets").iterdir()] if Path("datasets").exists() else []
    assert not [x for x in left if x.endswith("tmp")]


def test_no_flipped_byte_passes_unseen(dopamine, capsys):
    """Every 13th byte of each column: refused in one line, or (in gzip's own header) without consequence."""
    good, wrong, passed = seen(load(dopamine)), [], 0
    for name in COLUMNS:
        whole = (dopamine / name).read_bytes()
        for at in range(0, len(whole), 13):
            folder = copied(dopamine, f"{COLUMNS.index(name)}_{at}")
            (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            try:
                same = seen(load(folder)) == good
                passed += same
                wrong += [] if same else [(name, at, "other data")]
            except SystemExit as stop:
                err = capsys.readouterr().err
                if stop.code != 2 or err.count("\n") != 1 or name not in err:
                    wrong.append((name, at, err))
            except Exception as e:
                wrong.append((name, at, repr(e)))
    assert not wrong and passed < 12


def test_other_mistakes_about_datasets(dopamine, capsys):
    refused(lambda: load(dopamine, checkpoints=(0, 5)), capsys, "no checkpoint 5", "0 to 1")
    other = SimpleNamespace(frame_shape=(84, 84), actions=4, name="Pong")
    refused(lambda: load(dopamine, other), capsys, "(2, 2)", "Pong", "(84, 84)")
    Path("nothing").mkdir()
    refused(lambda: load("nothing"), capsys, "nothing", "neither")
    refused(lambda: load("nowhere", storage="mmap"), capsys, "nowhere")
    refused(lambda: load("no/such-set-v0"), capsys, "no/such-set-v0")
    refused(lambda: load(dopamine, holdout=0.9, fraction=1e-9), capsys, "fraction")
    refused(lambda: c.check(tiny(dataset=("a", "b"))), capsys, "2 sets", "1 env")


def test_a_full_memory_is_refused_before_it_is_taken(dopamine, monkeypatch, capsys):
    real = c.reserve
    monkeypatch.setattr(c, "reserve", lambda size, what, device: real(size * 10**12, what, device))
    refused(lambda: load(dopamine), capsys, "frames needs", "GiB")
    load(dopamine, storage="mmap")


# ------------------------------------------------------------------------- memory
def big_set(folder: Path, rows: int):
    """Made-up frames in this script's layout; the frames' file is sparse."""
    folder.mkdir()
    frames = np.lib.format.open_memmap(folder / "observations.npy", "w+", np.uint8, (rows, 84, 84))
    frames[::997, 0, 0] = 1
    at = np.arange(rows)
    columns = {"actions": at % 4, "rewards": np.float32(at % 3), "begins": at % 100 == 0}
    columns |= {"terminals": at % 100 == 98, "real": at % 100 != 99}
    for k, v in columns.items():
        np.save(folder / f"{k}.npy", v)
    (folder / "made_by.json").write_text(json.dumps({"whole": [True] * (rows // 100), "info": {}}))


ATARI = SimpleNamespace(frame_shape=(84, 84), actions=4, name="made up")


def test_columns_and_frames_take_at_most_102_hundredths_of_the_frames(tmp_path):
    big_set(tmp_path / "x", 3_000)
    data = load(tmp_path / "x", ATARI, storage="memory")
    tensors = [v for v in vars(data).values() if isinstance(v, torch.Tensor)]
    size = sum(t.untyped_storage().nbytes() for t in tensors)
    raw = 3_000 * 84 * 84
    assert data.frames.untyped_storage().nbytes() == raw < size < 1.02 * raw


def test_a_mapped_set_is_mapped_read_only(tmp_path):
    """The kernel counts a private writable mapping against memory and refuses one that is larger."""
    big_set(tmp_path / "x", 3_000)
    raw = c.read_own(tmp_path / "x", tiny(storage="mmap"), CPU)
    assert isinstance(raw["frames"], np.memmap) and not raw["frames"].flags.writeable
    assert load(tmp_path / "x", ATARI, storage="mmap").stack(torch.tensor([1, 997]))[
        :, -1, 0, 0
    ].tolist() == [0, 1]


def resident() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_mapped_frames_are_read_without_read_ahead(tmp_path):
    """The kernel's flag `rr` of the mapping; at 5,000,000 frames read-ahead costs nine tenths of the rate."""
    big_set(tmp_path / "x", 3_000)
    data = load(tmp_path / "x", ATARI, storage="mmap")
    assert data.mapped
    mappings = re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M
    )
    (frames,) = [m for m in mappings if str(tmp_path / "x" / "observations.npy") in m]
    assert " rr " in re.search(r"VmFlags:.*", frames)[0] + " "


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_mapped_frames_larger_than_what_stays_resident(tmp_path):
    """700 MB of frames in a sparse file; batches touch much of it, a small part stays."""
    big_set(tmp_path / "x", 100_000)
    data = load(tmp_path / "x", ATARI, storage="mmap")
    data.batch(data.train[:4])

    def growth():
        before, highest = resident(), 0
        for _ in range(150):
            data.sample(32)
            highest = max(highest, resident() - before)
        return highest

    bounded, data.mapped = growth(), None
    assert bounded < 2e8 and growth() > 1.5 * bounded  # without the advice it grows


# ----------------------------------------------------------------------------- this script's own folders
def played_again(env_id, folder, n, T, seed):
    """The environment itself, given the recorded actions: checks every row, returns episodes' returns."""
    rows = {k: np.load(folder / f"{k}.npy") for k in NAMES}
    assert len(rows["actions"]) == n * T
    returns, resets = [], 0
    for i in range(n):
        env = gym.make(env_id)
        obs, _ = env.reset(seed=seed + i)
        total, begins, after = 0.0, True, False
        for t in range(T):
            r = i * T + t
            np.testing.assert_array_equal(
                rows["observations"][r], np.asarray(obs, rows["observations"].dtype)
            )
            assert rows["begins"][r] == begins and rows["real"][r] == (not after and t < T - 1), (
                i,
                t,
            )
            if after:  # holds the last frame of an episode; the environment is reset
                assert not rows["terminal" + "s"][r]
                obs, _ = env.reset()
                begins, after, resets = True, False, resets + 1
                continue
            obs, rew, terminated, truncated, _ = env.step(rows["actions"][r])
            total, begins, after = total + rew, False, terminated or truncated
            assert rows["rewards"][r] == np.float32(rew)
            assert rows["terminals"][r] == (terminated and t < T - 1)
            if after and t < T - 1:
                returns.append(total)
            total = 0.0 if after else total
    assert resets > 0
    return returns


@pytest.mark.parametrize("who", ["random", "dqn"])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "OtherCartPole-v0", "ShortCatch-v0"])
def test_collected_rows_are_those_of_the_environment(env_id, who):
    """Terminal and cut episodes, vectors and frames; the row of a reset is no transition."""
    args = tiny(
        env_id=(env_id,), collect=who, collect_steps=1_600, seed=3, head="dqn", clip_rewards=False
    )
    folder = c.collect(env_id, args, CPU)
    returns = played_again(env_id, folder, 8, 200, 3)
    data = c.load(str(folder), args, c.Envs(env_id, 1, args), CPU)
    real = np.load(folder / "real.npy")
    assert len(data.train) == real.sum()
    assert abs(data.info["dataset_return_mean"] - np.mean(returns)) < 1e-4
    for row in data.train.tolist():
        b = data.batch(torch.tensor([row]))
        assert (b.discount == 0) == data.terminal[row]
    assert ("collector_return_mean" in data.info) == (who == "dqn")
    assert not list(Path("datasets").glob("*tmp")) and c.collect(env_id, args, CPU) == folder


def test_the_learning_player_plays_better_than_the_random_one():
    scores = {}
    for who in ("random", "dqn"):
        args = tiny(
            collect=who,
            collect_steps=4_800,
            head="dqn",
            width=4,
            learning_rate=1e-3,
            n_step=5,
            clip_rewards=False,
        )
        data = c.load(
            str(c.collect("CartPole-v1", args, CPU)), args, c.Envs("CartPole-v1", 1, args), CPU
        )
        scores[who] = data.info["dataset_return_mean"]
    assert scores["dqn"] > 1.3 * scores["random"]


class Pays(gym.Env):
    """Four steps, which pay 5, -2, 0.5 and 3, and then a time-out; observes 1 + the number of steps."""

    action_space, observation_space = gym.spaces.Discrete(2), gym.spaces.Box(0, 9, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.float32([1]), {}

    def step(self, action):
        self.t += 1
        return np.float32([1 + self.t]), (5.0, -2.0, 0.5, 3.0)[self.t - 1], False, False, {}


gym.register("Pays-v0", Pays, max_episode_steps=4)


def test_a_random_player_repeats_its_action_as_often_as_told():
    """At 0.8, and by chance in half of the other cases."""
    folder = c.collect("Pays-v0", tiny(collect_steps=8_000, collect_repeat=0.8), CPU)
    act = np.load(folder / "actions.npy").reshape(8, 1_000)
    assert abs((act[:, 1:] == act[:, :-1]).mean() - 0.9) < 4 * (0.9 * 0.1 / 7_992) ** 0.5
    assert 0.4 < act.mean() < 0.6


def test_the_learning_player_is_plain_q_learning_on_complete_steps(monkeypatch):
    """Two updates for each eight rows after 1,000, without CQL, on clipped rewards of rows whose n steps are
    played; greedy action 1 but for epsilon, 1 for 1,000 rows, then from 0.41 to 0.05 at 1,600 of 3,200."""
    batches, args, refreshed = [], [], []
    note = lambda self, b, alone: batches.append(b[0]) or args.append(self.args) or alone or 1 / 0
    monkeypatch.setattr(c.Learner, "update", note)
    monkeypatch.setattr(c.Learner, "refresh_target", lambda self: refreshed.append(len(batches)))
    monkeypatch.setattr(
        c.Learner, "q", lambda self, obs, game: torch.tensor([[0.0, 1.0]]).expand(len(obs), 2)
    )
    collected = tiny(
        collect="dqn", collect_steps=3_200, n_step=2, cql_alpha=3.0, dr3_coef=1.0, dropout=0.5
    )
    folder = c.collect(
        "Pays-v0", replace(collected, unit_norm=True, target_network_frequency=150), CPU
    )
    assert len(batches) == 2 * (3_200 - 1_000) // 8 and refreshed == [150, 300, 450]
    assert {(a.cql_alpha, a.dr3_coef, a.dropout, a.unit_norm) for a in args} == {(0, 0, 0, False)}
    returns = torch.tensor([1 - 0.99, -1 + 0.99, 1 + 0.99, 1])
    for b in batches:
        t = b.obs[:, 0] - 1
        assert len(t) == 32 and torch.equal(b.next_obs[:, 0] - 1, (t + 2).clamp(max=4))
        torch.testing.assert_close(b.rew, returns[t.long()])
    act = np.load(folder / "actions.npy").reshape(8, 400)
    other = [int((act[:, slice(*x)] == 0).sum()) for x in ((0, 124), (125, 200), (200, 400))]
    for found, expected, n in zip(other, (496, 68, 40), (992, 600, 1_600)):
        assert abs(found - expected) < 4 * (expected * (1 - expected / n)) ** 0.5, other


def test_a_set_is_made_anew_for_all_that_changes_it_and_for_nothing_else(monkeypatch):
    monkeypatch.setattr(c, "evaluate", lambda *a: (np.zeros(1), 0.0))
    folder = lambda **changes: c.collect("Pays-v0", tiny(collect_steps=100, **changes), CPU)
    names = {folder(), folder(seed=2), folder(collect_repeat=0.5), folder(max_episode_steps=9)}
    assert len(names) == 4 and folder(gamma=0.5, num_updates=3, width=3, head="dqn") in names
    changes = dict(
        head="dqn", gamma=0.5, n_step=2, double=False, learning_rate=1e-3, width=3, batch_size=8
    )
    changes |= dict(target_network_frequency=7, encoder="mlp", clip_rewards=False, precision="bf16")
    dqn = {folder(collect="dqn"), *(folder(collect="dqn", **{k: v}) for k, v in changes.items())}
    dqn |= {folder(collect="dqn", head="c51", v_min=x) for x in (-9, -8)}
    assert len(dqn) == 14 and folder(collect="dqn", cql_alpha=2.0, dr3_coef=1.0, dropout=0.5) in dqn


@pytest.mark.parametrize("who", ["random", "dqn"])
def test_a_signal_while_collecting_leaves_nothing(who, monkeypatch, capsys):
    steps, real = [0], c.Envs.step

    def step(self, act):
        steps[0] += 1
        if steps[0] == 150:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, act)

    monkeypatch.setattr(c.Envs, "step", step)
    with pytest.raises(SystemExit) as stop:
        c.train(tiny(collect=who, collect_steps=4_000, head="dqn"))
    assert stop.value.code == 130 and "nothing is kept" in capsys.readouterr().out
    assert not Path("datasets").exists() or not list(Path("datasets").iterdir())
    assert not Path("runs").exists()


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    """A collected set of 800 rows."""
    here = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("cartpole"))
    try:
        return c.collect("CartPole-v1", tiny(collect_steps=800), CPU).resolve()
    finally:
        os.chdir(here)


def saved(name, change):
    def damage(folder):
        np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")), allow_pickle=True)

    return damage


NAMES = ("observations", "actions", "rewards", "terminals", "real", "begins")
OWN = {
    f"{n} cut to {s}": (f"{n}.npy", cut(f"{n}.npy", s))
    for n in NAMES
    for s in (0, 0.05, 0.5, 0.999)
}
OWN |= {f"{n} missing": (f"{n}.npy", lambda x, n=n: (x / f"{n}.npy").unlink()) for n in NAMES}
OWN |= {f"{n} short": (f"{n}.npy", saved(n, lambda x: x[:-1])) for n in NAMES[1:]}
OWN |= {
    "no made_by": ("made_by.json", lambda x: (x / "made_by.json").unlink()),
    "made_by cut": ("made_by.json", cut("made_by.json", 0.5)),
    "made_by empty": ("made_by.json", lambda x: (x / "made_by.json").write_text("{}")),
    "made_by a list": ("made_by.json", lambda x: (x / "made_by.json").write_text("[]")),
    "episodes": ("made_by.json", lambda x: (x / "made_by.json").write_text('{"whole": [true], "info": {}}')),
    "actions of float": ("actions.npy", saved("actions", lambda x: x + 0.5)),
    "actions 2-d": ("actions.npy", saved("actions", lambda x: x[:, None])),
    "rewards of text": ("rewards.npy", saved("rewards", lambda x: x.astype(str))),
    "rewards of objects": ("rewards.npy", saved("rewards", lambda x: x.astype(object))),
    "an infinite reward": ("reward inf", saved("rewards", lambda x: np.r_[x[:5], np.inf, x[6:]])),
    "a nan": ("row 7", saved("observations", lambda x: np.where(np.arange(len(x))[:, None] == 7, np.nan, x))),
    "unknown action": ("action -1", saved("actions", lambda x: x - 1)),
    "all real": ("no next state", saved("real", np.ones_like)),
    "none real": ("no transitions", saved("real", np.zeros_like)),
    "of another width": ("(3,)", saved("observations", lambda x: x[:, :3])),
    "a number": ("observations.npy", saved("observations", lambda x: np.float32(3))),
}  # fmt: skip


@pytest.mark.parametrize("damage", OWN)
def test_a_damaged_set_of_our_own_is_named_in_one_line(damage, cartpole, capsys):
    named, change = OWN[damage]
    folder = copied(cartpole)
    change(folder)
    envs = SimpleNamespace(frame_shape=(4,), actions=2, name="CartPole-v1")
    refused(lambda: load(folder, envs), capsys, named)


def test_a_full_disk_is_one_line_and_leaves_nothing(monkeypatch, capsys):
    """A sparse mapped file would take the frames without a word, and the process would die of a SIGBUS."""

    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(
        lambda: c.collect("CartPole-v1", tiny(collect_steps=200), CPU),
        capsys,
        "datasets",
        "No space left",
    )
    assert not list(Path("datasets").iterdir())


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals", "real"])
def test_every_column_counts_in_what_identifies_the_data(name, cartpole):
    envs = SimpleNamespace(frame_shape=(4,), actions=2, name="CartPole-v1")
    other = copied(cartpole)
    x = np.load(other / f"{name}.npy")
    where = np.flatnonzero(x != 0)[:1] if name in ("terminals", "real") else slice(None)
    x[where] = 1 - x[where] if x.dtype.kind == "i" else 0 if x.dtype.kind == "b" else -x[where]
    np.save(other / f"{name}.npy", x)
    assert load(cartpole, envs).info["dataset_sha256"] != load(other, envs).info["dataset_sha256"]


def test_two_runs_that_make_the_same_set_at_once_both_have_it(monkeypatch):
    """Of a sweep's processes each makes it; the second finds the first one's in its place."""
    real = c.write_own

    def write(folder, raw, fill):
        real(folder, raw, fill)
        real(folder, raw, fill)

    monkeypatch.setattr(c, "write_own", write)
    folder = c.collect("CartPole-v1", tiny(collect_steps=200), CPU)
    assert (
        load(folder, SimpleNamespace(frame_shape=(4,), actions=2, name="x"))
        and len(list(Path("datasets").iterdir())) == 1
    )


# ------------------------------------------------------------------------------------------------- Minari
def minari_set(monkeypatch, episodes, env_id, space=None):
    """[(observations T + 1, actions, rewards, terminated)] through minari's own writer."""
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path("minari").resolve()))
    buffers = []
    for obs, act, rew, over in episodes:
        last = np.arange(len(act)) == len(act) - 1
        flags = {"terminations": list(last & over), "truncations": list(last & (not over))}
        buffers.append(
            EpisodeBuffer(observations=list(obs), actions=list(act), rewards=list(rew), **flags)
        )
    minari.create_dataset_from_buffers(
        "made/up-v0", buffers, env=env_id, observation_space=space, algorithm_name="made up", author="nobody",
        author_email="a@b.c", code_permalink="none", description="made up",
    )  # fmt: skip
    return "made/up-v0"


LENGTHS = ((5, True), (1, True), (3, False), (1, False), (7, True))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["vectors", "rgb", "stack"])
def test_minari_sets_row_by_row(kind, monkeypatch):
    """Minari keeps pictures as JPEG: each has one colour, and its grey may be off by a little."""
    rng, number = np.random.default_rng(2), 0
    shape = {"vectors": (4,), "rgb": (84, 84, 3), "stack": (4, 84, 84)}[kind]
    episodes, space = [], gym.spaces.Box(0, 255, shape, np.uint8)
    for T, over in LENGTHS:
        obs = rng.integers(256, size=(T + 1, *shape), dtype=np.uint8)
        if kind == "rgb":
            shade = 10 * np.arange(number, number + T + 1, dtype=np.uint8)
            obs = np.zeros_like(obs) + shade[:, None, None, None]
        obs = rng.normal(size=(T + 1, *shape)).astype(np.float32) if kind == "vectors" else obs
        episodes.append((obs, rng.integers(2, size=T), rng.normal(size=T), over))
        number += T + 1
    space = gym.spaces.Box(-9, 9, shape, np.float32) if kind == "vectors" else space
    name = minari_set(monkeypatch, episodes, "CartPole-v1", space)
    frame_shape = (4,) if kind == "vectors" else (84, 84)
    data = load(
        name, SimpleNamespace(frame_shape=frame_shape, actions=2, name="x"), clip_rewards=False
    )
    picture = {"vectors": lambda x: x, "rgb": lambda x: x[..., 0], "stack": lambda x: x[-1]}[kind]
    row = 0
    for obs, act, rew, over in episodes:
        pictures = [picture(x) for x in obs]
        for t in range(len(act)):
            b = data.batch(torch.tensor([row]))
            assert b.act == act[t] and abs(b.rew - rew[t]) < 1e-6
            ended = over and t == len(act) - 1
            assert b.discount == (0 if ended else np.float32(0.99))
            for found, at in [(b.obs, t)] + [(b.next_obs, t + 1)] * (not ended):
                if kind == "vectors":
                    np.testing.assert_array_equal(found[0].numpy(), pictures[at])
                    continue
                for k in range(4):
                    i = at - 3 + k
                    expected = pictures[i] if i >= 0 else np.zeros((84, 84))
                    off = np.abs(found[0, k].numpy().astype(int) - expected).max()
                    assert off <= (3 if kind == "rgb" else 0)
            row += 1
        row += 1
    assert len(data.train) == sum(T for T, _ in LENGTHS)


def test_pictures_of_other_forms():
    x = np.random.default_rng(3).integers(256, size=(2, 84, 84, 3), dtype=np.uint8)
    grey = 0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2]
    assert np.abs(c.to_frames(x, "x") - grey).max() < 0.51
    assert (c.to_frames(x[..., :1], "x") == x[..., 0]).all() and (
        c.to_frames(x[..., 0], "x") == x[..., 0]
    ).all()
    large = np.random.default_rng(4).integers(256, size=(2, 168, 252), dtype=np.uint8)
    area = large.reshape(2, 84, 2, 84, 3).mean((2, 4))
    assert (
        np.abs(c.to_frames(large, "x") - area).max() < 0.51
        and c.to_frames(large, "x").dtype == np.uint8
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_minari_set_that_does_not_fit_is_refused(monkeypatch, capsys):
    obs = np.zeros((4, 4), np.float32)
    obs[2, 1] = np.nan
    name = minari_set(monkeypatch, [(obs, [0, 1, 1], [0.0, 1.0, 0.0], True)], "CartPole-v1")
    envs = SimpleNamespace(frame_shape=(4,), actions=2, name="x")
    refused(lambda: load(name, envs), capsys, "made/up-v0", "row 2", "not finite")
    refused(lambda: load(name, envs, fraction=0.5), capsys, "--fraction")
    refused(lambda: load(name, replace_actions(envs, 1)), capsys, "action 1")


def replace_actions(envs, n):
    return SimpleNamespace(**vars(envs) | {"actions": n})


# ------------------------------------------------------------------------ evaluation, diagnostics, advice
def test_evaluation_is_an_episode_by_hand():
    """Greedy from the same seeds; the return, and what max_a Q(s0, a) overestimates of the discounted one."""
    args = tiny(env_id=("OtherCartPole-v0",), head="dqn", seed=2, gamma=0.9)
    learner = c.Learner((4,), [2], args, CPU)
    learner.net.heads[0][0].weight.data.normal_()
    returns, over = c.evaluate(learner, c.Envs("OtherCartPole-v0", 5, args), 0, args)
    assert learner.net.training
    learner.net.eval()
    expected, gaps, draw = [], [], np.random.default_rng(2)
    assert (
        draw.random(5 * 30) >= 0.001
    ).all()  # no random action among these, else compare otherwise
    for i in range(5):
        env = gym.make("OtherCartPole-v0")
        obs, _ = env.reset(seed=1_002_000 + i)
        total, discounted, t, ended = 0.0, 0.0, 0, False
        with torch.no_grad():
            predicted = learner.q(torch.tensor(obs)[None], 0).max().item()
            while not ended:
                a = learner.q(torch.tensor(np.float32(obs))[None], 0).argmax().item()
                obs, rew, terminated, truncated, _ = env.step(a)
                total, discounted, t = total + rew, discounted + 0.9**t * rew, t + 1
                ended = terminated or truncated
        expected.append(total)
        gaps.append(predicted - discounted)
    assert returns.tolist() == expected and len(set(expected)) > 1
    assert abs(over - np.mean(gaps)) < 1e-4


def test_returns_are_raw_and_q_is_compared_with_rewards_as_trained_on():
    for clip, discounted in ((True, 1 - 0.5 + 0.25 + 0.125), (False, 5 - 1 + 0.125 + 0.375)):
        args = tiny(clip_rewards=clip, gamma=0.5)
        learner = c.Learner((1,), [2], args, CPU)
        returns, over = c.evaluate(learner, c.Envs("Pays-v0", 3, args), 0, args)
        assert returns.tolist() == [6.5] * 3
        assert abs(over - (learner.q(torch.ones(1, 1), 0).max().item() - discounted)) < 1e-5


def test_one_action_in_a_thousand_of_an_evaluation_is_random():
    """A random one of four is the greedy one in a quarter of the cases."""
    n, acts = 200_000, []
    none = np.zeros((n, 1), np.float32)
    over = lambda act: acts.append(act) or (none, np.zeros(n), np.ones(n, bool), np.zeros(n, bool))
    envs = SimpleNamespace(n=n, actions=4, reset=lambda seed: none, step=over)
    net = SimpleNamespace(eval=lambda: None, train=lambda: None)
    q = torch.tensor([[0.0, 0, 1, 0]]).expand(n, 4)
    learner = SimpleNamespace(net=net, device=CPU, q=lambda obs, game: q)
    c.evaluate(learner, envs, 0, tiny())
    counts = np.bincount(acts[0], minlength=4)
    assert len(acts) == 1 and all(abs(counts[a] - 50) < 5 * 50**0.5 for a in (0, 1, 3)), counts


def test_stacks_that_the_player_sees_hold_its_own_episode_only():
    envs = c.Envs("ShortCatch-v0", 2, tiny(env_id=("ShortCatch-v0",)))
    stack, over, pictures = envs.reset(3), False, []
    for _ in range(14):  # episodes of five steps
        pictures.append(stack[:, -1].copy())
        padded = [np.zeros_like(pictures[0])] * 3 + pictures
        np.testing.assert_array_equal(stack, np.stack(padded[-4:], 1))
        stack, _, terminated, truncated = envs.step(np.array([0, 2]))
        pictures = [] if over else pictures  # the step after an end is the reset
        over = (terminated | truncated)[0]


def test_games_are_played_with_sticky_actions_from_their_first_frame(monkeypatch, capsys):
    """Four frames a step; rewards raw; neither no-ops nor fire at a reset."""
    import ale_py.vector_env

    asked = []
    stop = lambda *names, **options: asked.append((names, options)) or 1 / 0
    monkeypatch.setattr(ale_py.vector_env, "AtariVectorEnv", stop)
    refused(
        lambda: c.Envs("ALE/SpaceInvaders-v5", 3, tiny(max_episode_steps=50)),
        capsys,
        "SpaceInvaders",
    )
    ((names, options),) = asked
    assert names == ("space_invaders", 3) and options["repeat_action_probability"] == 0.25
    assert options["noop_max"] == 0 and options["max_num_frames_per_episode"] == 200
    assert (
        not options["use_fire_reset"]
        and not options["reward_clipping"]
        and options["stack_num"] == 1
    )


@pytest.mark.parametrize("head, double", [("qr", True), ("c51", False)])
def test_diagnostics_against_loops(head, double):
    args = tiny(head=head, double=double, gamma=0.9, n_step=2, clip_rewards=False, holdout=0.2)
    data, _ = hand_made(
        [(9, True, 1), (14, False, 1), (40, True, 1), (12, False, 1), (8, True, 0)], args, True
    )
    data.frames /= 200
    learner = c.Learner((3,), [4], args, CPU)
    for p in learner.parameters():
        p.data += 0.2 * torch.randn_like(p)
    found = c.diagnose(learner, [data], args)
    assert learner.net.training
    net, target = learner.net.eval(), learner.target
    q_of = lambda net, x: net.q(net.heads[0](net.features(x[None])))[0]

    def by_hand(rows):
        q, y, to_go, qs, phis = [], [], [], [], []
        for row in rows.tolist():
            b = c.Batch(*(x[0] for x in data.batch(torch.tensor([row]))))
            with torch.no_grad():
                best = q_of(net if double else target, b.next_obs).argmax()
                y.append((b.rew + b.discount * q_of(target, b.next_obs)[best]).item())
                qs.append(q_of(net, b.obs).tolist())
                phis.append(
                    (
                        net.features(b.obs[None])[0],
                        net.features(b.next_obs[None])[0],
                        b.discount > 0,
                    )
                )
            q.append(qs[-1][b.act])
            if not data.returns_to_go[row].isnan():
                to_go.append((q[-1], data.returns_to_go[row].item()))
        return np.array(q), np.array(y), to_go, np.array(qs), phis

    q, y, to_go, qs, phis = by_hand(data.train)
    assert len(to_go) >= 32
    expected = {
        "td_error": ((q - y) ** 2).mean() / y.var(ddof=1),
        "q_data": q.mean(),
        "q_pi": qs.max(1).mean(),
        "q_rand": qs.mean(),
        "q_max": qs.max(),
        "q_minus_return": np.mean([a - b for a, b in to_go]),
        "return_std": np.std([b for _, b in to_go], ddof=1),
        "cql_gap": np.mean(np.log(np.exp(qs).mean(1)) - q),
        "q_bound": 1.25 / (1 - 0.9),
        "q_range": 2.5 / (1 - 0.9),
        "q_lift": args.cql_alpha / (1 - 0.9**args.n_step),
        "feature_dot": np.mean([(a @ b).item() for a, b, w in phis if w]),
        "feature_norm": np.mean([a.norm().item() for a, _, _ in phis]),
        "v_s0": np.mean([q_of(net, data.stack(r[None])[0]).max().item() for r in data.starts]),
    }
    held = by_hand(data.holdout)
    expected["td_error_holdout"] = ((held[0] - held[1]) ** 2).mean() / held[1].var(ddof=1)
    s = np.linalg.svd(np.stack([a.numpy() for a, _, _ in phis]), compute_uv=False)
    expected["srank"] = next(k for k in range(1, len(s) + 1) if s[:k].sum() >= 0.99 * s.sum())
    units = []
    with torch.no_grad():
        x = (data.stack(data.train) - net.mean) / net.std
        for layer in net.encoder:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                mean = x.abs().mean(0)
                units += (mean <= 0.025 * mean.mean()).tolist()
    expected["dormant"] = np.mean(units)
    for k, v in expected.items():
        assert abs(found[k] - v) < 1e-3 * max(1, abs(v)), (k, found[k], v)


def test_diagnostics_of_several_games_are_their_means_but_for_the_largest_q_and_the_bounds():
    """Two games with the same head, so that each alone can be measured as the first."""
    args = tiny(head="dqn", gamma=0.9, n_step=2, clip_rewards=False)
    games = [hand_made(x, args, True)[0] for x in ([(9, True, 1), (40, True, 1)], [(60, False, 1)])]
    learner = c.Learner((3,), [4, 4], args, CPU)
    learner.net.heads[1].load_state_dict(learner.net.heads[0].state_dict())
    learner.target.load_state_dict(learner.net.state_dict())
    games[1].info |= {"reward_min": -3.0, "reward_max": -2.0, "terminals": 4}
    both, one, other = (c.diagnose(learner, x, args) for x in (games, games[:1], games[1:]))
    assert other["q_bound"] == -2 and abs(other["q_range"] - 10) < 1e-6
    games[1].info["terminals"] = 0  # then the least reward may be had for ever
    assert abs(c.diagnose(learner, games[1:], args)["q_bound"] + 20) < 1e-4
    for k in ("td_error", "q_data", "q_pi", "q_rand", "cql_gap", "v_s0"):
        assert abs(both[k] - (one[k] + other[k]) / 2) < 1e-5 * max(1, abs(both[k])), k
    for k in ("q_max", "q_bound", "q_range"):
        assert one[k] != other[k] and both[k] == max(one[k], other[k]), k


def test_advice_halves_and_doubles():
    found = c.advice(c.Args(cql_alpha=4.0, width=64, n_step=20))
    assert found["divergence"] == "--cql-alpha 8 or --unit-norm"
    assert found["alpha too large"] == "--cql-alpha 2"
    assert found["overfitting"] == "--dropout 0.1 or a smaller --width"
    assert found["underfitting"].startswith(
        "--width 128 or --encoder resnet or --dr3-coef 0.1 or --n-step 10"
    )
    on = c.advice(
        c.Args(unit_norm=True, dropout=0.2, dr3_coef=0.1, encoder="resnet", n_step=1, cql_alpha=0.0)
    )
    assert on["divergence"] == "--cql-alpha 1" and on["overfitting"] == "a smaller --width"
    assert on["underfitting"] == "--width 32"


def test_summaries_are_means_over_games():
    returns, args = (
        [np.array([1.7, 30.5]), np.array([-20.7] * 2)],
        c.Args(env_id=("ALE/Breakout-v5", "ALE/Pong-v5")),
    )
    found = c.summary_of("final", returns, args)
    assert (
        abs(found["final_return_mean"] + 2.3) < 1e-9 and abs(found["final_return_std"] - 7.2) < 1e-9
    )
    assert abs(found["normalized_score"] - 25) < 1e-9
    assert found["final_games"] == {"ALE/Breakout-v5": np.mean([1.7, 30.5]), "ALE/Pong-v5": -20.7}
    unknown = c.summary_of(
        "final", returns, replace(args, env_id=("ALE/Breakout-v5", "CartPole-v1"))
    )
    assert unknown["normalized_score"] is None
    assert c.summary_of("selected", returns[1:], replace(args, env_id=("ALE/Pong-v5",))) == {
        "selected_return_mean": -20.7, "selected_return_std": 0.0}  # fmt: skip


def test_scores_against_a_person():
    assert c.normalized_score("ALE/Breakout-v5", 1.7) == 0
    assert abs(c.normalized_score("ALE/Breakout-v5", 30.5) - 100) < 1e-9
    assert abs(c.normalized_score("ALE/Pong-v5", 20.0) - 100 * 40.7 / 35.3) < 1e-9
    assert c.normalized_score("CartPole-v1", 3.0) is None
    assert len(c.HUMAN) == 57 and all(low < high for low, high in c.HUMAN.values())


def test_names_of_games():
    import ale_py

    gym.register_envs(ale_py)
    ids = {c.game_of(k) for k in gym.registry if k.startswith("ALE/") and k.endswith("-v5")}
    assert len(ids) > 90 and set(c.HUMAN) <= ids
    assert (
        c.game_of("ALE/UpNDown-v5") == "up_n_down"
        and c.game_of("ALE/SpaceInvaders-v5") == "space_invaders"
    )


def test_advice_names_flags_that_exist():
    known = {"--" + f.name.replace("_", "-") for f in fields(c.Args)}
    said = (
        " ".join(c.advice(c.Args(cql_alpha=0.0)).values())
        + " "
        + " ".join(c.advice(c.Args()).values())
    )
    flags = re.findall(r"--[a-z0-9-]+", said)
    assert flags and set(flags) <= known
    for text in c.advice(
        c.Args(width=64)
    ).values():  # and with their values the command line takes them
        for words in re.findall(r"--[a-z0-9-]+ [\w.]+(?= or|,|$)", text):
            tyro.cli(c.Args, args=words.split())


# ---------------------------------------------------------------------------------------------- promises
def short(data, **changes):
    """60 updates with every event between them; tuples among the arguments."""
    args = dict(
        dataset=(str(data),), holdout=0.1, num_updates=60, batch_size=8, target_network_frequency=7
    )
    args |= dict(
        diagnostics_frequency=20, eval_frequency=25, log_frequency=10, checkpoint_frequency=15
    )
    return tiny(
        **args | dict(eval_episodes=2, n_step=3, head="rem", dropout=0.2, dr3_coef=0.01) | changes
    )


def signalled_at(monkeypatch, update: int, signum=signal.SIGTERM):
    real, calls = c.Learner.update, [0]

    def counted(self, *rest, **more):
        calls[0] += 1
        if calls[0] == update:
            os.kill(os.getpid(), signum)
        return real(self, *rest, **more)

    monkeypatch.setattr(c.Learner, "update", counted)
    return lambda: monkeypatch.setattr(c.Learner, "update", real)


def assert_same_end(run, whole):
    assert_same_checkpoint(run / "checkpoint.pt", whole / "checkpoint.pt")
    assert_same_checkpoint(run / "selected.pt", whole / "selected.pt")
    assert metrics(run) == metrics(whole) and len(metrics(run)) > 50
    clock = ("wall_seconds", "updates_per_second")
    a, b = ({k: v for k, v in summary(x).items() if k not in clock} for x in (run, whole))
    assert a == b


@pytest.mark.parametrize(
    "stops, signum",
    [
        ((1, 14), signal.SIGTERM),
        ((20,), signal.SIGINT),
        ((33, 26), signal.SIGTERM),
        ((60,), signal.SIGTERM),
    ],
)
def test_stopped_and_resumed_by_its_own_words_is_bitwise_the_uninterrupted_run(
    stops, signum, cartpole, monkeypatch, capsys
):
    """Two games; each number is how many updates a process lives. What it prints goes on."""
    args = short(cartpole, env_id=("CartPole-v1", "OtherCartPole-v0"), dataset=(str(cartpole),) * 2)
    c.train(replace(args, run_dir="whole"))
    (whole,) = Path("whole").iterdir()
    for n in stops:
        undo = signalled_at(monkeypatch, n, signum)
        with pytest.raises(SystemExit) as stop:
            c.train(args)
        undo()
        assert stop.value.code == 128 + signum
        _, script, *words = shlex.split(capsys.readouterr().out.split("to go on:")[1].strip())
        assert script == "cql_atari.py"
        again = tyro.cli(c.Args, args=words)
        assert replace(again, resume=None) == replace(args, resume=None)
        args = again
        torch.rand(1000)
    assert c.train(args)["num_updates"] == 60
    assert_same_end(only_run("."), whole)


def test_the_target_network_is_refreshed_at_its_frequency(cartpole, monkeypatch):
    events, update, refresh = [], c.Learner.update, c.Learner.refresh_target
    monkeypatch.setattr(
        c.Learner, "update", lambda self, b: events.append("update") or update(self, b)
    )
    monkeypatch.setattr(
        c.Learner, "refresh_target", lambda self: events.append("refresh") or refresh(self)
    )
    c.train(short(cartpole, num_updates=16, head="dqn", eval_episodes=0, diagnostics_frequency=0))
    assert events == (["update"] * 7 + ["refresh"]) * 2 + ["update"] * 2


def test_the_selected_networks_are_those_of_the_peak_and_are_scored(cartpole, monkeypatch):
    """The dataset's Q is planted: it is highest after 30 of 50 updates. A return names its network."""
    planted, end = (
        [],
        {"td_error": 0.01, "cql_gap": 0.0, "return_std": 1.0, "q_max": 2.0, "q_bound": 9.0},
    )
    curve = iter([0.5, 1.0, 2.0, 1.5, 1.0])

    def measure(learner, games, args):
        planted.append(next(learner.net.parameters()).sum().item())
        return end | {"q_range": 1.0, "q_lift": 0.0, "q_data": next(curve)}

    named = lambda learner, *rest: (np.full(2, next(learner.net.parameters()).sum().item()), 0.0)
    monkeypatch.setattr(c, "diagnose", measure)
    monkeypatch.setattr(c, "evaluate", named)
    changes = dict(
        num_updates=50, diagnostics_frequency=10, eval_frequency=0, checkpoint_frequency=0
    )
    result = c.train(short(cartpole, head="dqn", **changes))
    assert result["selected_step"] == 30 and result["selected_return_mean"] == planted[2]
    assert result["final_return_mean"] == planted[4] and len(set(planted)) == 5
    assert torch.load(only_run(".") / "selected.pt", weights_only=True)["step"] == 30


def test_a_run_that_makes_its_data_is_the_run_on_them():
    """A learning player draws from torch's generator; the run begins with the same numbers nevertheless."""
    args, ends = (
        tiny(collect="dqn", collect_steps=160, head="dqn", num_updates=3, eval_episodes=0),
        [],
    )
    for changes in ({}, {"collect": "random", "collect_steps": 40_000}):
        if changes:
            (folder,) = Path("datasets").iterdir()
            changes |= {"dataset": (str(folder),)}
        c.train(replace(args, run_dir=f"run{len(ends)}", **changes))
        (run,) = Path(f"run{len(ends)}").iterdir()
        ends.append(networks(run))
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_resume_auto_takes_the_run_with_these_arguments(cartpole, monkeypatch, capsys):
    args = short(cartpole, num_updates=20)
    for seed in (1, 2):
        undo = signalled_at(monkeypatch, 10)
        with pytest.raises(SystemExit):
            c.train(replace(args, seed=seed))
        undo()
    c.train(replace(args, seed=1, resume="auto"))
    done = [p.parent.name for p in Path("runs").glob("*/summary.json")]
    assert len(done) == 1 and "__1__" in done[0]
    c.train(replace(args, seed=3, resume="auto"))
    assert "a new one starts" in capsys.readouterr().out and len(list(Path("runs").iterdir())) == 3


def test_resume_refuses_other_arguments_other_data_and_other_files(cartpole, capsys):
    args = short(cartpole, num_updates=4, checkpoint_frequency=0)
    c.train(args)
    run = only_run(".")
    resume = lambda **changes: lambda: c.train(replace(args, resume=str(run), **changes))
    refused(resume(head="qr"), capsys, "--head rem", "qr")
    refused(resume(gamma=0.5), capsys, "--gamma")
    refused(resume(env_id=("OtherCartPole-v0",)), capsys, "--env-id")
    good = (run / "checkpoint.pt").read_bytes()

    class Crafted:
        def __reduce__(self):
            return os.system, ("touch EXECUTED",)

    torch.save({"script": "cql_atari", "format": c.FORMAT, "x": Crafted()}, run / "checkpoint.pt")
    refused(resume(), capsys, "checkpoint.pt")
    assert not Path("EXECUTED").exists()
    (run / "checkpoint.pt").write_bytes(good[: len(good) // 2])
    refused(resume(), capsys, "checkpoint.pt")
    (run / "checkpoint.pt").write_bytes(good)
    other = copied(cartpole, "other")
    np.save(other / "rewards.npy", -np.load(other / "rewards.npy"))
    moved = torch.load(run / "checkpoint.pt", weights_only=True)
    moved["args"]["dataset"] = ("other",)
    torch.save(moved, run / "checkpoint.pt")
    refused(resume(dataset=("other",), num_updates=5), capsys, "other data")


def test_measuring_changes_nothing(cartpole):
    """Diagnostics, evaluation, logs and checkpoints off: the same parameters, bit by bit."""
    for precision in ("fp32", "bf16"):
        args = short(cartpole, precision=precision, run_dir=f"{precision}/loud")
        c.train(args)
        off = dict(
            diagnostics_frequency=0, eval_frequency=0, eval_episodes=0, checkpoint_frequency=0
        )
        c.train(replace(args, run_dir=f"{precision}/quiet", log_frequency=60, **off))
        (loud,), (quiet,) = (list(Path(precision, x).iterdir()) for x in ("loud", "quiet"))
        a, b = (torch.load(x / "checkpoint.pt", weights_only=True) for x in (loud, quiet))
        a, b = (flatten({k: x[k] for k in ("learner", "random")}) for x in (a, b))
        for k in a:
            assert torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k], k


def test_storage_changes_nothing_and_another_seed_does(cartpole):
    ends = {}
    for name, changes in {"a": {}, "b": {}, "mmap": {"storage": "mmap"}, "memory": {"storage": "memory"},
                          "seed": {"seed": 2}}.items():  # fmt: skip
        c.train(short(cartpole, num_updates=15, eval_episodes=0, run_dir=name, **changes))
        (run,) = Path(name).iterdir()
        ends[name] = torch.load(run / "checkpoint.pt", weights_only=True)["learner"]["networks"]
    for name, end in ends.items():
        same = all(torch.equal(end[k], ends["a"][k]) for k in end)
        assert same == (name != "seed"), name


@pytest.mark.parametrize("where", ["loss", "parameter"])
def test_a_nan_stops_the_run_with_status_3_and_keeps_the_checkpoint(
    where, cartpole, monkeypatch, capsys
):
    real, calls = c.Learner.update, [0]

    def spoilt(self, *rest, **more):
        calls[0] += 1
        info = real(self, *rest, **more)
        if calls[0] == 33 and where == "parameter":
            self.net.heads[0][0].weight.data[0, 0] = float("nan")
        return info | (
            {"td_loss": torch.tensor(math.inf)} if calls[0] >= 33 and where == "loss" else {}
        )

    monkeypatch.setattr(c.Learner, "update", spoilt)
    named = "heads.0.0.weight" if where == "parameter" else "td_loss"
    named = "" if where == "parameter" else named  # the next update has spread it
    refused(lambda: c.train(short(cartpole)), capsys, "step 40", named, "not finite", status=3)
    saved = torch.load(only_run(".") / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 30 and all(
        v.isfinite().all() for v in saved["learner"]["networks"].values()
    )


MISTAKES = [
    (dict(env_id=("Pendulum-v1",)), "actions are Box"),
    (dict(env_id=("FrozenLake-v1",)), "observations are Discrete"),
    (dict(env_id=("Blackjack-v1",)), "observations are Tuple"),
    (dict(env_id=("NoSuch-v0",)), "NoSuch-v0"),
    (dict(env_id=("ALE/NoSuch-v5",)), "ALE/NoSuch-v5"),
    (dict(env_id=()), "--env-id"),
    (dict(env_id=("CartPole-v1", "CartPole-v1")), "different"),
    (dict(env_id=("CartPole-v1", "MountainCar-v0")), "differ in shape"),
    (dict(encoder="nature"), "--encoder nature"),
    (dict(encoder="resnet"), "--encoder resnet"),
    (dict(env_id=("Catch-v0",), encoder="mlp"), "--encoder mlp"),
    (dict(env_id=("Catch-v0",), encoder="resnet", width=10), "multiple of 4"),
    (dict(env_id=("Catch-v0",), encoder="resnet", width=4), "from 8 on"),
    (dict(env_id=("CartPole-v1", "OtherCartPole-v0"), batch_size=33), "not a multiple of 2"),
    (dict(dataset=("a", "b")), "--dataset names 2"),
    (dict(dataset=("a",), collect="dqn"), "--collect dqn has no effect"),
    (dict(dataset=("a",), collect_steps=500), "--collect-steps"),
    (dict(collect="dqn", collect_repeat=0.5), "--collect-repeat"),
    (dict(fraction=0.5), "--fraction"),
    (dict(checkpoints=(1,)), "--checkpoints"),
    (dict(subset="first"), "--subset"),
    (dict(v_max=3.0), "--v-max"),
    (dict(head="c51", v_min=3.0, v_max=3.0), "not below"),
    (dict(max_episode_steps=50), "--max-episode-steps"),
    (dict(gamma=1.0), "--gamma"),
    (dict(gamma=math.nan), "--gamma"),
    (dict(n_step=0), "--n-step"),
    (dict(learning_rate=0.0), "--learning-rate"),
    (dict(wandb_entity="x"), "--wandb-entity"),
    (dict(precision="tf32"), "tf32"),
    (dict(resume="nowhere"), "nowhere"),
    (dict(dataset=("no/such-v0",)), "no/such-v0"),
]  # fmt: skip


@pytest.mark.parametrize("changes, named", MISTAKES)
def test_a_users_mistake_is_one_line_and_status_2(changes, named, capsys):
    small = {} if "dataset" in changes else {"collect_steps": 100}
    refused(lambda: c.train(replace(tiny(num_updates=2), **small | changes)), capsys, named)
    assert not Path("runs").exists()


def test_what_a_run_leaves_behind(cartpole, capsys):
    args = short(cartpole, head="c51", dr3_coef=0.01)
    result = c.train(args)
    run = only_run(".")
    assert {p.name for p in run.iterdir() if "tfevents" not in p.name} == {
        "args.json", "metrics.csv", "checkpoint.pt", "selected.pt", "summary.json"}  # fmt: skip
    assert json.loads((run / "args.json").read_text())["args"]["env_id"] == ["CartPole-v1"]
    keys = {"final_return_mean", "final_return_std", "eval_episodes", "wall_seconds", "device", "num_updates",
            "updates_per_second", "selected_return_mean", "selected_step", "dataset_return_mean",
            "normalized_score", "verdict", "verdict_text", "dataset", "dataset_sha256"}  # fmt: skip
    assert keys <= result.keys() and summary(run) == json.loads(json.dumps(result))
    tags = {tag for _, tag, _ in metrics(run)}
    assert {"charts/episodic_return", "eval/episodic_return", "losses/td_loss", "losses/cql_loss",
            "losses/dr3_loss",
            "losses/q_values", "losses/loss", "diagnostics/srank", "diagnostics/td_error_holdout",
            "diagnostics/overestimation", "diagnostics/q_bound"} <= tags  # fmt: skip
    assert [s for s, t, _ in metrics(run) if t == "eval/episodic_return"] == [25, 50, 60]
    out = capsys.readouterr().out
    assert out.index("MiB") < out.index("run folder") and "verdict:" in out


def test_several_games_draw_alike_and_are_scored_apart(cartpole, monkeypatch):
    sizes, real = [], c.Learner.update
    counted = lambda self, b, **k: sizes.append([len(x.act) for x in b]) or real(self, b, **k)
    monkeypatch.setattr(c.Learner, "update", counted)
    small = c.collect(
        "OtherCartPole-v0", tiny(collect_steps=160), CPU
    )  # a fifth of the other's rows
    names = ("CartPole-v1", "OtherCartPole-v0")
    result = c.train(
        short(cartpole, env_id=names, dataset=(str(cartpole), str(small)), num_updates=5)
    )
    assert sizes == [[4, 4]] * 5
    tags = {t for _, t, _ in metrics(only_run("."))}
    assert {f"eval/episodic_return/{n}" for n in names} <= tags and set(
        result["final_games"]
    ) == set(names)
    assert abs(np.mean(list(result["final_games"].values())) - result["final_return_mean"]) < 1e-9


def test_each_game_is_evaluated_by_its_own_head_and_logged_under_its_name(cartpole, monkeypatch):
    """Planted returns: 10 and 12 of the first game, 20 and 24 of the second."""
    asked, names = [], ("CartPole-v1", "OtherCartPole-v0")
    planted = lambda net, envs, game, args: (
        asked.append((envs.name, game)) or (np.array([10.0, 12.0]) * (1 + game), 0.5 + game)
    )
    monkeypatch.setattr(c, "evaluate", planted)
    small = c.collect(names[1], tiny(collect_steps=160), CPU)
    data = (str(cartpole), str(small))
    result = c.train(short(cartpole, env_id=names, dataset=data, num_updates=20))
    assert set(asked) == {(names[0], 0), (names[1], 1)}
    assert result["final_games"] == result["selected_games"] == {names[0]: 11.0, names[1]: 22.0}
    rows = {(s, t): float(v) for s, t, v in metrics(only_run("."))}
    for name, mean, over in zip(names, (11, 22), (0.5, 1.5)):
        assert (
            rows[20, f"eval/episodic_return/{name}"]
            == rows[20, f"charts/episodic_return/{name}"]
            == mean
        )
        assert rows[20, f"diagnostics/overestimation/{name}"] == over
    envs = SimpleNamespace(frame_shape=(4,), actions=2, name="x")
    found = [load(x, envs).info["dataset_return_mean"] for x in data]
    assert found[0] != found[1] and abs(result["dataset_return_mean"] - np.mean(found)) < 1e-9


# ------------------------------------------------------------------------------------- several processes
SERVER = """
import json, os, signal, sys, traceback
from pathlib import Path
import gymnasium, torch, tyro
import torch._dynamo
import torch.distributed
import cql_atari as c

torch.set_num_threads(1)
gymnasium.make("CartPole-v1")

def at(n, what):
    real, calls = c.Learner.update, [0]
    def update(self, *rest, **more):
        calls[0] += 1
        if calls[0] == n:
            what()
        return real(self, *rest, **more)
    c.Learner.update = update

for line in sys.stdin:
    job, children = json.loads(line), []
    for rank in range(job["size"]):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 0
        os.chdir(job["cwd"])
        for fd, name in enumerate((os.devnull, f"out{rank}", f"err{rank}")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
        signal.alarm(50)
        if job["size"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["size"]),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
        try:
            exec(job["before"], globals() | {"rank": rank})
            c.train(tyro.cli(c.Args, args=job["words"]))
        except SystemExit as e:
            status = e.code
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stderr.flush()
        sys.__stdout__.flush()
        os._exit(status or 0)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in children]), flush=True)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def group():
    """group(size, *words, before=code): that many processes, as torchrun starts them; their exit codes."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    options["env"] = one_thread() | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", SERVER], **options) as server:

        def start(size, *words, before=""):
            job = {
                "size": size,
                "words": [str(w) for w in words],
                "before": before,
                "cwd": os.getcwd(),
            }
            server.stdin.write(json.dumps(job | {"port": free_port()}) + "\n")
            server.stdin.flush()
            codes = json.loads(server.stdout.readline())
            errors = "".join(Path(f"err{r}").read_text() for r in range(size))
            return SimpleNamespace(
                codes=codes, err=errors, out=[Path(f"out{r}").read_text() for r in range(size)]
            )

        yield start
        server.stdin.close()


def line(data, *more):
    return ["--env", "CartPole-v1", "--dataset", data, "--width", 2, "--num-updates", 60, "--batch-size", 12,
            "--target-network-frequency", 7, "--diagnostics-frequency", 20, "--eval-frequency", 25,
            "--log-frequency", 10, "--checkpoint-frequency", 15, "--eval-episodes", 2, "--no-cuda",
            "--dr3-coef", 0.01, *more]  # fmt: skip


def networks(run) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)["learner"]["networks"]


def assert_close(a: dict, b: dict):
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=1e-5, msg=k)


@pytest.fixture(scope="module")
def alone(cartpole, group, tmp_path_factory):
    """The run of one process."""
    here = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("alone"))
    try:
        assert group(1, *line(cartpole)).codes == [0]
        return only_run(".").resolve()
    finally:
        os.chdir(here)


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_end_where_one_does(size, alone, group, cartpole):
    """Within 1e-5; only the first one writes and speaks; the same evaluations and diagnostics."""
    done = group(size, *line(cartpole))
    assert done.codes == [0] * size, done.err
    run = only_run(".")
    assert_close(networks(run), networks(alone))
    assert done.out[1] == "" and "verdict" in done.out[0]
    assert summary(run)["num_updates"] == 60 and len(list(run.glob("*tfevents*"))) == 1
    ours, theirs = (
        {(s, t): float(v) for s, t, v in metrics(x) if "losses" not in t} for x in (run, alone)
    )
    assert ours.keys() == theirs.keys()
    for k in ours:
        assert abs(ours[k] - theirs[k]) < 1e-2 * max(1, abs(theirs[k])), k


def test_stopped_together_and_resumed_by_another_number(alone, group, cartpole):
    """One of two gets the signal, both stop at the same update with a checkpoint; three go on, then one."""
    before = "if rank == {}: at({}, lambda: os.kill(os.getpid(), signal.SIGTERM))"
    done = group(2, *line(cartpole), before=before.format(1, 13))
    assert done.codes == [143, 143] and "to go on" in done.out[0]
    run = only_run(".")
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 20
    done = group(3, *line(cartpole, "--resume", run), before=before.format(0, 11))
    assert (
        done.codes == [143] * 3
        and torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 40
    )
    assert group(1, *line(cartpole, "--resume", run)).codes == [0]
    assert only_run(".") == run
    assert_close(networks(run), networks(alone))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others(rank, group, cartpole):
    begun = time.time()
    kill = f"if rank == {rank}: at(37, lambda: os.kill(os.getpid(), signal.SIGKILL))"
    done = group(2, *line(cartpole), before=kill)
    assert done.codes[rank] == -9 and done.codes[1 - rank] == 1 and time.time() - begun < 30
    assert re.fullmatch(r"error: another process is gone .*\n", done.err), done.err
    assert torch.load(only_run(".") / "checkpoint.pt", weights_only=True)["step"] == 30
    assert not list(only_run(".").glob("*tmp"))


@pytest.mark.parametrize("who", ["random", "dqn"])
def test_the_first_process_collects_for_all(who, group):
    """The learning player is one process's own; it makes the set that it makes alone."""
    words = ["--env", "CartPole-v1", "--width", 2, "--num-updates", 4, "--batch-size", 8, "--collect", who,
             "--collect-steps", 1_600, "--eval-episodes", 1, "--head", "dqn", "--no-cuda"]  # fmt: skip
    done = group(2, *words)
    assert done.codes == [0, 0], done.err
    (made,) = (p.resolve() for p in Path("datasets").iterdir())
    Path("single").mkdir()
    os.chdir("single")
    assert group(1, *words).codes == [0]
    (single,) = Path("datasets").iterdir()
    assert single.name == made.name
    for path in made.glob("*.npy"):
        assert path.read_bytes() == (single / path.name).read_bytes(), path.name


def test_the_first_process_unpacks_for_all(group, monkeypatch):
    recorder = Recorder(200)
    recorder.play(150)
    recorder.columns["observation"] = np.zeros((200, 84, 84), np.uint8)
    recorder.columns["action"] %= 3
    recorder.dump(Path("x"), 0)
    words = [
        "--env",
        "ALE/Freeway-v5",
        "--dataset",
        "x",
        "--width",
        2,
        "--num-updates",
        2,
        "--batch-size",
        4,
    ]
    done = group(2, *words, "--storage", "mmap", "--eval-episodes", 0, "--no-cuda")
    assert done.codes == [0, 0], done.err
    assert len(list(Path("datasets").iterdir())) == 1 and "unpacking" in done.out[0]


def test_a_mistake_ends_every_process(group, cartpole):
    done = group(2, *line(cartpole, "--batch-size", 13))
    assert done.codes == [2, 2] and "not a multiple of 2" in done.err
    done = group(2, *line("no/such-v0"))
    assert done.codes == [2, 2] or 2 in done.codes
    assert not Path("runs").exists()


def test_torchrun_and_its_signal(cartpole):
    """The documented launcher, stopped from outside while it trains; what is saved goes on."""
    words = [str(x) for x in line(cartpole, "--num-updates", 1_000_000, "--eval-frequency", 0)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    ]
    with open("log", "w") as log:
        job = subprocess.Popen([*command, str(ROOT / "cql_atari.py"), *words], env=one_thread(), stdout=log,
                               stderr=log)  # fmt: skip
        try:
            deadline = time.time() + 45
            while not list(Path(".").glob("runs/*/checkpoint.pt")) and time.time() < deadline:
                time.sleep(0.1)
            job.send_signal(signal.SIGTERM)
            begun = time.time()
            assert job.wait(timeout=30) != 0 and time.time() - begun < 30
        finally:
            job.kill()
    saved = torch.load(only_run(".") / "checkpoint.pt", weights_only=True)
    assert saved["step"] % c.AGREE == 0 and "to go on" in Path("log").read_text(), Path(
        "log"
    ).read_text()
    args = tyro.cli(c.Args, args=[*words, "--resume", str(only_run("."))])
    c.train(replace(args, num_updates=saved["step"] + 3, eval_episodes=0))


# ----------------------------------------------------------------------------------- commands, learning
def documented_commands() -> list:
    commands = []
    for file in ("README.md", "benchmarks/README.md", "cql_atari.py"):
        text = (ROOT / file).read_text().replace("\\\\\n", " ").replace("\\\n", " ")
        text = text if file.endswith(".md") else text.split('"""')[1]
        commands += re.findall(r"(?:python|torchrun [^\n`#]*?) ?cql_atari\.py[^\n`#&|;]*", text)
    return sorted({" ".join(x.split()) for x in commands})


def test_there_are_commands():
    assert len(documented_commands()) >= 6


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_run(command):
    """Parsed as written, then cut to two updates of small networks."""
    args = tyro.cli(c.Args, args=shlex.split(command.split("cql_atari.py")[1]))
    if args.dataset:
        recorder = Recorder(800)
        recorder.play(500)
        recorder.columns["observation"] = np.zeros((800, 84, 84), np.uint8)
        for folder in args.dataset:
            recorder.dump(Path(folder), 3)
        args = replace(args, fraction=max(args.fraction, 0.2))
    else:
        args = replace(args, collect_steps=160)
    small = dict(
        num_updates=2, width=8, batch_size=8, eval_episodes=min(1, args.eval_episodes), cuda=False
    )
    assert c.train(replace(args, **small, max_episode_steps=5))["num_updates"] == 2


def test_learns_to_catch_from_random_play():
    """Pixels: random play is below the ball in one step of nine; measured here, 0.8 of 8 against 4.4."""
    args = c.Args(
        env_id=("Catch-v0",),
        collect_steps=8_000,
        collect_repeat=0.8,
        width=8,
        num_updates=800,
        learning_rate=1e-3,
    )
    args = replace(
        args,
        n_step=1,
        target_network_frequency=50,
        eval_episodes=30,
        diagnostics_frequency=0,
        cuda=False,
    )
    result = c.train(replace(args, eval_frequency=0))
    assert result["dataset_return_mean"] < 1.2 and result["final_return_mean"] > 2.5


def test_more_processes_than_gpus_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as e:
        c.join(c.Args())
    assert e.value.code == 2 and "more processes here than GPUs (1)" in capsys.readouterr().err
