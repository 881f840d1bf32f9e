"""Steer the embedded model so that it answers one rule's puzzles by another rule.

    python examples/steering.py                    # turn-clockwise, answered by copy-beside
    python examples/steering.py --rule copy-beside --other turn-clockwise --output steer.safetensors

Two kinds of vectors are measured on held-out puzzles, by strength: the difference of the mean residual
streams of both rules, added after one layer; and vectors for all layers, learned by gradient descent through
the interventions of a plain forward pass. Each batch holds every puzzle at every strength, 0 included.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tiny_model.asking import APPLY, answers_of, held_out_puzzles, load_tiny_model, prompts_of
from tiny_model.puzzles import draw_puzzle
from tiny_model.rules import Dice

from generate_jitted import generate_single_task_jitted
from qwen2_core.intervention_files import encode_interventions
from qwen2_core.interventions import Add
from qwen2_jax import QwenModel
from qwen2_jax_with_hooks import create_model_with_hooks

POINT = "hook_resid_post"
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
MEASURED = 16  # held-out puzzles
MEANS, BATCH, STEPS, RATE = 64, 16, 100, 0.05  # puzzles of each mean; puzzles of a step, and steps
LAYERS = (3, 7, 11, 15, 19)  # after which the difference of the means is tried
STRONGER = 4  # the difference of the means is tried up to 6 times its length
TOKENS = 20  # that the longest answer has


class Measured(NamedTuple):
    """Shares of whole answers by strength."""

    own: np.ndarray  # those of the puzzles' own rule
    other: np.ndarray
    tokens: np.ndarray  # share of the other answer's tokens that are in their place


class Steering:
    """The embedded model, and puzzles of a rule that it is to answer by another."""

    def __init__(self, rule: str, other: str) -> None:
        self.config, self.params, self.tokenizer = load_tiny_model()
        self.rule, self.other = rule, other
        self.layers = self.config.num_hidden_layers

    def seen_puzzles(self, rule: str, n: int) -> list[Any]:
        """Returns puzzles for finding vectors; none of their grids is one of the held-out puzzles."""
        dice = Dice(f"steering {rule}")
        return [draw_puzzle(rule, dice, held_out=False) for _ in range(n)]

    def mean_difference(self) -> np.ndarray:
        """Returns vectors [layers, hidden] from the rule's mean generated stream to that of the other."""
        model = create_model_with_hooks(self.config, range(self.layers))

        def mean(rule: str) -> np.ndarray:
            prompts = prompts_of(self.tokenizer, self.seen_puzzles(rule, MEANS))
            eos = self.tokenizer.eos_token_id
            out = generate_single_task_jitted(model, self.params, prompts, TOKENS, eos_token_ids=eos)
            return np.asarray(out.activations).sum((1, 2)) / int(out.lengths.sum())

        return mean(self.other) - mean(self.rule)

    def learn(self, steps: int = STEPS) -> np.ndarray:
        """Returns vectors [layers, hidden] under which the other rule's answers become likely (Adam)."""
        puzzles = self.seen_puzzles(self.rule, BATCH * steps)
        prompts = prompts_of(self.tokenizer, puzzles)
        token_ids = np.concatenate([prompts, answers_of(self.tokenizer, puzzles, self.other)], axis=1)
        model, start = QwenModel(self.config), prompts.shape[1]

        def loss(vectors: Array, ids: Array) -> Array:
            steer = Add(POINT, True, vectors)
            logits, _ = model.apply({"params": self.params}, ids[:, :-1], interventions=[steer])
            logprobs = jax.nn.log_softmax(logits[:, start - 1 :])
            return -jnp.take_along_axis(logprobs, ids[:, start:, None], axis=-1).mean()

        @jax.jit
        def step(state: tuple[Array, Array, Array], ids: Array, i: Array) -> tuple[Array, Array, Array]:
            vectors, mean, square = state
            slope = jax.grad(loss)(vectors, ids)
            mean, square = 0.9 * mean + 0.1 * slope, 0.99 * square + 0.01 * slope**2
            ratio = mean / (1 - 0.9**i) / (jnp.sqrt(square / (1 - 0.99**i)) + 1e-8)
            return vectors - RATE * (1 - i / (steps + 1)) * ratio, mean, square

        zeros = jnp.zeros((self.layers, self.config.hidden_size))
        state = (zeros, zeros, zeros)
        for i in range(steps):
            state = step(state, token_ids[BATCH * i : BATCH * (i + 1)], jnp.float32(i + 1))
        return np.asarray(state[0])

    def measure(self, vectors: np.ndarray, positions: str) -> Measured:
        """Generates from held-out puzzles, each at every strength, in one batch."""
        puzzles = held_out_puzzles(self.rule, MEASURED, "measure")
        prompts = np.repeat(prompts_of(self.tokenizer, puzzles), len(STRENGTHS), axis=0)
        steer = Add(POINT, True, vectors, strength=np.tile(STRENGTHS, MEASURED), positions=positions)
        out = generate_single_task_jitted(
            QwenModel(self.config),
            self.params,
            prompts,
            TOKENS,
            eos_token_ids=self.tokenizer.eos_token_id,
            extract_activations=False,
            interventions=[steer],
        )
        rows = [out.tokens(row) for row in range(len(prompts))]

        def share(equal: Any, rule: str) -> np.ndarray:
            answers = np.repeat(np.array(answers_of(self.tokenizer, puzzles, rule)), len(STRENGTHS), axis=0)
            found = [equal(row, answer.tolist()) for row, answer in zip(rows, answers, strict=True)]
            return np.reshape(found, (MEASURED, -1)).mean(0)

        same = partial(share, lambda row, answer: row == answer)
        in_place = share(
            lambda row, answer: np.mean([a == b for a, b in zip(row, answer, strict=False)]), self.other
        )
        return Measured(same(self.rule), same(self.other), in_place)


