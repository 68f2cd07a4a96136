"""Training: the trainer, its options, and everything that makes a run survive."""

from gpucnn.training.callbacks import Callback
from gpucnn.training.checkpoint import (
    Checkpoint,
    Position,
    read_checkpoint,
    read_tensors,
    write_checkpoint,
    write_tensors,
)
from gpucnn.training.evaluation import EvaluationResult, evaluate
from gpucnn.training.history import EpochRecord, History
from gpucnn.training.interruption import TrainingInterrupted
from gpucnn.training.options import TrainingOptions
from gpucnn.training.preparation import default_preprocessing
from gpucnn.training.progress import BarProgress, LineProgress, Progress, make_progress
from gpucnn.training.run_folder import RunFolder
from gpucnn.training.trainer import Trainer

__all__ = [
    "BarProgress",
    "Callback",
    "Checkpoint",
    "EpochRecord",
    "EvaluationResult",
    "History",
    "LineProgress",
    "Position",
    "Progress",
    "RunFolder",
    "Trainer",
    "TrainingInterrupted",
    "TrainingOptions",
    "default_preprocessing",
    "evaluate",
    "make_progress",
    "read_checkpoint",
    "read_tensors",
    "write_checkpoint",
    "write_tensors",
]
