"""`python -m nkisim lint`: each rule has a kernel that breaks it, and what both sources accept is not reported."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.lint import RULES, Finding, cli, count_instructions, lint, lint_paths, main
from nkisim.lint import api as lint_api
from nkisim.lint.program import Program
from nkisim.lint.reach import kernels
from tests.nkisim import test_signatures as documented

ROOT = Path(__file__).parents[2]
SAMPLES = Path(__file__).parent / "lint_samples"
OPTIONS: dict[str, dict[str, Any]] = {"trn1": {"target": "trn1"}, "size": {"max_instructions": 100}}
HEAD = "import nki\nimport nki.isa as nisa\nimport nki.language as nl\n\n\n"

by_sample = pytest.mark.parametrize("sample", sorted(SAMPLES.glob("*.txt")), ids=lambda p: p.stem)


def marked(text: str) -> list[tuple[int, str]]:
    """Line and rule of every finding that the comments announce."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        comment = re.search(r"# ! ([\w -]+)$", line)
        if comment:
            found += [(number, rule) for rule in comment.group(1).split()]
    return sorted(found)


def written(folder: Path, files: dict[str, str]) -> Path:
    """A folder with these Python files."""
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def rules(findings: list[Finding]) -> list[str]:
    return [f.rule for f in findings]


def found_in(folder: Path, body: str, **options: Any) -> list[Finding]:
    """Findings of a file that starts with the usual imports."""
    return lint_paths([written(folder, {"kernels": HEAD + body}) / "kernels.py"], **options)


# -- rules


@by_sample
def test_each_marked_line_and_no_other_is_reported(sample: Path, tmp_path: Path) -> None:
    text = sample.read_text(encoding="utf-8")
    file = tmp_path / f"{sample.stem}_sample.py"
    file.write_text(text, encoding="utf-8")
    findings = lint_paths([file], **OPTIONS.get(sample.stem, {}))
    assert sorted((f.line, f.rule) for f in findings) == marked(text)


def test_each_rule_is_broken_by_a_sample() -> None:
    broken = {rule for path in SAMPLES.glob("*.txt") for _, rule in marked(path.read_text(encoding="utf-8"))}
    assert broken == set(RULES) - {"py-type-alias"}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the statement is new in Python 3.12")
