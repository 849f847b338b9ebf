"""Run by test_critic under torch.distributed: this process's half of a fixed batch, then the critic's weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support.training import make_trainer, weights
from tests.train.test_critic import LINEAR, fixed_batch

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    trainer = make_trainer(folder, per_device_train_batch_size=2, **LINEAR)
    number, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
    assert count == 2
    whole, rewards = fixed_batch(trainer, fill=False)
    # each mini-batch of 4 responses is split between the processes
    mine = torch.tensor([i for i in range(16) if i % 4 // 2 == number])
    batch = {name: value[mine] for name, value in whole.items()}
    for _ in range(3):
        trainer._set_critic_advantages(batch, rewards[mine])
        trainer._train_critic(batch)
    save_file(weights(trainer.critic), folder / f"critic-{number}.safetensors")
    save_file({"advantages": batch["advantages"].contiguous()}, folder / f"advantages-{number}.safetensors")
