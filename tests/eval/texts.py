# SPDX-License-Identifier: Apache-2.0
"""Token ids of the capture tool's texts, kept in the cache folder once made.

texts.py DIR writes them into DIR, so that a machine without tokenizer and texts can read them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from dynsplit.capture import sources


def text_ids(kind: str, cache: Path) -> npt.NDArray[np.int32]:
    """Token ids of a whole text: "prose", "code" or "dialogue" (SmolLM2's tokenizer)."""
    path = cache / f"{kind}_ids.npy"
    if not path.exists():
        from dynsplit.capture.tokenizer import GgufTokenizer
        from gguf import GGUFReader

        tokenizer = GgufTokenizer(GGUFReader(sources.model_file(cache)))
        text = sources.load_text(sources.TEXTS[kind], cache)
        np.save(path, np.array(tokenizer.encode(text), np.int32))
    ids: npt.NDArray[np.int32] = np.load(path)
    return ids


def long_ids(num_tokens: int, cache: Path) -> npt.NDArray[np.int32]:
    """Real text, repeated where it is too short: its delimiters are what matters."""
    joined = np.concatenate([text_ids(kind, cache) for kind in ("prose", "dialogue")])
    return np.resize(joined, num_tokens)


def main() -> int:
    """Command line; returns the exit status."""
    for kind in sources.TEXTS:
        np.save(Path(sys.argv[1]) / f"{kind}_ids.npy", text_ids(kind, sources.cache_dir()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
