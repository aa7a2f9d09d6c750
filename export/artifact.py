"""The artifact: a directory that any ONNX Runtime opens without tersor.

    model.onnx (model.onnx.data)   the graph
    config.json, tokenizer files   as in the checkpoint
    artifact.json                  inputs, outputs, limits, pooling, parity, SHA-256 of every file
    README.md                      how to run it, in a few lines

artifact.json is read as untrusted input: file names that leave the directory are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tersor.compress.errors import PreflightError

if TYPE_CHECKING:
    from tersor.compress.checkpoint import Checkpoint

MANIFEST = "artifact.json"
FORMAT = 1


@dataclass(frozen=True)
class Artifact:
    """artifact.json, checked.

    Attributes:
        directory: where it lies.
        manifest: the whole of artifact.json.
    """

    directory: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> Artifact:
        """Read artifact.json.

        Raises:
            PreflightError: it is missing or broken, names a file outside the directory, or a file is missing.
        """
        place = directory / MANIFEST
        try:
            manifest = json.loads(place.read_text("utf-8"))
        except FileNotFoundError as error:
            raise PreflightError(
                str(directory), f"no {MANIFEST}", "a directory that `tersor export` wrote"
            ) from error
        except (OSError, ValueError) as error:
            raise PreflightError(str(place), f"an unreadable file ({error})", "a JSON object") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise PreflightError(str(place), "an unknown format", f"an artifact of format {FORMAT}")
        missing = [
            k
            for k in ("inputs", "outputs", "files", "limits", "task", "packing", "model")
            if k not in manifest
        ]
        if missing:
            raise PreflightError(str(place), f"no {missing[0]}", "a whole manifest", "Export again.")
        for name in (*manifest["files"], manifest["model"]):
            resolve(directory, name)
        return cls(directory, manifest)

    @property
    def model_path(self) -> Path:
        """The graph's file."""
        return resolve(self.directory, self.manifest["model"])

    @property
    def packed(self) -> bool:
        """Whether a row may hold several segments."""
        return bool(self.manifest["packing"] != "padded")

    @property
    def trees(self) -> bool:
        """Whether a segment may go on from another, so that answers share their context."""
        return bool(self.manifest.get("trees"))

    @property
    def static(self) -> tuple[int, int] | None:
        """Rows and width of every call, or None where shapes are free."""
        fixed = self.manifest.get("static")
        return None if fixed is None else (int(fixed["rows"]), int(fixed["width"]))

    def per_sequence(self, output: str) -> bool:
        """Whether an output has one entry a sequence, not one a token."""
        return output == "sentence_embedding" or self.manifest["task"] == "text-classification"

    @property
    def inputs(self) -> list[str]:
        """Input names."""
        return [i["name"] for i in self.manifest["inputs"]]

    @property
    def vocab(self) -> int:
        """Token ids run below this."""
        return int(self.manifest["limits"]["vocab"])

    @property
    def max_length(self) -> int | None:
        """Longest sequence, or None where nothing bounds it."""
        limit = self.manifest["limits"]["max_length"]
        return None if limit is None else int(limit)

    @property
    def token_types(self) -> int:
        """Token types run below this; 1 where the model reads none."""
        return int(self.manifest["limits"].get("token_types") or 1)

    @property
    def pooling(self) -> dict[str, Any]:
        """How `sentence_embedding` is made."""
        return dict(self.manifest.get("pooling") or {})

    @property
    def bytes(self) -> int:
        """Size of the graph and its data."""
        return sum(
            (self.directory / n).stat().st_size for n in self.manifest["files"] if n.startswith("model.onnx")
        )

    def changed(self) -> list[str]:
        """Files whose content is not what was written."""
        return [n for n, digest in self.manifest["files"].items() if sha256(self.directory / n) != digest]


def resolve(directory: Path, name: Any) -> Path:
    """The path of a file that a manifest names.

    Raises:
        PreflightError: the name leaves the directory, by `..`, an absolute path or a link, or nothing is there.
    """
    path = PurePosixPath(name) if isinstance(name, str) and name and "\\" not in name else None
    inside = path is not None and not path.is_absolute() and ".." not in path.parts
    if not inside or not (directory / str(name)).resolve().is_relative_to(directory.resolve()):
        raise PreflightError(f"{directory / MANIFEST}: files", f"{name!r}", "a path inside the directory")
    found = directory / str(name)
    if not found.is_file():
        raise PreflightError(
            str(found), "no such file", "every file that artifact.json lists", "Export again."
        )
    return found


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_side_files(checkpoint: Checkpoint, directory: Path) -> None:
    """Config, tokenizer and small files, as the checkpoint has them."""
    checkpoint.config.save_pretrained(directory)
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save_pretrained(directory)
    for name, content in checkpoint.side_files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_manifest(directory: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write artifact.json over all files in `directory`; returns its content."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    hashes = {p.relative_to(directory).as_posix(): sha256(p) for p in files}
    manifest = {"format": FORMAT, "exporter": "onnx", **facts, "files": hashes}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    return manifest
