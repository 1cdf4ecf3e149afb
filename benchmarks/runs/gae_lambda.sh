#!/usr/bin/env bash
# lambda of generalised advantage estimation: 0 trusts the critic after a step (bias), 1 the sampled return (variance).
#   bash benchmarks/runs/gae_lambda.sh "1 2 3" && python benchmarks/figures.py gae_lambda
set -euo pipefail
export OMP_NUM_THREADS=1
for seed in ${1-1 2 3}; do
  for lambda in 0 0.5 0.9 0.95 1; do
    python ppo.py --seed $seed --gae-lambda $lambda --exp-name lambda_$lambda --total-timesteps 100_000 \
      --eval-frequency 10_000
    python ppo.py --env Hopper-v5 --seed $seed --gae-lambda $lambda --exp-name lambda_$lambda --total-timesteps 100_000 \
      --num-envs 8 --num-steps 256 --num-minibatches 32 --update-epochs 10 --learning-rate 3e-4 --ent-coef 0 \
      --no-clip-vloss --no-norm-adv --recompute-advantages --log-std-init -0.5 --normalize-obs --normalize-reward \
      --eval-frequency 10_000
  done
done
