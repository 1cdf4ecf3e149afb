#!/usr/bin/env bash
# AWAC and CRR beside d3rlpy's on one file: the same networks, rates, minibatches and updates, no cloning first. The
# peer's AWAC as it is and, as awac-hard, without the entropy in its target.
#   bash benchmarks/runs/weighted.sh HalfCheetah-v5 datasets/HalfCheetah-v5_replay_100000.hdf5 "1 2 3" 20_000 peer/bin/python
#   python tools/report.py runs/*__weighted_* --curves benchmarks/raw/weighted.csv
#   python benchmarks/figures.py weighted
# The file is that of offline.sh. Each run takes one thread: start seeds side by side.
set -euo pipefail
env=${1:-HalfCheetah-v5} file=${2:-datasets/${1:-HalfCheetah-v5}_replay_100000.hdf5} seeds=${3-"1 2 3"}
updates=${4:-20_000} peer=${5:-} kinds=${6:-"ours awac crr awac-hard"}
export OMP_NUM_THREADS=1
run="python policy_constraints.py --env $env --dataset $file --holdout 0 --behaviour-steps 0 --num-updates $updates"
run="$run --eval-frequency 5_000 --diagnostics-frequency 500"
for seed in $seeds; do for kind in $kinds; do
  if [ $kind = ours ]; then
    awac="--extract exp --normalise-weights --advantage-samples 1"
    $run --seed $seed --exp-name weighted_awac $awac
    $run --seed $seed --exp-name weighted_crr --extract binary
  elif [ "$peer" ]; then
    $peer benchmarks/peers/d3rlpy.py train $file $env --algo $kind --seed $seed --updates ${updates//_/} \
      --eval-frequency 5000 --out benchmarks/raw/weighted_peer.csv
  fi
done; done
