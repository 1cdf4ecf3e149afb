"""What a GPU gives: rates of the scripts, eager, with CUDA graphs, compiled, both; what it changes.

  python benchmarks/runs/gpu.py                                      # on a GPU: eight minutes
  python benchmarks/runs/gpu.py --cpu --updates 4 --no-compile --out gpu.csv    # that it runs

Targets on an H100-class card: cql_continuous.py, 3 x 256, N = 10, 1,700 updates a second; sac.py
and td3.py on HalfCheetah-v5 1,500 steps a second. Rows of benchmarks/raw/gpu.csv:

- `rate`, updates or steps a second of train() in a run's second half: start-up, capture and
  compilation lie in the first. Of cql_continuous.py also with --cql-backward and in bf16, of
  cql_atari.py, whose frames lie on the device, also with them in main memory.
- `max_difference` of all weights from those of an unbroken eager run with the same seed after 200
  updates or steps (on-policy scripts: four rollouts of them); the note is the word of
  torch.allclose(rtol=1e-4, atol=1e-5). `eager` is the same again: the noise of the card.
  `graphs > eager` stopped half-way with graphs and was resumed without.

Each row has a process of its own, for a failed capture spoils what comes after it, and is written
at once; one that failed, or came too late, holds nan and the reason. On a CPU there are no graphs.
"""

import argparse
import csv
import io
import math
import multiprocessing
import os
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import torch
import torch._dynamo  # the first optimizer would, in each child

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import cql_atari  # noqa: E402
import cql_continuous  # noqa: E402
import dr3_analysis  # noqa: E402
import kfac_npg  # noqa: E402
import policy_constraints  # noqa: E402
import ppo  # noqa: E402
import qt_opt  # noqa: E402
import sac  # noqa: E402
import safety_critics  # noqa: E402
import td3  # noqa: E402
from speed import QUIET, random_data  # noqa: E402

FORK = multiprocessing.get_context("fork")  # the imports are done once; only children use the GPU
FIRST = (cql_continuous, sac, td3, cql_atari, policy_constraints, qt_opt)  # those with CUDA graphs
OTHERS = (ppo, kfac_npg, safety_critics, dr3_analysis)
CQL = {"width": 256, "depth": 3, "cql_samples": 10}  # as in the targets
FLAGS = {"eager": [], "graphs": ["cudagraphs"], "compile": ["compile"]}
FLAGS["both"] = ["cudagraphs", "compile"]
dr3_analysis.report = lambda folder: None  # a table and a figure after each run


def in_child(seconds: float, fn, *words) -> tuple:
    """The pair that fn returns in a process of its own; nan and a note if it does not."""
    here, there = FORK.Pipe(duplex=False)

    def work():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        with redirect_stderr(io.StringIO()) as said:
            try:
                result = fn(*words)
            except Exception as e:
                result = math.nan, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
            except SystemExit:  # a script's own refusal: a line on stderr
                result = math.nan, said.getvalue().rpartition("error: ")[2].strip()
        there.send(result)

    child = FORK.Process(target=work)
    child.start()
    there.close()
    try:
        return here.recv() if here.poll(seconds) else (math.nan, "stopped: --minutes are over")
    except EOFError:
        child.join()
        return math.nan, f"the process ended with status {child.exitcode}"
    finally:
        child.kill()
        child.join()


