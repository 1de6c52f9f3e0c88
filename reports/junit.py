"""A gate as JUnit XML, which every CI shows: a suite per model, a case per check."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from harness.reports.compare import Check, Gate

_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD]")  # characters that XML 1.0 cannot hold


def junit(gate: Gate) -> str:
    """The document as text."""
    root = ElementTree.Element("testsuites", name="harness compare")
    for model in dict.fromkeys(check.place[0] for check in gate.checks):
        checks = [check for check in gate.checks if check.place[0] == model]
        counts = {state: sum(check.state == state for check in checks) for state in ("fail", "note")}
        suite = ElementTree.SubElement(
            root, "testsuite", name=_plain(model), tests=str(len(checks)), errors="0",
            failures=str(counts["fail"]), skipped=str(counts["note"]),
        )  # fmt: skip
        for check in checks:
            _case(suite, check)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, check: Check) -> None:
    classname = ".".join(part.replace(".", "_") for part in check.place)
    case = ElementTree.SubElement(suite, "testcase", classname=_plain(classname), name=_plain(check.what))
    said = _plain(f"{check.verdict}: {check.detail}")
    if check.state == "fail":
        ElementTree.SubElement(case, "failure", message=said).text = _plain(
            f"{' '.join(check.place)}\n{check.what}: baseline {check.baseline}, candidate {check.candidate}"
        )
    elif check.state == "note":
        ElementTree.SubElement(case, "skipped", message=said)
    else:
        ElementTree.SubElement(case, "system-out").text = said


def _plain(text: str) -> str:
    return _FORBIDDEN.sub("�", text)
