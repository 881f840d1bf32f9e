"""Train a small sparse autoencoder on one stored layer and print its falling loss.

python examples/train_sae.py                       # makes a small store from the embedded example first
python examples/train_sae.py activations --layer 12
"""

import argparse
import itertools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import optax

from activation_store import ActivationStore, RowFilter, ShuffledBatches, StoreError
from distributed_kv_cached_inference import main as run

SPARSITY = 0.5
Params = dict[str, jax.Array]


def init(key: jax.Array, hidden: int, features: int) -> Params:
    decoder = jax.random.normal(key, (features, hidden))
    decoder /= jnp.linalg.norm(decoder, axis=1, keepdims=True)
    return {
        "encoder": decoder.T,
        "encoder_bias": jnp.zeros(features),
        "decoder": decoder,
        "decoder_bias": jnp.zeros(hidden),
    }


def loss(params: Params, rows: jax.Array, sparsity: float) -> tuple[jax.Array, jax.Array]:
    """(squared error relative to the rows' own, plus sparsity; features in use per row)."""
    features = jax.nn.relu((rows - params["decoder_bias"]) @ params["encoder"] + params["encoder_bias"])
    error = features @ params["decoder"] + params["decoder_bias"] - rows
    scale = jnp.linalg.norm(params["decoder"], axis=1)  # else a large decoder would make sparsity cheap
    penalty = sparsity * (features * scale).sum(axis=1).mean() / rows.shape[1]
    return (error**2).mean() / (rows**2).mean() + penalty, (features > 0).sum(axis=1).mean()


def train(store: ActivationStore, layer: int, steps: int, batch_size: int, features: int) -> list[float]:
    """The loss of every step."""
    statistics = store.statistics(layer)
    mean, scale = jnp.asarray(statistics.mean, jnp.float32), float(statistics.variance.mean()) ** 0.5
    batches = ShuffledBatches(store, layer, batch_size, rows=RowFilter(prompt=False), framework="jax")
    optimizer = optax.adam(1e-3)
    params = init(jax.random.key(0), store.settings.hidden_size, features)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Params, state: Any, rows: jax.Array) -> tuple[Params, Any, jax.Array, jax.Array]:
        rows = (rows - mean) / scale
        (value, in_use), gradient = jax.value_and_grad(loss, has_aux=True)(params, rows, SPARSITY)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value, in_use  # type: ignore[return-value]

    losses: list[float] = []
    for batch in itertools.chain.from_iterable(itertools.repeat(batches)):  # each epoch is shuffled anew
        params, state, value, in_use = step(params, state, batch.rows)
        losses.append(float(value))
        if len(losses) % (steps // 10 or 1) == 0:
            print(f"step {len(losses):5d}   loss {value:.4f}   features in use {in_use:.1f} of {features}")
        if len(losses) == steps:
            return losses
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a sparse autoencoder on one stored layer.")
    parser.add_argument("directory", nargs="?", help="activation store (default: make a small one)")
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--features", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.directory
        if directory is None:
            directory = f"{scratch}/activations"
            where = ["--activations_dir", directory, "--output_filepath", f"{scratch}/submission.json"]
            run([*where, "--max_output_tokens", "64", "--temperature", "1.0"])
        store = ActivationStore(directory)
        try:
            rows = store.statistics(options.layer).count
        except StoreError as error:  # there is no such layer, or no row of it
            parser.error(str(error))
        if rows < options.batch_size:
            parser.error(f"{directory} has {rows} generated rows of layer {options.layer}: not one batch")
        losses = train(store, options.layer, options.steps, options.batch_size, options.features)
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} on {rows} rows of layer {options.layer}")


if __name__ == "__main__":
    main()
