"""tersor's own classes: stock models whose FFN, which has no gate, is routed experts beside a shared one.

    y = b + down_s act(up_s x + b_s) + Σ over the chosen e of down_e act(up_e x + b_e)

No stock class of transformers has experts of this form (ReLU or GELU, biases, no gate), so the config says
`bert_routed` and plain transformers refuses the directory instead of opening it as something else; what ships is the
ONNX export. A class is its stock class with one module of each block in another's place (`Own` in compress/arch), made
when it is first asked for and known to transformers' Auto classes from then on.

A token takes the `num_experts_per_tok` experts of the largest logits, or, where the config has null experts (AdaMoE,
arXiv 2406.13233), as many of them as score above `null_score`: null experts all score that and do nothing, so that the
choice is a top-k in either case, in torch and in ONNX.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from ..arch import SUFFIX, architecture
from ..layout import model_class

PREFIX = "Routed"
"""Of the names of classes, before that of the stock one."""
EXTRA: dict[str, int | float] = {
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "expert_width": 0,
    "shared_width": 0,
    "num_null_experts": 0,
    "null_score": 0.0,
}
"""What the config says beyond the stock one's."""


class Experts(nn.Module):
    """The weights of the routed experts."""

    def __init__(self, count: int, width: int, hidden: int):
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(count, width, hidden))
        self.up_bias = nn.Parameter(torch.zeros(count, width))
        self.down_proj = nn.Parameter(torch.zeros(count, hidden, width))


class Shared(nn.Module):
    """The expert that works on every token."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden, width)
        self.down_proj = nn.Linear(width, hidden, bias=False)


class RoutedFfn(nn.Module):
    """An FFN of experts without a gate.

    Args:
        config: with the attributes of `EXTRA`.
        hidden: width of the stream.
        act: transformers' name of the activation.
    """

    def __init__(self, config: Any, hidden: int, act: str):
        from transformers.activations import ACT2FN

        super().__init__()
        self.top_k, self.act_name, self.act = config.num_experts_per_tok, act, ACT2FN[act]
        self.nulls, self.null_score = config.num_null_experts, config.null_score
        self.router = nn.Linear(hidden, config.num_experts)
        self.experts = Experts(config.num_experts, config.expert_width, hidden)
        self.shared = Shared(config.shared_width, hidden) if config.shared_width else None
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """`[…, hidden]` to the same shape."""
        x = stream.reshape(-1, stream.shape[-1])
        y = self.routed(x, self.choose(self.router(x))) + self.bias
        if self.shared is not None:
            y = y + self.shared.down_proj(self.act(self.shared.up_proj(x)))
        return y.reshape(stream.shape)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Experts `[n, top_k]` from logits `[n, experts]`; a null expert has the number behind the last."""
        count = logits.shape[1]
        if self.nulls:
            logits = nn.functional.pad(logits, (0, self.nulls), value=self.null_score)
        index = torch.topk(logits, self.top_k, dim=-1)[1]
        return index.clamp(max=count) if self.nulls else index

    def routed(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Sum of the chosen experts `index` `[n, top_k]` on tokens `[n, hidden]`."""
        y = torch.zeros_like(x)
        experts = self.experts
        for number in range(len(experts.up_proj)):
            rows = (index == number).any(1).nonzero()[:, 0]
            inner = self.act(x[rows] @ experts.up_proj[number].T + experts.up_bias[number])
            y = y.index_add(0, rows, inner @ experts.down_proj[number].T)
        return y


@cache
def config_class(model_type: str) -> Any:
    """The config class of a `model_type` that ends in `SUFFIX`, known to transformers with its models from now on."""
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoConfig

    base = architecture(model_type.removesuffix(SUFFIX))
    stock = type(AutoConfig.for_model(base.model_type))
    made = type(
        f"Routed{stock.__name__}",
        (stock,),
        {
            "model_type": model_type,
            "__annotations__": {name: type(value) for name, value in EXTRA.items()},
            **EXTRA,
            "__module__": __name__,
        },
    )
    AutoConfig.register(model_type, made)
    for task in base.heads:
        model = model_class(stock(), task)
        found = type(f"{PREFIX}{model.__name__}", (model,), {"config_class": made, "__init__": _init(model, base)})
        TasksManager.get_model_class_for_task(task, framework="pt").register(made, found)
    return made


def _init(model: Any, base: Any) -> Any:
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model.__init__(self, config, *args, **kwargs)
        path = base.blocks.removeprefix("@")
        owner = getattr(self, self.base_model_prefix, self)
        for block in owner.get_submodule(path):
            block.set_submodule(base.own.ffn, RoutedFfn(config, config.hidden_size, getattr(config, base.activation)))
            for name in base.own.passed:
                block.set_submodule(name, nn.Identity())

    return init


def stock_name(name: str, model_type: str) -> str:
    """The name of the stock class that a class of this name and `model_type` was made from: itself, or its base."""
    return name.removeprefix(PREFIX) if model_type.endswith(SUFFIX) else name


def known(model_type: str) -> None:
    """Make sure that transformers' Auto classes know the `model_type`, if it is one of tersor's own."""
    if model_type.endswith(SUFFIX):
        config_class(model_type)
