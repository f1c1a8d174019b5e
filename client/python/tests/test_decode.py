# SPDX-License-Identifier: Apache-2.0
"""Decoding with a session in the loop: a numpy Llama whose attention reads what Select chose."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader, GGUFWriter

from dynsplit.capture.llama import Array, LlamaModel
from dynsplit.sessions import Gather, SessionClient, Step, index_policy

LAYERS, Q_HEADS, KV_HEADS, DIM, VOCAB, FFN = 3, 4, 2, 16, 64, 96
PROMPT, STEPS, APPEND_EVERY = 150, 40, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    """A random model, by way of a real file."""
    random, width = np.random.default_rng(3), Q_HEADS * DIM

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return random.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)

    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(1024)
    writer.add_embedding_length(width)
    writer.add_head_count(Q_HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_vocab_size(VOCAB)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", 8 * matrix(VOCAB, width))
    writer.add_tensor("output.weight", matrix(VOCAB, width))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(LAYERS):
        shapes = {
            "attn_q": (width, width),
            "attn_k": (KV_HEADS * DIM, width),
            "attn_v": (KV_HEADS * DIM, width),
            "attn_output": (width, width),
            "ffn_gate": (FFN, width),
            "ffn_up": (FFN, width),
            "ffn_down": (width, FFN),
        }
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix(*shape))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return LlamaModel(GGUFReader(path))


def _attention(q: Array, keys: Array, values: Array) -> Array:
    """One query over rows [Hkv, n, D], in any order; [1, Hq * D]."""
    grouped = q.reshape(KV_HEADS, -1, DIM)
    logits = np.einsum("hgd,hnd->hgn", grouped, keys) / np.float32(DIM**0.5)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = np.einsum("hgn,hnd->hgd", weights / weights.sum(-1, keepdims=True), values)
    out: Array = mixed.reshape(1, -1)
    return out


class _Cache:
    """Keys and values of all tokens, as the model made them: [t, Hkv, D] a layer."""

    def __init__(self, model: LlamaModel, prompt: npt.NDArray[np.int32]) -> None:
        self.keys: list[Array] = []
        self.values: list[Array] = []

        def keep(_layer: int, _q: Array, k: Array, v: Array) -> None:
            self.keys.append(k)
            self.values.append(v)

        self.first_token = int(model.logits(model.hidden_states(prompt, keep)[-1:]).argmax())

    def extend(self, layer: int, k: Array, v: Array) -> None:
        self.keys[layer] = np.concatenate((self.keys[layer], k))
        self.values[layer] = np.concatenate((self.values[layer], v))

    def rows(self, layer: int, begin: int) -> tuple[Array, Array]:
        """Tokens from `begin` on, [Hkv, t, D]."""
        return (
            self.keys[layer][begin:].transpose(1, 0, 2),
            self.values[layer][begin:].transpose(1, 0, 2),
        )


def _decode(
    model: LlamaModel,
    cache: _Cache,
    read: Callable[[int, Array], tuple[Array, Array]],
    on_token: Callable[[int, int], None],
) -> list[int]:
    """Greedy tokens; `read` gives a layer's rows for a query [Hq, D]."""

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        cache.extend(layer, k, v)
        return _attention(q[0], *read(layer, q[0]))

    token, tokens = cache.first_token, []
    for position in range(PROMPT, PROMPT + STEPS):
        ids = np.array([token], np.int32)
        hidden = model.hidden_states(ids, first_position=position, attend=attend)
        on_token(position, token)
        token = int(model.logits(hidden)[0].argmax())
        tokens.append(token)
    return tokens


class _SessionReader:
    """Reads a layer's rows through its session: the chosen ones, and the tail not appended yet."""

    def __init__(self, client: SessionClient, cache: _Cache, ids: npt.NDArray[np.int32]) -> None:
        self._client, self._cache = client, cache
        self._session = client.open(
            ids,
            cache.keys,
            cache.values,
            num_query_heads=Q_HEADS,
            policy=index_policy(profile="smollm2", num_recent_tokens=8),
            reserve_tokens=STEPS,
        ).session_id
        self._length = len(ids)
        self._pending: list[int] = []
        self._slots: dict[int, tuple[int, Array, Array]] = {}
        self.budget: int | None = None  # None = all

    def read(self, layer: int, q: Array) -> tuple[Array, Array]:
        budget = self.budget or self._length
        generation, keys, values = self._slots.get(layer, (0, *(np.empty(0, np.float32),) * 2))
        step = Step(
            self._session,
            q[None, None],
            first_layer=layer,
            tokens_per_head=budget,
            gather=Gather(generation),
        )
        chosen = self._client.select([step])[0]
        assert chosen.tokens_per_head == budget
        if keys.shape != (KV_HEADS, budget, DIM):
            keys, values = (np.full((KV_HEADS, budget, DIM), np.nan, np.float32) for _ in "kv")
        head, rows = np.arange(KV_HEADS)[:, None], chosen.moved[0]
        keys[head, rows.slots], values[head, rows.slots] = rows.keys, rows.values
        self._slots[layer] = (0, keys, values)  # a session remembers one range of layers: all move
        tail = self._cache.rows(layer, self._length)
        return (
            np.concatenate((keys, tail[0]), axis=1),
            np.concatenate((values, tail[1]), axis=1),
        )

    def on_token(self, _position: int, token: int) -> None:
        self._pending.append(token)
        if len(self._pending) == APPEND_EVERY:
            tails = [self._cache.rows(layer, self._length) for layer in range(LAYERS)]
            keys, values = ([part[kind].transpose(1, 0, 2) for part in tails] for kind in range(2))
            self._client.append(self._session, self._length, self._pending, keys, values)
            self._length += APPEND_EVERY
            self._pending = []


def _prompt() -> npt.NDArray[np.int32]:
    return np.random.default_rng(11).integers(0, VOCAB, PROMPT, np.int32)


def test_reading_everything_gives_the_same_tokens(model: LlamaModel, client: SessionClient) -> None:
    plain = _Cache(model, _prompt())
    expected = _decode(model, plain, lambda layer, _q: plain.rows(layer, 0), lambda *_: None)
    cache = _Cache(model, _prompt())
    reader = _SessionReader(client, cache, _prompt())
    found = _decode(model, cache, reader.read, reader.on_token)
    assert len(set(expected)) > 5  # the model does not just repeat itself
    assert found == expected
    for layer in range(LAYERS):
        np.testing.assert_allclose(cache.keys[layer], plain.keys[layer], rtol=1e-3, atol=1e-4)


def test_a_small_budget_reads_less_and_differs(model: LlamaModel, client: SessionClient) -> None:
    plain = _Cache(model, _prompt())
    _decode(model, plain, lambda layer, _q: plain.rows(layer, 0), lambda *_: None)
    cache = _Cache(model, _prompt())
    reader = _SessionReader(client, cache, _prompt())
    reader.budget = 64
    _decode(model, cache, reader.read, reader.on_token)
    assert np.abs(cache.keys[-1][PROMPT:] - plain.keys[-1][PROMPT:]).max() > 1e-3
