"""An ordinary script for the older API: it imports AWS's `neuronxcc.nki` and knows nothing of the simulator.

On a machine with AWS's compiler it runs as it is; on any other, `python -m nkisim run examples/legacy_softmax.py`.
"""

import math

import neuronxcc.nki as nki
import neuronxcc.nki.isa as nisa
import neuronxcc.nki.language as nl
import numpy as np


@nki.jit
def softmax(x):
    """exp(x - max) / sum(exp(x - max)) over the rows of [rows, columns] in HBM, 128 rows at a time."""
    rows, columns = x.shape
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    i_p = nl.arange(nl.tile_size.pmax)[:, None]
    i_f = nl.arange(columns)[None, :]
    for t in nl.affine_range(math.ceil(rows / nl.tile_size.pmax)):
        row = t * nl.tile_size.pmax + i_p
        inside = row < rows
        tile = nl.load(x[row, i_f], mask=inside)
        # exp(x - max) and its sum are one instruction of the Scalar Engine, whose bias is added.
        top = nisa.tensor_reduce(np.max, tile, axis=1, negate=True, mask=inside)
        total = nl.ndarray((nl.tile_size.pmax, 1), dtype=nl.float32)
        weights = nisa.activation_reduce(np.exp, tile, reduce_op=np.add, reduce_res=total, bias=top, mask=inside)
        nl.store(out[row, i_f], weights * nl.reciprocal(total, mask=inside), mask=inside)
    return out


def main() -> None:
    """Softmax of a matrix whose last tile is not full, against NumPy."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 200)).astype(np.float32)
    got = nki.simulate_kernel(softmax, x)
    wide = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(got, wide / wide.sum(axis=1, keepdims=True), rtol=2e-6)
    print(f"softmax is right for {x.shape}")


if __name__ == "__main__":
    main()
