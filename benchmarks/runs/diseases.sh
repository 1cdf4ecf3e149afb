#!/usr/bin/env bash
# Diseases and the flags that their verdicts recommend. On the collector's replay of Hopper-v5: underfitting (a critic of
# 4 units on the whole file) and overfitting (800 transitions, 19 short episodes of it). On three episodes of the
# HalfCheetah-v5 replay of offline.sh: too little data again, and a smaller alpha.
#   bash benchmarks/runs/diseases.sh "1 2"
set -euo pipefail
export OMP_NUM_THREADS=1
hopper=datasets/Hopper-v5_sac-replay_100000_seed1_v4.hdf5 cheetah=datasets/HalfCheetah-v5_replay_100000.hdf5
[ -f "$hopper" ] || python cql_continuous.py --env Hopper-v5 --collect-steps 100_000 --num-updates 1
[ -f "$cheetah" ] || bash benchmarks/runs/offline.sh HalfCheetah-v5 ""
python - "$hopper" 28000 28800 datasets/hopper_800.hdf5 "$cheetah" 60000 63000 datasets/halfcheetah_3.hdf5 <<'PYTHON'
import sys
import h5py
for i in (1, 5):
    source, begin, end, target = sys.argv[i : i + 4]
    with h5py.File(source) as f, h5py.File(target, "w") as g:
        for key in f:
            g[key] = f[key][int(begin) : int(end)]
PYTHON
run="python cql_continuous.py --width 256 --diagnostics-frequency 250 --bc-steps 0 --tau 0.02"
for seed in ${1:-1}; do
  large="$run --env Hopper-v5 --seed $seed --cql-samples 2 --dataset $hopper --num-updates 5_000 --batch-size 128"
  $large --eval-frequency 2_500 --exp-name width4 --width 4 --depth 1
  $large --eval-frequency 2_500 --exp-name width256
  small="$run --env Hopper-v5 --seed $seed --cql-samples 2 --dataset datasets/hopper_800.hdf5 --num-updates 8_000"
  small="$small --batch-size 64 --holdout 0.3 --eval-frequency 2_500"
  $small --exp-name small_data
  $small --exp-name small_data_dropout --dropout 0.1
  $small --exp-name small_data_vib --vib-coef 0.01
  $small --exp-name small_data_width32 --width 32
  three="$run --env HalfCheetah-v5 --seed $seed --dataset datasets/halfcheetah_3.hdf5 --num-updates 10_000"
  three="$three --batch-size 64 --holdout 0.34 --eval-frequency 2_000"
  $three --exp-name three_episodes
  $three --exp-name three_episodes_alpha2.5 --cql-alpha 2.5
  $three --exp-name three_episodes_alpha1 --cql-alpha 1
  $three --exp-name three_episodes_dropout --dropout 0.1
done
