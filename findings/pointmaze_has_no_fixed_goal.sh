#!/usr/bin/env bash
# PointMaze has no fixed goal, and offers no way to one.
#
# D4RL's maze2d pays for one place. In gymnasium-robotics each reset moves the goal by up to 0.25 in
# both directions from the centre of its cell, also where the map has a single goal cell and where
# `options={"goal_cell": ...}` names it. The range is an argument of MazeEnv, position_noise_range,
# but PointMazeEnv hands its keyword arguments on to MujocoEnv as well, which refuses it: the noise
# cannot be switched off from gym.make. A dataset whose rewards are for one goal is then evaluated on
# another one each time, close enough for nobody to notice.
# What works: a subclass whose `goal` is a property with a setter that does nothing.
#
# Seen with gymnasium-robotics 1.4.2, gymnasium 1.4.0, mujoco 4.0.0, Python 3.11:
#   goal of one cell, 200 resets: up to [0.25 0.25] from its centre, 200 goals
#   position_noise_range=0.0: TypeError
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gymnasium-robotics==1.4.2 gymnasium==1.4.0 mujoco==4.0.0
cat > "$folder/maze.py" <<'PYTHON'
import gymnasium as gym
import gymnasium_robotics  # noqa: F401
import numpy as np

maze = [[1, 1, 1, 1], [1, "g", "r", 1], [1, 1, 1, 1]]  # a cell for the goal, one to start in
env = gym.make("PointMaze_UMaze-v3", maze_map=maze)
cell = np.array([1, 1])
goals = [env.reset(seed=s, options={"goal_cell": cell})[0]["desired_goal"] for s in range(200)]
centre = env.unwrapped.maze.cell_rowcol_to_xy(cell)
spread, found = np.abs(goals - centre).max(0), len(np.unique(goals, axis=0))
print(f"goal of one cell, 200 resets: up to {spread.round(2)} from its centre, {found} goals")
assert (spread > 0.2).all() and (spread <= 0.25).all() and found == 200
try:
    gym.make("PointMaze_UMaze-v3", position_noise_range=0.0)
except TypeError:
    print("position_noise_range=0.0: TypeError")
else:
    raise SystemExit("position_noise_range is taken now")
PYTHON
"$folder/venv/bin/python" "$folder/maze.py"
