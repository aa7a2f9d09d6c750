"""README.md of an artifact: what goes in, what comes out, and the few lines that feed it from three languages.

The lines need ONNX Runtime and nothing of ours. Tests run them: Python in tests/test_export.py, JavaScript in headless
Chromium, and its C++ is compiled and run (tests/test_languages.py, `make test-browser`, `make test-cpp`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

README = """# {title}

An ONNX model written by tersor: `{model_type}`, task `{task}`, opset {opset}, {parameters:,} parameters.
Inputs: {inputs}, int64 `[{rows}]`. Outputs: {outputs}.

{interface}

## Python

```python
{python}
```

With tersor installed, `tersor.export.client.Client(directory)` takes sequences in any order, packs them, and answers in
that order. artifact.json holds the limits, the hashes of all files and the measured distance from float64.
{others}"""

OTHERS = """
## C++

```cpp
{cpp}
```

## JavaScript

In a browser or Node.js, with onnxruntime-web (`onnxruntime-node` is the same but for its name):

```javascript
{javascript}
```
"""

PACKED = """In `attention_mask` 0 is padding and k ≥ 1 is the number of the segment in its row: a plain 0/1 mask is the
ordinary case, and several sequences may lie side by side in one row without seeing each other. {per_sequence}"""

PADDED = "`attention_mask` is 1 at tokens and 0 at padding."

TREES = """ A segment −k goes on from the last positive one before it in its row, also behind others that do:
several answers share one context, computed once, without seeing each other."""
TYPES = " `token_type_ids` is 0, and 1 at the second of two texts in one sequence."

PACKED_CODE = """import numpy as np, onnxruntime
sequences = [{examples}]  # token ids
ids = np.concatenate(sequences)[None]
segments = np.repeat(np.arange(len(sequences)) + 1, [len(s) for s in sequences])[None]
outputs = onnxruntime.InferenceSession("{file}").run(None, {feed})"""

PADDED_CODE = """import numpy as np, onnxruntime
sequences = [{examples}]  # token ids
segments = np.array([[i < len(s) for i in range(max(map(len, sequences)))] for s in sequences], np.int64)
ids = np.zeros_like(segments); ids[segments == 1] = np.concatenate(sequences)
outputs = onnxruntime.InferenceSession("{file}").run(None, {feed})"""

STATIC_CODE = """import numpy as np, onnxruntime
sequences = [{examples}]  # token ids
ids, segments = np.zeros((2, {rows}, {width}), np.int64); n = sum(map(len, sequences))  # all in the first row
ids[0, :n], segments[0, :n] = np.concatenate(sequences), np.repeat([1, 2], [len(s) for s in sequences])
outputs = onnxruntime.InferenceSession("{file}").run(None, {feed})"""

CPP = """#include <onnxruntime_cxx_api.h>
#include <array>
#include <cstdint>
#include <cstdio>
#include <vector>

