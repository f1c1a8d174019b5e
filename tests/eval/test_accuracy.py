# SPDX-License-Identifier: Apache-2.0
"""The evaluation's own arithmetic, and that reading everything changes nothing.

Needs torch, and for the service dynsplitd ($DYNSPLITD); skips what is missing.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent))

from accuracy import cases, engine, measure, methods, metrics, presses, summary  # noqa: E402
from accuracy.service import Service  # noqa: E402
from buffers import HostBuffers  # noqa: E402
from dynsplit.client import Client  # noqa: E402
from torch_llama import TINY, TorchLlama, attend_prompt  # noqa: E402

TOKENS = 200
ANSWER = (5, 6, 7, 8)


class _Words:
    """A tokenizer of one token a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


@pytest.fixture(scope="module")
def model() -> TorchLlama:
    return TorchLlama.random(TINY, "cpu", torch.float32, 4096)


@pytest.fixture(scope="module")
def case() -> cases.Case:
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(10, 4000, (TOKENS,), generator=generator).tolist()
    return cases.Case("prose-text-0", "prose", "text", tuple(prompt), ANSWER, False, 0.5)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    binary = os.environ.get("DYNSPLITD", "")
    if not Path(binary).is_file():
        pytest.skip("no dynsplitd: set DYNSPLITD")
    path = tmp_path_factory.mktemp("eval") / "server.sock"
    command = [binary, "--backend=cpu", "--threads=2", "--listen=127.0.0.1:0"]
    command += ["--metrics-listen=127.0.0.1:0", f"--unix-socket={path}", "--regions=shm"]
    server = subprocess.Popen([*command, "--default-profile=smollm2", "--log-level=error"])
    try:
        for _ in range(100):
            if path.exists():
                break
            assert server.poll() is None
            time.sleep(0.1)
        with Client(f"unix:{path}") as connected:
            yield connected
    finally:
        server.terminate()
        server.wait(20)


def test_scores_of_logits() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    other = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]])
    readers = torch.stack([probabilities, other]).log()
    same, worse = metrics.score_logits(readers, probabilities.log(), (0, 1))
    assert same["exact"] == 1 and same["tokens"] == 1
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    assert same["nll"] == pytest.approx(math.log(2))
    assert worse["exact"] == 0 and worse["tokens"] == 0.5
    assert worse["nll"] == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert worse["kl"] == pytest.approx(0.25 * math.log(2) / 2)  # .5 ln 2 - .25 ln 2, halved


def test_rank_correlation() -> None:
    assert metrics.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert metrics.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert metrics.rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert list(metrics.ranks([5, 5, 1])) == [2.5, 2.5, 1]
    assert math.isnan(metrics.rank_correlation([1, 1, 1], [1, 2, 3]))


def test_interval_holds_the_mean_and_shrinks() -> None:
    values = torch.linspace(-1, 2, 100).double().numpy()
    low, high = metrics.interval([values], 1)
    assert low < 0.5 < high
    # Of a mean of 100 evenly spread values: 1.96 * 3 / sqrt(12) / 10.
    assert high - low == pytest.approx(2 * 1.96 * 3 / math.sqrt(12) / 10, rel=0.1)
    assert metrics.interval([values * 0 + 1], 1) == (1, 1)


@pytest.mark.parametrize("task", ["passkey", "multikey", "variables", "qa"])
def test_facts_are_in_the_prompt_at_their_depth(task: str) -> None:
    text = "This line says nothing of note.\n" * 400
    tokenizer = _Words()
    built = cases.build("prose", [tokenizer.encode(text)], 4000, 3, "seed", tokenizer)
    assert built == cases.build("prose", [tokenizer.encode(text)], 4000, 3, "seed", tokenizer)
    for case in (case for case in built if case.task == task):
        prompt, answer = bytes(case.prompt).decode(), bytes(case.answer).decode()
        place = prompt.index(answer.strip())
        assert abs(place / len(prompt) - case.depth) < 0.1
        assert not prompt.endswith(answer) and 3600 < len(prompt) <= 4000


