"""config.json of transformers, read into a ModelConfig."""
