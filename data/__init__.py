"""From stored bytes to batches: prepared datasets, an order that is arithmetic, batches for each data rank.

Knows nothing of models, devices, meshes or steps of an optimizer, and never imports torch; Ray only in `runners.py`,
when large text is prepared. A new kind of input file goes into `documents.py` (topics are `kafka.py`), a new step from
text to tokens into `steps.py` (a pure function of the document), a new place to read datasets from into `storage.py`, a
new rule of order into `order.py` or `mix.py` (pure functions of a position).
"""
