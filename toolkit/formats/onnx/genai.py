"""genai_config.json, as onnxruntime-genai reads it (its docs: genai_config reference)."""

from typing import Any

from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.formats.onnx.recipe import OnnxRecipe


def make_config(
    recipe: OnnxRecipe, decoder: Decoder, checkpoint: Checkpoint, context_length: int
) -> dict[str, Any]:
    """Return the configuration; the runtime reserves its cache for `search.max_length` tokens."""
    stops = checkpoint.stop_ids
    pad = checkpoint.special_id("pad_token_id")
    return {
        "model": {
            "type": decoder.family,
            "vocab_size": decoder.vocab,
            "context_length": context_length,
            "bos_token_id": checkpoint.special_id("bos_token_id"),
            "eos_token_id": list(stops),
            "pad_token_id": stops[0] if pad is None else pad,
            "decoder": _decoder(recipe, decoder),
        },
        "search": _search(checkpoint.generation, context_length),
    }


def _decoder(recipe: OnnxRecipe, decoder: Decoder) -> dict[str, Any]:
    is_cuda = recipe.provider == "cuda"
    providers = [{"cuda": {"enable_cuda_graph": "0"}}] if is_cuda else []
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers},
        "filename": "model.onnx",
        "head_size": decoder.head_dim,
        "hidden_size": decoder.hidden,
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": decoder.layers,
        "num_key_value_heads": decoder.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def _search(generation: dict[str, Any], context_length: int) -> dict[str, Any]:
    return {
        "do_sample": bool(generation.get("do_sample", False)),
        "temperature": generation.get("temperature") or 1.0,
        "top_k": generation.get("top_k") or 50,
        "top_p": generation.get("top_p") or 1.0,
        "repetition_penalty": generation.get("repetition_penalty") or 1.0,
        "min_length": 0,
        "max_length": context_length,
        "num_beams": 1,
        "num_return_sequences": 1,
        "early_stopping": True,
        "length_penalty": 1.0,
        "diversity_penalty": 0.0,
        "no_repeat_ngram_size": 0,
        "past_present_share_buffer": True,
    }
