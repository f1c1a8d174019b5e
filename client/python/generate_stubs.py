#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Generates the wire code of `dynsplit.v1`.

    generate_stubs.py [OUT]     OUT: folder of the package, by default the one beside this file

Writes OUT/dynsplit/v1/*_pb2.py with their types (*_pb2.pyi), *_pb2_grpc.py and error_details.binpb
(a descriptor set of google.rpc). The build of the package runs it (setup.py); run it by hand where
the sources are used in place. Needs the programs protoc (3.20 or later) and grpc_python_plugin
(Debian: protobuf-compiler, protobuf-compiler-grpc), or the Python package grpcio-tools.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_PROTO_ROOT = _HERE.parent.parent / "proto"


def has_programs() -> bool:
    """Whether the compiler and its plugin are on PATH."""
    return bool(shutil.which("protoc") and shutil.which("grpc_python_plugin"))


def _compiler() -> list[str]:
    """Command line of the compiler, which knows --grpc_python_out."""
    if has_programs():
        plugin = shutil.which("grpc_python_plugin")
        return ["protoc", f"--plugin=protoc-gen-grpc_python={plugin}"]
    if importlib.util.find_spec("grpc_tools") is None:
        raise FileNotFoundError(
            "neither protoc and grpc_python_plugin on PATH (Debian: apt-get install "
            "protobuf-compiler protobuf-compiler-grpc) nor grpcio-tools (pip install grpcio-tools)"
        )
    return [sys.executable, "-m", "grpc_tools.protoc"]


def generate(out: Path) -> None:
    """Generates into `out`/dynsplit/v1.

    Raises:
        FileNotFoundError: the compiler or the .proto files are missing.
        subprocess.CalledProcessError: protoc refused its input.
    """
    protos = sorted((_PROTO_ROOT / "dynsplit" / "v1").glob("*.proto"))
    if not protos:
        raise FileNotFoundError(f"no .proto files in {_PROTO_ROOT / 'dynsplit' / 'v1'}")
    target = out / "dynsplit" / "v1"
    target.mkdir(parents=True, exist_ok=True)
    protoc = _compiler()
    subprocess.run(
        [
            *protoc,
            f"-I{_PROTO_ROOT}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            *map(str, protos),
        ],
        check=True,
    )
    for empty in target.glob("*_pb2_grpc.py"):  # the plugin writes one a file, services or not
        if "class " not in empty.read_text():
            empty.unlink()
    # As data, not as modules: google.rpc may be installed beside this package, and two modules of
    # one name cannot both be registered.
    subprocess.run(
        [
            *protoc,
            f"-I{_PROTO_ROOT}",
            "--include_imports",
            f"--descriptor_set_out={target / 'error_details.binpb'}",
            str(_PROTO_ROOT / "google" / "rpc" / "status.proto"),
            str(_PROTO_ROOT / "google" / "rpc" / "error_details.proto"),
        ],
        check=True,
    )


def main() -> int:
    """Command line; returns the exit status."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else _HERE
    try:
        generate(out)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
