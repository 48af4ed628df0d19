"""Bytes that a careless or a hostile caller may send: protobuf bodies, tokens, and HTTP/2 below gRPC."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import strategies as st

T = TypeVar("T")


def weighted(*choices: tuple[int, st.SearchStrategy[T]]) -> st.SearchStrategy[T]:
    """One of these, as often as its weight says: `one_of` draws each alike, however often it is given."""
    places = [at for at, (weight, _) in enumerate(choices) for _ in range(weight)]
    return st.sampled_from(places).flatmap(lambda at: choices[at][1])


# -- protobuf ------------------------------------------------------------------------------------------

VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = range(6)
_NUMBERS = [
    *(0, 1, 2, 7, 99, 100, 500, 599, 1000, 86_400, 86_401, 10**9, 10**9 + 1, 10**12, 10**12 + 1),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
    *(2**64 - each for each in (2, 100, 10**9, 2**31, 2**31 + 1, 2**63 - 1)),
    # Seconds of a Timestamp: the year 10000 and the year 0, and just before.
    *(253_402_300_799, 253_402_300_800, 2**64 - 62_135_596_800, 2**64 - 62_135_596_801),
]
_TEXTS = [
    *(b"", b"a", b"x" * 64, b"x" * 65, b"x" * 128, b"x" * 129, b"x" * 256, b"x" * 257, b"x" * 4001),
    *(b"y" * 501, b"z" * 1025, b"w" * 20_000),
    *(b"\0", b"a\0b", b"\x1b[31m", b"\r\n", b"\x7f", b"\xc2\x85", b" ", b"\xe2\x80\xa8", b"\xef\xbb\xbf"),
    # Not UTF-8: lone surrogates, over-long forms, beyond Unicode, cut short.
    *(b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\xff\xfe", b"\x80"),
    *("\N{GRINNING FACE}" * 128, "\N{GRINNING FACE}" * 129, "\u202eresu", "e\u0301", "\U0010ffff", "\ufffe"),
    *("o'hara\"; DROP TABLE users; -- $1 %s {} \\u0000 \\", "../../etc/passwd", "${jndi:x}", "None", "NaN"),
    *(
        "openai",
        "anthropic",
        "gpt-4o-mini",
        "model-with-a-price",
        "byok_enabled",
        "byok_only_mode",
        "premium",
    ),
    *("byok_uses_internal_credits", "sk-test-0123456789abcdef0123", "0192f0c1-2d3e-7a4b-8c5d-6e7f8091a2b3"),
    *("kth1_", "ktt1_", "ktp1_", "kth1_AAAA", "kth1_" + "A" * 4091, "kth1_" + "A" * 4092, "ktt1_=", "kth2_x"),
]
TEXTS = [text.encode() if isinstance(text, str) else text for text in _TEXTS]


def varint(number: int, *, padding: int = 0) -> bytes:
    """A number as protobuf writes it, with so many bytes that say nothing."""
    out = bytearray()
    while number > 0x7F or padding > 0:
        out.append(number & 0x7F | 0x80)
        padding -= number <= 0x7F
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, wire_type: int, value: bytes) -> bytes:
    """One field."""
    head = varint(number << 3 | wire_type)
    return head + (varint(len(value)) if wire_type == LENGTH else b"") + value


_VARINTS = st.builds(
    varint,
    st.one_of(st.sampled_from(_NUMBERS), st.integers(0, 2**64 - 1)),
    padding=st.sampled_from([0, 0, 0, 0, 0, 0, 1, 5, 12]),
)
_VALUES = {
    VARINT: _VARINTS,
    FIXED64: st.binary(min_size=8, max_size=8),
    FIXED32: st.binary(min_size=4, max_size=4),
}


def _any_value(wire_type: int) -> st.SearchStrategy[bytes]:
    return _VALUES.get(wire_type, st.binary(max_size=40))


def _wrapped(depth: int) -> bytes:
    body = b""
    for _ in range(depth):
        body = field(77, LENGTH, body)
    return body


_UNKNOWN = st.one_of(
    st.builds(
        lambda number, wire, value: field(number, wire, value),
        st.sampled_from([100, 999, 19_000, 2**29 - 1]),
        st.just(LENGTH),
        st.binary(max_size=300),
    ),
    # Groups: closed, left open, closed as another one, and very deep.
    st.sampled_from([1, 2, 50, 99, 100, 101, 5000]).flatmap(
        lambda depth: st.sampled_from(
            [
                field(77, START_GROUP, b"") * depth + field(77, END_GROUP, b"") * depth,
                field(77, START_GROUP, b"") * depth,
                field(77, START_GROUP, b"") * depth + field(78, END_GROUP, b"") * depth,
                field(77, END_GROUP, b""),
            ]
        )
    ),
    # Messages in messages in a field that nobody knows.
    st.sampled_from([_wrapped(depth) for depth in (3, 100, 400)]),
    st.sampled_from([b"\0", b"\x07", b"\x80", b"\xff" * 11, field(0, VARINT, b"\1"), varint(2**35)]),
)


def texts(*known: bytes) -> st.SearchStrategy[bytes]:
    """Contents of a string field: the edges, what is `known` to mean something, and parts of it."""
    return weighted(
        (4, st.sampled_from([*known, *TEXTS])),
        (1, st.sampled_from(known).flatmap(_damaged)),
        (1, st.text(max_size=12).map(str.encode)),
    )


def _damaged(text: bytes) -> st.SearchStrategy[bytes]:
    """Cut, lengthened, changed in one place, or under the name of another kind of token."""
    place = st.integers(0, max(len(text) - 1, 0))
    return st.one_of(
        place.map(lambda at: text[:at]),
        st.binary(max_size=4).map(lambda tail: text + tail),
        st.tuples(place, st.integers(0, 255)).map(lambda c: text[: c[0]] + bytes([c[1]]) + text[c[0] + 1 :]),
        st.sampled_from([b"kth1_", b"ktt1_", b"ktp1_"]).map(lambda prefix: prefix + text[5:]),
        # The root is known, and what follows is not what was sealed under it.
        st.binary(max_size=60).map(lambda raw: text[:10] + raw.hex().encode()),
    )


Likely = Mapping[str, Sequence[bytes]]
"""Texts that mean something, by the name of the field in which they do."""
_LIKELY_NUMBERS = {
    "page_size": [1, 2, 100, 1000],
    "seconds": [60, 3600, 86_400, 1_700_000_000],
    "nanos": [0, 1, 999_999_999],
    "http_status": [200, 429, 500],
}


def bodies(descriptor: Descriptor, likely: Likely, *, depth: int = 0) -> st.SearchStrategy[bytes]:
    """Bodies of a message: as they ought to be, but for one field; with every field at some edge; with fields
    left out, given again, of a wrong type; with others besides; cut."""
    strings = texts(*(text for found in likely.values() for text in found))
    fields = list(descriptor.fields)
    ought = [weighted((5, _likely_part(one, likely, depth)), (1, st.just(b""))) for one in fields]
    odd = [_part(one, likely, strings, depth) for one in fields]
    unknown = weighted((30, st.just(b"")), (1, _UNKNOWN))
    kinds = [st.tuples(*ought, unknown).map(b"".join)]
    for at in range(len(fields)):
        parts = [odd[at] if index == at else one for index, one in enumerate(ought)]
        kinds.append(st.tuples(*parts, unknown).map(b"".join))
    every = [weighted((1, st.just(b"")), (2, one)) for one in odd]
    kinds.append(st.tuples(*every, unknown).map(b"".join))
    if depth:
        return st.one_of(kinds)
    kinds.append(st.lists(st.one_of(*odd, _UNKNOWN), max_size=6).map(b"".join))
    kinds.append(st.tuples(kinds[0], st.integers(0, 200)).map(lambda drawn: drawn[0][: drawn[1]]))
    kinds.append(st.binary(max_size=60))
    return st.one_of(kinds)


def _likely_part(one: FieldDescriptor, likely: Likely, depth: int) -> st.SearchStrategy[bytes]:
    if one.message_type is not None:
        value = bodies(one.message_type, likely, depth=depth + 1) if depth < 3 else st.just(b"")
        wire_type = LENGTH
    elif one.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        value, wire_type = st.sampled_from(likely.get(one.name, [b"a text"])), LENGTH
    else:
        numbers = _LIKELY_NUMBERS.get(one.name, [0, 1, 2, 3])
        value, wire_type = st.sampled_from([varint(number) for number in numbers]), VARINT
    return value.map(lambda content: field(one.number, wire_type, content))


def _part(
    one: FieldDescriptor, likely: Likely, strings: st.SearchStrategy[bytes], depth: int
) -> st.SearchStrategy[bytes]:
    number = one.number
    if one.message_type is not None:
        wire_type = LENGTH
        value = bodies(one.message_type, likely, depth=depth + 1) if depth < 3 else st.just(b"")
    elif one.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        wire_type, value = LENGTH, strings
    else:
        wire_type, value = VARINT, _VARINTS
    good = value.map(lambda content: field(number, wire_type, content))
    wrong = st.sampled_from([VARINT, FIXED64, LENGTH, FIXED32]).flatmap(
        lambda other: _any_value(other).map(lambda content: field(number, other, content))
    )
    repeated = st.lists(good, min_size=2, max_size=4).map(b"".join)
    return weighted((12, good), (1, wrong), (4 if one.is_repeated else 1, repeated))


# -- HTTP/2 --------------------------------------------------------------------------------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
(DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION) = (
    range(10)
)
END_STREAM, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x4, 0x8, 0x20
Headers = Sequence[tuple[bytes, bytes]]


def frame(
    kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"", *, length: int | None = None
) -> bytes:
    """One frame; `length` is what it says of its length, if that is not the truth."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _hpack_integer(number: int, prefix: int) -> bytes:
    most = (1 << prefix) - 1
    if number < most:
        return bytes([number])
    return bytes([most]) + varint(number - most)