def test_type_alias(tmp_path: Path) -> None:
    assert rules(found_in(tmp_path, "@nki.jit\ndef k(a):\n    type T = int\n    return a\n")) == ["py-type-alias"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the statement is new in Python 3.11")
def test_try_star(tmp_path: Path) -> None:
    body = "@nki.jit\ndef k(a):\n    try:\n        pass\n    except* ValueError:\n        pass\n    return a\n"
    assert rules(found_in(tmp_path, body)) == ["py-try"]


def test_a_finding_names_place_rule_severity_and_both_sources(tmp_path: Path) -> None:
    (finding,) = found_in(tmp_path, "@nki.jit\ndef k(a):\n    if a is a:\n        pass\n    return a\n")
    assert (finding.line, finding.column, finding.rule, finding.severity) == (8, 8, "py-is", "error")
    assert finding.path.endswith("kernels.py")
    assert str(finding).startswith(f"{finding.path}:8:8: py-is error is or is not; use == or !=: a is a [")
    assert "migration guide" in finding.source
    assert "KLR" in finding.source


def test_a_broken_chain_of_names_is_reported_where_it_breaks(tmp_path: Path) -> None:
    (finding,) = found_in(tmp_path, "@nki.jit\ndef k(a):\n    nl.grid.x.y(a)\n    return a\n")
    assert finding.message == "name that NKI does not have: nki.language.grid"


def test_severity_says_whether_the_sources_agree() -> None:
    for rule in RULES.values():
        assert rule.severity in ("error", "warning")
        assert rule.docs
        assert rule.klr.startswith("KLR")
        # An error is never something that the front end takes as it is.
        accepts = re.search(r": accepted", rule.klr) is not None
        assert not (accepts and rule.severity == "error"), rule.id


# -- reach


def test_helpers_are_followed_across_functions_modules_and_packages(tmp_path: Path) -> None:
    bad = "def {name}(x):\n    lambda: x\n"
    written(
        tmp_path,
        {
            "pkg/__init__": "from .inner import exported\n",
            "pkg/inner": bad.format(name="exported") + bad.format(name="unused"),
            "pkg/sub/__init__": "",
            "pkg/sub/deep": "from ..other import parent\n\n\ndef deep(x):\n    return parent(x)\n",
            "pkg/other": "from . import third\n\n\ndef parent(x):\n    return third.final(x)\n",
            "pkg/third": bad.format(name="final"),
            "kernels": HEAD
            + "import pkg\nfrom pkg.sub import deep as module\nimport pkg.other\n\n\n"
            + "def local(x):\n    return module.deep(x)\n\n\n"
            + "@nki.jit\ndef k(a):\n    pkg.exported(a)\n    return local(a)\n",
        },
    )
    findings = lint_paths([tmp_path / "kernels.py"])
    assert [(Path(f.path).name, f.line, f.rule) for f in findings] == [
        ("inner.py", 2, "py-lambda"),
        ("third.py", 2, "py-lambda"),
    ]


@pytest.mark.parametrize(
    "imports",
    [
        "import nki\nfrom nki import isa as nisa",
        "import nki as n, nki.isa as nisa\nnki = n",
        "import nkisim.nki as nki\nimport nkisim.isa as nisa",
        "from nkisim import nki, isa as nisa",
        "from backend import nki, nisa",
        "from backend import *",
        "try:\n    import nki\n    import nki.isa as nisa\nexcept ImportError:\n    nki = nisa = None",
        "try:\n    import nki, nki.isa as nisa\nexcept ImportError:\n    import fake as nki\n    import fake as nisa",
    ],
)
def test_aliases_are_resolved_through_imports(imports: str, tmp_path: Path) -> None:
    backend = (
        "import importlib\n\nNAME = 'nki' if True else 'nkisim.nki'\nnki = importlib.import_module(NAME)\n"
        "nisa = importlib.import_module('nki.isa' if NAME == 'nki' else 'nkisim.isa')\n"
    )
    kernels = imports + "\n\n\n@nki.jit\ndef k(a):\n    nisa.no_such_instruction(a)\n    return a\n"
    file = written(tmp_path, {"backend": backend, "kernels": kernels}) / "kernels.py"
    assert rules(lint_paths([file])) == ["api-name"]


@pytest.mark.parametrize(
    "made",
    [
        "@nki.jit\ndef k(a):\n    lambda: a\n",
        "@nki.jit(mode='trace')\ndef k(a):\n    lambda: a\n",
        "def k(a):\n    lambda: a\n\n\nkernel = nki.jit(k)\n",
        "def k(a):\n    lambda: a\n\n\nnki.simulate(k)(1)\n",
        "def make():\n    def h(a):\n        lambda: a\n\n    @nki.jit\n    def k(a):\n        h(a)\n\n    return k\n",
        "from nki import jit\n\n\n@jit\ndef k(a):\n    lambda: a\n",
        "class Kernels:\n    @nki.jit\n    def k(a):\n        lambda: a\n",
    ],
)
def test_kernels_are_found(made: str, tmp_path: Path) -> None:
    assert rules(found_in(tmp_path, made)) == ["py-lambda"]


def test_functions_that_are_no_kernels_are_not_read(tmp_path: Path) -> None:
    assert found_in(tmp_path, "def host(a):\n    raise ValueError(lambda: a)\n") == []


def test_a_helper_is_reported_once(tmp_path: Path) -> None:
    body = "def h(a):\n    lambda: a\n\n\n" + "".join(
        f"@nki.jit\ndef k{i}(a):\n    h(a)\n    h(1)\n\n\n" for i in range(3)
    )
    assert rules(found_in(tmp_path, body)) == ["py-lambda"]


def test_circular_imports_and_recursion_end(tmp_path: Path) -> None:
    written(
        tmp_path,
        {
            "one": "from two import *\nfrom two import second\n\n\ndef first(a, n):\n    return second(a, n)\n",
            "two": "from one import first\n\n\ndef second(a, n):\n    lambda: n\n    return first(a, n - 1)\n",
            "kernels": HEAD + "from one import first\n\n\n@nki.jit\ndef k(a):\n    return first(a, 3)\n",
        },
    )
    assert rules(lint_paths([tmp_path / "kernels.py"])) == ["py-lambda"]


def test_branches_that_a_constant_decides_are_taken_as_the_compiler_takes_them(tmp_path: Path) -> None:
    body = (
        "DEBUG = False\n\n\ndef h(t, n=0):\n    if n:\n        return t + n\n    return t\n\n\n"
        "@nki.jit\ndef k(a):\n    t = nl.zeros((4, 4), dtype=nl.float32)\n    h(t)\n"
        "    if DEBUG:\n        t + 1\n    if isinstance(t, int):\n        t + 2\n    return a\n"
    )
    assert found_in(tmp_path, body) == []
    (finding,) = found_in(tmp_path, body.replace("h(t)", "h(t, 2)"))
    assert (finding.rule, finding.line) == ("tensor-operator", HEAD.count("\n") + 6)


# -- targets


def test_versions_agree_with_what_the_simulator_refuses() -> None:
    """Called without operands, an instruction of a later generation refuses the target before anything else."""
    for name in sorted(lint_api.INSTRUCTIONS):
        function = getattr(nisa, name)
        required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]

        def kernel(function: Any = function, n: int = len(required)) -> None:
            function(*[None] * n)

        first = lint_api.FIRST_GENERATION.get(f"nki.isa.{name}", 2)
        for target, generation in (("trn1", 2), ("trn2", 3), ("trn3", 4)):
            rule = ""
            try:
                nkisim.simulate(kernel, target=target)()
            except nkisim.NkiError as error:
                rule = error.rule
            except (TypeError, AttributeError):
                pass
            assert (rule == "target") == (generation < first), f"{name} on {target}"


