#!/usr/bin/env bash
# d3rlpy's fit(n_steps=...) trains whole epochs only, and none if there is no whole one.
#
# One would expect n_steps updates. fit() divides n_steps by n_steps_per_epoch, 10,000 if not given,
# and drops the rest: a first try with n_steps=5_000 returns at once, an empty list and an untrained
# policy that evaluates like any other; 25,000 steps are 20,000, and a comparison at equal steps with
# another library is not at equal steps. Nothing is raised or logged.
# What works: n_steps_per_epoch=min(10_000, n_steps), with n_steps a multiple of it.
#
# Seen with d3rlpy 2.8.1, torch 2.13.0, Python 3.11:
#   fit(n_steps=5000): 0 updates, 0 epochs, weights unchanged
#   fit(n_steps=5, n_steps_per_epoch=10): 0 updates, 0 epochs, weights unchanged
#   fit(n_steps=25, n_steps_per_epoch=10): 20 updates, 2 epochs, weights changed
#   fit(n_steps=30, n_steps_per_epoch=10): 30 updates, 3 epochs, weights changed
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 d3rlpy==2.8.1
cat > "$folder/fit.py" <<'PYTHON'
import d3rlpy
import numpy as np
import torch

rng = np.random.default_rng(0)
n = 400
data = d3rlpy.dataset.MDPDataset(
    rng.normal(size=(n, 3)).astype(np.float32),
    rng.uniform(-1, 1, (n, 1)).astype(np.float32),
    rng.normal(size=n).astype(np.float32),
    np.zeros(n, np.float32),
    (np.arange(1, n + 1) % 20 == 0).astype(np.float32),
)
silent = {"show_progress": False, "logger_adapter": d3rlpy.logging.NoopAdapterFactory()}


def weights(algo):
    return torch.cat([p.detach().flatten().clone() for p in algo.impl.policy.parameters()])


for steps, given, expect in (
    (5_000, {}, 0),
    (5, {"n_steps_per_epoch": 10}, 0),
    (25, {"n_steps_per_epoch": 10}, 20),
    (30, {"n_steps_per_epoch": 10}, 30),
):
    algo = d3rlpy.algos.SACConfig(batch_size=8).create(device="cpu")
    algo.build_with_dataset(data)
    before = weights(algo)
    epochs = len(algo.fit(data, n_steps=steps, **given, **silent))
    updates, same = algo.grad_step, torch.equal(before, weights(algo))
    text = ", ".join([f"n_steps={steps}"] + [f"{key}={value}" for key, value in given.items()])
    what = "unchanged" if same else "changed"
    print(f"fit({text}): {updates} updates, {epochs} epochs, weights {what}")
    assert updates == expect and same == (expect == 0), "the rest is trained now"
PYTHON
cd "$folder" && venv/bin/python fit.py | grep "^fit"
