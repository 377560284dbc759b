"""The mesh: sizes of axes, coordinates, and which processes share a group."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from l3m_like.core.errors import UserError
from l3m_like.distributed.mesh import AXES, axis_sizes
from tests.distributed import pool

EXAMPLE = {"dp_replicate": 3, "dp_shard": 4, "tp": 2}


def facts(world_size: int, parallel: dict[str, int]) -> list[dict[str, Any]]:
    """What every rank of a fake process group says of its mesh; nothing is sent."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from l3m_like.distributed.mesh import build_mesh

    found = []
    for rank in range(world_size):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        mesh = build_mesh(parallel, torch.device("cpu"))
        groups = {axis: dist.get_process_group_ranks(mesh[axis].get_group()) for axis in AXES}
        found.append(
            {
                "coordinates": {axis: mesh.coordinate(axis) for axis in AXES},
                "groups": groups,
                "dp": (mesh.dp_rank, mesh.dp_size),
                "speaks": mesh.speaks_for_rows,
                "main": mesh.is_main,
                "fsdp": (tuple(mesh.fsdp.mesh_dim_names or ()), mesh.fsdp.mesh.tolist()),
                "text": str(mesh),
                "sizes": dict(mesh.sizes),
            }
        )
        dist.destroy_process_group()
    return found


def test_twenty_four_processes() -> None:
    """l3m's example: 3 copies of the model, each over 4 ranks, each rank 2 tensor-parallel processes."""
    ranks = pool.alone(facts, 24, EXAMPLE)
    for rank, found in enumerate(ranks):
        replicate, shard, tp = rank // 8, rank // 2 % 4, rank % 2
        assert found["coordinates"] == {"pp": 0, "dp_replicate": replicate, "dp_shard": shard, "cp": 0, "tp": tp}
        assert found["groups"] == {
            "pp": [rank],
            "dp_replicate": [8 * r + 2 * shard + tp for r in range(3)],
            "dp_shard": [8 * replicate + 2 * s + tp for s in range(4)],
            "cp": [rank],
            "tp": [8 * replicate + 2 * shard + t for t in range(2)],
        }
        assert found["dp"] == (4 * replicate + shard, 12)
        assert found["speaks"] == (tp == 0) and found["main"] == (rank == 0)
        names, members = found["fsdp"]
        assert names == ("dp_replicate", "dp_shard")
        assert members == [[8 * r + 2 * s + tp for s in range(4)] for r in range(3)]
        assert found["text"] == "24 processes on cpu (dp_replicate 3 x dp_shard 4 x tp 2)"
    # rows are dealt once: each dp_rank is held by the ranks of one tp group, and one of them speaks for its rows
    for tp in range(2):
        assert [found["dp"][0] for rank, found in enumerate(ranks) if rank % 2 == tp] == list(range(12))
    assert sum(found["speaks"] for found in ranks) == 12


def test_shards_over_dp_and_cp_together() -> None:
    for rank, found in enumerate(pool.alone(facts, 8, {"dp_shard": 2, "cp": 2, "tp": 2})):
        assert found["dp"] == (rank // 4, 2)  # cp ranks hold the same rows
        assert found["fsdp"] == (("dp_shard_cp",), [rank % 2 + 2 * i for i in range(4)])
        assert found["speaks"] == (rank % 4 == 0)


def test_without_a_parallel_section() -> None:
    ranks = pool.alone(facts, 6, {})
    assert all(found["sizes"] == {"pp": 1, "dp_replicate": 1, "dp_shard": 6, "cp": 1, "tp": 1} for found in ranks)
    assert [found["dp"] for found in ranks] == [(rank, 6) for rank in range(6)]
    assert pool.alone(facts, 1, {})[0]["text"] == "1 process on cpu (no parallelism)"


def test_one_axis_takes_what_is_left() -> None:
    assert axis_sizes({}, 24)["dp_shard"] == 24
    assert axis_sizes({"tp": 2}, 24) == {"pp": 1, "dp_replicate": 1, "dp_shard": 12, "cp": 1, "tp": 2}
    assert axis_sizes({"dp_replicate": -1, "dp_shard": 4, "tp": 2}, 24)["dp_replicate"] == 3
    assert axis_sizes(EXAMPLE, 24) == {"pp": 1, "dp_replicate": 3, "dp_shard": 4, "cp": 1, "tp": 2}


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        ({"tp": 5}, 24, "tp 5 = 5 does not divide the 24 processes that were started. Start a multiple of 5"),
        (EXAMPLE, 16, "dp_replicate 3 x dp_shard 4 x tp 2 = 24 processes, but 16 were started. Start 24"),
        ({"dp_shard": 1}, 2, "1 = 1 processes, but 2 were started"),
        ({"dp_shard": -1, "dp_replicate": -1}, 4, "dp_replicate and dp_shard are both -1"),
        ({"tp": 0}, 4, "parallel.tp is 0"),
        ({"dp_shard": -2}, 4, "parallel.dp_shard is -2"),
    ],
)
def test_sizes_that_do_not_fit(parallel: dict[str, int], world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        axis_sizes(parallel, world)


def sums() -> tuple[list[float], list[float], str]:
    from l3m_like.distributed.mesh import broadcast_object, build_mesh, gather_objects

    mesh = build_mesh({"dp_shard": 2, "tp": 2})
    assert build_mesh({"dp_shard": 2, "tp": 2}).device_mesh is mesh.device_mesh  # its sockets are not made again
    values = torch.tensor([1.0 + mesh.dp_rank, 10.0])
    kept = values.clone()
    total = mesh.sum(values.clone())
    agreed = mesh.agree(torch.tensor(float(mesh.rank)))
    alike = mesh.agree(torch.tensor(0.1, dtype=torch.float64))
    assert float(alike) == float(torch.tensor(0.1, dtype=torch.float64)) and torch.equal(values, kept)
    assert gather_objects(mesh.rank) == [0, 1, 2, 3]
    return total.tolist(), [float(agreed)], broadcast_object(f"from {mesh.rank}")


def test_sums_count_every_row_once() -> None:
    for rank, (total, agreed, heard) in enumerate(pool.run(4, sums)):
        assert total == [3.0, 20.0]
        assert agreed == [rank // 2 * 2 + 0.5]
        assert heard == "from 0"


def single() -> tuple[str, int, bool]:
    """A plain ``python`` process, without a launcher's environment."""
    from l3m_like.distributed.mesh import build_mesh, init_process_group

    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    first = init_process_group()
    mesh = build_mesh({})
    assert init_process_group() == first == (0, 1)
    return str(mesh), mesh.dp_size, mesh.speaks_for_rows


def test_one_process_is_an_ordinary_mesh() -> None:
    text, size, speaks = pool.alone(single)
    assert text.startswith("1 process on ") and size == 1 and speaks
