"""What the same action at every step earns in cql_atari.py's evaluation episodes: the least to
beat.

  python benchmarks/runs/constant_actions.py --env ALE/SpaceInvaders-v5 --seeds 1 2 --episodes 10
  python benchmarks/runs/constant_actions.py --seeds 1 --episodes 30

Prints, for each action, the mean of each seed; --csv appends env_id, seed, episodes, action,
mean, std.
"""

import argparse
import csv
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cql_atari import Args, Envs, evaluate  # noqa: E402


def constant(action: int, actions: int):
    """A learner in evaluate()'s eyes, whose Q is largest for one action everywhere."""
    q = torch.zeros(actions)
    q[action] = 1
    net = SimpleNamespace(eval=lambda: None, train=lambda: None)
    device = torch.device("cpu")
    return SimpleNamespace(net=net, device=device, q=lambda obs, game: q.expand(len(obs), -1))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", default="ALE/SpaceInvaders-v5")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--csv")
    args = parser.parse_args()
    settings = Args(env_id=(args.env,))
    stack, rows = ExitStack(), []
    envs = Envs(args.env, args.episodes, stack)
    for action in range(envs.actions):
        for seed in args.seeds:
            settings.seed = seed
            returns, _ = evaluate(constant(action, envs.actions), envs, 0, settings)
            rows.append([args.env, seed, args.episodes, action, returns.mean(), returns.std()])
            result = f"{returns.mean():.1f} +- {returns.std():.1f}"
            print(f"action {action}, seed {seed}: {result}", flush=True)
    stack.close()
    if args.csv:
        with open(args.csv, "a", newline="") as f:
            head = [] if f.tell() else [["env_id", "seed", "episodes", "action", "mean", "std"]]
            csv.writer(f).writerows([*head, *rows])


if __name__ == "__main__":
    main()
