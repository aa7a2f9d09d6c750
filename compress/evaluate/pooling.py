"""How a sentence encoder's token vectors become one embedding, as the checkpoint's side files say.

sentence-transformers writes a list of modules (`modules.json`) and a `config.json` for the pooling module, in
which older versions set one of several `pooling_mode_*` switches and newer ones name a `pooling_mode`. Both
forms are read here, once, for the scorer and the exporter. What is not understood (max pooling, a Dense head)
is refused: leaving it out would give other embeddings without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import PreflightError, RecipeError

if TYPE_CHECKING:
    import torch

DEFAULT = "1_Pooling/config.json"
MODES: dict[str, Literal["mean", "cls"]] = {
    "mean": "mean",
    "mean_tokens": "mean",
    "cls": "cls",
    "cls_token": "cls",
}
SMALLEST_NORM = 1e-12  # torch.nn.functional.normalize's


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one embedding.

    Attributes:
        mode: the mean over the sequence's tokens, or the first token's vector.
        normalize: scale the embedding to length 1.
    """

    mode: Literal["mean", "cls"] = "mean"
    normalize: bool = False

    @classmethod
    def of(cls, side_files: Mapping[str, bytes]) -> Pooling:
        """Read `modules.json` and the pooling config it names; the mean, not normalised, without them.

        Raises:
            RecipeError: a module or a mode that is not one of the above.
            PreflightError: a file that is not JSON.
        """
        if "modules.json" not in side_files:
            return cls(_mode(side_files, DEFAULT)) if DEFAULT in side_files else cls()
        modules = [
            (str(m["type"]).rpartition(".")[2], str(m["path"])) for m in _json(side_files, "modules.json")
        ]
        for kind, _ in modules:
            if kind not in ("Transformer", "Pooling", "Normalize"):
                raise RecipeError("modules.json", f"a module {kind}", "Transformer, Pooling, Normalize")
        pooled = [path for kind, path in modules if kind == "Pooling"]
        mode = _mode(side_files, f"{pooled[0]}/config.json") if pooled else "mean"
        return cls(mode, any(kind == "Normalize" for kind, _ in modules))

    def as_json(self) -> dict[str, Any]:
        """For artifact.json."""
        return asdict(self)

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """One embedding a row.

        Args:
            hidden: `[batch, n, hidden]`.
            mask: `[batch, n]`, 1 on the sequence's tokens, 0 on padding behind them.

        Returns:
            `[batch, hidden]` in the dtype of `hidden`.
        """
        if self.mode == "cls":
            pooled = hidden[:, 0]
        else:
            weights = mask.to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        if self.normalize:
            pooled = pooled / pooled.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
        return pooled


def _json(side_files: Mapping[str, bytes], name: str) -> Any:
    if name not in side_files:
        raise RecipeError("modules.json", f"a pooling module without {name}", "its config beside it")
    try:
        return json.loads(side_files[name])
    except ValueError as error:
        raise PreflightError(name, f"an unreadable file ({error})", "JSON") from error


def _mode(side_files: Mapping[str, bytes], name: str) -> Literal["mean", "cls"]:
    config = _json(side_files, name)
    named = config.get("pooling_mode")
    if named is None:
        prefix = "pooling_mode_"
        modes = [key.removeprefix(prefix) for key, on in config.items() if key.startswith(prefix) and on]
    else:
        modes = [named] if isinstance(named, str) else list(named)
    if len(modes) != 1 or modes[0] not in MODES:
        raise RecipeError(name, f"pooling by {' and '.join(map(str, modes)) or 'nothing'}", "mean or cls")
    return MODES[modes[0]]
