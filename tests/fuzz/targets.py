"""What is fuzzed."""

from __future__ import annotations

import logging

import fuzz_files
import fuzz_flags
import fuzz_report
import fuzz_streams

logging.disable(logging.WARNING)  # what converters leave out

TARGETS = (*fuzz_files.TARGETS, *fuzz_flags.TARGETS, *fuzz_streams.TARGETS, *fuzz_report.TARGETS)
