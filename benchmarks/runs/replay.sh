#!/usr/bin/env bash
# Which transitions to replay: td3.py with each --replay, otherwise as in online.sh.
#   bash benchmarks/runs/replay.sh HalfCheetah-v5 "1 2 3"
#   bash benchmarks/runs/replay.sh Hopper-v5 "1 2 3"
#   python tools/report.py runs/*__td3_replay_* --curves benchmarks/raw/replay.csv
#   python benchmarks/figures.py replay
# Each run takes one thread: start seeds side by side, a call a seed.
set -euo pipefail
env=${1:-HalfCheetah-v5} seeds=${2-"1 2 3"} kinds=${3:-"uniform per lap pal discor"} steps=${4:-100_000}
export OMP_NUM_THREADS=1
for seed in $seeds; do
  for kind in $kinds; do
    python td3.py --env $env --seed $seed --total-timesteps $steps --learning-starts 5_000 --eval-frequency 5_000 \
      --replay $kind --exp-name td3_replay_$kind
  done
done
