#!/usr/bin/env bash
# Fine-tuning on Pendulum-v1: 2,000 offline updates of CQL on the bare run's data, then 3,000 online steps with half
# of each minibatch offline; beside it 5,000 online steps from scratch (SAC in the same script: no offline data).
#   bash benchmarks/runs/finetune_pendulum.sh "1 2 3"
set -euo pipefail
export OMP_NUM_THREADS=1
file=datasets/Pendulum-v1_sac-replay_8000_seed1_v4.hdf5
[ -f "$file" ] || python cql_continuous.py --num-updates 1
run="python cql_continuous.py --dataset $file --eval-frequency 500 --diagnostics-frequency 500 --bc-steps 0"
run="$run --width 128 --batch-size 128 --policy-lr 3e-4 --tau 0.01"
for seed in ${1:-1 2 3}; do
  $run --seed $seed --exp-name offline_then_online --num-updates 2_000 --online-steps 3_000 --cql-samples 2
  $run --seed $seed --exp-name online_only --num-updates 1 --online-steps 5_000 --offline-share 0 --cql-alpha 0 \
    --backup-entropy
done
