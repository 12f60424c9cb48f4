"""Look at a model without changing it: which layers run, in which order, and who uses their outputs."""
