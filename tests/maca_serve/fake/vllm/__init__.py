"""Stands in for vLLM: put `fake/` on PYTHONPATH and every part of maca-serve meets this one."""
