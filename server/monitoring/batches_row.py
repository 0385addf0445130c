"""The dashboard's row of batches: what nobody waits for."""

from __future__ import annotations

from server.monitoring.panels import Panel, Query, Row
from server.monitoring.promql import Scope
from server.telemetry import metric_families as families

UNFINISHED = "validating|in_progress|finalizing|cancelling"


def batches_row(scope: Scope) -> Row:
    return Row(
        "Batches",
        panels=[
            Panel(
                title="Unfinished batches", unit="none", description="By status.",
                queries=[
                    Query(
                        scope.gauge(
                            families.BATCHES, by=("status",), status=UNFINISHED
                        ),
                        "{{status}}",
                    )
                ],
            ),
            Panel(
                title="Lines", unit="none",
                description="Requests of batches that were written to a file of answers, per second, by outcome.",
                queries=[Query(scope.rate(families.BATCH_LINES, by=("outcome",)), "{{outcome}}")],
            ),
            Panel(
                title="Lines in work", unit="none",
                description="Requests of batches that are answered now. They make room for others, and wait for them.",
                queries=[Query(scope.gauge(families.BATCH_LINES_IN_WORK, by=("instance",)), "{{instance}}")],
            ),
            Panel(
                title="Kept batches", unit="none", description="All that are kept, finished ones included.",
                queries=[Query(scope.gauge(families.BATCHES, by=("instance",)), "{{instance}}")],
            ),
            Panel(
                title="Kept files", unit="bytes", description="Uploads and answers in the folder of batches.",
                queries=[Query(scope.gauge(families.BATCH_FILE_BYTES, by=("instance",)), "{{instance}}")],
            ),
        ],
    )  # fmt: skip
