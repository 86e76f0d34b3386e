"""Every section of a configuration file: what may stand in it, its defaults, and what a mistake is told.

A file is YAML and holds data, never code. Unknown keys are errors that name the nearest known one. Nothing here imports
torch or another heavy package, so that the command line answers at once.
"""

from steradian.config.hosts import ExpNormalConfig, MACEConfig, NequIPConfig, RadialConfig, ReadoutConfig, ViSNetConfig
from steradian.config.load import (
    ConfigError,
    HostConfig,
    ModelConfig,
    NoMixer,
    RunConfig,
    dump_config,
    json_schema,
    load_config,
    parse_config,
)
from steradian.config.operators import (
    EFAConfig,
    EquiangularGrid,
    GaussLegendreGrid,
    GridConfig,
    LebedevGrid,
    MARAConfig,
    NoGate,
    O3MPNNConfig,
    SphericalDesign,
)
from steradian.config.precision import ElementTablesConfig, PrecisionConfig
from steradian.config.run import (
    BatchConfig,
    DataConfig,
    KeysConfig,
    LossConfig,
    OptimizerConfig,
    ReferenceEnergiesConfig,
    ScheduleConfig,
    SplitConfig,
    TrainingConfig,
    UnitsConfig,
)

__all__ = [
    "BatchConfig",
    "ConfigError",
    "DataConfig",
    "EFAConfig",
    "ElementTablesConfig",
    "EquiangularGrid",
    "ExpNormalConfig",
    "GaussLegendreGrid",
    "GridConfig",
    "KeysConfig",
    "HostConfig",
    "LebedevGrid",
    "LossConfig",
    "MACEConfig",
    "MARAConfig",
    "ModelConfig",
    "NequIPConfig",
    "NoGate",
    "NoMixer",
    "O3MPNNConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "RadialConfig",
    "ReadoutConfig",
    "ReferenceEnergiesConfig",
    "RunConfig",
    "ScheduleConfig",
    "SphericalDesign",
    "SplitConfig",
    "TrainingConfig",
    "UnitsConfig",
    "ViSNetConfig",
    "dump_config",
    "json_schema",
    "load_config",
    "parse_config",
]
