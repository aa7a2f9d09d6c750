"""What zeros in the weights are worth in a graph: products that became smaller, exactly.

    units     a product reads an input with weight zero everywhere: nobody listens. The product in front of it, and all
              elementwise work between (bias, norm, activation, gate), then need not make it: MLP units, conv filters
    gather    what is in front cannot shrink (it is read elsewhere): the product gathers the inputs it listens to
    groups    outputs in eight groups, each listening to few inputs of its own: a Gather and a small MatMul for each

ONNX Runtime multiplies dense matrices; a zero in one costs as much as any other number. These forms need no operator
of our own. Scattered zeros fit none of them and stay where they are. The pass `compact` changes a checkpoint and its
config; this works where no stock config can state the shapes (a ResNet's filters).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .ops import Ops

GROUPS = 8
WORTH = 0.5
"""Share of a product's work up to which a Gather in front of it pays (measured on 768→3072: benchmarks/swat.py)."""
SMALLEST = 1 << 8
"""Weights under which a product is not worth it."""
ELEMENTWISE = frozenset(
    ("Add", "Sub", "Mul", "Div", "Erf", "Gelu", "Relu", "Sigmoid", "Tanh", "Pow", "Clip", "LeakyRelu", "HardSwish",
     "Softplus", "Elu", "Mish", "HardSigmoid", "Swish", "BatchNormalization", "Identity", "Sqrt", "Neg", "Exp")
)  # fmt: skip


@dataclass(frozen=True)
class Product:
    """A product with a stored weight.

    Attributes:
        node: MatMul, Gemm or Conv.
        inputs: dimension of the weight that reads.
        outputs: dimension of the weight that writes.
        channel: dimension of the data that inputs and outputs are: −1, or 1 for Conv.
    """

    node: ir.Node
    inputs: int
    outputs: int
    channel: int

    @property
    def weight(self) -> np.ndarray:
        """The stored weight."""
        value = self.node.inputs[1]
        assert value is not None
        assert value.const_value is not None
        return value.const_value.numpy()

    def live(self) -> np.ndarray:
        """Inputs that any output listens to, ascending."""
        other = tuple(d for d in range(self.weight.ndim) if d != self.inputs)
        return np.flatnonzero((self.weight != 0).any(other))


def product(node: ir.Node | None) -> Product | None:
    """The node as a product, if it is one whose weight can be changed."""
    if node is None or len(node.inputs) < 2 or node.inputs[1] is None or node.inputs[1].const_value is None:
        return None
    weight = node.inputs[1].const_value
    if weight.dtype != ir.DataType.FLOAT or weight.size < SMALLEST or node.domain:
        return None
    read = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "MatMul" and len(weight.shape) == 2:
        return Product(node, 0, 1, -1)
    if node.op_type == "Gemm" and not read.get("transA", 0) and read.get("alpha", 1.0) == read.get("beta", 1.0) == 1.0:
        return Product(node, 1, 0, -1) if read.get("transB", 0) else Product(node, 0, 1, -1)
    if node.op_type == "Conv" and read.get("group", 1) == 1:
        return Product(node, 1, 0, 1)
    return None


def shrink(model: ir.Model) -> dict[str, int]:
    """Take what zeros are worth out of every product, in place.

    Returns:
        how many units left, and how many products gather or were split into groups.
    """
    graph, found = model.graph, {"units": 0, "gathered": 0, "grouped": 0}
    for number, node in enumerate(list(graph)):
        reader = product(node)
        if reader is None:
            continue
        ops, live = Ops(f"zeros{number}"), reader.live()
        width = reader.weight.shape[reader.inputs]
        between = _between(reader, width) if 0 < len(live) < width else None
        if between is not None:
            _leave(ops, reader, between, live, width)
            found["units"] += width - len(live)
        elif reader.node.op_type == "MatMul" and _split(ops, graph, reader):
            found["grouped"] += 1
        elif 0 < len(live) <= WORTH * width:
            _gather(ops, graph, reader, live)
            found["gathered"] += 1
        ops.register(graph)
    if any(found.values()):
        RemoveUnusedNodesPass()(model)
    return found


@dataclass(frozen=True)
class Between:
    """What makes a product's input: writers, and the elementwise nodes behind them."""

    writers: list[Product]
    nodes: list[ir.Node]