@pytest.mark.parametrize(("target", "n"), [("trn1", 3), ("gen3", 1), ("trn3", 0), (None, 0)])
def test_target_decides_what_is_absent(target: str | None, n: int, tmp_path: Path) -> None:
    body = (
        "@nki.jit\ndef k(a, t):\n    nisa.range_select(t, t, nl.less, nl.less, t, t)\n"
        "    nisa.dma_copy(a, a, dge_mode=nisa.dge_mode.hwdge)\n    nisa.rand2(t, 0.0, 1.0)\n"
        "    if nisa.get_nc_version() == nisa.nc_version.gen4:\n        nisa.exponential(t, t)\n    return a\n"
    )
    assert len(found_in(tmp_path, body, target=target)) == n


# -- signatures


def test_the_names_are_the_documented_ones() -> None:
    queries = {"get_nc_version", "get_nc_sub_version"}
    assert set(documented.ISA) - queries == lint_api.INSTRUCTIONS
    others = {*documented.ENUMS, *documented.ENGINES} - {"MemoryRegion"}
    others |= {"NkiInstruction", "NkiValidationError", "VirtualRegister"}
    assert lint_api.NAMES["nki.isa"] == lint_api.INSTRUCTIONS | queries | others
    methods = {name.removeprefix("NkiTensor.") for name in documented.METHODS if name.startswith("NkiTensor.")}
    fields = set(documented.TENSOR_ATTRIBUTES.split())
    assert {m for m in methods if not m.startswith("_")} | fields == lint_api.TENSOR_ATTRIBUTES


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("nisa.tensor_copy(t, t, mask=1)", "unexpected keyword argument 'mask'"),
        ("nisa.tensor_copy(t)", "missing a required argument: 'src'"),
        ("nisa.max8(t, t, None, 1)", "too many positional arguments"),
        ("nisa.memset(t, 1.0, value=1.0)", "multiple values for argument 'value'"),
        ("nl.zeros((1, 1))", "missing a required argument: 'dtype'"),
        ("t.permute()", "NkiTensor.permute: missing a required argument: 'dims'"),
    ],
)
def test_the_message_says_what_does_not_bind(call: str, what: str, tmp_path: Path) -> None:
    body = f"@nki.jit\ndef k(a):\n    t = nl.zeros((1, 1), dtype=nl.float32)\n    {call}\n    return a\n"
    (finding,) = found_in(tmp_path, body)
    assert finding.rule == "api-bind"
    assert what in finding.message


