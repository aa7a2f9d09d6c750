"""Sparse training of one model: which layers, how sparse at which step, and everything a resumed run needs.

    with swat(model, weights=0.8, activations=0.8, steps=1000) as training:
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            training.step()

Inside, the forward of every layer is replaced on the instance; parameters, optimizer and state dict are those of the
model. Evaluation inside uses the same masks. On leaving, the masks become zeros in the weights and the model is as it
was. What changes over time follows from the step (ramp, tokens drawn) or is in `state_dict` (thresholds, units).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tersor.compress.errors import RecipeError
from torch import nn

from .density import erk, spread
from .functions import Part
from .groups import Group, groups_of
from .layers import ActivationLayer, Layer, NormLayer
from .options import Sparsity
from .targets import activations, layers, norms, operation
from .threshold import SAMPLE, threshold


class SparseTraining:
    """What `swat` hands out; the callback and the pass drive the same object.

    Attributes:
        model: being trained.
        options: what was asked for.
        steps: optimizer steps that the ramp is a share of.
        seed: of the tokens drawn.
        number: optimizer steps done.
        layers: sparse layers by name.
        groups: coupled units (structured mode).
        live: bool `[units]` by group name.
    """

    def __init__(
        self, model: nn.Module, options: Sparsity, steps: int, groups: list[Group] | None = None, seed: int = 0
    ) -> None:
        if steps < 1:
            raise RecipeError("swat: steps", str(steps), "at least 1")
        self.model, self.options, self.steps, self.seed, self.number = model, options, steps, seed, 0
        chosen = layers(model, options.exempt)
        self.groups: list[Group] = []
        if options.mode == "structured":
            self.groups = [g for g in (groups or groups_of(model, options.on)) if self._whole(g, chosen)]
            if not self.groups:
                raise RecipeError("swat: exempt", "a layer of every group", "at least one group of units left")
        values = torch.bfloat16 if options.values == "bfloat16" else None
        rows = self.rows if options.mode != "exact" else None
        self.layers = {
            name: Layer(module, op, rows, values, options.activations, options.drop == "stored")
            for name, module in chosen.items()
            if (op := operation(module)) is not None
        }
        self.live = {group.name: torch.ones(group.size, dtype=torch.bool) for group in self.groups}
        told = norms(model, "rows") | (norms(model, "batch") if options.mode == "exact" else {})
        grouped = {n: model.get_submodule(n) for g in self.groups for n in g.members if n not in self.layers}
        self._norms = {name: NormLayer(module, name in told) for name, module in (grouped | told).items()}
        self._activations = {name: ActivationLayer(module) for name, module in activations(model).items()}
        self._drawn: dict[tuple[int, torch.device], torch.Tensor] = {}
        self.refresh()

    @staticmethod
    def _whole(group: Group, chosen: Mapping[str, nn.Module]) -> bool:
        """Whether no layer of the group is exempt: units leave all of them or none."""
        return all(name in chosen for name, owners in group.members.items() if len(owners) > 1)

    def attach(self) -> None:
        """Put sparse forwards in place of the model's."""
        for replacement in self._replacements():
            replacement.module.forward = replacement

    def detach(self) -> None:
        """Put the model's own forwards back."""
        for replacement in self._replacements():
            replacement.module.__dict__.pop("forward", None)

    def _replacements(self) -> tuple[Layer | NormLayer | ActivationLayer, ...]:
        return (*self.layers.values(), *self._norms.values(), *self._activations.values())

    def step(self) -> None:
        """Count an optimizer step; every `period` of them, choose anew."""
        self.number += 1
        self._drawn.clear()
        if self.number % self.options.period == 0:
            self.refresh()

    @property
    def shares(self) -> dict[str, float]:
        """Weight sparsity by layer."""
        return {name: layer.share for name, layer in self.layers.items()}

    @property
    def share(self) -> float:
        """Weight sparsity now."""
        return self.options.share(self.number, self.steps)

    @torch.no_grad()
    def refresh(self, final: bool = False) -> None:
        """New layer densities, weight thresholds and units; activation thresholds follow in the next forward.

        Args:
            final: take the whole share and sort all weights instead of a sample.
        """
        share = self.options.weights if final else self.share
        if self.options.mode == "structured":
            self._choose_units(share, final)
        else:
            for name, layer_share in self._shares(share).items():
                layer = self.layers[name]
                layer.share = layer_share
                sample = None if final else SAMPLE
                layer.part = Part(threshold(layer.module.weight, layer_share, sample)) if layer_share else Part()
        for layer in self.layers.values():
            layer.limit = None
            layer.watching = self.options.distribution == "momentum"

    def _shares(self, share: float) -> dict[str, float]:
        if share == 0 or self.options.distribution == "uniform":
            return dict.fromkeys(self.layers, share)
        shapes = {name: layer.module.weight.shape for name, layer in self.layers.items()}
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        if self.options.distribution == "erk":
            return spread(share, sizes, {name: erk(shape) for name, shape in shapes.items()})
        seen = {name: layer.gradient for name, layer in self.layers.items()}
        if any(gradient is None for gradient in seen.values()) or not any(seen.values()):
            return dict.fromkeys(self.layers, share)
        return spread(share, sizes, {name: gradient or 0.0 for name, gradient in seen.items()})

    def _choose_units(self, share: float, final: bool) -> None:
        names = {name for group in self.groups for name in group.members}
        weights = {name: self.model.get_parameter(f"{name}.weight") for name in names}
        for group in self.groups:
            count = max(1, round((1 - share) * group.size))
            if final and int(self.live[group.name].sum()) == count:
                continue  # those that were trained last, not those that would be chosen next
            best = group.scores(weights).argsort(descending=True, stable=True)[:count]
            live = torch.zeros(group.size, dtype=torch.bool)
            live[best] = True
            self.live[group.name] = live
        self._narrow()

    def _narrow(self) -> None:
        """Rows, columns and channels of every member from the live units."""
        places: dict[str, list[torch.Tensor | None]] = {}
        for group in self.groups:
            live = self.live[group.name]
            if bool(live.all()):
                continue
            for name in group.members:
                mine = places.setdefault(name, [None, None])
                for dim in (0, 1):
                    found = group.live_places(name, dim, live)
                    mine[dim] = found if found is not None else mine[dim]
        for name, layer in self.layers.items():
            rows, columns = places.get(name, (None, None))
            device = layer.module.weight.device
            layer.part = Part(None, *(None if p is None else p.to(device) for p in (rows, columns)))
            dims = layer.module.weight.shape
            left = [full if p is None else len(p) for p, full in zip((rows, columns), dims[:2], strict=True)]
            layer.share = 1 - left[0] * left[1] / (dims[0] * dims[1])
        for name, norm in self._norms.items():
            found = places.get(name, (None, None))[0]
            norm.live = None if found is None else found.to(norm.module.weight.device)

    def rows(self, total: int, device: torch.device) -> torch.Tensor:
        """The tokens of this step: int64, ascending, the same for every layer that reads as many."""
        key = (total, device)
        if key not in self._drawn:
            seed = (self.seed * 1_000_003 + self.number) * 1_000_033 + total
            generator = torch.Generator().manual_seed(seed % (1 << 63))
            count = max(1, round((1 - self.options.activations) * total))
            self._drawn[key] = torch.randperm(total, generator=generator)[:count].sort().values.to(device)
        return self._drawn[key]

    @torch.no_grad()
    def harden(self) -> None:
        """Write the masks into the weights, as zeros, at the whole share."""
        self.refresh(final=True)
        for layer in self.layers.values():
            if layer.part.least is not None:
                weight = layer.module.weight
                weight.masked_fill_(weight.abs() < layer.part.least, 0)
        for group in self.groups:
            dead = ~self.live[group.name]
            for name in group.members:
                self._silence(group, name, dead)

    def _silence(self, group: Group, name: str, dead: torch.Tensor) -> None:
        """Zero all that belongs to dead units in one member, biases and norms too."""
        module: Any = self.model.get_submodule(name)
        out = 1 if getattr(operation(module), "transposed", False) else 0
        for dim, owner in enumerate(group.members[name]):
            if owner is None:
                continue
            places = (dead[owner.clamp_min(0)] & (owner >= 0)).nonzero().reshape(-1).to(module.weight.device)
            module.weight.index_fill_(dim, places, 0)
            if dim == out and module.bias is not None:
                module.bias.index_fill_(0, places, 0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that does not follow from the weights and the options, as tensors by name."""
        found = {"step": torch.tensor(self.number)}
        for name, layer in self.layers.items():
            values = {"least": layer.part.least, "limit": layer.limit}
            found.update({f"{name}.{k}": v.detach().cpu() for k, v in values.items() if v is not None})
            found[f"{name}.share"] = torch.tensor(layer.share, dtype=torch.float64)
            if layer.gradient is not None:
                found[f"{name}.gradient"] = torch.tensor(layer.gradient, dtype=torch.float64)
            found[f"{name}.watching"] = torch.tensor(layer.watching)
        found.update({f"{name}.live": live.clone() for name, live in self.live.items()})
        found.update({f"{name}.read": torch.tensor(act.read) for name, act in self._activations.items()})
        return found

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            RecipeError: it is of other layers or other options.
        """
        missing = [name for name in self.layers if f"{name}.share" not in state]
        missing += [name for name in self.live if f"{name}.live" not in state]
        missing += [name for name in self._activations if f"{name}.read" not in state]
        if missing or "step" not in state:
            found = f"no state of {missing[0] if missing else 'the step'}"
            raise RecipeError("swat: state", found, "the state of this model")
        self.number = int(state["step"])
        self._drawn.clear()
        self.live = {name: state[f"{name}.live"].clone() for name in self.live}
        if self.groups:
            self._narrow()
        for name, activation in self._activations.items():
            activation.read = bool(state[f"{name}.read"])
        for name, layer in self.layers.items():
            device = layer.module.weight.device
            least, limit, gradient = (state.get(f"{name}.{k}") for k in ("least", "limit", "gradient"))
            if not self.groups:
                layer.part = Part(None if least is None else least.to(device))
                layer.share = float(state[f"{name}.share"])
            layer.limit = None if limit is None else limit.to(device)
            layer.gradient = None if gradient is None else float(gradient)
            layer.watching = bool(state[f"{name}.watching"])


@contextmanager
def swat(
    model: nn.Module,
    options: Sparsity | None = None,
    *,
    steps: int,
    groups: list[Group] | None = None,
    seed: int = 0,
    **words: Any,
) -> Iterator[SparseTraining]:
    """Train `model` sparsely inside a plain loop.

    Args:
        model: any module with Linear or Conv2d layers.
        options: what is dropped; or its fields by name in `words`.
        steps: optimizer steps of the whole training.
        groups: coupled units for structured mode, where the model's own cannot be found.
        seed: of the tokens drawn.
        words: fields of `Sparsity`.

    Yields:
        The training; call its `step` after every optimizer step.

    Raises:
        RecipeError: options that mean nothing on this model.
    """
    training = SparseTraining(model, options or Sparsity(**words), steps, groups, seed)
    training.attach()
    try:
        yield training
        training.harden()
    finally:
        training.detach()
