"""State, folder, log, trackers and plots of a run."""
