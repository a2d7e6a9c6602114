#!/usr/bin/env bash
# Everything that needs a GPU, unattended: the tests marked `gpu`, then a training step of each family in the precision
# of the checkpoints (float16 layers). Results go to the folder named as first argument, or $OUT, or gpu-out.
# Uses python3 of the machine, or $PYTHON; what fails is written down and the rest still runs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-${OUT:-gpu-out}}
mkdir -p "$out"
export PYTHONPATH=$PWD
failed=0

step() { # step NAME COMMAND…: runs it, keeps what it printed
    local name=$1
    shift
    echo "== $name: $*"
    if ! "$@" >"$out/$name.txt" 2>&1; then
        echo "failed: $name (see $out/$name.txt)"
        failed=1
    fi
    tail -n 15 "$out/$name.txt"
}

step machine "$python" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())'
step tests "$python" -m pytest -m gpu -p no:cacheprovider
for resolution in 256 1024; do
    batch=$((resolution == 256 ? 16 : 4))
    step "step-$resolution" "$python" benchmarks/bench_step.py --device cuda --resolution "$resolution" --batch "$batch" \
        --cbase 32768 --cmax 512 --repeats 10 --out "$out/step_${resolution}.md"
done
exit "$failed"
