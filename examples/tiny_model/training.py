"""Training of the embedded model: a few layers first, then all 24, with Muon, on seeded puzzles.

The loss is on what can be known: the second example's output, and the answer with the token that ends it.
"""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers, muon

from arc_puzzles import ArcTask, build_messages, create_grid_encoder
from arc_puzzles.chat import encode_prompts
from qwen2_jax import QwenConfig, QwenModel
from tiny_model.puzzles import draw_training_puzzle
from tiny_model.rules import Dice

PROMPT_VERSION = "output-from-examples-v0"  # the runner's defaults
ENCODER = create_grid_encoder("GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")
OUTPUT, TEST = "\n```\n\nOutput:\n```grid shape: ", "\n```\n\n### Test\n\nInput:\n```grid shape: "

WIDTH = 112  # tokens that the longest puzzle has with its answer
WARM_UP = 20  # steps
NEW_LAYER_SCALE = 0.1  # of what a layer adds that is put between trained ones

Params = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """Holds one part of the training: `batch` puzzles a step.

    `rate` is that of Muon, for the layers' matrices; that of Adam, for the embedding, norms and biases, is a
    quarter of it. Both fall to zero in the last `decay` steps.
    """

    layers: int
    steps: int
    batch: int = 32
    rate: float = 1e-2
    decay: int = 1


RECIPE = (
    Phase(layers=6, steps=200),
    Phase(layers=6, steps=200),
    Phase(layers=6, steps=200, decay=200),
    Phase(layers=24, steps=150, batch=24, rate=5e-3, decay=130),
)


class Batch(NamedTuple):
    """Puzzles with their answers, padded on the right, and which of their tokens are to be predicted."""

    token_ids: np.ndarray  # int32 [puzzles, width]
    wanted: np.ndarray  # bool [puzzles, width]
    answer: np.ndarray  # bool [puzzles, width]: those of the wanted that are the answer


def encode(tokenizer: Any, puzzles: list[ArcTask]) -> Batch:
    """Returns the puzzles as the runner puts them, with their right answers. None is longer than WIDTH."""
    prompts = encode_prompts(tokenizer, [build_messages(one, 0, ENCODER, PROMPT_VERSION) for one in puzzles])
    texts = [ENCODER.encode(output) for one in puzzles if (output := one.outputs[0])]
    answers = tokenizer(texts, add_special_tokens=False)["input_ids"]
    output, test = tokenizer.convert_tokens_to_ids([OUTPUT, TEST])
    token_ids = np.full((len(puzzles), WIDTH), tokenizer.pad_token_id, np.int32)
    wanted, is_answer = np.zeros((2, len(puzzles), WIDTH), bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer) + 1
        token_ids[i, :end] = [*prompt, *answer, tokenizer.eos_token_id]
        is_answer[i, len(prompt) : end] = True
        _, second = np.flatnonzero(prompt == output)
        (after,) = np.flatnonzero(prompt == test)
        wanted[i, second + 1 : after + 1] = True
    return Batch(token_ids, wanted | is_answer, is_answer)


def training_batches(tokenizer: Any, size: int, seed: str) -> Iterator[Batch]:
    """Yields batches of `size` puzzles for ever."""
    dice = Dice(seed)
    while True:
        yield encode(tokenizer, [draw_training_puzzle(dice) for _ in range(size)])


# --- Weights ------------------------------------------------------------------------------------------------


def _ends_block(path: Any) -> bool:
    return any(key.key in ("o_proj", "down_proj") for key in path)


