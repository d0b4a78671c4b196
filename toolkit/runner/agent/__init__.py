"""The device side of a push: blobs, releases, the switch. JSON in, JSON out."""
