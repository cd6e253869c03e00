"""Mutations of bytes and of the containers that hold them: tar, .npy, safetensors, protocol buffers."""

import io
import random
import struct
import tarfile
from collections.abc import Callable

from ebft_mega.apps.fuzzing.hostile_values import mutated_json

Random = random.Random

_CHUNKS = (
    b"\0",
    b"\0" * 600,
    b"\xff" * 9,
    b"\n",
    b"\r\n",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"{",
    b"[" * 2000,
    b'"',
    b"9" * 5000,
    b"\x1f\x8b\x08",
    b"\x28\xb5\x2f\xfd",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"\x93NUMPY\x01\x00",
    b"\x80\x04.",
)
_SMALL_FILES = (b"", b"\0", b"\n", b"{}", b"[]", b"null", b'""', b"0", b"\xff\xfe", b"PK\x03\x04", *_CHUNKS)


def mutated_bytes(random: Random, content: bytes) -> bytes:
    """Bytes with some of them flipped, cut, inserted, repeated or moved."""
    if random.random() < 0.04:
        return random.choice(_SMALL_FILES)
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at = random.randrange(len(changed) + 1)
        kind = random.randrange(7)
        if kind < 2 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 2 and at < len(changed):
            changed[at] = random.choice((0, 1, 127, 128, 255, 10, 34, 44, 57, 123))
        elif kind == 3:
            del changed[at : at + random.choice((1, 2, 8, 100, len(changed)))]
        elif kind == 4:
            changed[at:at] = random.choice(_CHUNKS)
        elif kind == 5:
            changed[at:at] = changed[at : at + random.choice((1, 8, 64, 512))]
        elif at + 16 < len(changed):
            changed[at : at + 8], changed[at + 8 : at + 16] = changed[at + 8 : at + 16], changed[at : at + 8]
    return bytes(changed)


def either(*ways: Callable[[Random, bytes], bytes], bytes_share: float = 0.15) -> Callable[[Random, bytes], bytes]:
    """A mutation that takes one of several, and now and then one of the bytes."""

    def mutate(random: Random, content: bytes) -> bytes:
        if random.random() < bytes_share:
            return mutated_bytes(random, content)
        return random.choice(ways)(random, content)

    return mutate


def json_file(random: Random, content: bytes) -> bytes:
    """A JSON file whose values are changed."""
    return mutated_json(random, content.decode())


def json_lines(random: Random, content: bytes) -> bytes:
    """JSON lines of which one is changed, removed, repeated, or cut."""
    lines = content.splitlines()
    at = random.randrange(len(lines))
    kind = random.randrange(8)
    if kind < 5:
        lines[at] = mutated_json(random, lines[at].decode())
    elif kind == 5:
        lines[at] = lines[at][: random.randrange(len(lines[at]))]
    elif kind == 6:
        lines += lines[at:]
    else:
        lines[at] = random.choice((b"", b" ", b"\t{}", b"null", b"[]", b'"text"'))
    return b"\n".join(lines) + random.choice((b"\n", b"\n", b"", b"\r\n", b"\n\n"))


def safetensors_header(random: Random, content: bytes) -> bytes:
    """A safetensors file whose header is changed and has its right length."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = mutated_json(random, content[8 : 8 + length].decode()), content[8 + length :]
    if random.random() < 0.1:
        data = random.choice((b"", data + b"\0", data[:-1], data * 2))
    return struct.pack("<Q", len(header)) + header + data


def numpy_header(random: Random, content: bytes) -> bytes:
    """A `.npy` file whose header is changed and has its right length, or whose records are."""
    (length,) = struct.unpack("<H", content[8:10])
    header, data = content[10 : 10 + length].decode().strip(), content[10 + length :]
    kind = random.randrange(6)
    if kind == 0:
        shape = random.choice(("()", "(-1,)", "(0,)", "(10**9,)", f"({2**62},)", f"({10**30},)", "(1, 3)", "(True,)"))
        header = header[: header.index("'shape'")] + f"'shape': {shape}, }}"
    elif kind == 1:
        other = random.choice(("'|O'", "'<u8'", "[]", "'<U0'", "'|V32'", "['a']", "[('a', '<u4', (2**30,))]", "None"))
        header = "{'descr': " + other + header[header.index(", 'fortran_order'") :]
    elif kind == 2:
        header = header.replace("False", random.choice(("True", "None", "'a'", "[]")))
    else:
        place = random.randrange(len(data) // 8) * 8
        number = random.choice((0, 1, 511, 512, 2**31, 2**63, 2**64 - 1, random.getrandbits(64)))
        data = data[:place] + struct.pack("<Q", number) + data[place + 8 :]
    written = header.encode().ljust(length - 1) + b"\n"
    return content[:8] + struct.pack("<H", len(written)) + written + data


def tar_members(random: Random, content: bytes) -> bytes:
    """An archive of which one header is changed and has its right checksum, or one member is moved or removed."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        spans = [(member.offset, member.offset_data + -(-member.size // 512) * 512) for member in tar]
    parts = [content[start:stop] for start, stop in spans]
    at = random.randrange(len(parts))
    kind = random.randrange(8)
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts.insert(random.randrange(len(parts) + 1), parts[at])
    elif kind == 2:
        parts.append(parts.pop(at))
    else:
        parts[at] = _changed_member(random, parts[at])
    end = random.choice((b"\0" * 1024, b"\0" * 1024, b"\0" * 10_240, b"\0" * 512, b""))
    return b"".join(parts) + end


