"""The loop: transformers' Trainer with our batches, losses and checkpoints; accelerate decides where it runs.

What is taken from there: the step, gradient accumulation, autocast, clipping, schedules, DDP and FSDP2 under
`accelerate launch` or torchrun, and the order in which a checkpoint is written. What is ours, and why:

- The order of the rows is a pure function of the seed and the step, so a resumed run skips to its place without
  replaying generators, and n processes see what one would.
- A step's loss is its sum over answers divided by their number over all micro-batches and processes.
- Checkpoints hold the module's own names (state.py).
- A loss that is not finite ends the run; Trainer would average it away in its log and go on.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..errors import RecipeError
from ..pretrained import quiet
from . import state as disk
from .losses import Objective, answers
from .memory import checkpoint_activations
from .options import Training
from .rows import Rows

SMALL = 1 / 16
"""A matrix whose values are this much smaller than its peers' moves in proportion (see `groups`)."""

Track = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Trained:
    """How a training ended.

    Attributes:
        steps: done, fewer than asked for if `stop` said so.
        losses: (step, mean loss of an answer), in order.
        averaged: how many checkpoints the weights are the mean of.
        stopped: whether `stop` ended it.
        weights: under FSDP2, where the model stays in shards, what was trained, whole and by name; else None.
    """

    steps: int
    losses: tuple[tuple[int, float], ...]
    averaged: int
    stopped: bool
    weights: dict[str, torch.Tensor] | None = None


def train(
    model: nn.Module,
    data: Rows,
    objective: Objective,
    options: Training | None = None,
    *,
    folder: Path | None = None,
    seed: int = 0,
    stop: Callable[[nn.Module], bool] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    track: Track = lambda items, _label: items,
    label: str = "train",
) -> Trained:
    """Train `model` in place: parameters that require gradients move.

    Args:
        model: float32; left in eval mode, on the CPU (under FSDP2: in shards, see `Trained.weights`).
        data: what a step reads; rows are shuffled anew in each round through them.
        objective: what is minimised.
        options: steps, rates, precision, checkpoints.
        folder: where checkpoints go. One that holds some is continued from the last. None: nowhere, no resume.
        seed: of the order of the rows and of dropout.
        stop: asked after each checkpoint; True ends the training.
        callbacks: transformers' own interface; state that must survive a kill is theirs to export
            (`ExportableState`), or a function of the step.
        track: wraps an iterable in a progress bar.
        label: of the bar.

    Raises:
        RecipeError: the loss became NaN or infinite; names the step.
        PreflightError: `folder` holds checkpoints of another model.
    """
    options = options or Training()
    with tempfile.TemporaryDirectory() as nowhere, apart_from_the_world():
        where = folder or Path(nowhere)
        found = disk.checkpoints(where)
        checkpoint_activations(model, options.activation_checkpointing)
        watch = Watch(options, stop, track, label)
        keeps, sharded = folder is not None or options.average > 1, False
        arguments = arguments_of(options, where, seed, keeps)
        if folder is None and arguments.world_size > 1:
            raise RecipeError(
                "train: folder", f"none for {arguments.world_size} processes", "one that all of them read"
            )
        if found and disk.ended(found[-1], options.steps):
            disk.load_weights(model, disk.mean(found[-1:]), str(where))
            steps, log = disk.history(found[-1])
        else:
            loop = Loop(model, data, objective, options, arguments, [*callbacks, watch])
            loop.train(resume_from_checkpoint=str(found[-1]) if found else None)
            steps, log, sharded = loop.state.global_step, loop.state.log_history, bool(loop.is_fsdp_enabled)
            loop.accelerator.wait_for_everyone()  # what the first process saved is read by all
        if sharded:
            last = disk.checkpoints(where)[-options.average :]
            return Trained(steps, losses_of(log), len(last), steps < options.steps, disk.mean(last))
        averaged = average(model, where, options.average)
    model.to("cpu").eval()
    return Trained(steps, losses_of(log), averaged, steps < options.steps)


def losses_of(log: Sequence[dict[str, Any]]) -> tuple[tuple[int, float], ...]:
    """(step, loss) of a log."""
    return tuple((int(entry["step"]), float(entry["loss"])) for entry in log if "loss" in entry)


def average(model: nn.Module, folder: Path, count: int) -> int:
    """Put the mean of the last checkpoints into the model; returns how many there were."""
    last = disk.checkpoints(folder)[-count:] if count > 1 else []
    if len(last) > 1:
        disk.load_weights(model, disk.mean(last), str(folder))
    return max(1, len(last))


@contextmanager
def apart_from_the_world() -> Iterator[None]:
    """Leave generators and transformers' verbosity as they were; Trainer seeds and sets them for the process."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), quiet():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def arguments_of(options: Training, folder: Path, seed: int, keeps: bool) -> TrainingArguments:
    """Our options in transformers' words."""
    schedules = {"constant": "constant_with_warmup", "stable-decay": "warmup_stable_decay"}
    warm = math.ceil(options.warmup * options.steps)
    decay = max(1, options.steps // 5)
    more = {"num_decay_steps": decay, "decay_type": "linear"} if options.schedule == "stable-decay" else {}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type=schedules.get(options.schedule, options.schedule),
        lr_scheduler_kwargs=more,
        warmup_steps=warm,
        max_grad_norm=options.clip,
        bf16=options.in_bfloat16,
        save_strategy="steps" if keeps else "no",
        save_steps=options.save_every,
        save_total_limit=max(2, options.average),
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if not torch.cuda.is_available() and "WORLD_SIZE" in os.environ else None,
    )


