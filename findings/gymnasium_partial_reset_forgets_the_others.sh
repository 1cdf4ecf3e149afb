#!/usr/bin/env bash
# Gymnasium: resetting one environment of a vector wipes the running scores of all of them.
#
# With autoreset DISABLED one resets those that ended by `options={"reset_mask": ended}`. One would
# expect vector.RecordEpisodeStatistics to start these anew and to go on counting the others; its
# code means to. But SyncVectorEnv and AsyncVectorEnv take the mask out of the caller's dict with
# pop(), the wrapper looks for it afterwards, finds none and clears everything. Every episode that ran
# while another one ended is reported too short, with too small a return: a learning curve that is
# too low, by an amount that grows with the number of environments. The rewards themselves are right.
# The caller's dict is empty afterwards, too: a second use of it resets all the environments.
# Gymnasium's pull request 1696, open in September 2026, is about this.
# What works: the wrapper for single environments around each of them, inside the vector.
#
# Seen with gymnasium 1.4.0, numpy 2.4.6, Python 3.11, CartPole, random actions, 4,000 steps:
#   2 environments: mean length 20.8, reported by the vector wrapper 10.8, from inside 20.8
#   8 environments: mean length 22.3, reported by the vector wrapper 3.6, from inside 22.3
#   the options afterwards: {}
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gymnasium==1.4.0 numpy==2.4.6
cat > "$folder/reset.py" <<'PYTHON'
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorStatistics


def lengths(envs):
    """Lengths of the ended episodes: counted here, and as `info` has them."""
    n = envs.num_envs
    rng, running = np.random.default_rng(0), np.zeros(n, int)
    counted, reported = [], []
    envs.reset(seed=0)
    for _ in range(4_000 // n):
        _, _, terminated, truncated, info = envs.step(rng.integers(2, size=n))
        running += 1
        ended = terminated | truncated
        if ended.any():
            counted += running[ended].tolist()
            reported += info["episode"]["l"][ended].tolist()
            running[ended] = 0
            options = {"reset_mask": ended}
            envs.reset(options=options)
    return np.array(counted), np.array(reported), options


mode = {"autoreset_mode": AutoresetMode.DISABLED}
for n in (2, 8):
    plain = [lambda: gym.make("CartPole-v1")] * n
    outside = lengths(VectorStatistics(SyncVectorEnv(plain, **mode)))
    inner = [lambda: RecordEpisodeStatistics(gym.make("CartPole-v1"))] * n
    inside = lengths(SyncVectorEnv(inner, **mode))
    print(
        f"{n} environments: mean length {outside[0].mean():.1f}, reported by the vector wrapper "
        f"{outside[1].mean():.1f}, from inside {inside[1].mean():.1f}"
    )
    assert (inside[0] == inside[1]).all() and (inside[0] == outside[0]).all()
    assert outside[1].mean() < 0.7 * outside[0].mean(), "the others are remembered now"
print(f"the options afterwards: {outside[2]}")
assert outside[2] == {}, "the caller keeps the mask now"
PYTHON
"$folder/venv/bin/python" "$folder/reset.py"
