"""All models whose scale groups are written down by hand."""

import expert_models
import stacked_models
import user_models

MODELS = user_models.MODELS | stacked_models.MODELS | expert_models.MODELS
