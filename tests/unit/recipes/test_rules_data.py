"""Rules of the data plane: what each refuses, and in which words."""

import pytest
from check_samples import LAPTOP, assert_told, changed, problems_of, rehearsal

from conf.schema import DiskTierConfig, MemoryTierConfig, MixtureChange, RedisTierConfig, SourceConfig
from recipes import check


def tiered(*tiers, **values):
    return rehearsal("foundation", data__tiers=tiers, **values)


def test_unknown_schemes_are_told():
    config = rehearsal("foundation")
    source = SourceConfig(path="hdfs://host/business")
    assert_told(
        changed(config, data__sources__business=source), "data.sources.business.path", "unknown scheme", "s3://"
    )
    source = SourceConfig(path="kafka://host:9092/business")
    assert_told(changed(config, data__sources__business=source), "data.sources.business.path", "data.prepare")


def test_a_tier_smaller_than_the_working_set_is_told():
    small = tiered(MemoryTierConfig(kind="memory", num_bytes=1 << 20))
    assert_told(small, "data.tiers[0].num_bytes", "memory tier of 1.0 MiB", "must hold that")
    assert problems_of(tiered(MemoryTierConfig(kind="memory", num_bytes=1 << 34))) == {}
    wide = tiered(DiskTierConfig(kind="disk", path="blocks", num_bytes=1 << 30), data__shuffle__window_blocks=4096)
    assert_told(wide, "data.tiers[0].num_bytes", "disk tier of 1.0 GiB")


def test_passwords_and_placeholders_in_tiers_are_told():
    def redis(url):
        return tiered(RedisTierConfig(kind="redis", url=url, num_bytes=1 << 40))

    found = problems_of(redis("redis://:secret@host:6379"))
    assert "REDIS_PASSWORD" in found["data.tiers[0].url"] and "secret" not in str(found)
    assert_told(redis("redis://YOUR-REDIS:6379"), "data.tiers[0]", "is still redis://YOUR-REDIS:6379")


def test_a_tier_inside_a_source_is_told(tmp_path):
    config = tiered(DiskTierConfig(kind="disk", path=str(tmp_path / "set/tier"), num_bytes=1 << 34))
    config = changed(config, data__sources__business=SourceConfig(path=str(tmp_path / "set")))
    assert_told(config, "data.tiers[0].path", "inside source 'business'")


def test_mixture_changes_ascend_and_name_sources():
    changes = tuple(MixtureChange(from_fraction=at, mixture={"business": 1.0}) for at in (0.9, 0.5))
    config = rehearsal("foundation", stages__pretrain__training__mixture_changes=changes)
    assert_told(config, "stages.pretrain.training.mixture_changes", "each must begin after the one before")
    # Both begin at the last of the steps.
    steps = config.stages["pretrain"].training.num_steps
    late = tuple(MixtureChange(from_fraction=1 - at / steps, mixture={"business": 1.0}) for at in (1.3, 1.0))
    config = rehearsal("foundation", stages__pretrain__training__mixture_changes=late)
    assert_told(config, "stages.pretrain.training.mixture_changes", f"begin at steps [{steps - 1}, {steps - 1}]")
    unknown = (MixtureChange(from_fraction=0.5, mixture={"busines": 1.0}),)
    config = rehearsal("foundation", stages__pretrain__training__mixture_changes=unknown)
    assert_told(config, "stages.pretrain.training.mixture", "no source 'busines'")


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"data__shuffle__window_blocks": 4}, "data.shuffle.window_blocks"),
        (
            {"stages__pretrain__training__mixture": {"business": 1.0, "creative": 1e-5}},
            "stages.pretrain.training.mixture",
        ),
        ({"data__shuffle__lanes": 1, "engine__mesh__data": 2}, "data.shuffle.lanes"),
    ],
)
def test_narrow_shuffles_are_warned_of(values, path):
    warned = check.warnings(rehearsal("foundation", **values), LAPTOP)
    assert path in {problem.path for problem in warned}