def settings(script, n: int, home: Path) -> tuple[dict, str, int]:
    """Arguments for about n updates or steps, the name of their number, the number."""
    size = min(n, 2048)  # of a rollout; four of them
    own = {
        cql_continuous: CQL | {"dataset": f"{home}/random.hdf5"},
        policy_constraints: {"dataset": f"{home}/random.hdf5", "behaviour_steps": n // 4},
        qt_opt: {"dataset": f"{home}/random.hdf5", "cem_iterations": 5, "lag": 500},
        cql_atari: {"width": 32, "n_step": 1, "collect_steps": min(5_000, 50 * n)}
        | {"data_dir": f"{home}/data"},
        ppo: {"num_envs": 1, "num_steps": size, "num_minibatches": max(1, size // 64)},
        kfac_npg: {"num_envs": 1, "num_steps": size},
        safety_critics: {"num_envs": 1, "num_steps": size},
        dr3_analysis: {"seeds": 1, "transitions": min(1_000, 50 * n)},
    }.get(script, {"learning_starts": n // 4})
    own |= {"update_epochs": 10, "anneal_lr": False} if script is ppo else {}
    total = 4 * size if script in (ppo, kfac_npg, safety_critics) else n
    common = QUIET | {"log_frequency": total // 2, "diagnostics_frequency": 0, "bc_steps": 0}
    if script is not cql_atari:
        common["env_id"] = "HalfCheetah-v5"
    known = {name: x for name, x in common.items() if hasattr(script.Args, name)}
    length = "num_updates" if hasattr(script.Args, "num_updates") else "total_timesteps"
    return known | own, length, total


def run(script, n: int, home: Path, cpu: bool, parts: list, changes: dict) -> Path:
    """The folder of a run in as many parts as there are variants, each resumed from the last."""
    about, length, total = settings(script, n, home)
    about |= changes | {"cuda": not cpu, "run_dir": mkdtemp(dir=home)}
    for i, variant in enumerate(parts, 1):
        for flag in ("cudagraphs", "compile"):
            if hasattr(script.Args, flag):
                about[flag] = flag in FLAGS[variant]
        script.train(script.Args(**about | {length: total * i // len(parts)}))
        (about["resume"],) = map(str, Path(about["run_dir"]).iterdir())
    return Path(about["resume"])


def rate(*words) -> tuple:
    with open(run(*words) / "metrics.csv") as f:
        tags = ("charts/SPS", "charts/updates_per_second")
        found = [(int(r["step"]), float(r["value"])) for r in csv.DictReader(f) if r["tag"] in tags]
    (half, before), (end, after) = found[0], found[-1]  # each since the start
    return round((end - half) / (end / after - half / before), 1), ""


def max_difference(script, n: int, home: Path, cpu: bool, parts: list, changes: dict) -> tuple:
    whole = home / f"{script.__name__}.pt"  # the unbroken run's
    if not whole.exists():
        (run(script, n, home, cpu, ["eager"], changes) / "checkpoint.pt").rename(whole)
    paths = whole, run(script, n, home, cpu, parts, changes) / "checkpoint.pt"
    one, two = (torch.load(path, "cpu", weights_only=True)["networks"] for path in paths)
    worst = max(float((x.double() - two[name]).abs().max()) for name, x in one.items())
    close = all(torch.allclose(x, two[name], rtol=1e-4, atol=1e-5) for name, x in one.items())
    return worst, "allclose" if close else "not allclose"


def jobs(cpu: bool, compiled: bool):
    """(what, script, variants of its parts, changed arguments), the most important first."""
    fast = ["eager"] if cpu else ["eager", "graphs"]
    yield from ((rate, s, [v], {}) for s in FIRST[:3] for v in fast)
    for precision in ("fp32", "bf16"):
        for k in (0, 2) if precision == "fp32" else (0, 1, 2):  # 1, the default, has been measured
            yield rate, cql_continuous, fast[-1:], {"precision": precision, "cql_backward": k}
    yield from ((rate, cql_atari, [v], {}) for v in fast)
    yield rate, cql_atari, ["eager"], {"storage": "memory"}
    yield from ((rate, script, [v], {}) for script in (policy_constraints, qt_opt) for v in fast)
    yield rate, qt_opt, fast[-1:], {"cql_alpha": 5.0}
    for script in FIRST:
        yield from ((max_difference, script, [v], {}) for v in fast if not cpu)
        yield from ((max_difference, script, [v, w], {}) for v in fast for w in fast)
    for script in OTHERS:
        yield rate, script, ["eager"], {}
        yield max_difference, script, ["eager", "eager"], {}
    if compiled:
        slow = ["compile"] if cpu else ["both", "compile"]
        yield from ((rate, s, [v], {}) for s in FIRST for v in slow)
        yield rate, ppo, ["compile"], {}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--updates", type=int, default=3_000, help="updates or steps of a rate")
    parser.add_argument("--minutes", type=float, default=8, help="nothing runs any longer")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "raw" / "gpu.csv"))
    parser.add_argument("--no-compile", action="store_true", help="leave --compile out")
    parser.add_argument("--cpu", action="store_true", help="on the processor, to try this script")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    device, note = "cpu", ""
    if not options.cpu:
        device, note = in_child(60, lambda: (torch.cuda.get_device_name(), ""))
    if note:
        print(f"error: no GPU ({note}); --cpu tries this script without one", file=sys.stderr)
        raise SystemExit(2)
    with TemporaryDirectory() as home, open(options.out, "w", newline="", buffering=1) as f:
        writer = csv.writer(f)
        writer.writerow(["script", "variant", "device", "torch", "what", "value", "note"])
        random_data(f"{home}/random.hdf5")
        for what, script, parts, changes in jobs(options.cpu, not options.no_compile):
            variant = ", ".join([" > ".join(parts), *(f"{k}={v}" for k, v in changes.items())])
            n = options.updates if what is rate else min(options.updates, 200)
            words = script, n, Path(home), options.cpu, parts, changes
            value, note, seconds = math.nan, "left out: --minutes are over", end - time.monotonic()
            if seconds > 1:
                value, note = in_child(seconds, what, *words)
            row = [script.__name__, variant, device, torch.__version__, what.__name__, value, note]
            writer.writerow(row)
            print(*row, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
