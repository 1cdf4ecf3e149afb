"""What `--cql-backward K` buys: updates a second of cql_continuous.py, and the peak of memory.

  python benchmarks/runs/cql_backward.py > benchmarks/raw/cql_backward.csv    # alone on the machine

Rounds in turn, each process on its own: K = 0 (all samples), 1, 2; fp32, and bf16 where the
processor has it; one thread and two. HalfCheetah's widths: 17 observations, 6 actions.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SIZES = {"3x256, N=10": (3, 10, 24), "2x256, N=4": (2, 4, 80)}  # depth, N, updates a round
ROUNDS = 3


def measure(size: str, k: int, precision: str, threads: int):
    """Prints updates a second, and the process's peak in MiB."""
    import cql_continuous as cql
    import torch

    depth, n, updates = SIZES[size]
    about = {"width": 256, "depth": depth, "cql_samples": n, "cql_backward": k}
    about |= {"precision": precision}
    args = cql.Args(**about, threads=threads, cuda=False)
    cpu, B = cql.set_up(args), args.batch_size
    learner = cql.Learner(17, 6, args, cpu)
    states, acts = torch.randn(2, B, 17), torch.rand(B, 6) * 2 - 1
    batch = cql.Batch(states[0], acts, torch.randn(B), states[1], torch.zeros(B))
    learner.update(lambda: batch, cloning=False)
    start = time.perf_counter()
    for _ in range(updates):
        learner.update(lambda: batch, cloning=False)
    rate = updates / (time.perf_counter() - start)
    print(f"{rate:.2f},{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")


def main():
    print("size,k,precision,threads,round,updates_per_second,peak_mib", flush=True)
    bf16 = Path("/proc/cpuinfo").exists() and "bf16" in Path("/proc/cpuinfo").read_text()
    for size in SIZES:
        for threads in (1, 2):
            for turn in range(ROUNDS):
                for precision in ("fp32", "bf16")[: 1 + bf16]:
                    for k in (0, 1, 2):
                        words = [size, str(k), precision, str(threads)]
                        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
                        command = [sys.executable, __file__, *words]
                        done = subprocess.run(
                            command, env=env, capture_output=True, text=True, check=True
                        )
                        row = [f'"{size}"', *words[1:], str(turn), done.stdout.strip()]
                        print(",".join(row), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main()
