from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from tokenmdp.parallel import world

# Two processes: the sums of 1, 2 and of 10, 20 are 3 and 30; seven rows are shared as 3 and 4.
TWO = """
import json, sys, torch
import torch.distributed as dist
from tokenmdp.parallel import world
world.join()
mine = torch.tensor([1.0, 10.0], dtype=torch.float64) * (world.rank + 1)
total = world.sum(mine)
turned = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T  # its memory is not in the order of its elements
world.sum(turned)
said = {"size": world.size, "rank": world.rank, "sum": total.tolist(), "same": total is mine, "turned": turned.tolist(),
        "list": world.shard(list(range(7))), "tensor": world.shard(torch.arange(7)).tolist()}
with open(f"{sys.argv[1]}/{world.rank}.json", "w") as file:
    json.dump(said, file)
dist.destroy_process_group()
"""


def test_one_process_is_the_identity() -> None:
    x = torch.arange(3.0)
    rows = ["a", "b", "c"]
    world.join()  # alone there is nobody to meet
    assert (world.size, world.rank) == (1, 0)
    assert world.sum(x) is x
    assert world.shard(rows) == rows
    assert torch.equal(world.shard(x), x)


def test_two_processes_sum_and_share(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # The environment that torchrun gives its processes, without the seconds that torchrun itself takes to start.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in both:
        _, said = process.communicate()
        assert process.returncode == 0, said
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["size"] == second["size"] == 2
    assert first["sum"] == second["sum"] == [3.0, 30.0]
    assert first["turned"] == second["turned"] == [[2.0, 6.0], [4.0, 8.0]]
    assert first["same"]  # summed in place, as with one process
    assert first["list"] == first["tensor"] == [0, 1, 2]
    assert second["list"] == second["tensor"] == [3, 4, 5, 6]
