"""What several files of tests share."""

from __future__ import annotations

from steradian.data.statistics import DatasetStatistics

#: Of a training set that does not exist, for models of H, C and O with random weights.
STATISTICS = DatasetStatistics(
    elements=(1, 6, 8),
    atom_references={1: -13.0, 6: -1000.0, 8: -2000.0},
    avg_num_neighbors=5.0,
    energy_shift=0.0,
    force_rms=1.0,
    energy_std=1.0,
    num_frames=1,
    reference_report="made up",
)
