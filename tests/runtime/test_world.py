"""Launchers' variables that cannot be, and ranks that do not meet: one line each."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
import torch

from selfnpo_fast import train
from selfnpo_fast.runtime import world
from selfnpo_fast.runtime.errors import RunError, UserError


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launched(**changes: str | None) -> dict[str, str]:
    """The variables of rank 0 of 2, with changes; None leaves a variable out."""
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | changes
    return {name: value for name, value in variables.items() if value is not None}


@pytest.fixture
def launch(monkeypatch):
    """Sets the variables of a launcher, and no others."""

    def set_variables(variables: dict[str, str]) -> None:
        for name in list(os.environ):
            if name in (*world.VARIABLES, "LOCAL_SIZE") or name.startswith(("SLURM", "OMPI", "PMI")):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


REFUSED = {
    "no address": (launched(MASTER_ADDR=None), "MASTER_ADDR: missing"),
    "no port": (launched(MASTER_PORT=None), "MASTER_PORT: missing"),
    "no rank": (launched(RANK=None), "RANK: missing"),
    "no local rank": (launched(LOCAL_RANK=None), "LOCAL_RANK: missing"),
    "rank abc": (launched(RANK="abc"), "RANK: 'abc' is not possible; expected an integer from 0 to 1"),
    "rank 2 of 2": (launched(RANK="2"), "RANK: '2' is not possible; expected an integer from 0 to 1"),
    "rank -1": (launched(RANK="-1"), "RANK: '-1' is not possible"),
    "a size of 0": (launched(WORLD_SIZE="0"), "WORLD_SIZE: '0' is not possible"),
    "a size of 10^12": (launched(WORLD_SIZE="1" + 12 * "0"), "WORLD_SIZE: '1000000000000' is not possible"),
    "port http": (launched(MASTER_PORT="http"), "MASTER_PORT: 'http' is not possible"),
    "a local size of x": (launched(LOCAL_SIZE="x"), "LOCAL_SIZE: 'x' is not possible"),
    "a rank alone": ({"RANK": "1"}, "WORLD_SIZE: missing"),
    "srun": ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, "srun has started 4 processes without WORLD_SIZE"),
    "srun of many": ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS: 'many' is not possible"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 processes without WORLD_SIZE"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_variables_that_cannot_be_are_one_line(name, launch, tmp_path, capfd):
    """Each rank prints its own line: the others may know nothing of it."""
    variables, line = REFUSED[name]
    launch(variables)
    output = tmp_path / "run"
    assert train.main(["--config", str(train.CONFIGS / "digits.yaml"), "--output", str(output)]) == 2
    log = capfd.readouterr().err.splitlines()
    rank = variables.get("RANK") or "0"
    prefix = f"rank {rank}: error: " if rank in ("1", "2") else "error: "
    assert len(log) == 1, log
    assert log[0].startswith(prefix + line)
    assert not output.exists()


def test_more_ranks_than_gpus_are_one_line(launch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    launch(launched(RANK="1", LOCAL_RANK="1"))
    line = "LOCAL_RANK: 1 is not possible; expected at most 0, since this host has 1 GPU; start one rank for each GPU"
    with pytest.raises(UserError, match=line):
        world.init_world()


def test_a_process_of_its_own_computes_on_the_first_gpu(launch, monkeypatch):
    """Also DeepSpeed, which goes by LOCAL_RANK, here that of an outer launcher."""
    launch({"LOCAL_RANK": "3"})
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert world.init_world().device == torch.device("cuda", 0)
    assert chosen == [torch.device("cuda", 0)]
    assert os.environ["LOCAL_RANK"] == "0"


def test_a_port_that_is_taken_is_one_line(launch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        launch(launched(MASTER_PORT=str(port)))
        with pytest.raises(UserError, match=f"MASTER_PORT: {port} cannot be listened on at 127.0.0.1") as caught:
            world.init_world()
    assert caught.value.of_one_rank
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_whose_peer_never_comes_is_one_line(rank, launch, monkeypatch):
    monkeypatch.setattr(world, "MEETING", timedelta(seconds=0.5))
    launch(launched(RANK=rank, LOCAL_RANK=rank))
    line = rf"rank {rank} of 2 has not met the others at 127.0.0.1:\d+: .*; it waits 0.5 s for them"
    with pytest.raises(RunError, match=line) as caught:
        world.init_world()
    assert caught.value.of_one_rank
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "variables", [{}, {"RANK": "0"}, {"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}]
)
def test_a_process_of_its_own_needs_no_launcher(variables, launch):
    launch(variables)
    assert world.read_launch() is None


def test_a_launcher_may_start_a_single_rank(launch):
    launch(launched(WORLD_SIZE="1", LOCAL_RANK=None, LOCAL_SIZE=None, MASTER_PORT="29500"))
    assert world.read_launch() == world.Launch(0, 1, 0, 1, "127.0.0.1:29500")
