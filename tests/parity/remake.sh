#!/usr/bin/env bash
# Make the numbers of the peer package again, compare them with the frozen ones, then run the parity tests.
#
#   PARITY_PYTHON     interpreter that has mace-torch already; without it .venv-parity is made (mace-torch is installed
#                     there and nowhere else)
#   PARITY_TORCH      requirement for the torch of that environment, default torch>=2.8,<2.14
#   STERADIAN_PYTHON  interpreter that has steradian, default .venv/bin/python (made by make test), else python3
#   PYTHON            interpreter that makes .venv-parity, default python3
set -euo pipefail
cd "$(dirname "$0")/../.."

peer="${PARITY_PYTHON:-}"
if [[ -z "$peer" ]]; then
    venv=.venv-parity
    peer="$venv/bin/python"
    if [[ ! -e "$venv/.installed" ]]; then
        "${PYTHON:-python3}" -m venv "$venv"
        echo "${PARITY_TORCH:-torch>=2.8,<2.14}" >"$venv/constraints.txt"
        "$peer" -m pip install --quiet --upgrade pip
        "$peer" -m pip install --quiet --constraint "$venv/constraints.txt" mace-torch==0.3.16
        touch "$venv/.installed"
    fi
fi

ours="${STERADIAN_PYTHON:-}"
if [[ -z "$ours" ]]; then
    ours=python3
    [[ -x .venv/bin/python ]] && ours=.venv/bin/python
fi
"$ours" -c 'import steradian, pytest' 2>/dev/null ||
    { echo "$ours has no steradian or no pytest: run 'make test' once, or set STERADIAN_PYTHON" >&2; exit 1; }

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$peer" tests/parity/make_mace_torch.py tests/parity/data --check
"$ours" -m pytest tests/parity
