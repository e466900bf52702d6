"""Every shipped recipe fits what its header says: `# Fits: 8 x h100, or 1 x cpu with 40GiB`."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from s2srm.commands.parsing import RECIPES, parse, recipe_names
from s2srm.commands.plan import find_stage, parse_memory
from s2srm.commands.stages import STAGES
from s2srm.plan.devices import DEVICES, GIB
from s2srm.plan.fit import Fitting
from s2srm.plan.lengths import find_lengths
from s2srm.plan.models import Place

CPU = replace(DEVICES["h100"], context=0.0, ranks=0.0, reserve=0.0, is_cpu=True)
LIBRARIES = 0.6 * GIB
CLAIM = re.compile(r"(\d+) x (\w+)(?: with (\w+))?")


def claims(recipe):
    text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    header = re.search(r"^# Fits: (.*)$", text, re.MULTILINE)
    assert header, f"{recipe} does not say what it fits"
    return CLAIM.findall(header[1])


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_recipe_fits_what_its_header_says(recipe):
    stage = find_stage(["--config", recipe])
    cfg = parse(STAGES[stage].config, ["--config", recipe], stage, "")
    found = claims(recipe)
    assert found
    for ranks, name, size in found:
        device = CPU if name == "cpu" else DEVICES[name]
        memory = parse_memory(size) if size else device.memory
        place = Place(device, int(ranks), LIBRARIES)
        fitting = Fitting(cfg, place, find_lengths(cfg), memory)
        assert fitting.peak() <= memory, (name, fitting.peak() / GIB, fitting.moments())
