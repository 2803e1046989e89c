"""Skip-softmax decode against the oracle: results, the tiles that each head skips, and the rows of V that are read."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from contributed import _sparse_launch, skip_softmax_decode
from contributed._cases import SparseCase
from contributed._nki import has_device, run_on_device
from contributed._sparse_launch import TileStats
from contributed.flash_decode import INSTRUCTIONS_PER_TILE as OF_FLASH
from contributed.flash_decode import flash_decode
from contributed.skip_softmax_decode import CASES, INSTRUCTIONS_PER_TILE, calibrate
from contributed.skip_softmax_decode import skip_softmax_decode as decode
from nkisim import Trace, simulate
from reference.budget import check_budget
from reference.rounded_sparse import skip_softmax_decode_rounded
from reference.skip_softmax import skip_softmax_decode as oracle
from tests.kernels.flash import BF16, CEILING, Run, by_dtype, by_layout, by_target, normal
from tests.kernels.test_flash_decode_properties import assert_same_bits, columns_by_themselves
