"""Recognizes by its first bytes whether a file is text in UTF-8, or something that must not be trained on."""

from typing import NamedTuple

from swamla_titan.data.document import decode_utf8

HEAD_BYTES = 64 << 10  # of each file are checked, once, when the data are opened

# A file with larger shares of such bytes, and more than FEW, is not text in UTF-8; else they are replaced and counted.
# Latin-1 spends 1 to 5% of its bytes on accented letters; UTF-16 of any script has a control byte in every other word.
MOST_UNDECODABLE, MOST_CONTROL = 1 / 200, 1 / 20
FEW = 10

_CONTROL = bytes(byte for byte in range(32) if byte not in b"\b\t\n\v\f\r\x1b")
_DECOMPRESS = "Decompress it"
_SIGNATURES = [
    (b"\x1f\x8b", "gzip data", _DECOMPRESS),
    (b"\x28\xb5\x2f\xfd", "Zstandard data", _DECOMPRESS),
    (b"\xfd7zXZ\x00", "xz data", _DECOMPRESS),
    (b"\x04\x22\x4d\x18", "LZ4 data", _DECOMPRESS),
    (b"LZIP\x01", "lzip data", _DECOMPRESS),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "Unpack it"),
    (b"PK\x03\x04", "a zip archive (or an office document)", "Unpack it, or save it as plain text"),
    (b"PK\x05\x06", "an empty zip archive", "Remove it"),
    (b"Rar!\x1a\x07", "a RAR archive", "Unpack it"),
    (b"%PDF-", "a PDF document", "Extract its text first, for example with pdftotext"),
    (b"PAR1", "a parquet file", "Name it .parquet"),
    (b"PARE", "an encrypted parquet file", "Decrypt it, and name it .parquet"),
    (b"ARROW1\x00\x00", "an Arrow file", 'Write it as .parquet, or read it with data.source = "huggingface"'),
    (b"SQLite format 3\x00", "an SQLite database", "Write its text as .jsonl"),
    (b"\xff\xfe\x00\x00", "text in UTF-32", "Convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "text in UTF-32", "Convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "text in UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8"),
    (b"version https://git-lfs.github.com/spec/", "a pointer of Git LFS", "Fetch what it stands for: git lfs pull"),
]


class Finding(NamedTuple):
    """What a file is if it is not text in UTF-8, and what to do about it."""

    what: str
    advice: str


def other_than_text(head: bytes) -> Finding | None:
    """What a file that begins with `head` is; None if it is text in UTF-8, entirely or nearly."""
    for signature, what, advice in _SIGNATURES:
        if head.startswith(signature):
            return Finding(what, advice)
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return Finding("bzip2 data", _DECOMPRESS)
    if head and not head.strip(b"\x00"):
        return Finding("nothing but NUL bytes", "Write or download it again, or remove it")
    # NULs at the end do not show an encoding: file systems leave them if a machine failed during a write.
    head = head.rstrip(b"\x00") if len(head) - len(head.rstrip(b"\x00")) > FEW else head
    control = len(head) - len(head.translate(None, _CONTROL))
    if control > FEW and control > MOST_CONTROL * len(head):
        what = f"not text in UTF-8: {control / len(head):.0%} of its first bytes are NUL or other control bytes"
        return Finding(what, "If it is UTF-16, convert it: iconv -f UTF-16LE -t UTF-8; if it is not text, remove it")
    _, undecodable = decode_utf8(head)
    if undecodable > FEW and undecodable > MOST_UNDECODABLE * len(head):
        what = f"not text in UTF-8: {undecodable / len(head):.1%} of its first bytes cannot be decoded"
        advice = "If it is text in another encoding, convert it, for example iconv -f LATIN1 -t UTF-8; else remove it"
        return Finding(what, advice)
    return None
