"""Training in processes of its own: killed and resumed, on two processes, in shards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tersor.compress.train import fsdp2

RUN = """
import sys, copy, json
from pathlib import Path
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
from tersor.compress.train import LanguageModel, Training, text, train
torch.set_num_threads(1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, attention_dropout=0.1))
generator = np.random.default_rng(0)
rows = text(model, [generator.integers(0, 64, n) for n in generator.integers(4, 30, 50)], width=32)
out, folder, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
done = train(model, rows, LanguageModel(), Training(**options), folder=Path(folder) if folder else None)
out = f"{out}.{torch.distributed.get_rank()}" if torch.distributed.is_initialized() else out
torch.save({"weights": done.weights or model.state_dict(), "losses": done.losses}, out)
"""


def command(tmp_path: Path, out: Path, folder: Path | str, options: dict) -> list[str]:
    script = tmp_path / "run.py"
    script.write_text(RUN, "utf-8")
    return [str(script), str(out), str(folder), json.dumps(options)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_killed_at_a_random_step_and_resumed_the_weights_are_identical(tmp_path, environment):
    options = {"steps": 150, "batch": 2, "save_every": 3, "average": 2, "learning_rate": 0.01}
    whole, folder = tmp_path / "whole.pt", tmp_path / "state"
    arguments = command(tmp_path, tmp_path / "killed.pt", folder, options)
    process = subprocess.Popen([sys.executable, *arguments], env=environment, stderr=subprocess.DEVNULL)
    reached = int(np.random.default_rng().integers(5, 100))
    while process.poll() is None and not any(int(p.name[11:]) >= reached for p in folder.glob("checkpoint-*")):
        time.sleep(0.002)
    assert process.poll() is None, "it must be killed at work"
    process.send_signal(signal.SIGKILL)
    process.wait()
    print("killed behind step", reached)  # shown if what follows fails
    subprocess.run([sys.executable, *arguments], env=environment, check=True)
    subprocess.run([sys.executable, *command(tmp_path, whole, "", options)], env=environment, check=True)
    one, two = torch.load(whole), torch.load(tmp_path / "killed.pt")
    assert same(one["weights"], two["weights"])
    assert one["losses"] == two["losses"]


def test_two_processes_see_what_one_would(tmp_path, environment):
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    options = {"steps": 6, "batch": 8, "learning_rate": 0.01, "save_every": 3, "average": 2}
    options |= {"optimizer": "sgd"}  # Adam turns float noise in tiny gradients into whole steps
    subprocess.run([sys.executable, *command(tmp_path, one, tmp_path / "a", options)], env=environment, check=True)
    options |= {"batch": 4}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    subprocess.run([*launch, *command(tmp_path, two, tmp_path / "b", options)], env=environment, check=True)
    alone = torch.load(one)
    first, second = (torch.load(f"{two}.{rank}") for rank in range(2))
    assert same(first["weights"], second["weights"])
    assert first["losses"] == second["losses"]
    assert [v for _, v in first["losses"]] == pytest.approx([v for _, v in alone["losses"]], rel=0.02)
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], tensor, rtol=1e-2, atol=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP2 shards over GPUs")
def test_shards_learn_what_a_whole_model_does(tmp_path, environment):
    count = torch.cuda.device_count()
    options = {"steps": 6, "batch": 8, "learning_rate": 0.01, "optimizer": "sgd", "save_every": 3}
    subprocess.run(
        [sys.executable, *command(tmp_path, tmp_path / "one", tmp_path / "a", options)], env=environment, check=True
    )
    options["batch"] = 8 // count
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(fsdp2())]
    launch += ["--num_processes", str(count), "--mixed_precision", "no"]
    subprocess.run(
        [*launch, *command(tmp_path, tmp_path / "two", tmp_path / "b", options)], env=environment, check=True
    )
    alone, first = torch.load(tmp_path / "one"), torch.load(tmp_path / "two.0")
    assert [v for _, v in first["losses"]] == pytest.approx([v for _, v in alone["losses"]], rel=0.02)
    for name, tensor in first["weights"].items():
        torch.testing.assert_close(tensor, alone["weights"][name], rtol=1e-2, atol=2e-3)


ON_CPU = """
from accelerate import state
from accelerate.utils import DistributedType
made = state.AcceleratorState.__init__
def shard_on_cpu(self, *arguments, fsdp_plugin=None, **named):
    made(self, *arguments, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
state.AcceleratorState.__init__ = shard_on_cpu
"""
"""accelerate reads an FSDP configuration on GPUs alone; torch's fully_shard itself runs on CPUs over gloo."""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs, accelerate shards over them")
def test_shards_on_two_processes_learn_and_resume(tmp_path, environment):
    """The configuration that ships, read by accelerate's own launcher."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    asked = ["--config_file", str(fsdp2()), "--mixed_precision", "no", "run.py"]
    found = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(asked))[0])
    shards = {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    assert shards["FSDP_VERSION"] == "2"
    options = {"steps": 6, "batch": 8, "learning_rate": 0.01, "optimizer": "sgd", "save_every": 3}
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run([sys.executable, *command(tmp_path, one, tmp_path / "a", options)], env=environment, check=True)
    options["batch"] = 4
    script = command(tmp_path, two, tmp_path / "b", options)
    sharded = "assert all(type(p).__name__ == 'DTensor' for p in model.parameters())"
    Path(script[0]).write_text(f"{ON_CPU}\n{RUN}\n{sharded}", "utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *script]
    subprocess.run(launch, env=environment | shards, check=True)
    alone, first, second = torch.load(one), torch.load(f"{two}.0"), torch.load(f"{two}.1")
    assert same(first["weights"], second["weights"])
    assert [v for _, v in first["losses"]] == pytest.approx([v for _, v in alone["losses"]], rel=0.02)
    for name, tensor in first["weights"].items():
        torch.testing.assert_close(tensor, alone["weights"][name], rtol=1e-2, atol=2e-3)
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    subprocess.run(launch, env=environment | shards, check=True)
    again = torch.load(f"{two}.0")
    assert same(again["weights"], first["weights"])
    assert again["losses"] == first["losses"]


def test_the_configuration_for_shards_is_one_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(fsdp2()))
    assert found.distributed_type == "FSDP"
    assert found.fsdp_config["fsdp_version"] == 2
