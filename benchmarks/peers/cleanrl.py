"""The rate of CleanRL's ppo_continuous_action.py, run as it is in an environment of its own.

  python -m venv cleanrl cleanrl/bin/pip install torch==2.13.0 "numpy<2"
  "gymnasium[mujoco]==0.29.1" tyro tensorboard git clone https://github.com/vwxyzjn/cleanrl
  cleanrl/repo  # measured at fe8d8a03 cleanrl/bin/python benchmarks/peers/cleanrl.py
  cleanrl/repo/cleanrl/ppo_continuous_action.py --steps 20480

It needs gymnasium 0.29 (1.x wants an argument of TransformObservation that it does not give),
whose HalfCheetah-v4 has the physics of v5. Printed: steps per second from its own "SPS" lines,
the first rollout left out. It normalises observations and rewards: compare with ppo.py's
--normalize-obs --normalize-reward.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROLLOUT = 2048


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--env", default="HalfCheetah-v4")
    parser.add_argument("--steps", type=int, default=20_480)
    args = parser.parse_args()
    line = [sys.executable, args.file.resolve(), "--env-id", args.env]
    line += ["--total-timesteps", str(args.steps + ROLLOUT)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True)
    rates = [int(x) for x in re.findall(r"SPS: (\d+)", done.stdout)]  # each since the run's start
    seconds = [ROLLOUT * (i + 1) / rate for i, rate in enumerate(rates)]
    print("steps per second", ROLLOUT * (len(rates) - 1) / (seconds[-1] - seconds[0]))


if __name__ == "__main__":
    main()
