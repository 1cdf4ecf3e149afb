"""Convert recordings of others into a dataset that the scripts read, or into a Minari set.

  python tools/convert.py replay_buffer.pkl buffer.hdf5    # Stable-Baselines3's save_replay_buffer
  python tools/convert.py demonstrations.pkl demos.hdf5    # a list of dicts of arrays
  python tools/convert.py recording.npz recording.hdf5     # one array a column
  python tools/convert.py replay.hdf5 pendulum/sac-v0 --env Pendulum-v1    # D4RL layout to Minari

TARGET is a file that ends in .hdf5 or .h5, written in D4RL's layout, or the id of a Minari set.
Columns are found by their usual names (`obs`, `acts`, `dones`, ...). Stable-Baselines3 keeps
actions in [-1, 1] and time-outs among its dones: here actions are within the environment's bounds
again, and time-outs and terminals are two columns. Where nothing marks time-outs, one is where the
next row does not go on from next_observations; without these, and without an end among the dones,
the file gets no `timeouts` either, and a script cuts at its environment's limit.

Only this program unpickles, the training scripts never do; and it makes numpy arrays and plain
containers only, so that no code of the file runs, and the library that wrote it is not needed.
"""

import argparse
import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np

NAMES = {
    "observations": "observations observation obs states",
    "actions": "actions action acts act",
    "rewards": "rewards reward rews rew",
    "next_observations": "next_observations next_obs obs_next obs2",
    "terminals": "terminals terminal terminated terminations",
    "timeouts": "timeouts truncated truncations",
    "dones": "dones done episode_terminals",  # of both kinds
    "episode_starts": "episode_starts",
}
ROWS = ("observations", "next_observations", "actions")  # (N, width)


