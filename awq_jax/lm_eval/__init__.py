"""EleutherAI's lm-eval with our models: ``python -m awq_jax.lm_eval --model awq-jax --model_args pretrained=DIR ...``.

`scoring` and `settings` know nothing of lm-eval; `lm` is the class that it calls, and `command` its command line.
"""
