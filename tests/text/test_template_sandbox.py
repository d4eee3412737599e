"""Hostile templates end quickly and small; honest ones print what Jinja prints."""

import json
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import jinja2.sandbox
import pytest

from shoal.errors import TokenizerError
from shoal.text.template_sandbox import BoundedTemplate

MESSAGES = [{"role": "user", "content": "hello, World"}, {"role": "assistant", "content": "a < b\nc"}]
DOUBLED = "{% set ns = namespace(v=[1]) %}{% for i in range(60) %}{% set ns.v = MADE %}{% endfor %}"

ENDLESS = {
    "empty loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that filter all": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for a in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a macro of macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a block of itself": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "a filter that selects none": "{% for a in range(99999) %}{{ range(9999) | select('lt', 0) | list }}{% endfor %}",
    "attributes of many parts": "{{ range(99999) | map(attribute='" + "a." * 5000 + "') | list }}",
    "a chain of filters": "{% set ns = namespace(g=[1]) %}{% for i in range(9999) %}{% set ns.g = ns.g | map('int') %}"
    "{% endfor %}{{ ns.g | list }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a large number": "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "rounding": "{{ 1 | round(10 ** 9, 'ceil') }}",
    "printing what doubles": DOUBLED.replace("MADE", "[ns.v, ns.v]") + "{{ ns.v }}",
    "joining what doubles": DOUBLED.replace("MADE", "[ns.v, ns.v]") + "{{ '' ~ ns.v }}",
    "comparing what doubles": DOUBLED.replace("MADE", "[ns.v, ns.v]")
    + "{% set a = ns.v %}"
    + DOUBLED.replace("MADE", "[ns.v, ns.v]")
    + "{{ a == ns.v }}",
    "hashing what doubles": DOUBLED.replace("[1]", "(1,)").replace("MADE", "(ns.v, ns.v)") + "{{ {ns.v: 1} }}",
    "looking up what doubles": DOUBLED.replace("[1]", "(1,)").replace("MADE", "(ns.v, ns.v)") + "{{ {}[ns.v] }}",
    "deep tuples": "{% set ns = namespace(v=()) %}{% for i in range(99999) %}{% set ns.v = (ns.v,) %}{% endfor %}"
    "{{ {ns.v: 1} }}",
    "a search from the end": "{{ ('a' * 999999).rfind('ab' + 'a' * 500000) }}",
    "colliding hashes": "{{ range(0, 99999 * 2305843009213693951, 2305843009213693951) | unique | list | length }}",
}

