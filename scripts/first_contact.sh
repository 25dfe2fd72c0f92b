#!/usr/bin/env bash
# Check a new GPU machine in nine minutes, without a network: what the machine can do beside what forecasts assume, the
# GPU tests, every preset on a tiny model, the demo, a profiled step beside its forecast, and first comparisons. The most
# important steps come first. Later steps depend on earlier ones.
#
#     bash scripts/first_contact.sh               OUT=elsewhere bash scripts/first_contact.sh
#     bash scripts/first_contact.sh --quick       every step on a tiny model, to check on a CPU that it runs
#
# Writes results under OUT (contact-out) after each step: summary.md, and a log of each step. LIMIT_S (540) is the time
# for everything. Each step has its own limit, and the summary lists steps for which no time is left. WORK is the folder
# in which bases are built (4.5 GB, and 17 GB for the 7B); by default memory (/dev/shm) if it has enough space, else the
# disk. Optional packages (PyAV, liger-kernel, qwen-vl-utils) may be missing: the first step says what is left out then.
# For the whole benchmark: scripts/bench_gpu.sh.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python
out=${OUT:-contact-out} limit=${LIMIT_S:-540} began=$SECONDS failed=0
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

quick=false
case ${1:-} in
    --quick) quick=true ;;
    "") ;;
    *) printf 'first_contact.sh: unknown argument %s; the only one is --quick\n' "$1" >&2 && exit 2 ;;
esac

mkdir -p "$out" || exit 1
if [[ -n ${WORK:-} ]]; then
    work=$WORK && mkdir -p "$work"
else
    room=$(df -k --output=avail /dev/shm 2>/dev/null | tail -1)
    place=$out
    ((${room:-0} < 30 * 1024 * 1024)) || place=/dev/shm
    work=$(mktemp -d "$place/vlft-contact-XXXXXX")
    trap 'rm -rf "$work"' EXIT
fi

summary=$out/summary.md rows=""
rm -f "$out/machine.md" "$out/bench.md" "$out"/*/forecast.md

# The steps so far, and the tables that they wrote.
summarise() {
    local table
    {
        printf '| step | result | seconds |\n| --- | --- | --- |\n%s' "$rows"
        for table in "$out/machine.md" "$out"/*/forecast.md "$out/bench.md"; do
            [[ ! -f $table ]] || { printf '\n%s\n\n' "${table#"$out"/}" && cat "$table"; }
        done
    } >"$summary"
}

step() { # name, seconds it may take, command...
    local name=$1 most=$2 start=$SECONDS status result
    shift 2
    local left=$((limit - SECONDS + began))
    if ((left < most / 3)); then
        rows+="| $name | left out: only $left of $limit s are left | - |"$'\n'
        summarise
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
    rows+="| $name | $result | $((SECONDS - start)) |"$'\n'
    summarise
}

bench() { # name, seconds, more flags...
    local name=$1 most=$2
    shift 2
    step "$name" "$most" "$python" -m vlft bench train --out "$out" --work "$work" --mix story "$@"
}

# Profiles the run that `vlft bench train` has just measured, in the work folder.
profiled() { # name, seconds
    step "$1" "$2" "$python" -m vlft.bench.profiled "$work/runs/ours-0/flags.yaml" "$out/$1"
}

if $quick; then
    step machine 150 "$python" -m vlft.bench.probe --quick --out "$out/machine.md"
    step tests 120 "$python" -m pytest -m gpu tests/test_gpu.py
    step presets 200 "$python" -m vlft.bench.presets "$work/presets"
    step demo 200 "$python" -m vlft demo --quick --out "$work/demo"
    bench tiny-lora 240 --shape tiny --preset lora --steps 9 --skip_steps 1
    profiled profile-tiny-lora 240
    bench tiny-lora-baseline 240 --shape tiny --preset lora --steps 4 --skip_steps 1 \
        --baseline --baseline_order grouped
    bench tiny-full 240 --shape tiny --preset full --steps 4 --skip_steps 1
else
    # One order and no gradient checkpointing, to save the time of trying both. bench_gpu.sh tries them.
    baseline=(--baseline --baseline_order grouped --baseline_checkpointing false)
    step machine 50 "$python" -m vlft.bench.probe --out "$out/machine.md"
    step tests 80 "$python" -m pytest -rs -m gpu tests/test_gpu.py
    step presets 50 "$python" -m vlft.bench.presets "$work/presets"
    step demo 50 "$python" -m vlft demo --quick --out "$work/demo"
    bench 2b-lora 120 --shape 2b --preset lora --steps 12 --skip_steps 4 --timeout 80
    profiled profile-2b-lora 80
    bench 2b-lora-baseline 170 --shape 2b --preset lora --steps 6 --skip_steps 2 --timeout 70 "${baseline[@]}"
    bench 2b-full 80 --shape 2b --preset full --steps 9 --skip_steps 2 --timeout 70
    bench 7b-lora 150 --shape 7b --preset lora --steps 8 --skip_steps 3 --timeout 90
fi

printf '\n'
cat "$summary"
exit "$failed"
