# SPDX-License-Identifier: Apache-2.0
"""transformers' generate with its KV in the service: full budgets change no token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dynsplit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import dynsplit.hf  # noqa: E402

VOCAB, PROMPT, NEW = 64, 170, 24
FULL = dynsplit.policy("dynsplit", kept_ratio=1.0, profile="smollm2")


both = pytest.mark.parametrize("model", ["sdpa", "eager"], indirect=True)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    """A random Llama; its parameter names the attention function."""
    torch.manual_seed(3)
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        initializer_range=0.2,
        attn_implementation=getattr(request, "param", "sdpa"),
    )
    made = transformers.LlamaForCausalLM(config).eval()
    made.generation_config.eos_token_id = None
    return made


def _prompt(batch: int = 1, length: int = PROMPT, seed: int = 7) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _generate(model: Any, prompt: dict[str, Any], new: int = NEW, **options: Any) -> list[Any]:
    found = model.generate(**prompt, max_new_tokens=new, do_sample=False, **options)
    return found[:, prompt["input_ids"].shape[1] :].tolist()


@both
@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("batch", [1, 2])
def test_full_budget_changes_no_token(
    model: Any, service: dynsplit.Client, positions: str, batch: int
) -> None:
    expected = _generate(model, _prompt(batch))
    policy = dynsplit.policy("dynsplit", kept_ratio=1.0, profile="smollm2", positions=positions)
    with dynsplit.hf.compress(model, service, policy) as compression:
        assert _generate(model, _prompt(batch)) == expected
    assert len({tuple(row) for row in expected}) == batch and len(set(expected[0])) > 5
    assert [result.num_tokens for result in compression.results] == [PROMPT] * batch
    assert _generate(model, _prompt(batch)) == expected  # the model is as it was


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_session_read_whole_changes_no_token(
    model: Any, service: dynsplit.Client, speculative: bool, batch: int
) -> None:
    expected = _generate(model, _prompt(batch))
    policy = dynsplit.index_policy(kept_ratio=1.0, profile="smollm2", num_recent_tokens=8)
    cache = dynsplit.hf.SessionCache(
        model, service, policy, speculative=speculative, append_every=7
    )
    with cache:
        assert _generate(model, _prompt(batch), past_key_values=cache) == expected
        lengths = [service.get(session).shape.num_tokens for session in cache.session_ids]
        assert lengths == [PROMPT + 21] * batch  # the last token is never fed
        opened = list(cache.session_ids)
    for session in opened:
        with pytest.raises(dynsplit.DynSplitError, match="SESSION_RELEASED"):
            service.get(session)


@pytest.mark.parametrize("layers_a_call", [1, 2, 4])
@pytest.mark.parametrize("speculative", [False, True])
def test_answers_larger_than_a_message_come_in_pieces(
    model: Any,
    service: dynsplit.Client,
    monkeypatch: pytest.MonkeyPatch,
    speculative: bool,
    layers_a_call: int,
) -> None:
    policy = dynsplit.index_policy(kept_ratio=0.3, profile="smollm2", num_recent_tokens=8)

    def run() -> list[Any]:
        cache = dynsplit.hf.SessionCache(model, service, policy, speculative=speculative)
        with cache:
            return _generate(model, _prompt(2), past_key_values=cache)

    expected = run()
    sizes: list[int] = []
    select = service.select

    def counting(steps: Any) -> Any:
        sizes.append(sum(len(step.queries) for step in steps))
        return select(steps)

    with monkeypatch.context() as patched:
        patched.setattr(service, "select", counting)
        patched.setattr(
            dynsplit.hf.SessionCache,
            "_fit",
            lambda self, info: setattr(self, "_layers_a_call", layers_a_call),
        )
        assert run() == expected
    assert max(sizes) <= layers_a_call


def test_a_small_session_budget_reads_less(model: Any, service: dynsplit.Client) -> None:
    policy = dynsplit.index_policy(kept_ratio=0.3, profile="smollm2", num_recent_tokens=8)
    with dynsplit.hf.SessionCache(model, service, policy, speculative=True) as cache:
        _generate(model, _prompt(), past_key_values=cache)
        assert cache.chosen_rows < 0.4 * NEW * 3 * 2 * PROMPT
        assert 0 < cache.moved_rows < cache.chosen_rows


def _reference(model: Any, prompt: dict[str, Any], compressed: Any, new: int) -> list[int]:
    """Greedy tokens of a plain loop over exactly the kept rows, with positions set by hand."""
    cache = transformers.DynamicCache()
    for layer in compressed.layers:
        keys, values = layer.rows()
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer.layer)
    with torch.no_grad():
        token = model(**prompt).logits[:, -1:].argmax(-1)
    position = compressed.layers[0].num_kept if compressed.contiguous else compressed.num_tokens
    tokens = [int(token)]
    for step in range(new - 1):
        with torch.no_grad():
            logits = model(
                token,
                past_key_values=cache,
                position_ids=torch.tensor([[position + step]]),
            ).logits
        token = logits[:, -1:].argmax(-1)
        tokens.append(int(token))
    return tokens


@both
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_positions_go_on_where_they_should(
    model: Any, service: dynsplit.Client, positions: str
) -> None:
    policy = dynsplit.policy("dynsplit", kept_ratio=0.4, profile="smollm2", positions=positions)
    with dynsplit.hf.compress(model, service, policy, num_queries=16) as compression:
        found = _generate(model, _prompt())[0]
    compressed = compression.results[0]
    assert compressed.layers[0].num_kept == 68
    assert found == _reference(model, _prompt(), compressed, NEW)
    assert found != _generate(model, _prompt())[0]


@both
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_a_second_turn_sees_all_that_was_kept(
    model: Any, service: dynsplit.Client, positions: str
) -> None:
    """Several tokens at once over a compressed cache equal the same tokens one by one."""
    policy = dynsplit.policy("dynsplit", kept_ratio=0.4, profile="smollm2", positions=positions)
    more = _prompt(length=9, seed=8)["input_ids"]
    logits = []
    with dynsplit.hf.compress(model, service, policy, num_queries=16), torch.no_grad():
        for pieces in ([more], list(more.split(1, dim=1))):
            cache = transformers.DynamicCache(config=model.config)
            model(**_prompt(), past_key_values=cache)
            assert cache.get_seq_length() == PROMPT
            parts = [model(piece, past_key_values=cache).logits for piece in pieces]
            logits.append(torch.cat(parts, dim=1))
            assert cache.get_seq_length() == PROMPT + 9
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("speculative", [False, True])
def test_a_second_turn_over_a_session(
    model: Any, service: dynsplit.Client, speculative: bool
) -> None:
    more = _prompt(length=9, seed=8)["input_ids"]
    policy = dynsplit.index_policy(kept_ratio=1.0, profile="smollm2")
    session = dynsplit.hf.SessionCache(
        model, service, policy, speculative=speculative, append_every=4
    )
    logits = []
    with session, torch.no_grad():
        for cache in (transformers.DynamicCache(config=model.config), session):
            model(**_prompt(), past_key_values=cache)
            parts = [
                model(piece, past_key_values=cache).logits for piece in more.split([5, 1, 3], 1)
            ]
            logits.append(torch.cat(parts, dim=1))
            assert cache.get_seq_length() == PROMPT + 9
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_the_decode_side_goes_on_from_a_file(
    model: Any, service: dynsplit.Client, tmp_path: Path
) -> None:
    policy = dynsplit.policy("dynsplit", kept_ratio=0.5, profile="smollm2", encoding="int8")
    with dynsplit.hf.compress(model, service, policy, num_queries=16) as compression:
        expected = _generate(model, _prompt())[0]
    compression.results[0].save(tmp_path / "x.dskv")
    cache = dynsplit.hf.cache_of([dynsplit.load(tmp_path / "x.dskv")[0]], model)
    ids = torch.cat([_prompt()["input_ids"], torch.tensor([[expected[0]]])], dim=1)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert _generate(model, prompt, NEW - 1, past_key_values=cache)[0] == expected[1:]
    with pytest.raises(ValueError, match="3 layers"):
        result = compression.results[0]
        dynsplit.hf.cache_of([dataclasses.replace(result, layers=result.layers[:2])], model)


@both
def test_layers_may_keep_different_numbers(model: Any, service: dynsplit.Client) -> None:
    policy = dynsplit.policy("dynsplit", kept_ratio=0.3, profile="smollm2", dense_layers=[1])
    with dynsplit.hf.compress(model, service, policy, num_queries=16) as compression:
        _generate(model, _prompt())
    kept = [layer.num_kept for layer in compression.results[0].layers]
    assert kept == [51, PROMPT, 51]
    policy.positions = dynsplit.policy(positions="contiguous").positions
    with (
        dynsplit.hf.compress(model, service, policy),
        pytest.raises(ValueError, match="contiguous"),
    ):
        _generate(model, _prompt())


def test_bfloat16_travels_bit_for_bit(model: Any, service: dynsplit.Client) -> None:
    model = model.to(torch.bfloat16)
    expected = _generate(model, _prompt())
    with dynsplit.hf.compress(model, service, FULL) as compression:
        assert _generate(model, _prompt()) == expected
    keys, _ = compression.results[0].layers[0].rows()
    assert keys.dtype == torch.bfloat16
    policy = dynsplit.index_policy(kept_ratio=1.0, profile="smollm2")
    with dynsplit.hf.SessionCache(model, service, policy, append_every=8) as cache:
        assert _generate(model, _prompt(), past_key_values=cache) == expected


def test_without_a_server_generation_goes_on(model: Any, tmp_path: Path) -> None:
    expected = _generate(model, _prompt())
    nobody = dynsplit.Client(
        f"unix:{tmp_path}/none.sock", retry=dynsplit.Retry(attempts=1), on_error="passthrough"
    )
    with (
        nobody,
        dynsplit.hf.compress(model, nobody, FULL) as compression,
        pytest.warns(dynsplit.PassthroughWarning),
    ):
        assert _generate(model, _prompt()) == expected
    assert compression.results[0].passed_through
    with dynsplit.Client(f"unix:{tmp_path}/none.sock", retry=dynsplit.Retry(attempts=1)) as nobody:
        cache = dynsplit.hf.SessionCache(model, nobody, on_error="passthrough")
        with cache, pytest.warns(dynsplit.PassthroughWarning):
            assert _generate(model, _prompt(), past_key_values=cache) == expected


def test_padded_prompts_and_nested_contexts_are_refused(
    model: Any, service: dynsplit.Client
) -> None:
    prompt = _prompt(2)
    prompt["attention_mask"][0, :5] = 0
    with dynsplit.hf.compress(model, service, FULL):
        with pytest.raises(ValueError, match="padded"):
            _generate(model, prompt)
        with (
            pytest.raises(RuntimeError, match="another"),
            dynsplit.hf.compress(model, service, FULL),
        ):
            pass


def test_the_readme_works(
    model: Any, service: dynsplit.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    monkeypatch.setenv("DYNSPLIT_TARGET", service.target)
    scope = {"model": model, "inputs": _prompt(), "dynsplit": dynsplit}
    for block in (block for block in blocks if "dynsplit.hf" in block):
        exec(block, scope)
    assert scope["compression"].results[0].layers[0].num_kept == 68  # the 64 queries and 4 sinks
    assert scope["cache"].chosen_rows > 0


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Any]:
    """The real model, where the capture tool has fetched it and accelerate is there."""
    pytest.importorskip("accelerate")
    pytest.importorskip("gguf")
    from dynsplit.capture import sources

    cache = sources.cache_dir()
    try:
        files = list(cache.glob("*SmolLM2-135M-Instruct*.gguf"))
    except OSError:
        files = []
    if not files:
        pytest.skip("SmolLM2 is not in the cache (python -m dynsplit.capture fetches it)")
    options = {"gguf_file": files[0].name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(cache, **options)
    real = transformers.AutoModelForCausalLM.from_pretrained(
        cache, dtype=torch.float32, **options
    ).eval()
    return tokenizer, real


def test_smollm2_at_full_budget_says_the_same(smollm2: Any, service: dynsplit.Client) -> None:
    tokenizer, real = smollm2
    text = "List the planets of the solar system and one fact about each. " * 8
    chat = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = _generate(real, prompt, 40)
    for positions in ("original", "contiguous"):
        policy = dynsplit.policy(kept_ratio=1.0, profile="smollm2_table7", positions=positions)
        with dynsplit.hf.compress(real, service, policy):
            assert _generate(real, prompt, 40) == expected
    index = dynsplit.index_policy(kept_ratio=1.0, profile="smollm2_table7")
    for speculative in (False, True):
        with dynsplit.hf.SessionCache(real, service, index, speculative=speculative) as cache:
            assert _generate(real, prompt, 40, past_key_values=cache) == expected
