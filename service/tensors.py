"""Tensors as the Open Inference Protocol has them in binary form: little-endian, each text behind its length."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from service.errors import InvalidTensor

Datatype = Literal["BYTES", "FP32", "INT32", "BOOL"]
DTYPES = {"FP32": "<f4", "INT32": "<i4", "BOOL": "?"}
HEADER_LENGTH = "Inference-Header-Content-Length"
_LENGTH = struct.Struct("<I")


def split_body(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """Part a body into its JSON and the binary data after it; without the header all is JSON. Raises InvalidTensor."""
    if header_length is None:
        return body, b""
    if not re.fullmatch("[0-9]{1,18}", header_length) or int(header_length) > len(body):
        raise InvalidTensor(f"{HEADER_LENGTH} must be a whole number, at most the body's length of {len(body)} bytes.")
    length = int(header_length)
    return body[:length], body[length:]


def decode_texts(data: bytes, count: int) -> list[str]:
    """Read `count` texts of a BYTES tensor, each behind its length; raises InvalidTensor unless that is all of it."""
    texts = []
    place = 0
    for index in range(count):
        start = place + _LENGTH.size
        if start > len(data):
            raise InvalidTensor(f"The binary data ends before element {index}; the shape says {count} elements.")
        place = start + _LENGTH.unpack_from(data, start - _LENGTH.size)[0]
        if place > len(data):
            raise InvalidTensor(f"Element {index} would be {place - start} bytes; {len(data) - start} are left.")
        try:
            texts.append(data[start:place].decode())
        except UnicodeDecodeError:
            raise InvalidTensor(f"Element {index} is not UTF-8.") from None
    if place < len(data):
        raise InvalidTensor(f"{len(data) - place} bytes are left after the {count} elements that the shape says.")
    return texts


def encode(datatype: Datatype, values: Sequence[Any]) -> bytes:
    """Write a tensor's values, in row-major order."""
    if datatype == "BYTES":
        encoded = [value.encode() for value in values]
        return b"".join(_LENGTH.pack(len(each)) + each for each in encoded)
    return np.array(values, DTYPES[datatype]).tobytes()
