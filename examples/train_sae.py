"""Train a small sparse autoencoder on one stored layer, and save it as SAELens does.

python examples/train_sae.py                       # makes a small store from the embedded example first
python examples/train_sae.py activations --layer 12 --output sae

`SAE.load_from_disk("sae")` of SAELens loads what --output writes.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float32
from safetensors.numpy import save_file

from activation_store import ActivationStore, RowFilter, ShuffledBatches, StoreError, hook_name
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


class SparseAutoencoder(NamedTuple):
    """A trained autoencoder of the stored rows as they are, under SAELens' names."""

    W_enc: Float32[np.ndarray, "hidden features"]
    b_enc: Float32[np.ndarray, " features"]
    W_dec: Float32[np.ndarray, "features hidden"]
    b_dec: Float32[np.ndarray, " hidden"]

    def encode(self, rows: Float32[np.ndarray, "n hidden"]) -> Float32[np.ndarray, "n features"]:
        """Returns how strongly each feature is active in each row."""
        return np.maximum((rows - self.b_dec) @ self.W_enc + self.b_enc, 0)

    def save(self, folder: str | Path, layer: int) -> None:
        """Writes the two files of which SAELens makes an SAE for ``layer``, in a folder made if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in self._asdict().items()}
        save_file(tensors, folder / "sae_weights.safetensors")
        hidden, features = self.W_enc.shape
        configuration = {
            "architecture": "standard",
            "d_in": hidden,
            "d_sae": features,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {"sae_lens_version": "6.0.0", "hook_name": hook_name(layer)},  # of this form
        }
        (folder / "cfg.json").write_text(json.dumps(configuration, indent=2) + "\n")


def train(
    store: ActivationStore, layer: int, steps: int, batch_size: int, features: int
) -> tuple[SparseAutoencoder, list[float]]:
    """Returns the autoencoder, and the loss of every step."""
    statistics = store.statistics(layer)
    mean, scale = np.float32(statistics.mean), float(statistics.variance.mean()) ** 0.5
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
    epochs = itertools.chain.from_iterable(itertools.repeat(batches))  # each is shuffled anew
    for batch in itertools.islice(epochs, steps):
        params, state, value, in_use = step(params, state, batch.rows)
        losses.append(float(value))
        if len(losses) % (steps // 10 or 1) == 0:
            print(f"step {len(losses):5d}   loss {value:.4f}   features in use {in_use:.1f} of {features}")
    trained = {name: np.asarray(value) for name, value in params.items()}
    return SparseAutoencoder(  # of rows as they are stored: the scaling goes into the weights
        trained["encoder"] / scale,
        trained["encoder_bias"],
        trained["decoder"] * scale,
        trained["decoder_bias"] * scale + mean,
    ), losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a sparse autoencoder on one stored layer.")
    parser.add_argument("directory", nargs="?", help="activation store (default: make a small one)")
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--output", help="folder to save the autoencoder in")
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
        autoencoder, losses = train(store, options.layer, options.steps, options.batch_size, options.features)
        if options.output:
            autoencoder.save(options.output, options.layer)
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} on {rows} rows of layer {options.layer}")


if __name__ == "__main__":
    main()
