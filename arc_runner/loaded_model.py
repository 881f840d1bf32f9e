"""A run's loaded model: weights on the device, compiled calls, and their results on the host."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from activation_store import FinishedSequence
from arc_runner.console import say
from arc_runner.hook_flags import points_of
from arc_runner.job import Job
from arc_runner.steering_file import interventions_of
from arc_runner.waiting import Waiting
from arc_runner.workload import Call
from generate_jitted import GenerateShape, Generation, compile_generate, generate_single_task_jitted
from qwen2_core.compilation import defined_settings
from qwen2_core.hook_points import RESID_POST
from qwen2_core.interventions import Intervention
from qwen2_core.kernels.cpu.library import unavailable_reason
from qwen2_core.parameter_checks import abstract_params
from qwen2_core.requests import pad_to
from qwen2_core.sampling import sampling_params
from qwen2_core.weights import load_params
from qwen2_engine.python_loop import generate_single_task_python
from qwen2_jax import QwenModel
from qwen2_jax_with_hooks import create_model_with_hooks


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Holds a model with its weights on the device, and makes a run's calls."""

    job: Job
    model: QwenModel
    params: Any

    @classmethod
    def load(cls, job: Job) -> LoadedModel:
        """Reads the weights onto the device, and returns when they are there."""
        config = job.config
        options = job.options
        params = load_params(options.model_path, config, job.layout, revision=options.revision)
        if config.dtype == np.dtype("bfloat16") and (reason := unavailable_reason()):
            say(f"bfloat16 is multiplied by XLA, up to 2.6 times slower than need be: {reason}")
        return cls(job, _model(job), jax.block_until_ready(params))

    @classmethod
    def without_weights(cls, job: Job) -> LoadedModel:
        """Returns the model with the shapes of its weights alone, to plan with."""
        return cls(job, _model(job), abstract_params(job.config, job.layout))

    @functools.cached_property
    def interventions(self) -> list[Intervention]:
        """What is written into the model."""
        return interventions_of(self.job.interventions)

    def compile(self, calls: Sequence[Call]) -> int:
        """Compiles every shape of ``calls``, side by side, and returns how many there were."""
        shapes = list(dict.fromkeys(self.shape(call) for call in calls))
        say(f"compiling {len(shapes)} shapes")
        done = 0
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            Waiting(lambda: f"compiling: {done} of {len(shapes)} shapes done"),
        ):
            steered = self.interventions

            def compile_one(shape: GenerateShape) -> None:
                compile_generate(self.model, self.params, shape, steered)

            for _ in pool.map(compile_one, shapes):
                done += 1
        return len(shapes)

    def generate(self, call: Call) -> Generation:
        """Makes one call in the way that ``--generation`` names, and returns when its tokens are there."""
        options = self.job.options
        input_ids, lengths = pad_to(call.prompts, call.width)
        kwargs: dict[str, Any] = {
            "prompt_lengths": lengths,
            "samples_per_prompt": call.samples_per_prompt,
            "eos_token_ids": self.job.eos,
            "sampling": options.sampling,
            "seed": options.random_seed,
            "sequence_ids": np.array([request.sampling_id for request in call.requests]),
            "extract_prompt": options.extract_prompt,
            "interventions": self.interventions,
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

    def shape(self, call: Call) -> GenerateShape:
        """Returns what decides the programs of a call."""
        options = self.job.options
        traced = sampling_params(
            options.sampling, options.random_seed, self.job.eos, self.job.config.vocab_size
        )
        return GenerateShape(
            num_prompts=len(call.prompts),
            prompt_width=call.width,
            max_tokens=options.max_output_tokens,
            samples_per_prompt=call.samples_per_prompt,
            cache_dtype=None if options.kv_cache_dtype is None else np.dtype(options.kv_cache_dtype),
            stop=len(self.job.eos) > 0,
            capture_prompt=options.extract_prompt,
            sampling=traced.shape,
        )


def _model(job: Job) -> QwenModel:
    options = job.options
    if options.extract_activations:
        return create_model_with_hooks(
            job.config,
            options.layers_to_extract,
            points=points_of(options.hook_points),
            capture_before=options.capture_before,
        )
    return QwenModel(job.config)


@defined_settings()
def finished_sequences(call: Call, generation: Generation, wanted: Sequence[bool]) -> list[FinishedSequence]:
    """Copies a call's results to the host as finished sequences, without padding and what follows EOS.

    Rows are [layers, positions, width] in the model's dtype, those of other points by name. Sequences that
    are not ``wanted`` are left out.
    """
    tokens, logprobs = np.asarray(generation.token_ids), np.asarray(generation.logprobs)
    lengths, finished = np.asarray(generation.lengths), np.asarray(generation.finished)
    rows = _on_host(generation.activations, generation.points)
    prompt_rows = _on_host(generation.prompt_activations, generation.prompt_points)
    result = []
    for row, request in enumerate(call.requests):
        if not wanted[row]:
            continue
        length = int(lengths[row])
        kept = {point: of_point[:, :length, row] for point, of_point in rows.items()}
        if request.capture_prompt:
            read, prompt = len(request.prompt_token_ids), row // call.samples_per_prompt
            for point, of_point in prompt_rows.items():
                kept[point] = np.concatenate([of_point[:, :read, prompt], kept[point]], axis=1)
        activations = kept.pop(RESID_POST, None)
        reason = "stop" if finished[row] else "length"
        result.append(
            FinishedSequence(
                request.id,
                tokens[row, :length],
                logprobs[row, :length],
                reason,
                activations,
                key=request.key,
                points=kept,
            )
        )
    return result


def _on_host(activations: Any, points: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns rows by point, those of the chosen layers' outputs among them."""
    every = points if activations is None else {RESID_POST: activations, **points}
    return {point: np.asarray(of_point) for point, of_point in every.items()}
