"""How the tests are shared out when several processes run them (`make test`): a file is never split.

Files that need the same costly thing go together, so that it is made once, and the longest go first.
"""

import pytest
from cluster import why_not

COSTLY = (
    "one_cluster",
    "smoke",
    "two_ranks",
)  # fixtures of a session; a cluster mostly waits, so it comes first


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    together: dict[str, str] = {}
    for item in items:
        needs = [name for name in COSTLY if name in getattr(item, "fixturenames", ())]
        if needs:
            together[item.location[0]] = needs[0]
    ranks = {name: rank for rank, name in enumerate(COSTLY)}
    for item in items:
        file = item.location[0]
        item.add_marker(pytest.mark.xdist_group(together.get(file, file.replace("/", "."))))
    items.sort(key=lambda item: ranks.get(together.get(item.location[0], ""), len(ranks)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reason = why_not()
    if reason is not None:
        terminalreporter.write_line(f"tests/slurm: skipped, no SLURM here: {reason}")
