"""SliceGPT's algorithm (Ashkboos et al., arXiv 2401.15024) as Microsoft's code has it, as a baseline for slice.

Per-block uncentred PCA on the already compressed stream, a shortcut matrix beside every stage, the head whole and
untied. The result has no stock form, so quality is measured on the dense model with its projections put in, and speed
on a module of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from tersor.compress.calibration.batches import batches
from tersor.compress.calibration.side import Side
from tersor.compress.calibration.stages import stages
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.layout import Layout
from tersor.compress.slicing.basis import principal
from tersor.compress.slicing.fuse import fuse
from torch import nn


def classic_parameters(layout: Layout, k: int) -> int:
    """Of SliceGPT's result: every stage at width k, two shortcuts a block, the head untied and whole."""
    d, depth = layout.families["hidden"], layout.depth
    vocab = layout.families["vocab"]
    last = layout.inner_size(layout.branches(depth - 1)[-1])
    inside = layout.resized({}, untie=True).parameters - 2 * vocab * d - d * (2 * depth + 1)
    return vocab * (k + d) + inside * k // d + last * (d - k) + (2 * depth - 1) * k * k + k * d


class Classic:
    """SliceGPT's algorithm on a fused model: one projection a stage, found on the stream as compressed so far."""

    def __init__(self, checkpoint: Checkpoint, calibration: list[np.ndarray]):
        self.layout, tensors = fuse(checkpoint.layout.resized({}, untie=True), untied(checkpoint))
        self.model = Checkpoint(self.layout, tensors).model()
        self.data = batches(calibration, self.layout)

    @torch.no_grad()
    def cut(self, k: int) -> list[torch.Tensor]:
        """Projections `[d, d]` of rank k: on the embedding, then behind every stage; the last is whole."""
        side = Side.at_start(self.model, self.layout, self.data)
        found = [self._project(side, k)]
        for block in range(self.layout.depth):
            with ExitStack() as passed:
                for stage in stages(self.layout, block):
                    side.move(stage)
                    whole = block == self.layout.depth - 1 and not stage.after
                    found.append(self._project(side, self.layout.families["hidden"] if whole else k))
                    if stage.after:
                        passed.enter_context(side.without(stage))
        return found

    def _project(self, side: Side, k: int) -> torch.Tensor:
        moments = sum(s.flatten(0, 1).double().T @ s.flatten(0, 1).double() for s in side.streams)
        q = principal(moments)[:, :k]
        projection = (q @ q.T).float()
        side.streams = [stream @ projection for stream in side.streams]
        return projection

    def score(self, projections: list[torch.Tensor], judged: Callable[[Any], float]) -> float:
        """What `judged` says of the fused model with the projections put in."""
        seen: dict[str, torch.Tensor] = {}
        with ExitStack() as hooks:

            def hook(name: str, before: bool, function: Callable[..., Any]) -> None:
                module = self.model.get_submodule(name)
                register = module.register_forward_pre_hook if before else module.register_forward_hook
                hooks.callback(register(function).remove)

            first = self.layout.full(self.layout.arch.embeddings[0])
            hook(first, False, lambda _m, _a, out: out @ projections[0])
            number = 0
            for block in range(self.layout.depth):
                for stage in stages(self.layout, block):
                    number += 1

                    def remember(_m: Any, args: Any, norm: str = stage.norm) -> None:
                        seen[norm] = args[0]

                    def put_in(
                        _m: Any, _a: Any, out: Any, norm: str = stage.norm, p: torch.Tensor = projections[number]
                    ) -> Any:
                        return (seen[norm] + out) @ p - seen[norm]

                    hook(stage.norm, True, remember)
                    hook(stage.writers[0].module, False, put_in)
            return judged(self.model)


def untied(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}


def same_shapes(layout: Layout, k: int) -> Any:
    """A random Llama with the matrices of SliceGPT's result: width k, two k × k shortcuts a block, the head whole."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes, stated = layout.families, layout.config.to_dict()
    d, heads = sizes["hidden"], layout.config.num_attention_heads
    stated |= {"hidden_size": -(-k // heads) * heads, "head_dim": sizes["head_dim"], "tie_word_embeddings": False}
    with torch.random.fork_rng(devices=[]):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**stated), dtype=torch.float32).eval()
    width = model.config.hidden_size
    shortcut = torch.eye(width)
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.register_forward_pre_hook(lambda _module, args: (args[0] @ shortcut,))
    model.lm_head = nn.Linear(d, sizes["vocab"], bias=False)
    model.lm_head.register_forward_pre_hook(lambda _module, args: (nn.functional.pad(args[0], (0, d - width)),))
    return model.requires_grad_(False)
