"""What do the constraints of policy_constraints.py allow? Bandits with one action, in seconds.

  python benchmarks/runs/divergences.py    # rows of benchmarks/raw/divergences.csv
  python benchmarks/figures.py divergences

The lecture says that MMD constrains the support, "regardless of density", and KL the distribution.
Each row is D(pi, b) of a Gaussian pi on the line:

- `gap`: b has 90 % at -0.5, 10 % at 0.5, each with a deviation of 0.1; pi has the same and moves;
- `uniform`: b is uniform on [-1, 1], pi has a deviation of 0.1 and moves;
- `width`: b is N(0, 1), pi is N(0, std^2); N is the number of samples that mmd compares;
- `best`: eps is a tenth more than it takes to let pi = N(0.5, 0.1^2) in: on the data of `gap` into
  the small mode, on those of `uniform` half-way to the border. Of all pi with D <= eps the one with
  the largest E r(a), r = exp(-(a - peak)^2 / 0.02); the peak is in the gap between the modes, at 0,
  at the small mode, at 0.5, or near the border, at 0.8.

All are integrals over a grid; mmd is the root of the expectation of the script's V-statistic, with
a laplacian kernel and sigma 20.
"""

import csv
import math
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
GRID = torch.linspace(-6, 6, 1_201, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])
KERNEL = torch.exp(-(GRID[:, None] - GRID).abs() / (2 * 20.0))


def normal(mean: float, std: float):
    """Density on the grid."""
    return torch.exp(-0.5 * ((GRID - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


DATA = {
    "gap": 0.9 * normal(-0.5, 0.1) + 0.1 * normal(0.5, 0.1),
    "uniform": (GRID.abs() <= 1).double() / 2,
    "width": normal(0, 1),
}


def kl(p, q) -> float:
    """Of densities on the grid; where q is nothing the logarithm is held at that of 1e-30."""
    return float((p * (p.clamp(min=1e-30) / q.clamp(min=1e-30)).log()).sum() * STEP)


def mmd(p, q, n: int) -> float:
    """sqrt E[MMD^2] of n samples of each: n of n^2 pairs are a sample with itself, k = 1."""

    def mean_k(p, q):
        return float(p @ KERNEL @ q) * STEP**2

    alike = (2 + (n - 1) * (mean_k(p, p) + mean_k(q, q))) / n
    return math.sqrt(max(alike - 2 * mean_k(p, q), 0.0))


def measures(case: str, mean: float, std: float) -> dict:
    p, b = normal(mean, std), DATA[case]
    found = {"kl": kl(p, b), "forward-kl": kl(b, p)}
    return found | {f"mmd, N = {n}": mmd(p, b, n) for n in (4, 10, 100)}


BEST = {  # what is drawn: data, where the reward's peak is
    "reward in the gap": ("gap", 0.0),
    "reward at the small mode": ("gap", 0.5),
    "reward near the border": ("uniform", 0.8),
}


def best(case: str, name: str, peak: float) -> tuple[float, float, float]:
    """Mean, deviation and E r of the best pi that eps allows, of a grid of them."""
    eps, reward = 1.1 * measures(case, 0.5, 0.1)[name], torch.exp(-((GRID - peak) ** 2) / 0.02)
    found = []
    for mean in torch.linspace(-1, 1, 41).tolist():
        for std in (0.05, 0.1, 0.2, 0.4, 0.8):
            if measures(case, mean, std)[name] <= eps:
                found.append((float(normal(mean, std) @ reward) * STEP, mean, std))
    r, mean, std = max(found)
    return mean, std, r


def main():
    rows = [["case", "divergence", "mean", "std", "value"]]
    for case in ("gap", "uniform"):
        for mean in torch.linspace(-1.5, 1.5, 61).tolist():
            for name, d in measures(case, mean, 0.1).items():
                rows.append([case, name, round(mean, 3), 0.1, d])
    for std in torch.linspace(0.1, 2, 39).tolist():
        for name, d in measures("width", 0.0, std).items():
            rows.append(["width", name, 0.0, round(std, 3), d])
    for what, (case, peak) in BEST.items():
        for name in ("kl", "forward-kl", "mmd, N = 4"):
            mean, std, reward = best(case, name, peak)
            rows.append([f"best, {what}", name, round(mean, 3), std, reward])
            print(*rows[-1])
    for case, mean, std in (("gap", -0.5, 0.1), ("gap", 0.0, 0.1), ("gap", 0.5, 0.1)):
        print(case, mean, {k: round(v, 3) for k, v in measures(case, mean, std).items()})
    out = HERE / "raw" / "divergences.csv"
    with open(sys.argv[1] if sys.argv[1:] else out, "w", newline="") as f:
        csv.writer(f).writerows(rows)


if __name__ == "__main__":
    main()
