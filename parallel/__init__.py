"""One model on many ranks: the mesh and its groups, the model, and the engines that take steps with it.

`engine.py` is the seam to the training loop and `make_engine` the way in. Nothing here knows of recipes, stages, run
directories or files. An engine is made of parts: `ShardedModel` (which boxes of which tensors this rank holds),
`Schedule` (micro-batches through a pipeline), `ForwardPasses` (what looking at a model tells) and `TrainingEngine` (a
step, agreed by all ranks). A new one makes a model trainable, accumulates gradients, and is a case in `make_engine`; a
new loss implements `Objective` (see `loss.py`); a new kind of weight is named in `weight_names.py`. `mesh.py`,
`boxes.py` and `weight_names.py` are arithmetic and import no torch.
"""
