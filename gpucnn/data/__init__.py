"""Data sets, transforms of their images, and the loader that makes batches of them."""

from gpucnn.data.augmentation import PRESETS, Augmentation, parse_augmentation
from gpucnn.data.catalog import load
from gpucnn.data.dataset import ArrayDataset, Dataset, DataSplits, Subset, TensorDataset, split
from gpucnn.data.loader import Batch, Loader
from gpucnn.data.transforms import Preprocessing, channel_statistics

__all__ = [
    "PRESETS",
    "ArrayDataset",
    "Augmentation",
    "Batch",
    "DataSplits",
    "Dataset",
    "Loader",
    "Preprocessing",
    "Subset",
    "TensorDataset",
    "channel_statistics",
    "load",
    "parse_augmentation",
    "split",
]
