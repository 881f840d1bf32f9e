"""What callers hand in: what is clear is taken, everything else is one sentence; nothing is compiled here."""

from __future__ import annotations

import re
import warnings
from collections import UserDict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_core.config import QwenConfig
from qwen2_core.inputs import as_float, as_int, cache_dtype_of, layer_numbers, whole_number, yes_or_no
from qwen2_core.requests import check_prompts, check_sequence_ids, pad_prompts
from qwen2_core.sampling import Sampling, sampling_params

CONFIG = QwenConfig(vocab_size=512, hidden_size=64, num_hidden_layers=24, num_attention_heads=4)
NAN = float("nan")


class Tensor:
    """Looks like torch's: numpy's after ``detach().cpu()`` alone."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Any:
        return self.values


def named(value: Any) -> str:
    """Names a value in a test's name without its address in memory, which differs between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def assert_one_sentence(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".") or text.endswith("?")
    assert len(text) < 300


# --- Numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [3, 3.0, np.int64(3), np.uint8(3), np.float32(3), jnp.int32(3), Tensor(3)], ids=named
)
def test_a_whole_number_of_any_kind_is_taken(value: Any):
    assert as_int(value) == 3
    assert type(as_int(value)) is int


@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        np.bool_(True),
        "3",
        b"3",
        3.5,
        NAN,
        float("inf"),
        None,
        [3],
        [],
        {},
        3 + 0j,
        np.array([3]),
    ],
    ids=named,
)
def test_what_is_no_whole_number_is_refused(value: Any):
    assert as_int(value) is None
    with pytest.raises(ValueError, match="max_tokens must be a whole number, not ") as caught:
        whole_number("max_tokens", value, 1)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize("value", ["0.7", None, True, NAN, np.float32("nan"), [0.7], 10**400, 1j], ids=named)
def test_what_is_no_number_is_none(value: Any):
    assert as_float(value) is None


def test_a_number_of_any_kind_is_a_float():
    for value in (0.5, np.float32(0.5), np.float64(0.5), jnp.float32(0.5), jnp.bfloat16(0.5), Tensor(0.5)):
        assert as_float(value) == 0.5
    assert as_float(1) == 1.0
    assert type(as_float(np.int64(1))) is float


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": "0.7"}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 5.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_k": "5"}, "top_k"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": None}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": NAN}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": "0.9"}, "top_p"),
    ],
    ids=named,
)
def test_sampling_refuses_what_is_out_of_range_or_no_number(settings: dict[str, Any], word: str):
    with pytest.raises(ValueError, match=f"^{word} must be ") as caught:
        Sampling(**settings)
    assert_one_sentence(caught.value)


def test_sampling_takes_numbers_of_numpy_and_jax_and_is_equal_to_pythons():
    given: Any = (np.float64(0.5), np.int64(5), jnp.float32(0.5))
    assert Sampling(*given) == Sampling(0.5, 5, 0.5)
    assert hash(Sampling(*given)) == hash(Sampling(0.5, 5.0, 0.5))  # pyright: ignore[reportArgumentType]
    assert type(Sampling(*given).top_p) is float


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": 0.7}, r"sampling must be a Sampling, such as Sampling\(temperature=0.7\), not 0.7"),
        ({"sampling": {"temperature": 0.7}}, "sampling must be a Sampling"),
        ({"sampling": None}, "sampling must be a Sampling"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"seed": "0"}, "seed must be a whole number, not '0'"),
        ({"seed": True}, "seed must be a whole number, not True"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"seed": -1}, r"seed must be between 0 and 2\*\*32 - 1, not -1"),
        ({"seed": 2**32}, "seed must be between"),
        ({"eos_token_ids": "im_end"}, "eos_token_ids must be token ids, not 'im_end'"),
        ({"eos_token_ids": True}, "eos_token_ids must be token ids, not True"),
        ({"eos_token_ids": {"id": 1}}, "eos_token_ids must be token ids"),
        ({"eos_token_ids": [None]}, "EOS token id None is no integer; does the tokenizer have an EOS token"),
        ({"eos_token_ids": [[1, 2]]}, r"EOS token id \[1, 2\] is no integer"),
        ({"eos_token_ids": [1.5]}, "EOS token id 1.5 is no integer"),
        ({"eos_token_ids": ["1"]}, "EOS token id '1' is no integer"),
        ({"eos_token_ids": [True]}, "EOS token id True is no integer"),
        ({"eos_token_ids": 512}, "EOS token id 512 is outside the vocabulary of 512"),
        ({"eos_token_ids": [2**40]}, "EOS token id 1099511627776 is outside"),
    ],
    ids=named,
)
def test_sampling_arguments_that_cannot_be_are_refused(changes: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"sampling": Sampling(), "seed": 0, "eos_token_ids": ()} | changes
    with pytest.raises(ValueError, match=message) as caught:
        sampling_params(**arguments, vocab_size=512)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (511, [511]),
        (np.int64(511), [511]),
        (None, []),
        ((), []),
        ({511}, [511]),
        (range(2), [0, 1]),
        (np.array([1, 2]), [1, 2]),
        (np.array(7), [7]),
        ([np.int32(1), 2], [1, 2]),
        (jnp.array([3]), [3]),
        (Tensor([4, 5]), [4, 5]),
        (iter([6]), [6]),
    ],
    ids=named,
)
def test_eos_ids_of_any_kind_are_taken_also_a_single_one_or_none(given: Any, ids: list[int]):
    params = sampling_params(Sampling(), np.int64(3), given, vocab_size=512)
    assert params.eos_token_ids[params.eos_token_ids >= 0].tolist() == ids
    assert params.seed == 3


