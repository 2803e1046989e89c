"""The functions that neuronxcc gets. Each creates its results itself, one by one, as neuronxcc demands.

They use nothing but what kernels of the 2.26 documentation do: named parameters, absent ones None, annotations that
are objects (hence no postponed annotations in this file), no loop and no condition, which neuronxcc would rewrite.
"""

from collections.abc import Callable
from typing import Any

from contributed._neuronxcc_vendor import nl, nt

PARAMETERS = 24  # of each function


def entry(body: Callable[..., Any], shapes: list[tuple[Any, Any]], n_arrays: int, n_written: int) -> Callable[..., Any]:
    """The function of a kernel.

    Args:
        body: `(arguments, results)` to what the kernel returns; absent arguments are None.
        shapes: shapes and types of the results.
        n_arrays: arguments.
        n_written: of them, those that are written; they come first.

    Raises:
        NotImplementedError: there is no such function.
    """
    entries = {(1, 0): _one, (2, 0): _two, (3, 0): _three, (4, 0): _four, (0, 2): _two_written}
    make = entries.get((len(shapes), n_written))
    if make is None:
        raise NotImplementedError(
            f"neuronxcc: a kernel with {len(shapes)} results that writes {n_written} of its arguments; allowed 1 to 4 "
            "results, or two arguments"
        )
    if n_arrays > PARAMETERS:
        raise NotImplementedError(f"neuronxcc: a kernel with {n_arrays} arrays, allowed {PARAMETERS}")
    return make(body, shapes)


# fmt: off
def _one(body: Callable[..., Any], shapes: list[tuple[Any, Any]]) -> Callable[..., Any]:
    def kernel(
        t0=None, t1=None, t2=None, t3=None, t4=None, t5=None, t6=None, t7=None, t8=None, t9=None, t10=None, t11=None,
        t12=None, t13=None, t14=None, t15=None, t16=None, t17=None, t18=None, t19=None, t20=None, t21=None,
        t22=None, t23=None,
    ):
        a = nl.ndarray(shapes[0][0], dtype=shapes[0][1], buffer=nl.shared_hbm)
        arguments = (
            t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, t16, t17, t18, t19, t20, t21,
            t22, t23,
        )
        return body(arguments, (a,))

    return kernel


def _two(body: Callable[..., Any], shapes: list[tuple[Any, Any]]) -> Callable[..., Any]:
    def kernel(
        t0=None, t1=None, t2=None, t3=None, t4=None, t5=None, t6=None, t7=None, t8=None, t9=None, t10=None, t11=None,
        t12=None, t13=None, t14=None, t15=None, t16=None, t17=None, t18=None, t19=None, t20=None, t21=None,
        t22=None, t23=None,
    ):
        a = nl.ndarray(shapes[0][0], dtype=shapes[0][1], buffer=nl.shared_hbm)
        b = nl.ndarray(shapes[1][0], dtype=shapes[1][1], buffer=nl.shared_hbm)
        arguments = (
            t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, t16, t17, t18, t19, t20, t21,
            t22, t23,
        )
        return body(arguments, (a, b))

    return kernel


def _three(body: Callable[..., Any], shapes: list[tuple[Any, Any]]) -> Callable[..., Any]:
    def kernel(
        t0=None, t1=None, t2=None, t3=None, t4=None, t5=None, t6=None, t7=None, t8=None, t9=None, t10=None, t11=None,
        t12=None, t13=None, t14=None, t15=None, t16=None, t17=None, t18=None, t19=None, t20=None, t21=None,
        t22=None, t23=None,
    ):
        a = nl.ndarray(shapes[0][0], dtype=shapes[0][1], buffer=nl.shared_hbm)
        b = nl.ndarray(shapes[1][0], dtype=shapes[1][1], buffer=nl.shared_hbm)
        c = nl.ndarray(shapes[2][0], dtype=shapes[2][1], buffer=nl.shared_hbm)
        arguments = (
            t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, t16, t17, t18, t19, t20, t21,
            t22, t23,
        )
        return body(arguments, (a, b, c))

    return kernel


def _four(body: Callable[..., Any], shapes: list[tuple[Any, Any]]) -> Callable[..., Any]:
    def kernel(
        t0=None, t1=None, t2=None, t3=None, t4=None, t5=None, t6=None, t7=None, t8=None, t9=None, t10=None, t11=None,
        t12=None, t13=None, t14=None, t15=None, t16=None, t17=None, t18=None, t19=None, t20=None, t21=None,
        t22=None, t23=None,
    ):
        a = nl.ndarray(shapes[0][0], dtype=shapes[0][1], buffer=nl.shared_hbm)
        b = nl.ndarray(shapes[1][0], dtype=shapes[1][1], buffer=nl.shared_hbm)
        c = nl.ndarray(shapes[2][0], dtype=shapes[2][1], buffer=nl.shared_hbm)
        d = nl.ndarray(shapes[3][0], dtype=shapes[3][1], buffer=nl.shared_hbm)
        arguments = (
            t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, t16, t17, t18, t19, t20, t21,
            t22, t23,
        )
        return body(arguments, (a, b, c, d))

    return kernel


def _two_written(body: Callable[..., Any], _: list[tuple[Any, Any]]) -> Callable[..., Any]:
    def kernel(
        t0: nt.mutable_tensor, t1: nt.mutable_tensor, t2=None, t3=None, t4=None, t5=None, t6=None, t7=None,
        t8=None, t9=None, t10=None, t11=None, t12=None, t13=None, t14=None, t15=None, t16=None, t17=None,
        t18=None, t19=None, t20=None, t21=None, t22=None, t23=None,
    ):
        arguments = (
            t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, t16, t17, t18, t19, t20, t21,
            t22, t23,
        )
        return body(arguments, ())

    return kernel
