"""A plan: recipe x architecture x target with every default filled in and every cost predicted."""

import contextlib
import hashlib
import json
import os
from bisect import bisect_left
from dataclasses import asdict, dataclass
from functools import lru_cache

from toolkit import __version__, catalog, formats
from toolkit.artifact import Limits
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.lora import Adapter
from toolkit.console import format_bytes
from toolkit.decoder import Decoder
from toolkit.errors import PhishipError, PlanError
from toolkit.formats import RuntimeNeeds
from toolkit.quality.limits import fill_limits
from toolkit.quantize.grids import MOST_BITS, is_choosable
from toolkit.recipe import Recipe
from toolkit.stream import DataFile
from toolkit.target import Target

# Resident memory of a conversion, and of each thread: bench/convert.py, rounded up.
PROCESS_BYTES = 150_000_000
WORKER_BYTES = 20_000_000
ADAPTER_COPIES = 3  # of an adapter that stays apart, while its file is written: docs/lora.md
# Of Phi-3's files and of Phi-4-mini's, where there is no checkpoint to look at: 75 to 78.
TOKEN_BYTES = 78
RUNNER_BYTES = 1_000_000
MOST_WORKERS = 8
SHOWN_RECIPES = 5
STEP_TOKENS = 256  # of contexts that are suggested
FLOAT_BYTES = 4
FACTORS = 9  # a matrix's gram, its shift, its factors, and copies on the way


