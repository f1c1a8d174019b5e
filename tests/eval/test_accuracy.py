# SPDX-License-Identifier: Apache-2.0
"""The evaluation's own arithmetic, and that reading everything changes nothing.

Needs torch, and for the service dynsplitd ($DYNSPLITD); skips what is missing.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent))

from dynsplit import tensors  # noqa: E402
from dynsplit.client import Client  # noqa: E402
from dynsplit.v1 import types_pb2  # noqa: E402

import report  # noqa: E402
from accuracy import (  # noqa: E402
    cases,
    corpus,
    engine,
    measure,
    methods,
    metrics,
    presses,
    summary,
    workers,
)
from accuracy.service import Mismatch, Service  # noqa: E402
from buffers import HostBuffers  # noqa: E402
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


def test_a_passage_lies_in_one_text() -> None:
    texts = [[number] * 5000 for number in (65, 66, 67)]
    tokenizer = _Words()
    built = cases.build("prose", texts, 2000, 30, "seed", tokenizer)
    seen = set()
    for case in (case for case in built if case.task == "text"):
        of = set(case.prompt) | set(case.answer)
        assert len(of) == 1 and len(case.prompt) == 2000
        seen |= of
    assert seen == {65, 66, 67}
    short = [[64] * 100, *texts]
    assert cases.build("prose", short, 2000, 30, "seed", tokenizer) == built
    with pytest.raises(ValueError, match="longest text has 100"):
        cases.build("prose", short[:1], 2000, 1, "seed", tokenizer)


def test_parts_of_the_corpus_share_no_text() -> None:
    named = {
        split: {text.sha256 for kind in corpus.KINDS for text in corpus._TEXTS[kind, split]}
        for split in corpus.SPLITS
    }
    assert len(named["tuning"]) >= 8 and not named["tuning"] & named["held-out"]


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


def test_whole_attention_of_the_last_tokens() -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(40, heads, 32, generator=generator) for heads in (8, 2, 2))
    whole = engine.attend_whole(q, k, v)
    assert torch.allclose(engine.attend_whole(q[-7:], k, v), whole[-7:], atol=1e-5)
    past = (k[:33].clone(), v[:33].clone())
    parts = (part[None, -7:] for part in (q, k, v))
    assert torch.allclose(engine.read_masked(*parts, past, None)[0], whole[-7:], atol=1e-5)


def test_presses_keep_what_kvpress_keeps(model: TorchLlama, case: cases.Case) -> None:
    """Scores that are computed once give every share what the press itself gives."""
    if presses.available():
        pytest.skip(presses.available())
    from kvpress.presses.chunkkv_press import ChunkKVPress
    from kvpress.presses.keydiff_press import KeyDiffPress
    from kvpress.presses.snapkv_press import SnapKVPress

    past = engine.prefill(model, case.prompt)
    judge = presses.Judge(model, past, _Words())
    for share in (0.2, 0.5):
        removed = 1 - share
        for name, press in (
            ("snapkv", SnapKVPress(removed)),
            ("keydiff", KeyDiffPress(removed)),
            ("chunkkv", ChunkKVPress(SnapKVPress(removed), chunk_length=presses.CHUNK_LENGTH)),
        ):
            found = judge.kept(name, share)
            for layer in range(TINY.num_layers):
                keys, values = press.compress(*judge._arguments(layer))
                for head in range(TINY.num_kv_heads):
                    for rows, of in ((keys, past.keys), (values, past.values)):
                        own = of[layer][found[layer, head], head]
                        assert {tuple(row.tolist()) for row in own} == {
                            tuple(row.tolist()) for row in rows[0, head]
                        }, name
        pruned = judge.kept("kvzip", share)
        assert pruned.float().mean() == pytest.approx(share, abs=0.01)
        assert pruned[..., :4].all()
    fewer = judge.kept("kvzip", 0.2)
    assert not (fewer & ~judge.kept("kvzip", 0.5)).any()


def _service(client: Client) -> tuple[Service, HostBuffers]:
    buffers = HostBuffers(client)
    return Service(client, buffers, TINY, torch.float32, TOKENS), buffers


def test_a_method_that_fails_is_noted(
    model: TorchLlama, case: cases.Case, client: Client, tmp_path: Path
) -> None:
    rows = [
        {"name": "good", "mode": "evict", "choices": {"preset": "snapkv"}},
        {"name": "bad", "mode": "evict", "choices": {"preset": "dynsplit", "profile": "nobody"}},
        {"name": "good", "mode": "index", "choices": {"preset": "quest"}},
        {"name": "bad", "mode": "index", "choices": {"preset": "nothing"}},
    ]
    (tmp_path / "grid.json").write_text(json.dumps(rows))
    table = methods.grid(tmp_path / "grid.json")
    service, buffers = _service(client)
    try:
        settings = measure.Settings((0.2, 0.5), memory_bytes=1, session_bytes=1)
        bench = measure.Bench(model, _Words(), service, table, settings)
        result = measure.measure(bench, case) | {"config": ""}
        bench.close()
    finally:
        buffers.close()
    assert {(row["method"], row["mode"]) for row in result["rows"]} == {
        ("good", "evict"),
        ("good", "index"),
    }
    assert len(result["rows"]) == 4
    failed = summary.failures([result])
    assert [(row["method"], row["mode"], row["cases"]) for row in failed] == [
        ("bad", "evict", 1),
        ("bad", "index", 1),
    ]
    assert "nobody" in failed[0]["error"] and "nothing" in failed[1]["error"]


@pytest.mark.parametrize(
    "row",
    [
        {"name": "a", "mode": "both", "choices": {}},
        {"name": "a", "mode": "evict", "choices": {"block_length": 3}},
        {"name": "a", "mode": "evict", "choices": {}, "preset": "snapkv"},
    ],
)
def test_a_grid_is_checked(row: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=r"grid\.json"):
        methods.grid(tmp_path / "grid.json")


def test_a_room_may_be_a_tensor() -> None:
    """As on a device: what was written there is seen in its own type, without a copy."""
    rows = torch.arange(12).view(2, 3, 2).bfloat16()
    room = rows.view(torch.uint8).flatten()
    found = tensors.from_bytes(room, types_pb2.DTYPE_BFLOAT16, (2, 3, 2), like=room)
    assert torch.equal(found, rows) and found.data_ptr() == room.data_ptr()


def test_other_rows_are_found_out(model: TorchLlama, case: cases.Case, client: Client) -> None:
    service, buffers = _service(client)
    try:
        service.load(engine.prefill(model, case.prompt))
        method = methods.Method("snapkv", "evict", "preset", {"preset": "snapkv"})
        mask = torch.ones(TINY.num_layers, TINY.num_kv_heads, TOKENS, dtype=torch.bool)
        assert service.evict(method, 0.5, mask).checked
        assert mask.float().mean() == pytest.approx(0.5, abs=0.01)
        compare = service._compare

        def shifted(result: Any, layers: range, tokens: Any, name: str) -> None:
            compare(result, layers, tokens - 1 + 2 * (tokens == 0), name)

        service._compare = shifted  # type: ignore[method-assign]
        with pytest.raises(Mismatch, match=r"snapkv at 0\.5"):
            service.evict(method, 0.5, mask)
        assert not service.evict(method, 0.5, mask, check=False).checked
    finally:
        buffers.close()


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


def _measured(
    name: str, right: dict[str, float], full: float, mode: str = "evict"
) -> dict[str, Any]:
    kind, task, *_ = name.split("-")
    rest = {"tokens": 0.0, "nll": 0.0, "kl": 0.5, "mass": 0.9, "error": 0.1, "kept": 0.1}
    return {
        "case": name,
        "kind": kind,
        "task": task,
        "full": {"exact": full, "tokens": 1.0, "nll": 0.0, "kl": 0.0},
        "rows": [
            {"method": m, "mode": mode, "share": 0.1} | rest | {"exact": exact}
            for m, exact in right.items()
        ],
    }


def test_tasks_that_the_full_cache_cannot_do_are_not_averaged() -> None:
    """By kind, task and length: here qa of 4096 tokens in prose, and of code at any length."""
    ours, full = {"dynsplit": 1.0, "snapkv": 0.0}, 1.0
    measured = [_measured(f"prose-qa-2048-{n}", ours, full) for n in range(4)]
    measured += [_measured(f"prose-qa-4096-{n}", ours, float(n == 9)) for n in range(10)]
    measured += [_measured(f"prose-passkey-4096-{n}", ours, float(n < 2)) for n in range(10)]
    measured += [_measured("code-qa-2048-0", ours, 0.0)]
    counted = {"prose-qa-2048", "prose-passkey-4096"}
    assert summary.counted(measured, "evict") == counted  # 0.2 is enough, 0.1 is not
    found = summary.cells(measured)
    rows = {(r["method"], r["kind"], r["task"]): r for r in summary.summary(found)}
    assert rows["dynsplit", "prose", "qa"]["n"] == 14
    average = rows["dynsplit", "prose", "average"]
    assert (average["n"], average["score"]) == (14, 1.0)
    assert average["full_score"] == pytest.approx((1 + 0.2) / 2)
    relative = rows["dynsplit", "all", "relative"]
    assert relative["score"] == pytest.approx(1 / 0.6) and relative["full_score"] == 1
    assert ("dynsplit", "code", "average") not in rows
    compared = [r for r in summary.comparisons(found) if r["task"] == "average"]
    assert [(r["other"], r["n"], r["difference"]) for r in compared] == [("snapkv", 14, 1.0)]


def test_index_is_paired_with_its_own_part_of_the_answer() -> None:
    case = _measured("logs-line-2048-0", {"quest": 0.0}, 1.0, "index")
    case["full_index"] = case["full"] | {"tokens": 0.75}
    rows = {r["task"]: r for r in summary.summary(summary.cells([case])) if r["kind"] == "logs"}
    assert rows["line"]["full_score"] == 0.75


def test_comparisons_where_some_cases_failed() -> None:
    both, one = {"dynsplit": 1.0, "snapkv": 0.0}, {"dynsplit": 1.0}
    measured = [_measured("prose-qa-2048-0", both, 1.0), _measured("prose-qa-2048-1", one, 1.0)]
    measured += [_measured("prose-passkey-2048-0", one, 1.0)]
    compared = summary.comparisons(summary.cells(measured))
    found = {r["task"]: (r["n"], r["difference"]) for r in compared}
    assert found == {"qa": (1, 1.0), "average": (1, 1.0)}


def test_report_of_small_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"dynsplit": "preset", "snapkv": "preset", "no_weights": "ablation"}
    right = {"dynsplit": 1.0, "snapkv": 0.0, "no_weights": 0.5}
    measured = [_measured(f"prose-qa-2048-{n}", right, 1.0) for n in range(3)]
    measured[0]["failures"] = [{"method": "x", "mode": "index", "share": None, "error": "E: why"}]
    (tmp_path / "cases").mkdir()
    for number, case in enumerate(measured):
        config = "other" if number == 2 else "this"
        (tmp_path / f"cases/{case['case']}.json").write_text(json.dumps(case | {"config": config}))
    described = {
        "config": "this",
        "methods": [{"name": n, "mode": "evict", "group": g} for n, g in table.items()],
        "cases": [case["case"] for case in measured] + ["prose-qa-2048-3"],
    }
    (tmp_path / "run.json").write_text(json.dumps(described))
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--recount"])
    assert report.main() == 0
    header = (tmp_path / "summary.csv").read_text().splitlines()[0]
    assert header == "method,mode,share,kind,task,n,score,full_score,lo,hi"
    text = (tmp_path / "report.md").read_text()
    assert "| no_weights | +0.500 [+0.500, +0.500] |" in text  # of the ablations
    assert "| x | index | 1 | all | E: why |" in text
    assert "| dynsplit | 1.000 | 1.000 |" in text  # by kind
    assert "| *cases* | 2 |" in text  # the third was of another run, the fourth is missing


def test_no_case_begins_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    clock = workers._Clock(10.0)
    assert clock.has_time()
    clock.note(4.0)
    now[0] = 105.0
    assert clock.has_time()
    now[0] = 106.5
    assert not clock.has_time()
    assert clock.left() == pytest.approx(3.5 + workers._GRACE_SECONDS)
    assert workers._Clock(0).has_time() and workers._Clock(0).left() is None
