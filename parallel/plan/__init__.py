"""What a layout costs before a GPU is taken: memory of every pipeline stage, and the time of a step.

Arithmetic only: nothing here imports torch, numpy or anything of the launch. `hardware.py` holds facts of GPUs,
`shapes.py` what a model is, `layout.py` how it is spread and by which software, `memory.py` and `throughput.py` the two
models, `constants.py` the few numbers that are fitted to public measurements (by `bench/plan.py`), `search.py` the best
layouts, `rows.py` and `__main__.py` the same for CSV files of published measurements. A new GPU is a row in
`hardware.py`; a new software stack a row in `layout.py`.
"""
