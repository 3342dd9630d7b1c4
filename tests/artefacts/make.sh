#!/usr/bin/env bash
# Made the files beside it, by commit 385b785: `PYTHON=.venv/bin/python bash make.sh` in an empty folder with the inputs.
set -euo pipefail
python=${PYTHON:-python}
tools=${TOOLS:?the tools/ folder of that checkout}
export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
$python pairs.py
$python -m pal_ds prepare --config recipe.yaml
# Stopped on two ranks before the end, so that there is something to resume.
$python -m torch.distributed.run --standalone --nproc_per_node 2 -m pal_ds train --config recipe.yaml \
  --config pal_a.yaml --run_dir runs/pal_a --train.stop_after 9
for name in pal_b bradley_terry; do
  $python -m pal_ds train --config recipe.yaml --config $name.yaml --run_dir runs/$name
done
for name in pal_a pal_b; do
  $python -m pal_ds adapt --run_dir runs/$name --pairs new_users.jsonl --out users/$name
  $python -m pal_ds evaluate --run_dir runs/$name --data new_users.jsonl --users users/$name --name new_users
done
for name in pal_a pal_b bradley_terry; do
  $python -m pal_ds evaluate --run_dir runs/$name --split test
  $python "$tools/consolidate.py" runs/$name exported/$name
  $python -m pal_ds score --model exported/$name --input texts.jsonl --output exported/$name.jsonl
done
$python -m pal_ds score --run_dir runs/pal_b --user u1 --input texts.jsonl --output exported/pal_b_u1.jsonl
