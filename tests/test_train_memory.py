"""A run that the kernel kills for want of memory goes on where it was; needs a memory control group (Linux, root)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tersor.compress.rundir import hash_tree
from tersor.compress.train.state import WEIGHTS, checkpoints

CONTROL = Path("/sys/fs/cgroup")
STEPS = """
passes:
  - use: recover
    with: {steps: 300, batch: 4, save_every: 3, average: 2, learning_rate: 0.003, redrawn: 0.5}
"""


class Group:
    """A control group of processes whose memory has a limit (versions 1 and 2)."""

    def __init__(self, name: str):
        first = (CONTROL / "memory").is_dir()
        self.folder = (CONTROL / "memory" if first else CONTROL) / name
        self.limit = "memory.limit_in_bytes" if first else "memory.max"
        self.usage = "memory.usage_in_bytes" if first else "memory.current"
        self.events = "memory.oom_control" if first else "memory.events"
        self.folder.mkdir()
        if not (self.folder / self.limit).exists():
            self.folder.rmdir()
            raise OSError("memory is not controlled here")

    def take(self, least: int) -> None:
        """Lower the limit to what the processes hold; refused by version 1 while they hold more."""
        held = max(least, int((self.folder / self.usage).read_text()))
        try:
            (self.folder / self.limit).write_text(str(held))
        except OSError:
            return

    @property
    def kills(self) -> int:
        """Processes that the kernel killed for memory."""
        lines = (line.split() for line in (self.folder / self.events).read_text().splitlines())
        return int(dict(lines)["oom_kill"])


@pytest.fixture
def group() -> Iterator[Group]:
    try:
        found = Group(f"tersor-test-{os.getpid()}")
    except OSError as error:
        pytest.skip(f"no memory control group can be made: {error}")
    yield found
    found.folder.rmdir()


def run(recipe: Path, output: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-c", "from tersor.compress.cli import main; main()"),
        *("apply", str(recipe), "--output", str(output), "--threads", "1", *more),
    ]


@pytest.mark.slow  # 40 s: four runs in processes of their own
def test_a_run_that_is_out_of_memory_in_the_training_is_killed_and_goes_on_to_the_same_bytes(
    small_recipe, tmp_path, group
):
    recipe = small_recipe(STEPS)
    given = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    enter = ["sh", "-c", f'echo $$ > {group.folder / "cgroup.procs"}; exec "$@"', "sh"]
    cut, other, whole = (tmp_path / name for name in ("cut", "other", "whole"))
    process = subprocess.Popen([*enter, *run(recipe, cut)], env=given, stdout=subprocess.DEVNULL)
    try:
        state = cut / ".steps" / "1-recover.state"
        while process.poll() is None and not any(state.glob("checkpoint-*/trainer_state.json")):
            time.sleep(0.01)
        while process.poll() is None:
            group.take(1 << 20)
    finally:
        process.kill()
    assert process.wait() == -9
    assert group.kills == 1
    assert not (cut / "model").exists()
    last = checkpoints(state)[-1]
    shutil.copytree(cut, other)
    change(other / last.relative_to(cut) / WEIGHTS)
    for command in (run(recipe, cut, "--resume"), run(recipe, other, "--resume"), run(recipe, whole)):
        subprocess.run(command, env=given, check=True, stdout=subprocess.DEVNULL)
    assert hash_tree(cut / "model") == hash_tree(whole / "model")
    assert hash_tree(other / "model") != hash_tree(whole / "model"), "it went on from the checkpoint"


def change(path: Path) -> None:
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)
