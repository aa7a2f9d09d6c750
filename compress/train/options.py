"""What a recipe may say about training; a pass that trains inherits these fields as its own options."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ..errors import PreflightError
from ..pass_ import STRICT

Count = Annotated[int, Field(gt=0)]
EXTRA = ("accelerate", "peft")


@dataclass(frozen=True, config=STRICT)
class Training:
    """How a model is trained.

    Attributes:
        steps: updates of the weights.
        batch: rows a step and process, before `accumulate`.
        accumulate: forwards and backwards a step.
        learning_rate: the highest.
        schedule: of the learning rate behind the warm-up; `stable-decay` falls linearly in the last fifth.
        warmup: share of the steps in which the rate rises from 0.
        weight_decay: of matrices; vectors have none.
        clip: largest norm of the gradient; 0 leaves it as it is.
        optimizer: AdamW with betas 0.9 and 0.95, or SGD with momentum 0.9.
        precision: of the arithmetic; weights and optimizer state are float32. `bfloat16` (autocast) pays on GPUs
            and on cores with AMX or AVX512-BF16, and is several times slower on others: `auto` asks the machine.
        activation_checkpointing: what backward computes again instead of keeping it: `none`; `selective`, all but
            the results of matrix products and attention; `full`, all but the input of each block.
        save_every: steps between checkpoints, from which a killed training continues.
        average: so many last checkpoints are averaged into the result.
    """

    steps: Count = 300
    batch: Count = 16
    accumulate: Count = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Literal["cosine", "linear", "constant", "stable-decay"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 1.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    save_every: Count = 50
    average: Count = 1

    @property
    def in_bfloat16(self) -> bool:
        """Whether products run in bfloat16 on this machine."""
        return self.precision == "bfloat16" or (self.precision == "auto" and multiplies_bfloat16())


def needs_extra(place: str) -> None:
    """Refuse to train where the libraries for it are missing.

    Raises:
        PreflightError: says how to install them.
    """
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        found = f"no {' and no '.join(missing)}"
        raise PreflightError(place, found, "the extra `train`", "pip install 'tersor[train]'")


def multiplies_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 in hardware: the GPU if there is one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older ones than torch 2.10 cannot tell
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def fsdp2() -> Path:
    """The configuration of `accelerate launch` that shards a model over GPUs."""
    return Path(__file__).with_name("fsdp2.yaml")
