"""Anything at all that a peer may send is either of the protocol, or costs its sender its place with one line.

Before it is admitted as well as after. A commit's tests take the same examples each time; with --slow there are many
more, other ones each time, and hypothesis prints how to repeat one that fails.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from members import COHORT, UNSEEN, Faulty, Member, Pool, Values, assert_whole

from multi_process.fedlab_adapter import MessageCode
from multi_process.messages import Message, from_line, from_package
from multi_process.transport import control
from multi_process.transport.control import PROTOCOL_VERSION, ControlConnection, ProtocolError
from multi_process.transport.handshake import Hello, JoinRequest, RefusedError, receive_request

KINDS = (
    "Join",
    "Ready",
    "GroupTrained",
    "GroupScored",
    "PartialSum",
    "Failed",
    "Configure",
    "AssignGroups",
    "RequestPartialSum",
)
"""What the fuzzed member may say; the last ones are the server's own words."""
DTYPES = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float32, torch.float64, torch.bfloat16)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TENSORS = st.builds(
    lambda dtype, shape, value: torch.full(shape, value, dtype=torch.int64).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(-(2**63), 2**63 - 1),
)


def fuzz(strategy: st.SearchStrategy[Any], body: Callable[[Any], None], num_examples: int) -> None:
    """Try the body with so many examples: always the same few, or other ones each time."""
    is_few = num_examples <= 200
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    tried = settings(
        max_examples=num_examples,
        derandomize=is_few,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=checks,
    )(given(strategy)(body))
    tried()


def outcome(listen: Callable[[], Any]) -> Any:
    """What was heard, or the error for which its sender is dropped."""
    try:
        return listen()
    except ValueError as error:
        return error


few_and_many = pytest.mark.parametrize("num_examples", [150, pytest.param(1500, marks=pytest.mark.slow)])


@few_and_many
def test_any_line_is_a_word_or_is_refused(num_examples: int) -> None:
    lines = st.fixed_dictionaries({}, optional={"control": st.sampled_from(KINDS) | JSON, "values": JSON, "more": JSON})

    def body(fields: dict[str, Any]) -> None:
        heard = outcome(lambda: from_line(fields))
        assert isinstance(heard, Message) or str(heard).isprintable()

    fuzz(lines, body, num_examples)


@few_and_many
def test_any_package_is_a_message_or_is_refused(num_examples: int) -> None:
    """Bytes of any kind in place of its header, headers of any content, tensors of any type and shape."""
    shapes = st.lists(st.integers(-2, 5) | st.integers(), max_size=3) | JSON
    placeholders = st.fixed_dictionaries({"$tensor": st.tuples(st.sampled_from(["int64", "float32"]) | JSON, shapes)})
    headers = st.fixed_dictionaries(
        {},
        optional={
            "kind": st.sampled_from(KINDS) | JSON,
            "values": JSON | st.dictionaries(st.text(max_size=8), JSON | placeholders, max_size=3),
        },
    )
    parts = headers.map(lambda header: torch.tensor(list(json.dumps(header).encode()), dtype=torch.int8)) | TENSORS
    packages = st.tuples(st.sampled_from(list(MessageCode)), st.none() | st.lists(parts, max_size=4))

    def body(package: tuple[MessageCode, list[torch.Tensor] | None]) -> None:
        heard = outcome(lambda: from_package(*package))
        assert isinstance(heard, Message) or str(heard).isprintable()

    fuzz(packages, body, num_examples)


def test_a_tensor_without_a_size_is_no_body() -> None:
    header = json.dumps({"kind": "Ready", "values": {"": {"$tensor": ["int64", []]}}})
    with pytest.raises(ValueError, match="is not a message"):
        from_package(MessageCode.SetUp, [torch.tensor(list(header.encode()), dtype=torch.int8), torch.tensor(0)])


def test_a_header_of_thousands_of_brackets_is_refused() -> None:
    """Python's parser gives up on it with an error of its own."""
    header = torch.tensor(list(b"[" * 100_000), dtype=torch.int8)
    with pytest.raises(ValueError, match="is not a message"):
        from_package(MessageCode.SetUp, [header, header[:0]])


class Stranger:
    """In place of a control connection: the line that somebody sends after the server's hello."""

    def __init__(self, line: bytes) -> None:
        self._line = line

    def send(self, **fields: Any) -> None:
        pass

    def receive_handshake(self, timeout_seconds: float) -> dict[str, Any]:
        return control._parse_line(self._line)