class Plain:
    """Stands for every class and function in a pickle that numpy's arrays do not need."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {})


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        known = {"numpy": ["_reconstruct", "scalar", "ndarray", "dtype", "_frombuffer"]}
        known["_codecs"] = ["encode"]
        is_known = name in known.get(module.split(".")[0], ())
        return super().find_class(module, name) if is_known else Plain


def renamed(columns) -> dict:
    """Those columns of a mapping that NAMES knows, under its names; None stands for no array."""
    found = {}
    for name, others in NAMES.items():
        for other in others.split():
            if columns.get(other) is not None:
                found.setdefault(name, np.asarray(columns[other]))
    for name in ("observations", "actions", "rewards"):
        if name not in found:
            names = ", ".join([*map(str, columns)][:9]) or "nothing"
            raise ValueError(f"no {name} (found: {names}); expected one of {NAMES[name]}")
    return found


def read_sb3(buffer) -> dict:
    """A pickled ReplayBuffer: (T, environments, ...) arrays, a ring; the oldest row is at `pos`."""
    rows = np.arange(buffer.buffer_size)
    rows = np.roll(rows, -buffer.pos) if buffer.full else rows[: buffer.pos]
    if buffer.full and getattr(buffer, "next_observations", None) is None:
        rows = rows[1:]  # optimize_memory_usage: the newest next observation lies in the oldest row
    last = np.zeros((buffer.n_envs, len(rows)), bool)
    last[:, -1:] = True  # one environment after the other, each is cut where the recording ends

    def column(name):
        x = getattr(buffer, name)
        if isinstance(x, dict):
            raise ValueError(f"{name} are a Dict of {list(x)}: record them flattened")
        return np.swapaxes(x[rows], 0, 1).reshape(last.size, *x.shape[2:])

    names = ["observations", "actions", "rewards", "next_observations"]
    c = {name: column(name) for name in names if getattr(buffer, name, None) is not None}
    box = buffer.action_space
    if hasattr(box, "low"):  # bounds of a Box
        c["actions"] = box.low + (c["actions"] + 1) / 2 * (box.high - box.low)
        c["actions"] = c["actions"].clip(box.low, box.high)
    dones, timeouts = column("dones") > 0, column("timeouts") > 0
    timeouts |= last.flatten() & ~dones
    return c | {"terminals": dones & ~timeouts, "timeouts": timeouts}


def read_episodes(episodes) -> dict:
    """A list with a dict of arrays for each episode, ended by a time-out if nothing says more."""
    parts = []
    if not isinstance(episodes, list) or not episodes:
        raise ValueError(f"expected columns, or a list of episodes, found {str(episodes)[:60]}")
    for i, episode in enumerate(episodes):
        try:
            c = renamed(episode if isinstance(episode, dict) else {})
        except ValueError as e:
            raise ValueError(f"item {i}, expected a dict of arrays: {e}") from e
        n, obs = len(c["actions"]), c["observations"]
        if len(obs) == n + 1:  # the last one, too
            c["observations"], c["next_observations"] = obs[:-1], obs[1:]
        over = {name: np.any(c.get(name, False)) for name in ("terminals", "timeouts", "dones")}
        ended = over["terminals"] or (over["dones"] and not over["timeouts"])
        end = np.arange(n) == n - 1
        c.pop("dones", None)
        parts.append(c | {"terminals": end & ended, "timeouts": end & ~ended})
        if differ := parts[0].keys() ^ parts[i].keys():
            raise ValueError(f"items 0 and {i}: only one of them has {', '.join(sorted(differ))}")
    return {k: np.concatenate([c[k] for c in parts]) for k in parts[0]}


def read(path: Path) -> dict:
    """The columns of a file, in D4RL's names."""
    if h5py.is_hdf5(path):
        with h5py.File(path) as f:
            if "observations_0" in f:
                raise ValueError("d3rlpy's dump, which cql_continuous.py --dataset reads as it is")
            arrays = {k: x for k, x in f.items() if isinstance(x, h5py.Dataset)}
            return renamed({k: arrays[k][()] if k in arrays else None for k in f})
    if zipfile.is_zipfile(path):
        with np.load(path, allow_pickle=False) as f:
            return renamed({k: f[k] for k in f.files})
    with path.open("rb") as f:
        if f.read(20) == b"version https://git-":
            raise ValueError("a Git LFS pointer, not the file itself: `git lfs pull`")
        f.seek(0)
        content = Unpickler(f, encoding="latin1").load()
    if isinstance(content, dict):
        return renamed(content)
    return read_sb3(content) if hasattr(content, "buffer_size") else read_episodes(content)


def completed(c: dict) -> dict:
    """Columns of one length, flags as booleans, an end at the last row. There are `timeouts` if
    anything tells where episodes end."""
    n = len(c["observations"])
    if n == 0:
        raise ValueError("no transitions")
    for name, x in c.items():
        if len(bad := np.argwhere(~np.isfinite(x))):
            raise ValueError(f"{name} hold NaN or infinity, first in row {bad[0][0]}")
    if wrong := {name: len(x) for name, x in c.items() if len(x) != n}:
        raise ValueError(f"{n} observations, but {wrong}")
    for name in c.keys() - set(ROWS):
        if c[name].size != n:
            raise ValueError(f"{name} have shape {c[name].shape}, expected ({n},)")
        c[name] = c[name].reshape(n)  # of (N, 1)
        if name != "rewards" and not np.isin(c[name], (0, 1)).all():
            raise ValueError(f"{name} hold {np.unique(c[name])[:5]}, expected 0 and 1")
    told = {"timeouts", "episode_starts"} & c.keys()
    if "next_observations" not in c and c.get("dones", np.zeros(1)).any():
        told.add("dones")  # which may lack the time-outs: next_observations would tell
    ends = c.pop("dones", np.zeros(n)) > 0
    timeouts = c.get("timeouts", np.zeros(n)) > 0
    terminals = c.get("terminals", ends & ~timeouts) > 0
    if "episode_starts" in c:  # Stable-Baselines 2
        ends |= np.append(c.pop("episode_starts")[1:] > 0, True)
    if not told and "next_observations" not in c:
        return c | {"terminals": terminals}
    if not told:
        jumps = np.float32(c["next_observations"][:-1]) != np.float32(c["observations"][1:])
        ends = ends | np.append(jumps.reshape(n - 1, -1).any(1), True)
    timeouts |= ends & ~terminals
    timeouts[-1] |= not terminals[-1]
    return c | {"terminals": terminals, "timeouts": timeouts}


