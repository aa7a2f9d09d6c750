"""Which form a mixture's experts take (experts.py): by a rule, or by a clock.

The rule (`auto`) is the outcome of benchmarks/moe.py. Choosing costs nodes, and products of few rows; it pays at 1, 8,
128 and 512 tokens alike where an expert is large and a token passes over enough of them (`PAYS`). There slices are the
fastest in float32, and in the int8 of an encoder or scorer, whose arithmetic they keep; a decoder with eight-bit blocks
takes QMoE, which reads one token's weights fastest, where its kernel takes the widths. Elsewhere the experts stay the
dense FFN that they were cut from, masked (`whole`): such a mixture is no faster than its dense model, and the exporter
says so. Fixed shapes leave `whole` alone.

`measure` times every form on the first block's own weights at `TOKENS`, interleaved, and takes the one with the best
mean ratio among those that are never slower than `whole`, which does the work of the dense FFN; `whole` if there is
none. What a clock decides may differ from run to run, so it is asked for and not the default.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir
from tersor.compress.errors import RecipeError
from tersor.compress.layout import Layout

from .. import runtime
from ..graph.ops import CONTRIB
from ..small.nbits import BLOCK
from . import experts

Word = Literal["auto", "slices", "operator", "whole", "measure"]
Precision = Literal["float32", "int8", "blocks"]
TOKENS = (1, 8, 128, 512)
REPEATS = {1: 40, 8: 30, 128: 9, 512: 5}
OPERATOR = "experts as ONNX Runtime's operator"
PAYS: dict[Precision, int] = {"float32": 36_864, "int8": 294_912, "blocks": 18_432}
"""Weights of one expert, times the share of experts that a token does not choose, from which on choosing is at no size
slower than `whole` (`python benchmarks/moe.py forms`)."""
MOST: dict[Precision, float] = {"float32": 2 / 3, "int8": 2 / 3, "blocks": 0.4}
"""Share of chosen experts up to which it is."""
EVEN = 0.97
"""A ratio to `whole` that passes for equal on a busy machine."""
Speeds = dict[experts.Form, dict[str, float]]
"""Of each form, as a multiple of the first one's, by tokens."""
SUFFIX = {"float32": "", "int8": "-int8", "blocks": "-blocks"}


def form_of(word: Word, precision: Precision, layout: Layout, static: bool = False) -> experts.Form:
    """The form that the rule gives; for `measure` the one to begin with.

    Raises:
        RecipeError: fixed shapes or an activation that the form cannot have.
    """
    if static:
        if word not in ("auto", "whole"):
            raise RecipeError("export: experts", f"{word} with inputs packed-static", "auto or whole")
        word = "whole"
    fits = fits_operator(layout, precision)
    if word == "operator":
        runtime.require(OPERATOR, "export: experts")
    if word == "operator" and not fits:
        raise RecipeError("export: experts", "operator, whose kernel needs silu and widths of 32", "slices")
    if word == "auto" and not pays(layout, precision):
        word = "whole"
    if word == "operator" or (word == "auto" and precision == "blocks" and fits and runtime.knows(OPERATOR)):
        return "moe" if precision == "float32" else "qmoe"
    found: experts.Form = f"{'whole' if word == 'whole' else 'slices'}{SUFFIX[precision]}"  # type: ignore[assignment]
    return found


def pays(layout: Layout, precision: Precision) -> bool:
    """Whether it is worth to compute the chosen experts alone, at every number of tokens.

    With null experts a token chooses fewer than it may; then at most a half of the experts is taken for chosen.
    """
    routed = layout.arch.experts
    assert routed is not None
    count, width = layout.families["experts"], layout.families["ffn"]
    share = int(getattr(layout.config, routed.active)) / count
    if getattr(layout.config, "num_null_experts", 0):
        share = min(share, 0.5)
    weights = (3 if routed.gated else 2) * width * layout.families["hidden"]
    return share <= MOST[precision] and (1 - share) * weights >= PAYS[precision]


