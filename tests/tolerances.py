"""One absolute tolerance per dtype and quantity, each with its reason."""

import torch

# Rounding of sums over some hundred terms of order one; the models below give energies of order 1 eV.
ENERGY = {torch.float64: 1e-10, torch.float32: 2e-5}  # [eV]
FORCES = {torch.float64: 1e-10, torch.float32: 1e-4}  # [eV/Å]
# Energies over a volume of some 70 Å^3.
STRESS = 1e-11  # [eV/Å^3], float64
# Central differences with a step of 1e-4 Å: the step's own error, third derivative times 1e-8 / 6.
FINITE_DIFFERENCE = 1e-6  # [eV/Å]
SIGNAL = 100  # a symmetry test first asserts that what it compares is this many times larger than its tolerance
