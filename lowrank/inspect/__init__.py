"""What a user looks at: before training the rows as the model will read them, after it what adapters have learnt."""

from lowrank.inspect.data import COLORS, MARKS, data_masks, wants_color
from lowrank.inspect.spectra import Spectra, spectra

__all__ = ["COLORS", "MARKS", "Spectra", "data_masks", "spectra", "wants_color"]