def header_block(headers: Headers) -> bytes:
    """Headers as literals, none of them indexed, none compressed."""
    return b"".join(
        b"\0" + _hpack_integer(len(name), 7) + name + _hpack_integer(len(value), 7) + value
        for name, value in headers
    )


def call_headers(
    method: bytes, *more: tuple[bytes, bytes], without: bytes = b""
) -> list[tuple[bytes, bytes]]:
    """Those of a gRPC call, without one of them, and `more` in front of the ordinary ones."""
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/keyturn.v1." + method),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    ]
    kept = [header for header in headers if header[0] != without]
    pseudo = [header for header in more if header[0].startswith(b":")]
    return [*pseudo, *kept, *(header for header in more if header not in pseudo)]


def message(body: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    """A body as gRPC frames it."""
    return bytes([flag]) + (len(body) if length is None else length).to_bytes(4, "big") + body


def call(stream: int, method: bytes, data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A whole unary call on a stream."""
    block = header_block(call_headers(method, *more))
    return frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, END_STREAM, stream, data)


def conversations(body: bytes) -> dict[str, bytes]:
    """What a peer may say on one connection, by name. `body` is one that Decide takes."""
    method = b"RoutingService/Decide"
    hello = PREFACE + frame(SETTINGS)
    good = call(1, method, message(body))
    opening = header_block(call_headers(method))
    begun = hello + frame(HEADERS, END_HEADERS, 1, opening)

    def with_headers(*more: tuple[bytes, bytes], without: bytes = b"") -> bytes:
        block = header_block(call_headers(method, *more, without=without))
        return hello + frame(HEADERS, END_HEADERS, 1, block) + frame(DATA, END_STREAM, 1, message(body))

    def with_data(*parts: bytes) -> bytes:
        return begun + b"".join(frame(DATA, 0, 1, part) for part in parts) + frame(DATA, END_STREAM, 1)

    def many(times: int, one: bytes) -> bytes:
        return hello + one * times + good

    def streams(times: int, of_each: Any) -> bytes:
        return hello + b"".join(of_each(2 * index + 1) for index in range(times))

    rapid = streams(
        1000,
        lambda stream: (
            frame(HEADERS, END_HEADERS, stream, opening) + frame(RST_STREAM, 0, stream, b"\0\0\0\x08")
        ),
    )
    return {
        "nothing": b"",
        "half a preface": PREFACE[:11],
        "another preface": b"PRI * HTTP/3.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS),
        "HTTP/1.1": b"POST /keyturn.v1.RoutingService/Decide HTTP/1.1\r\nHost: x\r\n\r\n",
        "a TLS hello": bytes.fromhex("16030100f1010000ed0303") + b"\xab" * 200,
        "zeros": b"\0" * 5000,
        "ones": b"\xff" * 5000,
        "a good call": hello + good,
        "no settings": PREFACE + good,
        "settings of a wrong size": PREFACE + frame(SETTINGS, payload=b"\0" * 5),
        "settings on a stream": hello + frame(SETTINGS, 0, 1),
        "an acknowledgement with a payload": hello + frame(SETTINGS, 1, 0, b"\0" * 6),
        "settings that nobody knows": PREFACE
        + frame(SETTINGS, payload=b"\xff\xfe\xff\xff\xff\xff" * 100)
        + good,
        "settings out of range": PREFACE
        + frame(SETTINGS, payload=b"\0\x04\xff\xff\xff\xff\0\x05\0\0\0\1")
        + good,
        "a window of nothing": PREFACE + frame(SETTINGS, payload=b"\0\x04\0\0\0\0") + good,
        "a header table of 4 GiB": PREFACE + frame(SETTINGS, payload=b"\0\x01\xff\xff\xff\xff") + good,
        "floods of settings": many(3000, frame(SETTINGS)),
        "floods of settings that change the window": many(
            1000, frame(SETTINGS, payload=b"\0\x04\0\1\0\0" * 20)
        ),
        "floods of pings": many(3000, frame(PING, payload=b"12345678")),
        "a ping of a wrong size": hello + frame(PING, payload=b"1234567"),
        "floods of priorities": many(3000, frame(PRIORITY, 0, 3, b"\0\0\0\1\x10")),
        "a stream that depends on itself": hello + frame(PRIORITY, 0, 3, b"\0\0\0\3\x10"),
        "floods of empty data": begun + frame(DATA, 0, 1) * 3000 + frame(DATA, END_STREAM, 1, message(body)),
        "floods of padding": begun + frame(DATA, PADDED, 1, b"\xff" + b"\0" * 255) * 500,
        "padding that is too long": begun + frame(DATA, PADDED, 1, b"\xff\0"),
        "windows of nothing more": many(2000, frame(WINDOW_UPDATE, payload=b"\0\0\0\0")),
        "a window that overflows": hello + frame(WINDOW_UPDATE, payload=b"\x7f\xff\xff\xff") * 3 + good,
        "a window of a wrong size": hello + frame(WINDOW_UPDATE, payload=b"\0\0\0"),
        "rapid resets": rapid,
        "resets of streams that are not": many(2000, frame(RST_STREAM, 0, 99, b"\0\0\0\x08")),
        "a reset of the connection": hello + frame(RST_STREAM, 0, 0, b"\0\0\0\x08"),
        "streams that never end": streams(150, lambda stream: frame(HEADERS, END_HEADERS, stream, opening)),
        "streams of headers alone": streams(
            300, lambda stream: frame(HEADERS, END_HEADERS | END_STREAM, stream, opening)
        ),
        "a stream of the server's": hello + frame(HEADERS, END_HEADERS, 2, opening),
        "streams that go back": hello + call(5, method, message(body)) + call(3, method, message(body)),
        "the same stream again": hello + good + good,
        "data of a stream that is not": hello + frame(DATA, END_STREAM, 7, message(body)),
        "data after the end": hello + good + frame(DATA, END_STREAM, 1, message(body)),
        "data of the connection": hello + frame(DATA, 0, 0, b"x"),
        "a frame of 16 MiB": hello + frame(DATA, 0, 1, b"\0" * 70_000, length=2**24 - 1),
        "headers of 16 MiB": hello + frame(HEADERS, END_HEADERS, 1, opening, length=2**24 - 1),
        "continuations without an end": hello
        + frame(HEADERS, 0, 1, opening)
        + frame(CONTINUATION, 0, 1, header_block([(b"x", b"y" * 1000)])) * 2000,
        "empty continuations": hello + frame(HEADERS, 0, 1, opening) + frame(CONTINUATION, 0, 1) * 5000,
        "a continuation of nothing": hello + frame(CONTINUATION, END_HEADERS, 1, opening),
        "something between headers": hello + frame(HEADERS, 0, 1, opening) + frame(PING, payload=b"12345678"),
        "headers that are none": hello + frame(HEADERS, END_HEADERS, 1, b"\xff" * 200),
        "an index that is none": hello + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\x0f"),
        "an integer without an end": hello + frame(HEADERS, END_HEADERS, 1, b"\x7f" + b"\xff" * 500),
        "a string beyond its block": hello + frame(HEADERS, END_HEADERS, 1, b"\0\x7f\xff\xff\x03abc"),
        "Huffman's rubbish": hello
        + frame(HEADERS, END_HEADERS, 1, b"\0\x84\xff\xff\xff\xff\x84\xff\xff\xff\xff"),
        "tables that grow and shrink": hello
        + frame(HEADERS, END_HEADERS, 1, b"\x3f\xe1\xff\x03\x20" * 500 + opening),
        "a small block of large headers": hello
        + frame(HEADERS, END_HEADERS, 1, opening + b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000 + b"\xbe" * 4000),
        "headers over the limit": with_headers(*[(b"x-%d" % index, b"v" * 100) for index in range(150)]),
        "a path that is no text": with_headers((b":path", b"/\xff\xfe\x80/\xed\xa0\x80"), without=b":path"),
        "a path of nothing": with_headers((b":path", b""), without=b":path"),
        "a long path": with_headers((b":path", b"/" + b"p" * 12_000), without=b":path"),
        "no path": with_headers(without=b":path"),
        "two paths": with_headers((b":path", b"/x")),
        "no method": with_headers(without=b":method"),
        "GET": with_headers((b":method", b"GET"), without=b":method"),
        "no content type": with_headers(without=b"content-type"),
        "another content type": with_headers((b"content-type", b"text/html"), without=b"content-type"),
        "upper case": with_headers((b"X-Upper", b"x")),
        "a name with a NUL": with_headers((b"x\0y", b"x")),
        "a value with a line break": with_headers((b"x", b"a\r\nb: c\0")),
        "a pseudo header that is none": with_headers((b":x", b"y")),
        "binary metadata that is none": with_headers((b"x-bin", b"!!! not base64 \xff")),
        "a deadline that is none": with_headers((b"grpc-timeout", b"9999999999999999999X")),
        "a deadline of no time": with_headers((b"grpc-timeout", b"0n")),
        "a deadline of ages": with_headers((b"grpc-timeout", b"99999999H")),
        "an encoding that is none": with_headers((b"grpc-encoding", b"nonsense")),
        "gzip that is none": with_headers((b"grpc-encoding", b"gzip")).replace(
            message(body), message(body, flag=1)
        ),
        "an actor that is none": with_headers((b"keyturn-actor", b"\xff\x80\n")),
        "a token that is no text": with_headers((b"authorization", b"Bearer \xff\xfe")),
        "a token of spaces": with_headers((b"authorization", b" " * 1000)),
        "compressed without a word": with_data(message(body, flag=1)),
        "a flag that is none": with_data(message(body, flag=255)),
        "a message of 4 GiB": with_data(message(body, length=2**32 - 1)),
        "a message that is cut": with_data(message(body, length=len(body) + 1)),
        "half a length": with_data(b"\0\0"),
        "no message": with_data(),
        "an empty message": with_data(message(b"")),
        "many messages": with_data(message(body) * 200),
        "a message by the byte": with_data(*(bytes([byte]) for byte in message(body))),
        "a promise": hello + frame(PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2" + opening),
        "a farewell": hello + good + frame(GOAWAY, payload=b"\0\0\0\1\0\0\0\0bye"),
        "a farewell first": hello + frame(GOAWAY, payload=b"\x7f\xff\xff\xff\0\0\0\x0b") + good,
        "a farewell of a wrong size": hello + frame(GOAWAY, payload=b"\0"),
        "frames of kinds that nobody knows": many(500, frame(0xEE, 0xFF, 0x7FFFFFFF, b"x" * 50)),
        "reserved bits": hello + frame(HEADERS, END_HEADERS, 0x80000001, opening),
        "all flags": hello + frame(HEADERS, 0xFF, 1, b"\0" * 6 + opening),
    }


def mutated(conversation: bytes, draw: random.Random) -> bytes:
    """The same with some of it changed, left out, doubled, or cut."""
    out = bytearray(conversation)
    for _ in range(draw.choice([1, 1, 2, 4, 16])):
        at = draw.randrange(len(out)) if out else 0
        match draw.randrange(6):
            case 0:
                out[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del out[at : at + draw.choice([1, 2, 9, 50])]
            case 2:
                out[at:at] = out[at : at + draw.choice([1, 9, 100])]
            case 3:
                out[at:at] = draw.randbytes(draw.choice([1, 3, 9, 40]))
            case 4:
                out[at : at + 1] = bytes([out[at] ^ 1 << draw.randrange(8)]) if out else b""
            case _:
                del out[at:]
    return bytes(out)
