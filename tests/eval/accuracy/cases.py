# SPDX-License-Identifier: Apache-2.0
"""Cases: a prompt, what must follow, and how that is scored. Equal arguments give equal cases.

The question stands at the prompt's end, as where a service compresses between prefill and decode.
The prompt's last token is not compressed: it is the first input of the continuation, so that every
token of the answer is predicted over the compressed cache.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

KINDS = ("prose", "code", "dialogue", "logs")  # of texts
# Tasks that are right or wrong; "kl" and "nll" come from the true continuations of "text" cases.
ACCURACY_TASKS = ("passkey", "multikey", "variables", "qa", "line")
CONTINUATION = 32  # tokens of "text"
Texts = Sequence[Sequence[int]]  # token ids of texts; a passage lies in one of them
_LINE_KINDS = ("code", "logs")
_WORDS = ("copper", "willow", "lantern", "harbor", "meadow", "falcon", "pepper", "marble", "cactus",
          "violin", "ribbon", "anchor", "tunnel", "saddle", "pigeon", "walnut")  # fmt: skip
_NAMES = ("Mary", "Peter", "Alice", "Robert", "Helen", "Victor", "Laura", "Oscar")
_FAMILIES = ("Thornton", "Baker", "Mason", "Fletcher", "Harper", "Sawyer", "Turner", "Cooper")
_CITIES = ("Paris", "London", "Rome", "Berlin", "Madrid", "Boston", "Tokyo", "Vienna", "Dublin")


class Tokenizer(Protocol):
    """What the builders need of one."""

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of a token."""
        ...


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt.

    Attributes:
        name: unique.
        kind: of text.
        task: one of ACCURACY_TASKS, or "text".
        prompt: token ids; all but the last are compressed.
        answer: token ids that must follow.
        exact: right is every token right; otherwise the share of right tokens counts.
        depth: place of what is asked for, in [0, 1].
    """

    name: str
    kind: str
    task: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    exact: bool
    depth: float


@dataclasses.dataclass(frozen=True)
class _Draft:
    facts: list[tuple[float, str]]  # (depth, sentence)
    question: str
    answer: str
    depth: float


def _number(rng: random.Random) -> str:
    return str(rng.randint(10000, 99999))


def _passkey(rng: random.Random, depth: float) -> _Draft:
    key = _number(rng)
    fact = f"The pass key is {key}. Remember it. {key} is the pass key."
    return _Draft([(depth, fact)], "The pass key is", f" {key}", depth)


def _multikey(rng: random.Random, depth: float) -> _Draft:
    words = rng.sample(_WORDS, 4)
    places = [depth, *(rng.uniform(0.05, 0.95) for _ in words[1:])]
    numbers = [_number(rng) for _ in words]
    facts = [
        (place, f"The special number for {word} is {number}.")
        for place, word, number in zip(places, words, numbers, strict=True)
    ]
    question = f"What is the special number for {words[0]}? The special number for {words[0]} is"
    return _Draft(facts, question, f" {numbers[0]}", depth)


def _variables(rng: random.Random, depth: float) -> _Draft:
    first, second, other = rng.sample(_WORDS, 3)
    value, wrong = _number(rng), _number(rng)
    later = depth + rng.uniform(0.1, 0.9) * (0.98 - depth)
    facts = [
        (depth, f"VAR {first} = {value}"),
        (later, f"VAR {second} = VAR {first}"),
        (rng.uniform(0.05, 0.95), f"VAR {other} = {wrong}"),
    ]
    question = f"VAR {second} = VAR {first} ="
    return _Draft(facts, question, f" {value}", depth)


def _qa(rng: random.Random, depth: float) -> _Draft:
    names, families = rng.sample(_NAMES, 3), rng.sample(_FAMILIES, 3)
    people = [f"{name} {family}" for name, family in zip(names, families, strict=True)]
    cities = rng.sample(_CITIES, 3)
    places = [depth, rng.uniform(0.05, 0.95), rng.uniform(0.05, 0.95)]
    facts = [
        (place, f"{person} lives in {city}.")
        for place, person, city in zip(places, people, cities, strict=True)
    ]
    question = f"Question: Where does {people[0]} live?\nAnswer: {people[0]} lives in"
    return _Draft(facts, question, f" {cities[0]}", depth)


_DRAFTS: dict[str, Callable[[random.Random, float], _Draft]] = {
    "passkey": _passkey,
    "multikey": _multikey,
    "variables": _variables,
    "qa": _qa,
}


def tasks_of(kind: str) -> tuple[str, ...]:
    """Tasks that a kind of text has."""
    line = ("line",) if kind in _LINE_KINDS else ()
    return (*_DRAFTS, *line, "text")


def _insert(ids: list[int], facts: list[tuple[float, str]], tokenizer: Tokenizer) -> list[int]:
    """The text with each fact as a paragraph behind the next end of a line or sentence."""
    ends = [i + 1 for i, t in enumerate(ids) if tokenizer.token_bytes(t).endswith((b"\n", b"."))]
    places = []
    for depth, fact in facts:
        wanted = int(depth * len(ids))
        places.append((min((e for e in ends if e >= wanted), default=len(ids)), fact))
    result, begin = [], 0
    for place, fact in sorted(places):
        result += ids[begin:place] + tokenizer.encode(f"\n\n{fact}\n\n")
        begin = place
    return result + ids[begin:]


def _passage(texts: Texts, length: int, rng: random.Random) -> list[int]:
    """Of one text; every begin in every text is equally likely."""
    begins = [max(0, len(ids) - length) for ids in texts]
    if not any(begins):
        longest = max(map(len, texts), default=0)
        raise ValueError(f"the longest text has {longest} tokens; cases need more than {length}")
    begin = rng.randrange(sum(begins))
    for ids, room in zip(texts, begins, strict=True):
        if begin < room:
            return list(ids[begin : begin + length])
        begin -= room
    raise AssertionError("begin lies in no text")


def _fact_case(
    task: str, texts: Texts, length: int, depth: float, rng: random.Random, tokenizer: Tokenizer
) -> tuple[list[int], list[int], bool, float]:
    draft = _DRAFTS[task](rng, depth)
    question = tokenizer.encode(f"\n\n{draft.question}")
    room = length - len(question) - sum(len(tokenizer.encode(f)) + 4 for _, f in draft.facts)
    passage = _insert(_passage(texts, room, rng), draft.facts, tokenizer)
    return passage + question, tokenizer.encode(draft.answer), True, draft.depth


def _text_case(
    texts: Texts, length: int, rng: random.Random
) -> tuple[list[int], list[int], bool, float]:
    passage = _passage(texts, length + CONTINUATION, rng)
    return passage[:length], passage[length:], False, 1.0


def _line_case(
    texts: Texts, length: int, rng: random.Random, tokenizer: Tokenizer
) -> tuple[list[int], list[int], bool, float]:
    """The rest of a line of at least eight tokens, of which the prompt has the first three."""
    for _ in range(1000):
        passage = _passage(texts, length + 2 * CONTINUATION, rng)
        ends = [i for i, t in enumerate(passage) if b"\n" in tokenizer.token_bytes(t)]
        begin = next((e + 1 for e in ends if e + 4 >= length), None)
        if begin is None:
            continue
        end = next((e for e in ends if e > begin), len(passage))
        if 8 <= end - begin <= CONTINUATION:
            return passage[: begin + 3], passage[begin + 3 : end], False, 1.0
    raise ValueError("the text has no line to complete")


def build(
    kind: str, texts: Texts, length: int, count: int, seed: str, tokenizer: Tokenizer
) -> list[Case]:
    """`count` cases of every task of a kind, about `length` tokens each, depths spread evenly."""
    cases = []
    for task in tasks_of(kind):
        for number in range(count):
            name = f"{kind}-{task}-{length}-{number}"
            rng = random.Random(zlib.crc32(f"{seed}/{name}".encode()))
            depth = 0.05 + 0.85 * ((number * 0.618034) % 1.0)
            if task == "text":
                parts = _text_case(texts, length, rng)
            elif task == "line":
                parts = _line_case(texts, length, rng, tokenizer)
            else:
                parts = _fact_case(task, texts, length, depth, rng, tokenizer)
            prompt, answer, exact, place = parts
            cases.append(Case(name, kind, task, tuple(prompt), tuple(answer), exact, place))
    return cases
