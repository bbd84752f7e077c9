"""Two things that all processes of a run have to know of each other: whether anyone wants to stop, and their log lines."""

from typing import Any

import torch
import torch.distributed as dist

from writesae.parallel import World


def anyone(flag: bool, world: World) -> bool:
    """Whether the flag is up in any process; all of them call it."""
    if world.size == 1:
        return flag
    return bool(world.max_(torch.tensor(int(flag))))


def merged(own: dict[str, Any], world: World) -> dict[str, Any]:
    """The dictionaries of all processes in one, in the order of their ranks; all of them call it."""
    if world.size == 1:
        return own
    parts: list[dict[str, Any]] = [{} for _ in range(world.size)]
    dist.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}
