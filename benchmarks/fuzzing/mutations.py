"""How whole inputs are spoiled: byte by byte, and along the structure of JSON, pickles and archives."""

from __future__ import annotations

import copy
import json
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from random import Random
from typing import Any

_NUMBERS = tuple(
    number.to_bytes(size, order)
    for size in (1, 2, 4, 8)
    for order in ("little", "big")
    for number in (0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
)
_HEAD = 64  # bytes in which most formats say how large things are
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 64, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "\n", "\0", "\ud800", "é" * 300, "../../x", "/etc/passwd", "hf-hub:a/b", "<b>", "{}", "%s",
    [], {}, [None], [[]], {"": ""}, {"a": 1}, [1, 2, 3], ["x"] * 50,
)  # fmt: skip
_KEYS = ("", " ", "\0", "\ud800", "x" * 300, "../x", "__class__", "name", "0", "\n")
_OPERATIONS = (
    b"cos\nsystem\n", b"X\x05\x00\x00\x00touch\x85R", b"c__builtin__\neval\n", b"cbuiltins\ngetattr\n", b"R",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"b",
    b"(", b"t", b")", b"]", b"}", b"a", b"e", b"s", b"u", b"0", b"1", b"2", b".", b"\x85", b"\x86", b"\x87",
    b"N", b"\x88", b"\x81", b"\x90", b"\x92", b"\x93", b"\x94", b"Q", b"q\x00", b"h\x00", b"h\x7f", b"K\xff",
    b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x82\x01",
    b"G\x7f\xf8\0\0\0\0\0\0", b"X\xff\xff\xff\x7f", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b"I99\n", b"V\n",
    b"U\x00", b"\x95\xff\xff\xff\xff\xff\xff\xff\xff", b"((((((((tttttttt",
)  # fmt: skip


def spoil(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Flip, overwrite, cut, insert, repeat, move or splice a few times."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 12))):
        size = len(out)
        at = rng.randrange(min(size, _HEAD) + 1) if rng.random() < 0.4 else rng.randrange(size + 1)
        length = min(rng.choice((1, 2, 4, 16, 64, 1024)), size - at)
        match rng.randrange(9):
            case 0 | 1 if at < size:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                number = rng.choice(_NUMBERS)
                out[at : at + len(number)] = number
            case 3:
                out[at : at + length] = rng.randbytes(length)
            case 4:
                del out[at : at + length]
            case 5:
                out[at:at] = out[at : at + length] * rng.choice((1, 2, 40))
            case 6:
                piece = out[at : at + length]
                del out[at : at + length]
                to = rng.randrange(len(out) + 1)
                out[to:to] = piece
            case 7:
                del out[at:]
            case 8 if others:
                other = rng.choice(others)
                out[at:] = other[rng.randrange(len(other) + 1) :] if rng.random() < 0.5 else other[at:]
    return bytes(out)


def with_checksums(png: bytes) -> bytes:
    """Return a PNG whose chunks have the checksums of what they hold, as far as chunks can be made out."""
    out, at = bytearray(png), 8
    while at + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, at)
        end = at + 8 + length
        if end + 4 > len(out):
            break
        struct.pack_into(">I", out, end, zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def spoil_json(rng: Random, value: Any) -> Any:
    """Replace, remove, rename, add, move and nest values anywhere in a JSON document."""
    whole = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(whole))
        place, key = rng.choice(places)
        match rng.randrange(8):
            case 0 | 1:
                place[key] = copy.deepcopy(rng.choice(JUNK))
            case 2:
                del place[key]
                if not whole:
                    return None
            case 3 if isinstance(place, dict):
                place[rng.choice(_KEYS)] = place.pop(key)
            case 4:
                inside = place[key]
                if isinstance(inside, dict):
                    inside[rng.choice(_KEYS)] = copy.deepcopy(rng.choice(JUNK))
                elif isinstance(inside, list):
                    inside.insert(rng.randrange(len(inside) + 1), copy.deepcopy(rng.choice(JUNK)))
            case 5:
                other, other_key = rng.choice(places)
                if other_key in other if isinstance(other, dict) else other_key < len(other):
                    place[key] = copy.deepcopy(other[other_key])
            case 6:
                for _ in range(rng.choice((1, 2, 40))):
                    place[key] = [place[key]] if rng.random() < 0.5 else {"": place[key]}
            case 7:
                place[key] = _near(rng, place[key])
    return whole[0] if whole else None


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a document with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _near(rng: Random, value: Any) -> Any:
    """Return a value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((-value, value + 1, value - 1, value * 2, value * 1000, value / 3, str(value)))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "x", value.upper(), value * 50, f" {value}\n", f"../{value}"))
    return value


def json_bytes(rng: Random, value: Any) -> bytes:
    """Return a document as text, now and then in a form no writer gives it."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    match rng.randrange(20):
        case 0:
            text = "\ufeff" + text
        case 1:
            text = text.replace(": ", ': 1, "": ', 1)
        case 2:
            depth = rng.choice((10, 900, 100_000))
            text = "[" * depth + text + "]" * rng.choice((0, depth))
        case 3:
            text = text.replace("1", "9" * rng.choice((10, 400, 5000)), 1)
    data = text.encode("utf-8", "surrogatepass")
    return spoil(rng, data) if rng.random() < 0.1 else data


def spoil_pickle(rng: Random, data: bytes) -> bytes:
    """Remove, repeat, swap and insert whole operations."""
    starts = [position or 0 for _, _, position in pickletools.genops(data)]
    parts = [data[one:other] for one, other in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        match rng.randrange(6):
            case 0 if len(parts) > 1:
                del parts[at]
            case 1:
                parts.insert(at, parts[other])
            case 2:
                parts[at], parts[other] = parts[other], parts[at]
            case 3 | 4:
                parts.insert(at, rng.choice(_OPERATIONS) * rng.choice((1, 1, 1, 300)))
            case 5:
                parts[at] = parts[at][:1] + spoil(rng, parts[at][1:])
    return b"".join(parts)


def spoil_archive(rng: Random, data: bytes) -> bytes:
    """Spoil the pickle, an entry or the order of entries of what `torch.save` wrote."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    at = next(index for index, (name, _) in enumerate(entries) if name.endswith("/data.pkl"))
    how = rng.randrange(8)
    if how > 3:
        entries[at] = (entries[at][0], spoil_pickle(rng, entries[at][1]))
    else:
        at = rng.randrange(len(entries))
        name, content = entries[at]
        changes = (
            [(name, spoil(rng, content))],
            [],
            [(rng.choice((name + "x", name.upper(), "data.pkl", f"a/{name}", "../x")), content)],
            [(name, content), (entries[rng.randrange(len(entries))][0], content)],
        )
        entries[at : at + 1] = changes[how]
    out = BytesIO()
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", kind) as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return out.getvalue() if rng.random() < 0.8 else spoil(rng, out.getvalue())


def spoil_safetensors(rng: Random, data: bytes) -> bytes:
    """Spoil names, types, shapes and places in the header, or the header's length."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json_bytes(rng, spoil_json(rng, json.loads(data[8 : 8 + length])))
    claimed = len(header) if rng.random() < 0.9 else rng.choice((0, 1, length, 2**32 - 1, 2**63))
    return struct.pack("<Q", claimed) + header + data[8 + length :]
