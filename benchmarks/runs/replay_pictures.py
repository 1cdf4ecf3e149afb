"""Three pictures of what the replayed transitions do to Q-learning, on a grid whose Q* is known.

  python benchmarks/runs/replay_pictures.py    # rows of benchmarks/raw/replay_pictures.csv
  python benchmarks/figures.py replay_pictures

The lecture shows, after DisCor (arXiv 2003.07305), the error of Q and the return over training:
(a) transitions of the present policy alone: the error falls at first and stays above 0, the return
below the best; (b) a replay, drawn uniformly: the error rises sharply now and then, and the return
breaks down with it; (c) the same with sparse rewards: nothing is learnt.

Here: dr3_analysis.py's grid of 8 x 8, from one corner to the other, one move in ten slips. `dense`:
a step costs 0.1, the goal pays 1; `sparse`: the goal pays 1, all else is 0. A state is seen as 16
random numbers. Q is td3.py's critic of 2 x 32 units, a = argmax Q but for one in ten; each step is
followed by an update on 64 transitions, y = r + gamma max Qt(s',.), gamma 0.95, Qt copied every 100
updates, Adam at 1e-3. `on-policy` draws from the last 100 steps; the others from all of them, with
td3.py's formulas. `all pairs` draws states and actions evenly, with their true successors: what no
learner has, and the best that this network does.

When the goal is first seen would decide more than the draws do. So each memory begins with the same
400 steps of random episodes that reached the goal; `on-policy` has forgotten them after 100 steps.
Ten seeds of each kind, each with a network and a beginning of its own.

Columns: the mean of |Q - Q*| over states and actions; the greedy policy's exact return from the
start, 1 for the best policy and 0 for one that never arrives; `found`, the step at which the agent
itself first reached the goal, empty if it never did.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE.parent))
import dr3_analysis  # noqa: E402
import td3  # noqa: E402

KINDS = ("all pairs", "on-policy", "uniform", "per", "lap", "pal", "discor")
SEEDS, GRID, GAMMA, STEPS, BATCH, LIMIT = 10, 8, 0.95, 5_000, 64, 100
BEGINNING = 400  # steps in the memory before the first of the agent
STATES = GRID * GRID - 1  # the last is the goal


def a_net(args):
    return td3.Critic(16, 4, args)


def values(net, seen):
    """Q of all four actions, (n, B, 4), where states are seen as (n, B, 16)."""
    n, b, _ = seen.shape
    rows = seen.repeat_interleave(4, 1)
    return net(rows, torch.eye(4).repeat(n, b, 1)).view(n, b, 4)


def a_beginning(P, rng):
    """(BEGINNING, 3), the last (s, a, s') of random episodes that reached the goal in time."""
    sums, kept = P.cumsum(2), []
    while len(kept) < BEGINNING:
        s, episode = 0, []
        while s != STATES and len(episode) < LIMIT:
            a = rng.integers(4)
            after = min(int((rng.random() > sums[s, a]).sum()), STATES)
            episode.append((s, a, after))
            s = after
        if s == STATES:
            kept += episode
    return torch.tensor(np.array(kept[-BEGINNING:]))


def run(kind: str, rewards: str, steps: int = STEPS) -> list[tuple]:
    """(step, seed, error, return, found) every 50 steps."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    P, _ = dr3_analysis.grid_model(GRID)
    cost = -0.1 if rewards == "dense" else 0.0
    r = cost + (1 - cost) * P[:, :, STATES]
    r[STATES] = 0
    best, worst = dr3_analysis.optimal_q(P, r, GAMMA), cost / (1 - GAMMA)
    sums, truth = P.cumsum(2), torch.from_numpy(best[:STATES])
    features = torch.randn(SEEDS, STATES + 1, 16)
    seed = torch.arange(SEEDS)[:, None]
    args = td3.Args(num_critics=SEEDS, width=32)
    net, target = a_net(args), a_net(args)
    target.load_state_dict(net.state_dict())
    optim = torch.optim.Adam(net.parameters(), lr=1e-3)
    error, error_target = (a_net(td3.replace(args, depth=3)) for _ in range(2))
    error_target.load_state_dict(error.state_dict())
    error_optim, tau = torch.optim.Adam(error.parameters(), lr=1e-3), torch.full((SEEDS,), 10.0)
    alpha = td3.ALPHA.get(kind)
    s, t = np.zeros(SEEDS, int), np.zeros(SEEDS, int)
    memory = torch.zeros(SEEDS, BEGINNING + steps, 3, dtype=torch.long)  # s, a, s'
    for i in range(SEEDS):  # with generators of their own: the same for all kinds
        memory[i, :BEGINNING] = a_beginning(P, np.random.default_rng([1, i]))
    p, highest = torch.ones(SEEDS, BEGINNING + steps).double(), torch.ones(SEEDS, 1).double()
    measured, found = [], np.zeros(SEEDS, int)
    for k in range(steps):
        size = BEGINNING + k + 1  # with the step that is taken now
        with torch.no_grad():
            a = values(net, features[seed, torch.from_numpy(s)[:, None]]).argmax(2)[:, 0].numpy()
        a = np.where(rng.random(SEEDS) < 0.1, rng.integers(4, size=SEEDS), a)
        after = (rng.random(SEEDS)[:, None] > sums[s, a]).sum(1).clip(max=STATES)
        memory[:, size - 1] = torch.from_numpy(np.stack([s, a, after], 1))
        p[:, size - 1] = highest[:, 0]
        found[(found == 0) & (after == STATES)] = k + 1
        t += 1
        over = (after == STATES) | (t == LIMIT)
        s, t = np.where(over, 0, after), np.where(over, 0, t)

        weight = None
        if kind == "all pairs":
            pairs = rng.integers(STATES, size=(SEEDS, BATCH)), rng.integers(4, size=(SEEDS, BATCH))
            to = (rng.random((SEEDS, BATCH, 1)) > sums[pairs]).sum(2).clip(max=STATES)
            batch = torch.from_numpy(np.stack([*pairs, to], 2))
        else:
            oldest = size - 100 if kind == "on-policy" else 0
            if kind in ("per", "lap"):
                rows = torch.multinomial(p[:, :size], BATCH, replacement=True)
            else:
                rows = torch.randint(oldest, size, (SEEDS, BATCH))
            if kind == "per":
                beta = td3.BETA + (1 - td3.BETA) * k / steps
                weight = p[seed, rows] ** -beta
                weight = (weight / weight.amax(1, keepdim=True)).float()
            batch = memory[seed, rows]
        state, act, to = batch.unbind(2)
        go = GAMMA * (to != STATES)
        with torch.no_grad():
            ahead = features[seed, to]
            q_ahead, a_ahead = values(target, ahead).max(2)
            y = torch.where(to == STATES, 1.0, cost) + go * q_ahead
        one_hot, seen = torch.eye(4)[act], features[seed, state]
        q = net(seen, one_hot)
        delta = q - y
        if kind == "discor":
            with torch.no_grad():
                following = go * error_target(ahead, torch.eye(4)[a_ahead])
                weight = td3.discor_weight(following, tau)
            guess = error(seen, one_hot)
            loss = ((guess - delta.detach().abs() - following) ** 2).mean(1).sum()
            error_optim.zero_grad()
            loss.backward()
            error_optim.step()
            tau.lerp_(guess.detach().mean(1), 0.005)
        name = kind if kind in td3.ALPHA else "uniform"
        if name == "pal":
            loss = torch.cat([td3.td_loss(d[None], name, alpha) for d in delta])
        else:
            loss = td3.td_loss(delta, name, alpha, weight)
        optim.zero_grad()
        loss.mean(1).sum().backward()
        optim.step()
        if kind in ("per", "lap"):
            new = torch.stack([td3.priority(d[None], name, alpha) for d in delta.detach().double()])
            p.scatter_(1, rows, new)
            highest = torch.maximum(highest, new.amax(1, keepdim=True))
        if k % 100 == 99:
            target.load_state_dict(net.state_dict())
            error_target.load_state_dict(error.state_dict())
        if k % 50 == 49:
            with torch.no_grad():
                q = values(net, features).double()
            off = (q[:, :STATES] - truth).abs().mean((1, 2))
            for i in range(SEEDS):
                policy = np.eye(4)[q[i].argmax(1)]
                reached = (policy * dr3_analysis.evaluate_policy(P, r, policy, GAMMA))[0].sum()
                share = (reached - worst) / (best[0].max() - worst)
                measured.append((k + 1, i + 1, round(float(off[i]), 5), round(float(share), 5)))
    return [(*x, found[x[1] - 1] or "") for x in measured]


def main():
    torch.set_num_threads(1)
    rows = [["rewards", "kind", "step", "seed", "error", "return", "found"]]
    for rewards in ("dense", "sparse"):
        for kind in KINDS:
            measured = run(kind, rewards)
            rows += [[rewards, kind, *x] for x in measured]
            last = [x for x in measured if x[0] > STEPS - 1_000]
            error, reached = (np.mean([x[i] for x in last]) for i in (2, 3))
            print(f"{rewards}, {kind}: error {error:.3f}, return {reached:.3f}", flush=True)
    out = HERE / "raw" / "replay_pictures.csv"
    with open(sys.argv[1] if sys.argv[1:] else out, "w", newline="") as f:
        csv.writer(f).writerows(rows)


if __name__ == "__main__":
    main()
