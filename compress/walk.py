"""Walking a model block by block without copying its forward code.

The blocks are swapped for probes that return their input and remember the other arguments (masks, position
embeddings) with which the model's own forward called them. One forward through the probes therefore yields the stream
before the first block and each block's arguments; one more, whose last probe hands out a given stream, applies
everything behind the blocks (final norm, head, soft caps) to it.
"""

from __future__ import annotations

import contextlib
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
        self.last = False

    def forward(self, stream: torch.Tensor, *positional: Any, **named: Any) -> torch.Tensor:
        self.stream, self.arguments = stream, Arguments(positional, named)
        if self.last:
            raise _Enough
        return stream if self.replacement is None else self.replacement


class _Mute(nn.Module):
    """In place of a part of a block that has already run: adds nothing to the stream, or hands it on."""

    def __init__(self, returned: int, hands_on: bool):
        super().__init__()
        self.returned, self.hands_on = returned, hands_on

    def forward(self, *positional: Any, **named: Any) -> Any:
        stream = positional[0] if positional else next(v for v in named.values() if isinstance(v, torch.Tensor))
        out = stream if self.hands_on else torch.zeros_like(stream)
        return (out, *[None] * (self.returned - 1)) if self.returned else out


class Walk:
    """Walks `model` (as laid out by `layout`) one block at a time."""

    def __init__(self, model: nn.Module, layout: Layout):
        self.model, self.layout = model, layout
        self.path = layout.full(layout.arch.blocks)
        self.blocks: nn.ModuleList = model.get_submodule(self.path)  # type: ignore[assignment]
        self._returned: dict[str, int] = {}

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
            probes[-1].last = True  # what is behind the blocks, a large head above all, is not computed
            with contextlib.suppress(_Enough):
                self.model(**inputs, use_cache=False)
        first = probes[0].stream
        assert first is not None
        return Start(first, [p.arguments for p in probes])

    def block(self, number: int, stream: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """The stream after block `number`."""
        out = self.blocks[number](stream, *arguments.positional, **arguments.named)
        return out[0] if isinstance(out, tuple) else out

    def observe(
        self,
        number: int,
        stream: torch.Tensor,
        arguments: Arguments,
        inputs: Iterable[str] = (),
        outputs: Iterable[str] = (),
    ) -> Seen:
        """What modules of block `number` read and return; the block runs no further than the last of them."""
        with captured(self.model, inputs, outputs, leave=True) as seen:
            self.block(number, stream, arguments)
        return seen

    def part(self, number: int, writer: str) -> str:
        """The direct child of block `number` that holds module `writer`, or empty if that is the writer itself."""
        inside = writer.removeprefix(f"{self.path}.{number}.")
        return inside.split(".")[0] if "." in inside else ""

    @contextmanager
    def muted(
        self, number: int, part: str, stream: torch.Tensor, arguments: Arguments, hands_on: bool = False
    ) -> Iterator[None]:
        """Block `number` without one of its parts, for a stream to which that part has already been added.

        Args:
            number: the block.
            part: a direct child, from `part`.
            stream: any stream in front of the block, to learn what the part returns.
            arguments: the block's.
            hands_on: the part returns the stream itself (post-norm) and not what is added to it.
        """
        block = self.blocks[number]
        original: nn.Module = block.get_submodule(part)
        if part not in self._returned:  # blocks are alike

            def learn(_module: nn.Module, _args: Any, out: Any) -> None:
                self._returned[part] = len(out) if isinstance(out, tuple) else 0
                raise _Enough

            hook = original.register_forward_hook(learn)
            try:
                with contextlib.suppress(_Enough):
                    self.block(number, stream, arguments)
            finally:
                hook.remove()
        setattr(block, part, _Mute(self._returned[part], hands_on))
        try:
            yield
        finally:
            setattr(block, part, original)

    def finish(self, stream: torch.Tensor, **inputs: torch.Tensor) -> Any:
        """The model's output for a stream that left the last block. `inputs` are those given to `start`."""
        with self._probes() as probes:
            probes[-1].replacement = stream
            return self.model(**inputs, use_cache=False)


@dataclass
class Seen:
    """What modules read and returned in a forward, by full name."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


class _Enough(Exception):  # (a signal, not an error: leaves a forward whose rest nobody needs)
    pass


@contextmanager
def captured(
    model: nn.Module, inputs: Iterable[str] = (), outputs: Iterable[str] = (), leave: bool = False
) -> Iterator[Seen]:
    """Remember what the named modules read (`inputs`) and return (`outputs`) in the forwards inside the block.

    With `leave`, the forward is left, and so is the `with` block, when everything named was seen.
    """
    seen = Seen()
    wanted = (set(inputs), set(outputs))

    def enough() -> None:
        if leave and seen.inputs.keys() == wanted[0] and seen.outputs.keys() == wanted[1]:
            raise _Enough

    def reader(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.inputs[name] = args[0] if args else next(iter(named.values()))
            enough()

        return hook

    def writer(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.outputs[name] = output[0] if isinstance(output, tuple) else output
            enough()

        return hook

    hooks = [model.get_submodule(n).register_forward_pre_hook(reader(n), with_kwargs=True) for n in wanted[0]]
    hooks += [model.get_submodule(n).register_forward_hook(writer(n)) for n in wanted[1]]
    try:
        yield seen
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
