"""Print the tree that the README shows: every module with the first sentence of its docstring."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "compress": "recipes, plans, runs, checkpoints, evaluation: everything that is neither sparse nor ONNX",
    "compress/arch": "architectures as data, one file a `model_type`",
    "compress/evaluate": "metrics, scores with intervals, gates, latency",
    "compress/passes": "passes that come with compress",
    "compress/recipe": "recipes as frozen data that knows its lines",
    "compress/slicing": "the parts of the slice pass",
    "sparse": "sparsity",
    "sparse/passes": "passes that come with sparse",
    "export": "ONNX artifacts and the client that runs them",
    "recipes": "recipes that ship, the embedded decoder and its text",
    "benchmarks": "speed and quality against named baselines; prints the tables that are quoted",
    "tests": "",
    "docs": "how the house is built, how to add a pass or an architecture",
}
WIDTH = 28


def first_sentence(path: Path) -> str:
    """What a module's docstring says first, without its own name in front."""
    text = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n\n")[0].replace("\n", " ")
    name = path.stem.strip("_")
    for prefix in (f"{name}: ", f"{name.capitalize()}: "):
        text = text.removeprefix(prefix)
    sentence = text.split(". ")[0].rstrip(".")
    return sentence[:1].lower() + sentence[1:] if sentence[1:2].islower() or sentence[1:2] == " " else sentence


def lines() -> list[str]:
    """The tree, a line a file."""
    found = []
    for folder, what in FOLDERS.items():
        if not (ROOT / folder).is_dir():
            continue
        found.append(f"{folder + '/':<{WIDTH}}{what}".rstrip())
        if folder in ("tests", "docs", "recipes", "compress/arch"):
            continue
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.stem != "__init__":
                found.append(f"{'    ' + path.name:<{WIDTH}}{first_sentence(path)}")
    return found


if __name__ == "__main__":
    print("\n".join(lines()))
