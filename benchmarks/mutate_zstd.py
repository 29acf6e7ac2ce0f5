"""zstd frames made by hand: bombs, and frames that are not what a reader expects."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.mutation_parts import Draw, compress

_RUN = 2**17  # the longest block of zstd


def zstd_frame(
    stated: int | None, blocks: list[tuple[int, bytes]], *, window: int = 0, checksum: bool = False
) -> bytes:
    """A zstd frame by hand: its stated content size, and blocks as (times, byte) of run-length coding or raw bytes.

    A block (0, data) is raw, (times, byte) repeats the byte.
    """
    single = stated is not None and not window
    descriptor = (0b11 << 6 if stated is not None else 0) | single << 5 | checksum << 2
    head = b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + (b"" if single else bytes([window or 0x58]))
    head += b"" if stated is None else stated.to_bytes(8, "little")
    body = b""
    for number, (times, data) in enumerate(blocks):
        last, kind, size = number == len(blocks) - 1, 1 if times else 0, times or len(data)
        body += (last | kind << 1 | size << 3).to_bytes(3, "little") + data
    return head + body + (b"\0\0\0\0" if checksum else b"")


def _with_dictionary(content: bytes) -> bytes:
    frame_ = zstd_frame(len(content), [(0, content)])
    return frame_[:4] + bytes([frame_[4] | 1]) + b"\x07" + frame_[5:]


ZSTD_FAULTS: dict[str, Callable[[bytes, Draw], bytes]] = {
    "states its content, holds 128 KiB runs": lambda c, d: zstd_frame(len(c), [(_RUN, b"a")] * d.between(1, 200)),
    "states 2^62 bytes": lambda c, d: zstd_frame(2**62, [(0, c)]),
    "states and holds 26 MB": lambda c, d: zstd_frame(200 * _RUN, [(_RUN, b"a")] * 200),
    "states 300 MB, holds little": lambda c, d: zstd_frame(300 * 10**6, [(0, c)]),
    "states no size": lambda c, d: zstd_frame(None, [(0, c)]),
    "states no size, holds runs": lambda c, d: zstd_frame(None, [(_RUN, b"a")] * d.between(1, 200)),
    "states less": lambda c, d: zstd_frame(len(c) - 1, [(0, c)]),
    "states more": lambda c, d: zstd_frame(len(c) + 1, [(0, c)]),
    "holds less": lambda c, d: zstd_frame(len(c), [(0, c[:-1])]),
    "holds more": lambda c, d: zstd_frame(len(c), [(0, c + b"a")]),
    "a window of 2 TiB": lambda c, d: zstd_frame(len(c), [(0, c)], window=0xFF),
    "a wrong content checksum": lambda c, d: zstd_frame(len(c), [(0, c)], checksum=True),
    "two frames": lambda c, d: compress(c) + compress(c),
    "two halves": lambda c, d: compress(c[: len(c) // 2]) + compress(c[len(c) // 2 :]),
    "bytes behind it": lambda c, d: compress(c) + d.data(d.between(1, 50)),
    "a skippable frame in front": lambda c, d: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + compress(c),
    "a skippable frame behind": lambda c, d: compress(c) + b"\x50\x2a\x4d\x18\x04\0\0\0abcd",
    "a dictionary": lambda c, d: _with_dictionary(c),
    "cut": lambda c, d: compress(c)[: d.between(1, len(compress(c)) - 1)],
    "not compressed": lambda c, d: c,
    "random bytes": lambda c, d: d.data(d.between(1, 100)),
    "gzip's magic": lambda c, d: b"\x1f\x8b\x08" + c,
}
