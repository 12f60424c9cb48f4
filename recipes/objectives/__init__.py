"""Losses: named terms on labels, the teacher's predictions and its features, and their weighted sum."""
