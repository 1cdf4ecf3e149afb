#!/usr/bin/env bash
# Which --cql-alpha? The workflow's rule without an environment: TD error and CQL regulariser both small.
#   bash benchmarks/runs/alpha_sweep.sh HalfCheetah-v5 "1 2" datasets/HalfCheetah-v5_replay_100000.hdf5
#   python tools/report.py runs/HalfCheetah-v5__alpha_*__1__* --sweep    # each seed by itself
# The evaluations tell afterwards whether the rule was right. The file is that of offline.sh.
set -euo pipefail
env=${1:-HalfCheetah-v5} seeds=${2-"1 2"} file=${3:-datasets/HalfCheetah-v5_replay_100000.hdf5} alphas=${4:-"0.5 1 2.5 5 10 20"}
export OMP_NUM_THREADS=1
for seed in $seeds; do
  for alpha in $alphas; do
    python cql_continuous.py --env $env --dataset $file --seed $seed --cql-alpha $alpha --exp-name alpha_$alpha \
      --num-updates 10_000 --width 256 --batch-size 128 --bc-steps 0 --eval-frequency 5_000
  done
done
