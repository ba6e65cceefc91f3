"""Parse PTX text into instructions."""

import re
from dataclasses import dataclass
from typing import Any

import ptx_async  # noqa: F401  fills OPS
from ptx_ops import OPS, Op


@dataclass(slots=True)
class Instruction:
    text: str
    parts: list[str]
    operands: list[str]
    predicate: str | None
    negated: bool
    label: tuple[str, int] | None  # of a branch: the name and the scope it is written in
    run: Op | None


@dataclass
class Program:
    instructions: list[Instruction]
    labels: dict[tuple[str, int], int]
    parameters: list[str]  # names
    shared: int
    warps: int
    boxes: list[dict[str, Any]]  # of TMA descriptors: "block_size", "swizzle"


def parse(ptx: str) -> tuple[list[Instruction], dict[tuple[str, int], int], list[str]]:
    """The instructions, label positions and parameter names of the one entry."""
    ptx = re.sub(r"//.*", "", ptx)
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)[^{]*\{", ptx, re.S)
    assert entry is not None
    instructions: list[Instruction] = []
    labels: dict[tuple[str, int], int] = {}
    scopes, opened, statement = [0], 0, ""
    for line in ptx[entry.end() :].splitlines():
        line = line.strip()
        if line == "{":  # inline assembly, whose labels are local
            opened += 1
            scopes.append(opened)
            continue
        if line == "}":
            scopes.pop()
            if not scopes:
                break
            continue
        while line:
            label = re.match(r"([$\w]+):\s*", line)
            if label and not statement:
                labels[_scoped(label[1], scopes[-1])] = len(instructions)
                line = line[label.end() :]
                continue
            piece, end, line = line.partition(";")
            statement, line = f"{statement} {piece}".strip(), line.strip()
            if end:
                if statement and not statement.startswith("."):
                    instructions.append(_instruction(statement, scopes[-1]))
                statement = ""
            elif statement.startswith("."):  # a directive without a semicolon
                statement = ""
    return instructions, labels, re.findall(r"\w+_param_\d+", entry[1])


def _scoped(label: str, scope: int) -> tuple[str, int]:
    return (label, 0 if label.startswith("$") else scope)


def _instruction(text: str, scope: int) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    assert found is not None, text
    parts = found[3].split(".")
    operands = [t.strip() for t in re.findall(r"(?:\[[^]]*\]|\{[^}]*\}|[^,[{])+", found[4])]
    label = _scoped(operands[0], scope) if parts[0] == "bra" else None
    run = OPS.get(parts[0])
    return Instruction(text, parts, operands, found[2], found[1] == "!", label, run)
