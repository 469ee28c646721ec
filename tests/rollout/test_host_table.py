"""A conditioning table on the host gives the pairs and the rows of one on the device, in the same
bits, without a wait."""

from __future__ import annotations

import pytest
import test_rollout
import torch
from test_lockstep_waits import OnDevice
from test_rollout import Run, config

from selfnpo_fast.models import host_table
from selfnpo_fast.models.conditioning import ConditioningTable, Row
from selfnpo_fast.models.host_table import HostRows, HostTable
from selfnpo_fast.rollout import OverlappedProducer, Producer, lockstep, pairs, rows_at_hand, rows_in_flight

CPU = torch.device("cpu")
PROMPTS, BATCH, GROUPS, ACCUMULATION = 300, 3, 4, 2
ROWS = torch.randn(PROMPTS + 1, 1, generator=torch.Generator().manual_seed(5))
FIELDS = ("x_s", "s", "target", "t", "rows", "weight", "sample_ids")


def host(rows: torch.Tensor = ROWS) -> HostTable:
    facts = {"rows": Row(shape=tuple(rows.shape[1:]))}
    return HostTable(HostRows(facts=facts, tensors={"rows": rows}, lengths={}), range(1, len(rows)), CPU)


@pytest.fixture
def make(monkeypatch):
    """A producer over a rollout with many prompts, by the table and the choices of the config."""
    monkeypatch.setattr(test_rollout, "PROMPTS", PROMPTS)

    def made(table, *, overlap: bool, dropout: float = 0.3, **choices):
        choices |= {"grid_steps": 2}
        monkeypatch.setattr(test_rollout, "TABLE", table)
        run = Run(config(**{"k": 2} | choices), dropout=dropout, batch=BATCH, pool=GROUPS, num_prompts=PROMPTS)
        groups = 0 if choices["mode"] == "lockstep" else GROUPS
        omega = choices["omega"]
        table.reserve(rows_at_hand(batch=BATCH, accumulation=ACCUMULATION, groups=groups, omega=omega))
        rollout = run.make()
        rollout.maker.predictor.branches.batched = True
        arguments = rollout, rollout.maker.predictor, ACCUMULATION, lambda: 0
        return OverlappedProducer(*arguments, device=CPU) if overlap else Producer(*arguments)

    return made


def assert_same_updates(one: Producer, other: Producer, updates: int) -> None:
    """`other` is over a table on the host."""
    for _ in range(updates):
        expected, found = one.take(), other.take()
        for a, b in zip(expected.micro_batches, found.micro_batches, strict=True):
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)
            # The student gathers while the next pairs are made.
            rows = other.predictor.table.gather(b.rows)["rows"]
            assert torch.equal(rows, ROWS[b.rows])
        one.settle()
        other.settle()


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize(
    "choices",
    [
        {"mode": "continuous", "omega": -3.0},
        {"mode": "continuous", "omega": -1.0},
        {"mode": "continuous", "omega": 0.0, "start": "data", "k": 2},
        {"mode": "lockstep", "omega": -3.0},
        {"mode": "lockstep", "omega": -1.0, "start": "data", "k": 2},
    ],
    ids=lambda choices: "-".join(map(str, choices.values())),
)
def test_pairs_and_rows_are_those_of_a_table_on_the_device(make, choices, overlap):
    table = host()
    device, other = (
        make(ConditioningTable({"rows": ROWS}), overlap=overlap, **choices),
        make(table, overlap=overlap, **choices),
    )
    assert_same_updates(device, other, 20)
    assert len(table.rows["rows"]) < PROMPTS / 2, "most rows have left the device again"
    # A state that was saved with one table is continued with the other.
    state = {name: value.clone() for name, value in other.state_dict().items()}
    again, resumed = make(ConditioningTable({"rows": ROWS}), overlap=overlap, **choices), host()
    later = make(resumed, overlap=overlap, **choices)
    for producer in (again, later):
        producer.load_state_dict(state)
    resumed.prefetch(rows_in_flight(state))
    assert_same_updates(again, later, 5)
    for producer in (device, other, again, later):
        producer.settle()
        producer.close()


@pytest.mark.parametrize("mode", ["continuous", "lockstep"])
def test_the_host_waits_for_nothing(make, mode, monkeypatch):
    table = host()
    producer = make(table, overlap=False, mode=mode, omega=-3.0)
    producer.rollout.fill()
    producer.take()
    device, uploads = OnDevice(), []

    def uploaded(tensor, to):
        uploads.append(tensor)
        return device.add(tensor.clone())

    for module in (host_table, lockstep, pairs):
        monkeypatch.setattr(module, "upload", uploaded)
    for tensor in [*table.rows.values(), *vars(producer.rollout).values()]:
        if isinstance(tensor, torch.Tensor):
            device.add(tensor)
    with device:
        update = producer.take()
        for micro_batch in update.micro_batches:
            table.gather(micro_batch.rows)
    assert device.asked == []
    assert any(tensor.shape[1:] == ROWS.shape[1:] and tensor.is_floating_point() for tensor in uploads)


def test_the_window_keeps_what_was_asked_for_last():
    table = host(torch.arange(10.0)[:, None])
    assert torch.equal(table.gather(torch.tensor([7, 2]))["rows"], torch.tensor([[7.0], [2.0]])), "asks the device"
    table.reserve(3)
    addresses = [value.data_ptr() for value in table.rows.values()]
    table.prefetch(torch.tensor([1, 2, 3]))
    table.prefetch(torch.tensor([1, 0]))
    table.prefetch(torch.tensor([4, 4]))  # the place of 2
    found = table.gather(torch.tensor([0, 1, 2, 3, 4, 9]))["rows"][:, 0]
    assert torch.equal(found.nan_to_num(-1), torch.tensor([0.0, 1, -1, 3, 4, -1])), "what is missing is not a number"
    assert [value.data_ptr() for value in table.rows.values()] == addresses
    assert torch.equal(table.empty(2)["rows"], torch.zeros(2, 1))
    assert torch.equal(table.fetch(torch.tensor([9, 0]))["rows"], torch.tensor([[9.0], [0.0]]))
    with pytest.raises(ValueError, match="4 rows do not fit into a window of 3"):
        table.prefetch(torch.tensor([5, 6, 7, 8]))


def test_repeated_prompts_share_a_row():
    rows = HostRows(facts={"rows": Row(shape=(1,))}, tensors={"rows": torch.arange(3.0)[:, None]}, lengths={})
    table = HostTable(rows, [1, 2, 1], CPU)
    assert table.prompts == 3
    assert table.fetch(torch.arange(4))["rows"].flatten().tolist() == [0, 1, 2, 1]
