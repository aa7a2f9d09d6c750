"""Checkpoint: the one mutable thing that flows through a run.

It owns the tensors, by the names that transformers gives them in memory; a torch module is a view built on demand
(`model()`), so that a pass changes shapes by replacing tensors and a config, and never patches modules. The module
comes from transformers' own loader, which also makes the buffers that checkpoints do not store (rotary tables).

Weights keep the dtype of their source. Scores are computed in float32 on the weights as stored.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .arch import understood
from .deferred import Deferred, Store, lent
from .errors import PreflightError, RecipeError
from .layout import BYTES, Layout, model_class
from .paths import package_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
SIDE_FILES = (
    "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "generation_config.json", "preprocessor_config.json", *TOKENIZER_FILES,
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """A promise that a pass leaves behind; re-run after every later pass and after reload.

    Attributes:
        name: what holds, for people.
        holds: (config, tensors by name) → None if it does, else what is wrong.
    """

    name: str
    holds: Callable[[PreTrainedConfig, Mapping[str, torch.Tensor]], str | None]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own progress bars and load reports: ours say what happens."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_config(directory: Path, task: str | None = None) -> Layout:
    """The layout of a checkpoint directory, from config.json alone.

    Raises:
        PreflightError: there is no readable config.json.
        RecipeError: the architecture, the task or an attribute is not understood.
    """
    from transformers import AutoConfig

    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise PreflightError(str(directory), "no config.json", "a Hugging Face checkpoint directory") from error
    except (OSError, ValueError) as error:
        raise PreflightError(str(path), f"an unreadable file ({error})", "a JSON object") from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise PreflightError(str(path), "no model_type", "the config of a transformers model")
    if raw.get("quantization_config"):
        raise RecipeError(
            f"{path}: quantization_config", "a quantised checkpoint", "plain weights", "Dequantise it first."
        )
    from .arch import architecture

    understood(architecture(raw["model_type"], str(path)), raw, str(path))
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers' config validation raises many types; all mean the same to the user
        raise RecipeError(str(path), f"a config that transformers refuses: {_one_line(error)}") from error
    config.__dict__.pop("auto_map", None)  # names code that we neither run nor carry along
    dtype = raw.get("dtype") or raw.get("torch_dtype") or stored_dtype(directory) or "float32"
    if dtype not in BYTES:
        raise RecipeError(f"{path}: dtype", repr(dtype), " or ".join(BYTES))
    return Layout.of(config, task or infer_task(config, path), dtype)


def stored_dtype(directory: Path) -> str | None:
    """Dtype of the first floating tensor in the directory's safetensors, from the file's header; None if unknown."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 100_000_000)))
            found = [names[t["dtype"]] for t in header.values() if t.get("dtype") in names]
        except (ValueError, AttributeError):  # a broken file: loading says what is wrong with it
            return None
        if found:
            return found[0]
    return None


