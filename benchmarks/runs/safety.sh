#!/usr/bin/env bash
# Accidents while learning: safety_critics.py with all of it, with nothing (TRPO), with the multiplier alone and alpha 0,
# with the shield alone, with Eq. 1, with alpha 0; on Navigation also gamma_C 0.99 and the paper's threshold.
#   bash benchmarks/runs/safety.sh "Navigation-v0 InvertedPendulum-v5 Hopper-v5" "1 2 3"
#   python benchmarks/runs/safety_table.py runs/*__safety_*
#   python benchmarks/figures.py safety
# Each run takes one thread: start seeds side by side. The last argument cuts every run's steps.
set -euo pipefail
envs=${1:-"Navigation-v0 InvertedPendulum-v5 Hopper-v5"} seeds=${2-"1 2 3"} most=${3:-300_000}
export OMP_NUM_THREADS=1
for env in $envs; do
  case $env in
    Navigation-v0) steps=40_000 more="" ;;
    InvertedPendulum-v5) steps=40_000 more="--normalize-obs" ;;
    *) steps=300_000 more="--normalize-obs --normalize-reward" ;;
  esac
  steps=$((${steps//_/} < ${most//_/} ? ${steps//_/} : ${most//_/}))
  for seed in $seeds; do
    run="python safety_critics.py --env $env --seed $seed --total-timesteps $steps --log-frequency 1 $more"
    $run --exp-name safety_csc
    $run --exp-name safety_trpo --shield off --no-lagrange
    $run --exp-name safety_lagrange --shield off --conservative off
    $run --exp-name safety_shield --no-lagrange
    $run --exp-name safety_eq1 --conservative eq1
    $run --exp-name safety_alpha0 --conservative off
    [ $env = Hopper-v5 ] || $run --exp-name safety_alpha0.02 --safety-alpha 0.02
    [ $env = Hopper-v5 ] || $run --exp-name safety_alpha0.1 --safety-alpha 0.1
    [ $env != Navigation-v0 ] || $run --exp-name safety_gamma99 --safety-gamma 0.99
    [ $env != Navigation-v0 ] || $run --exp-name safety_paper --threshold paper
  done
done
