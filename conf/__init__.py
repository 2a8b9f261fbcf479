"""What a run is: configuration groups in YAML, the frozen dataclasses they must fit, and the way from one to the other.

Knows nothing of torch, Ray or any other package of the project. A new option of a group is a YAML file in its folder; a
new setting is a field in `schema/` and a value in the group's YAML; a rule between fields goes to `recipes/check.py`.
"""
