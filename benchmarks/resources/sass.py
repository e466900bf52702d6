"""Where a kernel's main loop lies in its SASS, and what a scheduler issues for a tile outside it.

Read from `nvdisasm -c`: basic blocks, the edges between them, dominators, natural loops. A main
loop is an innermost loop with a matrix instruction, however far it is unrolled or pipelined; the
loop around it is the tile's, and what the second has and the first has not is the epilogue, with
whatever of a pipeline is peeled off the main loop. Without a loop around it the epilogue is the
rest of the kernel. A branch counts as taken: cycles are an upper bound.

Left out: latencies and stalls, which the time model assumes; the order of instructions.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MATRIX_INSTRUCTION = re.compile(r"(?:HMMA|HGMMA|UTC\w*MMA|DMMA)[\w.]*")
_LINE = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>.*);"
)
_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
# Control does not pass these, unless they are predicated.
_ENDS = ("EXIT", "BRA", "RET", "BRX", "JMP", "BRK")

# Cycles for which one instruction of a warp holds a pipe of one of the four schedulers of an sm_90
# multiprocessor: 32 lanes over the results a cycle of the CUDA C++ Programming Guide, table
# "Throughput of Native Arithmetic Instructions", compute capability 9.0, divided by four.
PIPE_CYCLES = {"fma": 1, "alu": 2, "mufu": 8, "shuffle": 4, "convert": 2, "issue": 1}
_PIPES = {
    "mufu": {"MUFU", "FRND", "F2I", "I2F", "F2F"},
    "fma": {"FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2", "IMAD", "IMUL"},
    "convert": {"F2FP", "I2FP", "POPC"},
    "shuffle": {"SHFL", "REDUX", "VOTE", "MATCH"},
    "alu": {
        *("FSETP", "FSEL", "FMNMX", "FMNMX3", "FSET", "FCHK", "ISETP", "SEL", "IMNMX", "VIMNMX"),
        *("VIMNMX3", "VIADD", "VIADDMNMX", "IADD3", "LOP3", "PLOP3", "SHF", "PRMT", "LEA", "MOV"),
        *("P2R", "R2P", "IABS", "BMSK", "SGXT"),
    },
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names}


@dataclass(frozen=True)
class Instruction:
    """name with its modifiers, without a guard; target: the label that it may branch to."""

    name: str
    guarded: bool
    target: str | None

    @property
    def family(self) -> str:
        """The name without modifiers."""
        return self.name.split(".")[0]

    @property
    def matrix(self) -> bool:
        """Whether it is one of the tensor cores'."""
        return MATRIX_INSTRUCTION.fullmatch(self.name) is not None


