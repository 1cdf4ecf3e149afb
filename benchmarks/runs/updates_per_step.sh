#!/usr/bin/env bash
# More updates for each environment step, and what keeps them in check: sac.py with 1, 4 and 16, DroQ and REDQ with 16.
# Those two step the policy once in 16 updates, as in their papers; sac_utd16_rare is SAC with that alone.
#   bash benchmarks/runs/updates_per_step.sh Hopper-v5 "1 2 3"
#   python tools/report.py runs/Hopper-v5__{sac,droq,redq}_utd* --curves benchmarks/raw/updates_per_step.csv
#   python benchmarks/figures.py updates_per_step
set -euo pipefail
env=${1:-Hopper-v5} seeds=${2-"1 2 3"} names=${3:-"sac_utd1 sac_utd4 sac_utd16 sac_utd16_rare droq_utd16 redq_utd16"}
export OMP_NUM_THREADS=1
run="python sac.py --env $env --total-timesteps 5_000 --learning-starts 1_000 --batch-size 128 --target-entropy -1"
run="$run --eval-frequency 500 --checkpoint-frequency 0"
declare -A flags=(
  [sac_utd1]="--utd 1" [sac_utd4]="--utd 4" [sac_utd16]="--utd 16"
  [sac_utd16_rare]="--utd 16 --policy-frequency 16"
  [droq_utd16]="--utd 16 --policy-frequency 16 --actor-q mean --layer-norm --dropout 0.01"
  [redq_utd16]="--utd 16 --policy-frequency 16 --actor-q mean --num-critics 10 --target-subset 2"
)
for seed in $seeds; do
  for name in $names; do
    $run --seed $seed --exp-name $name ${flags[$name]}
  done
done
