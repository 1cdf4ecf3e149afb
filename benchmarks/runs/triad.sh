#!/usr/bin/env bash
# The deadly triad: DDPG (td3.py's three switches) with and without target networks, with 1, 4 and 16 updates a step.
#   bash benchmarks/runs/triad.sh Hopper-v5 "1 2 3 4 5"
#   python tools/report.py runs/Hopper-v5__*target_utd* --curves benchmarks/raw/triad.csv
#   python benchmarks/figures.py triad
set -euo pipefail
env=${1:-Hopper-v5} seeds=${2-"1 2 3 4 5"} utds=${3:-"1 4 16"}
export OMP_NUM_THREADS=1
run="python td3.py --env $env --num-critics 1 --policy-noise 0 --policy-frequency 1 --total-timesteps 4_000"
run="$run --learning-starts 1_000 --batch-size 64 --width 128"
run="$run --eval-frequency 100 --eval-episodes 0 --checkpoint-frequency 0"
for seed in $seeds; do
  for utd in $utds; do
    $run --seed $seed --utd $utd --tau 0.005 --exp-name target_utd$utd
    $run --seed $seed --utd $utd --tau 1 --exp-name no_target_utd$utd
  done
done
