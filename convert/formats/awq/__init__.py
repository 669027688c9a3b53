"""The layouts of AutoAWQ and of MIT's llm-awq."""
