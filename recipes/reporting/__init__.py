"""The page about a saved model: facts, their HTML, charts and examples."""
