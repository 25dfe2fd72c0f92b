#!/usr/bin/env bash
# See a vision-language model learn, on a laptop without a GPU: set up, then run `vlft demo` with the arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m vlft demo "$@"
