"""What people write today, done well, to be measured beside mnist-cli.

    textbook  torchvision's dataset, a transform per sample, a DataLoader, `.item()` at each step
    strong    the whole set as normalised float tensors, plain slices, fused optimizer, no sync

    python benchmarks/peers.py strong --work mlp --epochs 1 --data DIR

prints one JSON line with the test accuracy and the seconds of training. DIR holds MNIST as
torchvision lays it out (DIR/MNIST/raw/...). Both train on all 60,000 images and test once.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

MEAN, STD = 0.1307, 0.3081


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(512, 256), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(256, 10),
    )  # fmt: skip


def mlp_small() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def cnn_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.25), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(128, 10),
    )  # fmt: skip


MODELS = {
    "linear": linear,
    "mlp": mlp,
    "mlp_small": mlp_small,
    "cnn": cnn,
    "cnn_dropout": cnn_dropout,
}


def optimizer(name: str, model: nn.Module, fused: bool, lr: float = 0.001) -> torch.optim.Optimizer:
    if name == "adadelta":
        return torch.optim.Adadelta(model.parameters(), lr=1.0)
    return torch.optim.Adam(model.parameters(), lr=lr, fused=fused)


def textbook(work: argparse.Namespace) -> tuple[float, float]:
    """(test accuracy, seconds of training) of the usual loop."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    train = DataLoader(
        datasets.MNIST(work.data, train=True, transform=transform),
        batch_size=work.batch_size,
        shuffle=True,
    )
    test = DataLoader(datasets.MNIST(work.data, train=False, transform=transform), batch_size=1000)
    model = MODELS[work.work]()
    optim = optimizer(work.optim, model, fused=False, lr=work.lr)
    started = time.perf_counter()
    for _ in range(work.epochs):
        model.train()
        total = 0.0
        for images, labels in train:
            optim.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optim.step()
            total += loss.item()
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(images).argmax(dim=1) == labels).sum()) for images, labels in test)
    return hits / 10_000, seconds


def strong(work: argparse.Namespace) -> tuple[float, float]:
    """(test accuracy, seconds of training) of a loop over preloaded tensors."""

    def tensors(train: bool) -> tuple[Tensor, Tensor]:
        found = datasets.MNIST(work.data, train=train)
        return (found.data.unsqueeze(1).float() / 255 - MEAN) / STD, found.targets

    (images, labels), (test_images, test_labels) = tensors(True), tensors(False)
    model = MODELS[work.work]()
    optim = optimizer(work.optim, model, fused=True, lr=work.lr)
    started = time.perf_counter()
    for _ in range(work.epochs):
        model.train()
        for rows in torch.randperm(len(images)).split(work.batch_size):
            optim.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optim.step()
    seconds = time.perf_counter() - started
    model.eval()
    with torch.inference_mode():
        answers = torch.cat([model(batch).argmax(dim=1) for batch in test_images.split(1000)])
    return float((answers == test_labels).double().mean()), seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=("textbook", "strong"))
    parser.add_argument("--work", choices=MODELS, required=True)
    parser.add_argument("--optim", choices=("adam", "adadelta"), default="adam")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", required=True)
    work = parser.parse_args()
    torch.manual_seed(work.seed)
    accuracy, seconds = {"textbook": textbook, "strong": strong}[work.peer](work)
    print(json.dumps({"accuracy": accuracy, "train_s": seconds}))


if __name__ == "__main__":
    main()