def init_params(config: QwenConfig, seed: int) -> Params:
    """Returns random weights: matrices of deviation 1/sqrt(inputs), less where a block ends."""
    shapes = jax.eval_shape(QwenModel(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    leaves, tree = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def draw(path: Any, shape: tuple[int, ...], key: Array) -> Array:
        match path[-1].key:
            case "weight":
                return jnp.ones(shape)
            case "bias":
                return jnp.zeros(shape)
            case "embedding":
                return 0.1 * jax.random.normal(key, shape)
        scale = (0.3 if _ends_block(path) else 1.0) / np.sqrt(shape[-2])
        return scale * jax.random.normal(key, shape)

    return jax.tree.unflatten(
        tree, [draw(path, leaf.shape, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    )


def grow(params: Params, config: QwenConfig, seed: int) -> Params:
    """Returns the model with as many new layers after each trained one as make up the config's depth.

    A new layer adds little to the residual stream at first.
    """
    fresh = init_params(config, seed)["layers"]
    trained = jax.tree.leaves(params["layers"])[0].shape[0]

    def mix(path: Any, new: Array, old: Array) -> Array:
        new = NEW_LAYER_SCALE * new if _ends_block(path) else new
        return new.at[:: config.num_hidden_layers // trained].set(old)

    return {**params, "layers": jax.tree.map_with_path(mix, fresh, params["layers"])}


def state_dict(params: Params) -> dict[str, np.ndarray]:
    """Returns the weights by their Hugging Face names, `[out, in]` for projections."""
    state = {
        "model.embed_tokens.weight": np.asarray(params["embed_tokens"]["embedding"]),
        "model.norm.weight": np.asarray(params["norm"]["weight"]),
    }
    for path, stack in jax.tree.leaves_with_path(params["layers"]):
        *names, kind = (key.key for key in path)
        for layer, array in enumerate(np.asarray(stack)):
            name = ".".join(["model.layers", str(layer), *names, "weight" if kind == "kernel" else kind])
            state[name] = np.ascontiguousarray(array.T)
    return state


# --- The loop -----------------------------------------------------------------------------------------------


def optimizer(phase: Phase) -> optax.GradientTransformation:
    """Returns Muon for the layers' matrices and Adam for the rest, with warm-up and decay."""

    def schedule(rate: float) -> Any:
        def at(step: Array) -> Array:
            up, down = (step + 1) / WARM_UP, (phase.steps - step) / phase.decay
            return rate * jnp.minimum(1.0, jnp.minimum(up, down))

        return at

    def matrices(params: Any) -> Any:
        numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map_with_path(lambda path, _: numbers if path[-1].key == "kernel" else None, params)

    return muon(
        schedule(phase.rate),
        adam_learning_rate=schedule(phase.rate / 4),
        muon_weight_dimension_numbers=matrices,
    )


def _predictions(model: QwenModel, params: Params, token_ids: Array) -> Array:
    return model.apply({"params": params}, token_ids[:, :-1])[0]


def train(params: Params, config: QwenConfig, phase: Phase, batches: Iterator[Batch]) -> Params:
    """Trains for one phase; prints the loss every 50 steps, the mean of these."""
    model, optimize = QwenModel(config), optimizer(phase)

    @jax.jit
    def step(params: Params, state: Any, token_ids: Array, wanted: Array) -> tuple[Any, Any, Array]:
        def loss(params: Params) -> Array:
            logits = _predictions(model, params, token_ids)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, token_ids[:, 1:])
            return jnp.sum(each, where=wanted[:, 1:]) / jnp.sum(wanted)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimize.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses, started = optimize.init(params), [], time.perf_counter()
    for number, batch in zip(range(1, phase.steps + 1), batches, strict=False):
        params, state, value = step(params, state, batch.token_ids, batch.wanted)
        losses.append(value)
        if number % 50 == 0 or number == phase.steps:
            seconds = time.perf_counter() - started
            loss = np.mean(losses[-50:])
            print(f"{phase.layers} layers, step {number}: loss {loss:.3f}, {seconds:.0f} s", flush=True)
    return params


def solved(params: Params, config: QwenConfig, batch: Batch) -> np.ndarray:
    """Tells of each puzzle whether the greedy answer is the right one, bool `[puzzles]`.

    It is where each token of the right answer is the likeliest after those before it.
    """
    likeliest = np.asarray(_likeliest(QwenModel(config), params, batch.token_ids))
    return ((likeliest == batch.token_ids[:, 1:]) | ~batch.answer[:, 1:]).all(axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _likeliest(model: QwenModel, params: Params, token_ids: Array) -> Array:
    return _predictions(model, params, token_ids).argmax(-1)
