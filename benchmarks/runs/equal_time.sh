#!/usr/bin/env bash
# CQL(H) beside d3rlpy's on one file by minutes and by updates: the same networks, minibatch, rates and starts, one
# thread each; and with d3rlpy's target, the policy's mean action (10,000 updates).
#   bash benchmarks/runs/equal_time.sh HalfCheetah-v5 "1 2 3" peer/bin/python
#   python tools/report.py runs/*__equal_time* --curves benchmarks/raw/equal_time.csv
#   python benchmarks/figures.py equal_time
# The file is that of offline.sh. A seed's runs come one after the other: let nothing beside them change.
set -euo pipefail
env=${1:-HalfCheetah-v5} seeds=${2-"1 2 3"} peer=${3:-} kinds=${4:-"ours mean d3rlpy"}
export OMP_NUM_THREADS=1
file=datasets/${env}_replay_100000.hdf5
run="python cql_continuous.py --env $env --dataset $file --width 256 --batch-size 128 --holdout 0 --bc-steps 0"
run="$run --eval-frequency 2_500 --diagnostics-frequency 500"
for seed in $seeds; do for kind in $kinds; do
  if [ $kind = ours ]; then
    $run --seed $seed --num-updates 25_000 --exp-name equal_time
  elif [ $kind = mean ]; then
    $run --seed $seed --num-updates 10_000 --exp-name equal_time_mean --backup mean
  elif [ "$peer" ]; then
    $peer benchmarks/peers/d3rlpy.py train $file $env --seed $seed --updates 10000 --batch-size 128 \
      --eval-frequency 2500 --out benchmarks/raw/equal_time_peer.csv
  fi
done; done
