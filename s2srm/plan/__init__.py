"""Memory, time and what fits, before anything is rented: `s2srm plan`.

The bytes of a pass through a model are counted on the meta device, where the real code runs without
weights or memory (`tracing`, `passes`); everything else is arithmetic in functions that state their
formula (`states`, `phases`, `flops`, `timing`, `fit`).
"""
