"""What is trained: images of digits and things, and a text by its bytes; a seed is a split, weights and batches."""

from __future__ import annotations

import gzip
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional


@dataclass
class Task:
    """What is trained, by seed.

    The rate is the one at which dense training scores best under --validation: of 1, 2, 3, 5 and 10 thousandths for
    digits and MNIST (three seeds), of 1, 3 and 5 for CIFAR and of 1, 2 and 3 for text (one seed).
    """

    name: str
    steps: int
    model: Callable[[], nn.Module]
    batch: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
    score: Callable[[nn.Module, int], float]
    rate: float
    higher: bool = True
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = functional.cross_entropy
    bfloat16: bool = False


def classifier(
    name: str,
    x: torch.Tensor,
    y: torch.Tensor,
    test: int,
    steps: int,
    model: Callable[[], nn.Module],
    rate: float,
    validation: bool,
    size: int = 64,
) -> Task:
    """A task on images `x`; by seed, another `test` of them are kept back.

    Options are chosen with `validation`: as many of the others are kept back in their place, and none of those is read.
    """

    def split(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        order = order[test:] if validation else order
        return order[test:], order[:test]

    def batch(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        train = split(seed)[0]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        drawn = train[torch.randint(len(train), (size,), generator=generator)]
        return x[drawn], y[drawn]

    @torch.no_grad()
    def score(trained: nn.Module, seed: int) -> float:
        kept = split(seed)[1]
        right = [(trained(x[part]).argmax(1) == y[part]).float().sum() for part in kept.split(500)]
        return 100 * float(sum(right)) / len(kept)

    return Task(name, steps, model, batch, score, rate)


def mlp(inputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 10),
    )  # fmt: skip


def digits(validation: bool = False) -> Task:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    return classifier("digits", x, y, 450, 600, mlp(64), 5e-3, validation)


def mnist(folder: Path, validation: bool = False) -> Task:
    def idx(pattern: str) -> np.ndarray:
        path = next(folder.glob(pattern))
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = [int.from_bytes(raw[4 + 4 * n : 8 + 4 * n], "big") for n in range(raw[3])]
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)

    x = torch.tensor(idx("t10k-images*").astype(np.float32) / 255)
    y = torch.tensor(idx("t10k-labels*")).long()
    return classifier("MNIST, 10,000 images", x, y, 2000, 1000, mlp(784), 1e-2, validation)


def cifar(file: Path, validation: bool = False) -> Task:
    from transformers import ResNetConfig, ResNetForImageClassification

    with np.load(file) as data:
        x = np.concatenate([data["x_train"], data["x_test"]]).astype(np.float32) / 255
        y = np.concatenate([data["y_train"], data["y_test"]]).astype(np.int64)
    pixels = torch.tensor((x - x.mean((0, 1, 2))) / x.std((0, 1, 2))).permute(0, 3, 1, 2).contiguous()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = ResNetConfig(
                embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic", num_labels=10
            )
            self.net = ResNetForImageClassification(config)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net(images).logits

    return classifier("CIFAR-10 subset (JPEG)", pixels, torch.tensor(y), 2000, 1600, Net, 3e-3, validation)


def text(validation: bool = False, length: int = 128, rows: int = 16) -> Task:
    from tersor import recipes
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(next(iter(recipes.__path__))) / "quickstart" / "text"

    def read(name: str) -> torch.Tensor:
        lines = (folder / name).read_text("utf-8").splitlines()
        joined = "\n".join(json.loads(line)["text"] for line in lines).encode()
        return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()

    train, held = read("calibration.jsonl"), read("heldout.jsonl")
    if validation:
        train, held = train[: len(train) * 9 // 10], train[len(train) * 9 // 10 :]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = LlamaConfig(
                vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=4, use_cache=False,
            )  # fmt: skip
            self.net = LlamaForCausalLM(config)
            self.config = config

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.net(ids).logits

    def windows(bytes_: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.stack([bytes_[s : s + length + 1] for s in starts.tolist()])
        return found[:, :-1], found[:, 1:]

    def batch(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return windows(train, torch.randint(len(train) - length - 1, (rows,), generator=generator))

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def score(model: nn.Module, seed: int) -> float:
        starts = torch.arange(0, len(held) - length - 1, length * 8)
        parts = [windows(held, part) for part in starts.split(64)]
        return statistics.mean(float(loss(model(ids), targets)) for ids, targets in parts)

    return Task("text, nats a byte", 300, Net, batch, score, 2e-3, False, loss)
