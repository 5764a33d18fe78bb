"""`trl-personal audit`: what preference data allow, before anything is trained."""

import sys
from argparse import Namespace
from dataclasses import replace

from trl import DatasetMixtureConfig, ScriptArguments

from ..audit import audit_preferences
from ..audit.table import audit_table
from ..data import LoadReport
from ..terminal import json_line, print_whole
from .arguments import ColumnArguments
from .preferences import load_preferences


def run_audit(arguments: Namespace) -> None:
    """Write the audit of `arguments.dataset` to the standard output, and to the folder `arguments.output` if there is one."""
    script_args = ScriptArguments(dataset_name=arguments.dataset, dataset_config=arguments.dataset_config)
    user_id_column = arguments.user_id_column or "user_id"
    reports: list[LoadReport] = []
    splits = load_preferences(
        script_args,
        DatasetMixtureConfig(),
        ColumnArguments.of(arguments),
        user_id_column=user_id_column,
        extra_columns=[arguments.split_column],
        on_report=reports.append,
    )
    audit = audit_preferences(
        {split: rows for split, rows in splits.items() if len(rows)},
        user_id_column,
        split_column=arguments.split_column,
        min_pairs=arguments.min_pairs,
        seed=arguments.seed,
    )
    audit = replace(audit, notes=(*filter(None, (report.left_out() for report in reports)), *audit.notes))
    if arguments.output is not None:
        audit.save(arguments.output)
        sys.stderr.write(f"audit.json and audit.png are in {arguments.output}.\n")
    if arguments.format == "json":
        found = audit.to_dict()
        if not arguments.list_users:
            del found["users"], found["variants"]
        sys.stdout.write(json_line(found, indent=2) + "\n")
        return
    print_whole(audit_table(audit, arguments.list_users))
