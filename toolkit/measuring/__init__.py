"""Measuring what runs: bench, tune, and compare."""
