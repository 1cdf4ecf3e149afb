"""How much noise does the sampled backward pass add to the critic's gradient?

  python cql_continuous.py --env HalfCheetah-v5 --dataset FILE --cql-backward 0 \
      --width 256 --num-updates 10_000
  python benchmarks/runs/cql_noise.py runs/HalfCheetah-v5__* --out benchmarks/raw/cql_noise.csv

For each run's checkpoint and its data, over 200 minibatches of the run's size: the squared norm of
the mean gradient of all critics, and the variance (the sum over parameters) that comes from the
minibatch, of the squared TD error, of alpha times the conservative term with all samples backward,
and of their sum; and the variance that K of the samples add to it, for the same minibatches and the
same sampled actions. Then what --precision bf16 moves: half the sum of absolute differences of the
weights by which samples are drawn, and the mean absolute difference of the logged term.
Rows of the CSV: run, updates, what, value.
"""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import cql_continuous as cql  # noqa: E402


def gradient(learner, loss):
    parts = torch.autograd.grad(loss, [*learner.critic.parameters()])
    return torch.cat([x.flatten() for x in parts])


def terms(learner, batch, args, seed: int) -> dict:
    """Gradients of the TD error and of the conservative term with K = 0, 1, 2."""
    torch.manual_seed(seed)
    with torch.no_grad():
        _, y = cql.backup(learner, batch, args)
    q = learner.critic(batch.obs, batch.act)
    found = {"td": gradient(learner, ((q - y) ** 2).mean(1).sum())}
    for k in (0, 1, 2):
        torch.manual_seed(seed)  # the same sampled actions
        q_data = learner.critic(batch.obs, batch.act)
        term, _ = cql.conservative_loss(learner, batch, q_data, replace(args, cql_backward=k))
        found[k] = gradient(learner, args.cql_alpha * term.sum())
    return found


@torch.no_grad()
def rounding(learner, batch, args) -> tuple[float, float]:
    """What bf16 moves: the weights (total variation), the term (mean over states and critics)."""
    act, log_ratio = cql.proposals(
        learner.actor, batch.obs, batch.next_obs, "three-sets", args.cql_samples
    )
    q = learner.critic(batch.obs, act)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = learner.critic(batch.obs, act)
    w, w_rounded = ((x.float() - log_ratio).softmax(-1) for x in (q, rounded))
    terms = [cql.log_mean_exp(x.float(), log_ratio) for x in (q, rounded)]
    moved = (w - w_rounded).abs().sum(-1).mean() / 2
    return float(moved), float((terms[0] - terms[1]).abs().mean())


def measure(folder: Path, minibatches: int) -> dict:
    saved = torch.load(folder / "checkpoint.pt", "cpu", weights_only=True)
    args = cql.Args(**saved["args"])
    data = cql.load(args.dataset, args, None, torch.device("cpu"))
    sizes = data.columns["obs"].shape[1], data.columns["act"].shape[1]
    learner = cql.Learner(*sizes, args, torch.device("cpu"))
    learner.load_state_dict(saved["networks"])
    torch.manual_seed(0)
    sums, squares, added = {}, {}, {1: 0.0, 2: 0.0}
    for seed in range(minibatches):
        found = terms(learner, data.sample(args.batch_size), args, seed)
        three = {"td": found["td"], "cql": found[0], "both": found["td"] + found[0]}
        for name, g in three.items():
            sums[name] = sums.get(name, 0) + g.double()
            squares[name] = squares.get(name, 0) + float(g.double().pow(2).sum())
        for k in added:
            added[k] += float((found[k] - found[0]).double().pow(2).sum()) / minibatches
    row = {"updates": saved["step"]}
    for name in sums:
        mean = float((sums[name] / minibatches).pow(2).sum())
        row[f"{name} variance"] = (squares[name] / minibatches - mean) * minibatches
        row[f"{name} variance"] /= minibatches - 1
        row[f"{name} squared mean"] = mean - row[f"{name} variance"] / minibatches
    row["bf16 moves the weights"], row["bf16 moves the term"] = rounding(
        learner, data.sample(1024), args
    )
    for k in added:
        row[f"K = {k} adds"] = added[k]
        row[f"K = {k} adds, over both"] = added[k] / row["both variance"]
        row[f"K = {k} adds, over td"] = added[k] / row["td variance"]
    return row


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--minibatches", type=int, default=200)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "raw" / "cql_noise.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with open(options.out, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["run", "updates", "what", "value"])
        for folder in options.runs:
            row = measure(folder, options.minibatches)
            step = row.pop("updates")
            for what, value in row.items():
                writer.writerow([folder.name.rsplit("__", 1)[0], step, what, f"{value:.6g}"])
            print(folder.name, step, {k: round(v, 4) for k, v in row.items() if "over" in k})


if __name__ == "__main__":
    main()
