"""What does it cost to draw a minibatch by priority? td3.py's `Priorities` beside other structures.

  python benchmarks/runs/replay_cost.py    # writes benchmarks/raw/replay_cost.csv

Milliseconds of one thread of a CPU (the process's own time, the least of ten means over 100 calls)
for 256 rows of a full replay of 10^5 and 10^6 transitions with Hopper-v5's shapes. `draw` finds the
rows, `set` writes their new priorities, `gather` fetches the transitions, which every kind pays.

- uniform: Replay.sample's rows;
- blocks: Priorities, sums of 64 rows, computed anew;
- cumsum: cumulative sums of all rows at each draw, nothing to keep;
- tree: a binary sum tree, parents computed anew.

`update` is a whole update of td3.py at its defaults, by --replay, every second one with a policy
step: means over 20, the kinds in turn, the least of 15.
"""

import csv
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE.parent))
import td3  # noqa: E402

CPU, BATCH = torch.device("cpu"), 256


def milliseconds(calls: dict, repeats: int = 100, times: int = 10) -> dict:
    """Of each call; they take turns, so that what else the machine does falls on all alike."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(times):
        for name, call in calls.items():
            begin = time.process_time()
            for _ in range(repeats):
                call()
            least[name] = min(least[name], 1e3 * (time.process_time() - begin) / repeats)
    return least


class Tree:
    """Levels from the leaves up; level[i] = below[2i] + below[2i + 1]."""

    def __init__(self, p):
        n = 1 << (len(p) - 1).bit_length()
        self.levels = [torch.zeros(n, dtype=torch.float64)]
        self.levels[0][: len(p)] = p
        while len(self.levels[-1]) > 1:
            self.levels.append(self.levels[-1].view(-1, 2).sum(1))

    def draw(self):
        u = torch.rand(BATCH, dtype=torch.float64) * self.levels[-1]
        i = torch.zeros(BATCH, dtype=torch.long)
        for level in self.levels[-2::-1]:
            left = level[2 * i]
            right = u >= left
            u, i = u - right * left, 2 * i + right
        return i

    def set(self, i, p):
        self.levels[0][i] = p
        for below, level in zip(self.levels, self.levels[1:]):
            i = i // 2
            level[i] = below[2 * i] + below[2 * i + 1]


def structures(n: int) -> dict:
    """(name, part) -> call, on n rows with log-normal priorities."""
    p = torch.randn(n, dtype=torch.float64).exp()
    rows, new = torch.randint(n, (BATCH,)), torch.rand(BATCH, dtype=torch.float64)
    size = torch.tensor(float(n), dtype=torch.float64)
    blocks, tree = td3.Priorities(n, CPU), Tree(p)
    blocks.set(torch.arange(n), p)

    def cumsum():
        ends = p.cumsum(0)
        u = torch.rand(BATCH, dtype=torch.float64) * ends[-1]
        return torch.searchsorted(ends, u, right=True)

    return {
        ("uniform", "draw"): lambda: (torch.rand(BATCH, dtype=torch.float64) * size).long(),
        ("blocks", "draw"): lambda: blocks.sample(BATCH, size),
        ("blocks", "set"): lambda: blocks.set(rows, new),
        ("cumsum", "draw"): cumsum,
        ("cumsum", "set"): lambda: p.__setitem__(rows, new),
        ("tree", "draw"): tree.draw,
        ("tree", "set"): lambda: tree.set(rows, new),
    }


def an_update(kind: str, n: int):
    args = td3.Args(replay=kind)
    replay, priorities = td3.Replay(n, 11, 3, CPU), td3.Priorities(n, CPU)
    replay.add(*(torch.randn(n, *x.shape[1:]).tanh() for x in replay.columns.values()))
    priorities.add(replay, n)
    learner, count = td3.Learner(11, 3, args, CPU), [0]

    def update():
        count[0] += 1
        with_policy = count[0] % args.policy_frequency == 0
        if kind in ("per", "lap"):
            return td3.prioritised_update(learner, replay, priorities, with_policy)
        return learner.update(replay.sample(args.batch_size), with_policy)

    return update


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [["what", "transitions", "part", "milliseconds"]]
    for n in (10**5, 10**6):
        calls = structures(n)
        replay, at = td3.Replay(n, 11, 3, CPU), torch.randint(n, (BATCH,))
        calls["every kind", "gather"] = lambda replay=replay, at=at: replay.batch(at)
        found = milliseconds(calls)
        kinds = ("uniform", "per", "lap", "pal", "discor")
        found |= milliseconds({(kind, "update"): an_update(kind, n) for kind in kinds}, 20, 15)
        for (name, part), value in found.items():
            rows.append([name, n, part, round(value, 3)])
            print(*rows[-1], flush=True)
    with open(HERE / "raw" / "replay_cost.csv", "w", newline="") as f:
        csv.writer(f).writerows(rows)


if __name__ == "__main__":
    main()
