"""How many updates does a reward take to travel back? The Blind Cliffwalk of PER, in minutes.

  python benchmarks/runs/cliffwalk.py    # rows of benchmarks/raw/cliffwalk.csv
  python benchmarks/figures.py cliffwalk

n states in a row. The right action leads on, and pays 1 behind the last; the wrong one ends the
walk with 0. The replay holds all 2^n walks of n choices, each up to its first mistake: of its
2^(n+1) - 2 transitions one is rewarded. gamma is 1 - 1/n. A table of Q learns by

    Q(s,a) <- Q(s,a) - 0.25 L'(Q(s,a) - y),    y = r + gamma (1 - done) max Q(s',.),

one transition at a time, L' the slope of the kind's loss, of 1/2 delta^2 where that is delta^2.
Counted are updates until the mean of (Q - Q*)^2 over states and actions is below 0.001, with ten
seeds; 200,000 at most.

- per, lap: td3.py's priorities. `per` has alpha 1, `per 0.6` the script's alpha; in a minibatch of
  one PER's weight is 1. The wrong transitions have nothing to learn, and are soon seldom drawn;
- pal: td3.py's loss, uniform draws;
- discor: weights need a minibatch in which they compare. Here exp(-gamma Delta(s',a') / T) over
  the whole replay is the probability of a draw; Delta is a table, T the running mean of Delta over
  the whole replay. `discor, T 1` holds T there.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE.parent))
import td3  # noqa: E402

KINDS = ("uniform", "per", "per 0.6", "lap", "pal", "discor", "discor, T 1")
ALPHA = td3.ALPHA | {"per": 1.0, "per 0.6": 0.6}
STEP = 0.25


def updates(kind: str, n: int, seed: int, most: int = 200_000, every: int = 20) -> int:
    """Updates until Q is right, a multiple of `every`."""
    rng, gamma = np.random.default_rng(seed), 1 - 1 / n
    torch.manual_seed(seed)
    name = kind[:3]
    pairs = [(s, a) for s in range(n) for a in (0, 1)]  # 1 is right
    count = np.array([2 ** (n - 1 - s) for s, _ in pairs])  # transitions of each pair
    rows = np.repeat(np.arange(2 * n), count)
    truth = np.zeros((n, 2))
    truth[:, 1] = gamma ** np.arange(n - 1, -1, -1)
    q, error = np.zeros((n + 1, 2)), np.zeros((n + 1, 2))  # the last row: the end
    temperature = 10.0
    after = np.array([s + 1 if a else n for s, a in pairs])
    if name in ("per", "lap"):
        priorities = td3.Priorities(len(rows), torch.device("cpu"))
        priorities.set(torch.arange(len(rows)), torch.ones(len(rows)))
        size = torch.tensor(float(len(rows)), dtype=torch.float64)
    for k in range(1, most + 1):
        if name in ("per", "lap"):
            i, _ = priorities.sample(1, size)
            pair = rows[int(i)]
        elif name == "dis":
            ahead = gamma * error[after, q[after].argmax(1)]
            weight = (count * np.exp((ahead.min() - ahead) / temperature)).cumsum()
            pair = weight.searchsorted(rng.random() * weight[-1], "right")
        else:
            pair = rows[rng.integers(len(rows))]
        (s, a), to = pairs[pair], after[pair]
        delta = q[s, a] - float(s == n - 1 and a) - gamma * q[to].max()
        if name in ("per", "lap"):
            p = td3.priority(torch.tensor([[delta]]), name, ALPHA[kind])
            priorities.set(i, p)
        if name == "dis":
            target = abs(delta) + gamma * error[to, q[to].argmax()]
            error[s, a] += STEP * (target - error[s, a])
            mean = count @ error[:n].ravel() / len(rows)
            temperature = 1.0 if "T 1" in kind else temperature + 0.005 * (mean - temperature)
        q[s, a] -= STEP * slope(delta, name)
        if k % every == 0 and ((q[:n] - truth) ** 2).mean() < 1e-3:
            return k
    return most


def slope(delta: float, kind: str) -> float:
    """Of the loss at delta. td3.py's is asked where it is not that of 1/2 delta^2."""
    if kind not in ("lap", "pal") or abs(delta) <= 1:
        return delta
    d = torch.tensor([[delta]], requires_grad=True)
    td3.td_loss(d, kind, ALPHA[kind]).sum().backward()
    return float(d.grad)


def main():
    torch.set_num_threads(1)
    rows = [["states", "transitions", "kind", "seed", "updates"]]
    for n in (2, 4, 6, 8, 10):
        for kind in KINDS:
            found = [updates(kind, n, seed) for seed in range(1, 11)]
            print(f"{n} states, {kind}: {found}", flush=True)
            rows += [[n, 2 ** (n + 1) - 2, kind, i, k] for i, k in enumerate(found, 1)]
    out = HERE / "raw" / "cliffwalk.csv"
    with open(sys.argv[1] if sys.argv[1:] else out, "w", newline="") as f:
        csv.writer(f).writerows(rows)


if __name__ == "__main__":
    main()
