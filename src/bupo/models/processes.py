"""The processes that a launcher (torchrun, `accelerate launch`) started, joined into one group."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from bupo.errors import InputError


def join_processes() -> PartialState:
    """accelerate's state of this process, with the group set up; gloo on a CPU.

    Raises:
        InputError: the launcher started several processes and accelerate did not make a group of them.
    """
    # `PartialState` makes no group of CPU processes unless it is told that they are meant to be
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != wanted:
        raise InputError(
            f"the launcher started {wanted} processes, but their group has {state.num_processes}; start them with "
            f"torchrun --nproc_per_node {wanted} -m bupo ..."
        )
    return state
