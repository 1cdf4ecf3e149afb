#!/usr/bin/env bash
# Gymnasium's vector environments cut a number in `info` to the type of the first environment's.
#
# A vector environment gathers the infos of its environments into arrays. One would expect an array
# that holds what the environments gave. But its type is that of the first value that arrives in a
# step, and the others are cast to it. Python's max(0, x) is the int 0 or a float: where environment 0
# had no cost, the array is of ints and a cost of 0.7 elsewhere is stored as 0. In the next step
# environment 0 has a cost, and all are right. So costs and shaped rewards out of `info` are too
# small, by an amount that depends on what environment 0 did, and a test of a single environment shows
# nothing. Nothing is raised or warned. Async and sync are alike.
# What works: float(...) around every number that goes into `info`.
#
# Seen with gymnasium 1.4.0, numpy 2.4.6, Python 3.11, 1,000 steps of three environments:
#   alone:                [125.3 123.6 123.1]
#   in SyncVectorEnv:     [125.3  52.9  62.9], 52 % of the steps in int64
#   in AsyncVectorEnv:    [125.3  52.9  62.9], 52 % of the steps in int64
#   with float(...):      [125.3 123.6 123.1], 0 % of the steps in int64
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gymnasium==1.4.0 numpy==2.4.6
cat > "$folder/cost.py" <<'PYTHON'
import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv


class Road(gym.Env):
    """Too fast costs what is above the limit."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(0, 1, (1,))
    number = staticmethod(lambda x: x)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        cost = self.number(max(0, float(action[0]) - 0.5))
        return np.zeros(1, np.float32), 1.0, False, False, {"cost": cost}


class Careful(Road):
    number = float


def total(vector, make):
    envs = vector([make] * 3)
    envs.reset(seed=0)
    costs = [envs.step(speed)[4]["cost"] for speed in speeds]
    envs.close()
    return np.sum(costs, axis=0, dtype=float), np.mean([c.dtype.kind == "i" for c in costs])


if __name__ == "__main__":
    speeds = np.random.default_rng(0).uniform(size=(1_000, 3, 1)).astype(np.float32)
    env = Road()
    alone = np.array([sum(env.step(a)[4]["cost"] for a in speeds[:, i]) for i in range(3)])
    cases = {
        "in SyncVectorEnv": (SyncVectorEnv, Road),
        "in AsyncVectorEnv": (AsyncVectorEnv, Road),
        "with float(...)": (SyncVectorEnv, Careful),
    }
    show = {"precision": 1, "floatmode": "fixed"}
    print(f"{'alone:':22}{np.array2string(alone, **show)}")
    for name, case in cases.items():
        costs, ints = total(*case)
        text = np.array2string(costs, **show)
        print(f"{name + ':':22}{text}, {ints:.0%} of the steps in int64".replace("%", " %"))
        if case[1] is Careful:
            assert np.allclose(costs, alone)
        else:
            assert np.isclose(costs[0], alone[0]), "environment 0 loses some, too"
            assert (costs[1:] < 0.6 * alone[1:]).all(), "the others keep their costs now"
PYTHON
"$folder/venv/bin/python" "$folder/cost.py"
