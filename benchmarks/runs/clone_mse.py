"""Behaviour cloning by mean squared error, beside cql_continuous.py's cloning (-log pi), on a
replay.

  python benchmarks/runs/clone_mse.py datasets/HalfCheetah-v5_replay_100000.hdf5 HalfCheetah-v5

Clones the whole file, then its last fifth; the mean return of ten episodes of each goes to
benchmarks/raw/clone_mse.csv.
"""

import csv
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(0)
with h5py.File(sys.argv[1]) as f:
    obs, act = f["observations"][()], f["actions"][()]
mean, std = obs.mean(0), obs.std(0) + 1e-3
env = gym.make(sys.argv[2])
rows_of_csv = [["env_id", "share_of_file", "return_mean", "return_std"]]


def tensor(x):
    return torch.as_tensor(x, dtype=torch.float32)


for share in (1.0, 0.2):
    first = round((1 - share) * len(obs))
    x, y = tensor((obs[first:] - mean) / std), tensor(act[first:])
    sizes = (obs.shape[1], 256, 256)
    layers = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(256, act.shape[1]), nn.Tanh())
    optim = torch.optim.Adam(net.parameters(), 3e-4)
    for _ in range(12_000):
        rows = torch.randint(len(x), (128,))
        loss = F.mse_loss(net(x[rows]), y[rows])
        optim.zero_grad()
        loss.backward()
        optim.step()
    returns = []
    for seed in range(10):
        o, over, total = env.reset(seed=seed)[0], False, 0.0
        while not over:
            with torch.no_grad():
                a = net(tensor((o - mean) / std)).numpy()
            o, rew, terminated, truncated, _ = env.step(a)
            total, over = total + float(rew), terminated or truncated
        returns.append(total)
    print(f"last {share:.0%} of the file: {np.mean(returns):.1f}")
    rows_of_csv.append([sys.argv[2], share, np.mean(returns), np.std(returns)])
raw = Path(__file__).resolve().parent.parent / "raw"
with open(raw / "clone_mse.csv", "w", newline="") as f:
    csv.writer(f).writerows(rows_of_csv)
