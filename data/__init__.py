"""Datasets: files, splits, joint transforms, loaders."""

from data.datasets import DatasetFiles
from data.loaders import evaluation_loader, preview_batch, training_loader

__all__ = ["DatasetFiles", "evaluation_loader", "preview_batch", "training_loader"]
