#!/usr/bin/env bash
# A replay of 100,000 steps of sac.py, and on it CQL(H), behaviour cloning, SARSA and naive offline SAC; d3rlpy's
# CQL on the same file at the same sizes (peers/d3rlpy.py); then Eq. 1 and naive ensembles of 4 and 10.
#   bash benchmarks/runs/offline.sh HalfCheetah-v5 "1 2 3" peer/bin/python
#   bash benchmarks/runs/offline.sh HalfCheetah-v5 "1 2 3" "" 40000   # or, bitwise the same: --resume THAT_RUN --num-updates 40_000
#   python tools/report.py runs/HalfCheetah-v5__* --csv benchmarks/raw/offline_halfcheetah.csv
# Each run takes one thread: start several seeds side by side, e.g. one call with "1" and one with "2"; or on a
# cluster, one array task a seed, once the replay is there:
#   sbatch --array=1-3 --wrap 'bash benchmarks/runs/offline.sh HalfCheetah-v5 $SLURM_ARRAY_TASK_ID'
set -euo pipefail
env=${1:-HalfCheetah-v5} seeds=${2-"1 2 3"} peer=${3:-} updates=${4:-25000}
export OMP_NUM_THREADS=1
file=datasets/${env}_replay_100000.hdf5
[ -f "$file" ] || python sac.py --env "$env" --total-timesteps 100_000 --learning-starts 5_000 --save-dataset "$file"
run="python cql_continuous.py --env $env --dataset $file --width 256 --batch-size 128 --holdout 0"
run="$run --eval-frequency 5_000 --diagnostics-frequency 500"
rl="$run --bc-steps 0"
for seed in $seeds; do
  $rl --seed $seed --num-updates $updates --exp-name cql_h
  $rl --seed $seed --num-updates $updates --exp-name cql_h_bf16 --precision bf16
  $rl --seed $seed --num-updates $updates --exp-name cql_meanbackup --backup mean
  $run --seed $seed --num-updates $updates --exp-name bc --bc-steps $updates --cql-alpha 0
  $rl --seed $seed --num-updates $updates --exp-name naive2 --cql-alpha 0
  $rl --seed $seed --num-updates $updates --exp-name sarsa --cql-alpha 0 --backup sarsa
  [ -z "$peer" ] || $peer benchmarks/peers/d3rlpy.py train "$file" "$env" --seed $seed --updates $updates --batch-size 128
done
for seed in $seeds; do  # learned minus achieved value, compared at 10,000 updates (report.py --at 10000)
  $rl --seed $seed --num-updates 10_000 --exp-name eq1 --cql-variant eq1
  $rl --seed $seed --num-updates 10_000 --exp-name naive4 --cql-alpha 0 --num-critics 4
  $rl --seed $seed --num-updates 10_000 --exp-name naive10 --cql-alpha 0 --num-critics 10
done
