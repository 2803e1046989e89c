"""Options of the test run."""

from __future__ import annotations
