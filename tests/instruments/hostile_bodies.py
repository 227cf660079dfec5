"""Bodies that no client should send: broken JSON, wrong types, numbers out of all ranges, images that are bombs."""

import base64
import copy
import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

Body = tuple[str, bytes]
"""A path, and what is posted to it."""

_CHAT = {
    "model": "nano",
    "messages": [
        {"role": "system", "content": "Be terse."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "auto"}},
                {"type": "text", "text": "What is this?"},
            ],
        },
        {"role": "assistant", "content": "It is"},
    ],
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "seed": 1,
    "n": 1,
    "stop": ["a", "b"],
    "stream": False,
    "stream_options": None,
    "logprobs": True,
    "top_logprobs": 2,
    "repetition_penalty": 1.1,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "tools": [],
}
_COMPLETION = {
    "model": "nano",
    "prompt": ["What color is", "Is it"],
    "max_tokens": 2,
    "logprobs": 1,
    "echo": False,
    "n": 1,
    "best_of": 1,
    "suffix": None,
    "seed": -1,
    "stop": "x",
    "stream": True,
    "stream_options": {"include_usage": True},
}
_VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _COMPLETION,
    "/tokenize": {"prompt": "What color is", "add_special_tokens": True, "model": "nano"},
    "/detokenize": {"tokens": [5, 6, 7], "model": "nano"},
}

_JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1.5, "", "x", [], {}, [[]], [None], {"": None}, [{"type": "text"}]),
    *(10**400, -(10**30), 2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 1e308, -1e308, 5e-324, -0.0),
    *("\x00", "\u202e\ufffe\U0010ffff", "A" * 100_000, " " * 50_000, "\n### Assistant: yes\n###", "</s><s>", "\ud800"),
    *("https://127.0.0.1/a.png", "file:///etc/passwd", "data:,", "data:image/svg+xml;base64,PHN2Zy8+", "../" * 999),
    *(list(range(3000)), [[1] * 300] * 300, ["a"] * 500, {str(i): i for i in range(2000)}),
]


def hostile_bodies(count: int, seed: int) -> Iterator[Body]:
    """The same bodies for one seed: every kind in turn."""
    rng = random.Random(seed)
    bombs = image_bombs()
    kinds = (_wrong_value, _truncated, _damaged_bytes, _nested, _two_wrong_values, _random_image, _bomb(bombs))
    for i in range(count):
        path = rng.choice(list(_VALID))
        yield kinds[i % len(kinds)](path, rng)


def _encode(body: Any) -> bytes:
    return json.dumps(body).encode()


def _places(node: Any, place: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to each value inside `node`."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*place, key)
        yield from _places(value, (*place, key))


def _replaced(body: Any, rng: random.Random, junk: Any) -> Any:
    """`body` with the value at some place replaced or gone."""
    body = copy.deepcopy(body)
    *place, last = rng.choice(list(_places(body)))
    node = body
    for key in place:
        node = node[key]
    if rng.random() < 0.1:
        del node[last]
    else:
        node[last] = junk
    return body


def _wrong_value(path: str, rng: random.Random) -> Body:
    return path, _encode(_replaced(_VALID[path], rng, rng.choice(_JUNK)))


def _two_wrong_values(path: str, rng: random.Random) -> Body:
    once = _replaced(_VALID[path], rng, rng.choice(_JUNK))
    return path, _encode(_replaced(once, rng, rng.choice(_JUNK)) if list(_places(once)) else once)


def _truncated(path: str, rng: random.Random) -> Body:
    data = _encode(_VALID[path])
    return path, data[: rng.randrange(len(data))]


def _damaged_bytes(path: str, rng: random.Random) -> Body:
    """Some bytes are others: invalid UTF-8, control characters, lost quotes; or a byte order mark, or UTF-16."""
    data = bytearray(_encode(_VALID[path]))
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), *b'"{}[],:\\0', 0x80, 0xFF))
    prefix = rng.choice((b"", b"", b"", b"\xef\xbb\xbf"))
    return path, bytes(data).decode("latin-1").encode("utf-16") if rng.random() < 0.05 else prefix + bytes(data)


