"""A checksum that travels with the JSON it is of."""

import json
from typing import Any

import pytest

from activation_store.checked_json import seal, seal_line, unseal, unseal_line


@pytest.mark.parametrize("content", [{}, {"a": 1}, {"b": [1, {"c": None}], "a": "é"}, {"x": 0.1}])
def test_what_is_sealed_comes_back_and_fits(content: dict[str, Any]):
    sealed = seal(content)
    assert list(sealed)[-1] == "checksum"
    assert unseal(json.loads(json.dumps(sealed, indent=3))) == (content, True)


def test_the_order_of_fields_does_not_count():
    sealed = seal({"a": 1, "b": 2})
    assert unseal(dict(reversed(sealed.items()))) == ({"a": 1, "b": 2}, True)


@pytest.mark.parametrize(
    "change", [{"a": 2}, {"a": True}, {"a": "1"}, {"b": 1}, {"checksum": "0" * 64}, {"checksum": None}]
)
def test_what_was_changed_does_not_fit(change: dict[str, Any]):
    assert unseal(seal({"a": 1}) | change)[1] is False


def test_what_was_never_sealed_is_told_apart():
    assert unseal({"a": 1}) == ({"a": 1}, None)


def test_what_is_not_json_is_not_sealed():
    with pytest.raises(ValueError, match="JSON compliant"):
        seal({"a": float("nan")})
    assert unseal({"a": float("nan"), "checksum": "0" * 64})[1] is False
    with pytest.raises(ValueError, match="already"):
        seal(seal({"a": 1}))


def test_a_line_stays_json_and_comes_back():
    line = b'{"key":"a","n":1}'
    sealed = seal_line(line)
    assert list(json.loads(sealed)) == ["key", "n", "crc32"]
    assert unseal_line(sealed) == line
    assert unseal_line(line) == line
    with pytest.raises(ValueError, match="does not fit"):
        unseal_line(sealed.replace(b'"n":1', b'"n":2'))
