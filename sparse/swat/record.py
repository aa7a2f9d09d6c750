"""What a report plots of sparse training over its steps.

    loss      with the masks, and of the same weights without them, on one batch that the training reads too: what
              being sparse costs at this step
    density   of each layer's weights
    bytes     that autograd held between the forward and the backward pass of a real step, and what a dense one holds

Points are taken at steps that follow from the number of steps alone and are kept beside each checkpoint, so that a
resumed training plots what an uninterrupted one does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..meters import saved_bytes
from .callback import about_to_save, checkpoint_directory

if TYPE_CHECKING:
    from tersor.compress.train.losses import Batch, Objective

    from .callback import SwatCallback

POINTS = 60
"""About as many points has a curve."""
FILE = "swat_curves.json"


class Record(TrainerCallback):
    """Takes points while a Trainer trains; register it behind the `SwatCallback`.

    Attributes:
        callback: whose masks are measured.
        objective: the training's loss.
        watched: the same loss, whose bytes are counted at steps that are due: what the Trainer is given.
        batch: on which the losses are compared.
        points: one dictionary a point.
    """

    def __init__(self, callback: SwatCallback, objective: Objective, batch: Batch, steps: int) -> None:
        self.callback, self.objective, self.batch = callback, objective, batch
        self.every, self.points = max(1, steps // POINTS), list[dict[str, Any]]()
        self.watched = Watched(objective, self._due, self._count)
        self._bytes = 0

    def _due(self) -> bool:
        training = self.callback.training
        return training is not None and training.number % self.every == 0

    def _count(self, found: int) -> None:
        self._bytes = found

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take up the points of the checkpoint that the Trainer resumes from."""
        if state.global_step:
            self.load(checkpoint_directory(args, state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Take a point, if this step is due; leave all of them where a checkpoint will lie."""
        training = self.callback.training
        assert training is not None
        if (state.global_step - 1) % self.every == 0:
            sparse = self._loss(model)
            training.detach()
            dense = self._loss(model)
            training.attach()
            density = {name: 1 - share for name, share in training.shares.items()}
            self.points.append(
                {"step": state.global_step, "sparse": sparse, "dense": dense, "bytes": self._bytes, "density": density}
            )

        if state.is_world_process_zero and about_to_save(args, state, control):
            directory = checkpoint_directory(args, state.global_step)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / FILE).write_text(json.dumps(self.points), "utf-8")

    @torch.no_grad()
    def _loss(self, model: nn.Module) -> float:
        """Mean loss of an answer of the batch, in eval mode."""
        was, device = model.training, next(model.parameters()).device
        model.eval()
        batch = {name: value.to(device) for name, value in self.batch.items()}
        found = float(self.objective(model, batch)) / max(1, int(batch["targets"].ne(-100).sum()))
        model.train(was)
        return found

    def load(self, directory: Path) -> None:
        """Take up the points that lie in a checkpoint directory."""
        path = directory / FILE
        self.points = json.loads(path.read_text("utf-8")) if path.is_file() else []

    def curves(self) -> dict[str, Any]:
        """Columns over `step`, as the report plots them."""
        if not self.points:
            return {}
        steps = [point["step"] for point in self.points]
        columns = {name: [point[name] for point in self.points] for name in ("sparse", "dense", "bytes")}
        layers = {name: [point["density"][name] for point in self.points] for name in self.points[0]["density"]}
        return {
            "loss_with_and_without_masks": {"step": steps, "sparse": columns["sparse"], "dense": columns["dense"]},
            "density_by_layer": {"step": steps, **layers},
            "bytes_kept_for_backward": {"step": steps, "bytes": columns["bytes"]},
        }


class Watched:
    """An objective whose kept bytes are counted at some steps."""

    def __init__(self, objective: Objective, due: Callable[[], bool], tell: Callable[[int], None]) -> None:
        self.objective, self.due, self.tell = objective, due, tell

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The objective's loss."""
        if not self.due():
            return self.objective(model, batch)
        with saved_bytes(model) as found:
            loss = self.objective(model, batch)
        self.tell(found.total)
        return loss

    def to(self, device: torch.device) -> None:
        """Move the objective."""
        self.objective.to(device)
