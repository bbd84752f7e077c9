"""The registry and the tests' list name the same rules, so that none escapes the property tests."""

from hooked_recurrent.mixers.registry import MIXERS
from tests.hooked_recurrent.models import RULES, tiny_model


def test_every_rule_is_in_the_tests_list():
    assert set(MIXERS) == set(RULES)


def test_rules_and_configs_belong_together():
    for rule, mixer in MIXERS.items():
        assert mixer.Config.rule == rule
        model = tiny_model((rule, rule))
        assert type(model.cfg.mixer) is mixer.Config
        assert mixer.Config.from_dict(model.cfg.mixer.to_dict()) == model.cfg.mixer
        assert type(model.blocks[0].mixer) is mixer
