"""The loop and its book-keeping: launching ranks, taking steps, checkpoints, records, the screen and the report.

Knows engines and streams by their seams only, and no stage: what a recipe is made of is in `recipes`. `loop.py` is the
place to start reading on a rank, `launch.py` in the driver. A new launcher goes beside `Gang` in `launch.py`.
"""
