"""Megatron is imported as in a rank of a run, before any test file does."""

from parallel.imports import import_framework

import_framework()
