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
        seed: of the tokens drawn.
        harden: whether the end of training writes the zeros.
        training: of the model, once training has begun.
    """

    def __init__(
        self, options: Sparsity, groups: list[Group] | None = None, seed: int = 0, harden: bool = True
    ) -> None:
        self.options, self.groups, self.seed, self.harden = options, groups, seed, harden
        self.training: SparseTraining | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Replace the forwards; take up the state of the checkpoint that the Trainer resumes from."""
        self.training = SparseTraining(model, self.options, state.max_steps, self.groups, self.seed)
        if state.global_step:
            load(self.training, checkpoint_directory(args, state.global_step))
        self.training.attach()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step; before the Trainer writes a checkpoint, leave the state where it will lie.

        The Trainer writes its own state last, so that a checkpoint it calls whole has ours too, whenever it is killed.
        """
        assert self.training is not None
        self.training.step()
        if about_to_save(args, state, control):
            self._write(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the state beside the Trainer's, where another callback asked for the checkpoint."""
        if not (checkpoint_directory(args, state.global_step) / STATE).is_file():
            self._write(args, state)

    def _write(self, args: Any, state: Any) -> None:
        from safetensors.torch import save_file

        if self.training is not None and state.is_world_process_zero:
            directory = checkpoint_directory(args, state.global_step)
            directory.mkdir(parents=True, exist_ok=True)
            save_file(self.training.state_dict(), directory / STATE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write zeros, and give the model its forwards back."""
        assert self.training is not None
        if self.harden:
            self.training.harden()
        self.training.detach()


def load(training: SparseTraining, directory: Path) -> None:
    """Take up the state in a checkpoint directory.

    Raises:
        PreflightError: there is none.
    """
    from safetensors.torch import load_file

    path = directory / STATE
    if not path.is_file():
        remedy = "Resume from where it was saved."
        raise PreflightError(str(path), "no such file", "the state of sparse training", remedy)
    training.load_state_dict(load_file(path))


def about_to_save(args: Any, state: Any, control: Any) -> bool:
    """Whether the Trainer writes a checkpoint behind this step."""
    return bool(control.should_save or (state.global_step >= state.max_steps and args.save_strategy != "no"))


def checkpoint_directory(args: Any, step: int) -> Path:
    """Where the Trainer keeps the checkpoint of a step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
