#!/usr/bin/env bash
# The lecture's table on data that anyone can make: cloning, of all and of the best tenth, a naive actor-critic, BEAR, BRAC-p, BRAC-v, AWAC, CRR and
# CQL(H) on one set, with the same networks, updates and acting by the mean; d3rlpy's AWAC and CRR beside them.
#   bash benchmarks/runs/constraints.sh HalfCheetah-v5 datasets/HalfCheetah-v5_replay_100000.hdf5 "1 2 3" 20_000
#   bash benchmarks/runs/constraints.sh Hopper-v5 datasets/Hopper-v5_medium.hdf5 "1 2 3" 20_000 peer/bin/python
#   python tools/report.py runs/HalfCheetah-v5__pc_* --csv benchmarks/raw/constraints.csv
# The files are those of offline.sh and datasets.sh. Each run takes one thread: start seeds side by side.
set -euo pipefail
env=${1:-HalfCheetah-v5} file=${2:-datasets/${1:-HalfCheetah-v5}_replay_100000.hdf5} seeds=${3-"1 2 3"}
updates=${4:-20_000} peer=${5:-}
export OMP_NUM_THREADS=1
best=${file%.hdf5}_best_tenth.hdf5
[ -f "$best" ] || python benchmarks/runs/best_tenth.py "$file" "$best"
common="--env $env --dataset $file --holdout 0 --num-updates $updates --eval-frequency 5_000 --diagnostics-frequency 500"
for seed in $seeds; do
  run="python policy_constraints.py $common --behaviour-steps 5_000 --seed $seed"
  python policy_constraints.py $common --seed $seed --behaviour-steps $updates --exp-name pc_bc
  python policy_constraints.py ${common/$file/$best} --seed $seed --behaviour-steps $updates --exp-name pc_bc_best
  $run --exp-name pc_naive --weight 0
  bear="--constraint mmd --backup-samples 10 --min-share 0.75"
  $run --exp-name pc_bear $bear --threshold 0.05
  $run --exp-name pc_bear_half $bear --threshold 0.5  # the threshold that the first one's verdict advises
  $run --exp-name pc_brac_p
  $run --exp-name pc_brac_v --where value
  $run --exp-name pc_awac --extract exp --normalise-weights --advantage-samples 1
  $run --exp-name pc_crr --extract binary
  python cql_continuous.py $common --seed $seed --bc-steps 0 --width 256 --exp-name pc_cql_h
  for algo in awac crr; do
    [ -z "$peer" ] || $peer benchmarks/peers/d3rlpy.py train "$file" "$env" --algo $algo --seed $seed --updates ${updates//_/}
  done
done
