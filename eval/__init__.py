"""The commands that measure what a backbone learnt: `python -m eval.NAME`."""

from __future__ import annotations

from ssl_pipeline.commands.interrupts import answer_interrupts

answer_interrupts()