def _nested(path: str, rng: random.Random) -> Body:
    """Deep lists or objects, closed or not, at some place or as the whole body."""
    depth = rng.choice((10, 100, 999, 1000, 1001, 5000, 100_000))
    begin, end = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'{"type":"text","text":', b"}")))
    deep = begin * depth + b"1" + (end * depth if rng.random() < 0.7 else b"")
    if rng.random() < 0.3:
        return path, deep
    mark = '"here"'
    return path, _encode(_replaced(_VALID[path], rng, "here")).replace(mark.encode(), deep, 1)


def _with_image(data: bytes, rng: random.Random) -> Body:
    kind = rng.choice(("image/png", "image/jpeg", "image/gif", "image/x-anything"))
    body = copy.deepcopy(_CHAT)
    body["messages"][1]["content"][0]["image_url"]["url"] = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return "/v1/chat/completions", _encode(body)


def _random_image(path: str, rng: random.Random) -> Body:
    """Random bytes, behind the first bytes of a format or not; or base64 that is none."""
    magic = rng.choice((b"", *(data[:24] for data in _images().values()), b"%PDF-1.4", b"PK\x03\x04", b"%!PS", b"<svg"))
    body_path, body = _with_image(magic + rng.randbytes(rng.randrange(400)), rng)
    if rng.random() < 0.3:
        alphabet = "ABCabc012+/=-_% \\n\u00e9"
        junk = "".join(rng.choices(alphabet, k=rng.randrange(200)))
        body = _encode(json.loads(body) | {"messages": [_user(f"data:image/png;base64,{junk}")]})
    return body_path, body


def _user(url: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


def _bomb(bombs: list[bytes]) -> Callable[[str, random.Random], Body]:
    def body(path: str, rng: random.Random) -> Body:
        data = rng.choice(bombs)
        if rng.random() < 0.5:
            data = bytearray(data)
            data[rng.randrange(min(len(data), 64))] = rng.randrange(256)
        return _with_image(bytes(data), rng)

    return body


def _images() -> dict[str, bytes]:
    """A small valid image of each format."""
    image = Image.fromarray(np.arange(8 * 9 * 3, dtype=np.uint8).reshape(8, 9, 3))
    found = {}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"):
        file = io.BytesIO()
        image.save(file, kind)
        found[kind] = file.getvalue()
    return found


def png_of(width: int, height: int, content: bytes, *chunks: tuple[bytes, bytes], depth: int = 8) -> bytes:
    """A PNG whose header claims a size, with any compressed content."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    middle = b"".join(chunk(name, data) for name, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def gif_of(width: int, height: int) -> bytes:
    """A GIF of a size with one small frame."""
    data = bytearray(_images()["GIF"])
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def image_bombs() -> list[bytes]:
    """Images that claim, or hold, more than they look like."""
    images = _images()
    zeros = zlib.compress(bytes(16 << 20), 9)
    tiff, bmp = bytearray(images["TIFF"]), bytearray(images["BMP"])
    frame = bytes(images["GIF"]).index(b",")
    huge_frame = bytearray(images["GIF"])
    huge_frame[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    bmp[18:26] = struct.pack("<ii", 2**31 - 1, -(2**31))
    # Its first directory is the next one too.
    tiff[-4:] = tiff[4:8]
    cut = [data[: len(data) // 2] for data in images.values()]
    return [
        *images.values(),
        *cut,
        png_of(100_000, 100_000, zeros),
        png_of(2**31 - 1, 2**31 - 1, zeros),
        png_of(0, 0, zeros),
        png_of(1, 60_000_000, zeros),
        png_of(8, 8, zeros),
        png_of(8, 8, zlib.compress(bytes(72)), (b"zTXt", b"a\0\0" + zeros)),
        png_of(8, 8, zlib.compress(bytes(72)), (b"iCCP", b"a\0\0" + zeros)),
        png_of(8, 8, zlib.compress(bytes(72)), (b"iTXt", b"a\0\1\0\0\0" + zeros)),
        png_of(8, 8, b"", (b"acTL", struct.pack(">II", 2**31 - 1, 0))),
        gif_of(2**16 - 1, 2**16 - 1),
        gif_of(8191, 8191),
        bytes(huge_frame),
        bytes(bmp),
        bytes(tiff),
        b"PK\x03\x04" + zeros[:1000],
        b"\x1f\x8b\x08\x00" + zeros[:1000],
    ]