def infer_task(config: PreTrainedConfig, path: Path) -> str:
    """Optimum's task name for the class in `config.architectures`."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    name = (config.architectures or [""])[0]
    found = getattr(transformers, name, None)
    if found is None:
        raise RecipeError(
            f"{path}: architectures", repr(name), "a transformers class", "Or state `task:` in the recipe."
        )
    try:
        return str(TasksManager.infer_task_from_model(found))
    except ValueError as error:
        raise RecipeError(
            f"{path}: architectures", repr(name), "a class with a known task", "State `task:` in the recipe."
        ) from error


@dataclass
class Checkpoint:
    """A model as data.

    Attributes:
        layout: architecture, config, task and dtype.
        tensors: every parameter and stored buffer by its in-memory name; tied names hold the same tensor.
        tokenizer: carried along, or None.
        side_files: small files that travel with the model byte for byte (tokenizer, pooling, generation defaults),
            by relative path.
        checks: promises of the passes so far.
        history: one entry a pass, for the model card.
        lean: the weights stay in their files, and float32 models over them make each weight when it is used.
    """

    layout: Layout
    tensors: dict[str, torch.Tensor]
    tokenizer: PreTrainedTokenizerBase | None = None
    side_files: dict[str, bytes] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    lean: bool = False

    @property
    def config(self) -> PreTrainedConfig:
        """The transformers config; replace it only through `become`."""
        return self.layout.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored weights."""
        found: torch.dtype = getattr(torch, self.layout.dtype)
        return found

    @classmethod
    def load(cls, directory: Path, task: str | None = None, lean: bool = False) -> Checkpoint:
        """Read a directory written by `save_pretrained`: safetensors, sharded or not, or torch files (weights only).

        Args:
            directory: where it lies.
            task: optimum's name, or None for the config's.
            lean: map the files into memory instead of reading them, where they hold the weights by their own names.

        Raises:
            PreflightError: weights missing, truncated, or not finite.
            RecipeError: see `read_config`.
        """
        layout = read_config(directory, task)
        if not any(
            (directory / name).exists() for name in (*WEIGHTS, "pytorch_model.bin", "pytorch_model.bin.index.json")
        ):
            raise PreflightError(str(directory), "no weights", " or ".join(WEIGHTS))
        if lean and (tensors := mapped(directory, layout)) is not None:
            side_files = read_side_files(directory)
            return cls(layout, tensors, load_tokenizer(directory), side_files, lean=True).verified(str(directory))
        try:
            with quiet():
                model, info = model_class(layout.config, layout.task).from_pretrained(
                    directory,
                    config=layout.config,
                    dtype=layout.dtype,
                    output_loading_info=True,
                    low_cpu_mem_usage=True,
                    ignore_mismatched_sizes=True,  # reported below, by name
                )
        except Exception as error:  # the loaders raise many types for one cause: the file is broken
            raise PreflightError(
                str(directory),
                f"weights that do not load: {_one_line(error)}",
                "a whole checkpoint",
                "Copy or download it again.",
            ) from error
        if task is not None:  # a head that the recipe's task leaves out is left out on purpose
            info["unexpected_keys"] = ()
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            wrong = sorted(_key(k) for k in info[kind])
            if wrong:
                raise PreflightError(
                    str(directory),
                    f"{len(wrong)} {kind.replace('_', ' ')}, first {wrong[0]}",
                    "the config's parameters, each once",
                )
        side_files = read_side_files(directory)
        return cls(layout, named_parameters(model), load_tokenizer(directory), side_files).verified(str(directory))

    def verified(self, place: str) -> Checkpoint:
        """The checkpoint, after `verify`."""
        self.verify(place)
        return self

    def verify(self, place: str) -> None:
        """Names and shapes are the layout's; every value is finite.

        Raises:
            PreflightError: names the first tensor that is wrong.
        """
        expected = self.layout.shapes()
        extra, lost = self.tensors.keys() - expected.keys(), expected.keys() - self.tensors.keys()
        for name in sorted(extra | lost):
            what = "a parameter that the architecture does not name" if name in extra else "a parameter missing"
            raise PreflightError(f"{place}: {name}", what, "", f"{self.layout.arch.model_type} is described in arch/.")
        for name, tensor in self.tensors.items():
            if tuple(tensor.shape) != expected[name]:
                raise PreflightError(f"{place}: {name}", f"shape {tuple(tensor.shape)}", str(expected[name]))
            if not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise PreflightError(f"{place}: {name}", f"{bad} values that are NaN or infinite", "finite weights")

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """A transformers module over these tensors, in eval mode, sharing storage where the dtype allows.

        In float32, weights of a lean checkpoint and deferred ones are made when they are used.
        """
        held = any(isinstance(t, Deferred) for t in self.tensors.values())
        return self._module(dtype, late=dtype == torch.float32 and (self.lean or held))

    def _module(self, dtype: torch.dtype, late: bool) -> PreTrainedModel:
        import copy

        seen: dict[int, torch.Tensor] = {}
        hollow = {n for n, t in self.tensors.items() if late and t.ndim > 1}
        nothing = torch.zeros((), dtype=dtype)

        def part(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return nothing.expand(tensor.shape) if name in hollow else _cast(tensor.detach(), dtype)

        state = {n: seen.setdefault(id(t), part(n, t)) for n, t in self.tensors.items()}
        config = copy.deepcopy(self.config)
        config.dtype = dtype
        with quiet():
            model = model_class(config, self.layout.task).from_pretrained(
                None, config=config, state_dict=state, dtype=dtype
            )
        model.tie_weights()
        if self.layout.arch.experts is not None and dtype == torch.float64:
            model.set_experts_implementation("eager")  # torch has no grouped product of float64
        store, made = Store(self.dtype), dict[int, torch.nn.Parameter]()
        for name in hollow:
            tensor = self.tensors[name]
            module, _, leaf = name.rpartition(".")
            weight = made.setdefault(id(tensor), torch.nn.Parameter(lent(name, tensor, store), requires_grad=False))
            setattr(model.get_submodule(module), leaf, weight)
        found: PreTrainedModel = model.eval().requires_grad_(False)
        return found

    def become(self, layout: Layout, tensors: dict[str, torch.Tensor]) -> None:
        """Take a new shape. Tensors are cast to the stored dtype once, here; tied names are tied again."""
        own = {n: layout.tensors[n].dtype for n in tensors}
        cast = {
            n: _cast(t, getattr(torch, own[n]) if own[n] else self.dtype).contiguous()
            for n, t in ((n, t.settle() if isinstance(t, Deferred) else t) for n, t in tensors.items())
            if not layout.tensors[n].shared_with
        }
        for name, tensor in layout.tensors.items():
            if tensor.shared_with:
                cast[name] = cast[tensor.shared_with]
        self.layout, self.tensors = layout, cast
        self.verify("after the pass")

    def save(self, directory: Path, card: str = "") -> None:
        """Write a plain `from_pretrained` directory: config, safetensors, tokenizer, side files, model card."""
        model = self._module(self.dtype, late=False)
        model.config.dtype = self.dtype
        with quiet(), system_errors(directory):
            model.save_pretrained(directory)
        if self.tokenizer is not None and not self.side_files.keys() & set(TOKENIZER_FILES):
            self.tokenizer.save_pretrained(directory)  # one made in code; files that were read are copied below,
            # because transformers rebuilds some tokenizers on loading and writes them out differently
        for name, content in self.side_files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if card:
            (directory / "README.md").write_text(card, "utf-8")

    def failing_checks(self) -> list[str]:
        """Checks of earlier passes that no longer hold, with what is wrong."""
        wrong = ((c.name, c.holds(self.config, self.tensors)) for c in self.checks)
        return [f"{name}: {what}" for name, what in wrong if what]


@contextlib.contextmanager
def system_errors(directory: Path) -> Iterator[None]:
    """Turn what safetensors says of a full disk into the OSError that it was."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(directory)) from error


def mapped(directory: Path, layout: Layout) -> dict[str, torch.Tensor] | None:
    """The weights of a directory by name, in memory only while they are read; None if its files name them otherwise."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, torch.Tensor] = {}
    try:
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError:  # the usual way of loading says what is wrong
        return None
    for name, tensor in layout.tensors.items():
        if tensor.shared_with in found:
            found[name] = found[tensor.shared_with]
    dtypes = {str(t.dtype).removeprefix("torch.") for t in found.values()}
    if found.keys() != layout.tensors.keys() or dtypes != {layout.dtype}:
        return None
    return {name: found[name] for name in layout.tensors}


def named_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and stored buffers by name, detached; tied names hold the same tensor object."""
    seen: dict[int, torch.Tensor] = {}
    state = model.state_dict(keep_vars=True)
    return {name: seen.setdefault(id(tensor), tensor.detach()) for name, tensor in state.items()}


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """The directory's tokenizer, or None if it has none."""
    from transformers import AutoTokenizer

    if not any(
        (directory / name).exists()
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")
    ):
        return None
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
            return tokenizer
    except Exception as error:  # as for the weights: many types, one meaning
        raise PreflightError(
            f"{directory}: tokenizer", f"files that do not load: {_one_line(error)}", "a tokenizer"
        ) from error


def read_side_files(directory: Path) -> dict[str, bytes]:
    """The small files that travel with a model."""
    return {name: (directory / name).read_bytes() for name in SIDE_FILES if (directory / name).is_file()}


def _key(found: str | tuple[Any, ...]) -> str:
    """A key of transformers' load report; a mismatched one comes with the shapes found and expected."""
    return found if isinstance(found, str) else f"{found[0]} {list(found[1])} instead of {list(found[2])}"


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]


def locate(reference: str, offline: bool = False, base: Path | None = None) -> Path:
    """The directory of a checkpoint: a local path, `package:NAME/sub/dir` for data of a package, or a hub id.

    Raises:
        PreflightError: nothing is there, or the hub cannot be asked.
    """
    if reference.startswith("package:"):
        return _package_directory(reference)
    path = Path(reference).expanduser()
    if base is not None and not path.is_absolute() and not path.exists():
        path = base / path
    if path.is_dir():
        return path
    looks_local = reference.startswith((".", "/", "~")) or reference.count("/") != 1
    if looks_local:
        raise PreflightError(f"model: {reference}", "no such directory", "a checkpoint directory or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                reference,
                local_files_only=offline or bool(os.environ.get("HF_HUB_OFFLINE")),
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*/config.json"],
            )
        )
    except Exception as error:  # network, authorisation and cache errors share one remedy
        raise PreflightError(
            f"model: {reference}",
            f"a hub id that cannot be fetched ({_one_line(error)})",
            "a local directory or a reachable hub id",
        ) from error


def _package_directory(reference: str) -> Path:
    path = package_path(reference, "model")
    if not path.is_dir():
        raise PreflightError(f"model: {reference}", "no such folder in the package", "a checkpoint directory")
    return path
