"""Promises P1 to P8 of cql_continuous.py: exact resume, seeds, what must not matter, checkpoints,
signals, bad input, non-finite numbers, memory.

Most tests need processes, and importing torch costs seconds. So one server process imports the
script, and each "new process" is a fork of it that has run nothing yet."""

import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import pytest
import torch
from conftest import (
    ROOT,
    assert_equal,
    assert_same_checkpoint,
    flatten,
    load,
    metrics,
    one_thread,
    only_run,
    summary,
    write_d4rl,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SERVER = """
import errno, json, math, os, random, resource, signal, sys, time, traceback
from pathlib import Path
import gymnasium, h5py, torch
import torch._dynamo  # the first optimiser imports it: 1.5 s in each child
import cql_continuous as cql

gymnasium.make("Pendulum-v1")

def at(n, what, before=False):
    "Call what(learner) right after (or before) update n of this process."
    real, calls = cql.Learner.update, [0]
    def update(learner, *rest, **more):
        calls[0] += 1
        if before and calls[0] == n:
            what(learner)
        info = real(learner, *rest, **more)
        if not before and calls[0] == n:
            what(learner)
        return info
    cql.Learner.update = update

def send(signum):
    return lambda learner: os.kill(os.getpid(), signum)

def train():
    return cql.train(cql.parse(cql.Args, ""))

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 0
        os.chdir(job["cwd"])
        for fd, name in enumerate((os.devnull, job["out"], job["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
        signal.alarm(60)
        sys.argv = ["cql_continuous.py", *job["words"]]
        try:
            exec(job["code"], globals())
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
    """new_process(cwd, *words, before=code): `python cql_continuous.py words` after `before`."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    options["env"] = one_thread() | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", SERVER], **options) as server:

        def start(cwd, *words, before="", code="train()", status=0):
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
    return write_d4rl(tmp_path_factory.mktemp("data") / "data.hdf5", scale=2.0)


TINY = ["--width", 16, "--batch-size", 16]
STOP = "at({}, send(signal.SIGTERM))"
RICH = ["--dropout", 0.1, "--vib-coef", 0.01, "--dr3-coef", 0.01, "--cql-target-gap", -1]
VARIANTS = {"plain": [], "rich": [*RICH, "--num-critics", 3]}


def words(data, *more):
    """200 updates, cloning until 60; 73 and 199 fall between the events of all frequencies."""
    line = [*TINY, "--dataset", data, "--num-updates", 200, "--bc-steps", 60, "--eval-episodes", 2]
    line += ["--log-frequency", 20, "--diagnostics-frequency", 50, "--eval-frequency", 90]
    return [*line, "--checkpoint-frequency", 60, *more]


@pytest.fixture(scope="module")
def whole(data, new_process, tmp_path_factory):
    """variant -> the folder of its uninterrupted run."""
    runs = {k: tmp_path_factory.mktemp(k) for k in VARIANTS}
    for k, cwd in runs.items():
        new_process(cwd, *words(data, *VARIANTS[k]))
    return {k: only_run(cwd) for k, cwd in runs.items()}


def wait_for_next_second():
    """TensorBoard orders a folder's event files by the second in their names."""
    time.sleep(1.001 - time.time() % 1)


def events(run: Path) -> dict:
    """tag -> [(step, value)] as TensorBoard shows them, less those that measure time."""
    read = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = set(read.Tags()["scalars"]) - {"charts/SPS", "charts/updates_per_second"}
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in tags}


def assert_same_run(a: Path, b: Path):
    """Everything that a run leaves behind, but for the clock."""
    for name in ("checkpoint.pt", "selected.pt"):
        assert_same_checkpoint(a / name, b / name)
    assert metrics(a) == metrics(b) and len(metrics(a)) > 50
    assert events(a) == events(b)
    assert_equal(summary(a), summary(b), ignore=("wall_seconds", "updates_per_second"))


def assert_one_line(done, *mentions):
    """A user's mistake: one line on stderr, no traceback."""
    assert re.fullmatch(r"error: .*\n", done.err), done.err
    for m in mentions:
        assert m in done.err


