"""What every test file uses: the scripts on the path, a clean process state, tiny datasets, real
subprocesses."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# a shell's background jobs ignore these, and so would the scripts that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def clean_process(tmp_path, monkeypatch):
    """Each test runs in its own folder, on one thread, from fixed seeds, and leaves the process as
    it was."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {s: signal.getsignal(s) for s in signals}
    precision = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    torch.set_num_threads(1)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = precision
    for s, handler in handlers.items():
        signal.signal(s, handler)


def one_thread() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_script(script: str, *words, cwd, timeout=300, check=True, env=None, **options):
    """`python script words` as a user runs it, in the folder `cwd`."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, words)],
        cwd=cwd,
        timeout=timeout,
        text=True,
        env=one_thread() | (env or {}),
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
    )
    if check:
        assert done.returncode == 0, (done.stdout or "") + (done.stderr or "")
    return done


STOP = """
import importlib, os, sys
sys.path.insert(0, {root!r})
script = importlib.import_module({script!r})
method, count = script.{where}, [0]
def counted(*a, **k):
    count[0] += 1
    if count[0] == {n}: os.kill(os.getpid(), {signum})
    return method(*a, **k)
script.{where} = counted
sys.argv = {argv!r}
script.train(script.parse(script.Args, ""))
"""


def stop_at(script: str, where: str, n: int, *words, cwd, signum=signal.SIGTERM, **options):
    """The script in a process that sends itself a signal at the n-th call of `where`."""
    argv = [f"{script}.py", *map(str, words)]
    about = {"root": str(ROOT), "script": script, "where": where, "n": n, "argv": argv}
    code = STOP.format(**about, signum=int(signum))
    line = [sys.executable, "-c", code]
    options = {"capture_output": True, "text": True, "timeout": 300, "env": one_thread()} | options
    return subprocess.run(line, cwd=cwd, **options)


def only_run(folder) -> Path:
    """The single run folder under folder/runs."""
    (run,) = (Path(folder) / "runs").iterdir()
    return run


def metrics(run: Path) -> list[tuple[int, str, str]]:
    """Rows of metrics.csv without those that measure time."""
    with open(run / "metrics.csv") as f:
        rows = [(int(r["step"]), r["tag"], r["value"]) for r in csv.DictReader(f)]
    return [r for r in rows if r[1] not in ("charts/SPS", "charts/updates_per_second")]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def flatten(x, name="") -> dict:
    """A checkpoint as a flat dict of path -> value."""
    if isinstance(x, dict):
        parts = [flatten(value, f"{name}/{key}") for key, value in x.items()]
    elif isinstance(x, (list, tuple)):
        parts = [flatten(value, f"{name}/{i}") for i, value in enumerate(x)]
    else:
        return {name: x}
    return {key: value for part in parts for key, value in part.items()}


CLOCKS = ("wall", "busy", "csv_bytes", "run_dir", "resume", "exp_name")


def assert_equal(a, b, ignore=CLOCKS):
    """Bitwise equality of nested dicts and lists, but for the entries named."""
    a, b = flatten(a), flatten(b)
    a, b = ({k: x[k] for k in x if not k.startswith("/command/")} for x in (a, b))
    assert a.keys() == b.keys()
    for k in a:
        if k.rsplit("/", 1)[-1] not in ignore:
            tensors = isinstance(a[k], torch.Tensor)
            assert torch.equal(a[k], b[k]) if tensors else repr(a[k]) == repr(b[k]), k


def assert_same_checkpoint(a: Path, b: Path):
    """Of everything but the clock and the folder."""
    assert_equal(load(a), load(b))


def refused(capsys, call) -> str:
    """The one line on stderr with which `call` ends the program, status 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def write_d4rl(
    path, n=2000, obs_dim=3, act_dim=1, length=100, seed=0, scale=2.0, next_obs=True, **changes
) -> Path:
    """A made-up D4RL file shaped like Pendulum-v1; `changes` replace columns (None drops one)."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(n, obs_dim)).astype(np.float32)
    end = np.arange(1, n + 1) % length == 0
    columns = {
        "observations": obs,
        "actions": (scale * rng.uniform(-1, 1, (n, act_dim))).astype(np.float32),
        "rewards": -rng.uniform(0, 1, n).astype(np.float32),
        "next_observations": np.vstack([obs[1:], obs[:1]]) if next_obs else None,
        "terminals": end & (np.arange(n) // length % 2 == 0),
        "timeouts": end & (np.arange(n) // length % 2 == 1),
    } | changes
    with h5py.File(path, "w") as f:
        for key, value in columns.items():
            if value is not None:
                f[key] = value
    return Path(path)


class Counting(gym.Env):
    """Observes (episode, time); episode e lasts 3 + e % 3 steps; even ones terminate, odd ones time
    out; the reward is the time."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([-3.0, 0.0]), np.array([1.0, 4.0]), dtype=np.float64)

    def __init__(self):
        self.episode, self.t = -1, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        over, even = self.t == 3 + self.episode % 3, self.episode % 2 == 0
        obs = np.array([self.episode, float(self.t)])
        return obs, float(self.t), over and even, over and not even, {}


if "Counting-v0" not in gym.registry:
    gym.register("Counting-v0", entry_point=Counting, max_episode_steps=100)
