"""The rules as data: what each reports, what the documentation says of it, and what the public front end does.

Severity follows from the two sources. `error`: one of them rejects the construct and the other rejects it too or does
not speak of it. `warning`: they contradict each other, or the construct is accepted and about to be removed. What both
accept has no rule.
"""

from __future__ import annotations

from dataclasses import dataclass

ERROR = "error"
WARNING = "warning"

# Documents of the Neuron SDK 2.32 (NKI 0.6), and files of leanprover/KLR, snapshot of 2026-03-25 (about NKI 0.3).
LANG = "language guide"
MIG = "migration guide"
NOTES = "release notes"
ISA = "nki.isa reference"
NL = "nki.language reference"
DYN = "dynamic loops guide"
SIM = "simulator guide: Python outside the subset runs in a simulator and fails to compile"
SILENT = "docs: not in the documented subset"
GATHER = "KLR interop/klr/gather.c"
SIMPLIFY = "KLR NKI/Simplify.lean"
ANNOTATE = "KLR NKI/Annotations.lean"
TRACE = "KLR Trace/NKI.lean"
PYTHON = "KLR Trace/Python.lean"
TERM = "KLR Trace/Term.lean"


@dataclass(frozen=True)
class Rule:
    """One rule: the construct, why it is reported, and both sources."""

    id: str
    severity: str
    what: str
    docs: str
    klr: str

    @property
    def source(self) -> str:
        """Both sources in one line."""
        return f"{self.docs}; {self.klr}"


