"""The nrrdd dataset format: SPEC.md, its reader, writer and checks. Importing it does not import torch."""

from nrrdd_format.dataset import DistilledDataset, open_dataset
from nrrdd_format.errors import ConfigError, DataError, FormatError, NrrddError, OutputError, TeacherError
from nrrdd_format.manifest import Manifest
from nrrdd_format.pairs import PairRecords
from nrrdd_format.shards import ShardReader
from nrrdd_format.verify import Problem, verify_dataset

__all__ = [
    "ConfigError",
    "DataError",
    "DistilledDataset",
    "FormatError",
    "Manifest",
    "NrrddError",
    "OutputError",
    "PairRecords",
    "Problem",
    "ShardReader",
    "TeacherError",
    "open_dataset",
    "verify_dataset",
]
