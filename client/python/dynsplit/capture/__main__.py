# SPDX-License-Identifier: Apache-2.0
"""Command line of the capture tool."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynsplit.capture import CaptureError, sources

if TYPE_CHECKING:
    from dynsplit.capture.llama import LlamaConfig

_EXTRA_HINT = "pip install 'dynsplit[capture]'"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dynsplit.capture",
        description=f"Records keys, values and queries of {sources.MODEL_NAME} over real texts, "
        "one safetensors file a text.",
        epilog="The numpy forward pass follows OMP_NUM_THREADS / OPENBLAS_NUM_THREADS.",
    )
    parser.add_argument(
        "--kind", choices=[*sources.TEXTS, "all"], default="all", help="which text (default: all)"
    )
    parser.add_argument(
        "--tokens", type=int, default=8192, metavar="N", help="tokens of each text (default: 8192)"
    )
    parser.add_argument(
        "--layers",
        default="all",
        metavar="LIST",
        help="model layers to keep: all, or a comma list such as 2,14,27 (default: all)",
    )
    parser.add_argument(
        "--queries",
        default="64",
        metavar="N",
        help="last positions whose queries are kept: a number, or all (default: 64)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument(
        "--cache",
        type=Path,
        default=sources.cache_dir(),
        metavar="DIR",
        help="folder of the fetched archives (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _layer_ids(argument: str, config: LlamaConfig) -> list[int]:
    if argument == "all":
        return list(range(config.num_layers))
    try:
        layers = sorted({int(part) for part in argument.split(",")})
    except ValueError:
        raise CaptureError(f"--layers is {argument!r}, must be all or a comma list") from None
    if layers[0] < 0 or layers[-1] >= config.num_layers:
        raise CaptureError(f"--layers is {argument!r}, layers are 0..{config.num_layers - 1}")
    return layers


def _num_queries(argument: str) -> int | None:
    if argument == "all":
        return None
    if not argument.isascii() or not argument.isdigit():
        raise CaptureError(f"--queries is {argument!r}, must be a number or all")
    return int(argument)


def _run(arguments: argparse.Namespace) -> None:
    try:
        from gguf import GGUFReader
        from tqdm import tqdm

        from dynsplit.capture.container import write_tensors
        from dynsplit.capture.llama import LlamaModel
        from dynsplit.capture.recorder import record
        from dynsplit.capture.tokenizer import GgufTokenizer
    except ImportError as error:
        raise CaptureError(f"missing module {error.name}: {_EXTRA_HINT}") from error

    num_queries = _num_queries(arguments.queries)
    reader = GGUFReader(sources.model_file(arguments.cache))
    tokenizer, model = GgufTokenizer(reader), LlamaModel(reader)
    layer_ids = _layer_ids(arguments.layers, model.config)
    kinds = list(sources.TEXTS) if arguments.kind == "all" else [arguments.kind]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        source = sources.TEXTS[kind]
        text = sources.load_text(source, arguments.cache)
        with tqdm(
            total=model.config.num_layers, desc=kind, unit="layer", disable=arguments.quiet
        ) as bar:
            capture = record(
                model,
                tokenizer,
                source,
                text,
                arguments.tokens,
                layer_ids,
                num_queries,
                lambda bar=bar: bar.update(),  # type: ignore[misc]
            )
        path = arguments.out / f"{kind}.safetensors"
        num_bytes = write_tensors(path, capture.tensors, capture.metadata)
        print(
            f"{path}: {arguments.tokens} tokens, {len(layer_ids)} layers, "
            f"{num_bytes / 2**20:.2f} MiB, perplexity {capture.perplexity:.2f}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except (CaptureError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
