# SPDX-License-Identifier: Apache-2.0
"""Reference for delimiter calibration (arXiv 2602.03184, section 3, Algorithm 1), in plain numpy.

For an occurrence i of a delimiter, with W future queries q in {i+1 .. i+W} (clipped to the last
token) and R retained keys, each query's attention splits into three masses that sum to 1:

    drop     keys 0 .. i-R        (none when i < R)
    overlap  keys max(0, i-R+1) .. i
    own      keys i+1 .. q

averaged over layers, query heads and queries; score s_i = overlap - alpha * drop. The paper leaves
open how scores become weights. Here: S_b = mean of s_i over the sampled occurrences of token type
b, w_b = clamp((S_b + 1) / 2, 0, 1). A type needs `min_occurrences`; of more than `max_occurrences`
(n in all, m kept) those of rank floor(j * n / m), j = 0..m-1, are sampled. An occurrence counts
when it has a future query and all its query rows are captured.

Commands: `golden` writes the expected masses of one small capture. `profile` measures long captures
and writes a delimiter profile; it leaves out occurrences before position R, which have nothing to
drop and would score high for that alone. `transfer` writes the paper's own weights (Table 7) for
the same tokens, by character. The last two need the `dynsplit` package for the vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from captures import CaptureFile, LayerTensors
from delimiters import DelimiterClass, classify, ends_sentence, escape

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Options:
    """Parameters of the calibration; token counts."""

    num_future_queries: int = 8  # W
    overlap_size: int = 128  # R
    alpha: float = 1.0
    min_occurrences: int = 4
    max_occurrences: int = 64


@dataclasses.dataclass
class Occurrence:
    """One sampled delimiter, with its masses averaged over layers, heads and queries."""

    capture: int  # index of the capture it lies in
    position: int
    token_id: int
    drop: float = 0.0
    overlap: float = 0.0
    own: float = 0.0

    def score(self, alpha: float) -> float:
        """s_i, in [-alpha, 1]."""
        return self.overlap - alpha * self.drop


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` items, evenly spread over the sequence."""
    if len(items) <= limit:
        return list(items)
    return [items[j * len(items) // limit] for j in range(limit)]


def sample(
    captures: Sequence[CaptureFile],
    candidates: Iterable[int],
    options: Options,
    first_position: int = 0,
) -> list[Occurrence]:
    """The occurrences to measure, from `first_position` on, by capture and position.

    Types seen fewer than `min_occurrences` times are sampled too: their classes need them.
    """
    wanted = set(candidates)
    by_type: dict[int, list[Occurrence]] = defaultdict(list)
    for index, capture in enumerate(captures):
        captured = set(capture.query_positions.tolist())
        num_tokens = len(capture.token_ids)
        for position, token in enumerate(capture.token_ids.tolist()):
            future = range(position + 1, min(position + 1 + options.num_future_queries, num_tokens))
            if position < first_position or token not in wanted or not future:
                continue
            if captured.issuperset(future):
                by_type[token].append(Occurrence(index, position, token))
    chosen = [item for items in by_type.values() for item in spread(items, options.max_occurrences)]
    return sorted(chosen, key=lambda item: (item.capture, item.position))


def attention_rows(
    queries: npt.NDArray[np.float32], keys: npt.NDArray[np.float32], positions: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Causal softmax attention of some query rows, in fp64.

    Args:
        queries: [N, Hq, D].
        keys: [T, Hkv, D], T > every position.
        positions: position of each query row.

    Returns:
        [Hq, N, T]; zero behind each row's own position.
    """
    num_tokens, kv_heads, dim = keys.shape
    group = queries.shape[1] // kv_heads
    grouped = queries.reshape(len(queries), kv_heads, group, dim).astype(np.float64)
    logits = np.einsum("nhgd,thd->hgnt", grouped, keys.astype(np.float64), optimize=True)
    logits /= np.sqrt(dim)
    hidden = np.arange(num_tokens)[None, :] > np.asarray(positions)[:, None]
    logits[..., hidden] = -np.inf
    weights: npt.NDArray[np.float64] = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights.reshape(kv_heads * group, len(queries), num_tokens)


def measure(
    item: Occurrence, layer: LayerTensors, query_positions: Sequence[int], options: Options
) -> tuple[float, float, float]:
    """Mean (drop, overlap, own) of one occurrence in one layer."""
    row_of = {position: row for row, position in enumerate(query_positions)}
    end = min(item.position + 1 + options.num_future_queries, len(layer.key))
    future = list(range(item.position + 1, end))
    rows = [row_of[position] for position in future]
    weights = attention_rows(layer.query[rows], layer.key[:end], future)
    kept = max(0, item.position - options.overlap_size + 1)
    drop = weights[..., :kept].sum(axis=-1).mean()
    overlap = weights[..., kept : item.position + 1].sum(axis=-1).mean()
    own = weights[..., item.position + 1 :].sum(axis=-1).mean()
    return float(drop), float(overlap), float(own)


def calibrate(
    captures: Sequence[CaptureFile],
    candidates: Iterable[int],
    options: Options,
    first_position: int = 0,
) -> list[Occurrence]:
    """Samples and measures; masses are means over every captured layer."""
    items = sample(captures, candidates, options, first_position)
    for index, capture in enumerate(captures):
        mine = [item for item in items if item.capture == index]
        positions = capture.query_positions.tolist()
        share = 1.0 / len(capture.layer_ids)
        for slot in range(len(capture.layer_ids)):
            layer = capture.layer(slot)
            for item in mine:
                drop, overlap, own = measure(item, layer, positions, options)
                item.drop += drop * share
                item.overlap += overlap * share
                item.own += own * share
            print(f"\r{capture.text['kind']}: layer {slot + 1}", end="", file=sys.stderr)
        print(f" of {len(capture.layer_ids)}, {len(mine)} occurrences", file=sys.stderr)
    return items


def weight(score: float) -> float:
    """The unrounded weight of a mean score."""
    return min(max((score + 1.0) / 2.0, 0.0), 1.0)


def mean_scores(items: Iterable[Occurrence], options: Options) -> dict[int, tuple[float, int]]:
    """(S_b, number of sampled occurrences) of every sampled token type."""
    scores: dict[int, list[float]] = defaultdict(list)
    for item in items:
        scores[item.token_id].append(item.score(options.alpha))
    return {token: (float(np.mean(found)), len(found)) for token, found in scores.items()}


def delimiter_tokens() -> dict[int, tuple[bytes, DelimiterClass]]:
    """Every delimiter of the SmolLM2 vocabulary: id -> (bytes, class)."""
    from dynsplit.capture import sources
    from dynsplit.capture.tokenizer import GgufTokenizer
    from gguf import GGUFReader

    tokenizer = GgufTokenizer(GGUFReader(sources.model_file(sources.cache_dir())))
    found: dict[int, tuple[bytes, DelimiterClass]] = {}
    for token in filter(tokenizer.is_normal, range(tokenizer.vocab_size)):
        raw = tokenizer.token_bytes(token)
        try:
            kind = classify(raw.decode())
        except UnicodeDecodeError:
            continue
        if kind is not None:
            found[token] = (raw, kind)
    return found


def class_scores(
    items: Sequence[Occurrence],
    tokens: Mapping[int, tuple[bytes, DelimiterClass]],
    options: Options,
) -> dict[DelimiterClass, tuple[float, int]]:
    """(mean score, occurrences behind it) of each class, over all its sampled occurrences.

    A class with fewer than `min_occurrences` takes the score of the next class that has enough (the
    last ones: of the one before).
    """
    pooled: dict[DelimiterClass, list[float]] = {kind: [] for kind in DelimiterClass}
    for item in items:
        pooled[tokens[item.token_id][1]].append(item.score(options.alpha))
    order = list(DelimiterClass)
    enough = [len(pooled[kind]) >= options.min_occurrences for kind in order]
    if not any(enough):
        raise SystemExit("error: no class of delimiters occurs often enough in these captures")
    scores: dict[DelimiterClass, tuple[float, int]] = {}
    for rank, kind in enumerate(order):
        nearest = [*range(rank, len(order)), *range(rank - 1, -1, -1)]
        source = next(order[other] for other in nearest if enough[other])
        scores[kind] = (float(np.mean(pooled[source])), len(pooled[kind]))
    return scores


def decimals_for(weights: Iterable[float]) -> int:
    """One decimal, or two when the weights lie too close together for one."""
    values = list(weights)
    return 1 if max(values) - min(values) >= 0.5 else 2


def write_csv(
    path: Path,
    comments: Iterable[str],
    tokens: Mapping[int, tuple[bytes, DelimiterClass]],
    weight_of: Mapping[int, str],
    occurrences_of: Mapping[int, int],
) -> None:
    """Writes one profile; every token of `tokens` is a row, ascending."""
    lines = ["# SPDX-License-Identifier: Apache-2.0", *(f"# {comment}" for comment in comments)]
    lines += [
        r"# text_escaped: \n \r \t \\, and \xHH for comma, quotation mark and bytes outside ASCII",
        "token_id,text_escaped,weight,occurrences,sentence_end",
    ]
    lines += [
        f"{token},{escape(raw)},{weight_of[token]},{occurrences_of.get(token, '')},"
        f"{int(ends_sentence(kind))}"
        for token, (raw, kind) in sorted(tokens.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_profile(path: Path, capture_paths: Sequence[Path], options: Options) -> None:
    """Measures long captures and writes the profile that the service compiles in."""
    captures = [CaptureFile(capture) for capture in capture_paths]
    tokens = delimiter_tokens()
    items = calibrate(captures, tokens, options, first_position=options.overlap_size)
    by_type, by_class = mean_scores(items, options), class_scores(items, tokens, options)
    measured = {t: s for t, (s, n) in by_type.items() if n >= options.min_occurrences}
    weights = {t: weight(measured.get(t, by_class[kind][0])) for t, (_, kind) in tokens.items()}
    digits = decimals_for(weights[token] for token in measured)
    lowest, highest = (bound(weights[token] for token in measured) for bound in (min, max))
    model = captures[0].model
    comments = [
        f"Delimiter profile of the SmolLM2 tokenizer ({model['vocab_size']} tokens), measured by "
        "tests/judges/calibrate_reference.py.",
        f"model: {model['name']}, {model['weights']}; {len(captures[0].layer_ids)} layers, "
        f"{model['num_query_heads']} query heads",
        *(f"text: {c.text['title']}, {len(c.token_ids)} tokens" for c in captures),
        f"W = {options.num_future_queries}, R = {options.overlap_size}, alpha = {options.alpha:g}; "
        f"{options.min_occurrences} to {options.max_occurrences} occurrences a type, none before "
        "position R",
        f"weight = clamp((S + 1) / 2, 0, 1), {digits} decimals; measured types span "
        f"{lowest:.{digits}f} to {highest:.{digits}f}",
        "occurrences 0: type seen too rarely, weight of its class:",
    ]
    comments += [
        f"  {kind.value}: S = {score:+.4f} over {count} occurrences"
        for kind, (score, count) in by_class.items()
    ]
    rows = {token: f"{value:.{digits}f}" for token, value in weights.items()}
    counts = {token: by_type[token][1] if token in measured else 0 for token in tokens}
    write_csv(path, comments, tokens, rows, counts)
    for token, score in sorted(measured.items(), key=lambda pair: -pair[1]):
        text = escape(tokens[token][0])
        print(f"{token:6d} {text:36s} n={counts[token]:3d} S={score:+.4f} w={weights[token]:.4f}")


def table7_weight(text: str, kind: DelimiterClass) -> float:
    """Weight of a delimiter by the paper's Table 7, keyed by character instead of token id.

    A merged token has the weight of its class; newlines, which the table lacks, are placed by us:
    1.0 for a paragraph, 0.8 for a line.
    """
    if kind is DelimiterClass.SENTENCE:
        return 0.9 if "?" in text and "." not in text and "!" not in text else 1.0
    if kind is DelimiterClass.CLOSER:
        return max({"”": 0.9, ")": 0.6}.get(char, 0.5) for char in text.strip())
    return {
        DelimiterClass.PARAGRAPH: 1.0,
        DelimiterClass.LINE: 0.8,
        DelimiterClass.SEMICOLON: 0.7,
        DelimiterClass.COLON: 0.7,
        DelimiterClass.COMMA: 0.6,
    }[kind]


def write_transfer(path: Path) -> None:
    """Writes Table 7's weights for the delimiters of the SmolLM2 vocabulary."""
    tokens = delimiter_tokens()
    weights = {t: f"{table7_weight(raw.decode(), kind):.1f}" for t, (raw, kind) in tokens.items()}
    comments = [
        "Delimiter profile of the SmolLM2 tokenizer: the weights that arXiv 2602.03184 (Table 7) "
        "gives for Mistral-7B-Instruct-v0.2,",
        "carried over by character; nothing here is measured on SmolLM2. Written by "
        "tests/judges/calibrate_reference.py transfer.",
        "Merged tokens have their class's weight; newlines (paragraph 1.0, line 0.8) are ours.",
    ]
    write_csv(path, comments, tokens, weights, {})


def write_golden(
    path: Path, capture_path: Path, candidates: Sequence[int], options: Options
) -> None:
    """Writes every sampled occurrence's masses and the resulting weights of one capture."""
    capture = CaptureFile(capture_path)
    items = calibrate([capture], candidates, options)
    scores = mean_scores(items, options)
    document = {
        "input": capture_path.name,
        "candidates": sorted(candidates),
        "options": dataclasses.asdict(options),
        "occurrences": [
            {
                "position": item.position,
                "token_id": item.token_id,
                "drop": item.drop,
                "overlap": item.overlap,
                "own": item.own,
                "score": item.score(options.alpha),
            }
            for item in items
        ],
        "weights": [
            {
                "token_id": token,
                "num_occurrences": count,
                "score": score,
                "weight": weight(score),
            }
            for token, (score, count) in sorted(scores.items())
            if count >= options.min_occurrences
        ],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Reference delimiter calibration.")
    commands = parser.add_subparsers(dest="command", required=True)
    golden = commands.add_parser("golden", help="expected masses of one small capture")
    golden.add_argument("capture", type=Path)
    golden.add_argument("--out", type=Path, required=True)
    golden.add_argument("--candidates", required=True, help="comma list of token ids")
    golden.add_argument("--max-occurrences", type=int, default=Options.max_occurrences)
    profile = commands.add_parser("profile", help="delimiter profile from long captures")
    profile.add_argument("captures", type=Path, nargs="+")
    profile.add_argument("--out", type=Path, required=True)
    transfer = commands.add_parser("transfer", help="Table 7's weights for the same tokens")
    transfer.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "golden":
            ids = [int(part) for part in arguments.candidates.split(",")]
            options = Options(max_occurrences=arguments.max_occurrences)
            write_golden(arguments.out, arguments.capture, ids, options)
        elif arguments.command == "profile":
            write_profile(arguments.out, arguments.captures, Options())
        else:
            write_transfer(arguments.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
