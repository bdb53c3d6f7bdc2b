"""Ranks from the variables of launchers, and the sets of them that platforms leave."""

from __future__ import annotations

import pytest

from fastmoco.config import launched
from fastmoco.config.launched import (
    Launched,
    describe_launcher,
    first_host,
    read_launcher,
    tasks_per_node,
)

pytestmark = pytest.mark.faults

MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_JOB_ID": "40000",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "9",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "n[3-4]",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"} | MEETING,
        {"RANK": "0"},
        {"WORLD_SIZE": "", "RANK": " "},
        MEETING,
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_a_process_on_its_own(variables: dict[str, str]) -> None:
    """With the leftovers of platforms, in the shell of a batch script, in a step of one task."""
    assert read_launcher(variables) == Launched()
    assert read_launcher(variables).variables() == {}
    assert not describe_launcher(variables)


def test_complete_variables_are_taken_and_torchrun_comes_before_slurm() -> None:
    given = {"RANK": "1", "WORLD_SIZE": "4"} | MEETING
    pod = Launched(
        rank=1, world_size=4, local_rank=0, local_world_size=1, address="10.0.0.1", port=29500
    )
    assert read_launcher(given) == pod
    assert read_launcher(given | STEP) == pod
    worker = given | {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert read_launcher(worker | STEP).local_world_size == 2
    assert read_launcher(worker).variables().items() <= worker.items()


def test_a_task_of_srun_has_its_rank_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched.socket, "getaddrinfo", lambda host, port: host)
    task = read_launcher(STEP)
    assert (task.rank, task.world_size, task.local_rank, task.local_world_size) == (5, 6, 1, 2)
    assert task.address == "n3"
    assert task.port == 15000 + (40000 + 303) % 17000
    assert task.variables()["MASTER_ADDR"] == "n3"
    assert read_launcher(STEP | MEETING).address == "10.0.0.1"
    assert read_launcher(STEP | MEETING).port == 29500
    assert describe_launcher(STEP) == "srun has started 6 tasks (SLURM_STEP_NUM_TASKS)"


@pytest.mark.parametrize("job", [0, 1, 16999, 17000, 2**31])
def test_ports_of_steps_lie_below_those_that_linux_hands_out(
    job: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launched.socket, "getaddrinfo", lambda host, port: host)
    assert 1024 < read_launcher(STEP | {"SLURM_JOB_ID": str(job)}).port < 32768


def test_a_name_that_does_not_resolve_becomes_the_address_of_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(host: str, port: None) -> None:
        raise OSError

    monkeypatch.setattr(launched.socket, "getaddrinfo", unknown)
    monkeypatch.setattr(launched, "_address_of_node", lambda host: {"n3": "10.1.1.3"}.get(host))
    assert read_launcher(STEP).address == "10.1.1.3"
    with pytest.raises(ValueError, match="the first node, m1, does not resolve: set MASTER_ADDR"):
        read_launcher(STEP | {"SLURM_STEP_NODELIST": "m1"})


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but not RANK, MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "8", "RANK": "0"}, "but not MASTER_ADDR and MASTER_PORT.*unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "2"} | MEETING, "RANK=2 and WORLD_SIZE=2: ranks go from 0"),
        ({"RANK": "3"}, "RANK=3 is set and WORLD_SIZE is not.*unset RANK"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "1"}, "LOCAL_RANK=1 is set and WORLD_SIZE=1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': is no whole number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"} | MEETING, "RANK='-1': is no whole number"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE=0: is a number of processes"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "0"}, "is a port"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "does not use MPI"),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, "mpirun has started 4 processes .*unset PMI_SIZE"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "but not SLURM_STEP_ID.*launch/slurm.sh"),
        (STEP | {"WORLD_SIZE": "16"}, "WORLD_SIZE=16 is set, but srun has started 6 tasks"),
        (STEP | {"SLURM_STEP_NODELIST": ""}, "without SLURM_JOB_NODELIST.*unset SLURM_PROCID"),
        (STEP | {"SLURM_STEP_NODELIST": "a;touch x"}, "host name 'a;touch x' refused"),
        (
            STEP | {"SLURM_STEP_NODELIST": "-oProxyCommand=x"},
            "host name '-oProxyCommand=x' refused",
        ),
        (STEP | {"SLURM_STEP_NODELIST": "$(touch x)"}, "refused"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "x"}, "has another form than 8"),
    ],
)
def test_what_does_not_fit_together_is_named(variables: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_launcher(variables)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu-[007,009-012],login", "gpu-007"),
        ("r[0-1]n[3-5]", "r0n3"),
        ("a.cluster.example,b", "a.cluster.example"),
        ("n[5]-ib", "n5-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_tasks_of_every_node() -> None:
    assert tasks_per_node("8(x3),2") == [8, 8, 8, 2]


RANKS = {"RANK": "0", "WORLD_SIZE": "2"} | MEETING


@pytest.mark.parametrize("garbage", ["-1", "abc", "9" * 5000, "1e3", "\u0663", "0x2", "\x1b[2J"])
@pytest.mark.parametrize(
    ("given", "name"),
    [
        *((RANKS, name) for name in RANKS if name != "MASTER_ADDR"),
        *((RANKS, name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")),
        *(({}, name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")),
        *(({}, name) for name in launched.COUNTS_OF_STARTS),
        *((STEP, name) for name in STEP if name.endswith(("ID", "TASKS", "NODE"))),
    ],
)
def test_garbage_in_any_variable_is_refused_by_its_name(given, name, garbage) -> None:
    if given is STEP:
        given = STEP | {"MASTER_ADDR": "10.0.0.1"}
        if name == "SLURM_NTASKS":  # the number of the step comes before it
            del given["SLURM_STEP_NUM_TASKS"]
    with pytest.raises(ValueError, match=name.replace("STEP_TASKS", "TASKS")):
        read_launcher(given | {name: garbage})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", str(2**40)),
        ("LOCAL_WORLD_SIZE", "0"),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "99999999"),
        ("MASTER_ADDR", "host:29500/x"),
        ("MASTER_ADDR", "-host"),
        ("MASTER_ADDR", "a b"),
        ("MASTER_ADDR", "x" * 300),
    ],
)
def test_numbers_and_names_that_no_launcher_sets_are_refused(name, value) -> None:
    with pytest.raises(ValueError, match=name):
        read_launcher(RANKS | {name: value})
    if name == "LOCAL_WORLD_SIZE":
        with pytest.raises(ValueError, match=name):
            read_launcher({name: value})
        assert launched.local_processes({name: value}) == 1


@pytest.mark.parametrize("text", ["8(x1000000000)", "0", "8(x0)", "1(x999999),1(x999999)", "x"])
def test_a_list_of_tasks_is_no_larger_than_a_cluster(text) -> None:
    with pytest.raises(ValueError, match="SLURM_TASKS_PER_NODE"):
        tasks_per_node(text)


@pytest.mark.parametrize("address", ["::1", "fe80::1%eth0", "10.0.0.1", "node-1.cluster.example"])
def test_addresses_of_machines_are_taken(address) -> None:
    assert read_launcher(RANKS | {"MASTER_ADDR": address}).address == address


def test_a_count_that_is_no_number_counts_as_none_where_it_cannot_be_refused() -> None:
    assert launched.count_in({"A": "3"}, "A") == 3
    assert [launched.count_in({"A": text}, "A") for text in ("abc", "-1", "9" * 5000, "")] == [
        0
    ] * 4
