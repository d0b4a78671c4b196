"""The command line: parse, one call, render. Everything else is elsewhere."""

import sys
from typing import NoReturn

import click

from toolkit import __version__
from toolkit.cli import building, devices, exporting, measuring, reporting, serving
from toolkit.cli.options import OrderedGroup
from toolkit.console import Console
from toolkit.errors import PhishipError

EXIT_INTERRUPTED = 130


def main() -> NoReturn:
    """Run a command; expected errors end with their own exit code and no traceback."""
    as_json = "--json" in sys.argv
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except PhishipError as error:
        Console(as_json=as_json).error(error)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        Console(as_json=as_json).note("interrupted; nothing half-written was left behind")
        sys.exit(EXIT_INTERRUPTED)


@click.group(cls=OrderedGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="phiship")
def cli() -> None:
    """Turn a Phi-3 checkpoint into what a device runs best, prove it, push it, test it there.

    Start with: phiship ship CHECKPOINT DEVICE
    """


for _command in (
    *(devices.ship_command, building.list_command, building.plan_command),
    *(building.build_command, building.check_command),
    *(devices.deploy_command, serving.run_command, serving.serve_command),
    *(measuring.bench_command, measuring.tune_command, measuring.compare_command),
    reporting.report_command,
    *(devices.rollback_command, devices.probe_command),
    *(devices.status_command, devices.history_command, devices.logs_command),
    *(devices.unlock_command, devices.uninstall_command, devices.trust_command),
    *(exporting.bundle_command, exporting.adopt_command),
    *(building.parity_command, building.vendor_group),
):
    cli.add_command(_command)
