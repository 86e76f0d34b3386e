"""The sides of ``gpu_mace.py``: mace-torch, mace-torch with cuEquivariance, and steradian in its ways of running."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from sides import SIDES, MaceTorch, Steradian, read_atoms, serve


class OnDevice:
    """Waits for the device before a time is taken, and says how much memory was used."""

    device = "cpu"

    def finish(self) -> None:
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()

    def peak(self, _: Any = None) -> float:
        import torch

        return round(torch.cuda.max_memory_allocated() / 2**20, 1) if self.device != "cpu" else 0.0


class MaceOnDevice(OnDevice, MaceTorch):
    """mace-torch as it comes."""

    cueq = False

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self.device = case["device"]
        about = super().prepare(case)
        if self.cueq:
            from mace.cli.convert_e3nn_cueq import run

            self.model = run(self.model, device=self.device, return_model=True)
        self.model = self.model.to(self.device)
        self.batch = {
            key: value.to(self.device) if hasattr(value, "to") else value for key, value in self.batch.items()
        }
        return about

    def run(self, task: str) -> None:
        super().run(task)
        self.finish()


class MaceWithCuEquivariance(MaceOnDevice):
    """``enable_cueq``: the model converted to cuEquivariance's kernels."""

    cueq = True


class SteradianOnDevice(OnDevice, Steradian):
    """steradian; ``case`` names the backend of polynomials and how steps are run, ``BACKEND/MODE``."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        from steradian.polynomials import set_backend

        self.device = case["device"]
        backend, self.mode = case["way"].split("/")
        if self.device != "cpu" or backend != "auto":
            set_backend(backend)
        about = super().prepare(case)
        self.model = self.model.to(self.device)
        self.graph = self.graph.to(self.device)
        return about

    def select(self, task: str) -> None:
        from gpu_settings import training_steps

        from steradian.execution.backend_benchmark import prepare_backend
        from steradian.execution.steps import Runner
        from steradian.graph.neighbors import make_graph
        from steradian.interfaces.ase import _structure

        super().select(task)
        training = task == "training step"
        prepare_backend(self.model, self.graph, training)
        self.step = None
        if training:
            frames = [make_graph(_structure(atoms), self.model.cutoff) for atoms in read_atoms(self.folder)]
            self.step, steps = training_steps(self.model, frames, self.mode)
            self.reason = lambda: steps.reason
        elif self.mode != "eager":
            runner = Runner(self.model, self.mode)
            self.step = runner.static(self.graph)
            self.reason = lambda: runner.reason

    def run(self, task: str) -> None:
        if self.step is not None:
            self.step()
        else:
            self.call(training=False)
        self.finish()

    def fell_back(self, _: Any = None) -> str | None:
        """Why steps are called although they were to be recorded."""
        reason: str | None = self.reason() if self.step is not None else None
        return reason

    def results(self) -> list[Any]:
        """What a step gives, in its own way of running."""
        if self.step is None:
            return super().results()
        prediction = self.step()
        count = self.graph.num_systems
        energy, forces = prediction.interaction_energy[:count], prediction.forces[: self.graph.num_atoms]
        return [energy.detach().double().tolist(), forces.detach().double().tolist()]


SIDES |= {"mace-torch": MaceOnDevice, "mace-torch + cuEquivariance": MaceWithCuEquivariance}
WAYS = [f"{backend}/{mode}" for backend in ("reference", "triton", "cuequivariance", "auto")
        for mode in ("eager", "cuda_graph")]  # fmt: skip
SIDES |= {f"steradian {way}": SteradianOnDevice for way in WAYS}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", choices=SIDES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 loads its constants with torch.load
    serve(arguments.serve, arguments.folder)
