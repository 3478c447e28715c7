#!/usr/bin/env bash
# usage: install.sh VENV [EXTRA,...]
# A virtual environment with the whole stack for a machine without a GPU, and this project in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=$1
extras=cpu${2:+,$2}
stamp="$venv/.openrlhf-gopo-$extras"
if [[ -f "$stamp" && "$stamp" -nt setup.cfg ]]; then exit 0; fi
[[ -x "$venv/bin/python" ]] || "${PYTHON:-python3}" -m venv "$venv"
# torch first: a CPU build that is at hand stays, and nothing later replaces it.
"$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$venv/bin/pip" install --quiet --disable-pip-version-check -e ".[$extras]"
# OpenRLHF requires flash-attn, which builds only with CUDA; its other requirements are in the [cpu] extra.
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps openrlhf==0.11.2
touch "$stamp"
