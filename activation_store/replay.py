"""Computing stored rows again, as one plain forward pass without any cache, and comparing each with them.

This checks the generation itself: nothing of its cache, its loop or its batching is used here. The only
module of the store that needs jax and the model; import it where it is used.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from activation_store.format import INTERVENTIONS, SequenceRecord, StoreError
from activation_store.hook_labels import hook_label
from activation_store.reader import ActivationStore
from activation_store.verify import Progress, silently
from qwen2_core.checkpoint_files import checkpoint_fingerprint, is_hub_id
from qwen2_core.compilation import defined_settings
from qwen2_core.hook_points import LN_FINAL, RESID_POST, full_name, parse_name, width_of
from qwen2_core.intervention_files import decode_interventions
from qwen2_core.sharding import Layout
from qwen2_core.steering import Steering, steer
from qwen2_core.weights import load_params, read_config
from qwen2_jax_with_hooks import create_model_with_hooks

_BUCKET = 128  # lengths are padded to a multiple, so that a few programs serve all sequences


class Tolerance(NamedTuple):
    """How far stored values may be from replayed ones."""

    row: float  # norm of a row's difference, relative to the row's norm
    outlier: float  # the same, relative to its median over the sequence; a wrong row exceeds both limits
    rows: float  # root mean square of the relative norms over the sequence
    column: float  # norm of a column's difference over a sequence, relative to the column's norm
    logprob: float  # absolute, in nats

    def at(self, point: str) -> "Tolerance":
        """Returns that of the rows of a point; the values are those of the residual stream."""
        more = _BRANCH if point in _BRANCH_POINTS else 1
        return self._replace(row=more * self.row, rows=more * self.rows)


# float32: another order of summation only. In 16 bits the cached and the plain pass round differently in
# every layer. Over 56 long sequences of a lively random model of 24 layers (bfloat16) rows differed by 0.05
# in the middle, single ones by 0.31 and 6 times their sequence's median, log-probabilities by 0.9.
# Neighbouring layers may differ as little, so rows must also fit their own place best (`_better_fit`).
TOLERANCES = {
    "float32": Tolerance(row=1e-4, outlier=0, rows=1e-4, column=1e-2, logprob=1e-3),
    "bfloat16": Tolerance(row=0.1, outlier=10, rows=0.15, column=0.5, logprob=2.0),
    "float16": Tolerance(row=0.02, outlier=10, rows=0.03, column=0.1, logprob=0.3),
}
# Attention and the MLP round what they compute from the stream once more. Over four sequences of up to 250
# tokens of the embedded model (bfloat16) their values differed by 1.5 times as much as the stream's.
_BRANCH = 2.0
_BRANCH_POINTS = ("mlp.hook_post", "attn.hook_z", "hook_attn_out", "hook_mlp_out")
# A damaged column stands out from the others; where all columns are a little off, the row's limit decides.
_COLUMN_OUTLIER = 5.0
_CLEARLY = 0.7  # rows fit another place only with less than this share of their error here

Rows = Mapping[str, np.ndarray]  # float32 [n, width] by hook name
# Of tokens, the length of their prompt, and the strengths of interventions (SequenceId).
Forward = Callable[[np.ndarray, int, Sequence[float]], tuple[Rows, np.ndarray]]


def replay_store(
    store: ActivationStore, model_path: str, count: int, seed: int = 0, progress: Progress = silently
) -> Iterator[str]:
    """Replays `count` random sequences, compares every row and log-probability, and yields findings.

    Of a hub model that the store names it takes the commit that the store names.

    The memory needed is that of one forward pass over the longest sequence, its float32 logits included.

    Args:
        store: the store; its imported sequences, whose tokens are not known, are passed over.
        model_path: the checkpoint, a directory or hub id; it is loaded in the store's dtype.
        count: how many sequences, or all where there are fewer.
        seed: which sequences are drawn.
        progress: called once with the sequences.
    """
    settings = store.settings
    revision = _commit(store, model_path)
    if checkpoint_fingerprint(model_path, revision=revision) != settings.model_fingerprint:
        yield f"{model_path} is not the model that made the store (its fingerprint differs)"
        return
    # Scanned layers compile in a fraction of the time, which counts for a handful of sequences.
    config = read_config(model_path, dtype=settings.dtype, revision=revision, scan_layers=True)
    config = config.replace(residual_dtype=settings.residual_dtype or settings.dtype)
    params = load_params(model_path, config, Layout(), revision=revision)
    if config.hidden_size != settings.hidden_size:
        yield f"the stored rows are {settings.hidden_size} wide, the model's are {config.hidden_size}"
        return
    for hook in settings.hook_names:
        if (width := settings.hook_widths[hook]) != (of_model := width_of(parse_name(hook)[0], config)):
            yield f"the stored rows of {hook} are {width} wide, the model's are {of_model}"
            return
    try:
        steering = _steering(store, config)
    except ValueError as error:
        yield str(error)
        return
    chosen = progress(_choose(store, count, seed), "replay", "seq")
    forward = plain_forward(config, params, settings.hook_names, steering, settings.capture_before)
    yield from replay_sequences(store, chosen, forward)


def _commit(store: ActivationStore, model_path: str) -> str | None:
    commit = store.provenance.get("model_commit")
    named = isinstance(commit, str) and re.fullmatch("[0-9a-f]{40}", commit) is not None
    same = store.provenance.get("model_id") == model_path and is_hub_id(model_path)
    return commit if named and same else None


def replay_sequences(
    store: ActivationStore, records: Iterable[SequenceRecord], forward: Forward
) -> Iterator[str]:
    """Compares every stored row and log-probability of `records` with `forward`, and yields findings."""
    for record in records:
        for problem in _compare(store, record, forward):
            yield f"replay of {record.label}: {problem}"


def _choose(store: ActivationStore, count: int, seed: int) -> list[SequenceRecord]:
    """Draws `count` sequences without replacement and without holding all records (reservoir sampling)."""
    rng = np.random.default_rng(seed)
    chosen: list[SequenceRecord] = []
    with_tokens = store.sequences(where=lambda record: record.finish_reason != "imported")
    for number, record in enumerate(with_tokens):
        if len(chosen) < count:
            chosen.append(record)
        elif (place := int(rng.integers(number + 1))) < count:
            chosen[place] = record
    return chosen


def _steering(store: ActivationStore, config: Any) -> Steering | None:
    """Returns what is to be written into the model; raises ValueError where that is not known or fits not."""
    data = store.interventions()
    if data is None:
        return None
    found = decode_interventions(data, INTERVENTIONS)
    try:
        return steer(found, config, rows=1)
    except ValueError as error:
        raise ValueError(f"{INTERVENTIONS} does not fit the model: {error}") from error


def plain_forward(
    config: Any, params: Any, hooks: Sequence[str], steering: Steering | None = None, before: bool = False
) -> Forward:
    """Returns the model without any cache as a function of one sequence.

    It takes tokens, int32 [n], the prompt's length, and strengths, one for each intervention of `steering`,
    or () for its own. It returns the rows of `hooks`, float32 [n, width] by name, and the log-probabilities
    of the tokens after the first, float32 [n - 1]. With `before` rows are those before interventions.
    """
    captured = _capture(config, hooks, before)

    @jax.jit
    def run(
        params: Any, tokens: jax.Array, done: Steering | None, prompt_length: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        logits, found = captured(params, tokens[None], done, prompt_length)
        following = jnp.roll(tokens, -1)
        chosen = jnp.take_along_axis(logits[0], following[:, None], axis=-1)[:, 0]
        return found, chosen - jax.nn.logsumexp(logits[0], axis=-1)

    @defined_settings()
    def forward(
        tokens: np.ndarray, prompt_length: int, strengths: Sequence[float]
    ) -> tuple[Rows, np.ndarray]:
        padded = np.zeros(-(-len(tokens) // _BUCKET) * _BUCKET, np.int32)  # after the end: nothing sees it
        padded[: len(tokens)] = tokens
        done, known = steering, 0 if steering is None else len(steering.placed)
        if len(strengths) not in (0, known):
            raise StoreError(f"it has {len(strengths)} strengths of {known} interventions")
        if done is not None and strengths:
            done = dataclasses.replace(done, strengths=np.array([strengths], np.float32))
        found, logprobs = jax.device_get(run(params, jnp.asarray(padded), done, jnp.asarray(prompt_length)))
        rows = {hook: of_hook[: len(tokens)].astype(np.float32) for hook, of_hook in found.items()}
        return rows, logprobs[: len(tokens) - 1]

    return forward


def _capture(config: Any, hooks: Sequence[str], before: bool) -> Callable[..., tuple[jax.Array, Any]]:
    """Returns what gives logits and the rows [n, width] of each hook, for one sequence, int32 [1, n]."""
    of_points: dict[str, list[int | None]] = {}
    for point, layer in map(parse_name, hooks):
        of_points.setdefault(point, []).append(layer)
    layers = of_points.get(RESID_POST, [] if of_points else [0])
    points = {
        point: True if point == LN_FINAL else of_point
        for point, of_point in of_points.items()
        if point != RESID_POST
    }
    model = create_model_with_hooks(config, layers, points=points, capture_before=before)

    def captured(
        params: Any, tokens: jax.Array, steering: Steering | None, prompt_length: jax.Array
    ) -> tuple[jax.Array, Any]:
        output: Any = model.apply(
            {"params": params},
            tokens,
            interventions=() if steering is None else steering,
            prompt_lengths=prompt_length[None],
            method=model.forward,
        )
        arrays = {RESID_POST: output.activations} | (output.points if points else {})
        rows = {
            full_name(point, layer): arrays[point][place, :, 0]
            for point, of_point in of_points.items()
            for place, layer in enumerate(of_point)
        }
        return output.logits, rows

    return captured


def _compare(store: ActivationStore, record: SequenceRecord, forward: Forward) -> Iterator[str]:
    prompt, generated = store.prompt_token_ids(record), store.generated_tokens(record)
    try:
        replayed, logprobs = forward(np.concatenate([prompt, generated]), len(prompt), record.strengths)
    except StoreError as error:
        yield str(error)
        return
    limit = _tolerance(store)
    expected = logprobs[len(prompt) - 1 :]
    worst = np.abs(store.generated_logprobs(record) - expected)
    if not (worst <= limit.logprob).all():
        step = int(np.argmax(worst))
        stored = store.generated_logprobs(record)[step]
        yield f"log-probability of generated token {step} is {expected[step]:.4f}, stored {stored:.4f}"
    first = len(prompt) - record.prompt_rows
    replayed = {hook: rows[first:] for hook, rows in replayed.items()}
    for hook in store.settings.hook_names:
        problem = _rows_problem(store.rows(record, hook), replayed, hook, limit.at(parse_name(hook)[0]))
        if problem is not None:
            yield f"{hook}: {problem}"


def _tolerance(store: ActivationStore) -> Tolerance:
    """Returns that of the coarsest type involved: a KV cache may be in a smaller type than the rows."""
    dtype = store.settings.dtype
    cache = TOLERANCES.get(store.settings.prompt.get("kv_cache_dtype", dtype), TOLERANCES["bfloat16"])
    return max(TOLERANCES[dtype], cache)


def _rows_problem(stored: np.ndarray, replayed: Rows, hook: str, limit: Tolerance) -> str | None:
    """Returns what is wrong with the rows [n, width] of a hook, or None."""
    expected = replayed[hook]
    if stored.shape != expected.shape:
        return f"{stored.shape} values are stored, {expected.shape} are computed"
    errors = _row_errors(stored, expected)
    better = _better_fit(stored, replayed, hook, _rms(errors))
    if better is not None:
        return f"the rows are those of {better}"
    wrong = ~(errors <= max(limit.row, limit.outlier * float(np.median(errors))))
    if wrong.any():
        worst = float(np.nanmax(errors))
        return f"{np.count_nonzero(wrong)} of {len(errors)} rows differ, the worst by {worst:.2g} of its norm"
    if _rms(errors) > limit.rows:
        return f"the rows differ by {_rms(errors):.2g} of their norm"
    differences = np.linalg.norm(stored - expected, axis=0)
    relative = differences / np.maximum(np.linalg.norm(expected, axis=0), np.finfo(np.float32).tiny)
    outliers = (relative > limit.column) & (differences > _COLUMN_OUTLIER * np.median(differences))
    if outliers.any():
        return f"columns {np.flatnonzero(outliers).tolist()[:8]} differ"
    return None


def _better_fit(stored: np.ndarray, replayed: Rows, hook: str, error: float) -> str | None:
    """Returns another hook, or the same one a position off, that the rows are clearly closer to."""
    own = replayed[hook]
    fits = {
        f"layer {label}" if isinstance(label := hook_label(other), int) else other: _rms(
            _row_errors(stored, rows)
        )
        for other, rows in replayed.items()
        if other != hook and rows.shape == own.shape
    }
    if len(stored) > 1:
        fits["position +1"] = _rms(_row_errors(stored[:-1], own[1:]))
        fits["position -1"] = _rms(_row_errors(stored[1:], own[:-1]))
    best = min(fits, key=lambda name: fits[name], default=None)
    return best if best is not None and fits[best] < _CLEARLY * error else None


def _row_errors(stored: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Returns each row's relative error, [n]."""
    norms = np.linalg.norm(expected, axis=1)  # an intervention may have made them 0
    return np.linalg.norm(stored - expected, axis=1) / np.maximum(norms, np.finfo(np.float32).tiny)


def _rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(errors**2)))
