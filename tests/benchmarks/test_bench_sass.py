"""Main loops and epilogues of SASS written by hand, in the form that nvdisasm prints."""

import pytest

from benchmarks.resources.sass import PIPE_CYCLES, Flow, epilogues, parse

# A persistent kernel: items (.L_item), tiles (.L_tile), blocks of K (.L_main, which waits in
# .L_wait and goes on in .L_go), one product peeled off behind the main loop.
KERNEL = """
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_item:
        /*0010*/                   IMAD R0, R1, R2, RZ ;
.L_tile:
        /*0020*/                   MOV R3, RZ ;
.L_main:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2] ;
        /*0040*/              @!P1 BRA `(.L_wait) ;
.L_go:
        /*0050*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0060*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*0070*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0080*/               @P0 BRA `(.L_main) ;
        /*0090*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*00a0*/                   FMNMX R4, R24, R25, !PT ;
        /*00b0*/                   FADD R5, R24, -R4 ;
        /*00c0*/               @P3 MUFU.EX2 R5, R5 ;
        /*00d0*/                   NOP ;
        /*00e0*/               @P1 BRA `(.L_tile) ;
        /*00f0*/                   STG.E desc[UR4][R2.64], R5 ;
        /*0100*/               @P2 BRA `(.L_item) ;
        /*0110*/                   EXIT ;
.L_wait:
        /*0120*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2] ;
        /*0130*/              @!P1 BRA `(.L_wait) ;
        /*0140*/                   BRA `(.L_go) ;
.L_end:
        /*0150*/                   BRA `(.L_end);
.L_after:
"""


def test_the_epilogue_is_the_tiles_loop_without_the_main_loop():
    (found,) = epilogues(KERNEL)
    # MOV, FMNMX, FADD, MUFU, BRA: no NOP, no product, nothing of the item or of the main loop.
    assert found.counts == {"alu": 2, "fma": 1, "mufu": 1, "issue": 5}
    assert found.matrix == 1
    assert found.cycles(2) == {"alu": 8, "fma": 2, "mufu": 16, "issue": 10}


def test_a_wait_out_of_line_belongs_to_the_main_loop():
    flow = Flow(*parse(KERNEL))
    (main,) = flow.main_loops()
    waits = [x for x in flow.within(main) if x.name.startswith("SYNCS")]
    assert len(waits) == 2


def test_without_a_loop_of_tiles_the_rest_of_the_kernel_counts():
    text = KERNEL.replace("@P1 BRA `(.L_tile)", "    NOP").replace("@P2 BRA `(.L_item)", "    NOP")
    (found,) = epilogues(text)
    assert found.counts["issue"] == 5 - 1 + len(["LDC", "IMAD", "STG", "EXIT", "BRA .L_end"])


def test_unrolling_the_main_loop_changes_nothing():
    body = KERNEL.split(".L_go:\n")[1].split("        /*0080*/")[0]
    assert epilogues(KERNEL.replace(body, 4 * body)) == epilogues(KERNEL)


def test_specialised_warps_have_an_epilogue_each():
    """The second group is reached through a table alone."""
    second = KERNEL.replace(".L_", ".L_second_").replace("FADD", "FMUL R6, R6, R6 ;\n /*0*/ FADD")
    text = KERNEL.replace("EXIT ;", "BRX R2 -0xb930 ;") + second
    first, other = epilogues(text)
    assert (first.counts["issue"], other.counts["issue"]) == (5, 6)


def test_without_matrix_instructions_there_is_no_main_loop():
    assert epilogues(KERNEL.replace("HGMMA.64x256x16.F32.BF16", "FFMA")) == []


@pytest.mark.parametrize(
    ("line", "family", "guarded", "target"),
    [
        ("@!P1 BRA `(.L_x_0)", "BRA", True, ".L_x_0"),
        ("BRA `(.L_x_0)", "BRA", False, ".L_x_0"),
        ("BRA P0, `(.L_x_0)", "BRA", True, ".L_x_0"),
        ("@UP2 UIADD3 UR4, UR4, 0x1, URZ", "UIADD3", True, None),
        ("BSSY B0, `(.L_x_0)", "BSSY", False, None),
    ],
)
def test_parse(line, family, guarded, target):
    (found,), labels = parse(f"        /*0000*/  {line} ;\n.L_x_0:\n")
    assert (found.family, found.guarded, found.target) == (family, guarded, target)
    assert labels == {".L_x_0": 1}


def test_every_pipe_has_a_rate():
    assert {pipe for e in epilogues(KERNEL) for pipe in e.counts} <= set(PIPE_CYCLES)
