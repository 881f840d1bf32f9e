"""Activation patching: which layer and position of the embedded model say what a puzzle's rule is.

    python examples/activation_patching.py                # writes patching.png
    python examples/activation_patching.py --output FILE.png

Two puzzles have the same input grids. In one, the outputs are mirrored left to right; in the other, coloured
cells fall down. The model reads the first, and at one layer and position the residual stream is replaced by
that of the second. The plot shows how far this moves the answer, at the first token where the two answers
differ: 0 is the first puzzle's own answer, 1 that of the second.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from tiny_model.asking import APPLY, answers_of, held_out_puzzles, load_tiny_model, prompts_of

from arc_puzzles import ArcTask, Pair
from qwen2_core.config import QwenConfig
from qwen2_core.interventions import Add
from qwen2_core.steering import steer
from qwen2_jax_with_hooks import create_model_with_hooks

RULES = ("flip-left-right", "fall-down")


class Patched(NamedTuple):
    """Two prompts that end before the first token where their answers differ."""

    effect: np.ndarray  # [layers, tokens]: 0 as the first prompt, 1 as the second
    token_ids: np.ndarray  # [2, tokens]
    answers: tuple[int, int]  # the next token of each
    differences: tuple[float, float]  # of these tokens' logits, after each prompt


def under_rule(puzzle: ArcTask, rule: str) -> ArcTask:
    """Returns a puzzle with the same inputs, whose outputs are a rule's."""
    pairs = [
        tuple(Pair(one.input, APPLY[rule](one.input)) for one in part) for part in (puzzle.train, puzzle.test)
    ]
    return ArcTask(rule, *pairs)


def patch(config: QwenConfig, params: Any, token_ids: np.ndarray, answers: tuple[int, int]) -> Patched:
    """Patches each layer and position of the first prompt from the second."""
    layers = config.num_hidden_layers
    model = create_model_with_hooks(config, extract_layers=range(layers))

    def run(ids: Any, interventions: Any = ()) -> tuple[Any, Any]:
        output: Any = model.apply({"params": params}, ids, interventions=interventions)
        logits, _, resid_post = output
        return logits[:, -1, answers[1]] - logits[:, -1, answers[0]], resid_post

    (first, second), resid_post = jax.jit(run)(token_ids)
    # What one layer has to add at a position is traced: all layers and positions are one program.
    added = np.asarray(resid_post[:, :, 1] - resid_post[:, :, 0])
    one_layer = np.eye(layers, dtype=np.float32)[:, :, None] * added.swapaxes(0, 1)[:, None]
    patched = jax.jit(jax.vmap(lambda steering: run(token_ids[:1], steering)[0][0]))
    effect = []
    for position, vectors in enumerate(one_layer):
        steered = [
            steer(Add("hook_resid_post", True, one, positions=[position]), config, 1) for one in vectors
        ]
        effect.append(patched(jax.tree.map(lambda *leaves: np.stack(leaves), *steered)))
    return Patched(
        (np.stack(effect, 1) - first) / (second - first), token_ids, answers, (float(first), float(second))
    )


def patch_rules(seed: str = "patching") -> tuple[Patched, Any]:
    """Patches the first puzzle under whose two rules the model answers rightly; returns its tokenizer too."""
    config, params, tokenizer = load_tiny_model()
    for puzzle in held_out_puzzles(RULES[0], 20, seed):
        puzzles = [under_rule(puzzle, rule) for rule in RULES]
        answers = [answers_of(tokenizer, [one], one.task_id)[0] for one in puzzles]
        if len(set(map(str, answers))) == 1 or any(a.input == a.output for one in puzzles for a in one.train):
            continue
        same = next(i for i, (a, b) in enumerate(zip(*answers, strict=True)) if a != b)
        ids = np.concatenate([prompts_of(tokenizer, puzzles), [answer[:same] for answer in answers]], axis=1)
        found = patch(config, params, ids, (answers[0][same], answers[1][same]))
        if found.differences[0] < 0 < found.differences[1]:
            return found, tokenizer
    raise SystemExit("No puzzle is answered by both rules.")


def draw(found: Patched, tokenizer: Any, path: Path) -> None:
    """Draws the effect by layer and position."""
    figure, axes = plt.subplots(figsize=(15, 5.2), layout="constrained")
    image = axes.imshow(found.effect, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-1, vmax=1)
    words = [tokenizer.decode([token]).split() or ["\\n"] for token in found.token_ids[0]]
    axes.set_xticks(
        range(len(words)), [word[0][:9] for word in words], rotation=90, fontsize=7, family="monospace"
    )
    for position in np.flatnonzero(found.token_ids[0] != found.token_ids[1]):
        axes.get_xticklabels()[position].set_color("tab:red")
    axes.set(xlabel="token of the prompt (red: it differs between the two)", ylabel="layer")
    axes.set_title(f"Patching the residual stream: from {RULES[0]} towards {RULES[1]}")
    figure.colorbar(image, label="effect: 0 own answer, 1 that of the other rule")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot the effect of patching by layer and position.")
    parser.add_argument("--output", type=Path, default=Path("patching.png"))
    options = parser.parse_args()
    found, tokenizer = patch_rules()
    a, b = (tokenizer.decode([token]) for token in found.answers)
    first, second = found.differences
    print(
        f"Logit of {b!r} less that of {a!r}: {first:+.2f} in the first puzzle, {second:+.2f} in the second."
    )
    print("\nLayer  position of the largest effect")
    for layer, effect in enumerate(found.effect):
        position = int(effect.argmax())
        print(f"{layer:5}  {position:3} of {len(effect)}: {effect[position]:.2f}")
    draw(found, tokenizer, options.output)
    print(f"\n{options.output}")


if __name__ == "__main__":
    main()
