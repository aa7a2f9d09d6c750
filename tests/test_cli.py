"""The command line as a user meets it: exit codes, one line per error, kills, resumes, hostile surroundings."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tersor.compress.cli import main
from tersor.compress.progress import Progress, remember_interrupts
from tersor.compress.rundir import hash_tree

COMMAND = [sys.executable, "-m", "tersor.compress.cli"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


STEPS = """
metrics: [perplexity, kl]
passes:
  - use: slice
    with: {remove: 0.15, on: [hidden]}
export:
  - use: onnx
    with: {inputs: padded}
"""


@pytest.fixture
def recipe(small_recipe: Callable[..., Path]) -> Path:
    return small_recipe(STEPS)


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, stdout, stderr."""

    def invoke(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tersor", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return invoke


def one_line(err: str) -> str:
    """The error line, which must be the only thing that looks like one."""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("tersor: ")]
    assert len(lines) == 1, err
    return lines[0]


def test_help_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['tersor', '--help']\n"
        "from tersor.compress.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=ENV)
    assert done.returncode == 0, done.stderr
    for verb in ("validate", "plan", "apply", "eval", "compare", "export", "verify", "passes", "schema", "doctor"):
        assert verb in done.stdout


def test_validate_reads_no_weights(run, recipe):
    model = Path(recipe.read_text().split("model: ")[1].split("\n")[0])
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    assert run("validate", recipe)[:2] == (0, "small: valid\n")
    code, _, err = run("validate", recipe, "--set", "passes.0.with.remove=0.999")
    assert code == 2
    assert "passes.0: slice: remove" in one_line(err)


