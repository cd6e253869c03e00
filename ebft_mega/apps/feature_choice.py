"""Which frozen feature network a model is evaluated with. No torch."""

from dataclasses import dataclass
from pathlib import Path

from ebft_mega.config.schema import RunConfig


@dataclass(frozen=True)
class FeatureChoice:
    """A feature network's directory, and who named it."""

    directory: Path
    key: str  # an option or a key of the configuration
    note: str = ""  # where nothing names the network that a run would use

    @property
    def words(self) -> str:
        """One line that says which network is used."""
        return f"feature network: {self.directory} ({self.key})"


def choose_feature_network(
    given: Path | None, config: RunConfig | None, config_name: str, model: Path
) -> FeatureChoice:
    """Choose the network that a run of a configuration has: `ebft.feature_model`, else its initial model.

    Args:
        given: by a person, who wins; None: nothing is.
        config: of a run; None: there is none.
        config_name: what it is called in a note.
        model: that is evaluated; it stands in where nothing else is known.
    """
    if given is not None:
        return FeatureChoice(given, "--feature-model")
    if config is not None and config.ebft.feature_model is not None:
        return FeatureChoice(config.ebft.feature_model, "ebft.feature_model")
    if config is not None and config.model.init_from is not None:
        return FeatureChoice(config.model.init_from, "model.init_from")
    why = "there is no --config" if config is None else f"the initial model of {config_name} has random weights"
    note = (
        f"the model itself gives the features, since {why}; a run compares with its initial model. "
        "Name one --feature-model for all models that are to be compared"
    )
    return FeatureChoice(model, "--model", note)
