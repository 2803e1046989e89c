"""An ordinary NKI script: it imports AWS's `nki` and knows nothing of the simulator.

On a machine with AWS's package it runs as it is; on any other, `python -m nkisim run examples/vector_add.py`.
"""

import nki
import nki.isa as nisa
import nki.language as nl
import numpy as np


@nki.jit
def vector_add(a, b):
    """a + b for [rows, columns] in HBM, 128 rows at a time."""
    rows, columns = a.shape
    out = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.shared_hbm)
    for start in range(0, rows, nl.tile_size.pmax):
        n = min(nl.tile_size.pmax, rows - start)
        a_sb = nl.ndarray((n, columns), dtype=a.dtype, buffer=nl.sbuf)
        b_sb = nl.ndarray((n, columns), dtype=b.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=a_sb, src=a[start : start + n, :])
        nisa.dma_copy(dst=b_sb, src=b[start : start + n, :])
        nisa.tensor_tensor(dst=a_sb, data1=a_sb, data2=b_sb, op=nl.add)
        nisa.dma_copy(dst=out[start : start + n, :], src=a_sb)
    return out


def main() -> None:
    """Add two matrices and compare with NumPy."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((300, 64)).astype(np.float32)
    b = rng.standard_normal((300, 64)).astype(np.float32)
    got = nki.simulate(vector_add)(a, b)
    np.testing.assert_array_equal(got, a + b)
    print(f"a + b is right for {a.shape}")


if __name__ == "__main__":
    main()
