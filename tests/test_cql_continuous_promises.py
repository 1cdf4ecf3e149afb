"""Promises P1 to P8 of cql_continuous.py: exact resume, seeds, what must not matter, checkpoints, signals,
non-finite numbers, memory.

Most tests need processes, and importing torch costs seconds. So one server process imports the script, and
each "new process" is a fork of it that has run nothing yet; `run_script` where the command line is promised.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cql_continuous as cql
import h5py
import numpy as np
import pytest
import torch
import tyro
from conftest import (
    ROOT,
    TINY,
    assert_same_checkpoint,
    flatten,
    metrics,
    one_thread,
    only_run,
    run_script,
    summary,
    write_d4rl,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SERVER = """
import errno, json, math, os, random, resource, signal, sys, threading, time, traceback
from pathlib import Path
import gymnasium, h5py, torch, tyro
import torch._dynamo  # the first optimiser imports it: 1.5 s in each child
import cql_continuous as cql

gymnasium.make("Pendulum-v1")

def at(n, what, before=False):
    "Call what(learner) right after (or before) update n of this process."
    real, calls = cql.Learner.update, [0]
    def update(learner, *rest):
        calls[0] += 1
        if before and calls[0] == n:
            what(learner)
        info = real(learner, *rest)
        if not before and calls[0] == n:
            what(learner)
        return info
    cql.Learner.update = update

def send(signum):
    return lambda learner: os.kill(os.getpid(), signum)

