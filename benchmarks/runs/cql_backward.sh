#!/usr/bin/env bash
# Does the sampled backward pass change what is learned? The bare run with networks of 256, five seeds.
#   bash benchmarks/runs/cql_backward.sh "1 2 3 4 5" "0 1 2"
#   python tools/report.py runs/Pendulum-v1__K* --curves benchmarks/raw/cql_backward_curves.csv
set -euo pipefail
seeds=${1-"1 2 3 4 5"} ks=${2-"0 1 2"}
export OMP_NUM_THREADS=1
for seed in $seeds; do
  for k in $ks; do
    python cql_continuous.py --seed $seed --width 256 --cql-backward $k --exp-name K$k
  done
done