@pytest.fixture
def go(new_process, tmp_path):
    """new_process() in the test's own folder."""
    return lambda *line, cwd=tmp_path, **options: new_process(cwd, *line, **options)


# ------------------------------------------------------------------------------------- P1: resume
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop", [1, 73, 199, 200])
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(
    variant, stop, whole, go, data, tmp_path
):
    line = words(data, *VARIANTS[variant])
    go(*line, before=STOP.format(stop), status=143)
    run = only_run(tmp_path)
    assert load(run / "checkpoint.pt")["step"] == stop and not (run / "summary.json").exists()
    wait_for_next_second()
    done = go("--resume", run)
    assert only_run(tmp_path) == run and "so far" not in done.out
    assert_same_run(run, whole[variant])


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(whole, go, data, tmp_path):
    """Metrics of after the checkpoint are there: they go, and come again."""
    go(*words(data), before="at(115, send(signal.SIGKILL))", status=-9)
    run = only_run(tmp_path)
    assert load(run / "checkpoint.pt")["step"] == 60 < max(step for step, *_ in metrics(run))
    wait_for_next_second()
    go("--resume", run)
    assert_same_run(run, whole["plain"])


def test_more_updates_may_be_asked_for_and_none_doubles_nothing(whole, go, data, tmp_path):
    """90 is a step of the evaluation: the shorter run's last one stands for it."""
    go(*words(data), "--num-updates", 90)
    run = only_run(tmp_path)
    wait_for_next_second()
    done = go("--resume", run, "--num-updates", 200)
    assert "num-updates 200, 90 so far" in done.out
    for _ in range(2):
        assert_same_checkpoint(run / "checkpoint.pt", whole["plain"] / "checkpoint.pt")
        assert metrics(run) == metrics(whole["plain"]) and events(run) == events(whole["plain"])
        wait_for_next_second()
        go("--resume", run)  # nothing is left to do


def fine_tuning(data):
    """Steps 40 to 260 act in Pendulum, whose episodes last 200 steps: the first one ends at 240."""
    line = [*words(data), "--num-updates", 40, "--bc-steps", 10, "--online-steps", 220]
    return [*line, "--eval-frequency", 0, "--diagnostics-frequency", 20]


