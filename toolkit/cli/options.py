"""Options that several commands have, and how a report is shown."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from toolkit.artifact import Smoke
from toolkit.console import Console
from toolkit.report import Report
from toolkit.yamlfile import ByteSize


class OrderedGroup(click.Group):
    """Shows commands in the order of use, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order in which they were added."""
        del ctx
        return list(self.commands)


class Size(click.ParamType[int]):
    """A count of bytes such as 2GiB."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Read a size; a usage error when it is none."""
        try:
            return ByteSize.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON event a line.")
workers_option = click.option(
    "--workers", type=click.IntRange(1, 64), help="Worker threads; as many as cores, at most 8."
)
context_option = click.option(
    "--context", type=click.IntRange(min=16), help="Context length, instead of the recipe's."
)
memory_option = click.option(
    "--memory", type=Size(), help="Memory the build may take, such as 2GiB; limits workers."
)
adapter_option = click.option(
    "--adapter", type=click.Path(path_type=Path, file_okay=False),
    help="Folder of a LoRA adapter (PEFT): merged into the checkpoint, unless it stays apart.",
)  # fmt: skip
apart_option = click.option(
    "--adapter-apart", is_flag=True,
    help="ONNX: keep the adapter a file of its own, beside weights that are as without it.",
)  # fmt: skip
out_option = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("build"),
    show_default=True, help="Folder in which the artifact's folder appears.",
)  # fmt: skip
check_option = click.option(
    "--check/--no-check", default=True,
    help="Compare logits with the source. Without, the artifact is sealed as unchecked.",
)  # fmt: skip
calibration_option = click.option(
    "--calibration", type=click.Path(path_type=Path, dir_okay=False),
    help="Text (.txt, or chats as .jsonl) that codes are chosen on, instead of Python's manual.",
)  # fmt: skip
method_option = click.option(
    "--method", type=click.Choice(["rtn", "gptq"]),
    help="How codes are chosen, instead of the recipe's way; the artifact's name says so.",
)  # fmt: skip
equalize_option = click.option(
    "--equalize/--no-equalize", default=None,
    help="Move scale from channels with outliers to other weights first, or not; with "
    "--method gptq it is done by default where the model allows it.",
)  # fmt: skip
devices_option = click.option(
    "--devices", type=click.Path(path_type=Path, dir_okay=False), help="The devices.yaml to use."
)
prompt_option = click.option(
    "--prompt", help="Question of the smoke test, instead of the recipe's."
)
accept_option = click.option(
    "--accept-kl", type=click.FloatRange(0, min_open=True),
    help="Publish up to this mean KL from the source, instead of the precision's limit.",
)  # fmt: skip
expect_option = click.option("--expect", help="Text that the answer must contain.")

temperature_option = click.option(
    "--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True,
    help="0 takes the likeliest token, always.",
)  # fmt: skip
seed_option = click.option("--seed", type=int, help="Makes random choices repeatable.")


def settings_options(command: Any) -> Any:
    """Settings for this run alone, instead of those that `tune` has kept."""
    for words, text in (
        (("--batch-tokens",), "Tokens of a prompt that go through the network at once."),
        (("--kv-bits",), "Bits of a value in the KV cache."),
        (("--threads",), "Threads of the engine."),
        (("--context", "context_tokens"), "Tokens of prompt and answer together."),
    ):
        command = click.option(*words, type=click.IntRange(1), help=text)(command)
    return command


def read_smoke(prompt: str | None, expect: str | None) -> Smoke | None:
    """The question to ask instead of the recipe's; a usage error without its answer."""
    if (prompt is None) != (expect is None):
        raise click.UsageError("--prompt and --expect belong together: give both or neither")
    return None if prompt is None or expect is None else Smoke(prompt=prompt, expect=expect)


@contextmanager
def rendering(console: Console, report: Report) -> Iterator[None]:
    """Print the report however the block ends."""
    try:
        yield
    finally:
        if report.steps:
            console.report(report)
