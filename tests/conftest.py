"""Tiny random models and a tiny tokenizer, built in code, for every architecture that has a file.

`tests/tiny/<model_type>.json` holds the small config (`config`) and named variations of it (`variants`) under which the
contract suite runs. Weights are drawn wider than transformers would (unit gain per layer, norm gains and biases that
are neither 0 nor 1), so that a wrong gain, a lost bias or a permuted head shows in the logits.
"""

from __future__ import annotations

import inspect
import json
import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tersor.compress.arch import architecture
from tersor.compress.checkpoint import Checkpoint, named_parameters
from tersor.compress.layout import Layout, model_class
from tersor.compress.pass_ import Context

TINY = Path(__file__).parent / "tiny"
TASKS = ("text-generation", "image-classification", "feature-extraction")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


@pytest.fixture(autouse=True)
def nothing_global_changes() -> Iterator[None]:
    """Fail a test that leaves torch's threads, default dtype or global seed changed, and put them back."""
    before = (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())
    yield
    after = (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())
    if after != before:
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])
        torch.manual_seed(before[2])
        pytest.fail(f"global (threads, dtype, seed) were {before} and are now {after}")


def tiny_config(model_type: str, variant: str = "", **changes: Any) -> Any:
    """A small transformers config of the architecture, from the data beside the suite."""
    from transformers import AutoConfig

    data = json.loads((TINY / f"{model_type}.json").read_text("utf-8"))
    return AutoConfig.for_model(
        model_type, **{**data["config"], **(data["variants"][variant] if variant else {}), **changes}
    )


def tiny_tokenizer() -> Any:
    """One token a printable ASCII character and newline, 100 entries; other characters are dropped.

    Byte-level BPE without merges, which is what transformers' own classes rebuild for some model types.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters = [byte_level.pre_tokenize_str(chr(code))[0][0] for code in (10, *range(32, 127))]
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *characters))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def tiny_checkpoint(
    model_type: str,
    task: str | None = None,
    *,
    variant: str = "",
    seed: int = 0,
    dtype: str = "float32",
    **config: Any,
) -> Checkpoint:
    """A small random model of the architecture.

    Args:
        model_type: a file of compress/arch.
        task: optimum's name; by default text generation, features or image classes, the first there is a head for.
        variant: a named variation of `tests/tiny/<model_type>.json`.
        seed: of the weights.
        dtype: of the weights.
        config: attributes that replace those of the data file.
    """
    made = tiny_config(model_type, variant, **config)
    made.dtype = getattr(torch, dtype)
    task = task or next(t for t in TASKS if t in architecture(model_type).heads)
    with torch.random.fork_rng(devices=[]):
        model = model_class(made, task)._from_config(made, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                fan = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()  # experts are stacked
                parameter.copy_(noise * (1.4 / fan**0.5))
            else:  # a gain stays around its neutral value (1, or 0 where it is stored as an offset), a bias around 0
                parameter.add_(noise * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):  # as after training: neither 0 nor 1
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    model.to(getattr(torch, dtype))
    tokenizer = tiny_tokenizer() if getattr(made, "vocab_size", 0) else None
    return Checkpoint(Layout.of(made, task, dtype), named_parameters(model), tokenizer)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Checkpoint]:
    """`tiny(model_type, task=None, *, variant="", seed=0, dtype="float32", **config) -> Checkpoint`."""
    return tiny_checkpoint


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., Path]:
    """`save_tiny(model_type, task=None, **as_tiny) -> Path`: directory of a saved tiny checkpoint with tokenizer."""

    def save(model_type: str, task: str | None = None, **options: Any) -> Path:
        directory = tmp_path / f"{model_type}-{len(list(tmp_path.iterdir()))}"
        tiny_checkpoint(model_type, task, **options).save(directory)
        return directory

    return save


@pytest.fixture(scope="session")
def write_recipe() -> Callable[..., Path]:
    """`write_recipe(folder, model, steps, name="small.yaml") -> Path`: a recipe of these passes and gates, and the
    source code that is its text, beside each other in the folder."""

    def write(folder: Path, model: Path, steps: str, name: str = "small.yaml") -> Path:
        text, path = folder / "text.txt", folder / name
        text.write_text(inspect.getsource(textwrap) + inspect.getsource(inspect)[:20000], "utf-8")
        data = f"""
recipe: 1
model: {model}
data:
  calibration: {{path: {text}, samples: 16, length: 48, span: 0%-50%}}
  heldout: {{path: {text}, samples: 12, length: 48, span: 50%-100%}}
"""
        path.write_text(data + steps.lstrip(), "utf-8")
        return path

    return write


@pytest.fixture
def small_recipe(
    tmp_path: Path, save_tiny: Callable[..., Path], write_recipe: Callable[..., Path]
) -> Callable[..., Path]:
    """`small_recipe(steps, model=None) -> Path`: a recipe of these passes, for a tiny Llama where none is given."""
    return lambda steps, model=None: write_recipe(tmp_path, model or save_tiny("llama"), steps)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny tokenizer."""
    return tiny_tokenizer()


# --- dense models as experts ------------------------------------------------------------------------------------------


def random_samples(count: int = 24, length: int = 16, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 100, length) for _ in range(count)]


@pytest.fixture(scope="session")
def samples() -> Callable[..., list[np.ndarray]]:
    """`samples(count=24, length=16, seed=0)`: random tokens, int64 `[length]` each."""
    return random_samples


@pytest.fixture(scope="session")
def converted() -> Callable[..., dict[str, Any]]:
    """`converted(checkpoint, text=samples(), **options)`: through `moe`, into 4 experts of which 2 are active and
    nothing is compared unless the options say otherwise; returns the details as the journal keeps them."""
    from tersor.compress.passes.moe import Moe

    def convert(checkpoint: Checkpoint, text: list[np.ndarray] | None = None, **options: Any) -> dict[str, Any]:
        context = Context(random_samples() if text is None else text)
        Moe(**{"experts": 4, "active": 2, "compare": False, **options}).apply(checkpoint, context)
        details: dict[str, Any] = json.loads(json.dumps(context.details))
        return details

    return convert


@pytest.fixture(scope="session")
def output() -> Callable[..., torch.Tensor]:
    """`output(checkpoint, dtype=torch.float32, **attributes)`: logits or hidden states of four samples, float64.

    The attributes replace those of every module that has them.
    """

    def forward(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, **attributes: Any) -> torch.Tensor:
        model = checkpoint.model(dtype)
        for module in model.modules():
            for name in attributes.keys() & vars(module).keys():
                setattr(module, name, attributes[name])
        with torch.no_grad():
            out = model(torch.tensor(np.stack(random_samples(4, seed=9))))
        return (out.logits if hasattr(out, "logits") else out.last_hidden_state).double()

    return forward


@pytest.fixture(scope="session")
def planted() -> Callable[[Checkpoint, int], Checkpoint]:
    """`planted(checkpoint, experts)`: the same, its gates' rows alike by group, in a scrambled order."""

    def plant(checkpoint: Checkpoint, experts: int) -> Checkpoint:
        generator = torch.Generator().manual_seed(4)
        for name, tensor in list(checkpoint.tensors.items()):
            if name.endswith("gate_proj.weight"):
                group = torch.randperm(len(tensor), generator=generator) % experts
                centres = 3 * torch.randn(experts, tensor.shape[1], generator=generator) / tensor.shape[1] ** 0.5
                checkpoint.tensors[name] = centres[group] + 0.1 * tensor
        return checkpoint

    return plant