@dataclass(frozen=True)
class Plan:
    """What would be built and what it would cost; bytes everywhere."""

    recipe: Recipe
    decoder: Decoder
    context_length: int
    data: DataFile
    needs: RuntimeNeeds
    workers: int
    rest_bytes: int
    adapter: Adapter | None = None  # that stays apart
    adapter_bytes: int = 0

    @property
    def artifact_bytes(self) -> int:
        """Size of the artifact: exact for the weights, rounded up for the small files."""
        return self.data.size_bytes + self.adapter_bytes + self.rest_bytes

    @property
    def limits(self) -> Limits:
        """What the gate demands: the recipe's limits, and its precision's where it sets none."""
        return fill_limits(self.recipe.check, self.data)

    @property
    def weight_bytes(self) -> int:
        """What a runtime has in memory of the artifact."""
        return self.data.size_bytes + self.adapter_bytes

    @property
    def source_decoder(self) -> Decoder:
        """The source as the runtime can be: with LongRoPE's long factors where it has no others."""
        return self.decoder.with_long_rope() if self.needs.always_long_rope else self.decoder

    @property
    def kv_bytes(self) -> int:
        """The cache of keys and values at the plan's context length."""
        return self.needs.kv_bytes_per_token * self.context_length

    @property
    def device_memory_bytes(self) -> int:
        """Weights, cache and engine together."""
        return self.weight_bytes + self.kv_bytes + self.needs.overhead_bytes

    @property
    def device_disk_bytes(self) -> int:
        """What a first push puts on the device."""
        return self.artifact_bytes + RUNNER_BYTES

    @property
    def build_memory_bytes(self) -> int:
        """Resident memory of the conversion; the gate then loads the artifact."""
        adapter_bytes = ADAPTER_COPIES * self.adapter_bytes
        if self.recipe.quantization.is_calibrated:
            tokens = self.recipe.quantization.calibration_tokens
            return PROCESS_BYTES + max(_calibration_bytes(self.decoder, tokens), adapter_bytes)
        return PROCESS_BYTES + max(self.workers * WORKER_BYTES, adapter_bytes)

    @property
    def gate_memory_bytes(self) -> int:
        """Resident memory of the gate: the artifact in its own runtime on this machine."""
        return self.weight_bytes + self.needs.overhead_bytes + PROCESS_BYTES

    @property
    def digest(self) -> str:
        """Hex sha256 over all that changes bytes: settings, architecture, context, version.

        In the order of the settings: of two overrides that match one matrix the last counts.
        """
        content = {
            "phiship": __version__,
            "settings": self.recipe.settings(),
            "decoder": asdict(self.decoder),
            "context_length": self.context_length,
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def make_plan(
    recipe: Recipe,
    decoder: Decoder,
    *,
    context_length: int | None = None,
    workers: int | None = None,
    memory_bytes: int | None = None,
    tokenizer_bytes: int | None = None,
    adapter: Adapter | None = None,
) -> Plan:
    """Fill in every default; PlanError when the recipe cannot hold this architecture.

    `adapter` is what was read of the one to build with; it counts where it stays apart.
    """
    context = context_length or recipe.context_length or decoder.context
    if context > decoder.context:
        raise PlanError(
            f"{recipe.name}: context_length: got {context}; this model allows {decoder.context}",
            advice=f"set context_length to {decoder.context} or less, or give --context",
        )
    _check_architecture(recipe, decoder)
    _check_room(recipe, decoder, context)
    module = formats.get(recipe.format)
    module.check_shape(recipe, decoder)
    data = module.lay_out(recipe, decoder, context)
    _check_codes(recipe, decoder, data)
    apart = adapter if recipe.adapter_apart else None
    plan = Plan(
        recipe=recipe,
        decoder=decoder,
        context_length=context,
        data=data,
        needs=module.needs(recipe, decoder, context),
        workers=_limit_workers(workers, memory_bytes),
        rest_bytes=module.rest_bytes(
            TOKEN_BYTES * decoder.vocab if tokenizer_bytes is None else tokenizer_bytes
        ),
        adapter=apart,
        adapter_bytes=_measure_adapter(recipe, decoder, adapter),
    )
    if memory_bytes is not None:
        _check_memory(plan, memory_bytes)
    return plan


def _check_memory(plan: Plan, memory_bytes: int) -> None:
    """PlanError when a build takes more, of whose reasons fewer workers are none."""
    if plan.build_memory_bytes <= memory_bytes:
        return
    quantization = plan.recipe.quantization
    what, otherwise = "writing the adapter's file", "leave adapter_apart out"
    if quantization.is_calibrated:
        what = f"choosing codes on a text of {quantization.calibration_tokens} tokens"
        otherwise = "set quantization.calibration_tokens lower"
    raise PlanError(
        f"--memory {format_bytes(memory_bytes)}: {what} takes "
        f"{format_bytes(plan.build_memory_bytes)}",
        advice=f"give more, or {otherwise}",
    )


def _calibration_bytes(decoder: Decoder, tokens: int) -> int:
    """Arrays that `calibrate` holds at once, the source's inputs of a layer among them.

    Measured at full size: docs/calibration.md.
    """
    inputs = 3 * decoder.hidden + decoder.heads * decoder.head_dim + decoder.intermediate
    gate = 4 * decoder.intermediate
    widest = max(decoder.hidden, decoder.heads * decoder.head_dim, decoder.intermediate)
    factors = tokens * decoder.intermediate + FACTORS * widest**2
    states = 4 * tokens * decoder.hidden
    return FLOAT_BYTES * (tokens * inputs + states + max(tokens * gate, factors))


def _check_architecture(recipe: Recipe, decoder: Decoder) -> None:
    """PlanError when the format, or what the recipe asks for, is made for Phi-3's layers alone."""
    specials = decoder.specials
    able = [name for name in formats.names() if formats.get(name).HOLDS.issuperset(specials)]
    if recipe.format not in able:
        module = formats.get(recipe.format)
        lacking = [one for one in specials if one not in module.HOLDS]
        reasons = "".join(f" ({module.REASONS[one]})" for one in lacking if one in module.REASONS)
        raise PlanError(
            f"{recipe.name}: {recipe.format} cannot hold this model ({decoder.family}), for its "
            f"{' and '.join(lacking)}{reasons}; {', '.join(able) or 'no format'} can"
        )
    if specials and recipe.engine != "native":
        raise PlanError(
            f"{recipe.name}: engine: got {recipe.engine}; the vendors' converters are run for "
            f"Phi-3's own layers only, this model ({decoder.family}) has {' and '.join(specials)}; "
            "allowed native"
        )
    if specials and recipe.quantization.equalize:
        raise PlanError(
            f"{recipe.name}: quantization.equalize: knows Phi-3's own layers only; this model "
            f"({decoder.family}) has {' and '.join(specials)}; allowed false"
        )
    if decoder.experts and recipe.quantization.method != "rtn":
        raise PlanError(
            f"{recipe.name}: quantization.method: got {recipe.quantization.method}; a text shows "
            "each expert too few tokens to choose its codes by; allowed rtn"
        )


def _measure_adapter(recipe: Recipe, decoder: Decoder, adapter: Adapter | None) -> int:
    """Bytes of an adapter that stays apart; PlanError where there is none, or it cannot be read."""
    if adapter and recipe.engine == "vendor":
        raise PlanError(
            f"{recipe.name}: engine: vendor: a vendor's converter does not read adapters",
            advice="use `engine: native`, or give a checkpoint that PEFT has merged",
        )
    if not recipe.adapter_apart:
        return 0
    where = f"{recipe.name}: adapter_apart"
    if recipe.format not in (able := formats.names_with_apart()):
        raise PlanError(
            f"{where}: runtimes of {recipe.format} are given no adapter beside a model here; "
            f"allowed with {', '.join(able)}",
            advice="leave it out to have the adapter merged",
        )
    if recipe.quantization.equalize:
        raise PlanError(
            f"{where}: quantization.equalize moves scale between the checkpoint's weights, of "
            "which an adapter beside them knows nothing; allowed with equalize: false",
            advice="leave one of them out",
        )
    if adapter is None:
        raise PlanError(f"{where}: there is no adapter", advice="give one with --adapter DIR")
    return formats.get_apart(recipe.format).measure(recipe, decoder, adapter)


def _check_room(recipe: Recipe, decoder: Decoder, context_length: int) -> None:
    """PlanError for a context that holds no picture, of a model that sees."""
    if decoder.vision and context_length < (least := decoder.vision.count_least()):
        raise PlanError(
            f"{recipe.name}: context_length: got {context_length}; a picture with a text takes "
            f"{least} tokens and more",
            advice=f"set context_length to {least} or more, or give --context",
        )


def _check_codes(recipe: Recipe, decoder: Decoder, data: DataFile) -> None:
    """PlanError when codes are to be chosen on a text, and there are none, or others choose."""
    if not recipe.quantization.is_calibrated:
        return
    asked = "equalize: true" if recipe.quantization.method == "rtn" else "method: gptq"
    where = f"{recipe.name}: quantization.{asked}"
    if recipe.engine != "native":
        raise PlanError(f"{where}: the vendor's engine chooses its own codes; use engine: native")
    # The embedding is looked up, not multiplied: there is nothing to choose its codes by.
    matrices = [p.encoder for p in data.pieces if p.tensor != decoder.names.embedding]
    if not any(map(is_choosable, matrices)):
        raise PlanError(
            f"{where}: its matrices have no codes of {MOST_BITS} bits or fewer that can be chosen",
            advice="leave it out",
        )


def measure_tokenizer(checkpoint: Checkpoint) -> int:
    """Bytes of the tokenizer's files, as an artifact has them."""
    return sum(map(len, checkpoint.tokenizer_contents().values()))


def _limit_workers(workers: int | None, memory_bytes: int | None) -> int:
    wanted = workers or min(MOST_WORKERS, os.cpu_count() or 1)
    if memory_bytes is None:
        return wanted
    allowed = (memory_bytes - PROCESS_BYTES) // WORKER_BYTES
    if allowed < 1:
        raise PlanError(
            f"--memory {format_bytes(memory_bytes)}: converting takes at least "
            f"{format_bytes(PROCESS_BYTES + WORKER_BYTES)}"
        )
    return min(wanted, allowed)


def check_fit(plan: Plan, target: Target) -> None:
    """PlanError when the target cannot run or hold the artifact; its advice says what would fit."""
    if problem := find_problem(plan, target):
        raise PlanError(
            problem, advice="; ".join(what_fits(plan, target)) or "nothing bundled fits"
        )


def find_problem(plan: Plan, target: Target) -> str:
    """One sentence that says why the target cannot take the artifact; empty when it can."""
    name, way = plan.recipe.name, f"{plan.recipe.format}/{plan.needs.provider}"
    if way not in target.runs:
        return f"{target.name} does not run {way}; it runs {', '.join(target.runs)}"
    if plan.device_memory_bytes > target.usable_memory_bytes:
        return (
            f"{name} at context {plan.context_length} takes "
            f"{format_bytes(plan.device_memory_bytes)} of memory; {target.name} has "
            f"{format_bytes(target.usable_memory_bytes)} ({format_bytes(target.memory)} "
            f"less {format_bytes(target.reserved_memory)} for the system)"
        )
    if plan.device_disk_bytes > target.disk:
        return (
            f"{name} takes {format_bytes(plan.device_disk_bytes)} of disk; "
            f"{target.name} has {format_bytes(target.disk)}"
        )
    return ""


def largest_context(plan: Plan, target: Target) -> int:
    """The longest context that the target's memory holds, in steps; at most the plan's, 0: none."""
    module = formats.get(plan.recipe.format)
    left_bytes = target.usable_memory_bytes - plan.weight_bytes

    def is_too_long(context: int) -> bool:
        """What the engine takes may grow faster than the context, as attention masks do."""
        with contextlib.suppress(PlanError):  # some recipes are not for short contexts
            needs = module.needs(plan.recipe, plan.decoder, context)
            return needs.kv_bytes_per_token * context + needs.overhead_bytes > left_bytes
        return False

    contexts = range(STEP_TOKENS, plan.context_length + 1, STEP_TOKENS)
    return STEP_TOKENS * bisect_left(contexts, True, key=is_too_long)


def what_fits(plan: Plan, target: Target) -> list[str]:
    """Say what would fit instead: a shorter context, and recipes of the same model, best first."""
    advice = []
    way = f"{plan.recipe.format}/{plan.needs.provider}"
    context = largest_context(plan, target)
    if way in target.runs and context < plan.context_length and _at(plan, context):
        advice.append(f"--context {context} would fit")
    plans = _plan_all(plan.recipe.model, plan.decoder)
    others = [other for other in plans if other.recipe.name != plan.recipe.name]
    names = [other.recipe.name for other in others if not find_problem(other, target)]
    if not names:
        names = [text for other in others if (text := fit_shorter(other, target))]
    if names:
        more = f" and {len(names) - SHOWN_RECIPES} more" if len(names) > SHOWN_RECIPES else ""
        advice.append(f"these recipes would fit: {', '.join(names[:SHOWN_RECIPES])}{more}")
    return advice


@lru_cache(maxsize=4)
def _plan_all(model: str, decoder: Decoder) -> tuple[Plan, ...]:
    """The plans of a model's bundled recipes that can be made, first choices first."""
    plans = []
    recipes = catalog.find_recipes(model, decoder)
    for recipe in sorted(recipes, key=lambda recipe: not recipe.first_choice):
        with contextlib.suppress(PhishipError):
            plans.append(make_plan(recipe, decoder))
    return tuple(plans)


def fit_shorter(plan: Plan, target: Target) -> str:
    """The recipe with a context that fits, shorter than its own; empty when none does."""
    shorter = _at(plan, largest_context(plan, target))
    if shorter is None or find_problem(shorter, target):
        return ""
    return f"{plan.recipe.name} with --context {shorter.context_length}"


def _at(plan: Plan, context_length: int) -> Plan | None:
    """The same with another context; None when the recipe is not for contexts that short."""
    with contextlib.suppress(PlanError):
        if context_length:
            return make_plan(
                plan.recipe, plan.decoder, context_length=context_length, adapter=plan.adapter
            )
    return None
