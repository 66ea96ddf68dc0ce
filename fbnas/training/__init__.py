"""Data, and the training of one network."""

from fbnas.training.data import Data, batches, load_data, split_for_search
from fbnas.training.distillation import Distillation, Ensemble
from fbnas.training.evaluation import evaluate, recalibrate_bn
from fbnas.training.halving import Halved, Trial, halve, planned
from fbnas.training.images import Images, Subset, TensorImages
from fbnas.training.interrupt import stop_on_signal
from fbnas.training.loop import TrainingResult, train
from fbnas.training.reading import Wait
from fbnas.training.settings import TrainingSettings
from fbnas.training.state import TrainingDiverged
from fbnas.training.task import CLASSIFICATION, Task

__all__ = [
    "CLASSIFICATION",
    "Data",
    "Distillation",
    "Ensemble",
    "Halved",
    "Images",
    "Subset",
    "Task",
    "TensorImages",
    "TrainingDiverged",
    "TrainingResult",
    "TrainingSettings",
    "Trial",
    "Wait",
    "batches",
    "evaluate",
    "halve",
    "load_data",
    "planned",
    "recalibrate_bn",
    "split_for_search",
    "stop_on_signal",
    "train",
]
