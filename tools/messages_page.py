"""The site's page of all one-line messages, by the file that raises them.

MkDocs calls `on_files` (mkdocs.yml, hooks) and gets the page. The page is made from the code, so it is always current.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "data_pipeline", "trainer", "launch")
PAGE = "messages.md"
_HEAD = """# All messages

Every line that FlowMask raises for a person, by the file that raises it. `…` is filled in.
[Troubleshooting](troubleshooting.md) explains those that are met most.
"""


def on_files(files: Any, config: Any) -> Any:
    """MkDocs' event: add the page to those of docs/."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """The page as Markdown: a heading for each file that raises a message, a line for each message."""
    lines = [_HEAD]
    for path in (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))):
        said = list(dict.fromkeys(messages(ast.parse(path.read_text()))))
        if said:
            lines += [f"## {path.relative_to(ROOT)}", "", *(f"- **{kind}** `{text}`" for kind, text in said), ""]
    return "\n".join(lines)


def messages(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Kind and text of each message whose words are in the `raise` statement."""
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else None
        if not isinstance(call, ast.Call) or not call.args or not isinstance(call.func, ast.Name):
            continue
        text = words(call.args[0])
        if call.func.id.endswith("Error") and call.func.id != "AssertionError" and text.strip("… "):
            yield call.func.id, text


def words(node: ast.AST) -> str:
    """The text of a string or f-string, with … for each inserted value; empty for any other node."""
    if isinstance(node, ast.Constant):
        return str(node.value).replace("\n", " ").replace("`", "'")
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""