LARGE = {
    "times": "{{ 'x' * 300000000 }}",
    "times twice": "{% set a = 30000 %}{{ 'x' * a * a }}",
    "times from the right": "{{ 300000000 * 'x' }}",
    "a list times": "{{ ([1] * 300000000) | length }}",
    "concatenation": "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(30) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "one wide concatenation": "{% set s = 'x' * 1999999 %}{{ " + "~".join(["s"] * 500) + " }}",
    "addition": "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(30) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "slices": "{% set s = 'x' * 1999999 %}{{ [" + ",".join(["s[1:]"] * 500) + "] | length }}",
    "center": "{{ 'x' | center(10 ** 9) }}",
    "center by name": "{{ 'x' | center(width=10 ** 9) }}",
    "the method center": "{{ 'x'.center(10 ** 9) }}",
    "zfill": "{{ 'x'.zfill(10 ** 9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 9, 'big') }}",
    "indent": "{{ ('x\n' * 9999) | indent(10 ** 8) }}",
    "indent by text": "{{ ('x\n' * 9999) | indent('x' * 99999) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent with a key": "{{ '%((a))1000000000d' % {'(a)': 1} }}",
    "percent with a star": "{{ '%*d' % (10 ** 9, 1) }}",
    "percent precision": "{{ '%.1000000000f' % 1 }}",
    "percent again and again": "{{ ('%99999d' * 999) % ((1,) * 999) }}",
    "the filter format": "{{ '%1000000000d' | format(1) }}",
    "format": "{{ '{:1000000000d}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "format of one large value": "{{ ('{0}' * 9999).format('x' * 99999) }}",
    "format_map": "{{ '{a:1000000000d}'.format_map({'a': 1}) }}",
    "a test that formats": "{{ '%1000000000d' is odd }}",
    "rounding a text": "{{ 'x' | round(9, 'ceil') }}",
    "join": "{{ (['x'] * 99999) | join('y' * 99999) }}",
    "the method join": "{{ ('y' * 99999).join(['x'] * 99999) }}",
    "join of a map": "{{ ([{'a': 'x' * 99999}] * 9999) | map(attribute='a') | join }}",
    "replace": "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "the method replace": "{{ ('x' * 99999).replace('', 'y' * 99999) }}",
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "slice": "{{ [1] | slice(10 ** 9) | list | length }}",
    "text of a loop": "{% set s %}{% for a in range(99999) %}" + "x" * 50_000 + "{% endfor %}{% endset %}",
    "text of a macro": "{% macro m() %}{% for a in range(9999) %}"
    + "x" * 50_000
    + "{% endfor %}{% endmacro %}{{ m() | length }}",
    "blocks that double": "{% set s = 'xxxxxxxx' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 30,
    "kept strings": "{% set ns = namespace(l=[]) %}{% for i in range(999) %}{% set ns.l = ns.l + ['x' * 999999] %}{% endfor %}",
    "kept lists": "{% set ns = namespace(l=[]) %}{% for i in range(999) %}{% set ns.l = ns.l + [range(99999) | list] %}"
    "{% endfor %}",
    "json indent": "{{ ([[1] * 9] * 9999) | tojson(indent=10 ** 7) }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 7) }}",
    "a constant": "{% autoescape 'x' | center(10 ** 9) %}{% endautoescape %}{{ 'x' | center(10 ** 9) }}",
    "a dictionary from keys": "{{ dict.fromkeys(range(99999), 1) }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_templates_that_would_not_end_are_stopped(source):
    started_s = time.monotonic()
    with pytest.raises(TokenizerError):
        BoundedTemplate(source).render({"messages": MESSAGES})
    assert time.monotonic() - started_s < 8


@pytest.mark.parametrize("source", LARGE.values(), ids=LARGE)
def test_large_values_are_refused_before_they_exist(source):
    tracemalloc.start()
    try:
        with pytest.raises(TokenizerError):
            BoundedTemplate(source).render({"messages": MESSAGES})
        assert tracemalloc.get_traced_memory()[1] < 250_000_000
    finally:
        tracemalloc.stop()


HONEST = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ m.role }}: {{ m['content'] | trim }}{% endfor %}",
    "{% for m in messages if m.role != 'user' %}{{ loop.first }}{{ loop.last }}{{ m.content }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.s = ns.s ~ m.role ~ ns.n %}"
    "{% endfor %}{{ ns.s }}|{{ ns.n * 2 - 1 }}|{{ 7 // 2 }}|{{ 2 ** 5 }}|{{ 7 % 4 }}|{{ -ns.n / 4 }}",
    "{% macro turn(m, mark='#') %}{{ mark }}{{ m.content }}{{ varargs }}{{ kwargs }}{% endmacro %}"
    "{{ turn(messages[0]) }}{{ turn(messages[1], '@', 1, a=2) }}",
    "{% macro outer() %}<{{ caller(3) }}>{% endmacro %}{% call(n) outer() %}{{ n }}{% endcall %}",
    "{% for n in [1, [2, [3]]] recursive %}{{ n if n is number else loop(n) }};{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ (messages | rejectattr('role', 'in', ['user', 'tool']) | first).content }} {{ messages[1:][0].role }} {{ messages[::-1] }}",
    "{{ messages[0].items() | list }} {{ messages[0] | dictsort }} {{ messages[0] | items | list }} {{ messages[0].get('x', 'y') }}",
    "{{ 'a-b-c'.split('-')[-1] }}{{ 'x</think>y'.split('</think>') }}{{ ' a '.strip() }}{{ 'ab'.replace('a', 'c') }}"
    "{{ 'ab'.upper() }}{{ 'ab'.startswith('a') }}{{ 'a\nb' | indent(2, true) }}{{ 'ab' | replace('b', 'cc') }}{{ 'x'.center(5) }}",
    "{{ '%s has %05.1f (%d %%)' % ('a', 2.5, 3) }}{{ '%(k)s' % {'k': 1} }}{{ '{:>5}|{a[0]}|{!r}'.format(1, 'q', a=[2]) }}"
    "{{ '%s-%s' | format('a', 'b') }}{{ '{a}'.format_map({'a': 1}) }}",
    "{{ [3, 1, 2] | sort }}{{ [1, 1, 2] | unique | list }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}"
    "{{ [3, 1] | max }}{{ 2.567 | round(2) }}{{ '7' | int }}{{ none | default('d', true) }}{{ 'abc' | reverse }}{{ [1, 2] | reverse | list }}",
    "{% for g in messages | groupby('role') %}{{ g.grouper }}{{ g.list | length }}{% endfor %}",
    "{{ messages | tojson }}{{ {'b': '<é>', 'a': [1, {}]} | tojson(indent=2) }}{{ 'a<b' | e }}{{ 'a<b' | safe }}{{ '<' ~ ('a' | safe) }}",
    "{% set a, b = 1, 2 %}{{ (a, b) }}{{ a < b <= 2 }}{{ a in [1] }}{{ 'x' not in 'yz' }}{{ a == b or not b }}{{ {'k': a}['k'] }}",
    "{% if tools is none and x is not defined and messages is iterable and messages[0] is mapping %}{{ 3 is odd }}{% endif %}",
    "{% set s %}a{{ 1 }}b{% endset %}{{ s | upper }}{% filter upper %}q{{ s }}{% endfilter %}{% with z = 3 %}{{ z }}{% endwith %}",
    "{% block b %}{{ messages[0].role }}{% endblock %}{{ self.b() }}{{ loop is defined }}{{ dict(a=1).a }}{{ range(3) | list }}",
    "{% for m in messages %}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{{ loop.previtem is defined }}{% endfor %}",
    "{% if messages | selectattr('role', 'equalto', 'nobody') %}a generator is true{% endif %}",
]


