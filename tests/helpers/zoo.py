"""All models whose scale groups are written down by hand."""

import stacked_models
import user_models

MODELS = user_models.MODELS | stacked_models.MODELS
