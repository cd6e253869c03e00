"""The first stage of parsers, asked of the libraries that define a syntax and not of the program's own code."""

import ast
import json
import struct
import tarfile


def is_json(content: bytes) -> bool:
    """Whether a file is a JSON object."""
    try:
        return isinstance(json.loads(content.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def has_safetensors_header(content: bytes) -> bool:
    """Whether a file begins with the length of a JSON object and that object."""
    if len(content) < 8:
        return False
    (length,) = struct.unpack("<Q", content[:8])
    return length <= len(content) - 8 and is_json(content[8 : 8 + length])


def has_npy_header(content: bytes) -> bool:
    """Whether a file begins as a `.npy` file of version 1 does, with a dictionary of its own keys."""
    if content[:8] != b"\x93NUMPY\x01\x00" or len(content) < 10:
        return False
    (length,) = struct.unpack("<H", content[8:10])
    try:
        header = ast.literal_eval(content[10 : 10 + length].decode("latin-1").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return isinstance(header, dict) and set(header) == {"descr", "fortran_order", "shape"}


def has_tar_header(content: bytes) -> bool:
    """Whether a file begins with a header of tar whose checksum is right."""
    try:
        tarfile.TarInfo.frombuf(content[:512], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def is_protobuf(content: bytes) -> bool:
    """Whether a file is a sequence of fields of protocol buffers."""
    at = 0
    while at < len(content):
        tag = shift = 0
        for _ in range(10):
            if at >= len(content):
                return False
            byte = content[at]
            tag, at, shift = tag | (byte & 127) << shift, at + 1, shift + 7
            if byte < 128:
                break
        if tag & 7 != 2:
            return False
        length = shift = 0
        for _ in range(10):
            if at >= len(content):
                return False
            byte = content[at]
            length, at, shift = length | (byte & 127) << shift, at + 1, shift + 7
            if byte < 128:
                break
        at += length
    return bool(content) and at == len(content)
