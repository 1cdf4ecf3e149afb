#!/usr/bin/env bash
# Two diseases and the flags that their verdicts recommend, on the Hopper-v5 replay of offline_hopper.sh (seed 1):
# underfitting (a critic of 4 units on the whole file) and overfitting (800 transitions, 3 episodes of it).
set -euo pipefail
export OMP_NUM_THREADS=1
file=datasets/Hopper-v5_sac-replay_100000_seed1_v1.hdf5
[ -f "$file" ] || python cql_continuous.py --env Hopper-v5 --collect-steps 100_000 --num-updates 1
python - "$file" <<'PYTHON'
import sys
import h5py
with h5py.File(sys.argv[1]) as f, h5py.File("datasets/hopper_800.hdf5", "w") as g:
    for key in f:
        g[key] = f[key][28000:28800]
PYTHON
run="python cql_continuous.py --env Hopper-v5 --eval-frequency 2_500 --diagnostics-frequency 250 --bc-steps 0"
run="$run --cql-samples 2 --tau 0.02"
large="$run --dataset $file --num-updates 5_000 --batch-size 128"
small="$run --dataset datasets/hopper_800.hdf5 --num-updates 8_000 --batch-size 64 --holdout 0.3"
$large --exp-name width4 --critic-width 4 --critic-depth 1
$large --exp-name width256 --critic-width 256 --critic-depth 2
$small --exp-name small_data
$small --exp-name small_data_dropout --dropout 0.1
