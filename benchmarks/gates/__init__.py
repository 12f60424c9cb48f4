"""Area of arithmetic circuits by logic synthesis, for the area model in ``convert/cost/area.py``."""
