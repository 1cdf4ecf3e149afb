#!/usr/bin/env bash
# cql_atari.py's heads with and without the conservative term on one self-collected set, then C51 with DR3 and with
# unit-norm features: returns, rank and dot products.
#   bash benchmarks/runs/atari_heads.sh ALE/SpaceInvaders-v5 "1 2"
#   python tools/report.py runs/ALE_SpaceInvaders-v5__*_alpha* --curves benchmarks/raw/atari_heads.csv
#   python benchmarks/figures.py atari_heads
# All seeds share the data of --collect-steps random rows that seed 1 made, under datasets/.
set -euo pipefail
env=${1:-ALE/SpaceInvaders-v5} seeds=${2-"1 2"} names=${3:-"dqn c51 qr"}
export OMP_NUM_THREADS=1
file=datasets/${env/\//_}_random_40000_0.95_seed1
[ -d "$file" ] || python cql_atari.py --env $env --num-updates 1 --eval-episodes 0 --exp-name make_data
run="python cql_atari.py --env $env --dataset $file --num-updates 6_000 --eval-frequency 1_000 --diagnostics-frequency 500"
for seed in $seeds; do
  for head in $names; do
    $run --seed $seed --head $head --exp-name ${head}_alpha0.1
    $run --seed $seed --head $head --exp-name ${head}_alpha0 --cql-alpha 0
  done
  $run --seed $seed --head c51 --exp-name c51_alpha0.1_dr3 --dr3-coef 0.1
  $run --seed $seed --head c51 --exp-name c51_alpha0.1_unit --unit-norm
done
