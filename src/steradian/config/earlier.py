"""What settings mean in files of earlier versions, which do not name them: what was published.

Model files up to format 2, the configurations of runs, and files of attached operators named every setting that there
was. One that came later had no choice yet then, so its default today may be another. This is the one place that knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["FIRST_COMPLETE_FORMAT", "complete_gate", "complete_model", "complete_run"]

#: The first format of model files (:data:`steradian.checkpoint.FORMAT_VERSION`) that names what is filled in here.
FIRST_COMPLETE_FORMAT = 3

SCALES: dict[str, str | float] = {"mace": "mean", "nequip": "root", "o3mpnn": 1.0, "visnet": 1.0}
GATE = {"form": "published", "frame": "lab", "grid": {"kind": "equiangular", "num_lat": 4, "num_lon": 8}}


def complete_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """The ``model`` section of an earlier version with what it does not name; what it names stays.

    Args:
        model: as it stands in the file, not validated; parts that are no sections are left to the validation.
    """
    completed = dict(model)
    host = model.get("host")
    if isinstance(host, Mapping) and host.get("kind", "mace") in SCALES:
        completed["host"] = {"message_scale": SCALES[host.get("kind", "mace")], **host}
    if isinstance(model.get("edge_gate"), Mapping):
        completed["edge_gate"] = complete_gate(model["edge_gate"])
    return completed


def complete_gate(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section of an operator likewise: a gate of MARA without a form is the published one, in its axes."""
    is_earlier = section.get("kind") == "mara" and "form" not in section
    return {**GATE, **section} if is_earlier else dict(section)


def complete_run(content: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration, if an earlier version wrote it with every default (the ``config.yaml`` of a run does, and
    ``steradian config``); what somebody wrote by hand has the defaults of today and comes back as it is.
    """
    model = content.get("model")
    host = model.get("host") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(host, dict):
        return content
    settings = {"kind", "num_layers", "num_channels", "cutoff_A"}
    if host.get("kind") != "visnet":
        settings.add("avg_num_neighbors")
    every_section = {"host", "edge_gate", "global_mixer", "precision"} <= model.keys()
    is_earlier = every_section and settings <= host.keys() and "message_scale" not in host
    return {**content, "model": complete_model(model)} if is_earlier else content
