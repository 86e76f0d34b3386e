"""What a model tied to the laboratory axes means for a user who moves atoms with it; said once per process."""

from __future__ import annotations

from steradian.execution.recording import say
from steradian.potential import Potential

__all__ = ["LAB_FRAME_NOTICE", "tell_of_frame"]

LAB_FRAME_NOTICE = (
    "the attention of this model is tied to the laboratory axes (frame: lab), so its energy turns with the molecule: "
    "torque does not vanish, optimisations stall near 1e-3 eV/Å, angular momentum drifts; rotation_average=12 "
    "(--rotation-average 12; also 24, 60) averages over rotations at so many times the cost, frame: intrinsic or "
    "form: channel in training avoids it"
)

_told: set[str] = set()


def tell_of_frame(potential: object) -> None:
    """Say :data:`LAB_FRAME_NOTICE` before atoms are moved with such a model, unless that was said or rotations are
    averaged over."""
    if _told or not isinstance(potential, Potential) or potential.rotation_average is not None:
        return
    if potential.rotation == "lab_frame":
        _told.add(LAB_FRAME_NOTICE)
        say(LAB_FRAME_NOTICE)
