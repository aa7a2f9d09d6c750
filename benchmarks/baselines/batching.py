"""The common ways to batch sentences on a CPU: the stock export with padding, and sentence-transformers' own encode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from tersor.compress.checkpoint import Checkpoint
from tersor.export.graph.trace import trace
from torch import nn

BATCH, CALL = 32, 1024


class Stock(nn.Module):
    """The unchanged model with mean pooling under a plain mask."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> Any:
        """States and their means."""
        states = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        shown = attention_mask.unsqueeze(-1).to(states.dtype)
        return states, (states * shown).sum(1) / shown.sum(1)


def export(checkpoint: Checkpoint, folder: Path) -> None:
    """Write stock.onnx, torch's dynamo export, and stock-int8.onnx, ONNX Runtime's quantize_dynamic of it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    ids = torch.arange(14).reshape(2, 7)
    names, outputs = ["input_ids", "attention_mask", "token_type_ids"], ["last_hidden_state", "sentence_embedding"]
    model = trace(Stock(checkpoint.model()), [ids, torch.ones_like(ids), ids * 0], names, outputs, 23)
    ir.save(model, folder / "stock.onnx")
    kinds = ["MatMul", "Gemm", "Gather"]  # left alone, it takes the standard Attention for its own and breaks it
    options = {"op_types_to_quantize": kinds, "weight_type": QuantType.QInt8}
    quantize_dynamic(folder / "stock.onnx", folder / "stock-int8.onnx", **options)


def session(path: Path, threads: int, fused: bool = False) -> onnxruntime.InferenceSession:
    """The stock file opened without SkipLayerNormFusion, which makes it up to a tenth faster, or (`fused`) with it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    off = [] if fused else ["SkipLayerNormFusion"]
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=off)


def padded(ids: Sequence[np.ndarray], numbers: Sequence[int], width: int = 0) -> dict[str, np.ndarray]:
    """The feed of one batch, padded to `width` or the longest."""
    width = width or max(len(ids[n]) for n in numbers)
    tokens = np.zeros((len(numbers), width), np.int64)
    mask = np.zeros_like(tokens)
    for row, n in enumerate(numbers):
        tokens[row, : len(ids[n])], mask[row, : len(ids[n])] = ids[n], 1
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": tokens * 0}


def budgeted(ids: Sequence[np.ndarray], order: Sequence[int]) -> Iterator[list[int]]:
    """Batches of about `CALL` tokens, padding included."""
    batch: list[int] = []
    for n in order:
        if batch and (len(batch) + 1) * len(ids[n]) > CALL:
            yield batch
            batch = []
        batch.append(int(n))
    yield batch


def encoder(folder: Path, longest: int) -> Callable[[list[str]], Any] | None:
    """sentence-transformers' encode of a checkpoint's folder, as a user calls it; None where it is not installed."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return None
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = longest
    return lambda texts: model.encode(texts, batch_size=BATCH, show_progress_bar=False)
