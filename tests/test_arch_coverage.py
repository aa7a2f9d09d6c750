"""The table of architectures × passes × exporters has no empty promise: what says yes is run, what says no says why."""

from __future__ import annotations

import numpy as np
import pytest
from tersor.compress.arch import architecture, names
from tersor.compress.coverage import FORMS, cell, form, main_task, table
from tersor.compress.errors import RecipeError
from tersor.compress.pass_ import Context

PASSES = [column for column, (name, _) in FORMS.items() if name != "onnx"]
EXPORTS = [column for column in FORMS if column not in PASSES]
QUICK = {"gpt2", "roberta"}  # late positions, transposed weights; the others take minutes together


def samples(checkpoint, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    if checkpoint.layout.arch.inputs == "pixels":
        return [rng.normal(size=(3, 16, 16)).astype(np.float32) for _ in range(count)]
    return [rng.integers(4, 100, 16 + number % 8) for number in range(count)]


@pytest.fixture(scope="module")
def promised() -> dict[str, dict[str, str]]:
    return table()


def test_every_architecture_has_a_row(promised):
    assert set(promised) == {architecture(name).model_type for name in names()}
    assert all(set(row) == set(FORMS) for row in promised.values())
    assert any(row["slice hidden"] for row in promised.values())
    assert any(not row["slice hidden"] for row in promised.values())


@pytest.mark.parametrize("column", PASSES)
@pytest.mark.parametrize("name", names())
def test_a_pass_does_what_the_table_says(name, column, tiny, promised):
    checkpoint = tiny(name, main_task(architecture(name)))
    why = promised[name][column]
    if why:
        assert cell(checkpoint.layout, column)
        return
    before = checkpoint.layout.parameters
    context = Context(samples(checkpoint, 40))
    form(column).apply(checkpoint, context)
    checkpoint.model()
    assert checkpoint.layout.parameters < before or not column.startswith("slice")  # a random model has no zeros
    assert all(c.holds(checkpoint.config, checkpoint.tensors) is None for c in form(column).checks(context.details))


@pytest.mark.parametrize("column", EXPORTS)
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names()])
def test_an_exporter_does_what_the_table_says(name, column, tiny, promised, tmp_path):
    checkpoint = tiny(name, main_task(architecture(name)))
    if promised[name][column]:
        with pytest.raises(RecipeError):
            form(column).write(checkpoint, tmp_path, samples(checkpoint, 8))
    else:
        facts = form(column).write(checkpoint, tmp_path, samples(checkpoint, 8))
        assert facts["parity"]
        assert (tmp_path / "model.onnx").is_file()
