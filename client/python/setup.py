# SPDX-License-Identifier: Apache-2.0
"""Build hook: the wire code is generated, not kept (everything else is in pyproject.toml)."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

_HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE))

import generate_stubs  # noqa: E402


class BuildWithStubs(build_py):
    """Generates into the source folder, where editable installs and wheels both find it."""

    def run(self) -> None:
        """Generates, then builds."""
        generate_stubs.generate(_HERE)
        super().run()


setup(cmdclass={"build_py": BuildWithStubs})
