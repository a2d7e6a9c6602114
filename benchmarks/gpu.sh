#!/usr/bin/env bash
# Everything that needs a GPU, unattended, in under ten minutes: the kernels built with nvcc and with NVRTC, the tests
# marked `gpu`, every op, and a training step of each family in the precision of the checkpoints (float16 layers).
# Results go to the folder named as first argument, or $OUT, or gpu-out.
# Uses python3 of the machine, or $PYTHON; what fails is written down and the rest still runs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-${OUT:-gpu-out}}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 FINETUNE_CACHE=${FINETUNE_CACHE:-$(mktemp -d)}
failed=0

step() { # step NAME SECONDS COMMAND…: runs it for so long at most, keeps what it printed
    local name=$1 seconds=$2
    shift 2
    echo "== $name: $*"
    if ! timeout "$seconds" "$@" >"$out/$name.txt" 2>&1; then
        echo "failed: $name (see $out/$name.txt)"
        failed=1
    fi
    tail -n 15 "$out/$name.txt"
}

finetune=("$python" -m finetune)
step machine 60 "$python" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())'
step doctor-build 120 "${finetune[@]}" doctor --build
step doctor-clean 60 "${finetune[@]}" doctor --clean
step tests 150 "$python" -m pytest -m gpu -p no:cacheprovider tests/torch_utils tests/models
step ops-float16 60 "$python" benchmarks/bench_ops.py --device cuda --dtype float16 --arms ref cuda --repeats 5 \
    --budget 4 --out "$out/ops_float16.md"
step ops-float32 60 "$python" benchmarks/bench_ops.py --device cuda --dtype float32 --arms ref cuda --repeats 5 \
    --budget 4 --out "$out/ops_float32.md"
for resolution in 256 1024; do
    batch=$((resolution == 256 ? 16 : 4))
    step "step-$resolution" 100 "$python" benchmarks/bench_step.py --device cuda --resolution "$resolution" --batch "$batch" \
        --cbase 32768 --cmax 512 --repeats 3 --arms ref auto --no-memory --out "$out/step_${resolution}.md"
done
step tests-all 120 "$python" -m pytest -m gpu -p no:cacheprovider
exit "$failed"
