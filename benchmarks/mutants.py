"""Mutants of a module: copies in which one operator, comparison, number, keyword, loop or handler is another one.

What may change, and into what, is Cosmic Ray's (its operators without arguments). A place of the code counts once,
however many operators could stand there instead: one of them is drawn.
"""

from __future__ import annotations

import ast
import dataclasses
import random
import warnings
from collections.abc import Collection, Iterator

from cosmic_ray import plugins  # pyright: ignore[reportMissingImports]
from cosmic_ray.ast import ast_nodes, get_ast  # pyright: ignore[reportMissingImports]
from cosmic_ray.mutating import mutate_code  # pyright: ignore[reportMissingImports]

# The first does nothing; the others need names that somebody chose.
_LEFT_OUT = {"NoOp", "VariableInserter", "VariableReplacer"}

_SIGNATURES = {"parameters", "lambdef", "param"}

Place = tuple[int, int]
"""Line from 1 and column from 0."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
      line: where it is, from 1.
      column: from 0.
      operator: Cosmic Ray's name.
      before: the line as it stands, without indentation.
      after: the same line of the mutant.
      source: the whole mutant.
    """

    line: int
    column: int
    operator: str
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        """What tells it from the other mutants of its module."""
        return f"{self.line}:{self.column} {self.operator}: {self.after}"


def draw(source: str, *, limit: int, seed: int, only: Collection[str] = (), without: Collection[str] = ()) -> Drawn:
    """A uniform sample of the places of a module, with one mutant of each.

    A place has no mutant where each is the same program: one that does not compile, or that differs in annotations or
    in what is there for type checkers alone.

    Args:
      source: of the module.
      limit: how many places are drawn at most.
      seed: decides which, and which mutant of each.
      only: qualified names of functions and classes outside of which nothing changes; none: everywhere.
      without: qualified names of those in which nothing changes.
    """
    names = _owners(source)
    lines = source.splitlines()
    plain = _skeleton(source)
    mutants: list[tuple[float, Mutant]] = []
    for (place, family), choices in sorted(_places(source).items()):
        owner = names.get(place[0], "")
        if (only and not _is_in(owner, only)) or _is_in(owner, without):
            continue
        # What is drawn for a place follows from its line, so that changes elsewhere do not matter.
        generator = random.Random(f"{seed} {family} {place[1]} {lines[place[0] - 1]}")
        order = generator.random()
        generator.shuffle(choices)
        for operator, occurrence in choices:
            mutant = _mutant(source, place, operator, occurrence)
            if mutant is not None and _skeleton(mutant.source) not in (None, plain):
                mutants.append((order, mutant))
                break
    # A smaller sample is part of a larger one.
    chosen = sorted(mutants, key=lambda pair: pair[0])[:limit]
    return Drawn(
        len(mutants), sorted((mutant for _, mutant in chosen), key=lambda mutant: (mutant.line, mutant.column))
    )


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A sample.

    Attributes:
      places: how many there are to draw from.
      mutants: those drawn, in the order of the code.
    """

    places: int
    mutants: list[Mutant]


def _places(source: str) -> dict[tuple[Place, str], list[tuple[str, int]]]:
    """What can be done at each place: operators of one family, with the number by which Cosmic Ray finds it again."""
    nodes = list(ast_nodes(get_ast(source)))
    found: dict[tuple[Place, str], list[tuple[str, int]]] = {}
    for name in plugins.operator_names():
        short = name.split("/")[-1]
        if short in _LEFT_OUT:
            continue
        operator = plugins.get_operator(name)()
        positions = [(start, node) for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, (place, node) in enumerate(positions):
            if node.type == "operator" and node.parent.type in _SIGNATURES:
                continue  # the star before keyword-only arguments, which Cosmic Ray takes for a product
            found.setdefault((place, short.split("_")[0]), []).append((name, occurrence))
    return found


def _mutant(source: str, place: Place, operator: str, occurrence: int) -> Mutant | None:
    changed = mutate_code(source, plugins.get_operator(operator)(), occurrence)
    if changed is None or changed == source:
        return None
    old, new = source.splitlines(), changed.splitlines()
    line = next(number for number, (one, other) in enumerate(zip(old, new, strict=False)) if one != other)
    return Mutant(*place, operator.split("/")[-1], old[line].strip(), new[line].strip(), changed)


def _skeleton(source: str) -> str | None:
    """A module's syntax tree without annotations and what only type checkers read.

    None where it does not compile, or not without a warning, which tests take for an error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = ast.parse(source)
            compile(tree, "<mutant>", "exec")
    except (SyntaxError, SyntaxWarning, ValueError):
        return None
    return ast.dump(_Bare().visit(tree))


class _Bare(ast.NodeTransformer):
    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        only = node.body[0]
        if isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant) and only.value.value is ...:
            return None  # a stub: an overload, or what a protocol asks for
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if any(isinstance(part, ast.Name) and part.id == "TYPE_CHECKING" for part in ast.walk(node.test)):
            return None
        return self.generic_visit(node)


def _owners(source: str) -> dict[int, str]:
    """Qualified name of the innermost function or class of every line that is in one."""
    owners: dict[int, str] = {}

    def visit(node: ast.AST, above: str) -> Iterator[None]:
        for child in ast.iter_child_nodes(node):
            name = above
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{above}.{child.name}".lstrip(".")
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                owners.update(dict.fromkeys(range(first, (child.end_lineno or first) + 1), name))
            yield from visit(child, name)

    for _ in visit(ast.parse(source), ""):
        pass
    return owners


def _is_in(owner: str, names: Collection[str]) -> bool:
    return any(owner == name or owner.startswith(f"{name}.") for name in names)
