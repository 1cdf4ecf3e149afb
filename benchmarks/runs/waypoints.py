"""Undirected data of a point in a maze, as D4RL's maze2d: trips between random cells, of which
parts must be stitched to reach the one goal that pays. Needs `pip install gymnasium-robotics`.

  python benchmarks/runs/waypoints.py --env MazeU-v0 --steps 100_000 --out maze_u.hdf5
  python benchmarks/runs/waypoints.py --env MazeMedium-v0 --steps 100_000 --out maze_medium.hdf5
  PYTHONPATH=benchmarks/runs python cql_continuous.py --env waypoints:MazeU-v0 \
      --dataset maze_u.hdf5

Task: PointMaze_UMaze-v3 or PointMaze_Medium-v3 with D4RL's fixed goal. Cells are 1 wide. An episode
starts at rest in a random cell other than the goal's and ends by time alone, after 300 or 600
steps. A step that ends within 0.45 of the middle of the goal's cell pays 1, any other 0. Under
PointMaze's own id, which reads the file too, each episode has another goal: another task.

Data: one walk without resets, cut by a time-out every 300 or 600 steps. A PD controller follows
a shortest path to a random cell, with noise on its actions; within 0.1 of it the next is drawn.
Observations are PointMaze's, flattened: position, goal, position, velocity. Rewards and the goal
in there are the task's; of the cells that the controller went to nothing is kept.
"""

import argparse
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
from gymnasium.wrappers import FlattenObservation
from gymnasium_robotics.envs.maze.maps import GOAL, MEDIUM_MAZE, U_MAZE
from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv

TASKS = {"MazeU-v0": (U_MAZE, (1, 1), 300), "MazeMedium-v0": (MEDIUM_MAZE, (6, 6), 600)}


class OneGoal(PointMazeEnv):
    """PointMaze with its goal in the middle of one cell; PointMaze moves it at each reset."""

    def __init__(self, maze_map, goal_cell, **kwargs):
        maze_map = [list(row) for row in maze_map]
        maze_map[goal_cell[0]][goal_cell[1]] = GOAL
        super().__init__(maze_map, **kwargs)

    goal = property(lambda self: self.maze.unique_goal_locations[0], lambda self, moved: None)


for task, (maze, cell, limit) in TASKS.items():
    gym.register(task, OneGoal, max_episode_steps=limit, kwargs=dict(maze_map=maze, goal_cell=cell))


class Controller:
    """From wherever the point is to a cell: PD control to the next cell of a shortest path."""

    def __init__(self, maze):
        self.maze, rows = maze, enumerate(maze.maze_map)
        self.cells = [(i, j) for i, row in rows for j, kind in enumerate(row) if kind != 1]
        self.steps = {goal: self.steps_to(goal) for goal in self.cells}

    def near(self, cell) -> list[tuple]:
        i, j = cell
        return [x for x in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)) if x in self.cells]

    def steps_to(self, goal) -> dict:
        """From each cell, by breadth-first search."""
        steps, queue = {goal: 0}, [goal]
        for cell in queue:
            new = [x for x in self.near(cell) if x not in steps]
            steps |= dict.fromkeys(new, steps[cell] + 1)
            queue += new
        return steps

    def act(self, obs, goal) -> np.ndarray:
        position, velocity = obs[:2], obs[6:]
        cell = tuple(self.maze.cell_xy_to_rowcol(position))
        target = min([cell, *self.near(cell)], key=self.steps[goal].get)
        return (10 * (self.maze.cell_rowcol_to_xy(target) - position) - velocity).clip(-1, 1)


def walk(env, control: Controller, args) -> dict:
    """The columns of the file."""
    rng, n, acts, rewards = np.random.default_rng(args.seed), args.steps, [], []
    seen, goal = [env.reset(seed=args.seed)[0]], control.cells[0]
    for _ in range(n):
        if np.linalg.norm(control.maze.cell_rowcol_to_xy(goal) - seen[-1][:2]) < 0.1:
            goal = tuple(rng.choice(control.cells))
        noise = args.noise * rng.standard_normal(2)
        acts.append((control.act(seen[-1], goal) + noise).clip(-1, 1))
        obs, reward, *_ = env.step(acts[-1])
        seen.append(obs)
        rewards.append(reward)
    seen, timeouts = np.float32(seen), np.arange(1, n + 1) % TASKS[args.env][2] == 0
    timeouts[-1] = True
    columns = {"observations": seen[:-1], "next_observations": seen[1:], "timeouts": timeouts}
    columns |= {"actions": np.float32(acts), "rewards": np.float32(rewards)}
    return columns | {"terminals": np.zeros(n, bool)}


def returns(env, policy, seed: int, episodes: int = 50) -> str:
    """Mean and deviation of what policy(obs) earns in an episode."""
    found = np.zeros(episodes)
    for i in range(episodes):
        (obs, _), over = env.reset(seed=None if i else seed), False
        while not over:
            obs, reward, _, over, _ = env.step(policy(obs))
            found[i] += reward
    return f"{found.mean():.1f} +- {found.std():.1f} in {episodes} episodes"


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--env", choices=TASKS, default="MazeU-v0")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--out", type=Path, required=True, help="HDF5 file, which must not exist")
    parser.add_argument("--noise", type=float, default=0.5, help="deviation, of actions in [-1, 1]")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.out.exists() or not args.out.parent.is_dir() or args.steps < 1:
        parser.error(f"--out {args.out} exists already, its folder does not, or no --steps")
    env = FlattenObservation(gym.make(args.env, max_episode_steps=-1))  # the walk has no end
    control, (_, goal, limit) = Controller(env.unwrapped.maze), TASKS[args.env]
    columns = walk(env, control, args)
    with h5py.File(args.out, "w") as f:
        f.update(columns)
        f.attrs.update({"env_id": args.env, "noise": args.noise, "seed": args.seed})
    rewards = columns["rewards"]
    segments = np.add.reduceat(rewards, np.arange(0, args.steps, limit))
    print(f"{args.out}: {args.steps:,} transitions, {rewards.mean():.2%} of them to the goal")
    print(f"return of a segment of {limit}: {segments.mean():.1f} +- {segments.std():.1f}")
    env, rng = FlattenObservation(gym.make(args.env)), np.random.default_rng(args.seed)
    direct = returns(env, lambda obs: control.act(obs, goal), args.seed)
    print(f"return of the controller when it is sent to the goal, without noise: {direct}")
    print(f"of uniform actions: {returns(env, lambda obs: rng.uniform(-1, 1, 2), args.seed)}")


if __name__ == "__main__":
    main()
