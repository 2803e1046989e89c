"""Arithmetic on shapes and strides, with no memory behind it."""

from __future__ import annotations


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a dense tensor."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return tuple(strides)


def is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the view walks addresses one by one in row-major order (size-1 dims do not count)."""
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return True


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int]:
    """Least and greatest distance of an element from the first one."""
    low = high = 0
    for n, stride in zip(shape, strides, strict=True):
        reach = stride * (n - 1)
        if reach < 0:
            low += reach
        else:
            high += reach
    return low, high


def merge(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int] | None:
    """Size and stride of one dimension in place of several, or None where they are not contiguous."""
    size = stride = 1
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        if n == 1:
            continue
        if size == 1:
            stride = step
        elif step != size * stride:
            return None
        size *= n
    return size, stride


def reshape_strides(shape: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides of shape `new` over the same elements in the same order, or None where that needs a copy.

    Old and new dimensions are matched from the left in the shortest blocks of equal size; the old ones
    of a block have to merge into one, which is then split. Size-1 dimensions take no part in a match.
    """
    old = [(n, stride) for n, stride in zip(shape, strides, strict=True) if n != 1]
    out: list[int] = []
    while old and len(out) < len(new):
        taken, count = 1, old[0][0]
        first, wanted = len(out), new[len(out)]
        last = first + 1
        while count != wanted:
            if wanted < count:
                wanted *= new[last]
                last += 1
            else:
                count *= old[taken][0]
                taken += 1
        block = merge(tuple(n for n, _ in old[:taken]), tuple(stride for _, stride in old[:taken]))
        if block is None:
            return None
        out.extend(stride * block[1] for stride in row_major_strides(new[first:last]))
        old = old[taken:]
    return (*out, *[1] * (len(new) - len(out)))
