"""Proof that your training script resumes exactly, for your own test suite.

::

    from hf_lifecycle.testing import assert_resumes_exactly

    def test_resume():
        print(assert_resumes_exactly(make_trainer, break_at=[5, 12]))

The run is trained uninterrupted, uninterrupted again (is it deterministic by itself?), and interrupted and resumed.
Either all end with the same bits, or :class:`NotExact` names the first thing that differs, and since which step.
"""

from __future__ import annotations

from hf_lifecycle.testing.loops import Probe, assert_loop_resumes_exactly
from hf_lifecycle.testing.report import NotExact, Report, Resumed
from hf_lifecycle.testing.trainers import assert_resumes_exactly

__all__ = ["NotExact", "Probe", "Report", "Resumed", "assert_loop_resumes_exactly", "assert_resumes_exactly"]
