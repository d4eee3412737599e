"""Jinja programs from strangers, run so that they end: in bounded steps, memory and time, whatever they say.

Jinja's immutable sandbox keeps a template away from the machine, not from its time and memory: nested empty loops never
end, `'x' * 10**9` fills the memory in one step, and `[x, x]` taken forty times prints for ever. So every step is counted
here against `template_budget.Budget`. The syntax tree is rewritten before it is compiled: each loop turn, literal, slice,
`~` and comparison passes through a counter. Operators, calls, filters, tests and output have hooks of Jinja's own.

Methods and filters are allowed by name. What cannot be bounded simply (`lipsum`, `urlize`, `wordwrap`, `pprint`, `sum`, ...)
is left out; no published chat template needs it.
"""

import functools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.filters import FILTERS
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from shoal.errors import TokenizerError
from shoal.text import template_budget as budget

MAX_TEMPLATE_CHARS = 100_000
MAX_TEMPLATE_NODES = 20_000
MAX_OUTPUT_CHARS = 20_000_000


class BoundedTemplate:
    """A compiled template. One object serves several threads at once.

    Raises:
        TokenizerError: the source is no valid template, or too large.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TokenizerError(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARS} are accepted."
            )
        try:
            self._template = _compile(source)
        except TokenizerError:
            raise
        except Exception as error:  # deep nesting and huge numbers make parser and compiler fail in several ways
            raise TokenizerError(
                f"the chat template is not valid Jinja: {_short(error) or type(error).__name__}."
            ) from error

    def render(self, values: Mapping[str, Any]) -> str:
        """The output.

        Raises:
            TokenizerError: the template refuses the values, fails, or runs past its limits.
        """
        token, parts, length = budget.running.set(budget.Budget()), [], 0
        try:
            for part in self._template.generate(**values):
                parts.append(part)
                length += len(part)
                if length > MAX_OUTPUT_CHARS:
                    raise budget.too_much(f"more than {MAX_OUTPUT_CHARS} characters of output")
        except TokenizerError:
            raise
        except Exception as error:  # a foreign program may fail in any way
            raise TokenizerError(
                f"the chat template failed on these messages: {type(error).__name__}: {_short(error)}."
            ) from error
        finally:
            budget.running.reset(token)
        return "".join(parts)


class JsonText(str):
    """Text that is JSON already: `tojson` hands it on as it is, whether a template pastes it or converts it."""


def _compile(source: str) -> jinja2.Template:
    environment = _Environment()
    tree = environment.parse(source)
    if sum(1 for _ in tree.find_all(nodes.Node)) > MAX_TEMPLATE_NODES:
        raise TokenizerError(f"the chat template has more than {MAX_TEMPLATE_NODES} parts; use a simpler one.")
    counted: nodes.Template = _Counting().visit(tree)
    counted.set_environment(environment)
    return environment.from_string(counted)


class _Counting(NodeTransformer):
    """Puts counters into a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _count(node))
        if node.test is not None:
            node.test = nodes.And(_through(TURN, nodes.Const(0), node), node.test, lineno=node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        self.generic_visit(node)
        written = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        return [_count(node, written), node] if written else [node]

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        first = node.ops[0]
        # Equality with a constant looks no deeper than the constant is.
        if len(node.ops) > 1 or first.op not in ("eq", "ne") or not isinstance(first.expr, nodes.Const):
            node.expr = _through(MEASURED, node.expr, node)
            for operand in node.ops:
                operand.expr = _through(MEASURED, operand.expr, node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_through(COPIED, part, node) for part in node.nodes]
        return _through(CREATED, node, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through(CREATED, node, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _through(CREATED, node, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _through(CREATED, node, node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = _through(MEASURED, pair.key, node)
        return _through(CREATED, node, node)


# The counters are filters whose names hold a space, so that no template can spell them; called by name through `map` they
# only count more.
TURN, MEASURED, COPIED, CREATED = "shoal turn", "shoal measured", "shoal copied", "shoal created"


def _through(name: str, value: nodes.Expr, place: nodes.Node) -> nodes.Expr:
    return nodes.Filter(value, name, [], [], None, None, lineno=place.lineno)


def _count(place: nodes.Node, chars: int = 0) -> nodes.Stmt:
    return nodes.ExprStmt(_through(TURN, nodes.Const(chars), place), lineno=place.lineno)


def _turn(chars: int) -> bool:
    budget.running.get().spend(1, max(0, chars))
    return True


def _measured(value: Any) -> Any:
    """Before a value is compared or hashed."""
    budget.running.get().spend()
    budget.measure(value)
    return value


def _copied(value: Any) -> Any:
    """Before a value becomes part of a text."""
    size = budget.measure(value)
    budget.running.get().spend(1 + size.entries, size.chars)
    return value


@jinja2.pass_context  # keeps Jinja from computing outputs while compiling
def _output(_: Context, value: Any) -> Any:
    return budget.created(value) if isinstance(value, str) else _copied(value)


TEXT_METHODS = (
    "capitalize casefold center count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit "
    "islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind "
    "rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill"
)

METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, frozenset(TEXT_METHODS.split())),
    (dict, frozenset({"get", "items", "keys", "values", "copy"})),
    (list, frozenset({"index", "count", "copy"})),
    (tuple, frozenset({"index", "count", "grouper", "list"})),
)
"""What may be asked of plain values; the last two are the fields of a `groupby` entry."""

OBJECTS = (LoopContext, Macro, Namespace, TemplateReference, BlockReference, jinja2.Undefined)

LOOKING_FILTERS = "attr count d default first items last length map reject rejectattr select selectattr"
"""Filters that hand on what they are given, or one entry of it, without walking into it."""

WORKING_FILTERS = (
    "abs batch capitalize center dictsort e escape float forceescape format groupby indent int join lower max min replace "
    "reverse round safe slice sort string title trim truncate unique upper urlencode wordcount"
)
"""Filters that walk their value or make a new one."""

WORK_STEPS = 4
"""What measuring takes, in turns of an empty loop."""

LOOKING_TESTS = (
    "defined undefined none boolean false true string mapping number integer float sequence iterable callable sameas filter "
    "test escaped"
)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with every operation counted."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        # Without the optimizer nothing is computed while compiling, when no budget runs yet.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_output,
            extensions=["jinja2.ext.loopcontrols"],
        )
        self.globals = {
            "range": budget.bounded_range,
            "raise_exception": _refuse,
            "dict": dict,
            "namespace": Namespace,
        }
        self.filters = {name: _looking(name, FILTERS[name]) for name in LOOKING_FILTERS.split()}
        self.filters |= {name: _working(name, FILTERS[name]) for name in WORKING_FILTERS.split()}
        self.filters |= {"list": _list, "tojson": _to_json}
        self.filters |= {TURN: _turn, MEASURED: _measured, COPIED: _copied, CREATED: budget.created}
        self.tests = {
            name: _looking(name, test) if name in LOOKING_TESTS.split() else _working(name, test)
            for name, test in cast("dict[str, Callable[..., Any]]", TESTS).items()
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Only what is listed; every other attribute is out of reach."""
        for kind, names in METHODS:
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, OBJECTS) and super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An entry; a key is hashed, which walks it."""
        if not isinstance(argument, (str, int)):
            budget.measure(argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operation."""
        budget.check_operation(operator, left, right)
        return budget.created(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call. Macros and recursive loops count their own steps; anything else has its arguments measured."""
        budget.running.get().spend(1 + len(args) + len(kwargs))
        if not isinstance(__obj, (Macro, LoopContext, BlockReference)):
            args = tuple(budget.settled(value) for value in args)
            added = ("_loop_vars", "_block_vars", "caller")  # by the compiler
            budget.measure(args, [value for name, value in kwargs.items() if name not in added])
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str):
                budget.check_method(owner, __obj.__name__, args)
            elif isinstance(owner, (list, tuple)):
                budget.measure(owner)
        return budget.created(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with every field bounded and paid for."""
        if super().wrap_str_format(value) is None:
            return None
        text: str = value.__self__
        formatter = _EscapeFormatter(self, escape=text.escape) if isinstance(text, Markup) else _Formatter(self)

        def bounded(*args: Any, **kwargs: Any) -> str:
            values = args[0] if value.__name__ == "format_map" else kwargs
            return type(text)(formatter.vformat(text, () if values is not kwargs else args, values))

        return bounded


class _Formatter(SandboxedFormatter):
    """Fields of bounded width, each paid for."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        budget.measure(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        budget.measure(value, format_spec)
        for digits in re.findall(r"\d+", format_spec):
            budget.bounded_width(digits)
        return budget.created(super().format_field(value, format_spec))


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    """The same for text marked safe."""


def _looking(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that hands on; paid for, not measured."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0
    estimate = budget.ESTIMATES.get(name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        budget.running.get().spend()
        if estimate is not None:
            estimate(*args[first:], **kwargs)
        result = function(*args, **kwargs)
        is_new = isinstance(result, Iterator) and not isinstance(result, (budget.Paid, LoopContext))
        return budget.chained(result, args) if is_new else result

    return _passing(function, counted)


def _working(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that is measured, estimated and paid for."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0
    estimate = budget.ESTIMATES.get(name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        budget.running.get().spend(WORK_STEPS)
        args = tuple(budget.settled(value) for value in args)
        budget.measure(args, list(kwargs.values()))
        if estimate is not None:
            budget.check_chars(estimate(*args[first:], **kwargs))
        return budget.created(function(*args, **kwargs))

    return _passing(function, counted)


def _passing(function: Callable[..., Any], counted: Callable[..., Any]) -> Callable[..., Any]:
    """`counted` marked to be given the same first argument by Jinja (context, environment, none) as `function`."""
    return functools.update_wrapper(counted, function) if hasattr(function, "jinja_pass_arg") else counted


def _list(value: Any) -> list[Any]:
    if isinstance(value, Collection):
        budget.running.get().spend(len(value))
        return list(value)
    return list(budget.Paid(iter(value)))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' chat templates write it: not sorted, not escaped for HTML."""
    if isinstance(value, JsonText):
        return value
    budget.check_chars(budget.json_chars(value, indent=indent, separators=separators))
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    budget.created(text)
    return text


def _refuse(message: str) -> None:
    raise TokenizerError(f"the chat template refuses these messages: {_short(message)}")


def _short(message: object) -> str:
    text = str(message)
    return text if len(text) <= 500 else text[:500] + "..."
