"""A request's form: what is accepted, what is refused with which code, and that nothing sent is repeated."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InputEmpty, InvalidJSON, InvalidRequest, RefrainError
from service.schemas import MAX_ITERATIONS, SHOWN_NAME, SHOWN_PROBLEMS, ClassifyRequest, parse_request

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.dictionaries(st.sampled_from(sorted(ClassifyRequest.model_fields)), JSON)


def refused(body: object) -> list[dict[str, str]]:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(json.dumps(body).encode())
    errors = caught.value.members["errors"]
    assert isinstance(errors, list)
    return errors


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"inputs": "a"} x',
        b'{"inputs": "\xff"}',
        b'{"inputs": "\\ud800"}',
        b'{"inputs": "\xed\xa0\x80"}',
        b"[" * 10_000,
        b'{"inputs":' * 10_000,
    ],
    ids=lambda body: body[:16],
)
def test_what_is_not_json_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(InvalidJSON):
        parse_request(body)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inputs", 1),
        ("inputs", []),
        ("inputs", None),
        ("inputs", {}),
        ("task", 1),
        ("architecture", ["recurrent"]),
        ("routing_key", ""),
        ("routing_key", "k" * 129),
        ("routing_key", 1),
        ("max_iterations", 0),
        ("max_iterations", MAX_ITERATIONS + 1),
        ("max_iterations", 1.5),
        ("max_iterations", "2"),
        ("max_iterations", True),
        ("exit_threshold", 0),
        ("exit_threshold", 1.01),
        ("exit_threshold", float("nan")),
        ("exit_threshold", float("inf")),
        ("exit_threshold", "0.9"),
        ("top_k", 0),
        ("raw_scores", 1),
        ("raw_scores", "true"),
        ("truncate", "no"),
        ("deadline_ms", 0),
        ("deadline_ms", -1),
        ("deadline_ms", float("inf")),
        ("max_iteration", 2),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    assert [error["field"] for error in refused({"inputs": "a", field: value})] == [field]


def test_the_first_wrong_item_is_named_with_its_index_and_the_others_cost_nothing() -> None:
    assert [error["field"] for error in refused({"inputs": ["a", 1, "b", None]})] == ["inputs[1]"]


@pytest.mark.parametrize("inputs", ["a", ["a"]])
def test_an_unknown_field_may_be_called_like_an_item(inputs: object) -> None:
    assert [error["field"] for error in refused({"inputs": inputs, "inputs[0]": "b"})] == ["inputs[0]"]


def test_a_list_without_texts_is_named_beside_a_field_called_like_an_item() -> None:
    assert [error["field"] for error in refused({"inputs": [], "inputs[0]": "b"})] == ["inputs", "inputs[0]"]


@pytest.mark.parametrize("body", [[], 1, "a", None])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    assert refused(body)[0]["field"] == "(body)"


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u2003"])
@pytest.mark.parametrize("index", [None, 0, 1])
def test_an_empty_input_is_named_by_its_index(blank: str, index: int | None) -> None:
    inputs: Any = blank if index is None else ["a", "b"]
    if index is not None:
        inputs[index] = blank
    with pytest.raises(InputEmpty) as caught:
        parse_request(json.dumps({"inputs": inputs}).encode())
    assert caught.value.members == {"index": index or 0}


def test_many_or_long_wrong_fields_give_a_short_answer() -> None:
    errors = refused({"inputs": "a", **{f"{number}" + "x" * 10_000: 1 for number in range(100)}})
    assert len(errors) == SHOWN_PROBLEMS
    assert all(len(error["field"]) <= SHOWN_NAME for error in errors)


def test_a_whole_number_may_be_written_with_a_point() -> None:
    asked = parse_request(b'{"inputs": "a", "max_iterations": 2.0, "top_k": 1e0}')
    assert (asked.max_iterations, asked.top_k) == (2, 1)


def test_null_means_left_out() -> None:
    asked = parse_request(b'{"inputs": ["a"], "task": null, "max_iterations": null, "exit_threshold": null}')
    assert asked == parse_request(b'{"inputs": ["a"]}')


@given(JSON | FIELDS | FIELDS.map(lambda fields: {"inputs": "a", **fields}))
def test_any_json_is_either_a_request_or_refused_without_repeating_it(value: object) -> None:
    secret = "a-text-that-must-not-come-back"
    body = {"inputs": [secret, 1], **value} if isinstance(value, dict) else value
    try:
        asked = parse_request(json.dumps(body).encode())
    except RefrainError as error:
        assert error.status in (400, 422)
        assert secret not in error.detail + json.dumps(error.members)
    else:
        assert all(text.strip() for text in asked.texts) and asked.texts


@given(st.binary())
def test_any_bytes_are_either_a_request_or_refused(body: bytes) -> None:
    with pytest.raises(RefrainError):
        parse_request(body)
