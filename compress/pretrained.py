"""Directories that transformers writes: where they are, and what lies in them beside a model.

Reading a config takes no weights; reading weights maps the files, so that memory is taken only where they are used.
What transformers' loaders raise for a broken file is one error here, with the place and the remedy.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .arch import architecture, understood
from .errors import PreflightError, RecipeError
from .layout import BYTES, Layout
from .paths import package_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
SIDE_FILES = (
    "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "generation_config.json", "preprocessor_config.json", *TOKENIZER_FILES,
)  # fmt: skip


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
            f"a hub id that cannot be fetched ({one_line(error)})",
            "a local directory or a reachable hub id",
        ) from error


def _package_directory(reference: str) -> Path:
    path = package_path(reference, "model")
    if not path.is_dir():
        raise PreflightError(f"model: {reference}", "no such folder in the package", "a checkpoint directory")
    return path


def read_config(directory: Path, task: str | None = None) -> Layout:
    """The layout of a checkpoint directory, from config.json alone.

    Raises:
        PreflightError: there is no readable config.json.
        RecipeError: the architecture, the task or an attribute is not understood.
    """
    from transformers import AutoConfig

    from .moe.own import known

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
    understood(architecture(raw["model_type"], str(path)), raw, str(path))
    known(raw["model_type"])
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers' config validation raises many types; all mean the same to the user
        raise RecipeError(str(path), f"a config that transformers refuses: {one_line(error)}") from error
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
    """Optimum's task name for the class in `config.architectures`; one of tersor's own has its stock class' task."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    from .moe.own import stock_name

    name = (config.architectures or [""])[0]
    found = getattr(transformers, stock_name(name, config.model_type), None)
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
            f"{directory}: tokenizer", f"files that do not load: {one_line(error)}", "a tokenizer"
        ) from error


def read_side_files(directory: Path) -> dict[str, bytes]:
    """The small files that travel with a model."""
    return {name: (directory / name).read_bytes() for name in SIDE_FILES if (directory / name).is_file()}


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


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 300 characters."""
    return " ".join((str(error) or type(error).__name__).split())[:300]