def only(vectors: np.ndarray, layer: int) -> np.ndarray:
    """Returns vectors that are 0 in all layers but one: which one is a value, so it never recompiles."""
    return vectors * (np.arange(len(vectors)) == layer)[:, None]


def print_table(title: str, strengths: Any, shares: dict[str, np.ndarray]) -> None:
    print(f"\n{title}\n{'strength':24}", *(f"{strength:6.2f}" for strength in strengths))
    for name, by_strength in shares.items():
        print(f"{name:24}", *(f"{share:6.0%}" for share in by_strength), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Steer the embedded model from one rule to another.")
    parser.add_argument("--rule", choices=APPLY, default="turn-clockwise")
    parser.add_argument("--other", choices=APPLY, default="copy-beside")
    parser.add_argument("--output", type=Path, help="write the learned vectors as a .safetensors file")
    options = parser.parse_args()
    steering = Steering(options.rule, options.other)
    print(f"{MEASURED} held-out puzzles of {options.rule}, answered by {options.other}")
    difference = steering.mean_difference()
    by_layer: dict[str, np.ndarray] = {}
    for layer in LAYERS:
        own, other, _ = steering.measure(only(STRONGER * difference, layer), "generated")
        by_layer |= {f"{layer:2} {options.rule}": own, f"{layer:2} {options.other}": other}
    strengths = STRONGER * np.array(STRENGTHS)
    print_table("Difference of the means, after one layer, at generated tokens", strengths, by_layer)
    learned = steering.learn()
    if options.output:
        options.output.write_bytes(encode_interventions(Add(POINT, True, learned)))
    own, other, tokens = steering.measure(learned, "all")
    shares = {options.rule: own, options.other: other, "its tokens": tokens}
    print_table("Learned vectors, after all layers, at all tokens", STRENGTHS, shares)


if __name__ == "__main__":
    main()
