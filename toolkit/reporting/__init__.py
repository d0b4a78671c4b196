"""A page about one model: every artifact, how near it is to its source, what it costs."""