int main() {
  const std::vector<std::vector<int64_t>> sequences = {<examples>};  // token ids
  std::vector<int64_t> ids, segments;
  for (size_t k = 0; k < sequences.size(); ++k) {
    ids.insert(ids.end(), sequences[k].begin(), sequences[k].end());
    segments.insert(segments.end(), sequences[k].size(), int64_t(k + 1));
  }<padding>
  const std::array<int64_t, 2> shape = {<shape>};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const auto tensor = [&](std::vector<int64_t>& v) {
    return Ort::Value::CreateTensor<int64_t>(memory, v.data(), v.size(), shape.data(), shape.size());
  };
  Ort::Env env;
  Ort::Session session(env, "<file>", Ort::SessionOptions{});
  const char* inputs[] = {<inputs>};
  const char* names[] = {"<output>"};
  Ort::Value feed[] = {<feed>};
  const auto outputs = session.Run(Ort::RunOptions{}, inputs, feed, <count>, names, 1);
  const auto info = outputs[0].GetTensorTypeAndShapeInfo();  // .GetShape()
  const float* answers = outputs[0].GetTensorData<float>();
  std::printf("%s: %zu values, the first %g\\n", names[0], info.GetElementCount(), answers[0]);
}"""

JAVASCRIPT = """import * as ort from "onnxruntime-web";
const sequences = [{examples}];  // token ids
const ids = BigInt64Array.from(sequences.flat(), BigInt);
const segments = BigInt64Array.from(sequences.flatMap((s, k) => s.map(() => k + 1)), BigInt);
const tensor = data => new ort.Tensor("int64", data, [1, data.length]);
const session = await ort.InferenceSession.create("{file}");
const outputs = await session.run({feed});"""

STATIC_JAVASCRIPT = """import * as ort from "onnxruntime-web";
const sequences = [{examples}];  // token ids, {width} at most in a row; all in the first
const ids = new BigInt64Array({cells}), segments = new BigInt64Array({cells});
ids.set(sequences.flat().map(BigInt));
segments.set(sequences.flatMap((s, k) => s.map(() => BigInt(k + 1))));
const tensor = data => new ort.Tensor("int64", data, [{rows}, {width}]);
const session = await ort.InferenceSession.create("{file}");
const outputs = await session.run({feed});"""


def _feed(facts: Mapping[str, Any], values: Mapping[str, str], quoted: bool) -> str:
    mark = '"' if quoted else ""
    return "{" + ", ".join(f"{mark}{i['name']}{mark}: {values[i['name']]}" for i in facts["inputs"]) + "}"


def _examples(facts: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    high = facts["limits"]["vocab"] - 1
    return [min(n, high) for n in (7, 8, 9)], [min(n, high) for n in (4, 5)]


def python(facts: Mapping[str, Any]) -> str:
    """Five lines of Python that run the artifact with numpy and ONNX Runtime alone."""
    values = {"input_ids": "ids", "attention_mask": "segments", "token_type_ids": "ids * 0"}
    code = {"padded": PADDED_CODE, "packed": PACKED_CODE, "packed-static": STATIC_CODE}[facts["packing"]]
    examples = ", ".join(map(str, _examples(facts)))
    fixed = facts.get("static") or {}
    feed = _feed(facts, values, quoted=True)
    return code.format(examples=examples, file=facts["model"], feed="@", **fixed).replace("@", feed)


def javascript(facts: Mapping[str, Any]) -> str:
    """The same in JavaScript, for packed input."""
    values = {
        "input_ids": "tensor(ids)",
        "attention_mask": "tensor(segments)",
        "token_type_ids": "tensor(ids.map(() => 0n))",
    }
    fixed = facts.get("static") or {}
    cells = fixed.get("rows", 0) * fixed.get("width", 0)
    examples = ", ".join(map(str, _examples(facts)))
    code = STATIC_JAVASCRIPT if fixed else JAVASCRIPT
    feed = _feed(facts, values, quoted=False)
    return code.format(examples=examples, file=facts["model"], feed="@", cells=cells, **fixed).replace("@", feed)


def cpp(facts: Mapping[str, Any]) -> str:
    """The same in C++, for packed input."""
    names, fixed = [i["name"] for i in facts["inputs"]], facts.get("static")
    made = {"input_ids": "tensor(ids)", "attention_mask": "tensor(segments)", "token_type_ids": "tensor(types)"}
    padding = ""
    if fixed is not None:
        padding = f"\n  ids.resize({fixed['rows']} * {fixed['width']}), segments.resize(ids.size());"
    if "token_type_ids" in names:
        padding += "\n  std::vector<int64_t> types(ids.size());"
    shape = "1, int64_t(ids.size())" if fixed is None else f"{fixed['rows']}, {fixed['width']}"
    examples = ", ".join("{" + ", ".join(map(str, ids)) + "}" for ids in _examples(facts))
    values = {
        "examples": "{" + examples + "}",
        "padding": padding,
        "shape": shape,
        "file": facts["model"],
        "inputs": ", ".join(f'"{n}"' for n in names),
        "output": facts["outputs"][-1]["name"],
        "feed": ", ".join(made[n] for n in names),
        "count": str(len(names)),
    }
    code = CPP.replace("{<examples>}", "<examples>")
    for name, value in values.items():
        code = code.replace(f"<{name}>", value)
    return code


def write(directory: Path, facts: Mapping[str, Any]) -> None:
    """Write README.md into an artifact's directory; `facts` as in artifact.json."""
    last = facts["outputs"][-1]["name"]
    each = last == "sentence_embedding" or facts["task"] == "text-classification"
    order = f"`{last}` has one row a sequence, row by row in the order in which segments begin."
    if facts.get("static"):
        order = f"`{last}[r, k - 1]` belongs to segment k of row r."
    padded = facts["packing"] == "padded"
    interface = PADDED if padded else PACKED.format(per_sequence=order if each else "").strip()
    interface += TREES * bool(facts.get("trees"))
    interface += TYPES * any(i["name"] == "token_type_ids" for i in facts["inputs"])
    text = README.format(
        title=f"{facts['model_type']} as ONNX, {facts['packing']} input",
        model_type=facts["model_type"],
        task=facts["task"],
        opset=facts["opset"],
        parameters=facts["parameters"],
        inputs=", ".join(f"`{i['name']}`" for i in facts["inputs"]),
        rows=", ".join(map(str, facts["inputs"][0]["shape"])),
        outputs=", ".join(f"`{o['name']}` `[{', '.join(map(str, o['shape']))}]`" for o in facts["outputs"]),
        interface=interface,
        python=python(facts),
        others="" if padded else OTHERS.format(cpp=cpp(facts), javascript=javascript(facts)),
    )
    (directory / "README.md").write_text(text, "utf-8")