class Order(Dataset):
    """The rows in the order of training: round after round, each a seeded permutation."""

    def __init__(self, data: Rows, length: int, seed: int):
        self.data, self.length, self.seed = data, length, seed
        self._round = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, place = divmod(index, len(self.data))
        if self._round[0] != number:
            self._round = (number, np.random.default_rng((self.seed, number)).permutation(len(self.data)))
        return self.data.at(int(self._round[1][place]), number)


class Loop(Trainer):
    """Trainer with our losses, order and checkpoints."""

    def __init__(
        self,
        model: nn.Module,
        data: Rows,
        objective: Objective,
        options: Training,
        arguments: TrainingArguments,
        callbacks: Sequence[TrainerCallback],
    ):
        self.objective: Objective = objective
        self.options: Training = options
        self.trained: nn.Module = model
        rows = options.steps * options.batch * options.accumulate * arguments.world_size
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=Order(data, rows, arguments.seed),
            data_collator=data.collate,
            callbacks=list(callbacks),
            compute_loss_func=lambda *_args, **_named: None,  # says that `compute_loss` divides over the whole step
        )
        self.remove_callback(PrinterCallback)
        objective.to(arguments.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset
        return SequentialSampler(rows)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        count = sum((answers(batch) for batch in batch_samples), torch.zeros((), dtype=torch.long)).to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count[None]).sum()
        return count.clamp_min(1)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The batch's part of the step's mean loss of an answer; DDP's averaging over processes is undone."""
        with self.accelerator.autocast():  # which wraps the model's forward alone: an original would run in float32
            loss = self.objective(model, inputs) / num_items_in_batch * self.args.world_size
        if not bool(torch.isfinite(loss)):
            raise RecipeError(
                f"train: step {self.state.global_step + 1}",
                f"a loss that is {'NaN' if bool(torch.isnan(loss)) else 'infinite'}",
                "a finite one",
                f"Lower learning_rate ({self.options.learning_rate:g}) or raise warmup, and start again.",
            )
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW or SGD over `groups`."""
        if self.optimizer is None:
            found = groups(model or self.trained, self.options)
            self.optimizer = (
                torch.optim.AdamW(found, lr=self.options.learning_rate, betas=(0.9, 0.95))
                if self.options.optimizer == "adamw"
                else torch.optim.SGD(found, lr=self.options.learning_rate, momentum=0.9)
            )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:  # under FSDP2 `state_dict` is gathered from all shards, beside accelerate's own files
            disk.save_weights(self.trained, Path(str(output_dir)), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # each process its shard
        else:
            path = Path(resume_from_checkpoint)
            disk.load_weights(self.trained, disk.mean([path]), str(path))


def groups(model: nn.Module, options: Training) -> list[dict[str, Any]]:
    """Parameters by weight decay and learning rate.

    Adam moves every value by about the learning rate, whatever its size. A matrix far smaller than its peers (a
    router that was scaled down so that its gate weights are nearly constant) would be overwritten in a step: it moves
    in proportion to its size instead, which is what training it unscaled and scaling it again would do.
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    sizes = {n: float(p.detach().square().mean().sqrt()) for n, p in trained if p.ndim > 1}
    typical = float(np.median([s for s in sizes.values() if s] or [1.0]))
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained:
        ratio = sizes.get(name, typical) / typical
        rate = options.learning_rate * (ratio if 0 < ratio < SMALL else 1.0)
        decay = options.weight_decay if parameter.ndim > 1 else 0.0
        found.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in found.items()]


class Watch(TrainerCallback):
    """Moves the progress bar and asks whether to stop."""

    def __init__(self, options: Training, stop: Callable[[nn.Module], bool] | None, track: Track, label: str):
        self.options, self.stop, self.track, self.label = options, stop, track, label
        self.bar: Iterator[Any] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_named: Any) -> None:
        """Start the bar, where a resumed training left off."""
        self.bar = iter(self.track(range(args.max_steps), self.label)) if state.is_world_process_zero else iter(())
        for _ in range(state.global_step + 1):
            next(self.bar, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> Any:
        """Move the bar; before a checkpoint is written, ask."""
        next(self.bar, None)
        last = state.global_step >= args.max_steps
        due = state.global_step % self.options.save_every == 0
        if self.stop is not None and due and not last:
            model = named["model"]
            was = model.training
            if self.stop(model.eval()):
                control.should_training_stop = control.should_save = True
            model.train(was)
        if last:
            control.should_save = args.save_strategy != "no"
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_named: Any) -> None:
        """Only the last two checkpoints need an optimizer; older ones wait to be averaged."""
        for old in disk.checkpoints(Path(args.output_dir))[:-2] if state.is_world_process_zero else []:
            (old / disk.OPTIMIZER).unlink(missing_ok=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_named: Any) -> None:
        """Close the bar."""
        for _ in self.bar:
            pass
