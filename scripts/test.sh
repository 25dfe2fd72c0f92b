#!/usr/bin/env bash
# Run all checks that a change must pass, from a bare clone: set-up, ruff, mypy, pytest. Arguments are passed to pytest:
#
#     bash scripts/test.sh                        bash scripts/test.sh tests/test_cli.py -x
#
# The whole suite runs in three workers, because tests also wait for processes they start (WORKERS=4 for more, WORKERS=0
# for none); chosen tests run in one process.
# A failed stage does not stop the next ones, except set-up; the exit status is 1 if any stage failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# The test models are so small that a second thread makes them slower, and several tests start two processes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# Tests start several hundred processes. Without stored bytecode each of them would compile all that it imports, 20 s.
unset PYTHONDONTWRITEBYTECODE
# Tests download nothing. A test that tries must fail at once instead of waiting.
export HF_HUB_OFFLINE=1

failed=()
stage() { # name, command...
    local name=$1 began=$SECONDS status=ok
    shift
    "$@" || { status="FAILED (exit $?)" && failed+=("$name"); }
    printf -- '-- %s: %s, %d s\n' "$name" "$status" $((SECONDS - began)) >&2
}

stage set-up bash scripts/setup.sh
[[ ${#failed[@]} -eq 0 ]] || exit 1
stage "ruff check" .venv/bin/python -m ruff check .
stage "ruff format" .venv/bin/python -m ruff format --check .
# mypy takes most of a minute of one core.
types=$(mktemp)
.venv/bin/python -m mypy >"$types" 2>&1 &
checker=$!
checked() {
    local status=0
    wait "$checker" || status=$?
    cat "$types"
    rm -f "$types"
    return "$status"
}
# A worker that runs out of tests takes over some of another's remaining tests, so all end together.
[[ $# -gt 0 ]] || set -- -n "${WORKERS:-3}" --dist worksteal
stage pytest .venv/bin/python -m pytest "$@"
stage "mypy (beside pytest)" checked
[[ -n $(command -v chromium chromium-browser google-chrome) ]] ||
    printf -- '-- vlft ui was not tested in a browser, as no Chromium is here: apt-get install -y chromium\n' >&2

[[ ${#failed[@]} -eq 0 ]] || {
    (IFS=, && printf -- '-- not clean: %s\n' "${failed[*]}" >&2)
    exit 1
}
