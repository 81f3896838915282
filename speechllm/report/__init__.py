"""What a run tells: metrics files, the progress line, and the summary of finished runs."""
