"""Change, measure, save and load models, without training them."""
