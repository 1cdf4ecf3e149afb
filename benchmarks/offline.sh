#!/usr/bin/env bash
# One self-made replay of 100,000 steps, and on it CQL(H), behaviour cloning, SARSA and naive offline SAC; Eq. 1
# and naive ensembles of 4 and 10; d3rlpy's CQL on the same file at the same sizes (peer_d3rlpy.py).
#   bash benchmarks/offline.sh HalfCheetah-v5 "1 2 3" peer/bin/python
# Each run takes one thread: start several seeds side by side, e.g. one call with "1" and one with "2"; or on a
# cluster, one array task a seed: sbatch --array=1-3 --wrap 'bash benchmarks/offline.sh HalfCheetah-v5 $SLURM_ARRAY_TASK_ID'
set -euo pipefail
env=${1:-HalfCheetah-v5} seeds=${2:-"1 2 3"} peer=${3:-} updates=${4:-25000}
export OMP_NUM_THREADS=1
file=datasets/${env}_sac-replay_100000_seed1_v1.hdf5
[ -f "$file" ] || python cql_continuous.py --env "$env" --collect-steps 100_000 --num-updates 1
run="python cql_continuous.py --env $env --dataset $file --num-updates $updates --batch-size 128 --holdout 0"
run="$run --eval-frequency 5_000 --diagnostics-frequency 500"
for seed in $seeds; do
  $run --seed $seed --exp-name cql_h --bc-steps 0
  $run --seed $seed --exp-name bc --bc-steps $updates --cql-alpha 0
  $run --seed $seed --exp-name naive2 --bc-steps 0 --cql-alpha 0
  $run --seed $seed --exp-name sarsa --bc-steps 0 --cql-alpha 0 --backup sarsa
  [ -z "$peer" ] || $peer benchmarks/peer_d3rlpy.py train "$file" "$env" --seed $seed --updates $updates --batch-size 128
done
for seed in $seeds; do
  $run --seed $seed --exp-name eq1 --bc-steps 0 --cql-variant eq1
  $run --seed $seed --exp-name naive4 --bc-steps 0 --cql-alpha 0 --num-critics 4
  $run --seed $seed --exp-name naive10 --bc-steps 0 --cql-alpha 0 --num-critics 10
done
