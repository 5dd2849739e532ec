"""Handwritten digits and a small network, for trainings of a second."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def data(count: int = 256) -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images[:count], dtype=torch.float32) / 16, torch.tensor(labels[:count]))


def loader(count: int = 256, batch: int = 32) -> DataLoader:
    return DataLoader(data(count), batch_size=batch)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 10))