# Of the fields of a tar header: first byte and length.
_TAR_FIELDS = {"name": (0, 100), "mode": (100, 8), "uid": (108, 8), "size": (124, 12), "mtime": (136, 12)}
_TAR_FIELDS |= {"type": (156, 1), "link": (157, 100), "magic": (257, 8), "user": (265, 32), "prefix": (345, 155)}
_TAR_VALUES = (
    *(
        b"",
        b"../../owned",
        b"/etc/passwd",
        b"a" * 200,
        b"\xff\xfe",
        b"\x1b[31m",
        b"a\nb",
        b"00000000000",
        b"77777777777",
    ),
    *(b"\x80" + b"\0" * 10 + b"\1", b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"-1", b"9", b" 12", b"000000000001"),
    *(b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"D", b"V"),
)


def _changed_member(random: Random, member: bytes) -> bytes:
    """A member with another header, under a checksum that fits, or with other contents."""
    header, data = bytearray(member[:512]), member[512:]
    if random.random() < 0.2:
        return bytes(header) + mutated_bytes(random, data).ljust(len(data), b"\0")[: len(data)]
    for _ in range(random.choice((1, 1, 2))):
        start, length = _TAR_FIELDS[random.choice(list(_TAR_FIELDS))]
        value = random.choice(_TAR_VALUES)[:length]
        header[start : start + length] = value.ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    if header[156:157] == b"S" and random.random() < 0.5:  # parts of a sparse member
        header[386:482] = b"00000000000\000777777777777" * 4
    if header[156:157] == b"x" and random.random() < 0.8:
        records = (
            b"size=999999999999\n",
            b"path=../../owned\n",
            b"GNU.sparse.map=0,1,x\n",
            b"size=-5\n",
            b"hdrcharset=a\n",
        )
        text = random.choice(records)
        data = (f"{len(text) + 3} ".encode() + text).ljust(len(data), b"\0")[: len(data)]
    return bytes(header) + data


def protobuf_fields(random: Random, content: bytes) -> bytes:
    """A protocol buffer of which one field is changed and has its right length, removed, moved or repeated."""
    fields = list(_fields(content))
    if not fields:
        return mutated_bytes(random, content)
    at = random.randrange(len(fields))
    kind = random.randrange(6)
    if kind == 0:
        del fields[at]
    elif kind == 1:
        fields.insert(random.randrange(len(fields) + 1), fields[at])
    elif kind == 2:
        fields.append(fields.pop(at))
    else:
        tag, body = fields[at]
        deeper = tag & 7 == 2 and len(body) > 3 and random.random() < 0.7
        fields[at] = (tag, (protobuf_fields if deeper else mutated_bytes)(random, body))
    return b"".join(protobuf_field(tag, body) for tag, body in fields)


def protobuf_field(tag: int, body: bytes) -> bytes:
    """One field: its tag, its length where it has one, its bytes."""
    return varint(tag) + (varint(len(body)) if tag & 7 == 2 else b"") + body


def varint(value: int) -> bytes:
    """A number in sevens of bits, the lowest first."""
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _fields(content: bytes) -> "list[tuple[int, bytes]]":
    """Tag and bytes of every field; none where it is no protocol buffer."""
    found = []
    at = 0
    while at < len(content):
        tag, at = _read_varint(content, at)
        start = at
        if tag & 7 == 0:
            _, at = _read_varint(content, at)
        elif tag & 7 == 2:
            length, start = _read_varint(content, at)
            at = start + length
        elif tag & 7 in (1, 5):
            at += 8 if tag & 7 == 1 else 4
        else:
            return []
        if at > len(content):
            return []
        found.append((tag, content[start:at]))
    return found


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(content):
        byte = content[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            break
    return value, at