@pytest.fixture(scope="module")
def fine_tuned(data, new_process, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("fine_tuned")
    new_process(cwd, *fine_tuning(data))
    return only_run(cwd)


@pytest.mark.parametrize("stop", [30, 40, 110, 250])
def test_stopped_fine_tuning_resumes_bitwise(stop, fine_tuned, go, data, tmp_path):
    go(*fine_tuning(data), before=STOP.format(stop), status=143)
    run = only_run(tmp_path)
    wait_for_next_second()
    done = go("--resume", run)
    assert "does not repeat" not in done.out
    assert_same_run(run, fine_tuned)
    assert load(run / "checkpoint.pt")["replay"]["added"] == 220


def test_the_length_of_the_fine_tuning_may_change_on_resume(go, data, tmp_path):
    """Given to a finished offline run, and raised; fewer steps than were taken are refused."""
    line = [*words(data), "--num-updates", 40, "--bc-steps", 10, "--eval-frequency", 0]
    go(*line)
    run = only_run(tmp_path)
    for steps in (20, 30):
        go("--online-steps", steps, "--resume", run)
        saved = load(run / "checkpoint.pt")
        assert saved["step"] == 40 + steps == 40 + saved["replay"]["added"]
    for steps in (29, 0):
        done = go("--online-steps", steps, "--resume", run, status=2)
        assert_one_line(done, "beyond")
    done = go("--num-updates", 65, "--online-steps", 10, "--resume", run, status=2)
    assert_one_line(done, "online already")


# -------------------------------------------------- P2: seeds; P3: what must not matter
def test_same_seed_same_numbers_another_seed_others(whole, go, data, tmp_path):
    line = words(data, *VARIANTS["rich"])
    go(*line, cwd=tmp_path / "same")
    assert_same_run(only_run(tmp_path / "same"), whole["rich"])
    go(*line, "--seed", 2, cwd=tmp_path / "other")
    runs = whole["rich"], only_run(tmp_path / "other")
    same, other = (flatten(load(r / "checkpoint.pt")) for r in runs)
    learnt = [k for k in same if "/networks/" in k and not k.endswith(("mean", "std"))]
    assert len(learnt) > 10 and not any(torch.equal(same[k], other[k]) for k in learnt)
    assert not torch.equal(same["/random"], other["/random"])


LEARNT = ("networks", "optim", "random", "replay")


def test_a_run_that_collects_equals_one_that_finds_the_file(go, tmp_path):
    line = [*TINY, "--collect-steps", 1_060, "--num-updates", 30, "--eval-episodes", 0]
    for name in ("a", "b"):
        go(*line, "--exp-name", name)
    a, b = (load(p / "checkpoint.pt") for p in (tmp_path / "runs").iterdir())
    assert_equal({k: a[k] for k in LEARNT}, {k: b[k] for k in LEARNT})
    assert len(list((tmp_path / "datasets").iterdir())) == 1


OFTEN = ["--log-frequency", 1, "--diagnostics-frequency", 5, "--eval-frequency", 15]
OFTEN += ["--eval-episodes", 2, "--checkpoint-frequency", 10]
RARE = ["--log-frequency", 10_000, "--diagnostics-frequency", 0, "--eval-frequency", 0]
RARE += ["--eval-episodes", 0, "--checkpoint-frequency", 0]


@pytest.mark.parametrize("variant, online", [("plain", 0), ("rich", 0), ("plain", 30)])
def test_diagnostics_logging_evaluation_change_nothing(variant, online, go, data, tmp_path):
    line = [*words(data, *VARIANTS[variant]), "--num-updates", 60, "--bc-steps", 20]
    for name, some in (("often", OFTEN), ("rare", RARE)):
        go(*line, *some, "--online-steps", online, cwd=tmp_path / name)
    often, rare = (only_run(tmp_path / k) for k in ("often", "rare"))
    assert len(metrics(often)) > 20 * len(metrics(rare))
    a, b = (load(run / "checkpoint.pt") for run in (often, rare))
    assert a["step"] == b["step"] == 60 + online
    assert_equal({k: a[k] for k in LEARNT}, {k: b[k] for k in LEARNT})


# -------------------------------------------------------------------------------- P4: checkpoints
KILLS = """
run, step, draw = cql.Run(cql.parse(cql.Args, ""), 1), 0, random.Random(0)
run.open()
learner = torch.nn.Linear(1, 300_000)
run.save(step, learner, {})
for kill in range(30):
    told, tell = os.pipe()
    child = os.fork()
    while child == 0:
        step += 1
        learner.bias.data.fill_(step)
        run.save(step, learner, {})
        os.write(tell, step.to_bytes(4, "little"))
    os.close(tell)
    if kill % 2 == 0:  # let one save succeed
        step = int.from_bytes(os.read(told, 4), "little")
    time.sleep(draw.uniform(0, 0.04))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while word := os.read(told, 4):
        step = int.from_bytes(word, "little")
    os.close(told)
    saved = cql.load_checkpoint(run.dir)
    assert saved["step"] >= step, (saved["step"], step)
    assert step == 0 or (saved["networks"]["bias"] == saved["step"]).all()
    print(step := saved["step"])
"""


def test_killed_at_any_moment_the_latest_checkpoint_loads(go, data, tmp_path):
    """A process that does nothing but save: the step that it last called saved is there."""
    done = go(*words(data), code=KILLS)
    steps = [int(x) for x in re.findall(r"^\d+$", done.out, re.M)]
    assert len(steps) == 30 and steps == sorted(steps) and steps[-1] >= 15


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


def test_a_save_that_fails_half_way_leaves_the_one_before(go, data, tmp_path):
    """The first save, at 60, succeeds, the second one not."""
    line = [*words(data), "--diagnostics-frequency", 0, "--eval-episodes", 0]
    done = go(*line, before=FULL, status=2)
    assert_one_line(done, "checkpoint.pt", "intact")
    run = only_run(tmp_path)
    assert load(run / "checkpoint.pt")["step"] == 60 and not list(run.glob("*tmp*"))


class Crafted:
    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


@pytest.fixture(scope="module")
def stopped_run(data, new_process, tmp_path_factory):
    """A run stopped at update 5."""
    cwd = tmp_path_factory.mktemp("stopped")
    line = words(data, "--eval-episodes", 0)
    new_process(cwd, *line, before=STOP.format(5), status=143)
    return only_run(cwd)


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def altered(**changes):
    return lambda path: torch.save(load(path) | changes, path)


def flip(path):
    """One byte in the middle of a tensor, which torch.load alone would not notice."""
    content, marker = bytearray(path.read_bytes()), load(path)["random"].numpy().tobytes()
    content[content.index(marker) + len(marker) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGES = {
    "empty": cut(0),
    "half": cut(0.5),
    "99 %": cut(0.99),
    "text": lambda path: path.write_text("not a checkpoint\n"),
    "missing": Path.unlink,
    "flipped byte": flip,
    "crafted": altered(x=Crafted()),
    "crafted, no zip": lambda path: path.write_bytes(pickle.dumps(Crafted())),
    "another script's": altered(script="sac"),
    "another format": altered(format=999),
    "no dict": lambda path: torch.save(torch.zeros(3), path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_checkpoint_is_refused_in_one_line(damage, stopped_run, go, tmp_path):
    run = tmp_path / "runs" / "damaged"
    run.mkdir(parents=True)
    path, good = run / "checkpoint.pt", (stopped_run / "checkpoint.pt").read_bytes()
    path.write_bytes(good)
    DAMAGES[damage](path)
    bad = path.exists() and path.read_bytes()
    assert bad != good
    assert_one_line(go("--resume", run, status=2), "checkpoint.pt")
    assert (path.exists() and path.read_bytes()) == bad
    assert len(list(run.iterdir())) == path.exists() and not list(tmp_path.rglob("EXECUTED"))


def test_no_script_opens_a_door_to_pickles():
    doors = r"weights_only\s*=\s*False|[pP]ickle\.(load|Unpickler)|allow_pickle\s*=\s*True"
    for script in sorted(ROOT.glob("*.py")):
        text = script.read_text()
        assert not re.search(doors, text), script
        safe = re.findall(r"torch\.load\([^\n]*weights_only=True", text)
        assert text.count("torch.load(") == len(safe), script


# ------------------------------------------------------------------------------------ P5: signals
WRAPPED = """
real, calls = {0}, []
def wrapped(*rest):
    calls.append(0)
    if len(calls) == {1}:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*rest)
{0} = wrapped
"""
# With the step of the checkpoint. The first save is selected.pt, at 50; evaluations come at 60,
# 90, 100, and of selected.pt.
INTERRUPTIONS = {
    "before an update": ("at(73, send(signal.SIGINT), before=True)", 73),
    "after an update": ("at(73, send(signal.SIGINT))", 73),
    "in diagnostics": (WRAPPED.format("cql.diagnose", 1), 50),
    "in a save": (WRAPPED.format("torch.save", 2), 60),
    "in an evaluation": (WRAPPED.format("cql.evaluate", 2), 90),
    "in the last evaluation": (WRAPPED.format("cql.evaluate", 3), 100),
}


@pytest.mark.parametrize("when", INTERRUPTIONS)
def test_a_signal_at_any_moment_saves_and_says_how_to_go_on(when, go, data, tmp_path):
    code, step = INTERRUPTIONS[when]
    done = go(*words(data), "--num-updates", 100, before=code, status=130)
    run = only_run(tmp_path)
    assert done.err == "" and load(run / "checkpoint.pt")["step"] == step
    assert done.out.endswith(f"cql_continuous.py --resume runs/{run.name}\n")
    assert not (run / "summary.json").exists()
    if when == "after an update":
        go(*shlex.split(done.out.splitlines()[-1])[2:])
        assert summary(run)["num_updates"] == 100


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_collecting_keeps_nothing(signum, go, tmp_path):
    """Half a replay is not mistaken for a whole one by the next run."""
    line, stop = [*TINY, "--collect-steps", 1_060], f"at(10, send({int(signum)}))"
    done = go(*line, before=stop, status=128 + signum)
    assert done.err == "" and "nothing is kept" in done.out
    assert not [p for k in ("datasets", "runs") for p in (tmp_path / k).rglob("*")]


def test_a_second_signal_ends_the_process_at_once(go, data, tmp_path):
    """A user who cannot wait for the update is not locked out."""
    twice = "at(73, lambda x: [send(signal.SIGTERM)(x), time.sleep(0.01), send(signal.SIGTERM)(x)])"
    go(*words(data), before=twice, status=-signal.SIGTERM)


# ---------------------------------------------------------------------------------- P6: bad input
def test_resume_refuses_other_networks_and_other_data(data, stopped_run, go, tmp_path):
    before = {p.name: p.read_bytes() for p in stopped_run.iterdir()}
    fixed = {
        "--seed": 2,
        "--width": 17,
        "--reward-scale": 2.0,
        "--holdout": 0.1,
        "--cql-alpha": 0.5,
    }
    for flag, value in fixed.items():
        done = go("--resume", stopped_run, flag, value, status=2)
        assert_one_line(done, flag, str(value))
    other = write_d4rl(tmp_path / "other.hdf5", seed=1)
    done = go("--resume", stopped_run, "--dataset", other, status=2)
    assert_one_line(done, "other data", str(data))
    assert {p.name: p.read_bytes() for p in stopped_run.iterdir()} == before


@pytest.mark.parametrize("flag", ["--run-dir", "--data-dir"])
def test_a_place_that_cannot_be_written_is_said_before_collecting(flag, go, tmp_path):
    """A file stands where the folder should be."""
    (tmp_path / "there").write_text("")
    done = go(*TINY, flag, "there/below", status=2)
    assert_one_line(done, f"{flag} there", "cannot be written")
    assert "steps of" not in done.out


# -------------------------------------------------------------------------- P7: non-finite numbers
KEEP = """
load, held = cql.load, []
def keep(*rest):
    held.append(load(*rest))
    return held[0]
cql.load = keep
def inject(what, number):
    def do(learner):
        for p in Path("runs").glob("*/*.pt"):
            p.with_suffix(".before").write_bytes(p.read_bytes())
        if what == "reward":
            return held[0].columns["rew"].fill_(number)
        dict(learner.named_parameters())[what].data.view(-1)[0] = number
    return do
"""
CRITIC, ACTOR, TARGET = "critic.layers.0.weight", "actor.net.1.bias", "target.head.bias"
NON_FINITE = [  # what becomes which number after which update, event -> frequency, last step, words
    ("reward", "math.nan", 57, {"log": 20, "checkpoint": 40}, 60, r"losses/qf_loss is nan"),
    ("reward", "math.inf", 57, {"log": 20, "checkpoint": 40}, 60, r"losses/qf_loss is (inf|nan)"),
    (CRITIC, "math.nan", 57, {"log": 20, "checkpoint": 40}, 60, r"losses/\w+ is nan"),
    (ACTOR, "math.nan", 57, {"log": 20, "checkpoint": 40}, 60, r"losses/\w+ is nan"),
    (ACTOR, "math.nan", 60, {"checkpoint": 30}, 60, rf"{ACTOR} is not finite"),
    (CRITIC, "-math.inf", 60, {"checkpoint": 30}, 60, rf"{CRITIC} is not finite"),
    (TARGET, "math.nan", 60, {"checkpoint": 30}, 60, rf"{TARGET} is not finite"),
    ("log_alpha", "math.nan", 60, {"checkpoint": 30}, 60, r"log_alpha is not finite"),
    (CRITIC, "math.nan", 57, {"checkpoint": 30, "diagnostics": 58}, 58, r"\S+ is nan"),
    (ACTOR, "math.nan", 58, {"checkpoint": 30, "diagnostics": 29}, 58, r"\S+ is nan"),
    (ACTOR, "math.nan", 58, {"checkpoint": 30, "eval": 29}, 58, r"action is not finite"),
    (CRITIC, "math.nan", 100, {"checkpoint": 30}, 100, r"overestimation is nan"),
    (CRITIC, "math.nan", 57, {"checkpoint": 30, "signal": 58}, 58, r"\S+ is not finite"),
]


@pytest.mark.parametrize("case", NON_FINITE, ids=["{} {} at {}: {}".format(*x) for x in NON_FINITE])
def test_non_finite_numbers_stop_the_run(case, go, data, tmp_path):
    """Of 100 updates, at the next event (log, save, diagnostics, evaluation, the end): status 3,
    before any file is touched, with the term named."""
    what, number, update, frequencies, stops, named = case
    line = [*words(data), "--num-updates", 100, "--bc-steps", 10]
    for k in ("log", "diagnostics", "eval", "checkpoint"):
        line += [f"--{k}-frequency", frequencies.get(k, 10_000)]
    hook = f"at({update}, inject({what!r}, {number}))\n"
    if "signal" in frequencies:  # the good checkpoint matters more
        hook += STOP.format(frequencies["signal"])
    done = go(*line, before=KEEP + hook, status=3)
    assert_one_line(done, "the last checkpoint is from before")
    assert re.search(named, done.err), done.err
    step = re.search(r"step (\d+)", done.err)
    assert int(step[1]) <= stops if step else "action" in named
    run = only_run(tmp_path)
    assert (run / "checkpoint.pt").exists() and not list(run.glob("*tmp*"))
    for p in run.glob("*.pt"):
        assert p.read_bytes() == p.with_suffix(".before").read_bytes(), p.name


# ------------------------------------------------------------------------------------- P8: memory
def sparse_file(path: Path):
    """A few kilobytes on disk, 20 TB when read."""
    with h5py.File(path, "w") as f:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            more = {"observations": [3], "actions": [1]}.get(key, [])
            f.create_dataset(key, (10**12, *more), "f4", chunks=(10**6, *more))


TOO_LARGE = [["--online-steps", 10**12], ["--dataset", "x.hdf5"], ["--collect-steps", 10**12]]


@pytest.mark.parametrize("line", TOO_LARGE, ids=lambda line: line[0])
def test_a_run_that_cannot_fit_says_so_first(line, go, data, tmp_path):
    """Status 2, one line, before training. The limit keeps the machine alive should it not."""
    sparse_file(tmp_path / "x.hdf5")
    limit = "resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))"
    line = line if "--collect-steps" in line else [*words(data), *line]
    done = go(*line, before=limit, status=2)
    assert_one_line(done, "GiB")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


MEASURE = """
def kib(key):
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(key))

args = cql.parse(cql.Args, "")
cql.set_up(args)
cql.load("small.hdf5", args, None, torch.device("cpu"))
before = kib("VmRSS")
cql.load("large.hdf5", args, None, torch.device("cpu"))
print("peak", kib("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_reading_takes_the_memory_that_was_printed(go, tmp_path):
    """The file's and the table's together, within a third; 200,000 rows like HalfCheetah's."""
    for name, n in (("small", 2_000), ("large", 200_000)):
        write_d4rl(tmp_path / f"{name}.hdf5", n, 17, 6, 1_000, scale=1.0)
    done = go(*TINY, code=MEASURE)
    said = [float(x) for x in re.findall(r": ([\d.]+) MiB on cpu", done.out)[-2:]]
    peak = int(re.search(r"peak (\d+)", done.out)[1]) / 1024
    assert 0.75 * sum(said) < peak < 1.34 * sum(said), (said, peak)
