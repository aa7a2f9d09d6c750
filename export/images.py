"""A model of images as ONNX: the stock interface, `pixel_values` in and `logits` out, any number of images a call.

The graph comes from the tracer as it is; its optimiser folds each BatchNorm into the convolution before it, so that
none is left at run time, and parity judges what that did to the numbers. Height and width are fixed at
those of the images. Parity follows parity.py's rule, on real images and drawn ones, alone and together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.evaluate import OUTPUTS, Output
from tersor.compress.tokens import Input, Tokens
from torch import nn

from . import artifact, parity
from .artifact import Artifact
from .graph import trace, zeros
from .graph.core import TRACED

if TYPE_CHECKING:
    from tersor.compress.checkpoint import Checkpoint

CALL = 1 << 21
"""Numbers of a call: 13 images of 224 × 224."""
IMAGES = 8
"""Images of the parity check."""

README = """# {model_type} as ONNX

An ONNX model written by tersor: `{model_type}`, task `{task}`, opset {opset}, {parameters:,} parameters.
Input: `pixel_values`, float32 `{shape}`, prepared as preprocessor_config.json says. Output: `logits`, one row an image.

```python
import numpy as np, onnxruntime
images = np.zeros({zeros}, np.float32)
logits, = onnxruntime.InferenceSession("{file}").run(None, {{"pixel_values": images}})
```

artifact.json holds the hashes of all files and the measured distance from float64.
"""


class Pixels(nn.Module):
    """A transformers module as a function of pixels."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, labels]` of pixels `[batch, channels, height, width]`."""
        logits: torch.Tensor = self.model(pixel_values=pixel_values).logits
        return logits


def write(checkpoint: Checkpoint, directory: Path, samples: Sequence[np.ndarray], opset: int) -> dict[str, Any]:
    """Write the artifact into the empty `directory` and hold it against the checkpoint.

    Args:
        checkpoint: of images and classes.
        directory: exists and is empty.
        samples: images, float32 `[channels, height, width]`, all of one size.
        opset: of the default domain.

    Raises:
        RecipeError: there are no images, or they differ in size.
        ParityMissed: the graph disagrees with the checkpoint.
    """
    shapes = {sample.shape for sample in samples}
    if len(shapes) != 1:
        raise RecipeError("export: onnx", f"images of {len(shapes)} sizes", "one, to fix the graph's input")
    shape = list(shapes.pop())
    module = checkpoint.model(torch.float32)
    example = torch.zeros(3, *shape)
    model = trace.trace(Pixels(module), [example], ["pixel_values"], ["logits"], TRACED, axes={0: "batch"})
    model.graph.opset_imports[""] = opset
    removed = zeros.shrink(model)
    trace.save(model, directory)
    artifact.write_side_files(checkpoint, directory)
    layout = checkpoint.layout
    facts: dict[str, Any] = {
        "model": trace.MODEL_FILE,
        "model_type": layout.arch.model_type,
        "task": layout.task,
        "opset": opset,
        "precision": "float32",
        "packing": "none",
        "inputs": [{"name": "pixel_values", "dtype": "float", "shape": ["batch", *shape]}],
        "outputs": [{"name": "logits", "dtype": "float", "shape": ["batch", layout.families["labels"]]}],
        "limits": {"shape": shape},
        "parameters": layout.parameters,
        "zeros": removed,
        "produced_by": {"torch": torch.__version__},
    }
    readme = README.format(**{**facts, "file": trace.MODEL_FILE, "shape": ["batch", *shape], "zeros": (2, *shape)})
    (directory / "README.md").write_text(readme, "utf-8")
    artifact.write_manifest(directory, facts)
    figures = hold(checkpoint, ImageClient(directory, threads=1), samples)
    return artifact.write_manifest(directory, {**facts, "parity": figures})


def hold(checkpoint: Checkpoint, client: ImageClient, samples: Sequence[np.ndarray]) -> dict[str, Any]:
    """Measure and judge by parity.py's rule.

    Raises:
        ParityMissed: logits are further from float64 than the rule allows.
    """
    draw = np.random.default_rng(0)
    images = [*samples[:IMAGES], *(draw.standard_normal(samples[0].shape, np.float32) for _ in range(2))]
    pixels = torch.from_numpy(np.stack(images))
    with torch.no_grad():
        exact, single = (
            checkpoint.model(dtype)(pixel_values=pixels.to(dtype)).logits.numpy()
            for dtype in (torch.float64, torch.float32)
        )
    errors = [parity.distance(answers, exact) for answers in ([client([image])[0] for image in images], client(images))]
    figures = parity.Figures.of(errors, parity.distance(single, exact), float(np.abs(exact).max()), len(images))
    return parity.insist({"logits": figures})


class ImageClient:
    """Runs an artifact of a model of images; satisfies `Scorer`.

    Args:
        directory: an artifact.
        threads: intra-op threads of ONNX Runtime; None lets it take one a core.

    Raises:
        PreflightError: the directory is no whole artifact.
    """

    def __init__(self, directory: Path | str, threads: int | None = None):
        import onnxruntime

        self.artifact = Artifact.open(Path(directory))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        path = self.artifact.model_path
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ORT raises its own types for one cause: the file is not a model it can run
            reason = str(error).splitlines()[0][:200]
            raise PreflightError(str(path), f"a graph that does not load: {reason}", "a whole file") from error
        self.output: Output = OUTPUTS[str(self.artifact.manifest["task"])]
        self.parameters = int(self.artifact.manifest.get("parameters", 0))
        self.bytes = self.artifact.bytes
        self.shape = tuple(self.artifact.manifest["limits"]["shape"])

    def __call__(self, sequences: Sequence[Input]) -> list[np.ndarray]:
        """Answer images (float32 `[channels, height, width]`): classes `[labels]` each, float32.

        Raises:
            RecipeError: an image has another shape; says which.
        """
        images = [Tokens.of(image).ids for image in sequences]
        for number, image in enumerate(images):
            if image.shape != self.shape:
                raise RecipeError(f"image {number}", f"shape {list(image.shape)}", f"{list(self.shape)}")
        step = max(1, CALL // int(np.prod(self.shape)))
        answers: list[np.ndarray] = []
        for start in range(0, len(images), step):
            pixels = np.stack(images[start : start + step]).astype(np.float32, copy=False)
            answers += list(self.session.run(["logits"], {"pixel_values": pixels})[0])
        return answers
