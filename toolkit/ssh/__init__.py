"""SSH to devices: connection, host keys, transfer, and a device inside this process."""
