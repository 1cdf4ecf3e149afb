"""Both signs of CQL's term on a critic of accidents, against the exact probability, in seconds.

  python benchmarks/runs/safety_signs.py    # rows of benchmarks/raw/safety_signs.csv
  python benchmarks/figures.py safety_signs

FrozenLake 4x4, slippery, holes being accidents, gamma_C 0.9, tables and exact expectations. pi is
uniform; the data's policy b takes the least risky action with 0.7, each other with 0.1. Rows:

- `v`: V_C(s0) where the loss of safety_critics.py is least, over alpha: eq2, eq1, eq2 clipped to
  [0, 1], and `CQL's sign`, the term as it stands for rewards. `exact` is a linear solve;
- `unseen`: descent on the term alone where the data never goes, alpha 1, rate 0.1, from 0.05: Q as
  a number and as a sigmoid, over steps.
"""

import csv
import math
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np

HERE = Path(__file__).resolve().parent.parent
GAMMA, HOLES, GOAL = 0.9, (5, 7, 11, 12), 15
LIVE = [s for s in range(16) if s not in (*HOLES, GOAL)]


def model() -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of an accident (16, 4) and of each next state that is no end (16, 4, 16)."""
    cost, move = np.zeros((16, 4)), np.zeros((16, 4, 16))
    P = gym.make("FrozenLake-v1").unwrapped.P
    for s in LIVE:
        for a in range(4):
            for p, after, _, end in P[s][a]:
                cost[s, a] += p * (after in HOLES)
                move[s, a, after] += p * (not end)
    return cost, move


COST, MOVE = model()


def solved(pi: np.ndarray) -> np.ndarray:
    """The exact Q_C (16, 4)."""
    M = np.einsum("sax,xb->saxb", MOVE, pi).reshape(64, 64)
    return np.linalg.solve(np.eye(64) - GAMMA * M, COST.ravel()).reshape(16, 4)


def fixed_point(pi, bonus, clip: bool = False) -> np.ndarray:
    """Q = y + bonus; the clip is of Q after each backup."""
    Q = np.zeros((16, 4))
    for _ in range(500):
        Q = COST + GAMMA * MOVE @ (pi * Q).sum(1) + bonus
        Q[[*HOLES, GOAL]] = 0
        Q = Q.clip(0, 1) if clip else Q
    return Q


def main():
    pi = np.full((16, 4), 0.25)
    exact = solved(pi)
    b = np.full((16, 4), 0.1)
    b[np.arange(16), exact.argmin(1)] = 0.7
    forms = {
        "eq2": lambda a: fixed_point(pi, a * (pi / b - 1)),
        "eq1": lambda a: fixed_point(pi, a * pi / b),
        "eq2, clipped": lambda a: fixed_point(pi, a * (pi / b - 1), clip=True),
        "CQL's sign": lambda a: fixed_point(pi, -a * (pi / b - 1)),
    }
    rows = [["case", "form", "x", "value"]]
    for alpha in np.linspace(0, 0.1, 21).round(3).tolist():
        rows.append(["v", "exact", alpha, float((pi * exact).sum(1)[0])])
        rows += [["v", name, alpha, float((pi * q(alpha)).sum(1)[0])] for name, q in forms.items()]
    for name, q in forms.items():
        v = (pi * (q(0.02) - exact)).sum(1)[LIVE]
        print(f"{name}, alpha 0.02: V too low in {(v < -1e-9).sum()} of {len(LIVE)} states")
    number, logit = 0.05, math.log(0.05 / 0.95)
    for step in range(401):
        sigmoid = 1 / (1 + math.exp(-logit))
        rows += [["unseen", "a number", step, number], ["unseen", "a sigmoid", step, sigmoid]]
        number, logit = number + 0.1, logit + 0.1 * sigmoid * (1 - sigmoid)
    for name in ("exact", *forms):
        at = [r for r in rows if r[:2] == ["v", name]]
        print(name, {r[2]: round(r[3], 3) for r in at if r[2] in (0, 0.02, 0.05, 0.1)})
    with open(sys.argv[1] if sys.argv[1:] else HERE / "raw" / "safety_signs.csv", "w") as f:
        csv.writer(f, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