# -- size


@nkisim.jit
def tiled(a: Any) -> Any:
    out = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.shared_hbm)
    for start in range(0, a.shape[0], 2):
        t = nl.ndarray((2, a.shape[1]), dtype=a.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=t, src=a[start : start + 2, :])
        nisa.dma_copy(dst=out[start : start + 2, :], src=t)
    return out


@nkisim.jit
def device_loops(a: Any) -> Any:
    t = nl.ndarray((2, 4), dtype=nl.float32, buffer=nl.sbuf)
    out = nl.ndarray((2, 4), dtype=nl.float32, buffer=nl.shared_hbm)

    def inner(_: Any) -> None:
        nisa.memset(dst=t, value=1.0)

    def outer(_: Any) -> None:
        nl.fori_loop(0, 3, inner)
        nisa.memset(dst=t, value=2.0)

    nl.fori_loop(0, 5, outer)
    nisa.dma_copy(dst=out, src=t)
    return out


def test_count_depends_on_shapes() -> None:
    assert count_instructions(tiled, np.ones((2, 4), np.float32)) == 2
    assert count_instructions(tiled, np.ones((10, 4), np.float32), target="trn2") == 10


def test_the_larger_of_two_cores_counts() -> None:
    @nkisim.jit
    def kernel(a: Any) -> Any:
        t = nl.ndarray((2, 4), dtype=nl.float32, buffer=nl.sbuf)
        for _ in range(1 + nl.program_id(0)):
            nisa.memset(dst=t, value=1.0)
        return a

    assert count_instructions(kernel[2], np.ones((2, 4), np.float32), target="trn2") == 2


def test_the_body_of_a_dynamic_loop_counts_once() -> None:
    assert count_instructions(device_loops, np.ones((2, 4), np.float32)) == 3


def test_the_static_count_is_that_of_the_simulator(tmp_path: Path) -> None:
    body = (
        "def h(t, n):\n    for i in range(n):\n        nisa.memset(t, 0.0)\n    return t\n\n\n"
        "@nki.jit\ndef k():\n    t = nl.ndarray((2, 4), dtype=nl.float32)\n    for i in range(0, 10, 3):\n"
        "        for j in (1, 2):\n            h(t, 3)\n        h(t, 5)\n    x = [h(t, 1), h(t, 1)]\n"
        "    for y in x:\n        h(y, 2)\n    for y in range(6):\n        h(t, 5)\n"
    )
    file = written(tmp_path, {"kernels": HEAD + body}) / "kernels.py"
    scope: dict[str, Any] = {}
    source = file.read_text(encoding="utf-8").replace("import nki", "import nkisim.nki", 1)
    source = "from nkisim import nki, isa as nisa, language as nl\n" + source.split("\n\n\n", 1)[1]
    exec(compile(source, str(file), "exec"), scope)
    n = count_instructions(scope["k"])
    assert n == 4 * (2 * 3 + 5) + 2 + 2 * 2 + 6 * 5
    assert lint_paths([file], max_instructions=n) == []
    (finding,) = lint_paths([file], max_instructions=n - 1)
    assert (finding.rule, finding.severity) == ("size-unrolled", "error")
    assert f"issues at least {n}, allowed {n - 1}" in finding.message


