"""From a torch module to one ONNX file, the same bytes every time.

The dynamo exporter writes the tracer's stack traces and absolute paths into every node; they differ from run to run
and tell where the file was made. They are stripped, together with the shapes of inner values, which ONNX Runtime
infers anyway.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import torch
from tersor.compress.errors import TersorError
from torch import nn

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
BATCHES = {0: "batch", 1: "sequence"}
EXTERNAL_ABOVE = 1 << 30
"""Bytes of weights above which they go into a file of their own: protobuf ends at 2 GiB."""


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter's notices are about its own insides; what matters is checked by parity."""
    loggers = [logging.getLogger(n) for n in ("", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def trace(
    module: nn.Module,
    examples: Sequence[torch.Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
    axes: Mapping[int, str] = BATCHES,
) -> ir.Model:
    """Export `module` with dynamic inputs, by default `[batch, sequence]`.

    Args:
        module: called with `examples` in order.
        examples: int64 `[batch, sequence]`, with sizes above 1 that differ from each other.
        inputs: names of the inputs.
        outputs: names of the outputs.
        opset: of the default domain.
        axes: the dynamic axes of every input.

    Returns:
        the model, stripped (see `strip`).
    """
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module.eval(),
                tuple(examples),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=tuple(dict(axes) for _ in examples),
                verbose=False,
            )
        except Exception as error:  # the tracer wraps whatever the model's forward raises
            raise _ours(error) or error from error
    assert program is not None
    strip(program.model)
    return program.model


def _ours(error: BaseException | None) -> TersorError | None:
    """The refusal of ours that led to `error`, if one did."""
    while error is not None and not isinstance(error, TersorError):
        error = error.__cause__
    return error


def strip(model: ir.Model) -> None:
    """Remove all metadata and the shapes of inner values, in place."""
    model.metadata_props.clear()
    model.doc_string = None
    kept = {id(v) for v in (*model.graph.inputs, *model.graph.outputs)}
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
            value.doc_string = None
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None
                if id(value) not in kept:
                    value.shape, value.type = None, None


def save(model: ir.Model, directory: Path) -> list[str]:
    """Write `model.onnx`, weights beside it where they are too many for one file. Returns the files' names."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    external = size > EXTERNAL_ABOVE
    if not external:
        (directory / DATA_FILE).unlink(missing_ok=True)  # of a larger form that lay here before
    ir.save(model, directory / MODEL_FILE, external_data=DATA_FILE if external else None)
    return [MODEL_FILE, DATA_FILE] if external else [MODEL_FILE]
