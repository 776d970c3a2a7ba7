"""Which device each of several processes takes, and where what they exchange goes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as distributed
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers a backend

from yopo.support import launched, memory, ranks
from yopo.support.errors import YopoError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def there(count: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)

    yield there


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def started(processes: int, rank: int = 0, local: int | None = None) -> None:
        here = processes if local is None else local
        values = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": here}
        values |= {"RANK": rank, "LOCAL_RANK": rank % here, "TORCHELASTIC_RUN_ID": "none"}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    yield started


def test_without_torchrun_a_device_is_as_named(gpus) -> None:
    gpus(2)
    names = ("auto", "cpu", "cuda", "cuda:1", "mps")
    assert [ranks.own_device(name) for name in names] == list(names)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_a_gpu_of_its_own(gpus, torchrun, name: str) -> None:
    gpus(2)
    for rank in range(4):  # on two machines
        torchrun(4, rank, local=2)
        assert ranks.own_device(name) == f"cuda:{rank % 2}"
    torchrun(1)
    assert ranks.own_device(name) == "cuda:0"  # with a number: a process group asks for one
    assert ranks.own_device("cuda:1") == "cuda:1"


def test_processes_that_share_a_gpu_are_refused_all_of_them(gpus, torchrun) -> None:
    gpus(1)
    for rank in range(2):
        torchrun(2, rank)
        with pytest.raises(YopoError, match="2 processes .* it has 1 GPU: ") as caught:
            ranks.own_device("auto")
        assert caught.value.remedy == "Use torchrun --nproc-per-node 1, or --device cpu."
        assert ranks.own_device("cpu") == "cpu"
        with pytest.raises(YopoError, match="--device cuda:0: processes"):
            ranks.own_device("cuda:0")


def test_without_gpus_all_compute_on_the_cpu(gpus, torchrun) -> None:
    gpus(0)
    torchrun(2, 1)
    assert ranks.own_device("auto") == "cpu"
    assert ranks.own_device("cuda") == "cuda"  # which loading refuses
    assert ranks.own_device("star") == "star"
    with pytest.raises(YopoError, match="--device mps: processes"):
        ranks.own_device("mps")


def test_main_memory_is_divided(torchrun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_of_system", lambda: 12)
    monkeypatch.setattr(memory, "free_in_groups", lambda: None)
    assert memory.available_bytes() == 12
    torchrun(6, local=3)
    assert memory.available_bytes() == 4


def test_with_gpus_values_and_cpu_tensors_go_through_gloo(
    gpus, torchrun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for NCCL exchanges nothing, so what went through it would be wrong or fail."""
    gpus(1)
    torchrun(1)
    chosen: list[object] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    store = distributed.HashStore()
    monkeypatch.setattr(launched, "store", lambda: store)
    begin = distributed.init_process_group

    def init(backend: str, **options: object) -> None:
        assert backend == "cpu:gloo,cuda:nccl"
        begin("cpu:gloo,cuda:fake", **options)

    monkeypatch.setattr(distributed, "init_process_group", init)
    with ranks.together(ranks.own_device("auto")):
        group = distributed.group.WORLD
        assert group._get_backend(torch.device("cpu")).name() == "gloo"
        assert group._get_backend(torch.device("cuda")).name() == "fake"
        assert ranks.is_together() and ranks.gathered([{"a": 1}, 2]) == [{"a": 1}, 2]
        assert ranks.of_first_object((1, "b")) == (1, "b")
        assert ranks.least(3) == 3 and ranks.least(None) is None
        numbers = torch.arange(3.0)
        assert ranks.of_first(numbers).tolist() == ranks.added(numbers).tolist() == [0, 1, 2]
    assert chosen == ["cuda:0"] and not ranks.is_together()
