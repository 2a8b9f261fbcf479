"""What a recipe is made of: the driver, the checks before launch, and one file a stage.

A stage is a function from checkpoint to checkpoint (`stage.py`). A new one is a config dataclass in `conf/schema/`, a
YAML in `conf/stage/`, a function in a file here, and a case in `run.py`.
"""
