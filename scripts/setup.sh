#!/usr/bin/env bash
# Install vlft and the versions of scripts/constraints.txt into .venv. Needs bash and Python >= 3.11. Does nothing if
# .venv is up to date. test.sh calls it; call it yourself before finetune*.sh on a new machine:
#
#     bash scripts/setup.sh                              PYTHON=/opt/python3.12/bin/python3 bash scripts/setup.sh
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

need_gb=7 # of .venv alone; uv's cache shares its files if both are on one disk
pins=scripts/constraints.txt
stamp=.venv/vlft-setup.stamp
unfinished=.venv/vlft-setup.unfinished
log=.venv/vlft-setup.log
offline='dns error|name resolution|failed to resolve|error sending request|failed to connect|network is unreachable'
offline+='|connection (refused|reset|timed out)|connecttimeout|newconnectionerror|max retries'

say() { printf 'set-up: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 1
}

# Finds the first Python on PATH that is new enough and can make environments. A pyenv shim may exist but not run.
find_python() {
    local candidate version old="" bare="" candidates=(python3.13 python3.12 python3.11 python3)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON") # the user's choice is never replaced silently
    for candidate in "${candidates[@]}"; do
        version=$("$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            old="$candidate is $version"
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            bare="$candidate $version"
        else
            python=$candidate
            return
        fi
    done
    if [[ -n $bare ]]; then
        fail "$bare has no venv module. Debian, Ubuntu: apt install python3-venv; or PYTHON=/path/to/another bash $0"
    fi
    fail "Python 3.11 or newer is needed; ${old:-none was found as ${PYTHON:-python3.13, 3.12, 3.11 or python3}}." \
        "Install one, or set PYTHON: PYTHON=/path/to/python3.12 bash $0"
}

log_says() { grep -qiE "$1" "$log"; }

# Prints one line on what to do, from the log of the command that failed.
explain() {
    if log_says 'no space left|disk quota|os error 28'; then
        fail "the disk is full ($PWD, TMPDIR or ~/.cache). Free about $need_gb GB and run the same command again."
    elif log_says "$offline"; then
        fail "the package index cannot be reached. Check the network (HTTPS_PROXY?) and run the same command again."
    fi
    tail -n 15 "$log" >&2
    fail "$1 failed, see above; the whole log is $PWD/$log. Fix it, then run the same command again."
}

# Two set-ups at the same time would damage each other's files. The lock ends with the process, also if it is killed.
if command -v flock >/dev/null; then
    exec 9<.
    flock -n 9 || { say "another set-up is running here; waiting for it"; flock 9; }
fi

# The state includes the folder: scripts inside an environment contain its path, and the install is editable.
state=$(cat pyproject.toml "$pins" scripts/setup.sh <(pwd) | cksum)
if [[ -f $stamp && $(<"$stamp") == "$state" ]] && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

if [[ -e $unfinished ]] || { [[ -e .venv ]] && ! .venv/bin/python -c '' 2>/dev/null; }; then
    say "the last set-up did not finish; starting over"
    rm -rf .venv || fail "cannot remove $PWD/.venv"
fi
if [[ ! -e .venv ]]; then
    find_python
    free_gb=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [[ ${free_gb:-99} -ge $need_gb ]] ||
        fail "$PWD has $free_gb GB free and $need_gb GB are needed. Free some space and run the same command again."
    { mkdir .venv && : >"$unfinished"; } 2>/dev/null || fail "cannot write in $PWD"
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv >"$log" 2>&1 || explain "python -m venv"
fi
.venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$PWD/.venv holds $(.venv/bin/python --version) and 3.11 or newer is needed. Remove it and run again."
{ rm -f "$stamp" && : >"$unfinished"; } 2>/dev/null || fail "cannot write in $PWD/.venv"

began=$SECONDS
say "installing the pinned packages (the first time about 3 GB to download); progress: tail -f $PWD/$log"
.venv/bin/python -m pip --version >"$log" 2>&1 || .venv/bin/python -m ensurepip >>"$log" 2>&1 || explain ensurepip

# deepspeed is installed from source. With DS_BUILD_OPS=0 its CUDA kernels are built by the first run that needs one, so
# that the installation needs neither torch nor a compiler. The pins also hold for build requirements (-b).
export DS_BUILD_OPS=0 UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180} PIP_DISABLE_PIP_VERSION_CHECK=1
if .venv/bin/python -m pip install -c "$pins" uv >>"$log" 2>&1; then
    .venv/bin/python -m uv pip install --python .venv/bin/python -c "$pins" -b "$pins" -e '.[dev]' >>"$log" 2>&1 ||
        explain "uv pip install"
elif log_says "$offline"; then
    explain "pip install"
else
    say "uv cannot be installed here; using pip, which is slower"
    PIP_CONSTRAINT=$pins .venv/bin/python -m pip install -e '.[dev]' >>"$log" 2>&1 || explain "pip install"
fi
# Some images forbid Python to store bytecode, which makes every start take tens of seconds. Then it is stored here.
if [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]]; then
    .venv/bin/python -m compileall -q -j 0 .venv/lib vlft >>"$log" 2>&1 || true # some packages contain templates
fi
printf '%s\n' "$state" >"$stamp" && rm -f "$unfinished"
say "ready after $((SECONDS - began)) s"
