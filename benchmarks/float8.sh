#!/usr/bin/env bash
# All that [float8] claims, on one GPU: kernels right and near the floor of memory, where products pay, whole steps.
#
#     bash benchmarks/float8.sh CORPUS.jsonl [RESULTS_FOLDER]
set -uo pipefail
corpus=$1
results=${2:-float8-results}
mkdir -p "$results"
export PYTHONUNBUFFERED=1

python -m pytest -q -m gpu tests/kernels/test_float8_casts.py tests/kernels/test_float8_gpu.py 2>&1 | tee "$results/tests.log"
python benchmarks/float8_casts.py --tiles 32 64 128 2>&1 | tee "$results/casts.log"
python benchmarks/train_step.py --corpus "$corpus" --profile --top 40 --out "$results/steps.json" --runs \
    base:16 base:16,float8.recipe=native base:16,float8.recipe=tensorwise base:16,float8.recipe=native,float8.fast_accumulation=true \
    large:8 large:8,float8.recipe=native large:8,float8.recipe=tensorwise large:8,float8.recipe=rowwise \
    base:16,float8.recipe=rowwise medium:32 medium:32,float8.recipe=native 2>&1 | tee "$results/steps.log"
python benchmarks/float8_products.py 2>&1 | tee "$results/products.log"
