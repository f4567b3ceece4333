"""Broken copies of good files: of any bytes, of JSON, of safetensors headers, of protocol buffers.

Every function takes a random.Random and changes nothing else: the same state of it, the same copy.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

# --- bytes


def _flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    new = rng.choice((b"\0" * 8, b"\xff" * 8, b"\x80" * 12, b"\xff\xff\xff\xff\x0f", rng.randbytes(4)))
    data[at : at + len(new)] = new


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _remove(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 2, 8, 100, 5000))]


def _insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100, 5000)))


def _repeat(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    piece = data[at : at + rng.choice((1, 8, 100))]
    data[at:at] = piece * rng.choice((1, 2, 100))


def _splice(rng: random.Random, data: bytearray) -> None:
    """A piece of the file in another place of it."""
    source, target, length = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice((1, 8, 100, 5000))
    data[target : target + length] = data[source : source + length]


BYTES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    _flip,
    _overwrite,
    _cut,
    _remove,
    _insert,
    _repeat,
    _splice,
)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to three changes that know nothing about what the bytes mean."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if changed:
            rng.choice(BYTES)(rng, changed)
    return bytes(changed)


# --- JSON


class Raw(str):
    """JSON that no value of Python's is written as."""


class Pairs(list[list[Any]]):
    """An object as its pairs, of which two may have the same name."""


