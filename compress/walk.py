"""Walking a model block by block without copying its forward code.

The blocks are swapped for probes that return their input and remember the other arguments (masks, position
embeddings) with which the model's own forward called them. One forward through the probes therefore yields the stream
before the first block and each block's arguments; one more, whose last probe hands out a given stream, applies
everything behind the blocks (final norm, head, soft caps) to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .layout import Layout


@dataclass(frozen=True)
class Arguments:
    """What a block takes beside the stream."""

    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)


@dataclass
class Start:
    """What the model computed in front of its blocks.

    Attributes:
        stream: `[batch, sequence, hidden]`.
        arguments: what each block was called with beside the stream, in order.
    """

    stream: torch.Tensor
    arguments: list[Arguments]


class _Probe(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)  # some forwards pick the mask by it
        self.stream: torch.Tensor | None = None
        self.arguments = Arguments()
        self.replacement: torch.Tensor | None = None

    def forward(self, stream: torch.Tensor, *positional: Any, **named: Any) -> torch.Tensor:
        self.stream, self.arguments = stream, Arguments(positional, named)
        return stream if self.replacement is None else self.replacement


class Walk:
    """Walks `model` (as laid out by `layout`) one block at a time."""

    def __init__(self, model: nn.Module, layout: Layout):
        self.model, self.layout = model, layout
        self.path = layout.full(layout.arch.blocks)
        self.blocks: nn.ModuleList = model.get_submodule(self.path)  # type: ignore[assignment]

    @contextmanager
    def _probes(self) -> Iterator[list[_Probe]]:
        probes = [_Probe(block) for block in self.blocks]
        parent, _, name = self.path.rpartition(".")
        owner = self.model.get_submodule(parent)
        setattr(owner, name, nn.ModuleList(probes))
        try:
            yield probes
        finally:
            setattr(owner, name, self.blocks)

    def start(self, **inputs: torch.Tensor) -> Start:
        """Run everything in front of the blocks on the model's inputs."""
        with self._probes() as probes:
            self.model(**inputs, use_cache=False)
        first = probes[0].stream
        assert first is not None
        return Start(first, [p.arguments for p in probes])

    def block(self, number: int, stream: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """The stream after block `number`."""
        out = self.blocks[number](stream, *arguments.positional, **arguments.named)
        return out[0] if isinstance(out, tuple) else out

    def finish(self, stream: torch.Tensor, **inputs: torch.Tensor) -> Any:
        """The model's output for a stream that left the last block. `inputs` are those given to `start`."""
        with self._probes() as probes:
            probes[-1].replacement = stream
            return self.model(**inputs, use_cache=False)


@contextmanager
def captured(
    model: nn.Module, inputs: Iterable[str] = (), outputs: Iterable[str] = ()
) -> Iterator[dict[str, torch.Tensor]]:
    """Remember what the named modules read (`inputs`) or return (`outputs`) in the forwards inside the block.

    Yields a dict by module name, filled by each forward.
    """
    seen: dict[str, torch.Tensor] = {}

    def reader(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[name] = args[0] if args else next(iter(named.values()))

        return hook

    def writer(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [model.get_submodule(n).register_forward_pre_hook(reader(n), with_kwargs=True) for n in inputs]
    hooks += [model.get_submodule(n).register_forward_hook(writer(n)) for n in outputs]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
