"""Sparse training beside dense training and the field's methods: seconds, bytes, accuracy.

    python benchmarks/swat.py speed [--plot FILE.png]
    python benchmarks/swat.py memory [--plot FILE.png]
    python benchmarks/swat.py onnx
    python benchmarks/swat.py accuracy [--mnist FOLDER] [--cifar FILE.npz] [--seeds 5] [--results FILE] [--plot FILE]
    python benchmarks/swat.py text [--seeds 3] [--results FILE] [--plot FILE]

`speed` runs forward and backward of one block, a named dense baseline and each method in turn, and prints the median
of their ratios in CPU seconds of one thread (wall clock says little on a shared machine). `accuracy` trains on
scikit-learn's digits, and on MNIST's 10,000 test images (idx files, 8,000 to train) and a CIFAR-10 subset (x_train,
y_train, x_test, y_test) where they are given; seeds are paired: the same split, weights and batches for every method.
`text` trains a byte-level Llama on the text that ships. Methods marked = have as many counted FLOPs as ours at the same
sparsity, so other steps; --only takes words in their names. --results keeps every run as it ends, and what lies there
is not trained again. --validation scores on a part cut from the training data, for choosing options. --plot draws each
table, with its name in the file's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from training.blocks import bars, memory, onnx, speed
from training.compare import compare, plot
from training.tasks import cifar, digits, mnist, text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", nargs="*", default=["speed", "memory", "onnx", "accuracy"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float, help="the highest learning rate, of all methods")
    parser.add_argument("--validation", action="store_true", help="score on a part of the training data")
    parser.add_argument("--results", type=Path, help="where runs are kept")
    parser.add_argument("--bfloat16", action="store_true", help="all methods multiply in bfloat16")
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--without-digits", action="store_true")
    parser.add_argument("--only", nargs="+", help="words in the names of methods")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "speed" in options.table:
        found = speed(options.rounds)
        if options.plot:
            bars("steps in the time of a dense one", found, options.plot.with_stem(f"{options.plot.stem}-speed"))
    if "memory" in options.table:
        shares = memory()
        if options.plot:
            bars("saved bytes, share of dense", shares, options.plot.with_stem(f"{options.plot.stem}-memory"))
    if "onnx" in options.table:
        onnx(options.rounds)
    tasks = []
    if "accuracy" in options.table:
        tasks += [] if options.without_digits else [digits(options.validation)]
        tasks += [mnist(options.mnist, options.validation)] if options.mnist else []
        tasks += [cifar(options.cifar, options.validation)] if options.cifar else []
    if "text" in options.table:
        tasks.append(text(options.validation))
    for task in tasks:
        task.steps, task.bfloat16 = options.steps or task.steps, options.bfloat16
        task.rate = options.rate or task.rate
        chosen = compare(task, options.seeds, options.only, options.results)
        if options.plot:
            word = task.name.split(",")[0].split()[0].lower()
            plot(task, chosen, options.plot.with_stem(f"{options.plot.stem}-{word}"))


if __name__ == "__main__":
    main()
