"""Is the artifact still the model? Reference forward, token ids, logits, gate."""
