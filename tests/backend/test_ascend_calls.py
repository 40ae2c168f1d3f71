"""Our calls of torch_npu against a table of its signatures, and the table against a wheel where there is one."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_telechat.backend.kernels import ascend
from tests.backend.torch_npu_signatures import DOCUMENTED, REGISTERED, SIGNATURES, VERSION, signature
from tests.backend.torch_npu_wheel import VARIABLE, Wheel

WHEEL = Wheel.at_hand()
needs_wheel = pytest.mark.skipif(WHEEL is None, reason=f"no torch_npu: {VARIABLE} may name a wheel (docs/ascend.md)")


class Call(NamedTuple):
    place: str
    name: str
    positional: int
    keywords: tuple[str, ...]


def calls_in(source: str, place: str) -> Iterator[Call]:
    """Calls of functions of the module torch_npu."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch_npu."):
            assert not any(isinstance(argument, ast.Starred) for argument in node.args)
            keywords = tuple(str(keyword.arg) for keyword in node.keywords)
            yield Call(f"{place}:{node.lineno}", ast.unparse(node.func)[10:], len(node.args), keywords)


def our_calls() -> list[Call]:
    files = sorted(Path(ascend.__path__[0]).glob("*.py"))
    return [call for file in files for call in calls_in(file.read_text(encoding="utf-8"), file.name)]


def require(call: Call, known: inspect.Signature) -> None:
    """Raises TypeError where a function of this signature would."""
    known.bind(*range(call.positional), **dict.fromkeys(call.keywords))


def test_our_calls_fit_the_table():
    calls = our_calls()
    assert {call.name for call in calls} == set(SIGNATURES) - {"npu_grouped_matmul_add"}, "its documentation is shared"
    for call in calls:
        require(call, SIGNATURES[call.name])


@pytest.mark.parametrize(
    "source, error",
    [
        ("torch_npu.npu_swiglu(x, axis=-1)", "axis"),
        ("torch_npu.npu_rms_norm(x)", "gamma"),
        ("torch_npu.npu_grouped_matmul(x, w, None)", "too many"),
    ],
)
def test_a_wrong_call_is_found(source, error):
    (call,) = calls_in(source, "here")
    with pytest.raises(TypeError, match=error):
        require(call, SIGNATURES[call.name])


def test_what_is_not_documented_shares_the_documented_parameters():
    """``npu_grouped_matmul_add_`` takes what ``npu_grouped_matmul_add`` does, says the documentation of the second."""
    documented, registered = (
        [(p.kind, p.default) for p in table[name].parameters.values()]
        for table, name in ((DOCUMENTED, "npu_grouped_matmul_add"), (REGISTERED, "npu_grouped_matmul_add_"))
    )
    assert documented == registered


@needs_wheel
def test_our_calls_fit_the_wheel():
    assert WHEEL is not None
    for call in our_calls():
        known = WHEEL.documented(call.name) if call.name in DOCUMENTED else WHEEL.registered(call.name)
        require(call, known)


@needs_wheel
@pytest.mark.parametrize("name", SIGNATURES)
def test_the_table_is_what_the_wheel_says(name):
    assert WHEEL is not None
    if WHEEL.version != VERSION:
        pytest.skip(f"the table is of torch_npu {VERSION}, this is {WHEEL.version}")
    found = WHEEL.documented(name) if name in DOCUMENTED else WHEEL.registered(name)
    assert found == SIGNATURES[name]


def test_documentation_and_registrations_are_read(tmp_path):
    """The reader of a wheel, on a small one."""
    package = tmp_path / "torch_npu"
    (package / "op_plugin" / "meta").mkdir(parents=True)
    (package / "version.py").write_text("__version__ = '9.8.7+git'\n")
    (package / "_op_plugin_docs.py").write_text(
        'text = """\ntorch_npu.npu_one(Tensor self, Tensor? gamma, float eps=1e-06, int[]? sizes=None, *, '
        'str mode="half") -> (Tensor, Tensor)\n"""\n'
    )
    (package / "op_plugin" / "meta" / "_meta_registrations.py").write_text(
        '@impl(m, "npu_two.out")\n@impl(m, "npu_two")\ndef meta(y, x, *, dim=-1):\n    pass\n'
    )
    wheel = Wheel(tmp_path)
    assert wheel.version == "9.8.7"
    assert wheel.documented("npu_one") == signature("self, gamma=None, eps=1e-06, sizes=None, *, mode='half'")
    assert wheel.registered("npu_two") == signature("y, x, *, dim=-1")
    with pytest.raises(AssertionError, match="npu_three is not documented"):
        wheel.documented("npu_three")
