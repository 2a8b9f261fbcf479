"""One model on many ranks: the mesh and its groups, the model, and the engines that take steps with it.

`engine.py` is the seam to the training loop and `make_engine` the way in. Nothing here knows of recipes, stages, run
directories or files. A new engine is a file that implements `Engine` and a case in `make_engine`; a new loss implements
`Objective` (see `loss.py`); a new kind of weight is named in `weight_names.py`. `mesh.py`, `boxes.py` and
`weight_names.py` are arithmetic and import no torch.
"""
