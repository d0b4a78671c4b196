"""The checkpoint that is built from: opened or fetched, and which bundled model it is."""

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from toolkit import catalog, formats
from toolkit.artifact import make_safe
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.config import Config
from toolkit.checkpoint.hub import is_local, resolve
from toolkit.checkpoint.merged import MergedCheckpoint, merge
from toolkit.checkpoint.peft import look
from toolkit.console import Console
from toolkit.decoder import Decoder
from toolkit.errors import CheckpointError, SettingsError, UnsupportedError
from toolkit.families import read_decoder
from toolkit.recipe import Recipe

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
QUANTIZED_ENDS = ("-bnb-4bit", "-unsloth")  # as unsloth names them, in this order


def open_source(reference: str, console: Console, adapter: Path | None = None) -> Checkpoint:
    """Open a folder or fetch a Hugging Face id; what cannot be built is refused before a fetch.

    `adapter` is the folder of a LoRA adapter, merged in; CheckpointError or UnsupportedError when
    it does not belong to this checkpoint or is more than that.
    """
    if adapter is None:
        return resolve(reference, console, accept=read_decoder)
    base = look(adapter).base
    is_id = not is_local(reference) and HUB_ID.fullmatch(base)
    if is_id and _shorten_id(base) != _shorten_id(reference):
        raise CheckpointError(
            f"{adapter}: base_model_name_or_path: got {base!r}; the checkpoint is {reference}",
            advice="give the checkpoint that the adapter was trained on, or its folder",
        )
    checkpoint = resolve(reference, console, accept=read_decoder)
    checkpoint.check(read_decoder(checkpoint.config))
    merged = merge(checkpoint, adapter)
    _check_used(merged, adapter)
    return merged


def _shorten_id(reference: str) -> str:
    """A repository's name without owner and revision, and what names a copy in 4 bits.

    Adapters are trained on such copies, also of other owners; the 16-bit model is what is built.
    """
    name = reference.partition("@")[0].rpartition("/")[2].lower()
    for end in QUANTIZED_ENDS:
        name = name.removesuffix(end)
    return name


def choose_adapter(recipe: Recipe | None, given: Path | None, *, apart: bool) -> Path | None:
    """The folder of the adapter to build with: the recipe's or the one that is given, if any.

    SettingsError where they are two, for the artifact's name, limits and question are those of the
    recipe's own; or where one is to stay `apart`, and there is none.
    """
    named = Path(recipe.adapter) if recipe and recipe.adapter else None
    if recipe and named and given and named.resolve() != given.resolve():
        raise SettingsError(
            f"--adapter {given}: {recipe.name} names another adapter, {named}",
            advice="leave --adapter out, or take a recipe that names none",
        )
    apart = apart or bool(recipe and recipe.adapter_apart)
    if apart and not (named or given):
        who = f"{recipe.name}: adapter_apart" if recipe else "--adapter-apart"
        raise SettingsError(f"{who}: there is no adapter", advice="give one with --adapter DIR")
    return given or named


def _check_used(merged: MergedCheckpoint, adapter: Path) -> None:
    """UnsupportedError for an update of what no build reads, as the head of a tied model."""
    decoder = read_decoder(merged.config)
    if unused := sorted(set(merged.adapter.changes) - set(decoder.all_shapes())):
        raise UnsupportedError(
            f"{adapter}: {unused[0]}: the model does not use this tensor of {merged.folder}"
            + (", its head is its embedding" if decoder.is_tied else ""),
            advice="train the adapter without it",
        )


def list_recipes(checkpoint: Checkpoint, reference: str, kinds: Collection[str]) -> list[Recipe]:
    """Every bundled recipe for the checkpoint, of these formats or of all.

    `reference` is the id or path it was given by. SettingsError for a format that is unknown.
    """
    if unknown := sorted(set(kinds) - set(formats.names())):
        raise SettingsError(f"--format {unknown[0]}: unknown; allowed {', '.join(formats.names())}")
    decoder = read_decoder(checkpoint.config)
    recipes = catalog.find_recipes(find_model(decoder, reference), decoder)
    return [one for one in recipes if not kinds or one.format in kinds]


def bind_recipe(recipe: Recipe, checkpoint: Checkpoint, reference: str) -> Recipe:
    """A recipe for any model as one of the checkpoint's; another recipe as it is."""
    if recipe.model:
        return recipe
    decoder = read_decoder(checkpoint.config)
    return recipe.bind(find_model(decoder, reference), decoder)


def find_model(decoder: Decoder, hint: str) -> str:
    """Name of the bundled model with this checkpoint's shape; of another the end of `hint`.

    A fine-tune may have another vocabulary or window: it is that model where no other is. Where
    two have the same shape (3-mini-128k and 3.5-mini), `hint`, the checkpoint's id or path,
    decides; their recipes make the same bytes.
    """
    models = {name: catalog.load_model(name) for name in catalog.names("models")}
    decoders = {name: read_decoder(Config(name, m.config)) for name, m in models.items()}
    found = [name for name, one in decoders.items() if _shape(one) == _shape(decoder)]
    found = found or [name for name, one in decoders.items() if _size(one) == _size(decoder)]
    if not found:
        return make_safe(Path(hint.partition("@")[0]).resolve().name, "model")
    named = [name for name in found if models[name].id.rpartition("/")[2].lower() in hint.lower()]
    return (named or found)[0]


def _shape(decoder: Decoder) -> tuple[object, ...]:
    """What tells the models apart."""
    return (decoder.shapes(), decoder.context, decoder.kv_heads, decoder.window, decoder.vision)


def _size(decoder: Decoder) -> tuple[object, ...]:
    """The same without what a fine-tune may change: vocabulary, window, a head of its own."""
    one = replace(decoder, vocab=1, is_tied=True)
    return (one.shapes(), one.context, one.kv_heads, one.vision)