def write_minari(c: dict, name: str, env_id: str | None, source: str):
    """A set of Minari's, which keeps T + 1 observations of an episode of T steps."""
    import gymnasium as gym
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    over = c["terminals"] | c.get("timeouts", False)
    over[-1] = True
    ends, episodes = np.flatnonzero(over) + 1, []
    for begin, end in zip([0, *ends[:-1]], ends):
        obs = c["observations"][begin:end]
        if "next_observations" in c:
            following = c["next_observations"][begin:end]
            if not np.allclose(following[:-1], obs[1:], atol=1e-4):
                raise ValueError(f"rows {begin} to {end} are not consecutive")
            obs = np.concatenate([obs, following[-1:]])
        elif c["terminals"][end - 1]:  # what follows a terminal is never used
            obs = np.concatenate([obs, obs[-1:]])
        steps = len(obs) - 1  # after a time-out without next_observations the last one is lost
        columns = {k: c[k][begin : begin + steps] for k in ("actions", "rewards")}
        columns["terminations"] = c["terminals"][begin : begin + steps]
        columns["truncations"] = (np.arange(steps) == steps - 1) & ~columns["terminations"]
        if steps:
            episodes.append(EpisodeBuffer(observations=obs, **columns))
    about = {"env": env_id, "description": f"converted from {source}", "jpeg_encoding": False}
    if env_id is None:
        act, shape = c["actions"], c["observations"].shape[1:]
        about["observation_space"] = gym.spaces.Box(-np.inf, np.inf, shape, obs.dtype)
        about["action_space"] = gym.spaces.Box(act.min(0), act.max(0), dtype=act.dtype)
        print("no --env: the bounds of actions are those of the data")
    warnings.filterwarnings("ignore", module="minari")  # that nobody is named as author
    minari.create_dataset_from_buffers(name, episodes, **about)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", help="FILE.hdf5, or a Minari set's id, NAME-v0")
    parser.add_argument("--env", help="the environment that a Minari set names")
    options = parser.parse_args()
    target = Path(options.target)
    try:
        to_file = target.suffix in (".hdf5", ".h5")
        if to_file and (target.exists() or not target.parent.is_dir()):
            raise ValueError(f"{target} exists already, or its folder does not")
        if to_file and options.env:
            raise ValueError("--env names the environment of a Minari set, a file has none")
        if not to_file and not re.search(r"-v\d+$", options.target):
            raise ValueError("expected FILE.hdf5, or a Minari set's id that ends in -v0")
        c = completed(read(options.source))
        if to_file:
            with h5py.File(target, "x") as f:
                f.update({k: x[:, None] if k in ROWS and x.ndim == 1 else x for k, x in c.items()})
        else:
            write_minari(c, options.target, options.env, options.source.name)
    except Exception as e:
        message = f"error: {options.source} to {target}: {type(e).__name__} {e}"
        print(" ".join(message.split())[:500], file=sys.stderr)
        raise SystemExit(2) from e
    n, terminals = len(c["rewards"]), c["terminals"].sum()
    timeouts = c["timeouts"].sum() if "timeouts" in c else 0
    print(f"{target}: {n:,} transitions, {terminals:,} terminals, {timeouts:,} time-outs")
    if "timeouts" not in c:
        who = "a script cuts at its environment's" if to_file else "only terminals end episodes"
        print(f"nothing tells where a time limit cut: {who}")
    elif terminals and timeouts <= 1 and "next_observations" not in c:
        told = "dones became terminals, a column `timeouts` would tell"
        print(f"if episodes were cut by a time limit, the file does not tell: {told}")


if __name__ == "__main__":
    main()
