"""Writing ONNX nodes by hand: a few lines over onnx-ir, with names that are the same in every export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

CONTRIB = "com.microsoft"
"""ONNX Runtime's own operators; every build of it has those used here, the browser's included."""
LAST = 2**31 - 1


class Ops:
    """Collects nodes and constants: `ops("Add", a, b)` is the sum.

    Args:
        prefix: of every name.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Value] = {}

    def __call__(self, operator: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one output."""
        name = f"{self.prefix}_{len(self.nodes)}_{operator}"
        output = ir.Value(name=name)
        self.nodes.append(
            ir.node(operator, list(inputs), attributes, domain=domain, outputs=[output], name=f"{name}_node")
        )
        return output

    def split(self, x: ir.Value, count: int, sizes: ir.Value | None = None, axis: int = 0) -> list[ir.Value]:
        """Parts along an axis in one node: equal ones, or as long as `sizes` `[count]` say."""
        name = f"{self.prefix}_{len(self.nodes)}_Split"
        outputs = [ir.Value(name=f"{name}_{number}") for number in range(count)]
        inputs, attributes = ([x], {"num_outputs": count}) if sizes is None else ([x, sizes], {})
        self.nodes.append(ir.node("Split", inputs, {"axis": axis, **attributes}, outputs=outputs, name=f"{name}_node"))
        return outputs

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """An initializer, one for each distinct value."""
        array = np.array(value, dtype)
        key = f"{array.dtype}_{array.shape}_{array.ravel().tolist()}"
        if key not in self.constants:
            name = f"{self.prefix}_constant_{len(self.constants)}"
            self.constants[key] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        return self.constants[key]

    def constant_array(self, array: np.ndarray) -> ir.Value:
        """An initializer of its own, for weights."""
        name = f"{self.prefix}_array_{len(self.constants)}"
        value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
        self.constants[name] = value
        return value

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """To a fixed shape, −1 for what is left."""
        return self("Reshape", x, self.constant(list(shape)))

    def squeeze(self, x: ir.Value, axis: int = 0) -> ir.Value:
        """Without one dimension."""
        return self("Squeeze", x, self.constant([axis]))

    def unsqueeze(self, x: ir.Value, axis: int) -> ir.Value:
        """With one more dimension."""
        return self("Unsqueeze", x, self.constant([axis]))

    def slice(self, x: ir.Value, start: int, end: int = LAST) -> ir.Value:
        """`x[start:end]` on axis 0."""
        return self("Slice", x, self.constant([start]), self.constant([end]), self.constant([0]))

    def nonzero(self, x: ir.Value) -> ir.Value:
        """Indices, `[n]`, at which a vector is not zero."""
        return self.squeeze(self("NonZero", x))

    def size(self, x: ir.Value, axis: int = 0) -> ir.Value:
        """Length of an axis as `[1]`."""
        return self("Shape", x, start=axis, end=axis + 1)

    def range(self, end: ir.Value) -> ir.Value:
        """0, 1, … below `end` (`[1]`)."""
        return self("Range", self.constant(0), self.squeeze(end), self.constant(1))

    def count(self, flags: ir.Value) -> ir.Value:
        """Rank of each position among the true ones: cumulative count − 1."""
        ones = self("Cast", flags, to=ir.DataType.INT64)
        return self("Sub", self("CumSum", ones, self.constant(0)), self.constant([1]))

    def either(self, condition: ir.Value, *branches: Callable[[Ops], list[ir.Value]]) -> list[ir.Value]:
        """What the first of two functions writes where the condition (a scalar) holds, else what the second writes."""
        name, graphs, count = f"{self.prefix}_{len(self.nodes)}_If", {}, 0
        for attribute, branch in zip(("then_branch", "else_branch"), branches, strict=True):
            ops = Ops(f"{name}_{attribute}")
            ops.constants = self.constants
            made = [v if v.producer() in ops.nodes else ops("Identity", v) for v in branch(ops)]
            graphs[attribute] = ir.Graph([], made, nodes=ops.nodes, name=ops.prefix)
            count = len(made)
        outputs = [ir.Value(name=f"{name}_{number}") for number in range(count)]
        self.nodes.append(ir.node("If", [condition], graphs, outputs=outputs, name=f"{name}_node"))
        return outputs

    def register(self, graph: ir.Graph) -> None:
        """Give the constants to `graph`."""
        for value in self.constants.values():
            graph.register_initializer(value)
        self.constants.clear()