@dataclass(frozen=True)
class Epilogue:
    """Instructions that a warp issues for a tile outside its main loop, by pipe.

    "issue" has all of them. matrix: those of the tensor cores that were peeled off the main loop,
    which count in none.
    """

    counts: Mapping[str, int]
    matrix: int

    def cycles(self, warps: int) -> dict[str, int]:
        """By pipe: the cycles of a scheduler that has `warps` of the warps that share a tile."""
        return {name: warps * n * PIPE_CYCLES[name] for name, n in self.counts.items()}


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """`nvdisasm -c` of one kernel -> its instructions, and the index that each label stands at."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _LINE.match(line):
            target = _TARGET.search(match["rest"])
            name = match["name"]
            branches = name.startswith(("BRA", "JMP")) and target is not None
            # A predicate may also be an operand: `BRA P0, ...`, `BRA.DIV UR4, ...`.
            guarded = match["guard"] is not None or (
                branches and re.match(r"\s*!?U?[PR]", match["rest"]) is not None
            )
            found.append(Instruction(name, guarded, target[1] if branches and target else None))
    return found, labels


class Flow:
    """Basic blocks of a kernel, as slices of its instructions, and its natural loops.

    loops: header -> blocks of the loop; two loops with one header count as one.
    """

    def __init__(self, instructions: Sequence[Instruction], labels: Mapping[str, int]) -> None:
        self.instructions = instructions
        size = len(instructions)
        starts = {0, *(at for at in labels.values() if at < size)}
        starts |= {i + 1 for i, x in enumerate(instructions[:-1]) if _leaves(x)}
        bounds = [*sorted(starts), size]
        self.blocks = [range(a, b) for a, b in itertools.pairwise(bounds)]
        at = {block.start: i for i, block in enumerate(self.blocks)}
        self.edges: list[list[int]] = []
        for i, block in enumerate(self.blocks):
            last = instructions[block[-1]]
            follows = [] if _leaves(last) and not last.guarded else [i + 1]
            if last.target is not None and labels[last.target] in at:
                follows.append(at[labels[last.target]])
            self.edges.append([j for j in follows if j < len(self.blocks)])
        self.loops = self._natural_loops()

    def _natural_loops(self) -> dict[int, set[int]]:
        # Specialised warps are sent to their code by a table (BRX): each piece is an entry.
        entries = [0]
        reached = _reachable(self.edges, 0)
        for block in range(len(self.blocks)):
            if block not in reached:
                entries.append(block)
                reached |= _reachable(self.edges, block)
        dominators = _dominators([*self.edges, entries], len(self.edges))
        before: list[list[int]] = [[] for _ in self.blocks]
        for i, follows in enumerate(self.edges):
            for j in follows:
                before[j].append(i)
        loops: dict[int, set[int]] = {}
        for i, follows in enumerate(self.edges):
            for header in follows:
                if header not in dominators[i]:
                    continue
                body = loops.setdefault(header, {header})
                waiting = [i]
                while waiting:
                    block = waiting.pop()
                    if block not in body:
                        body.add(block)
                        waiting += before[block]
        return loops

    def within(self, blocks: Iterable[int]) -> list[Instruction]:
        """The instructions of some blocks."""
        return [self.instructions[i] for block in blocks for i in self.blocks[block]]

    def main_loops(self) -> list[set[int]]:
        """The innermost loops with a matrix instruction."""
        matrix = [body for body in self.loops.values() if any(x.matrix for x in self.within(body))]
        return [body for body in matrix if not any(other < body for other in matrix)]


def epilogues(text: str) -> list[Epilogue]:
    """The epilogue around each main loop of `nvdisasm -c`; none without matrix instructions.

    A kernel with specialised warps has several main loops, each in a loop of its own.
    """
    flow = Flow(*parse(text))
    found: list[Epilogue] = []
    for main in flow.main_loops():
        around = [body for body in flow.loops.values() if main < body]
        tile = min(around, key=len) if around else set(range(len(flow.blocks)))
        others = flow.within(tile - main)
        counts = Counter(pipe for x in others if not x.matrix and (pipe := _PIPE_OF.get(x.family)))
        counts["issue"] = sum(not x.matrix and x.family != "NOP" for x in others)
        found.append(Epilogue(counts, sum(x.matrix for x in others)))
    return found


def _leaves(instruction: Instruction) -> bool:
    return instruction.family in _ENDS


def _reachable(edges: Sequence[Sequence[int]], entry: int) -> set[int]:
    seen, waiting = {entry}, [entry]
    while waiting:
        for following in edges[waiting.pop()]:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return seen


def _dominators(edges: Sequence[Sequence[int]], entry: int) -> dict[int, set[int]]:
    """Of every block: those on each way to it from the entry, itself included."""
    order = sorted(_reachable(edges, entry) - {entry})
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in (entry, *order):
        for following in edges[block]:
            before[following].append(block)
    dominators = {block: {entry, *order} for block in order} | {entry: {entry}}
    changed = True
    while changed:
        changed = False
        for block in order:
            new = set.intersection(*(dominators[b] for b in before[block])) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators
