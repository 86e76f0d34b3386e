"""Foreign models become steradian's: from a file of arrays, or from a pickled module that the user trusts."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steradian.build import build_potential
from steradian.checkpoint import one_line, read_arrays
from steradian.config import ModelConfig
from steradian.data.statistics import DatasetStatistics
from steradian.execution.self_test import SelfTest, SelfTestError
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.interfaces import foreign_export
from steradian.interfaces.foreign import ForeignModelError
from steradian.interfaces.mace_torch import config_and_weights_from_mace_torch
from steradian.interfaces.nequip import config_and_weights_from_nequip
from steradian.interfaces.pyg_visnet import config_and_weights_from_pyg_visnet
from steradian.potential import Potential

__all__ = ["convert_arrays", "convert_file", "exporter_source"]

NEEDED = {"mace": "mace-torch", "nequip": "nequip", "torch_geometric": "torch_geometric"}


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
    try:
        model = foreign_export.load(str(path))
    except ModuleNotFoundError as error:
        package = NEEDED.get((error.name or "").split(".")[0], error.name)
        raise ForeignModelError(
            f"{path}: reading it needs {package}, which is not installed here; export it to arrays in an environment "
            "that has it (steradian convert --exporter writes the script)"
        ) from None
    except Exception as error:
        raise ForeignModelError(f"{path}: cannot be read ({type(error).__name__}: {one_line(error)})") from None
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "model.npz"
        try:
            foreign_export.export(model, str(arrays))
        except ValueError as error:
            raise ForeignModelError(f"{path}: {error}") from None
        return _from_npz(arrays, head, elements)


def _from_npz(path: Path, head: str | None, elements: Sequence[int] | None) -> Potential:
    try:
        arrays = read_arrays(path)
        about = json.loads(str(arrays.pop("about")))
        package, hyper = about["package"], dict(about["hyperparameters"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ForeignModelError(f"{path}: not a file of foreign_export.py ({one_line(error)})") from None
    try:
        return convert_arrays(package, hyper, arrays, head=head, elements=elements)
    except (ForeignModelError, SelfTestError):
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise ForeignModelError(f"{path}: damaged, or changed after the export ({one_line(error)})") from None


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
    test = _self_test(package, hyper, arrays, head)
    if package == "mace-torch":
        parts = config_and_weights_from_mace_torch(state, hyper, head)
    elif package == "nequip":
        parts = config_and_weights_from_nequip(state, hyper)
    elif package == "torch_geometric":
        tested = {int(number) for entry in test.structures for number in entry["numbers"]}
        parts = config_and_weights_from_pyg_visnet(state, hyper, elements and sorted({*elements, *tested}))
    else:
        raise ForeignModelError(
            f"models of '{package}' cannot be converted; known: mace-torch, nequip, torch_geometric"
        )
    potential = _tested(parts, test)
    if elements is not None and set(elements) != set(potential.elements):
        # the package's own numbers need elements that are not kept: from here the whole model says what is right
        test = _as_whole(potential, test, sorted(elements))
        return _tested(config_and_weights_from_pyg_visnet(state, hyper, elements), test)
    return potential


def _tested(parts: tuple[ModelConfig, DatasetStatistics, dict[str, torch.Tensor]], test: SelfTest) -> Potential:
    """The potential, its self-test passed.

    Raises:
        ForeignModelError: no structure to test it with.
        SelfTestError: it gives other numbers.
    """
    config, statistics, weights = parts
    potential = build_potential(config, statistics, seed=0)
    potential.host.load_state_dict(weights)
    potential.eval()
    known = [entry for entry in test.structures if set(entry["numbers"].tolist()) <= set(potential.elements)]
    if not known:
        raise ForeignModelError("the file has no structures to test the converted model with; export it again")
    test = SelfTest(test.source, tuple(known), single=potential.dtype == torch.float32)
    # in double precision first: a float32 model has too few digits to tell a small mistake from rounding
    test.check(copy.deepcopy(potential).double() if test.single else potential)
    potential.self_test = test
    return potential


def _as_whole(potential: Potential, test: SelfTest, elements: list[int]) -> SelfTest:
    """What a model that has passed its test says, in double precision, of the same structures in other elements."""
    exact = copy.deepcopy(potential).double()
    entries = []
    for entry in test.structures:
        numbers = np.array([elements[index % len(elements)] for index in range(len(entry["numbers"]))])
        found = exact(make_graph(Structure(numbers, entry["positions"]), exact.cutoff))
        assert found.forces is not None
        forces = found.forces.numpy()
        entries.append(
            {"numbers": numbers, "positions": entry["positions"], "energy": found.energy[0].numpy(), "forces": forces}
        )
    return SelfTest(test.source, tuple(entries))


def _head_index(hyper: dict[str, Any], head: str | None) -> int:
    heads = hyper.get("heads") or []
    return heads.index(head) if head in heads else 0


def _self_test(package: str, hyper: dict[str, Any], arrays: dict[str, np.ndarray], head: str | None) -> SelfTest:
    """The package's own energies and forces of the exported structures."""
    index, structures = _head_index(hyper, head), []
    wrong_forces = package == "mace-torch" and hyper.get("radial_type") == "chebyshev"
    if wrong_forces:
        print(
            "steradian: mace-torch takes Chebyshev polynomials for constants, so the forces that it gives for this "
            "model are not those of its energy; energies are compared, forces are right here",
            file=sys.stderr,
        )
    for number in sorted({int(name.split("/")[1]) for name in arrays if name.startswith("test/")}):
        entry = {name: arrays[f"test/{number}/{name}"] for name in ("numbers", "positions", "energy", "forces")}
        entry["energy"], entry["forces"] = entry["energy"][index], entry["forces"][index]
        if wrong_forces:
            del entry["forces"]
        structures.append(entry)
    return SelfTest(package, tuple(structures))
