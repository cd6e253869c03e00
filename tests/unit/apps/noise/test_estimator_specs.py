"""How a command line names estimators, and what is refused."""

import pytest

from ebft_mega.apps.noise.estimator_specs import expanded_specs, read_specs, references
from ebft_mega.errors import ConfigError, InputError

PLAIN = {"ebft__use_whitening": False, "ebft__alignment": "inner_product", "ebft__embed_method": "mean_pooling"}


@pytest.fixture
def config(inputs):
    return inputs.write(**PLAIN, ebft__generate_max_len=4, ebft__context_length=4, ebft__stride=4)


def read(config, *texts, overrides=()):
    return read_specs(texts, config, overrides)


def refused(config, *texts, overrides=()):
    with pytest.raises((InputError, ConfigError)) as error:
        read(config, *texts, overrides=overrides)
    return str(error.value)


def test_settings_are_keys_of_the_section_or_options(config):
    plain, small, options = read(
        config,
        "rloo",
        "rloo:n=8,T=1,pooling=last_token,alignment=cosine",
        "token_critic:n=2,rank=3,leave_one_out_share=0",
        overrides=["ebft.temperature=0.9", "train.global_batch_size=4"],
    )
    assert (plain.name, plain.config.ebft.n_samples_per_prompt, plain.config.ebft.temperature) == ("rloo", 4, 0.9)
    ebft = small.config.ebft
    assert (ebft.n_samples_per_prompt, ebft.temperature, ebft.embed_method) == (8, 1.0, "last_token")
    assert ebft.alignment == "cosine" and small.config.train.global_batch_size == 4
    assert options.config.options["token_critic"].items() >= {"rank": 3, "leave_one_out_share": 0}.items()
    assert options.settings["options"]["rank"] == 3 and options.config.ebft.advantage_estimator == "token_critic"


def test_the_first_of_a_cell_is_the_reference(config):
    specs = read(config, "rloo", "rloo:n=8", "rloo:alignment=cosine", "rloo:T=1", "token_critic:T=1", "token_critic")
    assert references(specs) == [0, 0, 0, 3, 3, 0]
    assert [spec.gradient == specs[0].gradient for spec in specs] == [True, True, False, False, False, True]


def test_baselines_of_others_use_the_rollouts_of_rloo(config):
    (spec,) = read(config, "prefix_values:n=3")
    assert (spec.name, spec.config.ebft.advantage_estimator) == ("prefix_values", "rloo")
    assert "at least 3, with prefix_values" in refused(config, "prefix_values:n=2")
    assert "inner_product, with optimal_token_baseline" in refused(config, "optimal_token_baseline:alignment=cosine")
    whitened = refused(config, "optimal_token_baseline", overrides=["ebft.use_whitening=true"])
    assert "false, with optimal_token_baseline" in whitened


def test_every_choice_that_an_estimator_does_not_make_itself():
    texts = expanded_specs(("rloo", "rloo:n=2,x=[1,2]"), {"n": [4, 8], "T": [0.6, 1.0], "pooling": None})
    assert texts == (
        "rloo:n=4,T=0.6",
        "rloo:n=4,T=1",
        "rloo:n=8,T=0.6",
        "rloo:n=8,T=1",
        "rloo:n=2,x=[1,2],T=0.6",
        "rloo:n=2,x=[1,2],T=1",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rlo", "Did you mean 'rloo'?"),
        ("rloo:n", "NAME:KEY=VALUE"),
        ("rloo:n=4,n=5", "n twice"),
        ("rloo:temprature=1", "Did you mean 'temperature'?"),
        ("rloo:n=0", "ebft.n_samples_per_prompt"),
        ("token_critic:alignment=cosine", "inner_product"),
        ("rloo:advantage_estimator=reinforce", "a key of the section ebft"),
    ],
)
def test_what_is_wrong_is_said_with_the_estimator(config, text, words):
    message = refused(config, "rloo:T=2", text)
    assert words in message and f"--estimators {text}" in message


def test_an_estimator_is_named_once(config):
    assert "rloo twice" in refused(config, "rloo", "rloo")