@pytest.mark.parametrize("value", ["no", 1, 0, None, [], "True"], ids=named)
def test_a_flag_is_true_or_false_and_nothing_that_merely_counts_as_such(value: Any):
    with pytest.raises(ValueError, match="extract_prompt must be True or False, not "):
        yes_or_no("extract_prompt", value)
    assert yes_or_no("x", np.bool_(True)) is True


def test_the_caches_dtype_may_be_said_in_every_way_and_is_one_that_a_cache_can_have():
    for given in ("bfloat16", jnp.bfloat16, np.dtype("bfloat16"), jnp.dtype("bfloat16")):
        assert cache_dtype_of(given) == np.dtype("bfloat16")
    assert cache_dtype_of(None) is None
    for bad in ("int8", "float64", "junk", "f,,", "torch.int8", 5, float, [], "float8_e4m3fn", bool):
        with pytest.raises(ValueError, match="cache_dtype must be one of float32, bfloat16, float16, not "):
            cache_dtype_of(bad)


# --- Layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        (12, (12,)),
        (np.int64(12), (12,)),
        ([20, 5], (20, 5)),
        (range(10, 13), (10, 11, 12)),
        (np.arange(2), (0, 1)),
        (np.array(3), (3,)),
        ({12, 5}, (5, 12)),
        (iter((1, 2)), (1, 2)),
        ([12.0], (12,)),
        (jnp.arange(2), (0, 1)),
    ],
    ids=named,
)
def test_layers_may_be_named_in_every_way(given: Any, layers: tuple[int, ...]):
    assert layer_numbers(given, 24) == layers


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("12", "extract_layers must be layer numbers such as"),
        (None, "extract_layers must be layer numbers such as"),
        (True, "extract_layers must be layer numbers such as"),
        (1.5, "extract_layers must be layer numbers such as"),
        ({"a": 1}, "extract_layers must be layer numbers such as"),
        (["12"], "'12' is none"),
        ([1.5], "1.5 is none"),
        ([True], "True is none"),
        ({0, "a"}, "'a' is none"),
        ([[1]], r"\[1\] is none"),
        ([12, 12], r"none twice, not \[12, 12\]"),
        ([-1], r"\[-1\] are out of range: the model has 24 layers, 0 to 23"),
        (24, r"\[24\] are out of range"),
        ([], "at least one layer"),
    ],
    ids=named,
)
def test_layers_that_cannot_be_are_refused(given: Any, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        layer_numbers(given, 24)
    assert_one_sentence(caught.value)


# --- Prompts ------------------------------------------------------------------------------------------------

TOKENIZED = UserDict(input_ids=[[1, 2, 3], [4, 5]], attention_mask=[[1, 1, 1], [1, 1]])  # as BatchEncoding


@pytest.mark.parametrize(
    ("prompts", "rows"),
    [
        ([[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 5]]),
        (((1, 2), range(3)), [[1, 2], [0, 1, 2]]),
        ([np.arange(3), np.array([4], np.uint16)], [[0, 1, 2], [4]]),
        ([jnp.arange(3), [4]], [[0, 1, 2], [4]]),
        ([Tensor([1, 2]), Tensor([3])], [[1, 2], [3]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([1, 2, 3], [[1, 2, 3]]),
        (np.array([1, 2]), [[1, 2]]),
        (TOKENIZED, [[1, 2, 3], [4, 5]]),
        ([UserDict(input_ids=[1, 2]), {"input_ids": np.array([[3]])}], [[1, 2], [3]]),
        ((row for row in [[1], [2, 3]]), [[1], [2, 3]]),
        ([[np.int64(1), 2]], [[1, 2]]),
        ({"input_ids": [[0, 1, 2], [0, 0, 3]], "attention_mask": [[0, 1, 1], [0, 0, 1]]}, [[1, 2], [3]]),
        (
            [{"input_ids": [0, 0, 0, 5, 6, 7], "attention_mask": [0, 0, 0, 1, 1, 1]}, {"input_ids": [1, 2]}],
            [[5, 6, 7], [1, 2]],
        ),
        ([UserDict(input_ids=np.array([[5, 0]]), attention_mask=np.array([[1, 0]])), [0, 1]], [[5], [0, 1]]),
    ],
    ids=[
        "lists", "tuples and ranges", "numpy", "jax", "torch", "a matrix", "one prompt", "one array",
        "a tokenizer's", "one a text", "a generator", "numpy integers", "padded by a tokenizer",
        "padded one by one", "padded as a matrix each",
    ],
)  # fmt: skip
def test_prompts_of_any_kind_are_padded(prompts: Any, rows: list[list[int]]):
    ids, lengths = pad_prompts(prompts)
    assert ids.shape == (len(rows), 64)
    assert lengths.tolist() == list(map(len, rows))
    assert [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)] == rows
    assert all(not row[length:].any() for row, length in zip(ids, lengths, strict=True))


TEXT = r"token ids, not text such as .*: tokenizer\(text\).input_ids gives them"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["2 + 2 ="], TEXT),
        (["12", "7"], TEXT),
        ("12", TEXT),
        ([b"12"], TEXT),
        ([["12", "7"]], TEXT),
        (UserDict(input_ids=["12"]), TEXT),
        ([], "There are no prompts"),
        ([[]], "Prompt 0 is empty"),
        ([[1], []], "Prompt 1 is empty"),
        ([[1.0, 2.0]], "must be integers .* not float64"),
        ([1.0], "must be integers .* not float64"),
        ([[NAN]], "must be integers"),
        ([[True, False]], "must be integers .* not bool"),
        ([[1, None]], "must be integers .* not object"),
        ([[2**70]], "must be integers"),
        ([[2**40]], r"Token id 1099511627776 \(prompt 0, position 0\) can be no token"),
        ([[5, -100]], r"Token id -100 \(prompt 0, position 1\) can be no token"),
        ([[[1, 2]], [[3]]], r"must be integers .* of shape \(1, 2\) a prompt"),
        ([[[1], [2, 3]]], "must be integers"),
        ([None], "not None among lists"),
        (None, "must be integers .* not None"),
        (5, "must be integers .* not 5"),
        ({1, 2}, "must be integers"),
        ([{1, 2}], "must be integers"),
        ([np.array([[1, 2], [3, 4]])], r"of shape \(2, 2\) a prompt"),
        ([np.array(["a"], object)], "must be integers .* not object"),
        ({"ids": [1]}, "must have input_ids, and has ids"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "attention_mask must have the shape"),
        ([{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}], "attention_mask of prompt 0 has a gap"),
        (np.ma.array([[1, 2]], mask=[[False, True]]), "give attention_mask= instead of a masked array"),
        ([np.ma.array([1, 2], mask=[False, True])], "give attention_mask= instead of a masked array"),
        (jax.random.key(0), "A random key of JAX is no number"),
    ],
    ids=named,
)
def test_what_are_no_prompts_is_refused(prompts: Any, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        pad_prompts(prompts)
    assert_one_sentence(caught.value)


def check(ids: Any, lengths: Any = None, mask: Any = None) -> list[list[int]]:
    prompts = check_prompts(CONFIG, ids, lengths, 4, mask)
    return [row[:n].tolist() for row, n in zip(prompts.input_ids, prompts.lengths, strict=True)]


LEFT = np.array([[0, 0, 5, 6], [7, 8, 9, 3]])
RIGHT = np.array([[5, 6, 0, 0], [7, 8, 9, 3]])


@pytest.mark.parametrize(
    "kind", [np.asarray, jnp.asarray, Tensor, np.ndarray.tolist], ids=["numpy", "jax", "torch", "lists"]
)
def test_padding_on_either_side_is_left_out_by_the_attention_mask(kind: Any):
    for ids in (LEFT, RIGHT):
        mask = (ids != 0).astype(int)
        assert check(kind(ids), mask=kind(mask)) == [[5, 6], [7, 8, 9, 3]]
        assert check(UserDict(input_ids=kind(ids), attention_mask=kind(mask))) == [[5, 6], [7, 8, 9, 3]]
        prompts = check_prompts(CONFIG, ids, None, 4, mask.astype(bool))
        assert prompts.input_ids.tolist() == [[5, 6, 0, 0], [7, 8, 9, 3]]
    assert check(RIGHT, [2, 4], RIGHT != 0) == [[5, 6], [7, 8, 9, 3]]
    assert check(LEFT, [2, 4], LEFT != 0) == [[5, 6], [7, 8, 9, 3]]
    assert check([5, 6, 0], mask=[1, 1, 0]) == [[5, 6]]
    assert check(RIGHT, mask=jnp.asarray(RIGHT != 0, jnp.bfloat16)) == [[5, 6], [7, 8, 9, 3]]
    each = [UserDict(input_ids=row, attention_mask=row != 0) for row in LEFT]
    assert check(each) == [[5, 6], [7, 8, 9, 3]]


def test_lists_of_several_lengths_and_a_single_prompt_are_prompts():
    assert check([[5, 6], [7, 8, 9]]) == [[5, 6], [7, 8, 9]]
    assert check(np.array([5, 6])) == [[5, 6]]
    assert check(np.array([5, 6]), 1) == [[5]]
    assert check_prompts(CONFIG, [[5], [7, 8]], None, 4).input_ids.shape == (2, 64)


@pytest.mark.parametrize(
    ("ids", "lengths", "mask", "message"),
    [
        (RIGHT, [3, 4], RIGHT != 0, "Prompt 0 has 2 tokens by its attention_mask, and 3 by prompt_lengths"),
        (RIGHT, None, [[1, 0, 1, 0], [1, 1, 1, 1]], "attention_mask of prompt 0 has a gap"),
        (RIGHT, None, [[0, 0, 0, 0], [1, 1, 1, 1]], "Prompt 0 is empty"),
        (RIGHT, None, [[1, 1], [1, 1]], r"must have the shape of input_ids, \(2, 4\), not \(2, 2\)"),
        (RIGHT, None, [1, 1, 1, 1], r"must have the shape of input_ids, \(2, 4\), not \(4,\)"),
        (RIGHT, None, np.ones((2, 1, 4, 4)), r"not \(2, 1, 4, 4\)"),
        (RIGHT, None, [[1, 1, 2, 2], [1, 1, 1, 1]], "must be 1 at tokens and 0 at padding"),
        (RIGHT, None, np.where(RIGHT != 0, 0, -1e9), "must be 1 at tokens and 0 at padding"),
        (RIGHT, None, 1, "must have the shape of input_ids"),
        (TOKENIZED, None, [[1, 1, 1], [1, 1]], "attention_mask is given twice"),
        (RIGHT, [2.0, 4.0], None, r"prompt_lengths must be 2 integers, .* not \[2.0, 4.0\] \(float64"),
        ([5, 6], "3", None, "prompt_lengths must be 1 integers, .* not '3'"),
        (RIGHT, [[2], [4, 1]], None, "prompt_lengths must be 2 integers"),
        (RIGHT, None, [[[1], [1, 0]], [1, 1]], "must have the shape of input_ids"),
        (RIGHT, np.ma.array([2, 4]), None, "instead of a masked array"),
        (RIGHT, None, np.ma.array(RIGHT != 0), "instead of a masked array"),
        ([UserDict(input_ids=[1], attention_mask=[1])], None, [[1]], "attention_mask is given twice"),
        (RIGHT, [True, True], None, "prompt_lengths must be 2 integers"),
        (RIGHT, 2, None, "prompt_lengths must be 2 integers"),
        ([[5, 6], [7]], [2, 2], None, "Prompt 1 is said to have 2 tokens, but input_ids is only 1 wide"),
        (["text"], None, None, TEXT),
    ],
    ids=range(21),
)
def test_masks_and_lengths_that_do_not_fit_are_refused(ids: Any, lengths: Any, mask: Any, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        check(ids, lengths, mask)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    ("ids", "side"),
    [
        (LEFT, "left"),
        (RIGHT, "right"),
        ([[5, 6, 0, 0, 0], [7, 8, 9, 0, 0]], "right"),  # padding="max_length"
        ([[5, 6, *[0] * 8]], "right"),
        ([[*[0] * 8, 5]], "left"),
        (np.array([[5, 6, 500, 500], [7, 8, 9, 500]]), "right"),
        ([[0, 0, 0, 5, 6, 7], [0, 0, 0, 7, 8, 9]], "left"),
        ([[5, 6, 0, 0], [7, 8, 0, 0], [9, 1, 0, 0]], "right"),
        ([[3, 3, 3, 5, 6, 3, 7], [3, 5, 6, 3, 7, 8, 9]], "left"),  # the pad token ends turns too
        ([[5, 3, 6, 3, 3, 3], [7, 3, 8, 9, 5, 6]], "right"),
    ],
    ids=named,
)
def test_what_looks_padded_without_a_mask_is_read_and_warned_of(ids: Any, side: str):
    with pytest.warns(UserWarning, match=f"look padded on the {side}, .* give attention_mask= or prompt_len"):
        assert check(ids) == np.asarray(ids).tolist()


@pytest.mark.parametrize(
    "ids",
    [
        np.ones((2, 5), int),
        np.zeros((1, 20), int),
        [[1, 2, 3, 3], [1, 2, 4, 4]],  # two ids, each repeated once
        [[1, 2, 9], [1, 3, 9]],
        [[0, 7, 0, 0], [5, 6, 7, 8]],  # 0 is a token elsewhere
        [[5, 6, 1], [5, 7, 1], [5, 8, 2]],
        [[4, 4, 4, 5, 6, 7]],
        [[4, 4, 5, 4], [4, 4, 6, 7]],  # all begin alike, and 4 is a token elsewhere
        [[4, 4, 4, 5, 4], [4, 4, 4, 7, 6]],
        [[4, 4, 4, 5], [3, 3, 3, 5]],
    ],
    ids=named,
)
def test_what_only_repeats_a_token_is_not_taken_for_padding(ids: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(ids) == np.asarray(ids).tolist()


def test_sequence_ids_have_32_bits_may_be_negative_and_are_integers_of_any_kind():
    for given in (
        [-1, 5],
        np.array([-1, 5]),
        Tensor([-1, 5]),
        [2**32 - 1, 5],
        np.array([2**32 - 1, 5], "u8"),
    ):
        assert check_sequence_ids(2, 1, given).tolist() == [2**32 - 1, 5]
    assert check_sequence_ids(2, 2, None).tolist() == [0, 1, 2, 3]
    for bad in ([1.5, 2], ["1", "2"], [True, False], [2**70, 1], [[1, 2]], [[1], [2, 3]], "12", 5, {1, 2}):
        with pytest.raises(ValueError, match=re.escape("sequence_ids must be 2 integers, one a sequence")):
            check_sequence_ids(2, 1, bad)


@pytest.mark.parametrize("id_", [2**32, -(2**31) - 1, 2**63 - 1])
def test_sequence_ids_that_would_be_cut_to_the_same_random_numbers_are_refused(id_: int):
    with pytest.raises(ValueError, match=f"sequence_ids have 32 bits, and {id_} is outside") as caught:
        check_sequence_ids(2, 1, [0, id_])
    assert_one_sentence(caught.value)


def test_more_sequences_than_memory_could_hold_are_refused():
    with pytest.raises(ValueError, match="2000000000000 sequences in one call are too many"):
        check_sequence_ids(2, 10**12, None)


def test_tensors_of_torch_are_read_in_bfloat16_too_and_refused_where_they_hold_no_plain_numbers():
    torch = pytest.importorskip("torch")
    assert as_float(torch.tensor(0.5, dtype=torch.bfloat16)) == 0.5
    assert as_int(torch.tensor(3, dtype=torch.bfloat16)) == 3
    assert check(torch.tensor(RIGHT), mask=torch.tensor(RIGHT != 0).bfloat16()) == [[5, 6], [7, 8, 9, 3]]
    assert cache_dtype_of(torch.bfloat16) == np.dtype("bfloat16")
    with pytest.raises(ValueError, match="must be integers"):
        check(torch.ones(1, 2, dtype=torch.bfloat16))
    for bad in (torch.ones(1, 2, dtype=torch.int32, device="meta"), torch.tensor([[1, 2]]).to_sparse()):
        with pytest.raises(ValueError, match="has no plain numbers that numpy could hold") as caught:
            check(bad)
        assert_one_sentence(caught.value)
