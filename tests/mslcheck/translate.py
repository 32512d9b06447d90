"""From MLX's generated Metal source to C++ for OpenCL with an entry for the runtime.

Only the signature changes: template parameters become constants of the body, and a
wrapper passes buffers by number and attributes by name. Header and body stay as they
are, but for constructors of vectors; error messages name them "header" and "source".
"""

import re

_KERNEL = re.compile(
    r"(template <(?P<template>[^>]*)>\n)?"
    r"\[\[kernel\]\] void (?P<name>\w+)\(\n(?P<parameters>.*?)\) \{\n",
    re.S,
)
_INSTANCE = re.compile(
    r'\ntemplate \[\[host_name\("[^"]*"\)\]\] \[\[kernel\]\] '
    r"decltype\((\w+)<(?P<arguments>.*)>\) \w+<.*>;\n$"
)
_BUFFER = re.compile(
    r"(?P<type>(const )?(constant|device) .+?)(?P<by>[*&]) (?P<name>\w+) "
    r"\[\[buffer\((?P<index>\d+)\)\]\]"
)
_ATTRIBUTE = re.compile(r"(?P<type>uint3?) (?P<name>\w+) \[\[(?P<attribute>\w+)\]\]")
_VECTOR = re.compile(r"\b((?:u?(?:char|short|int|long)|half|float)[234])\s*\(")

_WRAPPER = """
#line 1 "wrapper"
#include "attributes.h"

extern "C" __attribute__((no_sanitize("thread"))) void msl_kernel(
    const thread ulong* buffers, const thread Attributes* attributes) {{
  {name}({arguments});
}}
"""


def translate(source: str) -> str:
    """The kernel as C++ for OpenCL; MLX's preamble comes before it."""
    kernel = _KERNEL.search(source)
    assert kernel, f"no kernel in the generated source:\n{source}"
    instance = _INSTANCE.search(source)
    header = _vectors(source[: kernel.start()])
    body = _vectors(source[kernel.end() : instance.start() if instance else None])
    constants = ""
    if kernel["template"]:
        assert instance, "a template that is not instantiated"
        constants = _constants(kernel["template"], instance["arguments"])
    parameters = [p.strip() for p in kernel["parameters"].split(",\n")]
    name = kernel["name"]
    return (
        f'#line 1 "header"\n{header}\n'
        f"__kernel void {name}({', '.join(parameters)}) {{ {constants}\n"
        f'#line 1 "source"\n{body}\n'
        + _WRAPPER.format(name=name, arguments=", ".join(map(_argument, parameters)))
    )


def _vectors(code: str) -> str:
    """See shim/metal_vector."""
    return _VECTOR.sub(r"__make_\1(", code)


def _constants(parameters: str, arguments: str) -> str:
    """`typename T, int N` and `float, 3` as declarations on one line."""
    declared: list[str] = []
    pairs = zip(parameters.split(", "), arguments.split(", "), strict=True)
    for parameter, value in pairs:
        kind, name = parameter.split()
        if kind == "typename":
            declared.append(f"using {name} = {value};")
        else:
            declared.append(f"constexpr {kind} {name} = {value};")
    return " ".join(declared)


def _argument(parameter: str) -> str:
    """What the wrapper passes for a parameter."""
    if buffer := _BUFFER.fullmatch(parameter):
        pointer = f"({buffer['type']}*)buffers[{buffer['index']}]"
        return pointer if buffer["by"] == "*" else f"*{pointer}"
    attribute = _ATTRIBUTE.fullmatch(parameter)
    assert attribute, f"unknown parameter {parameter!r}"
    value = f"attributes->{attribute['attribute']}"
    if attribute["type"] == "uint":
        return value
    return f"__make_uint3({value}[0], {value}[1], {value}[2])"
