#!/usr/bin/env bash
# Make the numbers of the peer packages again, compare them with the frozen ones, then run the parity tests, and those of
# operators attached to the peers' own models.
#
#   PARITY_MACE, PARITY_NEQUIP, PARITY_PYG
#                     interpreters that have mace-torch, nequip and torch_geometric already; without one an environment
#                     .venv-parity-NAME is made (no two of these packages share one, and none is installed beside ours)
#   PARITY_TORCH      requirement for the torch of those environments, default torch>=2.8,<2.14
#   STERADIAN_PYTHON  interpreter that has steradian, default .venv/bin/python (made by make test), else python3
#   PYTHON            interpreter that makes the environments, default python3
set -euo pipefail
cd "$(dirname "$0")/../.."

# peer NAME REQUIREMENT [INTERPRETER]: print the interpreter that has the package
peer() {
    local venv=".venv-parity-$1"
    if [[ -n "${3:-}" ]]; then
        echo "$3"
        return
    fi
    if [[ ! -e "$venv/.installed" ]]; then
        "${PYTHON:-python3}" -m venv "$venv"
        echo "${PARITY_TORCH:-torch>=2.8,<2.14}" >"$venv/constraints.txt"
        "$venv/bin/python" -m pip install --quiet --upgrade pip
        "$venv/bin/python" -m pip install --quiet --constraint "$venv/constraints.txt" torch "$2" \
            ase cuequivariance llvmlite pydantic pytest pyyaml safetensors scipy vesin
        touch "$venv/.installed"
    fi
    echo "$venv/bin/python"
}

ours="${STERADIAN_PYTHON:-}"
if [[ -z "$ours" ]]; then
    ours=python3
    [[ -x .venv/bin/python ]] && ours=.venv/bin/python
fi
"$ours" -c 'import steradian, pytest' 2>/dev/null ||
    { echo "$ours has no steradian or no pytest: run 'make test' once, or set STERADIAN_PYTHON" >&2; exit 1; }

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mace=$(peer mace mace-torch==0.3.16 "${PARITY_MACE:-}")
nequip=$(peer nequip nequip==0.19.1 "${PARITY_NEQUIP:-}")
pyg=$(peer pyg torch_geometric==2.8.1 "${PARITY_PYG:-}")
"$mace" tests/parity/make_mace_torch.py tests/parity/data --check
"$nequip" tests/parity/make_nequip.py tests/parity/data --check
"$pyg" tests/parity/make_pyg_visnet.py tests/parity/data --check
"$ours" -m pytest tests/parity
# operators in live models of the peers; steradian runs from the sources there
for python in "$mace" "$nequip" "$pyg"; do
    PYTHONPATH=src "$python" -m pytest tests/parity/check_attach.py
done
