# SPDX-License-Identifier: Apache-2.0
"""Shipped data against the rules it was made by: samples, calibration golden, profiles."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from calibrate_reference import Options, calibrate, mean_scores, spread, weight
from captures import CaptureFile
from delimiters import DelimiterClass, classify, escape

_ROOT = Path(__file__).resolve().parents[2]
_DATA = _ROOT / "tests/data"
_PROFILES = sorted((_ROOT / "server/pipeline/profiles").glob("*.csv"))


@pytest.mark.parametrize("kind", ["prose", "code", "dialogue"])
def test_samples_have_the_documented_shapes(kind: str) -> None:
    capture = CaptureFile(_DATA / f"sample/{kind}.safetensors")
    model, tokens = capture.model, len(capture.token_ids)
    assert capture.text["kind"] == kind
    assert tokens % 16 and tokens % 20
    assert capture.token_ids.min() >= 0 and capture.token_ids.max() < model["vocab_size"]
    np.testing.assert_array_equal(capture.query_positions, np.arange(tokens - 64, tokens))
    for slot in range(len(capture.layer_ids)):
        layer = capture.layer(slot)
        assert layer.key.shape == (tokens, model["num_kv_heads"], model["head_dim"])
        assert layer.value.shape == layer.key.shape
        assert layer.query.shape == (64, model["num_query_heads"], model["head_dim"])
        for tensor in (layer.key, layer.value, layer.query):
            assert np.isfinite(tensor).all()


def test_calibration_golden_is_reproduced() -> None:
    golden = json.loads((_DATA / "golden/calibration_prose.json").read_text())
    options = Options(**golden["options"])
    capture = CaptureFile(_DATA / "golden" / golden["input"])
    items = calibrate([capture], golden["candidates"], options)
    assert [item.position for item in items] == [o["position"] for o in golden["occurrences"]]
    for item, recorded in zip(items, golden["occurrences"], strict=True):
        assert item.token_id == recorded["token_id"]
        assert (item.drop == 0.0) == (item.position < options.overlap_size)
        assert item.drop + item.overlap + item.own == pytest.approx(1.0, abs=1e-12)
        for mass in ("drop", "overlap", "own"):
            assert getattr(item, mass) == pytest.approx(recorded[mass], abs=1e-9)
    scores = mean_scores(items, options)
    for row in golden["weights"]:
        assert weight(scores[row["token_id"]][0]) == pytest.approx(row["weight"], abs=1e-9)


def test_spread_is_even_and_capped() -> None:
    items = list(range(10))
    assert spread(items, 4) == [0, 2, 5, 7]
    assert spread(items, 10) == items


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (".", DelimiterClass.SENTENCE),
        ('."', DelimiterClass.SENTENCE),
        (" ...", DelimiterClass.SENTENCE),
        ("?),", DelimiterClass.COMMA),
        ("):", DelimiterClass.COLON),
        (");", DelimiterClass.SEMICOLON),
        ("()", DelimiterClass.CLOSER),
        ('"', DelimiterClass.CLOSER),
        ("\n    ", DelimiterClass.LINE),
        ("\r\n", DelimiterClass.LINE),
        ("\n\n", DelimiterClass.PARAGRAPH),
        (' "', None),
        ("(", None),
        ('("', None),
        ("    ", None),
        (".py", None),
        ("--", None),
    ],
)
def test_classes(text: str, expected: DelimiterClass | None) -> None:
    assert classify(text) is expected


def test_escape_is_plain_ascii() -> None:
    assert escape('a,"\\\n\r\t…'.encode()) == r"a\x2c\x22\\\n\r\t\xe2\x80\xa6"


@pytest.mark.parametrize("path", _PROFILES, ids=lambda path: path.stem)
def test_profiles_are_well_formed(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="ascii").splitlines() if line[0] != "#"]
    rows = list(csv.DictReader(lines, quoting=csv.QUOTE_NONE))
    ids = [int(row["token_id"]) for row in rows]
    assert ids == sorted(set(ids))
    for row in rows:
        assert set(row) == {"token_id", "text_escaped", "weight", "occurrences", "sentence_end"}
        assert 0.0 <= float(row["weight"]) <= 1.0
        assert row["sentence_end"] in ("0", "1")
        assert row["occurrences"] == "" or int(row["occurrences"]) >= 0