def train(*words):
    return cql.train(tyro.cli(cql.Args, args=list(words)))

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 0
        os.chdir(job["cwd"])
        for fd, name in enumerate((os.devnull, job["out"], job["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
        signal.alarm(40)
        try:
            exec(job["code"], globals() | {"words": job["words"]})
        except SystemExit as e:
            status = e.code
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def new_process():
    """new_process(cwd, *words, before=code): `python cql_continuous.py words` after `before`, in a fork."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    options["env"] = one_thread() | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", SERVER], **options) as server:

        def start(cwd, *words, before="", code="train(*words)", status=0):
            Path(cwd).mkdir(exist_ok=True)
            out, err = Path(cwd) / "stdout", Path(cwd) / "stderr"
            job = {"cwd": str(cwd), "code": f"{before}\n{code}", "words": [str(w) for w in words]}
            server.stdin.write(json.dumps(job | {"out": str(out), "err": str(err)}) + "\n")
            server.stdin.flush()
            ended = int(server.stdout.readline())
            done = SimpleNamespace(out=out.read_text(), err=err.read_text())
            assert ended == status, f"status {ended}\n{done.out[-2000:]}\n{done.err[-3000:]}"
            return done

        yield start
        server.stdin.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Actions within [-1, 1], which any box of the environment admits."""
    return write_d4rl(tmp_path_factory.mktemp("data") / "data.hdf5", scale=1.0)


def words(data, *more):
    """200 updates, cloning until 60; 73 and 199 fall between the events of all frequencies."""
    return [*TINY, "--dataset", data, "--num-updates", 200, "--bc-steps", 60, "--eval-episodes", 2,
            "--log-frequency", 20, "--diagnostics-frequency", 50, "--eval-frequency", 90,
            "--checkpoint-frequency", 60, *more]  # fmt: skip


RICH = [
    "--dropout",
    0.1,
    "--vib-coef",
    0.01,
    "--dr3-coef",
    0.01,
    "--cql-target-gap",
    -1,
    "--num-critics",
    3,
]
VARIANTS = {"plain": [], "rich": RICH}


@pytest.fixture(scope="module")
def whole(data, new_process, tmp_path_factory):
    """variant -> the folder of its uninterrupted run."""
    runs = {k: tmp_path_factory.mktemp(k) for k in VARIANTS}
    for k, cwd in runs.items():
        new_process(cwd, *words(data, *VARIANTS[k]))
    return {k: only_run(cwd) for k, cwd in runs.items()}


def wait_for_next_second():
    """TensorBoard orders a folder's event files by the second and process id in their names."""
    time.sleep(1.001 - time.time() % 1)


def events(run: Path) -> dict:
    """tag -> [(step, value)] as TensorBoard shows them, less those that measure time."""
    read = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = set(read.Tags()["scalars"]) - {"charts/SPS", "charts/updates_per_second"}
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in tags}


def timeless(run: Path) -> dict:
    return {
        k: v for k, v in summary(run).items() if k not in ("wall_seconds", "updates_per_second")
    }


def assert_same_run(a: Path, b: Path):
    """Everything that a run leaves behind, but for the clock."""
    for name in ("checkpoint.pt", "selected.pt"):
        assert_same_checkpoint(a / name, b / name)
    assert metrics(a) == metrics(b)
    assert events(a) == events(b)
    assert timeless(a) == timeless(b)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_one_line(done, *mentions):
    """A user's mistake: one line on stderr, no traceback."""
    assert re.fullmatch(r"error: .*\n", done.err), done.err
    for m in mentions:
        assert m in done.err


# ------------------------------------------------------------------------------------------- P1: resume
STOPS = [("plain", 1), ("plain", 73), ("plain", 100), ("plain", 199), ("plain", 200), ("rich", 73)]


@pytest.mark.parametrize("variant, stop", STOPS)
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(
    variant, stop, whole, new_process, data, tmp_path
):
    line = words(data, *VARIANTS[variant])
    done = new_process(tmp_path, *line, before=f"at({stop}, send(signal.SIGTERM))", status=143)
    run = only_run(tmp_path)
    assert str(Path("runs") / run.name) in done.out
    assert load(run / "checkpoint.pt")["step"] == stop
    wait_for_next_second()
    new_process(tmp_path, *line, "--resume", run)
    assert only_run(tmp_path) == run
    assert_same_run(run, whole[variant])


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(whole, new_process, data, tmp_path):
    """Killed outright, the folder holds metrics of after the checkpoint: they go, and come again."""
    kill = "at(115, lambda learner: [time.sleep(0.2), os.kill(os.getpid(), signal.SIGKILL)])"
    new_process(tmp_path, *words(data), before=kill, status=-9)
    run = only_run(tmp_path)
    assert load(run / "checkpoint.pt")["step"] == 60 < max(step for step, *_ in metrics(run))
    wait_for_next_second()
    new_process(tmp_path, *words(data), "--resume", run)
    assert_same_run(run, whole["plain"])


def test_more_updates_may_be_asked_for_on_resume(whole, new_process, data, tmp_path):
    """90 is a step of the evaluation: the shorter run's last one stands for it."""
    new_process(tmp_path, *words(data), "--num-updates", 90)
    run = only_run(tmp_path)
    wait_for_next_second()
    new_process(tmp_path, *words(data), "--resume", run)
    assert_same_checkpoint(run / "checkpoint.pt", whole["plain"] / "checkpoint.pt")
    assert metrics(run) == metrics(whole["plain"])
    assert events(run) == events(whole["plain"])


def test_resuming_a_finished_run_doubles_nothing(new_process, data, tmp_path):
    line = [*words(data), "--num-updates", 60]
    new_process(tmp_path, *line)
    run = only_run(tmp_path)
    before = metrics(run), events(run), timeless(run)
    wait_for_next_second()
    new_process(tmp_path, *line, "--resume", run)
    assert metrics(run) == before[0]
    assert timeless(run) == before[2]
    assert events(run) == before[1]


def test_resume_auto_takes_the_newest_run_with_these_arguments(new_process, data, tmp_path):
    line = words(data, "--eval-episodes", 0, "--num-updates", 20)
    new_process(tmp_path, *line, before="at(5, send(signal.SIGTERM))", status=143)
    first = only_run(tmp_path)
    new_process(tmp_path, *line, before="at(9, send(signal.SIGTERM))", status=143)
    new_process(tmp_path, *line, "--seed", 2, before="at(7, send(signal.SIGTERM))", status=143)
    others = set((tmp_path / "runs").iterdir()) - {first}
    done = new_process(tmp_path, *line, "--resume", "auto")
    (run,) = (r for r in others if r.name in done.out)
    assert load(run / "checkpoint.pt")["args"]["seed"] == 1
    assert (run / "summary.json").exists() and len(list((tmp_path / "runs").iterdir())) == 3
    assert load(first / "checkpoint.pt")["step"] == 5
    new_process(tmp_path, *line, "--seed", 3, "--num-updates", 5, "--resume", "auto")
    assert len(list((tmp_path / "runs").iterdir())) == 4


@pytest.mark.parametrize("header", ["sac.py's", "{}", "{", None])
def test_resume_auto_passes_over_what_is_not_this_script_s(header, new_process, data, tmp_path):
    """All scripts share runs/: the newest checkpoint there may be sac.py's, or one without the rest."""
    line = words(data, "--eval-episodes", 0, "--num-updates", 20)
    new_process(tmp_path, *line, before="at(5, send(signal.SIGTERM))", status=143)
    run = only_run(tmp_path)
    other = tmp_path / "runs" / "another"
    other.mkdir()
    torch.save(load(run / "checkpoint.pt") | {"script": "sac"}, other / "checkpoint.pt")
    if header:
        theirs = (
            (run / "args.json").read_text().replace('"script": "cql_continuous"', '"script": "sac"')
        )
        (other / "args.json").write_text(theirs if header == "sac.py's" else header)
    done = new_process(tmp_path, *line, "--resume", "auto")
    assert run.name in done.out and summary(run)["num_updates"] == 20


def test_resume_refuses_another_algorithm_and_other_data(new_process, data, tmp_path):
    copy = tmp_path / "copy.hdf5"
    copy.write_bytes(data.read_bytes())
    line = words(copy, "--eval-episodes", 0)
    new_process(tmp_path, *line, before="at(5, send(signal.SIGTERM))", status=143)
    run = only_run(tmp_path)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    changes = {
        "--gamma": 0.9,
        "--cql-alpha": 1.0,
        "--seed": 2,
        "--critic-width": 16,
        "--backup": "max",
    }
    for flag, value in changes.items():
        done = new_process(tmp_path, *line, flag, value, "--resume", run, status=2)
        assert_one_line(done, flag, str(value))
    write_d4rl(copy, scale=1.0, seed=1)
    assert_one_line(new_process(tmp_path, *line, "--resume", run, status=2), "data")
    assert_one_line(new_process(tmp_path, *line, "--resume", tmp_path / "none", status=2), "none")
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def fine_tuning(data):
    """Steps 40 to 260 act in Pendulum, whose episodes last 200 steps: the first one ends at 240."""
    return [*words(data), "--num-updates", 40, "--bc-steps", 10, "--online-steps", 220,
            "--eval-frequency", 0, "--diagnostics-frequency", 20]  # fmt: skip


@pytest.fixture(scope="module")
def fine_tuned(data, new_process, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("fine_tuned")
    new_process(cwd, *fine_tuning(data))
    return only_run(cwd)


@pytest.mark.parametrize("stop", [30, 40])
def test_stopped_before_the_fine_tuning_resumes_bitwise(
    stop, fine_tuned, new_process, data, tmp_path
):
    line = fine_tuning(data)
    new_process(tmp_path, *line, before=f"at({stop}, send(signal.SIGTERM))", status=143)
    run = only_run(tmp_path)
    wait_for_next_second()
    new_process(tmp_path, *line, "--resume", run)
    assert_same_run(run, fine_tuned)


def test_stopped_in_the_fine_tuning_the_replay_comes_back_whole(
    fine_tuned, new_process, data, tmp_path
):
    line = fine_tuning(data)
    new_process(tmp_path, *line, before="at(250, send(signal.SIGTERM))", status=143)
    run, expected = only_run(tmp_path), load(fine_tuned / "checkpoint.pt")["player"]
    stopped = load(run / "checkpoint.pt")["player"]
    assert len(stopped["returns"]) == 1
    for k, v in stopped[
        "buffer"
    ].items():  # up to the stop nothing differs from the uninterrupted run
        assert len(v) == 210 and torch.equal(v, expected["buffer"][k][:210]), k
    wait_for_next_second()
    new_process(tmp_path, *line, "--resume", run)
    saved = load(run / "checkpoint.pt")
    assert saved["step"] == 260 and saved["player"]["returns"][:1] == stopped["returns"]
    for k, v in saved["player"]["buffer"].items():
        assert len(v) == 220 and torch.equal(v[:210], stopped["buffer"][k]), k
    obs, next_obs = (saved["player"]["buffer"][k] for k in ("obs", "next_obs"))
    assert not torch.equal(obs[210], next_obs[209])  # a new episode, not a row that joins two
    assert not torch.equal(obs[210], obs[0])  # and not the first one again
    tags = [[row[:2] for row in metrics(r)] for r in (run, fine_tuned)]
    assert tags[0] == tags[1] and max(Counter(tags[0]).values()) == 1
    assert {k: len(v) for k, v in events(run).items()} == {
        k: len(v) for k, v in events(fine_tuned).items()
    }


def test_the_length_of_the_fine_tuning_may_change_on_resume(new_process, data, tmp_path):
    """--online-steps is among the flags that may change: given to a finished offline run, raised."""
    line = [*words(data), "--num-updates", 40, "--bc-steps", 10, "--eval-frequency", 0]
    new_process(tmp_path, *line)
    run = only_run(tmp_path)
    for online_steps in (20, 30):
        new_process(tmp_path, *line, "--online-steps", online_steps, "--resume", run)
        saved = load(run / "checkpoint.pt")
        assert saved["step"] == 40 + online_steps == 40 + len(saved["player"]["buffer"]["rew"])


@pytest.mark.parametrize("online_steps", [10, 0])
def test_fewer_online_steps_than_were_taken(online_steps, new_process, data, tmp_path):
    """A replay that does not fit is refused in one line, or simply kept; no traceback."""
    line = [
        *words(data),
        "--num-updates",
        40,
        "--bc-steps",
        10,
        "--eval-frequency",
        0,
        "--online-steps",
    ]
    new_process(tmp_path, *line, 20)
    code = "try:\n    train(*words)\nexcept SystemExit as e:\n    assert e.code == 2, e.code"
    new_process(tmp_path, *line, online_steps, "--resume", only_run(tmp_path), code=code)


def test_more_updates_before_the_fine_tuning_has_begun(new_process, data, tmp_path):
    line = [
        *words(data),
        "--bc-steps",
        10,
        "--eval-frequency",
        0,
        "--online-steps",
        5,
        "--num-updates",
    ]
    new_process(tmp_path, *line, 40, before="at(30, send(signal.SIGTERM))", status=143)
    run = only_run(tmp_path)
    new_process(tmp_path, *line, 45, "--resume", run)
    assert load(run / "checkpoint.pt")["step"] == 50


# -------------------------------------------------------------------------------------------- P2: seeds
def test_same_seed_same_numbers_another_seed_others(whole, new_process, data, tmp_path):
    new_process(tmp_path / "same", *words(data, *RICH))
    assert_same_run(only_run(tmp_path / "same"), whole["rich"])
    new_process(tmp_path / "other", *words(data, *RICH), "--seed", 2)
    same, other = (
        flatten(load(r / "checkpoint.pt")) for r in (whole["rich"], only_run(tmp_path / "other"))
    )
    learnt = [k for k in same if "/networks/" in k and not k.endswith(("obs_mean", "obs_std"))]
    assert len(learnt) > 10 and not any(torch.equal(same[k], other[k]) for k in learnt)
    assert not torch.equal(same["/random/cpu"], other["/random/cpu"])


def test_same_seed_same_collected_data(new_process, tmp_path):
    """Collected twice alike; and a run that collects equals one that finds the file of an earlier run."""
    line = [*TINY, "--collect-steps", 1_060, "--num-updates", 30, "--diagnostics-frequency", 0]
    for cwd in ("collects", "again", "again"):
        new_process(tmp_path / cwd, *line)
    (a,), (b,) = ((tmp_path / cwd / "datasets").iterdir() for cwd in ("collects", "again"))
    with h5py.File(a) as x, h5py.File(b) as y:
        assert x.keys() == y.keys() and dict(x.attrs) == dict(y.attrs)
        assert all(np.array_equal(x[k], y[k]) for k in x)
    second, third = sorted((tmp_path / "again" / "runs").iterdir(), key=lambda p: p.stat().st_mtime)
    for run in (second, third):
        saved = [load(r / "checkpoint.pt") for r in (run, only_run(tmp_path / "collects"))]
        assert_equal(*({k: s[k] for k in ("learner", "random")} for s in saved))


def assert_equal(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k], k


# ------------------------------------------------------------------------------- P3: what must not matter
OFTEN = [
    "--log-frequency",
    1,
    "--diagnostics-frequency",
    5,
    "--eval-frequency",
    15,
    "--eval-episodes",
    2,
]
OFTEN += ["--checkpoint-frequency", 10]
RARE = ["--log-frequency", 10_000, "--diagnostics-frequency", 0, "--eval-frequency", 0]
RARE += ["--checkpoint-frequency", 0]


@pytest.mark.parametrize("variant, online", [("plain", 0), ("rich", 0), ("plain", 30)])
def test_diagnostics_logging_evaluation_change_nothing(
    variant, online, new_process, data, tmp_path
):
    line = [
        *words(data, *VARIANTS[variant]),
        "--num-updates",
        60,
        "--bc-steps",
        20,
        "--online-steps",
        online,
    ]
    new_process(tmp_path / "often", *line, *OFTEN)
    new_process(tmp_path / "rare", *line, *RARE)
    often, rare = (only_run(tmp_path / k) for k in ("often", "rare"))
    assert len(metrics(often)) > 20 * len(metrics(rare))
    a, b = (load(run / "checkpoint.pt") for run in (often, rare))
    assert a["step"] == b["step"] == 60 + online
    assert_equal(*({k: s[k] for k in ("learner", "random", "player")} for s in (a, b)))


def test_no_evaluation_changes_nothing(new_process, data, tmp_path):
    """--eval-episodes 0 needs no environment, yet must not read the actions on another scale."""
    line = [*words(data), "--num-updates", 60]
    new_process(tmp_path / "with", *line)
    new_process(tmp_path / "without", *line, "--eval-episodes", 0)
    saved = [load(only_run(tmp_path / k) / "checkpoint.pt") for k in ("with", "without")]
    assert_equal(*({k: s[k] for k in ("learner", "random")} for s in saved))


# --------------------------------------------------------------------------------------- P4: checkpoints
KILLS = """
args = tyro.cli(cql.Args, args=words)
run = cql.Run(args, {}, None)
path, step, draw = run.dir / "checkpoint.pt", 0, random.Random(0)
for kill in range(30):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            step += 1
            run.save("checkpoint.pt", {"step": step, "x": torch.full((300_000,), float(step))})
            os.write(tell, step.to_bytes(4, "little"))
    os.close(tell)
    promised = step
    if kill % 2 == 0:  # let one save succeed; after the first kill there is a checkpoint
        promised = int.from_bytes(os.read(told, 4), "little")
    time.sleep(draw.uniform(0, 0.04))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while word := os.read(told, 4):
        promised = int.from_bytes(word, "little")
    os.close(told)
    saved = cql.load_checkpoint(path)
    assert saved["step"] >= promised >= step, (saved["step"], promised, step)
    assert (saved["x"] == saved["step"]).all()
    print(step := saved["step"])
"""


def test_killed_at_any_moment_the_latest_checkpoint_loads(new_process, data, tmp_path):
    """30 kills of a process that does nothing but save: the step that it last called saved is there."""
    done = new_process(tmp_path, *words(data), code=KILLS)
    steps = [int(x) for x in re.findall(r"^\d+$", done.out, re.M)]
    assert len(steps) == 30 and steps == sorted(steps) and steps[-1] >= 15


def test_a_checkpoint_is_flushed_before_it_is_moved_into_place(monkeypatch, tmp_path):
    """A power cut cannot be tested, the order can: file to disk, rename, folder to disk."""
    calls, fsync, move = [], os.fsync, os.replace

    def note_fsync(descriptor):
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def note_move(a, b):
        assert Path(a).parent == Path(b).parent  # else it would be a copy
        calls.append(("move", Path(a), Path(b)))
        move(a, b)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_move)
    with cql.write_beside(tmp_path / "x.pt") as temporary:
        torch.save({"step": 1}, temporary)
    order = [("fsync", temporary), ("move", temporary, tmp_path / "x.pt"), ("fsync", tmp_path)]
    assert calls == order and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


FULL = """
real, saves = torch.save, []
def save(state, path, *rest):
    saves.append(path)
    if len(saves) == 2:
        Path(path).write_bytes(b"x" * 5_000)
        raise OSError(errno.ENOSPC, "No space left on device")
    return real(state, path, *rest)
torch.save = save
"""
LIMIT = "at(70, lambda learner: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY)))"


@pytest.mark.parametrize("fault", [FULL, LIMIT], ids=["ENOSPC", "file size limit"])
def test_a_save_that_fails_half_way_leaves_the_one_before(fault, new_process, data, tmp_path):
    """The first save, at 60, succeeds, the second one not."""
    done = new_process(tmp_path, *words(data), "--diagnostics-frequency", 0, before=fault, status=2)
    assert_one_line(done, "checkpoint.pt")
    run = only_run(tmp_path)
    assert cql.load_checkpoint(run / "checkpoint.pt")["step"] == 60
    assert not list(run.glob("*tmp*"))


class Crafted:
    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


@pytest.fixture(scope="module")
def stopped_run(data, new_process, tmp_path_factory):
    """A command and the bytes of a good checkpoint of it, at update 5."""
    cwd = tmp_path_factory.mktemp("stopped")
    line = words(data, "--eval-episodes", 0)
    new_process(cwd, *line, before="at(5, send(signal.SIGTERM))", status=143)
    return line, (only_run(cwd) / "checkpoint.pt").read_bytes()


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def altered(change):
    def alter(path):
        saved = load(path)
        change(saved)
        torch.save(saved, path)

    return alter


def put_nan(saved):
    saved["learner"]["networks"]["critic.head.weight"][0, 0, 0] = float("nan")


def flip(path):
    """One byte in the middle of the largest tensor."""
    whole, marker = bytearray(path.read_bytes()), load(path)["random"]["cpu"].numpy().tobytes()
    whole[whole.index(marker) + len(marker) // 2] ^= 0xFF
    path.write_bytes(whole)


def raw_pickle(path):
    import pickle

    path.write_bytes(pickle.dumps(Crafted()))


DAMAGES = {
    "empty": cut(0),
    "half": cut(0.5),
    "99 %": cut(0.99),
    "text": lambda path: path.write_text("not a checkpoint\n"),
    "flipped byte": flip,
    "crafted": lambda path: torch.save(
        {"script": "cql_continuous", "format": cql.FORMAT, "x": Crafted()}, path
    ),
    "crafted, no zip": raw_pickle,
    "another script's": altered(lambda saved: saved.update(script="sac")),
    "another format": altered(lambda saved: saved.update(format=999)),
    "no dict": lambda path: torch.save(torch.zeros(3), path),
    "nan": altered(put_nan),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_checkpoint_is_refused_in_one_line(damage, stopped_run, new_process, tmp_path):
    line, good = stopped_run
    run = tmp_path / "runs" / "damaged"
    run.mkdir(parents=True)
    (run / "checkpoint.pt").write_bytes(good)
    DAMAGES[damage](run / "checkpoint.pt")
    bad = (run / "checkpoint.pt").read_bytes()
    assert bad != good
    done = new_process(tmp_path, *line, "--resume", run, status=2)
    assert_one_line(done, "checkpoint.pt")
    assert (run / "checkpoint.pt").read_bytes() == bad and len(list(run.iterdir())) == 1
    assert not list(tmp_path.rglob("EXECUTED"))


def test_no_script_opens_a_door_to_pickles():
    scripts = sorted(ROOT.glob("*.py"))
    assert ROOT / "cql_continuous.py" in scripts
    doors = r"weights_only\s*=\s*False|[pP]ickle\.(load|Unpickler)|allow_pickle\s*=\s*True|\b(joblib|dill)\b"
    for script in scripts:
        text = script.read_text()
        assert not re.search(doors, text), script
        safe = re.findall(r"torch\.load\([^\n]*weights_only=True", text)
        assert text.count("torch.load(") == len(safe), script


# ------------------------------------------------------------------------------------------- P5: signals
def test_the_printed_command_goes_on_to_the_end(data, tmp_path):
    """As a user meets it: a real process, a signal from outside, the printed line run word by word."""
    line = [*words(data), "--num-updates", 300, "--eval-frequency", 0, "--exp-name", "it's a test"]
    line += ["--no-normalize-obs", "--reward-shift", -0.5, "--run-dir", "my runs"]
    start = [sys.executable, ROOT / "cql_continuous.py", *map(str, line)]
    with subprocess.Popen(
        start,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=one_thread(),
    ) as process:
        out = ""
        while "training" not in out:  # the progress of the first update
            out += (word := process.stdout.readline())
            assert word, out + process.stderr.read()
        process.send_signal(signal.SIGTERM)
        out += process.stdout.read()
        assert process.wait(20) == 143 and process.stderr.read() == ""
    (run,) = (tmp_path / "my runs").iterdir()
    step = load(run / "checkpoint.pt")["step"]
    assert 1 <= step < 300 and not (run / "summary.json").exists()
    python, script, *rest = shlex.split(out.splitlines()[-1])
    assert (python, script) == ("python", "cql_continuous.py")
    run_script(script, *rest, cwd=tmp_path)
    assert summary(run)["num_updates"] == 300 and len(list((tmp_path / "my runs").iterdir())) == 1


WRAPPED = """
real, calls = {0}, []
def wrapped(*rest):
    calls.append(0)
    if len(calls) == {1}:
        send(signum)(0)
    return real(*rest)
{0} = wrapped
"""
INTERRUPTIONS = {  # and the step of the checkpoint. The first save is selected.pt, at 50; evaluations come
    # at 60 (cloning ends), 90, 100, and of selected.pt
    "before an update": ("at(73, send(signum), before=True)", 73),
    "after an update": ("at(73, send(signum))", 73),
    "in diagnostics": (WRAPPED.format("cql.diagnose", 1), 50),
    "in a save": (WRAPPED.format("torch.save", 2), 60),
    "in an evaluation": (WRAPPED.format("cql.evaluate", 2), 90),
    "in the last evaluation": (WRAPPED.format("cql.evaluate", 4), 100),
}


@pytest.mark.parametrize(
    "signum, when",
    [(signal.SIGINT, k) for k in INTERRUPTIONS]
    + [(signal.SIGTERM, k) for k in ("after an update", "in the last evaluation")],
)
def test_a_signal_at_any_moment_saves_and_prints_the_command(
    signum, when, new_process, data, tmp_path
):
    code, step = INTERRUPTIONS[when]
    line = [*words(data), "--num-updates", 100]
    done = new_process(
        tmp_path, *line, before=f"signum = {int(signum)}\n{code}", status=128 + signum
    )
    assert done.err == ""
    run = only_run(tmp_path)
    assert load(run / "checkpoint.pt")["step"] == step
    python, script, *rest = shlex.split(done.out.splitlines()[-1])
    assert (python, script, rest[-2:]) == (
        "python",
        "cql_continuous.py",
        ["--resume", f"runs/{run.name}"],
    )
    if when == "after an update":
        new_process(tmp_path, *rest)
        assert summary(run)["num_updates"] == 100


def test_a_signal_while_collecting_keeps_nothing(new_process, tmp_path):
    """Half a replay is not mistaken for a whole one by the next run."""
    line = [*TINY, "--collect-steps", 1_060]
    done = new_process(tmp_path, *line, before="at(10, send(signal.SIGTERM))", status=143)
    assert (
        done.err == "" and not list(tmp_path.rglob("*.hdf5*")) and not (tmp_path / "runs").exists()
    )


def test_a_second_signal_ends_the_process_at_once(new_process, data, tmp_path):
    """A user who cannot wait for the update is not locked out."""
    twice = "at(73, lambda learner: [send(signal.SIGTERM)(0), time.sleep(0.01), send(signal.SIGTERM)(0)])"
    new_process(tmp_path, *words(data), before=twice, status=-signal.SIGTERM)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"exp_name": "a b'c", "dataset": "with space.hdf5", "reward_shift": -0.5, "cuda": False},
        {"reward_shift": -1e-05, "cql_clip_diff": -200.0, "cql_target_gap": -8.1, "q_lr": 1e-5},
        {
            "alpha": 0.2,
            "backup": "max",
            "layer_norm": True,
            "normalize_obs": False,
            "num_updates": 10**6,
        },
        {"dropout": 0.1 + 0.2, "vib_coef": 1 / 3, "gamma": 0.9999999999, "online_steps": 7},
    ],
)
def test_the_printed_command_gives_the_same_arguments(changes):
    args = replace(cql.Args(), **changes)
    words = shlex.split(cql.command(args, Path("runs/x y")))
    assert words[:2] == ["python", "cql_continuous.py"]
    assert tyro.cli(cql.Args, args=words[2:]) == replace(args, resume="runs/x y")


def short(data):
    line = words(data, "--num-updates", 6, "--eval-episodes", 0)
    return tyro.cli(cql.Args, args=[str(w) for w in line])


def test_train_may_be_called_in_a_thread(data, tmp_path):
    """Only the main thread may set signal handlers; elsewhere train() does without."""
    results = []

    def target():
        try:
            results.append(cql.train(short(data)))
        except BaseException as e:
            results.append(e)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(30)
    (result,) = results
    assert isinstance(result, dict) and result["num_updates"] == 6


@pytest.mark.parametrize("end", ["done", "stopped", "error"])
def test_handlers_are_restored(end, data, monkeypatch, tmp_path):
    """Whoever calls train() keeps their own handlers, however it ends."""
    mine = {s: lambda *_: None for s in (signal.SIGINT, signal.SIGTERM)}
    for s, handler in mine.items():
        signal.signal(s, handler)
    real = cql.Learner.update

    def update(learner, *rest):
        assert all(signal.getsignal(s) is not handler for s, handler in mine.items())
        if end == "stopped":
            os.kill(os.getpid(), signal.SIGINT)
        if end == "error":
            raise ZeroDivisionError
        return real(learner, *rest)

    monkeypatch.setattr(cql.Learner, "update", update)
    try:
        cql.train(short(data))
        assert end == "done"
    except SystemExit as e:
        assert end == "stopped" and e.code == 130
    except ZeroDivisionError:
        assert end == "error"
    assert all(signal.getsignal(s) is handler for s, handler in mine.items())


# ------------------------------------------------------------------------------- P7: non-finite numbers
KEEP = """
load, held = cql.load, []
def keep(*a):
    held.append(load(*a))
    return held[0]
cql.load = keep
def inject(what, number):
    def do(learner):
        for p in Path("runs").glob("*/*.pt"):
            p.with_suffix(".before").write_bytes(p.read_bytes())
        if what == "reward":
            return held[0].rew.fill_(number)
        dict(learner.named_parameters())[what].data.view(-1)[0] = number
    return do
"""
CRITIC, ACTOR, TARGET = "critic.layers.0.weight", "actor.net.0.bias", "target.head.bias"
NEVER = 10_000


NON_FINITE = [  # what becomes which number after which update, event -> frequency, last step to stop at, name
    ("reward", "math.nan", 57, {"log": 20, "checkpoint": 40}, 60, r"qf1_loss"),
    ("reward", "math.inf", 57, {"log": 20, "checkpoint": 40}, 60, r"qf1_loss"),
    (
        CRITIC,
        "math.nan",
        57,
        {"log": 20, "checkpoint": 40},
        60,
        r"qf1_loss|critic\.layers\.0\.weight",
    ),
    (ACTOR, "math.nan", 57, {"log": 20, "checkpoint": 40}, 60, r"qf1_loss|actor.*"),
    (ACTOR, "math.nan", 60, {"log": 20, "checkpoint": 40}, 60, re.escape(ACTOR)),
    (CRITIC, "-math.inf", 60, {"log": 20, "checkpoint": 40}, 60, re.escape(CRITIC)),
    (TARGET, "math.nan", 60, {"log": 20, "checkpoint": 40}, 60, re.escape(TARGET)),
    ("log_alpha", "math.nan", 60, {"log": 20, "checkpoint": 40}, 60, "log_alpha|alpha"),
    ("reward", "math.nan", 57, {"checkpoint": 30}, 60, r"qf1_loss"),
    (CRITIC, "math.nan", 60, {"checkpoint": 30}, 60, re.escape(CRITIC)),
    (CRITIC, "math.nan", 57, {"checkpoint": 30, "diagnostics": 58}, 58, r"\S+"),
    (ACTOR, "math.nan", 58, {"checkpoint": 30, "diagnostics": 29}, 58, r"\S+"),
    (ACTOR, "math.nan", 58, {"checkpoint": 30, "eval": 29}, 60, r"\S+"),
    (CRITIC, "math.nan", 100, {"checkpoint": 30}, 100, re.escape(CRITIC)),
]


@pytest.mark.parametrize(
    "what, number, update, frequencies, stops, names",
    NON_FINITE,
    ids=["{} {} at {}: {}".format(*case[:4]) for case in NON_FINITE],
)
def test_non_finite_numbers_stop_the_run(
    what, number, update, frequencies, stops, names, new_process, data, tmp_path
):
    """100 updates, at the next event (log, save, diagnostics, the run's end): status 3, before any file is
    touched, with the term named."""
    line = [*words(data), "--num-updates", 100, "--bc-steps", 10]
    for k in ("log", "diagnostics", "eval", "checkpoint"):
        line += [f"--{k}-frequency", frequencies.get(k, NEVER)]
    hook = f"at({update}, inject({what!r}, {number}))"
    done = new_process(tmp_path, *line, before=KEEP + hook, status=3)
    assert_one_line(done)
    step, name = re.search(r"step (\d+): (\S+) is not finite", done.err).groups()
    assert int(step) <= stops and re.fullmatch(names, name), done.err
    run = only_run(tmp_path)
    assert (run / "checkpoint.pt").exists() and not list(run.glob("*tmp*"))
    for p in run.glob("*.pt"):
        assert p.read_bytes() == p.with_suffix(".before").read_bytes(), p.name
        for k, v in flatten(load(p)["learner" if p.stem == "checkpoint" else "networks"]).items():
            assert not isinstance(v, torch.Tensor) or v.isfinite().all(), k


def test_a_stop_does_not_save_non_finite_numbers(new_process, data, tmp_path):
    """A signal between the injection and the next check: the good checkpoint matters more than the signal."""
    hook = f"at(57, inject({CRITIC!r}, math.nan))\nat(58, send(signal.SIGTERM))"
    line = [*words(data), "--checkpoint-frequency", 30, "--log-frequency", NEVER]
    new_process(tmp_path, *line, "--diagnostics-frequency", 0, before=KEEP + hook, status=3)
    assert load(only_run(tmp_path) / "checkpoint.pt")["step"] == 30


# -------------------------------------------------------------------------------------------- P8: memory
def sparse_file(path: Path) -> Path:
    """A few kilobytes on disk, 20 TB when read."""
    n = 10**12
    with h5py.File(path, "w") as f:
        for key, width in (("observations", 3), ("actions", 1)):
            f.create_dataset(key, (n, width), "f4", chunks=(10**6, width))
        for key, kind in (("rewards", "f4"), ("terminals", "?"), ("timeouts", "?")):
            f.create_dataset(key, (n,), kind, chunks=(10**6,))
    return path


@pytest.mark.parametrize(
    "flags",
    [
        {"--online-steps": 10**12},
        {"--dataset": "sparse.hdf5"},
        {"--critic-width": 10**6},
        {"--policy-width": 10**6},
        {"--batch-size": 10**6, "--cql-samples": 10**6},
    ],
    ids=["replay", "dataset", "critic", "policy", "minibatch"],
)
def test_a_run_that_cannot_fit_says_so_first(flags, new_process, data, tmp_path):
    """Status 2 and one line, before training. The limit keeps the machine alive should it not say so."""
    sparse_file(tmp_path / "sparse.hdf5")
    gib = 2**30
    limit = f"resource.setrlimit(resource.RLIMIT_AS, ({16 * gib}, {16 * gib}))"
    more = [x for pair in flags.items() for x in pair]
    done = new_process(tmp_path, *words(data), *more, before=limit, status=2)
    assert_one_line(done, "GiB")
    assert not (tmp_path / "runs").exists()


def test_a_collection_that_cannot_fit_says_so_first(new_process, tmp_path):
    assert_one_line(new_process(tmp_path, *TINY, "--collect-steps", 10**12, status=2), "GiB")


def test_memory_is_printed_before_it_is_taken(new_process, data, tmp_path):
    """The estimates are right to a third: the dataset's arrays, the replay's rows."""
    args = [*words(data), "--num-updates", 5, "--online-steps", 5_000]
    done = new_process(tmp_path, *args, before="at(2, send(signal.SIGTERM))", status=143)
    found = dict(re.findall(r"^(.+): ([\d,.]+) MiB on cpu$", done.out.split("run folder")[0], re.M))
    replay = 5_000 * 4 * (3 + 3 + 1 + 1 + 1 + 1) / 2**20
    assert float(found["replay buffer"]) == pytest.approx(replay, rel=0.34)
    assert float(found["dataset"]) == pytest.approx(
        2_000 * 4 * (3 + 3 + 1 + 1 + 1 + 2) / 2**20, abs=0.06
    )


@pytest.mark.parametrize("free, fits", [(100, True), (1, False)])
def test_reserve_asks_the_machine(free, fits, monkeypatch, capsys):
    """/proc/meminfo counts in KiB."""
    real = Path.read_text
    fake = f"MemTotal: 9 kB\nMemAvailable:  {free * 1024} kB\n"
    monkeypatch.setattr(
        Path, "read_text", lambda p, *a: fake if str(p) == "/proc/meminfo" else real(p, *a)
    )
    try:
        cql.reserve(10 * 2**20, "thing", torch.device("cpu"))
        assert fits
    except SystemExit as e:
        assert e.code == 2 and not fits
    assert "thing: 10.0 MiB on cpu" in capsys.readouterr().out


def test_under_torchrun_the_printed_command_starts_as_many_processes(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    words = shlex.split(cql.command(cql.Args(), Path("runs/x")))
    assert words == ["torchrun", "--nproc_per_node=4", "cql_continuous.py", "--resume", "runs/x"]


def test_a_gpu_that_cannot_be_used_does_not_stop_a_save(monkeypatch):
    """NVML may count GPUs that CUDA cannot initialise; the run is on the CPU and asks none of them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    saved = cql.random_state()
    a = torch.rand(3)
    cql.restore_random_state(saved)
    assert torch.equal(torch.rand(3), a) and saved["cuda"] == []