_TABLE = (
    # Statements
    Rule("py-raise", ERROR, "raise in a kernel; assert is the documented check", SILENT, f"{GATHER}: rejected"),
    Rule("py-try", ERROR, "try in a kernel", SILENT, f"{GATHER}: rejected"),
    Rule("py-del", ERROR, "del in a kernel", SILENT, f"{GATHER}: rejected"),
    Rule("py-scope", ERROR, "global or nonlocal in a kernel", f"{LANG}: kernels are pure", f"{GATHER}: rejected"),
    Rule("py-import", ERROR, "import in a kernel", SILENT, f"{GATHER}: rejected"),
    Rule("py-match", ERROR, "match in a kernel", SILENT, f"{GATHER}: rejected"),
    Rule("py-async", ERROR, "async or await in a kernel", SILENT, f"{GATHER}: rejected"),
    Rule("py-type-alias", ERROR, "type statement in a kernel", SILENT, f"{GATHER}: rejected"),
    Rule("py-class-nested", ERROR, "class inside a kernel", SILENT, f"{GATHER}: rejected"),
    Rule(
        "py-def-nested",
        WARNING,
        "function inside a kernel that is not the body of fori_loop or while_loop",
        f"{NL}, fori_loop and while_loop: their bodies are inner functions",
        f"{GATHER}: rejects every inner function (older than fori_loop)",
    ),
    Rule("py-loop-else", ERROR, "else on a loop", SILENT, f"{SIMPLIFY}: rejected"),
    Rule("py-for-target", ERROR, "for target that is not one name", SILENT, f"{SIMPLIFY}: one simple variable"),
    Rule(
        "py-with",
        ERROR,
        "with of anything but nl.no_reorder(), without arguments and without as",
        f"{NL}: no_reorder is the one context manager it has",
        f"{SIMPLIFY}, {ANNOTATE}: rejected",
    ),
    # Expressions
    Rule("py-yield", ERROR, "yield in a kernel", SILENT, f"{GATHER}: rejected"),
    Rule("py-lambda", ERROR, "lambda in a kernel", SILENT, f"{GATHER}: rejected"),
    Rule("py-comprehension", ERROR, "comprehension or generator in a kernel", SILENT, f"{GATHER}: rejected"),
    Rule("py-walrus", ERROR, ":= in a kernel", SILENT, f"{GATHER}: rejected"),
    Rule(
        "py-set",
        ERROR,
        "set in a kernel",
        f"{LANG}: values are None, bool, int, float, str, tensors, tuple, list, dict, classes",
        f"{GATHER}: rejected",
    ),
    Rule("py-star", ERROR, "* or ** unpacking", SILENT, f"{SIMPLIFY}: tuple and keyword expansion rejected"),
    Rule("py-matmul", ERROR, "the @ operator", SILENT, f"{SIMPLIFY}: rejected"),
    Rule(
        "py-format-spec",
        ERROR,
        "format specifier in an f-string",
        f"{LANG}: plain f-strings only shown",
        f"{GATHER}: rejected",
    ),
    Rule(
        "py-dict-key",
        ERROR,
        "dict key that is not a string",
        f"{LANG}, {MIG} 0.2: string keys only",
        f"{SIMPLIFY}: rejected",
    ),
    Rule(
        "py-dict-computed-key",
        WARNING,
        "computed key in a dict display; assign it with d[key] = value",
        f"{LANG}: any string",
        f"{SIMPLIFY}: string literals only",
    ),
    Rule(
        "py-is",
        ERROR,
        "is or is not; use == or !=",
        f"{MIG} 0.3: not supported",
        f"{SIMPLIFY}: reported as not supported, then read as ==",
    ),
    Rule(
        "py-is-none",
        WARNING,
        "is None or is not None; == None and != None are safe",
        f"{MIG} 0.3: is is not supported, None not excepted",
        f"{SIMPLIFY}: accepted as == None, as in AWS's nki-library",
    ),
    Rule(
        "py-in",
        ERROR,
        "in on something other than a tuple, list or string, or in a chained comparison",
        SILENT,
        f"{SIMPLIFY}, {PYTHON}: rejected",
    ),
    Rule("py-ellipsis", ERROR, "... outside an index", SILENT, f"{SIMPLIFY}: rejected"),
    Rule(
        "py-constant",
        ERROR,
        "constant outside None, bool, 32-bit int, float, str",
        f"{LANG}: the value types",
        f"{GATHER}: too wide an int is rejected, another type becomes None",
    ),
    Rule(
        "py-target",
        ERROR,
        "assignment target: unpacking takes names, chained assignment one stored element, a store one index",
        SILENT,
        f"{SIMPLIFY}, {TRACE}: rejected",
    ),
    # Functions, classes, names
    Rule("py-varargs", ERROR, "*args parameter", SILENT, f"{SIMPLIFY}: rejected"),
    Rule("py-kwargs", WARNING, "**kwargs parameter", SILENT, f"{SIMPLIFY}: reported, and must stay empty"),
    Rule(
        "py-kwonly", WARNING, "keyword-only parameter of a kernel", f"{MIG} 0.3: not supported", f"{SIMPLIFY}: accepted"
    ),
    Rule(
        "py-list-argument",
        WARNING,
        "list as kernel argument or default; use a tuple",
        f"{MIG} 0.3: not supported",
        f"{GATHER}: accepted",
    ),
    Rule(
        "py-decorator",
        ERROR,
        "decorator other than nki.jit, staticmethod and dataclass",
        SILENT,
        f"{SIMPLIFY}: rejected",
    ),
    Rule(
        "py-class",
        ERROR,
        "class that is not a plain NKIObject or Enum",
        f"{LANG}: NKIObject and no other base, or Enum",
        f"{GATHER}: rejected",
    ),
    Rule("py-builtin", ERROR, "Python built-in that the compiler does not have", SILENT, f"{PYTHON}: absent"),
    Rule(
        "py-method",
        ERROR,
        "method of list, dict or str that the compiler does not have",
        f"{LANG}: the methods shown",
        f"{TERM}: absent",
    ),
    Rule(
        "py-library",
        ERROR,
        "call of a Python library in a kernel",
        f"{LANG}: libraries are not all supported",
        f"{GATHER}, {PYTHON}: NumPy is left out, of math a few functions exist",
    ),
    Rule(
        "py-global-state",
        WARNING,
        "a kernel changes a global",
        f"{LANG}, kernel caching: kernels are pure",
        f"{TRACE}: accepted",
    ),
    Rule(
        "reach-unresolved",
        WARNING,
        "helper whose source was not found; it is not checked",
        f"{LANG}: every callee is compiled",
        f"{GATHER}: follows it",
    ),
    # Tensors
    Rule(
        "tensor-operator",
        ERROR,
        "Python operator on a tensor; use nki.isa or nki.language",
        f"{LANG}: tensor contents are unknown when the kernel is built",
        f"{TERM}: rejected",
    ),
    Rule(
        "tensor-truth",
        WARNING,
        "truth value of a tensor",
        f"{LANG}: tensor contents are unknown when the kernel is built",
        f"{TRACE}: accepted, always true",
    ),
    Rule(
        "tensor-store",
        ERROR,
        "assignment to elements of a tensor; pass it as dst",
        f"{MIG} 0.2: dst is a parameter",
        f"{TRACE}: rejected",
    ),
    Rule("tensor-attribute", ERROR, "attribute that NkiTensor does not have", f"{NL}, NkiTensor", f"{TERM}: rejected"),
    # API
    Rule("api-name", ERROR, "name that NKI does not have", f"{ISA}, {NL}", "KLR: resolved by name only"),
    Rule(
        "api-removed",
        ERROR,
        "removed entry point or the neuronxcc namespace",
        f"{NOTES} 0.2, 0.4: raises",
        f"{ANNOTATE}: neuronxcc rejected",
    ),
    Rule(
        "api-bind",
        ERROR,
        "arguments do not bind to the documented signature",
        f"{ISA}, {NL}; {NOTES} 0.2: unknown keywords are errors",
        f"{TRACE}: rejected",
    ),
    Rule(
        "api-enum",
        ERROR,
        "plain number for engine, reduce_cmd, perf_mode or dma_engine",
        f"{MIG} 0.3: integer enum constants are not accepted",
        "KLR Trace/FromNKI.lean: rejected",
    ),
    Rule(
        "api-enum-dma",
        WARNING,
        "plain number for dge_mode or oob_mode",
        f"{MIG} 0.3: integer enum constants are not accepted",
        "KLR Trace/ISA.lean: accepted, as in AWS's nki-library",
    ),
    Rule(
        "api-buffer",
        WARNING,
        "string for a buffer; use nl.sbuf and so on",
        f"{MIG} 0.3: not accepted",
        "KLR Trace/FromNKI.lean: accepted",
    ),
    Rule(
        "api-output",
        ERROR,
        "returned tensor that is not in nl.shared_hbm",
        f"{MIG} 0.3: fails to compile",
        "KLR: not checked",
    ),
    Rule(
        "api-output-hbm",
        WARNING,
        "returned tensor in nl.hbm; use nl.shared_hbm",
        f"{MIG} 0.3: fails to compile, yet the scheduling guide's examples return one",
        "KLR Trace/FromNKI.lean: same as shared_hbm",
    ),
    Rule(
        "api-nested-jit",
        WARNING,
        "call of an @nki.jit function from a kernel",
        f"{MIG} 0.2: remove the decorator",
        f"{GATHER}: accepted, as in AWS's nki-library",
    ),
    Rule(
        "api-jit",
        ERROR,
        "platform_target of nki.jit; set NEURON_PLATFORM_TARGET_OVERRIDE",
        f"{MIG} 0.3: raises",
        "KLR: not its part",
    ),
    Rule(
        "api-not-on-device",
        WARNING,
        "works in a simulator only",
        f"{NOTES} 0.4, known issues; not said to be fixed",
        "KLR: not built in",
    ),
    # Dynamic loops
    Rule(
        "loop-deprecated",
        WARNING,
        "nl.dynamic_range or while on a register; use nl.fori_loop or nl.while_loop",
        f"{MIG} 0.6: deprecated; VirtualRegister page: not in the tracing front end",
        f"{TRACE}: accepted",
    ),
    Rule(
        "loop-step", ERROR, "step of a dynamic loop that is not a positive compile-time int", DYN, f"{TRACE}: rejected"
    ),
    Rule(
        "loop-no-reorder",
        ERROR,
        "dynamic loop inside nl.no_reorder()",
        f"{DYN}; {NL}, no_reorder",
        "KLR Trace/Types.lean: rejected",
    ),
    Rule(
        "loop-variable-write",
        ERROR,
        "write to a dynamic loop's index register",
        f"{MIG} 0.6: read-only; {NOTES} 0.4: AssertionError",
        "KLR: not checked",
    ),
    Rule(
        "loop-register-python",
        ERROR,
        "register in Python arithmetic, comparison or conversion",
        f"{ISA}, VirtualRegister: TypeError",
        f"{TERM}, Trace/Types.lean: rejected",
    ),
    Rule(
        "loop-register-branch",
        WARNING,
        "if on a register",
        f"{ISA}, VirtualRegister: TypeError in the tracing front end",
        f"{TRACE}: becomes a branch on the device",
    ),
    Rule(
        "loop-register-index",
        WARNING,
        "register as an index; use .ap(scalar_offset=...)",
        f"{LANG}, dynamic control flow: shown; {MIG} 0.6: .ap(scalar_offset=...)",
        f"{TERM}: rejected",
    ),
    Rule(
        "loop-rebind",
        ERROR,
        "Python state carried from trip to trip of a dynamic loop, whose body is built once; keep it in SBUF or HBM",
        f"{MIG} 0.6, rules for migrated loops",
        f"{TRACE}: the body is traced once",
    ),
    Rule(
        "loop-tensor-escape",
        ERROR,
        "tensor declared in a dynamic loop's body used outside it",
        f"{MIG} 0.6, rules for migrated loops",
        "KLR: not checked",
    ),
    Rule("loop-control", ERROR, "break, continue or return out of a dynamic loop", SILENT, f"{TRACE}: rejected"),
    Rule(
        "loop-body-return",
        ERROR,
        "fori_loop's body returns nothing, while_loop's the next condition",
        f"{MIG} 0.6, rules for migrated loops",
        "KLR: older than these loops",
    ),
    Rule(
        "loop-nested",
        WARNING,
        "dynamic loop inside a dynamic loop, bound by a register",
        f"{NOTES} 0.4, known issues: carried registers are not found",
        f"{TRACE}: accepted",
    ),
    # Targets and size
    Rule(
        "target-instruction",
        ERROR,
        "instruction that the target does not have",
        f"{ISA}, {NL}: supported versions",
        "KLR: not checked",
    ),
    Rule(
        "target-argument",
        ERROR,
        "argument that the target does not have",
        f"{ISA}: supported versions",
        "KLR: not checked",
    ),
    Rule(
        "size-unrolled",
        WARNING,
        "more instructions after unrolling than the budget",
        f"{LANG}: every static loop is unrolled; no limit is published",
        f"{TRACE}: every static loop is unrolled",
    ),
)

RULES: dict[str, Rule] = {rule.id: rule for rule in _TABLE}

# Assumed: no limit is published. AWS's profile of its tiled fp32 matmul, [4096, 8192] by [8192, 8192] on trn2, shows
# 65,536 Tensor Engine instructions from one fully unrolled kernel; more than that is not known to compile.
DEFAULT_MAX_INSTRUCTIONS = 65_536