def test_a_mask_is_a_cache_of_the_shown_rows(model: TorchLlama, case: cases.Case) -> None:
    """Attention under a mask equals attention over the gathered rows alone."""
    generator = torch.Generator().manual_seed(4)
    kv_heads, dim = TINY.num_kv_heads, TINY.head_dim
    past = [torch.randn(50, kv_heads, dim, generator=generator) for _ in range(2)]
    q = torch.randn(1, 1, TINY.num_query_heads, dim, generator=generator)
    k, v = (torch.randn(1, 1, kv_heads, dim, generator=generator) for _ in range(2))
    shown = torch.rand(kv_heads, 50, generator=generator) < 0.3
    found = engine.read_masked(q, k, v, (past[0], past[1]), shown[None, :, None])
    group = TINY.num_query_heads // kv_heads
    for head in range(TINY.num_query_heads):
        own = head // group
        keys = torch.cat([past[0][shown[own], own], k[0, :, own]])
        values = torch.cat([past[1][shown[own], own], v[0, :, own]])
        expected = (q[0, 0, head] @ keys.T * dim**-0.5).softmax(-1) @ values
        assert torch.allclose(found[0, 0, head], expected, atol=1e-5)


def test_continuation_equals_one_prefill(model: TorchLlama, case: cases.Case) -> None:
    past = engine.prefill(model, case.prompt)
    split = engine.prefill(model, case.prompt[:-3])
    logits = engine.continue_with(model, split, case.prompt[-3:], 1, None)
    positions = torch.arange(len(case.prompt))
    attend = attend_prompt(lambda *_: None)
    hidden = model.hidden_states(torch.tensor(case.prompt), positions, attend)
    assert torch.allclose(model.logits(hidden[-3:]), logits[0], atol=1e-3)
    rows = torch.stack(past.received).sum(dim=-1) / TOKENS
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-4)  # a query gives 1 in all


def test_reading_everything_is_the_full_cache(
    model: TorchLlama, case: cases.Case, client: Client
) -> None:
    """Every preset, rigid splitting and ablation at share 1; presses where kvpress is."""
    names = () if presses.available() else methods.PRESSES
    buffers = HostBuffers(client)
    service = Service(client, buffers, TINY, torch.float32, TOKENS)
    try:
        methods.put_profiles(client, {})
        table = [m for m in methods.table(client, (), names)]
        assert {m.mode for m in table} == {"evict", "index"}
        settings = measure.Settings((0.5, 1.0), index_positions=2, check_one_in=1)
        bench = measure.Bench(model, _Words(), service, table, settings)
        result = measure.measure(bench, case)
        bench.close()
    finally:
        buffers.close()
    assert not result["failures"]
    lost = 0
    for row in result["rows"]:
        name = f"{row['method']} ({row['mode']})"
        if row["share"] == 1:
            full = result["full_index" if row["mode"] == "index" else "full"]
            assert row["nll"] == pytest.approx(full["nll"], abs=1e-5), name
            assert row["exact"] == full["exact"], name
            assert row["kl"] == pytest.approx(0, abs=1e-6), name
        else:
            lost += row["kl"] > 1e-5
            assert row["mode"] == "index" or 0.35 < row["kept"] < 0.65, name
    assert lost == len(result["rows"]) / 2  # and reading half does change something


def test_summary_of_two_cases() -> None:
    def measured(name: str, ours: float, full: float) -> dict[str, object]:
        score = {"exact": ours, "tokens": 0.0, "nll": 0.0, "kl": 0.5}
        rows = [
            {"method": m, "mode": "evict", "share": 0.1, "mass": 0.9, "error": 0.1, "kept": 0.1}
            | score | {"exact": ours if m == "dynsplit" else 0.0}
            for m in ("dynsplit", "fixed8")
        ]  # fmt: skip
        full_score = {"exact": full, "tokens": 1.0, "nll": 0.0, "kl": 0.0}
        return {"case": name, "kind": "prose", "task": "qa", "full": full_score, "rows": rows}

    found = summary.cells([measured("a", 1.0, 1.0), measured("b", 0.0, 1.0)])
    rows = {(r["method"], r["kind"], r["task"]): r for r in summary.summary(found)}
    cell = rows["dynsplit", "all", "qa"]
    assert (cell["n"], cell["score"], cell["full_score"]) == (2, 0.5, 1.0)
    assert (cell["lo"], cell["hi"]) == (-1.0, 0.0)
    assert rows["dynsplit", "prose", "average"]["score"] == 0.5
    compared = [r for r in summary.comparisons(found) if r["task"] == "qa"]
    assert [(r["other"], r["difference"]) for r in compared] == [("fixed8", 0.5)]
