"""What a run leaves on disk and shows: state, folder, log, trackers, plots."""
