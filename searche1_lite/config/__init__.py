"""Settings: what can be set, the shipped presets, and how a preset, a file and `key=value` make one `Config`."""

from searche1_lite.config.loading import DEFAULT_PRESETS as DEFAULT_PRESETS
from searche1_lite.config.loading import PRESETS as PRESETS
from searche1_lite.config.loading import default_preset as default_preset
from searche1_lite.config.loading import dump_config as dump_config
from searche1_lite.config.loading import flatten as flatten
from searche1_lite.config.loading import load_config as load_config
from searche1_lite.config.loading import parse_config as parse_config
from searche1_lite.config.loading import preset_names as preset_names
from searche1_lite.config.loading import what_counts as what_counts
from searche1_lite.config.settings import BudgetConfig as BudgetConfig
from searche1_lite.config.settings import CheckpointConfig as CheckpointConfig
from searche1_lite.config.settings import CollapseConfig as CollapseConfig
from searche1_lite.config.settings import Config as Config
from searche1_lite.config.settings import DataConfig as DataConfig
from searche1_lite.config.settings import EngineConfig as EngineConfig
from searche1_lite.config.settings import GRPOStageConfig as GRPOStageConfig
from searche1_lite.config.settings import LoggingConfig as LoggingConfig
from searche1_lite.config.settings import ModelConfig as ModelConfig
from searche1_lite.config.settings import OFSDStageConfig as OFSDStageConfig
from searche1_lite.config.settings import ProtocolConfig as ProtocolConfig
from searche1_lite.config.settings import SearchConfig as SearchConfig
