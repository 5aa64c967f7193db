"""Makes one self-contained source file of a module and the parts of this project that it needs.

Only the needed top-level statements are copied, unchanged and with the comments above them, so that an exported model
brings the code that it was trained with.
"""

import ast
import importlib.util
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_PROJECT = ("trainer", "pipeline", "captioner")


class _Statement(NamedTuple):
    """A top-level statement of a module."""

    source: str  # with the comments above it
    node: ast.stmt
    defines: set[str]
    is_import: bool


class _Import(NamedTuple):
    module: str
    member: str | None  # None: the module itself


def single_file(module: str, note: str) -> str:
    """The source of `module`: its docstring, `note` as a comment, imports, everything it needs of this project, itself.

    Raises ValueError if a name has two meanings in these modules, or if a function imports from this project.
    """
    statements, has_docstring = _statements(module), _docstring(module) is not None
    needed: dict[str, set[int]] = defaultdict(set)  # statement numbers, by module
    packages: dict[str, _Import] = {}  # imports of other projects, by name
    pending = [(module, number) for number in range(has_docstring, len(statements))]
    while pending:
        owner, number = pending.pop()
        statement = _statements(owner)[number]
        if statement.is_import or number in needed[owner]:
            continue
        needed[owner].add(number)
        used = _used_names(owner, statement.node)
        for i, other in enumerate(_statements(owner)):
            for name in used & other.defines:
                if not other.is_import:
                    pending.append((owner, i))
                elif (found := _import_of(other.node, name)).module.split(".")[0] in _PROJECT:
                    if found.member != name:
                        raise ValueError(f"{'.'.join(filter(None, found))} is imported as {name}: use its own name")
                    pending += [(found.module, j) for j, s in enumerate(_statements(found.module)) if name in s.defines]
                elif packages.setdefault(name, found) != found:
                    raise ValueError(f"{name} is {packages[name]} in one module and {found} in another: rename one")
    _check_names(needed, packages)
    heading = statements[0].source if has_docstring else ""
    comment = "\n".join(f"# {line}" for line in note.splitlines())
    bodies = [_body(name, needed[name]) for name in _dependencies_first(module) if needed[name]]
    return "\n\n".join(part for part in (heading, comment, _import_lines(packages), *bodies) if part) + "\n"


def _body(module: str, numbers: set[int]) -> str:
    """The statements below their module's docstring, which has the legend of their names, as a comment."""
    lines = [f"--- {module} ---", *(_docstring(module) or "").splitlines()]
    heading = "\n".join(f"# {line}".rstrip() for line in lines)
    return "\n\n\n".join([heading, *(_statements(module)[i].source for i in sorted(numbers))])


def _import_of(node: ast.stmt, name: str) -> _Import:
    assert isinstance(node, ast.Import | ast.ImportFrom)
    imported = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
    return _Import(imported, None) if isinstance(node, ast.Import) else _Import(str(node.module), imported)


def _used_names(module: str, node: ast.stmt) -> set[str]:
    for inner in ast.walk(node):
        if _is_project_import(inner):
            raise ValueError(f"{module}, line {node.lineno}: a function imports from this project; import at the top")
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _is_project_import(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in _PROJECT


def _check_names(needed: dict[str, set[int]], packages: dict[str, _Import]) -> None:
    owner = dict.fromkeys(packages, "an import")
    for module, numbers in needed.items():
        for name in {name for i in numbers for name in _statements(module)[i].defines}:
            if name in owner:
                raise ValueError(f"{name} is defined by {owner[name]} and by {module}: rename one")
            owner[name] = module


def _dependencies_first(module: str) -> list[str]:
    """The module and those of this project that it imports, directly or not, each after the ones it imports."""
    order: dict[str, None] = {}
    for statement in _statements(module):
        if _is_project_import(statement.node):
            order |= dict.fromkeys(_dependencies_first(str(statement.node.module)))  # type: ignore[attr-defined]
    return [*order, module]


def _import_lines(packages: dict[str, _Import]) -> str:
    lines, members = [], defaultdict(list)
    for name, (package, member) in sorted(packages.items()):
        renamed = "" if name == (member or package) else f" as {name}"
        if member is None:
            lines.append(f"import {package}{renamed}")
        else:
            members[package].append(f"{member}{renamed}")
    return "\n".join([*sorted(lines), *(f"from {name} import {', '.join(members[name])}" for name in sorted(members))])


def _docstring(module: str) -> str | None:
    return ast.get_docstring(ast.Module([statement.node for statement in _statements(module)], []))


@lru_cache
def _statements(module: str) -> list[_Statement]:
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    source = Path(str(spec.origin)).read_text(encoding="utf-8")
    lines, end, found = source.splitlines(), 0, []
    for node in ast.parse(source).body:
        assert node.end_lineno is not None
        source, is_import = (
            "\n".join(lines[end : node.end_lineno]).strip("\n"),
            isinstance(node, ast.Import | ast.ImportFrom),
        )
        found.append(_Statement(source, node, _defined(node), is_import))
        end = node.end_lineno
    return found


def _defined(node: ast.stmt) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Assign(targets=targets):
            return {inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)}
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {alias.asname or alias.name for alias in names}
    return set()
