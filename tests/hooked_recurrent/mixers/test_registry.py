"""The registry, the configs and the tests' list name the same rules, so that none escapes the property tests."""

from hooked_recurrent.config import MIXER_CONFIGS
from hooked_recurrent.mixers.registry import MIXERS
from tests.hooked_recurrent.models import RULES, tiny_model


def test_every_rule_is_in_every_list():
    assert set(MIXERS) == set(MIXER_CONFIGS) == set(RULES)


def test_rules_and_configs_belong_together():
    for rule, config in MIXER_CONFIGS.items():
        assert config.rule == rule
        model = tiny_model((rule, rule))
        assert isinstance(model.cfg.mixer, config)
        assert type(model.cfg.mixer).from_dict(model.cfg.mixer.to_dict()) == model.cfg.mixer
        assert type(model.blocks[0].mixer) is MIXERS[rule]
