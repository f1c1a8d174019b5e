#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""clang-tidy over the given units, as many at a time as there are cores.

A unit that passed is not analysed again while what the analysis sees stays the same: the preprocessed
text with comments and macro definitions, the flags, the checks, the tool. Only passes are remembered,
in $XDG_CACHE_HOME/dynsplit-tidy, for all checkouts.

usage: tidy.py BUILD_DIR FILE...            flags from BUILD_DIR/compile_commands.json
       tidy.py --flags 'FLAG...' FILE...    these flags for every file
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shlex
import subprocess
import sys

TIDY = "clang-tidy-14"
CLANG = "clang++-14"
ROOT = pathlib.Path.cwd()
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "dynsplit-tidy"


def flags_of_build(build_dir):
    """File -> (flags, directory they are relative to), of the units the build compiles."""
    flags = {}
    for entry in json.loads((pathlib.Path(build_dir) / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        # Launchers, with flags of their own, may stand before the compiler.
        compiler = next(i for i, word in enumerate(words) if pathlib.Path(word).name.startswith("clang++"))
        words = words[compiler + 1:]
        kept = words[: words.index("-o")]
        flags[os.path.relpath(entry["file"], ROOT)] = (kept, entry["directory"])
    return flags


def fingerprint(unit, flags, directory, common):
    """None if the unit does not even preprocess: the analysis then says why."""
    command = [CLANG, *flags, "-E", "-C", "-dD", "-P", str(ROOT / unit)]
    text = subprocess.run(command, cwd=directory, capture_output=True)
    if text.returncode != 0:
        return None
    key = hashlib.sha256(common)
    for part in (unit, *flags):
        key.update(part.replace(str(ROOT), ".").encode() + b"\0")
    key.update(text.stdout.replace(bytes(ROOT), b"."))
    return key.hexdigest()


def analyse(unit, flags, directory, common):
    """(findings or None, whether it was remembered)."""
    key = fingerprint(unit, flags, directory, common)
    if key and (CACHE / key).exists():
        return None, True
    command = [TIDY, "--quiet", str(ROOT / unit), "--", *flags]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if result.returncode != 0:
        return result.stdout.strip() or result.stderr.strip(), False
    if key:
        (CACHE / key).touch()
    return None, False


def main(arguments):
    if arguments[0] == "--flags":
        flags, units = shlex.split(arguments[1]), arguments[2:]
        of_unit = {unit: (flags, str(ROOT)) for unit in units}
    else:
        of_unit, units = flags_of_build(arguments[0]), arguments[1:]
    unknown = [unit for unit in units if unit not in of_unit]
    if unknown:
        sys.exit(f"tidy: not compiled by {arguments[0]}: {' '.join(unknown)}")
    CACHE.mkdir(parents=True, exist_ok=True)
    version = subprocess.run([TIDY, "--version"], capture_output=True, check=True).stdout
    common = version + (ROOT / ".clang-tidy").read_bytes()
    failed, remembered = set(), 0
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running = {pool.submit(analyse, unit, *of_unit[unit], common): unit for unit in units}
        for done in concurrent.futures.as_completed(running):
            findings, was_remembered = done.result()
            remembered += was_remembered
            if findings is not None:
                failed.add(running[done])
                print(findings, file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"tidy: findings in {', '.join(sorted(failed))}")
    print(f"lint: clang-tidy ok ({len(units)} files, {remembered} unchanged since they passed)")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1:])
