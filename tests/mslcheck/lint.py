"""What is wrong in Metal and right in C++ for OpenCL, so the compiler cannot see it."""

import re
from collections.abc import Iterator

from .findings import Finding, Kind

_MAX_BUFFERS = 31
_RULES = [
    (r"\bdouble\b", "Metal has no double"),
    (r"\bstd::", "Metal has no std::"),
    (r"\b(printf|assert)\s*\(", "Metal has neither printf nor assert"),
    (
        r"\b(goto|new|delete|virtual|dynamic_cast|typeid|throw|try|catch|thread_local"
        r"|noexcept|register)\b",
        "not in Metal",
    ),
    (r"\[[=&\w, ]*\]\s*\([^)]*\)\s*(->[^{]*)?\{", "no lambdas before Metal 4"),
    (
        r"memory_order_(acquire|release|acq_rel|seq_cst)",
        "before Metal 3.2 there is only memory_order_relaxed",
    ),
]
_COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(\\.|[^"\\])*"', re.S)
_ATTRIBUTE = re.compile(r"^ *(?:const )?uint3? \w+ \[\[(\w+)\]\]", re.M)
_DECLARED = r"\b(?:auto|const|int|size_t|u?short|uint[23]?)\s+{name}\b(?!\s*\[\[)"

_SPACES = ("device", "constant", "threadgroup", "thread")
_WORDS = rf"(?:(?:{'|'.join(_SPACES)}|const|volatile)\s+)*"
_SCALARS = (
    r"bool|size_t|bfloat(?:16_t)?|atomic_(?:u?int|float)|u?int(?:8|16|32|64)_t"
    r"|(?:u?(?:char|short|int|long)|half|float)[234]?"
)
_TYPE_PARAMETER = re.compile(r"\b(?:typename|class) (\w+)")


def lint(source: str) -> list[Finding]:
    """Findings in a kernel's generated source."""
    return [Finding(Kind.LINT, message) for message in _messages(source)]


def _messages(source: str) -> Iterator[str]:
    code = _COMMENT_OR_STRING.sub(" ", source)
    if not source.isascii():
        # MLX hands it over as NSASCIIStringEncoding.
        yield "characters outside of ASCII, even in a comment, do not compile"
    for pattern, why in _RULES:
        if match := re.search(pattern, code):
            yield f"{why}: {match[0]!r}"
    buffers = source.count("[[buffer(")
    if buffers > _MAX_BUFFERS:
        yield f"{buffers} buffers; Metal has {_MAX_BUFFERS}"
    for name in _ATTRIBUTE.findall(source):
        # MLX adds a parameter for any occurrence of an attribute's name.
        if re.search(_DECLARED.format(name=name), code):
            yield f"the variable {name} collides with MLX's parameter"
    types = "|".join([_SCALARS, *set(_TYPE_PARAMETER.findall(code))])
    # `float& x`: OpenCL takes what has no address space for a thread's own.
    for match in re.finditer(rf"\b{_WORDS}(?:{types})\s*[*&](?![&=])\s*\w*", code):
        if not any(word in match[0].split() for word in _SPACES):
            yield f"a pointer or reference without address space: {match[0]!r}"
