"""What a study leaves: its tables in the terminal, and a report with everything needed to judge and repeat it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from recsys_lightning.analysis.codes_run import CodedRun
from recsys_lightning.analysis.compare import markdown_table
from recsys_lightning.analysis.groups import shown_path
from recsys_lightning.analysis.latency_report import machine
from recsys_lightning.analysis.study_run import StudiedRun
from recsys_lightning.training.record import code_fingerprint

Opened = StudiedRun[Any] | CodedRun
"""What a study is of."""


class StudyTable(NamedTuple):
    """A table of a study."""

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]


class Findings(NamedTuple):
    """What a study has found."""

    title: str
    introduction: Sequence[str]  # what was done, in Markdown
    tables: Sequence[StudyTable]
    remarks: Sequence[str]
    pictures: Mapping[str, bytes]  # PNG files by what stands after the report's name, such as ".png"
    files: Mapping[str, bytes]  # other files, in the same way
    settings: Mapping[str, str]  # of the study


def markdown(findings: Findings, stem: str, command: str, runs: Sequence[Opened], seconds: float) -> str:
    """The report of a study.

    Args:
        findings: what was found.
        stem: name of the report's file without its ending; the other files lie beside it.
        command: the command line that writes the report.
        runs: that were studied.
        seconds: that the study took.
    """
    beside = ", ".join(f"`{stem}{ending}`" for ending in findings.files)
    parts = [f"# {findings.title}", f"Written by `{command}`." + (f" Beside it lie {beside}." if beside else "")]
    parts += findings.introduction
    for ending in findings.pictures:
        parts.append(f"![{findings.title}]({f'{stem}{ending}'.replace(' ', '%20')})")
    for table in findings.tables:
        parts += [f"## {table.title}", markdown_table(table.head, table.body)]
    parts += findings.remarks
    code = code_fingerprint()
    made = {
        **findings.settings,
        "code": f"{code['version']} {code['commit'] or ''} {(code['sha256'] or '')[:12]}",
        "device": runs[0].device.type,
        "seconds": f"{seconds:.0f}",
        **machine(),
    }
    head = ["run", "checkpoint", "seed", "data", "text encoder", "trained on", "trained by code"]
    parts += [
        "## How it was measured",
        markdown_table(head, [_provenance(run) for run in runs]),
        markdown_table(["", ""], [[name, value] for name, value in made.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _provenance(run: Opened) -> list[str]:
    results = run.results
    if not results:  # a bare file tells of nothing else
        return [run.name, run.checkpoint, *["-"] * 5]
    data, hardware, code = results["data"], results["hardware"], results["code"]
    machine = hardware["gpu"] or f"{hardware['cpu_cores']} CPU cores ({hardware['cpu']})"
    return [
        run.name,
        run.checkpoint,
        str(results["seed"]),
        f"{data.get('source')} {str(data.get('fingerprint'))[:12]}",
        shown_path(data.get("text_encoder") or "none")[:80],
        f"{hardware['devices']} x {machine}, torch {hardware['torch']}",
        f"{code['version']} {code['commit'] or ''} {code['sha256'][:12]}",
    ]
