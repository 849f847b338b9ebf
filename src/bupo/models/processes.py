"""Joins the processes that a launcher (torchrun, `accelerate launch`) started into one group."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from bupo.errors import InputError


def join_processes(cpu: bool = False) -> PartialState:
    """Return accelerate's state of this process, with the process group set up (gloo on CPUs).

    Args:
        cpu: run on CPUs even where there are accelerators.

    Raises:
        InputError: the launcher started several processes, but accelerate did not form a group of them.
    """
    # without `cpu`, PartialState does not form a group of CPU processes
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != world_size:
        raise InputError(
            f"the launcher started {world_size} processes, but {state.num_processes} form a group; start them with "
            f"torchrun --nproc_per_node {world_size} -m bupo ..."
        )
    return state
