"""Training on an nrrdd dataset: `DBRLoader` gives batches of mixed images, `DBRLoss` the loss on them."""

from loaders.batch import ClassDistances, DBRBatch
from loaders.loader import DBRLoader, TrainingInfo
from loaders.losses import CompactLoss, CompletedDBRLoss, DBRLoss, OneHotLoss, SoftLoss, completed_labels

__all__ = [
    "ClassDistances",
    "CompactLoss",
    "CompletedDBRLoss",
    "DBRBatch",
    "DBRLoader",
    "DBRLoss",
    "OneHotLoss",
    "SoftLoss",
    "TrainingInfo",
    "completed_labels",
]