def test_plan_says_parameters_bytes_and_memory(run, recipe):
    code, out, _ = run("plan", recipe, "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["result"]["parameters"] <= 0.85 * plan["original"]["parameters"]
    assert plan["result"]["bytes"] == 4 * plan["result"]["parameters"]
    assert plan["peak_memory"] > 0
    code, out, _ = run("plan", recipe)
    assert "1-slice" in out
    assert "hidden moves in steps of" in out


def test_apply_prints_the_table_and_set_overrides(run, recipe, tmp_path):
    code, out, err = run("apply", recipe, "--output", tmp_path / "run", "--threads", 1)
    assert code == 0, err
    for word in ("original", "compressed", "ONNX", "parameters", "bytes", "perplexity", "latency", "parity"):
        assert word in out
    code, out, _ = run(
        "apply", recipe, "--output", tmp_path / "more", "--threads", 1, "--set", "passes.0.with.remove=0.3", "--json"
    )
    metrics = json.loads(out)
    assert code == 0
    assert metrics["checkpoint"]["parameters"] <= 0.7 * metrics["original"]["parameters"]


def test_smoke_checks_a_recipe_without_the_models_weights(run, recipe, tmp_path):
    model = Path(recipe.read_text().split("model: ")[1].split("\n")[0])
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    code, out, err = run("apply", recipe, "--smoke", "--threads", 1, "--json")
    assert code == 0, err
    assert json.loads(out)["original"]["parameters"] > 0
    assert not (Path.cwd() / "runs" / "small").exists()


def test_gate_missed_is_exit_3(run, recipe, tmp_path):
    code, out, err = run(
        "apply", recipe, "--output", tmp_path / "run", "--threads", 1, "--set", "gate={metric: kl, max: 0.0000001}"
    )
    assert code == 3
    assert "kl" in one_line(err)
    assert "FAILED" in out


def test_eval_measures_and_judges(run, recipe, tmp_path):
    run("apply", recipe, "--output", tmp_path / "run", "--threads", 1)
    model = recipe.read_text().split("model: ")[1].split("\n")[0]
    for result in ("model", "onnx"):
        code, out, err = run("eval", tmp_path / "run" / result, "--recipe", recipe, "--threads", 1, "--json")
        assert code == 0, err
        found = json.loads(out)
        stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
        block = stored["checkpoint"] if result == "model" else stored["artifacts"][0]
        assert found["model"]["perplexity"] == pytest.approx(block["perplexity"], rel=1e-6)
    code, _, err = run(
        "eval", model, "--recipe", recipe, "--threads", 1, "--set", "gate={metric: perplexity, max: 1.5}"
    )
    assert code == 3
    assert "perplexity" in one_line(err)


def test_export_writes_an_artifact_that_plain_onnx_runtime_opens(run, recipe, tmp_path):
    import onnxruntime

    model = recipe.read_text().split("model: ")[1].split("\n")[0]
    code, _, err = run("export", model, "--output", tmp_path / "out", "--set", "inputs=padded", "--threads", 1)
    assert code == 0, err
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    assert {"input_ids", "attention_mask"} <= {i.name for i in session.get_inputs()}
    code, _, err = run("export", model, "--output", tmp_path / "out")
    assert code == 2
    assert "something there already" in one_line(err)
    code, _, err = run("export", model, "--output", tmp_path / "more", "--set", "inputs=sideways")
    assert code == 2
    assert "sideways" in one_line(err)
    assert not (tmp_path / "more").exists()


def test_passes_lists_and_describes(run):
    code, out, _ = run("passes", "--json")
    assert code == 0
    assert {"slice", "onnx"} <= {e["name"] for e in json.loads(out)}
    assert all(len(e["summary"]) > 10 for e in json.loads(out))
    code, out, _ = run("passes", "slice")
    assert "remove" in out
    for name in [e["name"] for e in json.loads(run("passes", "--json")[1])]:
        for option in json.loads(run("passes", name, "--json")[1])["options"]:
            assert not any(word in option["type"] for word in ("[", "Annotated")), "as people write them"
            assert not any(word in option["default"] for word in ("=", "None", "Undefined")), "likewise"
    code, _, err = run("passes", "slise")
    assert code == 2
    assert "Did you mean 'slice'?" in one_line(err)


def test_schema_and_doctor(run):
    code, out, _ = run("schema")
    assert code == 0
    assert "passes" in json.loads(out)["properties"]
    code, out, _ = run("doctor", "--json")
    assert code == 0
    assert "onnxruntime" in json.loads(out)


def _edit(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _poison(model: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    name = sorted(tensors)[3]
    tensors[name] = tensors[name].copy()
    tensors[name].flat[1] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


BREAKS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "truncated weights": (
        lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-500]),
        5,
        "weights that do not load",
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), 5, "no weights"),
    "no config": (lambda m: (m / "config.json").unlink(), 5, "no config.json"),
    "config that is no JSON": (lambda m: (m / "config.json").write_text("{"), 5, "unreadable"),
    "no tokenizer": (lambda m: [p.unlink() for p in m.glob("tokenizer*")], 5, "without a tokenizer"),
    "unknown architecture": (lambda m: _edit(m, model_type="lamma"), 2, "model_type: found 'lamma'"),
    "strange attribute": (lambda m: _edit(m, embedding_multiplier=12.0), 2, "embedding_multiplier"),
    "NaN": (_poison, 5, "NaN or infinite"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_checkpoint_is_one_line(run, recipe, tmp_path, case):
    model = Path(recipe.read_text().split("model: ")[1].split("\n")[0])
    harm, expected, words = BREAKS[case]
    harm(model)
    code, _, err = run("apply", recipe, "--output", tmp_path / "run", "--threads", 1)
    assert code == expected
    assert words in one_line(err)
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob("*.part")) if (tmp_path / "run").exists() else True


