#!/usr/bin/env bash
# Two diseases and the flags that their verdicts recommend, on the HalfCheetah-v5 replay of offline.sh (seed 1):
# underfitting (a critic of 4 units on the whole file) and overfitting (3 episodes of it, one of them held out).
set -euo pipefail
export OMP_NUM_THREADS=1
file=${1:-datasets/HalfCheetah-v5_replay_100000.hdf5}
python - "$file" <<'PYTHON'
import sys
import h5py
with h5py.File(sys.argv[1]) as f, h5py.File("datasets/halfcheetah_3_episodes.hdf5", "w") as g:
    for key in f:
        g[key] = f[key][60_000:63_000]
PYTHON
run="python cql_continuous.py --env HalfCheetah-v5 --eval-frequency 2_000 --diagnostics-frequency 250 --bc-steps 0"
run="$run --tau 0.02"
large="$run --dataset $file --num-updates 6_000 --batch-size 128"
small="$run --dataset datasets/halfcheetah_3_episodes.hdf5 --num-updates 10_000 --batch-size 64 --holdout 0.34"
$large --exp-name width4 --critic-width 4 --critic-depth 1
$large --exp-name width256 --critic-width 256 --critic-depth 2
$small --exp-name small_data
$small --exp-name small_data_dropout --dropout 0.1
$small --exp-name small_data_vib --vib-coef 0.01
$small --exp-name small_data_width32 --critic-width 32
