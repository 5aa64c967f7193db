"""A module of this project as one file that runs without it: what it imports from here stands in front of it.

Only the definitions that are needed come along, unchanged and with the comments above them. So a model that leaves this
project takes the same code with it that trained it.
"""

import ast
import importlib.util
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

_PROJECT = ("trainer", "pipeline", "captioner")


@dataclass(frozen=True)
class _Statement:
    """One of a module's top level."""

    source: str  # with the comments above it
    node: ast.stmt
    defines: frozenset[str]

    @property
    def imports(self) -> bool:
        return isinstance(self.node, ast.Import | ast.ImportFrom)


@dataclass(frozen=True)
class _Needed:
    statements: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))  # numbers, by module of ours
    packages: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # name: where it is imported from


def single_file(module: str, note: str) -> str:
    """The source of `module`: its docstring, `note` as a comment, all that it needs of this project, and itself.

    ValueError where two of the modules mean different things by a name, or where a function imports from this project.
    """
    statements = _statements(module)
    described = ast.get_docstring(ast.parse(_source(module))) is not None
    needed = _Needed()
    _need(module, range(described, len(statements)), needed)
    _check_names(needed)
    docstring = statements[0].source if described else ""
    comment = "\n".join(f"# {line}" for line in note.splitlines())
    bodies = [_body(name, needed.statements[name]) for name in _imported_first(module) if needed.statements[name]]
    return "\n\n".join(part for part in (docstring, comment, _import_lines(needed), *bodies) if part) + "\n"


def _body(module: str, numbers: set[int]) -> str:
    """The statements under their module's docstring, which has the legend of their names, as a comment."""
    described = ast.get_docstring(ast.parse(_source(module))) or ""
    heading = "\n".join(f"# {line}".rstrip() for line in (f"--- {module} ---", *described.splitlines()))
    return "\n\n\n".join([heading, *(_statements(module)[i].source for i in sorted(numbers))])


def _need(module: str, numbers: Iterable[int], needed: _Needed) -> None:
    """Take these statements of a module, and whatever they use."""
    statements = _statements(module)
    waiting = list(numbers)
    while waiting:
        number = waiting.pop()
        statement = statements[number]
        if statement.imports or number in needed.statements[module]:
            continue
        needed.statements[module].add(number)
        for name in _names_used(module, statement.node):
            for i, other in enumerate(statements):
                if name not in other.defines:
                    continue
                if other.imports:
                    _need_import(other.node, name, needed)
                else:
                    waiting.append(i)


def _need_import(node: ast.stmt, name: str, needed: _Needed) -> None:
    assert isinstance(node, ast.Import | ast.ImportFrom)
    imported = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
    source = (imported, None) if isinstance(node, ast.Import) else (str(node.module), imported)
    if source[0].split(".")[0] not in _PROJECT:
        if needed.packages.setdefault(name, source) != source:
            raise ValueError(f"{name} is {needed.packages[name]} in one module and {source} in another: rename one")
        return
    if source[1] != name:
        raise ValueError(f"{'.'.join(filter(None, source))} is imported as {name}: import it under its own name")
    definitions = [i for i, statement in enumerate(_statements(source[0])) if name in statement.defines]
    _need(source[0], definitions, needed)


def _names_used(module: str, node: ast.stmt) -> set[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.ImportFrom) and str(inner.module).split(".")[0] in _PROJECT:
            raise ValueError(
                f"{module}, line {inner.lineno}: {inner.module} is imported in a function; import it above"
            )
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _check_names(needed: _Needed) -> None:
    owner: dict[str, str] = dict.fromkeys(needed.packages, "an import")
    for module, numbers in needed.statements.items():
        for name in {name for i in numbers for name in _statements(module)[i].defines}:
            if name in owner:
                raise ValueError(f"{name} is a name of {owner[name]} and of {module}: rename one")
            owner[name] = module


def _imported_first(module: str) -> list[str]:
    """The modules of this project that `module` imports, and theirs, each behind those that it imports itself."""
    order: dict[str, None] = {}
    for statement in _statements(module):
        if isinstance(statement.node, ast.ImportFrom) and str(statement.node.module).split(".")[0] in _PROJECT:
            order |= dict.fromkeys(_imported_first(str(statement.node.module)))
    return [*order, module]


def _import_lines(needed: _Needed) -> str:
    lines, members = [], defaultdict(list)
    for name, (package, member) in sorted(needed.packages.items()):
        renamed = "" if name == (member or package) else f" as {name}"
        if member is None:
            lines.append(f"import {package}{renamed}")
        else:
            members[package].append(f"{member}{renamed}")
    return "\n".join(
        [*sorted(lines), *(f"from {package} import {', '.join(members[package])}" for package in sorted(members))]
    )


@lru_cache
def _source(module: str) -> str:
    found = importlib.util.find_spec(module)
    assert found is not None, module
    return Path(str(found.origin)).read_text(encoding="utf-8")


@lru_cache
def _statements(module: str) -> list[_Statement]:
    source = _source(module)
    lines, end, found = source.splitlines(), 0, []
    for node in ast.parse(source).body:
        assert node.end_lineno is not None
        found.append(_Statement("\n".join(lines[end : node.end_lineno]).strip("\n"), node, frozenset(_defined(node))))
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
