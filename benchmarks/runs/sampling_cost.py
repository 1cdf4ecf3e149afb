"""Minibatches per second that cql_atari.py draws, by the number of frames and by where they lie.

  python benchmarks/runs/sampling_cost.py     # writes benchmarks/raw/sampling_cost.csv

Frames are made up, in a sparse file that takes no space on the disk and reads as zeros: what is
measured is the cost of finding, gathering and stacking, not that of a disk. Beside the rate stand
the bytes that the process holds for the set, as a multiple of the raw frames' (7,056 each), and
the growth of its resident memory while it samples.
"""

import csv
import re
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE.parent))
import cql_atari as atari  # noqa: E402

SIZES = {"mmap": (50_000, 500_000, 5_000_000), "memory": (50_000, 500_000)}


def make(folder: Path, rows: int):
    """Episodes of 99 transitions in the layout of read_own(), the frames' file sparse."""
    np.lib.format.open_memmap(folder / "frames.npy", "w+", np.uint8, (rows, 84, 84))
    at = np.arange(rows)
    columns = {"act": at % 4, "rew": np.float32(at % 3), "begins": at % 100 == 0}
    columns |= {"terminal": at % 100 == 98, "real": at % 100 != 99, "whole": at >= 0}
    np.savez(folder / "columns.npz", **columns)


def resident() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure(storage: str, rows: int, batches: int = 1_000) -> list:
    torch.set_num_threads(1)
    args = atari.Args(storage=storage, holdout=0.0)
    game = SimpleNamespace(frame_shape=(84, 84), actions=4, name="made up")
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), rows)
        data = atari.load(folder, args, game, torch.device("cpu"))
        tensors = [v for v in vars(data).values() if isinstance(v, torch.Tensor)]
        held = sum(t.untyped_storage().nbytes() for t in tensors) / (rows * 84 * 84)
        for _ in range(50):
            data.sample(32)
        before, highest, begin = resident(), 0, time.perf_counter()
        for i in range(batches):
            data.sample(32)
            if i % 50 == 49:
                highest = max(highest, resident() - before)
        rate = batches / (time.perf_counter() - begin)
    return [storage, rows, round(rate, 1), round(held, 4), round(highest / 2**20)]


def main():
    out = HERE / "raw" / "sampling_cost.csv"
    with open(out, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow("storage frames batches_per_second bytes_per_raw_byte growth_mib".split())
        for storage, sizes in SIZES.items():
            for rows in sizes:
                row = measure(storage, rows)
                print(*row)
                writer.writerow(row)


if __name__ == "__main__":
    main()