@pytest.mark.parametrize("output", ["/dev/null/run", "/proc/run"])
def test_an_output_that_cannot_be_written_is_one_line(run, recipe, output):
    code, _, err = run("apply", recipe, "--output", output, "--threads", 1)
    assert code == 5
    assert output in one_line(err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_is_one_line(run, recipe, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = run("apply", recipe, "--output", tmp_path / "locked" / "run", "--threads", 1)
    assert code == 5
    assert "cannot be written" in one_line(err)


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        **options,  # type: ignore[call-overload]
    )


def test_a_full_disk_is_one_line_and_nothing_half_written(recipe, tmp_path):
    """The kernel refuses to write a file beyond 20 kB, as a full disk would: the weights do not fit."""

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start("apply", recipe, "--output", tmp_path / "run", "--threads", 1, preexec_fn=small_files)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 5, err
    assert "--resume" in one_line(err)
    assert not (tmp_path / "run" / "model").exists()
    assert list((tmp_path / "run").rglob("*.part")) == []
    process = start("apply", recipe, "--output", tmp_path / "run", "--threads", 1, "--resume")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Wait until a run has got somewhere, or has ended."""
    while process.poll() is None and not reached():
        time.sleep(0.002)


def journal_has(run: Path, step: str) -> bool:
    path = run / "journal.jsonl"
    return path.exists() and f'"step": "{step}"' in path.read_text()


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "scored": lambda run: journal_has(run, "original"),
    "saving": lambda run: (run / ".steps" / ".1-slice.part").exists(),
    "sliced": lambda run: journal_has(run, "1-slice"),
    "exporting": lambda run: (run / ".steps" / ".onnx.part").exists(),
    "exported": lambda run: journal_has(run, "onnx"),
    "publishing": lambda run: (run / "model").exists(),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny, write_recipe) -> tuple[Path, dict[str, dict[str, str]]]:
    """A recipe, and what it gives when nothing interrupts it."""
    folder = tmp_path_factory.mktemp("whole")
    tiny("llama").save(folder / "model")
    path = write_recipe(folder, folder / "model", STEPS)
    process = start("apply", path, "--output", folder / "run", "--threads", 1)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return path, {part: hash_tree(folder / "run" / part) for part in ("model", "onnx")}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_same_bytes(run, whole, tmp_path, moment):
    recipe, expected = whole
    killed = tmp_path / "killed"
    process = start("apply", recipe, "--output", killed, "--threads", 1)
    wait_for(process, lambda: MOMENTS[moment](killed))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert run("apply", recipe, "--output", killed, "--threads", 1, "--resume")[0] == 0
    assert {part: hash_tree(killed / part) for part in ("model", "onnx")} == expected
    assert not (killed / ".steps").exists()


def test_ctrl_c_is_one_line_and_resumable(run, recipe, tmp_path):
    process = start("apply", recipe, "--output", tmp_path / "run", "--threads", 1)
    wait_for(process, lambda: journal_has(tmp_path / "run", "original"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in one_line(err)
    assert list((tmp_path / "run").rglob("*.part")) == []
    assert run("apply", recipe, "--output", tmp_path / "run", "--threads", 1, "--resume")[0] == 0


def test_a_step_in_which_ctrl_c_got_lost_ends_with_it():
    before = signal.getsignal(signal.SIGINT)
    try:
        remember_interrupts()
        with Progress().step("nobody pressed"):
            pass
        swallows = contextlib.suppress(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt), Progress().step("swallowed"), swallows:
            signal.raise_signal(signal.SIGINT)
    finally:
        remember_interrupts()
        signal.signal(signal.SIGINT, before)


def test_usage_errors_are_exit_2(run, recipe):
    code, _, err = run("apply", recipe, "--frobnicate")
    assert code == 2
    assert "--frobnicate" in err
    code, _, err = run("apply", recipe, "--resume")
    assert code == 2
    assert "--output" in one_line(err)
    code, _, err = run("validate", "quickstarted")
    assert code == 2
    assert "Did you mean 'quickstart'?" in one_line(err)


def test_a_model_that_is_not_there_is_exit_5_and_no_hub_is_asked_offline(run, recipe, tmp_path):
    code, _, err = run("plan", recipe, "--model", tmp_path / "nowhere")
    assert code == 5
    assert "no such directory" in one_line(err)
    code, _, err = run("plan", recipe, "--model", "somebody/some-model", "--offline")
    assert code == 5
    assert "somebody/some-model: found a hub id that cannot be fetched" in one_line(err)
