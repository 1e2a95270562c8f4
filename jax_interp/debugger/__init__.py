"""Why this token and not that one: nodes of one prompt and their effects on an objective, from `engine.debug` on."""
