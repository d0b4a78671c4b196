"""Block quantizers."""
