"""The content that a file promises: it distinguishes a file that lost its end from a short one."""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

_UNKNOWN = 0
_HEADERS = 1 << 24  # largest size of the headers at the beginning of an AVI
_LIST_OF_FRAMES = re.compile(rb"(?s)LIST....movi")
_ENTRY = re.compile(rb"[0-9]{2}\w{2}|rec |\0{4}")  # of an AVI's index: a stream and a kind, a list, or padding
_PADDING = 1 << 16  # bytes after the last box that are checked
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # its file properties: 24 bytes later is the size
_BOXES = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot")
# Of the tables of frames: name, position of the count after it, version and flags that may be set.
_TABLES = ((b"stsz", 8, 0), (b"stz2", 8, 0), (b"trun", 4, 0x01000F05))


def missing_bytes(path: Path) -> int:
    """Number of missing bytes at the end by the file's own sizes; 0: none, or the container has no sizes.

    Known: ISO boxes (mp4, mov), the segment of EBML (mkv, webm), RIFF chunks (avi), ASF (wmv), the last byte of GIF.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[4:8] in _BOXES:
            ends = [at + length for at, length, _ in _boxes(file, size)]
            return max(0, max(ends, default=0) - size)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return max(0, _end_of_segment(file) - size)
        if head[:4] == b"RIFF":
            return max(0, _end_of_chunks(file, size) - size)
        if head[:4] == b"\x30\x26\xb2\x75":
            file.seek(0)
            _, found, after = file.read(1 << 16).partition(_ASF_FILE)
            return max(0, int.from_bytes(after[24:32], "little") - size) if found else 0
        if head[:4] == b"GIF8":
            file.seek(max(0, size - 1024))
            return int(not file.read().rstrip(b"\0").endswith(b";"))
    return 0


def false_count(path: Path) -> int:
    """A number of frames in a table of an mp4 or mov that is larger than the file's size in bytes; 0: none.

    FFmpeg would allocate memory for them before it looks for them.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        for at, length, kind in _boxes(file, size):
            if kind not in (b"moov", b"moof"):
                continue
            file.seek(at)
            content = file.read(min(length, size - at))
            for name, place, flags in _TABLES:
                for found in re.finditer(name, content):
                    fields = content[found.end() : found.end() + place + 4]
                    count = int.from_bytes(fields[place:])
                    if count > size and not int.from_bytes(fields[:4]) & ~flags:
                        return count
    return 0


def damage_of_avi(path: Path) -> str:
    """Damage in an AVI's tables that FFmpeg silently skips, with the number of frames; "" if there is none.

    Without the header of the frame list FFmpeg begins anywhere; of the index it uses only entries that name a stream.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_PADDING)
        if not (_LIST_OF_FRAMES.search(head) or _LIST_OF_FRAMES.search(head + file.read(_HEADERS))):
            return "the header of its list of frames (movi) is gone"
        at = 12
        while at + 8 <= size:
            file.seek(at)
            header = file.read(8)
            length = int.from_bytes(header[4:], "little")
            if header[:4] == b"idx1":
                index = file.read(min(length, size - at))
                wrong = sum(not _ENTRY.match(index, place) for place in range(0, len(index) - 15, 16))
                return f"{wrong} entries of its index (idx1) name no stream" if wrong else ""
            at += 8 + length + length % 2
    return ""


def first_unplaced(
    path: Path, packets: Mapping[int, int], *, overtaken: Collection[int], all_known: bool
) -> int | None:
    """The byte of an mp4 after which no fragment names the frames; None: all are named, or it has no fragments.

    FFmpeg skips a fragment with a damaged header, and packets whose time comes too late because of one wrong time.
    packets:   size by position of all found packets
    overtaken: positions of packets without a picture; correct if an edit list causes it, before the first fragment
    all_known: FFmpeg gives packets for every stream: each byte of a fragment belongs to a packet
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        boxes = list(_boxes(file, size))
        if not any(kind == b"moof" or (kind == b"moov" and _announces(file, at, length)) for at, length, kind in boxes):
            return None
        fragments = min((at for at, _, kind in boxes if kind == b"moof"), default=size)
        places = sorted(place for place in packets if place < fragments or place not in overtaken)
        ends = [0, *accumulate(packets[place] for place in places)]  # total bytes up to each packet
        for at, length, kind in boxes:
            if kind == b"mdat" and at + length <= size:
                held = ends[bisect_left(places, at + length)] - ends[bisect_left(places, at)]
                if held < (length - 16 if all_known else min(1, length - 16)):
                    return at
            elif at + length > size:
                return size if kind == b"mdat" else at  # the last frames are cut, but some exist
        if kind == b"moof":
            return at  # its frames are missing
        file.seek(at + length)
        rest = file.read(_PADDING)
        return at + length if any(rest) and not rest.startswith(b"\0\0\0\0mdat") else None  # 0: to the file's end


def _announces(file: BinaryIO, at: int, length: int) -> bool:
    """Whether the header of an mp4 says that fragments follow."""
    file.seek(at)
    return b"mvex" in file.read(length)


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[int, int, bytes]]:
    """Position, length and kind of each top-level box; the last box may end after the file's end."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4]), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16])
        if (at == 0 and kind not in _BOXES) or length < 8 or not kind.isalnum():
            return  # 0: up to the file's end; else no box, but padding
        yield at, length, kind
        at += length


def _end_of_chunks(file: BinaryIO, size: int) -> int:
    at = 0
    while at + 8 <= size:
        file.seek(at)
        header = file.read(8)
        length = int.from_bytes(header[4:], "little")
        if header[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):  # a stream that was not closed has no size
            return min(at, size)
        at += 8 + length
        if at < size:
            at += length % 2
    return at


def _end_of_segment(file: BinaryIO) -> int:
    """The end of the first segment of a Matroska file, by its header and its size, which may be unknown."""
    file.seek(4)
    length = _number(file)
    if length is None:
        return _UNKNOWN
    file.seek(length, 1)
    if file.read(4) != b"\x18\x53\x80\x67":
        return _UNKNOWN
    length = _number(file)
    return _UNKNOWN if length is None else file.tell() + length


def _number(file: BinaryIO) -> int | None:
    """An EBML number: its length is the number of leading zeros of its first byte plus one; None: unknown, all ones."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    number = int.from_bytes(bytes([first[0] & (0x7F >> more)]) + file.read(more))
    return None if number == (1 << 7 * (more + 1)) - 1 else number
