"""Makes the parameter tree of a Hugging Face checkpoint, straight from safetensors, without torch.

The tree is that of a Flax linen model: ``embed_tokens/embedding``,
``layers_{i}/self_attn/q_proj/{kernel,bias}``, ``layers_{i}/mlp/down_proj/kernel``,
``layers_{i}/input_layernorm/weight``, ``norm/weight`` and, if the head is untied, ``lm_head/kernel``. Qwen3
has no biases, and ``layers_{i}/self_attn/{q_norm,k_norm}/weight``.
Kernels are ``[in, out]``, the transpose of Hugging Face's. With ``config.scan_layers`` the layers are one
stack ``layers/...`` with a leading axis.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen2_core.checkpoint_files import (
    is_hub_id,
    open_tensors,
    read_json_object,
    resolve_file,
    weights_dtype,
)
from qwen2_core.compilation import defined_settings
from qwen2_core.config import QwenConfig, said_dtype
from qwen2_core.errors import CheckpointError
from qwen2_core.generation_config import checkpoint_sampling, unapplied_settings
from qwen2_core.inputs import yes_or_no
from qwen2_core.kernels.cpu.library import is_available
from qwen2_core.sampling import Sampling
from qwen2_core.sharding import Layout, make_layout
from qwen2_core.tensor_names import HEAD, TensorSpec, is_tied, locate, locate_stored, tensor_specs

Params = dict[str, Any]
_logger = logging.getLogger(__name__)
_CACHE_LINE, _HUGE_PAGE = 64, 2**21  # bytes
_SMALL_LAYER = 2**22  # bytes of a layer's weights that XLA copies on CPU in no measurable time


@defined_settings()
def convert_hf_to_jax_weights(hf_model_or_state_dict: Any, config: QwenConfig) -> Params:
    """Returns the parameter tree of a Hugging Face model, or of its state dict of torch or numpy arrays.

    The weights are copied, in ``config.dtype``, onto the default device.

    Raises:
        CheckpointError: listing every missing, unexpected, mis-shaped and mis-typed tensor; or the head is
            not the embedding that the config says it is.
    """
    state = hf_model_or_state_dict
    if not isinstance(state, Mapping):
        state = state.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}
    names = locate(shapes, dtypes, config, "The state dict")

    def read(name: str) -> np.ndarray:
        return _to_numpy(state[names[name]])

    _refuse_another_head(read, names, config, "The state dict")
    return _build_tree(config, read, Layout())


def load_qwen2(
    path_or_hub_id: str | Path,
    *,
    dtype: Any = None,
    revision: str | None = None,
    scan_layers: bool | None = None,
    mesh_shape: tuple[int, int] = (1, 1),
) -> tuple[QwenConfig, Params]:
    """Reads a Qwen2 or dense Qwen3 checkpoint, tensor by tensor, onto the default device or several devices.

    Args:
        path_or_hub_id: a directory in Hugging Face layout (``config.json`` and one or several
            ``.safetensors``), or a hub id such as ``Qwen/Qwen2.5-0.5B-Instruct``.
        dtype: of the weights and of the computation, also as torch's or by name; the checkpoint's own by
            default and for "auto".
        revision: branch, tag or commit of a hub model.
        scan_layers: stack the layers' weights, to be run as one ``lax.scan``, which compiles sooner; by
            default where it runs as fast, see ``scans_layers_by_default``.
        mesh_shape: (data, model) devices, see :mod:`qwen2_core.sharding`. Generation runs where the weights
            are.

    Warns of settings in ``generation_config.json`` that would change the tokens: none of them is applied.

    Returns:
        (config, params), for ``QwenModel(config).apply({"params": params}, ...)``.

    Raises:
        CheckpointError: no checkpoint there, another architecture, a truncated file, or tensors missing,
            unexpected or mis-shaped (all of them listed).
        ValueError: there are not so many devices, the model cannot be split over them, or scan_layers is no
            flag.
    """
    config = read_config(path_or_hub_id, dtype=dtype, revision=revision, scan_layers=scan_layers)
    _warn_of_unapplied_settings(path_or_hub_id, revision)
    layout = make_layout(config, mesh_shape)
    return config, load_params(path_or_hub_id, config, layout, revision=revision)


def _warn_of_unapplied_settings(path_or_hub_id: str | Path, revision: str | None) -> None:
    sampling = "sampling is what a call says"
    try:
        unapplied = unapplied_settings(path_or_hub_id, revision=revision)
        if unapplied and (asked := checkpoint_sampling(path_or_hub_id, revision=revision)) != Sampling():
            sampling += f", and sampling={asked.describe()} says it so"
    except CheckpointError as error:  # the weights are as good without it
        unapplied = f"no generation_config.json is read: {error}"
    if unapplied:
        _logger.warning("%s: %s; %s", path_or_hub_id, unapplied, sampling)


def read_config(
    path_or_hub_id: str | Path,
    *,
    dtype: Any = None,
    revision: str | None = None,
    scan_layers: bool | None = None,
) -> QwenConfig:
    """Reads a checkpoint's config, and from its weights what the config does not decide.

    The dtype that no config names is that of the weights. A head that the config says is the embedding, but
    that is stored with other values, is a head of its own. Both are as in Transformers.

    Args:
        path_or_hub_id: as in ``load_qwen2``, like the other arguments.

    Raises:
        CheckpointError: as ``load_qwen2``.
        ValueError: scan_layers is no flag.
    """
    scan_layers = None if scan_layers is None else yes_or_no("scan_layers", scan_layers)
    if not isinstance(revision, str | None):
        raise CheckpointError(f"revision must be a branch, tag or commit, not {revision!r}.")
    if revision is not None and not is_hub_id(path_or_hub_id):
        raise CheckpointError(f"revision {revision!r} is for hub models; {path_or_hub_id} is none.")
    hf = read_json_object(resolve_file(path_or_hub_id, "config.json", revision=revision))
    config = QwenConfig.from_hf(hf)
    dtype = None if isinstance(dtype, str) and dtype == "auto" else dtype
    if dtype is None and said_dtype(hf) is None:
        dtype = weights_dtype(path_or_hub_id, revision=revision)
    config = config.replace(dtype=config.dtype if dtype is None else dtype)
    config = config.replace(
        scan_layers=scans_layers_by_default(config) if scan_layers is None else scan_layers
    )
    if not config.tie_word_embeddings:
        return config
    with open_tensors(path_or_hub_id, revision=revision) as stored:
        names = locate_stored(stored, config)
        if is_tied(lambda name: stored.read(names[name]), names, config):
            return config
        _logger.warning(
            "the config of %s says that the head is the embedding, but %s has other values: it is used, as "
            "Transformers does",
            path_or_hub_id,
            names[HEAD],
        )
        return config.replace(tie_word_embeddings=False)


def scans_layers_by_default(config: QwenConfig) -> bool:
    """Tells whether ``load_qwen2`` stacks the layers' weights by default: where a scan costs no speed.

    That is on TPUs; on CPU in bfloat16, where the compiled kernels read weights within their stacks, and for
    small layers in any dtype. Elsewhere XLA copies each layer's weights out of the stacks in every step.
    """
    platform = jax.default_backend()
    if platform != "cpu":
        return platform == "tpu"
    specs = tensor_specs(config).values()
    layer = sum(math.prod(spec.tree_shape) for spec in specs if spec.path[0] == "layers_0")
    in_place = config.dtype == jnp.bfloat16 and is_available()
    return in_place or layer * config.dtype.itemsize <= _SMALL_LAYER


@defined_settings()
def load_params(
    path_or_hub_id: str | Path, config: QwenConfig, layout: Layout, *, revision: str | None = None
) -> Params:
    """Reads a checkpoint's weights to where ``layout`` says, for a config that was read before.

    Raises:
        CheckpointError: as ``load_qwen2``.
    """
    with open_tensors(path_or_hub_id, revision=revision) as stored:
        names = locate_stored(stored, config)

        def read(name: str) -> np.ndarray:
            return stored.read(names[name])

        _refuse_another_head(read, names, config, f"The checkpoint in {stored.directory}")
        return _build_tree(config, read, layout)


def check_checkpoint(path_or_hub_id: str | Path, config: QwenConfig, *, revision: str | None = None) -> None:
    """Raises what ``load_qwen2`` would. Reads only the headers of the weight files, which takes milliseconds.

    Raises:
        CheckpointError: no weights, a truncated file, or tensors missing, unexpected or mis-shaped.
    """
    with open_tensors(path_or_hub_id, revision=revision) as stored:
        locate_stored(stored, config)


def stack_layers(params: Params) -> Params:
    """Returns the tree with ``layers_0 .. layers_{L-1}`` stacked into ``layers``, for ``scan_layers``."""
    count = sum(name.startswith("layers_") for name in params)
    layers = [params[f"layers_{i}"] for i in range(count)]
    rest = {name: value for name, value in params.items() if not name.startswith("layers_")}
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def _build_tree(config: QwenConfig, read: Callable[[str], np.ndarray], layout: Layout) -> Params:
    """Fills the tree, one tensor or stack at a time, so that only one is held beside the tree itself."""
    specs = tensor_specs(config)
    tree: Params = {}

    def place(path: tuple[str, ...], array: np.ndarray) -> None:
        *parents, name = path
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        # Waits, so that the next array is not made before this one is on the device.
        node[name] = jax.block_until_ready(layout.place_weight(path, array))

    if config.scan_layers:
        for path, names in _stacks(specs, config.num_hidden_layers):
            # Filled in place: np.stack would hold every layer twice.
            stack = _empty((len(names), *specs[names[0]].tree_shape), config.dtype)
            for layer, name in zip(stack, names, strict=True):
                _copy(read(name), specs[name], layer)
            place(("layers", *path), stack)
    for name, spec in specs.items():
        if not (config.scan_layers and spec.path[0].startswith("layers_")):
            array = _empty(spec.tree_shape, config.dtype)
            _copy(read(name), spec, array)
            place(spec.path, array)
    return tree


def _copy(tensor: np.ndarray, spec: TensorSpec, into: np.ndarray) -> None:
    """Copies a tensor as stored into an array of the tree, transposed and cast where needed."""
    if tensor.dtype == into.dtype:
        as_integers = np.dtype(f"u{into.dtype.itemsize}")  # which numpy copies quickly; bfloat16 it does not
        tensor, into = tensor.view(as_integers), into.view(as_integers)
    into[...] = tensor.T if spec.transposed else tensor


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns uninitialised memory that JAX on CPU takes over without a copy; large arrays in huge pages.

    JAX copies what does not begin at a cache line. With huge pages, which Linux has, a decode step at batch 1
    is 8 % faster.
    """
    size = math.prod(shape) * dtype.itemsize
    if size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        pages, alignment = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE), _HUGE_PAGE
        with contextlib.suppress(OSError):  # Linux without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(pages, np.uint8)
    else:
        memory, alignment = np.empty(size + _CACHE_LINE, np.uint8), _CACHE_LINE
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


def _stacks(specs: Mapping[str, TensorSpec], count: int) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yields each path within a layer, and the names of the ``count`` layers' tensors that belong there."""
    by_path = {spec.path: name for name, spec in specs.items()}
    for path in list(by_path):
        if path[0] == "layers_0":
            yield path[1:], [by_path[(f"layers_{i}", *path[1:])] for i in range(count)]


def _refuse_another_head(
    read: Callable[[str], np.ndarray], names: Mapping[str, str], config: QwenConfig, where: str
) -> None:
    if config.tie_word_embeddings and not is_tied(read, names, config):
        raise CheckpointError(
            f"{where} has a {HEAD} that is not the embedding, and the config says tie_word_embeddings. Use "
            "config.replace(tie_word_embeddings=False), or the config that read_config returns."
        )


def _to_numpy(tensor: Any) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has no bfloat16 of its own
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()
