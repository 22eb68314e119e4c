"""Preloaded into the process that workers are forked from, so that they are born the right way.

Importing this module there (and only there: the server looks for it by name) makes it ignore Ctrl-C, which the
terminal sends to every process of the job; only the parent decides what an interrupt means. NumPy and what a
worker needs are loaded once, before the fork: two workers start in 10 ms instead of 90.
"""

from __future__ import annotations

import signal

import numpy
import numpy.random  # noqa: F401

import minidp.comm
import minidp.launch.worker
import minidp.parallel  # noqa: F401
from minidp.launch.whereabouts import ASK

signal.signal(signal.SIGINT, signal.SIG_IGN)
if ASK is not None:  # the same: the parent is asked where everybody is, and answers
    signal.signal(ASK, signal.SIG_IGN)
