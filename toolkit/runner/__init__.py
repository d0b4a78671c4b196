"""What is pushed to a device: the standard library plus one engine, shipped as one zipapp.

Imports nothing of toolkit and keeps to the syntax of Python 3.9, the oldest Python of the devices.
"""