NUMBERS = (0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 0.5, 1e-320, 1e300)
RAW = ("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "-0", "1" * 5000, "0." + "1" * 5000, "1e999999999")
TEXTS = (
    "",
    "x" * 100_000,
    "4096",
    "true",
    "null",
    "../../x",
    "/etc/passwd",
    "C:\\x",
    "a\nb\r\nc",
    "\0",
    "\x1b[31mred\x07",
    "\ud800",
    "\U0001f600",
    "\u202eabc",
    "é" * 500,
    "__class__",
    "x*",
    "(",
)


def strange(rng: random.Random) -> Any:
    """A value that nobody expects."""
    return rng.choice(
        (
            lambda: rng.choice((None, True, False)),
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(NUMBERS),
            lambda: Raw(rng.choice(RAW)),
            lambda: rng.choice(TEXTS),
            lambda: rng.choice(TEXTS),
            lambda: Raw(_nested(rng.choice((3, 500, rng.randrange(900, 1000), 100_000)), rng.random() < 0.5)),
            lambda: rng.choice(([], {}, [0] * 100_000, [[]], [None], {"a": 1}, {"": {}}, ["x" * 1000] * 100)),
        )
    )()


def _nested(depth: int, objects: bool) -> str:
    return '{"a":' * depth + "1" + "}" * depth if objects else "[" * depth + "]" * depth


def _near(rng: random.Random, value: Any) -> Any:
    """A value that is almost the right one."""
    if isinstance(value, int | float) and abs(value) < 1e300:
        return rng.choice((value + 1, value - 1, -value, value * 2, value // 2, float(value), str(value), [value]))
    if isinstance(value, str):
        return rng.choice((value + rng.choice(TEXTS), value[:-1], value.upper(), value * 3, [value], {value: value}))
    return rng.choice(([value], {"x": value}, str(value)[:100]))


def _some_container(rng: random.Random, root: Any) -> Any:
    """The outermost object or list, or one inside it, rarely one deep inside."""
    found = root
    while isinstance(found, list) and rng.random() < 0.6:
        members = [member[1] for member in found] if isinstance(found, Pairs) else found
        inner = [member for member in members if isinstance(member, list) and member]
        if not inner:
            break
        found = rng.choice(inner)
    return found


def mutate_tree(rng: random.Random, root: Any) -> Any:
    """One change to a value as `parse` gives it."""
    inside = _some_container(rng, root)
    if not isinstance(inside, list) or not inside or rng.random() < 0.02:
        return strange(rng)
    at, other = rng.randrange(len(inside)), rng.randrange(len(inside))
    pair = isinstance(inside, Pairs)
    kind = rng.randrange(10)
    if kind == 0:
        del inside[at]
    elif kind == 1:  # twice: an object then has a name twice
        inside.insert(other, list(inside[at]) if pair else inside[at])
    elif kind == 2 and pair:
        inside[at][0] = rng.choice((*TEXTS, inside[other][0], inside[at][0] + "x", inside[at][0].upper()))
    elif kind == 3:
        inside.insert(at, [rng.choice(TEXTS), strange(rng)] if pair else strange(rng))
    elif kind == 4 and pair:  # the values of two
        inside[at][1], inside[other][1] = inside[other][1], inside[at][1]
    elif kind in (5, 6) and pair:
        inside[at][1] = _near(rng, inside[at][1])
    elif pair:
        inside[at][1] = strange(rng)
    else:
        inside[at] = _near(rng, inside[at]) if kind < 7 else strange(rng)
    return root


def parse(text: str | bytes) -> Any:
    """A JSON value, with objects as Pairs."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))


def write(value: Any) -> str:
    """JSON of a value with Raw and Pairs in it."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{write(member)}" for name, member in value) + "}"
    if isinstance(value, list) and any(isinstance(member, list | Raw) for member in value):
        return "[" + ",".join(map(write, value)) + "]"
    return json.dumps(value)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """One to three changes to what a JSON file says, or sometimes to its bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    if rng.random() < 0.002:
        return b"[" + b"[]," * 25_000_000 + b"0]"  # twenty times as much in memory
    tree = parse(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = mutate_tree(rng, tree)
    mark = rng.choice((b"", b"", b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n", b"//x\n"))
    return mark + write(tree).encode()


# --- safetensors

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", "X" * 5000)
SIZES = (0, 1, 2, 3, -1, 2**31, 2**62, 2**63, 2**64, 10**30, 1.0, "2", None, True)


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A header that lies about its length, its tensors, or itself; or broken bytes, mostly of the header."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(10)
    if kind == 0:
        return mutate_bytes(rng, data)
    if kind == 1:
        return data[:8] + mutate_bytes(rng, header) + body
    if kind == 2:
        lies = (0, 1, length - 1, length + 1, len(data), len(data) - 8, 10**8, 2**40, 2**63, 2**64 - 1)
        return rng.choice(lies).to_bytes(8, "little") + header + body
    if kind == 3:
        header = mutate_bytes(rng, header)
    else:
        tree = parse(header)
        for _ in range(rng.choice((1, 1, 2))):
            tree = _mutate_entry(rng, tree) if kind < 8 else mutate_tree(rng, tree)
        header = write(tree).encode()
    if rng.random() < 0.2:
        body = rng.choice((body[: rng.randrange(len(body))], body + b"\0" * rng.choice((1, 8, 4096)), b""))
    if rng.random() < 0.2:
        header += rng.choice((b" ", b"\n", b"\0", b"{}", b"]")) * rng.choice((1, 8, 10_000))
    return len(header).to_bytes(8, "little") + header + body


def _mutate_entry(rng: random.Random, tree: Any) -> Any:
    """One change to what a header says of a tensor, in the form that headers have."""
    if not isinstance(tree, Pairs):
        return tree
    tensors = [pair for pair in tree if pair[0] != "__metadata__" and isinstance(pair[1], Pairs)]
    if len(tensors) < 2:
        return tree
    one, other = rng.sample(tensors, 2)
    entry = {key: i for i, (key, _) in enumerate(one[1])}
    if not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        return tree
    dtype, shape, offsets = (one[1][entry[key]] for key in ("dtype", "shape", "data_offsets"))
    kind = rng.randrange(9)
    if kind == 0:
        one[0], other[0] = other[0], one[0]
    elif kind == 1:
        one[0] = rng.choice((other[0], "__metadata__", *TEXTS))
    elif kind == 2:
        one[1], other[1] = other[1], one[1]
    elif kind == 3:
        dtype[1] = rng.choice(DTYPES)
    elif kind == 4 and isinstance(shape[1], list) and shape[1]:
        shape[1] = rng.choice(
            (shape[1][::-1], [*shape[1], 1], shape[1] * 2, [], [rng.choice(SIZES)] * rng.choice((1, 2, 30, 1500)))
        )
    elif kind == 5 and isinstance(shape[1], list) and shape[1]:
        shape[1][rng.randrange(len(shape[1]))] = rng.choice(SIZES)
    elif kind == 6 and isinstance(offsets[1], list) and len(offsets[1]) == 2:
        begin, end = offsets[1]
        offsets[1] = rng.choice(
            ([end, begin], [begin, begin], [begin], [begin, end, end], [0, end], [begin, 2**63], [-8, end])
        )
    elif kind == 7 and isinstance(offsets[1], list) and offsets[1]:
        at = rng.randrange(len(offsets[1]))
        moved = offsets[1][at] + rng.choice((-1, 1, -4, 4, 4096)) if isinstance(offsets[1][at], int) else 0
        offsets[1][at] = rng.choice((moved, *SIZES))
    else:
        tree.insert(rng.randrange(len(tree)), [rng.choice(TEXTS), rng.choice((one[1], strange(rng)))])
    return tree


# --- protocol buffers, which SentencePiece models are


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def varint(value: int) -> bytes:
    """A whole number as protocol buffers have it; of negative ones the low 64 bits."""
    value %= 2**64
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


Field = tuple[int, int, bytes]  # number, wire type, value as it stands (without the length of type 2)


def fields(message: bytes) -> list[Field]:
    """The fields of a well-formed message."""
    at, found = 0, []
    while at < len(message):
        key, at = _varint(message, at)
        begin = at
        if key & 7 == 0:
            _, at = _varint(message, at)
        elif key & 7 == 2:
            length, begin = _varint(message, at)
            at = begin + length
        else:
            at += {1: 8, 5: 4}[key & 7]
        found.append((key >> 3, key & 7, message[begin:at]))
    return found


def join(message: list[Field]) -> bytes:
    """The message that has these fields."""
    return b"".join(
        varint(number << 3 | wire) + (varint(len(value)) if wire == 2 else b"") + value
        for number, wire, value in message
    )


def mutate_message(rng: random.Random, message: list[Field]) -> None:
    """One change to the fields of a message."""
    at, other = rng.randrange(len(message)), rng.randrange(len(message))
    number, wire, value = message[at]
    kind = rng.randrange(8)
    if kind == 0:
        del message[at]
    elif kind == 1:
        message.insert(other, message[at])
    elif kind == 2:
        message[at], message[other] = message[other], message[at]
    elif kind == 3:
        message[at] = (rng.choice((number + 1, 0, 50, 2**28)), wire, value)
    elif wire == 0:
        message[at] = (number, wire, varint(rng.choice((0, 1, 2, 3, 4, 5, 6, -1, 2**31, 2**62, rng.randrange(5000)))))
    elif wire == 5:
        message[at] = (number, wire, rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", rng.randbytes(4))))
    else:
        new = rng.choice(
            (b"", rng.randbytes(8), value * 2, "é▁".encode(), b"<0x41>", b"\xff\xfe", mutate_bytes(rng, value))
        )
        message[at] = (number, wire, new)


# Of a SentencePiece model: pieces and the two messages about how it was trained and how text is prepared.
PIECE, TRAINER, NORMALIZER = 1, 2, 3


def mutate_sentencepiece(rng: random.Random, data: bytes) -> bytes:
    """A vocabulary with pieces that cannot be, or settings that do not go with it; or broken bytes."""
    kind = rng.randrange(10)
    if kind < 2:
        return mutate_bytes(rng, data) if rng.random() < 0.99 else data + b"\n\0" * 20_000_000
    message = fields(data)
    if kind == 2:
        for _ in range(rng.choice((1, 10, 4000))):
            mutate_message(rng, message)
        return join(message)
    # Of the pieces, as often one of the first, which are unk, bos, eos and bytes.
    wanted = {3: TRAINER, 4: TRAINER, 5: NORMALIZER}.get(kind, PIECE)
    places = [i for i, field in enumerate(message) if field[0] == wanted]
    for _ in range(rng.choice((1, 1, 3, 30))):
        at = rng.choice(places[: rng.choice((3, 259, len(places)))])
        inner = fields(message[at][2])
        if kind == 5 and rng.random() < 0.5:  # a table of replacements, which a C++ library walks
            inner.append((2, 2, rng.choice((b"\x08\0\0\0" + rng.randbytes(40), rng.randbytes(2000), b"\xff" * 64))))
        for _ in range(rng.choice((1, 2, 5))):
            if inner:
                mutate_message(rng, inner)
        if kind == 6:
            inner.append((3, 0, varint(rng.randrange(8))))  # normal, unknown, control, user-defined, unused, byte
        message[at] = (message[at][0], 2, join(inner))
        if kind == 5:  # so that `fields` understands it once more
            break
    return join(message)
