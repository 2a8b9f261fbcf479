"""What every recipe composes to is kept as text, so that a review sees the effect of an edit to a YAML file."""

import pytest

from conf import load

RECIPES = ["business_module", "creative_module", "development_module", "foundation"]


def test_these_are_all_recipes():
    assert load.recipe_names() == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_composed_recipe_is_as_reviewed(recipe, assert_golden, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, cluster in (("rehearsal", "local"), ("full", "h200_ray")):
        config = load.compose([f"recipe={recipe}", f"cluster={cluster}"])
        assert config.scale == name
        load.write(config, tmp_path / "config.json")
        assert_golden(f"config/{recipe}.{name}.json", (tmp_path / "config.json").read_text())
