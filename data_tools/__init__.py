"""The commands about data: `python -m data_tools.NAME`."""

from __future__ import annotations

from ssl_pipeline.commands.interrupts import answer_interrupts

answer_interrupts()
