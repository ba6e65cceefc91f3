"""Find matrix products in machine code whose operand addresses depend on kernel parameters.

ptxas 12.8, which Triton ships for sm_90, at times adds to the wrong uniform register where two
wgmma descriptors share a base: the descriptor then holds a parameter's bits, and the product reads
from a wrong address. `stray_descriptors` finds such products, also on sm_100, which has another
ptxas. It tracks integer registers through all branches; values loaded from memory or computed from
floats are taken not to depend on parameters.
"""

import re

_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][\w.]*)\s*(.*?);")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_REGISTER = re.compile(r"\b(U?R)(\d+)\b")
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")
_FIRST_PARAMETER = {90: 0x210, 100: 0x380}  # offset in constant bank 0
# Instructions with integer results made of their operands; no other result holds a parameter.
_COPYING = set(
    "IADD3 UIADD3 IADD IMAD UIMAD LEA ULEA MOV UMOV R2UR SHF USHF LOP3 ULOP3 SEL USEL VIADD SGXT "
    "USGXT PRMT UPRMT ULDC LDC LDCU IABS VIMNMX UVIMNMX IMNMX SHFL".split()
)
_NO_RESULT = set("ST STG STS STL STSM RED BAR BRA EXIT HGMMA UTMALDG UTMASTG SYNCS".split())
_WIDTHS = ((".128", 4), ("HMMA", 4), (".64", 2), (".WIDE", 2), ("CS2R", 2))


def stray_descriptors(sass: str, arch: int) -> int:
    """Count the products in `nvdisasm -c` code (sm_90, sm_100) with addresses from parameters."""
    code, labels = _parse(sass)
    parameters = _FIRST_PARAMETER[arch]
    before: list[frozenset[str] | None] = [None] * (len(code) + 1)
    todo, stray = [(0, frozenset[str]())], set()
    while todo:
        i, state = todo.pop()
        known = before[i]
        state = state if known is None else state | known
        if i == len(code) or state == known:
            continue
        before[i] = state
        predicate, op, operands = code[i]
        name = op.partition(".")[0]
        if name.endswith("MMA") and not _addresses(name, operands).isdisjoint(state):
            stray.add(i)
        if name == "BRA":
            target = re.search(r"\.L_x_\d+", operands)
            if target:
                todo.append((labels[target.group()], state))
            # A branch may be conditional on a uniform predicate among its operands.
            if predicate is None and "UP" not in operands.partition("`")[0]:
                continue
        elif name == "EXIT" and predicate is None:
            continue
        todo.append((i + 1, _after(state, predicate, op, operands, parameters)))
    return len(stray)


def _parse(sass: str) -> tuple[list[tuple[str | None, str, str]], dict[str, int]]:
    """(predicate, operation, operands) of each instruction, and the index that each label marks.

    Instructions of the elected thread, which issues the product too, get no predicate.
    """
    code, labels, elected = [], {}, ""
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)], elected = len(code), ""
        elif found := _LINE.match(line):
            predicate, op, operands = found.groups()
            if op == "ELECT":
                elected = operands.partition(",")[0]
            elif elected and re.match(rf"{elected}\b", operands):
                elected = ""
            elif predicate == elected and op.partition(".")[0] not in ("BRA", "EXIT"):
                predicate = None
            code.append((predicate, op, operands.strip()))
    return code, labels


def _addresses(name: str, operands: str) -> set[str]:
    """The registers that hold the addresses of a product's operands.

    wgmma has four, of which the first two describe A and are unused if A comes from registers;
    tcgen05 has two for each descriptor, and one for each operand in tensor memory.
    """
    if name != "HGMMA":
        found = re.findall(r"(gdesc|tmem|idesc)\[UR(\d+)\]", operands)
        return {f"UR{int(n) + i}" for kind, n in found for i in range(1 + (kind == "gdesc"))}
    described = set()
    for found in re.finditer(r"gdesc\[UR(\d+)\]", operands):
        first, both = int(found.group(1)), operands.split(",")[1].lstrip().startswith("gdesc")
        described |= {f"UR{r}" for r in range(first if both else first + 2, first + 4)}
    return described


def _after(
    state: frozenset[str], predicate: str | None, op: str, operands: str, parameters: int
) -> frozenset[str]:
    """The registers that depend on parameters after an instruction."""
    name = op.partition(".")[0]
    parts = [p.strip() for p in operands.split(",")]
    while parts and re.match(r"U?P[0-9T]", parts[0]):
        parts.pop(0)
    result = _REGISTER.match(parts[0]) if parts else None
    if name in _NO_RESULT or result is None:
        return state
    width = next((n for word, n in _WIDTHS if word in op), 1)
    kind, first = result.group(1), int(result.group(2))
    results = {f"{kind}{first + i}" for i in range(width)}
    sources = ",".join(parts[1:])
    depends = name in _COPYING and (
        any(int(c, 16) >= parameters for c in _CONSTANT.findall(sources))
        or any(
            f"{kind}{int(n) + i}" in state
            for kind, n in _REGISTER.findall(sources)
            for i in range(2 if ".64" in op else 1)
        )
    )
    if depends:
        return state | results
    return state if predicate else state - results
