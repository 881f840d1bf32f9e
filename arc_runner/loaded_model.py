"""A run's loaded model: weights on the device, compiled calls, and their results on the host."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from activation_store import FinishedSequence
from arc_runner.console import say
from arc_runner.options import RunOptions
from arc_runner.workload import Call, sampling_id
from generate_jitted import GenerateShape, Generation, compile_generate, generate_single_task_jitted
from qwen2_core.kernels.cpu.library import unavailable_reason
from qwen2_core.requests import eos_slots
from qwen2_engine.python_loop import generate_single_task_python
from qwen2_jax import QwenModel, load_qwen2
from qwen2_jax_with_hooks import create_model_with_hooks


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Holds a model with its weights on the device, and makes a run's calls."""

    options: RunOptions
    model: QwenModel
    params: Any
    eos_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, options: RunOptions, eos_token_ids: tuple[int, ...]) -> LoadedModel:
        """Reads the weights onto the device, and returns when they are there."""
        mesh_shape = options.mesh_shape or (1, 1)
        config, params = load_qwen2(options.model_path, dtype=options.dtype, mesh_shape=mesh_shape)
        if config.dtype == np.dtype("bfloat16") and (reason := unavailable_reason()):
            say(f"bfloat16 is multiplied by XLA, up to 2.6 times slower than need be: {reason}")
        model = QwenModel(config)
        if options.extract_activations:
            model = create_model_with_hooks(config, options.layers_to_extract)
        elif options.generation == "python":  # which always captures; every model has a layer 0
            model = create_model_with_hooks(config, (0,))
        return cls(options, model, jax.block_until_ready(params), eos_token_ids)

    def compile(self, calls: Sequence[Call]) -> int:
        """Compiles every shape of ``calls``, side by side, and returns how many there were."""
        shapes = list(dict.fromkeys(self._shape(call) for call in calls))
        say(f"compiling {len(shapes)} shapes")
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            tqdm(total=len(shapes), desc="compiling", unit="shape", disable=None, leave=False) as bar,
        ):
            for _ in pool.map(lambda shape: compile_generate(self.model, self.params, shape), shapes):
                bar.update()
        return len(shapes)

    def generate(self, call: Call) -> Generation:
        """Makes one call in the way that ``--generation`` names, and returns when its tokens are there."""
        options = self.options
        input_ids = np.zeros((len(call.prompts), call.width), np.int32)
        for row, prompt in zip(input_ids, call.prompts, strict=True):
            row[: len(prompt.token_ids)] = prompt.token_ids
        kwargs: dict[str, Any] = {
            "prompt_lengths": np.array([len(prompt.token_ids) for prompt in call.prompts]),
            "samples_per_prompt": len(call.samples),
            "eos_token_ids": self.eos_token_ids,
            "sampling": options.sampling,
            "seed": options.random_seed,
            "sequence_ids": np.array([sampling_id(sequence) for sequence in call.sequences]),
            "extract_prompt": options.extract_prompt,
        }
        if options.generation == "python":
            return generate_single_task_python(
                self.model, self.params, input_ids, options.max_output_tokens, **kwargs
            )
        generation = generate_single_task_jitted(
            self.model,
            self.params,
            input_ids,
            options.max_output_tokens,
            cache_dtype=options.kv_cache_dtype,
            extract_activations=options.extract_activations,
            **kwargs,
        )
        # Two calls at once would share the device and take twice the memory; storing overlaps instead.
        jax.block_until_ready(generation.lengths)
        return generation

    def _shape(self, call: Call) -> GenerateShape:
        cache_dtype = self.options.kv_cache_dtype
        return GenerateShape(
            num_prompts=len(call.prompts),
            prompt_width=call.width,
            max_tokens=self.options.max_output_tokens,
            samples_per_prompt=len(call.samples),
            cache_dtype=None if cache_dtype is None else np.dtype(cache_dtype),
            stop=len(self.eos_token_ids) > 0,
            capture_prompt=self.options.extract_prompt,
            eos_slots=eos_slots(len(self.eos_token_ids)),
        )


def finished_sequences(
    call: Call, generation: Generation, capture: bool, wanted: np.ndarray
) -> list[FinishedSequence]:
    """Copies a call's results to the host as finished sequences, without padding and what follows EOS.

    Rows are [layers, positions, hidden_size] in the model's dtype if ``capture`` is set, else None. Those of
    the prompt go with sample 0 alone, as all samples share them. Sequences that are not ``wanted`` (bool [B])
    are left out.
    """
    tokens, logprobs = np.asarray(generation.token_ids), np.asarray(generation.logprobs)
    lengths, finished = np.asarray(generation.lengths), np.asarray(generation.finished)
    rows = np.asarray(generation.activations) if capture else None
    prompt_rows = generation.prompt_activations
    prompt_rows = np.asarray(prompt_rows) if capture and prompt_rows is not None else None
    result = []
    for row, sequence in enumerate(call.sequences):
        if not wanted[row]:
            continue
        length = int(lengths[row])
        kept = None if rows is None else rows[:, :length, row]
        if kept is not None and prompt_rows is not None and sequence.sample_index == 0:
            prompt = prompt_rows[:, : len(sequence.prompt_token_ids), row // len(call.samples)]
            kept = np.concatenate([prompt, kept], axis=1)
        result.append(
            FinishedSequence(
                sequence,
                tokens[row, :length],
                logprobs[row, :length],
                "stop" if finished[row] else "length",
                kept,
            )
        )
    return result
