"""Routed experts as ONNX: a placeholder while tracing, then one of several forms of the same sum.

transformers hands an expert module its tokens, the chosen experts and their weights, whatever the class
(`ExpertsInterface`), so one placeholder `tersor::Experts(x, index, weights, gate_up, down)` stands for all of them and
holds every expert, also those that the traced sample did not choose. It is filled in with

    slices           tokens sorted by expert, each expert's products on its slice, of standard operators: any runtime
    slices-int8      the same with the eight-bit products of int8.py
    slices-blocks    the same with those of nbits.py
    moe, qmoe        com.microsoft.MoE; and QMoE, eight bits in blocks of 32
    whole, whole-…   all experts as one FFN, masked by their weights: the work of a dense model

    order = NonZero of who-chose-whom by expert        y = concatenated slices, weighted, put back, summed over slots

Where a token may choose fewer (null experts, moe/own.py), `index` names the one behind the last, which has no slice;
its slot is filled with zeros.

A slice without tokens is a product of no rows, which runtimes return from at once; an `If` around each expert cost more
than it saved (at 8 tokens 1.07 × dense against 1.30 ×). All but the two products of an expert is done for all at once,
between them: with many experts it is the number of nodes that counts.

transformers' own forms either do not trace (eager, grouped) or gather a copy of the weights for every token (batched:
3.6 GB a layer at 512 tokens of a 768-wide model).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from tersor.compress.moe.own import RoutedFfn

from ..graph.ops import CONTRIB, Ops
from ..small import int8
from ..small.nbits import BLOCK, INTEGER, blocks

DOMAIN = "tersor"
PLACEHOLDER = "Experts"
ROUTED = "tersor_core"
Form = Literal[
    "slices", "slices-int8", "slices-blocks", "whole", "whole-int8", "whole-blocks", "moe", "qmoe"
]
NEVER = -1e30
"""Logit of an expert that was not chosen."""
SWIGLU: dict[str, Any] = {
    "activation_type": "swiglu", "activation_alpha": 1.0, "activation_beta": 0.0, "swiglu_fusion": 1,
}  # fmt: skip
"""How ONNX Runtime's operators are told of silu(gate) · up, gate and up woven."""


def place(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """A placeholder node for tokens `[n, hidden]`, chosen experts and weights `[n, k]`, giving `[n, hidden]`."""
    from tersor.compress.errors import RecipeError

    if module.has_bias or not module.has_gate or module.is_transposed or not module.is_concatenated:
        raise RecipeError("export", f"experts of {type(module).__name__}", "gate and up stacked, no biases")
    attributes: dict[str, Any] = {"activation": str(module.config.hidden_act), "chosen": int(top_k_index.shape[1])}
    inputs = [hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj]
    found: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{PLACEHOLDER}",
        inputs,
        attributes,
        dtype=hidden_states.dtype,
        shape=tuple(hidden_states.shape),
        version=1,
    )
    return found


