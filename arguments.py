"""How every command's `--help` reads."""

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of what has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default in ([], "")
        return action.help if silent else super()._get_help_string(action)
