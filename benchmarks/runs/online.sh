#!/usr/bin/env bash
# sac.py and td3.py beside Stable-Baselines3's (peers/sb3.py), the same networks, batches, rates and random first steps.
#   bash benchmarks/runs/online.sh HalfCheetah-v5 "1 2 3" sb3/bin/python 100_000 "sac td3"
#   python tools/report.py runs/HalfCheetah-v5__*_online__* --curves benchmarks/raw/online_HalfCheetah-v5.csv
#   python benchmarks/figures.py online   # draws raw/online*.csv and raw/sb3.csv
# Each run takes one thread: start seeds side by side (a call a seed), or on a cluster one array task a seed:
#   sbatch --array=1-3 --wrap 'bash benchmarks/runs/online.sh Hopper-v5 $SLURM_ARRAY_TASK_ID sb3/bin/python'
set -euo pipefail
env=${1:-HalfCheetah-v5} seeds=${2-"1 2 3"} peer=${3:-} steps=${4:-100_000} algos=${5:-"sac td3"}
export OMP_NUM_THREADS=1
for seed in $seeds; do
  for algo in $algos; do
    python $algo.py --env $env --seed $seed --total-timesteps $steps --learning-starts 5_000 --eval-frequency 5_000 \
      --exp-name ${algo}_online
    [ -z "$peer" ] || $peer benchmarks/peers/sb3.py $algo train --env $env --seed $seed --steps ${steps//_/}
  done
done
