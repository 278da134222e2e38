"""Every call that our code makes of another package, read from its source, and whether a signature takes it.

For packages that cannot be imported here: the Neuron SDK's are on no public index. Calls are found by their imports:
`from a.b import c` and c(…), `import a.b as d` and d.c(…). A method of an object that such a call gave is not seen.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class VendorCall:
    """One call. `positional` is None where the call unpacks a sequence, `more_keywords` true where it unpacks a map."""

    module: str
    name: str
    """The name below `module`, dotted where it is an attribute of a class or of a submodule."""
    positional: int | None
    keywords: tuple[str, ...]
    more_keywords: bool
    place: str
    """file:line of the call."""

    def __str__(self) -> str:
        return f"{self.place} {self.module}.{self.name}"


@dataclass(frozen=True)
class Signature:
    """What a function takes beside self: names by position, names by keyword only, and how many must be given."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    any_positional: bool = False
    any_keyword: bool = False


def vendor_calls(files: Collection[Path], packages: Collection[str]) -> list[VendorCall]:
    """All calls in `files` of what is imported from the top-level `packages`, in the order of the text."""
    return [call for file in sorted(files) for call in _calls_of(file, packages)]


def vendor_names(files: Collection[Path], packages: Collection[str]) -> list[tuple[str, str, str]]:
    """(module, name, file:line) of every `from module import name` of these packages, called or not."""
    found = []
    for file in sorted(files):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in packages:
                found += [(node.module, alias.name, f"{file.name}:{node.lineno}") for alias in node.names]
    return found


def _calls_of(file: Path, packages: Collection[str]) -> Iterator[VendorCall]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    places: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in packages:
            places |= {alias.asname or alias.name: f"{node.module}:{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in packages:
                    root = alias.name if alias.asname else alias.name.partition(".")[0]
                    places[alias.asname or root] = f"{root}:"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            root, *attributes = _dotted(node.func)
            if root not in places:
                continue
            module, _, name = places[root].partition(":")
            starred = any(isinstance(each, ast.Starred) for each in node.args)
            yield VendorCall(
                module,
                ".".join(part for part in (name, *attributes) if part),
                None if starred else len(node.args),
                tuple(each.arg for each in node.keywords if each.arg is not None),
                any(each.arg is None for each in node.keywords),
                f"{file.name}:{node.lineno}",
            )


def _dotted(node: ast.expr) -> list[str]:
    """The parts of a.b.c; [""] for what is no chain of names."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [*_dotted(node.value), node.attr]
    return [""]


def refusals(call: VendorCall, signature: Signature) -> list[str]:
    """Why `signature` does not take the call: each a sentence; empty when it does."""
    problems = []
    taken = {*signature.positional, *signature.keyword_only}
    if not signature.any_keyword:
        problems += [f"{call}: it takes no argument {name}" for name in call.keywords if name not in taken]
    given: set[str] = set(call.keywords)
    if call.positional is not None:
        given |= set(signature.positional[: call.positional])
        if call.positional > len(signature.positional) and not signature.any_positional:
            problems.append(
                f"{call}: it takes {len(signature.positional)} arguments by position, not {call.positional}"
            )
        if not call.more_keywords:
            missing = sorted(signature.required - given)
            problems += [f"{call}: it needs {name} too" for name in missing]
    return problems


def source_signature(root: Path, module: str, name: str) -> Signature | None:
    """The signature of module.name as the source below `root` has it; None where there is no such name.

    Follows `from x import name` within the same package. Of a class it is __init__'s, or its base's where it has none
    in the package; a class without either, and what is no function at all, takes anything.
    """
    first, *rest = name.split(".")
    file = _module_file(root, module)
    if file is None:
        return None
    if rest and _module_file(root, f"{module}.{first}") is not None and _definition(file, first) is None:
        return source_signature(root, f"{module}.{first}", ".".join(rest))
    node = _definition(file, first)
    if node is None:
        return _reexported(root, module, file, name)
    if isinstance(node, ast.ClassDef):
        return _class_signature(root, module, file, node, rest)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return _of_arguments(node.args, skip_self=False)
    return _ANYTHING


_ANYTHING = Signature((), any_positional=True, any_keyword=True)


def _module_file(root: Path, module: str) -> Path | None:
    path = root.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _definition(file: Path, name: str) -> ast.stmt | None:
    """The last statement of a module that defines `name`, conditional ones included."""
    found: ast.stmt | None = None
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and node.name == name
            and node.col_offset == 0
        ):
            found = node
        elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            found = found or node
    return found


def _reexported(root: Path, module: str, file: Path, name: str) -> Signature | None:
    first = name.partition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) != first:
                continue
            base = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
            parents = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            return source_signature(root, origin, name.replace(first, alias.name, 1))
    return None


def _class_signature(root: Path, module: str, file: Path, node: ast.ClassDef, rest: list[str]) -> Signature | None:
    method = rest[0] if rest else "__init__"
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == method:
            static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in each.decorator_list)
            return _of_arguments(each.args, skip_self=not static)
    for base in node.bases:
        inherited = source_signature(root, module, ".".join([*_dotted(base), *rest]))
        if inherited is not None:
            return inherited
    return None if rest else _ANYTHING


def _of_arguments(arguments: ast.arguments, *, skip_self: bool) -> Signature:
    positional = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    with_default = set(positional[len(positional) - len(arguments.defaults) :])
    keyword_only = [each.arg for each in arguments.kwonlyargs]
    with_default |= {
        each.arg for each, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None
    }
    if skip_self:
        positional = positional[1:]
    return Signature(
        tuple(positional),
        tuple(keyword_only),
        frozenset({*positional, *keyword_only} - with_default),
        arguments.vararg is not None,
        arguments.kwarg is not None,
    )
