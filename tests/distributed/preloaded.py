"""What the server imports that ranks are forked from: Megatron as in a rank of a run, and what test files import."""

from parallel.imports import import_framework

import_framework()

import pytest  # noqa: E402, F401
import ranks  # noqa: E402, F401
import tiny  # noqa: E402, F401

import parallel.deepspeed  # noqa: E402, F401
