"""What every test file uses: the scripts on the path, a clean process state, tiny datasets, real
subprocesses."""

import csv
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def clean_process(tmp_path, monkeypatch):
    """Each test runs in its own folder, on one thread and from fixed seeds, and leaves the process as it
    was."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    deterministic, precision = torch.backends.cudnn.deterministic, torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = deterministic
    torch.set_float32_matmul_precision(precision)
    for s, handler in handlers.items():
        signal.signal(s, handler)


def run_script(script: str, *words, cwd, timeout=180, check=True, **options) -> subprocess.CompletedProcess:
    """`python script words` as a user runs it, on one thread, in the folder `cwd`."""
    line = [sys.executable, str(ROOT / script), *map(str, words)]
    done = subprocess.run(
        line, cwd=cwd, timeout=timeout, capture_output=True, text=True, env=one_thread(), **options
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def one_thread() -> dict:
    import os

    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


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


def flatten(x, name="") -> dict:
    """A checkpoint as a flat dict of path -> value."""
    if isinstance(x, dict):
        return {k: v for key, value in x.items() for k, v in flatten(value, f"{name}/{key}").items()}
    if isinstance(x, (list, tuple)):
        return {k: v for i, value in enumerate(x) for k, v in flatten(value, f"{name}/{i}").items()}
    return {name: x}


def assert_same_checkpoint(a: Path, b: Path, ignore=("wall_seconds", "csv_bytes", "run_dir", "resume")):
    """Bitwise equality of everything but the clock and the folder."""
    a, b = (flatten(torch.load(p, weights_only=True)) for p in (a, b))
    assert a.keys() == b.keys()
    for k in a:
        if k.rsplit("/", 1)[-1] in ignore:
            continue
        same = torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else repr(a[k]) == repr(b[k])
        assert same, k


def write_d4rl(
    path, n=2000, obs_dim=3, act_dim=1, length=100, seed=0, scale=2.0, next_obs=True, **changes
) -> Path:
    """A made-up D4RL file shaped like Pendulum-v1 by default; `changes` replace columns (None drops one)."""
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


TINY = ["--env", "Pendulum-v1", "--critic-width", "32", "--policy-width", "32", "--batch-size", "32",
        "--cql-samples", "2", "--eval-episodes", "0"]  # fmt: skip
