"""Paths around the trap of Navigation-v0, and what the safety critic says of each place: twenty
episodes of each run's policy as it explores, V_C of pi without its shield on a grid.

  python safety_critics.py --total-timesteps 10_000 --exp-name nav_all
  python safety_critics.py --total-timesteps 10_000 --exp-name nav_trpo --shield off --no-lagrange
  python benchmarks/runs/navigation.py runs/Navigation-v0__nav_*
  python benchmarks/figures.py navigation

Writes benchmarks/raw/navigation.csv: run, what ("v_c", or the number of a path), x, y, value (V_C;
of the last place of a path 1 for an accident, else 0).
"""

import csv
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import safety_critics as s  # noqa: E402

PATHS, SIDE = 20, 41


@torch.no_grad()
def rows_of(folder: Path) -> list:
    saved = s.load_checkpoint(folder)
    args = s.Args(**saved["args"])
    torch.manual_seed(args.seed)
    rows, at = [], np.linspace(-5, 5, SIDE)
    with ExitStack() as stack:
        s.register()
        envs = s.make_envs(args.env_id, 1, stack)
        learner = s.Learner(*s.check_boxes(envs, args.env_id), args, torch.device("cpu"))
        learner.load_state_dict(saved["networks"])
        places = np.stack(np.meshgrid(at, at), -1).reshape(-1, 2)
        risks = learner.policy_risk(learner.standardised(places.astype(np.float32)))
        for (x, y), v in zip(places, risks.tolist()):
            rows.append([args.exp_name, "v_c", f"{x:.2f}", f"{y:.2f}", f"{v:.4f}"])
        env, obs = envs.envs[0].unwrapped, envs.reset(seed=[args.seed])[0]
        for path in range(PATHS):
            over, places = False, [env.at]
            while not over:
                act = s.to_env(learner.act(obs, explore=True), envs)
                obs, _, terminated, truncated, infos = envs.step(act)
                over = bool(terminated[0] or truncated[0])
                places.append(infos["final_obs"][0] if over else env.at)
            accident = (np.abs(places[-1] - env.TRAP) < env.HALF).all() or np.abs(
                places[-1]
            ).max() > 5
            for i, (x, y) in enumerate(places):
                value = int(accident and i == len(places) - 1)
                rows.append([args.exp_name, path, f"{x:.3f}", f"{y:.3f}", value])
    return rows


def main():
    rows = [row for folder in map(Path, sys.argv[1:]) for row in rows_of(folder)]
    with open(ROOT / "benchmarks" / "raw" / "navigation.csv", "w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows(["run what x y value".split(), *rows])


if __name__ == "__main__":
    main()
