"""Binary tensors: what is written is read back, and of other bytes nothing comes but a refusal."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidTensor, RefrainError
from service.inference_schemas import parse_infer, read_texts
from service.tensors import decode_texts, encode, split_body

TEXTS = st.lists(st.text(), max_size=8)
SIZES = st.integers(-(2**70), 2**70)
HEADERS = st.none() | st.text(max_size=30) | SIZES.map(str)


@given(TEXTS)
def test_texts_come_back(texts: list[str]) -> None:
    assert decode_texts(encode("BYTES", texts), len(texts)) == texts


@given(TEXTS, st.binary(max_size=40), st.integers(0, 40), st.integers(0, 9))
def test_any_bytes_are_either_all_of_the_texts_or_refused(texts: list[str], put: bytes, place: int, count: int) -> None:
    data = encode("BYTES", texts)
    data = data[:place] + put + data[place:]
    try:
        read = decode_texts(data, count)
    except InvalidTensor:
        return
    assert len(read) == count
    assert encode("BYTES", read) == data


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\x01\x00\x00", "ends before element 0"),
        (b"\x02\x00\x00\x00a", "would be 2 bytes; 1 are left"),
        (b"\xff\xff\xff\xffa", "would be 4294967295 bytes; 1 are left"),
        (b"\x01\x00\x00\x00\xff", "Element 0 is not UTF-8"),
        (b"\x03\x00\x00\x00\xed\xa0\x80", "Element 0 is not UTF-8"),
        (b"\x01\x00\x00\x00abc", "2 bytes are left"),
    ],
)
def test_a_refusal_says_what_is_wrong(data: bytes, told: str) -> None:
    with pytest.raises(InvalidTensor, match=told):
        decode_texts(data, 1)


@pytest.mark.parametrize("header", ["", "-1", "+1", "1.0", "1e3", " 1", "5", "9" * 5000, "\u0661", "1, 1"])
def test_the_length_of_the_json_must_be_one(header: str) -> None:
    with pytest.raises(InvalidTensor, match="at most the body's length of 4 bytes"):
        split_body(b"{}ab", header)
    assert split_body(b"{}ab", "2") == (b"{}", b"ab")
    assert split_body(b"{}ab", None) == (b"{}ab", b"")


@given(st.binary(), HEADERS)
def test_any_body_is_refused_by_an_error_of_ours(body: bytes, header: str | None) -> None:
    with pytest.raises(RefrainError):
        parse_infer(body, header)


@given(
    st.binary(max_size=9) | TEXTS.map(lambda texts: encode("BYTES", texts)),
    st.integers(-1, 50) | SIZES,
    st.lists(st.integers(-1, 3) | SIZES, max_size=3),
)
def test_any_sizes_and_shapes_are_either_true_or_refused(data: bytes, size: int, shape: list[int]) -> None:
    head = b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": %s, "parameters": {"binary_data_size": %d}}]}'
    head %= (str(shape).encode(), size)
    try:
        asked, binary = parse_infer(head + data, str(len(head)))
        texts = read_texts(asked, binary)
    except RefrainError as error:
        assert 400 <= error.status < 500
    else:
        assert size == len(data) == len(encode("BYTES", texts)) and shape in ([len(texts)], [len(texts), 1])


def test_numbers_are_little_endian() -> None:
    assert encode("FP32", [1.5, -2.0]) == struct.pack("<2f", 1.5, -2.0)
    assert encode("INT32", [1, -2]) == struct.pack("<2i", 1, -2)
    assert encode("BOOL", [True, False]) == b"\x01\x00"
    assert np.frombuffer(encode("FP32", [0.1]), "<f4")[0] == np.float32(0.1)
