"""What does a better argmax do to the return? Finished runs of qt_opt.py, played with other numbers
of iterations than they were trained with.

  bash benchmarks/runs/qt_opt.sh cheetah "1"
  python benchmarks/runs/cem_return.py runs/HalfCheetah-v5__qt_cem* > benchmarks/raw/cem_return.csv
"""

import csv
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import qt_opt  # noqa: E402

out = csv.writer(sys.stdout, lineterminator="\n")
out.writerow(["exp_name", "seed", "trained", "played", "return_mean", "return_std", "argmax_share"])
for folder in sys.argv[1:]:
    saved = qt_opt.load_checkpoint(folder)
    args = qt_opt.Args(**saved["args"])
    with ExitStack() as stack:
        envs = qt_opt.make_envs(args.env_id, 10, stack)
        sizes = qt_opt.check_boxes(envs, args.env_id)
        learner = qt_opt.Learner(*sizes, args, torch.device("cpu"))
        learner.load_state_dict(saved["networks"])
        states = torch.as_tensor(qt_opt.play(learner, envs, args.seed)[0], dtype=torch.float32)
        for k in (1, 2, 3, 5, 10):
            learner.args = replace(args, cem_iterations=k)
            found = qt_opt.evaluate(learner, envs, learner.args)
            draw = torch.Generator().manual_seed(0)
            share = qt_opt.argmax_share(learner, states, learner.args, draw)
            numbers = found["final_return_mean"], found["final_return_std"], float(share)
            row = [args.exp_name, args.seed, args.cem_iterations, k]
            out.writerow(row + [f"{x:.4g}" for x in numbers])
            sys.stdout.flush()
