#!/usr/bin/env bash
# Measure one GPU in under nine minutes, without a network: the GPU tests, loading, and training of both published sizes
# (random weights) with each preset, compared with stock transformers. Each item has its own time limit.
#
#     bash scripts/bench_gpu.sh                   OUT=elsewhere bash scripts/bench_gpu.sh
#     ONLY="2b-lora 7b-lora" bash scripts/bench_gpu.sh        only these items (names: see below), with all the time
#     bash scripts/bench_gpu.sh --quick           every item on a tiny model, to check on a CPU that it runs
#
# Writes under OUT (bench-out): summary.md, and for each item a JSON file, a line in bench.md and a log.
# LIMIT_S (530) is the time for everything. The summary lists items for which no time is left; run them with ONLY.
# WORK is the folder in which bases are built, 4.5 GB and 17 GB; by default memory (/dev/shm) if it has enough space,
# else the disk. FLAGS are passed to every `vlft bench train`, e.g. FLAGS="--pack_tokens 16384".
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python
out=${OUT:-bench-out} limit=${LIMIT_S:-530} began=$SECONDS failed=0
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
read -r -a only <<<"${ONLY:-}"
read -r -a flags <<<"${FLAGS:-}"

quick=false
case ${1:-} in
    --quick) quick=true ;;
    "") ;;
    *) printf 'bench_gpu.sh: unknown argument %s; the only one is --quick\n' "$1" >&2 && exit 2 ;;
esac

mkdir -p "$out" || exit 1
if [[ -n ${WORK:-} ]]; then
    work=$WORK && mkdir -p "$work"
else
    room=$(df -k --output=avail /dev/shm 2>/dev/null | tail -1)
    place=$out
    ((${room:-0} < 30 * 1024 * 1024)) || place=/dev/shm
    work=$(mktemp -d "$place/vlft-bench-XXXXXX")
    trap 'rm -rf "$work"' EXIT
fi

summary=$out/summary.md
printf '| item | result | seconds |\n| --- | --- | --- |\n' >"$summary"

item() { # name, seconds it may take, command...
    local name=$1 most=$2 start=$SECONDS status result
    shift 2
    if ((${#only[@]})) && [[ " ${only[*]} " != *" $name "* ]]; then return; fi
    local left=$((limit - SECONDS + began))
    if ((left < most / 2)); then
        printf '| %s | left out: only %s of %s s are left | - |\n' "$name" "$left" "$limit" >>"$summary"
        return
    fi
    ((most <= left)) || most=$left
    printf -- '== %s (at most %s s)\n' "$name" "$most"
    timeout --kill-after=10 "$most" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) result=ok ;;
        124 | 137) result="stopped after $most s" failed=1 ;;
        *) result="failed (exit $status)" failed=1 ;;
    esac
    printf '| %s | %s | %s |\n' "$name" "$result" $((SECONDS - start)) >>"$summary"
}

train() { # name, seconds, more flags...
    local name=$1 most=$2
    shift 2
    item "$name" "$most" "$python" -m vlft bench train --out "$out" --work "$work" --mix story "$@" \
        "${flags[@]+"${flags[@]}"}"
}

data() { # name, seconds, more flags...
    local name=$1 most=$2
    shift 2
    item "$name" "$most" "$python" -m vlft bench data --baseline --out "$out" --work "$work" --shape tiny "$@"
}

if $quick; then
    item tests 300 "$python" -m pytest -m gpu tests/test_gpu.py
    data data-photo 120 --mix photo --rows 6 --rounds 1
    for preset in lora lora_vision full; do
        train "tiny-$preset" 240 --shape tiny --preset "$preset" --steps 3 --skip_steps 1 \
            --baseline --baseline_order grouped
    done
    for base in qwen2.5-vl qwen3-vl qwen3.5 qwen3.5-moe; do
        train "tiny-$base" 120 --shape "tiny-$base" --preset lora --steps 3 --skip_steps 1
    done
else
    # 2b-lora measures both sides of the baseline, the others the faster one: with kernels, rows of similar length. With
    # a 7B there is no time to try gradient checkpointing for it. ONLY and FLAGS measure the rest.
    grouped=(--baseline --baseline_order grouped --baseline_side kernels)
    large=("${grouped[@]}" --baseline_checkpointing false)
    item tests 90 "$python" -m pytest -m gpu tests/test_gpu.py
    data data-photo 45 --mix photo --rows 64 --rounds 3
    # The most important items first.
    train 2b-lora 230 --shape 2b --preset lora --steps 16 --baseline --baseline_order grouped --timeout 90
    train 7b-lora 190 --shape 7b --preset lora --steps 10 --timeout 110 "${large[@]}"
    train 2b-full 130 --shape 2b --preset full --steps 12 --timeout 80 "${grouped[@]}"
    train 2b-lora_vision 130 --shape 2b --preset lora_vision --steps 12 --timeout 80 "${grouped[@]}"
    train 7b-lora_vision 190 --shape 7b --preset lora_vision --steps 10 --timeout 110 "${large[@]}"
    train qwen3-vl-2b-lora 110 --shape qwen3-vl-2b --preset lora --steps 12 --timeout 70
    train qwen3.5-0.8b-lora 110 --shape qwen3.5-0.8b --preset lora --steps 12 --timeout 70
    # float32 masters, gradients and two moments of 8.3 B weights take 133 GB, so the item uses 8-bit moments (83 GB).
    if "$python" -c 'import bitsandbytes' 2>/dev/null; then
        train 7b-full 150 --shape 7b --preset full --steps 8 --optim adamw_8bit --gradient_checkpointing true
    else
        printf '| 7b-full | left out: bitsandbytes is not installed, and no card holds 133 GB of states | - |\n' >>"$summary"
    fi
    data data-story 45 --mix story --rows 48 --rounds 2 --workers 4
fi

printf '\n'
cat "$summary"
[[ ! -f $out/bench.md ]] || { printf '\n' && cat "$out/bench.md"; }
exit "$failed"
