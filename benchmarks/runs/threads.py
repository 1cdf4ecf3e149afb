"""Updates per second of sac.py by --threads and by the number of busy processes beside it.

  python benchmarks/runs/threads.py          # 0, 1 and 4 of them, on a machine that is quiet
  python benchmarks/runs/threads.py --busy 0   # as the machine is

HalfCheetah's shapes, batch 256, two layers of 256, a replay of made-up rows. Rows are appended to
benchmarks/raw/threads.csv, with the machine's load before each.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
BUSY = [sys.executable, "-c", "while True: pass"]


def updates_per_second(threads: int, seconds: float = 10.0) -> float:
    """Measured in a process of its own, since OpenMP keeps its threads."""
    sys.path.insert(0, str(HERE.parent))
    import sac
    import torch

    torch.set_num_threads(threads)
    args, device = sac.Args(), torch.device("cpu")
    learner, replay = sac.Learner(17, 6, args, device), sac.Replay(20_000, 17, 6, device)
    rows = torch.randn(20_000, 17), torch.rand(20_000, 6) * 2 - 1, torch.randn(20_000)
    replay.add(*rows, torch.randn(20_000, 17), torch.zeros(20_000), torch.zeros(20_000))
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        learner.update(replay.sample(args.batch_size), with_policy=True)
        done += 1
    return done / (time.perf_counter() - begin)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--measure", type=int, metavar="THREADS", help="in this process")
    options = parser.parse_args()
    if options.measure:
        print(updates_per_second(options.measure))
        return
    path, rows = HERE / "raw" / "threads.csv", []
    if not path.exists():
        rows.append(["cores", "load_before", "busy", "threads", "updates_per_second"])
    for busy in options.busy:
        others = [subprocess.Popen(BUSY) for _ in range(busy)]
        for threads in (1, 2):
            load = round(os.getloadavg()[0], 1)
            line = [sys.executable, __file__, "--measure", str(threads)]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            rate = float(done.stdout.split()[-1])
            rows.append([os.cpu_count(), load, busy, threads, round(rate, 2)])
            print(rows[-1], flush=True)
        for other in others:
            other.kill()
    with open(path, "a", newline="") as f:
        csv.writer(f).writerows(rows)


if __name__ == "__main__":
    main()