def place_plain(module: RoutedFfn, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The same for experts without a gate, whose weights are one; `index` may name the one behind the last: none."""
    own = module.experts
    inputs = [x, index, torch.ones_like(index, dtype=x.dtype), own.up_proj, own.down_proj, own.up_bias]
    chosen, nulls = int(index.shape[1]), int(module.nulls)
    attributes: dict[str, Any] = {"activation": module.act_name, "chosen": chosen, "nulls": nulls}
    found: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{PLACEHOLDER}", inputs, attributes, dtype=x.dtype, shape=tuple(x.shape), version=1
    )
    return found


def prepare(model: torch.nn.Module) -> None:
    """Have the experts of a module leave placeholders; one without experts stays as it is."""
    from transformers.integrations.moe import ExpertsInterface

    if any(hasattr(module, "is_transposed") and hasattr(module, "has_gate") for module in model.modules()):
        ExpertsInterface.register(ROUTED, place)
        model.set_experts_implementation(ROUTED)  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, RoutedFfn):
            module.routed = partial(place_plain, module)  # type: ignore[method-assign]


def placeholders(graph: ir.Graph) -> list[ir.Node]:
    """The graph's placeholders, in order."""
    return [node for node in graph if node.domain == DOMAIN and node.op_type == PLACEHOLDER]


def chosen(node: ir.Node) -> int:
    """Experts that a token uses."""
    return int(node.attributes["chosen"].value)


def nulls(node: ir.Node) -> int:
    """Null experts that a token may choose instead."""
    return int(node.attributes["nulls"].value) if "nulls" in node.attributes else 0


def stored(value: ir.Value | None) -> np.ndarray:
    """The weights of a placeholder's input."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def routers(graph: ir.Graph) -> list[str]:
    """Names of the products that choose experts: rounding them would choose others."""
    found, todo = [], [node.inputs[1] for node in placeholders(graph)]
    while todo:
        value = todo.pop()
        node = None if value is None else value.producer()
        if node is None:
            continue
        if node.op_type in ("MatMul", "Gemm"):
            found.append(str(node.outputs[0].name))
        elif node.op_type != "Shape":
            todo += node.inputs
    return sorted(set(found))


def fill(graph: ir.Graph, form: Form) -> None:
    """Put `form` in the place of every placeholder, in place."""
    for number, node in enumerate(placeholders(graph)):
        ops = Ops(f"experts{number}")
        x, index, weights, *stacks = (value for value in node.inputs if value is not None)
        reads, writes, *bias = map(stored, stacks)
        act = str(node.attributes["activation"].value)
        made = Stacks(reads, writes, act, bias[0] if bias else None, nulls(node) > 0)
        if form in OPERATORS:
            answer = OPERATORS[form](ops, x, index, weights, made, chosen(node))
        else:
            layout, _, how = form.partition("-")
            answer = LAYOUTS[layout](ops, x, index, weights, made, ARITHMETIC[how or "float32"])
        ops.register(graph)
        graph.insert_before(node, ops.nodes)
        node.outputs[0].replace_all_uses_with(answer, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        for value in stacks:
            if not value.uses():
                graph.initializers.pop(str(value.name), None)
        if form not in ("slices", "whole"):
            graph.opset_imports[CONTRIB] = 1


@dataclass(frozen=True)
class Stacks:
    """All experts' weights, float32.

    Attributes:
        reads: gate over up `[experts, 2 · ffn, hidden]`, or without a gate up alone.
        writes: down `[experts, hidden, ffn]`.
        act: the activation.
        bias: of up, `[experts, ffn]`; None with a gate.
        nulls: whether a token may choose none: the number of experts stands for it.
    """

    reads: np.ndarray
    writes: np.ndarray
    act: str
    bias: np.ndarray | None = None
    nulls: bool = False


class Arithmetic:
    """How products are computed: float32."""

    def read(self, ops: Ops, x: ir.Value) -> list[ir.Value]:
        """What stands for the tokens `[n, hidden]`, line by line: what is multiplied, then what scales the result."""
        return [x]

    def product(self, ops: Ops, line: ir.Value, weight: np.ndarray) -> ir.Value:
        """The first of the lines by a weight `[out, in]`, not yet scaled."""
        return ops("MatMul", line, ops.constant_array(weight.T))

    def scaled(self, ops: Ops, y: ir.Value, lines: list[ir.Value]) -> ir.Value:
        """A product as float32."""
        return y

    def whole(self, ops: Ops, lines: list[ir.Value], weight: np.ndarray) -> ir.Value:
        """A product of all tokens."""
        return self.scaled(ops, self.product(ops, lines[0], weight), lines)

    def sliced(self, ops: Ops, lines: list[ir.Value], numbers: ir.Value, weights: np.ndarray) -> ir.Value:
        """Products of consecutive slices, as long as `numbers` say, with a weight `[out, in]` each."""
        slices = ops.split(lines[0], len(weights), numbers)
        parts = [self.product(ops, part, weight) for part, weight in zip(slices, weights, strict=True)]
        return self.scaled(ops, ops("Concat", *parts, axis=0), lines)


class Lines(Arithmetic):
    """Eight bits, a scale for every token and every output (small/int8.py)."""

    def read(self, ops: Ops, x: ir.Value) -> list[ir.Value]:
        """Eight-bit lines and their scales."""
        line, scale, _ = int8.quantized_lines(ops, x)
        return [line, scale]

    def product(self, ops: Ops, line: ir.Value, weight: np.ndarray) -> ir.Value:
        """See `Arithmetic`."""
        return int8.multiplied(ops, line, weight.T)

    def scaled(self, ops: Ops, y: ir.Value, lines: list[ir.Value]) -> ir.Value:
        """See `Arithmetic`."""
        return ops("Mul", y, lines[1])


class Blocks(Arithmetic):
    """Eight bits, a scale for every 32 inputs of an output (small/nbits.py)."""

    def product(self, ops: Ops, line: ir.Value, weight: np.ndarray) -> ir.Value:
        """See `Arithmetic`."""
        small, scale = blocks(np.ascontiguousarray(weight))
        options = {"K": weight.shape[1], "N": len(weight), "bits": 8, "block_size": BLOCK, "accuracy_level": INTEGER}
        arrays = ops.constant_array(small), ops.constant_array(scale)
        return ops("MatMulNBits", line, *arrays, domain=CONTRIB, **options)


ARITHMETIC = {"float32": Arithmetic(), "int8": Lines(), "blocks": Blocks()}


def slices(ops: Ops, x: ir.Value, index: ir.Value, weights: ir.Value, experts: Stacks, how: Arithmetic) -> ir.Value:
    """Every expert on the tokens that chose it."""
    count, width = len(experts.writes), experts.writes.shape[1]
    slots, flat = ops.size(index, 1), ops.reshape(index, -1)
    chose = ops("Equal", ops.constant(np.arange(count)[:, None]), ops.unsqueeze(flat, 0))
    order = ops("Gather", ops("NonZero", chose), ops.constant(1))
    token = ops("Div", order, slots)
    numbers = ops("ReduceSum", ops("Cast", chose, to=ir.DataType.INT64), ops.constant([1]), keepdims=0)
    read = [ops("Gather", part, token) for part in how.read(ops, x)]
    opened = how.sliced(ops, read, numbers, experts.reads)
    if experts.bias is None:
        gate, up = ops.split(opened, 2, axis=1)
        inner = ops("Mul", activated(ops, gate, experts.act), up)
    else:
        bias = ops("Gather", ops.constant_array(experts.bias), ops("Gather", flat, order))
        inner = activated(ops, ops("Add", opened, bias), experts.act)
    joined = how.sliced(ops, how.read(ops, inner), numbers, experts.writes)
    weighted = ops("Mul", joined, ops.unsqueeze(ops("Gather", ops.reshape(weights, -1), order), 1))
    start = flat
    if experts.nulls:
        weighted = ops("Concat", weighted, ops.constant(np.zeros((1, width)), np.float32), axis=0)
        start = ops("Expand", ops.size(order), ops.size(flat))  # the row behind the last: an adding ScatterND, which
        # needs none, loses sums when ONNX Runtime has several threads
    back = ops("ScatterElements", start, order, ops.range(ops.size(order)))
    shape = ops("Concat", ops.constant([-1]), slots, ops.constant([width]), axis=0)
    return ops("ReduceSum", ops("Reshape", ops("Gather", weighted, back), shape), ops.constant([1]), keepdims=0)


def whole(ops: Ops, x: ir.Value, index: ir.Value, weights: ir.Value, experts: Stacks, how: Arithmetic) -> ir.Value:
    """All experts as one FFN on every token, masked by their weights: the work of a dense model."""
    count, width, part = experts.writes.shape
    gates = spread(ops, x, index, weights, count + experts.nulls, 0.0)
    if experts.nulls:
        gates = ops("Slice", gates, ops.constant([0]), ops.constant([count]), ops.constant([1]))
    mask = ops.unsqueeze(gates, 2)
    read = how.read(ops, x)
    gate = how.whole(ops, read, experts.reads[:, :part].reshape(count * part, -1))
    if experts.bias is None:
        up = how.whole(ops, read, experts.reads[:, part:].reshape(count * part, -1))
        inner = ops("Mul", activated(ops, gate, experts.act), up)
    else:
        inner = activated(ops, ops("Add", gate, ops.constant_array(experts.bias.ravel())), experts.act)
    masked = ops.reshape(ops("Mul", ops.reshape(inner, -1, count, part), mask), -1, count * part)
    return how.whole(ops, how.read(ops, masked), experts.writes.swapaxes(0, 1).reshape(width, -1))


def activated(ops: Ops, x: ir.Value, act: str) -> ir.Value:
    """An activation by transformers' name."""
    from tersor.compress.errors import RecipeError

    if act in ("silu", "swish"):
        return ops("Mul", x, ops("Sigmoid", x))
    if act in ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        return ops("Gelu", x, approximate="none" if act == "gelu" else "tanh")
    if act == "relu":
        return ops("Relu", x)
    raise RecipeError("export", f"experts with {act}", "silu, gelu or relu")


LAYOUTS = {"slices": slices, "whole": whole}


def moe(ops: Ops, x: ir.Value, index: ir.Value, weights: ir.Value, experts: Stacks, chosen: int) -> ir.Value:
    """ONNX Runtime's MoE, which weights by a softmax over the chosen logits: it gets logarithms, and the sum after."""
    logits = spread(ops, x, index, ops("Log", weights), len(experts.writes), NEVER)
    stacks = ops.constant_array(woven(experts.reads)), None, ops.constant_array(experts.writes)
    answer = ops("MoE", x, logits, *stacks, domain=CONTRIB, k=chosen, normalize_routing_weights=1, **SWIGLU)
    return ops("Mul", answer, ops("ReduceSum", weights, ops.constant([1]), keepdims=1))


def qmoe(ops: Ops, x: ir.Value, index: ir.Value, weights: ir.Value, experts: Stacks, chosen: int) -> ir.Value:
    """ONNX Runtime's QMoE, eight bits in blocks, widths padded to whole ones; its last input are the weights."""
    gates = spread(ops, x, index, weights, len(experts.writes), 0.0)
    fill_up = -experts.writes.shape[2] % BLOCK
    up = np.pad(woven(experts.reads), ((0, 0), (0, 2 * fill_up), (0, 0)))
    down = np.pad(experts.writes, ((0, 0), (0, 0), (0, fill_up)))
    stacks: list[ir.Value | None] = []
    for stack in (up, down):
        small, scale = blocks(stack.reshape(-1, stack.shape[2]))
        stacks += [
            ops.constant_array(small.reshape(*stack.shape)),
            ops.constant_array(scale.reshape(*stack.shape[:2], -1)),
            None,
        ]
    options = {"k": chosen, "expert_weight_bits": 8, "block_size": BLOCK, "normalize_routing_weights": 0, **SWIGLU}
    unused = [None] * 6
    return ops("QMoE", x, gates, *stacks, *unused, gates, domain=CONTRIB, **options)


def spread(ops: Ops, x: ir.Value, index: ir.Value, values: ir.Value, count: int, rest: float) -> ir.Value:
    """Values of the chosen experts `[n, k]` by expert, `[n, count]`; `rest` where an expert is not chosen."""
    rows = ops("Concat", ops.size(x), ops.constant([count]), axis=0)
    others = ops("ConstantOfShape", rows, value=ir.tensor(np.array([rest], np.float32)))
    return ops("ScatterElements", others, index, values, axis=1)


def woven(reads: np.ndarray) -> np.ndarray:
    """Gate over up `[experts, 2 · ffn, hidden]` as the operators read them, gate 0, up 0, gate 1 and so on."""
    count, width, hidden = reads.shape
    return reads.reshape(count, 2, width // 2, hidden).swapaxes(1, 2).reshape(count, width, hidden)


OPERATORS = {"moe": moe, "qmoe": qmoe}
