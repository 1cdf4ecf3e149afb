#!/usr/bin/env bash
# Evidence on Hopper-v5: CQL(H), Eq. 1, naive offline SAC with 2, 4 and 10 critics, SARSA and behaviour cloning on
# one self-made replay of 100,000 steps; d3rlpy's CQL on the same file at the same sizes (peer_d3rlpy.py).
#   bash benchmarks/offline_hopper.sh "1 2 3" peer/bin/python
# Each run takes one thread: start several seeds side by side, e.g. one call with "1" and one with "2".
set -euo pipefail
seeds=${1:-"1 2 3"} peer=${2:-}
export OMP_NUM_THREADS=1
file=datasets/Hopper-v5_sac-replay_100000_seed1_v1.hdf5
[ -f "$file" ] || python cql_continuous.py --env Hopper-v5 --collect-steps 100_000 --num-updates 1
run="python cql_continuous.py --env Hopper-v5 --dataset $file --num-updates 15_000 --batch-size 128 --holdout 0"
run="$run --eval-frequency 2_500 --diagnostics-frequency 500"
for seed in $seeds; do
  $run --seed $seed --exp-name cql_h --bc-steps 0
  $run --seed $seed --exp-name naive2 --bc-steps 0 --cql-alpha 0
  $run --seed $seed --exp-name sarsa --bc-steps 0 --cql-alpha 0 --backup sarsa
  $run --seed $seed --exp-name bc --bc-steps 15_000 --cql-alpha 0
  [ -z "$peer" ] || $peer benchmarks/peer_d3rlpy.py train $file Hopper-v5 --seed $seed --updates 15000 --batch-size 128
done
for seed in $seeds; do
  $run --seed $seed --exp-name eq1 --bc-steps 0 --cql-variant eq1
  $run --seed $seed --exp-name naive4 --bc-steps 0 --cql-alpha 0 --num-critics 4
  $run --seed $seed --exp-name naive10 --bc-steps 0 --cql-alpha 0 --num-critics 10
done
