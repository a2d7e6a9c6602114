#!/usr/bin/env bash
# Everything that needs a GPU, unattended, in under ten minutes:
#     benchmarks/gpu.sh [--dry-run] [--cpu] [FOLDER]
# What is installed; the kernels built with nvcc and with NVRTC; the tests marked `gpu`; every op; what a call costs;
# float16 layers against float32; a training step of each family. Result files go to FOLDER, or $OUT, or
# benchmarks/results, and so does all that was printed. A stage has a time limit of its own; what fails or is cut off
# is written down and the rest still runs.
# --dry-run prints the stages and runs none. --cpu runs them on this machine's CPU at sizes that are over soon.
# Uses python3 of the machine, or $PYTHON.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
LIMIT=590 # seconds for everything
python=${PYTHON:-python3}
device=cuda dry=0 patience=1
while [[ ${1:-} == --* ]]; do
    case $1 in
        --dry-run) dry=1 ;;
        --cpu) device=cpu patience=6 ;; # a small machine that does other things, too
        *)
            echo "benchmarks/gpu.sh: unknown option $1; there are --dry-run and --cpu" >&2
            exit 2
            ;;
    esac
    shift
done
out=${1:-${OUT:-benchmarks/results}}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

names=() seconds=() ends=()
if ((dry)); then
    machine=MACHINE
else
    mkdir -p "$out" || exit 1
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    export FINETUNE_CACHE=$scratch/cache
    # The short name of the processor.
    if ! machine=$("$python" benchmarks/measuring.py "$device"); then
        echo "benchmarks/gpu.sh: nothing was run; another Python is chosen with PYTHON=/path/to/python" >&2
        exit 1
    fi
fi
stamp=${machine}_$(date +%Y%m)
log=$out/gpu-log_$stamp.txt
((dry)) || : >"$log" || exit 1

stage() { # stage NAME SECONDS COMMAND…: runs it for so long at most, and adds what it prints to the log
    local name=$1 limit=$(($2 * patience)) left=$((LIMIT * patience - SECONDS)) started=$SECONDS status
    shift 2
    names+=("$name")
    if ((dry)); then
        seconds+=("$limit")
        echo "$name | $limit | $*"
        return
    fi
    if ((left < 5)); then
        seconds+=(0) ends+=("not run: the time for everything is over")
        return
    fi
    ((limit < left)) || limit=$left
    printf '\n== %s (%s s at most): %s\n' "$name" "$limit" "$*" | tee -a "$log"
    timeout -k 5 "$limit" "$@" >"$scratch/said" 2>&1
    status=$?
    cat "$scratch/said" >>"$log"
    tail -n 12 "$scratch/said"
    seconds+=($((SECONDS - started)))
    case $status in
        0) ends+=("ok") ;;
        124 | 137) ends+=("cut off after $limit s; what was written by then stays") ;;
        *) ends+=("failed with exit code $status: $(tail -n 1 "$scratch/said" | cut -c 1-120)") ;;
    esac
}

finetune=("$python" -m finetune)
bench() { # bench NAME SECONDS SCRIPT OPTIONS…: a stage that leaves a result file
    local name=$1 limit=$2 script=$3
    shift 3
    stage "$name" "$limit" "$python" "benchmarks/$script.py" "$@" --out "$out/${name}_$stamp.md"
}

if [[ $device == cuda ]]; then
    ops=(--device cuda --arms ref cuda --repeats 5 --budget 3) tests=(-m gpu --continue-on-collection-errors)
    # Most of the tests' time is the compiling of kernels, one after the other in each process.
    workers=$(($(nproc) / 2))
    ((workers < 8)) || workers=8
    if ((!dry && workers > 1)) && "$python" -c 'import xdist' 2>>"$log"; then tests+=(-n "$workers"); fi
    wide=(--device cuda --cbase 32768 --cmax 512 --repeats 3 --arms ref auto)
    step256=("${wide[@]}" --resolution 256 --batch 16)
    step1024=("${wide[@]}" --resolution 1024 --batch 4 --families stylegan2 stylegan3-t --no-memory)
    build=(--repeats 1 --only-networks) float16=(--device cuda)
else
    ops=(--device cpu --arms ref cpu --repeats 1 --budget 1 --match colors) tests=(-k stylegan2_up)
    step256=(--device cpu --resolution 16 --batch 4 --cbase 64 --cmax 8 --repeats 1 --arms ref auto
        --families stylegan2 --no-memory)
    step1024=("${step256[@]}")
    build=(--repeats 1 --only-networks --resolution 16 --families stylegan3-t) float16=(--device cpu --resolution 16 --cbase 128 --cmax 16)
fi

stage doctor 30 "${finetune[@]}" doctor
stage doctor-build 60 "${finetune[@]}" doctor --build
stage tests 110 "$python" -m pytest -p no:cacheprovider "${tests[@]}" tests/torch_utils/test_cases.py tests
bench ops-float16 60 bench_ops --dtype float16 "${ops[@]}"
bench float16 40 check_float16 "${float16[@]}"
bench step-256 100 bench_step "${step256[@]}"
bench ops-float32 45 bench_ops --dtype float32 "${ops[@]}"
bench step-1024 60 bench_step "${step1024[@]}"
bench overhead 15 bench_overhead --rounds 7 --device "$device"
bench build 65 bench_build "${build[@]}"

if ((dry)); then
    total=0
    for limit in "${seconds[@]}"; do ((total += limit)); done
    echo "total | $total | to $out"
    exit 0
fi
{
    printf '\n== summary, %s s in all, files in %s\n' "$SECONDS" "$out"
    for i in "${!names[@]}"; do printf '%-14s %4s s  %s\n' "${names[i]}" "${seconds[i]}" "${ends[i]}"; done
} | tee -a "$log"
for end in "${ends[@]}"; do [[ $end == ok ]] || exit 1; done
