"""What a Python package offers and what other code takes of it, both read from source: nothing is imported or run."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from typing import Protocol


class Folder(Protocol):
    """A folder or file, on disk (``pathlib.Path``) or in an archive (``zipfile.Path``)."""

    def joinpath(self, *parts: str) -> Folder: ...

    def is_file(self) -> bool: ...

    def read_text(self, encoding: str) -> str: ...


@dataclass(frozen=True)
class Use:
    """A place where code takes a name: ``torch.npu.mem_get_info(device)`` is path torch.npu.mem_get_info, 1 argument.

    Attributes:
        path: the dotted name.
        positional: arguments by position when it is called there, else None.
        keywords: arguments by name.
        where: file and line.
    """

    path: str
    positional: int | None
    keywords: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class Definition:
    """A function or class, and the module it stands in; other values have no ``node``."""

    module: str
    node: ast.FunctionDef | ast.ClassDef | None


@dataclass
class Sources:
    """The Python sources of packages under a folder."""

    root: Folder
    _modules: dict[str, ast.Module | None] = field(default_factory=dict)

    def module(self, name: str) -> ast.Module | None:
        """A module's tree; None when there is no such module, or it is not in Python."""
        if name not in self._modules:
            parts = name.split(".")
            files = (self.root.joinpath(*parts, "__init__.py"), self.root.joinpath(*parts[:-1], f"{parts[-1]}.py"))
            text = next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)
            self._modules[name] = None if text is None else ast.parse(text)
        return self._modules[name]

    def find(self, path: str) -> Definition | None:
        """What a dotted name stands for; None when the sources have no such name."""
        module, _, name = path.rpartition(".")
        if self.module(module) is not None:
            return self._top_level(module, name)
        owner = self.find(module) if module else None
        return self._member(owner, name) if owner is not None and isinstance(owner.node, ast.ClassDef) else None

    def _top_level(self, module: str, name: str) -> Definition | None:
        for statement in reversed(list(_statements(self.module(module)))):
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) and statement.name == name:
                return Definition(module, statement)
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and name in _targets(statement):
                return Definition(module, None)
            if isinstance(statement, ast.ImportFrom):
                found = self._imported(module, statement, name)
                if found is not None:
                    return found
        return Definition(f"{module}.{name}", None) if self.module(f"{module}.{name}") is not None else None

    def _imported(self, module: str, statement: ast.ImportFrom, name: str) -> Definition | None:
        source = self._absolute(module, statement)
        for alias in statement.names:
            if alias.name == "*" and self.module(source) is not None and name in self._public(source):
                return self._top_level(source, name)
            if (alias.asname or alias.name) == name:
                submodule = f"{source}.{alias.name}"
                if self.module(source) is None or self.module(submodule) is not None:
                    return Definition(submodule, None)
                return self._top_level(source, alias.name)
        return None

    def _absolute(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        package = module.split(".")
        if not self.root.joinpath(*package, "__init__.py").is_file():
            package = package[:-1]
        package = package[: len(package) - statement.level + 1]
        return ".".join([*package, *([statement.module] if statement.module else [])])

    def _public(self, module: str) -> set[str]:
        names: set[str] = set()
        for statement in _statements(self.module(module)):
            if isinstance(statement, ast.Assign) and "__all__" in _targets(statement):
                return set(ast.literal_eval(statement.value))
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                names.add(statement.name)
        return {name for name in names if not name.startswith("_")}

    def _member(self, owner: Definition, name: str) -> Definition | None:
        assert isinstance(owner.node, ast.ClassDef)
        for statement in owner.node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == name:
                return Definition(owner.module, statement)
        for base in owner.node.bases:
            found = self.find(f"{owner.module}.{base.id}") if isinstance(base, ast.Name) else None
            inherited = self._member(found, name) if found and isinstance(found.node, ast.ClassDef) else None
            if inherited is not None:
                return inherited
        return None

    def signature(self, definition: Definition, *, bound: bool = False) -> Signature | None:
        """How a function or class is called; ``bound`` leaves the first parameter out. None when nobody can say."""
        node = definition.node
        if isinstance(node, ast.ClassDef):
            makers = (self._member(definition, name) for name in ("__init__", "__new__"))
            made = next((maker for maker in makers if maker is not None and _takes_more(maker)), None)
            return Signature() if made is None else self.signature(made, bound=True)
        return None if node is None else _signature(node.args, skip=int(bound))

    def returned_class(self, path: str) -> str | None:
        """The class, as a dotted name, of which a function returns an instance; the class itself for a class."""
        definition = self.find(path)
        if definition is None or isinstance(definition.node, ast.ClassDef):
            return path if definition else None
        for node in ast.walk(definition.node) if definition.node else ():
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
                name = dotted(node.value.func)
                for candidate in (name, f"{definition.module}.{name}", f"{path.rpartition('.')[0]}.{name}"):
                    found = self.find(candidate) if candidate and "." in candidate else None
                    if found is not None and isinstance(found.node, ast.ClassDef):
                        return candidate
        return None


def accepts(signature: Signature, use: Use) -> str | None:
    """Why a call does not fit a signature, or None."""
    assert use.positional is not None
    try:
        signature.bind(*[None] * use.positional, **dict.fromkeys(use.keywords))
    except TypeError as error:
        return str(error)
    return None


def dotted(node: ast.expr) -> str | None:
    """``a.b.c`` of an expression that is a dotted name, else None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return None if owner is None else f"{owner}.{node.attr}"
    return None


def use_of(path: str, node: ast.AST, parent: ast.AST | None, where: str) -> Use:
    """Makes a use, with its arguments when ``parent`` is its call."""
    if not isinstance(parent, ast.Call) or parent.func is not node:
        return Use(path, None, (), where)
    starred = any(isinstance(argument, ast.Starred) for argument in parent.args)
    if starred or any(keyword.arg is None for keyword in parent.keywords):
        return Use(path, None, (), where)
    return Use(path, len(parent.args), tuple(keyword.arg for keyword in parent.keywords if keyword.arg), where)


def with_parents(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """Every node of a tree with the one above it."""
    above: dict[ast.AST, ast.AST] = {}
    for node in ast.walk(tree):
        yield node, above.get(node)
        above.update((child, node) for child in ast.iter_child_nodes(node))


def _statements(tree: ast.AST | None) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported, those in branches included."""
    body: Iterable[ast.AST] = [] if tree is None else ast.iter_child_nodes(tree)
    for node in body:
        if isinstance(node, ast.stmt):
            yield node
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            yield from _statements(node)


def _targets(statement: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def _takes_more(maker: Definition) -> bool:
    assert isinstance(maker.node, ast.FunctionDef)
    arguments = maker.node.args
    return len(arguments.args) > 1 or bool(arguments.kwonlyargs or arguments.vararg or arguments.kwarg)


def _signature(arguments: ast.arguments, skip: int) -> Signature:
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    made = [
        Parameter(
            argument.arg,
            Parameter.POSITIONAL_ONLY if index < len(arguments.posonlyargs) else Parameter.POSITIONAL_OR_KEYWORD,
            default=Parameter.empty if index < required else None,
        )
        for index, argument in enumerate(positional)
    ]
    if arguments.vararg:
        made.append(Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        empty = Parameter.empty if default is None else None
        made.append(Parameter(argument.arg, Parameter.KEYWORD_ONLY, default=empty))
    if arguments.kwarg:
        made.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(made[skip:])
