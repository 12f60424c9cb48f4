"""Losses: labels, the teacher's predictions, its blocks, and the teacher that trains alongside."""