def plain_jinja(source: str) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(source).render(messages=MESSAGES, tools=None)


@pytest.mark.parametrize("source", HONEST)
def test_honest_templates_print_what_jinja_prints(source):
    assert BoundedTemplate(source).render({"messages": MESSAGES, "tools": None}) == plain_jinja(source)


def test_every_render_has_its_own_budget(monkeypatch):
    monkeypatch.setattr("shoal.text.template_budget.MAX_STEPS", 3000)
    template = BoundedTemplate("{% for i in range(n) %}{{ i }}{% endfor %}")
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda _: template.render({"n": 900}), range(12)))
    assert outputs == ["".join(map(str, range(900)))] * 12
    with pytest.raises(TokenizerError, match="more than 3000 steps"):
        template.render({"n": 2000})


def test_long_conversations_stay_within_the_limits():
    source = "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<u>' + m['content'] | trim }}{% else %}{{ m['content'].split('x')[-1] }}{% endif %}{% endfor %}"
    conversation = [{"role": "user", "content": "abc " * 100}, {"role": "assistant", "content": "def " * 100}] * 2000
    assert len(BoundedTemplate(source).render({"messages": conversation})) > 1_600_000 - 4000


@pytest.mark.parametrize(
    "source",
    [
        "{{" + "(" * 20_000 + "1" + ")" * 20_000 + "}}",
        "{{ a" + ".a" * 9_000 + "}}",
        "{{ " + "9" * 9_000 + " }}",
        "{{ a" + "~a" * 20_000 + " }}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "x" * 100_001,
    ],
)
def test_sources_too_deep_or_large_are_refused(source):
    with pytest.raises(TokenizerError, match="chat template"):
        BoundedTemplate(source)
