#!/usr/bin/env bash
# The first reward after restoring a MuJoCo state is wrong in Gymnasium's Ant and Humanoid.
#
# mj_getState and mj_setState with mjSTATE_INTEGRATION hold all that a simulation needs to go on
# bit for bit. One would expect an environment that is put back in this way to go on bit for bit, too.
# Observations do. But Ant and Humanoid take the speed that they pay for from positions of bodies, which
# are computed from the state and not part of it: the first reward after a restore is the way from where
# the body was when the state was set back, as if it had jumped. HalfCheetah, Hopper and
# Swimmer take it from joint coordinates, so that a test on one of them passes.
# It hits planners (each branch starts with it, and its size is that of where the last branch ended),
# exact resumes and "reset to a state of the data set". set_state(qpos, qvel) and mj_forward are nearly
# right, not exactly: in play the bodies' positions are those before the last substep.
# What works: copying all of MjData, data = copy.copy(env.unwrapped.data), and back by mj_copyData.
#
# Seen with gymnasium 1.4.0, mujoco 4.0.0, Python 3.11, error of the first and second reward, largest
# error of an observation in five steps:
#   Ant-v5, mj_setState: 1.64505, 0.00000, 0.00000
#   Ant-v5, mj_setState and mj_forward: 0.00211, 0.00000, 0.00000
#   Ant-v5, mj_copyData: 0.00000, 0.00000, 0.00000
#   Humanoid-v5, mj_setState: 1.44207, 0.00000, 0.00000
#   Humanoid-v5, mj_setState and mj_forward: 0.00003, 0.00000, 0.00000
#   Humanoid-v5, mj_copyData: 0.00000, 0.00000, 0.00000
#   HalfCheetah-v5, mj_setState: 0.00000, 0.00000, 0.00000
#   Hopper-v5, mj_setState: 0.00000, 0.00000, 0.00000
#   Swimmer-v5, mj_setState: 0.00000, 0.00000, 0.00000
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "gymnasium[mujoco]==1.4.0" mujoco==4.0.0 numpy==2.4.6
cat > "$folder/restore.py" <<'PYTHON'
import copy

import gymnasium as gym
import mujoco
import numpy as np

kind = mujoco.mjtState.mjSTATE_INTEGRATION


def errors(name, way):
    env = gym.make(name)
    env.action_space.seed(1)
    env.reset(seed=0)
    model, data = env.unwrapped.model, env.unwrapped.data
    for _ in range(20):
        env.step(env.action_space.sample())
    state = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, state, kind)
    kept = copy.copy(data)
    actions = [env.action_space.sample() for _ in range(5)]
    first = [env.step(a)[:2] for a in actions]
    if way == "mj_copyData":
        mujoco.mj_copyData(data, model, kept)
    else:
        mujoco.mj_setState(model, data, state, kind)
    if way == "mj_setState and mj_forward":
        mujoco.mj_forward(model, data)
    again = [env.step(a)[:2] for a in actions]
    env.close()
    reward = [abs(float(a[1] - b[1])) for a, b in zip(first, again)]
    return reward, max(float(np.abs(a[0] - b[0]).max()) for a, b in zip(first, again))


ways = ("mj_setState", "mj_setState and mj_forward", "mj_copyData")
for name in ("Ant-v5", "Humanoid-v5", "HalfCheetah-v5", "Hopper-v5", "Swimmer-v5"):
    body = name in ("Ant-v5", "Humanoid-v5")
    for way in ways[: 3 if body else 1]:
        reward, obs = errors(name, way)
        print(f"{name}, {way}: {reward[0]:.5f}, {reward[1]:.5f}, {obs:.5f}")
        assert reward[1] == obs == 0
        if way == "mj_copyData" or not body:
            assert reward[0] == 0
        elif way == "mj_setState":
            assert reward[0] > 0.5, "the first reward is right now"
        else:
            assert 0 < reward[0] < 0.05
PYTHON
cd "$folder" && venv/bin/python restore.py
