"""How near does qt_opt.py's cross-entropy method come to the maximum? In seconds, without learning.

  python benchmarks/runs/cem.py > benchmarks/raw/cem.csv
  python benchmarks/figures.py cem

Rows: `error`, the mean squared distance per dimension between the argmax of Q = -|a - a*|^2 and a*,
uniform in the box, by dimension, iterations and choice, 64 samples and 6 elites; `uniform`, the
best of as many uniform actions. `missed`, how often CEM stays more than 0.1 away from an a* in a
corner of the box. `share`, what CEM has, on slopes of all directions, of what lies between the mean
and the maximum: diagnostics/argmax_share of a linear Q. `travel`, how far the mean gets in each
coordinate of an equal slope, in first deviations, by dimension and elites.
"""

import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from qt_opt import Args, cem  # noqa: E402

torch.manual_seed(0)
STATES = 4_000


def distance(best, args: Args):
    """Of the argmax from a*, (states, dimensions)."""
    return (
        cem(lambda obs, a: -((a - best[:, None]) ** 2).sum(-1), best, best.shape[1], args).act
        - best
    )


def uniform(best, n: int):
    act = torch.rand(len(best), n, best.shape[1]) * 2 - 1
    q = -((act - best[:, None]) ** 2).sum(-1)
    return act[torch.arange(len(best)), q.argmax(1)] - best


def travel(d: int, args: Args) -> float:
    """Of the mean on a slope, in first deviations, small ones, so that the box ends nothing."""
    found = cem(lambda obs, a: a.sum(-1), torch.zeros(STATES // d, 1), d, args).tried
    return float(found[:, -args.cem_samples :].mean()) / args.cem_std


out = csv.writer(sys.stdout, lineterminator="\n")
out.writerow(["kind", "dimension", "iterations", "elites", "choice", "value"])
for d in (1, 2, 3, 6, 11, 17):
    best = torch.rand(STATES, d) * 2 - 1
    for k in (1, 2, 3, 5, 8, 12):
        for choice in ("best", "mean"):
            error = distance(best, Args(cem_iterations=k, cem_choice=choice)).pow(2).mean()
            out.writerow(["error", d, k, 6, choice, f"{error:.3g}"])
        out.writerow(["error", d, k, "", "uniform", f"{uniform(best, 64 * k).pow(2).mean():.3g}"])
for d in (1, 2, 3, 6):
    best = torch.randn(STATES, d).sign()
    for elites in (6, 16):
        for k in (2, 5, 12):
            off = distance(best, Args(cem_iterations=k, cem_elites=elites)).abs().amax(1)
            out.writerow(["missed", d, k, elites, "best", f"{(off > 0.1).float().mean():.3g}"])
for d in (1, 2, 3, 6):
    slope = torch.randn(STATES, d)
    for k in (1, 2, 3, 5, 8):
        args = Args(cem_iterations=k)
        act = cem(lambda obs, a: (a * obs[:, None]).sum(-1), slope, d, args).act
        share = (act * slope).sum() / slope.abs().sum()
        out.writerow(["share", d, k, 6, "best", f"{share:.3g}"])
for d, elites in ((1, 2), (1, 6), (1, 16), (3, 6), (6, 6)):
    for k in (1, 2, 3, 5, 12, 30):
        args = Args(cem_iterations=k, cem_elites=elites, cem_std=0.001, cem_min_std=0.0)
        out.writerow(["travel", d, k, elites, "", f"{travel(d, args):.3g}"])