def test_the_default_budget_only_warns(tmp_path: Path) -> None:
    body = "@nki.jit\ndef k(a):\n    for i in range(70000):\n        nisa.memset(a, 0.0)\n    return a\n"
    (finding,) = found_in(tmp_path, body)
    assert (finding.rule, finding.severity) == ("size-unrolled", "warning")
    early = body.replace("0.0)", "0.0)\n        if a.shape == i:\n            break")
    assert found_in(tmp_path, early) == []


# -- the command


def test_exit_code_and_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(
        tmp_path,
        {
            "good": HEAD + "@nki.jit\ndef k(a):\n    return a\n",
            "careless": HEAD + "@nki.jit\ndef k(a):\n    if a is None:\n        pass\n    return a\n",
            "bad": HEAD + "@nki.jit\ndef k(a):\n    lambda: a\n    return a\n",
            "broken": "def (:\n",
        },
    )
    assert main([str(tmp_path / "good.py")]) == 0
    assert capsys.readouterr().out == "0 errors, 0 warnings: 1 kernels, 1 functions with their helpers, 1 files\n"
    assert main([str(tmp_path / "careless.py")]) == 0
    assert main(["--strict", str(tmp_path / "careless.py")]) == 1
    assert main([str(tmp_path / "bad.py"), str(tmp_path / "good.py")]) == 1
    out = capsys.readouterr().out
    assert "bad.py:8:5: py-lambda error lambda in a kernel [" in out
    assert "1 errors, 0 warnings: 2 kernels" in out
    assert main([str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "broken.py: invalid syntax" in captured.err
    assert "py-lambda" in captured.out
    assert main([str(tmp_path / "absent.py")]) == 2
    assert main([str(written(tmp_path, {"empty/x": ""}) / "empty")]) == 0
    assert main([str(tmp_path / "nothing")]) == 2


def test_unreadable_files_raise_from_python(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        lint_paths([tmp_path / "absent.py"])
    with pytest.raises(ValueError, match="trn9"):
        lint_paths([tmp_path], target="trn9")
    kernels = HEAD + "from helper import h\n\n\n@nki.jit\ndef k(a):\n    h(a)\n"
    folder = written(tmp_path, {"helper": "def (", "kernels": kernels})
    assert len(lint([folder / "kernels.py"]).unreadable) == 1


def test_command_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    from nkisim.__main__ import main as package_main

    assert package_main(["lint", "--target", "trn2", str(ROOT / "examples" / "vector_add.py")]) == 0
    assert "0 errors, 0 warnings: 1 kernels" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        package_main(["lint"])
    with pytest.raises(SystemExit):
        package_main(["lint", "--target", "trn9", "x.py"])


def test_the_documented_table_is_the_rules() -> None:
    assert cli.rules_table() in (ROOT / "docs" / "lint.md").read_text(encoding="utf-8")


# -- the project's kernels

# Other examples are for the API before the one that the lint knows.
EXAMPLES = [p for p in sorted((ROOT / "examples").rglob("*.py")) if "import neuronxcc" not in p.read_text("utf-8")]


@cache
def own_program() -> Program:
    """Filled with the project's files by the first test that takes it: parsing is half of the time of a run."""
    return Program()


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
def test_kernels_of_this_project_pass(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nkisim.lint.check.Program", own_program)
    report = lint([ROOT / "contributed", *EXAMPLES], target)
    assert report.unreadable == []
    assert report.n_kernels >= 3
    assert not report.findings, "\n".join(map(str, report.findings))


def test_every_kernel_file_has_a_kernel() -> None:
    program = own_program()
    for path in [*(ROOT / "contributed").glob("*.py"), *EXAMPLES]:
        decorated = [
            node.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef) and any("nki.jit" in ast.unparse(d) for d in node.decorator_list)
        ]
        file = program.load(path)
        assert file is not None
        assert sorted({kernel.node.name for kernel in kernels(program, file)}) == sorted(decorated), path
