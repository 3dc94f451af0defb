#!/usr/bin/env bash
# Everything that one GPU can tell, on a bare machine without a network: bench/card.sh OUT [WHEELS]
#
# OUT     folder of the results: gpu.json, trace.json, a log per step, steps.tsv (step, status, seconds).
# WHEELS  folder of wheels that the machine's Python lacks (pydantic, say; mergekit for the comparison).
#
# It needs Python with torch, triton, numpy, safetensors, transformers, pybind11, setuptools, click, PyYAML and tqdm,
# and a C++20 compiler. LIMIT: seconds for all of it. With TRITON_INTERPRET=1 it runs without a GPU, at a tiny size.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?bench/card.sh OUT [WHEELS]}")
wheels=${2:-}
python=${PYTHON:-python3}
limit=${LIMIT:-540}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
: >"$out/steps.tsv"
failed=0

left() { echo $((limit - SECONDS)); }

# step NAME COMMAND…: its output goes to NAME.log and here; a failure is kept, and what follows still runs.
step() {
    local name=$1 begin=$SECONDS status=0
    shift
    echo "== $name, $(left) s left"
    timeout --kill-after=10 "$(($(left) > 1 ? $(left) : 1))" "$@" 2>&1 | tee "$out/$name.log" || status=$?
    printf '%s\t%d\t%d\n' "$name" "$status" $((SECONDS - begin)) >>"$out/steps.tsv"
    ((status == 0)) || failed=1
    return $status
}

export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [[ -n $wheels ]]; then
    step wheels "$python" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" "$wheels"/*.whl
    PYTHONPATH=$PYTHONPATH:$scratch/site
fi
step build "$python" setup.py -q build_ext --inplace || exit 1
# Before any figure; `bench gpu` begins with a shorter one of its own, and shows nothing where it is red.
step selftest "$python" -m safepatch_core selftest --backend triton --seconds "${SELFTEST_SECONDS:-20}"
step bench "$python" -m safepatch_core bench gpu --seconds "$(($(left) - 20))" --workdir "$scratch/work" -o "$out/gpu.json"
exit $failed
