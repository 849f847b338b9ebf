"""The lens through which an internal phase reads its policy: raw, norm, a saved one, or fitted on fresh samples."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from accelerate.utils import gather_object

from bupo.lens.maps import TOKENS_PER_DIMENSION, Lens, named_lens
from bupo.models.layout import find_layout
from bupo.train.images import inputs_of_prompt, prompt_with_images


class PhaseLens:
    """Owns the lens of the internal phases; maps are constants, and change between rollout batches only."""

    def __init__(self, trainer: Any):
        self._trainer, name = trainer, trainer.args.internal_lens
        self.lens: Lens | None = None if name == "ridge" else named_lens(name).check(trainer.model)
        self.fitted: int | None = None  # the rollout batch (from 0) before which the maps were fitted

    def before_rollout(self, inputs: Sequence[Mapping[str, Any]]) -> None:
        """Fit the maps before the first rollout batch of a phase, and again after every ``internal_lens_refit``."""
        args, rollout = self._trainer.args, self._trainer.rollout
        age, refit = rollout - (self.fitted or 0), args.internal_lens_refit
        if args.internal_lens != "ridge" or (self.lens is not None and not (refit and age >= refit)):
            return
        model, accelerator = self._trainer.model, self._trainer.accelerator
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():  # the run's own samples stay those of a run without a fit
            torch.manual_seed(args.seed + 1_000_003 * (rollout + 1) + accelerator.process_index)
            responses = self._sample(inputs)
        self.lens = Lens.fit(model, responses, seed=args.seed, share=accelerator.num_processes > 1)
        self.fitted = rollout

    def _sample(self, inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Sample responses of the full policy until they have enough tokens; all processes get the same list."""
        trainer, args, accelerator = self._trainer, self._trainer.args, self._trainer.accelerator
        width = find_layout(trainer.model).unembedding.weight.shape[1]
        wanted = args.internal_lens_tokens or TOKENS_PER_DIMENSION * width
        rows = trainer.train_dataset if hasattr(trainer.train_dataset, "__len__") else inputs
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
        responses: list[dict[str, Any]] = []
        for turn in count():
            first = (turn * accelerator.num_processes + accelerator.process_index) * len(inputs)
            numbers = [order[(first + i) % len(order)] for i in range(len(inputs))]
            prompts = [prompt_with_images(rows[number]) for number in numbers]
            prompt_ids, images, fields = trainer._tokenize_prompts(prompts)
            completion_ids, _ = trainer._generate_single_turn(prompt_ids, images, fields, 1)
            drawn: list[dict[str, Any]] = [
                {"prompt_ids": list(prompt), "response_ids": list(response), "problem_id": str(number)}
                for prompt, response, number in zip(prompt_ids, completion_ids, numbers, strict=True)
            ]
            for row, prompt in zip(drawn, prompts, strict=True) if images else ():
                row["image_inputs"] = inputs_of_prompt(trainer._tokenize_prompts([prompt])[2], len(row["response_ids"]))
            responses += gather_object([row for row in drawn if row["response_ids"]])
            if sum(len(row["response_ids"]) for row in responses) >= wanted:
                break
        return responses

    def state_dict(self) -> dict[str, Any]:
        """The fitted maps, once for all processes; nothing for a lens that the settings name."""
        if self.fitted is None or self.lens is None or not self._trainer.accelerator.is_main_process:
            return {}
        return {"maps": self.lens.maps, "biases": self.lens.biases, "card": self.lens.card, "fitted": self.fitted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the maps of a `state_dict`."""
        if "maps" in state:
            self.lens, self.fitted = Lens("ridge", state["maps"], state["biases"], state["card"]), state["fitted"]