def _between(reader: Product, width: int) -> Between | None:  # noqa: PLR0911 (each return is one reason why not)
    """All that makes the reader's input and nothing else, back to other products; None if something else reads it."""
    start = reader.node.inputs[0]
    writers: dict[int, Product] = {}
    nodes: dict[int, ir.Node] = {}
    values: list[ir.Value] = []
    waiting = [start]
    while waiting:
        value = waiting.pop()
        if value is None or value.is_graph_output():
            return None
        producer = value.producer()
        if producer is None or len(producer.outputs) != 1:
            return None
        values.append(value)
        if id(producer) in nodes or id(producer) in writers:
            continue
        writer = product(producer)
        if writer is not None and writer.channel == reader.channel:
            if writer.weight.shape[writer.outputs] != width:
                return None
            writers[id(producer)] = writer
        elif producer.op_type in ELEMENTWISE and not producer.domain:
            nodes[id(producer)] = producer
            given = [v for v in producer.inputs if v is not None]
            waiting += [v for v in given if v.const_value is None]
            if not all(_fits(v, width, reader.channel) for v in given if v.const_value is not None):
                return None
        else:
            return None
    inside = {id(reader.node), *nodes}
    if any(id(user) not in inside for value in values for user, _ in value.uses()):
        return None
    return Between(list(writers.values()), list(nodes.values())) if writers else None


def _fits(value: ir.Value, width: int, channel: int) -> bool:
    """Whether a constant is one number, or one a channel."""
    assert value.const_value is not None
    return value.const_value.size == 1 or _place(value, width, channel) is not None


def _place(value: ir.Value, width: int, channel: int) -> int | None:
    """The dimension of a constant that counts channels; None for a single number or another form."""
    assert value.const_value is not None
    shape = list(value.const_value.shape)
    if value.const_value.size != width or width == 1:
        return None
    if len(shape) == 1:  # along the last dimension, or a BatchNormalization's parameter
        return 0
    place = len(shape) - 1 if channel == -1 else len(shape) - 3
    return place if shape[place] == width else None


def _leave(ops: Ops, reader: Product, between: Between, live: np.ndarray, width: int) -> None:
    """Take the units that are not live out of the reader, its writers and all between."""
    _keep(ops, reader.node, 1, reader.inputs, live)
    for writer in between.writers:
        _keep(ops, writer.node, 1, writer.outputs, live)
        if len(writer.node.inputs) > 2 and (bias := writer.node.inputs[2]) is not None and bias.const_value is not None:
            _keep(ops, writer.node, 2, len(bias.const_value.shape) - 1, live)
    for node in between.nodes:
        for index, value in enumerate(node.inputs):
            if value is not None and value.const_value is not None:
                place = _place(value, width, reader.channel)
                if place is not None:
                    _keep(ops, node, index, place, live)


def _keep(ops: Ops, node: ir.Node, index: int, dim: int, live: np.ndarray) -> None:
    """Replace a constant input by its live part; other users of the constant keep the whole."""
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    node.replace_input_with(index, ops.constant_array(np.take(value.const_value.numpy(), live, axis=dim)))


def _gather(ops: Ops, graph: ir.Graph, reader: Product, live: np.ndarray) -> None:
    node = reader.node
    taken = ops("Gather", node.inputs[0], ops.constant_array(live.astype(np.int64)), axis=reader.channel)
    graph.insert_before(node, ops.nodes)
    node.replace_input_with(0, taken)
    _keep(ops, node, 1, reader.inputs, live)


def _split(ops: Ops, graph: ir.Graph, reader: Product) -> bool:
    """Eight groups of outputs, each with its own inputs, if that is little enough work."""
    weight, node = reader.weight, reader.node
    if weight.shape[1] % GROUPS:
        return False
    parts = list(groups(weight))
    read = [len(live) for live, _ in parts]
    together = len(reader.live())  # one Gather for all is as good, if all read the same
    if min(read) == 0 or sum(read) > WORTH * GROUPS * len(weight) or sum(read) > 0.8 * GROUPS * together:
        return False
    answers = []
    for live, part in parts:
        taken = ops("Gather", node.inputs[0], ops.constant_array(live.astype(np.int64)), axis=-1)
        answers.append(ops("MatMul", taken, ops.constant_array(part)))
    answer, old = ops("Concat", *answers, axis=-1), node.outputs[0]
    if old.is_graph_output():
        old.name, answer.name = f"{old.name}_dense", old.name
        answer.shape, answer.type = old.shape, old.type
    old.replace_all_uses_with(answer, replace_graph_outputs=True)
    graph.insert_before(node, ops.nodes)
    graph.remove(node, safe=True)
    return True


def groups(weight: np.ndarray, count: int = GROUPS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of a weight `[in, out]`, by group of neighbouring outputs: the inputs it listens to, and its part of them."""
    for part in np.split(weight, count, axis=1):
        live = np.flatnonzero((part != 0).any(1))
        yield live, np.ascontiguousarray(part[live])


