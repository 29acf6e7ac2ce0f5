"""Training on an nrrdd dataset: `DBRLoader` gives batches of mixed images, `DBRLoss` the loss on them."""

from loaders.batch import DBRBatch
from loaders.loader import DBRLoader, TrainingInfo
from loaders.losses import CompactLoss, DBRLoss, OneHotLoss, SoftLoss

__all__ = ["CompactLoss", "DBRBatch", "DBRLoader", "DBRLoss", "OneHotLoss", "SoftLoss", "TrainingInfo"]
