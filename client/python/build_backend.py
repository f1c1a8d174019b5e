# SPDX-License-Identifier: Apache-2.0
"""setuptools' build backend, which also asks for a protobuf compiler where the host has none."""

from __future__ import annotations

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  The rest of PEP 517 and 660.

import generate_stubs


def _compiler() -> list[str]:
    return [] if generate_stubs.has_programs() else ["grpcio-tools>=1.60"]


def get_requires_for_build_wheel(settings: Any = None) -> list[str]:
    """What pip installs before it builds."""
    return [*build_meta.get_requires_for_build_wheel(settings), *_compiler()]


def get_requires_for_build_editable(settings: Any = None) -> list[str]:
    """Likewise for `pip install -e`."""
    return [*build_meta.get_requires_for_build_editable(settings), *_compiler()]


def get_requires_for_build_sdist(settings: Any = None) -> list[str]:
    """A source archive has no generated code."""
    return list(build_meta.get_requires_for_build_sdist(settings))
