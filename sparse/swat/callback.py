"""Sparse training inside transformers' Trainer, its checkpoints and its resume.

    trainer = Trainer(model, args, train_dataset=data, callbacks=[SwatCallback(Sparsity(weights=0.8))])
    trainer.train()

Its state lies beside the Trainer's own in every checkpoint-N directory (swat.safetensors), so that
`trainer.train(resume_from_checkpoint=True)` continues bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.compress.errors import PreflightError
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .options import Sparsity
from .training import SparseTraining

if TYPE_CHECKING:
    from .groups import Group

STATE = "swat.safetensors"


class SwatCallback(TrainerCallback):
    """Makes a Trainer's model sparse while it trains; afterwards the masks are zeros in its weights.

    Attributes:
        options: what is dropped.
        groups: coupled units for structured mode, where the model's own cannot be found.
        training: of the model, once training has begun.
        densities: by step, one entry a period: what the report plots.
    """

    def __init__(self, options: Sparsity, groups: list[Group] | None = None) -> None:
        self.options, self.groups = options, groups
        self.training: SparseTraining | None = None
        self.densities: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Replace the forwards; take up the state of the checkpoint that the Trainer resumes from."""
        self.training = SparseTraining(model, self.options, state.max_steps, self.groups)
        if state.global_step:
            from safetensors.torch import load_file

            path = _directory(args, state.global_step) / STATE
            if not path.is_file():
                remedy = "Resume from where it was saved."
                raise PreflightError(str(path), "no such file", "the state of sparse training", remedy)
            self.training.load_state_dict(load_file(path))
        self.training.attach()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step."""
        assert self.training is not None
        if state.global_step % self.options.period == 1 % self.options.period:
            shares = {name: layer.share for name, layer in self.training.layers.items()}
            self.densities.append({"step": state.global_step, "share": shares})
        self.training.step()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the state beside the Trainer's."""
        from safetensors.torch import save_file

        assert self.training is not None
        directory = _directory(args, state.global_step)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.training.state_dict(), directory / STATE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write zeros, and give the model its forwards back."""
        assert self.training is not None
        self.training.harden()
        self.training.detach()


def _directory(args: Any, step: int) -> Path:
    """Where the Trainer keeps the checkpoint of a step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
