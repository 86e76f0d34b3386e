"""From configuration to objects: the one place where hosts and operators meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steradian.checkpoint import ModelFileError, one_line, read_model_file, write_model_file
from steradian.config import (
    EFAConfig,
    MACEConfig,
    MARAConfig,
    ModelConfig,
    NequIPConfig,
    NoGate,
    NoMixer,
    O3MPNNConfig,
    PrecisionConfig,
    ViSNetConfig,
)
from steradian.config.earlier import FIRST_COMPLETE_FORMAT, complete_model
from steradian.data.statistics import DatasetStatistics
from steradian.execution.self_test import SelfTest, SelfTestError
from steradian.hosts.base import Host, TrainingFacts
from steradian.hosts.mace import MACE, compress_element_tables
from steradian.hosts.nequip import NequIP
from steradian.hosts.o3mpnn import O3MPNN
from steradian.hosts.visnet import ViSNet
from steradian.operators.base import GateFactory, MixerFactory, SlotSpec, no_operator
from steradian.operators.efa.operator import efa_factory
from steradian.operators.mara import mara_factory
from steradian.potential import PLAIN, Potential

HOSTS: dict[type, Callable[..., Host]] = {
    MACEConfig: MACE,
    NequIPConfig: NequIP,
    O3MPNNConfig: O3MPNN,
    ViSNetConfig: ViSNet,
}
GATES: dict[type, Callable[..., GateFactory]] = {NoGate: no_operator, MARAConfig: mara_factory}
MIXERS: dict[type, Callable[..., MixerFactory]] = {NoMixer: no_operator, EFAConfig: efa_factory}

__all__ = ["build_potential", "gate_factory", "load_potential", "mixer_factory", "save_potential"]


def gate_factory(config: ModelConfig) -> GateFactory:
    """The factory that fills the edge gates as the configuration says."""
    return GATES[type(config.edge_gate)](config.edge_gate)


def mixer_factory(config: ModelConfig) -> MixerFactory:
    """The factory that fills the slots of global mixers as the configuration says."""
    return MIXERS[type(config.global_mixer)](config.global_mixer)


def build_potential(
    config: ModelConfig,
    statistics: DatasetStatistics,
    *,
    make_gate: GateFactory | None = None,
    make_mixer: MixerFactory | None = None,
    seed: int | None = None,
) -> Potential:
    """A potential from its configuration and the statistics of its training set.

    Args:
        config: model section.
        statistics: elements, reference energies, average number of neighbours and scales.
        make_gate, make_mixer: factories in place of the configured operators, to try one of your own.
        seed: of the initial weights; null leaves PyTorch's generator as it is. The generator's state is restored. The
            host's weights do not depend on which operators fill its slots.

    Raises:
        ValueError: a combination that cannot be built; the message names the setting to change.
    """
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_potential(config, statistics, make_gate=make_gate, make_mixer=make_mixer)
    facts = TrainingFacts(
        elements=tuple(sorted(statistics.elements)),
        avg_num_neighbors=statistics.avg_num_neighbors,
        scale=statistics.force_rms or 1.0,
        shift=statistics.energy_shift,
    )
    host = HOSTS[type(config.host)](
        config.host,
        facts,
        make_gate=_isolated(make_gate or gate_factory(config)),
        make_mixer=_isolated(make_mixer or mixer_factory(config)),
    )
    compress_element_tables(host, config.element_tables, len(statistics.elements))
    return Potential(host, config, statistics)


def _isolated(make: Any) -> Any:
    """A factory with random numbers of its own, so that filling a slot does not change the host's initial weights."""

    def make_isolated(spec: SlotSpec) -> Any:
        seed = torch.initial_seed() + 7919 * (spec.layer + 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            return make(spec)

    return make_isolated


def save_potential(path: Path | str, potential: Potential, extra: dict[str, Any] | None = None) -> None:
    """Write a model file (see :mod:`steradian.checkpoint`); whole or not at all."""
    # The file says how each average was obtained, so that it can be rebuilt without the training set.
    statistics = potential.statistics.to_dict()
    extra = dict(extra or {})
    if potential.self_test is not None:
        extra["self_test"] = potential.self_test.to_dict()
    write_model_file(path, potential.state_dict(), potential.config.model_dump(mode="json"), statistics, extra)


def load_potential(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    precision: str | PrecisionConfig | None = None,
) -> Potential:
    """Rebuild a potential from a model file or the folder of a training run, ready for evaluation.

    Args:
        path: ``.safetensors`` file, or a folder with ``model.safetensors``.
        device: where to put it.
        dtype: float32 or float64 for all roles; overrides the precision it was trained in.
        precision: preset (see :mod:`steradian.precision`) or section of the configuration; overrides the same.

    Raises:
        ModelFileError: missing, damaged, not a steradian model, or a converted one that fails its self-test.
        ValueError: both ``dtype`` and ``precision``, or one that is not known.
    """
    if dtype is not None:
        if precision is not None:
            raise ValueError("give dtype or precision, not both")
        precision = PLAIN.get(dtype)
        if precision is None:
            raise ValueError(f"dtype must be torch.float32 or torch.float64, not {dtype}")
    weights, header = read_model_file(path)
    potential, config = _rebuilt(path, weights, header)
    potential = potential.to(device).eval()
    wanted = config.precision if precision is None else precision
    if "self_test" in header["extra"]:
        try:
            potential.self_test = SelfTest.from_dict(header["extra"]["self_test"], potential.dtype == torch.float32)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(f"{path}: its self-test cannot be read ({one_line(error)})") from None
        # its bounds are those of rounding in one format; weights do not change by going to another policy and back
        plain = wanted if wanted in PLAIN.values() else PLAIN[potential.dtype]
        try:
            potential.self_test.check(potential.set_precision(plain))
        except SelfTestError as error:
            raise ModelFileError(f"{path}: {error}") from None
    return potential.set_precision(wanted)


def _rebuilt(
    path: Path | str, weights: Mapping[str, Tensor], header: Mapping[str, Any]
) -> tuple[Potential, ModelConfig]:
    """The potential of a model file, and its configuration.

    Raises:
        ModelFileError: configuration, statistics or weights that cannot be, or do not fit each other.
    """
    try:
        is_earlier = int(header["format_version"]) < FIRST_COMPLETE_FORMAT
        config = ModelConfig.model_validate(complete_model(header["model"]) if is_earlier else header["model"])
        statistics = DatasetStatistics.from_dict(header["statistics"])
        _check_statistics(statistics)
        potential = build_potential(config, statistics, seed=0)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise ModelFileError(f"{path}: its configuration cannot be read ({one_line(error)})") from None
    try:
        potential.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ModelFileError(
            f"{path}: weights do not fit the configuration ({str(error).splitlines()[-1].strip()})"
        ) from None
    for name, own in potential.state_dict().items():
        if weights[name].is_floating_point() != own.is_floating_point():
            raise ModelFileError(f"{path}: '{name}' holds {weights[name].dtype}, the model computes in {own.dtype}")
        if not bool(torch.isfinite(own).all()):
            raise ModelFileError(f"{path}: '{name}' holds NaN or infinity")
    return potential, config


def _check_statistics(statistics: DatasetStatistics) -> None:
    """Refuse averages that no training set has.

    Raises:
        ValueError: names the first.
    """
    if not statistics.elements or not all(0 < number <= 118 for number in statistics.elements):
        raise ValueError(f"elements are {list(statistics.elements)}")
    missing = [number for number in statistics.elements if number not in statistics.atom_references]
    if missing:
        raise ValueError(f"there is no reference energy of atomic number {missing[0]}")
    numbers = {f"the reference energy of {number}": value for number, value in statistics.atom_references.items()}
    numbers |= {name: getattr(statistics, name) for name in ("energy_shift", "force_rms", "energy_std")}
    numbers["avg_num_neighbors"] = statistics.avg_num_neighbors
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    if statistics.avg_num_neighbors <= 0:
        raise ValueError(f"avg_num_neighbors is {statistics.avg_num_neighbors}")
