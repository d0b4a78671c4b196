"""Probes: one module a topic. Each returns facts by name; what cannot be read is None.

Files are read below a root folder and programs run through `run`, so that a recorded board can be
replayed; the rest comes from an Interpreter.
"""
