"""Foreign models become steradian's: from a file of arrays, or from a pickled module that the user trusts."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steradian.build import build_potential
from steradian.execution.self_test import SelfTest
from steradian.interfaces.foreign import ForeignModelError
from steradian.interfaces.mace_torch import config_and_weights_from_mace_torch
from steradian.interfaces.nequip import config_and_weights_from_nequip
from steradian.interfaces.pyg_visnet import config_and_weights_from_pyg_visnet
from steradian.potential import Potential

__all__ = ["convert_arrays", "convert_file", "exporter_source"]

NEEDED = {"mace": "mace-torch", "nequip": "nequip", "torch_geometric": "torch_geometric"}

ROUNDED_CONSTANTS = 5e-6
"""Bound for models of float32 that were tested in double precision: their packages keep rounded constants."""


def exporter_source() -> str:
    """The script that writes a file of arrays in the environment of the foreign package."""
    return Path(__file__).with_name("foreign_export.py").read_text(encoding="utf-8")


def convert_file(
    path: Path | str, *, trust: bool = False, head: str | None = None, elements: Sequence[int] | None = None
) -> Potential:
    """A potential from a foreign model, its self-test passed.

    Args:
        path: ``.npz`` of the exporter (data only), or a pickled module (``.model``, ``.pt``, ``.ckpt``, ...), whose
            package must be installed here.
        trust: allow a pickled file. Reading one runs code that stands in it.
        head: which of several heads of a mace-torch model.
        elements: atomic numbers to keep of a ViSNet's embedding.

    Raises:
        ForeignModelError: not readable, not trusted, without counterpart here; the message says what to do.
        SelfTestError: the converted model does not give the foreign one's numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise ForeignModelError(f"{path}: no such file")
    if path.suffix == ".npz":
        return _from_npz(path, head, elements)
    if path.suffix == ".safetensors":
        raise ForeignModelError(f"{path}: give a foreign model; files of steradian end in .safetensors already")
    if not trust:
        raise ForeignModelError(
            f"{path}: a pickled model; reading it runs code that stands in the file, with your rights. If you trust "
            "where it comes from, say --trust; or export it to arrays in its own environment (--exporter)"
        )
    from steradian.interfaces import foreign_export

    try:
        model = foreign_export.load(str(path))
    except ModuleNotFoundError as error:
        package = NEEDED.get((error.name or "").split(".")[0], error.name)
        raise ForeignModelError(
            f"{path}: reading it needs {package}, which is not installed here; export it to arrays in an environment "
            "that has it (steradian convert --exporter writes the script)"
        ) from None
    except Exception as error:
        raise ForeignModelError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "model.npz"
        try:
            foreign_export.export(model, str(arrays))
        except ValueError as error:
            raise ForeignModelError(f"{path}: {error}") from None
        return _from_npz(arrays, head, elements)


def _from_npz(path: Path, head: str | None, elements: Sequence[int] | None) -> Potential:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        package, hyper = about["package"], about["hyperparameters"]
    except (OSError, ValueError, KeyError) as error:
        raise ForeignModelError(f"{path}: not a file of foreign_export.py ({error})") from None
    return convert_arrays(package, hyper, arrays, head=head, elements=elements)


def convert_arrays(
    package: str,
    hyper: dict[str, Any],
    arrays: dict[str, np.ndarray],
    *,
    head: str | None = None,
    elements: Sequence[int] | None = None,
) -> Potential:
    """A potential from arrays named as :mod:`steradian.interfaces.foreign_export` names them; see :func:`convert_file`.

    Args:
        package: ``mace-torch``, ``nequip`` or ``torch_geometric``.
        hyper: hyper-parameters.
        arrays: ``weights/NAME`` and ``test/INDEX/NAME``.
        head, elements: see :func:`convert_file`.
    """
    state = {name.removeprefix("weights/"): value for name, value in arrays.items() if name.startswith("weights/")}
    if head is not None and package != "mace-torch":
        raise ForeignModelError(f"a model of {package} has no heads; leave --head out")
    if elements is not None and package != "torch_geometric":
        raise ForeignModelError(f"a model of {package} says which elements it has; leave --elements out")
    if package == "mace-torch":
        config, statistics, weights = config_and_weights_from_mace_torch(state, hyper, head)
    elif package == "nequip":
        config, statistics, weights = config_and_weights_from_nequip(state, hyper)
    elif package == "torch_geometric":
        config, statistics, weights = config_and_weights_from_pyg_visnet(state, hyper, elements)
    else:
        raise ForeignModelError(
            f"models of '{package}' cannot be converted; known: mace-torch, nequip, torch_geometric"
        )
    potential = build_potential(config, statistics, seed=0)
    potential.host.load_state_dict(weights)
    potential.eval()
    test = _self_test(package, arrays, _head_index(hyper, head), set(potential.elements))
    # in double precision first: a float32 model has too few digits to tell a small mistake from rounding
    exact = potential.dtype == torch.float64
    test.check(potential if exact else copy.deepcopy(potential).double(), bound=None if exact else ROUNDED_CONSTANTS)
    potential.self_test = test
    return potential


def _head_index(hyper: dict[str, Any], head: str | None) -> int:
    heads = hyper.get("heads") or []
    return heads.index(head) if head in heads else 0


def _self_test(package: str, arrays: dict[str, np.ndarray], head: int, elements: set[int]) -> SelfTest:
    structures = []
    for index in sorted({int(name.split("/")[1]) for name in arrays if name.startswith("test/")}):
        entry = {name: arrays[f"test/{index}/{name}"] for name in ("numbers", "positions", "energy", "forces")}
        if set(entry["numbers"].tolist()) <= elements:
            entry["energy"], entry["forces"] = entry["energy"][head], entry["forces"][head]
            structures.append(entry)
    if not structures:
        raise ForeignModelError("the file has no structures to test the converted model with; export it again")
    return SelfTest(package, tuple(structures))