@few_and_many
@pytest.mark.parametrize("token", [None, b"a secret of 16 or more"], ids=["open", "token"])
def test_anybody_may_say_anything_to_the_port(token: bytes | None, num_examples: int) -> None:
    """A worker is taken in, refused, or dropped as none of ours; no other error may end the thread that serves it."""
    honest = {"protocol": PROTOCOL_VERSION, "nonce": "", "rank": 1, "gpu": "", "proof": ""}
    fields = st.fixed_dictionaries(
        {}, optional={**{name: st.just(value) | JSON for name, value in honest.items()}, "more": JSON}
    )
    hello = Hello("nonce", token is not None, 3, "gloo", 1.0, 30.0)
    lines = st.binary(max_size=50) | (fields | JSON).map(lambda said: json.dumps(said).encode())

    def body(line: bytes) -> None:
        stranger = cast(ControlConnection, Stranger(line))
        heard = outcome(lambda: receive_request(stranger, token, hello))
        if isinstance(heard, JoinRequest):
            assert token is None, "nobody is taken in who cannot prove that it knows the token"
        else:
            assert type(heard) in (ProtocolError, RefusedError)

    fuzz(lines, body, num_examples)


def objects_in(value: Any) -> list[dict[str, Any]]:
    """The value and all that it holds, as far as they are objects."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ([value] if isinstance(value, dict) else []) + [found for entry in inner for found in objects_in(entry)]


def same(one: Any, other: torch.Tensor) -> bool:
    return isinstance(one, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)


@st.composite
def changes(draw: st.DrawFn) -> Callable[[str, Values], tuple[str, Values]]:
    """What a member says in place of what it should: other fields, fewer, more, or something else altogether."""
    kind = draw(st.none() | st.sampled_from(KINDS))
    other = draw(st.dictionaries(st.text(max_size=8), JSON, max_size=3))
    steps = draw(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from("sda"), JSON | TENSORS), min_size=1)
    )

    def change(honest_kind: str, honest: Values) -> tuple[str, Values]:
        if kind is not None:
            return kind, other
        values = copy.deepcopy(honest)
        for place, key, action, value in steps:
            objects = objects_in(values)
            chosen = objects[place % len(objects)]
            names = sorted(chosen)
            if isinstance(value, torch.Tensor) and (chosen is not values or honest_kind != "PartialSum"):
                value = None
            if action == "a":
                chosen["more"] = value
            elif names and action == "s":
                chosen[names[key % len(names)]] = value
            elif names:
                del chosen[names[key % len(names)]]
        return honest_kind, values

    return change


@few_and_many
def test_a_member_may_say_anything_at_any_time(num_examples: int) -> None:
    """The pool never raises, the run goes on without it, and nothing that it said wrong is in the result."""

    def body(example: tuple[int, Callable[[str, Values], tuple[str, Values]]]) -> None:
        turn, change = example
        said: list[str] = []
        changed_totals: list[bool] = []

        def tamper(kind: str, values: Values) -> tuple[str, Values]:
            said.append(kind)
            if len(said) != turn:
                return kind, values
            new_kind, new_values = change(kind, values)
            total = new_values.get("total")
            changed_totals.append(kind == "PartialSum" and total is not None and not same(total, values["total"]))
            return new_kind, new_values

        honest, fuzzed = Member(1), Faulty(tamper)
        pool = Pool([honest])
        with pytest.MonkeyPatch.context() as patched:
            pool.start(patched)
            pool.admit(fuzzed)
            update = pool.train()
            scores = pool.score(num_curve_epochs=1)
        assert honest.told is None
        if fuzzed.told is not None or not any(changed_totals):
            assert_whole(update)  # a total that is possible is a lie that nobody can know
        assert sorted(report.client_id for report in update.reports) == list(COHORT)
        assert sorted(score.client_id for score in scores) == list(UNSEEN)
        assert all(0 <= score.personalized["accuracy"] <= 1 for score in scores)
        lines = [line for line in pool.said if "lost worker" in line or "could not join" in line]
        assert len(lines) == (fuzzed.told is not None)
        assert all(line.isprintable() for line in pool.said)

    fuzz(st.tuples(st.integers(1, 7), changes()), body, num_examples)
