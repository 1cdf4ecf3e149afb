"""The episodes of a D4RL-layout file with the best tenth of the returns: what is left to clone when
the rest is thrown away.

  python benchmarks/runs/best_tenth.py datasets/HalfCheetah-v5_replay_100000.hdf5 best.hdf5
"""

import argparse
from pathlib import Path

import h5py
import numpy as np


def best(columns: dict, share: float) -> np.ndarray:
    """The rows of the best episodes, one at least; what follows the last end is an episode, too."""
    end = columns["terminals"].astype(bool) | columns["timeouts"].astype(bool)
    end[-1] = True
    last = np.flatnonzero(end)
    episode = np.repeat(np.arange(len(last)), np.diff(last, prepend=-1))
    returns = np.bincount(episode, columns["rewards"])
    kept = np.argsort(-returns, kind="stable")[: max(1, round(share * len(returns)))]
    means = f"mean {returns[kept].mean():.1f} instead of {returns.mean():.1f}"
    print(f"{len(kept)} of {len(returns)} episodes, {means}")
    return np.flatnonzero(np.isin(episode, kept))


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--share", type=float, default=0.1)
    options = parser.parse_args()
    with h5py.File(options.source) as f:
        columns = {key: x[()] for key, x in f.items()}
    rows = best(columns, options.share)
    with h5py.File(options.target, "w") as f:
        for key, x in columns.items():
            f[key] = x[rows]


if __name__ == "__main__":
    main()
