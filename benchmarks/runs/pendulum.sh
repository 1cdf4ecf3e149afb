#!/usr/bin/env bash
# sac.py and td3.py on Pendulum-v1: 20,000 steps, 100 evaluation episodes.
#   bash benchmarks/runs/pendulum.sh "1 2 3"
#   python tools/report.py runs/Pendulum-v1__{sac,td3}_pendulum__* --csv benchmarks/raw/pendulum.csv
set -euo pipefail
export OMP_NUM_THREADS=1
for seed in ${1-1 2 3}; do
  python sac.py --seed $seed --eval-episodes 100 --eval-frequency 5_000 --exp-name sac_pendulum
  python td3.py --seed $seed --eval-episodes 100 --eval-frequency 5_000 --exp-name td3_pendulum
done
