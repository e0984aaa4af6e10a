"""What processes tell each other, which of them is first, and which of them writes."""

import torch

from autoencoder.common.processes import World, start_world
from svg_t2i.checkpoints.run import save_checkpoint


def talk(folder):
    with start_world("cpu") as world:
        with world.main_first():
            seen = sorted(path.name for path in folder.iterdir())
            (folder / f"seen by {world.rank}").touch()
        world.barrier()
        save_checkpoint(folder / f"saved by {world.rank}", 1, {"model": {"a": torch.ones(3)}}, {})
        total = world.reduce_sum(torch.tensor([1.0, world.rank])).tolist()
        joined = world.join_shares(torch.tensor([world.rank, 7])).tolist()
        return world.is_main, world.gather(world.rank), world.broadcast(world.rank), total, joined, seen


def test_the_first_process_is_the_main_one_and_writes_alone(run_processes, tmp_path):
    first, second = run_processes(talk, 2, tmp_path)
    shared = (0, [2, 1], [0, 7, 1, 7])
    assert first == (True, [0, 1], *shared, [])
    assert second == (False, [], *shared, ["seen by 0"])
    assert sorted(path.name for path in tmp_path.glob("saved*")) == ["saved by 0"]


def test_alone_every_collective_is_the_identity():
    world, tensor = World(), torch.tensor([1.0, 2.0])
    world.barrier()
    with world.main_first():
        assert (world.gather("x"), world.broadcast("x"), world.is_main) == (["x"], "x", True)
    assert world.reduce_sum(tensor) is tensor