def note_of(word: Word, form: experts.Form, layout: Layout, static: bool = False) -> tuple[str, ...]:
    """What a user should know of an answer that was not asked for: nothing, unless it keeps the dense form."""
    if word not in ("auto", "measure") or static or not form.startswith("whole"):
        return ()
    size = f"{layout.families['ffn']} × {layout.families['hidden']}"
    return (
        f"experts: {form}: of {size} they are too small, or too many are chosen, to pass over the others; "
        "the file is no faster than the dense model's (fewer and larger experts would be)",
    )


def fits_operator(layout: Layout, precision: Precision) -> bool:
    """Whether ONNX Runtime's operators take the model's experts."""
    gated = layout.arch.experts is not None and layout.arch.experts.gated
    silu = gated and getattr(layout.config, layout.arch.activation) in ("silu", "swish")
    return silu and (precision == "float32" or layout.families["hidden"] % BLOCK == 0)


def candidates(precision: Precision, layout: Layout) -> list[experts.Form]:
    """Forms that `measure` compares, `whole` first."""
    operator = fits_operator(layout, precision) and runtime.knows(OPERATOR)
    words: list[Word] = ["whole", "slices", *(["operator"] if operator else [])]  # type: ignore[list-item]
    found = [form_of(word, precision, layout) for word in words]
    return [*found, "slices-blocks"] if precision == "int8" else found


def measured(graph: ir.Graph, forms: Sequence[experts.Form]) -> tuple[experts.Form, Speeds]:
    """The best form for the graph's first placeholder, and how fast each is."""
    import onnxruntime

    node = experts.placeholders(graph)[0]
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    sessions = [
        onnxruntime.InferenceSession(ir.to_proto(alone(node, form)).SerializeToString(), options) for form in forms
    ]
    ratios: Speeds = {form: {} for form in forms}
    for count in TOKENS:
        feed = drawn(node, count)
        times: list[list[float]] = [[] for _ in forms]
        for number in range(REPEATS[count] + 1):
            for seconds, session in zip(times, sessions, strict=True):
                began = time.perf_counter()
                session.run(None, feed)
                if number:  # the first call warms up
                    seconds.append(time.perf_counter() - began)
        for form, seconds in zip(forms, times, strict=True):
            ratios[form][str(count)] = statistics.median(a / b for a, b in zip(times[0], seconds, strict=True))
    return best(ratios), ratios


def best(ratios: Speeds) -> experts.Form:
    """The form with the largest mean ratio among those that are nowhere slower; the first, which is 1, is."""
    fair = [form for form, each in ratios.items() if min(each.values()) >= EVEN]
    return max(fair, key=lambda form: math.prod(ratios[form].values()))


def alone(node: ir.Node, form: experts.Form) -> ir.Model:
    """A model of one placeholder: `x`, `index`, `weights` in, `y` out."""
    weights = [experts.stored(value) for value in node.inputs[3:]]
    width, count = weights[0].shape[2], experts.chosen(node)
    inputs = [
        _value("x", ir.DataType.FLOAT, width),
        _value("index", ir.DataType.INT64, count),
        _value("weights", ir.DataType.FLOAT, count),
    ]
    stacks = [ir.Value(name=f"stack_{n}", const_value=ir.tensor(w, name=f"stack_{n}")) for n, w in enumerate(weights)]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    copy = ir.node(node.op_type, [*inputs, *stacks], attributes, domain=node.domain)
    graph = ir.Graph(inputs, list(copy.outputs), nodes=[copy], initializers=stacks, opset_imports={"": 23, CONTRIB: 1})
    experts.fill(graph, form)
    answer = graph.outputs[0]
    answer.name, answer.type, answer.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["tokens", width])
    return ir.Model(graph, ir_version=10)


def _value(name: str, kind: ir.DataType, width: int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(["tokens", width]), type=ir.TensorType(kind))


def drawn(node: ir.Node, tokens: int) -> dict[str, np.ndarray]:
    """Random tokens, each with experts of its own; with null experts, as often one of them."""
    count, _, width = experts.stored(node.inputs[3]).shape
    draw = np.random.default_rng(0)
    index = np.argsort(draw.random((tokens, count + experts.nulls(node))), axis=1)[:, : experts.chosen(node)]
    index = np.minimum(index, count).astype(np.int64)
    weights = np.full(index.shape, 1 / index.shape[1], np.float32)
    return {"x": draw.standard_normal((tokens, width), np.float32), "index": index, "weights": weights}
