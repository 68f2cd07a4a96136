"""Data sets, transforms of their images, and the loader that makes batches of them."""

from gpucnn.data.augmentation import PRESETS, Augmentation, parse_augmentation
from gpucnn.data.catalog import NAMES, load
from gpucnn.data.dataset import ArrayDataset, Dataset, DataSplits, Subset, TensorDataset, split
from gpucnn.data.folder import ImageFolder
from gpucnn.data.image_files import read_image
from gpucnn.data.loader import Batch, Loader
from gpucnn.data.transforms import Preprocessing, channel_statistics

__all__ = [
    "NAMES",
    "PRESETS",
    "ArrayDataset",
    "Augmentation",
    "Batch",
    "DataSplits",
    "Dataset",
    "ImageFolder",
    "Loader",
    "Preprocessing",
    "Subset",
    "TensorDataset",
    "channel_statistics",
    "load",
    "parse_augmentation",
    "read_image",
    "split",
]
